"FaceGPT's stages: what they read, what they refuse, what two runs give."

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from facelab.data.instruct import Talk, Turn, write_instructions
from facelab.face.code import FaceCode
from facelab.facegpt import face_tables
from facelab.facegpt.dataset import ABOUT_THE_PICTURE, described_set, drawn_set, hq_photos, instruction_rows, mirrored_text, told_talks, training_set
from facelab.facegpt.describe import read_facts
from facelab.facegpt.face_tables import spread, test_photos as photos_to_judge
from facelab.facegpt.learn import key_text_talks, told_of
from facelab.facegpt.photos import FacePhotos
from facelab.facegpt.schema import Ruler, code_facts, measure
from facelab.facegpt.speed import step_operations
from facelab.facegpt.talk import KINDS
from facelab.facegpt.talker import Answer
from facelab.facegpt.wordings import QUESTIONS, SEVERAL_TEXT, SEVERAL_TEXT_HELD_OUT, TEXT_REQUESTS, fill
from facelab.lab.errors import InputError, Skipped

photos_to_judge.__test__ = False


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    place = tmp_path_factory.mktemp("set")
    _, talks = drawn_set(place / "set", 31, 3, 2, 64, 60, 0, place, 1)
    write_instructions(place / "set" / "talks.json", talks)
    return place / "set", talks


def test_drawn_set_is_the_same_again(drawn, tmp_path):
    folder, talks = drawn
    _, again = drawn_set(tmp_path / "set", 31, 3, 2, 64, 60, 0, tmp_path, 2)
    assert again == talks
    for path in sorted(folder.rglob("*.jpg")) + sorted(folder.rglob("*.pts")):
        assert path.read_bytes() == (tmp_path / "set" / path.relative_to(folder)).read_bytes()


def test_mirrored_set(drawn):
    folder, _ = drawn
    photos, talks = training_set(folder / "faces", folder / "talks.json", 64)
    half = len(photos) // 2
    assert torch.equal(photos.images[half:], photos.images[:half].flip(-1))
    assert torch.allclose(photos.landmarks_2d[half:].flip(-1)[:, 27, 1], 64 - photos.landmarks_2d[:half, 27, 0], atol=1e-3)  # the bridge of the nose
    both = {t.id: t for t in talks}
    for talk in talks:
        if talk.id + "_mirrored" in both:
            other = both[talk.id + "_mirrored"]
            assert [mirrored_text(t.text) for t in other.turns] == [t.text for t in talk.turns]
    assert set(ABOUT_THE_PICTURE) <= set(KINDS)


def test_photos_of_other_splits_are_not_trained_on(drawn, tmp_path):
    import shutil

    shutil.copytree(drawn[0] / "faces", tmp_path / "faces")
    (tmp_path / "faces" / "list_eval_partition.txt").unlink()
    mapping = tmp_path / "faces" / "CelebA-HQ-to-CelebA-mapping.txt"
    head, *rows = mapping.read_text().splitlines()
    originals = (1, 2, 162771, 182637, 182638, 202599)  # CelebA's own bounds: two of train, two of val, two of test
    mapping.write_text("\n".join([head, *(f"{k} {n - 1} {n:06d}.jpg" for k, n in enumerate(originals))]) + "\n")
    photos, _ = training_set(tmp_path / "faces", drawn[0] / "talks.json", 64, mirror=False)
    assert photos.names == ["CelebA-HQ-img/0.jpg", "CelebA-HQ-img/1.jpg"]
    assert photos_to_judge(str(tmp_path / "faces"), "test", 64).names == ["CelebA-HQ-img/4.jpg", "CelebA-HQ-img/5.jpg"]


def test_photos_without_landmarks_are_counted(drawn, tmp_path):
    import shutil

    shutil.copytree(drawn[0] / "faces", tmp_path / "faces")
    for name in ("1", "3"):
        (tmp_path / "faces" / "landmarks" / f"{name}.pts").unlink()
    (tmp_path / "faces" / "CelebA-HQ-img" / "5.jpg").write_bytes(b"no picture")
    skipped = Skipped()
    photos = hq_photos(tmp_path / "faces", 32, skipped=skipped)
    assert len(photos) == 3 and len(skipped) == 3 and photos.size == 32
    with pytest.raises(InputError, match="landmarks"):
        hq_photos(tmp_path / "faces", 32)


def test_oblong_pictures_are_cut_about_their_middle(drawn, tmp_path):
    import shutil

    shutil.copytree(drawn[0] / "faces", tmp_path / "faces")
    picture = tmp_path / "faces" / "CelebA-HQ-img" / "0.jpg"
    whole = np.asarray(Image.open(picture).convert("RGB"))
    wide = np.pad(whole, ((0, 0), (20, 20), (0, 0)))
    Image.fromarray(wide).save(picture, quality=100, subsampling=0)
    marks = tmp_path / "faces" / "landmarks" / "0.pts"
    lines = marks.read_text().splitlines()
    start = lines.index("{") + 1
    lines[start : start + 68] = [f"{float(x) + 20} {y}" for x, y in (line.split() for line in lines[start : start + 68])]
    marks.write_text("\n".join(lines) + "\n")
    plain, cut = hq_photos(drawn[0] / "faces", 64), hq_photos(tmp_path / "faces", 64)
    assert torch.allclose(plain.landmarks_2d[0], cut.landmarks_2d[0], atol=1e-3)
    assert (plain.images[0].float() - cut.images[0].float()).abs().mean() < 3


def test_instruction_rows(tmp_path):
    (tmp_path / "coco").mkdir()
    Image.fromarray(np.full((30, 50, 3), 90, np.uint8)).save(tmp_path / "coco" / "a.png")
    say = lambda q, a: (Turn("user", q), Turn("assistant", a))
    write_instructions(tmp_path / "mix.json", [Talk("1", "a.png", say("What is this?", "Grey.")), Talk("2", None, say("2 + 2?", "4")), Talk("3", "a.png", say("And now?", "Still grey."))])
    photos, talks = instruction_rows(tmp_path / "mix.json", tmp_path / "coco", 10, 16)
    assert photos.names == ["a.png"] and photos.images.shape == (1, 3, 16, 16) and [t.kind for t in talks] == ["general"] * 3
    none, talks = instruction_rows(tmp_path / "mix.json", None, 10, 16)
    assert none is None and [t.id for t in talks] == ["2"]
    (tmp_path / "coco" / "a.png").write_bytes(b"torn")
    skipped = Skipped()
    none, talks = instruction_rows(tmp_path / "mix.json", tmp_path / "coco", 10, 16, skipped)
    assert none is None and [t.id for t in talks] == ["2"] and len(skipped) == 2


@pytest.mark.parametrize(("content", "word"), [("{}", "list"), ("[", "brackets"), (json.dumps([{"id": "1", "conversations": []}]), "turns")])
def test_bad_talks_are_one_clear_error(drawn, tmp_path, content, word):
    path = tmp_path / "talks.json"
    path.write_text(content)
    with pytest.raises(InputError, match=word):
        training_set(drawn[0] / "faces", path, 64)


def test_talk_about_a_photo_that_is_not_there(drawn, tmp_path):
    from facelab.facegpt.batches import talk_set
    from facelab.facegpt.llava_training import PLAIN
    from facelab.facegpt.prompt import Encoder
    from facelab.facegpt.vlm import add_face_token, load_llava, random_llava

    llava = load_llava(random_llava(tmp_path / "llava", size=32, patch=16))
    add_face_token(llava)
    photos = hq_photos(drawn[0] / "faces", 64)
    lost = Talk("9", "lost.jpg", (Turn("user", "Who?"), Turn("assistant", "Nobody.")))
    with pytest.raises(InputError, match="lost.jpg"):
        talk_set(Encoder(llava, PLAIN), [lost], photos)


def test_told_of_reads_every_template_and_nothing_else():
    for template in TEXT_REQUESTS:
        assert told_of(fill(template, description="A broad smile, and {braces}.")) == "A broad smile, and {braces}"
    assert told_of("What is 3 and 4?") == ""


def test_key_text_talks_have_the_same_descriptions(drawn):
    folder, _ = drawn
    photos, talks = training_set(folder / "faces", folder / "talks.json", 64, mirror=False)
    made = key_text_talks(photos, talks)
    told = [told_of(t.turns[0].text) for t in talks if t.kind == "text_to_face"]
    assert len(made) == len(told) > 5 and all(said in talk.turns[0].text for said, talk in zip(told, made))


def test_described_photos_need_a_description_each():
    with pytest.raises(InputError):
        told_talks(["a"], ["x"], 0, {"general": 1.0})


class Witness:
    "Says what it was shown and asked, so that nothing can change places."

    def describe(self, images=None, codes=None):
        return [f"A face of shade {shade:.0f}." for shade in 255 * images.mean((1, 2, 3))]

    def converse(self, questions, images=None, codes=None):
        assert len(questions) == len(images)
        return [[f"Shade {shade:.0f}: {question}" for question in some] for some, shade in zip(questions, 255 * images.mean((1, 2, 3)))]


def test_described_photos_have_conversations_and_hard_negatives():
    "Paper 4.1: a conversation of several questions without <FACE> about each photo, hard negatives about some; the answers are those to the question, about the photo."
    names = [f"{k}.jpg" for k in range(150)]
    photos = FacePhotos(torch.arange(150, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4).contiguous(), names)
    talks = described_set(photos, Witness(), 3)
    kinds = Counter(talk.kind for talk in talks)
    assert kinds["face_conversation"] == kinds["image_to_face"] == 150 and 30 < kinds["hard_negative"] < 75 and kinds["text_to_face"] == 150 and len({talk.id for talk in talks}) == len(talks)
    assert talks == described_set(photos, Witness(), 3) != described_set(photos, Witness(), 4)
    plain = {text for texts in QUESTIONS.values() for text in texts}
    lengths = Counter()
    for talk in talks:
        shade = str((talk.targets[0] if talk.targets else talk.image).removesuffix(".jpg"))
        said = [turn.text for turn in talk.turns[1::2]]
        assert all("<FACE>" not in text for text in said) == (talk.kind not in ("image_to_face", "text_to_face"))
        if talk.kind in ("face_conversation", "hard_negative"):
            assert talk.image and not talk.targets and all(text.split(": ", 1)[0] == f"Shade {shade}" and text.split(": ", 1)[1] in plain for text in said)
            asked = [turn.text for turn in talk.turns[::2]]
            if talk.kind == "face_conversation":
                lengths[len(asked)] += 1
                assert [f"Shade {shade}: {question}" for question in asked] == said and len(set(asked)) == len(asked)
            else:
                assert len(asked) == 1 and said[0].split(": ", 1)[1] in asked[0] and asked[0] not in plain
    assert set(lengths) == {2, 3, 4} and min(lengths.values()) > 25
    mute = Witness()
    mute.converse = lambda questions, images=None, codes=None: [["<FACE>" if k % 2 else "" for k, _ in enumerate(some)] for some in questions]
    assert {talk.kind for talk in described_set(photos, mute, 3)} == {"image_to_face", "text_to_face", "detail"}  # what cannot be learned is left out


def test_photos_to_judge_are_of_the_test_split():
    photos = photos_to_judge("data/celeba", "test", 64, 12)
    assert len(photos) == 12 and photos.codes is not None and photos.facts is not None
    with pytest.raises(InputError):
        photos_to_judge("data/nothing", "test", 64)


def test_spread():
    assert spread(10, 3) == [0, 4, 9] and spread(2, 8) == [0, 1] and spread(1, 3) == [0]


def test_operations_are_linear_in_rows():
    one = step_operations(10**6, 10**5, 2, 64, 30, 16, 1)
    assert step_operations(10**6, 10**5, 2, 64, 30, 16, 7) == 7 * one > 0


def test_module_of_every_facegpt_stage_is_where_dvc_says():
    from facelab.lab.profile import stages
    from facelab.lab.run import named_function

    found = [s for name, s in stages(Path(__file__).parent.parent).items() if name.startswith("facegpt-")]
    assert len(found) == 7 and all(callable(named_function(s.run)) for s in found)


def test_photo_errors_say_what_they_are():
    from facelab.facegpt.evaluate import score_rows
    from facelab.face.morphable import MorphableModel

    for size in (64, 32):
        photos = photos_to_judge("data/celeba", "test", size, 2)
        units = {row.metric: row.unit for row in score_rows("zero", torch.zeros(2, 257), photos, MorphableModel.procedural())}
        assert units["photo error"] == f"RGB 0..1, render and skin, {size} px" and units["keypoint error"] == "px at 224"


def test_what_is_mentioned_is_pooled_by_part(model_and_ruler):
    "Shape and expression by themselves: each measure's error as a share of the mean face's, one weight a mention."
    model, ruler = model_and_ruler
    truth = FaceCode.unpack(0.5 * torch.randn(6, 257, generator=torch.Generator().manual_seed(0)), model.dims)
    mean, theta = torch.zeros(257), 0.4 * truth.pack()
    told = [{"smile": "broad", "nose": "big"}, {"nose": "small"}, {"yaw": "left"}, {"mouth": "open", "chin": "long"}, {}, {"smile": "none"}]
    rows = face_tables.mentioned_rows("m", theta, truth, told, ruler, mean, range(6))
    own, true, plain = (measure(ruler, code) for code in (FaceCode.unpack(theta, model.dims), truth, FaceCode.unpack(mean[None], model.dims)))
    for data, names in (("what is mentioned of shape", ("nose", "chin")), ("what is mentioned of expression", ("smile", "mouth"))):
        top = bottom = 0.0
        for name in names:
            some = [k for k, said in enumerate(told) if name in said]
            base = (plain[name] - true[name][some]).abs()
            top, bottom = top + float((own[name] - true[name])[some].abs().sum() / base.mean()), bottom + len(some)
        (row,) = [r for r in rows if r.data == data]
        assert row.n == bottom and abs(row.value - top / bottom) < 1e-4 and row.low <= row.value <= row.high
    assert [r.data for r in face_tables.mentioned_rows("m", theta, truth, [{"yaw": "left"}] * 6, ruler, mean, range(6))] == ["all that is mentioned", "yaw"]


@pytest.fixture(scope="module")
def model_and_ruler():
    from facelab.face.morphable import MorphableModel

    return MorphableModel.procedural(), Ruler.of(MorphableModel.procedural())


def test_two_people_are_asked_for_in_both_wordings_and_judged_by_their_own(model_and_ruler):
    model, ruler = model_and_ruler
    codes = FaceCode.unpack(0.6 * torch.randn(8, 257, generator=torch.Generator().manual_seed(2)), model.dims)
    photos = FacePhotos(torch.zeros(8, 3, 8, 8, dtype=torch.uint8), [str(k) for k in range(8)], None, codes, facts=tuple(code_facts(ruler, codes)), people=(0, 0, 1, 1, 2, 2, 3, 3))
    other, asked = face_tables.other_people(photos.people), []

    def generate(talks, thetas=lambda k: codes.pack()[[k, other[k]]]):
        asked.extend(talks)
        return [Answer("", thetas(k), True, torch.zeros(0, dtype=torch.long)) for k in range(len(talks))]

    rows, notes = face_tables.two_people_rows(SimpleNamespace(generate=generate), photos, [""] * 8, ruler, 0)
    frames = [[re.escape(frame).replace(r"\{first\}", "(.+)").replace(r"\{second\}", "(.+)") for frame in table] for table in (SEVERAL_TEXT, SEVERAL_TEXT_HELD_OUT)]
    told = [re.fullmatch(pattern, text) for k, text in enumerate(asked) for pattern in frames[k % 2] if re.fullmatch(pattern, text)]
    assert len(told) == 8 and all(read_facts(part).items() <= photos.facts[at].items() for k, found in enumerate(told) for at, part in zip((k, other[k]), found.groups()))
    value = {(row.metric, row.data): row.value for row in rows}
    assert [value["exactly two <FACE>", f"{which} wordings"] for which in ("all", "known", "held-out")] == [100, 100, 100] and notes == ["two people in one text: number of <FACE> in the 8 answers: 2 in 8"]
    assert value["cycle agreement", "all attributes"] == 100 > value["cycle agreement, the other's description", "all attributes"]
    short, _ = face_tables.two_people_rows(SimpleNamespace(generate=lambda talks: generate(talks, lambda k: codes.pack()[:1])), photos, [""] * 8, ruler, 0)
    assert [(row.metric, row.value) for row in short] == [("exactly two <FACE>", 0)] * 3  # nothing to measure
    unknown, _ = face_tables.two_people_rows(SimpleNamespace(generate=generate), replace(photos, facts=None), ["A face."] * 8, None, 0)
    assert [row.metric for row in unknown] == ["exactly two <FACE>"] * 3 and "A face" in asked[-1]
