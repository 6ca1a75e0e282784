"The coarse copy of a face model: the same codes and landmarks, the same surface, nearly the same picture."

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import coarse_digest
import pytest
import torch
from fixture_files import fixture
from make_models import NAMED, write_bfm2009, write_bfm2017
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from facelab.face.bfm import from_bfm2009, from_bfm2017
from facelab.face.coarse import coarse, fair, half_edges, removable
from facelab.face.code import FaceCode
from facelab.face.fit import see
from facelab.face.ict import from_ict
from facelab.face.morphable import REGION_NAMES, MorphableModel
from facelab.lab.errors import InputError


def surface(model) -> tuple[int, int, list[tuple[int, int]]]:
    "The busiest edge, the busiest directed edge, and of each part its Euler characteristic and number of border loops."
    faces, v = model.faces.numpy(), model.num_verts
    ways = faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)
    edges, busy = np.unique(np.sort(ways, 1), axis=0, return_counts=True)
    graph = lambda pairs: connected_components(csr_array((np.ones(len(pairs)), pairs.T), shape=(v, v)), directed=False)
    count, part = graph(edges)
    used = np.bincount(faces.ravel(), minlength=v) > 0
    euler = np.bincount(part[used], minlength=count) - np.bincount(part[edges[:, 0]], minlength=count) + np.bincount(part[faces[:, 0]], minlength=count)
    border = edges[busy == 1]
    _, loop = graph(border)
    on_border = np.unique(border)
    loops = np.bincount(part[on_border[np.unique(loop[on_border], return_index=True)[1]]], minlength=count)
    has = np.bincount(part[used], minlength=count) > 0
    return int(busy.max()), int(np.unique(ways, axis=0, return_counts=True)[1].max()), sorted(zip(euler[has].tolist(), loops[has].tolist()))


def faces_of(model, number: int, seed: int = 0) -> FaceCode:
    draw = torch.Generator().manual_seed(seed)
    some = lambda *shape: torch.randn(*shape, generator=draw)
    code = FaceCode.zeros(number, model.dims)
    exp = 0.7 * some(number, model.num_exp) if "exp_code" not in model.info else 0.2 * torch.rand(number, model.num_exp, generator=draw)
    return replace(code, shape=0.8 * some(number, model.num_shape), exp=exp, tex=0.8 * some(number, model.num_tex), light=0.1 * some(*code.light.shape), camera=some(number, 6) * torch.tensor([0.1, 0.3, 0.08, 0.02, 0.02, 0.05]))


def check(model, small, vertices: int, colour: float, outline: float = 0.985):
    "All that holds for every model."
    rows = small.info["vertex_ids"]
    assert small.num_verts == vertices == len(rows) and small.dims == model.dims and bool((rows.diff() > 0).all())
    for key in ("mean", "shape_basis", "exp_basis", "tex_mean", "tex_basis"):
        assert torch.equal(getattr(small, key), getattr(model, key)[rows]), key
    assert surface(small) == surface(model)
    assert torch.equal(small.faces.unique(), torch.arange(vertices))
    code = faces_of(model, 4)
    with torch.no_grad():
        (full, _, points), (less, _, same) = see(model, code, 64), see(small, code, 64)
    assert (points - same).abs().max() < 1e-4
    a, b = full.alpha > 0.5, less.alpha > 0.5
    assert (a & b).sum() > outline * (a | b).sum()
    assert 255 * (full.image - less.image).abs().mean(1, keepdim=True)[a & b].mean() < colour


def test_procedural():
    model = MorphableModel.procedural()
    small = coarse(model, 1600)
    check(model, small, 1600, 3.5, 0.99)
    assert coarse(model, 1600) is small and coarse(model, 1599) is not small and len(surface(small)[2]) == 7
    assert torch.equal(small.info["part_ids"], model.info["part_ids"][small.info["vertex_ids"]])
    assert all(len(field) == 1600 for field in small.info["blendshapes"].values())


@pytest.mark.parametrize("vertices", [200, 800, 3000, 7749])
def test_other_counts(vertices):
    model = MorphableModel.procedural()
    small = coarse(model, vertices)
    assert small.num_verts == vertices and surface(small) == surface(model)
    assert torch.equal(small.landmarks(small.mean[None]), model.landmarks(model.mean[None]))
    if vertices == model.num_verts:
        assert torch.equal(small.faces, model.faces) and torch.equal(small.uv[small.uv_faces], model.uv[model.uv_faces])


def test_faces_look_outwards():
    "Normals agree with those of the full head at the same vertices, nearly everywhere outside the ears and the mouth."
    from facelab.face.interpolate import vertex_normals

    model = MorphableModel.procedural()
    small = coarse(model, 1600)
    rows = small.info["vertex_ids"]
    dot = (vertex_normals(model.mean[None], model.faces)[0, rows] * vertex_normals(small.mean[None], small.faces)[0]).sum(1)
    seen = ~(small.regions["left_ear"] | small.regions["right_ear"] | small.regions["inner_mouth"])
    assert (dot[seen] > 0.8).float().mean() > 0.97 and (dot > 0).float().mean() > 0.99


def test_regions_and_uv_stay_where_they_were():
    model = MorphableModel.procedural()
    small = coarse(model, 1600)
    size = lambda x, faces: 0.5 * torch.linalg.cross(x[faces[:, 1]] - x[faces[:, 0]], x[faces[:, 2]] - x[faces[:, 0]]).norm(dim=1)
    for n in ("upper_lip", "lower_lip", "nose", "left_eye_region", "right_eye_region", "left_eyebrow", "right_eyebrow", "left_eyeball", "right_eyeball"):
        k = REGION_NAMES.index(n)
        before, after = (size(m.mean, m.faces)[m.region_ids == k].sum() for m in (model, small))
        assert 0.85 < after / before < 1.1, n
        assert torch.equal(small.regions[n], model.regions[n][small.info["vertex_ids"]])
        assert torch.isin(small.faces[small.region_ids == k].unique(), torch.nonzero(small.regions[n])[:, 0]).all(), n
    pairs = lambda m, number: {(int(number[v]), *map(float, m.uv[u])) for v, u in zip(m.faces.flatten(), m.uv_faces.flatten())}
    assert pairs(small, small.info["vertex_ids"]) <= pairs(model, torch.arange(model.num_verts))
    flat = lambda m: torch.nn.functional.pad(m.uv, (0, 1))
    assert abs(size(flat(small), small.uv_faces).sum() / size(flat(model), model.uv_faces).sum() - 1) < 0.1  # no triangle across a seam


def test_eyes_are_not_covered():
    "Eyeballs take as many pixels of the mean face as before."
    model = MorphableModel.procedural()
    small = coarse(model, 1600)
    white = lambda m: replace(m, tex_mean=(m.regions["left_eyeball"] | m.regions["right_eyeball"]).float()[:, None].expand(-1, 3).contiguous(), tex_basis=m.tex_basis[..., :0])
    full, less = (see(white(m), FaceCode.zeros(1, white(m).dims), 256, lit=False)[0].image[0, 0] > 0.5 for m in (model, small))
    assert full.sum() > 100 and (full & less).sum() > 0.85 * (full | less).sum()


def test_barycentric_landmarks():
    model = MorphableModel.procedural()
    draw = torch.Generator().manual_seed(0)
    weights = torch.rand(68, 3, generator=draw)
    around = torch.stack([torch.nonzero((model.faces == vertex).any(1))[0, 0] for vertex in model.landmarks68])
    model = replace(model, landmarks68=(around, weights / weights.sum(1, keepdim=True)))
    small = coarse(model, 1600)
    check(model, small, 1600, 3.5)
    assert torch.equal(small.info["vertex_ids"][small.faces[small.landmarks68[0]]], model.faces[around])


@pytest.mark.parametrize("name", ["ict_face9409.npz", "ict_facekit.npz"])
def test_ict(name):
    model = from_ict(fixture(f"ict/{name}"), albedo=MorphableModel.procedural())
    small = coarse(model, 1600)
    check(model, small, 1600, 4.5, 0.98)
    assert all(len(inside) == 1600 for inside in small.regions.values())


def test_bfm2017_layout(tmp_path):
    model = from_bfm2017(write_bfm2017(MorphableModel.procedural(), tmp_path / "head.h5", landmarks68=True))
    small = coarse(model, 1600)
    check(model, small, 1600, 3.5)
    assert set(small.info["named"]) == set(NAMED)
    assert all(small.info["vertex_ids"][small.info["named"][name]] == vertex for name, vertex in model.info["named"].items())


def test_bfm2009_layout(tmp_path):
    model = from_bfm2009(write_bfm2009(MorphableModel.procedural(), tmp_path / "BFM_model_front.mat"))
    small = coarse(model, 1600)
    check(model, small, 1600, 3.5)
    front = small.info["front_faces"]
    assert 0 < len(front) < len(small.faces) and small.regions["front"][front].all()


def test_no_landmarks_no_regions():
    model = replace(MorphableModel.procedural(), landmarks68=None, region_ids=None, uv=None, uv_faces=None)
    small = coarse(model, 500)
    assert small.num_verts == 500 and small.landmarks68 is None and small.uv is None and small.region_ids is None and surface(small) == surface(model)


def test_unused_vertices_go_first():
    model = MorphableModel.procedural()
    pad = lambda x: torch.cat([x, x[:10]])
    more = replace(model, **{key: pad(getattr(model, key)) for key in ("mean", "shape_basis", "exp_basis", "tex_mean", "tex_basis")}, regions={}, info={})
    small = coarse(more, 7000)
    assert small.num_verts == 7000 and small.info["vertex_ids"].max() < model.num_verts
    assert coarse(more, more.num_verts).num_verts == model.num_verts


def test_a_tube_is_not_pinched():
    "Three rings of three points, open at both ends: no two points of one ring may meet, though their edge has two triangles."
    ring = lambda r, k: 3 * r + k % 3
    faces = np.array([tri for r in (0, 1) for k in range(3) for tri in ((ring(r, k), ring(r, k + 1), ring(r + 1, k)), (ring(r, k + 1), ring(r + 1, k + 1), ring(r + 1, k)))])
    half = half_edges(faces, faces, faces, 9)
    ok = removable(half, faces, np.zeros(9, bool))
    assert not ok[half.u // 3 == half.v // 3].any()
    assert {(int(u) // 3, int(v) // 3) for u, v in zip(half.u[ok], half.v[ok])} == {(1, 0), (1, 2)}


def test_no_fold_and_no_splinter():
    faces = np.array([[0, 1, 4], [1, 2, 4], [2, 3, 4], [3, 0, 4]])
    centre, to = np.full(4, 4), np.arange(4)
    points = np.array([[0.0, 0, 0], [4, 0, 0], [4, 4, 0], [0, 4, 0], [2, 2, 0]])
    assert fair(centre, to, faces, points).all()
    points[2], points[4] = (1.5, 1.5, 0), (0.7, 0.7, 0)  # a dent past the diagonal: drawn to 1 or 3 a triangle turns over
    assert fair(centre, to, faces, points).tolist() == [True, False, True, False]
    points[2], points[4] = (2.05, 2.05, 0), (1.0, 1.0, 0)  # nearly on the diagonal: a splinter
    assert fair(centre, to, faces, points).tolist() == [True, False, True, False]


def test_gradients_reach_the_code():
    model = coarse(MorphableModel.procedural(), 1600)
    code = FaceCode.zeros(2, model.dims).pack().requires_grad_()
    see(model, FaceCode.unpack(code, model.dims), 64)[0].image.square().mean().backward()
    assert torch.isfinite(code.grad).all() and (code.grad.abs().sum(0) > 0).float().mean() > 0.9


def test_same_bytes_each_time():
    here = coarse_digest.digest()
    out = subprocess.run([sys.executable, coarse_digest.__file__], capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "3", "PYTHONHASHSEED": "7"})
    assert out.stdout.strip() == here


def test_refused():
    model = MorphableModel.procedural()
    for vertices in (-1, 0, 199, 7750):
        with pytest.raises(InputError, match=f"{vertices} vertices; needed 200 to 7749"):
            coarse(model, vertices)
    with pytest.raises(InputError, match="or more for this mesh"):
        coarse(replace(model, region_ids=torch.arange(len(model.faces)) % 19), 1600)
