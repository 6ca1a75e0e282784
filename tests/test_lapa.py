"LaPa's folders, its classes and its 106 points: where they are on the embedded head, what is written and read back, damage told or counted."

import shutil
from dataclasses import replace

import numpy as np
import pytest

from facelab.data.lapa import check_lapa, read_lapa, read_lapa_labels, read_lapa_points, write_lapa, write_lapa_points
from facelab.data.person import sample_person
from facelab.data.photo import photograph
from facelab.data.points106 import EYE_CORNERS_106, IBUG_FROM_106, ibug_from_106, places106, points106, pupil_places
from facelab.data.scene import make_view, sample_photo
from facelab.data.truth import truth_of
from facelab.data.world import generate
from facelab.lab.errors import AssetError, InputError, Skipped
from facelab.lab.images import write_image


@pytest.fixture(scope="module")
def items():
    return generate([0, 1, 2, 3, 8, 9, 19], 1, 64, seed=8, supersample=1, workers=1, every=1e9)[0]


@pytest.fixture(scope="module")
def whole(items, tmp_path_factory):
    root = tmp_path_factory.mktemp("lapa") / "LaPa"
    assert write_lapa(root, items, world_seed=8) == {"train": 4, "val": 1, "test": 2}
    return root


@pytest.fixture
def root(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "LaPa")
    return tmp_path / "LaPa"


# The 106 points


def test_points_that_are_ibugs_are_where_the_truth_has_them(items):
    own = {group[0]: k for k, group in enumerate(IBUG_FROM_106) if len(group) == 1}
    assert len(own) == 50 and EYE_CORNERS_106 == (66, 79) and own[66] == 36 and own[79] == 45
    for item in items:
        found = points106(item, world_seed=8)
        assert found.shape == (106, 2) and found.dtype == np.float32 and np.abs(found[list(own)] - item.landmarks_2d[list(own.values())]).max() < 1e-3
        wide = np.linalg.norm(item.landmarks_2d[36] - item.landmarks_2d[45])
        assert np.linalg.norm(ibug_from_106(found) - item.landmarks_2d, axis=1).mean() < 0.015 * wide


def test_every_place_is_on_the_head_and_its_shares_sum_to_one():
    places = [*places106(), *pupil_places((0.0, 0.0))]
    assert len(places) == 106 and all(abs(sum(shares) - 1) < 1e-9 and min(shares) > -1e-6 and len(ids) == len(shares) for ids, shares in places)
    assert len(set(places)) == 106


def test_the_points_of_a_frontal_head_are_mirrored_and_in_order():
    from facelab.data.rig import load_rig

    mean = load_rig().mean
    at = np.stack([sum(s * mean[i].astype(float) for i, s in zip(ids, shares)) for ids, shares in [*places106(), *pupil_places((0.0, 0.0))]])
    twin = [*range(32, -1, -1), 46, 45, 44, 43, 42, 50, 49, 48, 47, 37, 36, 35, 34, 33, 41, 40, 39, 38, 51, 52, 53, 54, *range(65, 54, -1), 79, 78, 77, 76, 75, 82, 81, 80, 83, 70, 69, 68, 67, 66, 73, 72, 71, 74]
    twin += [90, 89, 88, 87, 86, 85, 84, 95, 94, 93, 92, 91, 100, 99, 98, 97, 96, 103, 102, 101, 105, 104]
    assert sorted(twin) == list(range(106)) and np.abs(at[twin] * [-1, 1, 1] - at).max() < 0.6  # mm
    x, y = at[:, 0], at[:, 1]
    assert (np.diff(x[:33]) > -1.5).all() and y[16] < y[:33].min() + 2 and x[0] < x[33] < x[37] < 0 < x[42] < x[46] < x[32]
    assert all(y[up] > y[low] + 1.5 for up, low in ((34, 41), (35, 40), (36, 39), (37, 38), (42, 50), (43, 49), (44, 48), (45, 47)))  # brows
    assert (np.diff(y[51:55]) < 0).all() and x[55] < x[60] < x[65] and y[55] > y[56] > y[57] and x[56] < x[57] < x[58] < x[59] < 0  # nose
    assert all(y[a] > y[74] > y[b] for a, b in ((67, 73), (68, 72), (69, 71))) and x[66] < x[67] < x[68] < x[69] < x[70]  # lids
    assert y[87] > y[98] > y[102] - 1 > y[93]  # closed lips overlap a little


def test_pupils_follow_the_gaze_to_the_dark_of_the_eye():
    person = sample_person(1, 31)  # light eyes
    for gaze in ((0.0, 0.0), (0.18, 0.0), (-0.18, 0.06)):
        scene = replace(sample_photo(person, 0, "Neutral", make_view(0.1)), gaze=gaze, glasses="", sunglasses=False, occluder="", blur=0.0, noise=0.0, quality=97, hat="")
        photo = photograph(scene, 512, 2)
        grey = photo.image.mean(-1)
        yy, xx = np.mgrid[0.5:512, 0.5:512]
        for x, y in points106(photo)[104:]:
            far = np.hypot(xx - x, yy - y)
            near = far < 9
            dark = near & (grey <= np.quantile(grey[near], 0.15))
            assert np.hypot(xx[dark].mean() - x, yy[dark].mean() - y) < 2.5  # pixels of 512; the pupil's radius is 4
    left = points106(photograph(replace(scene, gaze=(0.2, 0.0)), 256, 1))[104:] - points106(photograph(replace(scene, gaze=(-0.2, 0.0)), 256, 1))[104:]
    assert (left[:, 0] > 3).all() and np.abs(left[:, 1]).max() < 1


def test_a_photo_and_its_truth_have_the_same_points():
    photo = photograph(sample_photo(sample_person(8, 3), 0), 64, 1)
    assert np.abs(points106(photo) - points106(truth_of(photo), world_seed=8)).max() < 1e-3


def test_a_wrong_world_is_noticed(items):
    for seed in (None, 9):
        with pytest.raises(InputError):
            points106(items[0], world_seed=seed)


# The layout


def test_files_are_as_published(whole):
    lines = (whole / "train" / "landmarks" / "000000_0.txt").read_text().splitlines()
    assert lines[0] == "106" and len(lines) == 107 and len(lines[1].split()) == 2
    assert sorted(p.name for p in (whole / "val").iterdir()) == ["images", "labels", "landmarks"] and (whole / "val" / "images" / "000008_0.jpg").is_file()


def test_what_went_in_comes_back(whole, items):
    data = read_lapa(whole, "all")
    assert [len(read_lapa(whole, s)) for s in ("train", "val", "test")] == [4, 1, 2] and len(data) == 7
    by_name = {f"{i.split}/{i.identity:06d}_0": i for i in items}
    for item in data.items():
        truth = by_name[item.name]
        assert np.array_equal(item.image, truth.image) and np.array_equal(item.labels, truth.labels11) and item.split == truth.split
        assert np.abs(item.landmarks_2d - points106(truth, world_seed=8)).max() < 6e-4
        assert np.abs(item.landmarks_2d[[66, 79]] - truth.landmarks_2d[[36, 45]]).max() < 1e-3
    with pytest.raises(IndexError):
        data[7]


def test_writing_twice_gives_the_same_bytes(whole, items, tmp_path):
    write_lapa(tmp_path, items, world_seed=8)
    files = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
    assert len(files) == 21 and all((whole / f).read_bytes() == (tmp_path / f).read_bytes() for f in files)
    with pytest.raises(InputError):
        write_lapa(tmp_path, [])


def test_the_first_pixels_centre(tmp_path):
    write_lapa_points(tmp_path / "a.txt", np.full((106, 2), 0.5))
    assert (tmp_path / "a.txt").read_text().startswith("106\n0.000 0.000\n") and (read_lapa_points(tmp_path / "a.txt") == 0.5).all()
    assert (read_lapa_points(tmp_path / "a.txt", base=1.0) == -0.5).all()
    write_lapa_points(tmp_path / "b.txt", np.full((106, 2), 0.5), base=1.0)
    assert (read_lapa_points(tmp_path / "b.txt", base=1.0) == 0.5).all()
    for wrong in (np.full((106, 2), np.nan), np.zeros((106, 3)), np.zeros(212)):
        with pytest.raises(InputError):
            write_lapa_points(tmp_path / "c.txt", wrong)


def test_other_casing_suffixes_and_the_folder_above(root, items):
    (root / "train").rename(root / "Train")
    (root / "Train" / "images").rename(root / "Train" / "Images")
    for path in list((root / "Train" / "Images").iterdir()):
        path.rename(path.with_suffix(".JPG"))
    assert len(read_lapa(root.parent, "train")) == 4 and np.array_equal(read_lapa(root, "train")[0].image, items[0].image)


def test_a_set_without_points_has_none(root):
    shutil.rmtree(root / "val" / "landmarks")
    assert read_lapa(root, "val")[0].landmarks_2d is None
    assert "no points in val" in check_lapa(root, every=1e9).notes


def spoil_label(array):
    return lambda files: write_image(files[1], array)


SPOILED = {
    "labels missing": lambda files: files[1].unlink(),
    "landmarks missing": lambda files: files[2].unlink(),
    "labels empty": spoil_label(np.zeros((64, 64), np.uint8)),
    "labels damaged": spoil_label(np.full((64, 64), 11, np.uint8)),
    "labels damaged ": spoil_label(np.ones((32, 64), np.uint8)),
    "labels damaged  ": spoil_label(np.ones((64, 64, 3), np.uint8)),
    "labels empty ": lambda files: files[1].write_bytes(b""),
    "landmarks damaged": lambda files: files[2].write_text("105\n" + "1 2\n" * 105),
    "landmarks damaged ": lambda files: files[2].write_text("106\n" + "1 2\n" * 105),
    "landmarks empty": lambda files: files[2].write_bytes(b""),
    "picture damaged": lambda files: files[0].write_bytes(files[0].read_bytes()[:200]),
    "picture empty": lambda files: files[0].write_bytes(b""),
}


@pytest.mark.parametrize("what", SPOILED)
def test_damage_is_told_or_counted_by_reason(root, what):
    SPOILED[what](read_lapa(root, "train").files[1])
    with pytest.raises(InputError):
        list(read_lapa(root, "train").items())
    skipped = Skipped()
    assert len(list(read_lapa(root, "train", skipped).items(skipped))) == 3 and len(skipped) == 1
    report = check_lapa(root, every=1e9)
    assert report.left_out.reasons == {what.strip(): 1} and (report.found, report.used) == (7, 6)


def test_an_unknown_class_is_named(root):
    path = read_lapa(root, "train").files[0][1]
    write_image(path, np.full((64, 64), 17, np.uint8))
    with pytest.raises(InputError, match=r"unknown class 17 \(4096 pixels\)"):
        read_lapa_labels(path)


def test_points_outside_are_remarked(root):
    path = read_lapa(root, "test").files[0][2]
    path.write_text("106\n" + "999 2\n" * 106)
    report = check_lapa(root, every=1e9)
    assert report.used == 7 and any(note.startswith("pictures with a point outside: ") and "test/" in note for note in report.notes)


def test_habits_of_an_annotator(items, tmp_path):
    write_lapa(tmp_path, items, 8, relabel=lambda labels: np.where(labels == 10, 0, labels))
    assert not any((item.labels == 10).any() for item in read_lapa(tmp_path, "all").items())
    with pytest.raises(InputError, match="unknown class"):
        write_lapa(tmp_path, items, 8, relabel=lambda labels: labels + 9)


def test_wrong_questions(root, tmp_path):
    with pytest.raises(InputError):
        read_lapa(root, "dev")
    for place in (tmp_path / "none", tmp_path / "LaPa" / "train"):
        with pytest.raises(AssetError, match="lapa-dataset"):
            read_lapa(place)
