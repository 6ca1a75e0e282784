"Cameras and light against the numbers of FOCUS, Deep3D and PyTorch3D's reference data; each test states its tolerance."

import json
import zlib

import numpy as np
import pytest
import torch
from fixture_files import fixture

from facelab.face.camera import HEAD_PIVOT, Camera, euler_matrix, sample_orbit
from facelab.face.code import FaceCode
from facelab.face.light import ambient_light, convert_sh, focus_normals, sh_basis, shade, to_viewer
from facelab.lab.errors import InputError, ShapeError


def arrays(name: str) -> dict[str, torch.Tensor]:
    with np.load(fixture(name), allow_pickle=False) as file:
        return {key: torch.as_tensor(file[key]) for key in file if file[key].dtype.kind in "fiub"}


def close(ours, theirs, tolerance: float):
    gap = (ours - theirs).abs().max().item()
    assert gap <= tolerance, f"{gap:.3g} > {tolerance}"


# FOCUS: fixture of facts 1.8. The pivot is 0 because its vertices have (0, 0, 100) subtracted already.


def test_focus_camera_and_projection():
    data = arrays("focus/io.npz")
    camera = Camera.focus(data["camera_param"], pivot=(0.0, 0.0, 0.0))
    close(camera.rotation, data["R"], 1e-6)
    close(camera.translation, data["T"][..., 0], 1e-4)
    pixels, depth = camera.project(data["vertex"].mT, 64)
    close(pixels - 0.5, data["projected"][:, :2].mT, 5e-5)  # FOCUS has pixel centres at whole numbers
    close(depth, data["projected"][:, 2], 2e-4)
    world = -(camera.rotation.mT @ camera.translation[..., None])
    close(camera.rotation.mT, data["R_cam2world"], 1e-6)
    close(world, data["T_cam2world"], 2e-4)


def test_focus_pivot_is_the_subtracted_mean():
    data = arrays("focus/io.npz")
    whole = data["vertex"].mT + torch.tensor(HEAD_PIVOT)
    ours = Camera.focus(data["camera_param"]).project(whole, 64)[0]
    close(ours - 0.5, data["projected"][:, :2].mT, 1e-4)


def test_focus_camera_gradient():
    data = arrays("focus/io.npz")
    seed = json.loads(fixture("focus/meta.json").read_text())["seed"]
    weight = np.random.RandomState((zlib.crc32(b"Wp") ^ seed) & 0xFFFFFFFF).standard_normal((3, 2, 224)).astype("float32")
    code = data["camera_param"].clone().requires_grad_()
    light = (data["sh_param"].reshape(-1, 3, 9)).clone().requires_grad_()
    verts = data["vertex"].mT
    camera = Camera.focus(code, pivot=(0.0, 0.0, 0.0))
    colour_weight = np.random.RandomState((zlib.crc32(b"Wc") ^ seed) & 0xFFFFFFFF).standard_normal((3, 3, 224)).astype("float32")
    shaded = shade(focus_normals(verts, data["faces"], camera), convert_sh(light, "focus")) * data["color"].mT
    loss = 0.1 * (camera.project(verts, 64)[0].mT * torch.tensor(weight)).sum() + (shaded.mT * torch.tensor(colour_weight)).sum()
    loss.backward()
    for ours, theirs in ((code.grad, data["grad_camera"]), (light.grad.flatten(1), data["grad_sh"])):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


def test_sh_basis_is_focus_basis():
    data = arrays("focus/io.npz")
    close(sh_basis(data["unit_normals"].mT).mT, data["unit_sh9"], 3e-6)  # theirs goes through acos and atan2


def test_focus_shading_with_its_short_normals():
    data = arrays("focus/io.npz")
    camera = Camera.focus(data["camera_param"], pivot=(0.0, 0.0, 0.0))
    normals = focus_normals(data["vertex"].mT, data["faces"], camera)
    light = convert_sh(data["sh_param"].reshape(-1, 3, 9), "focus")
    close(light[..., 0], data["sh_coef"].reshape(-1, 3, 9)[..., 0], 1e-6)
    close(shade(normals, light).mT, data["illumination"], 5e-6)
    close(shade(normals, light).mT * data["color"], data["shaded_color"], 5e-6)


def test_proper_normals_shade_differently_from_focus():
    data = arrays("focus/io.npz")
    proper = torch.nn.functional.normalize(data["rot_normal"].mT, dim=-1) * torch.tensor([1.0, -1.0, -1.0])
    light = convert_sh(data["sh_param"].reshape(-1, 3, 9), "focus")
    assert (shade(proper, light).mT - data["illumination"]).abs().max() > 0.01  # why the parity path exists


# Deep3D: fixture of facts 1.6


def test_deep3d_camera_and_projection():
    data = arrays("bfm09/io.npz")
    code = data["coeffs"]
    camera = Camera.deep3d(code[:, 224:227], code[:, 254:257])
    close(euler_matrix(code[:, 224:227], "zyx").mT, data["rotation"], 1e-6)
    verts = 100 * data["face_shape"]
    pixels, depth = camera.project(verts, 224)
    close(torch.stack([pixels[..., 0], 224 - pixels[..., 1]], -1), data["face_proj"], 2e-4)  # theirs has y up
    close(depth / 100, data["face_vertex"][..., 2], 5e-6)
    close(camera.view(verts)[..., :2] / 100 * torch.tensor([1.0, -1.0]), data["face_vertex"][..., :2], 5e-6)


def test_deep3d_light():
    data = arrays("bfm09/io.npz")
    code = data["coeffs"]
    camera = Camera.deep3d(code[:, 224:227], code[:, 254:257])
    normals = to_viewer(data["face_norm"], camera)
    close(normals, data["face_norm_rot"], 2e-6)
    light = convert_sh(code[:, 227:254].reshape(-1, 3, 9), "deep3d")
    close(shade(normals, light) * data["face_texture"], data["face_color"], 2e-6)


def test_code_importers_keep_what_the_owner_shows():
    data = arrays("bfm09/io.npz")
    code = FaceCode.from_deep3d(data["coeffs"].double())
    light = code.sh_coeffs()
    close(shade(data["face_norm_rot"].double(), light) * data["face_texture"], data["face_color"], 2e-6)
    close(code.to_deep3d(), data["coeffs"].double(), 1e-9)
    pinhole = Camera.deep3d(data["coeffs"][:, 224:227], data["coeffs"][:, 254:257]).to(torch.float64)
    at = torch.tensor(HEAD_PIVOT, dtype=torch.float64).expand(3, 1, 3)
    close(code.cam().project(at, 224)[0], pinhole.project(at, 224)[0], 1e-4)  # the pivot stays where it was
    around = at + torch.tensor([[[20.0, 0, 0], [0, 20.0, 0], [0, 0, 20.0]]]).double()
    close(code.cam().project(around, 224)[0], pinhole.project(around, 224)[0], 1.5)  # px; weak perspective


# DECA's basis: the raster fixture's image formula, restated from its README


@pytest.mark.parametrize("seed", [0, 1])
def test_deca_basis(seed):
    draw = np.random.default_rng(seed)
    n = draw.standard_normal((50, 3))
    n /= np.linalg.norm(n, axis=1, keepdims=True)
    x, y, z = n.T
    c0, c1, c2 = 1 / np.sqrt(4 * np.pi), 2 * np.pi / 3 * np.sqrt(3 / (4 * np.pi)), 3 * np.pi / 4 * np.sqrt(5 / (12 * np.pi))
    h = np.stack([np.full(50, c0), c1 * x, c1 * y, c1 * z, c2 * x * y, c2 * x * z, c2 * y * z, c2 / 2 * (x * x - y * y), np.pi / 8 * np.sqrt(5 / (4 * np.pi)) * (3 * z * z - 1)], 1)
    sh = draw.standard_normal((1, 9, 3))  # DECA's layout
    ours = shade(torch.tensor(n)[None], convert_sh(torch.tensor(sh).mT, "deca"))
    close(ours[0], torch.tensor(h @ sh[0]), 1e-12)


# PyTorch3D's reference cameras


@pytest.mark.parametrize("name", ["face_persp_64_b1", "face_ortho_64_b1", "sphere_persp_64_b4", "sphere_ortho_64_b4", "face_screen_nonsquare_80x48_b1"])
def test_to_ndc_equals_pytorch3d(name):
    data, meshes = arrays(f"raster/{name}.npz"), arrays("raster/meshes.npz")
    verts = data["verts"] if "verts" in data else meshes[f"{name.split('_')[0]}_verts"][None]
    size = tuple(int(n) for n in data["image_size"])
    flip = torch.tensor([-1.0, -1.0, 1.0])  # PyTorch3D: view = v R + T with x left, y up; ours: x right, y down
    rotation, translation = flip[:, None] * data["R"].mT, data["T"] * flip
    if "screen" in name:  # focal length and principal point in pixels
        wide = torch.tensor([size[1], size[0]], dtype=torch.float32)
        focal, centre = data["cam_focal"] / wide, data["cam_pp"] / wide
    else:
        focal, centre = data["cam_focal"] / 2, 0.5 - data["cam_pp"] / 2
    camera = Camera(rotation, translation, focal.expand(len(rotation), 2), centre.expand(len(rotation), 2), orthographic="ortho" in name)
    close(camera.to_ndc(verts, size), data["verts_ndc"], 2e-6 * data["verts_ndc"].abs().max().item())


def test_labels_survive_the_round_trip():
    cameras = sample_orbit(16, torch.Generator().manual_seed(3), uniform=True)
    for unit, origin in ((1000 / 2.7, (0.0, 0.0, 0.0)), (1.0, (0.0, -2.2, -59.6))):
        back = Camera.from_eg3d(cameras.pack(unit, origin), unit, origin)
        point = torch.tensor([[[10.0, 20.0, 80.0]]])
        close(back.project(point, 64)[0], cameras.project(point, 64)[0], 1e-3)
        close(back.pack(unit, origin), cameras.pack(unit, origin), 1e-3 if unit == 1.0 else 1e-5)


def test_orbit_follows_eg3d_sampler():
    # position = r (sin phi cos(pi - theta), cos phi, sin phi sin(pi - theta)), phi = arccos(1 - 2 v / pi): facts 1.7
    theta, v = torch.tensor([1.2, 1.9]).double(), torch.tensor([1.4, 1.8]).double()
    phi = torch.arccos(1 - 2 * v / torch.pi)
    eye = 2.7 * torch.stack([phi.sin() * (torch.pi - theta).cos(), phi.cos(), phi.sin() * (torch.pi - theta).sin()], -1)
    label = Camera.orbit(theta, v).pack().reshape(2, 25)
    close(label[:, [3, 7, 11]], eye, 1e-9)
    forward = torch.tensor([0, 0, 0.2]).double() - eye
    close(label[:, [2, 6, 10]], forward / forward.norm(dim=-1, keepdim=True), 1e-9)
    assert (label[:, 5] < 0).all() and (label[:, 4].abs() < 1e-9).all()  # y axis down, no roll


@pytest.mark.parametrize("rows", [1, 4])
def test_same_answer_in_two_batch_sizes(rows):
    code = 0.3 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    points = torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(1)) * 50
    whole = Camera.scaled_orthographic(code).project(points, 64)[0]
    parts = torch.cat([Camera.scaled_orthographic(code[i : i + rows]).project(points[i : i + rows], 64)[0] for i in range(0, 4, rows)])
    close(whole, parts, 1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda: Camera.scaled_orthographic(torch.zeros(2, 5)),
        lambda: Camera.from_eg3d(torch.zeros(1, 25)),
        lambda: Camera.from_eg3d(torch.full((1, 25), float("nan"))),
        lambda: Camera.from_eg3d(torch.zeros(25)),
        lambda: Camera.scaled_orthographic(torch.zeros(1, 6)).pack(),
        lambda: Camera.cat([]),
        lambda: Camera.focus(torch.zeros(1, 6)).project(torch.zeros(1, 1, 3), 0),
        lambda: shade(torch.zeros(1, 2, 3), torch.zeros(1, 27)),
        lambda: convert_sh(torch.zeros(1, 3, 9), "opengl"),
        lambda: FaceCode.unpack(torch.zeros(1, 258)),
        lambda: FaceCode.from_focus(torch.zeros(257)),
    ],
)
def test_wrong_inputs_meet_one_error(call):
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.came and caught.value.needed and caught.value.fix
    assert isinstance(caught.value, (ShapeError, InputError))


def test_zero_code_is_a_frontal_centred_face():
    code = FaceCode.zeros(1)
    # BFM 2017's landmarks (facts 1.1): nose tip and chin
    pixels, _ = code.cam().project(torch.tensor([[[0.2, 1.0, 131.8], [-0.1, -73.4, 103.0]]]), 224)
    close(pixels, torch.tensor([[[112.2, 111.0], [111.9, 112 + 73.4 * 1.015]]]), 0.05)
    close(code.sh_coeffs(), ambient_light(), 1e-6)
