"SynthForge's stacked hourglass and U-Nets against numbers of its own code (fixture hourglass, facts/fixtures.md 1.5)."

import json
import zlib

import numpy as np
import pytest
import torch
from fixture_files import fixture
from torch.nn import functional as F

from facelab.nets.hourglass import EDGES68, HourglassConfig, StackedHourglass
from facelab.nets.unet import UNet

CONFIGS = {"stage1": HourglassConfig(), "stage2": HourglassConfig(cin=68, channels=68, halvings=None)}


@pytest.fixture(scope="module")
def meta():
    return json.loads(fixture("hourglass/meta.json").read_text())


@pytest.fixture(scope="module")
def numbers():
    return {k: torch.from_numpy(np.array(v)) for k, v in np.load(fixture("hourglass/io.npz")).items()}


def draw(key, shape, seed):
    return np.random.RandomState((zlib.crc32(key.encode()) ^ seed) & 0xFFFFFFFF).standard_normal(shape).astype("float32")


def given(meta, key, shape, positive=False):
    n = draw(key, shape, meta["seed"])
    return torch.from_numpy(np.abs(n) if positive else n)


def filled(net, meta, name):
    "The network with the fixture's weights; its names, their order and its kept buffers are compared on the way."
    entry, state = meta["nets"][name], net.state_dict()
    assert list(state) == list(entry["keys"]), "names or order differ from the authors' code"
    for key, e in entry["keys"].items():
        if not e.get("keep"):
            n = draw(key, e["shape"], entry["seed"])
            state[key] = torch.from_numpy(np.asarray(np.float32(e["a"]) + np.float32(e["b"]) * (np.abs(n) if e.get("abs") else n)))
    for key, check in entry["checks"].items():
        assert np.allclose(state[key].flatten()[:3], check["first"], atol=1e-6), key
    net.load_state_dict(state, strict=True)
    return net.eval().requires_grad_(False)


def gap(ours, theirs):
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize("name", CONFIGS)
def test_hourglass_maps_coordinates_and_gradient(name, meta, numbers):
    net = filled(StackedHourglass(CONFIGS[name]), meta, name)
    said = meta["inputs"][name]["x"]
    x = given(meta, said["key"], said["shape"], said["abs"]).requires_grad_()
    if name == "stage1":
        assert gap(net.pre(x)[:, ::4, ::4, ::4].detach(), numbers["stage1.pre_s"]) < 1e-4
    stacks = net(x)
    for i, maps in enumerate(stacks):
        assert gap(maps.feature[:, ::4, ::4, ::4].detach(), numbers[f"{name}.feature{i}_s"]) < 1e-4
        assert gap(maps.heat[:, ::4, ::4, ::4].detach(), numbers[f"{name}.heat_raw{i}_s"]) < 1e-4
        assert gap(maps.point[:, ::4, ::4, ::4].detach(), numbers[f"{name}.point{i}_s"]) < 1e-4
        assert gap(maps.edge[:, :, ::4, ::4].detach(), numbers[f"{name}.edge{i}_s"]) < 1e-4
        assert gap(maps.fused[:, ::4, ::2, ::2].detach(), numbers[f"{name}.fusion{i}_s"]) < 1e-4
        assert (maps.coords.detach() - numbers[f"{name}.coords{i}"]).abs().max() < 1e-4
    assert gap(stacks[-1].fused[:1, :3].detach(), numbers[f"{name}.fusion_last_full3"]) < 1e-4
    target = torch.tanh(0.6 * given(meta, f"{name}.tgt", stacks[-1].coords.shape))
    loss = (target - stacks[-1].coords).norm(dim=-1).sum(1).mean()
    (grad,) = torch.autograd.grad(loss, x)
    assert abs(float(loss.detach()) - float(numbers[f"{name}.kp_loss"])) < 1e-3
    assert gap(grad[:, ::8, ::8, ::8], numbers[f"{name}.grad_x_s"]) < 1e-2
    assert abs(float(grad.norm()) / float(numbers[f"{name}.grad_x_norm"]) - 1) < 1e-2
    assert ((stacks[-1].coords.detach() * 0.5 + 0.5) * 256 - numbers[f"{name}.px_kps"]).abs().max() < 1e-2


def test_edges_are_those_of_the_authors(meta):
    assert [[closed, list(line)] for closed, line in EDGES68] == meta["nets"]["stage1"]["config"]["edges"]


def test_parameters_of_the_whole_network():
    with torch.device("meta"):
        nets = [UNet(3, 64), UNet(64, 20), UNet(64, 1), StackedHourglass()]
        later = [StackedHourglass(CONFIGS["stage2"]), StackedHourglass(HourglassConfig(cin=64, channels=68))]
    count = [sum(p.numel() for p in net.parameters()) for net in nets + later]
    assert count == [17_271_488, 17_303_764, 17_302_529, 894_690, 608_006, 963_910]
    assert round(sum(count[:4]) / 1e6, 1) == 52.8


@pytest.fixture(scope="module")
def unets(meta):
    return [filled(UNet(*size), meta, name) for size, name in (((3, 64), "unet_enc"), ((64, 20), "unet_seg"), ((64, 1), "unet_dep"))]


def test_unet_features_heads_and_gradient(unets, meta, numbers):
    encoder, seg, depth = unets
    x = given(meta, "unet.x", (2, 3, 64, 64)).requires_grad_()
    maps, features = encoder.stages(x.detach()), encoder(x)
    assert gap(maps[4][:, ::8], numbers["unet.x5_s"]) < 1e-4 and gap(maps[2][:, ::16, ::2, ::2], numbers["unet.x3_s"]) < 1e-4
    assert gap(features[:, ::4, ::3, ::3].detach(), numbers["unet.features_s"]) < 1e-4
    logits = seg(features)
    assert gap(logits[:, :, ::2, ::2].detach(), numbers["unet.seg_s"]) < 1e-4
    assert gap(depth(features)[:, :, ::2, ::2].detach(), numbers["unet.depth_s"]) < 1e-4
    loss = F.cross_entropy(logits, numbers["unet.labels"].long())
    (grad,) = torch.autograd.grad(loss, x)
    assert abs(float(loss.detach()) - float(numbers["unet.ce"])) < 1e-4 and gap(grad, numbers["unet.ce_grad_x"]) < 1e-2


def test_unet_in_train_mode_moves_its_statistics(meta, numbers):
    net = filled(UNet(3, 64), meta, "unet_enc").train()
    out = net(given(meta, "unet_train.x", (2, 3, 32, 32)))
    assert gap(out[:, ::8, ::4, ::4], numbers["unet_train.out_s"]) < 1e-4
    first, last = net.inc.double_conv[1], net.up4.conv.double_conv[4]
    assert gap(first.running_mean, numbers["unet_train.inc_rm_after"]) < 1e-4 and gap(first.running_var, numbers["unet_train.inc_rv_after"]) < 1e-4
    assert gap(last.running_var, numbers["unet_train.up4_rv_after"]) < 1e-4
