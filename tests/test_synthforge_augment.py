"Picture, labels, depth and landmarks go through one map; the same seed gives the same crop."

from dataclasses import replace

import numpy as np
import pytest

from facelab.face.align import FLIP68
from facelab.lab.errors import InputError
from facelab.lab.train import Items
from facelab.synthforge.annotated import SYNTH20_FLIPS, AnnotatedFace, face_batch
from facelab.synthforge.augment import CODE_TRAIN, PAPER_TRAIN, Augment, augment_face, corner_matrix, crop_matrix, item_rng, still, through, warp_face

SIZE = 192
QUIET = dict.fromkeys(("cover", "blur", "gamma", "noise", "grey", "light"), 0.0)


def dotted(marks, size=SIZE):
    "A face of dots: a red blob, a disc of its own label and of its own depth at each landmark."
    y, x = np.mgrid[:size, :size] + 0.5
    image, labels, depth = np.zeros((size, size, 3), np.uint8), np.full((size, size), 19, np.uint8), np.zeros((size, size), np.float32)
    for k, (u, v) in enumerate(marks):
        far = np.hypot(x - u, y - v)
        image[..., 0] = np.maximum(image[..., 0], (255 * np.exp(-((far / 2.2) ** 2))).astype(np.uint8))
        labels[far < 5] = 4 + k % 4  # the four eye classes
        depth[far < 5] = 500 + k
    return AnnotatedFace("dots", image, labels, depth, None, np.float32(marks), None, None)


@pytest.fixture(scope="module")
def face():
    marks = np.stack(np.meshgrid(np.linspace(50, 140, 9), np.linspace(48, 144, 8)), -1).reshape(-1, 2)[:68]
    return dotted(marks + np.random.default_rng(0).uniform(-0.5, 0.5, (68, 2)))


@pytest.mark.parametrize("name, config", [("code", CODE_TRAIN), ("paper", PAPER_TRAIN)])
def test_landmarks_labels_and_depth_stay_on_their_feature(face, name, config):
    config, seen, mirrored = replace(config, size=160, **QUIET), 0, 0
    for seed in range(12):
        crop = augment_face(face, config, item_rng(seed), SYNTH20_FLIPS)
        flipped = np.linalg.det(crop_matrix(face, config, *(lambda r: (r.random(32), r.standard_normal(32)))(item_rng(seed)))) < 0
        mirrored += flipped
        y, x = np.mgrid[:160, :160] + 0.5
        for k, (u, v) in enumerate(crop.landmarks_2d):
            if not (8 < u < 152 and 8 < v < 152):
                continue
            near = np.hypot(x - u, y - v) < 3.0
            weight = crop.image[..., 0].astype(float) ** 2 * near
            if weight.max() < 100**2:
                continue
            middle = np.array([(weight * x).sum(), (weight * y).sum()]) / weight.sum()
            assert np.hypot(*(middle - (u, v))) < 0.6, (name, seed, k)
            was = FLIP68[k] if flipped else k
            expected = {4: 5, 5: 4, 6: 7, 7: 6}[4 + was % 4] if flipped else 4 + was % 4
            assert crop.labels[int(v), int(u)] == expected and crop.depth[int(v), int(u)] == 500 + was
            seen += 1
    assert seen > 300 and 0 < mirrored < 12


def test_a_shifted_landmark_would_be_noticed(face):
    crop = augment_face(replace(face, landmarks_2d=face.landmarks_2d + 2.0), replace(still(CODE_TRAIN), size=160), item_rng(0))
    u, v = crop.landmarks_2d[30]
    assert crop.image[int(v), int(u), 0] < 200


@pytest.mark.parametrize("config", [CODE_TRAIN, PAPER_TRAIN])
def test_no_label_and_no_depth_is_invented(face, config):
    for seed in range(6):
        crop = augment_face(face, replace(config, size=96), item_rng(seed), SYNTH20_FLIPS)
        assert set(np.unique(crop.labels)) <= {4, 5, 6, 7, 19, 255}
        assert set(np.unique(crop.depth)) <= {0.0, *(500.0 + np.arange(68))}


def test_the_same_seed_is_the_same_crop_and_another_is_not(face):
    config = replace(PAPER_TRAIN, size=64)
    one, two, three = (augment_face(face, config, item_rng(*at)) for at in ((1, 5), (1, 5), (1, 6)))
    assert all(np.array_equal(getattr(one, part), getattr(two, part)) for part in ("image", "labels", "depth", "landmarks_2d"))
    assert not np.array_equal(one.image, three.image)


def test_a_cover_is_labelled_where_that_is_asked():
    "By default labels stay those of what is behind; with a class the box, and nothing else, gets it, and one colour; the draws are the same."
    face = AnnotatedFace("face", np.full((96, 96, 3), 200, np.uint8), np.full((96, 96), 3, np.uint8), landmarks_2d=np.random.default_rng(0).uniform(20, 76, (68, 2)).astype(np.float32))
    config = replace(CODE_TRAIN, **QUIET | {"cover": 1.0}, size=64, flip=0.0)
    behind, front, bare = (augment_face(face, one, np.random.default_rng(3)) for one in (config, replace(config, cover_class=0), replace(config, cover=0.0)))
    assert np.array_equal(behind.labels, bare.labels) and np.array_equal(front.landmarks_2d, bare.landmarks_2d)
    box = (behind.image != bare.image).any(2)
    assert box.sum() > 20 and not behind.image[box].any() and (front.labels[box] == 0).all() and np.array_equal(front.labels[~box], bare.labels[~box])
    assert len(np.unique(front.image[box], axis=0)) == 1 and np.array_equal(front.image[~box], bare.image[~box])
    assert (face.labels == 3).all() and augment_face(replace(face, labels=None), replace(config, cover_class=0), np.random.default_rng(3)).labels is None


def test_switching_one_change_off_leaves_the_others(face):
    rng = lambda: item_rng(3, 1)
    config = replace(CODE_TRAIN, size=64, cover=1.0)
    whole, bare = augment_face(face, config, rng()), augment_face(face, replace(config, cover=0.0), rng())
    assert np.array_equal(whole.landmarks_2d, bare.landmarks_2d) and np.array_equal(whole.labels, bare.labels)
    assert 0 < (whole.image != bare.image).any(2).mean() < 0.2


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_workers(face, workers):
    from facelab.lab.batches import Share

    config = replace(CODE_TRAIN, size=48)
    items = Items(5, lambda index, rng: augment_face(face, config, rng, SYNTH20_FLIPS), collate=face_batch, workers=workers, start_method="fork")
    batches = items.batches(0, Share(4, 0))
    found = [next(batches)[0][0].double().sum().item() for _ in range(2)]
    alone = Items(5, lambda index, rng: augment_face(face, config, rng, SYNTH20_FLIPS), collate=face_batch).batches(0, Share(4, 0))
    assert found == [next(alone)[0][0].double().sum().item() for _ in range(2)]


def test_spread_of_the_authors_crops():
    blank = AnnotatedFace("blank", np.zeros((512, 512, 3), np.uint8))
    sides, turns = [], []
    for seed in range(600):
        rng = item_rng(seed)
        matrix = crop_matrix(blank, replace(CODE_TRAIN, zoom=0.0), rng.random(32), rng.standard_normal(32))
        sides.append(256 / np.sqrt(abs(np.linalg.det(matrix[:2, :2]))) / 200)
        turns.append(np.degrees(np.arctan2(matrix[1, 0], matrix[1, 1])))
    assert 2.199 < min(sides) < 2.201 and 3.9 < max(sides) < 4.001 and abs(np.std(turns) - 18) < 1.5


def test_outside_the_picture_nothing_is_judged(face):
    crop = warp_face(face, np.array([[1.0, 0, 100], [0, 1, 0], [0, 0, 1]]), SIZE)
    assert (crop.labels[:, :100] == 255).all() and (crop.depth[:, :100] == 0).all() and (crop.image[:, :99] == 0).all()
    assert not crop.visible[crop.landmarks_2d[:, 0] > SIZE].any()


def test_what_is_refused(face):
    with pytest.raises(InputError, match="landmarks"):
        augment_face(replace(face, landmarks_2d=None), replace(CODE_TRAIN, unit="landmarks"), item_rng(0))
    with pytest.raises(InputError, match="finite"):
        augment_face(replace(face, landmarks_2d=face.landmarks_2d * np.nan), CODE_TRAIN, item_rng(0))
    with pytest.raises(InputError):
        Augment(perspective=0.4)
    with pytest.raises(InputError):
        Augment(side=(2.0, 0.1, 2.2, 4.0))


def test_four_corners_go_where_they_should():
    square = np.array([[0.0, 0], [8, 0], [8, 8], [0, 8]])
    away = square + np.random.default_rng(1).uniform(-1, 1, (4, 2))
    assert np.allclose(through(square, corner_matrix(square, away)), away)
