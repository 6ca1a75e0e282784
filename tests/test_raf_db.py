"RAF-DB's folders as its authors and Kaggle have them: the order of its labels, the published counts, shares by seed, copies that contradict themselves."

import shutil

import numpy as np
import pytest

from facelab.data.raf_db import LIST, RAF_CLASSES, RAF_COUNTS, check_raf_db, read_raf_db, write_raf_db
from facelab.data.world import generate
from facelab.lab.errors import AssetError, InputError, Skipped


@pytest.fixture(scope="module")
def items():
    return generate([*range(8), 18, 9, 19, 29], 1, 32, seed=8, supersample=1, workers=1, every=1e9)[0]


@pytest.fixture(scope="module")
def whole(items, tmp_path_factory):
    root = tmp_path_factory.mktemp("raf")
    assert write_raf_db(root, items) == {"train": 9, "test": 3}
    return root


@pytest.fixture
def root(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "raf")
    return tmp_path / "raf"


def edit(path, change):
    lines = path.read_text().splitlines()
    change(lines)
    path.write_text("\n".join(lines) + "\n")


def as_kaggle(root):
    "Turn the folders into Kaggle's."
    rows = [line.split() for line in (root / LIST).read_text().splitlines()]
    for split in ("train", "test"):
        own = [(name.replace(".jpg", "_aligned.jpg"), label) for name, label in rows if name.startswith(split)]
        (root / f"{split}_labels.csv").write_text("image,label\n" + "".join(f"{name},{label}\n" for name, label in own))
        for name, label in own:
            place = root / "DATASET" / split / label
            place.mkdir(parents=True, exist_ok=True)
            (root / "Image" / "aligned" / name).rename(place / name)
    shutil.rmtree(root / "Image")
    shutil.rmtree(root / "EmoLabel")


def same(data, items):
    for item, truth in zip(data.items(), sorted(items, key=lambda i: i.split == "test"), strict=True):
        assert np.array_equal(item.image, truth.image) and item.expression == truth.expression == RAF_CLASSES[item.label] and item.split == ("test" if truth.split == "test" else "train")


def test_labels_are_raf_dbs():
    assert RAF_CLASSES == ("Surprise", "Fear", "Disgust", "Happiness", "Sadness", "Anger", "Neutral")
    assert sum(RAF_COUNTS["train"]) == 12_271 and sum(RAF_COUNTS["test"]) == 3_068


def test_files_are_as_published(whole, items):
    lines = (whole / LIST).read_text().splitlines()
    first = sorted(items, key=lambda i: i.split == "test")[0]
    assert lines[0] == f"train_00001.jpg {RAF_CLASSES.index(first.expression) + 1}" and lines[9].startswith("test_0001.jpg ") and len(lines) == 12
    assert (whole / "Image" / "aligned" / "train_00001_aligned.jpg").read_bytes() == first.jpeg and (whole / "Image" / "aligned" / "test_0003_aligned.jpg").is_file()


@pytest.mark.parametrize("kind", ["authors", "kaggle", "folders", "basic above", "other casing"])
def test_what_went_in_comes_back(root, items, kind):
    if kind in ("kaggle", "folders"):
        as_kaggle(root)
    if kind == "folders":
        for split in ("train", "test"):
            (root / f"{split}_labels.csv").unlink()
    if kind == "basic above":
        (root.parent / "above").mkdir()
        root.rename(root.parent / "above" / "basic")
        root = root.parent / "above"
    if kind == "other casing":
        (root / "Image").rename(root / "IMAGE")
    data = read_raf_db(root)
    if kind == "folders":  # they come by label
        data = data.keep(sorted(range(len(data)), key=lambda k: (data.names[k].startswith("test"), data.names[k])))
    same(data, items)
    assert len(data.split("train")) == 9 and len(data.split("test")) == 3 and data[-1].split == "test"
    with pytest.raises(IndexError):
        data[12]


def test_writing_twice_gives_the_same_bytes(whole, items, tmp_path):
    write_raf_db(tmp_path, items)
    files = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
    assert len(files) == 13 and all((whole / f).read_bytes() == (tmp_path / f).read_bytes() for f in files)
    with pytest.raises(InputError):
        write_raf_db(tmp_path, [])


def test_pictures_before_alignment(root, items):
    (root / "Image" / "aligned").rename(root / "Image" / "original")
    for path in list((root / "Image" / "original").iterdir()):
        path.rename(path.with_name(path.name.replace("_aligned", "")))
    same(read_raf_db(root, "original"), items)
    with pytest.raises(AssetError, match="Image/aligned"):
        read_raf_db(root)
    with pytest.raises(InputError):
        read_raf_db(root, "cropped")


def test_shares_are_of_the_published_sizes(root):
    names = [f"train_{k:05d}.jpg" for k in range(1, 12_272)]
    (root / LIST).write_text("".join(f"{name} {k % 7 + 1}\n" for k, name in enumerate(names)))
    for name in names:
        (root / "Image" / "aligned" / name).touch()
    train = read_raf_db(root).split("train")
    assert [len(train.subset(share)) for share in (0.2, 0.5, 1)] == [2454, 6135, 12_271]
    assert set(train.subset(0.2, 3).names) < set(train.subset(0.5, 3).names) and train.subset(0.2, 3).names != train.subset(0.2, 4).names


ROWS = {
    "label 8": lambda x: x.__setitem__(2, "train_00003.jpg 8"),
    "label 0": lambda x: x.__setitem__(2, "train_00003.jpg 0"),
    "a word for a label": lambda x: x.__setitem__(2, "train_00003.jpg Fear"),
    "no label": lambda x: x.__setitem__(2, "train_00003.jpg"),
    "a name of another kind": lambda x: x.__setitem__(2, "valid_00003.jpg 3"),
    "a name that climbs out": lambda x: x.__setitem__(2, "../train_00003.jpg 3"),
    "a picture that is not there": lambda x: x.__setitem__(2, "train_77777.jpg 3"),
}


@pytest.mark.parametrize("what", ROWS)
def test_a_wrong_row_is_told_or_counted(root, what):
    edit(root / LIST, ROWS[what])
    with pytest.raises(InputError):
        read_raf_db(root)
    skipped = Skipped()
    data = read_raf_db(root, skipped=skipped)
    assert len(data) == 11 and len(skipped) == 1 and "train_00003" not in data.names and len(list(data.items())) == 11


def test_counting_from_zero_is_noticed(root):
    edit(root / LIST, lambda x: x.__setitem__(slice(None), [f"{line.split()[0]} {int(line.split()[1]) - 1}" for line in x]))
    if any(line.endswith(" 0") for line in (root / LIST).read_text().splitlines()):
        with pytest.raises(InputError, match="counts from 0"):
            read_raf_db(root)


def test_missing_and_damaged_pictures(root):
    pictures = root / "Image" / "aligned"
    (pictures / "train_00002_aligned.jpg").unlink()
    (pictures / "train_00004_aligned.jpg").write_bytes(b"")
    (pictures / "train_00005_aligned.jpg").write_bytes((pictures / "train_00005_aligned.jpg").read_bytes()[:100])
    (pictures / "train_00099_aligned.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match="train_00002"):
        read_raf_db(root)
    skipped = Skipped()
    data = read_raf_db(root, skipped=skipped)
    assert len(data) == 11 and len(list(data.items(skipped))) == 9 and len(skipped) == 3
    report = check_raf_db(root, every=1e9)
    assert report.left_out.reasons == {"picture missing": 1, "picture empty": 1, "picture damaged": 1} and (report.found, report.used) == (12, 9)
    assert any("pictures in no list: 1, such as train_00099" in note for note in report.notes) and any("12,271" in note for note in report.notes)


def test_a_copy_that_contradicts_itself(root):
    as_kaggle(root)
    name = next(p for p in (root / "DATASET" / "train").rglob("*.jpg"))
    other = root / "DATASET" / "train" / ("1" if name.parent.name != "1" else "2")
    other.mkdir(exist_ok=True)
    name.rename(other / name.name)
    with pytest.raises(InputError, match="as the list says"):
        read_raf_db(root)
    skipped = Skipped()
    assert len(read_raf_db(root, skipped=skipped)) == 11 and len(skipped) == 1
    assert check_raf_db(root, every=1e9).left_out.reasons == {"label contradicted": 1}


@pytest.mark.parametrize("text", ["", "image\ntrain_00001.jpg\n", "name,label\n", "image,label,split\ntrain_00001.jpg,1,train\n", "image,label\n"])
def test_a_list_of_kaggle_with_other_columns(root, text):
    as_kaggle(root)
    (root / "train_labels.csv").write_text(text)
    with pytest.raises(InputError, match="train_labels"):
        read_raf_db(root)


def test_nothing_there(tmp_path, root):
    for place in (tmp_path / "none", tmp_path):
        with pytest.raises(AssetError, match="list_patition_label"):
            read_raf_db(place if place.name == "none" else place / "empty")
    shutil.rmtree(root / "EmoLabel")
    with pytest.raises(AssetError, match="no list of labels"):
        read_raf_db(root)
    with pytest.raises(InputError, match="has no other"):
        read_raf_db_split(root)


def read_raf_db_split(root):
    (root / "EmoLabel").mkdir()
    (root / LIST).write_text("train_00001.jpg 1\n")
    return read_raf_db(root).split("val")
