"What papers share lies below them: models and embedders by name, cropped faces, the people of the shipped data set."

import numpy as np
import pytest
import torch

from facelab.data.embedded import Recipe
from facelab.data.faces import CROP_SCALE, nasa_portrait, square_crop, w300_faces
from facelab.data.person import sample_person
from facelab.data.w300 import write_pts
from facelab.face.morphable import MODELS, face_model, front
from facelab.lab.assets import ASSETS
from facelab.lab.errors import AssetError, InputError
from facelab.lab.images import write_image
from facelab.nets.embedder import BaseEmbedder, trained_embedder


@pytest.fixture
def bare(tmp_path, monkeypatch):
    "A checkout without licensed files, nor fixtures that stand in for them."
    (tmp_path / "repo" / "nbs").mkdir(parents=True)
    (tmp_path / "repo" / "settings.ini").touch()
    monkeypatch.setenv("FACELAB_ROOT", str(tmp_path / "repo"))
    monkeypatch.setenv("FACELAB_ASSETS", str(tmp_path / "assets"))
    monkeypatch.delenv("FACELAB_FIXTURES", raising=False)


@pytest.mark.parametrize("name", [name for name, asset in MODELS.items() if asset])
def test_a_model_without_its_file_says_which(name, bare):
    with pytest.raises(AssetError) as caught:
        face_model(name)
    assert ASSETS[MODELS[name][0]].file in str(caught.value)


def test_an_unknown_name_is_refused_with_the_known_ones(bare):
    with pytest.raises(InputError, match="procedural, ict, bfm2017, bfm2009"):
        face_model("bfm2019")
    with pytest.raises(InputError, match="base or arcface"):
        trained_embedder("facenet")
    with pytest.raises(AssetError):
        trained_embedder("arcface")
    with pytest.raises(InputError, match="dvc pull bases/identity"):
        trained_embedder("base")


def test_the_shipped_embedder_by_its_name():
    assert isinstance(trained_embedder("base"), BaseEmbedder)


def test_the_front_of_a_head_is_its_face():
    head = face_model("procedural")
    kept = set(front(head).tolist())
    assert set(head.landmarks68[17:].tolist()) <= kept, "brows, nose, eyes and lips"
    for name in ("left_eyeball", "scalp", "neck_back"):
        own = head.regions[name] & ~torch.stack([mask for other, mask in head.regions.items() if other != name]).any(0)
        assert own.any() and not kept & set(own.nonzero()[:, 0].tolist()), name


def test_faces_of_a_folder_keep_their_landmarks(tmp_path):
    "Two photos on disk, one twice as large: the same landmarks in the crop, and no truth."
    marks = np.random.default_rng(0).uniform(40, 80, (68, 2))
    marks[[36, 39, 42, 45, 30, 48, 54]] = [(45, 50), (55, 50), (70, 50), (80, 50), (62, 62), (52, 75), (73, 75)]
    for number, scale in enumerate((1, 2)):
        stem = tmp_path / "300w" / "ibug" / f"image_{number}"
        stem.parent.mkdir(parents=True, exist_ok=True)
        write_image(stem.with_suffix(".png"), np.full((128 * scale, 128 * scale, 3), 90, np.uint8))
        write_pts(stem.with_suffix(".pts"), scale * marks)
    faces = w300_faces(tmp_path / "300w", "challenging", 9, 64)
    assert faces.names == ["ibug/image_0", "ibug/image_1"] and faces.codes is None and faces.images.shape == (2, 3, 64, 64)
    assert torch.allclose(faces.landmarks_2d[0], faces.landmarks_2d[1], atol=0.5) and CROP_SCALE == 102 / 224
    (tmp_path / "300w" / "ibug" / "image_1.png").write_bytes(b"")
    with pytest.raises(InputError, match="image_1.png"):
        w300_faces(tmp_path / "300w", "challenging", 9, 64)


def test_the_portrait_shows_a_face():
    face = nasa_portrait(96)
    assert face.images.shape == (1, 3, 96, 96) and face.codes is None
    assert (face.landmarks_2d > 0).all() and (face.landmarks_2d < 96).all() and (face.landmarks_2d[0, 30] - 48).abs().max() < 16
    with pytest.raises(InputError):
        square_crop(np.zeros((8, 8), np.uint8), np.zeros((68, 2)), 64)


def people_by_counting(recipe):
    "The slow twin: draw one after another, keep who is still needed."
    left, found, at = {split: getattr(recipe, split) for split in ("train", "val", "test")}, [], 0
    while any(left.values()):
        split = sample_person(recipe.seed, at).split
        if left[split]:
            left[split] -= 1
            found.append(at)
        at += 1
    return found


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(seed=4, train=19, val=1, test=0), Recipe(train=0, val=3, test=1), Recipe(train=0, val=0, test=0)])
def test_the_people_of_a_recipe(recipe):
    assert recipe.people() == people_by_counting(recipe)
