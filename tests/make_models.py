"Writes free heads in the layouts of licensed files, so that tests read them through the real readers."

import json
import pickle
from pathlib import Path

import h5py
import numpy as np
import scipy.io

from facelab.face.morphable import MorphableModel

NAMED = {"center.nose.tip": 30, "center.chin.tip": 8, "right.eye.corner_outer": 36, "left.eye.corner_outer": 45, "right.lips.corner": 48, "left.lips.corner": 54}


def _unit_columns(basis) -> tuple[np.ndarray, np.ndarray]:  # (3v, k) of unit columns, and their variances
    flat = basis.numpy().astype(np.float64).reshape(3 * len(basis), basis.shape[2])
    length = np.linalg.norm(flat, axis=0)
    return (flat / np.where(length > 0, length, 1)).astype(np.float32), (length**2).astype(np.float64)


def write_bfm2017(model: MorphableModel, path: Path, landmarks68: bool = False) -> Path:
    "statismo's tree: unit columns with variances beside them, cells (3, f) from 0, some landmarks by name as JSON bytes. Basel's files have no list of the 68: `landmarks68` adds one."
    v = model.num_verts
    with h5py.File(path, "w") as file:
        for part, mean, basis in (("shape", model.mean, model.shape_basis), ("expression", 0 * model.mean, model.exp_basis), ("color", model.tex_mean, model.tex_basis)):
            columns, variance = _unit_columns(basis)
            file[f"{part}/model/mean"] = mean.numpy().astype(np.float32).ravel()
            file[f"{part}/model/pcaBasis"], file[f"{part}/model/pcaVariance"], file[f"{part}/model/noiseVariance"] = columns, variance, np.zeros(1, np.float32)
            file[f"{part}/representer/points"], file[f"{part}/representer/cells"] = np.zeros((3, v), np.float32), model.faces.numpy().T.astype(np.int32)
        if model.landmarks68 is not None:
            at = model.landmarks(model.mean[None])[0].numpy()
            marks = json.dumps([{"id": name, "coordinates": [float(x) for x in at[index]]} for name, index in NAMED.items()])
            file["metadata/landmarks/json"] = np.frombuffer(marks.encode(), np.int8)
            if not landmarks68:
                return path
            nearest = [int(((model.mean.numpy() - point) ** 2).sum(1).argmin()) for point in at]
            file["metadata/landmarks68"] = np.array(nearest if isinstance(model.landmarks68, tuple) else model.landmarks68.tolist(), np.int32)
    return path


def write_bfm2009(model: MorphableModel, path: Path) -> Path:
    "Deep3D's BFM_model_front.mat: decimetres, 0..255, deviations multiplied in, float32 indices from 1; the front mask is the first third of the faces."
    row = lambda x, unit: (x.numpy().astype(np.float64) * unit).astype(np.float32).reshape(1, -1)
    columns = lambda x, unit: (x.numpy().astype(np.float64) * unit).astype(np.float32).reshape(-1, x.shape[2]) if x.shape[2] else np.zeros((3 * model.num_verts, 1), np.float32)
    front = model.faces[: len(model.faces) // 3].numpy()
    used, reduced = np.unique(front, return_inverse=True)
    at = model.landmarks(model.mean[None])[0].numpy()
    ids = np.array([((model.mean.numpy() - point) ** 2).sum(1).argmin() for point in at]) if isinstance(model.landmarks68, tuple) else model.landmarks68.numpy()
    scipy.io.savemat(path, {
        "meanshape": row(model.mean, 0.01), "idBase": columns(model.shape_basis, 0.01), "exBase": columns(model.exp_basis, 0.01),
        "meantex": row(model.tex_mean, 255), "texBase": columns(model.tex_basis, 255), "tri": model.faces.numpy().astype(np.float32) + 1,
        "keypoints": (ids[None] + 1).astype(np.float32), "skinmask": np.ones((1, model.num_verts), np.float32),
        "frontmask2_idx": used[:, None].astype(np.float32) + 1, "tri_mask2": reduced.reshape(front.shape).astype(np.float32) + 1,
    })  # fmt: skip
    return path


def write_bfm2009_original(model: MorphableModel, path: Path, unit: float = 1000.0) -> Path:
    "01_MorphableModel.mat: micrometres (`unit` of them in a mm), 0..255, unit columns with deviations beside them, triangles from 1 and turning the other way; no expression, no landmarks."
    parts = {}
    for name, mean, basis, factor in (("shape", model.mean, model.shape_basis, unit), ("tex", model.tex_mean, model.tex_basis, 255.0)):
        columns, variance = _unit_columns(basis)
        parts |= {f"{name}MU": factor * mean.numpy().reshape(-1, 1), f"{name}PC": columns, f"{name}EV": factor * np.sqrt(variance)[:, None].astype(np.float32)}
    scipy.io.savemat(path, parts | {"tl": model.faces.numpy()[:, ::-1].astype(np.uint16) + 1})
    return path


def write_ict(model: MorphableModel, path: Path) -> Path:
    "The lab's layout of ICT-FaceKit: centimetres, modes first, float16 displacements, named blendshapes, a UV map with seams."
    named = model.info["blendshapes"]
    modes = lambda fields: np.stack([np.asarray(field, np.float64) / 10 for field in fields]).astype(np.float16)
    np.savez(
        path, mean=(model.mean.numpy() / 10).astype(np.float32), identity=modes(model.shape_basis.unbind(-1)), expression=modes(named.values()), expression_names=np.array(list(named)),
        triangles=model.faces.numpy().astype(np.int32), uv=model.uv.numpy(), triangles_uv=model.uv_faces.numpy().astype(np.int32), landmarks68=model.landmarks68.numpy().astype(np.int32), units=np.array("cm"),
    )  # fmt: skip
    return path


def few_of_ict(path: Path, out: Path) -> dict[str, np.ndarray]:
    "The triangles at the landmarks and at 20 vertices of the UV seams of a file in that layout, as a file of its own; two random faces of it in float64, of the whole file's numbers and in cm."
    with np.load(path, allow_pickle=False) as file:
        held = {key: file[key] for key in ("mean", "identity", "expression", "expression_names", "triangles", "uv", "triangles_uv", "landmarks68", "units")}
    at = held["landmarks68"]
    vertex, rows = np.unique(np.unique(np.stack([held["triangles"].ravel(), held["triangles_uv"].ravel()]), axis=1)[0], return_counts=True)
    seam = vertex[rows > 1][:20]
    keep = np.unique(held["triangles"][np.isin(held["triangles"], np.concatenate([at, seam])).any(1)])
    inside = np.isin(held["triangles"], keep).all(1)
    uv, corners = np.unique(held["triangles_uv"][inside], return_inverse=True)
    np.savez(
        out, mean=held["mean"][keep], identity=held["identity"][:, keep], expression=held["expression"][:, keep], expression_names=held["expression_names"], units=held["units"],
        triangles=np.searchsorted(keep, held["triangles"][inside]), uv=held["uv"][uv], triangles_uv=corners.reshape(-1, 3), landmarks68=np.searchsorted(keep, at),
    )  # fmt: skip
    draw = np.random.RandomState(20201)
    codes = {"identity": draw.standard_normal((2, len(held["identity"]))), "expression": draw.uniform(size=(2, len(held["expression"])))}
    face = held["mean"].astype(np.float64) + sum(np.tensordot(code, held[key].astype(np.float64), 1) for key, code in codes.items())
    return {"identity_code": codes["identity"], "expression_code": codes["expression"], "vertices_cm_f64": face[:, keep], "landmarks_cm_f64": face[:, at]}


class Python2Pickler(pickle._Pickler):
    "Writes what Python 2, NumPy 1 and an old scipy wrote: byte strings for text, and the modules' old names."

    dispatch = dict(pickle._Pickler.dispatch)
    NAMES = {"numpy._core.multiarray": "numpy.core.multiarray", "scipy.sparse._csc": "scipy.sparse.csc", "builtins": "__builtin__"}

    def save_string(self, obj):
        raw = obj.encode("latin1") if isinstance(obj, str) else obj
        self.write(b"U" + bytes([len(raw)]) + raw if len(raw) < 256 else b"T" + len(raw).to_bytes(4, "little") + raw)
        self.memoize(obj)

    dispatch[str] = dispatch[bytes] = save_string

    def save_global(self, obj, name=None):
        module = getattr(obj, "module_in_file", obj.__module__)
        self.write(f"c{self.NAMES.get(module, module)}\n{getattr(obj, 'name_in_file', obj.__name__)}\n".encode())
        self.memoize(obj)


class Chumpy:
    "Stands for chumpy.ch.Ch where a pickle is written."

    module_in_file, name_in_file = "chumpy.ch", "Ch"

    def __init__(self, x):
        self.x = x

    def __reduce__(self):
        return (type(self), (), {"x": self.x, "_depends_on_deps": {}, "_dirty_vars": set()})


def write_python2_pickle(held: dict, path: Path) -> Path:
    "A protocol-2 pickle as FLAME's are."
    with open(path, "wb") as file:
        Python2Pickler(file, protocol=2).dump(held)
    return path
