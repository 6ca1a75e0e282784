"Masks of GPTFace: exact budgets, connected spans, work that grows with the tokens, SpanBERT's spans, what is never hidden."

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.ndimage import label

from facelab.gptface import masking
from facelab.gptface.masking import ImageBudget, Masking, block_mask, draw_hidden, hide, neighbours, random_mask, span_lengths, span_mask, text_count, text_random, text_span
from facelab.gptface.tokens import TokenLayout, Vocabulary, join, text_ids
from facelab.lab.errors import InputError


def test_spans_have_the_exact_budget_and_are_one_piece():
    rng = np.random.default_rng(0)
    for _ in range(400):
        rows, cols = rng.integers(1, 12, 2)
        count = int(rng.integers(0, rows * cols + 1))
        made = span_mask(int(rows), int(cols), count, rng)
        assert made.shape == (rows, cols) and made.sum() == count and label(made)[1] == min(1, count)


@pytest.mark.parametrize("draw", [random_mask, block_mask])
def test_other_masks_have_the_exact_budget(draw):
    rng = np.random.default_rng(1)
    for _ in range(200):
        rows, cols = (int(n) for n in rng.integers(1, 12, 2))
        count = int(rng.integers(0, rows * cols + 1))
        assert draw(rows, cols, count, rng).sum() == count


def test_random_masks_are_not_connected():
    rng = np.random.default_rng(2)
    assert np.mean([label(random_mask(10, 10, 20, rng))[1] for _ in range(50)]) > 5


def grown(rows, cols, count):
    "Exact probability of each span: a seed, then each edge cell equally likely."
    near, level = neighbours(rows, cols), {frozenset([k]): 1 / (rows * cols) for k in range(rows * cols)}
    for _ in range(count - 1):
        following = Counter()
        for span, p in level.items():
            edge = {n for k in span for n in near[k]} - span
            for n in edge:
                following[span | {n}] += p / len(edge)
        level = following
    return level


@pytest.mark.parametrize(("rows", "cols", "count"), [(2, 3, 3), (3, 3, 4), (1, 5, 2)])
def test_spans_are_drawn_as_they_should(rows, cols, count):
    expected, rng, n = grown(rows, cols, count), np.random.default_rng(3), 6000
    met = Counter(frozenset(np.flatnonzero(span_mask(rows, cols, count, rng)).tolist()) for _ in range(n))
    assert met.keys() <= expected.keys()
    for span, p in expected.items():
        assert abs(met[span] / n - p) < 5 * np.sqrt(p / n), (sorted(span), met[span] / n, p)


def test_work_grows_with_the_tokens(monkeypatch):
    "Each token's neighbours are looked at once."
    looked = []

    class Counted(tuple):
        def __getitem__(self, k):
            looked.append(k)
            return tuple.__getitem__(self, k)

    near = neighbours(40, 40)
    monkeypatch.setattr(masking, "neighbours", lambda rows, cols: Counted(near))
    made = span_mask(40, 40, 1200, np.random.default_rng(0))
    assert len(looked) == len(set(looked)) == 1200 and set(looked) == set(np.flatnonzero(made).tolist())


def test_schedule():
    budget = ImageBudget()
    assert [budget.count(step, 441) for step in (0, 19_999, 20_000, 999_999, 1_000_000, 10**9)] == [66, 66, 71, 282, 287, 287]
    assert budget(999_999) < 0.65 == budget(1_000_000)
    assert ImageBudget(0.01).count(0, 16) == 1
    for wrong in ({"start": 0.0}, {"start": 0.7}, {"limit": 1.2}, {"every": 0}, {"rise": -0.1}):
        with pytest.raises(InputError):
            ImageBudget(**wrong)


def test_text_spans():
    rng = np.random.default_rng(4)
    assert abs(sum(span_lengths()) - 1) < 1e-12 and len(span_lengths()) == 10 and all(a > b for a, b in itertools.pairwise(span_lengths()))
    for _ in range(300):
        starts = rng.random(int(rng.integers(1, 40))) < 0.7
        count = text_count(len(starts), float(rng.random()))
        for draw in (text_span, text_random):
            assert draw(starts, count, rng).sum() == count
        hidden = text_span(starts, count, rng)
        words = np.cumsum(starts | (np.arange(len(starts)) == 0))
        torn = [w for w in np.unique(words) if 0 < hidden[words == w].sum() < (words == w).sum()]
        assert len(torn) <= 1  # only the word in which the budget ended


def test_text_spans_are_longer_than_random_ones():
    starts, rng = np.ones(40, bool), np.random.default_rng(5)
    runs = {draw.__name__: np.mean([label(draw(starts, 8, rng))[1] for _ in range(200)]) for draw in (text_span, text_random)}
    assert runs["text_span"] < 0.55 * runs["text_random"]


def pairs(b=6):
    vocab = Vocabulary.learn(["a man with black hair and a hat", "a woman smiling hats"], 80)
    layout = vocab.layout(9, 4, 5, 12)
    texts = ["a man with black hair and a hat", "a woman", "", "hats", "zzz a", "a man, a hat"][:b]
    return vocab, layout, join(layout, torch.arange(20 * b).reshape(b, 4, 5) % 9, text_ids(vocab, layout, texts).ids)


def test_special_tokens_and_padding_are_never_hidden():
    vocab, layout, seq = pairs()
    never = torch.isin(seq.ids, torch.tensor(layout.specials))
    for seed in range(60):
        hidden = draw_hidden(layout, seq, Masking(text_ratio=0.9), 10**7, np.random.default_rng(seed), vocab.starts_word)
        assert not (hidden & never).any() and hidden[:, layout.image].sum(1).eq(13).all()
        assert hidden[2, layout.first_text :].sum() == 0 and hidden[0, layout.first_text :].sum() == text_count(8, 0.9)


def test_no_share_hides_no_piece():
    vocab, layout, seq = pairs()
    hidden = draw_hidden(layout, seq, Masking(text_ratio=0.0), 0, np.random.default_rng(0), vocab.starts_word)
    assert text_count(5, 0.0) == 0 and not hidden[:, layout.first_text :].any() and hidden[:, layout.image].any()


def test_shares_of_kinds():
    vocab, layout, seq = pairs()
    kind = lambda **how: [label(draw_hidden(layout, seq, Masking(**how), 4 * 10**5, np.random.default_rng(k))[:, layout.image][0].reshape(4, 5).numpy())[1] for k in range(60)]
    assert set(kind(image_spans=1.0)) == {1} and np.mean(kind(image_spans=0.0)) > 2.5
    half = kind()
    assert 15 < sum(n == 1 for n in half) < 50
    assert np.mean(kind(image_spans=0.0, image_else="block")) < np.mean(kind(image_spans=0.0))


def test_masks_depend_on_the_generator_alone():
    vocab, layout, seq = pairs()
    one, two, other = (draw_hidden(layout, seq, Masking(), 0, np.random.default_rng(k), vocab.starts_word) for k in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    given = hide(layout, seq, one)
    assert given.ids[one].eq(layout.mask).all() and torch.equal(given.ids[~one], seq.ids[~one])


def test_a_budget_that_does_not_fit():
    for draw in (span_mask, random_mask, block_mask):
        for count in (-1, 17):
            with pytest.raises(InputError, match="0 to 16"):
                draw(4, 4, count, np.random.default_rng(0))
    with pytest.raises(InputError):
        Masking(image_else="spans")
    assert TokenLayout().positions == 507
