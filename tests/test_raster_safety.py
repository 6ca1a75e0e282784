"""What broke other rasterisers here: forked workers after use, several threads at once, a different number of threads, a folder that cannot be written; sizes and blurs as they come."""

import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from facelab.face.align import warp
from facelab.face.camera import size_pair
from facelab.face.interpolate import lit_pixels, vertex_normals
from facelab.face.raster import rasterize
from facelab.face.raster_kernels import POOL, raster_numpy
from facelab.lab.errors import InputError

ROOT = Path(__file__).parent.parent


def sheet(seed=0, n=60, batch=1):
    "A wavy sheet of 2 n^2 faces."
    gen = torch.Generator().manual_seed(seed)
    x, y = torch.meshgrid(torch.linspace(-1, 1, n + 1), torch.linspace(-1, 1, n + 1), indexing="xy")
    phase = torch.rand(batch, 1, 1, generator=gen) * 6
    z = 2 + 0.3 * torch.sin(5 * x + phase) * torch.cos(4 * y)
    verts = torch.stack([x.expand_as(z) * 0.9 + 0.05 * z, y.expand_as(z) * 0.9, z], -1).reshape(batch, -1, 3)
    i = torch.arange((n + 1) ** 2).view(n + 1, n + 1)
    a, b, c, d = i[:-1, :-1], i[:-1, 1:], i[1:, :-1], i[1:, 1:]
    return verts, torch.cat([torch.stack([a, b, c], -1).view(-1, 3), torch.stack([b, d, c], -1).view(-1, 3)])


def everything(batch=1, size=200, **how):
    "All that has a parallel path, forwards and backwards, as one list of tensors."
    verts, faces = sheet(batch=batch)
    verts.requires_grad_()
    seen = rasterize(verts, faces, size, **how)
    normals = vertex_normals(verts, faces)
    light = torch.linspace(-1, 1, 27).view(1, 3, 9).requires_grad_()
    albedo = torch.linspace(0, 1, verts.shape[1] * 3).view(1, -1, 3).requires_grad_()
    image = lit_pixels(seen, normals, albedo, light, faces)
    loss = (image * torch.sin(torch.arange(image.numel()).view_as(image))).mean() + seen.zbuf.square().mean() + seen.dists.mean()
    return [*seen, normals, image, *torch.autograd.grad(loss, [verts, light, albedo])]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("how", [{}, {"faces_per_pixel": 3, "blur_radius": 1e-4}], ids=["hard", "soft"])
def test_bits_do_not_depend_on_threads(batch, how, threads):
    threads(1)
    reference = everything(batch, **how)
    for count in (2, 3, 5):
        threads(count)
        POOL.reset()
        assert same(everything(batch, **how), reference)
        assert POOL.executor is not None, "several threads were at work"


def test_numpy_bits_do_not_depend_on_threads():
    verts, faces = sheet(batch=2, n=100)
    runs = [raster_numpy(verts.numpy(), faces.numpy(), (300, 200), threads=n) for n in (1, 2, 7)]
    for other in runs[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(runs[0], other, strict=True))


class Pictures(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        verts, faces = sheet(seed=index)
        ids, depth, _ = raster_numpy(verts[0].numpy(), faces.numpy(), 96, threads=2)
        seen = rasterize(verts.requires_grad_(), faces, 96)
        seen.zbuf.sum().backward()
        return torch.from_numpy(ids), torch.from_numpy(depth), verts.grad[0]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_forked_loader_workers_after_use(threads):
    threads(2)
    everything(batch=2)  # the parent's pool is awake before the fork
    assert POOL.executor is not None
    alone = [Pictures()[i] for i in range(8)]
    loader = DataLoader(Pictures(), batch_size=1, num_workers=2, multiprocessing_context="fork", timeout=120)
    for expected, got in zip(alone, loader, strict=True):
        assert all(torch.equal(a, b[0]) for a, b in zip(expected, got, strict=True))


def _child(out, points, faces):
    POOL.lock.acquire(timeout=5)  # would hang for ever if the parent's lock had come along
    POOL.lock.release()
    out.put(checksums(points, faces))


def checksums(points, faces):
    "On the pool's threads, without torch: its own OpenMP threads do not survive a fork (a loader's workers set them to 1)."
    return [float(x.astype(np.float64).sum()) for x in raster_numpy(points, faces, 300, threads=2)]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_fork_while_the_lock_is_held():
    verts, faces = sheet(batch=2)
    points, faces = verts.numpy(), faces.numpy()
    expected = checksums(points, faces)
    assert POOL.executor is not None
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    with POOL.lock:
        child = context.Process(target=_child, args=(out, points, faces), daemon=True)
        child.start()
    assert out.get(timeout=60) == expected
    child.join(30)
    assert child.exitcode == 0


def test_several_threads_at_once(threads):
    threads(2)
    reference = everything(batch=2)
    barrier = threading.Barrier(4)

    def work(_):
        barrier.wait(60)
        return [same(everything(batch=2), reference) for _ in range(3)]

    with ThreadPoolExecutor(4) as pool:
        assert all(all(part) for part in pool.map(work, range(4)))


def test_two_processes_start_together(tmp_path):
    "An empty cache, filled by two processes at a time: both give the same bits."
    code = "import numpy as np; from facelab.face.raster_kernels import raster_numpy as r; print(r(np.array([[1,-1,2],[-1,-1,2],[1,1,2]],'f'), np.array([[0,1,2]]), 8)[0].sum())"
    env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    running = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [p.communicate(timeout=240)[0] for p in running]
    assert [p.returncode for p in running] == [0, 0] and told[0] == told[1] == "-36\n"
    assert any(tmp_path.rglob("*.nbi"))


def test_no_folder_to_cache_in(tmp_path):
    "Read-only package, read-only home: compiled without a cache, with the same answer, and torch is not imported."
    code = (
        "import numba.core.caching as c; (getattr(c, '_CacheImpl', None) or c.CacheImpl)._locator_classes = []\n"
        "import sys, numpy as np; from facelab.face.raster_kernels import raster_numpy as r\n"
        "print(r(np.array([[1,-1,2],[-1,-1,2],[1,1,2]],'f'), np.array([[0,1,2]]), 8)[0].sum(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.stdout == "-36 False\n", done.stderr


@pytest.mark.parametrize("whole", [np.int64, np.int32, int])
def test_a_size_is_any_whole_number(whole):
    verts, faces = torch.tensor([[[-0.5, -0.5, 1.0], [0.5, -0.5, 1.0], [0.0, 0.5, 1.0]]]), torch.tensor([[0, 1, 2]])
    seen = rasterize(verts, faces, whole(9))
    assert seen.pix_to_face.shape == (1, 9, 9, 1) and torch.equal(seen.zbuf, rasterize(verts, faces, (whole(9), whole(9))).zbuf)
    assert warp(torch.rand(1, 3, 8, 8), torch.eye(2, 3)[None], whole(4)).shape == (1, 3, 4, 4) and size_pair(whole(7)) == (7, 7)
    assert raster_numpy(verts[0].numpy(), faces.numpy(), whole(9))[0].shape == (9, 9)


@pytest.mark.parametrize("radius", [-1, -1e-9, float("nan"), float("inf")])
def test_a_blur_is_a_distance(radius):
    with pytest.raises(InputError, match="blur_radius"):
        rasterize(torch.zeros(1, 3, 3), torch.tensor([[0, 1, 2]]), 8, blur_radius=radius)
