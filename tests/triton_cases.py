"""Run the Triton kernels in their interpreter beside the compiled engine, and print what differs as JSON: `TRITON_INTERPRET=1 python triton_cases.py`."""

import json

import torch

from facelab.face.raster import rasterize
from facelab.lab.errors import InputError


def soup(seed, faces=8, batch=1):
    "Triangles at random, with an exact duplicate, a flipped one, a sliver and a tie in depth."
    gen = torch.Generator().manual_seed(seed)
    verts = torch.rand(batch, 3 * faces, 3, generator=gen) * 2.4 - 1.2
    verts[..., 2] = 1.5 + verts[..., 2] * 0.7
    verts[:, 3:9, 2] = 1.25
    table = torch.arange(3 * faces).view(-1, 3)
    return verts, torch.cat([table, table[:1], table[1:2].flip(1), torch.tensor([[0, 0, 1]])])


HOW = {
    "hard": {},
    "perspective": {"perspective_correct": True},
    "culled": {"cull_backfaces": True, "perspective_correct": True},
    "clipped": {"clip_barycentric": True, "perspective_correct": True},
    "four": {"faces_per_pixel": 4},
    "soft": {"faces_per_pixel": 6, "blur_radius": 0.02},
    "soft perspective": {"faces_per_pixel": 5, "blur_radius": 0.01, "perspective_correct": True},
    "soft unclipped": {"faces_per_pixel": 3, "blur_radius": 0.01, "clip_barycentric": False},
    "near plane": {"perspective_correct": True, "z_clip": 1.4},
    "near plane, soft": {"faces_per_pixel": 3, "blur_radius": 0.01, "perspective_correct": True, "z_clip": 1.4},
}


def reading(backend, verts, faces, size, dtype=torch.float32, **how):
    verts = verts.to(dtype).clone().requires_grad_()
    out = rasterize(verts, faces, size, backend=backend, **how)
    weight = lambda x: torch.sin(torch.arange(x.numel(), dtype=x.dtype)).view_as(x)
    loss = sum((weight(x) * x).sum() for x in out[1:])
    return out, torch.autograd.grad(loss, verts)[0] if loss.requires_grad else torch.zeros_like(verts)


def compare(verts, faces, size, **how):
    (ours, slope), (theirs, reference) = (reading(name, verts, faces, size, **how) for name in ("triton", "numba"))
    worst = [float((a - b).detach().abs().max()) if a.numel() else 0.0 for a, b in zip(ours[1:], theirs[1:])]
    return {
        "wrong": int((ours.pix_to_face != theirs.pix_to_face).sum()), "covered": int((theirs.pix_to_face >= 0).sum()), "worst": max(worst),
        "slope": float((slope - reference).norm() / reference.norm().clamp_min(1e-12)), "dtype": str(slope.dtype),
    }  # fmt: skip


def surface(seed, batch=2, shared=False, channels=5):
    "Differences of the surface kernels from the compiled loops: values, then gradients, relative."
    from facelab.face.interpolate import HARMONIC_FACTORS, interpolate, lit_pixels
    from facelab.face.surface_triton import interpolate_triton, lit_triton

    verts, faces = soup(seed, batch=batch)
    seen = rasterize(verts, faces, (19, 14), faces_per_pixel=2)
    gen, rows = torch.Generator().manual_seed(seed), 1 if shared else batch
    draw = lambda *shape: torch.randn(*shape, generator=gen)
    table, normals, albedo, light, bary = draw(rows, 24, channels), draw(batch, 24, 3), draw(rows, 24, 3), draw(batch, 3, 9), seen.bary
    normals[:, :6] = 0  # no direction
    flat, factors = seen.pix_to_face.reshape(batch, -1), torch.tensor(HARMONIC_FACTORS)
    pairs = [
        (lambda b, t: interpolate(seen._replace(bary=b), t, faces).reshape(batch, -1, channels), lambda b, t: interpolate_triton(flat, b.reshape(batch, -1, 3), t, faces), (bary, table)),
        (lambda b, n, a, l: lit_pixels(seen._replace(bary=b), n, a, l, faces), lambda b, n, a, l: lit_triton(seen.pix_to_face[..., 0], b[..., 0, :], n, a, l * factors, faces), (bary, normals, albedo, light)),
    ]
    found = []
    for reference, ours, given in pairs:
        told = []
        for call in (reference, ours):
            leaves = [x.clone().requires_grad_() for x in given]
            out = call(*leaves)
            told.append([out.detach(), *torch.autograd.grad((out * torch.cos(torch.arange(out.numel())).view_as(out)).sum(), leaves)])
        found += [float((a - b).norm() / a.norm()) for a, b in zip(*told)]
    return {"covered": int((seen.pix_to_face >= 0).sum()), "values": [found[0], found[3]], "slopes": [*found[1:3], *found[4:]]}


def main():
    out = {name: compare(*soup(5), (17, 18 if name in ("hard", "soft perspective") else 16), **how) for name, how in HOW.items()}  # four tiles, or two
    out["batch"] = compare(*soup(6, faces=8, batch=3), (9, 17))
    out["double"] = compare(*soup(7), 12, dtype=torch.float64)
    for size in ((1, 1), (33, 2)):
        out[f"size {size}"] = compare(*soup(4), size)
    verts, faces = soup(2)
    behind = verts * torch.tensor([1.0, 1, -1])
    for name, points, table in (("behind", behind, faces), ("no faces", verts, faces[:0]), ("nan", verts * torch.nan, faces), ("inf", verts * torch.inf, faces), ("aside", verts + 9, faces)):
        out[name] = compare(points, table, (5, 9))
    out["surface"], out["surface, shared"] = surface(3), surface(8, batch=3, shared=True, channels=1)
    try:
        rasterize(verts, faces + 1, 8, backend="triton")
        out["refused"] = False
    except InputError:
        out["refused"] = True
    out["auto on the CPU"] = rasterize(verts, faces, 8)[1].grad_fn is None
    print(json.dumps(out))


if __name__ == "__main__":
    main()
