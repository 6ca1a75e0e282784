"Eq. 2 against numbers of the authors' code (fixture hourglass, part ssl), and the losses' small print."

import json
import math
import zlib

import numpy as np
import pytest
import torch
from fixture_files import fixture

from facelab.face.align import warp
from facelab.lab.errors import InputError, ShapeError
from facelab.nets.unet import UNet
from facelab.synthforge.model import Predictions
from facelab.synthforge.objective import CODE_STAGE1, CODE_STAGE2, PAPER_STAGE1, Annotations, TaskWeights, depth_loss, draw_moves, equivariance_loss, heat_loss, kps_loss, seg_loss, turn_and_shift, weighted_loss


def gap(ours, theirs):
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.fixture(scope="module")
def meta():
    return json.loads(fixture("hourglass/meta.json").read_text())


@pytest.fixture(scope="module")
def numbers():
    return {k: torch.from_numpy(np.array(v)) for k, v in np.load(fixture("hourglass/io.npz")).items() if k.startswith("ssl")}


@pytest.fixture(scope="module")
def encoder(meta):
    net, entry = UNet(3, 64), meta["nets"]["unet_enc"]
    state = net.state_dict()
    for key, e in entry["keys"].items():
        if not e.get("keep"):
            n = np.random.RandomState((zlib.crc32(key.encode()) ^ entry["seed"]) & 0xFFFFFFFF).standard_normal(e["shape"]).astype("float32")
            state[key] = torch.from_numpy(np.asarray(np.float32(e["a"]) + np.float32(e["b"]) * (np.abs(n) if e.get("abs") else n)))
    net.load_state_dict(state)
    return net.eval()


@pytest.fixture(scope="module")
def moved(numbers):
    "The pictures, and the authors' moves in our convention (their shift comes after the turn, in pixels)."
    images = numbers["ssl.image_u8"].float() / 127.5 - 1
    return images, turn_and_shift(torch.deg2rad(numbers["ssl.angle"]), numbers["ssl.translation"], 256)


def test_moves_are_the_authors(numbers, moved):
    images, moves = moved
    ours = torch.eye(3).repeat(2, 1, 1)
    ours[:, :2] = moves
    half = torch.eye(3)
    half[:2, 2] = 0.5  # pixel centres at 0 -> at .5
    assert (torch.linalg.inv(half) @ ours @ half - numbers["ssl.matrix3x3"]).abs().max() < 1e-3
    assert gap(warp(images, moves, 256)[:, :, ::4, ::4], numbers["ssl.A_img_s"]) < 1e-4


def test_features_sums_and_gradients_are_the_authors(encoder, numbers, moved):
    images, moves = moved
    features = encoder(images)
    assert gap(features[:, ::8, ::8, ::8].detach(), numbers["ssl.E_img_s"]) < 1e-4
    assert gap(warp(features, moves, 256)[:, ::8, ::8, ::8].detach(), numbers["ssl.A_E_s"]) < 1e-4
    seen = []
    each = equivariance_loss(lambda x: seen.append(encoder(x)) or seen[0], images, features, moves, "l1")
    assert gap(each.detach(), numbers["ssl.loss_per_sample"]) < 1e-4 and abs(float(each.sum().detach()) / float(numbers["ssl.loss_sum"]) - 1) < 1e-4
    last, first = torch.autograd.grad(each.sum(), [encoder.outc.conv.weight, encoder.inc.double_conv[0].weight])
    assert gap(last, numbers["ssl.grad_outc_weight"]) < 1e-2 and gap(first, numbers["ssl.grad_inc0_weight"]) < 1e-2
    with torch.no_grad():
        again = seen[0].detach()
        mean, norm = (equivariance_loss(lambda _: again, images, features, moves, how) for how in ("mse", "norm"))
        mean = mean.mean()
    assert abs(float(mean) / float(numbers["ssl.loss_mean_l2sq"]) - 1) < 1e-4
    assert abs(float((norm**2).mean()) / features[0].numel() / float(mean) - 1) < 1e-4


def test_draws_fill_their_range():
    numbers = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0))
    moves = draw_moves(numbers, 90)
    angle = torch.atan2(moves[:, 0, 1], moves[:, 0, 0])
    middle = torch.tensor([45.0, 45.0])
    shift = (moves[..., :2] @ middle[:, None])[..., 0] + moves[..., 2] - middle
    assert 0.98 < float(angle.max()) < 1.001 and -1.001 < float(angle.min()) < -0.98
    assert 29.5 < float(shift.max()) < 30.01 and abs(float(shift.mean())) < 1.0


def test_terms_by_hand():
    depth, solid = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2, dtype=torch.bool)
    solid[0, 0, 0] = True
    assert depth_loss(depth + torch.tensor([[[[0.1, 0.3], [7.0, 7.0]]]]), depth, solid).tolist() == pytest.approx([0.2, 0.0])
    scores = torch.tensor([0.0, math.log(3.0)]).view(1, 2, 1, 1).expand(1, 2, 1, 2)
    assert float(seg_loss(scores, torch.tensor([[[1, 0]]]))) == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)
    assert float(seg_loss(scores, torch.tensor([[[255, 255]]]))) == 0.0
    points = torch.zeros(1, 68, 2)
    points[0, :2] = torch.tensor([[3.0, 4.0], [0.0, -1.0]])
    assert float(kps_loss(points, torch.zeros_like(points))) == 6.0


def test_a_wrong_label_is_named():
    with pytest.raises(ShapeError, match="class 11"):
        seg_loss(torch.zeros(1, 11, 2, 2), torch.tensor([[[0, 11], [1, 2]]]))
    with pytest.raises(ShapeError, match="class -1"):
        seg_loss(torch.zeros(1, 11, 2, 2), torch.tensor([[[0, -1], [1, 2]]]))


def test_l1_of_the_code_is_a_sum_over_the_batch():
    found, true = Predictions(None, None, torch.zeros(2, 68, 2), None, None), Annotations(coords=torch.zeros(2, 68, 2))
    ssl = torch.tensor([1.0, 3.0])
    assert float(weighted_loss(found, true, TaskWeights(reading="l1"), ssl)["loss"]) == 4.0
    assert float(weighted_loss(found, true, TaskWeights(reading="norm"), ssl)["loss"]) == 2.0
    with pytest.raises(InputError):
        TaskWeights(reading="l2")
    with pytest.raises(InputError):
        TaskWeights(seg=-1.0)


def test_what_is_ours_is_off_in_the_published_weights():
    for weights in (PAPER_STAGE1, CODE_STAGE1, CODE_STAGE2):
        assert (weights.heat, weights.balance, weights.ssl_part) == (0.0, 0.0, 1.0)
    with pytest.raises(InputError, match="part"):
        TaskWeights(ssl_part=0.0)


def test_heat_maps_are_pulled_to_the_true_place():
    true = torch.tensor([[[-0.5, 0.25]]]).expand(2, 68, 2)
    heat = torch.ones(2, 68, 8, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(heat_loss(heat, true).sum(), heat)
    row, col = divmod(int(grad[0, 0].argmin()), 8)  # where more heat helps most
    assert abs((col + 0.5) / 4 - 1 + 0.5) <= 0.25 and abs((row + 0.5) / 4 - 1 - 0.25) <= 0.25
    assert torch.allclose(heat_loss(3 * heat, true), heat_loss(heat, true))  # the scale does not matter
    found, known = Predictions(None, None, true, heat, None), Annotations(coords=true)
    assert "heat" not in weighted_loss(found, known) and "heat" in weighted_loss(found, known, TaskWeights(heat=1.0))


def test_rare_classes_are_lifted_and_the_rest_is_as_before():
    scores = torch.randn(2, 5, 6, 6, generator=torch.Generator().manual_seed(1))
    labels = torch.zeros(2, 6, 6, dtype=torch.long)
    labels[0, 0, 0], labels[1, 2, 2] = 3, 255
    each = torch.nn.functional.cross_entropy(scores, labels.clamp(max=4), reduction="none")
    share = torch.where(labels == 3, 71.0, 71 / 70) * (labels != 255)
    assert torch.allclose(seg_loss(scores, labels, 1.0), (each * share).sum((1, 2)) / share.sum((1, 2)), atol=1e-5)
    assert torch.allclose(seg_loss(scores, labels, 1e-9), seg_loss(scores, labels), atol=1e-5)
