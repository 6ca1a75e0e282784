"GPTFace's losses and pre-training: no leak, means as by hand, mismatches that mismatch, resumed runs, streams."

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from facelab.gptface.masking import Hiding, ImageBudget, Masking, draw_hidden, hide
from facelab.gptface.model import GPTFaceConfig, build_gptface, load_gptface, save_gptface
from facelab.gptface.objective import MilmItm, itm_loss, judged_pairs, milm, mismatch, other_texts, pretrain_losses
from facelab.gptface.pretrain import Pretraining, Rise, TokenSet, held_out, pair_stream, picture, pretrain, token_set, weight_groups
from facelab.gptface.tokens import TokenLayout, Sequences, Vocabulary, join
from facelab.lab.errors import InputError, ShapeError

LAYOUT = TokenLayout(words=20, codes=12, rows=3, cols=4, text=5, pad=0, unk=1, cls=2, sep=3, mask=4)


def small(seed=0, layout=LAYOUT, **changes):
    return build_gptface(GPTFaceConfig(layout, **({"layers": 2, "width": 16, "heads": 2, "ffn_dim": 24} | changes)), seed)


def batch(b=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(12, (b, 3, 4), generator=g), torch.randint(5, 20, (b, 5), generator=g)


def masked(seed=0):
    truth = join(LAYOUT, *batch())
    return truth, draw_hidden(LAYOUT, truth, Masking(), 4 * 10**5, np.random.default_rng(seed))


# ---- MILM -------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_no_leak(tied):
    "The ids under the masks change; states, MILM (for the same targets) and ITM keep their bits."
    model = small(tied=tied)
    truth, hidden = masked()
    changed = truth.ids.clone()
    changed[hidden] = torch.where(truth.ids[hidden] >= 20, 20 + (truth.ids[hidden] - 20 + 5) % 12, 5 + (truth.ids[hidden] - 5 + 3) % 15)
    assert (changed[hidden] != truth.ids[hidden]).all()
    given = [hide(LAYOUT, Sequences(ids, truth.attend), hidden) for ids in (truth.ids, changed)]
    assert torch.equal(milm(model, given[0], truth.ids).loss, milm(model, given[1], truth.ids).loss)
    assert torch.equal(model(*given[0][:2]).match, model(*given[1][:2]).match)
    grads = [torch.autograd.grad(milm(model, one, truth.ids).loss, list(model.blocks.parameters())) for one in given]
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_the_leak_test_can_fail():
    "A batch in which the hidden ids are left standing is found out."
    model = small()
    truth, hidden = masked()
    changed = truth.ids.clone()
    changed[hidden] = torch.where(truth.ids[hidden] >= 20, 20, 5)
    assert not torch.equal(milm(model, Hiding(truth.ids, truth.attend, hidden), truth.ids).loss, milm(model, Hiding(changed, truth.attend, hidden), truth.ids).loss)


def test_milm_is_the_mean_over_hidden_positions():
    model = small().double()
    truth, hidden = masked()
    given = hide(LAYOUT, truth, hidden)
    states, losses, hits = model(given.ids, given.attend).states.detach(), [], {True: [], False: []}
    for row, place in hidden.nonzero().tolist():
        scores = (states[row, place] @ model.tokens.weight.T + model.bias).detach()
        target = int(truth.ids[row, place])
        losses.append(float(scores.exp().sum().log() - scores[target]))
        hits[target >= 20].append(int(scores.argmax()) == target)
    found = milm(model, given, truth.ids)
    assert abs(float(found.loss) - sum(losses) / len(losses)) < 1e-5 and found.count == len(losses)  # the loss is in float32
    assert abs(float(found.image_accuracy) - np.mean(hits[True])) < 1e-6 and abs(float(found.text_accuracy) - np.mean(hits[False])) < 1e-6
    nothing = milm(model, hide(LAYOUT, truth, hidden & False), truth.ids)
    assert float(nothing.loss) == 0.0 and nothing.count == 0


# ---- ITM --------------------------------------------------------------------------------------------------------------------------------------


def test_itm_loss_by_hand():
    logits = torch.tensor([[0.0, 2.0], [1.0, -1.0], [0.0, 0.0]])
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-2)) + math.log(2)) / 3
    assert abs(float(itm_loss(logits, torch.tensor([True, False, True]))) - expected) < 1e-6


def test_mismatched_texts_are_others():
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = torch.from_numpy(rng.integers(5, 7, (int(rng.integers(2, 12)), 2)))  # four captions, so many are equal
        found = other_texts(text, rng)
        several = len({tuple(row) for row in text.tolist()}) > 1
        assert (text[found] != text).any(1).all() if several else torch.equal(found, torch.arange(len(text)))
        share = float(rng.random())
        texts, matched = mismatch(text, share, rng)
        assert torch.equal(matched, (texts == text).all(1))
        if several:
            assert abs(int((~matched).sum()) - share * len(text)) < 1


def test_other_texts_are_spread_over_the_batch():
    text, rng = torch.arange(8)[:, None] + 5, np.random.default_rng(1)
    met = Counter(int(other_texts(text, rng)[0]) for _ in range(700))
    assert set(met) == set(range(1, 8)) and max(met.values()) < 2 * min(met.values())


def test_half_of_the_pairs_is_mismatched():
    rng, text = np.random.default_rng(2), torch.arange(7)[:, None] + 5
    counts = [int((~mismatch(text, 0.5, rng)[1]).sum()) for _ in range(200)]
    assert set(counts) == {3, 4} and abs(np.mean(counts) - 3.5) < 0.15


def test_paired_pictures_come_with_both_texts():
    codes, text = batch()
    faces, texts, matched = judged_pairs(codes, text, MilmItm(), np.random.default_rng(0))
    assert len(faces) == 6 and torch.equal(faces[:3], faces[3:]) and matched.tolist() == [True] * 3 + [False] * 3
    assert (texts[:3] != texts[3:]).any(1).all()
    equal = judged_pairs(codes, text[:1].expand(6, -1), MilmItm(), np.random.default_rng(0))
    assert equal[2].all()  # no other text in the batch: all are matched, none is mislabelled


def test_losses_are_added_and_weighted():
    model, (codes, text) = small(), batch()
    for how in ({}, {"joint": True}, {"paired": False}, {"blind": True}, {"itm": 0.5}):
        terms = pretrain_losses(model, codes, text, MilmItm(**how), Masking(), 0, 10, np.random.default_rng(0))
        assert torch.equal(terms["loss"], terms["milm"] + how.get("itm", 1.0) * terms["itm"])
        grads = torch.autograd.grad(terms["loss"], list(model.parameters()))
        assert all(torch.isfinite(grad).all() for grad in grads) and grads[0].abs().sum() > 0


def test_clean_inputs_give_way_to_masked_ones(monkeypatch):
    from facelab.gptface import objective

    seen = []
    real = objective.hide
    monkeypatch.setattr(objective, "hide", lambda layout, seq, hidden: seen.append(hidden) or real(layout, seq, hidden))
    model, (codes, text) = small(), batch(40)
    for step in (0, 99):
        pretrain_losses(model, codes, text, MilmItm(), Masking(), step, 100, np.random.default_rng(0))
    bare = [float((~hidden.any(1)).float().mean()) for hidden in seen]  # MILM, ITM, MILM, ITM
    assert bare[0] == bare[2] == 0 and bare[1] == 1.0 and 0.1 < bare[3] < 0.55


def test_blind_milm_sees_the_text_of_another(monkeypatch):
    from facelab.gptface import objective

    seen = []
    real = objective.milm
    monkeypatch.setattr(objective, "milm", lambda model, given, truth: seen.append(truth) or real(model, given, truth))
    model, (codes, text) = small(), batch()
    for blind in (False, True):
        pretrain_losses(model, codes, text, MilmItm(blind=blind), Masking(), 0, 100, np.random.default_rng(0))
    assert torch.equal(seen[0][:, LAYOUT.first_text :], text) and (seen[1][:, LAYOUT.first_text :] != text).any(1).all()


def test_a_lone_pair_is_refused():
    codes, text = batch(1)
    with pytest.raises(ShapeError, match="a batch of 1"):
        pretrain_losses(small(), codes, text, MilmItm(), Masking(), 0, 1, np.random.default_rng(0))


# ---- pre-training -----------------------------------------------------------------------------------------------------------------------------

WORDS = ("red", "green", "blue", "white")
VOCAB = Vocabulary.learn([" ".join(WORDS)], 40)
FACES = VOCAB.layout(codes=4, rows=3, cols=3, text=2)
KINDS = torch.arange(32) % 4
PAIRS = token_set(VOCAB, FACES, KINDS[:, None, None].expand(-1, 3, 3).contiguous(), [WORDS[k] for k in KINDS])
BRIEF = Pretraining(steps=24, batch=8, rate=3e-3, warmup=4, ema=0.9, threads=1, log_every=6, look_every=12, save_every=8, masking=Masking(ImageBudget(0.3, 0.1, 10)))


class PowerCut(Exception):
    pass


def learn(config=BRIEF, data=PAIRS, cut=None, **how):
    def power(run):
        if run.step == cut:
            raise PowerCut

    model = small(layout=FACES)
    return model, pretrain(config, model, data, progress=False, callbacks=[power], **how)


def test_resumed_run_has_the_same_bits(tmp_path):
    whole, _ = learn(val=PAIRS)
    with pytest.raises(PowerCut):
        learn(val=PAIRS, scratch=tmp_path / "run", cut=19)
    again, done = learn(val=PAIRS, scratch=tmp_path / "run")
    assert done.resumed == 16 and all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))
    assert {"gptface/milm", "gptface/itm", "gptface/itm_accuracy", "gptface/image_accuracy", "val/itm_accuracy", "val/milm"} <= set(done.curve.columns)


def encode(images):  # an 'image' whose pixels are its code
    return (images[:, 0, :3, :3] * 255).round().long()


def stream():
    images = KINDS[:, None, None, None].expand(-1, 8, 8, 3).to(torch.uint8).numpy()
    return pair_stream([(image, WORDS[k]) for image, k in zip(images, KINDS)], VOCAB, FACES)


def test_resumed_stream_has_the_same_bits(tmp_path):
    whole, _ = learn(data=stream(), encode=encode)
    with pytest.raises(PowerCut):
        learn(data=stream(), encode=encode, scratch=tmp_path / "run", cut=19)
    again, done = learn(data=stream(), encode=encode, scratch=tmp_path / "run")
    assert done.resumed == 16 and all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


def test_a_stream_is_shared_by_processes_and_gives_the_pairs():
    source = pair_stream([(np.full((4, 4, 3), k, np.uint8), WORDS[k % 4]) for k in range(7)], VOCAB, FACES)
    parts = [[int(image[0, 0, 0]) for image, _ in source.open_fn(0, 0, rank, 2)] for rank in range(2)]
    assert parts == [[0, 2, 4, 6], [1, 3, 5]]
    asked = []
    own = pair_stream(lambda *where: asked.append(where) or iter([(np.zeros((3, 4, 4), np.uint8), "red, green and more")]), VOCAB, FACES)
    images, text = own.collate(list(own.open_fn(5, 1, 0, 2)))
    assert asked == [(5, 1, 0, 2)] and images.shape == (1, 3, 4, 4) and text.shape == (1, 2)


def test_a_changed_setting_or_set_is_another_run(tmp_path):
    learn(scratch=tmp_path / "run")
    assert learn(scratch=tmp_path / "run")[1].resumed == 24
    assert learn(replace(BRIEF, losses=MilmItm(itm=2.0)), scratch=tmp_path / "run")[1].resumed == 0
    assert learn(data=PAIRS.take(slice(0, 16)), scratch=tmp_path / "run")[1].resumed == 0
    assert learn(replace(BRIEF, look_every=5, save_every=7), scratch=tmp_path / "run")[1].resumed == 24  # these change nothing


def test_the_averaged_weights_are_what_is_left():
    averaged, done = learn()
    plain, _ = learn(replace(BRIEF, ema=None))
    assert torch.equal(averaged.tokens.weight, done.state_dict("gptface")["tokens.weight"]) and not torch.equal(averaged.tokens.weight, plain.tokens.weight)


def test_trained_saved_and_loaded(tmp_path):
    model, _ = learn()
    save_gptface(tmp_path, model, VOCAB)
    again, words = load_gptface(tmp_path, FACES)
    assert held_out(again, PAIRS) == held_out(model, PAIRS) and words.pieces == VOCAB.pieces


def test_itm_and_milm_learn():
    model, done = learn(replace(BRIEF, steps=120, batch=16, warmup=10, masking=Masking(ImageBudget(0.3, 0.1, 50))))
    found = held_out(model, PAIRS)
    assert found["itm_accuracy"] > 0.9 and found["p_matched"] > 0.6 > 0.4 > found["p_mismatched"] and found["milm"] < 0.5 * float(done.curve["gptface/milm"].iloc[0])


def test_decay_is_for_matrices():
    model = small(segments=True, tied=False, transform=True)
    decayed, plain = weight_groups(model, 0.1)
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert len(decayed["params"]) + len(plain["params"]) == len(names) and decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    assert not [names[id(w)] for w in decayed["params"] if "norm" in names[id(w)] or names[id(w)].endswith("bias") or names[id(w)].split(".")[0] in ("tokens", "places", "kinds")]


def test_rates():
    rate = Rise(1_000_000, 10_000)
    assert [round(1e-3 * rate(step), 7) for step in (0, 5_000, 10_000, 999_999)] == [2e-4, 6e-4, 1e-3, 1e-3]
    assert Pretraining().rate * Pretraining().start == pytest.approx(2e-4)
    with pytest.raises(InputError):
        Rise(10, 20)


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 4), np.uint8)])
def test_images_that_are_none(image):
    with pytest.raises(ShapeError):
        picture(image)


def test_data_that_does_not_fit():
    with pytest.raises(InputError, match="without encode"):
        pretrain(BRIEF, small(layout=FACES), stream())
    with pytest.raises(ShapeError):
        token_set(VOCAB, FACES, PAIRS.codes, ["red"])
    with pytest.raises(ShapeError, match="another codebook"):
        token_set(VOCAB, FACES, PAIRS.codes + 4, ["red"] * 32)
    with pytest.raises(ShapeError, match="one size"):
        source = pair_stream([(np.zeros((4, 4, 3), np.uint8), ""), (np.zeros((5, 4, 3), np.uint8), "")], VOCAB, FACES)
        source.collate(list(source.open_fn(0, 0, 0, 1)))
    assert token_set(VOCAB, FACES, PAIRS.codes[:1], ["red green blue"]).cut == 1 and isinstance(PAIRS.take([0, 1]), TokenSet)
