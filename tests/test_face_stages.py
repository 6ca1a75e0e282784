"The stages of the face as the paper profile runs them, on tiny stand-ins in the layouts of the licensed files."

import shutil
from dataclasses import replace

import pytest
import torch
from make_models import write_bfm2017

from facelab.face.fit import FitConfig, fit_light
from facelab.face.morphable import MorphableModel
from facelab.lab import run, table
from facelab.lab.assets import ASSETS
from facelab.lab.files import file_sha256, read_yaml
from facelab.lab.inputs import input_hash
from facelab.lab.paths import data_dir, root
from facelab.lab.record import Row
from facelab.lab.run import Job, Outcome, main
from facelab.lab.table import show
from facelab.nets.embedder import embedder_inputs
from facelab.nets.iresnet import IResNet, IResNetConfig
from facelab.tasks import fitting, verify


@pytest.fixture
def assets(tmp_path, monkeypatch):
    "BFM 2017 as Basel gives it (no list of 68 landmarks), ArcFace's file with few channels, 300-W and CelebA."
    home = tmp_path / "assets"
    monkeypatch.setenv("FACELAB_ASSETS", str(home))
    monkeypatch.setitem(ASSETS, "bfm2017", replace(ASSETS["bfm2017"], holds={}))
    monkeypatch.setitem(ASSETS, "arcface-r50-ms1mv3", replace(ASSETS["arcface-r50-ms1mv3"], min_bytes=1))
    for name in ("bfm2017", "arcface-r50-ms1mv3"):
        (home / name).mkdir(parents=True)
    write_bfm2017(MorphableModel.procedural().keep_modes(6, 4, 3), home / "bfm2017" / ASSETS["bfm2017"].file)
    torch.manual_seed(0)
    torch.save(IResNet(IResNetConfig((1, 1, 1, 1), (4, 4, 8, 8), 112, 16)).state_dict(), home / "arcface-r50-ms1mv3" / "backbone.pth")
    shutil.copytree(data_dir() / "300w", home / "300w")
    (home / "300w" / "afw").mkdir(exist_ok=True)
    (home / "celeba").symlink_to(data_dir() / "celeba")
    return home


def paper(stage, **small):
    values = read_yaml(root() / "profiles" / "paper" / f"{stage}.yaml")
    assert set(small) <= set(values)
    return Job(stage, "paper", {key: value for key, value in (values | small).items() if key != "profile"})


def test_face_fit_of_the_paper(assets):
    job = paper("face-fit", faces=2, steps=2, batch=1, size=48)
    assert job.model == "bfm2017" and job.embedder == "arcface" and job.data == "asset:300w"
    out = fitting.run(job)
    assert not out.not_run and {row.method for row in out.rows} >= {"mean face", "Eq. 5", "landmarks alone, our weights"}
    assert all(row.value == row.value for row in out.rows)
    files = {name: file_sha256(assets / name / ASSETS[name].file) for name in ("bfm2017", "arcface-r50-ms1mv3")}
    assert out.inputs == {"asset:300w": input_hash("asset:300w")} | {f"asset:{name}": value for name, value in files.items()}
    assert any("68 landmarks: carried over from procedural" in note for note in out.notes)


def test_a_model_that_is_not_here_is_not_run(assets):
    (assets / "bfm2017" / ASSETS["bfm2017"].file).unlink()
    out = fitting.run(paper("face-fit", faces=2, steps=2, size=48))
    assert not out.rows and "bfm2017" in str(out.not_run)


def test_verification_of_the_paper_names_its_weights(assets):
    out = verify.run(paper("face-verification", people=4, draws=3))
    weights = file_sha256(assets / "arcface-r50-ms1mv3" / "backbone.pth")
    assert out.inputs == {"asset:celeba": input_hash("asset:celeba"), "asset:arcface-r50-ms1mv3": weights} and out.rows
    assert embedder_inputs("base") == {"bases/identity": input_hash("bases/identity/model.safetensors")}


def test_the_baselines_light_a_batch_of_faces_at_a_time(monkeypatch):
    seen = []

    def light(model, code, images, skin, focal):
        seen.append((len(code), len(images), len(skin)))
        return fit_light(model, code, images, skin, focal)

    monkeypatch.setattr(fitting, "fit_light", light)
    faces = fitting.nasa_portrait(32)
    many = fitting.Faces(list("abcde"), faces.images.expand(5, -1, -1, -1), faces.landmarks_2d.expand(5, -1, -1))
    found = fitting.placed(MorphableModel.procedural(), many, FitConfig(landmark_steps=0, batch=2), torch.ones(5, 1, 32, 32))
    assert seen == [(2, 2, 2), (2, 2, 2), (1, 1, 1)] and found.light.shape == (5, 3, 9)
    assert torch.allclose(found.light, found.light[:1].expand_as(found.light), atol=1e-4) and found.light.std() > 0


def test_the_shell_prints_what_a_run_left_out(monkeypatch, capsys, tmp_path):
    "Notes, what was not run and why, and the seconds of a part: as `make repro` prints them at its end."
    found = Outcome([Row("Eq. 5", "photo error", 0.1, n=2)], not_run={"BFM 2017": "no file"}, notes=["1 of 3 photos left out"], seconds={"a face": 1.5})
    monkeypatch.setattr(run, "named_function", lambda name: lambda job: found)
    monkeypatch.setattr(run, "save_results", lambda *parts: None)
    assert main(["face-fit", "--profile", "smoke", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "face-fit (smoke profile, smoke)" and lines[-4:-1] == ["note: 1 of 3 photos left out", "note: BFM 2017 was not run: no file", "time here: 1.5 s a face"]


def test_a_record_that_this_machine_did_not_make_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(table, "root", lambda: tmp_path)
    (tmp_path / "results").mkdir()
    shutil.copytree(root() / "results" / "face-verification", tmp_path / "results" / "face-verification")
    show()
    assert "committed record; not run here" in capsys.readouterr().out
    (tmp_path / "build" / "records").mkdir(parents=True)
    (tmp_path / "build" / "records" / "face-verification.json").write_text('{"seconds": 61.2}')
    show()
    out = capsys.readouterr().out
    assert "took 61 s here" in out and "not run here" not in out
