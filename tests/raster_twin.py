"""A rasteriser to read: one face after the other over all pixels, autograd for the gradients. Slow; it shares no code with facelab.

Also here: the cameras, the picture and the losses of fixtures/raster/README.md, from their formulae.
"""

import math

import numpy as np
import torch

EPS = 1e-8


def cross2(p, a, b):
    "(p - a) x (b - a) in the plane, for p (..., 2) and single points a, b."
    return (p[..., 0] - a[0]) * (b[1] - a[1]) - (p[..., 1] - a[1]) * (b[0] - a[0])


def to_segment(p, a, b):
    "Squared distance of points to one segment."
    along = b - a
    if float((along @ along).detach()) <= EPS:
        return ((p - b) ** 2).sum(-1)
    t = (((p - a) @ along) / (along @ along)).clamp(0, 1)
    return ((p - a - t[..., None] * along) ** 2).sum(-1)


def pixel_grid(height, width, dtype):
    "NDC of pixel centres (h, w, 2): x to the left, y up, the short side from -1 to 1."
    u, v = max(width / height, 1.0), max(height / width, 1.0)
    x = u * (1 - (2 * torch.arange(width, dtype=dtype) + 1) / width)
    y = v * (1 - (2 * torch.arange(height, dtype=dtype) + 1) / height)
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1)


def twin(verts, faces, size, k=1, blur=0.0, perspective=False, clip=None, cull=False):
    "ids, zbuf, bary, dists (h, w, k ...) of one image; verts (v, 3)."
    grid = pixel_grid(*size, verts.dtype)
    clip = blur > 0 if clip is None else clip
    depths, weights, dists = [], [], []
    for face in faces.tolist():
        a, b, c = verts[face]
        area = cross2(c[:2], a[:2], b[:2])
        signed, nearest = float(area.detach()), float(verts.detach()[face, 2].min())
        bad = abs(signed) <= EPS or nearest < EPS or (cull and signed < 0)
        w = [cross2(grid, b[:2], c[:2]), cross2(grid, c[:2], a[:2]), cross2(grid, a[:2], b[:2])]
        w = torch.stack(w, -1) / (area + EPS)
        if perspective:
            w = w * torch.stack([b[2] * c[2], a[2] * c[2], a[2] * b[2]])
            w = w / w.sum(-1, keepdim=True).clamp(min=EPS)
        inside = (w > 0).all(-1)
        if clip:
            w = w.clamp(min=0) / w.clamp(min=0).sum(-1, keepdim=True).clamp(min=1e-5)
        z = w @ torch.stack([a[2], b[2], c[2]])
        d = torch.stack([to_segment(grid, a[:2], b[:2]), to_segment(grid, a[:2], c[:2]), to_segment(grid, b[:2], c[:2])]).min(0).values
        seen = (inside | (d < blur)) & (z >= 0) & (not bad)
        depths.append(torch.where(seen, z, torch.inf))
        weights.append(w)
        dists.append(torch.where(inside, -d, d))
    depths, weights, dists = torch.stack(depths, -1), torch.stack(weights, -2), torch.stack(dists, -1)
    order = torch.sort(depths.detach(), dim=-1, stable=True).indices[..., :k]
    z, d = torch.gather(depths, -1, order), torch.gather(dists, -1, order)
    w = torch.gather(weights, -2, order[..., None].expand(*order.shape, 3))
    hit = z < torch.inf
    none = torch.full_like(z, -1)
    return torch.where(hit, order, -1), torch.where(hit, z, none), torch.where(hit[..., None], w, -torch.ones_like(w)), torch.where(hit, d, none)


# ---- the fixtures' own formulae


def project(case, verts):
    "World vertices (b, v, 3) to NDC and depth, by the camera of a fixture file."
    get = lambda name: torch.as_tensor(case[name]).to(verts)
    view = verts @ get("R") + get("T")[:, None]
    kind, (height, width) = str(case["camera"]), [int(s) for s in case["image_size"]]
    xy, z = view[..., :2], view[..., 2:]
    if kind in ("persp", "persp_screen", "ortho"):
        focal, centre = get("cam_focal")[:, None], get("cam_pp")[:, None]
        if kind == "persp_screen":
            short = min(height, width)
            focal, centre = 2 * focal / short, -2 * (centre - torch.tensor([width / 2, height / 2]).to(verts)) / short
        xy = focal * (xy if kind == "ortho" else xy / z) + centre
    elif kind == "fovpersp":
        xy = xy / (z * math.tan(math.radians(float(case["cam_fov"])) / 2))
    else:
        xy = xy / torch.stack([get("cam_hx"), get("cam_hy")], -1).view(-1, 1, 2)
    return torch.cat([xy, z], -1)


def unit(x):
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-6)


def normals(verts, faces):
    a, b, c = (verts[:, faces[:, i]] for i in range(3))
    out = torch.zeros_like(verts)
    for i in range(3):
        out = out.index_add(1, faces[:, i], torch.linalg.cross(b - a, c - a))
    return unit(out)


def lit(case, verts, faces, ids, bary):
    "The picture (b, h, w, 3) of a fixture, from the nearest face and its weights."
    hit = ids[..., 0] >= 0
    corner = faces[ids[..., 0].clamp(min=0)]
    image = torch.arange(len(verts)).view(-1, 1, 1, 1)
    weights = bary[..., 0, :, None]
    n = unit((weights * normals(verts, faces)[image, corner]).sum(-2))
    albedo = (weights * torch.as_tensor(case["albedo"])[corner]).sum(-2)
    x, y, z = n.unbind(-1)
    c0, c1, c2 = 1 / math.sqrt(4 * math.pi), (2 * math.pi / 3) * math.sqrt(3 / (4 * math.pi)), (3 * math.pi / 4) * math.sqrt(5 / (12 * math.pi))
    last = math.pi / 8 * math.sqrt(5 / (4 * math.pi)) * (3 * z * z - 1)
    basis = torch.stack([c0 + 0 * x, c1 * x, c1 * y, c1 * z, c2 * x * y, c2 * x * z, c2 * y * z, c2 / 2 * (x * x - y * y), last], -1)
    return albedo * torch.einsum("bhwj,bjc->bhwc", basis, torch.as_tensor(case["sh"])) * hit[..., None]


def soft_alpha(case, ids, dists):
    return 1 - torch.prod(1 - torch.sigmoid(-dists / float(case["sigma"])) * (ids >= 0), dim=-1)


def weighting(shape, k):
    "The fixed pattern of weights of a loss."
    phase = sum(a * np.arange(n).reshape([-1 if i == j else 1 for j in range(len(shape))]) for i, (a, n) in enumerate(zip((0.9, 0.37, 0.61, 1.3, 1.7), shape)))
    return torch.from_numpy(np.sin(phase + 0.5 * k).astype(np.float32))


def loss(name, value, ids):
    "loss_X of a fixture."
    k = ["image", "zbuf", "bary", "dists", "alpha"].index(name)
    hit = ids >= 0
    mask = {"image": hit[..., :1], "zbuf": hit, "bary": hit[..., None], "dists": hit, "alpha": torch.ones(1)}[name]
    return (value * mask * weighting(value.shape, k)).sum()
