"EG3D trained on a folder or a zip of pictures: stopped, gone on, read back; and what is wrong with a set."

import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from facelab.lab.errors import InputError
from facelab.my3dgen.applications import yaw_cams
from facelab.my3dgen.eg3d_training import MIRRORED, LabelledPictures, main, nets_for, objective_for, train_on_pictures
from facelab.my3dgen.own_photos import label_points
from facelab.nets.eg3d import EG3DConfig, Generator
from facelab.nets.eg3d_convert import load_eg3d
from facelab.nets.eg3d_objective import EG3DObjective
from facelab.nets.stylegan2 import StyleGAN2Config
from facelab.nets.stylegan2_discriminator import DiscriminatorConfig
from facelab.nets.superres import SuperresConfig
from facelab.nets.volume import VolumeConfig

TINY = EG3DConfig(StyleGAN2Config(z_dim=8, w_dim=16, c_dim=25, size=16, out_channels=12, channels=(16, 16, 8)), VolumeConfig(6, 6), SuperresConfig(4, 8, (8, 8), (False, True)), 8, 8, orbit=(0.0, 0.0, 0.0))
NETS = TINY, DiscriminatorConfig(16, channel_base=64, channel_max=8, group=2)
HOW = EG3DObjective(raw_first=4, raw_last=8, raw_fade=0.02, density_every=2, r1_every=2, blur_sigma=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    top, rng, cams = tmp_path_factory.mktemp("set") / "faces", np.random.default_rng(0), yaw_cams(TINY, np.linspace(-0.5, 0.5, 6))
    (top / "00000").mkdir(parents=True)
    rows = []
    for k, cam in enumerate(cams):
        rows.append([f"00000/img{k:08d}.png", cam.tolist()])
        Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8)).save(top / rows[-1][0])
    (top / "00000" / "img00000004.png").write_bytes(b"no picture")
    (top / "dataset.json").write_text(json.dumps({"labels": rows}))
    with zipfile.ZipFile(top.with_suffix(".zip"), "w") as held:
        for path in top.rglob("*.*"):
            held.write(path, path.relative_to(top))
    return top


def test_folder_and_zip_are_one_set(folder):
    one, two = LabelledPictures(folder, 16), LabelledPictures(folder.with_suffix(".zip"), 16)
    assert one.names == two.names and len(one) == 6 and all(a.equal(b) for k in (0, 3, 5) for a, b in zip(one[k], two[k]))
    assert one.load(4)[0].equal(one[5][0]) and "img00000004" in one.skipped.items[0][0]
    with pytest.raises(InputError):
        one[4]


def test_a_mirrored_picture_is_seen_by_the_mirrored_camera(folder):
    some = LabelledPictures(folder, 16, mirror=True)
    (photo, cam), (turned, other) = some[1], some[7]
    assert turned.equal(photo.flip(-1)) and some.cams[7].equal(other) and len(some) == 12
    points = np.random.default_rng(0).normal(0, 40, (5, 3))
    there, here = label_points(other.numpy(), points * [-1, 1, 1], 16), label_points(cam.numpy(), points, 16)
    assert np.allclose(there, np.stack([16 - here[:, 0], here[:, 1]], 1), atol=1e-4) and MIRRORED.prod() == -1


def test_it_trains_is_stopped_and_goes_on(folder, tmp_path):
    pictures = LabelledPictures(folder, 16)
    how = dict(batch=4, how=HOW, nets=NETS, look=0.008, workers=0, device="cpu")
    whole = train_on_pictures(pictures, tmp_path / "a", kimg=0.016, **how)
    assert whole.steps == 4 and whole.curve["generator/loss"].notna().all()
    again = train_on_pictures(pictures, tmp_path / "a", kimg=0.016, **how)
    assert again.resumed == 4, "a finished run is found"
    net = load_eg3d(tmp_path / "a")
    assert net.config == TINY and torch.equal(net.decoder.net[0].weight, whole.state_dict("generator")["decoder.net.0.weight"])
    assert {path.name for path in (tmp_path / "a").glob("*.png")} == {"heads_000000.png"}


@pytest.mark.parametrize("told", [True, False])
def test_it_begins_at_given_weights(folder, tmp_path, told):
    "As a finish of a distilled generator, whose mapping is told no camera and whose noise maps are learned."
    config = TINY if told else replace(TINY, backbone=replace(TINY.backbone, c_dim=0, train_noise=True))
    torch.manual_seed(5)
    start = Generator(config).eval().requires_grad_(False)
    before = {name: value.clone() for name, value in start.state_dict().items()}
    how, judge = replace(objective_for(config, True), density_every=2, r1_every=2), DiscriminatorConfig(16, channel_base=64, channel_max=8, group=2)
    assert (how.raw_first, how.raw_last, how.blur_sigma, how.swap, how.noise) == (8, 8, 0.0, *((0.5, "random") if told else (None, "const")))
    pictures = LabelledPictures(folder, 16)
    run = lambda name, how, **more: train_on_pictures(pictures, tmp_path / name, 0.008, batch=4, how=how, nets=(config, judge), workers=0, device="cpu", **more)
    still = run("still", replace(how, rate_generator=0.0), start=start).state_dict("generator")
    assert all(still[name].equal(before[name]) for name in before if not name.endswith("w_avg")), "it did not begin there"
    moved, fresh = run("moved", how, start=start), run("moved", how)
    far = lambda state: sum(float((state[name] - before[name]).square().sum()) for name in before if not name.endswith(("w_avg", "filter")))
    assert moved.resumed == fresh.resumed == 0 and 0 < far(moved.state_dict("generator")) < 0.1 * far(fresh.state_dict("generator"))
    assert run("moved", how, start=start).resumed == 2, "the same again is found again"
    assert all(start.state_dict()[name].equal(before[name]) for name in before) and not any(weight.requires_grad for weight in start.parameters())
    with pytest.raises(InputError, match="another configuration"):
        train_on_pictures(pictures, tmp_path / "other", nets=(replace(config, hidden=9), judge), start=start)


def test_a_set_that_is_none(tmp_path, folder, capsys):
    (tmp_path / "empty.zip").write_bytes(b"PK\x03\x04 cut")
    for path in (tmp_path, tmp_path / "empty.zip", tmp_path / "nowhere"):
        with pytest.raises(InputError):
            LabelledPictures(path, 16)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [["../../etc/passwd", yaw_cams(TINY, [0.0])[0].tolist()]]}))
    with pytest.raises(InputError, match="no picture with a camera"):
        LabelledPictures(tmp_path, 16)
    with pytest.raises(InputError, match="one size"):
        train_on_pictures(LabelledPictures(folder, 16), tmp_path / "out", nets=nets_for(128))
    assert main([str(tmp_path), str(tmp_path / "out"), "--size", "128"]) == 1 and main([str(folder), str(tmp_path / "out"), "--size", "100"]) == 1
    assert main([str(folder), str(tmp_path / "out"), "--size", "128", "--start", str(tmp_path / "nowhere")]) == 1
    assert "facelab: " in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_published_nets_for_every_size():
    for size, rays in ((128, 64), (256, 128), (512, 128)):
        config, judge = nets_for(size)
        assert (config.size, config.neural_size, judge.size) == (size, rays, size) and config.backbone.c_dim == 25
