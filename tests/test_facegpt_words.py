"FaceGPT's language: every sentence that can be said is read back, nothing that is read raises, measures agree with what they measure, talks keep their shares and their words."

import re
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from fixture_files import fixture

from facelab.data.attributes import ATTRIBUTES
from facelab.data.caption import choose
from facelab.data.instruct import read_instructions, write_instructions
from facelab.data.world import generate, people_of
from facelab.face.camera import Camera
from facelab.face.code import FaceCode
from facelab.face.light import AMBIENT, ambient_light, directional_light
from facelab.face.mirror import Mirror
from facelab.face.morphable import MorphableModel
from facelab.facegpt.chat_tables import IFF_MIX, iff_prompts
from facelab.facegpt.describe import CLAUSES, HEARD, PARTS, PHRASES, LlavaDescriber, SchemaDescriber, describe, mentioned, read_facts, say, words_of
from facelab.facegpt.photos import FacePhotos
from facelab.facegpt.schema import SCHEMA, Ruler, check_facts, code_facts, item_codes, item_facts, measure, photo_facts, world_ruler
from facelab.facegpt.talk import COMPLEX, KINDS, UNKNOWN, all_texts, answer, detail, make_talks, vocabulary
from facelab.facegpt.wordings import (
    ANSWER, ANSWER_TWO, DETAIL, DETAIL_HELD_OUT, GENERAL, HARD, HARD_HELD_OUT, HARD_IMAGE_HELD_OUT, HARD_TEXT_HELD_OUT, QUESTIONS, QUESTIONS_HELD_OUT, REQUESTS, REQUESTS_HELD_OUT, SEVERAL_TEXT_HELD_OUT, TEXT_REQUESTS, TEXT_REQUESTS_HELD_OUT, fill,
)  # fmt: skip
from facelab.lab.errors import InputError, ShapeError


def some_facts(rng, share=0.8):
    return {a.name: choose(rng, a.values) for a in SCHEMA.values() if rng.random() < share}


@pytest.fixture(scope="module")
def model():
    return MorphableModel.procedural()


@pytest.fixture(scope="module")
def items():
    return generate(people_of("val", 20), 2, size=64, seed=31, supersample=2, workers=1, every=1e9)[0]


# sentences


def test_each_phrase_is_read_as_what_it_says():
    for name, values in PHRASES.items():
        for value, pair in values.items():
            for phrase in (*pair[PARTS], *pair[CLAUSES]):
                assert read_facts(phrase) == {name: value}, phrase
                assert read_facts(f"{phrase.capitalize()}.") == {name: value}
    for (name, value), phrases in HEARD.items():
        for phrase in phrases:
            assert read_facts(f"Here: {phrase}!") == {name: value}, phrase


def test_what_is_said_is_what_is_read():
    rng = np.random.default_rng(0)
    for _ in range(6000):
        facts = some_facts(rng, rng.random())
        if not facts:
            continue
        said = mentioned(facts, rng, rng.random())
        assert said.items() <= facts.items()
        for plain in (False, True):
            text = say(said, rng, plain)
            assert read_facts(text) == said, text
            assert 1 <= text.count(".") <= 3 and text[0].isupper() and "  " not in text and " ," not in text
        assert read_facts(describe(facts, rng, rng.random())).items() <= facts.items()


def test_only_and_plain():
    rng = np.random.default_rng(1)
    for _ in range(300):
        facts = {a.name: choose(rng, a.values) for a in SCHEMA.values()}
        assert all(SCHEMA[name].source == "code" for name in read_facts(describe(facts, rng, only="code")))
        assert read_facts(describe(facts, rng, only="visible", plain=True)) == {n: v for n, v in facts.items() if SCHEMA[n].visible}
        assert {n for n, v in facts.items() if v != SCHEMA[n].neutral} <= set(read_facts(describe(facts, rng)))
    for wrong in ("codes", ""):
        with pytest.raises(InputError):
            describe({"mouth": "open"}, rng, only=wrong)
    with pytest.raises(InputError):
        say({}, rng)
    with pytest.raises(InputError):
        describe({"mouth": "ajar"}, rng)


def test_share_and_neutral_values():
    rng = np.random.default_rng(2)
    facts = {a.name: a.neutral or a.values[0] for a in SCHEMA.values()} | {"mouth": "open", "smile": "broad", "brows": "raised"}
    count = {name: np.mean([name in mentioned(facts, rng, 0.5) for _ in range(2000)]) for name in facts}
    assert abs(count["mouth"] - 0.5) < 0.05 and 0.03 < count["yaw"] < 0.14


def test_denials():
    assert read_facts("There are no glasses and no hat.") == {"glasses": "none", "hat": "none"}
    assert read_facts("The mouth is not open") == {"mouth": "closed"} and read_facts("The person is not smiling") == {"smile": "none"}
    assert read_facts("without a beard, without glasses") == {"glasses": "none", "beard": "none"}
    assert read_facts("The skin is not dark.") == {} and read_facts("no smile. a broad smile") == {"smile": "broad"}


def test_garbled_text_never_raises():
    rng = np.random.default_rng(3)
    words = [w for text in all_texts() for w in text.split()] + ["</s>", "<FACE>", "<image>", "☃", "\x00", "no", "not", ".", ",", "\n", "'", "{}", "%s", ""]
    for _ in range(1500):
        text = " ".join(choose(rng, words) for _ in range(rng.integers(40)))
        assert check_facts(read_facts(text)) == read_facts(text)
    for text in ("", " ", "no", "not not not", "\ud800", "a" * 100000, "Ünïcode ☃ mouth ist offen"):
        assert read_facts(text) == {}
    start = time.process_time()
    read_facts("the face is turned far to the " * 2000)
    assert time.process_time() - start < 2


# measures


def test_zero_code_is_neutral(model):
    facts = code_facts(model, FaceCode.zeros(2, model.dims))
    assert facts[0] == facts[1] and all(v == SCHEMA[n].neutral for n, v in facts[0].items() if SCHEMA[n].neutral) and facts[0]["skin"] in ("medium", "light")


@pytest.mark.parametrize("yaw, word", [(-0.6, "far left"), (-0.3, "left"), (0.0, "front"), (0.3, "right"), (0.6, "far right")])
def test_pose_words(model, yaw, word):
    code = replace(FaceCode.zeros(1, model.dims), camera=torch.tensor([[0.0, yaw, 0, 0, 0, 0]]))
    assert code_facts(model, code)[0]["yaw"] == word
    nose = code.cam().project(model.landmarks(model.verts())[:, [30, 27]], 64)[0][0]  # the tip of the nose moves to that side of its root
    assert np.sign(float(nose[0, 0] - nose[1, 0])).astype(int) == np.sign(yaw).astype(int) or yaw == 0


def test_pitch_is_up_when_the_nose_goes_up(model):
    for pitch in (-0.25, 0.25):
        code = replace(FaceCode.zeros(1, model.dims), camera=torch.tensor([[pitch, 0.0, 0, 0, 0, 0]]))
        tip, corner = code.cam().project(model.landmarks(model.verts())[:, [30, 0]], 64)[0][0, :, 1]
        flat = Camera.scaled_orthographic(torch.zeros(1, 6)).project(model.landmarks(model.verts())[:, [30, 0]], 64)[0][0, :, 1]
        up = float((tip - corner) - (flat[0] - flat[1])) < 0  # rows grow downwards
        assert code_facts(model, code)[0]["pitch"] == ("up" if up else "down")


@pytest.mark.parametrize("to_lamp, word", [((-1, 0, 1), "left"), ((1, 0.2, 1), "right"), ((0, 1, 0.8), "above"), ((0, 0.1, 1), "front"), ((0, -1, 1), "front")])
def test_light_words_follow_a_lamp(model, to_lamp, word):
    for level in (0.3, 1.0, 2.0):
        sh = level * (ambient_light(0.5) + 0.7 * directional_light(torch.tensor([to_lamp], dtype=torch.float32)))
        code = replace(FaceCode.zeros(1, model.dims), light=(sh - ambient_light(1.0)).flatten(1))
        assert code_facts(model, code)[0]["light"] == word


def test_skin_words_follow_albedo_and_light(model):
    ruler = Ruler.of(model)
    steps = torch.linspace(-2.5, 2.5, 9)
    tone = (ruler.tex_basis.sum(0) / ruler.tex_basis.sum(0).norm())[None]
    code = FaceCode(torch.zeros(9, model.dims[0]), torch.zeros(9, model.dims[1]), steps[:, None] * tone, torch.zeros(9, 27), torch.zeros(9, 6))
    skin = measure(ruler, code)["skin"]
    assert (skin.diff() > 0).all() and len({f["skin"] for f in code_facts(ruler, code)}) >= 3
    dim = replace(code, light=torch.tensor([[-0.4 * AMBIENT] + [0.0] * 8]).repeat(9, 3))
    assert (measure(ruler, dim)["skin"] < skin).all()


def test_expression_is_measured_against_rest(model):
    "Shape alone changes no expression measure, expression alone no shape measure."
    rng = torch.Generator().manual_seed(0)
    code = FaceCode.zeros(50, model.dims)
    shaped = measure(model, replace(code, shape=torch.randn(50, model.dims[0], generator=rng)))
    assert all(shaped[k].abs().max() < 1e-3 for k in ("smile", "mouth", "brows", "eyes"))
    moved = measure(model, replace(code, exp=torch.randn(50, model.dims[1], generator=rng)))
    assert all(moved[k].abs().max() < 1e-3 for k in ("face_width", "nose", "lips", "chin")) and moved["mouth"].abs().max() > 0.5


def test_rows_do_not_influence_each_other(model, items):
    code = item_codes(items)
    together, alone = measure(model, code), [measure(model, code[k]) for k in range(len(code))]
    for name, values in together.items():
        assert torch.allclose(values, torch.cat([one[name] for one in alone]), atol=2e-3), name
    assert all(v.shape == (0,) for v in measure(model, code[slice(0, 0)]).values()) and code_facts(model, code[slice(0, 0)]) == []
    double = measure(model, code.to(torch.float64))
    assert all(torch.allclose(double[name].float(), values, atol=1e-2) for name, values in together.items())


def test_a_mirror_swaps_left_and_right(model, items):
    code = item_codes(items)
    other = {"left": "right", "right": "left"}
    plain, seen = measure(model, code), measure(model, Mirror.of(model).code(code))
    near = {"skin": 2.0, "yaw": 0.01, "pitch": 0.01, "light_x": 0.01, "light_y": 0.01}  # the mirrored bases are not exactly the model's
    for name in plain:
        sign = -1 if name in ("yaw", "light_x") else 1
        assert torch.allclose(sign * seen[name], plain[name], atol=near.get(name, 0.25)), name
    swapped = [f["yaw"] == " ".join(other.get(w, w) for w in g["yaw"].split()) for f, g in zip(code_facts(model, code), code_facts(model, Mirror.of(model).code(code)), strict=True)]
    assert np.mean(swapped) > 0.95


def test_a_world_photo_reads_as_the_simulator_drew_it(model, items):
    facts, angles = item_facts(model, items), measure(model, item_codes(items))
    assert np.corrcoef(angles["yaw"], [i.pose[0] for i in items])[0, 1] > 0.99 and np.corrcoef(angles["pitch"], [i.pose[1] for i in items])[0, 1] > 0.95
    assert np.corrcoef(angles["skin"], [-i.tone for i in items])[0, 1] > 0.9
    smiles = np.array([dict(zip(ATTRIBUTES, i.attributes, strict=True))["Smiling"] > 0 for i in items])
    free = [k for k, i in enumerate(items) if not (i.labels19 == 18).sum() > 1800]
    assert np.mean([(facts[k]["smile"] != "none") == smiles[k] for k in free]) > 0.85
    assert all(set(f) >= {a.name for a in SCHEMA.values() if a.source == "code"} | {"glasses", "hat"} for f in facts)


def test_measuring_is_fast(model):
    code, ruler = FaceCode.unpack(0.5 * torch.randn(4000, sum(model.dims) + 33), model.dims), Ruler.of(model)
    code_facts(ruler, code[slice(0, 10)])
    start = time.process_time()
    code_facts(ruler, code)
    assert time.process_time() - start < 2.0  # thousands in a second


def test_measure_takes_shorter_codes_and_other_models(model):
    cut = model.keep_modes(20, 10, 5)
    assert set(code_facts(cut, FaceCode.zeros(1, cut.dims))[0]) == {a.name for a in SCHEMA.values() if a.source == "code"}
    code = FaceCode.unpack(torch.randn(3, 20 + 10 + 5 + 33, generator=torch.Generator().manual_seed(0)) * 0.3, (20, 10, 5))
    short, full = measure(model, code), measure(cut, code)
    assert all(torch.allclose(short[k], full[k], atol=1e-3) for k in ("smile", "mouth", "skin", "yaw"))
    with pytest.raises(ShapeError):
        measure(cut, FaceCode.zeros(1, model.dims))
    with pytest.raises(InputError, match="finite"):
        code_facts(model, replace(FaceCode.zeros(1, model.dims), light=torch.full((1, 27), torch.nan)))
    with pytest.raises(InputError, match="landmarks"):
        measure(replace(model, landmarks68=None), FaceCode.zeros(1, model.dims))


def test_ict_can_be_measured():
    ict = MorphableModel.from_ict(fixture("ict/ict_face9409.npz"))
    facts = code_facts(ict, FaceCode.zeros(1, ict.dims))[0]
    assert facts["yaw"] == "front" and facts["smile"] == "none" and facts["nose"] == "average"
    code = FaceCode.zeros(1, ict.dims)
    code.exp[0, ict.info["exp_names"].index("jawOpen")] = 1.0
    assert code_facts(ict, code)[0]["mouth"] == "wide open"
    code = FaceCode.zeros(1, ict.dims)
    for name in ("mouthSmile_L", "mouthSmile_R"):
        code.exp[0, ict.info["exp_names"].index(name)] = 1.0
    assert code_facts(ict, code)[0]["smile"] == "broad"


def test_photo_facts():
    plus = lambda *names: np.array([1 if a in names else -1 for a in ATTRIBUTES], np.int8)
    assert photo_facts(plus("Bald", "No_Beard")) == {"hair": "bald", "glasses": "none", "hat": "none", "beard": "none"}
    assert "hair" not in photo_facts(plus("Black_Hair", "Brown_Hair")) and "hair" not in photo_facts(plus())
    assert [photo_facts(plus(*n)).get("beard") for n in (("5_o_Clock_Shadow",), ("Goatee",), ("Goatee", "Mustache"), ("Mustache",), ("Sideburns",))] == ["stubble", "beard", "beard", None, "beard"]
    for wrong in (np.ones(39, np.int8), np.ones((1, 40), np.int8)):
        with pytest.raises(ShapeError):
            photo_facts(wrong)


def test_sunglasses_are_told_from_the_picture(items):
    got = [photo_facts(i.attributes, i.labels19, i.image)["glasses"] for i in items]
    want = ["sunglasses" if "sunglasses" in i.caption else "glasses" if dict(zip(ATTRIBUTES, i.attributes, strict=True))["Eyeglasses"] > 0 else "none" for i in items]
    assert np.mean([a == b for a, b in zip(got, want, strict=True)]) > 0.95


def test_describer_is_true_and_steady(model, items):
    codes, attributes = item_codes(items), np.stack([i.attributes for i in items])
    writer = SchemaDescriber(model, seed=5)
    texts = writer.describe(codes=codes)
    assert texts == writer.describe(codes=codes) and len(set(texts)) > len(texts) // 2 and texts != SchemaDescriber(model, seed=6).describe(codes=codes)
    for text, facts in zip(texts, code_facts(model, codes), strict=True):
        assert read_facts(text).items() <= facts.items()
    assert any(set(read_facts(t)) & {"hair", "glasses", "hat", "beard"} for t in writer.describe(codes=codes, attributes=attributes))
    with pytest.raises(InputError):
        writer.describe(images=torch.rand(1, 3, 8, 8))
    nobody = LlavaDescriber(None)  # is not asked
    assert nobody.describe(torch.rand(0, 3, 64, 64)) == [] == nobody.converse([], torch.rand(0, 3, 64, 64)) and nobody.converse([[], []], torch.rand(2, 3, 64, 64)) == [[], []]
    for wrong in (torch.rand(3, 64, 64), torch.rand(0, 1, 64, 64), None):
        with pytest.raises(InputError, match="pictures"):
            nobody.describe(wrong)
    assert writer.describe(codes=codes[slice(0, 0)]) == [] == writer.describe(codes=codes[slice(0, 0)], attributes=attributes[:0])
    with pytest.raises(InputError, match="rows of attributes"):
        writer.describe(codes=codes, attributes=attributes[:-1])
    assert world_ruler() is world_ruler()


# talks


def test_answers_are_read_without_the_question():
    for a in SCHEMA.values():
        for value in a.values:
            for seed in range(20):
                assert read_facts(answer(a.name, {a.name: value}, np.random.default_rng(seed))) == {a.name: value}
    assert answer("hat", {}) == UNKNOWN and read_facts(UNKNOWN) == {}
    with pytest.raises(InputError):
        answer("ears", {})


def test_rules_answer_from_the_facts():
    rng = np.random.default_rng(4)
    seen = {name: set() for name in COMPLEX}
    for _ in range(2000):
        facts = {a.name: choose(rng, a.values) for a in SCHEMA.values()}
        for name, rule in COMPLEX.items():
            text = rule.answer(facts)
            assert text.startswith("Yes" if rule.verdict(facts) else "No") and 0 < len(read_facts(text)) and read_facts(text).items() <= facts.items()
            others = facts | {n: v for n, v in some_facts(rng).items() if n not in rule.needs}
            assert rule.answer(others) == text  # nothing else decides
            seen[name].add(text[:2])
    assert all(s == {"Ye", "No"} for s in seen.values())


def test_shares_and_faces():
    rng = np.random.default_rng(5)
    facts = [{a.name: choose(rng, a.values) for a in SCHEMA.values()} for _ in range(50)]
    names = [f"{k}.jpg" for k in range(50)]
    mix = {"image_to_face": 3, "text_to_face": 1, "general": 0, "face_conversation": 1}
    talks = make_talks(facts, names, 7, mix, 500)
    kinds = [t.kind for t in talks]
    assert {k: kinds.count(k) for k in mix} == {"image_to_face": 300, "text_to_face": 100, "general": 0, "face_conversation": 100} and kinds[:20] != sorted(kinds[:20])
    assert talks == make_talks(facts, names, 7, mix, 500) and talks != make_talks(facts, names, 8, mix, 500) and len({t.id for t in talks}) == 500
    used = [t.image or t.targets[0] for t in talks]
    assert set(used) == set(names) and max(used.count(n) for n in names) == 10
    assert all(facts[names.index(t.image or t.targets[0])] == t.facts for t in talks)
    assert len(make_talks(facts, names, 7, {"general": 1.0})) == 50
    for wrong in ({}, {"chat": 1.0}, {"general": -1.0}, {"general": 0.0}):
        with pytest.raises(InputError):
            make_talks(facts, names, 0, wrong)
    with pytest.raises(InputError):
        make_talks(facts, names[:-1], 0, {"general": 1.0})


@pytest.mark.parametrize("held_out", [False, True])
def test_face_is_said_when_asked_and_only_then(held_out):
    rng = np.random.default_rng(6)
    facts = [some_facts(rng) | {"yaw": "left"} for _ in range(40)]
    talks = make_talks(facts, [f"{k}.jpg" for k in range(40)], 3, dict.fromkeys(KINDS, 1.0), 1500, held_out)
    known = set(vocabulary())
    for t in talks:
        said = [turn.text for turn in t.turns if turn.role == "assistant"]
        count = {"image_to_face": 1, "text_to_face": 1, "mixed": 1, "several": 2}.get(t.kind, 0)
        assert sum(s.count("<FACE>") for s in said) == count == len(t.targets)
        assert all(s in (ANSWER, ANSWER_TWO) for s in said if "<FACE>" in s) and not any("<" in turn.text for turn in t.turns if turn.role == "user")
        assert (t.image is None) == (t.kind in ("text_to_face", "several", "general")) or t.kind in ("worded", "hard_negative")
        assert {w for turn in t.turns for w in words_of(turn.text.replace("<FACE>", ""))} <= known
        if t.kind in ("image_to_face", "mixed", "face_conversation", "detail", "complex"):
            assert all(read_facts(s).items() <= t.facts.items() for s in said)
        if t.kind == "text_to_face":
            assert all(SCHEMA[n].source == "code" for n in read_facts(t.turns[0].text)) and read_facts(t.turns[0].text).items() <= t.facts.items()


def test_held_out_wordings_are_not_trained():
    rng = np.random.default_rng(7)
    facts = [{a.name: choose(rng, a.values) for a in SCHEMA.values()} for _ in range(30)]
    asked = lambda held: {turn.text for t in make_talks(facts, ["x.jpg"] * 30, 9, dict.fromkeys(("image_to_face", "face_conversation", "detail", "complex"), 1.0), 3000, held) for turn in t.turns if turn.role == "user"}
    trained, held = asked(False), asked(True)
    assert not trained & held and set(REQUESTS) <= trained and set(REQUESTS_HELD_OUT) <= held
    assert {q for qs in QUESTIONS.values() for q in qs} <= trained and {q for qs in QUESTIONS_HELD_OUT.values() for q in qs} <= held
    start = lambda texts: {t.split("{")[0] for t in texts if not t.startswith("{")}
    assert not start(TEXT_REQUESTS) & start(TEXT_REQUESTS_HELD_OUT) and len(HARD_IMAGE_HELD_OUT) >= 2 and len(REQUESTS_HELD_OUT) >= 6


def test_held_out_prompts_hold_nothing_that_was_trained():
    "Each question of the row 'held-out wordings' stands, whole and frame by frame, among the held-out tables; everyday questions are among the known."
    rng = np.random.default_rng(8)
    facts = [{a.name: choose(rng, a.values) for a in SCHEMA.values()} for _ in range(30)]
    photos = FacePhotos(torch.zeros(30, 3, 8, 8, dtype=torch.uint8), [f"{k}.jpg" for k in range(30)], facts=tuple(facts))
    prompts = iff_prompts(photos, 4000, 0)
    asked = {name: [(t.kind, turn.text) for n, t, _ in prompts if n == name for turn in t.turns if turn.role == "user"] for name in ("known wordings", "held-out wordings")}
    trained, held = ({text for text in (*texts, *(q for some in groups for q in some)) if "{" not in text} for texts, groups in (
        (REQUESTS + DETAIL, [*QUESTIONS.values(), *(w for w, _ in HARD + GENERAL), *(r.questions for r in COMPLEX.values())]),
        (REQUESTS_HELD_OUT + DETAIL_HELD_OUT, [*QUESTIONS_HELD_OUT.values(), *(w for w, _ in HARD_HELD_OUT), *(r.held_out for r in COMPLEX.values())])))  # fmt: skip
    frames = {"hard_negative": HARD_IMAGE_HELD_OUT + HARD_TEXT_HELD_OUT, "text_to_face": TEXT_REQUESTS_HELD_OUT, "several": SEVERAL_TEXT_HELD_OUT}
    fits = lambda text, frame: re.fullmatch(re.sub(r"\\{\w+\\}", "(.+)", re.escape(frame)), text)
    for kind, text in asked["held-out wordings"]:
        assert text in held or any(fits(text, frame) for frame in frames.get(kind, ())), (kind, text)
        assert text not in trained and not any(text.endswith(q) or text.startswith(q) for q in trained - {text}), (kind, text)
    assert {kind for kind, _ in asked["held-out wordings"]} == set(IFF_MIX) - {"general"} and {kind for kind, _ in asked["known wordings"]} == set(IFF_MIX)
    assert len({frame for frame in HARD_TEXT_HELD_OUT + SEVERAL_TEXT_HELD_OUT for kind, text in asked["held-out wordings"] if fits(text, frame)}) == len(HARD_TEXT_HELD_OUT + SEVERAL_TEXT_HELD_OUT)
    assert [answer for _, answer in HARD_HELD_OUT] == [answer for _, answer in HARD]


def test_vocabulary_is_small_plain_and_closed():
    words = set(vocabulary())
    trained = {w for text in all_texts() for w in words_of(text)}
    assert len(words) <= 450 and words == trained
    assert not words & set("man woman men women male female boy girl lady he she his her him old young age aged child asian african european white-skinned caucasian black-skinned".split())
    assert 55 <= len(GENERAL) <= 110 and all(len(group) >= 2 for group, _ in GENERAL + HARD)


def test_talks_survive_the_file(tmp_path):
    rng = np.random.default_rng(8)
    facts = [some_facts(rng) | {"yaw": "left"} for _ in range(20)]
    talks = make_talks(facts, [f"{k}.jpg" for k in range(20)], 3, dict.fromkeys(KINDS, 1.0), 200)
    write_instructions(tmp_path / "talks.json", talks)
    assert list(read_instructions(tmp_path / "talks.json")) == talks


def test_questions_ask_for_what_is_special_more_often():
    neutral = {a.name: a.neutral or a.values[0] for a in SCHEMA.values()}
    talks = make_talks([neutral | {"mouth": "open", "glasses": "glasses"}], ["x.jpg"], 2, {"face_conversation": 1.0}, 1000)
    first = [read_facts(t.turns[1].text) for t in talks]
    assert np.mean([set(f) <= {"mouth", "glasses", "skin", "hair"} for f in first]) > 0.6


def test_detail_states_each_visible_attribute_once():
    rng = np.random.default_rng(9)
    for _ in range(200):
        facts = {a.name: choose(rng, a.values) for a in SCHEMA.values()}
        assert read_facts(detail(facts)) == {n: v for n, v in facts.items() if SCHEMA[n].visible}


def test_templates_take_any_description():
    for text in ("{x} {} %s \\ <FACE>", "a" * 50000, ""):
        assert text.removesuffix(".") in fill(TEXT_REQUESTS[0], description=text)
    with pytest.raises(InputError):
        fill("{nothing}", description="x")
