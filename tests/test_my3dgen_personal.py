"My3DGen's personal priors: saved and read back, interrupted and gone on, measures by hand, and what is refused."

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from facelab.lab.arrays import read_safetensors, write_safetensors
from facelab.lab.errors import AssetError, InputError, ShapeError
from facelab.lab.files import read_json, write_json
from facelab.my3dgen.adapter import Adapter, AdapterConfig, base_hash
from facelab.my3dgen.alpha_space import AlphaStyles, beyond, mix, project_weights, sample_weights
from facelab.my3dgen.applications import between_cams, edit, interpolate, invert_alpha, novel_views, reel, sample, yaw_cams
from facelab.my3dgen.directions import Direction, code_score, fit_boundary, move, train_direction, within
from facelab.my3dgen.likeness import depth_error, psnr, smoothness, ssim
from facelab.my3dgen.personalize import PersonalConfig, PersonalPrior, render_views
from facelab.my3dgen.photo_loss import PhotoLoss
from facelab.my3dgen.portraits import Portraits, check_label, strangers
from facelab.my3dgen.styles import InversionConfig, average_style, invert
from facelab.my3dgen.tuning import TuneConfig, full_weights, pivotal, tune, tune_whole
from facelab.nets.eg3d import EG3DConfig, Generator
from facelab.nets.lpips import GradientDistance
from facelab.nets.stylegan2 import StyleGAN2Config
from facelab.nets.superres import SuperresConfig
from facelab.nets.volume import VolumeConfig

TOY = EG3DConfig(
    StyleGAN2Config(z_dim=8, w_dim=16, c_dim=0, lr_mul=1.0, size=16, out_channels=12, channels=(16, 16, 8), train_noise=True), VolumeConfig(6, 6),
    SuperresConfig(8, 16, (8, 8), (False, True), clamp=None), neural_size=16, hidden=8,
)  # fmt: skip
PLAIN = PhotoLoss(norm="l1", perceptual=0.0, raw_perceptual=0.0)
QUICK = PersonalConfig(AdapterConfig(2), InversionConfig(steps=6, rate=0.1, group=2, loss=PLAIN), TuneConfig(steps=8, batch=2, rate=0.02, betas=(0.9, 0.99), loss=PLAIN))


def shaken(net, seed=0):
    "Somebody whom a generator does not know."
    other, random = copy.deepcopy(net), torch.Generator().manual_seed(seed)
    for name, weight in other.named_parameters():
        if name.endswith("weight") and "mapping" not in name:
            weight.add_(0.3 * weight.std() * torch.randn(weight.shape, generator=random))
    return other


@pytest.fixture(scope="module")
def toy():
    torch.manual_seed(0)
    return Generator(TOY).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def album(toy):
    cams = yaw_cams(TOY, [-0.3, 0.0, 0.2])
    styles = toy.mapping(torch.randn(3, 8, generator=torch.Generator().manual_seed(1)))
    return Portraits(shaken(toy).synthesis(styles, cams).image.detach(), cams, ("a", "b", "c"))


@pytest.fixture(scope="module")
def prior(toy, album):
    return PersonalPrior.personalize(toy, album, QUICK)


def test_base_is_left_alone(toy, album, prior):
    before = base_hash(toy)
    again = PersonalPrior.personalize(toy, album, QUICK)
    assert base_hash(toy) == before
    assert again.anchors.equal(prior.anchors) and all(v.equal(w) for v, w in zip(again.adapter.state_dict().values(), prior.adapter.state_dict().values()))
    assert float(prior.report["curve"]["tune/loss"].iloc[-1]) < float(prior.report["curve"]["tune/loss"].iloc[0])


def test_save_load(tmp_path, toy, prior):
    prior.save(tmp_path / "a", half=False)
    back = PersonalPrior.load(tmp_path / "a", copy.deepcopy(toy))
    assert back.anchors.equal(prior.anchors) and back.cams.equal(prior.cams)
    assert back.render(back.anchors, back.cams).image.equal(prior.render(prior.anchors, prior.cams).image)
    assert read_safetensors(tmp_path / "a" / "anchors.safetensors")["styles"].shape == (3, 1, 16), "W keeps one vector"
    prior.save(tmp_path / "b")
    half = PersonalPrior.load(tmp_path / "b", toy)
    gap = (half.render(half.anchors, half.cams).image - prior.render(prior.anchors, prior.cams).image).abs().max()
    assert 0 < gap < 2e-2 and (tmp_path / "b" / "adapter_model.safetensors").stat().st_size < (tmp_path / "a" / "adapter_model.safetensors").stat().st_size


def test_files_refused(tmp_path, toy, prior):
    prior.save(tmp_path / "a", half=False)
    with pytest.raises(InputError, match="base"):
        PersonalPrior.load(tmp_path / "a", shaken(toy))
    said = read_json(tmp_path / "a" / "adapter_config.json")
    write_json(tmp_path / "a" / "adapter_config.json", said | {"config": said["config"] | {"rank": 1}})
    with pytest.raises(InputError, match="rank 1"):
        PersonalPrior.load(tmp_path / "a", toy)
    write_json(tmp_path / "a" / "adapter_config.json", said)
    held = read_safetensors(tmp_path / "a" / "anchors.safetensors")
    write_safetensors(tmp_path / "a" / "anchors.safetensors", held | {"styles": held["styles"] * torch.nan})
    with pytest.raises(ShapeError, match="not finite"):
        PersonalPrior.load(tmp_path / "a", toy)
    write_safetensors(tmp_path / "a" / "anchors.safetensors", {"styles": held["styles"][:2], "cams": held["cams"]})
    with pytest.raises(InputError, match="anchors"):
        PersonalPrior.load(tmp_path / "a", toy)
    (tmp_path / "a" / "anchors.safetensors").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(InputError):
        PersonalPrior.load(tmp_path / "a", toy)


def test_who_it_is_is_kept(tmp_path, toy, prior):
    somebody = PersonalPrior(toy, prior.adapter, prior.anchors, prior.cams, "somebody")
    somebody.save(tmp_path / "a")
    assert PersonalPrior.load(tmp_path / "a", toy).about == "somebody"


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [4, 9])  # calls of the renderer: within the second group of anchors, within the tuning
def test_resume_bits(tmp_path, monkeypatch, toy, album, prior, after):
    import facelab.lab.state as state
    import facelab.my3dgen.styles as styles
    import facelab.my3dgen.tuning as tuning

    every = lambda **how: state.TrainConfig(**how, save_every=2)
    monkeypatch.setattr(styles, "TrainConfig", every)
    monkeypatch.setattr(tuning, "TrainConfig", every)
    calls, draw = [0], Generator.synthesis

    def tired(self, *args, **how):
        calls[0] += 1
        if calls[0] > after:
            raise Killed
        return draw(self, *args, **how)

    with monkeypatch.context() as patched:
        patched.setattr(Generator, "synthesis", tired)
        with pytest.raises(Killed):
            PersonalPrior.personalize(toy, album, QUICK, tmp_path / "work")
    assert any((tmp_path / "work").rglob("*.safetensors")) or after == 4
    done = PersonalPrior.personalize(toy, album, QUICK, tmp_path / "work")
    assert done.anchors.equal(prior.anchors) and all(v.equal(w) for v, w in zip(done.adapter.state_dict().values(), prior.adapter.state_dict().values()))
    assert not (tmp_path / "work").exists()


def test_later_groups(toy, album):
    one = invert(toy, album.images, album.cams, replace(QUICK.inversion, noise=0.0, later=1.0))
    two = invert(toy, album.images, album.cams, replace(QUICK.inversion, noise=0.0, later=0.5))
    assert one.styles[:2].equal(two.styles[:2]) and not one.styles[2].equal(two.styles[2])


def test_another_search_in_the_same_folder_is_another(tmp_path, toy, album, prior):
    quick, photo, cam = replace(QUICK.inversion, steps=8), album.images[:1], album.cams[:1]
    near, other = prior.anchors[2:], PersonalPrior(toy, prior.adapter, prior.anchors.flip(0) * 0.5, prior.cams)
    searches = {
        "hull": lambda **how: invert_alpha(prior, photo, cam, quick, 0.0, **how), "beyond": lambda **how: invert_alpha(prior, photo, cam, quick, 0.6, **how),
        "near": lambda **how: invert_alpha(prior, photo, cam, quick, 0.6, near=near, **how), "plus": lambda **how: invert_alpha(prior, photo, cam, quick, 0.6, plus=True, **how),
        "anchors": lambda **how: invert_alpha(other, photo, cam, quick, 0.6, **how), "free": lambda **how: invert(toy, photo, cam, quick, **how), "start": lambda **how: invert(toy, photo, cam, quick, start=near, **how),
    }  # fmt: skip
    fresh = {name: search().styles for name, search in searches.items()}
    for name, search in searches.items():
        found = search(scratch=tmp_path / ("w" if name in ("free", "start") else "alpha")).styles
        assert found.equal(fresh[name]), name
        assert search(scratch=tmp_path / ("w" if name in ("free", "start") else "alpha")).styles.equal(found), "the same again is found again"


def test_whole_and_pivotal(toy, album, prior):
    before = base_hash(toy)
    whole, _ = tune_whole(toy, album.images, album.cams, prior.anchors, QUICK.tuning)
    own = dict(toy.named_parameters())
    moved = {name for name, weight in whole.named_parameters() if not weight.equal(own[name])}
    assert base_hash(toy) == before and moved and moved <= set(full_weights(toy)) and not any("mapping" in name or "noise_const" in name for name in moved)
    alone = pivotal(toy, album.images[:1], album.cams[:1], prior.anchors[:1], replace(QUICK.tuning, steps=12))
    off = lambda net: (render_views(net, prior.anchors[:1], album.cams[:1]).image - album.images[:1]).abs().mean()
    assert off(alone) < off(toy)
    stops = tune(copy.deepcopy(toy), album.images[:1], album.cams[:1], prior.anchors[:1], replace(QUICK.tuning, stop_at=1e9, loss=replace(PLAIN, perceptual=1.0, network="gradients")), None)
    assert len(stops) == 1, "PTI ends where the perceptual term is low enough"


def test_bad_photos():
    front, good = yaw_cams(TOY, [0.0])[0], np.random.default_rng(0).random((32, 32, 3))
    for pictures, labels in (([], []), ([good], []), ([np.full((32, 32, 3), np.nan)], [front]), ([good[:20]], [front]), ([good[..., :1]], [front]), ([good * 255], [front]), ([np.zeros((32, 32, 3))], [front])):
        with pytest.raises(InputError):
            Portraits.of(pictures, labels, 32)
    some = Portraits.of([good, good * np.inf, (255 * good).astype(np.uint8)], [front] * 3, 32, ["a", "b", "c"])
    assert some.names == ("a", "c") and "b" in some.skipped.report(3) and (some.images[0] - some.images[1]).abs().max() < 0.01


def test_bad_labels():
    front = yaw_cams(TOY, [0.3])[0]
    assert check_label(front.numpy()).equal(front)
    scaled, mirrored, sick, far = front.clone(), front.clone(), front.clone(), front.clone()
    scaled[:3] *= 1.2
    mirrored[[0, 4, 8]] *= -1
    sick[5] = torch.inf
    far[16] = -4.0
    for label in (scaled, mirrored, sick, far, front[:16], torch.zeros(25)):
        with pytest.raises(ShapeError):
            check_label(label)


def test_nan_in_a_latent(toy, prior):
    broken = prior.anchors.clone()
    broken[1, 0, 0] = torch.nan
    for call in (lambda: prior.render(broken, prior.cams), lambda: PersonalPrior(toy, prior.adapter, broken, prior.cams), lambda: invert(toy, torch.zeros(3, 3, 32, 32), prior.cams, QUICK.inversion, start=broken), lambda: project_weights(broken, prior.anchors)):
        with pytest.raises(ShapeError, match="finite"):
            call()
    with pytest.raises(InputError):
        invert(toy, torch.zeros(0, 3, 32, 32), prior.cams[:0], QUICK.inversion)
    with pytest.raises(ShapeError):
        move(broken, Direction("x", torch.eye(16)[0], 0.0, 1.0, 1.0), 1.0)
    planes, fresh = toy.planes(prior.anchors), Generator(TOY)  # as it is made: in training mode
    with torch.no_grad():
        for call in (lambda: toy.render(planes, broken, prior.cams), lambda: fresh.synthesis(broken, prior.cams), lambda: fresh.render(fresh.planes(prior.anchors), broken, prior.cams)):
            with pytest.raises(ShapeError, match="finite"):
                call()


def test_strangers():
    vectors = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1, 0.1], [1, -0.1], [0.9, 0.1], [-1, 0.3]]), dim=1)
    assert strangers(vectors) == [4] and strangers(vectors[:4]) == []


def test_alpha_space():
    anchors = torch.randn(6, 4, 16, generator=torch.Generator().manual_seed(0))
    for beta in (0.0, 0.03):
        drawn = sample_weights(200, 6, torch.Generator().manual_seed(1), beta=beta)
        assert torch.allclose(drawn.sum(1), torch.ones(200), atol=1e-5) and torch.isclose(drawn.min(), torch.tensor(-beta), atol=1e-6)
        flat = mix(drawn[:5], anchors.mean(1, keepdim=True).expand_as(anchors))
        assert torch.allclose(mix(project_weights(flat, anchors.mean(1, keepdim=True).expand_as(anchors), beta), anchors.mean(1, keepdim=True).expand_as(anchors)), flat, atol=1e-3)
    module = AlphaStyles(anchors, 2, 0.02, plus=True)
    weights = module.weights()
    assert torch.allclose(weights.sum(1), torch.ones(2)) and module().shape == (2, 4, 16)
    assert torch.allclose(beyond(torch.eye(2), 0.5), torch.tensor([[1.5, -0.5], [-0.5, 1.5]]))


def test_directions(toy):
    x = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    normal, offset, accuracy = fit_boundary(x, x @ torch.tensor([0.0, 3, 4, 0, 0]) > 2.5, penalty=1e-4)
    assert torch.allclose(normal, torch.tensor([0.0, 0.6, 0.8, 0, 0]), atol=0.08) and abs(offset + 0.5) < 0.1 and accuracy > 0.93
    found = train_direction(toy, "third", code_score(2), count=300)
    assert found.accuracy > 0.75 and torch.isclose(found.normal.norm(), torch.tensor(1.0), atol=1e-5)
    line = torch.zeros(3, 1, 5)
    line[1, 0, 1], line[2, 0, 1] = 1.0, 2.0
    assert torch.allclose(within(normal, line), torch.tensor([0, normal[1], 0, 0, 0]), atol=0.01)


def test_applications(toy, prior):
    pictures, styles = interpolate(prior, 0, 2, 4)
    assert styles[[0, -1]].equal(prior.anchors[[0, 2]]) and torch.allclose(pictures[0], prior.render(prior.anchors[:1], prior.cams[:1]).image[0], atol=1e-5)
    assert sample(prior, 3, seed=1)[1].equal(sample(prior, 3, seed=1)[1]) and not sample(prior, 3, seed=1)[1].equal(sample(prior, 3, seed=2)[1])
    nothing = edit(prior, prior.anchors[:1], Direction("x", torch.eye(16)[0], 0.0, 1.0, 1.0), [0.0], prior.cams[:1])[0]
    assert torch.allclose(nothing[0], pictures[0], atol=1e-5)
    way = between_cams(prior.cams[0], prior.cams[2], torch.linspace(0, 1, 5))
    turns = way[:, :16].view(-1, 4, 4)[:, :3, :3]
    assert torch.allclose(turns @ turns.mT, torch.eye(3).expand(5, 3, 3), atol=1e-5)


def test_what_applications_refuse(tmp_path, monkeypatch, toy, prior):
    flat, frames = Direction("x", torch.eye(16)[0], 0.0, 1.0, 1.0), prior.render(prior.anchors, prior.cams).image
    together = edit(prior, prior.anchors, flat, [0.5], prior.cams)[0]  # as many cameras as styles
    for k in range(3):
        assert torch.allclose(together[k : k + 1], edit(prior, prior.anchors[k : k + 1], flat, [0.5], prior.cams[k : k + 1], inside=True)[0], atol=1e-4)
    assert edit(prior, prior.anchors[:1], flat, [0.5], prior.cams)[0].shape == (3, 3, 32, 32)
    for call in (
        lambda: edit(prior, prior.anchors, flat, [0.5], prior.cams[:2]), lambda: novel_views(prior, prior.anchors[:1], []), lambda: prior.render(prior.anchors, prior.cams, 0), lambda: prior.render(prior.anchors, prior.cams, -1),
        lambda: reel(tmp_path / "a.avi", frames), lambda: reel(tmp_path / "a.gif", frames[:0]),
    ):  # fmt: skip
        with pytest.raises(InputError):
            call()
    assert reel(tmp_path / "a.gif", frames).read_bytes()[:6] == b"GIF89a"
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "imageio_ffmpeg", None)  # as where it is not installed
        with pytest.raises(AssetError, match=r"facelab\[video\]"):
            reel(tmp_path / "a.mp4", frames)
    assert not (tmp_path / "a.mp4").exists() and not (tmp_path / "a.avi").exists()


@pytest.mark.parametrize("wrong", ["eight bits", "0..255", "too small", "one channel", "not finite", "too few cameras"])
def test_photos_of_another_kind(toy, prior, album, wrong):
    photos, cams = ((album.images.clamp(-1, 1) + 1) * 127.5).round(), album.cams
    fine = photos / 127.5 - 1
    bad = {"eight bits": photos.byte(), "0..255": photos, "too small": fine[..., :16, :16], "one channel": fine[:, :1], "not finite": fine / 0, "too few cameras": fine}[wrong]
    cams = cams[:2] if wrong == "too few cameras" else cams
    for call in (lambda photos: invert(toy, photos, cams, QUICK.inversion), lambda photos: invert_alpha(prior, photos, cams, QUICK.inversion), lambda photos: tune(copy.deepcopy(toy), photos, cams, prior.anchors, QUICK.tuning, None)):
        with pytest.raises(ShapeError, match="photos"):
            call(bad)
    assert len(invert(toy, fine[:1], album.cams[:1], replace(QUICK.inversion, steps=1)).styles) == 1


def test_measures_by_hand():
    truth = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    near = (truth * 0.5).clamp(-1, 1)
    assert torch.allclose(psnr(near, truth), 10 * torch.log10(4 / (near - truth).square().mean((1, 2, 3))))
    assert torch.allclose(ssim(truth, truth), torch.ones(2)) and (ssim(near, truth) < 1).all()
    depth = torch.full((1, 1, 4, 4), 2.7)
    depth[..., 0] = 0.0
    assert torch.allclose(depth_error(depth + 0.02, depth, unit_mm=100.0), torch.tensor([2.0]), atol=1e-3)
    frames = torch.linspace(-1, 1, 4)[:, None, None, None] * torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert abs(smoothness(frames, GradientDistance())[1] - 1) < 1e-3
    with pytest.raises(ShapeError):
        depth_error(depth, depth * 0)


def test_average(toy):
    mean, spread = average_style(toy, count=500)
    points = toy.mapping(torch.from_numpy(np.random.RandomState(123).randn(500, 8)).float())[:, 0]
    assert torch.allclose(mean, points.mean(0), atol=1e-5) and abs(spread - float((points - points.mean(0)).square().sum(1).mean().sqrt())) < 1e-4


def test_adapter_of_one_photo(toy, album):
    one = PersonalPrior.personalize(toy, album.pick([0]), QUICK)
    assert len(one) == 1 and isinstance(one.adapter, Adapter) and torch.isfinite(one.render(one.anchors, one.cams).image).all()
    with pytest.raises(InputError):
        album.pick([])


LAUNCHED = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
import test_my3dgen_personal as t
from facelab.lab.side_by_side import over_ranks

def one(number, folder):
    torch.manual_seed(0)
    toy = t.Generator(t.TOY).eval().requires_grad_(False)
    cams = t.yaw_cams(t.TOY, [-0.3, 0.0, 0.2])
    album = t.Portraits(t.shaken(toy, number).synthesis(toy.mapping(torch.randn(3, 8, generator=torch.Generator().manual_seed(1))), cams).image.detach(), cams, ("a", "b", "c"))
    prior = t.PersonalPrior.personalize(toy, album, t.QUICK, folder + f"/work{{number}}", device="cpu")
    alone = t.pivotal(toy, album.images[:1], album.cams[:1], prior.anchors[:1], t.replace(t.QUICK.tuning, steps=3, batch=1), device="cpu")
    return [prior.anchors, *prior.adapter.state_dict().values(), *alone.state_dict().values()]

if __name__ == "__main__":
    folder, rank = sys.argv[1], __import__("os").environ.get("RANK", "one")
    held = {{"shared": one(7, folder), "spread": over_ranks(one, [(k, folder) for k in range(3)], device="cpu")}}
    torch.save(held, f"{{folder}}/{{rank}}.pt")
"""


def test_people_are_spread_over_processes(tmp_path):
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED.format(tests=str(Path(__file__).parent)))
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    for command in ([sys.executable], [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]):
        subprocess.run([*command, str(script), str(tmp_path)], check=True, env=environ, timeout=300)
    one, *two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "0", "1"))
    for held in two:
        assert all(a.equal(b) for a, b in zip(one["shared"], held["shared"]))
        assert all(a.equal(b) for mine, theirs in zip(one["spread"], held["spread"]) for a, b in zip(mine, theirs))
    assert not one["spread"][0][0].equal(one["spread"][1][0])
