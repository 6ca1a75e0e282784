"FaceGPT's rivals: the mean face, networks on the tower, LLaVA-Key, and the refinement that both sides may use."

import json
import os
import random
from dataclasses import replace
from functools import partial

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from facelab.data.instruct import Talk, Turn
from facelab.face.coarse import coarse
from facelab.face.code import FaceCode
from facelab.face.fit import FitConfig, see
from facelab.face.measure import keypoint_error
from facelab.face.morphable import MorphableModel
from facelab.face.objective import EQ5, Objective
from facelab.facegpt import baselines
from facelab.facegpt import train as train_page
from facelab.facegpt.baselines import FaceRegressor, constant_codes, train_regressor
from facelab.facegpt.batches import talk_set, tensor_pixels
from facelab.facegpt.key import NUMBERS, add_number_words, cells, fit_points, free_answers, key_loss, key_talks, moved, number_words, parse_points, train_key, write_points, written
from facelab.facegpt.llava_training import Sizes, built
from facelab.facegpt.model import FaceGPT
from facelab.facegpt.objective import Weights, render_loss, targets_of
from facelab.facegpt.photos import FacePhotos
from facelab.facegpt.prompt import Prompt, ask
from facelab.facegpt.refine import Kept, own_landmarks, refine
from facelab.facegpt.talker import Talker
from facelab.facegpt.tower_training import Jitter
from facelab.facegpt.train import MINI, train_facegpt
from facelab.facegpt.vlm import FACE, LoraSettings, add_face_token, load_llava, random_llava, with_lora, word_pieces
from facelab.lab.errors import InputError, ShapeError
from facelab.lab.train import TrainConfig
from facelab.nets.tower import TowerConfig
from train_target import PowerCut, cut_at

TEXTS = ["USER: ASSISTANT: Can you give the landmarks of this person. Please give them of this face in the photo."]
QUICK = replace(MINI, steps=12, batch=6, warmup=2, threads=1, rate=1e-3, head_rate=2e-3, how=Jitter(share=0.0, gain=0.0))


@pytest.fixture(scope="module")
def model():
    return coarse(MorphableModel.procedural(), 600)


@pytest.fixture(scope="module")
def photos(model):
    "Six renders on grey, of 64 pixels; what is true of them is known exactly."
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(6, 257, generator=generator) * torch.tensor([0.6] * 224 + [0.1] * 27 + [0.15] * 6)
    code = FaceCode.unpack(codes, model.dims)
    with torch.no_grad():
        seen, _, points = see(model, code, 64)
    images = (seen.alpha * seen.image + (1 - seen.alpha) * 0.5).clamp(0, 1)
    return FacePhotos((images * 255).round().byte(), [f"{k}.png" for k in range(6)], points, code, facts=tuple({"yaw": "front", "skin": "light"} for _ in range(6)))


@pytest.fixture()
def clip(tmp_path):
    "A LLaVA with a small CLIP tower."
    return load_llava(random_llava(tmp_path / "clip", TEXTS, 64, 16, context=640))


def towered():
    "A LLaVA with the lab's own tower."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return built(word_pieces(TEXTS), Sizes(32, 1, 2, 64), TowerConfig(widths=(8, 16, 16, 24), layers=1, heads=2, hidden_size=32).to_dict())


# ---- faces that look at nothing ---------------------------------------------------------------------------------------------------------------


def test_constant_codes(photos):
    assert torch.allclose(constant_codes("mean", 2, photos.codes), photos.codes.pack().mean(0).expand(2, -1))
    drawn = constant_codes("random", 2000, photos.codes, seed=3)
    assert abs(float(drawn[:, :224].std()) - 1) < 0.02
    truth = photos.codes.pack()[:, -33:]
    assert torch.allclose(drawn[:, -33:].mean(0), truth.mean(0), atol=0.05) and torch.allclose(drawn[:, -33:].std(0), truth.std(0), atol=0.05)
    assert not torch.equal(drawn, constant_codes("random", 2000, photos.codes, seed=4))
    for wrong in (("mean", 1), ("median", 1), ("mean", 1, photos.codes[:0])):
        with pytest.raises(InputError, match="constant_codes"):
            constant_codes(*wrong)
    with pytest.raises(ShapeError):
        constant_codes("random", 1, photos.codes, (80, 53, 0))


# ---- networks on the tower --------------------------------------------------------------------------------------------------------------------


def test_pooling(clip, monkeypatch):
    assert FaceRegressor(clip).pooling == "flat"  # 16 x 16
    monkeypatch.setattr(baselines, "LARGEST", 255)
    net = FaceRegressor(clip)
    assert net.pooling == "mean" and net.head.layers[0].in_features == 16
    own = towered()
    net = FaceRegressor(own)
    assert net.pooling == "sum"
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    tower = own.model.model.vision_tower
    with torch.no_grad():
        summary = (tower.summary(2 * images - 1) - tower.mean) / tower.std
        assert torch.allclose(net.features(tensor_pixels(own, images)).sum(1), summary, atol=1e-5)
    with pytest.raises(InputError, match="pooling"):
        FaceRegressor(own, pooling="max")


@pytest.mark.parametrize("trained", [False, True])
def test_what_a_regressor_trains(photos, model, trained):
    llava = towered()
    tower = llava.model.model.vision_tower
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    torch.manual_seed(0)
    net = FaceRegressor(llava, trained=trained)
    assert not net.predict(photos).any()  # the last layer is zero
    curve = train_regressor(replace(QUICK, steps=60), net, photos, model)
    assert curve["regressor/loss"].iloc[-1] < (0.7 if trained else 0.97) * curve["regressor/loss"].iloc[0]
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())
    moved = {name for name, value in net.tower.state_dict().items() if not torch.equal(value, before[name])}
    assert bool(moved) == ("stem.1.weight" in moved) == trained and "stem.1.running_mean" not in moved and not net.tower.training
    assert torch.allclose(net.predict(photos[[2]]), net.predict(photos)[2:3], atol=1e-5)  # no statistics of the batch


def test_the_same_eq5_as_facegpt(photos, model):
    "One step, no framing: the loss is Eq. 5 of the mean face on these photos, and the regulariser pulls to the head's offset."
    prior = photos.codes.pack().mean(0)
    net = FaceRegressor(towered(), offset=prior)
    curve = train_regressor(replace(QUICK, steps=1, warmup=0), net, photos, model)
    truth = targets_of(photos.pictures(), photos.landmarks_2d)
    each, terms = render_loss(model, prior.expand(6, -1), truth, QUICK.weights.eq5, prior=prior)
    assert not terms["regulariser"].any() and float(curve["regressor/regulariser"].iloc[0]) == 0.0
    assert abs(float(curve["regressor/face"].iloc[0]) - float(each.mean())) < 1e-4
    assert abs(float(curve["regressor/loss"].iloc[0]) - QUICK.weights.face * float(each.mean())) < 1e-4


def test_supervised_variant(photos, model):
    net = FaceRegressor(towered())
    how = replace(QUICK, weights=Weights(loss="params"))
    curve = train_regressor(how, net, photos, model, codes=photos.codes.pack())
    assert curve["regressor/face"].iloc[-1] < curve["regressor/face"].iloc[0]
    with pytest.raises(InputError, match="codes"):
        train_regressor(how, net, photos, model)


@pytest.mark.parametrize("trained", [False, True])
def test_regressor_files(photos, clip, tmp_path, trained):
    net = FaceRegressor(clip, trained=trained, face_model="some")
    with torch.no_grad():
        for weight in (net.head.layers[2].weight, *(net.tower.parameters() if trained else ())):
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    net.save(tmp_path / "net")
    again = FaceRegressor.load(tmp_path / "net")  # finds its base by the card
    assert torch.equal(again.predict(photos), net.predict(photos)) and again.face_model == "some" and again.trained == trained
    with pytest.raises(InputError, match="dims"):
        FaceRegressor.load(tmp_path / "net", dims=(80, 53, 0))
    with pytest.raises(InputError, match="another tower"):
        FaceRegressor.load(tmp_path / "net", random_llava(tmp_path / "other", TEXTS, 64, 16, seed=1))
    card = json.loads((tmp_path / "net/regressor.json").read_text())
    for change, said in (({"sha256": "0"}, "another file"), ({"dims": [1, 2]}, "dims"), ({"format": 2}, "format"), ({"base": {"folder": "gone"}}, "not there")):
        (tmp_path / "net/regressor.json").write_text(json.dumps(card | change))
        with pytest.raises(InputError, match=said):
            FaceRegressor.load(tmp_path / "net")
    with pytest.raises(InputError, match="regressor.json"):
        FaceRegressor.load(tmp_path)


# ---- refinement -------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def predicted(photos):
    generator = torch.Generator().manual_seed(1)
    return photos.codes.pack() + torch.tensor([0.3] * 224 + [0.1] * 27 + [0.02] * 6) * torch.randn(6, 257, generator=generator)


def test_refinement_never_makes_eq5_worse(photos, model, predicted):
    images = photos.pictures()
    truth = targets_of(images, own_landmarks(model, predicted, 64))
    with torch.no_grad():
        eq5 = lambda theta: render_loss(model, theta, truth)[0]
        better, wild = refine(model, predicted, images, 15), refine(model, predicted, images, 2, config=FitConfig(camera_step=1.0, geometry_step=9.0, tex_step=9.0, light_step=9.0))
        assert (eq5(better) < 0.95 * eq5(predicted)).all() and (eq5(wild) <= eq5(predicted)).all()
        assert (eq5(refine(model, predicted, images, 0, relight=True)) <= eq5(predicted)).all()
    assert torch.equal(refine(model, predicted, images, 0), predicted)
    off = (refine(model, predicted, images, 15, config=FitConfig(batch=2)) - better).abs()
    assert off.max() < 1e-2 and off.mean() < 1e-3 < 0.1 < (better - predicted).abs().mean()  # other sums in matrix products, and Adam divides by small slopes


def test_landmarks_of_a_detector_are_followed(photos, model, predicted):
    px = lambda theta: float(keypoint_error(own_landmarks(model, theta, 64), photos.landmarks_2d, 64).px.mean())
    led = refine(model, predicted, photos.pictures(), 25, Objective(landmark=5e-3), photos.landmarks_2d)
    assert px(led) < 0.6 * px(predicted)


def test_kept_is_per_face():
    kept = Kept(torch.zeros(3, 1))
    for value, losses in enumerate(([1.0, 4.0, float("nan")], [2.0, 3.0, 1.0], [0.5, 9.0, 2.0])):
        kept.look(torch.full((3, 1), float(value)), torch.tensor(losses))
    assert kept.theta[:, 0].tolist() == [2, 1, 1]


@pytest.mark.parametrize("broken", [lambda p: (p.pictures()[:2], 3, {}), lambda p: (p.pictures()[..., :40], 3, {}), lambda p: (p.pictures(), -1, {}), lambda p: (p.pictures(), 3, {"landmarks_2d": torch.zeros(6, 5, 2)}),
                                    lambda p: (p.pictures(), 3, {"config": FitConfig(optimiser="lbfgs")}), lambda p: (p.pictures() * torch.nan, 3, {})])  # fmt: skip
def test_refinement_refuses(photos, model, predicted, broken):
    images, steps, how = broken(photos)
    with pytest.raises(InputError):
        refine(model, predicted, images, steps, **how)


# ---- LLaVA-Key --------------------------------------------------------------------------------------------------------------------------------


def test_points_as_text(photos):
    texts = written(photos.landmarks_2d, 64)
    back = torch.stack([parse_points(text, 64) for text in texts])
    inside = photos.landmarks_2d.clamp(0, 63.999)
    assert float((back - inside).abs().max()) <= 0.32 + 1e-4  # half a cell
    assert written(back, 64) == texts
    edge = photos.landmarks_2d.clone()
    edge[:, 0], edge[:, 1] = -5.0, 64.0
    assert written(edge, 64)[0].startswith("00 00 99 99 ")


def test_parsing_never_fails(photos):
    draw, good = random.Random(0), written(photos.landmarks_2d, 64)[0]
    assert parse_points(f"The points: {good.replace(' ', ',')}") is not None
    for _ in range(300):
        letters = list(good)
        for _ in range(draw.randint(1, 4)):
            letters[draw.randrange(len(letters))] = draw.choice(["", " ", "7", "77", "x", "٣", "-", "."])
        found = parse_points("".join(letters), 64)
        assert found is None or (found.shape == (68, 2) and 0 < float(found.min()) and float(found.max()) < 64)
    for wrong in ("", good + " 50", good[3:], good.replace(" ", ""), " ".join(["33"] * NUMBERS), " ".join(["33", "44"] * 68)):
        assert parse_points(wrong) is None


def test_number_words(clip):
    assert number_words(clip) == ()
    before, rows = len(clip.tokenizer), clip.model.lm_head.weight.detach().clone()
    words = add_number_words(clip)
    assert len(set(words)) == 100 and add_number_words(clip) == words == number_words(clip) and len(clip.tokenizer) == before + 100
    assert torch.equal(clip.model.lm_head.weight[:before], rows[:before])
    ids = clip.tokenizer(" 07 54 99")["input_ids"]
    assert len(ids) == 3 and clip.tokenizer.decode(ids).split() == ["07", "54", "99"]
    face = add_face_token(clip)
    adapted = with_lora(clip, LoraSettings(words=words[:2]))
    assert adapted.peft_config["default"].trainable_token_indices["lm_head"] == sorted({face, *clip.tokenizer.convert_tokens_to_ids(list(words[:2]))})


def test_words_of_lora(clip):
    assert LoraSettings(words=["a"]) == LoraSettings(words=("a",))  # as a card gives it
    with pytest.raises(InputError, match="LoraSettings.words"):
        with_lora(clip, LoraSettings(words=("no such word",)))
    assert FACE not in clip.tokenizer.get_vocab() and with_lora(clip, LoraSettings()).peft_config["default"].trainable_token_indices is None


def test_answers_follow_moved_photos(photos, clip):
    words = add_number_words(clip)
    talker, numbers = Talker(clip, Prompt(system="")), torch.tensor(clip.tokenizer.convert_tokens_to_ids(list(words)))
    talks = key_talks(photos, 0, 8, 0.5)
    tokens = talker.tokens(talks)
    shown = [talk for talk in talks if talk.image is not None]
    other = photos.landmarks_2d[[photos.names.index(talk.image) for talk in shown]] / 64 * 0.5
    then = moved(tokens, numbers, other)
    texts = [clip.tokenizer.decode(row[row != -100], skip_special_tokens=True).strip() for row in then.labels]
    wanted = iter(written(other, 1))
    assert texts == [next(wanted) if talk.image is not None else talk.turns[1].text for talk in talks]
    same = then.labels == -100
    assert torch.equal(then.input_ids[same], tokens.input_ids[same]) and torch.equal(then.input_ids[~same], then.labels[~same])
    with pytest.raises(ShapeError, match="numbers"):
        moved(tokens._replace(labels=torch.full_like(tokens.labels, -100)), numbers, other)


def test_key_trains_its_rows_and_nothing_else(photos, clip):
    words = add_number_words(clip)
    talker = Talker(clip, Prompt(system=""), LoraSettings(4, 8, words=words))
    frozen = {name: weight.detach().clone() for name, weight in talker.named_parameters() if not weight.requires_grad}
    talks = key_talks(photos, 0, 12, 0.3)
    curve = train_key(replace(QUICK, rate=1e-2), talker, photos, talk_set(talker.encoder, talks, photos))
    assert curve["key/text"].iloc[-1] < curve["key/text"].iloc[0]
    assert all(torch.equal(weight, frozen[name]) for name, weight in talker.named_parameters() if name in frozen)
    questions = [ask(talk) for talk in talks]
    rows = [photos.names.index(q.image) for q in questions if q.image is not None]
    features = talker.vision(tensor_pixels(clip, photos.pictures(rows)))
    fallback = photos.landmarks_2d.mean(0)
    said, alone = (write_points(talker, questions, features, 64, fallback, batch) for batch in (32, 5))
    assert said.texts == alone.texts and torch.equal(said.good, alone.good) and said.malformed == int((~said.good).sum())
    free = free_answers(talker, questions, features, 32)[0]
    assert [a == b for a, b in zip(said.texts, free)] == said.good.tolist() and all(len(text.split()) == NUMBERS for text in said.texts)
    assert write_points(talker, [], None, 64, fallback).points.shape == (0, 68, 2)
    fresh = load_llava(clip.folder)
    add_number_words(fresh)
    other = Talker(fresh, Prompt(system=""), LoraSettings(4, 8))
    with pytest.raises(InputError, match="rows frozen"):
        train_key(QUICK, other, photos, None)


def test_key_with_digits(photos, clip):
    "A tokenizer that cuts numbers into digits: photos stay where they are."
    talker = Talker(clip, Prompt(system=""), LoraSettings(4, 8))
    talks = talk_set(talker.encoder, key_talks(photos, 0, 6, 0.0), photos)
    with pytest.raises(InputError, match="several tokens"):
        key_loss(photos, MINI, [])
    still = replace(QUICK, steps=3, batch=2, warmup=1)
    assert torch.isfinite(torch.tensor(train_key(still, talker, photos, talks)["key/text"].tolist())).all()
    questions, fallback = [ask(talk) for talk in key_talks(photos, 0, 2, 0.0)], photos.landmarks_2d.mean(0)
    said = write_points(talker, questions, talker.vision(tensor_pixels(clip, photos.pictures([0, 1]))), 64, fallback)
    assert said.malformed == 2 and all(torch.equal(points, fallback) for points in said.points)


def test_words_alone_and_layers_computed_twice(photos, model, clip, tmp_path):
    "A micro-batch without a picture or a face goes through; gradient checkpointing changes no number."
    words = Talk("w", None, (Turn("user", "Is it?"), Turn("assistant", "No.")), "general")
    asked = Talk("f", photos.names[0], (Turn("user", "Can you give the face of this person."), Turn("assistant", f"Sure, it is {FACE}.")), "image_to_face", None, (photos.names[0],))
    curves = []
    for twice in (False, True):
        torch.manual_seed(0)
        gpt = FaceGPT(load_llava(tmp_path / "clip"), model.dims, Prompt(system=""), LoraSettings(4, 8))
        rows = talk_set(gpt.encoder, [words, asked, words, words], photos)
        how = replace(QUICK, steps=4, batch=1, accumulate=4, gradient_checkpointing=twice)
        calls = []
        hook = gpt.core.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        curves.append(train_facegpt(how, gpt, photos, rows, model))
        hook.remove()
        curves[-1].attrs["calls"] = len(calls)
        assert not getattr(gpt.core.language_model, "gradient_checkpointing", False)
    one, two = curves
    assert one["facegpt/face"].iloc[0] > 0 and {"facegpt/photo", "facegpt/landmark"} <= set(one.columns)
    assert torch.allclose(torch.tensor(one["facegpt/loss"].values), torch.tensor(two["facegpt/loss"].values), rtol=1e-5)
    assert two.attrs["calls"] > 1.5 * one.attrs["calls"]
    talker = Talker(load_llava(tmp_path / "clip"), Prompt(system=""), LoraSettings(words=number_words(clip))) if number_words(clip) else None
    assert talker is None or train_key(replace(QUICK, steps=1, batch=1), talker, photos, talk_set(talker.encoder, [words], photos)) is not None


def test_prediction_is_the_same_in_pieces(photos, clip):
    net = FaceRegressor(clip)
    assert torch.allclose(net.predict(photos, 2), net.predict(photos.pictures()), atol=1e-6)


def test_a_regressor_of_another_model_or_camera(clip, tmp_path):
    FaceRegressor(clip, face_model="ict", focal=4.53).save(tmp_path / "net")
    assert FaceRegressor.load(tmp_path / "net", face_model="ict").focal == 4.53
    with pytest.raises(InputError, match="'ict'; needed 'bfm2017'"):
        FaceRegressor.load(tmp_path / "net", face_model="bfm2017")


def test_talks_of_key(photos):
    talks = key_talks(photos, 0, 60, 0.5)
    assert talks == key_talks(photos, 0, 60, 0.5) != key_talks(photos, 1, 60, 0.5)
    assert 15 < sum(talk.image is None for talk in talks) < 45
    asked = lambda **how: {talk.turns[0].text for talk in key_talks(photos, 0, 60, 0.0, **how)}
    assert not asked() & asked(held_out=True)
    with pytest.raises(InputError, match="facts"):
        key_talks(replace(photos, facts=None), 0)
    assert len(key_talks(replace(photos, facts=None), 0, text_share=0.0)) == 6


def test_fit_of_written_points(photos, model):
    points = torch.stack([parse_points(text, 64) for text in written(photos.landmarks_2d, 64)])
    px = lambda theta: float(keypoint_error(own_landmarks(model, theta, 64), photos.landmarks_2d, 64).px.mean())
    alone = fit_points(model, points, 64)
    assert px(alone) < 2.5 and not alone[:, 144:251].any()
    config = FitConfig(objective=replace(EQ5, landmark=5e-3))
    seen = fit_points(model, points, 64, photos.pictures(), 8, config)
    assert px(seen) < 2.5 and seen[:, 144:251].any()
    start = fit_points(model, points, 64, config=config)
    assert torch.equal(seen, refine(model, start, photos.pictures(), 8, config.objective, points, relight=True, config=config))  # one and the same descent
    assert torch.equal(fit_points(model, points, 64, photos.pictures(), 0), alone)
    with pytest.raises(ShapeError):
        fit_points(model, points, 64, torch.zeros(6, 3, 32, 32), 4)


def test_cells():
    assert cells(torch.tensor([[0.0, 0.999], [0.505, 1.2]])).tolist() == [[0, 99], [50, 99]]


# ---- a run that was cut off ---------------------------------------------------------------------------------------------------------------------


def adapted(folder, photos, seed):
    "A FaceGPT with a fresh adapter that drops out, and its talks."
    torch.manual_seed(seed)
    gpt = FaceGPT(load_llava(folder), prompt=Prompt(system=""), lora=LoraSettings(4, 8, 0.1))
    said = lambda answer: (Turn("user", "Can you give the landmarks of this person."), Turn("assistant", answer))
    talks = [Talk(str(k), f"{k % 6}.png" if k % 3 else None, said(f"Sure, it is {FACE}." if k % 4 else "Please."), "t", None, (f"{k % 6}.png",) if k % 4 else ()) for k in range(18)]
    return gpt, talk_set(gpt.encoder, talks, photos)


def test_training_goes_on_where_it_was_cut_off(photos, model, tmp_path, monkeypatch):
    "LoRA with dropout, the rows of <FACE>, the head and what the optimiser keeps, photos framed anew in each step: the same bits as without the cut, whatever the second start's weights were."
    monkeypatch.setattr(train_page, "TrainConfig", partial(TrainConfig, save_every=3, save_every_s=None))
    folder, recipe = random_llava(tmp_path / "llava", TEXTS, 64, 16, context=640), replace(QUICK, how=Jitter())
    ends, seen = [], []
    for scratch, seed, look in (("whole", 0, lambda run: None), ("cut", 0, cut_at(8)), ("cut", 5, lambda run: seen.append(run.step))):
        gpt, rows = adapted(folder, photos, seed)
        train_it = lambda: train_facegpt(recipe, gpt, photos, rows, model, look=look, scratch=tmp_path / scratch)
        if scratch == "cut" and seed == 0:
            with pytest.raises(PowerCut):
                train_it()
            continue
        curve = train_it()
        ends.append((curve.drop(columns=[c for c in curve if c.endswith("seconds")]), {name: weight.detach().clone() for name, weight in gpt.named_parameters() if weight.requires_grad}))
    (curve, weights), (again, resumed) = ends
    assert seen[0] == 7 and seen[-1] == 12, "it began anew"
    assert {part for part in ("lora_A", "lora_B", "trainable_tokens_delta", "head.layers") if any(part in name for name in weights)} == {"lora_A", "lora_B", "trainable_tokens_delta", "head.layers"}
    assert [name for name, weight in weights.items() if not torch.equal(weight, resumed[name])] == [] and curve.equals(again)
    assert max(float(weight.abs().max()) for name, weight in weights.items() if "lora_B" in name) > 0


def test_a_regressor_goes_on_where_it_was_cut_off(photos, model, tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "TrainConfig", partial(TrainConfig, save_every=3, save_every_s=None))
    recipe, ends, seen = replace(QUICK, how=Jitter()), [], []
    for scratch, seed, look in (("whole", 0, lambda run: None), ("cut", 0, cut_at(8)), ("cut", 5, lambda run: seen.append(run.step))):
        torch.manual_seed(seed)
        net = FaceRegressor(towered(), trained=True)
        try:
            curve = train_regressor(recipe, net, photos, model, look=look, scratch=tmp_path / scratch)
            ends.append((curve.drop(columns=[c for c in curve if c.endswith("seconds")]), {name: value.clone() for name, value in net.state_dict().items()}))
        except PowerCut:
            pass
    (curve, weights), (again, resumed) = ends
    assert seen[0] == 7 and [name for name, weight in weights.items() if not torch.equal(weight, resumed[name])] == [] and curve.equals(again)
