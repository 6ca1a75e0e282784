"The 3DMM readers against numbers that official code (or an independent float64 rebuild) produced; each test states its tolerance."

import json
import os
import pickle
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch
from fixture_files import fixture
from make_models import Chumpy, few_of_ict, write_bfm2009, write_bfm2009_original, write_bfm2017, write_ict, write_python2_pickle

from facelab.face.bfm import from_bfm2009, from_bfm2017
from facelab.face.camera import Camera
from facelab.face.code import FaceCode
from facelab.face.flame import Flame, contour_row, deca_pose, from_flame, rodrigues
from facelab.face.ict import from_ict
from facelab.face.morphable import REGION_NAMES, MorphableModel
from facelab.face.objective import Objective, cosine_loss, landmark_loss, photo_loss, regulariser
from facelab.face.transfer import NAMED_IBUG, transfer_albedo, transfer_landmarks, transfer_regions
from facelab.lab.errors import AssetError, InputError, UnsafeFileError


def arrays(name: str) -> dict[str, torch.Tensor]:
    with np.load(fixture(name), allow_pickle=False) as file:
        return {key: torch.as_tensor(file[key].astype("int64") if file[key].dtype.kind in "iu" else file[key]) for key in file if file[key].dtype.kind in "fiub"}


def close(ours, theirs, tolerance: float):
    gap = (ours.double() - theirs.double()).abs().max().item()
    assert gap <= tolerance, f"{gap:.3g} > {tolerance}"


# BFM 2017: independent float64 numpy; 1e-4 mm is float32 at 100 mm


def bfm17(**how):
    return from_bfm2017(fixture("bfm17/model2017_synthetic.h5"), num_shape=None, num_exp=None, num_tex=None, **how)


def test_bfm17_faces_and_colours():
    model, data = bfm17(), arrays("bfm17/io.npz")
    assert model.dims == (40, 18, 24) and torch.equal(model.faces, data["faces"])
    close(model.verts(data["alpha"], data["delta"]), data["vertices_f64"], 1e-4)
    close(model.verts()[0], data["neutral_vertices_f64"], 1e-5)
    close(model.albedo(data["beta_color"], clamp=False), data["color_f64"], 1e-6)
    close(model.albedo(data["beta_color"]), data["color_clamped_f64"], 1e-6)


def test_bfm17_variances_are_rooted():
    model, data = bfm17(), arrays("bfm17/io.npz")
    wrong = data["vertices_if_std_forgotten_f64"]
    ours = model.verts(data["alpha"][:1], data["delta"][:1])[0]
    assert (ours - wrong).abs().max() > 1.0  # mm: the usual mistake must not come back
    assert (ours - data["vertices_f64"][0]).abs().max() < 1e-4


def test_bfm17_named_landmarks():
    model, data = bfm17(), arrays("bfm17/io.npz")
    names = fixture("bfm17/meta.json").read_text()
    assert [model.info["named"][name] for name in json.loads(names)["landmark_names"]] == data["landmark_vertex"].tolist()
    with pytest.raises(InputError, match="68 landmarks"):
        model.landmarks(model.verts())
    assert torch.equal(bfm17(landmarks68=range(68)).landmarks68, torch.arange(68))


@pytest.mark.parametrize("kind", ["text", "bytes", "fixed", "void", "uint8"])
def test_bfm17_landmark_json_in_any_storage(kind, tmp_path):
    path = tmp_path / "a.h5"
    shutil.copyfile(fixture("bfm17/model2017_synthetic.h5"), path)
    with h5py.File(path, "r+") as file:
        raw = file["metadata/landmarks/json"][()].tobytes()
        del file["metadata/landmarks/json"]
        file["metadata/landmarks/json"] = {"text": raw.decode(), "bytes": raw, "fixed": np.bytes_(raw), "void": np.void(raw), "uint8": np.frombuffer(raw, "u1")}[kind]
        cells = file["shape/representer/cells"][()].astype("u4")
        del file["shape/representer/cells"]
        file["shape/representer/cells"] = cells
    assert from_bfm2017(path).info["named"] == bfm17().info["named"]


def test_bfm17_equals_focus_vertices():
    model, data = bfm17(), arrays("focus/io.npz")
    ours = model.verts(data["alpha"], data["delta"]) - torch.tensor([0.0, 0.0, 100.0])
    close(ours, data["vertex"].mT, 1e-4)
    close(model.albedo(data["beta_color"], clamp=False), data["color"].mT, 1e-6)


def test_keeping_modes_is_a_zero_code():
    model, data = bfm17(), arrays("bfm17/io.npz")
    few = from_bfm2017(fixture("bfm17/model2017_synthetic.h5"), num_shape=5, num_exp=3, num_tex=2)
    code = torch.nn.functional.pad(data["alpha"][:, :5], (0, 35))
    close(few.verts(data["alpha"][:, :5]), model.verts(code), 1e-4)
    assert few.dims == (5, 3, 2) == model.keep_modes(5, 3, 2).dims


# BFM 2009 in Deep3D's layout: official ParametricFaceModel; floors in its meta, 5e-7 dm


def test_bfm09_faces_colours_landmarks():
    data = arrays("bfm09/io.npz")
    code = data["coeffs"]
    model = from_bfm2009(fixture("bfm09/BFM_model_front.mat"), recenter=True)
    verts = model.verts(code[:, :80], code[:, 80:144])
    close(model.mean / 100, data["mean_shape_used"], 1e-6)
    close(verts / 100, data["face_shape"], 1e-6)
    close(model.albedo(code[:, 144:224], clamp=False), data["face_texture"], 1e-6)
    points, _ = Camera.deep3d(code[:, 224:227], code[:, 254:257]).project(model.landmarks(verts), 224)
    close(torch.stack([points[..., 0], 224 - points[..., 1]], -1), data["landmark"], 2e-4)


def test_bfm09_head_frame_needs_the_pivot_only():
    data = arrays("bfm09/io.npz")
    code = data["coeffs"]
    model = from_bfm2009(fixture("bfm09/BFM_model_front.mat"))
    camera = Camera.deep3d(code[:, 224:227], code[:, 254:257], pivot=model.info["centroid"])
    points, _ = camera.project(model.landmarks(model.verts(code[:, :80], code[:, 80:144])), 224)
    close(torch.stack([points[..., 0], 224 - points[..., 1]], -1), data["landmark"], 3e-4)


def test_bfm09_front_triangles_go_through_the_reduced_list():
    model = from_bfm2009(fixture("bfm09/BFM_model_front.mat"))
    real = {tuple(sorted(face)) for face in model.faces.tolist()}
    mapped = [tuple(sorted(face)) in real for face in model.info["front_faces"].tolist()]
    assert all(mapped) and len(mapped) == 260
    assert bool(model.regions["front"][model.info["front_faces"]].all()) and model.regions["skin"].dtype == torch.bool


def test_bfm09_is_what_the_file_says():
    "Every array of the .mat against the loaded model."
    model = from_bfm2009(fixture("bfm09/BFM_model_front.mat"))
    held = {key: value.astype(np.float64) for key, value in scipy.io.loadmat(fixture("bfm09/BFM_model_front.mat")).items() if not key.startswith("__")}
    assert set(held) == {"meanshape", "meantex", "idBase", "exBase", "texBase", "tri", "point_buf", "tri_mask2", "keypoints", "frontmask2_idx", "skinmask"}
    close(model.mean, torch.tensor(100 * held["meanshape"].reshape(-1, 3)), 1e-5)
    close(model.tex_mean, torch.tensor(held["meantex"].reshape(-1, 3) / 255), 1e-6)
    for ours, key, unit in ((model.shape_basis, "idBase", 100), (model.exp_basis, "exBase", 100), (model.tex_basis, "texBase", 1 / 255)):
        close(ours, torch.tensor(unit * held[key].reshape(300, 3, -1)), 1e-5)
    assert model.faces.tolist() == (held["tri"] - 1).tolist() and model.landmarks68.tolist() == (held["keypoints"][0] - 1).tolist()
    assert model.regions["skin"].tolist() == (held["skinmask"][0] > 0).tolist()
    front = held["frontmask2_idx"][:, 0].astype(int) - 1
    assert torch.nonzero(model.regions["front"])[:, 0].tolist() == sorted(front) and model.info["front_faces"].tolist() == front[held["tri_mask2"].astype(int) - 1].tolist()
    around = [set() for _ in range(300)]  # point_buf: the triangles at each vertex, padded with F + 1
    for number, face in enumerate(model.faces.tolist(), 1):
        for vertex in face:
            around[vertex].add(number)
    stored = [set(row) - {len(model.faces) + 1} for row in held["point_buf"].astype(int).tolist()]
    assert all(mine == theirs or (len(mine) > 8 and theirs < mine) for mine, theirs in zip(around, stored))


def test_deep3d_losses():
    "Eq. 5's terms in Deep3D's weights: official photo, landmark, perceptual and regularisation losses; 1e-5 relative."
    data = arrays("bfm09/io.npz")
    image, rendered, mask = (data[key].permute(1, 0, 2, 3).reshape(1, data[key].shape[1], 72, 24) for key in ("photo_imA", "photo_imB", "photo_mask"))  # theirs is one mean over the batch
    close(photo_loss(image, rendered, mask)[0], data["photo_loss"], 1e-6)
    close(photo_loss(image, rendered, 0 * mask)[0], data["photo_loss_emptymask"], 0)
    weights = torch.ones(68)
    weights[28:31] = weights[-8:] = 20
    ours = landmark_loss(data["landmark"], data["lm_gt"], 224, weights=weights.sqrt())  # ours: on the distance, over 136 numbers
    close(2 * ours.mean(), data["landmark_loss"], 1e-3)  # of 60.16
    close(cosine_loss(data["percep_fa"], data["percep_fb"]).mean(), data["perceptual_loss"], 1e-6)
    code = FaceCode.from_deep3d(data["coeffs"])
    close(224 * regulariser(code, Objective(exp_weight=0.8, tex_weight=0.017)).mean(), data["reg_loss"], 1e-3)  # of 122.2


def test_bfm09_gradient_of_landmarks():
    data = arrays("bfm09/io.npz")
    seed = json.loads(fixture("bfm09/meta.json").read_text())["seed"]
    weight = torch.tensor(np.random.RandomState((zlib.crc32(b"Wl") ^ seed) & 0xFFFFFFFF).standard_normal((3, 68, 2)).astype("float32"))
    model = from_bfm2009(fixture("bfm09/BFM_model_front.mat"), recenter=True)
    code = data["coeffs"].clone().requires_grad_()
    points, _ = Camera.deep3d(code[:, 224:227], code[:, 254:257]).project(model.landmarks(model.verts(code[:, :80], code[:, 80:144])), 224)
    (torch.stack([points[..., 0], 224 - points[..., 1]], -1) * weight).sum().backward()
    assert (code.grad - data["grad_lm"]).norm() <= 1e-5 * data["grad_lm"].norm()


# FLAME: smplx 0.1.28 (float64) and DECA's layer (float32); metres there, so 1e-3 of ours


def flame(**how):
    return from_flame(fixture("flame/FLAME_NEUTRAL.npz"), fixture("flame/landmark_embedding.npz"), **how)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-6)])
def test_flame_equals_smplx(dtype, tolerance):
    data, model = arrays("flame/smplx_io.npz"), flame().to(dtype)
    pose = torch.cat([data[f"in_{part}"] for part in ("global_orient", "neck_pose", "jaw_pose", "leye_pose", "reye_pose")], 1).to(dtype)
    verts, joints = model.posed(data["in_betas"].to(dtype), data["in_expression"].to(dtype), pose, 1000 * data["in_transl"].to(dtype))
    close(verts / 1000, data["vertices"], tolerance)
    points = model.landmarks(verts, pose, "smplx")
    theirs = torch.cat([joints, points[:, 17:], points[:, :17]], 1)  # smplx: joints, 51, then the contour
    close(theirs / 1000, data["joints"], tolerance)
    if dtype == torch.float32:
        close(verts / 1000, data["vertices_f32"], tolerance)
        close(theirs / 1000, data["joints_f32"], tolerance)


def test_flame_at_rest():
    model = flame()
    with np.load(fixture("flame/FLAME_NEUTRAL.npz")) as file:
        held = {key: file[key] for key in file if file[key].dtype.kind in "fiu"}
    verts, joints = model.posed()
    close(verts[0] / 1000, torch.tensor(held["v_template"]), 1e-7)
    close(joints[0] / 1000, torch.tensor(held["J"]), 1e-6)
    close(model.shape_basis / 1000, torch.tensor(held["shapedirs"][..., :100]), 1e-6)
    close(model.exp_basis / 1000, torch.tensor(held["shapedirs"][..., 300:350]), 1e-6)
    close(model.pose_basis / 1000, torch.tensor(held["posedirs"]), 1e-6)
    assert model.faces.tolist() == held["f"].tolist() and Flame.from_file is from_flame
    everything = flame(num_shape=300, num_exp=100)
    assert everything.shape_basis.shape[2] == 300 and everything.exp_basis.shape[2] == 100


def test_flame_equals_deca():
    data, model = arrays("flame/deca_io.npz"), flame()
    pose = deca_pose(data["pose"], data["eye_pose"])
    verts = model.verts(data["shape"], data["expression"], pose)
    close(verts / 1000, data["vertices"], 1e-6)
    close(model.landmarks(verts, pose) / 1000, data["landmarks2d"], 1e-6)


def test_flame_fixed_landmarks_equal_deca(tmp_path):
    data = arrays("flame/deca_io.npz")
    held = dict(np.load(fixture("flame/landmark_embedding.npz"))) | {key: data[key].numpy() for key in ("full_lmk_faces_idx", "full_lmk_bary_coords")}
    np.savez(tmp_path / "embedding.npz", **held)
    model = from_flame(fixture("flame/FLAME_NEUTRAL.npz"), tmp_path / "embedding.npz")
    pose = deca_pose(data["pose"], data["eye_pose"])
    verts = model.verts(data["shape"], data["expression"], pose)
    close(model.landmarks(verts, pose, "fixed") / 1000, data["landmarks3d"], 1e-6)


def test_the_two_conventions_differ():
    data, model = arrays("flame/smplx_io.npz"), flame()
    turns = rodrigues(torch.stack([data["in_global_orient"], data["in_neck_pose"]], 1))
    assert (contour_row(turns, "deca") != contour_row(turns, "smplx")).any()
    assert model.parents == (-1, 0, 1, 1, 1)


@pytest.mark.parametrize("kind", ["plain", "python2", "chumpy", "sparse", "objects in float64", "male"])
def test_flame_pickles(kind, tmp_path):
    "The dialects that FLAME's files come in (2019, 2020, 2023; generic, female, male): Python 2 strings, NumPy 1 names, chumpy arrays, a sparse regressor. All equal the .npz, bit for bit."
    held = {key: value.item() if value.dtype.kind == "U" else value for key, value in np.load(fixture("flame/FLAME_NEUTRAL.npz")).items()}
    if kind in ("chumpy", "sparse", "male"):
        held["J_regressor"] = scipy.sparse.csc_matrix(held["J_regressor"])
    if kind == "chumpy":
        held |= {key: Chumpy(held[key]) for key in ("v_template", "shapedirs", "posedirs", "weights", "J")}
    if kind == "objects in float64":
        held |= {key: held[key].astype(np.float64) for key in ("v_template", "shapedirs", "posedirs", "weights")}
        held["f"], held["kintree_table"] = held["f"].astype(np.int32), held["kintree_table"].astype(np.int64)
    path = tmp_path / ("male_model.pkl" if kind == "male" else "generic_model.pkl")
    if kind == "plain":
        path.write_bytes(pickle.dumps(held, protocol=2))
    else:
        raw = write_python2_pickle(held, path).read_bytes()
        assert b"numpy.core.multiarray" in raw and b"numpy._core" not in raw and (b"cchumpy.ch\nCh\n" in raw) == (kind == "chumpy")
        assert (b"scipy.sparse.csc\n" in raw) == (kind in ("chumpy", "sparse", "male"))
    ours, theirs = from_flame(path), flame()
    for key in ("mean", "shape_basis", "exp_basis", "pose_basis", "joint_regressor", "weights", "faces"):
        assert torch.equal(getattr(ours, key), getattr(theirs, key)), key
    assert ours.parents == (-1, 0, 1, 1, 1) and ours.info["source"] == path.name


@pytest.mark.parametrize("change, said", [
    (dict(shapedirs=lambda x: x[..., :20]), "400"), (dict(v_template=lambda x: 1000 * x), "a thousandth"), (dict(v_template=lambda x: x[:, :2]), "v_template"), (dict(weights=lambda x: x[:, :4]), "weights"),
    (dict(f=lambda x: x + 200), "vertices"), (dict(kintree_table=lambda x: x[:, ::-1]), "parents"), (dict(posedirs=lambda x: x[..., :27]), "pose_basis"), (dict(posedirs=lambda x: x * np.nan), "NaN"), (dict(weights=lambda x: np.array({}, dtype=object)), "weights"),
])  # fmt: skip
def test_flame_of_another_version_or_unit(change, said, tmp_path):
    held = dict(np.load(fixture("flame/FLAME_NEUTRAL.npz")))
    held |= {key: edit(held[key]) for key, edit in change.items()}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(held, protocol=2))
    with pytest.raises(InputError) as caught:
        from_flame(tmp_path / "a.pkl")
    assert said in str(caught.value), caught.value


def test_flame_smplx_landmark_files(tmp_path):
    held = dict(np.load(fixture("flame/landmark_embedding.npz")))
    static = {"lmk_face_idx": held["static_lmk_faces_idx"], "lmk_b_coords": held["static_lmk_bary_coords"]}
    (tmp_path / "flame_static_embedding.pkl").write_bytes(pickle.dumps(static, protocol=2))
    np.save(tmp_path / "flame_dynamic_embedding.npy", np.array({"lmk_face_idx": held["dynamic_lmk_faces_idx"], "lmk_b_coords": held["dynamic_lmk_bary_coords"]}, dtype=object))
    torch_like = {key: torch.as_tensor(value.astype("int64") if value.dtype.kind in "iu" else value) for key, value in held.items()}
    np.save(tmp_path / "landmark_embedding.npy", np.array(torch_like, dtype=object))
    model = from_flame(fixture("flame/FLAME_NEUTRAL.npz"), [tmp_path / "flame_static_embedding.pkl", tmp_path / "flame_dynamic_embedding.npy"])
    deca = from_flame(fixture("flame/FLAME_NEUTRAL.npz"), tmp_path / "landmark_embedding.npy")
    verts = model.verts()
    close(model.landmarks(verts), flame().landmarks(verts), 0)
    close(deca.landmarks(verts), flame().landmarks(verts), 0)


# ICT-FaceKit: float64 from the file's own numbers; the file is in cm


def test_ict_layout(few_ict):
    "Two random faces computed in float64 from the whole file, and their 68 landmarks."
    model = from_ict(few_ict["path"])
    data = {key: torch.as_tensor(value) for key, value in few_ict.items() if isinstance(value, np.ndarray)}
    verts = model.verts(data["identity_code"].float(), data["expression_code"].float())
    close(verts, 10 * data["vertices_cm_f64"], 1e-3)
    close(model.landmarks(verts), 10 * data["landmarks_cm_f64"], 1e-3)
    assert model.dims == ((100, 53, 0) if few_ict["real"] else (80, 46, 0)) and model.info["exp_names"][20:22] == [str(name) for name in np.load(few_ict["path"])["expression_names"][20:22]]
    points = model.landmarks(model.verts())[0]
    if few_ict["real"]:
        close((points[36] - points[45]).norm(), torch.tensor(89.2), 0.1)
    few = from_ict(few_ict["path"], num_shape=7, num_exp=3)
    assert few.dims == (7, 3, 0) and torch.equal(few.shape_basis, model.shape_basis[..., :7]) and len(few.info["exp_names"]) == 3
    corner = model.mean[model.faces[torch.isin(model.faces, model.landmarks68).any(1)]]
    assert (torch.linalg.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])[:, 2] > 0).float().mean() > 0.8  # the triangles at the landmarks look to the viewer


def test_ict_landmarks_and_a_random_face():
    path = fixture("ict/ict_face9409.npz")
    model = from_ict(path)
    held = np.load(path)
    draw = np.random.default_rng(0)
    shape, exp = draw.standard_normal(100), draw.uniform(size=53)
    face = 10 * (held["mean"].astype("f8") + np.tensordot(shape, held["identity"].astype("f8"), 1) + np.tensordot(exp, held["expression"].astype("f8"), 1))
    verts = model.verts(torch.tensor(shape[None]).float(), torch.tensor(exp[None]).float())
    close(verts[0], torch.tensor(face), 1e-3)
    close(model.landmarks(verts)[0], torch.tensor(face[held["landmarks68"]]), 1e-3)
    # facts 3: outer eye corners 8.92 cm apart, jaw points 0 and 16 14.7 cm; iBUG 0 is image left = x < 0
    points = model.landmarks(model.verts())[0]
    close((points[36] - points[45]).norm(), torch.tensor(89.2), 0.1)
    close((points[0] - points[16]).norm(), torch.tensor(147.0), 1.0)
    assert points[0, 0] < 0 < points[16, 0] and points[8, 1] < points[30, 1] < points[27, 1] and points[30, 2] == points[:, 2].max()
    assert model.dims == (100, 53, 0) and "jawOpen" in model.info["exp_names"]


def test_ict_triangles_look_outwards():
    model = from_ict(fixture("ict/ict_face9409.npz"))
    corner = model.mean[model.faces]
    normal = torch.linalg.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
    tip = (model.faces == model.landmarks68[30]).any(1)
    assert (normal[tip].sum(0) / normal[tip].sum(0).norm())[2] > 0.9


def test_ict_full_file_has_the_same_face():
    small, full = from_ict(fixture("ict/ict_face9409.npz")), from_ict(fixture("ict/ict_facekit.npz"))
    assert full.num_verts == 26719 and torch.equal(full.mean[:9409], small.mean) and torch.equal(full.landmarks68, small.landmarks68)
    assert int(full.regions["face"].sum()) == 9409 and torch.equal(full.regions["face"].nonzero()[:, 0], torch.arange(9409))
    cropped = full.crop(full.regions["face"])
    assert cropped.faces.shape == small.faces.shape and torch.equal(cropped.shape_basis, small.shape_basis)


@pytest.fixture(scope="module")
def own_head(tmp_path_factory) -> Path:  # a few hundred vertices of the lab's own head, in ICT-FaceKit's layout
    folder = tmp_path_factory.mktemp("own")
    few_of_ict(write_ict(MorphableModel.procedural(), folder / "whole.npz"), folder / "few.npz")
    return folder / "few.npz"


# Stand-ins: another head, written in the licensed files' layouts, through the real readers


@pytest.fixture(scope="module")
def whole_ict() -> MorphableModel:
    return from_ict(fixture("ict/ict_face9409.npz"))


def test_ict_through_the_bfm2017_reader(few_ict, tmp_path):
    ict = from_ict(few_ict["path"])
    path = write_bfm2017(ict, tmp_path / "ict.h5", landmarks68=True)
    back = from_bfm2017(path, num_shape=None, num_exp=None, num_tex=None)
    code = torch.randn(2, ict.num_shape, generator=torch.Generator().manual_seed(0))
    blend = torch.rand(2, ict.num_exp, generator=torch.Generator().manual_seed(1))
    close(back.verts(code, blend), ict.verts(code, blend), 2e-3)
    assert torch.equal(back.landmarks68, ict.landmarks68) and torch.equal(back.faces, ict.faces)
    assert back.info["named"]["center.nose.tip"] == int(ict.landmarks68[30])


def test_ict_through_the_deep3d_reader(few_ict, tmp_path):
    ict = from_ict(few_ict["path"])
    back = from_bfm2009(write_bfm2009(ict.keep_modes(80), tmp_path / "ict.mat"))
    code = torch.randn(2, 80, generator=torch.Generator().manual_seed(0))
    close(back.verts(code), ict.verts(code), 2e-3)
    close(back.albedo(), ict.albedo(), 1e-6)
    assert torch.equal(back.landmarks68, ict.landmarks68) and torch.equal(back.info["front_faces"], ict.faces[: len(back.info["front_faces"])])


def test_the_original_2009_layout(tmp_path):
    "Micrometres, deviations, triangles that turn the other way: the same head as in Deep3D's layout, without expression."
    head = MorphableModel.procedural().keep_modes(6, 4, 5)
    back = from_bfm2009(write_bfm2009_original(head, tmp_path / "01_MorphableModel.mat"), num_shape=None, num_tex=None, landmarks68=range(68))
    code = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    close(back.verts(code), head.verts(code), 1e-3)
    close(back.albedo(code[:, :5]), head.albedo(code[:, :5]), 1e-5)
    assert torch.equal(back.faces.sort(1).values, head.faces.sort(1).values) and back.dims == (6, 0, 5)
    corner, same = back.mean[back.faces], head.mean[head.faces]
    turn = [torch.linalg.cross(c[:, 1] - c[:, 0], c[:, 2] - c[:, 0]) for c in (corner, same)]
    assert ((turn[0] * turn[1]).sum(1) >= 0).all()
    assert from_bfm2009(tmp_path / "01_MorphableModel.mat", num_shape=2, num_tex=3).dims == (2, 0, 3)
    with pytest.raises(InputError, match="a thousandth"):
        from_bfm2009(write_bfm2009_original(head, tmp_path / "nm.mat", unit=1e6))
    with pytest.raises(InputError, match="1000 times"):
        from_bfm2009(write_bfm2009_original(head, tmp_path / "mm.mat", unit=1.0))


def test_each_basel_reader_knows_the_other_years_file(tmp_path):
    with pytest.raises(InputError, match="from_bfm2017"):
        from_bfm2009(fixture("bfm17/model2017_synthetic.h5"))
    with pytest.raises(InputError, match="from_bfm2009"):
        from_bfm2017(fixture("bfm09/BFM_model_front.mat"))
    scipy.io.savemat(tmp_path / "facemodel_info.mat", {"tri": np.ones((5, 3)), "keypoints": np.ones((1, 68))})  # Deep3D's helper file, often taken for the model
    with pytest.raises(InputError, match="meanshape"):
        from_bfm2009(tmp_path / "facemodel_info.mat")


@pytest.mark.parametrize("change, said", [
    ({"shape/model/mean": lambda x: x / 1000, "expression/model/mean": lambda x: x / 1000}, "1000 times"), ({"shape/model/pcaVariance": lambda x: -x}, "negative variance"), ({"shape/model/pcaBasis": lambda x: x.T}, "pcaBasis"), ({"expression/model/mean": lambda x: x[:-3]}, "expression/model/mean"),
    ({"shape/representer/cells": lambda x: x + 1}, "cells"), ({"shape/representer/cells": lambda x: x.T}, "cells"), ({"color/model/mean": lambda x: x * np.nan}, "NaN"), ({"metadata/landmarks/json": lambda x: x[:40]}, "JSON"), ({"expression/model/pcaBasis": None}, "expression/model/pcaBasis"),
])  # fmt: skip
def test_bfm17_of_another_version_or_unit(change, said, tmp_path):
    path = tmp_path / "a.h5"
    shutil.copyfile(fixture("bfm17/model2017_synthetic.h5"), path)
    with h5py.File(path, "r+") as file:
        for name, edit in change.items():
            value = file[name][()]
            del file[name]
            if edit is not None:
                file[name] = edit(value)
    with pytest.raises(InputError) as caught:
        from_bfm2017(path)
    assert said in str(caught.value), caught.value


@pytest.mark.parametrize("name, value, said", [
    ("metadata", np.zeros(3), "metadata"), ("metadata/landmarks", np.zeros(3), "metadata"), ("metadata/landmarks68", "text", "landmarks68"), ("metadata/landmarks68", 5, "landmarks68"),
    ("metadata/landmarks68", np.zeros((68, 2), int), "landmarks68"), ("metadata/landmarks68", np.full(68, 224), "landmarks68"), ("metadata/landmarks/json", np.zeros(0, "S1"), "JSON"), ("shape", np.zeros(3), "shape/model/mean"),
])  # fmt: skip
def test_bfm17_with_other_things_in_place(name, value, said, tmp_path):
    path = tmp_path / "a.h5"
    shutil.copyfile(fixture("bfm17/model2017_synthetic.h5"), path)
    with h5py.File(path, "r+") as file:
        if name in file:
            del file[name]
        file[name] = value
    with pytest.raises(InputError, match=said):
        from_bfm2017(path)


@pytest.mark.parametrize("given", [["a"] * 68, np.zeros((68, 2), int), 5, [0.5] * 68, [224] * 68, [-1] * 68, [0] * 67])
def test_landmarks_of_the_caller(given):
    with pytest.raises(InputError, match="landmarks68"):
        from_bfm2017(fixture("bfm17/model2017_synthetic.h5"), landmarks68=given)


@pytest.mark.parametrize("count", [-1, 2.0, "2", True])
def test_how_many_modes(count, own_head):
    for read, path in ((from_bfm2017, fixture("bfm17/model2017_synthetic.h5")), (from_ict, own_head)):
        with pytest.raises(InputError, match="num_shape"):
            read(path, num_shape=count)
    with pytest.raises(InputError, match="num_tex"):
        from_bfm2009(fixture("bfm09/BFM_model_front.mat"), num_tex=count)
    with pytest.raises(InputError, match="num_exp"):
        MorphableModel.procedural().keep_modes(num_exp=count)
    assert from_ict(own_head, num_shape=0).dims[0] == 0


@pytest.mark.parametrize("change, said", [
    ({"uv": lambda x: np.array(0.5)}, "uv"), ({"uv": lambda x: np.array(["a", "b"])}, "uv"), ({"uv": lambda x: np.where(np.arange(len(x))[:, None] == 3, np.nan, x)}, "uv"), ({"uv": lambda x: np.c_[x, x[:, 0]]}, "uv"),
    ({"uv": None}, "triangles_uv"), ({"triangles": lambda x: x[:0], "triangles_uv": lambda x: x[:0]}, "triangles"), ({"triangles_uv": lambda x: x[:0]}, "triangles_uv"), ({"triangles_uv": lambda x: x.astype(str)}, "triangles_uv"),
    ({"triangles_uv": lambda x: x[:-1]}, "triangles_uv"), ({"triangles_uv": lambda x: x + 10_000}, "triangles_uv"), ({"expression_names": lambda x: np.array("jaw_open")}, "expression_names"), ({"expression_names": lambda x: x[:-1]}, "expression_names"),
    ({"region_names": lambda x: np.array("face"), "region_vertex_range": lambda x: np.zeros((1, 2), int)}, "region_names"), ({"region_names": lambda x: np.array(["face"]), "region_vertex_range": lambda x: np.array(["a"])}, "region_vertex_range"),
    ({"mean": lambda x: x[:0], "identity": lambda x: x[:, :0], "expression": lambda x: x[:, :0]}, "mean"), ({"units": lambda x: np.array(["cm", "mm"])}, "units"), ({"landmarks68": lambda x: x + 0.5}, "landmarks68"),
])  # fmt: skip
def test_ict_with_other_things_in_place(change, said, own_head, tmp_path):
    with np.load(own_head, allow_pickle=False) as file:
        held = dict(file)
    held |= {name: edit(held.get(name)) for name, edit in change.items() if edit is not None}
    np.savez(tmp_path / "a.npz", **{name: value for name, value in held.items() if change.get(name, True) is not None})
    with pytest.raises(InputError, match=said):
        from_ict(tmp_path / "a.npz")


def test_the_cropped_2017_file_serves_where_the_full_one_is_not(monkeypatch, tmp_path):
    from facelab.lab.assets import ASSETS

    monkeypatch.setenv("FACELAB_ASSETS", str(tmp_path))
    monkeypatch.setitem(ASSETS, "bfm2017-face12", replace(ASSETS["bfm2017-face12"], holds={"shape/model/mean": (3 * 224,)}))  # the fixture's size
    (tmp_path / "bfm2017-face12").mkdir()
    shutil.copyfile(fixture("bfm17/model2017_synthetic.h5"), tmp_path / "bfm2017-face12" / "model2017-1_face12_nomouth.h5")
    model = MorphableModel.from_bfm2017()
    assert model.num_verts == 224 and model.info["source"] == "model2017-1_face12_nomouth.h5"


def test_procedural_through_both_readers(tmp_path):
    head = MorphableModel.procedural()
    assert head.dims == (80, 64, 80)
    code = torch.randn(2, 80, generator=torch.Generator().manual_seed(0))
    seventeen = from_bfm2017(write_bfm2017(head, tmp_path / "p.h5"))
    nine = from_bfm2009(write_bfm2009(head, tmp_path / "p.mat"))
    for back in (seventeen, nine):
        close(back.verts(code, code[:, :64]), head.verts(code, code[:, :64]), 2e-3)
        close(back.albedo(code), head.albedo(code), 1e-5)


def test_carried_over_landmarks_are_near_the_true_ones(whole_ict):
    code = torch.randn(1, 100, generator=torch.Generator().manual_seed(0))
    face = whole_ict.verts(code)[0]
    bare = replace(whole_ict, mean=face, landmarks68=None)
    found = transfer_landmarks(whole_ict, bare, {point: int(whole_ict.landmarks68[point]) for point in NAMED_IBUG.values()})
    away = (face[found.landmarks68] - face[whole_ict.landmarks68]).norm(dim=1)
    assert away[17:].mean() < 1.5 and away[:17].mean() < 6.0  # mm


def test_carried_over_colours_and_regions(whole_ict):
    head = MorphableModel.procedural()
    painted = transfer_regions(head, transfer_albedo(head, whole_ict))
    lips = painted.landmarks68[[50, 51, 52, 57]]
    cheek = ((whole_ict.mean - torch.tensor([45.0, 0.0, 85.0])).norm(dim=1)).argmin()
    assert painted.num_tex == 80 and (painted.tex_mean[lips, 1] < painted.tex_mean[cheek, 1]).all()  # lips are less green
    nose = (painted.faces == painted.landmarks68[30]).any(1)
    assert REGION_NAMES[int(painted.region_ids[nose][0])] == "nose" and "procedural" in painted.info["albedo"]


# Bad files


@pytest.mark.parametrize("read", [from_bfm2017, from_bfm2009, from_ict, from_flame])
@pytest.mark.parametrize("kind", ["empty", "text", "cut", "other", "folder", "missing"])
def test_bad_files_meet_one_error(read, kind, own_head, tmp_path):
    path = tmp_path / {from_bfm2017: "a.h5", from_bfm2009: "a.mat", from_ict: "a.npz", from_flame: "a.pkl"}[read]
    good = {from_bfm2017: "bfm17/model2017_synthetic.h5", from_bfm2009: "bfm09/BFM_model_front.mat", from_flame: "flame/FLAME_NEUTRAL.npz"}
    if kind == "folder":
        path.mkdir()
    elif kind == "cut":
        raw = (own_head if read is from_ict else fixture(good[read])).read_bytes()
        path.write_bytes(raw[: len(raw) // 2])
    elif kind == "other":
        path.write_bytes(fixture("flame/smplx_io.npz").read_bytes())
    elif kind != "missing":
        path.write_bytes(b"" if kind == "empty" else "Grüße, this is no model".encode("latin1"))
    with pytest.raises(InputError) as caught:
        read(path)
    assert caught.value.came and caught.value.needed and caught.value.fix


@pytest.mark.parametrize("read, name", [(from_bfm2017, "bfm17/model2017_synthetic.h5"), (from_bfm2009, "bfm09/BFM_model_front.mat"), (from_ict, "own_head.npz"), (from_flame, "flame/FLAME_NEUTRAL.npz"), (from_flame, "pickle")])
def test_damaged_files_give_one_error_or_a_sound_model(read, name, own_head, tmp_path):
    "Cuts everywhere and flipped bytes: an InputError, or a model whose numbers are finite; never anything else."
    if name == "pickle":
        raw = write_python2_pickle({key: Chumpy(value) if key == "weights" else value for key, value in np.load(fixture("flame/FLAME_NEUTRAL.npz")).items() if value.dtype.kind in "fiu"}, tmp_path / "a.pkl").read_bytes()
    else:
        raw = (own_head if read is from_ict else fixture(name)).read_bytes()
    path = tmp_path / f"damaged{'.pkl' if name == 'pickle' else Path(name).suffix}"
    draw, refused = np.random.default_rng(0), 0
    cuts = [raw[: int(len(raw) * part)] for part in (0.001, 0.01, 0.3, 0.7, 0.99)] + [raw[:-1]]
    flips = []
    for at in [*draw.integers(0, 2000, 15), *draw.integers(0, len(raw), 10)]:
        flipped = bytearray(raw)
        flipped[at] ^= int(draw.integers(1, 256))
        flips.append(bytes(flipped))
    for damaged in [*cuts, *flips]:
        path.write_bytes(damaged)
        try:
            model = read(path)
        except InputError as error:
            assert error.came and error.needed and error.fix
            refused += 1
        else:
            assert torch.isfinite(model.mean).all() and torch.isfinite(model.shape_basis).all() and 0 <= int(model.faces.min()) <= int(model.faces.max()) < len(model.mean)
    assert refused >= len(cuts) - 1  # the last byte of some formats is padding


@pytest.mark.parametrize("read, file", [(from_bfm2017, "model2017-1_bfm_nomouth.h5"), (from_bfm2009, "BFM_model_front.mat"), (from_flame, "generic_model.pkl")])
def test_a_missing_licensed_file_is_named_with_its_terms(read, file, monkeypatch, tmp_path):
    monkeypatch.setenv("FACELAB_ASSETS", str(tmp_path))
    with pytest.raises(AssetError) as caught:
        read()
    assert file in str(caught.value) and str(tmp_path) in str(caught.value) and "Terms" in caught.value.fix


def test_a_users_file_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("FACELAB_ASSETS", str(tmp_path))
    (tmp_path / "ict-facekit").mkdir()
    shutil.copyfile(fixture("ict/ict_facekit.npz"), tmp_path / "ict-facekit" / "ict_facekit.npz")
    assert from_ict(num_shape=2).num_verts == 26719


class Runs:
    def __reduce__(self):
        return eval, ("__import__('os').environ.__setitem__('FACELAB_WAS_RUN', '1')",)


def test_a_flame_pickle_that_runs_code_is_refused(tmp_path):
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"v_template": Runs()}))
    with pytest.raises(UnsafeFileError):
        from_flame(path)
    assert "FACELAB_WAS_RUN" not in os.environ
