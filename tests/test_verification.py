"Verification against brute force: pairs, curve, thresholds, intervals over people; and the training recipe on small blobs."

import itertools

import numpy as np
import pytest
import torch

from facelab.lab.errors import InputError, ShapeError
from facelab.nets.iresnet import IResNetConfig
from facelab.nets.margin import MarginConfig
from facelab.tasks.identity_training import Augmentation, FaceCrops, IdentityConfig, augment, face_crops, room_for, train_identity
from facelab.tasks.verification import (
    Roc,
    accuracy_at,
    area_under,
    best_threshold,
    draw_pairs,
    equal_error_rate,
    identity_bootstrap,
    pair_scores,
    roc_curve,
    tar_at_far,
    verification_rows,
)


def answers(seed, count=60, ties=True):
    rng = np.random.default_rng(seed)
    same = rng.random(count) < 0.4
    scores = rng.normal(size=count) + same
    return (np.round(scores, 1) if ties else scores), same


def test_auc_is_the_share_of_comparisons_won():
    for seed in range(20):
        scores, same = answers(seed)
        wins = [(a > b) + (a == b) / 2 for a in scores[same] for b in scores[~same]]
        assert area_under(roc_curve(scores, same)) == pytest.approx(np.mean(wins), abs=1e-12)


def test_rates_at_every_threshold_by_counting():
    for seed in range(10):
        scores, same = answers(seed)
        roc = roc_curve(scores, same)
        for t, far, tar in zip(*roc):
            assert far == pytest.approx(np.mean(scores[~same] >= t)) and tar == pytest.approx(np.mean(scores[same] >= t))
        for level in (0.0, 0.01, 0.1, 0.5):
            possible = [np.mean(scores[same] >= t) for t in [*scores, np.inf] if np.mean(scores[~same] >= t) <= level]
            assert tar_at_far(roc, level) == pytest.approx(max(possible))


def test_weights_count_as_repeats():
    scores, same = answers(3)
    times = np.random.default_rng(0).integers(0, 4, size=len(scores))
    repeated = roc_curve(np.repeat(scores, times), np.repeat(same, times))
    weighted = roc_curve(scores, same, times.astype(float))
    for fn in (area_under, equal_error_rate, tar_at_far, lambda roc: accuracy_at(roc, 0.3)):
        assert fn(weighted) == pytest.approx(fn(repeated), abs=1e-12)


def test_equal_error_rate_lies_where_the_errors_cross():
    rng = np.random.default_rng(0)
    same = np.arange(40_000) % 2 == 0
    scores = rng.normal(size=len(same)) + 2.0 * same
    assert equal_error_rate(roc_curve(scores, same)) == pytest.approx(0.1587, abs=0.006)  # Phi(-1)


def test_threshold_is_the_best_of_all():
    for seed in range(10):
        scores, same = answers(seed)
        roc = roc_curve(scores, same)
        by_hand = max((np.mean(scores[same] >= t) + np.mean(scores[~same] < t)) / 2 for t in [*scores, np.inf])
        assert accuracy_at(roc, best_threshold(roc)) == pytest.approx(by_hand)
    worst = roc_curve(np.array([0.1, 0.9]), np.array([True, False]))
    assert accuracy_at(worst, best_threshold(worst)) == 0.5


def test_pairs_are_right_fixed_and_without_repeats():
    people = np.repeat([f"p{i}" for i in range(12)], 7)
    pairs = draw_pairs(people, seed=4, same_per_person=10, different_per_same=5)
    assert (people[pairs.first] == people[pairs.second]).tolist() == pairs.same.tolist()
    assert pairs.same.sum() == 120 and (~pairs.same).sum() == 600 and (pairs.first < pairs.second).all()
    assert len({*zip(pairs.first.tolist(), pairs.second.tolist())}) == 720
    assert all(np.array_equal(a, b) for a, b in zip(pairs, draw_pairs(people, 4, 10, 5)))
    assert not np.array_equal(pairs.first, draw_pairs(people, 5, 10, 5).first)
    every = draw_pairs(people, different_per_same=1000)
    assert (~every.same).sum() == 12 * 11 // 2 * 49 and every.same.sum() == 12 * 21


def test_scores_are_cosines():
    vectors = np.random.default_rng(0).normal(size=(9, 5))
    pairs = draw_pairs(np.repeat([0, 1, 2], 3))
    scores = pair_scores(vectors * np.arange(1, 10)[:, None], pairs)
    for k, (i, j) in enumerate(zip(pairs.first, pairs.second)):
        assert scores[k] == pytest.approx(vectors[i] @ vectors[j] / np.linalg.norm(vectors[i]) / np.linalg.norm(vectors[j]))


def test_bootstrap_draws_people():
    "With every multiset of three people enumerated, the interval's ends are theirs."
    who = np.repeat([0, 1, 2], 3)
    vectors = np.random.default_rng(2).normal(size=(9, 4)) + 2 * np.eye(3, 4)[who]
    pairs = draw_pairs(who, different_per_same=100)
    scores = pair_scores(vectors, pairs)
    possible = []
    for drawn in itertools.product(range(3), repeat=3):
        times = np.bincount(drawn, minlength=3).astype(float)
        if np.count_nonzero(times) > 1:
            weights = times[who[pairs.first]] * np.where(pairs.same, 1, times[who[pairs.second]])
            possible.append(area_under(roc_curve(scores, pairs.same, weights)))
    value, low, high = identity_bootstrap(scores, pairs, {"auc": area_under}, draws=3000)["auc"]
    assert value == pytest.approx(area_under(roc_curve(scores, pairs.same)))
    assert low == pytest.approx(np.percentile(possible, 2.5), abs=0.02) and high == pytest.approx(np.percentile(possible, 97.5), abs=0.02)


def test_threshold_comes_from_validation_people():
    rng = np.random.default_rng(0)
    who = np.repeat(np.arange(10), 5)
    vectors = rng.normal(size=(50, 6)) + 2 * rng.normal(size=(10, 6))[who]
    other = rng.normal(size=(50, 6)) + 2 * rng.normal(size=(10, 6))[who] + 4.0  # all validation people look alike: a high threshold
    fair = {r.metric: r for r in verification_rows("m", vectors, who, vectors[::-1].copy(), who[::-1] + 100, draws=50)}
    harsh = {r.metric: r for r in verification_rows("m", vectors, who, other, who + 100, draws=50)}
    assert harsh["AUC"] == fair["AUC"] and harsh["accuracy"].value < fair["accuracy"].value
    assert fair["EER"].better == "lower" and fair["TAR@FAR=1e-2"].better == "higher" and fair["AUC"].n > 0
    assert verification_rows("m", vectors, who, other, who + 100, draws=50) == list(harsh.values())


def test_bad_verification_input():
    pairs = draw_pairs([0, 0, 1, 1])
    with pytest.raises(InputError):
        draw_pairs([0, 1, 2])
    with pytest.raises(ShapeError):
        pair_scores(np.ones((2, 3)), pairs)
    with pytest.raises(InputError):
        pair_scores(np.array([[1.0], [np.nan], [1.0], [1.0]]), pairs)
    with pytest.raises(InputError):
        roc_curve(np.ones(3), np.zeros(3, bool))
    with pytest.raises(InputError):
        verification_rows("m", np.ones((4, 2)), [0, 0, 1, 1], np.ones((4, 2)), [1, 1, 2, 2])


def test_roc_is_a_curve():
    roc = roc_curve(*answers(0))
    assert isinstance(roc, Roc) and roc.threshold[0] == np.inf and (np.diff(roc.far) >= 0).all() and (np.diff(roc.tar) >= 0).all() and roc.far[-1] == roc.tar[-1] == 1


def blobs(people, photos, seed):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:32, :32] / 32
    made = []
    for _ in range(people):
        spots, colours = rng.uniform(0.25, 0.75, (3, 2)), rng.uniform(0, 1, (3, 3))
        for _ in range(photos):
            picture = rng.uniform(0, 0.8, (3, 1, 1)) * np.ones((3, 32, 32))
            for (a, b), colour in zip(spots + 0.02 * rng.normal(size=(3, 2)), colours):
                near = np.exp(-((x - a) ** 2 + (y - b) ** 2) / 0.01)
                picture = picture * (1 - near) + colour[:, None, None] * near
            made.append(picture)
    return FaceCrops(torch.from_numpy((np.clip(np.stack(made), 0, 1) * 255).astype(np.uint8)), np.repeat(np.arange(people), photos), 28, 1.0)


SMALL = IdentityConfig(IResNetConfig((1, 1), (8, 16), 28, 16), margin=MarginConfig(scale=16.0, angle=0.2), epochs=3.0, batch=32, threads=1, device="cpu")


def test_training_repeats_itself_and_learns():
    data = blobs(8, 12, 0)
    first, second = (train_identity(data, SMALL, progress=False) for _ in range(2))
    faces = data.centre()[:5].float() / 255
    assert torch.equal(first.embedder.embed(faces), second.embedder.embed(faces))
    assert first.curve.equals(second.curve)
    assert first.curve["margin/loss"].iloc[-1] < first.curve["margin/loss"].iloc[0]
    with pytest.raises(InputError):
        train_identity(data, IdentityConfig(), progress=False)
    with pytest.raises(InputError):
        train_identity(data._replace(people=np.zeros(96, int)), SMALL, progress=False)


def test_augmentation_keeps_range_and_order():
    images = torch.rand(6, 3, 32, 32)
    draws = torch.rand(6, 17)
    out = augment(images, draws, 28)
    assert out.shape == (6, 3, 28, 28) and 0 <= float(out.min()) and float(out.max()) <= 1
    assert torch.allclose(augment(images[4:], draws[4:], 28), out[4:], atol=1e-6)
    untouched = torch.full((1, 17), 0.5)
    assert torch.allclose(augment(images[:1], untouched, 28), images[:1, :, 2:30, 2:30], atol=1e-5)
    erased = untouched.clone()
    erased[:, 16], erased[:, 14:16] = 0.0, 1.0
    assert float((augment(images[:1], erased, 28, Augmentation(erase=1.0)) - images[:1, :, 2:30, 2:30]).abs().max()) > 0.05


def test_crops_put_the_middle_where_the_embedder_sees_it():
    from facelab.nets.embedder import crop_faces

    images = (torch.rand(4, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    images = torch.nn.functional.interpolate(images.float(), 160, mode="bicubic").clamp(0, 255).to(torch.uint8)
    five = torch.tensor([[60.0, 70], [100, 70], [80, 90], [64, 110], [96, 110]]).expand(4, -1, -1)
    data = face_crops(images, five, ["b", "a", "b", "c"], size=56, zoom=0.8)
    assert data.people.tolist() == [1, 0, 1, 2] and data.images.shape[-1] == room_for(56) == 64
    direct = crop_faces(images.float() / 255, five, 56, 0.8)
    assert (data.centre().float() / 255 - direct).abs().max() < 0.02
