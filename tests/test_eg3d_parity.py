"EG3D against numbers of the official code on random weights (facts/eg3d_my3dgen.md section 3, facts/fixtures.md 1.4)."

import json
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from fixture_files import fixture
from torch.nn import functional as F

from facelab.lab.arrays import read_safetensors
from facelab.nets.eg3d import EG3DConfig, Generator
from facelab.nets.eg3d_speed import plain_decode, plain_march, plain_superres
from facelab.nets.resample import resize_filtered
from facelab.nets.stylegan2 import StyleGAN2Config
from facelab.nets.stylegan2_discriminator import DiscriminatorConfig, DualDiscriminator, with_deviation
from facelab.nets.superres import SUPERRES, Superresolution
from facelab.nets.triplane import NEXT3D_AXES
from facelab.nets.volume import RayDraws, VolumeConfig, camera_rays, coarse_depths, fine_depths, render_rays

SMALL = EG3DConfig(StyleGAN2Config(z_dim=32, embed=16, hidden=48, channel_base=1024, channel_max=8), VolumeConfig(12, 12), SUPERRES["2X"], neural_size=32)


def gap(ours, theirs):
    return float((ours - theirs).abs().max())


def by_rule(key, entry, seed):
    draw = np.random.RandomState((zlib.crc32(key.encode()) ^ seed) & 0xFFFFFFFF).standard_normal(entry["shape"]).astype("float32")
    return torch.from_numpy(np.asarray(np.float32(entry["a"]) + np.float32(entry["b"]) * (np.abs(draw) if entry.get("abs") else draw)))


# Fixture A: 128 pixels from 32 x 32 rays, all official keys


@pytest.fixture(scope="module")
def small():
    net = Generator(SMALL).eval().requires_grad_(False)
    net.load_state_dict(read_safetensors(fixture("eg3d/fixture_A.state_dict.safetensors")), strict=True)
    return net


@pytest.fixture(scope="module")
def numbers():
    return read_safetensors(fixture("eg3d/fixture_A.io.safetensors"))


@pytest.fixture(scope="module")
def planes(small, numbers):
    return small.planes(numbers["ws"])


def test_styles(small, numbers):
    assert gap(small.mapping(numbers["z"], numbers["c_mapping"], 0.7), numbers["ws"]) < 1e-4
    assert gap(small.mapping(numbers["z"], numbers["c_mapping"]), numbers["ws_psi1"]) < 1e-4


def test_planes(small, numbers, planes):
    flat = planes.flatten(1, 2)
    assert gap(flat[:, ::4, ::16, ::16], numbers["planes_sub"]) < 1e-4 and gap(flat[:1, :, 100:116, 100:116], numbers["planes_crop"]) < 1e-4
    moments = torch.stack([flat.mean((2, 3)), flat.std((2, 3))], -1)
    assert gap(moments, numbers["planes_mean_std"]) < 1e-4
    assert gap(small.planes(numbers["ws"], "none").flatten(1, 2)[:, ::12, 96:160, 96:160], numbers["planes_none_crop"]) < 1e-4


def test_rays_and_samples(small, numbers):
    origins, directions = camera_rays(numbers["c"], 32)
    assert gap(origins, numbers["ray_origins"]) == 0 and gap(directions, numbers["ray_directions"]) < 2e-7
    depth = coarse_depths(origins, directions, SMALL.volume, numbers["random.u_coarse"][..., 0])
    assert gap(depth, numbers["random.depths_coarse"][..., 0]) == 0
    fine = fine_depths(depth, numbers["random.weights_coarse"][..., 0], numbers["random.u_fine"].view(2, 1024, 12))
    assert gap(fine, numbers["random.depths_fine"][..., 0]) < 1e-5


def test_density_and_colour_of_points(small, numbers, planes):
    density, logistic = small.sample_density(planes, numbers["query_xyz"])
    assert gap(density[..., None], numbers["query_sigma"]) < 1e-4 and gap(logistic * 1.002 - 0.001, numbers["query_rgb"]) < 1e-4


@pytest.mark.parametrize("mode", ["random", "mid", "coarse_mid"])
def test_views(small, numbers, planes, mode):
    net, draws = small, None
    if mode == "random":
        draws = RayDraws(numbers["random.u_coarse"][..., 0], numbers["random.u_fine"].view(2, 1024, 12))
    if mode == "coarse_mid":
        net = Generator(replace(SMALL, volume=VolumeConfig(12, 0))).eval().requires_grad_(False)
        net.load_state_dict(small.state_dict())
    seen = net.render(planes, numbers["ws"], numbers["c"], draws=draws)
    alpha = net.features(planes, numbers["c"], draws=draws)[2]
    assert gap(seen.image, numbers[f"{mode}.image"]) < 1e-3 and gap(seen.raw, numbers[f"{mode}.image_raw"]) < 3e-4
    solid, off = alpha > 1e-3, (seen.depth - numbers[f"{mode}.image_depth"]).abs()
    assert solid.float().mean() > 0.5 and off[solid].max() < 3e-4
    assert (off * alpha).max() < 3e-4  # what a ray that met next to nothing says alone is the rounding of 1 - exp(-x): another on another CPU


def test_features_and_opacity(small, numbers, planes):
    features, _, alpha = small.features(planes, numbers["c"])
    assert gap(features.flatten(2).mT, numbers["mid.feature_samples"]) < 3e-4 and gap(alpha.flatten(2).mT, numbers["mid.weights_total"]) < 3e-4
    image = small.superresolution(numbers["mid.feature_samples"].mT.reshape(2, 32, 32, 32), numbers["ws"][:, -1])
    assert gap(image, numbers["mid.image"]) < 1e-4


def test_other_axes_give_another_picture(small, numbers, planes):
    other = Generator(replace(SMALL, volume=VolumeConfig(12, 12, axes=NEXT3D_AXES))).eval().requires_grad_(False)
    other.load_state_dict(small.state_dict())
    assert gap(other.render(planes, numbers["ws"], numbers["c"]).raw, numbers["mid.image_raw"]) > 0.1


def test_rows_of_a_batch_are_renders_of_their_own(small, numbers, planes):
    for k in range(2):
        alone = small.synthesis(numbers["ws"][k : k + 1], numbers["c"][k : k + 1])
        assert gap(alone.raw, numbers["mid.image_raw"][k : k + 1]) < 3e-4 and gap(alone.image, numbers["mid.image"][k : k + 1]) < 1e-3
    both = small.render(planes[:1], numbers["ws"][:1], numbers["c"])
    assert gap(both.raw[:1], numbers["mid.image_raw"][:1]) < 3e-4 and gap(both.raw[1], both.raw[0]) > 0.05


def test_limits_of_the_box_are_those_of_the_whole_batch(monkeypatch):
    import facelab.nets.volume as volume

    torch.manual_seed(0)
    net = Generator(replace(SMALL, volume=replace(SMALL.volume, near=None, far=None), neural_size=16)).eval()
    cam = torch.tensor([1.0, 0, 0, 0, 0, -1, 0, 0, 0, 0, -1, 2.7, 0, 0, 0, 1, 1.6, 0, 0.5, 0, 1.6, 0.5, 0, 0, 1]).repeat(2, 1)  # a wide lens: half of the rays miss the box
    cam[1, 11] = 2.2
    planes = net.planes(net.mapping(torch.randn(2, 32), torch.zeros(2, 25)))
    whole = net.features(planes, cam)
    assert whole[0].requires_grad
    monkeypatch.setattr(volume, "PORTION", 50)
    with torch.no_grad():
        parts = net.features(planes, cam)
    assert all(gap(a.detach(), b) < 1e-5 for a, b in zip(whole, parts))
    (o, d), (near, far) = camera_rays(cam, 16), volume.box_limits(*camera_rays(cam, 16), 1.0)
    walls = torch.stack([(-0.5 - o) / d, (0.5 - o) / d]).sort(0).values
    hit = (walls[0].amax(-1) < walls[1].amin(-1))[..., None]
    assert 0 < hit.sum() < hit.numel() and (near[~hit] == near[hit].min()).all() and (far[~hit] == near[hit].max()).all()


def test_gradients_reach_styles_weights_and_camera(small, numbers):
    ws, cam = numbers["ws"][:1].clone().requires_grad_(), numbers["c"][:1].clone().requires_grad_()
    image = small.synthesis(ws, cam, neural_size=16).raw
    assert gap(image.detach(), small.synthesis(ws.detach(), cam.detach(), neural_size=16).raw) < 3e-4  # portions against the whole
    pull = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    slopes = torch.autograd.grad((image * pull).sum(), (ws, cam))
    assert all(torch.isfinite(slope).all() and slope.abs().max() > 0 for slope in slopes)
    with torch.no_grad():
        step = slopes[0] / slopes[0].norm() * 0.02
        ends = [(small.synthesis(ws + sign * step, cam, neural_size=16).raw * pull).sum() for sign in (1, -1)]
    expected = 2 * float((slopes[0] * step).sum())
    assert abs(float(ends[0] - ends[1]) - expected) < 0.1 * abs(expected)


# Fixture C: the full generator for FFHQ at 512


def full_weight(key, value):
    "The rule of the fixture's JSON."
    x = torch.from_numpy(np.random.RandomState(zlib.crc32(key.encode())).standard_normal(value.numel()).astype("float32")).view(value.shape)
    if key.endswith("noise_strength"):
        return x * 0.15
    if key.endswith("w_avg"):
        return x * 0.5
    if key.endswith("affine.bias"):
        return 1 + 0.1 * x
    if ".mapping.fc" in key:
        return x * (20 if key.endswith("bias") else 100)
    if key == "decoder.net.2.bias":
        return torch.cat([torch.tensor([-21.693]), 0.2 * x[1:]])
    if key == "decoder.net.2.weight":
        return torch.cat([40 * x[:1], x[1:]])
    return x * 0.2 if key.endswith(".bias") else x


def test_parameters_of_the_full_generator():
    with torch.device("meta"):
        net = Generator()
    assert sum(p.numel() for p in net.parameters()) == 30_662_136 and len(net.state_dict()) == 176
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert (count(net.backbone.mapping), count(net.backbone.synthesis), count(net.superresolution), count(net.decoder)) == (800_768, 28_207_533, 1_649_578, 4_257)
    assert sum(b.numel() for b in net.buffers()) == 831_024


def test_the_full_generator():
    numbers = read_safetensors(fixture("eg3d/fixture_C_fullcfg.io.safetensors"))
    net = Generator().eval().requires_grad_(False)
    state = {key: value if key.endswith("resample_filter") else full_weight(key, value) for key, value in net.state_dict().items()}
    net.load_state_dict(state)
    assert np.array_equal(np.random.RandomState(1234).standard_normal((1, 512)).astype("float32"), numbers["z"].numpy())
    ws = net.mapping(numbers["z"], numbers["c_mapping"], 0.7)
    assert gap(ws, numbers["ws"]) < 1e-4
    planes = net.planes(ws)
    flat = planes.flatten(1, 2)
    assert gap(flat[:, ::8, ::16, ::16], numbers["planes_sub"]) < 3e-4
    assert gap(torch.stack([flat.mean((2, 3)), flat.std((2, 3))], -1), numbers["planes_mean_std"]) < 1e-4
    density, logistic = net.sample_density(planes, numbers["query_xyz"])
    assert gap(density[..., None], numbers["query_sigma"]) < 3e-3 and gap(logistic * 1.002 - 0.001, numbers["query_rgb"]) < 1e-4  # densities reach 100
    seen = net.render(planes, ws, numbers["c"])
    alpha = net.features(planes, numbers["c"])[2]
    off = (seen.depth - numbers["mid.image_depth"]).abs()
    assert gap(seen.raw, numbers["mid.image_raw"]) < 5e-4 and off[alpha > 1e-3].max() < 2e-3 and (off * alpha).max() < 2e-3
    assert gap(seen.image[..., ::4, ::4], numbers["mid.image_sub"]) < 1e-3 and gap(seen.image[..., 192:320, 192:320], numbers["mid.image_crop"]) < 1e-3


# The dual discriminator


@pytest.fixture(scope="module")
def meta():
    return json.loads(fixture("dual_discriminator/meta.json").read_text())


@pytest.fixture(scope="module")
def pairs():
    return {name: torch.from_numpy(np.array(value)) for name, value in np.load(fixture("dual_discriminator/io.npz")).items()}


def official_discriminator(meta, **options):
    net = DualDiscriminator(DiscriminatorConfig(64, channel_base=1024, channel_max=24, **options)).eval()
    state = net.state_dict()
    assert list(state) == list(meta["keys"]), "names or order differ from the official ones"
    net.load_state_dict({key: state[key] if entry.get("keep") else by_rule(key, entry, meta["seed"]) for key, entry in meta["keys"].items()})
    loaded = net.state_dict()
    for key, check in meta["checks"].items():
        assert np.allclose(loaded[key].flatten()[:3], check["first"], atol=1e-4), key
    assert [name for name, _ in net.named_parameters()] == meta["D_param_order"]
    return net


@pytest.fixture(scope="module")
def judge(meta):
    return official_discriminator(meta).requires_grad_(False)


def test_verdicts(judge, pairs):
    seen = {}
    hooks = [getattr(judge, f"b{side}").register_forward_hook(lambda net, args, out, side=side: seen.__setitem__(side, out)) for side in (64, 32, 16, 8)]
    fake = judge(pairs["fake_image"], pairs["fake_image_raw"], pairs["gen_c"])
    for hook in hooks:
        hook.remove()
    assert gap(fake, pairs["logits_fake"]) < 1e-4 and gap(judge(pairs["real_image"], pairs["real_image_raw"], pairs["real_c"]), pairs["logits_real"]) < 1e-4
    assert gap(judge.mapping(None, pairs["gen_c"]), pairs["cmap_fake"]) < 1e-4
    for side, step in ((64, 4), (32, 2), (16, 1), (8, 1)):
        assert gap(seen[side][:, ::4, ::step, ::step], pairs[f"b{side}_fake_s"]) < 2e-4
    assert gap(with_deviation(seen[8], 4)[:, -1:], pairs["mbstd_fake"]) < 1e-5


def test_noise_on_labels(meta, pairs):
    net, label = official_discriminator(meta, label_noise=meta["disc_c_noise"]).requires_grad_(False), pairs["gen_c"].clone()
    assert gap(net(pairs["fake_image"], pairs["fake_image_raw"], label, pairs["cnoise_randn"]), pairs["cnoise_logits"]) < 1e-4
    assert torch.equal(label, pairs["gen_c"]), "the label was written to"
    assert torch.isfinite(net(pairs["fake_image"][:1], pairs["fake_image_raw"][:1], label[:1])).all()


@pytest.mark.parametrize("how", ["antialiased", "classic", "none", 0.5])
def test_resizing(pairs, how):
    assert gap(resize_filtered(pairs["real_image"], 32, how)[: len(pairs[f"resize_{how}"])], pairs[f"resize_{how}"]) < 1e-5


# What no official numbers are at hand for, against a naive reading


@pytest.mark.parametrize("kind", sorted(SUPERRES))
@pytest.mark.parametrize("side", [16, 32, 40])
def test_every_super_resolution_is_what_it_says(kind, side):
    torch.manual_seed(0)
    row = replace(SUPERRES[kind], features=8, size_in=32, widths=(12, 8), clamp=None)
    net = Superresolution(row, 16).eval().requires_grad_(False)
    features, w = torch.randn(2, 8, side, side), torch.randn(2, 16)
    enters = features if side == 32 or (side > 32 and kind == "4X") else F.interpolate(features, (32, 32), mode="bilinear", align_corners=False, antialias=True)
    plain = plain_superres(net, enters, w)
    assert gap(net(features, w), plain) < 1e-4 * float(plain.abs().max())
    assert plain.shape[-1] == enters.shape[-1] * {"2X": 2, "4X": 2, "8X": 4, "8XDC": 4}[kind]


@pytest.mark.parametrize("change", [{"near": None, "far": None}, {"disparity": True}, {"white": True}, {"near": None, "far": None, "white": True}, {"disparity": True, "white": True}])
def test_other_ways_along_the_rays(small, numbers, planes, change):
    config = replace(SMALL.volume, coarse=10, fine=0, **change)
    cam = numbers["c"][:1].clone()
    cam[0, [16, 20]] = 2.0  # a lens so wide that some rays miss the box
    o, d = (part[0].double() for part in camera_rays(cam, 8))
    draws = torch.rand(1, 64, 10, generator=torch.Generator().manual_seed(0))
    steps, rows = [], []
    for eye, ahead in zip(o.tolist(), d.tolist()):  # ray by ray
        walls = [sorted((wall - e) / a for wall in (-0.5, 0.5)) for e, a in zip(eye, ahead)]
        enters, leaves = max(near for near, _ in walls), min(far for _, far in walls)
        rows.append((enters, leaves) if leaves > enters else None)
    entries = [row[0] for row in rows if row]
    for k, row in enumerate(rows):
        u = draws[0, k].double()
        if config.near is None:
            near, far = row or (min(entries), max(entries))
            steps.append(torch.stack([near + (i + u[i]) / 9 * (far - near) for i in range(10)]))
        elif config.disparity:
            steps.append(torch.stack([1 / ((1 - (i + u[i]) / 9) / config.near + (i + u[i]) / 9 / config.far) for i in range(10)]))
        else:
            steps.append(torch.stack([config.near + (i + u[i]) / 9 * (config.far - config.near) for i in range(10)]))
    assert None in rows or config.near is not None
    depth = torch.stack(steps)[None, :, :, None].float()
    at = (o.float()[:, None] + depth[0] * d.float()[:, None]).reshape(1, -1, 3)
    density, colours = (x.view(1, 64, 10, -1) for x in plain_decode(planes[:1], small.decoder, at, config))
    seen, mean, weights = plain_march(colours, density, depth)
    if config.white:
        seen = seen + 2 * (1 - weights.sum(2))
    ours = render_rays(planes[:1], small.decoder, *camera_rays(cam, 8), config, RayDraws(draws, torch.zeros(1, 64, 0)))
    assert gap(ours.features, seen) < 1e-4 and gap(ours.alpha, weights.sum(2)[..., 0]) < 1e-4
    met = weights.sum(2)[..., 0] > 1e-3
    assert met.any() and gap(ours.depth[met], mean[..., 0][met]) < 1e-4
