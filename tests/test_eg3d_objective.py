"EG3D's training objective against the official loss on random weights (facts/fixtures.md 1.4), and in the lab's loop."

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from fixture_files import fixture
from test_eg3d_parity import SMALL, gap, official_discriminator
from torch.nn import functional as F

from facelab.lab.arrays import read_safetensors
from facelab.lab.batches import Share
from facelab.lab.train import Items, Step, TrainConfig
from facelab.nets.eg3d import EG3DConfig, Generator
from facelab.nets.eg3d_objective import EG3DObjective, Turns, blur_now, density_loss, eg3d_average, eg3d_players, r1_penalty, raw_side, raw_version, swap_chance, told_cameras, train_eg3d, verdict
from facelab.nets.resample import blur, blur_taps
from facelab.nets.stylegan2 import StyleGAN2Config
from facelab.nets.stylegan2_discriminator import DiscriminatorConfig, DualDiscriminator
from facelab.nets.superres import SuperresConfig
from facelab.nets.volume import VolumeConfig


@pytest.fixture(scope="module")
def meta():
    return json.loads(fixture("dual_discriminator/meta.json").read_text())


@pytest.fixture(scope="module")
def numbers():
    return {name: torch.from_numpy(np.array(value)) for name, value in np.load(fixture("dual_discriminator/io.npz")).items()}


@pytest.fixture(scope="module")
def judge(meta):
    return official_discriminator(meta)


def off(ours, theirs):
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-12))


def same_gradients(judge, numbers, loss, name, meta):
    "Norms of all gradients, and the stored ones whole, of one official phase."
    named = dict(judge.named_parameters())
    found = dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True)))
    for key, norm in zip(meta["D_param_order"], numbers[f"{name}_gradnorm"].tolist()):
        if norm == -1:
            assert found[key] is None, key
        else:
            value = torch.zeros(1) if found[key] is None else found[key]
            assert abs(float(value.norm()) - norm) < 1e-3 * norm + 1e-5, key
    for key, stored in numbers.items():
        if key.startswith(f"{name}_grad."):
            value = found[key.removeprefix(f"{name}_grad.")]
            if stored.abs().max() == 0:
                assert value is None or value.abs().max() == 0
            else:
                assert off(value, stored) < 1e-3, key


def test_schedules(meta, numbers):
    how = EG3DObjective(swap_fade=meta["schedule"]["gpc_fade_kimg"], blur_fade=meta["schedule"]["blur_fade_kimg"])
    for seen, swap, side, sigma in numbers["schedule"].tolist():
        seen = int(seen)
        assert abs(swap_chance(how, seen) - swap) < 1e-9 and raw_side(how, seen) == side and abs(blur_now(how, seen) - sigma) < 1e-9


def test_swapped_poses(numbers):
    assert torch.equal(told_cameras(numbers["gen_c"], 0.5, numbers["swap_rand"]), numbers["swap_c_cond"])
    assert torch.equal(told_cameras(numbers["gen_c"], 0.4, numbers["swap_rand"])[2], numbers["gen_c"][2])


def test_blur(judge, meta, numbers):
    sigma = blur_now(EG3DObjective(), meta["cur_nimg"])
    assert abs(sigma - meta["blur_sigma_at_cur"]) < 1e-9 and gap(blur_taps(sigma), numbers["blur_filter"]) < 1e-7
    assert gap(blur(numbers["real_image"], sigma)[:, :, ::4, ::4], numbers["blur_real_image_s"]) < 1e-5
    with torch.no_grad():
        assert gap(verdict(judge, numbers["fake_image"], numbers["fake_image_raw"], numbers["gen_c"], sigma), numbers["blur_logits_fake"]) < 1e-4


def test_terms(judge, meta, numbers):
    fake = verdict(judge, numbers["fake_image"], numbers["fake_image_raw"], numbers["gen_c"])
    raw = raw_version(numbers["real_image"], meta["raw_resolution"])
    assert gap(raw, numbers["real_image_raw"]) < 1e-6
    of_image, of_raw, real = r1_penalty(judge, numbers["real_image"], raw, numbers["real_c"])
    for ours, name in ((F.softplus(-fake), "loss_G_terms"), (F.softplus(fake), "loss_Dgen_terms"), (F.softplus(-real), "loss_Dreal_terms"), ((of_image + of_raw) * meta["r1_gamma"] / 2, "loss_Dr1")):
        assert off(ours.detach(), numbers[name]) < 1e-4, name
    assert off(of_image.detach(), numbers["r1_penalty_image"]) < 1e-4 and off(of_raw.detach(), numbers["r1_penalty_raw"]) < 1e-4
    leaves = [numbers["real_image"].clone().requires_grad_(), raw.clone().requires_grad_()]
    slopes = torch.autograd.grad(judge(*leaves, numbers["real_c"]).sum(), leaves)
    assert off(slopes[0][:, :, ::4, ::4], numbers["r1_grad_image_s"]) < 1e-4 and off(slopes[1][:, :, ::2, ::2], numbers["r1_grad_raw_s"]) < 1e-4


@pytest.mark.parametrize("blurred", [False, True])
def test_gradients_of_all_phases(judge, meta, numbers, blurred):
    sigma, tail = (meta["blur_sigma_at_cur"], "_blur") if blurred else (0.0, "")
    leaves = [numbers[name].clone().requires_grad_() for name in ("fake_image", "fake_image_raw")]
    loss = F.softplus(-verdict(judge, *leaves, numbers["gen_c"], sigma)).mean() * meta["gain"]
    slopes = torch.autograd.grad(loss, leaves)
    assert off(slopes[0][:, :, ::4, ::4], numbers[f"Gmain{tail}_grad_image_s"]) < 1e-3 and off(slopes[1][:, :, ::2, ::2], numbers[f"Gmain{tail}_grad_raw_s"]) < 1e-3

    raw = raw_version(numbers["real_image"], meta["raw_resolution"], sigma)

    def game():
        fake = verdict(judge, numbers["fake_image"], numbers["fake_image_raw"], numbers["gen_c"], sigma)
        return F.softplus(fake).mean() + F.softplus(-verdict(judge, numbers["real_image"], raw, numbers["real_c"], sigma)).mean()

    def slope():
        of_image, of_raw, _ = r1_penalty(judge, numbers["real_image"], raw, numbers["real_c"], sigma)
        return (of_image + of_raw).mean() * meta["r1_gamma"] / 2

    same_gradients(judge, numbers, game() * meta["gain"], f"Dmain{tail}", meta)
    same_gradients(judge, numbers, slope() * meta["gain_Dreg"], f"Dreg{tail}", meta)
    same_gradients(judge, numbers, game() + slope(), f"Dboth{tail}", meta)


@pytest.mark.parametrize("kind", ["l1", "monotonic-detach", "monotonic-fixed"])
def test_density(meta, numbers, kind):
    net = Generator(SMALL)
    net.load_state_dict(read_safetensors(fixture("eg3d/fixture_A.state_dict.safetensors")))
    how = EG3DObjective(density=meta["density"]["density_reg"], density_reach=meta["density"]["p_dist"], density_kind=kind)
    draw = lambda k: numbers[f"dens_{kind}_draw{k}"]
    cams = numbers["gen_c"][: len(numbers["dens_z"])]

    def planes(k):
        told = told_cameras(cams, swap_chance(how, meta["cur_nimg"]), draw(k).reshape(1, 1))
        ws = net.mapping(numbers["dens_z"], told)
        if k == 0:
            assert gap(ws[:, 0].detach(), numbers["dens_ws_first"]) < 1e-4
        return net.planes(ws)

    if kind == "l1":
        monotonic, smooth = density_loss(net, planes(0), [draw(1), draw(2)], how)
        loss = smooth * meta["density"]["gain"]
        assert abs(float(smooth.detach()) - float(numbers["dens_l1_value"])) < 1e-4 * float(numbers["dens_l1_value"])
    else:
        monotonic, smooth = density_loss(net, planes(0), [draw(1), draw(4), draw(5)], how)
        loss = monotonic + smooth
        assert abs(float(monotonic.detach()) - float(numbers[f"dens_{kind}_value_mono"])) < 1e-3 * float(numbers[f"dens_{kind}_value_mono"])
        assert abs(float(smooth.detach()) - float(numbers[f"dens_{kind}_value_tv"])) < 1e-3 * float(numbers[f"dens_{kind}_value_tv"])
    named = dict(net.named_parameters())
    found = dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True)))
    for key, norm in zip(meta["G_param_order"], numbers[f"dens_{kind}_gradnorm"].tolist()):
        ours = 0.0 if found[key] is None else float(found[key].norm())
        assert abs(ours - max(norm, 0.0)) < 1e-2 * abs(norm) + 1e-5, key
    for key in ("net.0.weight", "net.0.bias", "net.2.weight"):
        assert off(found[f"decoder.{key}"], numbers[f"dens_{kind}_grad.decoder.{key}"]) < 1e-2, key


# In the loop

TOY = EG3DConfig(StyleGAN2Config(z_dim=8, w_dim=16, size=16, out_channels=12, channels=(16, 16, 8), lr_mul=1.0), VolumeConfig(6, 6), SuperresConfig(4, 8, (8, 8), (False, True)), 8, 8)
FAST = EG3DObjective(raw_first=4, raw_last=8, raw_fade=0.02, density_every=2, r1_every=2, blur_sigma=1.0, rate_generator=0.01, rate_discriminator=0.005)


def toy_data(count=16):
    label = torch.cat([torch.diag(torch.tensor([1.0, -1, -1, 1])).flatten(), torch.tensor([4.2647, 0, 0.5, 0, 4.2647, 0.5, 0, 0, 1])])
    label[11] = 2.7
    draw = torch.Generator().manual_seed(0)
    return 0.3 * torch.randn(count, 3, 16, 16, generator=draw), label + 0.01 * torch.randn(count, 25, generator=draw) * (label != 0) * (torch.arange(25) > 15)


def play(steps, scratch=None, how=FAST, callbacks=(), **more):
    images, cams = toy_data()
    torch.manual_seed(0)
    net, judge = Generator(TOY), DualDiscriminator(DiscriminatorConfig(16, channel_base=64, channel_max=8, group=2))
    config = TrainConfig(steps, 4, log_every=1, ema=eg3d_average(4), ema_models=("generator",), device="cpu", **more)
    done = train_eg3d(net, judge, Items(len(images), lambda index, rng: (images[index], cams[index])), cams, config, how, scratch, callbacks, progress=False)
    return net, judge, done


class Killed(Exception):
    pass


def test_killed_training_goes_on_with_the_same_bits(tmp_path):
    def kill(run):
        if run.step == 4:
            raise Killed

    whole = play(6)
    with pytest.raises(Killed):
        play(6, tmp_path / "run", callbacks=[kill], save_every=3)
    net, judge, done = play(6, tmp_path / "run", save_every=3)
    assert done.resumed == 3
    for ours, theirs in ((net, whole[0]), (judge, whole[1])):
        assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))
    assert done.curve.equals(whole[2].curve)
    assert all(torch.equal(a, b) for a, b in zip(done.state_dict("generator").values(), whole[2].state_dict("generator").values()))


def test_each_head_has_a_pose_swapped_or_not(monkeypatch):
    import facelab.nets.eg3d_objective as page

    torch.manual_seed(0)
    models = {"generator": Generator(replace(TOY, backbone=replace(TOY.backbone, c_dim=25))), "judge": DualDiscriminator(DiscriminatorConfig(16, channel_base=64, channel_max=8, group=2))}
    images, cams = toy_data()
    turns, seen, told = Turns(replace(FAST, swap=0.5, swap_fade=0.0), cams), [], page.told_cameras
    monkeypatch.setattr(page, "told_cameras", lambda cam, chance, draws: (seen.append(draws < chance), told(cam, chance, draws))[1])
    for n in range(12):
        step = Step(n, 12, "any", 0, Share(16), torch.device("cpu"), (0, n, 0, 0))
        for phase in (turns.generator, turns.judge, turns.smooth):
            phase(models, (images, cams), step)
    for name, swapped in (("generator", seen[0::3]), ("judge", seen[1::3])):
        assert all(part.shape == (16, 1) for part in swapped), name
        assert 0.35 < torch.cat(swapped).float().mean() < 0.65 and sum(0 < part.float().mean() < 1 for part in swapped) > 10, name
    assert all(part.shape == (1, 1) for part in seen[2::3])


def test_the_discriminator_learns_to_tell():
    _, _, done = play(25, how=replace(FAST, rate_generator=1e-6, rate_discriminator=0.01, density=0.0, r1_every=8, blur_sigma=0.0, raw_first=8))
    losses, right = done.curve["judge/loss"], done.curve["judge/right"]
    assert losses[-5:].mean() < 0.7 * losses[:5].mean() and right[-5:].mean() > 0.85


def test_the_generator_learns_to_fool():
    how = replace(FAST, rate_discriminator=1e-6, density=0.0, r1=0.0, blur_sigma=0.0, raw_first=8)
    assert [player.name for player in eg3d_players(how, toy_data()[1])] == ["generator", "judge"]
    losses = play(15, how=how)[2].curve["generator/loss"]
    assert losses[-5:].mean() < losses[:5].mean()


def test_smooth_density_alone_makes_density_smooth():
    torch.manual_seed(0)
    net = Generator(TOY)
    turns = Turns(replace(FAST, density=25.0), toy_data()[1])
    step = lambda n: Step(n, 30, "density", 0, Share(4), torch.device("cpu"), (0, n, 1, 0))
    adam = torch.optim.Adam(net.parameters(), 0.01)
    losses = []
    for n in range(30):
        adam.zero_grad()
        terms = turns.smooth({"generator": net}, None, step(n))
        terms["loss"].backward()
        adam.step()
        losses.append(float(terms["density"].detach()))
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    assert net.superresolution.block0.conv0.weight.grad is None
