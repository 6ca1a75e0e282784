"300-W's folders and .pts files: the first pixel's centre is 1, sets lie where the protocol looks, damage is told or counted."

import shutil

import numpy as np
import pytest

from facelab.data.w300 import read_pts, read_w300, stem_of, write_pts, write_w300
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


def test_wrong_questions(root, tmp_path):
    with pytest.raises(InputError):
        read_w300(root, "dev")
    with pytest.raises(AssetError):
        read_w300(tmp_path / "nothing")
    with pytest.raises(InputError):
        write_w300(tmp_path / "x", [])
