"300-W's folders and .pts files: the first pixel's centre is 1, sets lie where the protocol looks, damage is told or counted."

import shutil

import numpy as np
import pytest

from facelab.data.w300 import PUBLISHED, SETS, check_w300, read_pts, read_w300, stem_of, write_pts, write_w300
from facelab.data.world import generate
from facelab.lab.errors import AssetError, InputError, Skipped


@pytest.fixture(scope="module")
def items():
    made, _ = generate([0, 1, 2, 8, 9, 19, 29, 39, 49], 1, 48, seed=8, supersample=1, workers=1, every=1e9)
    return made


@pytest.fixture(scope="module")
def whole(items, tmp_path_factory):
    root = tmp_path_factory.mktemp("w300")
    count = write_w300(root, items)
    assert count["helen/trainset"] == 3 and count["lfpw/trainset"] == 1 and count.get("ibug", 0) + count.get("helen/testset", 0) == 5
    return root


@pytest.fixture
def root(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "w300")
    return tmp_path / "w300"


def test_points_count_from_one(tmp_path):
    write_pts(tmp_path / "a.pts", np.array([[0.5, 0.5], [63.5, 10.25]]))
    assert (tmp_path / "a.pts").read_text() == "version: 1\nn_points:  2\n{\n1.000 1.000\n64.000 10.750\n}\n"
    assert np.array_equal(read_pts(tmp_path / "a.pts", count=None), np.float32([[0.5, 0.5], [63.5, 10.25]]))
    assert np.array_equal(read_pts(tmp_path / "a.pts", base=0.0, count=2), np.float32([[1.5, 1.5], [64.5, 11.25]]))
    with pytest.raises(InputError):
        read_pts(tmp_path / "a.pts")  # 68 by default


@pytest.mark.parametrize("points", [np.zeros((68, 3)), np.zeros(68), np.full((68, 2), np.nan), np.full((68, 2), np.inf)])
def test_wrong_points_are_not_written(tmp_path, points):
    with pytest.raises(InputError):
        write_pts(tmp_path / "a.pts", points)
    assert not list(tmp_path.iterdir())


def test_what_went_in_comes_back(whole, items):
    train, full, both = read_w300(whole, "train"), read_w300(whole, "full"), read_w300(whole, "all")
    assert (len(train), len(full), len(both)) == (4, 5, 9)
    by_picture = {item.jpeg: item for item in items}
    for data in (train, full):
        for picture, points in data.pairs:
            assert picture.stem == points.stem
        for (picture, _), back in zip(data.pairs, data.items(), strict=True):
            item = by_picture[picture.read_bytes()]
            assert np.array_equal(back.image, item.image) and np.abs(back.landmarks_2d - item.landmarks_2d).max() < 6e-4
            assert (item.split == "test") == (data is full)
    assert {item.name.split("/")[0] for item in full.items()} <= {"ibug", "helen"} and len(read_w300(whole, "common")) + len(read_w300(whole, "challenging") if (whole / "ibug").exists() else []) == 5


def test_files_of_the_wild_are_found(root):
    first = root / "helen" / "trainset" / "image_000001"
    before = read_w300(root)[0]
    first.with_suffix(".jpg").rename(first.parent / "image_ 000001.JPG")
    text = first.with_suffix(".pts").read_text()
    first.with_suffix(".pts").write_bytes(text.replace("version: 1", "version:1").replace(" ", "  ").replace("\n", "\r\n").encode())
    after = read_w300(root)[0]
    assert np.array_equal(before.image, after.image) and np.array_equal(before.landmarks_2d, after.landmarks_2d)
    assert stem_of(first.parent / "Image_092 _01.jpg") == stem_of(first.parent / "image_092_01.pts")


def test_damage_is_told_or_counted(root):
    folder = root / "helen" / "trainset"
    (folder / "image_000001.jpg").unlink()
    with pytest.raises(InputError):
        read_w300(root)
    skipped = Skipped()
    data = read_w300(root, "train", skipped)
    assert len(data) == 3 and [name for name, _ in skipped.items] == ["helen/trainset/image_000001.pts"]
    (folder / "image_000002.jpg").write_bytes(b"\xff\xd8\xff")
    text = (folder / "image_000003.pts").read_text().splitlines()
    (folder / "image_000003.pts").write_text("\n".join(text[:40]))
    assert [i.name for i in data.items(skipped)] == ["lfpw/trainset/image_000001"] and len(skipped) == 3
    with pytest.raises(InputError):
        list(data.items())


def challenging(root):
    "A pair of iBUG under the name that the real set has."
    first = root / "helen" / "testset" / "image_000001"
    (root / "ibug").mkdir(exist_ok=True)
    for suffix in (".jpg", ".pts"):
        shutil.copy(first.with_suffix(suffix), root / "ibug" / f"image_900{suffix}")
    return root / "ibug" / "image_900"


@pytest.mark.parametrize(("picture", "points"), [("image_092 _01.jpg", "image_092 _01.pts"), ("image_092 _01.jpg", "image_092_01.pts"), ("image_092_01.JPG", "Image_092 _01.PTS"), ("image_092_01.png", "image_092_01.pts")])
def test_the_file_with_a_blank_in_its_name(root, picture, points):
    pair = challenging(root)
    before = len(read_w300(root, "challenging"))
    pair.with_suffix(".jpg").rename(root / "ibug" / picture)
    pair.with_suffix(".pts").rename(root / "ibug" / points)
    data = read_w300(root, "challenging")
    item = next(i for k, i in enumerate(data.items()) if data.pairs[k][0].name == picture)
    assert len(data) == before and item.landmarks_2d.shape == (68, 2) and len(read_w300(root, "full")) == before + len(read_w300(root, "common"))


@pytest.mark.parametrize("change", [str.upper, str.title, lambda name: name.replace("set", "Set")])
def test_folders_in_another_casing(root, change):
    challenging(root)
    sizes = {name: len(read_w300(root, name)) for name in SETS}
    for part in ("helen/trainset", "helen/testset", "lfpw/trainset", "ibug", "helen", "lfpw"):
        if (root / part).is_dir():
            (root / part).rename((root / part).with_name(change((root / part).name)))
    assert {name: len(read_w300(root, name)) for name in SETS} == sizes and all(len(list(read_w300(root, name).items())) == n for name, n in sizes.items())


@pytest.mark.parametrize("name", ["300W", "300w", "300-W"])
def test_the_folder_above_is_opened(root, name):
    "As LaPa and CelebAMask-HQ: 300W is unpacked into a folder of its own, and one names the one above."
    above = root.parent / "up"
    above.mkdir()
    shutil.copytree(root, above / name)
    for part in ("train", "full", "all"):
        assert [item.name for item in read_w300(above, part).items()] == [item.name for item in read_w300(root, part).items()]
    assert str(check_w300(above, every=1e9)) == str(check_w300(root, every=1e9))


def test_names_of_ones_own(items, tmp_path):
    write_w300(tmp_path / "own", items, lambda item: f"{item.identity:06d}_{item.photo_id}")
    names = {item.name.rpartition("/")[2] for part in ("train", "full") for item in read_w300(tmp_path / "own", part).items()}
    assert names == {f"{item.identity:06d}_{item.photo_id}" for item in items}


@pytest.mark.parametrize("count", [67, 69, 29])
def test_another_number_of_points_is_told_or_counted(root, count):
    path = root / "helen" / "trainset" / "image_000002.pts"
    write_pts(path, np.full((count, 2), 9.0))
    with pytest.raises(InputError, match="68 points"):
        list(read_w300(root).items())
    skipped = Skipped()
    assert len(list(read_w300(root).items(skipped))) == 3 and skipped.items[0][0] == "helen/trainset/image_000002.pts"
    assert check_w300(root, every=1e9).left_out.reasons == {"landmarks damaged": 1}


def test_a_whole_folder_is_checked(root):
    assert sum(PUBLISHED[p] for p in SETS["train"]) == 3148 and sum(PUBLISHED[p] for p in SETS["common"]) == 554 and sum(PUBLISHED[p] for p in SETS["full"]) == 689
    folder = root / "helen" / "trainset"
    (folder / "image_000001.jpg").unlink()
    (folder / "image_000002.jpg").write_bytes(b"")
    (folder / "image_000003.pts").unlink()
    report = check_w300(root, every=1e9)
    assert report.left_out.reasons == {"picture missing": 1, "picture empty": 1} and (report.found, report.used) == (8, 6)
    assert "no folder afw" in report.notes and any(n.startswith("pictures without points: 1, such as helen/trainset/image_000003") for n in report.notes) and any("2000 published" in n for n in report.notes)


def test_wrong_questions(root, tmp_path):
    with pytest.raises(InputError):
        read_w300(root, "dev")
    with pytest.raises(AssetError):
        read_w300(tmp_path / "nothing")
    with pytest.raises(InputError):
        write_w300(tmp_path / "x", [])
