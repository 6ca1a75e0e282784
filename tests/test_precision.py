"Geometry gives the same numbers inside and outside autocast: bf16 would move points by millimetres and pixels by pixels."

import pytest
import torch
from fixture_files import fixture

from facelab.face.align import deep3d_crop, five_points, warp
from facelab.face.camera import Camera
from facelab.face.coarse import coarse
from facelab.face.code import FaceCode
from facelab.face.fit import code_camera, fit_light, landmark_model, pose_from_landmarks, see
from facelab.face.flame import from_flame
from facelab.face.light import ambient_light, directional_light, shade
from facelab.face.morphable import MorphableModel
from facelab.face.render import Mesh, render, unwrap
from facelab.face.skin import skin_mask
from facelab.nets.embedder import crop_faces

MODEL = coarse(MorphableModel.procedural(), 1600)


def drawn(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def code():
    vector = drawn(2, sum(MODEL.dims) + 33) * 0.3
    vector[:, -33:] *= 0.3
    return FaceCode.unpack(vector, MODEL.dims)


def seen():
    picture, verts, points = see(MODEL, code(), 96)
    return picture.image, picture.depth, picture.normals, picture.fragments.pix_to_face, verts, points


def photo():
    return see(MODEL, code(), 96)[0].image.clamp(0, 1)


def points():
    return see(MODEL, code(), 96)[2]


PHOTO, POINTS = photo(), points()
CASES = {
    "see": seen,
    "soft": lambda: (
        render(
            Mesh(MODEL.mean[None], MODEL.faces),
            Camera.pinhole(torch.zeros(1, 3), torch.tensor([[0.0, 0.0, 1000.0]]), torch.tensor([[4.0, 4.0]])),
            None,
            48,
            sigma=1e-4,
        ).alpha,
    ),
    "light": lambda: (
        fit_light(MODEL, code(), PHOTO).light,
        shade(torch.nn.functional.normalize(drawn(1, 9, 3, seed=1), dim=-1), ambient_light(0.3) + directional_light(torch.tensor([[0.3, 0.2, 1.0]]))),
    ),
    "skin": lambda: (skin_mask(PHOTO),),
    "warp": lambda: (warp(PHOTO, torch.tensor([[[0.41, 0.0, -3.0], [0.0, 0.41, 2.0]]]).expand(2, -1, -1), 32),),
    "crops": lambda: (crop_faces(PHOTO, POINTS, 112), deep3d_crop(five_points(POINTS), (96, 96)).matrix()),
    "pose": lambda: (pose_from_landmarks(landmark_model(MODEL)[0].expand(2, -1, -1), POINTS, 96),),
    "unwrap": lambda: unwrap(PHOTO, Mesh(see(MODEL, code(), 96)[1], MODEL.faces, uv=MODEL.uv, uv_faces=MODEL.uv_faces), code_camera(code().camera, None), 48),
}


@pytest.mark.parametrize("case", CASES)
def test_autocast_changes_nothing(case):
    plain = CASES[case]()
    with torch.autocast("cpu", torch.bfloat16):
        inside = CASES[case]()
    for one, two in zip(plain, inside, strict=True):
        assert one.dtype == two.dtype and torch.equal(one, two)


def test_flame_is_posed_in_full_precision():
    flame = from_flame(fixture("flame/FLAME_NEUTRAL.npz"))
    pose = drawn(2, 15) * 0.3
    with torch.autocast("cpu", torch.bfloat16):
        inside = flame.verts(pose=pose)
    assert torch.equal(flame.verts(pose=pose), inside)


def test_numbers_of_a_head_under_autocast_are_taken_in_full_precision():
    given = code()
    half = FaceCode.unpack(given.pack().bfloat16(), MODEL.dims)
    with torch.autocast("cpu", torch.bfloat16):
        image = see(MODEL, half, 96)[0].image
    assert image.dtype == torch.float32
    torch.testing.assert_close(image, see(MODEL, FaceCode.unpack(given.pack().bfloat16().float(), MODEL.dims), 96)[0].image, rtol=0, atol=1e-5)  # some CPUs differ in the last bit; bf16 would differ by 4e-3


def test_gradients_are_those_of_full_precision():
    found = []
    for inside in (False, True):
        vector = code().pack().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            loss = (see(MODEL, FaceCode.unpack(vector, MODEL.dims), 96)[0].image - 0.4).square().sum()
        loss.backward()
        found.append(vector.grad)
    assert torch.equal(*found)
