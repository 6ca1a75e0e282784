"""Every reader meets bad input with one clear error: what came, what was needed, what to do; nothing written, no hang.

To add a reader: a row in READERS gives it the six cases that every file can meet (missing, empty, folder, link loop, another kind of file, cut short);
rows in ROWS are cases of its own, `Row(reader's name, case, reader, make)`, where `make(folder)` writes the bad file and returns its path.
"""

import io
import json
import os
import pickle
import signal
import struct
import tarfile
import threading
import warnings
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from facelab.data.celeba_hq import read_mapping
from facelab.data.laion_face import TarLimits, read_shard
from facelab.data.lapa import read_lapa_labels, read_lapa_points, write_lapa_points
from facelab.data.raf_db import read_raf_list
from facelab.data.w300 import read_pts, write_pts
from facelab.face.export import read_mesh
from facelab.lab.arrays import read_h5, read_mat, read_npz, read_safetensors, require, safetensors_metadata, write_safetensors
from facelab.lab.assets import shapes_in
from facelab.lab.base import load_base
from facelab.lab.errors import InputError, Skipped, UnsafeFileError
from facelab.lab.files import file_sha256, read_csv, read_json, read_text, read_yaml, safe_join, write_json
from facelab.lab.images import read_image, resize, write_image
from facelab.lab.profile import profile_values, stages
from facelab.lab.record import Record, load_record
from facelab.lab.record import Row as Measured
from facelab.lab.run import run_stage
from facelab.lab.unpickle import load_checkpoint, load_pickle

SECONDS = 60  # longer than this is a hang, also on a busy machine


class Row(NamedTuple):
    reader: str
    case: str
    read: Callable[[Path], Any]
    make: Callable[[Path], Any]  # writes the bad file into a folder, returns what `read` takes
    kind: type = InputError  # the class expected: InputError or a subclass


# Good files, which the cases then spoil


def good_text(path):
    path.write_text("a face\n" * 40)


def good_json(path):
    write_json(path, {"landmarks": [[1.5, 2.5]] * 40})


def good_csv(path):
    path.write_text("id,nme\n" + "".join(f"{i},{i / 7:.4f}\n" for i in range(40)))


def good_yaml(path):
    path.write_text("profile: mini\nsteps: 300\nsizes: [64, 128]\nnames: {a: 'b'}\n")


def good_png(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(path)


def good_npz(path):
    np.savez_compressed(path, mean=np.random.default_rng(0).normal(size=(50, 3)), faces=np.zeros((9, 3), int))


def good_mat(path):
    scipy.io.savemat(path, {"meanshape": np.random.default_rng(0).normal(size=(1, 150)), "tri": np.ones((4, 3))}, do_compression=True)


def good_h5(path):
    with h5py.File(path, "w") as file:
        file["shape/model/mean"] = np.random.default_rng(0).normal(size=300)


def good_pickle(path):
    path.write_bytes(pickle.dumps({"v_template": np.random.default_rng(0).normal(size=(50, 3)), "style": "lbs"}, 2))


def good_checkpoint(path):
    torch.save({"state_dict": {"conv.weight": torch.ones(8, 3, 3, 3)}}, path)


def good_safetensors(path):
    write_safetensors(path, {"conv.weight": torch.ones(8, 3, 3, 3)}, {"step": "3"})


def good_obj(path):
    path.write_text("".join(f"v {i}.5 {i * i}.25 0.125\n" for i in range(9)) + "f 1 2 3\nf 4 5 6\nf 7 8 9\n")


def good_pts(path):
    write_pts(path, np.random.default_rng(0).uniform(0, 90, (68, 2)))


def good_lapa_points(path):
    write_lapa_points(path, np.random.default_rng(0).uniform(0, 90, (106, 2)))


def good_lapa_labels(path):
    write_image(path, np.random.default_rng(0).integers(0, 11, (24, 24), np.uint8))


def good_raf_list(path):
    path.write_text("".join(f"train_{i:05d}.jpg {i % 7 + 1}\n" for i in range(1, 40)))


def good_raf_csv(path):
    path.write_text("image,label\n" + "".join(f"test_{i:04d}_aligned.jpg,{i % 7 + 1}\n" for i in range(1, 40)))


def good_mapping(path):
    path.write_text("idx orig_idx orig_file\n" + "".join(f"{i} {i * 7} {i * 7 + 1:06d}.jpg\n" for i in range(40)))


def tar_with(*members, kind=tarfile.USTAR_FORMAT, cut=0):
    "A tar of (name, bytes), or of TarInfos for what has no bytes; without its last `cut` bytes."

    def make(path):
        held = io.BytesIO()
        with tarfile.open(fileobj=held, mode="w", format=kind) as file:
            for member in members:
                info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member[0])
                data = b"" if info is member else member[1]
                info.size = info.size or len(data)
                file.addfile(info, io.BytesIO(data))
        path.write_bytes(held.getvalue()[: len(held.getvalue()) - cut])

    return make


def linked(name):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return info


good_tar = tar_with(*((f"00000000{k}.{s}", d) for k in range(3) for s, d in (("jpg", b"\xff\xd8" + bytes(4998)), ("json", b"{}"), ("txt", b"a face"))))


def good_record(path):
    write_json(path, record_with())


def record_with(**changed):
    "A record as JSON, with some keys changed."
    plain = vars(Record("face-fit", "facegpt", "mini", "full", 0, {"steps": 3}, []))
    return plain | {"rows": [vars(Measured("ours", "nme", 0.5, n=8))]} | changed


READERS = {  # name -> (reader, suffix, writes a good file, can a file cut in the middle be told from a whole one?)
    "text": (read_text, ".txt", good_text, False),
    "json": (read_json, ".json", good_json, True),
    "csv": (read_csv, ".csv", good_csv, False),  # its own rows have the cuts that can be told
    "yaml": (read_yaml, ".yaml", good_yaml, False),
    "image": (read_image, ".png", good_png, True),
    "npz": (read_npz, ".npz", good_npz, True),
    "npz heads": (shapes_in, ".npz", good_npz, True),
    "mat": (read_mat, ".mat", good_mat, True),
    "mat heads": (shapes_in, ".mat", good_mat, True),
    "h5": (read_h5, ".h5", good_h5, True),
    "pickle": (load_pickle, ".pkl", good_pickle, True),
    "checkpoint": (load_checkpoint, ".pt", good_checkpoint, True),
    "safetensors": (read_safetensors, ".safetensors", good_safetensors, True),
    "obj": (read_mesh, ".obj", good_obj, False),
    "pts": (read_pts, ".pts", good_pts, True),
    "record": (load_record, ".json", good_record, True),
    "lapa points": (read_lapa_points, ".txt", good_lapa_points, True),
    "lapa labels": (read_lapa_labels, ".png", good_lapa_labels, True),
    "raf list": (read_raf_list, ".txt", good_raf_list, False),
    "raf csv": (read_raf_list, ".csv", good_raf_csv, False),
    "hq mapping": (read_mapping, ".txt", good_mapping, False),
    "laion tar": (lambda path: list(read_shard(path)), ".tar", good_tar, True),
}


def common(name, read, suffix, good, cut):
    "The cases that every reader of a file can meet."

    def named(write):
        def make(folder):
            path = folder / f"bad{suffix}"
            write(path)
            return path

        return make

    def halve(path):
        good(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])

    other = b"%PDF-1.7\n\xff\xfe\x00\x80" + bytes(range(256)) * 4
    yield Row(name, "missing", read, named(lambda path: None))
    yield Row(name, "empty", read, named(lambda path: path.write_bytes(b"")))
    yield Row(name, "a folder", read, named(lambda path: path.mkdir()))
    yield Row(name, "a link to itself", read, named(lambda path: path.symlink_to(path)))
    yield Row(name, "a pipe", read, named(os.mkfifo))
    yield Row(name, "another kind of file", read, named(lambda path: path.write_bytes(other)))
    if cut:
        yield Row(name, "cut short", read, named(halve))


def write(name, data):
    "A `make` that writes these bytes (or this text)."

    def make(folder):
        path = folder / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return make


def picture(name, image, **options):
    def make(folder):
        image().save(folder / name, **options)
        return folder / name

    return make


def arrays(name, save):
    def make(folder):
        save(folder / name)
        return folder / name

    return make


def png_of(width, height, depth=8, colour=2, data=b"", text=b""):
    "A well-formed PNG head of this size with whatever data."

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)) + (chunk(b"zTXt", b"a\0\0" + text) if text else b"") + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def jpeg(**options):
    held = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(held, "JPEG", **options)
    return held.getvalue()


def head(shape, kind="<f8"):
    "A .npy that claims this shape and has no numbers."
    text = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}}}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def zipped(**members):
    def save(path):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, data in members.items():
                file.writestr(f"{name}.npy", data)

    return save


def saved_npy(array):
    held = io.BytesIO()
    np.save(held, array, allow_pickle=True)
    return held.getvalue()


def h5(write):
    def save(path):
        with h5py.File(path, "w") as file:
            write(file, path)

    return save


def safetensors_of(text, numbers=b""):
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw + numbers


def mat_with(**variables):
    return arrays("a.mat", lambda path: scipy.io.savemat(path, variables))


def need(spec):
    "Read an npz and say what it needs."
    return lambda path: require(read_npz(path), path, spec)


MODEL = {"mean": ("v", 3, float), "basis": ("v", 3, "k", float), "faces": ("f", 3, int)}


def model(**changed):
    parts = {"mean": np.zeros((5, 3)), "basis": np.zeros((5, 3, 2)), "faces": np.zeros((4, 3), int)} | changed
    return arrays("model.npz", lambda path: np.savez(path, **{name: part for name, part in parts.items() if part is not None}))


def record(**changed):
    return arrays("record.json", lambda path: path.write_text(json.dumps(record_with(**changed))))


def points(rows, said=None, brace="}"):
    return write("a.pts", f"version: 1\nn_points: {len(rows) if said is None else said}\n{{\n" + "\n".join(rows) + f"\n{brace}\n")


def profile(text):
    "A checkout whose smoke profile of the stage `fit` is this text."

    def make(folder):
        (folder / "profiles" / "smoke").mkdir(parents=True)
        (folder / "profiles" / "smoke" / "fit.yaml").write_text(text)
        return folder

    return make


def run_with(stage="face-fit", **changed):
    "Run a stage of the smoke profile with some values changed; the experiment itself must not begin."
    return lambda folder: run_stage(stage, "smoke", profile_values(stage, "smoke") | changed, folder / "out", lambda job: pytest.fail("it was run"))


def nothing(folder):
    return folder


def pipeline(text):
    "A checkout whose pipeline is this text."

    def make(folder):
        (folder / "dvc.yaml").write_text(text)
        return folder

    return make


def base(write):
    "A folder of bases whose one base, `toy`, has the weights that `write` puts there."

    def make(folder):
        (folder / "toy").mkdir()
        write(folder / "toy" / "model.safetensors")
        return folder

    return make


def load_toy(folder):
    return load_base("toy", folder)


def tiff(*entries):
    "A 16 x 16 grey TIFF of these directory entries and a few bytes."
    entries = sorted([(256, 16), (257, 16), (258, 8), (262, 1), (277, 1), *entries])
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries) + bytes(68)


def webp_of(width, height):
    "A lossless WebP whose head claims this size."
    held = io.BytesIO()
    Image.new("RGB", (16, 16)).save(held, "WEBP", lossless=True)
    raw = bytearray(held.getvalue())
    at = raw.find(b"VP8L") + 9
    raw[at : at + 4] = struct.pack("<I", (width - 1) | (height - 1) << 14)
    return bytes(raw)


def gif_of(width, height):
    "A 4 x 4 GIF whose frame claims this size."
    return b"GIF89a" + struct.pack("<HH", 4, 4) + b"\x80\0\0" + bytes(6) + b"," + struct.pack("<HHHH", 0, 0, width, height) + b"\0\x02\x01\0\0;"


def packed(method):
    "An npz of eight megabytes of zeros, packed by this method."

    def save(path):
        with zipfile.ZipFile(path, "w", method) as file:
            file.writestr("a.npy", head("(1000000,)") + bytes(8 * 10**6))

    return save


def glb(head_of):
    raw = json.dumps({"asset": {"version": "2.0"}} | head_of).encode()
    return b"glTF" + struct.pack("<II", 2, 20 + len(raw)) + struct.pack("<I", len(raw)) + b"JSON" + raw


def nan_in(shape, value=np.nan):
    array = np.zeros(shape)
    array.flat[-1] = value
    return array


def loop_in(folder):
    (folder / "a").symlink_to(folder / "b")
    (folder / "b").symlink_to(folder / "a")
    return folder / "a" / "x.png"


def external(file, path):
    file.create_dataset("mean", (4,), "f8", external=[("/etc/passwd", 0, 32)])


def virtual(file, path):
    layout = h5py.VirtualLayout((4,), "f8")
    layout[:] = h5py.VirtualSource("/etc/other.h5", "mean", (4,))
    file.create_virtual_dataset("mean", layout)


UNSAFE = UnsafeFileError
ROWS = [
    *(row for name, parts in READERS.items() for row in common(name, *parts)),
    # text, JSON, CSV, YAML
    Row("text", "Latin-1", read_text, write("a.txt", b"Gr\xfc\xdfe")),
    Row("text", "UTF-16", read_text, write("a.txt", "face".encode("utf-16"))),
    Row("text", "zero bytes", read_text, write("a.txt", b"a\0b")),
    Row("text", "too large", lambda path: read_text(path, max_bytes=10), write("a.txt", "a" * 11), UNSAFE),
    Row("text", "a zero in the name", read_text, lambda folder: f"{folder}/a\0b"),
    Row("text", "a name of 5,000 letters", read_text, lambda folder: folder / ("a" * 5000)),
    Row("text", "an endless device", read_text, lambda folder: Path("/dev/zero")),
    Row("sha256", "missing", file_sha256, lambda folder: folder / "none"),
    Row("json", "NaN", read_json, write("a.json", '{"loss": NaN}')),
    Row("json", "infinity", read_json, write("a.json", "[-Infinity]")),
    Row("json", "a number beyond range", read_json, write("a.json", "[1e400]")),
    Row("json", "a key twice", read_json, write("a.json", '{"a": 1, "a": 2}')),
    Row("json", "brackets 200,000 deep", read_json, write("a.json", "[" * 200_000), UNSAFE),
    Row("json", "a number of 10,000 digits", read_json, write("a.json", "[" + "1" * 10_000 + "]")),
    Row("json", "Latin-1", read_json, write("a.json", b'{"name": "\xe9"}')),
    Row("json", "Python's quotes", read_json, write("a.json", "{'a': 1}")),
    Row("json", "the last of 200,000 keys twice", read_json, write("a.json", "{" + "".join(f'"k{i}": 1, ' for i in range(200_000)) + '"k199999": 2}')),
    Row("json", "a lone half of a pair", read_json, write("a.json", b'["\xed\xb2\x80"]')),
    Row("write_json", "a file name that is not UTF-8", lambda path: write_json(path, {"picture": os.fsdecode(b"\xff.png")}), lambda folder: folder / "a.json"),
    Row("csv", "5,000 columns, not the needed one", lambda path: read_csv(path, ["auc"]), write("a.csv", ",".join(f"c{i}" for i in range(5000)) + "\n")),
    Row("csv", "a short last row", read_csv, write("a.csv", "id,nme\n1,2\n3")),
    Row("csv", "a long row", read_csv, write("a.csv", "id,nme\n1,2,3\n")),
    Row("csv", "a column twice", read_csv, write("a.csv", "id,id\n1,2\n")),
    Row("csv", "no header", read_csv, write("a.csv", "\n\n")),
    Row("csv", "a missing column", lambda path: read_csv(path, ["auc"]), write("a.csv", "id\n1\n")),
    Row("csv", "an open quote", read_csv, write("a.csv", 'id,name\n1,"open\n')),
    Row("csv", "semicolons", lambda path: read_csv(path, ["id", "nme"]), write("a.csv", "id;nme\n1;2\n")),
    Row("yaml", "a key twice", read_yaml, write("a.yaml", "lr: 1\nlr: 2\n")),
    Row("yaml", "a float without a dot", read_yaml, write("a.yaml", "lr: 1e-4\n")),
    Row("yaml", "a list", read_yaml, write("a.yaml", "- a\n")),
    Row("yaml", "only comments", read_yaml, write("a.yaml", "# nothing\n")),
    Row("yaml", "numbers as keys", read_yaml, write("a.yaml", "1: a\n")),
    Row("yaml", "an open bracket", read_yaml, write("a.yaml", "a: [1, 2\n")),
    Row("yaml", "tabs", read_yaml, write("a.yaml", "a:\n\tb: 1\n")),
    Row("yaml", "a call", read_yaml, write("a.yaml", "a: !!python/object/apply:os.system ['touch hacked']\n"), UNSAFE),
    Row("yaml", "a module", read_yaml, write("a.yaml", "a: !!python/module:antigravity\n"), UNSAFE),
    Row("yaml", "a billion laughs", read_yaml, write("a.yaml", "a: &a [x, x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)))),
    Row("yaml", "NaN", read_yaml, write("a.yaml", "a: .nan\n")),
    Row("yaml", "a float beyond range", read_yaml, write("a.yaml", "a: 1.0e+999\n")),
    Row("yaml", "half a megabyte", read_yaml, write("a.yaml", "".join(f"k{i}: 1\n" for i in range(50_000))), UNSAFE),
    Row("yaml", "brackets 5,000 deep", read_yaml, write("a.yaml", "a: " + "[" * 5_000)),
    Row("yaml", "two documents", read_yaml, write("a.yaml", "a: 1\n---\nb: 2\n")),
    Row("yaml", "Latin-1", read_yaml, write("a.yaml", b"a: \xe9\n")),
    # profiles and records
    Row("profile", "an unknown profile", lambda folder: profile_values("fit", "huge", folder), profile("seed: 0\n")),
    Row("profile", "no file for the stage", lambda folder: profile_values("train", "smoke", folder), profile("seed: 0\n")),
    Row("profile", "a value that is a mapping", lambda folder: profile_values("fit", "smoke", folder), profile("model: {size: 3}\n")),
    Row("profile", "a list of lists", lambda folder: profile_values("fit", "smoke", folder), profile("sizes: [[1, 2], [3]]\n")),
    Row("profile", "a list at the top", lambda folder: profile_values("fit", "smoke", folder), profile("- seed\n")),
    Row("profile", "a rate that YAML reads as text", lambda folder: profile_values("fit", "smoke", folder), profile("lr: 1e-4\n")),
    Row("profile", "a path to another profile's file", lambda folder: profile_values("../smoke/fit", "smoke", folder), profile("seed: 0\n")),
    Row("profile", "a path in the lab itself", lambda folder: run_stage("../mini/face-fit", "smoke", None, folder / "out"), nothing),
    Row("values", "steps in words", run_with(steps="ten"), nothing),
    Row("values", "no size", run_with(size=None), nothing),
    Row("values", "a number as a folder", run_with(data=3), nothing),
    Row("values", "no embedder", run_with(embedder=None), nothing),
    Row("values", "half a face", run_with(faces=2.5), nothing),
    Row("values", "a seed in words", run_with(seed="x"), nothing),
    Row("values", "a seed below 0", run_with(seed=-1), nothing),
    Row("values", "threads in words", run_with(threads="two"), nothing),
    Row("values", "no face", run_with(faces=0), nothing),
    Row("values", "a batch of none", run_with(batch=0), nothing),
    Row("values", "a batch below 0", run_with(batch=-1), nothing),
    Row("values", "a picture of no pixel", run_with(size=0), nothing),
    Row("values", "steps below 0", run_with(steps=-4), nothing),
    Row("values", "true as a number", run_with(steps=True), nothing),
    Row("values", "a list as a name", run_with(model=["procedural"]), nothing),
    Row("values", "nobody", run_with("face-verification", people=0), nothing),
    Row("values", "no draw", run_with("face-verification", draws=0), nothing),
    Row("values", "a rate that is not a number", run_with("synthforge-train", rate=float("nan")), nothing),
    Row("values", "a number for true or false", run_with("gptface-data", draw=1), nothing),
    Row("pipeline", "a list of stages", stages, pipeline("stages: [face-fit]\n")),
    Row("pipeline", "a stage that is a text", stages, pipeline("stages: {face-fit: run}\n")),
    Row("pipeline", "meta that is a list", stages, pipeline("stages: {face-fit: {meta: [run]}}\n")),
    Row("pipeline", "deps that are a mapping", stages, pipeline("stages: {face-fit: {deps: {a: 1}, meta: {run: 'a:b'}}}\n")),
    Row("pipeline", "a cost in one word", stages, pipeline("stages: {face-fit: {meta: {run: 'a:b', cost: cheap}}}\n")),
    Row("pipeline", "a function without its module", stages, pipeline("stages: {face-fit: {meta: {run: run}}}\n")),
    Row("pipeline", "a number as its function", stages, pipeline("stages: {face-fit: {meta: {run: 3}}}\n")),
    Row("record", "a list", load_record, write("record.json", "[]")),
    Row("record", "a key that no record has", load_record, record(colour="red")),
    Row("record", "a missing key", load_record, arrays("record.json", lambda path: path.write_text(json.dumps({"stage": "fit"})))),
    Row("record", "an unknown status", load_record, record(status="splendid")),
    Row("record", "NaN as a measured value", load_record, record(rows=[{"method": "ours", "metric": "nme", "value": float("nan")}])),
    Row("record", "text as a measured value", load_record, record(rows=[{"method": "ours", "metric": "nme", "value": "good"}])),
    Row("record", "a row with an unknown direction", load_record, record(rows=[{"method": "ours", "metric": "nme", "value": 1, "better": "up"}])),
    Row("record", "rows that are no rows", load_record, record(rows=[3])),
    Row("record", "rows that are a mapping", load_record, record(rows={"a": 1})),
    Row("record", "a list as a measured value", load_record, record(rows=[{"method": "ours", "metric": "nme", "value": [1, 2]}])),
    Row("record", "an interval in words", load_record, record(rows=[{"method": "ours", "metric": "nme", "value": 1, "low": "a", "high": "b"}])),
    Row("record", "half an interval", load_record, record(rows=[{"method": "ours", "metric": "nme", "value": 1, "low": 0.5}])),
    Row("record", "no method", load_record, record(rows=[{"method": None, "metric": "nme", "value": 1}])),
    Row("record", "a count in words", load_record, record(rows=[{"method": "ours", "metric": "nme", "value": 1, "n": "x"}])),
    Row("record", "true as a measured value", load_record, record(rows=[{"method": "ours", "metric": "nme", "value": True}])),
    Row("record", "a seed in words", load_record, record(seed="x")),
    Row("record", "a configuration that is a list", load_record, record(config=[1])),
    Row("record", "a number as the stage", load_record, record(stage=3)),
    Row("record", "a note that is a number", load_record, record(notes=[3])),
    Row("record", "a hash that is null", load_record, record(inputs={"data": None})),
    # landmarks
    Row("pts", "NaN", read_pts, points(["1 2"] * 67 + ["nan 2"])),
    Row("pts", "infinity", read_pts, points(["1 2"] * 67 + ["1e999 2"])),
    Row("pts", "words", read_pts, points(["1 2"] * 67 + ["left eye"])),
    Row("pts", "three numbers in each row", read_pts, points(["1 2 3"] * 68)),
    Row("pts", "29 points where 68 are needed", read_pts, points(["1 2"] * 29)),
    Row("pts", "fewer rows than it says", read_pts, points(["1 2"] * 60, 68)),
    Row("pts", "a negative count", read_pts, points(["1 2"] * 68, -68)),
    Row("pts", "no closing brace", read_pts, points(["1 2"] * 68, brace="")),
    Row("pts", "Latin-1", read_pts, write("a.pts", b"version: 1\nn_points: 1 \xe9\n{\n1 2\n}\n")),
    Row("pts", "200,000 blanks in its head", read_pts, write("a.pts", "version" + " " * 200_000)),
    Row("pts", "200,000 line ends in its head", read_pts, write("a.pts", "version: 1\nn_points:" + "\n" * 200_000)),
    Row("pts", "a count of 5,000 digits", read_pts, write("a.pts", "version: 1\nn_points: " + "9" * 5_000 + "\n{\n1 2\n}\n")),
    Row("pts", "a word of 100,000 letters", read_pts, points(["1 2"] * 67 + ["1 " + "x" * 100_000])),
    Row("pts", "text after the brace", read_pts, points(["1 2"] * 68, brace="}\nversion: 2")),
    Row("pts", "two megabytes", read_pts, points(["1 2"] * 500_000), UNSAFE),
    Row("lapa points", "105 points", read_lapa_points, write("a.txt", "105\n" + "1 2\n" * 105)),
    Row("lapa points", "106 promised, 100 there", read_lapa_points, write("a.txt", "106\n" + "1 2\n" * 100)),
    Row("lapa points", "NaN", read_lapa_points, write("a.txt", "106\n" + "1 2\n" * 105 + "nan 2\n")),
    Row("lapa points", "infinity", read_lapa_points, write("a.txt", "106\n" + "1 2\n" * 105 + "1e99 inf\n")),
    Row("lapa points", "three numbers in each row", read_lapa_points, write("a.txt", "106\n" + "1 2 3\n" * 106)),
    Row("lapa points", "a count of 5,000 digits", read_lapa_points, write("a.txt", "9" * 5_000 + "\n1 2\n")),
    Row("lapa points", "a number of 100,000 digits", read_lapa_points, write("a.txt", "106\n" + "1 2\n" * 105 + "1 " + "1" * 100_000)),
    Row("lapa points", "two megabytes", read_lapa_points, write("a.txt", "106\n" + "1 2\n" * 500_000), UNSAFE),
    Row("lapa labels", "class 11", read_lapa_labels, picture("a.png", lambda: Image.fromarray(np.full((4, 4), 11, np.uint8)))),
    Row("lapa labels", "nothing but background", read_lapa_labels, picture("a.png", lambda: Image.new("L", (4, 4)))),
    Row("lapa labels", "a coloured view", read_lapa_labels, picture("a.png", lambda: Image.new("RGB", (4, 4)))),
    Row("lapa labels", "another size than its picture", lambda path: read_lapa_labels(path, (8, 8)), picture("a.png", lambda: Image.fromarray(np.ones((4, 4), np.uint8)))),
    # lists
    Row("raf list", "label 8", read_raf_list, write("a.txt", "train_00001.jpg 8\n")),
    Row("raf list", "label 0", read_raf_list, write("a.txt", "train_00001.jpg 0\n")),
    Row("raf list", "a word for a label", read_raf_list, write("a.txt", "train_00001.jpg happy\n")),
    Row("raf list", "a label of 5,000 digits", read_raf_list, write("a.txt", "train_00001.jpg " + "1" * 5_000)),
    Row("raf list", "a name that climbs out", read_raf_list, write("a.txt", "../../train_00001.jpg 3\n")),
    Row("raf list", "one name twice", read_raf_list, write("a.txt", "train_00001.jpg 3\ntrain_00001_aligned.jpg 4\n")),
    Row("raf csv", "other columns", read_raf_list, write("a.csv", "name,emotion\ntrain_00001.jpg,3\n")),
    Row("raf csv", "a third column", read_raf_list, write("a.csv", "image,label\ntrain_00001.jpg,3,4\n")),
    Row("hq mapping", "a name that climbs out", read_mapping, write("a.txt", "0 1 ../x.jpg\n")),
    Row("hq mapping", "one number twice", read_mapping, write("a.txt", "0 1 000002.jpg\n0 2 000003.jpg\n")),
    # tars
    Row("laion tar", "a picture of 0 bytes", lambda path: list(read_shard(path)), arrays("a.tar", tar_with(("1.jpg", b""), ("1.txt", b"a")))),
    Row("laion tar", "no caption", lambda path: list(read_shard(path)), arrays("a.tar", tar_with(("1.jpg", b"x"), ("2.jpg", b"x"), ("2.txt", b"a")))),
    Row("laion tar", "an empty caption", lambda path: list(read_shard(path)), arrays("a.tar", tar_with(("1.jpg", b"x"), ("1.txt", b" ")))),
    Row("laion tar", "a caption in Latin-1", lambda path: list(read_shard(path)), arrays("a.tar", tar_with(("1.jpg", b"x"), ("1.txt", b"caf\xe9")))),
    Row("laion tar", "a web page for a picture", lambda path: list(read_shard(path)), arrays("a.tar", tar_with(("1.html", b"x"), ("1.txt", b"404")))),
    Row("laion tar", "a name that climbs out", lambda path: list(read_shard(path)), arrays("a.tar", tar_with(("../../1.jpg", b"x"))), UNSAFE),
    Row("laion tar", "a name from the root", lambda path: list(read_shard(path)), arrays("a.tar", tar_with(("/etc/1.jpg", b"x"))), UNSAFE),
    Row("laion tar", "a link", lambda path: list(read_shard(path)), arrays("a.tar", tar_with(linked("1.jpg"))), UNSAFE),
    Row("laion tar", "a picture over the limit", lambda path: list(read_shard(path, limits=TarLimits(picture_bytes=10))), arrays("a.tar", tar_with(("1.jpg", b"x" * 11), ("1.txt", b"a"))), UNSAFE),
    Row("laion tar", "a caption of a megabyte", lambda path: list(read_shard(path)), arrays("a.tar", tar_with(("1.jpg", b"x"), ("1.txt", b"x" * 10**6))), UNSAFE),
    Row("laion tar", "one key twice", lambda path: list(read_shard(path)), arrays("a.tar", tar_with(("1.jpg", b"x"), ("1.txt", b"a"), ("2.jpg", b"x"), ("2.txt", b"a"), ("1.jpg", b"x"), ("1.txt", b"a")))),
    Row("laion tar", "cut between two members", lambda path: list(read_shard(path)), arrays("a.tar", lambda path: (tar_with(("1.jpg", b"x"), ("1.txt", b"a"))(path), path.write_bytes(path.read_bytes()[:2048])))),
    Row("laion tar", "a damaged head in the middle", lambda path: list(read_shard(path)), arrays("a.tar", lambda path: (tar_with(("1.jpg", b"x"), ("1.txt", b"a"), ("2.jpg", b"x"), ("2.txt", b"b"))(path), path.write_bytes(path.read_bytes()[:2060] + b"!!!" + path.read_bytes()[2063:])))),
    Row("laion tar", "a gzip file", lambda path: list(read_shard(path)), write("a.tar", zlib.compress(bytes(10**5)))),
    # pictures
    Row("image", "20,000 x 20,000", read_image, write("a.png", png_of(20_000, 20_000)), UNSAFE),
    Row("image", "9,000 x 9,000", read_image, write("a.png", png_of(9_000, 9_000)), UNSAFE),
    Row("image", "a bomb: 8,001 x 8,000 zeros in 200 kB", read_image, write("a.png", png_of(8_001, 8_000, data=zlib.compress(bytes(10**7), 9))), UNSAFE),
    Row("image", "four billion pixels wide", read_image, write("a.png", png_of(2**31 - 1, 1)), UNSAFE),
    Row("image", "no pixels at all", read_image, write("a.png", png_of(0, 0))),
    Row("image", "a head without pixels", read_image, write("a.png", png_of(64, 64))),
    Row("image", "a damaged checksum", read_image, write("a.png", png_of(4, 4, data=zlib.compress(bytes(52))).replace(b"IHDR", b"IHDX"))),
    Row("image", "a JPEG cut in the middle", read_image, write("a.jpg", jpeg()[:1500])),
    Row("image", "a JPEG cut in its head", read_image, write("a.jpg", jpeg()[:40])),
    Row("image", "a JPEG with its end missing", read_image, write("a.jpg", jpeg(progressive=True)[:-300])),
    Row("image", "floating point", read_image, picture("a.tif", lambda: Image.fromarray(np.float32([[0.5, 2]])))),
    Row("image", "32-bit grey", read_image, picture("a.tif", lambda: Image.fromarray(np.int32([[0, 10**6]])))),
    Row("image", "colour where labels are needed", lambda path: read_image(path, "labels"), picture("a.png", lambda: Image.new("RGB", (4, 4)))),
    Row("image", "an unknown mode asked for", lambda path: read_image(path, "BGR"), picture("a.png", lambda: Image.new("RGB", (4, 4)))),
    Row("image", "a WebP of 16,383 x 16,383 in 50 bytes", read_image, write("a.webp", webp_of(16_383, 16_383)), UNSAFE),
    Row("image", "a GIF frame of 65,535 x 65,535", read_image, write("a.gif", gif_of(65_535, 65_535)), UNSAFE),
    Row("image", "a GIF frame of 12,000 x 12,000", read_image, write("a.gif", gif_of(12_000, 12_000)), UNSAFE),
    Row("image", "a TIFF tile of 60,000 x 60,000", read_image, write("a.tif", tiff((259, 8), (322, 60_000), (323, 60_000), (324, 150), (325, 40)))),
    Row("image", "a TIFF strip of two gigabytes", read_image, write("a.tif", tiff((259, 8), (273, 150), (278, 2**31 - 1), (279, 2**31)))),
    Row("image", "a text of 300 MB in a PNG", read_image, write("a.png", png_of(4, 4, data=zlib.compress(bytes(52)), text=zlib.compress(bytes(3 * 10**8), 1)))),
    Row("image", "negative labels", lambda path: read_image(path, "labels"), picture("a.tif", lambda: Image.fromarray(np.int32([[-1, 3]])))),
    Row("image", "labels above 255", lambda path: read_image(path, "labels"), picture("a.png", lambda: Image.fromarray(np.uint16([[256, 3]])))),
    Row("image", "a PostScript program", read_image, write("a.eps", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")),
    Row("image", "a web page", read_image, write("a.jpg", "<html>404</html>")),
    Row("image", "text bytes in memory", read_image, lambda folder: b"no picture"),
    Row("image", "no bytes in memory", read_image, lambda folder: b""),
    Row("image", "an empty GIF", read_image, write("a.gif", b"GIF89a\x04\x00\x04\x00\x00\x00\x00;")),
    Row("write_image", "floats", lambda path: write_image(path, np.zeros((4, 4, 3))), lambda folder: folder / "a.png"),
    Row("write_image", "channels first", lambda path: write_image(path, np.zeros((3, 40, 40), np.uint8)), lambda folder: folder / "a.png"),
    Row("write_image", "an unknown suffix", lambda path: write_image(path, np.zeros((4, 4, 3), np.uint8)), lambda folder: folder / "a.webm"),
    Row("resize", "no size", lambda image: resize(image, (0, 4)), lambda folder: np.zeros((4, 4, 3), np.uint8)),
    # npz, and what a loader then needs
    Row("npz", "objects", read_npz, arrays("a.npz", lambda path: np.savez(path, a=np.array([{}], dtype=object))), UNSAFE),
    Row("npz", "a lone .npy", read_npz, arrays("a.npz", lambda path: path.write_bytes(saved_npy(np.zeros(3))))),
    Row("npz", "a zip of something else", read_npz, arrays("a.npz", zipped(a=b"hello"))),
    Row("npz", "a zip bomb", lambda path: read_npz(path, max_bytes=10**6), arrays("a.npz", zipped(a=saved_npy(np.zeros(10**6)))), UNSAFE),
    Row("npz", "a bomb of bzip2", read_npz, arrays("a.npz", packed(zipfile.ZIP_BZIP2)), UNSAFE),
    Row("npz", "a bomb of LZMA", read_npz, arrays("a.npz", packed(zipfile.ZIP_LZMA)), UNSAFE),
    Row("npz", "a size in its directory that is a lie", read_npz, arrays("a.npz", lambda path: (good_npz(path), path.write_bytes(smaller_in_directory(path.read_bytes()))))),
    Row("npz", "a shape of ten terabytes", read_npz, arrays("a.npz", zipped(a=head("(1250000000000,)")))),
    Row("npz", "a negative shape", read_npz, arrays("a.npz", zipped(a=head("(-3,)")))),
    Row("npz", "numbers of no size, 10^12 of them", read_npz, arrays("a.npz", zipped(a=head("(1000000000000,)", "|V0")))),
    Row("npz", "code in the head", read_npz, arrays("a.npz", zipped(a=head("(__import__('os').system('true'),)")))),
    Row("npz", "a damaged byte", read_npz, arrays("a.npz", lambda path: (good_npz(path), path.write_bytes(path.read_bytes().replace(path.read_bytes()[200:220], bytes(20)))))),
    Row("npz", "a missing array", lambda path: read_npz(path, ["texture"]), arrays("a.npz", good_npz)),
    Row("npz", "an array is missing", need(MODEL), model(basis=None)),
    Row("npz", "NaN", need(MODEL), model(mean=nan_in((5, 3)))),
    Row("npz", "infinity", need(MODEL), model(basis=nan_in((5, 3, 2), np.inf))),
    Row("npz", "a wrong axis", need(MODEL), model(basis=np.zeros((6, 3, 2)))),
    Row("npz", "a wrong number of axes", need(MODEL), model(mean=np.zeros(15))),
    Row("npz", "whole numbers where real ones are needed", need(MODEL), model(mean=np.zeros((5, 3), int))),
    Row("npz", "fractions as indices", need(MODEL), model(faces=np.full((4, 3), 0.5))),
    Row("npz", "text as numbers", need(MODEL), model(faces=np.array([["a", "b", "c"]]))),
    # MATLAB
    Row("mat", "version 7.3", read_mat, write("a.mat", b"MATLAB 7.3 MAT-file".ljust(126) + b"IM" + b"\x89HDF\r\n\x1a\n" + bytes(64))),
    Row("mat", "an HDF5 file", read_mat, arrays("a.mat", good_h5)),
    Row("mat", "cells", read_mat, mat_with(a=np.array([1, "b"], dtype=object))),
    Row("mat", "a struct", read_mat, mat_with(a={"b": 1})),
    Row("mat", "a missing variable", lambda path: read_mat(path, ["shapePC"]), arrays("a.mat", good_mat)),
    Row("mat", "a bomb", lambda path: read_mat(path, max_bytes=10**6), arrays("a.mat", lambda path: scipy.io.savemat(path, {"a": np.zeros(10**6)}, do_compression=True)), UNSAFE),
    Row("mat", "a length beyond the file", read_mat, write("a.mat", b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM" + struct.pack("<II", 14, 2**31) + bytes(64))),
    Row("mat", "dimensions beyond the data", read_mat, arrays("a.mat", lambda path: (scipy.io.savemat(path, {"a": np.zeros((7, 11))}), path.write_bytes(path.read_bytes().replace(struct.pack("<ii", 7, 11), struct.pack("<ii", 2**30, 11)))))),
    Row("mat", "only a head", read_mat, write("a.mat", b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM")),
    # HDF5
    Row("h5", "numbers in another file", read_h5, arrays("a.h5", h5(external)), UNSAFE),
    Row("h5", "a virtual data set", read_h5, arrays("a.h5", h5(virtual)), UNSAFE),
    Row("h5", "a link to another file", read_h5, arrays("a.h5", h5(lambda file, path: file.__setitem__("mean", h5py.ExternalLink("/etc/passwd", "/")))), UNSAFE),
    Row("h5", "a soft link to nowhere", read_h5, arrays("a.h5", h5(lambda file, path: file.__setitem__("mean", h5py.SoftLink("/none")))), UNSAFE),
    Row("h5", "a group in itself", read_h5, arrays("a.h5", h5(lambda file, path: file.create_group("a").__setitem__("b", file["a"]))), UNSAFE),
    Row("h5", "40 groups deep", read_h5, arrays("a.h5", h5(lambda file, path: file.create_group("/".join("a" * 40)))), UNSAFE),
    Row("h5", "four terabytes that are not there", read_h5, arrays("a.h5", h5(lambda file, path: file.create_dataset("a", (10**12,), "f4", chunks=(1000,)))), UNSAFE),
    Row("h5", "texts of 15 gigabytes that are not there", read_h5, arrays("a.h5", h5(lambda file, path: file.create_dataset("a", (300,), "S50000000"))), UNSAFE),
    Row("h5", "a chunk of a gigabyte around one number", lambda path: read_h5(path, max_bytes=10**6), arrays("a.h5", h5(lambda file, path: file.create_dataset("a", (1,), "f4", chunks=(2**28,), maxshape=(None,), compression=1))), UNSAFE),
    Row("h5", "references", read_h5, arrays("a.h5", h5(lambda file, path: file.create_dataset("a", (2,), h5py.ref_dtype)))),
    Row("h5", "a million texts", read_h5, arrays("a.h5", h5(lambda file, path: file.create_dataset("a", (10**6,), h5py.string_dtype()))), UNSAFE),
    # pickles and checkpoints (attacks: test_unpickle.py)
    Row("pickle", "a call", load_pickle, write("a.pkl", b"cos\nsystem\n(S'touch hacked'\ntR."), UNSAFE),
    Row("pickle", "an npz", load_pickle, arrays("a.pkl", lambda path: path.write_bytes(zip_bytes()))),
    Row("pickle", "too large", lambda path: load_pickle(path, max_bytes=100), write("a.pkl", pickle.dumps(bytes(200))), UNSAFE),
    Row("checkpoint", "a whole model", load_checkpoint, arrays("a.pt", lambda path: torch.save(torch.nn.Linear(2, 2), path))),
    Row("checkpoint", "a TorchScript or other zip", load_checkpoint, arrays("a.pt", zipped(a=b"x"))),
    Row("checkpoint", "safetensors", load_checkpoint, arrays("a.pt", good_safetensors)),
    Row("checkpoint", "a missing storage", load_checkpoint, arrays("a.pt", lambda path: without_storage(path))),
    # safetensors
    Row("safetensors", "a head of 16 exabytes", read_safetensors, write("a.safetensors", b"\xff" * 8 + b"{}")),
    Row("safetensors", "a head that is no JSON", read_safetensors, write("a.safetensors", safetensors_of("{'a'"))),
    Row("safetensors", "a head of brackets, a megabyte deep", read_safetensors, write("a.safetensors", safetensors_of("[" * 10**6))),
    Row("safetensors", "a shape beyond counting", read_safetensors, write("a.safetensors", safetensors_of('{"a":{"dtype":"F32","shape":[9223372036854775807,9],"data_offsets":[0,4]}}', bytes(4)))),
    Row("safetensors", "a head that is a list", safetensors_metadata, write("a.safetensors", safetensors_of("[1]"))),
    Row("safetensors", "offsets beyond the file", read_safetensors, write("a.safetensors", safetensors_of('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(4)))),
    Row("safetensors", "tensors on top of each other", read_safetensors, write("a.safetensors", safetensors_of('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)))),
    Row("safetensors", "a shape that does not fit", read_safetensors, write("a.safetensors", safetensors_of('{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}', bytes(4)))),
    Row("safetensors", "an unknown type", read_safetensors, write("a.safetensors", safetensors_of('{"a":{"dtype":"F3","shape":[1],"data_offsets":[0,4]}}', bytes(4)))),
    Row("safetensors", "too large", lambda path: read_safetensors(path, max_bytes=100), arrays("a.safetensors", good_safetensors), UNSAFE),
    Row("base", "nothing in its folder", load_toy, base(lambda path: None)),
    Row("base", "a link to itself", load_toy, base(lambda path: path.symlink_to(path))),
    Row("base", "a link to nowhere", load_toy, base(lambda path: path.symlink_to(path.with_name("none")))),
    Row("base", "a folder", load_toy, base(lambda path: path.mkdir())),
    Row("base", "no config", load_toy, base(lambda path: write_safetensors(path, {"w": torch.ones(2)}))),
    Row("base", "a config that is no JSON", load_toy, base(lambda path: write_safetensors(path, {"w": torch.ones(2)}, {"config": "{"}))),
    Row("base", "a config that is a list", load_toy, base(lambda path: write_safetensors(path, {"w": torch.ones(2)}, {"config": "[]"}))),
    Row("base", "NaN among the weights", load_toy, base(lambda path: write_safetensors(path, {"w": torch.tensor([1, torch.nan]).half()}, {"config": "{}"}))),
    Row("base", "an infinite weight", load_toy, base(lambda path: write_safetensors(path, {"w": torch.tensor([torch.inf])}, {"config": "{}"}))),
    Row("write_safetensors", "metadata that is no text", lambda path: write_safetensors(path, {}, {"step": 3}), lambda folder: folder / "a.safetensors"),
    Row("write_safetensors", "a numpy array", lambda path: write_safetensors(path, {"a": np.zeros(2)}), lambda folder: folder / "a.safetensors"),
    # meshes
    Row("obj", "points only", read_mesh, write("a.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\n")),
    Row("obj", "NaN", read_mesh, write("a.obj", "v 0 0 nan\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")),
    Row("obj", "a face beyond its vertices", read_mesh, write("a.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n")),
    Row("obj", "UTF-16", read_mesh, write("a.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n".encode("utf-16"))),
    Row("obj", "a face that counts from 0", read_mesh, write("a.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 0 1 2\n")),
    Row("obj", "an index of 22 digits", read_mesh, write("a.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9999999999999999999999\n")),
    Row("obj", "another suffix", read_mesh, write("a.stl", "solid\n")),
    Row("ply", "a billion vertices that are not there", read_mesh, write("a.ply", "ply\nformat binary_little_endian 1.0\nelement vertex 1000000000\nproperty float x\nproperty float y\nproperty float z\nelement face 1\nproperty list uchar int vertex_indices\nend_header\n")),
    Row("glb", "a terabyte of positions that are not there", read_mesh, write("a.glb", glb({"accessors": [{"componentType": 5126, "count": 10**12, "type": "VEC3"}], "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}], "nodes": [{"mesh": 0}], "scenes": [{"nodes": [0]}]}))),
    Row("glb", "a node inside itself", read_mesh, write("a.glb", glb({"nodes": [{"children": [0]}], "scenes": [{"nodes": [0]}], "scene": 0}))),
    Row("obj", "two coordinates in each row", read_mesh, write("a.obj", "v 0 0\nv 1 0\nv 0 1\nv 1 1\nv 2 1\nv 1 2\nf 1 2 3\n")),
    Row("obj", "words for numbers", read_mesh, write("a.obj", "v a b c\nf 1 2 3\n")),
    # names
    Row("safe_join", "up and out", lambda folder: safe_join(folder, "../x.png"), lambda folder: folder, UNSAFE),
    Row("safe_join", "absolute", lambda folder: safe_join(folder, "/etc/passwd"), lambda folder: folder, UNSAFE),
    Row("safe_join", "up in the middle", lambda folder: safe_join(folder, "a/../../x.png"), lambda folder: folder, UNSAFE),
    Row("safe_join", "Windows, up and out", lambda folder: safe_join(folder, "..\\x.png"), lambda folder: folder, UNSAFE),
    Row("safe_join", "a loop of two links", lambda path: safe_join(path.parent.parent, "a/x.png"), loop_in, UNSAFE),
    Row("image", "below a loop of two links", read_image, loop_in),
]


def smaller_in_directory(raw):
    "A zip whose central directory claims 1 byte for its first member."
    at = raw.rfind(b"PK\x01\x02", 0, raw.rfind(b"PK\x01\x02"))
    return raw[: at + 24] + struct.pack("<I", 1) + raw[at + 28 :]


def zip_bytes():
    held = io.BytesIO()
    np.savez(held, a=np.zeros(3))
    return held.getvalue()


def without_storage(path):
    good_checkpoint(path)
    with zipfile.ZipFile(path) as whole:
        members = {info.filename: whole.read(info) for info in whole.infolist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            if "/data/" not in name:
                file.writestr(name, data)


def state(folder):
    "Names, kinds and sizes of everything below a folder."
    return sorted((str(path.relative_to(folder)), path.lstat().st_mode, path.lstat().st_size if path.is_file() else 0) for path in folder.rglob("*"))


@pytest.fixture
def no_hang():
    "Fail instead of waiting for ever."
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_):
        raise TimeoutError(f"longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.reader}: {row.case}")
def test_bad_input(row, tmp_path, monkeypatch, no_hang):
    "One clear error, nothing written, no hang, no warning to the terminal instead of an error."
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = row.make(tmp_path)
    before = state(tmp_path)
    with pytest.raises(row.kind) as caught:
        row.read(given)
    error = caught.value
    assert isinstance(error, InputError) and all(len(part) > 2 for part in (error.came, error.needed, error.fix))
    message = str(error)
    assert error.came in message and error.needed in message and error.fix in message and len(message) < 2000 and "Traceback" not in message
    if isinstance(given, Path) and row.reader in READERS:
        assert str(given)[:40] in message, "the message names the file"
    assert state(tmp_path) == before, "nothing was written"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("v 0 0 0\nv 1 0\nv 0 1 0\nf 1 2 3\n", 2),
        ("# flat\r\n\r\nv 0 0\r\nv 1 0\r\nv 0 1\r\nf 1 2 3\r\n", 3),
        ("v 0 0 0\nv 1 0 \\\n0\nv 0 \\\n1\nf 1 2 3\n", 4),
        ("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n", 4),
        ("v 0 0 0\nv 1 0 0\nv 0 1 0\nvt\nf 1 2 3\n", 4),
    ],
)
def test_a_bad_row_of_an_obj_is_named_by_its_line(tmp_path, text, line):
    (tmp_path / "a.obj").write_bytes(text.encode())
    with pytest.raises(InputError, match=rf"a\.obj: .*line {line}\b"):
        read_mesh(tmp_path / "a.obj")


def test_every_message_can_be_printed(tmp_path):
    "A file name that is not UTF-8 is spelled out, whatever part of the message has it."
    name = os.fsdecode(b"\xff\xfe.json")
    with pytest.raises(InputError) as caught:
        read_json(tmp_path / name)
    skipped = Skipped()
    skipped.add(name, OSError(f"cannot read {name}"))
    skipped.add(name, InputError("a list", f"the name {name}", f"not {name}", f"Rename {name}."))
    back = pickle.loads(pickle.dumps(caught.value))
    for text in (str(caught.value), caught.value.what, str(back), skipped.report(3), *skipped.items[0], *skipped.items[1]):
        assert r"\udcff\udcfe.json" in text and text.encode("utf-8")


def test_there_are_enough_cases():
    assert len(ROWS) >= 60 and len({(row.reader, row.case) for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("name", READERS)
def test_the_good_file_is_read(name, tmp_path):
    "The files that the cases spoil are good before: a reader that refuses everything would pass the cases above."
    read, suffix, good, _ = READERS[name]
    good(tmp_path / f"good{suffix}")
    assert read(tmp_path / f"good{suffix}") is not None


# A batch survives its bad items


def spoiled_folder(folder):
    "Eight pictures, three of them bad."
    for place in range(8):
        good_png(folder / f"{place}.png")
    (folder / "1.png").write_bytes(b"")
    (folder / "4.png").write_bytes((folder / "4.png").read_bytes()[:400])
    (folder / "6.png").write_bytes(png_of(20_000, 20_000))
    return sorted(folder.glob("*.png"))


def test_a_batch_survives(tmp_path):
    skipped, kept = Skipped(), []
    for path in spoiled_folder(tmp_path):
        try:
            kept.append(read_image(path))
        except InputError as error:
            skipped.add(path, error)
    assert len(kept) == 5 and [Path(item).name for item, _ in skipped.items] == ["1.png", "4.png", "6.png"]
    report = skipped.report(8)
    assert report.splitlines()[0] == "3 of 8 items skipped:" and "0 bytes" in report and "400000000 pixels" in report


def test_an_error_crosses_processes(tmp_path):
    "A worker's InputError reaches the parent whole, with its four parts, and the pool lives on."
    paths = spoiled_folder(tmp_path)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(read_image, path) for path in paths]
        errors = {path.name: job.exception() for path, job in zip(paths, jobs)}
    bad = {name: error for name, error in errors.items() if error}
    assert set(bad) == {"1.png", "4.png", "6.png"} and all(isinstance(error, InputError) and error.came and error.fix for error in bad.values())
    assert isinstance(bad["6.png"], UnsafeFileError)


def test_memory_stays_small_on_a_bomb(tmp_path):
    "A refused file is refused before its arrays are made: the peak of Python's and numpy's allocations stays under 20 MB."
    import tracemalloc

    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(4_000_000))
    scipy.io.savemat(tmp_path / "a.mat", {"a": np.zeros(4_000_000)}, do_compression=True)
    (tmp_path / "a.png").write_bytes(png_of(9_000, 9_000, data=zlib.compress(bytes(10**7))))
    tracemalloc.start()
    for read, name in ((read_npz, "a.npz"), (read_mat, "a.mat")):
        with pytest.raises(UnsafeFileError):
            read(tmp_path / name, max_bytes=3 * 10**7)
    with pytest.raises(UnsafeFileError):
        read_image(tmp_path / "a.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20


def test_mat_with_numbers_of_an_unknown_type(tmp_path):
    "scipy's C reader looks the type up outside of its table: one changed byte would end the process."
    import scipy.io

    path = tmp_path / "a.mat"
    scipy.io.savemat(path, {"x": np.arange(6.0)}, do_compression=False)
    good = bytearray(path.read_bytes())
    at = good.index(np.arange(6.0).tobytes()) - 8
    assert good[at] == 9  # double
    good[at] = 42
    path.write_bytes(good)
    with pytest.raises(InputError, match="unknown type 42"):
        read_mat(path)
