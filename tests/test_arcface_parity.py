"iresnet50 and the margins against numbers of insightface's own code (fixture arcface, facts/fixtures.md 1.3)."

import json
import zlib

import numpy as np
import pytest
import torch
from fixture_files import fixture
from torch.nn import functional as F

from facelab.lab.errors import InputError, ShapeError
from facelab.nets.iresnet import IRESNETS, IResNet, iresnet_config
from facelab.nets.margin import ARCFACE, COSFACE, MarginConfig, MarginHead, margin_logits


@pytest.fixture(scope="module")
def numbers():
    return {k: torch.from_numpy(np.array(v)) for k, v in np.load(fixture("arcface/io.npz")).items()}


def by_rule(key, entry, seed):
    draw = np.random.RandomState((zlib.crc32(key.encode()) ^ seed) & 0xFFFFFFFF).standard_normal(entry["shape"]).astype("float32")
    return torch.from_numpy(np.asarray(np.float32(entry["a"]) + np.float32(entry["b"]) * (np.abs(draw) if entry.get("abs") else draw)))


@pytest.fixture(scope="module")
def backbone():
    meta = json.loads(fixture("arcface/meta.json").read_text())
    net = IResNet(IRESNETS["r50"]).eval()
    state = net.state_dict()
    assert list(state) == list(meta["keys"]), "names or order differ from insightface's"
    state = {k: state[k] if e.get("keep") else by_rule(k, e, meta["seed"]) for k, e in meta["keys"].items()}
    for key, check in meta["checks"].items():
        assert np.allclose(state[key].flatten()[:3], check["first"], atol=1e-6), key
    net.load_state_dict(state, strict=True)
    return net.requires_grad_(False)


def gap(ours, theirs):
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def test_keys_and_parameters():
    with torch.device("meta"):
        net = IResNet(IRESNETS["r50"])
    assert len(net.state_dict()) == 475
    assert sum(p.numel() for p in net.parameters()) == 43_590_848
    assert not net.features.weight.requires_grad
    assert iresnet_config(net.state_dict()) == IRESNETS["r50"]


def test_activations_and_embedding(backbone, numbers):
    with torch.no_grad():
        stages = backbone.stages(numbers["x"])
        fc = backbone.fc(backbone.bn2(stages[-1]).flatten(1))
        emb = backbone(numbers["x"])
    for i, (stage, step) in enumerate(zip(stages, (7, 4, 2, 1)), 1):
        assert gap(stage[:, ::8, ::step, ::step], numbers[f"layer{i}_s"]) < 1e-4, i
    assert gap(fc, numbers["fc_out"]) < 1e-4 and gap(emb, numbers["emb"]) < 1e-4
    assert (F.normalize(emb) - numbers["emb_norm"]).abs().max() < 1e-4


def test_gradient_to_the_image(backbone, numbers):
    x = numbers["x"].clone().requires_grad_()
    (grad,) = torch.autograd.grad((backbone(x) * numbers["W"]).sum(), x)
    assert gap(grad[:, :, ::4, ::4], numbers["grad_x_s"]) < 1e-2
    sums = torch.stack([grad.sum((2, 3)), grad.abs().sum((2, 3))])
    assert gap(sums, numbers["grad_x_sums"]) < 1e-2


def test_cosine_loss_and_its_gradient(backbone, numbers):
    from facelab.nets.embedder import ArcFaceEmbedder, perceptual_loss

    photos = ((numbers["x"] + 1) / 2).requires_grad_()  # the embedder takes 0..1
    face = ArcFaceEmbedder(backbone)
    loss = perceptual_loss(face, photos[:2], photos[2:].detach()).mean()
    (grad,) = torch.autograd.grad(loss, photos)
    assert abs(float(loss.detach()) - float(numbers["cos_loss"])) < 1e-5
    ours = grad[:2, :, ::4, ::4] / 2  # d/dx = half of d/d(photo)
    assert gap(ours, numbers["cos_grad_x_s"][:2]) < 1e-2
    assert float(numbers["cos_grad_x_s"][2:].abs().max()) == 0.0 and float(grad[2:].abs().max()) == 0.0


@pytest.mark.parametrize("name, config", [("arc", ARCFACE), ("cos", COSFACE), ("arc", MarginConfig(factor=1.0, angle=0.5, cosine=0.0))])
def test_margin_heads(numbers, name, config):
    cosines = numbers["margin_cos"].clone().requires_grad_()
    labels = numbers["margin_labels"]
    logits = margin_logits(cosines, labels, config)
    loss = F.cross_entropy(logits, labels)
    (grad,) = torch.autograd.grad(loss, cosines)
    assert torch.allclose(logits, numbers[f"margin_{name}_logits"], atol=1e-4)
    assert abs(float(loss.detach()) - float(numbers[f"margin_{name}_loss"])) < 1e-4
    assert gap(grad, numbers[f"margin_{name}_grad"]) < 1e-4
    assert torch.equal(cosines.detach(), numbers["margin_cos"]), "the input was written to"


def test_exact_derivative_is_another_one(numbers):
    cosines = numbers["margin_cos"].double().requires_grad_()
    labels = numbers["margin_labels"]
    exact = MarginConfig(gradient="exact")
    (grad,) = torch.autograd.grad(F.cross_entropy(margin_logits(cosines, labels, exact), labels), cosines)
    assert gap(grad, numbers["margin_arc_grad"]) > 0.05
    step = 1e-6
    moved = [cosines.detach().clone() for _ in range(2)]
    moved[0][0, labels[0]] += step
    moved[1][0, labels[0]] -= step
    numeric = (F.cross_entropy(margin_logits(moved[0], labels, exact), labels) - F.cross_entropy(margin_logits(moved[1], labels, exact), labels)) / (2 * step)
    assert abs(float(grad[0, labels[0]] - numeric)) < 1e-4 * max(1.0, abs(float(numeric)))


def test_guard_makes_the_margin_fall_all_the_way():
    cosines = torch.cos(torch.linspace(0.05, 3.1, 80, dtype=torch.float64))[:, None]
    labels = torch.zeros(80, dtype=torch.long)
    rises = margin_logits(cosines, labels, ARCFACE)[:, 0].diff() > 0
    falls = margin_logits(cosines, labels, MarginConfig(guard=True))[:, 0].diff() < 0
    assert bool(rises.any()) and bool(falls.all())


def test_bad_margin_input():
    with pytest.raises(ShapeError):
        margin_logits(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(ShapeError):
        margin_logits(torch.zeros(2, 3), torch.tensor([0, -2]))
    with pytest.raises(InputError):
        MarginConfig(gradient="sideways")
    with pytest.raises(InputError):
        MarginConfig(guard=True, factor=2.0)


def test_head_learns_separated_people():
    torch.manual_seed(0)
    points = torch.nn.Parameter(torch.randn(30, 4))
    head = MarginHead(4, 3, MarginConfig(scale=16.0))
    labels = torch.arange(30) % 3
    step = torch.optim.Adam([points, *head.parameters()], 0.05)
    before = float(head.loss(points, labels).mean().detach())
    for _ in range(400):
        step.zero_grad()
        head.loss(points, labels).mean().backward()
        step.step()
    assert float(head.loss(points, labels).mean().detach()) < 0.1 * before
    cosines = head.cosines(points.detach()).detach()
    own = torch.arccos(cosines.gather(1, labels[:, None]))
    others = cosines.masked_fill(F.one_hot(labels).bool(), -1.0).amax(1, keepdim=True)
    assert (torch.cos(own + 0.5) > others).all()  # right by the whole margin
