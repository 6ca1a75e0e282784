"Fits as a batch job: one clear error for what is wrong with all, a name for what is wrong with one, and the rest goes on."

import numpy as np
import pytest
import torch

from facelab.face import fit as module
from facelab.face.code import FaceCode
from facelab.face.fit import FitConfig, fit, see
from facelab.face.morphable import MorphableModel
from facelab.face.objective import photo_loss
from facelab.face.skin import skin_mask
from facelab.lab.errors import InputError, ShapeError, Skipped

MODEL = MorphableModel.procedural()
QUICK = FitConfig(landmark_steps=4, steps=(2, 2), batch=2)


@pytest.fixture(scope="module")
def faces():
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        picture, _, marks = see(
            MODEL, FaceCode(torch.randn(5, 80, generator=draw), torch.zeros(5, 64), torch.zeros(5, 80), torch.zeros(5, 27), torch.zeros(5, 6)), 40
        )
    return picture.image.clamp(0, 1), marks


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda i, m: dict(images=(255 * i).byte()), "torch.uint8.*Divide bytes by 255"),
        (lambda i, m: dict(images=torch.cat([i, i[:, :1]], 1)), r"\(5, 4, 40, 40\).*alpha channel"),
        (lambda i, m: dict(images=i.double()), "torch.float64.*torch.float32"),
        (lambda i, m: dict(images=i.half()), "torch.float16"),
        (lambda i, m: dict(images=i.to("meta")), "on meta"),
        (lambda i, m: dict(images=i.numpy()), "ndarray"),
        (lambda i, m: dict(images=i[:4]), r"\(4, 3, 40, 40\)"),
        (lambda i, m: dict(landmarks_2d=m.long()), "torch.int64"),
        (lambda i, m: dict(landmarks_2d=m[:, :51]), r"\(5, 51, 2\)"),
        (lambda i, m: dict(skin=torch.ones(5, 40, 40)), r"skin: \(5, 40, 40\).*\(5, 1, 40, 40\)"),
        (lambda i, m: dict(skin=torch.ones(5, 1, 20, 20)), "skin"),
        (lambda i, m: dict(skin=torch.ones(5, 1, 40, 40, dtype=torch.bool)), "torch.bool"),
    ],
)
def test_what_is_wrong_with_all_is_one_error(faces, change, said):
    images, marks = faces
    with pytest.raises(ShapeError, match=said):
        fit(MODEL, **({"images": images, "landmarks_2d": marks, "config": QUICK} | change(images, marks)), skipped=Skipped())


SPOILED = {
    "nan landmark": (lambda i, m, s: m[2, 5].fill_(torch.nan), "landmarks that are not finite"),
    "one place": (lambda i, m, s: m[2].fill_(20.0), "0 pixels across"),
    "far away": (lambda i, m, s: m[2].mul_(1e30), "far outside"),
    "nan pixel": (lambda i, m, s: i[2, 0, 3, 3].fill_(torch.nan), "pixels from nan"),
    "inf pixel": (lambda i, m, s: i[2, 0, 3, 3].fill_(torch.inf), "to inf"),
    "bytes": (lambda i, m, s: i[2].mul_(255), r"pixels from 0 to \d+"),
    "-1..1": (lambda i, m, s: i[2].mul_(2).sub_(1), "pixels from -1"),
    "nan skin": (lambda i, m, s: s[2, 0, 3, 3].fill_(torch.nan), "skin from nan"),
    "large skin": (lambda i, m, s: s[2].fill_(255.0), "skin from 255"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_one_bad_face_is_named_and_costs_itself(faces, kind):
    images, marks, skin = faces[0].clone(), faces[1].clone(), torch.ones(5, 1, 40, 40)
    good = fit(MODEL, images[[0, 1, 3, 4]], marks[[0, 1, 3, 4]], QUICK, skin=skin[:4])
    spoil, said = SPOILED[kind]
    spoil(images, marks, skin)
    with pytest.raises(InputError, match=f"face 2: .*{said}"):
        fit(MODEL, images, marks, QUICK, skin=skin)
    skipped = Skipped()
    found = fit(MODEL, images, marks, QUICK, skin=skin, skipped=skipped)
    assert found.rows == [0, 1, 3, 4] and torch.equal(found.code.pack(), good.code.pack()) and torch.equal(found.image, good.image)
    assert len(skipped) == 1 and skipped.items[0][0] == "face 2" and "1 of 5 items skipped" in skipped.report(5)


def test_no_face_left_says_why(faces):
    with pytest.raises(InputError, match="face 0: pixels from 0 to"):
        fit(MODEL, 255 * faces[0], faces[1], QUICK, skipped=Skipped())


@pytest.mark.parametrize("optimiser", ["adam", "lbfgs"])
def test_a_loss_that_leaves_the_numbers(faces, optimiser, monkeypatch):
    "The fourth face's loss is not finite from the start: its batch goes again without it."
    whole, images = module.face_loss, faces[0].clone()
    images[3, 0, 0, 0] = 0.123  # how it is known again

    def loss(objective, code, **parts):
        total, terms = whole(objective, code, **parts)
        image = parts.get("image")
        return (total if image is None else torch.where(image[:, 0, 0, 0] == images[3, 0, 0, 0], torch.nan, total)), terms

    monkeypatch.setattr(module, "face_loss", loss)
    config = FitConfig(optimiser=optimiser, landmark_steps=2, scales=(1.0,), steps=(2,), batch=3)
    with pytest.raises(InputError, match=r"faces \[3\]"):
        fit(MODEL, images, faces[1], config)
    skipped = Skipped()
    found = fit(MODEL, images, faces[1], config, skipped=skipped)
    assert found.rows == [0, 1, 2, 4] and len(found) == 4 and skipped.items[0][0] == "face 3" and torch.isfinite(found.code.pack()).all()
    with pytest.raises(InputError, match="none of 1 faces"):
        fit(MODEL, images[3:4], faces[1][3:4], config, skipped=Skipped())


def test_landmarks_alone(faces):
    marks = faces[1].clone()
    marks[0] = np.nan
    found = fit(MODEL, None, marks, QUICK, width=40, skipped=Skipped())
    assert found.rows == [1, 2, 3, 4] and found.image is None


def test_the_skin_mask_is_found_unless_it_is_switched_off(faces):
    images, marks = faces
    plain, given, off = (fit(MODEL, images, marks, QUICK, **how) for how in ({}, {"skin": skin_mask(images)}, {"skin": None}))
    assert torch.equal(plain.code.pack(), given.code.pack()) and plain.notes == given.notes
    assert not torch.equal(plain.code.pack(), off.code.pack()) and "no skin mask" in str(off.notes) and "no skin mask" not in str(plain.notes)
    with pytest.raises(InputError, match="'all'"):
        fit(MODEL, images, marks, QUICK, skin="all")
    blue = images.clone()
    blue[2] = torch.tensor([0.1, 0.2, 0.9])[:, None, None]
    assert "photos [2]" in str(fit(MODEL, blue, marks, QUICK).notes)


def test_the_literal_photo_term_is_what_is_printed():
    "The squared norm of A times the difference: A enters squared, and nothing is divided by its sum."
    image, rendered, weight = torch.rand(2, 3, 6, 5), torch.rand(2, 3, 6, 5), torch.rand(2, 1, 6, 5)
    printed = torch.stack([torch.linalg.vector_norm((a * (x - y)).flatten()).square() for x, y, a in zip(image, rendered, weight)])
    assert torch.allclose(photo_loss(image, rendered, weight, "literal"), printed, rtol=1e-5)
    assert torch.allclose(photo_loss(image, rendered, weight / 2, "literal"), printed / 4, rtol=1e-5) and torch.allclose(photo_loss(image, rendered, weight / 2), photo_loss(image, rendered, weight), rtol=1e-5)
