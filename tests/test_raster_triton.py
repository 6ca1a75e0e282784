"""The kernels for GPUs: their logic in Triton's interpreter against the compiled CPU engine, and that they compile for a GPU (no GPU is needed for either)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed here")
HERE = Path(__file__).parent
NAMES = [
    "hard", "perspective", "culled", "clipped", "four", "soft", "soft perspective", "soft unclipped", "near plane", "near plane, soft", "batch", "double",
    "size (1, 1)", "size (33, 2)",
]  # fmt: skip


@pytest.fixture(scope="module")
def told():
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "triton_cases.py"], cwd=HERE, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_compiled_engine(told, name):
    case = told[name]
    assert case["wrong"] == 0 and case["worst"] <= 1e-6, case
    assert case["slope"] <= 1e-5, case
    assert case["covered"] > 20 or name.startswith("size"), case
    assert case["dtype"] == ("torch.float64" if name == "double" else "torch.float32")


@pytest.mark.parametrize("name", ["behind", "no faces", "nan", "inf", "aside"])
def test_nothing_to_see(told, name):
    assert told[name]["covered"] == told[name]["wrong"] == 0 and told[name]["worst"] == 0, told[name]


def test_a_wrong_vertex_number_is_refused(told):
    assert told["refused"] is True


@pytest.mark.parametrize("name", ["surface", "surface, shared"])
def test_surface_kernels_equal_the_compiled_loops(told, name):
    case = told[name]
    assert case["covered"] > 100 and max(case["values"]) <= 2e-6 and max(case["slopes"]) <= 1e-5, case


FLOATS = {name: "*fp32" for name in ("rows", "xs", "ys", "zbuf", "bary", "dists", "grad_z", "grad_bary", "grad_dists", "out", "table", "normals", "albedo", "light", "grad", "to_bary", "to_table", "to_normals", "to_albedo", "to_light")}
TYPES = FLOATS | {
    "members": "*i32", "partner": "*i32", "begin": "*i64", "keys_out": "*i64", "ids": "*i64", "slots": "*i64", "faces": "*i64",
    "stride": "i32", "pixels": "i32", "verts3": "i32", "paint3": "i32", "total": "i32", "height": "i32", "width": "i32", "num_faces": "i32", "grow": "fp32", "blur": "fp32",
}  # fmt: skip
HARD = {"K": 1, "SLOTS": 1, "PERSPECTIVE": False, "CLIP": False, "SOFT": False, "PAIRED": False, "SIDE": 16, "BLOCK": 128}
SOFT = {"K": 6, "SLOTS": 8, "PERSPECTIVE": True, "CLIP": True, "SOFT": True, "PAIRED": True, "SIDE": 16, "BLOCK": 128}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on in this process")
@pytest.mark.parametrize("name", ["paint_tiles", "measure_slots", "corner_grads"])
@pytest.mark.parametrize("flags", [HARD, SOFT], ids=["hard", "soft"])
def test_compiles_for_a_gpu(name, flags):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from facelab.face import raster_triton

    kernel = getattr(raster_triton, name)
    constants = {k: v for k, v in flags.items() if k in kernel.arg_names}
    source = ASTSource(kernel, {k: "constexpr" if k in constants else TYPES[k] for k in kernel.arg_names}, constants)
    made = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": False})
    assert len(made.asm["cubin"]) > 1000 and "fma.rn.f32" not in made.asm["ptx"], "multiply and add stay apart, as on the CPU"
    assert "div.rn.f32" in made.asm["ptx"] or "div.approx" not in made.asm["ptx"], "exact division"


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on in this process")
@pytest.mark.parametrize("name", ["paint_slots", "paint_slots_back", "light_pixels", "light_pixels_back"])
def test_surface_kernel_compiles_for_a_gpu(name):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from facelab.face import surface_triton

    kernel, constants = getattr(surface_triton, name), {"C": 5, "WIDE": 8, "BLOCK": 64, "TABLE": True, "PAINT": True}
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    source = ASTSource(kernel, {k: "constexpr" if k in constants else (TYPES | {"slots": "i32"})[k] for k in kernel.arg_names}, constants)
    assert len(triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": False}).asm["cubin"]) > 1000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu():
    from facelab.face.raster import rasterize
    from triton_cases import HOW, soup

    for how in HOW.values():
        verts, faces = soup(5)
        there, here = (rasterize(verts.to(d), faces.to(d), (210, 340), **how) for d in ("cuda", "cpu"))
        same = there.pix_to_face.cpu() == here.pix_to_face
        assert (~same).float().mean() < 1e-4
        assert all(torch.allclose(a.cpu()[same], b[same], atol=1e-5) for a, b in zip(there[1:], here[1:]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_surface_on_a_gpu():
    from facelab.face.interpolate import interpolate, lit_pixels
    from facelab.face.raster import rasterize
    from triton_cases import soup

    verts, faces = soup(3, batch=2)
    told = []
    for device in ("cpu", "cuda"):
        gen = torch.Generator().manual_seed(0)
        seen = rasterize(verts.to(device), faces.to(device), 24)
        leaves = [torch.randn(2, 24, 3, generator=gen).to(device).requires_grad_() for _ in range(2)] + [torch.randn(2, 3, 9, generator=gen).to(device).requires_grad_()]
        out = interpolate(seen, leaves[0], faces.to(device)).sum() + lit_pixels(seen, *leaves, faces.to(device)).square().sum()
        told.append([out.detach(), *torch.autograd.grad(out, leaves)])
    for a, b in zip(*told):
        assert torch.allclose(a, b.cpu(), rtol=1e-4, atol=1e-4)
