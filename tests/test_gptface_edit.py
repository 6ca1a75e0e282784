"GPTFace in use: pixels outside the mask, unaligned photos, batches, threads, disk, and what comes in wrong."

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from facelab.data.celeba import read_celeba
from facelab.data.face_crop import FaceBox
from facelab.gptface.damage import add_scratches, find_damage
from facelab.gptface.decode import Decoding
from facelab.gptface.edit import FaceEditor
from facelab.gptface.edit_task import MeanPoints
from facelab.gptface.guidance import Guidance
from facelab.gptface.model import GPTFaceConfig, build_gptface, save_gptface
from facelab.gptface.paste import blend_of, cells_of, check_mask, face_frame, level, mask_to_frame, mask_to_photo, paste, whole_frame
from facelab.gptface.regions import NAMED_REGIONS, find_region, region_of
from facelab.gptface.tokens import Vocabulary, strange_words
from facelab.lab.base import Base, save_base
from facelab.lab.batches import seed_of
from facelab.lab.errors import InputError, ShapeError
from facelab.lab.paths import data_dir
from facelab.nets.codec import VQGANConfig
from facelab.nets.parser import FaceParser, FunctionParser, OutlineParser, UNetParser
from facelab.nets.vqgan import VQGAN

VOCAB = Vocabulary.learn(["tags: a, b", "a man with glasses", "a woman looks happy", "young old black hair"], 100)
BOX = FaceBox(60.0, 40.0, 50.0, 50.0, 1.0, 0.3)  # leans


def codec(codes=24):
    torch.manual_seed(0)
    net = VQGAN(VQGANConfig(ch=8, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(), resolution=32, z_channels=8, embed_dim=8, n_embed=codes, groups=4)).eval()
    with torch.no_grad():
        net.quantize.embedding.weight.normal_()
    return net


@pytest.fixture(scope="module")
def editor():
    model = build_gptface(GPTFaceConfig(VOCAB.layout(24, 8, 8, 12), 2, 16, 2, 24))
    return FaceEditor(codec(), model, VOCAB, OutlineParser(MeanPoints()), finder=lambda photo: BOX if min(photo.shape[:2]) > 100 else None)


def photo(h=150, w=190, seed=0):
    yy, xx = np.mgrid[:h, :w]
    smooth = np.stack([120 + 80 * np.sin(xx / 37 + seed), 120 + 80 * np.cos(yy / 29), 120 + 60 * np.sin((xx + yy) / 41)], -1)
    return smooth.round().astype(np.uint8)


def patch(shape=(150, 190), top=60, left=70, size=24):
    made = np.zeros(shape, bool)
    made[top : top + size, left : left + size] = True
    return made


# ---- pixels -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("face", ["found", "whole", BOX])
@pytest.mark.parametrize("feather", [None, 0.0, 6.0])
def test_outside_the_mask_nothing_changes(editor, face, feather):
    before, mask = photo(), patch()
    kept = before.copy()
    made = editor.edit(before, mask, "a man with glasses", face, feather=feather)
    assert np.array_equal(made.image[~mask], kept[~mask]) and np.array_equal(before, kept)
    assert not np.array_equal(made.image[mask], kept[mask]) and np.array_equal(made.mask, mask) and made.image.dtype == np.uint8


def test_a_face_that_leans_is_pasted_back_where_it_was():
    "The frame unchanged gives the photo again, up to the blur of sampling twice."
    before = photo()
    frame = face_frame(before, BOX, 128)
    assert abs(frame.back[0, 1]) > 0.05  # it is turned
    mask = mask_to_photo(np.ones((128, 128), bool), frame.back, before.shape)
    again = paste(before, frame.image.astype(np.float32) / 255, frame.back, mask)
    assert 0.2 < mask.mean() < 0.9 and np.abs(again.astype(int) - before)[mask].max() <= 4
    shifted = frame.back + np.array([[0, 0, 3.0], [0, 0, 0]])
    assert np.abs(paste(before, frame.image / 255.0, shifted, mask).astype(int) - before)[mask].max() > 4  # three pixels off would be seen


def test_a_mask_goes_to_the_frame_and_back():
    for where in (BOX, FaceBox(10.0, 60.0, 70.0, 70.0, 1.0)):
        frame = face_frame(photo(), where, 64)
        region = np.zeros((64, 64), bool)
        region[20:40, 12:50] = True
        there = mask_to_photo(region, frame.back, (150, 190))
        back = mask_to_frame(there, frame.back, 64)
        assert (back & region).sum() > 0.95 * (region & mask_to_frame(np.ones((150, 190), bool), frame.back, 64)).sum() and (back & ~region).sum() < 130


def test_a_thin_scratch_of_a_large_photo_hides_tokens():
    mask = np.zeros((1000, 1400), bool)
    mask[100:900, 700] = True
    frame = whole_frame(np.zeros((1000, 1400, 3), np.uint8), 32)
    assert cells_of(mask_to_frame(mask, frame.back, 32), 8, 8).sum() >= 5


def test_the_seam_fades_inside_the_mask():
    share = blend_of(patch(), 5)
    assert (share[~patch()] == 0).all() and share[72, 82] == 1 and 0 < share[60, 70] < share[62, 72] < 1


def test_level_is_the_solution_of_its_equation():
    rng = np.random.default_rng(0)
    before, after = rng.random((12, 12, 3)), rng.random((12, 12, 3))
    region = np.zeros((12, 12), bool)
    region[4:8, 3:9] = True
    before, after = 0.4 + 0.05 * before, 0.4 + 0.05 * after  # nothing is clipped
    made = level(before, after, region, reach=0.5, blur=0.0001)
    gap = np.where(region[..., None], made - after, before - after)
    for y, x in np.argwhere(region):
        near = gap[y - 1, x] + gap[y + 1, x] + gap[y, x - 1] + gap[y, x + 1]
        assert np.allclose(near - 4 * gap[y, x], gap[y, x] / 36, atol=1e-6)
    assert np.array_equal(made[~region], before[~region])


# ---- edits ------------------------------------------------------------------------------------------------------------------------------------


def test_a_batch_is_its_items(editor):
    tasks = [editor.prepare(photo(seed=k), patch(left=60 + 5 * k), "a man with glasses") for k in range(3)]
    together, alone = editor.fill(tasks, seed=4), editor.fill(tasks[:1], seed=4)
    assert torch.equal(together[0].codes, alone[0].codes) and np.abs(together[0].image.astype(int) - alone[0].image).max() <= 1


def test_all_hidden_tokens_are_filled_and_no_other(editor):
    task = editor.prepare(photo(), patch(), None)
    made = editor.fill([task])[0]
    before = editor.vqgan.token_ids(torch.from_numpy(task.frame.image).permute(2, 0, 1)[None])[0]
    assert torch.equal(made.codes[~torch.from_numpy(task.hidden)], before[~torch.from_numpy(task.hidden)]) and made.trace["kept"].sum() == task.hidden.sum()


def test_the_best_of_several_is_kept(editor):
    one = [editor.fill([editor.prepare(photo(), patch(), "a man")] * 6, seed=0)][0]
    best = editor.edit(photo(), patch(), "a man", tries=6)
    assert best.p == pytest.approx(max(item.p for item in one), abs=1e-5) and len({round(item.p, 6) for item in one}) > 1


def test_bad_items_are_left_out_and_counted(editor):
    images = [photo(), photo(80, 60), photo(seed=2), np.zeros((4, 4), np.float32), photo(seed=3)]
    masks = [patch(), np.ones((80, 60), bool), np.zeros((9, 9), bool), patch(), patch()]
    made = editor.edit_all(images, masks, ["a man", "a man", "a man", "a man", None])
    assert [item is not None for item in made.items] == [True, False, False, False, True] and len(made.skipped) == 3 and len(made.images) == 2
    said = made.skipped.report(5)
    assert "3 of 5" in said and "no face" in said and "cannot be placed" in said
    with pytest.raises(InputError, match="as many as photos"):
        editor.edit_all(images, masks, ["a man"] * 2)


def test_threads_share_an_editor(editor):
    ways = [Guidance(), Guidance(scope="all", strength=0.05), Guidance.paper(0.1), Guidance(kind="cfg"), Guidance(kind="none")]
    go = lambda way: editor.edit(photo(), patch(), "a man with glasses", guidance=way, decoding=Decoding(schedule="k", k=3)).codes
    before = {name: weight.clone() for name, weight in editor.model.state_dict().items()}
    expected, found = [go(way) for way in ways], {}

    def work(k):
        found[k] = go(ways[k % len(ways)])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(10)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert len(found) == 10 and all(torch.equal(codes, expected[k % len(ways)]) for k, codes in found.items())
    assert all(torch.equal(weight, before[name]) for name, weight in editor.model.state_dict().items())


def test_stitching_keeps_both_sides(editor):
    left, right = photo(96, 96), photo(96, 96, 3)
    made = editor.stitch(left, right, 0.25, 96, "whole")
    assert np.array_equal(made.image[:, :36], left[:, :36]) and np.array_equal(made.image[:, 60:], right[:, 60:]) and made.mask[:, 36:60].all()
    faces = editor.stitch(photo(), photo(200, 130), size=48)
    assert faces.image.shape == (48, 48, 3)


def test_scratches_are_found_and_nothing_else_changes(editor):
    clean = photo(128, 128)
    scratched, truth = add_scratches(clean, 2, np.random.default_rng(1))
    assert not find_damage(clean).any() and (find_damage(scratched) & truth).sum() > 0.8 * truth.sum()
    made = editor.restore(scratched)
    assert np.array_equal(made.image[~made.mask], scratched[~made.mask])
    with pytest.raises(InputError, match="no scratch"):
        editor.restore(clean)
    with pytest.raises(InputError, match="An empty mask leaves nothing to do") as said:
        editor.restore(scratched, np.zeros((128, 128), bool))
    assert "no scratch" not in str(said.value)


def test_something_in_front_of_the_face(editor):
    classes = ("background", "skin")
    labels = torch.ones(1, 64, 64, dtype=torch.long)
    labels[:, 36:44, 28:38] = 0
    seeing = FaceEditor(editor.vqgan, editor.model, VOCAB, FunctionParser(lambda images: labels, classes, 64))
    points = MeanPoints().landmarks(torch.zeros(1, 3, 190, 190))[0].double().numpy()
    before = photo(190, 190)
    made = seeing.remove_occlusion(before, face=points)
    assert made.mask.any() and made.mask.mean() < 0.2 and np.array_equal(made.image[~made.mask], before[~made.mask])
    labels[:] = 1
    with pytest.raises(InputError, match="nothing in front"):
        seeing.remove_occlusion(before, face=points)


def test_parts_that_the_parser_does_not_know(editor):
    points = MeanPoints().landmarks(torch.zeros(1, 3, 190, 190))[0].double().numpy()
    with pytest.raises(InputError, match="'spectacles'.*background, skin, nose"):
        editor.remove_occlusion(photo(190, 190), also=("spectacles",), face=points)
    with pytest.raises(InputError, match="no class for what is in front of a face"):
        editor.remove_occlusion(photo(190, 190), face=points)


def test_words_for_a_face(editor):
    assert len(set(editor.tag(photo(), 3))) == 3
    found = editor.classify(photo(), {"who": {"man": "a man", "woman": "a woman"}})
    assert set(found["who"]) == {"man", "woman"} and sum(found["who"].values()) == pytest.approx(1)


# ---- disk -------------------------------------------------------------------------------------------------------------------------------------


def test_to_disk_and_back(editor, tmp_path):
    torch.manual_seed(1)
    parser = UNetParser(("background", "skin", "mouth"), 32, width=4).eval()
    own = FaceEditor(editor.vqgan, editor.model, VOCAB, parser, 1.7, 0.1)
    own.save(tmp_path)
    again = FaceEditor.from_pretrained(tmp_path)
    faces = torch.rand(2, 3, 32, 32)
    assert (again.room, again.lift) == (1.7, 0.1) and isinstance(again.parser, FaceParser) and torch.equal(again.parser.parse(faces), parser.parse(faces))
    ours, theirs = (one.edit(photo(), patch(), "a man", BOX, seed=3) for one in (own, again))
    assert np.array_equal(ours.image, theirs.image) and ours.p == pytest.approx(theirs.p, abs=1e-5)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pt", ".pkl", ".bin")]


def test_the_shipped_parser_stands_in(editor, tmp_path, monkeypatch):
    "A folder without a parser: the base where it is, else outlines; one that is given goes before it."
    editor.save(tmp_path / "mine")  # outlines are not saved
    torch.manual_seed(1)
    base = UNetParser(("background", "skin", "hair"), 32, width=4).eval()
    bases = tmp_path / "bases"
    monkeypatch.setattr("facelab.lab.base.bases_dir", lambda: bases)
    assert isinstance(FaceEditor.from_pretrained(tmp_path / "mine").parser, OutlineParser)
    save_base(Base(base.state_dict(), base.config(), [], "", ""), bases / "parser", "smoke", {}, {})
    found = FaceEditor.from_pretrained(tmp_path / "mine").parser
    assert isinstance(found, UNetParser) and found.classes == base.classes
    assert FaceEditor.from_pretrained(tmp_path / "mine", parser=editor.parser).parser is editor.parser


def test_files_of_another_model(editor, tmp_path):
    with pytest.raises(InputError, match="24"):
        FaceEditor(codec(32), editor.model, VOCAB)
    editor.save(tmp_path)
    codec(32).save(tmp_path / "vqgan")
    with pytest.raises(InputError, match="codebook of 32 codes"):
        FaceEditor.from_pretrained(tmp_path)
    save_gptface(tmp_path / "bare", editor.model)
    with pytest.raises(InputError, match="vocab.txt"):
        FaceEditor.from_pretrained(tmp_path / "bare")
    with pytest.raises(InputError):
        FaceEditor.from_pretrained(tmp_path / "nowhere")


# ---- what comes in wrong ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("region", "text", "said"), [
    (np.zeros((10, 10), bool), "a man", "cannot be placed"), (np.zeros((150, 190), bool), "a man", "nothing to do"), (np.ones((150, 190), bool), "a man", "Leave something"), (np.full((150, 190), np.nan), "a man", "finite"),
    (patch(top=0, left=0, size=4), "a man", "nothing of it in the square"), ("moustache", "a man", "mouth, lips, eyes"), ("clothes", "a man", "has no such class"), (patch(), "a man " * 40, "pieces"), (patch(), "  ", "some words"),
])  # fmt: skip
def test_bad_edits(editor, region, text, said):
    with pytest.raises(InputError, match=said):
        editor.edit(photo(), region, text)


def test_bad_pictures(editor):
    for image in (np.zeros((20, 20, 2), np.uint8), np.zeros((20, 20, 3), np.float32), np.zeros((0, 20, 3), np.uint8)):
        with pytest.raises(ShapeError):
            editor.inpaint(image, "mouth")
    with pytest.raises(InputError, match="no face was found"):
        editor.inpaint(photo(60, 60), "mouth")
    with pytest.raises(InputError, match="found, whole"):
        editor.inpaint(photo(), "mouth", face="left")
    for grey in (photo()[..., 0], np.dstack([photo(), np.full((150, 190), 255, np.uint8)])):
        assert editor.inpaint(grey, patch()).image.shape == (150, 190, 3)


@pytest.mark.parametrize("name", ["mouth", "lips", "eyes", "brows", "nose", "glasses", "beard", "forehead", "face", "hair", "hat"])
def test_regions_from_outlines_alone(editor, name):
    mask = editor.mask_of(photo(), BOX, name)
    assert 0.0005 < mask.mean() < 0.3 and name in NAMED_REGIONS


def test_regions_lie_where_they_should():
    parser = OutlineParser(MeanPoints())
    labels = parser.parse(torch.zeros(1, 3, 128, 128))[0].numpy()
    height = {name: np.nonzero(region_of(labels, parser.classes, name))[0].mean() for name in ("hat", "brows", "eyes", "nose", "mouth", "beard")}
    assert list(height) == sorted(height, key=height.get)


# ---- batches, notes and masks -------------------------------------------------------------------------------------------------------------------


def test_a_photo_has_a_seed_of_its_own(editor):
    "Whatever the size of the batch, and whoever is left out of it."
    images, masks = [photo(seed=k) for k in range(5)], [patch(left=60 + 4 * k) for k in range(5)]
    go = lambda images=images, batch=16, **how: [None if item is None else item.codes for item in editor.edit_all(images, masks, "a man with glasses", batch=batch, seed=3, **how).items]
    together = go()
    for others in (go(batch=1), go(batch=2), go(batch=3), go([images[0], np.zeros((3, 3), np.float32), *images[2:]])):
        assert all(other is None or torch.equal(one, other) for one, other in zip(together, others))
    assert all(torch.equal(one, other) for one, other in zip(go(tries=2), go(batch=2, tries=2)))
    assert torch.equal(together[3], editor.edit(images[3], masks[3], "a man with glasses", seed=seed_of(3, 3)).codes)
    same = editor.edit_all([images[0]] * 2, masks[0], "a man with glasses")
    assert not torch.equal(same.items[0].codes, same.items[1].codes)  # and not all the same


def test_a_face_for_each_photo(editor):
    images = [photo(), photo(60, 60), photo(seed=2), photo(seed=3)]
    points = MeanPoints().landmarks(torch.zeros(1, 3, 150, 150))[0].double().numpy()
    masks = [patch(), patch((60, 60), 20, 20, 12), patch(), patch()]
    made = editor.edit_all(images, masks, "a man", [BOX, "whole", points, "left"])
    assert [item is not None for item in made.items] == [True, True, True, False]
    for k, where in enumerate((BOX, "whole", points)):
        assert np.array_equal(made.items[k].frame.back, editor.prepare(images[k], masks[k], "a man", where).frame.back)
    for where in (BOX, points):  # one for all
        assert all(np.array_equal(item.frame.back, made.items[0 if where is BOX else 2].frame.back) for item in editor.edit_all(images[2:], patch(), "a man", where).items)
    with pytest.raises(InputError, match="face: 3"):
        editor.edit_all(images, masks, "a man", ["whole"] * 3)


def test_nothing_to_do_is_done(editor):
    assert editor.fill([]) == [] and editor.edit_all([], "mouth", "a man").items == []


def covered():
    "A parser that sees something before each face."
    labels = torch.ones(1, 64, 64, dtype=torch.long)
    labels[:, 36:44, 28:38] = 0
    return FunctionParser(lambda images: labels.expand(len(images), -1, -1), ("background", "skin"), 64)


def test_every_use_has_a_batch(editor):
    "Each item is what the single call gives with its seed; bad ones are counted; networks see batches."
    own = FaceEditor(editor.vqgan, editor.model, VOCAB, covered())
    points = MeanPoints().landmarks(torch.zeros(1, 3, 190, 190))[0].double().numpy()
    rng, bad = np.random.default_rng(1), np.zeros((4, 4), np.float32)
    images = [photo(190, 190, k) for k in range(3)]
    scratched = [add_scratches(image, 2, rng)[0] for image in images]
    who = {"who": {"man": "a man", "woman": "a woman with glasses"}}
    ways = {
        "restore": (own.restore_all([scratched[0], bad, scratched[2]], seed=5), lambda k: own.restore(scratched[k], seed=seed_of(5, k))),
        "stitch": (own.stitch_all(iter(images), [images[1], bad, images[0]], size=64, face="whole", seed=5), lambda k: own.stitch(images[k], images[1 if k == 0 else 0], size=64, face="whole", seed=seed_of(5, k))),
        "remove": (own.remove_occlusion_all([images[0], bad, images[2]], texts=["a man", None, None], face=points, seed=5), lambda k: own.remove_occlusion(images[k], text="a man" if k == 0 else None, face=points, seed=seed_of(5, k))),
    }
    for name, (made, alone) in ways.items():
        assert [item is None for item in made.items] == [False, True, False] and len(made.skipped) == 1 and "uint8" in made.skipped.report(3), name
        assert all(torch.equal(made.items[k].codes, alone(k).codes) for k in (0, 2)), name
    tags, answers = own.tag_all([images[0], bad, images[2]], 3, face="whole", seed=5), own.classify_all([images[0], bad, images[2]], who, "whole")
    for made in (tags, answers):
        assert [item is None for item in made.items] == [False, True, False] and len(made.skipped) == 1
    assert tags.items[2] == own.tag(images[2], 3, face="whole", seeds=[seed_of(5, 2)]) == own.tag_all(images, 3, face="whole", batch=1, seed=5).items[2]
    assert answers.items[2]["who"] == pytest.approx(own.classify(images[2], who, "whole")["who"], abs=1e-5)
    looked, ids = [], own.vqgan.token_ids
    own.vqgan.token_ids = lambda batch: looked.append(len(batch)) or ids(batch)
    try:
        own.tag_all(images, 3, face="whole"), own.classify_all(images, who, "whole"), own.stitch_all(images, images, face="whole", batch=2)
    finally:
        del own.vqgan.token_ids
    assert looked == [3, 3, 2, 1]


def test_tags_go_as_the_editor_was_told(editor, monkeypatch):
    from facelab.gptface import read_face

    told = []
    monkeypatch.setattr(read_face, "fill_tags", lambda *words, **how: (told.append((how["guidance"], how["decoding"])) or [["man"]], None))
    own = FaceEditor(editor.vqgan, editor.model, VOCAB, guidance=Guidance(strength=0.2), decoding=Decoding(temperature=0.5))
    own.tag(photo(), 1, face="whole"), own.tag(photo(), 1, face="whole", guidance=Guidance(kind="none"))
    assert told == [(Guidance(strength=0.2), Decoding(temperature=0.5)), (Guidance(kind="none"), Decoding(temperature=0.5))]


@pytest.mark.parametrize(("call", "said"), [
    (lambda e: e.edit(photo(), patch(), 5), "in one string"), (lambda e: e.edit(photo(), patch(), ["a man"]), "in one string"), (lambda e: e.edit(photo(), patch(), "a man", guidance="literal"), "a Guidance, or None"),
    (lambda e: e.edit(photo(), patch(), "a man", decoding=8), "a Decoding, or None"), (lambda e: e.edit(photo(), patch(), "a man", seed=-1), "0 or more"), (lambda e: e.edit(photo(), patch(), "a man", seed=None), "0 or more"),
    (lambda e: e.edit(photo(), patch(), "a man", tries=1.5), "tries 1.5"), (lambda e: e.edit(photo(), patch(), "a man", feather=np.nan), "feather"), (lambda e: e.edit_all([photo()], patch(), "a man", batch=0), "batch 0"),
    (lambda e: e.edit_all([photo()], patch(), "a man", seed=None), "seed None"), (lambda e: e.edit_all(photo(), patch(), "a man"), "Put it into a list"), (lambda e: e.edit_all([photo()], patch(), 5), "Put it into a list"),
    (lambda e: e.classify(photo(), ["man"]), "groups of answers"), (lambda e: e.classify(photo(), {"man": "a man"}), "groups of answers"), (lambda e: e.classify(photo(), {"who": {"man": "a man " * 40}}), r"pieces.* Shorten it\.$"),
    (lambda e: e.edit(photo(), patch(), "a man " * 40), r"pieces.* Shorten it\.$"), (lambda e: e.stitch(photo(), photo(), size=100.5), "whole pixels"), (lambda e: e.stitch(photo(), photo(), band=np.nan), "band nan"),
    (lambda e: e.tag(photo(), 1, among="man"), "Put it into a list"), (lambda e: e.tag(photo(), 1.5), "whole number"), (lambda e: FaceEditor(e.vqgan, e.model, VOCAB, guidance="paper"), "a Guidance, or None"),
])  # fmt: skip
def test_what_comes_in_wrong_is_one_error(editor, call, said):
    with pytest.raises(InputError, match=said):
        call(editor)


def test_numpys_numbers_generators_and_one_bad_text_are_fine(editor):
    plain = editor.edit(photo(), patch(), "a man", seed=3, tries=2)
    assert torch.equal(editor.edit(photo(), patch(), "a man", seed=np.int64(3), tries=np.int64(2)).codes, plain.codes)
    images = [photo(seed=k) for k in range(3)]
    made = editor.edit_all((image for image in images), (patch() for _ in images), ["a man", 5, "a man"], batch=np.int64(2), seed=np.int64(4))
    assert [item is None for item in made.items] == [False, True, False] and "in one string" in made.skipped.report(3)
    assert torch.equal(made.items[2].codes, editor.edit_all(images, patch(), "a man", seed=4).items[2].codes)
    assert editor.stitch(photo(), photo(seed=2), size=np.int64(48)).image.shape == (48, 48, 3)


def test_what_is_outside_the_square_is_told(editor):
    "A mask over the whole photo but its edge: what the face's square does not hold stays, and a note says how much that is."
    mask = patch(top=2, left=2, size=140) & (np.add.outer(np.arange(150), np.arange(190)) % 9 < 3)
    mask[60:100, 70:110] = False
    made = editor.edit(photo(), mask, "a man")
    lost = 1 - made.mask.sum() / mask.sum()
    assert 0.2 < lost < 0.9 and made.notes == (f"{round(100 * lost)} % of the mask are outside the square around the face, and stay as they are; face='whole' takes the whole picture",)
    assert np.array_equal(made.image[mask & ~made.mask], photo()[mask & ~made.mask])
    assert editor.edit(photo(), patch(), "a man").notes == () == editor.edit(photo(), mask, "a man", "whole").notes
    assert all(not any("outside" in note for note in editor.prepare(photo(), name, "a man").notes) for name in ("mouth", "face", "eyes"))


class Eyes:
    "A parser of the user's: no class of the lab's, the same calls."

    name, size, room, lift, classes = "mine", 48, 1.85, 0.147, ("background", "skin", "hair")

    def parse(self, images):
        labels = torch.ones(len(images), *images.shape[2:], dtype=torch.long)
        labels[:, :12] = 2
        return labels


def test_how_a_region_was_found_is_told(editor):
    said = {name: editor.prepare(photo(), name, "a man") for name in ("mouth", "hair", "hat", "neck", "glasses")}
    assert {name: task.found for name, task in said.items()} == {"mouth": "parts", "hair": "box", "hat": "box", "neck": "box", "glasses": "parts"}
    assert "no class for hair" in said["hair"].notes[0] and said["mouth"].notes == ()
    made = editor.fill([said["neck"]])[0]
    assert made.found == "box" and made.notes == said["neck"].notes
    assert editor.edit(photo(), patch(), "a man").found == "mask"
    own = FaceEditor(editor.vqgan, editor.model, VOCAB, Eyes(), finder=editor.finder)
    assert isinstance(own.parser, FaceParser)
    hair = own.prepare(photo(), "hair", "a man")
    assert hair.found == "parts" and not np.array_equal(hair.mask, said["hair"].mask)
    assert own.prepare(photo(), "nose", "a man").notes == ("nose: the parser has no class for nose; this is a box where it usually is",)
    with pytest.raises(InputError, match="give the editor a parser"):
        own.prepare(photo(), "clothes", "a man")


def test_a_part_that_this_face_lacks():
    bald = np.ones((64, 64), int)
    seen = find_region(bald, ("background", "skin", "hair"), "hair")
    assert seen.how == "box" and "sees none of it" in seen.note
    with pytest.raises(InputError, match="sees none of it"):
        find_region(bald, ("background", "skin", "cloth"), "clothes")


def test_words_that_were_not_learned_are_told(editor):
    assert strange_words(VOCAB, "A man with a xylophone, 漢字 glasses!") == ["xylophone", "漢", "字", "!"]
    assert editor.edit(photo(), patch(), "a man with a zebra").notes == ("words that this GPTFace has not learned: zebra",)
    assert editor.edit(photo(), patch(), "a man with glasses").notes == () == editor.inpaint(photo(), patch()).notes


@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.float32, np.float64])
@pytest.mark.parametrize("top", [1, 255])
def test_soft_masks_count_from_the_half_on(kind, top):
    made = np.zeros((8, 8), kind)
    made[1], made[2], made[3] = top, top * 3 // 4 if top > 1 else 1, top * 2 // 5 if np.issubdtype(kind, np.integer) else top * 0.4
    assert np.flatnonzero(check_mask(made, (8, 8)).any(1)).tolist() == [1, 2]
    faint = np.full((8, 8), 0.01, np.float32)
    with pytest.raises(InputError, match="no pixel above 0.5; its largest is 0.01"):
        check_mask(faint, (8, 8))


def test_photos_without_damage_have_none():
    images = [item.image for item in read_celeba(data_dir() / "celeba").items()]
    flagged = [k for k, image in enumerate(images) if find_damage(image).any()]
    assert len(images) > 300 and len(flagged) < 0.05 * len(images)
    rng = np.random.default_rng(0)
    scratched = [add_scratches(image, 2, rng) for image in images[::10]]
    assert np.mean([(find_damage(image) & truth).sum() / truth.sum() for image, truth in scratched]) > 0.65


def test_gains_are_told_by_target(editor, monkeypatch):
    "All rows that the ledger asks of `gptface-edit`, from edits whose hits are known: guidance hits beards alone, classifier-free guidance a hat."
    from facelab.data.attributes import ATTRIBUTES
    from facelab.gptface import edit_scores

    names = ("No_Beard", "Wearing_Hat", "No_Beard", "Wearing_Hat")
    images, wanted = [photo(32, 32, k) for k in range(4)], np.array([False, True, False, True])
    edits = edit_scores.EditSet(images, np.zeros((4, 68, 2), np.float32), ["mouth"] * 4, ["a man"] * 4, np.array([ATTRIBUTES.index(name) for name in names]), wanted, np.arange(4))
    hit = {"words, no guidance": [0, 0, 0, 0], "classifier-free guidance 3": [0, 1, 0, 0], "guided (default)": [1, 0, 1, 0]}
    made = {f"{who}{name}": editor.fill([editor.prepare(image, patch((32, 32), 8, 8, 12), "a man", "whole") for image in images]) for who in ("", "gptface-train: ") for name in hit}
    shown = {id(item.image): flags[k] for name, items in made.items() for k, (item, flags) in enumerate((item, hit[name.removeprefix("gptface-train: ")]) for item in items)}

    def answers(net, seen):
        right = np.array([shown.get(id(image), 0) for image in seen], bool)
        return np.where(right[:, None], wanted[:, None], ~wanted[:, None]) & np.ones((4, len(ATTRIBUTES)), bool)

    monkeypatch.setattr(edit_scores, "answers", answers)
    monkeypatch.setattr(edit_scores, "embed_faces", lambda embedder, images, points: torch.ones(len(images), 1))
    rows = {(row.method, row.metric): row for row in edit_scores.edit_rows(edits, None, None, made, "toys")}
    for who in ("", "gptface-train: "):
        guided, plain, free = (f"{who}{name}" for name in ("guided (default)", "words, no guidance", "classifier-free guidance 3"))
        assert [rows[guided, metric].value for metric in ("target hit", "target hit, No_Beard", "target hit, Wearing_Hat", "target hit without No_Beard")] == [50, 100, 0, 0]
        found = {(other, metric): rows[f"{guided} against {other}", f"{metric}, difference"] for other in (plain, free) for metric in ("target hit", "target hit without No_Beard")}
        assert [row.value for row in found.values()] == [50, 0, 25, -50] and [row.n for row in found.values()] == [4, 2, 4, 2] and all(row.low is not None for row in found.values())
    assert rows["not edited", "target hit, No_Beard"].value == 0


def test_photos_are_told_by_target(editor, monkeypatch):
    from facelab.data.attributes import ATTRIBUTES
    from facelab.gptface import edit_scores

    def item(k, *names):
        signs = np.full(len(ATTRIBUTES), -1)
        signs[[ATTRIBUTES.index(name) for name in ("No_Beard", *names)]] = 1
        return SimpleNamespace(image=photo(32, 32, k), attributes=signs, identity=k)

    monkeypatch.setattr(edit_scores, "answers", lambda net, images: np.tile(np.array([name == "Wearing_Hat" for name in ATTRIBUTES]), (len(images), 1)))
    rows = edit_scores.photo_rows(editor.vqgan, [item(0, "Smiling"), item(1, "Wearing_Hat", "Smiling"), item(2)], None, "toys")
    told = {row.metric: (row.value, row.n) for row in rows if row.method == "photos that have it"}
    assert told == {"target hit": (pytest.approx(100 / 3), 3), "target hit, Smiling": (0, 2), "target hit, Wearing_Hat": (100, 1), "target hit without No_Beard": (pytest.approx(100 / 3), 3)}
    assert {row.method for row in rows} == {"photos that have it", "the same, through the tokenizer"}


def test_glasses_are_taken_away_and_judged(editor, monkeypatch):
    "One photo of each who wears some and is seen to; a face whose glasses the parser does not find stays as it is."
    from facelab.data.attributes import ATTRIBUTES
    from facelab.gptface import edit_stage

    def answers(net, images):
        told = np.zeros((len(images), len(ATTRIBUTES)), bool)
        told[:, ATTRIBUTES.index("Eyeglasses")] = [image[0, 0, 0] != 7 and any(np.array_equal(image, one.image) for one in items) for image in images]
        return told

    def item(k, wears=True, who=None, turn=0.0):
        attributes = np.full(len(ATTRIBUTES), -1)
        attributes[ATTRIBUTES.index("Eyeglasses")] = 1 if wears else -1
        return SimpleNamespace(image=photo(64, 64, k), attributes=attributes, pose=(turn, 0, 0), identity=k if who is None else who)

    def parse(images):  # glasses on all but the one whose picture is dark
        labels = torch.ones(len(images), *images.shape[2:], dtype=torch.long)
        labels[:, 26:34, 16:48] = 2
        return labels if images.mean() > 0.2 else labels * 0 + 1

    items = [item(0), item(1), item(2, wears=False), item(3, who=0), item(4, turn=0.9), item(5), item(6)]
    items[5].image[0, 0, 0] = 7  # the judge does not see these
    items[6].image //= 8
    monkeypatch.setattr(edit_stage, "answers", answers)
    own = FaceEditor(editor.vqgan, editor.model, VOCAB, FunctionParser(parse, ("background", "skin", "glasses"), 64))
    monkeypatch.setattr(own, "classify", lambda image, face: {"person": {"man": 0.9, "woman": 0.1}})
    figure, rows = edit_stage.without_glasses(own, items, None, 0)
    assert [row.method for row in rows] == ["remove_occlusion", "the tokenizer alone"] and rows[0].n == 3 and rows[0].value == pytest.approx(200 / 3) and rows[1].value == 100
    assert len(figure.axes) == 9
    assert edit_stage.without_glasses(own, items[2:3], None, 0) == (None, [])

