"Another label scheme by a texture, for sets to come and for written ones; and the GPU of each process."

import subprocess
import sys

import numpy as np
import pytest
import torch
from test_flame_faces import home  # noqa: F401

from facelab.lab.parallel import local_device
from facelab.face.morphable import face_model
from facelab.lab.errors import InputError
from facelab.lab.files import write_json
from facelab.lab.images import write_image
from facelab.lab.paths import root
from facelab.synthforge import generate
from facelab.synthforge.annotated import SYNTH20, SYNTH20_FLIPS
from facelab.synthforge.generate import SynthSpec, generate_faces, write_part
from facelab.synthforge.relabel import relabel_shards
from facelab.synthforge.shard_set import read_shards
from facelab.synthforge.uv_labels import merge_uv_labels, open_uv_labels, uv_labels_of

THREE = ("nothing", "rest", "nose")


def write_texture(path, labels, **more):
    write_image(path, labels.ids)
    write_json(path.with_suffix(".json"), {"classes": list(labels.classes), "background": labels.classes[labels.background], "flips": [[labels.classes[a], labels.classes[b]] for a, b in labels.flips], **more})
    return path


@pytest.fixture(scope="module")
def coarse():
    return merge_uv_labels(uv_labels_of(face_model("procedural")), {name: "nose" if name == "nose" else "rest" for name in SYNTH20[:19]}, THREE, "nothing")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return generate_faces(SynthSpec(3, size=40, supersample=1, each=2), tmp_path_factory.mktemp("plain") / "set", every=1e9)


def test_a_run_labels_by_the_named_texture(plain, coarse, tmp_path):
    spec = SynthSpec(3, size=40, supersample=1, each=2, uv_labels=str(write_texture(tmp_path / "three.png", coarse)))
    data = generate_faces(spec, tmp_path / "set", every=1e9)
    assert data.classes == THREE and data.plan.background == 0 and data.flips == () and data.plan.recipe["uv_labels"] == coarse.sha() and "uv_labels" not in plain.plan.recipe
    for at in range(3):
        old, new = plain[at], data[at]
        assert np.array_equal(old.image, new.image) and np.array_equal(new.labels == 2, old.labels == 16) and np.array_equal(new.labels == 0, old.labels == 19)
    again = relabel_shards(plain.root, tmp_path / "three.png", tmp_path / "again", every=1e9)
    assert all(np.array_equal(again[at].labels, data[at].labels) for at in range(3))


def test_a_written_set_is_labelled_again_by_one_command(plain, tmp_path):
    "By its own texture nothing changes, whatever the number of processes."
    write_texture(tmp_path / "own.png", uv_labels_of(face_model("procedural")))
    done = subprocess.run([sys.executable, "-m", "facelab.synthforge.relabel", str(plain.root), str(tmp_path / "own.png"), str(tmp_path / "again"), "2"], capture_output=True, text=True, cwd=root())
    assert done.returncode == 0 and "3 faces in 20 classes" in done.stdout, done.stderr
    again = read_shards(tmp_path / "again")
    for at in range(3):
        assert again.files(at) == plain.files(at)
    wrong = subprocess.run([sys.executable, "-m", "facelab.synthforge.relabel", str(plain.root)], capture_output=True, text=True, cwd=root())
    assert wrong.returncode == 1 and wrong.stderr.startswith("facelab: relabel") and "Traceback" not in wrong.stderr


def test_flames_faces_are_labelled_again_through_their_map(home, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("FACELAB_ASSETS", str(home))
    data = generate_faces(SynthSpec(2, "next3d-official", "code", 48), tmp_path / "set", every=1e9)
    assert len(data[0].facts["placed"]) == 12
    again = relabel_shards(data.root, home / "flame-labels" / "flame_seg_tex.png", tmp_path / "again", every=1e9)
    for at in range(2):
        a, b = data[at].labels, again[at].labels
        assert (a != 19).mean() > 0.05 and (a != b).mean() < 0.003


def test_a_face_that_does_not_tell_its_mesh_is_left_out(plain, coarse, tmp_path, monkeypatch):
    grey = generate_faces(SynthSpec(2, "facelab.synthforge.generate:grey_faces", size=16), tmp_path / "grey", every=1e9)
    write_texture(tmp_path / "three.png", coarse)
    with pytest.raises(InputError, match="generator 'grey'"):
        relabel_shards(grey.root, tmp_path / "three.png", tmp_path / "again", every=1e9)
    with pytest.raises(InputError, match="for it"):
        SynthSpec(2, "facelab.synthforge.generate:grey_faces", uv_labels=str(tmp_path / "three.png")).open()


@pytest.mark.parametrize("said", [{"classes": ["a"], "background": "b"}, {"classes": 3, "background": "a"}, {"classes": ["a", "b"], "background": "a", "flips": [["a", "c"]]}, {"classes": ["a", "b"], "background": "a", "colours": {"b": "xyz"}}, [1]])
def test_a_scheme_that_is_none_is_refused(coarse, tmp_path, said):
    write_image(tmp_path / "t.png", coarse.ids)
    write_json(tmp_path / "t.json", said)
    with pytest.raises(InputError, match="t.json|t.png"):
        open_uv_labels(tmp_path / "t.png")


def test_flips_of_a_scheme_are_names(tmp_path):
    found = open_uv_labels(write_texture(tmp_path / "own.png", uv_labels_of(face_model("procedural"))))
    assert found.flips == SYNTH20_FLIPS and found.classes == SYNTH20


def test_each_process_has_its_own_gpu(monkeypatch, tmp_path):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [str(local_device(name, k)) for name, k in (("cuda", 0), ("cuda", 3), ("cuda", 5), ("cpu", 3), ("cuda:2", 1))] == ["cuda:0", "cuda:3", "cuda:1", "cpu", "cuda:2"]
    seen, real = [], generate.open_generator
    monkeypatch.setattr(generate, "open_generator", lambda name, ranges, size, supersample, device: seen.append(device) or real(name, ranges, size, supersample, "cpu"))
    spec = SynthSpec(6, "facelab.synthforge.generate:grey_faces", size=16, each=2)
    for rank in range(2):
        write_part(spec, str(tmp_path / "one"), rank, 2, "cuda", 1e9)
    for name, value in {"WORLD_SIZE": "8", "RANK": "6", "LOCAL_RANK": "2"}.items():  # the second machine of two
        monkeypatch.setenv(name, value)
    generate_faces(spec, tmp_path / "two", 1, "cuda", 1e9)
    assert seen == ["cuda:0", "cuda:1", "cuda:2"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no GPU"):
        local_device("cuda")


