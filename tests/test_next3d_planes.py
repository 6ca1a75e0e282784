"Flooding, cutting and pasting of Next3D's planes against slow twins."

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional as F

from facelab.lab.errors import InputError, ShapeError
from facelab.nets.next3d import NEXT3DS, Next3DConfig
from facelab.nets.texture_planes import MeshViews, cut, flooded, merged_alpha, mouth_boxes, paste, texture_views, view_alpha


@pytest.mark.parametrize("share", [0.3, 0.45, 0.6, 0.9])
def test_flood_reaches_what_connected_components_say(share):
    free = torch.from_numpy(np.random.default_rng(int(100 * share)).random((6, 48, 40)) < share)
    free[0, 0, 0], free[1, 0, 0], free[2] = True, False, False
    found = flooded(free)
    for ours, picture in zip(found.numpy(), free.numpy()):
        parts, _ = ndimage.label(picture)
        assert np.array_equal(ours, (parts == parts[0, 0]) & picture & picture[0, 0])


def test_flood_does_not_depend_on_how_often_it_looks():
    free = torch.from_numpy(np.random.default_rng(1).random((4, 64, 64)) < 0.62)
    assert torch.equal(flooded(free, 1), flooded(free, 9))


def test_holes_are_face_and_thin_borders_are_not():
    hit = torch.zeros(1, 4, 16, 16, dtype=torch.bool)
    hit[:, :, 3:13, 3:13] = True
    hit[:, :, 6:9, 6:9] = False  # an open mouth
    views = MeshViews(torch.zeros(1, 4, 16, 16, 2), hit, torch.zeros(1, 12, 2))
    assert view_alpha(torch.ones(8, 8), views)[0, 0].sum() == 100
    half = view_alpha(torch.full((8, 8), 0.5), views)[0, 0]  # a mask of one half is flooded like the background, as by the authors' range
    assert half[4, 4] == 0.5 and half[7, 7] == 0.0


def test_cut_and_paste_are_pytorchs_resizing():
    rng = np.random.default_rng(3)
    plane, patch = torch.randn(12, 2, 64, 64), torch.randn(12, 2, 64, 64)
    low = rng.integers(0, 40, (12, 2))
    side = rng.integers(2, 24, (12, 2))
    boxes = torch.from_numpy(np.stack([low[:, 0], low[:, 0] + side[:, 0], low[:, 1], low[:, 1] + side[:, 1]], 1))
    small, put = cut(plane, boxes, 16), paste(plane, patch, boxes)
    for k, (a, b, c, d) in enumerate(boxes.tolist()):
        how = {"mode": "bilinear", "align_corners": False, "antialias": True}
        assert torch.allclose(small[k], F.interpolate(plane[k : k + 1, :, a:b, c:d], (16, 16), **how)[0], atol=1e-5)
        expected = plane[k].clone()
        expected[:, a:b, c:d] = F.interpolate(patch[k : k + 1], (b - a, d - c), **how)[0]
        assert torch.allclose(put[k], expected, atol=1e-5)


def test_boxes_stay_inside_and_turn_no_mouth_away():
    mouth = torch.randn(50, 12, 2) * 3
    boxes = mouth_boxes(mouth, 32)
    assert (boxes >= 0).all() and (boxes <= 32).all() and (boxes[:, 0] < boxes[:, 1]).all() and (boxes[:, 2] < boxes[:, 3]).all()


def test_gradients_reach_texture_and_planes():
    texture, plane, patch = (torch.randn(1, 2, 8, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    views = MeshViews(torch.rand(1, 4, 8, 8, 2).double() * 2 - 1, torch.ones(1, 4, 8, 8, dtype=torch.bool), torch.zeros(1, 12, 2))
    assert torch.autograd.gradcheck(lambda t: texture_views(t, views), (texture,))
    boxes = torch.tensor([[1, 6, 2, 8]])
    assert torch.autograd.gradcheck(lambda a, b: paste(a, b, boxes) + cut(a, boxes, 8), (plane, patch), atol=1e-4, rtol=1e-3, eps=1e-3)


def test_the_released_sides_count_one_side():
    alpha = torch.zeros(1, 4, 2, 2)
    alpha[0, 2] = 1.0
    assert merged_alpha(alpha).sum() == 0 and merged_alpha(alpha, both=True)[0, 1].sum() == 4 and merged_alpha(alpha, both=True, front_only=True).sum() == 0


def test_configurations_that_cannot_be():
    for wrong in ({"mouth_low": 64}, {"blend_low": 256}, {"mouth_size": 48}):
        with pytest.raises(InputError):
            Next3DConfig(**wrong)
    with pytest.raises(InputError):
        Next3DConfig.from_dict({**NEXT3DS["mini64"].to_dict(), "mouths": 2})
    with pytest.raises(ShapeError):
        texture_views(torch.zeros(2, 3, 8, 8), MeshViews(torch.zeros(1, 4, 8, 8, 2), torch.ones(1, 4, 8, 8, dtype=torch.bool), torch.zeros(1, 12, 2)))
