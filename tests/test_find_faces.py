"Faces in any photo: crops and their way back, boxes, bad pictures; and with the landmarks base, real faces and world photos."

import os
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage import data as pictures

from facelab.data.face_crop import FaceBox, as_photo, crop_face, move_points
from facelab.data.find_faces import PtsLandmarks, cascade_faces, faces_in_file, faces_of, find_faces, look_at, merge_boxes, turned_cascade
from facelab.data.w300 import read_pts, write_pts
from facelab.face.measure import keypoint_error
from facelab.lab.errors import InputError, ShapeError
from facelab.lab.images import resize, write_image
from facelab.lab.paths import bases_dir, data_dir
from facelab.nets.landmarks import BaseLandmarks, LandmarkDetector, LandmarkNet, cut_squares, landmark_square, square_matrix


@cache
def base():
    "The shipped detector; $FACELAB_LANDMARKS names another folder that holds a `landmarks` base."
    folder = Path(os.environ.get("FACELAB_LANDMARKS") or bases_dir())
    if not (folder / "landmarks" / "model.safetensors").is_file():
        pytest.skip("bases/landmarks is not here: dvc pull bases/landmarks/model.safetensors.dvc, or make bases BASE=landmarks")
    return BaseLandmarks.from_base(folder=folder)


@cache
def blank():
    torch.manual_seed(0)
    return BaseLandmarks(LandmarkNet())


def portrait_points():
    return read_pts(resources.files("facelab.data") / "nasa_portrait.pts")


def nme(found, true, width):
    return float(keypoint_error(torch.from_numpy(found)[None], torch.from_numpy(true)[None], width).nme[0])


def turned(picture, points, quarters):
    "Picture and points turned counter-clockwise."
    for _ in range(quarters):
        points = np.stack([points[:, 1], picture.shape[1] - points[:, 0]], 1)
        picture = np.ascontiguousarray(np.rot90(picture))
    return picture, points.astype(np.float32)


# crops


@pytest.mark.parametrize("lean", [0.0, 0.4, -2.0, np.pi])
@pytest.mark.parametrize("size", [16, 64, 200])
def test_a_point_of_the_crop_is_the_same_point_of_the_photo(lean, size):
    x, y = np.meshgrid(np.arange(200) + 0.5, np.arange(160) + 0.5)
    photo = np.stack([x, y, 0 * x], -1).astype(np.uint8)  # red is x, green is y, rounded down
    crop, back = crop_face(photo, FaceBox(70.0, 50.0, 50.0, 50.0, 1.0, lean), size, 1.2)
    at = np.random.default_rng(0).uniform(0.2 * size, 0.8 * size, (40, 2)).astype(int)
    there = move_points(at + 0.5, back)
    assert np.abs(crop[at[:, 1], at[:, 0], :2] + 0.5 - there).max() < 1.2 + 30 / size


def test_crop_is_upright_and_landmarks_come_back():
    true, photo = portrait_points(), pictures.astronaut()
    for quarters in range(4):
        picture, points = turned(photo, true, quarters)
        crop = crop_face(picture, points, 128)
        inside = np.linalg.solve(crop.back[:, :2], (points - crop.back[:, 2]).T).T
        eyes, mouth = inside[36:48].mean(0), inside[48:].mean(0)
        assert mouth[1] > eyes[1] + 20 and abs(inside[36:42].mean(0) - inside[42:48].mean(0))[1] < 1
        assert 0 < inside.min() and inside.max() < 128
        upright = crop_face(photo, true, 128).image.astype(int)
        assert np.abs(crop.image - upright).mean() < 4


def test_crop_of_a_huge_photo_is_the_crop_of_a_small_one():
    photo = pictures.astronaut()
    box = FaceBox(180.0, 80.0, 90.0, 90.0, 1.0)
    large = crop_face(np.repeat(np.repeat(photo, 8, 0), 8, 1), FaceBox(*(8 * v for v in box[:4]), 1.0), 64)
    assert np.abs(large.image.astype(int) - crop_face(photo, box, 64).image).mean() < 4
    assert np.allclose(large.back, 8 * crop_face(photo, box, 64).back)


def test_crop_far_outside_the_photo_is_its_edge():
    photo = np.full((10, 10, 3), 77, np.uint8)
    assert (crop_face(photo, FaceBox(500.0, -900.0, 40.0, 40.0, 1.0), 16).image == 77).all()


def test_squares_agree_with_a_slow_twin():
    torch.manual_seed(0)
    images = torch.rand(1, 3, 30, 44)
    matrix = square_matrix(torch.tensor([[20.0, 14.0]]), torch.tensor([13.0]), torch.tensor([0.7]), 8)
    made = cut_squares(images, matrix, 8)[0]
    turn, shift = matrix[0, :, :2].numpy(), matrix[0, :, 2].numpy()
    for row in range(8):
        for column in range(8):
            x, y = np.linalg.solve(turn, np.array([column + 0.5, row + 0.5]) - shift) - 0.5
            i, j = int(np.floor(y)), int(np.floor(x))
            p, q = y - i, x - j
            near = images[0][:, i : i + 2, j : j + 2]
            slow = near[:, 0, 0] * (1 - p) * (1 - q) + near[:, 0, 1] * (1 - p) * q + near[:, 1, 0] * p * (1 - q) + near[:, 1, 1] * p * q
            assert torch.allclose(made[:, row, column], slow.float(), atol=1e-4)


def test_square_around_landmarks():
    points = torch.from_numpy(portrait_points())[None]
    middle, side, lean = landmark_square(points)
    matrix = square_matrix(middle, side * 1.6, lean, 64)
    inside = torch.einsum("brc,bnc->bnr", matrix[..., :2], points) + matrix[:, None, :, 2]
    again = landmark_square(inside)
    assert abs(float(again[2])) < 1e-4 and torch.allclose(again[0], torch.tensor([[32.0, 32.0]]), atol=3) and abs(float(again[1]) - 40) < 4


# boxes


def test_merge_keeps_the_best_of_each_heap_whatever_the_order():
    boxes = [FaceBox(x + d, 5.0 + d, 20.0, 20.0, 0.5 + d / 10) for x in (0.0, 60.0) for d in (0.0, 1.0, 2.0)]
    kept = merge_boxes(boxes)
    assert kept == merge_boxes(boxes[::-1]) and sorted(b.left for b in kept) == [2.0, 62.0]


def test_cascade_finds_the_portrait_in_every_size():
    for side in (128, 512, 1500):
        photo = resize(pictures.astronaut(), side, "bicubic")
        box = cascade_faces(photo)[0]
        assert np.abs(np.subtract(box.middle, np.array([226, 132]) * side / 512)).max() < 25 * side / 512


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_turned_cascade_says_where_in_the_photo(quarters):
    photo, points = turned(pictures.astronaut(), portrait_points(), 4 - quarters if quarters else 0)  # the face now leans clockwise by `quarters`
    box = turned_cascade(photo, quarters)[0]
    middle, _, lean = landmark_square(torch.from_numpy(points)[None])
    assert np.abs(np.subtract(box.middle, middle[0])).max() < 25
    assert abs(np.angle(np.exp(1j * (box.lean - float(lean))))) < 0.3


# bad pictures


@pytest.mark.parametrize("picture", [np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4, 2), np.uint8), np.zeros(9, np.uint8), np.zeros((2, 3, 4, 4), np.uint8)], ids=str)
def test_what_is_no_picture_is_refused(picture):
    for call in (as_photo, cascade_faces, lambda p: faces_of(p, finder=blank()), lambda p: crop_face(p, FaceBox(0.0, 0.0, 2.0, 2.0, 1.0))):
        with pytest.raises(ShapeError):
            call(picture)


@pytest.mark.parametrize("shape", [(1, 1), (2, 900, 3), (900, 2, 1), (7, 7, 4), (25, 25, 3)], ids=str)
def test_odd_pictures_give_an_answer(shape):
    picture = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
    assert isinstance(faces_of(picture, finder=blank(), least=1.1, smallest=0.2), list)
    assert cascade_faces(picture) == cascade_faces(picture.copy())
    for face in look_at(as_photo(picture), [FaceBox(0.0, 0.0, 3.0, 3.0, 1.0)], blank()):
        assert np.isfinite(face.landmarks_2d).all()


def test_a_network_that_knows_nothing_does_not_break_the_search():
    for face in faces_of(pictures.coffee(), finder=blank(), least=0.0):
        assert face.landmarks_2d.shape == (68, 2) and np.isfinite(face.landmarks_2d).all() and 0 <= face.confidence <= 1


def test_files_of_every_kind(tmp_path):
    from PIL import Image

    small = Image.fromarray(resize(pictures.astronaut(), 48))
    for name, mode in (("cmyk.jpg", "CMYK"), ("palette.png", "P")):
        small.convert(mode).save(tmp_path / name)
        photo, faces = faces_in_file(tmp_path / name, finder=blank(), least=1.1, smallest=0.2)
        assert photo.shape == (48, 48, 3) and faces == []
    for name, held in (("empty.png", b""), ("torn.jpg", b"\xff\xd8\xff\xe0 torn"), ("text.png", b"not a picture")):
        (tmp_path / name).write_bytes(held)
        with pytest.raises(InputError):
            faces_in_file(tmp_path / name)
    with pytest.raises(InputError):
        faces_in_file(tmp_path / "missing.png")


def test_points_beside_a_file_are_the_truth(tmp_path):
    true = portrait_points()
    write_image(tmp_path / "me.png", pictures.astronaut())
    write_pts(tmp_path / "me.pts", true)
    _, (face,) = faces_in_file(tmp_path / "me.png")
    assert np.allclose(face.landmarks_2d, true, atol=2e-3) and face.confidence == 1
    crop = crop_face(pictures.astronaut(), face.box, 64)
    reader = PtsLandmarks([tmp_path / "me.png"], [crop.back])
    assert isinstance(reader, LandmarkDetector)
    assert np.allclose(move_points(reader.landmarks(torch.zeros(1, 3, 64, 64))[0].double().numpy(), crop.back), true, atol=1e-2)
    with pytest.raises(ShapeError):
        reader.landmarks(torch.zeros(2, 3, 64, 64))
    with pytest.raises(InputError, match="no .pts beside you.png"):
        PtsLandmarks([tmp_path / "you.png"])


def test_missing_base_says_how_to_bring_it(tmp_path):
    with pytest.raises(InputError, match="dvc pull"):
        BaseLandmarks.from_base(folder=tmp_path)


# with the base


def test_base_finds_the_portrait_and_its_points():
    (face,) = faces_of(pictures.astronaut(), finder=base())
    assert nme(face.landmarks_2d, portrait_points(), 512) < 9 and face.confidence > 0.5
    assert find_faces(pictures.astronaut(), base()) == [face.box]


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_base_finds_a_portrait_that_lies_on_its_side(quarters):
    photo, points = turned(pictures.astronaut(), portrait_points(), quarters)
    face = max(faces_of(photo, finder=base()), key=lambda f: f.confidence)
    assert nme(face.landmarks_2d, points, 512) < 12


@pytest.mark.parametrize("name", ["coffee", "chelsea", "rocket", "coins"])
def test_base_sees_no_face_in_things_however_they_lie(name):
    assert faces_of(getattr(pictures, name)(), finder=base(), thorough=True) == []


def test_base_tells_small_real_faces_from_patches():
    from facelab.tasks.landmark_base import believed, small_faces

    faces, others = small_faces()
    assert believed(base(), faces[::4]).mean() >= 80 and believed(base(), others[::4]).mean() <= 8


def test_base_finds_world_photos_one_or_several():
    if not (data_dir() / "300w").is_dir():
        pytest.skip("data/300w is not here: dvc pull data.dvc")
    from facelab.data.w300 import read_w300

    items = [read_w300(data_dir() / "300w", "full")[k] for k in range(0, 60, 12)]
    errors = []
    for item in items:
        found = faces_of(item.image, finder=base())
        assert found, item.name
        errors.append(min(nme(f.landmarks_2d, item.landmarks_2d, item.image.shape[1]) for f in found))
    assert np.median(errors) < 7
    row = np.concatenate([item.image for item in items[:3]], 1)
    found = faces_of(row, finder=base(), thorough=True)
    assert {int(f.box.middle[0] // items[0].image.shape[1]) for f in found} == {0, 1, 2}


def test_base_says_nothing_where_there_is_no_face():
    assert faces_of(np.full((200, 300, 3), 128, np.uint8), finder=base()) == []
    assert faces_of(pictures.brick(), finder=base()) == []
