"Cameras and light against the numbers of FOCUS, Deep3D and PyTorch3D's reference data; each test states its tolerance."

import json
import zlib

import numpy as np
import pytest
import torch
from fixture_files import fixture

from facelab.face.bfm import from_bfm2009, from_bfm2017
from facelab.face.camera import HEAD_PIVOT, Camera, euler_matrix, sample_orbit
from facelab.face.code import FaceCode
from facelab.face.interpolate import interpolate, vertex_normals
from facelab.face.light import SH_CONVENTIONS, ambient_light, convert_sh, deep3d_normals, directional_light, focus_normals, sh_basis, shade, to_viewer
from facelab.face.raster import rasterize
from facelab.lab.errors import InputError, ShapeError


def arrays(name: str) -> dict[str, torch.Tensor]:
    with np.load(fixture(name), allow_pickle=False) as file:
        return {key: torch.as_tensor(file[key]) for key in file if file[key].dtype.kind in "fiub"}


def close(ours, theirs, tolerance: float):
    gap = (ours - theirs).abs().max().item()
    assert gap <= tolerance, f"{gap:.3g} > {tolerance}"


def drawn(key: str, shape: tuple[int, ...], file: str) -> torch.Tensor:  # the weights of a fixture's gradients: the rule in its meta.json
    seed = json.loads(fixture(file).read_text())["seed"]
    return torch.tensor(np.random.RandomState((zlib.crc32(key.encode()) ^ seed) & 0xFFFFFFFF).standard_normal(shape).astype("float32"))


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


def test_focus_intrinsics_and_angles():
    data = arrays("focus/io.npz")
    camera = Camera.focus(data["camera_param"], pivot=(0.0, 0.0, 0.0))
    k = data["A"][0]
    close(64 * camera.focal, k.diagonal()[:2].expand(3, 2), 1e-4)
    close(64 * camera.centre - 0.5, k[:2, 2].expand(3, 2), 1e-5)  # pixel centres at whole numbers
    close(euler_matrix(data["camera_param"][:, :3]), data["euler"], 1e-6)
    close(Camera.focus(torch.zeros(1, 6), pivot=(0.0, 0.0, 0.0)).translation[0], data["T_ini"], 0)


def test_focus_gradients_of_camera_light_and_codes():
    "Through our own reader, camera, normals and light; relative L2 1e-3 (facts 1.1 allow 1e-2)."
    data = arrays("focus/io.npz")
    model = from_bfm2017(fixture("bfm17/model2017_synthetic.h5"), num_shape=None, num_exp=None, num_tex=None)
    code, light, alpha, delta, beta = (data[key].clone().requires_grad_() for key in ("camera_param", "sh_param", "alpha", "delta", "beta_color"))
    verts = model.verts(alpha, delta) - torch.tensor(HEAD_PIVOT)
    camera = Camera.focus(code, pivot=(0.0, 0.0, 0.0))
    shaded = shade(focus_normals(verts, model.faces, camera), convert_sh(light.reshape(-1, 3, 9), "focus")) * model.albedo(beta, clamp=False)
    loss = 0.1 * (camera.project(verts, 64)[0].mT * drawn("Wp", (3, 2, 224), "focus/meta.json")).sum() + (shaded.mT * drawn("Wc", (3, 3, 224), "focus/meta.json")).sum()
    loss.backward()
    for ours, name in ((code, "camera"), (light, "sh"), (alpha, "alpha"), (delta, "delta"), (beta, "color")):
        theirs = data[f"grad_{name}"]
        assert (ours.grad - theirs).norm() <= 1e-3 * theirs.norm(), name


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


def test_focus_normals_and_basis():
    data = arrays("focus/io.npz")
    camera = Camera.focus(data["camera_param"], pivot=(0.0, 0.0, 0.0))
    verts, faces = data["vertex"].mT, data["faces"]
    corner = verts[:, faces]
    cross = torch.linalg.cross(corner[:, :, 1] - corner[:, :, 0], corner[:, :, 2] - corner[:, :, 0], dim=-1)
    close(torch.nn.functional.normalize(cross, dim=-1).mT, data["face_normal"], 1e-6)  # the same winding
    close(cross.norm(dim=-1) / 2, data["face_area"][:, 0], 1e-3)  # mm^2, of up to 295
    close(vertex_normals(verts, faces), torch.nn.functional.normalize(data["vertex_normal"].mT, dim=-1), 1e-6)  # ours are theirs, normalised
    ours = focus_normals(verts, faces, camera) * torch.tensor([1.0, -1.0, -1.0])  # into their frame: y down, z forward
    close(ours[..., 2], data["rot_normal"][:, 2], 1e-6)
    close(sh_basis(ours).mT, data["sh_basis9"], 5e-6)
    assert torch.equal((ours[..., 2] < 0).float(), data["backface"])


def test_focus_picture():
    "Our rasteriser draws FOCUS's picture: screen-linear attributes, its own culling. Pixel sets are equal, colours within 2e-4."
    data = arrays("focus/io.npz")
    camera = Camera.focus(data["camera_param"], pivot=(0.0, 0.0, 0.0))
    verts, faces = data["vertex"].mT, data["faces"]
    seen = rasterize(camera.to_ndc(verts, 64), faces, 64, perspective_correct=False, cull_backfaces=True)
    colours = shade(focus_normals(verts, faces, camera), convert_sh(data["sh_param"].reshape(-1, 3, 9), "focus")) * data["color"].mT
    picture = interpolate(seen, colours.contiguous(), faces)[:, :, :, 0].permute(0, 3, 1, 2)
    for name in ("raster", "diff_raster"):
        assert torch.equal((seen.pix_to_face[..., 0] >= 0).float(), data[f"{name}_mask"])
        close(picture, data[f"{name}_image"], 2e-4)


def test_focus_code_importer():
    data = arrays("focus/io.npz")
    vector = torch.cat([data[key] for key in ("alpha", "delta", "beta_color", "camera_param", "sh_param")], 1).double()
    code = FaceCode.from_focus(vector, dims=(40, 18, 24))
    close(code.shape, data["alpha"].double(), 0), close(code.exp, data["delta"].double(), 0), close(code.tex, data["beta_color"].double(), 0)
    camera = Camera.focus(data["camera_param"], pivot=(0.0, 0.0, 0.0))
    close(shade(focus_normals(data["vertex"].mT, data["faces"], camera).double(), code.sh_coeffs()).mT, data["illumination"].double(), 5e-6)
    close(code.to_focus(), vector, 1e-9)
    pinhole = Camera.focus(data["camera_param"].double())
    at = torch.tensor(HEAD_PIVOT, dtype=torch.float64).expand(3, 1, 3)
    close(code.cam().project(at, 64)[0], pinhole.project(at, 64)[0], 1e-4)
    close(code.cam().rotation, pinhole.rotation, 1e-9)


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


def test_deep3d_normals_and_lit_colours_from_the_code():
    "code -> vertices -> normals -> light -> colour and its gradient, nothing taken from the fixture on the way."
    data = arrays("bfm09/io.npz")
    model = from_bfm2009(fixture("bfm09/BFM_model_front.mat"), recenter=True)
    code = data["coeffs"].clone().requires_grad_()
    verts, camera = model.verts(code[:, :80], code[:, 80:144]), Camera.deep3d(code[:, 224:227], code[:, 254:257])
    normals = deep3d_normals(verts, model.faces)
    close(normals, data["face_norm"], 2e-6)
    lit = shade(to_viewer(normals, camera), convert_sh(code[:, 227:254].reshape(-1, 3, 9), "deep3d")) * model.albedo(code[:, 144:224], clamp=False)
    close(lit, data["face_color"], 5e-6)
    (lit * drawn("Wc", (3, 300, 3), "bfm09/meta.json")).sum().backward()
    assert (code.grad - data["grad_color"]).norm() <= 1e-5 * data["grad_color"].norm()
    proper = vertex_normals(verts.detach(), model.faces)
    assert (proper - data["face_norm"]).abs().max() > 1e-3  # area weights are another rule


@pytest.mark.parametrize("source", sorted(SH_CONVENTIONS))
@pytest.mark.parametrize("target", sorted(SH_CONVENTIONS))
def test_light_conversions_round_trip(source, target):
    some = torch.randn(4, 3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    there = convert_sh(some, source, target)
    close(convert_sh(there, target, source), some, 1e-12)
    close(convert_sh(there, target), convert_sh(some, source), 1e-12)  # by any road the same light
    if source != target:
        assert (there - some).abs().max() > 0.1


def test_focus_and_deep3d_light_known_answers():
    "The two projects' own formulas (facts 1.3), written out on a dozen normals, must give one shading after conversion."
    draw = np.random.default_rng(5)
    n = draw.standard_normal((12, 3))
    n /= np.linalg.norm(n, axis=1, keepdims=True)
    gamma = draw.standard_normal((1, 3, 9))
    x, y, z = n.T
    a, c = (np.pi, 2 * np.pi / np.sqrt(3), 2 * np.pi / np.sqrt(8)), (1 / np.sqrt(4 * np.pi), np.sqrt(3) / np.sqrt(4 * np.pi), 3 * np.sqrt(5) / np.sqrt(12 * np.pi))
    y9 = np.stack([a[0] * c[0] + 0 * x, -a[1] * c[1] * y, a[1] * c[1] * z, -a[1] * c[1] * x, a[2] * c[2] * x * y, -a[2] * c[2] * y * z, a[2] * c[2] * 0.5 / np.sqrt(3) * (3 * z**2 - 1), -a[2] * c[2] * x * z, a[2] * c[2] * 0.5 * (x**2 - y**2)], 1)
    deep3d = y9 @ (gamma[0] + 0.8 * np.eye(9)[0]).T
    close(shade(torch.tensor(n)[None], convert_sh(torch.tensor(gamma), "deep3d"))[0], torch.tensor(deep3d), 1e-12)
    as_focus = convert_sh(torch.tensor(gamma), "deep3d", "focus")[0].numpy() + 0.7 * 2 * np.pi * np.eye(9)[0]
    y, z = -y, -z  # FOCUS's camera frame
    k = [0.5 / np.sqrt(np.pi), np.sqrt(3 / (4 * np.pi)), np.sqrt(15 / (4 * np.pi)), np.sqrt(5 / (16 * np.pi)), np.sqrt(15 / (16 * np.pi))]
    h9 = np.stack([k[0] + 0 * x, -k[1] * y, k[1] * z, -k[1] * x, k[2] * x * y, -k[2] * y * z, k[3] * (3 * z**2 - 1), -k[2] * x * z, k[4] * (x**2 - y**2)], 1)
    close(torch.tensor(h9 @ as_focus.T), torch.tensor(deep3d), 1e-12)


@pytest.mark.parametrize("where", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_a_lamp_lights_the_side_it_is_on(where):
    light = directional_light(torch.tensor([where]))
    lit, back = shade(torch.tensor([[where, [-w for w in where]]]), light)[0, :, 0].tolist()
    # degree 2 of a clamped cosine: at the pole pi (1/(4 pi) + 2/3 3/(4 pi) + 1/4 5/(4 pi)) = 17/16, behind 1/16
    assert abs(lit - 17 / 16) < 1e-5 and abs(back - 1 / 16) < 1e-5


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


@pytest.mark.parametrize("name", ["face_persp_64_b1", "face_ortho_64_b1", "sphere_persp_64_b4", "sphere_ortho_64_b4", "face_screen_nonsquare_80x48_b1", "sphere_persp_64_b1"])
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
