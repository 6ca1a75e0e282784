"""The rasteriser equals PyTorch3D on fixtures/raster (gates of facts/render.md 3.1), and the readable twin in both directions."""

import functools
import importlib
import json

import numpy as np
import pytest
import torch
from fixture_files import PLACES, fixture
from raster_twin import lit, loss, project, soft_alpha, twin

from facelab.face.interpolate import interpolate, lit_pixels, vertex_normals
from facelab.face.raster import rasterize
from facelab.face.raster_kernels import raster_numpy
from facelab.lab.errors import InputError


def names():
    for place in PLACES:
        if (place / "raster/index.json").exists():
            return [row["file"] for row in json.loads((place / "raster/index.json").read_text())]
    return ["index.json"]


@functools.cache
def load(name):
    "case, faces, world vertices (leaf), NDC vertices, fragments, whether the NDC is PyTorch3D's own."
    case = dict(np.load(fixture(f"raster/{name}"), allow_pickle=False))
    meshes = np.load(fixture("raster/meshes.npz"), allow_pickle=False)
    faces = torch.from_numpy(meshes[f"{case['mesh']}_faces"].astype(np.int64))
    world = torch.from_numpy(case["verts"] if "verts" in case else np.repeat(meshes[f"{case['mesh']}_verts"][None], len(case["R"]), 0)).requires_grad_()
    ndc = project(case, world)
    if given := "verts_ndc" in case:  # its bits, with the gradient of the projection
        ndc = ndc + (torch.from_numpy(case["verts_ndc"]) - ndc).detach()
    return case, faces, world, ndc, rasterize(ndc, faces, tuple(case["image_size"].tolist()), **options(case)), given


def options(case):
    return {
        "faces_per_pixel": int(case["faces_per_pixel"]), "blur_radius": float(case["blur_radius"]), "perspective_correct": bool(case["perspective_correct"]),
        "clip_barycentric": bool(case["clip_barycentric_coords"]), "cull_backfaces": bool(case["cull_backfaces"]),
        "z_clip": None if np.isnan(case["z_clip"]) else float(case["z_clip"]),
    }  # fmt: skip


def ambiguous(case, like):
    "Pixels where noise of 1e-6 changes the winner, and their neighbours."
    if "ambiguous" not in case:
        return None
    flags = torch.from_numpy(np.unpackbits(case["ambiguous"])[: like[..., 0].numel()].reshape(like.shape[:3])).float()
    return torch.nn.functional.max_pool2d(flags[:, None], 3, 1, 1)[:, 0] > 0


@pytest.mark.parametrize("name", names())
def test_forward(name):
    case, faces, _, _, seen, given = load(name)
    ours, theirs = seen.packed(len(faces)), torch.from_numpy(case["pix_to_face"]).long()
    wrong = ours != theirs
    if given:
        assert not wrong.any(), "same vertices, same order of operations: same faces"
    elif str(case["mesh"]) == "torture":  # exact duplicates: the last bit of the projection decides between two equal depths
        assert wrong.float().sum() <= 0.02 * (theirs >= 0).sum()
    else:
        assert wrong.sum() <= 1e-4 * (theirs >= 0).sum()
        if (doubt := ambiguous(case, theirs)) is not None:
            assert not (wrong.any(-1) & ~doubt).any()
    scale = 1 if given else 30
    for key, values, rtol, atol in (("zbuf", seen.zbuf, 1e-5, 1e-6), ("bary_coords", seen.bary, 0, 1e-5), ("dists", seen.dists, 1e-5, 1e-6)):
        if key in case:
            reference = torch.from_numpy(case[key])
            assert torch.allclose(values.detach()[~wrong], reference[~wrong], rtol=scale * rtol, atol=scale * atol), key


def clamped(case, faces, ndc, seen):
    """Vertices of faces whose perspective denominator PyTorch3D clamps to 1e-8 at some pixel of the blur. Its gradient there is rounding error times 1e16
    (its float32 sums do not cancel); ours is zero there, as the twin's. At most a few vertices of one file."""
    touched = torch.zeros(ndc.shape[:2], dtype=torch.bool)
    if not (options(case)["perspective_correct"] and options(case)["blur_radius"] > 0):
        return touched
    image, i, j, slot = (seen.pix_to_face >= 0).nonzero().T
    h, w = case["image_size"]
    x, y = 1 - (2 * j + 1) / w, 1 - (2 * i + 1) / h
    corner = faces[seen.pix_to_face[image, i, j, slot]]
    a, b, c = (ndc.detach()[image, corner[:, k]] for k in range(3))
    side = lambda px, py, p, q: (px - p[:, 0]) * (q[:, 1] - p[:, 1]) - (py - p[:, 1]) * (q[:, 0] - p[:, 0])
    area = side(c[:, 0], c[:, 1], a, b) + 1e-8
    total = (side(x, y, b, c) * b[:, 2] * c[:, 2] + side(x, y, c, a) * a[:, 2] * c[:, 2] + side(x, y, a, b) * a[:, 2] * b[:, 2]) / area
    touched[image[total <= 1e-8][:, None], corner[total <= 1e-8]] = True
    return touched


@pytest.mark.parametrize("what", ["image", "zbuf", "bary", "dists", "alpha"])
@pytest.mark.parametrize("name", names())
def test_vertex_gradient(name, what):
    case, faces, world, ndc, seen, given = load(name)
    if f"grad_{what}" not in case:
        return  # the index says so; not every file stores every gradient
    value = {"zbuf": seen.zbuf, "bary": seen.bary, "dists": seen.dists}.get(what)
    if what == "image":
        value = lit(case, world, faces, seen.pix_to_face, seen.bary)
        if "image" in case and given:
            assert torch.allclose(value, torch.from_numpy(case["image"]), atol=1e-5)
    if what == "alpha":
        value = soft_alpha(case, seen.pix_to_face, seen.dists)
        assert torch.allclose(value, torch.from_numpy(case["alpha"]), atol=1e-5)
    total = loss(what, value, seen.pix_to_face)
    grad = torch.autograd.grad(total, world, retain_graph=True)[0]
    theirs = torch.from_numpy(case[f"grad_{what}"])
    keep = ~clamped(case, faces, ndc, seen)
    assert (~keep).sum() <= 10
    gate = (1e-4 if what == "zbuf" else 1e-5) if given else 1e-3
    if not given and str(case["mesh"]) == "torture":
        gate = 0.05  # other winners among exact duplicates, see above
    difference = (grad - theirs)[keep].norm() / theirs[keep].norm()
    assert difference <= gate, f"relative difference {difference:.1e}"
    if given:
        assert abs(total.item() - case[f"loss_{what}"]) <= 1e-4 * max(1.0, abs(case[f"loss_{what}"]))


def test_every_gradient_was_there():
    "The gradient tests above return early for keys that a file lacks: count what was compared."
    stored = sum(f"grad_{what}" in load(name)[0] for name in names() for what in ("image", "zbuf", "bary", "dists", "alpha"))
    assert stored >= 80


def test_numpy_route_is_the_same():
    case, faces, _, ndc, seen, _ = load("torture_persp_128_b1.npz")
    ids, depth, bary = raster_numpy(ndc.detach().numpy(), faces.numpy(), tuple(case["image_size"].tolist()), perspective_correct=True, threads=2)
    assert np.array_equal(ids, seen.pix_to_face[..., 0]) and np.array_equal(depth, seen.zbuf.detach()[..., 0]) and np.array_equal(bary, seen.bary.detach()[..., 0, :])


def test_two_sided_faces_one_by_one():
    case, faces, _, ndc, _, _ = load("torture_persp_cull_64_b2.npz")
    points, size = ndc.detach().numpy(), tuple(case["image_size"].tolist())
    everything, none = (raster_numpy(points, faces.numpy(), size, cull_backfaces=c)[0] for c in (False, True))
    flags = np.arange(len(faces)) % 2 == 0
    some = raster_numpy(points, faces.numpy(), size, cull_backfaces=flags)[0]
    assert np.array_equal(raster_numpy(points, faces.numpy(), size, cull_backfaces=np.ones(len(faces), bool))[0], none)
    backs = set(np.unique(everything)) - set(np.unique(none)) - {-1}
    assert any(flags[f] for f in backs) and not any(flags[f] for f in set(np.unique(some)) & backs)


# ---- the twin


def soup(seed, faces=12, batch=1, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    verts = torch.rand(batch, 3 * faces, 3, generator=gen, dtype=torch.float64) * 2 - 1
    verts[..., :2] *= 1.2
    verts[..., 2] = 1.5 + verts[..., 2] * 0.7
    return verts.to(dtype), torch.arange(3 * faces).view(-1, 3)


CASES = {
    "hard": {},
    "perspective": {"perspective_correct": True},
    "culled": {"cull_backfaces": True, "perspective_correct": True},
    "four": {"faces_per_pixel": 4},
    "soft": {"faces_per_pixel": 6, "blur_radius": 0.02},
    "soft perspective": {"faces_per_pixel": 5, "blur_radius": 0.01, "perspective_correct": True},
    "soft unclipped": {"faces_per_pixel": 3, "blur_radius": 0.01, "clip_barycentric": False},
}


def by_twin(verts, faces, size, how):
    return twin(
        verts[0], faces, size, how.get("faces_per_pixel", 1), how.get("blur_radius", 0.0), how.get("perspective_correct", False),
        how.get("clip_barycentric"), how.get("cull_backfaces", False),
    )  # fmt: skip


@pytest.mark.parametrize("how", CASES.values(), ids=CASES)
@pytest.mark.parametrize("size", [(17, 17), (12, 20), (21, 10)], ids=str)
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_equals_the_twin(backend, size, how):
    verts, faces = soup(5)
    verts.requires_grad_()
    slow = by_twin(verts, faces, size, how)
    weights = [torch.rand(x.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64) - 0.5 for x in slow]
    reference = torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights[1:], slow[1:])), verts)[0]
    fast_verts = verts.detach().to(torch.float32 if backend == "numba" else torch.float64).requires_grad_()
    fast = rasterize(fast_verts, faces, size, backend=backend, **how)
    assert torch.equal(fast.pix_to_face[0], slow[0]) and (slow[0] >= 0).any()
    for x, y in zip(fast[1:], slow[1:]):
        assert torch.allclose(x[0].double(), y, atol=2e-4, rtol=1e-4)
    grad = torch.autograd.grad(sum((w.to(x.dtype) * x[0]).sum() for w, x in zip(weights[1:], fast[1:])), fast_verts)[0]
    assert (grad.double() - reference).norm() <= 2e-4 * reference.norm()


@pytest.mark.parametrize("how", [CASES["perspective"], CASES["soft perspective"], CASES["four"]], ids=["perspective", "soft", "four"])
def test_gradcheck_of_the_twin(how):
    verts, faces = soup(8, faces=3)
    assert torch.autograd.gradcheck(lambda v: by_twin(v, faces, (4, 5), how)[1:], verts.requires_grad_(), fast_mode=True)


def test_gradcheck_of_normals_and_light():
    verts, faces = soup(3, faces=5)
    faces = torch.tensor([[0, 1, 2], [1, 3, 2], [3, 4, 2], [0, 2, 4]])
    seen = rasterize(verts[:, :5], faces, (6, 6), backend="torch")
    gen = torch.Generator().manual_seed(0)
    albedo, light = (torch.rand(*s, generator=gen, dtype=torch.float64).requires_grad_() for s in ((1, 5, 3), (1, 3, 9)))

    def picture(v, bary, a, s):
        return lit_pixels(seen._replace(bary=bary), vertex_normals(v, faces), a, s, faces)

    assert (seen.pix_to_face >= 0).sum() > 4
    assert torch.autograd.gradcheck(picture, (verts[:, :5].clone().requires_grad_(), seen.bary.clone().requires_grad_(), albedo, light))


def test_near_plane_equals_a_finely_cut_mesh():
    "A triangle through the eye, z_clip on: the same depth as the part in front, rasterised on its own."
    verts = torch.tensor([[[0.6, -0.6, 2.0], [0.5, 0.7, 2.0], [-0.8, 0.1, 0.6]]])
    whole = rasterize(verts, torch.tensor([[0, 1, 2]]), 40, perspective_correct=True)
    cut = rasterize(verts, torch.tensor([[0, 1, 2]]), 40, perspective_correct=True, z_clip=1.0)
    kept = (whole.pix_to_face >= 0) & (whole.zbuf > 1.001)
    assert kept.any() and (cut.pix_to_face[kept] == 0).float().mean() > 0.98 and not (cut.pix_to_face[whole.zbuf.le(0.999)] == 0).any()
    both = kept & (cut.pix_to_face == 0)
    assert torch.allclose(cut.zbuf[both], whole.zbuf[both], atol=1e-5) and torch.allclose(cut.bary[both], whole.bary[both], atol=1e-5)


# ---- what else may come


def test_batch_is_one_by_one():
    verts, faces = soup(2, batch=3, dtype=torch.float32)
    together = rasterize(verts, faces, 32)
    for n in range(3):
        for all_of, one in zip(together, rasterize(verts[n : n + 1], faces, 32)):
            assert torch.equal(all_of[n], one[0])


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_nothing_to_see(backend):
    verts, faces = soup(2, dtype=torch.float32)
    behind = verts.clone()
    behind[..., 2] = -1
    for points, triangles in ((behind, faces), (verts, faces[:0]), (verts * torch.nan, faces), (verts + 9, faces), (verts * torch.inf, faces)):
        seen = rasterize(points, triangles, (5, 9), backend=backend)
        assert seen.pix_to_face.max() == -1 and seen.zbuf.max() == -1 and seen.bary.max() == -1
        assert interpolate(seen, torch.ones(1, 36, 2), triangles).abs().max() == 0


@pytest.mark.parametrize("size", [1, (1, 7), (7, 1), (2, 300)], ids=str)
def test_odd_sizes(size):
    verts, faces = soup(4, dtype=torch.float32)
    a, b = (rasterize(verts, faces, size, backend=name) for name in ("numba", "torch"))
    assert torch.equal(a.pix_to_face, b.pix_to_face)


def test_unwritable_and_strided_inputs():
    verts, faces = soup(4, dtype=torch.float32)
    points = verts.numpy()[0].copy()
    reference = raster_numpy(points, faces.numpy(), 20)[0]
    points.setflags(write=False)
    assert np.array_equal(raster_numpy(points, faces.numpy(), 20)[0], reference)
    assert np.array_equal(raster_numpy(np.asfortranarray(points), faces.numpy()[:, ::1], 20)[0], reference)
    assert np.array_equal(raster_numpy(points.astype(np.float64), faces.numpy().astype(np.uint16), 20)[0], reference)


@pytest.mark.parametrize(
    "change",
    [
        {"verts_ndc": torch.zeros(4, 3)}, {"verts_ndc": torch.zeros(1, 4, 2)}, {"verts_ndc": torch.zeros(1, 4, 3, dtype=torch.int64)},
        {"faces": torch.tensor([[0, 1, 36]])}, {"faces": torch.tensor([[0, -1, 2]])}, {"faces": torch.tensor([[0.0, 1, 2]])}, {"faces": torch.tensor([0, 1, 2])},
        {"size": 0}, {"size": (4, -1)}, {"faces_per_pixel": 0}, {"backend": "opengl"}, {"backend": "triton"},
    ],
    ids=str,
)  # fmt: skip
def test_bad_input(change):
    verts, faces = soup(2, dtype=torch.float32)
    call = {"verts_ndc": verts, "faces": faces, "size": 8} | change
    with pytest.raises(InputError):
        rasterize(call.pop("verts_ndc"), call.pop("faces"), call.pop("size"), **call)


def test_fragments_of_another_mesh():
    verts, faces = soup(2, dtype=torch.float32)
    seen = rasterize(verts, faces, 16)
    with pytest.raises(InputError):
        interpolate(seen, torch.zeros(1, 36, 1), faces[:1])
    with pytest.raises(InputError):
        interpolate(seen._replace(bary=seen.bary[:, :3]), torch.zeros(1, 36, 1), faces)


def test_the_path_of_other_devices(monkeypatch):
    "What runs on a GPU is plain torch: forced on CPU tensors in single precision, against the compiled loops."
    module = importlib.import_module("facelab.face.interpolate")
    verts, _ = soup(3, faces=20, batch=2, dtype=torch.float32)
    faces = torch.stack([torch.randperm(60, generator=torch.Generator().manual_seed(n))[:3] for n in range(80)])
    seen = rasterize(verts, faces, 40)
    gen = torch.Generator().manual_seed(0)
    leaves = [x.requires_grad_() for x in (verts, seen.bary.clone(), torch.rand(1, 60, 3, generator=gen), torch.rand(1, 3, 9, generator=gen), torch.rand(2, 80, 3, 5, generator=gen))]

    def everything():
        points, bary, albedo, light, corners = leaves
        normals = vertex_normals(points, faces)
        near = seen._replace(bary=bary)
        outs = [normals, interpolate(near, points, faces), interpolate(near, corners, faces), lit_pixels(near, normals, albedo, light, faces)]
        loss = sum((x * torch.sin(torch.arange(x.numel())).view_as(x)).sum() for x in outs)
        return outs + list(torch.autograd.grad(loss, leaves))

    compiled = everything()
    monkeypatch.setattr(module, "_compiled", lambda *tensors: False)
    for ours, plain in zip(compiled, everything()):
        assert (ours - plain).norm() <= 2e-5 * plain.norm()


@pytest.mark.parametrize("how", [{}, {"perspective_correct": True}, {"z_clip": 1.5}, {"faces_per_pixel": 3, "blur_radius": 1e-3}], ids=["hard", "perspective", "clipped", "soft"])
def test_distances_that_nobody_asks_for_change_nothing_else(how):
    gen = torch.Generator().manual_seed(5)
    verts = torch.cat([torch.rand(2, 30, 2, generator=gen) * 2 - 1, 1 + torch.rand(2, 30, 1, generator=gen)], -1).requires_grad_()
    faces = torch.arange(30).view(10, 3)
    seen, bare = rasterize(verts, faces, 24, **how), rasterize(verts, faces, 24, distances=False, **how)
    assert all(torch.equal(a, b) for a, b in zip(seen[:3], bare[:3])) and bare.dists.shape == seen.dists.shape
    assert torch.equal(bare.dists, seen.dists) if "blur_radius" in how else bool(bare.dists.isnan().all() and seen.dists.isfinite().all())
    assert torch.equal(*(torch.autograd.grad(one.zbuf.sum() + one.bary.square().sum(), verts)[0] for one in (seen, bare)))
