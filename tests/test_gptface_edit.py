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

