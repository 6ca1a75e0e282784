"CelebAMask-HQ's masks: the order is named, sides are the person's, what is written is what its authors ship, damage is told or counted."

import shutil

import numpy as np
import pytest
from PIL import Image

from facelab.data.celeba import SPLITS
from facelab.data.celeba_hq import MAPPING, read_celeba_hq
from facelab.data.celebamask_hq import HQ_COUNTS, MASKS, check_celebamask_hq, mask_path, merge_masks, read_celebamask_hq, read_masks, write_celebamask_hq
from facelab.data.label_sets import CELEBAMASK_ORDERS, CELEBAMASK_PARTS, celebamask_set, grow_class, remap
from facelab.data.world import generate
from facelab.lab.errors import AssetError, InputError, Skipped
from facelab.lab.images import write_image


@pytest.fixture(scope="module")
def items():
    return generate(12, 1, 64, seed=8, supersample=1, workers=1, every=1e9)[0]


@pytest.fixture(scope="module")
def whole(items, tmp_path_factory):
    root = tmp_path_factory.mktemp("hq")
    assert write_celebamask_hq(root, items, side=128) == 12
    return root


@pytest.fixture
def root(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "hq")
    return tmp_path / "hq"


def test_overlaps_are_decided_by_the_order():
    row = lambda *on: np.array([on], bool)
    masks = {"hair": row(1, 1, 0, 0), "neck": row(0, 1, 1, 0), "cloth": row(0, 0, 1, 0), "eye_g": row(1, 0, 0, 0), "skin": row(1, 1, 0, 0)}
    names = {order: [celebamask_set(order).classes[n] for n in merge_masks(masks, order)[0]] for order in CELEBAMASK_ORDERS}
    assert names == {
        "readme": ["hair", "neck", "cloth", "background"], "g_mask": ["hair", "neck", "cloth", "background"], "g_mask_list1": ["hair", "hair", "cloth", "background"],
        "farl": ["eye_g", "hair", "cloth", "background"], "bisenet": ["hair", "hair", "cloth", "background"],
    }  # fmt: skip


def test_a_merge_is_a_loop_over_pixels():
    rng = np.random.default_rng(0)
    masks = {part: rng.random((9, 7)) < 0.2 for part in list(CELEBAMASK_PARTS)[::2]}
    for order in CELEBAMASK_ORDERS:
        slow = np.zeros((9, 7), int)
        for y in range(9):
            for x in range(7):
                for number, part in enumerate(CELEBAMASK_ORDERS[order], 1):
                    if part in masks and masks[part][y, x]:
                        slow[y, x] = number
        assert np.array_equal(merge_masks(masks, order), slow)
    own = tuple(reversed(CELEBAMASK_ORDERS["readme"]))
    assert merge_masks({"skin": np.ones((1, 1), bool)}, own).item() == 18


def test_files_are_as_published(whole, items):
    names = sorted(p.name for p in (whole / MASKS / "0").iterdir())
    assert all(len(n.split("_")[0]) == 5 and n.split("_", 1)[1][:-4] in CELEBAMASK_PARTS for n in names) and names[0].startswith("00000_")
    with Image.open(whole / MASKS / "0" / "00000_skin.png") as image:
        assert image.mode == "RGB" and image.size == (128, 128) and sorted(image.convert("L").getextrema()) == [0, 255]
        assert np.unique(np.asarray(image.convert("P"))).tolist() == [0, 225]  # as face-parsing.PyTorch's script looks for
    assert mask_path(whole, 29_999, "ear_r") == whole / MASKS / "14" / "29999_ear_r.png" and mask_path(whole, 2000, "hat").parent.name == "1"


def test_a_part_that_is_absent_has_no_file(whole, items):
    for number, item in enumerate(items):
        there = {p.name.split("_", 1)[1][:-4] for p in (whole / MASKS / "0").glob(f"{number:05d}_*.png")}
        said = {celebamask_set("readme").classes[k] for k in np.unique(remap(item.labels19, "world19", "celebamask_readme")[0]) if k}
        assert there == said


@pytest.mark.parametrize("order", CELEBAMASK_ORDERS)
def test_what_went_in_comes_back_in_every_order(whole, items, order):
    data = read_celebamask_hq(whole, order)
    for item, truth in zip(data.items(), items, strict=True):
        back, table = remap(item.labels[::2, ::2], data.classes, "world19")
        assert table.exact and np.array_equal(back, truth.labels19) and np.array_equal(item.image, truth.image) and np.array_equal(item.attributes, truth.attributes)
        assert item.split == truth.split and np.abs(item.landmarks_2d - truth.landmarks_2d).max() < 1e-3 and item.labels.shape == (128, 128)
    assert sum(len(data.split(s)) for s in SPLITS if (data.pictures.partition == SPLITS.index(s)).any()) == 12 and len(data.keep([1, 3])) == 2


def test_left_in_the_files_is_the_persons_left(whole, items):
    seen = 0
    for number, item in enumerate(items):
        masks = read_masks(whole, number)
        if abs(np.degrees(item.pose[0])) < 20:
            for part, at in (("eye", 42), ("brow", 24)):
                if f"l_{part}" in masks and f"r_{part}" in masks:
                    left, right = (np.nonzero(masks[f"{side}_{part}"])[1].mean() / 2 for side in "lr")
                    seen += 1
                    assert left > right and abs(left - item.landmarks_2d[at : at + (6 if part == "eye" else 1), 0].mean()) < 6
    assert seen >= 6


def test_originals_masks_are_512(items, tmp_path):
    write_celebamask_hq(tmp_path, items[:1])
    assert read_celebamask_hq(tmp_path, "readme")[0].labels.shape == (512, 512) and read_celebamask_hq(tmp_path, "farl")[0].image.shape == (64, 64, 3)


def test_the_folder_is_the_one_that_celeba_hq_reads(whole):
    assert read_celebamask_hq(whole, "readme").pictures.names == read_celeba_hq(whole).names


def test_the_split_is_celebas_over_the_mapping(root):
    (root / "list_eval_partition.txt").unlink()
    files = ["000001", "162770", "162771", "182637", "182638", "202599", *(f"{n:06d}" for n in range(2, 8))]
    (root / MAPPING).write_text("idx orig_idx orig_file\n" + "".join(f"{k} {int(f) - 1} {f}.jpg\n" for k, f in enumerate(files)))
    data = read_celebamask_hq(root, "readme")
    assert [i.split for i in data.items()][:6] == ["train", "train", "val", "val", "test", "test"] and [len(data.split(s)) for s in SPLITS] == [8, 2, 2]
    assert sum(HQ_COUNTS.values()) == 30_000


def test_labels_of_another_hand(items, tmp_path):
    write_celebamask_hq(tmp_path / "a", items[:4], side=64, leave_out=["hair", "eye_g"])
    write_celebamask_hq(tmp_path / "b", items[:4], side=64, relabel=lambda labels: grow_class(labels, "world19", "nose", 1))
    hair = celebamask_set("readme").id_of("hair")
    for a, b, truth in zip(read_celebamask_hq(tmp_path / "a", "readme").items(), read_celebamask_hq(tmp_path / "b", "readme").items(), items):
        assert not (a.labels == hair).any() and "hair" not in a.parts and (b.labels == 2).sum() > (truth.labels19 == 2).sum() > 0
    with pytest.raises(InputError):
        write_celebamask_hq(tmp_path / "c", items[:1], leave_out=["beard"])
    with pytest.raises(InputError):
        write_celebamask_hq(tmp_path / "c", items[:1], relabel=lambda labels: labels + 100)


def all_black(root):
    for path in (root / MASKS / "0").glob("00003_*.png"):
        write_image(path, np.zeros((128, 128, 3), np.uint8))


SPOILED = {
    "masks missing": lambda root: [p.unlink() for p in (root / MASKS / "0").glob("00003_*.png")],
    "masks empty": all_black,
    "masks empty ": lambda root: mask_path(root, 3, "skin").write_bytes(b""),
    "masks damaged": lambda root: mask_path(root, 3, "skin").write_bytes(mask_path(root, 3, "skin").read_bytes()[:60]),
    "masks damaged ": lambda root: write_image(mask_path(root, 3, "skin"), np.zeros((64, 64, 3), np.uint8)),
    "masks unsafe or too large": lambda root: (mask_path(root, 3, "skin").unlink(), Image.new("1", (5000, 5000)).save(mask_path(root, 3, "skin"))),
    "picture empty": lambda root: (root / "CelebA-HQ-img" / "3.jpg").write_bytes(b""),
    "landmarks damaged": lambda root: (root / "landmarks" / "3.pts").write_text("version: 1\nn_points: 67\n{\n" + "1 2\n" * 67 + "}\n"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_damage_is_told_or_counted_by_reason(root, what):
    SPOILED[what](root)
    data, skipped = read_celebamask_hq(root, "readme"), Skipped()
    with pytest.raises(InputError):
        data[3]
    assert len(list(data.items(skipped))) == 11 and len(skipped) == 1
    report = check_celebamask_hq(root, "readme", every=1e9)
    assert report.left_out.reasons == {what.strip(): 1} and (report.found, report.used) == (12, 11)


RENAMED = {
    "parts": lambda path: path.with_name(path.stem[:6] + path.stem[6:].title() + path.suffix),
    "suffix": lambda path: path.with_suffix(".PNG"),
    "both": lambda path: path.with_name(path.name.upper()),
}


@pytest.mark.parametrize("how", RENAMED)
def test_no_mask_is_lost_by_its_casing(root, how):
    "`00000_Hair.png`, `.PNG`, and folders of other casing: all masks are read; of two names of one mask the published one."
    before = [(item.labels, item.parts) for item in read_celebamask_hq(root, "farl").items()]
    for path in sorted((root / MASKS / "0").iterdir()):
        path.rename(RENAMED[how](path))
    (root / MASKS).rename(root / MASKS.lower())
    (root / "CelebA-HQ-img").rename(root / "celeba-hq-IMG")
    (root.parent / "up").mkdir()
    root.rename(root.parent / "up" / "celebamask-hq")
    again = read_celebamask_hq(root.parent / "up", "farl")
    for (labels, parts), item in zip(before, again.items(), strict=True):
        assert np.array_equal(item.labels, labels) and item.parts == parts
    assert not any("masks" in note for note in check_celebamask_hq(root.parent / "up", "farl", every=1e9).notes)
    folder = root.parent / "up" / "celebamask-hq" / MASKS.lower() / "0"
    write_image(folder / "00000_skin.png", np.full((128, 128), 255, np.uint8))
    assert len(list(folder.glob("00000_[sS][kK][iI][nN].*"))) == 2 and read_masks(again.pictures.root, 0)["skin"].all()


def test_odd_masks_are_remarked(root):
    for name in ("0/00002_beard.png", "0/00099_skin.png", "3/00001_hat.png"):
        (root / MASKS / name).parent.mkdir(exist_ok=True)
        write_image(root / MASKS / name, np.zeros((128, 128), np.uint8))
    notes = check_celebamask_hq(root, "farl", every=1e9).notes
    assert any("unknown parts: 1, such as 00002_beard" in n for n in notes) and any("without a picture: 1, such as 00099" in n for n in notes) and any("wrong folder: 1" in n for n in notes)
    assert any("24,183" in n for n in notes)


def test_wrong_questions(root, tmp_path):
    for order in ("spade", [], ["skin", "hair"]):
        with pytest.raises(InputError, match="merge order"):
            read_celebamask_hq(root, order)
    with pytest.raises(TypeError):
        read_celebamask_hq(root)  # there is no default
    with pytest.raises(AssetError):
        read_celebamask_hq(tmp_path / "none", "readme")
    (root / "CelebA-HQ-img" / "portrait.jpg").write_bytes((root / "CelebA-HQ-img" / "0.jpg").read_bytes())
    (root / "CelebAMask-HQ-attribute-anno.txt").unlink()
    with pytest.raises(InputError, match="without a number"):
        read_celebamask_hq(root, "readme")
    shutil.rmtree(root / MASKS)
    with pytest.raises(AssetError, match=MASKS):
        read_celebamask_hq(root, "readme")
