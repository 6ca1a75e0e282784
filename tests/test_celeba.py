"CelebA's folders and lists: what is written is what its authors ship, what is read back is what went in, and damage is told or counted."

import csv
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from facelab.data.attributes import ATTRIBUTES
from facelab.data.celeba import POINTS, SPLITS, celeba_points, check_celeba, face_box, read_celeba, write_celeba
from facelab.data.world import generate
from facelab.lab.assets import find_asset
from facelab.lab.errors import AssetError, InputError, Skipped, UnsafeFileError

LISTS = ("list_attr_celeba", "list_landmarks_align_celeba", "list_landmarks_celeba", "list_bbox_celeba", "identity_CelebA", "list_eval_partition")


@pytest.fixture(scope="module")
def items():
    made, _ = generate(12, 1, 48, seed=8, supersample=1, workers=1, every=1e9)
    return sorted(made, key=lambda i: SPLITS.index(i.split))


@pytest.fixture(scope="module")
def whole(items, tmp_path_factory):
    root = tmp_path_factory.mktemp("celeba")
    assert write_celeba(root, items[::-1]) == 12
    return root


@pytest.fixture
def root(whole, tmp_path):
    "A copy that may be spoiled."
    shutil.copytree(whole, tmp_path / "celeba")
    return tmp_path / "celeba"


def edit(path, change):
    lines = path.read_text().splitlines()
    change(lines)
    path.write_text("\n".join(lines) + "\n")


def as_csv(root):
    "Turn the lists into Kaggle's."
    for stem in LISTS:
        rows = [line.split() for line in (root / f"{stem}.txt").read_text().splitlines()]
        if stem in ("identity_CelebA", "list_eval_partition"):
            head = ["image_id", {"identity_CelebA": "identity", "list_eval_partition": "partition"}[stem]]
        else:
            head, rows = ["image_id", *[n for n in rows[1] if n != "image_id"]], rows[2:]
        with open(root / f"{stem}.csv", "w", newline="") as file:
            csv.writer(file).writerows([head, *rows])
        (root / f"{stem}.txt").unlink()
    (root / "img_align_celeba").rename(root / "inner")
    (root / "img_align_celeba").mkdir()
    (root / "inner").rename(root / "img_align_celeba" / "img_align_celeba")


def as_authors(root, png=False):
    "Move all into the folders that CelebA's authors ship; with PNG pictures, whose lists say .jpg all the same."
    for folder, stems in (("Anno", LISTS[:-1]), ("Eval", LISTS[-1:])):
        (root / folder).mkdir()
        for stem in stems:
            (root / f"{stem}.txt").rename(root / folder / f"{stem}.txt")
    pictures = root / "Img" / ("img_align_celeba_png" if png else "img_align_celeba")
    pictures.parent.mkdir()
    (root / "img_align_celeba").rename(pictures)
    for path in pictures.glob("*.jpg") if png else ():
        Image.open(path).save(path.with_suffix(".png"))
        path.unlink()


def test_the_lists_are_celebas(whole):
    first = {stem: (whole / f"{stem}.txt").read_text().splitlines() for stem in LISTS}
    assert first["list_attr_celeba"][0] == "12" and first["list_attr_celeba"][1].split() == list(ATTRIBUTES)
    name, *values = first["list_attr_celeba"][2].split()
    assert name == "000001.jpg" and len(values) == 40 and set(values) <= {"1", "-1"}
    assert first["list_landmarks_align_celeba"][1].split() == POINTS and len(first["list_landmarks_celeba"][2].split()) == 11
    assert first["list_bbox_celeba"][:2] == ["12", "image_id x_1 y_1 width height"] and len(first["list_bbox_celeba"][2].split()) == 5
    assert first["identity_CelebA"][0].split()[0] == "000001.jpg" and int(first["identity_CelebA"][0].split()[1]) >= 1 and len(first["identity_CelebA"]) == 12
    assert [line.split()[1] for line in first["list_eval_partition"]] == sorted(line.split()[1] for line in first["list_eval_partition"])
    assert sorted(p.name for p in (whole / "img_align_celeba").iterdir()) == [f"{k:06d}.jpg" for k in range(1, 13)]


@pytest.mark.parametrize("kind", ["txt", "csv", "authors", "authors, png"])
def test_what_went_in_comes_back(root, items, kind):
    if kind == "csv":
        as_csv(root)
    elif kind != "txt":
        as_authors(root, kind.endswith("png"))
    data = read_celeba(root)
    assert len(data) == 12 and data.boxes.shape == (12, 4)
    for item, back in zip(sorted(items[::-1], key=lambda i: SPLITS.index(i.split)), data.items(), strict=True):
        assert np.array_equal(back.image, item.image) and np.array_equal(back.attributes, item.attributes)
        assert back.identity == item.identity + 1 and back.split == item.split
        assert np.abs(back.points - celeba_points(item.landmarks_2d)).max() <= 0.5 and np.array_equal(back.box, face_box(item.landmarks_2d, (48, 48)))
    assert [len(data.split(s)) for s in SPLITS] == [10, 1, 1] and data[-1].split == "test"
    assert not set(data.split("train").identity) & set(data.split("test").identity)
    with pytest.raises(InputError):
        data.split("dev")
    with pytest.raises(IndexError):
        data[12]


@pytest.mark.parametrize("png", [False, True])
def test_the_authors_folders_are_checked_and_found_as_an_asset(root, png, monkeypatch):
    as_authors(root, png)
    monkeypatch.setenv("FACELAB_ASSETS", str(root.parent))
    assert find_asset("celeba") == root
    pictures = next((root / "Img").iterdir())
    (pictures / f"999999.{'png' if png else 'jpg'}").write_bytes(b"x")
    report = check_celeba(root, every=1e9)
    assert (report.used, report.found) == (12, 12) and len(report.notes) == 1 and "pictures in no list" in report.notes[0]
    (root / "Eval" / "list_eval_partition.txt").unlink()
    with pytest.raises(AssetError, match="Eval/list_eval_partition.txt"):
        find_asset("celeba")
    edit(root / "Anno" / "list_attr_celeba.txt", lambda x: x.pop())
    with pytest.raises(InputError, match="Anno"):
        read_celeba(root)
    shutil.rmtree(root / "Img")
    with pytest.raises(AssetError, match="Img/img_align_celeba.*Unpack"):
        read_celeba(root)


def test_writing_twice_gives_the_same_bytes(whole, items, tmp_path):
    write_celeba(tmp_path, items[::-1])
    files = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()) and len(files) == 18
    assert all((whole / f).read_bytes() == (tmp_path / f).read_bytes() for f in files)
    with pytest.raises(InputError):
        write_celeba(tmp_path, [])


def test_a_box_stays_in_the_picture_and_holds_the_face():
    points = np.random.default_rng(0).uniform(5, 60, (68, 2))
    for shift in (0.0, -30.0, 40.0):
        left, top, width, height = face_box(points + shift, (64, 64))
        assert 0 <= left < left + width <= 64 and 0 <= top < top + height <= 64
    left, top, width, height = face_box(points, (64, 64))
    assert left <= points[:, 0].min() and left + width >= points[:, 0].max() and top <= points[:, 1].min() and top + height >= points[:, 1].max()


SPOILED = {
    "short row": lambda r: edit(r / "list_attr_celeba.txt", lambda x: x.__setitem__(4, x[4].rsplit(" ", 1)[0])),
    "a word for a number": lambda r: edit(r / "list_landmarks_align_celeba.txt", lambda x: x.__setitem__(4, x[4].rsplit(" ", 1)[0] + " left")),
    "NaN": lambda r: edit(r / "list_bbox_celeba.txt", lambda x: x.__setitem__(4, "000003.jpg 1 nan 3 4")),
    "a name that climbs out": lambda r: edit(r / "identity_CelebA.txt", lambda x: x.__setitem__(2, "../../etc/passwd 3")),
    "a drive": lambda r: edit(r / "list_attr_celeba.txt", lambda x: x.__setitem__(4, "C:" + x[4])),
    "a row missing in one list": lambda r: edit(r / "list_eval_partition.txt", lambda x: x.pop(2)),
}
BROKEN = {
    "empty list": lambda r: (r / "list_attr_celeba.txt").write_bytes(b""),
    "cut list": lambda r: edit(r / "list_attr_celeba.txt", lambda x: x.pop()),
    "a count that is no number": lambda r: edit(r / "list_attr_celeba.txt", lambda x: x.__setitem__(0, "twelve")),
    "other columns": lambda r: edit(r / "list_attr_celeba.txt", lambda x: x.__setitem__(1, x[1].replace("Male", "Man"))),
    "0 for -1": lambda r: edit(r / "list_attr_celeba.txt", lambda x: x.__setitem__(3, x[3].replace("-1", " 0"))),
    "a fourth split": lambda r: edit(r / "list_eval_partition.txt", lambda x: x.__setitem__(3, "000004.jpg 3")),
    "one name twice": lambda r: edit(r / "list_attr_celeba.txt", lambda x: x.__setitem__(4, x[3])),
    "not UTF-8": lambda r: (r / "identity_CelebA.txt").write_bytes(b"000001.jpg \xff\xfe\n"),
    "a list that is a folder": lambda r: ((r / "identity_CelebA.txt").unlink(), (r / "identity_CelebA.txt").mkdir()),
    "a link to itself": lambda r: ((r / "identity_CelebA.txt").unlink(), os.symlink("identity_CelebA.txt", r / "identity_CelebA.txt")),
}


@pytest.mark.parametrize("what", [*SPOILED, *BROKEN])
def test_damage_is_an_input_error(root, what):
    (SPOILED | BROKEN)[what](root)
    with pytest.raises(InputError) as told:
        read_celeba(root)
    assert told.value.came and told.value.needed and told.value.fix


@pytest.mark.parametrize("what", SPOILED)
def test_in_a_batch_a_wrong_row_is_counted_and_the_rest_is_used(root, what):
    SPOILED[what](root)
    skipped = Skipped()
    data = read_celeba(root, skipped)
    assert len(data) == 11 and 1 <= len(skipped) <= 2 and "000003.jpg" not in data.names
    assert len(list(data.items(skipped))) == 11 and "skipped" in skipped.report(12)


def test_pictures_that_are_missing_or_damaged_are_counted(root):
    pictures = root / "img_align_celeba"
    (pictures / "000002.jpg").unlink()
    (pictures / "000005.jpg").write_bytes((pictures / "000005.jpg").read_bytes()[:200])
    (pictures / "000009.jpg").write_bytes(b"")
    data, skipped = read_celeba(root), Skipped()
    assert [i.name for i in data.items(skipped)] == [f"{k:06d}.jpg" for k in (1, 3, 4, 6, 7, 8, 10, 11, 12)]
    assert [name for name, _ in skipped.items] == ["000002.jpg", "000005.jpg", "000009.jpg"]
    with pytest.raises(InputError):
        list(data.items())


def heads(root, stem, change):
    path = root / f"{stem}.csv"
    first, rest = path.read_text().split("\n", 1)
    path.write_text(change(first.strip()) + "\n" + rest)


OTHER = {
    "list_eval_partition": lambda head: "image_id,split",
    "identity_CelebA": lambda head: "image_id,partition",
    "list_bbox_celeba": lambda head: "image_id,x_1,y_1,height,width",
    "list_landmarks_align_celeba": lambda head: head.replace("lefteye_x,lefteye_y,righteye_x,righteye_y", "righteye_x,righteye_y,lefteye_x,lefteye_y"),
    "list_attr_celeba": lambda head: head.replace("Male", "Man"),
}


@pytest.mark.parametrize("stem", OTHER)
def test_lists_of_kaggle_with_other_columns_are_refused(root, stem):
    as_csv(root)
    read_celeba(root)
    heads(root, stem, OTHER[stem])
    with pytest.raises(InputError, match=stem):
        read_celeba(root)


def test_lists_of_kaggle_may_lack_rows_and_have_a_mark_at_their_head(root):
    as_csv(root)
    path = root / "list_eval_partition.csv"
    lines = path.read_text().split("\n")
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines[:4] + lines[5:]).encode())
    with pytest.raises(InputError, match="000004.jpg"):
        read_celeba(root)
    skipped = Skipped()
    assert len(read_celeba(root, skipped)) == 11 and len(skipped) == 1


def test_shares_are_of_the_published_sizes(root):
    data = read_celeba(root)
    full = data.keep(np.zeros(162_770, int))
    assert [len(full.subset(share)) for share in (0.01, 0.1, 1)] == [1627, 16_277, 162_770]
    assert len(data.subset(0.5, seed=2)) == 6 and set(data.subset(0.2, 5).names) <= set(data.subset(0.5, 5).names) and data.subset(0.5, 5).names != data.subset(0.5, 6).names
    part = data.subset(0.5, seed=2)
    assert np.array_equal(part[1].attributes, data[data.names.index(part.names[1])].attributes)


def test_a_whole_folder_is_checked(root):
    assert check_celeba(root, every=1e9).whole
    pictures = root / "img_align_celeba"
    (pictures / "000002.jpg").unlink()
    (pictures / "000005.jpg").write_bytes(b"")
    (pictures / "000013.jpg").write_bytes((pictures / "000001.jpg").read_bytes())
    edit(root / "list_eval_partition.txt", lambda x: x.pop(2))
    edit(root / "list_attr_celeba.txt", lambda x: x.__setitem__(10, x[10].rsplit(" ", 1)[0]))
    (root / "identity_CelebA.txt").unlink()
    report = check_celeba(root, every=1e9)
    assert report.left_out.reasons == {"picture missing": 1, "picture empty": 1, "list row missing": 1, "list row damaged": 1} and (report.found, report.used) == (12, 8)
    assert sum(report.counts["split"].values()) == 8 and report.counts["size"] == {"48x48": 8}
    assert "no list of identities" in report.notes and any(n.startswith("pictures in no list: 1, such as 000013") for n in report.notes)


def test_no_folder_and_no_list_say_where_to_get_celeba(root, tmp_path):
    with pytest.raises(AssetError):
        read_celeba(tmp_path / "nothing")
    (root / "list_attr_celeba.txt").unlink()
    with pytest.raises(AssetError):
        read_celeba(root)


def test_lists_that_are_optional_may_be_absent(root):
    for stem in LISTS[1:]:
        (root / f"{stem}.txt").unlink()
    data = read_celeba(root)
    assert len(data) == 12 and data.points is None and data.boxes is None and data[0].split == "" and data[0].identity == 0


def test_a_name_in_memory_cannot_climb_out(root):
    data = read_celeba(root)
    data.names[0] = "../identity_CelebA.txt"
    with pytest.raises(UnsafeFileError):
        data[0]
