"A licensed file is found by its structure; a missing or wrong one gives an error that says all that is needed to get it."

import pickle
import subprocess
import sys

import h5py
import numpy as np
import pytest
import scipy.io
from fixture_files import fixture

from facelab.lab.assets import ASSETS, assets_dir, find_asset, list_assets, main, shapes_in
from facelab.lab.errors import AssetError, InputError
from facelab.lab.files import write_json
from facelab.lab.paths import root


@pytest.fixture
def home(tmp_path, monkeypatch):
    "An empty $FACELAB_ASSETS."
    monkeypatch.setenv("FACELAB_ASSETS", str(tmp_path))
    return tmp_path


def test_the_registry_is_complete():
    "What the issue asks for is there, and each entry says what a user needs."
    for part in ("bfm2009", "bfm2017", "flame2020", "ict-facekit", "eg3d-ffhq512-128", "next3d", "arcface", "llava-1.5", "clip", "vqgan", "celeba", "celebamask-hq", "lapa", "300w", "raf-db", "laion-face"):
        assert any(name.startswith(part) for name in ASSETS), part
    for name, asset in ASSETS.items():
        assert asset.name == name and asset.what and asset.terms and asset.where and (asset.file or asset.holds)
        assert set(asset.papers) <= {"facegpt", "gptface", "synthforge", "my3dgen"} and asset.papers


def test_the_folder(home, monkeypatch):
    assert assets_dir() == home
    monkeypatch.delenv("FACELAB_ASSETS")
    assert assets_dir() == root() / "assets"


@pytest.mark.parametrize("name", sorted(ASSETS))
def test_a_missing_asset_says_everything(home, name, monkeypatch):
    "The file's name, where to get it, under which terms, where to put it."
    asset = ASSETS[name]
    if asset.fixture:
        monkeypatch.setenv("FACELAB_ROOT", str(home))  # away from the fixtures
        monkeypatch.delenv("FACELAB_FIXTURES", raising=False)
    with pytest.raises(AssetError) as error:
        find_asset(name)
    message = str(error.value)
    for part in (name, asset.file or next(iter(asset.holds)), asset.where, asset.terms, str(home / name)):
        assert part in message


def test_a_file_by_its_structure(home):
    "Right name and wrong arrays; then right arrays; then the same at a place that the user names."
    path = home / "flame-texture" / "FLAME_texture.npz"
    path.parent.mkdir()
    np.savez(path, mean=np.zeros(1), tex_dir=np.zeros(1), vt=np.zeros((5118, 3)), ft=np.zeros((9976, 3)))
    with pytest.raises(AssetError, match=r"vt has shape \(5118, 3\)"):
        find_asset("flame-texture")
    np.savez(path, mean=np.zeros(1), vt=np.zeros((5118, 2)), ft=np.zeros((9976, 3)))
    with pytest.raises(AssetError, match="tex_dir"):
        find_asset("flame-texture")
    np.savez(path, mean=np.zeros(1), tex_dir=np.zeros(1), vt=np.zeros((5118, 2)), ft=np.zeros((9976, 3)))
    assert find_asset("flame-texture") == path and find_asset("flame-texture", path) == path and find_asset("flame-texture", path.parent) == path
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(AssetError, match="broken"):
        find_asset("flame-texture")


def test_mat_and_h5_heads(home):
    "A file of the original's names and sizes is accepted from its heads; a cropped one is not taken for the full one."
    folder = home / "bfm2017-face12"
    folder.mkdir()
    with h5py.File(folder / "model2017-1_face12_nomouth.h5", "w") as file:  # data sets that were never written take no room
        for name, columns in (("shape", 199), ("expression", 100), ("color", 199)):
            file.create_dataset(f"{name}/model/pcaBasis", (85764, columns), "f4")
        file.create_dataset("shape/model/mean", (85764,), "f4")
        file.create_dataset("shape/representer/cells", (3, 10), "i4")
    found = find_asset("bfm2017-face12")
    with pytest.raises(AssetError, match=r"\(85764,\), not \(159447,\)"):
        find_asset("bfm2017", found)
    scipy.io.savemat(home / "small.mat", {"meanshape": np.zeros((1, 900))}, do_compression=True)
    assert shapes_in(home / "small.mat") == {"meanshape": (1, 900)}
    with pytest.raises(AssetError, match=r"\(1, 900\), not \(1, 107127\)"):
        find_asset("bfm2009-front", home / "small.mat")


def test_the_synthetic_model_is_not_taken_for_the_real_one():
    with pytest.raises(AssetError, match="107127"):
        find_asset("bfm2009-front", fixture("bfm09/BFM_model_front.mat"))


def test_pickles_by_head_and_size(home):
    path = home / "flame2020" / "generic_model.pkl"
    path.parent.mkdir()
    path.write_bytes(b"<html>please sign in</html>" * 50_000)
    with pytest.raises(AssetError, match="begins with b'<html>'"):
        find_asset("flame2020")
    path.write_bytes(pickle.dumps(0, 2))
    with pytest.raises(AssetError, match="at least 1,000,000 expected"):
        find_asset("flame2020")
    path.write_bytes(pickle.dumps(bytes(10**6), 2))
    assert find_asset("flame2020") == path == find_asset("flame")


def test_folders(home):
    "A data set or a Hugging Face model is a folder; alternatives count, and a config of another model does not."
    celeba = home / "celeba"
    for part in ("img_align_celeba",):
        (celeba / part).mkdir(parents=True)
    (celeba / "list_attr_celeba.csv").write_text("x")
    with pytest.raises(AssetError, match="list_eval_partition.txt or list_eval_partition.csv"):
        find_asset("celeba")
    (celeba / "list_eval_partition.txt").write_text("x")
    assert find_asset("celeba") == celeba
    clip = home / "clip-vit-l14-336"
    write_json(clip / "config.json", {"model_type": "vit"})
    (clip / "model.safetensors").write_bytes(b"x")
    with pytest.raises(AssetError, match="model_type = 'vit'"):
        find_asset("clip-vit-l14-336")
    (clip / "config.json").write_text("{")
    with pytest.raises(AssetError, match="line 1"):
        find_asset("clip-vit-l14-336")
    write_json(clip / "config.json", {"model_type": "clip"})
    assert find_asset("clip-vit-l14-336") == clip


def test_ict_is_found_among_the_fixtures(home):
    path = fixture("ict/ict_facekit.npz")
    assert find_asset("ict-facekit").read_bytes()[:100] == path.read_bytes()[:100]


def test_a_loop_is_an_asset_error(home):
    (home / "bfm2009").mkdir()
    (home / "bfm2009" / "01_MorphableModel.mat").symlink_to(home / "bfm2009" / "01_MorphableModel.mat")
    with pytest.raises(InputError):
        find_asset("bfm2009")


def test_the_list_prints(home, capsys):
    (home / "flame-masks").mkdir()
    (home / "flame-masks" / "FLAME_masks.pkl").write_bytes(b"GIF89a")
    states = {name: state for name, state, _ in list_assets()}
    assert states["bfm2009"] == "missing" and states["flame-masks"].startswith("wrong: it begins with")
    main([])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ASSETS) and str(home) in printed
    main(["bfm2017", "celeba"])
    printed = capsys.readouterr().out
    assert ASSETS["bfm2017"].terms in printed and "img_align" not in printed.splitlines()[0]
    with pytest.raises(SystemExit):
        main(["nonsense"])
    main(["flame", "clip-vit-l14-336", "flame-masks"])
    flames, masks = capsys.readouterr().out.split("\nclip-vit-l14-336\n")
    assert flames.splitlines()[0] == "flame2020" and "flame2023-open" in flames and "bytes or more" in flames and flames.count("  here       missing") == 2
    assert "model_type = 'clip'" in masks and "  here       wrong: it begins with" in masks
    main(["ict-facekit"])
    assert "the arrays" in capsys.readouterr().out


def test_the_command_runs(home):
    done = subprocess.run([sys.executable, "-m", "facelab.lab.assets"], capture_output=True, text=True, cwd=root())
    assert done.returncode == 0 and "bfm2009" in done.stdout and not done.stderr
