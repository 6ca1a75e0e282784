"""PyTorch3D and Warp behind the seam: what a user meets without them, and the comparison where they are."""

import sys
from types import ModuleType

import pytest
import torch
from test_raster import CASES, soup

from facelab.face import raster
from facelab.face.raster import rasterize
from facelab.lab.errors import InputError


@pytest.fixture
def without(monkeypatch):
    "As on a machine that has neither."
    for name in ("pytorch3d", "warp"):
        monkeypatch.setitem(sys.modules, name, None)
    raster.available.cache_clear()
    monkeypatch.setattr(raster.importlib.util, "find_spec", lambda name, real=raster.importlib.util.find_spec: None if name in ("pytorch3d", "warp") else real(name))
    yield
    monkeypatch.undo()
    raster.available.cache_clear()


@pytest.mark.parametrize("name, advice", [("pytorch3d", "README"), ("warp", "warp-lang")])
def test_missing(without, name, advice):
    verts, faces = soup(2, dtype=torch.float32)
    assert name not in raster.available()
    with pytest.raises(InputError, match=advice):
        rasterize(verts, faces, 8, backend=name)


@pytest.mark.parametrize("name", ["pytorch3d", "warp"])
def test_broken_install(monkeypatch, name):
    "The package is there and cannot be imported: still one error with the reason."
    import facelab.face.raster_pytorch3d as others

    broken = ModuleType(name)
    broken.__path__ = []
    monkeypatch.setitem(sys.modules, name, broken if name == "pytorch3d" else None)
    verts, faces = soup(2, dtype=torch.float32)
    with pytest.raises(InputError, match=name):
        getattr(others, f"raster_{name}")(verts, faces, raster.Settings(8, 8))


@pytest.mark.parametrize("how", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", ["pytorch3d", "warp"])
def test_equals_ours(name, how):
    pytest.importorskip(name, reason=f"{name} is not installed here")
    verts, faces = soup(5, dtype=torch.float32, batch=2)
    if name == "warp" and not how.keys() <= {"perspective_correct", "cull_backfaces"}:
        with pytest.raises(InputError, match="one face a pixel"):
            rasterize(verts, faces, 8, backend=name, **how)
        return
    got = []
    for backend in (name, "numba"):
        leaf = verts.clone().requires_grad_()
        seen = rasterize(leaf, faces, (40, 30), backend=backend, **how)
        loss = sum((torch.sin(torch.arange(x.numel())).view_as(x) * x).sum() for x in seen[1:])
        got.append((seen, torch.autograd.grad(loss, leaf)[0]))
    (theirs, slope), (ours, reference) = got
    assert torch.equal(theirs.pix_to_face, ours.pix_to_face) and (ours.pix_to_face >= 0).sum() > 100
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(theirs[1:], ours[1:]))
    assert (slope - reference).norm() <= 1e-4 * reference.norm()


@pytest.mark.parametrize("name", ["pytorch3d", "warp"])
def test_near_plane(name):
    pytest.importorskip(name, reason=f"{name} is not installed here")
    verts, faces = soup(5, dtype=torch.float32)
    a, b = (rasterize(verts, faces, 40, perspective_correct=True, z_clip=1.4, backend=backend) for backend in (name, "numba"))
    assert torch.equal(a.pix_to_face, b.pix_to_face) and torch.allclose(a.zbuf, b.zbuf, atol=1e-5)
