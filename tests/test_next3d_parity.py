"Next3D against the official code on random weights (facts/synthforge.md 1.5): every intermediate that the fixture holds."

import json

import numpy as np
import pytest
import torch
from fixture_files import fixture

from facelab.lab.errors import ShapeError
from facelab.nets.next3d import NEXT3DS, Next3D, Next3DConfig, Next3DVolume
from facelab.nets.stylegan2 import StyleGAN2Config
from facelab.nets.superres import SuperresConfig
from facelab.nets.texture_planes import MeshViews, cut, mouth_boxes, view_alpha
from facelab.nets.triplane import colour
from facelab.nets.volume import RayDraws
from facelab.synthforge.next3d_planes import FRAMES, mesh_views, views_for

SMALL = Next3DConfig(
    StyleGAN2Config(z_dim=16, channel_base=1024, channel_max=16), Next3DVolume(12, 12), SuperresConfig(32, 64, (128, 64), (False, True), clamp=None, top_filter=True),
    neural_size=32, num_faces=2472, num_uv=1276, num_dense=0,
)  # fmt: skip


def arrays(name):
    with np.load(fixture(f"next3d/{name}.npz")) as file:
        return {key: torch.from_numpy(file[key].astype(np.int64) if file[key].dtype == np.int32 else file[key]) for key in file.files}


@pytest.fixture(scope="module")
def official():
    return arrays("io"), arrays("mesh")


@pytest.fixture(scope="module")
def net():
    made, (mesh,) = Next3D(SMALL).eval().requires_grad_(False), (arrays("mesh"),)
    lost, more = made.load_state_dict(arrays("state_dict"), strict=False)
    assert lost == ["dense_faces"] and not more
    made.face_mask = mesh["uv_face_eye_mask"].float() / 255
    return made


@pytest.fixture(scope="module")
def head(net, official):
    io = official[0]
    verts, landmarks = io["v"].split((5023, 68), 1)
    views = views_for(net, verts, landmarks)
    return views, net.head_planes(io["ws"], views)


def near(ours, theirs, most):
    gap = (ours - theirs).abs().max()
    assert ours.shape == theirs.shape and gap < most, (ours.shape, theirs.shape, gap)


def test_topology(net, official):
    mesh = official[1]
    assert torch.equal(net.faces[0], mesh["f"]) and torch.equal(net.uvfaces[0], mesh["ft"])
    near(net.raw_uvcoords[0], mesh["vt"], 1e-6)
    near(net.uvcoords[0], torch.stack([2 * mesh["vt"][:, 0] - 1, 1 - 2 * mesh["vt"][:, 1], torch.ones(1276)], -1), 1e-6)


def test_styles(net, official):
    io = official[0]
    assert net.num_ws == 28
    near(net.mapping(io["z"], io["c"])[:, ::7], io["ws_psi1"], 1e-5)
    near(net.mapping(io["z"], io["c"], 0.7, 14), io["ws"], 1e-5)


def test_raster(head, official):
    io, views = official[0], head[0]
    drawn = np.unpackbits(io["raster_mask"].numpy()).reshape(4, 2, 256, 256).astype(bool)
    assert np.array_equal(views.hit.transpose(0, 1).numpy(), drawn)
    near(views.uv.permute(1, 0, 4, 2, 3)[..., ::2, ::2], io["raster_uv_s"], 1e-5)
    near(views.mouth, io["lm2d_front"][:, 48:60], 1e-6)


def test_alpha(head, official):
    io, alpha = official[0], head[1].alpha.transpose(0, 1)
    near(alpha[..., ::4, ::4], io["alpha_f32_s"], 1e-5)
    assert ((alpha * 255).round() - io["alpha_front_side_top"].float()).abs().max() <= 1


def test_boxes(head, official):
    assert head[1].boxes.tolist() == official[0]["mouth_boxes"].tolist()


def test_planes(head, official):
    io, parts = official[0], head[1]
    near(parts.texture[:, ::4, ::8, ::8], io["textures_s"], 1e-3)
    near(parts.merged.transpose(0, 1)[:, :, ::4, ::8, ::8], io["rast_images_s"], 1e-3)
    near(cut(parts.merged[:, 0], parts.boxes, 64)[:, ::4, ::4, ::4], io["mouth_in"], 1e-3)
    near(parts.mouth[:, ::4, ::8, ::8], io["mouth_out_s"], 1e-3)
    near(parts.front[:, ::4, ::8, ::8], io["blend_in_s"], 1e-3)
    near(parts.blended[:, ::4, ::8, ::8], io["blend_out_s"], 1e-3)
    near(parts.static.flatten(1, 2)[:, ::8, ::8, ::8], io["static_s"], 1e-3)
    near(parts.planes[:, :, ::4, ::8, ::8], io["planes_s"], 1e-3)
    near(torch.stack([parts.planes.mean((-1, -2)), parts.planes.std((-1, -2))]), io["planes_stats"], 1e-4)


def test_picture(net, head, official):
    io, planes = official[0], head[1].planes
    draws = RayDraws(io["rand_stratified"][..., 0], io["rand_pdf"].view(2, 1024, 12))
    seen = net.render(planes, io["ws"], io["c"], draws=draws)
    near(seen.image, io["image"], 1e-3)
    near(seen.raw, io["image_raw"], 1e-4)
    near(seen.depth, io["image_depth"], 1e-4)
    features, _, alpha = net.features(planes, io["c"], None, draws)
    near(features.flatten(2).mT, io["feature"], 1e-4)
    near(alpha.flatten(1)[..., None], io["weights_sum"], 1e-5)


def test_points(net, head, official):
    io = official[0]
    density, logistic = net.sample_density(head[1].planes, io["pts"])
    near(density[..., None], io["pts_sigma"], 1e-3)
    near(colour(logistic), io["pts_rgb"], 1e-4)


def test_default_configuration_has_the_official_weights():
    with torch.device("meta"):
        made = Next3D(NEXT3DS["ffhq512"])
    assert sum(weight.numel() for weight in made.parameters()) == 172_815_807
    official = {name: tuple(shape) for name, shape in json.loads(fixture("next3d/keys_default_512.json").read_text())}
    ours = {name: tuple(value.shape) for name, value in made.state_dict().items()}
    other = {name for name in ours.keys() | official.keys() if ours.get(name) != official.get(name)}
    assert other == {"faces", "uvfaces", "raw_uvcoords", "uvcoords", "face_uvcoords"}  # the fixture's mesh is synthetic: 9,928 triangles


def test_unused_blocks_are_loaded_and_have_no_say(net, head, official):
    io, views = official[0], MeshViews(*(part[:1] for part in head[0]))
    keys = [
        "mouth_backbone.synthesis.b4.conv1.weight",
        "neural_blending.synthesis.b32.conv0.weight",
        "mouth_backbone.synthesis.fusion.4.weight",
        "neural_blending.synthesis.fusion.3.weight",
        "texture_backbone.mapping.fc0.weight",
    ]
    weights = dict(net.named_parameters())
    before = {key: weights[key].clone() for key in keys}
    assert any(value.abs().sum() > 0 for value in before.values())
    try:
        for key in keys:
            weights[key].add_(1.0)
        assert torch.equal(net.planes(io["ws"][:1], views), net.planes(io["ws"][:1], views))
        near(net.planes(io["ws"][:1], views)[:, :, ::4, ::8, ::8], io["planes_s"][:1], 1e-3)
    finally:
        for key in keys:
            weights[key].copy_(before[key])


def test_heads_do_not_see_each_other(net, head, official):
    io, views = official[0], MeshViews(*(part[1:] for part in head[0]))
    near(net.planes(io["ws"][1:], views), head[1].planes[1:], 1e-3)


def test_any_mesh_of_the_chart(official):
    io, mesh = official
    corner = torch.stack([2 * mesh["vt"][:, 0] - 1, 1 - 2 * mesh["vt"][:, 1]], -1)[mesh["ft"]]
    whole = mesh_views(io["v"][:, :5023], io["v"][:, 5071:5083], mesh["f"], corner, size=64)
    half = mesh_views(io["v"][:, :1250], io["v"][:, 5071:5083], mesh["f"][::2], corner[::2], size=64)
    assert 0 < half.hit.sum() < whole.hit.sum()
    alpha = view_alpha(torch.ones(64, 64), whole)
    assert (alpha[whole.hit] > 0.99).all() and torch.equal(mouth_boxes(whole.mouth, 64), mouth_boxes(half.mouth, 64))
    with pytest.raises(ShapeError):
        mesh_views(io["v"], io["v"][:, 5071:5083], mesh["f"], corner[:5], FRAMES["flame"], 64)
