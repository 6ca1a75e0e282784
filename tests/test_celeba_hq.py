"CelebA-HQ's folders as people have them: three layouts, CelebA's split, lists that are missing, cut short or of another release."

import shutil

import numpy as np
import pytest

from facelab.data.attributes import ATTRIBUTES
from facelab.data.celeba import SPLITS, write_celeba
from facelab.data.celeba_hq import ATTR, IMAGES, MAPPING, POSE, find_pictures, number_of, read_celeba_hq, read_mapping, write_celeba_hq
from facelab.data.world import generate
from facelab.lab.errors import AssetError, InputError, Skipped


@pytest.fixture(scope="module")
def items():
    return generate(12, 1, 48, seed=8, supersample=1, workers=1, every=1e9)[0]


@pytest.fixture(scope="module")
def whole(items, tmp_path_factory):
    root = tmp_path_factory.mktemp("hq")
    assert write_celeba_hq(root, items) == 12
    return root


@pytest.fixture
def root(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "hq")
    return tmp_path / "hq"


def edit(path, change):
    lines = path.read_text().splitlines()
    change(lines)
    path.write_text("\n".join(lines) + "\n")


def same(data, items):
    for item, truth in zip(data.items(), items, strict=True):
        assert np.array_equal(item.image, truth.image)
        if item.attributes is not None:
            assert np.array_equal(item.attributes, truth.attributes)
        if item.landmarks_2d is not None:
            assert np.abs(item.landmarks_2d - truth.landmarks_2d).max() < 1e-3


def test_files_are_as_published(whole):
    assert (whole / IMAGES / "0.jpg").is_file() and (whole / IMAGES / "11.jpg").is_file()
    lines = (whole / f"{ATTR}.txt").read_text().splitlines()
    assert lines[0] == "12" and lines[1].split() == ATTRIBUTES and lines[2].startswith("0.jpg  ") and len(lines[2].split()) == 41
    assert (whole / f"{POSE}.txt").read_text().splitlines()[:2] == ["12", "Yaw Pitch Raw"]
    assert (whole / MAPPING).read_text().splitlines()[0].split() == ["idx", "orig_idx", "orig_file"]


def test_round_trip(whole, items):
    data = read_celeba_hq(whole)
    same(data, items)
    assert [i.split for i in data.items()] == [i.split for i in items]
    assert np.abs(data.pose - np.degrees(np.stack([i.pose for i in items]))).max() < 0.01


def test_original_file_is_the_one_that_celeba_has(whole, items, tmp_path):
    write_celeba(tmp_path, items)
    for name, item in zip(read_celeba_hq(whole).originals, items, strict=True):
        assert (tmp_path / "img_align_celeba" / name).read_bytes() == item.jpeg


def test_padded_names_and_parent_folder(root, items):
    (root / IMAGES).rename(root / "celeba_hq_256")
    for path in list((root / "celeba_hq_256").iterdir()):
        path.rename(path.with_name(f"{int(path.stem):05d}.jpg"))
    data = read_celeba_hq(root)
    assert data.names[10] == "celeba_hq_256/00010.jpg" and data.points[10] == root / "landmarks" / "10.pts"
    same(data, items)


def test_folder_above(root, items):
    (root.parent / "above").mkdir()
    root.rename(root.parent / "above" / "CelebAMask-HQ")
    same(read_celeba_hq(root.parent / "above"), items)


def test_split_folders_need_no_mapping(root, items):
    for k, item in enumerate(items):
        place = root / "star" / ("val" if k % 3 == 0 else "train") / ("male" if k % 2 else "female")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{k:06d}.jpg").write_bytes(item.jpeg)
        shutil.copy(root / "landmarks" / f"{k}.pts", place / f"{k:06d}.pts")
    data = read_celeba_hq(root / "star")
    assert len(data.split("train")) == 8 and len(data.split("val")) == 4 and data.attributes is None
    for item in data.items():
        truth = items[int(number_of(item.name))]
        assert np.array_equal(item.image, truth.image) and np.abs(item.landmarks_2d - truth.landmarks_2d).max() < 1e-3


def test_celebas_own_bounds_without_its_list(root):
    (root / "list_eval_partition.txt").unlink()
    files = ["000001", "162770", "162771", "182637", "182638", "202599"]
    edit(root / MAPPING, lambda lines: lines.__setitem__(slice(1, None), [f"{k} {int(f) - 1} {f}.jpg" for k, f in enumerate(files)]))
    assert read_celeba_hq(root).partition.tolist() == [0, 0, 1, 1, 2, 2] + [-1] * 6
    (root.parent / "celeba").mkdir()
    (root.parent / "celeba" / "list_eval_partition.txt").write_text("000001.jpg 2\n162770.jpg 1\n")
    assert read_celeba_hq(root, root.parent / "celeba").partition.tolist() == [2, 1] + [-1] * 10


def test_split_without_a_mapping_says_what_is_missing(root):
    (root / MAPPING).unlink()
    with pytest.raises(InputError, match="mapping"):
        read_celeba_hq(root).split("train")
    with pytest.raises(InputError):
        read_celeba_hq(root).split("training")


def test_bare_pictures(root, items):
    data = read_celeba_hq(root / IMAGES)
    same(data, items)
    assert data[0].attributes is None and data[0].pose is None and data[0].split == "" and data[0].landmarks_2d is None


def test_nothing_there(tmp_path):
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(AssetError, match="CelebA-HQ-img"):
            read_celeba_hq(place)


@pytest.mark.parametrize(
    "stem, change",
    [
        (ATTR, lambda lines: lines.pop()), (ATTR, lambda lines: lines.__setitem__(1, "a b c")), (ATTR, lambda lines: lines.__setitem__(4, lines[4].replace("-1", "0"))), (ATTR, lambda lines: lines.__setitem__(4, "2.jpg 1")),
        (POSE, lambda lines: lines.pop()), (POSE, lambda lines: lines.__setitem__(3, "1.jpg 0 nan 1")), (POSE, lambda lines: lines.__setitem__(3, "1.jpg 0 1")), (MAPPING[:-4], lambda lines: lines.__setitem__(3, lines[2])),
        (MAPPING[:-4], lambda lines: lines.__setitem__(3, "2 5 ../x.jpg")), ("list_eval_partition", lambda lines: lines.__setitem__(0, "000001.jpg 7")),
    ],
)  # fmt: skip
def test_wrong_list_is_one_clear_error(root, stem, change):
    edit(root / f"{stem}.txt", change)
    with pytest.raises(InputError, match=stem):
        read_celeba_hq(root)


def test_missing_rows_are_told_or_counted(root):
    edit(root / f"{ATTR}.txt", lambda lines: (lines.pop(5), lines.__setitem__(0, "11")))
    with pytest.raises(InputError, match="no row"):
        read_celeba_hq(root)
    skipped = Skipped()
    data = read_celeba_hq(root, skipped=skipped)
    assert len(data) == 11 and len(skipped) == 1 and f"{IMAGES}/3.jpg" not in data.names


def test_damaged_picture_and_landmarks(root):
    (root / IMAGES / "4.jpg").write_bytes(b"not a picture")
    (root / "landmarks" / "6.pts").write_text("version: 1\nn_points: 68\n{\n1 2\n}\n")
    data, skipped = read_celeba_hq(root), Skipped()
    assert len(list(data.items(skipped))) == 10 and len(skipped) == 2
    with pytest.raises(InputError):
        data[4]


def test_order_is_by_number(tmp_path):
    for k in (10, 9, 100, 0):
        (tmp_path / f"{k}.jpg").write_bytes(b"")
    assert find_pictures(tmp_path) == ["0.jpg", "9.jpg", "10.jpg", "100.jpg"]


def test_mapping_without_header(tmp_path):
    (tmp_path / "m.txt").write_text("0 119613 119614.jpg\n1 99094 099095.jpg\n")
    assert read_mapping(tmp_path / "m.txt") == {"0": "119614.jpg", "1": "099095.jpg"}


def test_splits_are_whole(whole):
    data = read_celeba_hq(whole)
    assert sum(len(data.split(s)) for s in SPLITS if (data.partition == SPLITS.index(s)).any()) == len(data)
