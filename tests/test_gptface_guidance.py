"Eq. 7: each reading and scope against a network whose weights are really overwritten; batches, stale steps, threads, crashes."

import copy
import threading

import pytest
import torch
from torch.nn import functional as F

from facelab.gptface.decode import Decoding, decode, fill_region
from facelab.gptface.guidance import SCOPES, UPDATES, Guidance, Steering, scope_names, step_of
from facelab.gptface.model import GPTFaceConfig, build_gptface
from facelab.gptface.tokens import TokenLayout, Sequences, join
from facelab.lab.errors import InputError

LAYOUT = TokenLayout(words=20, codes=12, rows=3, cols=4, text=5, pad=0, unk=1, cls=2, sep=3, mask=4)
NONE = torch.zeros(1, 0, dtype=torch.long)


def small(seed=0, **changes):
    return build_gptface(GPTFaceConfig(LAYOUT, **({"layers": 3, "width": 16, "heads": 2, "ffn_dim": 24} | changes)), seed).eval()


def masked(b=1, seed=0, places=(2, 3, 6, 7)):
    g = torch.Generator().manual_seed(seed)
    text = torch.randint(5, 20, (b, 5), generator=g)
    text[:, 3:] = 0
    seq = join(LAYOUT, torch.randint(12, (b, 3, 4), generator=g), text, trim=True)
    hidden = torch.zeros_like(seq.attend)
    hidden[:, [1 + place for place in places]] = True
    return Sequences(seq.ids.masked_fill(hidden, LAYOUT.mask), seq.attend), hidden


def bits(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


# ---- Eq. 7 by hand ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("update", "answer"), [("literal", (0.9 * 3 + 0.1 * 0.2689414, 0.9 * 4 - 0.1 * 0.2689414)), ("ascent", (3 + 0.1 * 0.2689414, 4 - 0.1 * 0.2689414)), ("normalised", (3 + 0.5 * 0.5**0.5, 4 - 0.5 * 0.5**0.5))])
def test_eq7_by_hand(update, answer):
    "log p = log sigmoid(a - b + 2) at (3, 4): the sigmoid is 0.7311, the gradient 0.2689 (1, -1); the size of (3, 4) is 5."
    theta = torch.tensor([3.0, 4.0], dtype=torch.double, requires_grad=True)
    (g,) = torch.autograd.grad(F.logsigmoid(theta[0] - theta[1] + 2), theta)
    keep, gain = step_of(update, 0.1, theta.detach().norm(), g.norm())
    assert torch.allclose(keep * theta.detach() + gain * g, torch.tensor(answer, dtype=torch.double), atol=1e-7)


def test_no_gradient_no_step():
    for update in UPDATES:
        keep, gain = step_of(update, 0.1, torch.tensor(5.0), torch.tensor(0.0))
        assert torch.isfinite(gain) and (keep == 1 or update == "literal")


# ---- the slow twins: weights are overwritten, the network is run, the weights are put back ------------------------------------------------------


def log_p(model, seq):
    return model(*seq, at=NONE.expand(len(seq.ids), 0)).match.log_softmax(1)[:, 1]


def slow_weights(model, seq, hidden, guidance, later=None):
    "Scopes that move weights, in place on a copy of the model: scores at hidden places, p before and after."
    model = copy.deepcopy(model)
    names = {"all": lambda n: True, "norms": lambda n: "norm." in n, "last_k": lambda n: n.startswith(tuple(f"blocks.{k}." for k in range(3 - guidance.last, 3)) + ("norm.",))}[guidance.scope]
    chosen = [weight for name, weight in model.named_parameters() if names(name)]
    value = log_p(model, seq)[0]
    grads = [torch.zeros_like(w) if g is None else g for w, g in zip(chosen, torch.autograd.grad(value, chosen, allow_unused=True))]
    size, norm = (torch.cat([x.detach().flatten() for x in xs]).norm() for xs in (chosen, grads))
    with torch.no_grad():
        for weight, grad in zip(chosen, grads):
            if guidance.update == "literal":
                weight.copy_((1 - guidance.strength) * weight + guidance.strength * grad)
            else:
                weight.add_(grad, alpha=guidance.strength * (float(size / norm) if guidance.update == "normalised" else 1.0))
        now = later or seq
        return model.logits(model(*now).states[hidden]), value.exp(), log_p(model, now).exp()


def slow_rows(model, seq, hidden, guidance, later=None):
    "Scope embeddings: the table of a copy is overwritten, row by row."
    model = copy.deepcopy(model)
    table, value = model.tokens.weight, log_p(model, seq)[0]
    (grad,) = torch.autograd.grad(value, table)
    rows = seq.ids[seq.attend].unique()
    with torch.no_grad():
        scale = guidance.strength * (float(table[rows].norm() / grad[rows].norm()) if guidance.update == "normalised" else 1.0)
        table[rows] = (1 - guidance.strength if guidance.update == "literal" else 1.0) * table[rows] + scale * grad[rows]
        now = later or seq
        return model.logits(model(*now).states[hidden]), value.exp(), log_p(model, now).exp()


def slow_hidden(model, seq, hidden, guidance, later=None):
    "Scope hidden: the states are moved one position at a time."
    start = model.start(model.embed(seq.ids), seq.attend).detach().requires_grad_()
    value = model.encode(start, seq.attend).match.log_softmax(1)[0, 1]
    (grad,) = torch.autograd.grad(value, start)
    with torch.no_grad():
        scale = guidance.strength * (float(start.norm() / grad.norm()) if guidance.update == "normalised" else 1.0)
        moved = model.start(model.embed((later or seq).ids), seq.attend).clone()
        for place in range(start.shape[1]):
            moved[0, place] += scale * grad[0, place] - (guidance.strength * start[0, place] if guidance.update == "literal" else 0)
        found = model.encode(moved, seq.attend)
        return model.logits(found.states[hidden]), value.exp(), found.match.softmax(1)[:, 1]


def slow(model, seq, hidden, guidance, later=None):
    return {"embeddings": slow_rows, "hidden": slow_hidden}.get(guidance.scope, slow_weights)(model, seq, hidden, guidance, later)


def fast(model, seq, hidden, guidance, part="all", later=None):
    steering = Steering(model, guidance)
    pull = steering.pull(seq)
    at = hidden.nonzero()[:, 1].reshape(len(hidden), -1)
    look = steering.look(later or seq, pull, at)
    return look.logits(part, torch.ones_like(at, dtype=torch.bool)), pull.p, look.p


@pytest.mark.parametrize("changes", [{}, {"tied": False}, {"transform": True, "segments": True}])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("scope", SCOPES)
def test_guidance_is_its_slow_twin(scope, update, changes):
    model, (seq, hidden) = small(**changes).double(), masked()
    before, guidance = bits(model), Guidance(scope=scope, update=update, strength=0.2)
    for a, b in zip(slow(model, seq, hidden, guidance), fast(model, seq, hidden, guidance)):
        assert torch.allclose(a, b.to(a.dtype), atol=2e-5), (a - b).abs().max()  # scores are handed out in float32
    plain = model.logits(model(*seq).states[hidden])
    assert (fast(model, seq, hidden, guidance)[0] - plain).abs().max() > 1e-3  # it does something
    assert all(torch.equal(weight, before[name]) and weight.grad is None for name, weight in model.named_parameters())


@pytest.mark.parametrize("scope", SCOPES)
def test_a_slice_of_the_scores_is_a_slice(scope):
    model, (seq, hidden) = small(), masked()
    guidance = Guidance(scope=scope, strength=0.2)
    whole = fast(model, seq, hidden, guidance)[0]
    for part, span in (("words", slice(0, 20)), ("codes", slice(20, 32))):
        assert torch.allclose(fast(model, seq, hidden, guidance, part)[0], whole[:, span], atol=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_stale_gradient_moves_the_untouched_weights(scope):
    "The gradient of one sequence, applied while another is looked at."
    model, (seq, hidden) = small().double(), masked()
    ids = seq.ids.clone()
    ids[0, [3, 4]] = torch.tensor([21, 25])  # two tokens were filled in meanwhile
    later, left = Sequences(ids, seq.attend), hidden.clone()
    left[0, [3, 4]] = False
    guidance = Guidance(scope=scope, strength=0.2)
    for a, b in zip(slow(model, seq, left, guidance, later), fast(model, seq, left, guidance, later=later)):
        assert torch.allclose(a, b.to(a.dtype), atol=2e-5)


def test_weights_through_functional_call():
    "The same as torch.func on a copy: an implementation that is not ours."
    model, (seq, hidden) = small().double(), masked()
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    other = copy.deepcopy(model)

    def value(weights):
        return torch.func.functional_call(other, weights, tuple(seq)).match.log_softmax(1)[0, 1]

    grads = torch.func.grad(value)(weights)
    size, norm = (torch.cat([x.flatten() for x in xs.values()]).norm() for xs in (weights, grads))
    moved = {name: weight + 0.03 * size / norm * grads[name] for name, weight in weights.items()}
    states = torch.func.functional_call(other, moved, tuple(seq)).states[hidden]
    expected = states @ moved["tokens.weight"].T + moved["bias"]
    assert torch.allclose(fast(model, seq, hidden, Guidance(scope="all", strength=0.03))[0], expected.float(), atol=2e-5)


@pytest.mark.parametrize("scope", ["embeddings", "hidden"])
def test_each_sample_of_a_batch_has_its_own_gradient(scope):
    model, (seq, hidden) = small(), masked(4)
    guidance = Guidance(scope=scope, strength=0.2)
    together = fast(model, seq, hidden, guidance)
    for k in range(4):
        alone = fast(model, seq.rows(slice(k, k + 1)), hidden[k : k + 1], guidance)
        assert torch.allclose(together[0].reshape(4, -1, 32)[k], alone[0], atol=1e-5) and torch.allclose(together[1][k], alone[1][0], atol=1e-6)


@pytest.mark.parametrize("scope", ["all", "norms", "last_k"])
def test_scopes_that_cannot_be_batched_say_so(scope):
    with pytest.raises(InputError, match="one at a time"):
        Steering(small(), Guidance(scope=scope)).pull(masked(2)[0])


def test_scope_names():
    model = small()
    everything = [name for name, _ in model.named_parameters()]
    assert scope_names(model, Guidance(scope="all")) == everything and scope_names(model, Guidance()) == scope_names(model, Guidance(kind="cfg", scope="all")) == []
    assert len(scope_names(model, Guidance(scope="norms"))) == 2 * (2 * 3 + 1)
    assert {name.split(".")[1] for name in scope_names(model, Guidance(scope="last_k", last=1)) if name.startswith("blocks")} == {"2"}


@pytest.mark.parametrize("values", [{"kind": "clip"}, {"update": "sgd"}, {"scope": "some"}, {"strength": -0.1}, {"every": 0}, {"last": 0}, {"fuse": 1.5}, {"strength": float("nan")}, {"strength": float("inf")}, {"scale": float("nan")}, {"scale": -3.0}, {"fuse": float("nan")}, {"every": 1.5}, {"strength": "0.1"}])
def test_bad_guidance(values):
    with pytest.raises(InputError):
        Guidance(**values)


# ---- what the docs claim ----------------------------------------------------------------------------------------------------------------------


def test_fast_weight_identity():
    "(W + l g_W) x = W x + l sum_t d_t (x_t . x): a moved matrix is a linear attention over the ITM pass; rank 1 in the last block but for keys and values."
    model, (seq, _) = small().double(), masked()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "match"}
    inputs, outputs = {}, {}

    def note(name):
        def hook(module, args, out):
            inputs[name], outputs[name] = args[0].detach().flatten(0, -2), out
            out.retain_grad()

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in layers.items()]
    model.requires_grad_(True)
    model(*seq).match.log_softmax(1)[0, 1].backward()
    for hook in hooks:
        hook.remove()
    torch.manual_seed(0)
    for name, module in layers.items():
        deltas, x = outputs[name].grad.flatten(0, -2), torch.randn(module.in_features, dtype=torch.double)
        moved = (module.weight + 0.3 * module.weight.grad) @ x + module.bias + 0.3 * module.bias.grad
        read = module(x) + 0.3 * deltas.T @ (inputs[name] @ x) + 0.3 * deltas.sum(0)
        assert torch.allclose(moved, read, atol=1e-12), name
        if name.startswith("blocks.2"):
            rank = int(torch.linalg.matrix_rank(module.weight.grad, rtol=1e-9))
            assert rank <= (model.blocks[2].heads if name.split(".")[-1] in ("key", "value") else 1), name


def test_a_kl_guard_has_no_gradient_at_the_first_step():
    "Why PPLM's KL term is not offered beside Eq. 7's single step."
    model, (seq, hidden) = small().double(), masked()
    with torch.no_grad():
        plain = model.logits(model(*seq).states[hidden]).log_softmax(1)
    now = model.logits(model(*seq).states[hidden]).log_softmax(1)
    kl = (now.exp() * (now - plain)).sum(1).mean()
    grads = torch.autograd.grad(kl, list(model.parameters()), allow_unused=True)
    assert max(float(grad.abs().max()) for grad in grads if grad is not None) < 1e-12


def test_cfg_is_its_slow_twin():
    model, (seq, hidden) = small(), masked()
    untold = seq.ids.clone()
    untold[0, LAYOUT.first_text :] = LAYOUT.mask
    with torch.no_grad():
        told, without = (model.logits(model(ids, seq.attend).states[hidden]) for ids in (seq.ids, untold))
    steering = Steering(model, Guidance(kind="cfg", scale=3.0))
    assert steering.pull(seq) is None
    found = steering.look(seq, None, hidden.nonzero()[:, 1][None]).logits("all", torch.ones(1, 4, dtype=torch.bool))
    assert torch.allclose(found, without + 3 * (told - without), atol=1e-5) and (told - without).abs().max() > 1e-4


@pytest.mark.parametrize("scope", ["embeddings", "all"])
def test_fusing_is_a_geometric_mean(scope):
    model, (seq, hidden) = small(), masked()
    with torch.no_grad():
        plain = model.logits(model(*seq).states[hidden], "codes").softmax(1)
    guided = fast(model, seq, hidden, Guidance(scope=scope, strength=0.2), "codes")[0].softmax(1)
    fused = fast(model, seq, hidden, Guidance(scope=scope, strength=0.2, fuse=0.8), "codes")[0].softmax(1)
    mean = guided**0.8 * plain**0.2
    assert torch.allclose(fused, mean / mean.sum(1, keepdim=True), atol=1e-5)


@pytest.mark.parametrize("update", ["normalised", "ascent"])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_small_step_raises_p(scope, update):
    model, (seq, hidden) = small(), masked()
    _, before, after = fast(model, seq, hidden, Guidance(scope=scope, update=update, strength=0.01))
    assert after > before


# ---- the model is never written ---------------------------------------------------------------------------------------------------------------


def region():
    made = torch.zeros(2, 3, 4, dtype=torch.bool)
    made[0, :2, :2], made[1, 1:] = True, True
    return made


def edits(model, guidance, seeds=(1, 2), **how):
    g = torch.Generator().manual_seed(5)
    return fill_region(model, torch.randint(12, (2, 3, 4), generator=g), region(), torch.randint(5, 20, (2, 4), generator=g), guidance, Decoding(schedule="k", k=2), seeds, **how)[0]


ALL_KINDS = [Guidance(scope=scope, strength=0.3, every=2) for scope in SCOPES] + [Guidance.paper(0.2), Guidance(kind="cfg"), Guidance(fuse=0.9), Guidance(kind="none")]


def test_threads_do_not_see_each_other():
    "Nine kinds of guidance at once on one model, several times: as one after another, and the model has the same bits."
    model = small(dropout=0.3).train()  # decoding turns dropout off for itself alone
    before, expected, found = bits(model), [edits(model, guidance) for guidance in ALL_KINDS], {}

    def work(k):
        found[k] = [edits(model, ALL_KINDS[k % len(ALL_KINDS)]) for _ in range(3)]

    count = 2 * len(ALL_KINDS)
    threads = [threading.Thread(target=work, args=(k,)) for k in range(count)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    for k, results in found.items():
        assert all(torch.equal(one, expected[k % len(ALL_KINDS)]) for one in results)
    assert len(found) == 2 * len(ALL_KINDS) and model.training
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) and weight.grad is None and weight.requires_grad


@pytest.mark.parametrize("guidance", ALL_KINDS, ids=lambda g: f"{g.kind}-{g.scope}-{g.update}")
def test_a_crash_leaves_the_model_as_it_was(guidance):
    model = small()
    before, expected = bits(model), edits(model, guidance)
    seq, hidden = masked(2)

    def crash(step, now):
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode(model, seq, hidden, guidance, Decoding(schedule="k", k=1), on_step=crash)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert torch.equal(edits(model, guidance), expected)


def test_guidance_works_on_frozen_weights_and_without_grad():
    model, expected = small(), edits(small(), Guidance(scope="all", strength=0.2))
    model.requires_grad_(False)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert torch.equal(edits(model, Guidance(scope="all", strength=0.2)), expected)
            edits(model, Guidance())
    assert not any(weight.requires_grad for weight in model.parameters())
