"Alignment and skin mask against official code's numbers; each test states its tolerance."

import numpy as np
import pytest
import torch
from fixture_files import fixture

from facelab.face.align import ARCFACE_POINTS, DEEP3D_POINTS, FLIP68, arcface_crop, arcface_matrix, deep3d_crop, five_points, official_crop, warp
from facelab.face.skin import skin_mask
from facelab.lab.errors import InputError


@pytest.fixture(scope="module")
def data():
    with np.load(fixture("align/io.npz"), allow_pickle=False) as file:
        return {key: file[key] for key in file}


def points(data) -> torch.Tensor:  # theirs count pixel centres from 0
    return torch.tensor(data["lm68_down"]).double() + 0.5


def from_zero(matrix: torch.Tensor) -> torch.Tensor:  # our matrix (pixel centres at .5) for coordinates that count them from 0
    half = torch.full((2, 1), 0.5, dtype=matrix.dtype)
    return torch.cat([matrix[..., :2], matrix[..., 2:] + matrix[..., :2] @ half - half], -1)


def close(ours, theirs, tolerance: float):
    gap = np.abs(np.asarray(ours, float) - np.asarray(theirs, float)).max()
    assert gap <= tolerance, f"{gap:.3g} > {tolerance}"


def test_five_points(data):
    five = five_points(points(data)) - 0.5
    close(five, data["lm5_down"], 1e-4)
    close(torch.stack([five[..., 0], torch.tensor(data["wh"][:, 1:]) - 1 - five[..., 1]], -1), data["lm5_up"], 1e-4)
    close(DEEP3D_POINTS, data["lm3d_5"], 1e-7)


@pytest.mark.parametrize("number", range(20))
def test_deep3d_camera_and_whole_pixels(data, number):
    w, h = (int(n) for n in data["wh"][number])
    crop = deep3d_crop(five_points(points(data)[number : number + 1]), (h, w), official=True)
    close(crop.pos[0, 1:], data["pos_t"][number], 1e-4)
    close(crop.pos[0, 0], data["pos_s"][number], 1e-4)
    close([w, h, 102 / crop.pos[0, 0], *crop.pos[0, 1:]], data["trans_params"][number], 1e-4)
    assert crop.resized[0].int().tolist() == data["resize_wh"][number].tolist()
    left, up = crop.corner[0].int().tolist()
    assert [left, up, left + 224, up + 224] == data["crop_box"][number].tolist()


@pytest.mark.parametrize("number", range(20))
def test_deep3d_landmarks(data, number):
    # lm_new is in the resized, untruncated crop, y up: (lm - t + wh/2) s - (resized/2 - 112)
    w, h = (int(n) for n in data["wh"][number])
    all68 = points(data)[number : number + 1]
    crop = deep3d_crop(five_points(all68), (h, w))
    ours = crop.points(all68)[0]
    grown = torch.tensor([w, h]) * crop.scale[0]
    lost = (grown - grown.trunc()) / 2  # their crop's middle is that of the truncated photo
    theirs = torch.tensor(data["lm_new"][number])
    scale = crop.scale[0, 0]
    theirs = torch.stack([theirs[:, 0] - lost[0] + scale / 2, 224 - theirs[:, 1] + lost[1] - scale / 2], -1)  # y down, pixel centres at .5
    close(ours, theirs, 1e-3)
    whole = deep3d_crop(five_points(all68), (h, w), official=True)
    assert (whole.points(all68)[0] - ours).abs().max() < 2.5  # what the truncations cost


@pytest.mark.parametrize("key, size, wide", [("M_deep3d", 112, False), ("M_focus", 112, False), ("M_insight112", 112, False), ("M_insight128", 128, True), ("M_insight224", 224, False), ("M_insight256", 256, True)])
def test_arcface_similarity(data, key, size, wide):
    ours = from_zero(arcface_matrix(five_points(points(data)), size, wide))
    close(ours, data[key], 1e-3 if size > 200 else 5e-4)  # skimage works in float32 here; the shift is in hundreds of px


def test_arcface_similarity_of_a_mirrored_face(data):
    ours = arcface_matrix(five_points(points(data)[-1:]))
    assert torch.linalg.det(ours[0, :, :2]) > 0


def test_warp_equals_cv2_and_kornia(data):
    photo = torch.tensor(data["images_u8"]).permute(0, 3, 1, 2).double() / 255
    matrix = arcface_matrix(five_points(torch.tensor(data["img_lm68"]).double() + 0.5))
    ours = warp(photo, matrix, 112)
    gap = (255 * ours.permute(0, 2, 3, 1) - torch.tensor(data["img_norm_crop_cv2"]).double()).abs()
    assert gap.max() <= 2.5 and gap.mean() < 0.5  # cv2 rounds and interpolates in steps of 1/32 px
    close(ours[:, :, ::2, ::2], data["img_warp_kornia_s"], 2e-3)
    close(arcface_crop(photo, torch.tensor(data["img_lm68"]).double() + 0.5), ours, 1e-12)  # these faces are not reduced by 2


def test_official_crop_equals_pil(data):
    for photo, lm, theirs in zip(data["images_u8"], data["img_lm68"], data["img_align224_pil_s"]):
        ours, _ = official_crop(photo, torch.tensor(lm).double() + 0.5)
        close(ours[::2, ::2].astype(int), theirs.astype(int), 1)


def test_exact_crop_is_near_the_official_one(data):
    photo = torch.tensor(data["images_u8"]).permute(0, 3, 1, 2).float() / 255
    lm = torch.tensor(data["img_lm68"]) + 0.5
    ours = warp(photo, deep3d_crop(five_points(lm), (200, 200)).matrix(), 224)
    theirs = torch.tensor(data["img_align224_pil_s"]).permute(0, 3, 1, 2) / 255
    assert (ours[:, :, ::2, ::2] - theirs).abs().mean() < 0.05


def test_skin_mask_equals_deep3d():
    with np.load(fixture("bfm09/io.npz"), allow_pickle=False) as file:
        rgb, theirs = file["skin_rgb_u8"], file["skin_mask_u8"][..., 0]  # three equal channels
    ours = skin_mask(torch.tensor(rgb).permute(2, 0, 1)[None].double() / 255)[0, 0]
    gap = (255 * ours - torch.tensor(theirs).double()).abs()
    assert gap.max() <= 1.0, gap.max()  # theirs is rounded, or cut, to a byte


def test_skin_mask_known_answers():
    "facts 1.5, computed there from the published tables."
    colours = torch.tensor([(224, 172, 150), (120, 80, 60), (60, 40, 32), (128, 128, 128), (255, 255, 255), (40, 90, 200)]).double().T.reshape(1, 3, 1, 6) / 255
    close(skin_mask(colours).flatten(), [0.992, 0.973, 0.763, 0.014, 0.188, 0.000], 6e-4)
    half = skin_mask(colours, floor=0.5).flatten()
    close(half, [0.992, 0.973, 0.763, 0.5, 0.5, 0.5], 6e-4)
    close(skin_mask(colours.float()).double(), skin_mask(colours), 1e-4)


def test_a_template_maps_to_itself():
    "Known answers: the canonical points through both alignments."
    for size, wide, left in ((112, False, 0), (224, False, 0), (128, True, 8), (256, True, 16)):
        scale = size / (128 if wide else 112)
        template = torch.tensor([ARCFACE_POINTS], dtype=torch.float64)
        five = 3 * template + 0.5 + torch.tensor([20.0, -5.0])
        moved = arcface_matrix(five, size, wide)[0]
        close(moved[:, :2], scale / 3 * torch.eye(2).double(), 1e-9)
        close((moved[:, :2] @ five[0].T + moved[:, 2:]).T, scale * template[0] + torch.tensor([left, 0.0]) + 0.5, 1e-9)
    canonical = torch.tensor(DEEP3D_POINTS, dtype=torch.float64)
    flat = 50 * canonical[None, :, :2] * torch.tensor([1.0, -1.0]) + torch.tensor([150.0, 130.0])  # 50 px a unit, straight on, at (150, 130)
    crop = deep3d_crop(flat, (260, 320))
    close(crop.scale, 102 / 50 * torch.ones(1, 2), 1e-6)
    close(crop.points(torch.tensor([[[150.0, 130.0]]]).double())[0, 0], [112 + 0.5 * 102 / 50, 112 - 0.5 * 102 / 50], 1e-6)  # the middle, but for the half pixels that align_img leaves
    close(crop.points(flat)[0] - crop.points(flat)[0].mean(0), 102 * (canonical[:, :2] - canonical[:, :2].mean(0)) * torch.tensor([1.0, -1.0]), 1e-6)


def test_mirroring_the_points_mirrors_the_crop(data):
    lm = points(data)[:5]
    mirrored = lm[:, list(FLIP68)] * torch.tensor([-1.0, 1.0])
    close(five_points(mirrored), five_points(lm)[:, [1, 0, 2, 4, 3]] * torch.tensor([-1.0, 1.0]), 1e-9)
    ours, theirs = deep3d_crop(five_points(lm), (400, 400)), deep3d_crop(five_points(mirrored) + torch.tensor([400.0, 0.0]), (400, 400))
    assert (ours.scale / theirs.scale - 1).abs().max() < 0.02  # the canonical points are symmetric to 2 %


def test_skin_mask_wants_rgb():
    with np.load(fixture("bfm09/io.npz"), allow_pickle=False) as file:
        rgb, theirs = file["skin_rgb_u8"], file["skin_mask_u8"][..., 0]  # three equal channels
    bgr = skin_mask(torch.tensor(rgb[..., ::-1].copy()).permute(2, 0, 1)[None].double() / 255)[0, 0]
    assert (255 * bgr - torch.tensor(theirs).double()).abs().max() > 50


@pytest.mark.parametrize(
    "call",
    [
        lambda: five_points(torch.zeros(1, 67, 2)),
        lambda: arcface_matrix(torch.full((1, 5, 2), float("nan"))),
        lambda: deep3d_crop(torch.full((1, 5, 2), 3.0), (10, 10)),
        lambda: official_crop(np.zeros((10, 10), np.uint8), torch.zeros(5, 2)),
        lambda: official_crop(np.zeros((10, 10, 4), np.uint8), torch.zeros(5, 2)),
        lambda: official_crop(np.zeros((9000, 9000, 3), np.uint8), torch.rand(5, 2)),
        lambda: warp(torch.zeros(2, 3, 4, 4), torch.zeros(1, 2, 3), 4),
        lambda: skin_mask(torch.zeros(1, 1, 4, 4)),
    ],
)
def test_wrong_inputs_meet_one_error(call):
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.came and caught.value.needed and caught.value.fix
