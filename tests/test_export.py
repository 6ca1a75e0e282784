"Exported meshes, read back by other code than wrote them."

import json
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh

from facelab.face.export import Surface, export_face, glb_join, glb_parts, linear_from_srgb, read_blendshapes, read_mesh, srgb_from_linear, write_mesh
from facelab.face.ict import from_ict
from facelab.face.morphable import MorphableModel
from facelab.lab.errors import InputError


def parse_glb(path: Path) -> tuple[dict, callable]:  # an independent reader: JSON, and accessor -> array
    raw = path.read_bytes()
    magic, version, total = struct.unpack("<4sII", raw[:12])
    assert (magic, version, total) == (b"glTF", 2, len(raw))
    size = struct.unpack("<I", raw[12:16])[0]
    head = json.loads(raw[20 : 20 + size])
    start = 20 + size + 8
    assert size % 4 == 0 and raw[start - 4 : start] == b"BIN\0" and head["buffers"][0]["byteLength"] <= len(raw) - start

    def array(index: int) -> np.ndarray:
        accessor = head["accessors"][index]
        view = head["bufferViews"][accessor["bufferView"]]
        kind, width = {5126: ("<f4", 4), 5125: ("<u4", 4), 5123: ("<u2", 2), 5121: ("u1", 1)}[accessor["componentType"]]
        parts = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}[accessor["type"]]
        at = start + view.get("byteOffset", 0) + accessor.get("byteOffset", 0)
        assert accessor["count"] * parts * width <= view["byteLength"] and at % width == 0
        return np.frombuffer(raw, kind, accessor["count"] * parts, at).reshape(accessor["count"], parts)

    return head, array


@pytest.fixture(scope="module")
def ict(few_ict) -> MorphableModel:  # named blendshapes, a UV map with seams
    return from_ict(few_ict["path"], num_shape=10)


def tetrahedron() -> Surface:
    verts = torch.tensor([[0.0, 0, 0], [10, 0, 0], [0, 10, 0], [0, 0, 10]])
    return Surface(verts, torch.tensor([[0, 2, 1], [0, 1, 3], [1, 2, 3], [0, 3, 2]]), torch.rand(4, 3, generator=torch.Generator().manual_seed(0)))


def test_glb_morph_targets_give_the_models_faces(ict, tmp_path):
    shape = torch.randn(1, 10, generator=torch.Generator().manual_seed(0))
    path = export_face(tmp_path / "face.glb", ict, shape)
    head, array = parse_glb(path)
    mesh = head["meshes"][0]
    part = mesh["primitives"][0]
    names = mesh["extras"]["targetNames"]
    assert names == ict.info["exp_names"] and len(mesh["weights"]) == len(part["targets"]) == ict.num_exp == len(set(names)) >= 46
    rest, faces = array(part["attributes"]["POSITION"]).astype("f8"), array(part["indices"]).reshape(-1, 3)
    weights = torch.zeros(1, ict.num_exp)
    jaw, smile = ("jawOpen", "mouthSmile_L") if "jawOpen" in names else ("jaw_open", "smile_left")
    weights[0, names.index(jaw)], weights[0, names.index(smile)] = 0.7, 0.4
    posed = rest + sum(float(w) * array(target["POSITION"]).astype("f8") for w, target in zip(weights[0], part["targets"]))
    ours = ict.verts(shape, weights)[0].double().numpy() / 1000  # metres
    assert np.abs(posed[faces] - ours[ict.faces.numpy()]).max() < 1e-6  # m
    for target in part["targets"]:
        accessor, rows = head["accessors"][target["POSITION"]], array(target["POSITION"])
        assert np.allclose(accessor["min"], rows.min(0)) and np.allclose(accessor["max"], rows.max(0)) and accessor["count"] == len(rest)
    assert np.allclose(array(part["attributes"]["TEXCOORD_0"])[faces].reshape(-1, 2) * [1, -1] + [0, 1], ict.uv[ict.uv_faces].reshape(-1, 2).numpy(), atol=1e-6)


def test_procedural_glb_has_named_sliders(tmp_path):
    head = MorphableModel.procedural()
    gltf, array = parse_glb(export_face(tmp_path / "head.glb", head))
    part, names = gltf["meshes"][0]["primitives"][0], gltf["meshes"][0]["extras"]["targetNames"]
    assert len(names) == 46 and {"jaw_open", "smile_left", "blink_right"} <= set(names)
    moved = array(part["targets"][names.index("jaw_open")]["POSITION"])
    faces = array(part["indices"]).reshape(-1, 3)
    assert np.abs(moved[faces] - head.info["blendshapes"]["jaw_open"][head.faces].numpy() / 1000).max() < 1e-7
    chin = int(head.landmarks68[8])
    assert head.info["blendshapes"]["jaw_open"][chin, 1] < -5  # mm: the chin goes down
    assert parse_glb(export_face(tmp_path / "none.glb", head, num_blendshapes=0))[0]["meshes"][0].get("extras", {}).get("targetNames") is None


def test_glb_opens_in_trimesh(tmp_path):
    head = MorphableModel.procedural()
    scene = trimesh.load(export_face(tmp_path / "face.glb", head, num_blendshapes=3))
    assert list(scene.geometry) == ["procedural"]
    mesh = scene.geometry["procedural"]
    assert len(mesh.faces) == len(head.faces) and abs(mesh.extents[0] - float(head.mean[:, 0].max() - head.mean[:, 0].min()) / 1000) < 1e-6
    nose = np.argmax(mesh.vertices[:, 2])
    assert mesh.vertex_normals[nose, 2] > 0.8  # faces outwards, +z


def check_gltf(path: Path) -> tuple[dict, callable]:  # what glTF 2.0 asks of a mesh with morph targets (3.6.2, 3.7.2)
    head, array = parse_glb(path)
    raw = path.read_bytes()
    assert len(raw) % 4 == 0 and head["asset"]["version"] == "2.0" and head["scenes"][head["scene"]]["nodes"] == [0] and head["nodes"][0]["mesh"] == 0
    end = 0
    for view in head["bufferViews"]:
        assert view["byteOffset"] % 4 == 0 and view["byteOffset"] >= end and view["byteOffset"] + view["byteLength"] <= head["buffers"][0]["byteLength"]
        end = view["byteOffset"] + view["byteLength"]
    for index, accessor in enumerate(head["accessors"]):
        rows = array(index)
        if rows.dtype.kind == "f":
            assert np.isfinite(rows).all()
        if "min" in accessor:
            assert np.array_equal(np.array(accessor["min"], rows.dtype), rows.min(0)) and np.array_equal(np.array(accessor["max"], rows.dtype), rows.max(0))
    part = head["meshes"][0]["primitives"][0]
    kinds = {"POSITION": (5126, "VEC3"), "NORMAL": (5126, "VEC3"), "TEXCOORD_0": (5126, "VEC2"), "COLOR_0": (5126, "VEC3")}
    count = head["accessors"][part["attributes"]["POSITION"]]["count"]
    for where in (part["attributes"], *part.get("targets", ())):
        for name, index in where.items():
            accessor = head["accessors"][index]
            assert (accessor["componentType"], accessor["type"], accessor["count"]) == (*kinds[name], count)
            assert head["bufferViews"][accessor["bufferView"]]["target"] == 34962 and (name != "POSITION" or {"min", "max"} <= set(accessor))
    faces = array(part["indices"])
    assert part["mode"] == 4 and head["accessors"][part["indices"]]["componentType"] in (5121, 5123, 5125) and faces.max() < count and len(faces) % 3 == 0
    assert head["bufferViews"][head["accessors"][part["indices"]]["bufferView"]]["target"] == 34963
    assert np.abs(np.linalg.norm(array(part["attributes"]["NORMAL"]), axis=1) - 1).max() < 1e-4
    if "COLOR_0" in part["attributes"]:
        assert 0 <= array(part["attributes"]["COLOR_0"]).min() and array(part["attributes"]["COLOR_0"]).max() <= 1
    names = head["meshes"][0].get("extras", {}).get("targetNames", [])
    assert len(names) == len(set(names)) == len(part.get("targets", [])) == len(head["meshes"][0].get("weights", []))
    return head, array


@pytest.mark.parametrize("kind", ["procedural", "ict", "texture", "plain", "lone vertex"])
def test_glb_keeps_the_rules_of_gltf(kind, ict, tmp_path):
    path = tmp_path / "a.glb"
    mesh = tetrahedron()
    if kind in ("procedural", "ict"):
        export_face(path, MorphableModel.procedural() if kind == "procedural" else ict)
    elif kind == "texture":
        write_mesh(path, mesh._replace(uv=torch.rand(4, 2, generator=torch.Generator().manual_seed(1))), {"up": mesh.verts}, texture=np.full((8, 8, 3), 200, np.uint8))
    else:
        more = torch.zeros(int(kind != "plain"), 3)
        write_mesh(path, Surface(torch.cat([mesh.verts, more]), mesh.faces), name="tetra")
    head, array = check_gltf(path)
    assert head["meshes"][0]["name"] == {"procedural": "procedural", "ict": "ict", "texture": "face"}.get(kind, "tetra")
    assert not head.get("extensionsRequired") and (kind == "texture") == bool(head.get("images"))


def test_no_seam_in_the_normals(tmp_path):
    "Vertices that are doubled for the UV map keep one normal."
    head, array = parse_glb(export_face(tmp_path / "head.glb", MorphableModel.procedural(), num_blendshapes=0))
    part = head["meshes"][0]["primitives"][0]["attributes"]
    model = MorphableModel.procedural()
    spots = lambda metres: [tuple(row) for row in np.round(1e6 * metres).astype(int).tolist()]
    lone = {spot for spot, n in Counter(spots(model.mean.double().numpy() / 1000)).items() if n == 1}
    normals = {}
    for spot, normal in zip(spots(array(part["POSITION"]).astype("f8")), array(part["NORMAL"])):
        normals.setdefault(spot, []).append(normal)
    seams = [rows for spot, rows in normals.items() if spot in lone and len(rows) > 1]
    assert len(seams) > 20
    assert max(np.abs(rows[0] - other).max() for rows in seams for other in rows) < 1e-6


def test_glb_reads_back_as_it_was_written(ict, tmp_path):
    "Millimetres, sRGB, UV and sliders through our own reader, on a mesh with UV seams."
    paint = torch.rand(len(ict.mean), 3, generator=torch.Generator().manual_seed(0))
    surface = Surface(ict.mean, ict.faces, paint, ict.uv, ict.uv_faces)
    shapes = {name: ict.exp_basis[..., k] for k, name in enumerate(ict.info["exp_names"])}
    path = write_mesh(tmp_path / "a.glb", surface, shapes)
    back, sliders = read_mesh(path), read_blendshapes(path)
    assert list(sliders) == ict.info["exp_names"] and all(len(shape) == len(back.verts) for shape in sliders.values())
    assert (back.verts[back.faces] - ict.mean[ict.faces]).abs().max() < 1e-4 and (back.colours[back.faces] - paint[ict.faces]).abs().max() < 1e-5
    assert (back.uv[back.uv_faces] - ict.uv[ict.uv_faces]).abs().max() < 1e-6
    assert max((sliders[name][back.faces] - shapes[name][ict.faces]).abs().max() for name in shapes) < 1e-5
    again = read_mesh(write_mesh(tmp_path / "b.glb", back))
    assert torch.equal(again.faces.sort().values.sort(0).values, back.faces.sort().values.sort(0).values) or (again.verts[again.faces] - back.verts[back.faces]).abs().max() < 1e-4


def test_the_srgb_curve_and_its_inverse():
    steps = torch.linspace(0, 1, 256, dtype=torch.float64)
    assert (srgb_from_linear(linear_from_srgb(steps)) - steps).abs().max() < 1e-6
    assert abs(float(linear_from_srgb(torch.tensor(188 / 255).double())) - 0.5029) < 1e-4 and abs(float(srgb_from_linear(torch.tensor(0.5).double())) - 0.7354) < 1e-4


def test_glb_colours_are_linear(tmp_path):
    path = write_mesh(tmp_path / "a.glb", tetrahedron()._replace(colours=torch.full((4, 3), 0.5)))
    head, array = parse_glb(path)
    assert np.allclose(array(head["meshes"][0]["primitives"][0]["attributes"]["COLOR_0"]), 0.21404, atol=1e-4)


def test_glb_texture_is_embedded(tmp_path):
    surface = tetrahedron()._replace(uv=torch.rand(4, 2, generator=torch.Generator().manual_seed(1)))
    path = write_mesh(tmp_path / "a.glb", surface, texture=np.full((8, 8, 3), 200, np.uint8))
    head, _ = parse_glb(path)
    assert head["images"] and "uri" not in head["images"][0] and "COLOR_0" not in head["meshes"][0]["primitives"][0]["attributes"]


@pytest.mark.parametrize("ending", [".obj", ".ply", ".glb"])
def test_round_trip(ending, tmp_path):
    mesh = tetrahedron()
    back = read_mesh(write_mesh(tmp_path / f"a{ending}", mesh))
    assert torch.equal(back.faces, mesh.faces) and (back.verts - mesh.verts).abs().max() < 1e-4
    assert (back.colours - mesh.colours).abs().max() < {".obj": 1e-5, ".ply": 0.003, ".glb": 1e-5}[ending]
    assert (tmp_path / f"a{ending}").read_bytes() == write_mesh(tmp_path / f"b{ending}", mesh).read_bytes()


@pytest.mark.parametrize("unit, factor", [(None, 1.0), (10.0, 10.0), (1000.0, 1000.0)])
def test_units(unit, factor, tmp_path):
    mesh = tetrahedron()
    assert torch.allclose(read_mesh(write_mesh(tmp_path / "a.obj", mesh), unit_mm=unit).verts, factor * mesh.verts)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError):
            read_mesh(tmp_path / "a.obj", unit_mm=bad)


def test_obj_keeps_the_vertex_order_across_uv_seams(ict, tmp_path):
    path = export_face(tmp_path / "face.obj", ict)
    lines = path.read_text().splitlines()
    verts = np.array([[float(x) for x in line.split()[1:4]] for line in lines if line.startswith("v ")])
    corners = [line.split()[1:] for line in lines if line.startswith("f ")]
    assert len(ict.uv) > len(verts) == ict.num_verts and np.abs(verts - ict.mean.numpy()).max() < 1e-3
    assert np.array_equal([[int(c.split("/")[0]) - 1 for c in f] for f in corners], ict.faces.numpy())
    assert np.array_equal([[int(c.split("/")[1]) - 1 for c in f] for f in corners], ict.uv_faces.numpy())
    assert sum(line.startswith("vt ") for line in lines) == len(ict.uv)
    back = read_mesh(path)
    assert torch.equal(back.faces, ict.faces) and torch.equal(back.uv_faces, ict.uv_faces) and (back.uv - ict.uv).abs().max() < 1e-5 and (back.verts - ict.mean).abs().max() < 1e-3


def test_obj_of_the_lab_head_reads_back_whole(tmp_path):
    head = MorphableModel.procedural()
    back = read_mesh(export_face(tmp_path / "head.obj", head))
    assert len(head.uv) > head.num_verts  # seams: one UV a vertex could not hold them
    assert torch.equal(back.faces, head.faces) and torch.equal(back.uv_faces, head.uv_faces) and (back.uv - head.uv).abs().max() < 1e-5
    assert (back.verts - head.mean).abs().max() < 1e-3 and (back.colours - head.albedo()[0]).abs().max() < 1e-5


@pytest.mark.parametrize(
    "text, faces, uv",
    [
        ("v 0 0 0\r\nv 1 0 0\r\nv 0 1 0\r\nf 1 2 3\r\n", [[0, 1, 2]], None),
        ("v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nf 1 2 3 4", [[0, 1, 2], [0, 2, 3]], None),
        ("v 0 0 0\nv 1 0 0\nv 0 1 0\nf -3 -2 -1\nv 9 9 9\nf -4 -3 -1\n", [[0, 1, 2], [0, 1, 3]], None),
        ("v 0 0 0 1.0\nv 1 0 0 1.0\nv 0 1 0 1.0\nvt 0 0 0\nvt 1 0 0\nvt 0 1 0\nvn 0 0 1\nf 1/3/1 2/2/1 3/1/1\n", [[0, 1, 2]], [[2, 1, 0]]),
        ("v 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nf 1//1 2//1 3//1 # no UV\nl 1 2\ng a\ns off\nf 1/1 2/1 3/1\n", [[0, 1, 2], [0, 1, 2]], None),
    ],
)
def test_obj_dialects(text, faces, uv, tmp_path):
    (tmp_path / "a.obj").write_bytes(text.encode())
    back = read_mesh(tmp_path / "a.obj")
    assert back.faces.tolist() == faces and (back.uv_faces.tolist() if back.uv is not None else None) == uv


def triangle_glb(nodes: list, more: dict | None = None, colours: np.ndarray | None = None) -> bytes:  # a GLB of one triangle, as other programs write it
    rows = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], "<f4")
    buffer = rows.tobytes() + (b"" if colours is None else colours.tobytes())
    views, accessors, attributes = [{"buffer": 0, "byteLength": 36}], [{"bufferView": 0, "componentType": 5126, "type": "VEC3", "count": 3, "min": [0, 0, 0], "max": [1, 1, 0]}], {"POSITION": 0}
    if colours is not None:
        views.append({"buffer": 0, "byteOffset": 36, "byteLength": colours.nbytes})
        accessors.append({"bufferView": 1, "componentType": {"u1": 5121, "u2": 5123, "f4": 5126}[colours.dtype.str[1:]], "normalized": True, "type": "VEC4", "count": 3})
        attributes["COLOR_0"] = 1
    head = {"asset": {"version": "2.0"}, "scene": 0, "scenes": [{"nodes": list(range(len(nodes)))}], "nodes": nodes, "meshes": [{"primitives": [{"attributes": attributes}]}], "accessors": accessors, "bufferViews": views}
    return glb_join(head | (more or {}), buffer)


def test_glb_nodes_are_followed(tmp_path):
    "Blender turns and scales by nodes; a mirrored node turns its triangles round; two nodes are joined."
    (tmp_path / "a.glb").write_bytes(triangle_glb([{"mesh": 0, "translation": [0, 0, 5], "scale": [2, 2, 2]}, {"mesh": 0, "scale": [-1, 1, 1]}]))
    back = read_mesh(tmp_path / "a.glb")
    assert back.faces.shape == (2, 3) and len(back.verts) == 6
    corner = back.verts[back.faces] / 1000
    normal = torch.linalg.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
    assert sorted(normal[:, 2].tolist()) == [1.0, 4.0]  # both to the viewer
    assert {tuple(p) for p in corner.reshape(-1, 3).tolist()} == {(0, 0, 5), (2, 0, 5), (0, 2, 5), (0, 0, 0), (-1, 0, 0), (0, 1, 0)}


@pytest.mark.parametrize("kind, tolerance", [("u1", 0.02), ("u2", 1e-4), ("f4", 1e-6)])
def test_glb_colours_of_other_programs(kind, tolerance, tmp_path):
    "Normalised bytes, shorts and floats are linear, and come back as sRGB."
    linear = np.array([[0, 0.25, 0.5, 1], [1, 0.75, 0.1, 1], [0.2, 0.2, 0.2, 1]])
    stored = linear.astype("<f4") if kind == "f4" else np.round(linear * np.iinfo(kind).max).astype("<" + kind)
    (tmp_path / "a.glb").write_bytes(triangle_glb([{"mesh": 0}], colours=stored))
    assert (read_mesh(tmp_path / "a.glb").colours - srgb_from_linear(torch.tensor(linear[:, :3]))).abs().max() < tolerance


BIG = {"bufferView": 0, "componentType": 5126, "type": "VEC3", "count": 10**9}


@pytest.mark.parametrize(
    "more",
    [
        {"accessors": [{key: value for key, value in BIG.items() if key != "bufferView"}]},  # zeros that are in no file
        {"accessors": [BIG]},
        {"accessors": [BIG | {"count": 3, "sparse": {"count": 1}}]},
        {"accessors": [BIG | {"count": -3}]},
        {"accessors": [BIG | {"count": "3"}]},
        {"accessors": [BIG | {"count": 3, "bufferView": 7}]},
        {"bufferViews": [{"buffer": 0, "byteLength": 10**12}]},
        {"bufferViews": [{"buffer": 0, "byteOffset": -4, "byteLength": 36}]},
        {"images": [{"uri": "../../etc/passwd"}]},
        {"images": [{"uri": "file:///etc/passwd"}]},
        {"extensionsRequired": ["KHR_draco_mesh_compression"]},
        {"meshes": []},
        {"meshes": [{"primitives": [{"attributes": {"POSITION": 9}}]}]},
        {"nodes": []},
        {"accessors": "none"},
    ],
)
def test_a_glb_that_promises_what_it_does_not_hold(more, tmp_path):
    (tmp_path / "a.glb").write_bytes(triangle_glb([{"mesh": 0}], more))
    with pytest.raises(InputError) as caught:
        read_mesh(tmp_path / "a.glb")
    assert caught.value.came and caught.value.needed and caught.value.fix


def test_a_glb_with_an_outer_buffer(tmp_path):
    (tmp_path / "secret.bin").write_bytes(np.zeros(9, "<f4").tobytes())
    head, buffer = glb_parts(triangle_glb([{"mesh": 0}]))
    raw = glb_join(head, buffer)
    head["buffers"] = [{"byteLength": 36, "uri": "secret.bin"}]
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 4)
    (tmp_path / "a.glb").write_bytes(struct.pack("<4sIII4s", b"glTF", 2, 20 + len(text), len(text), b"JSON") + text)
    with pytest.raises(InputError, match="outside"):
        read_mesh(tmp_path / "a.glb")
    (tmp_path / "b.glb").write_bytes(raw)
    assert len(read_mesh(tmp_path / "b.glb").verts) == 3 and read_blendshapes(tmp_path / "b.glb") == {}


@pytest.mark.parametrize("ending", [".obj", ".ply", ".glb"])
def test_damaged_meshes_give_one_error_or_a_sound_mesh(ending, tmp_path):
    raw = write_mesh(tmp_path / f"good{ending}", tetrahedron()).read_bytes()
    draw = np.random.default_rng(0)
    path = tmp_path / f"bad{ending}"
    for cut in range(0, len(raw), max(1, len(raw) // 40)):
        flipped = bytearray(raw)
        flipped[cut] ^= int(draw.integers(1, 256))
        for damaged in (raw[:cut], bytes(flipped)):
            path.write_bytes(damaged)
            for read in (read_mesh,) if ending != ".glb" else (read_mesh, read_blendshapes):
                try:
                    mesh = read(path)
                except InputError as error:
                    assert error.came and error.needed and error.fix
                else:
                    assert read is read_blendshapes or (torch.isfinite(mesh.verts).all() and int(mesh.faces.max()) < len(mesh.verts))


def test_an_obj_does_not_open_other_files(tmp_path):
    (tmp_path / "secret.mtl").write_text("newmtl a\nmap_Kd ../../etc/passwd\n")
    (tmp_path / "a.obj").write_text("mtllib secret.mtl\nusemtl a\nv 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    assert len(read_mesh(tmp_path / "a.obj").verts) == 3


@pytest.mark.parametrize(
    "name, content",
    [
        ("empty.obj", b""),
        ("points.obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\n"),
        ("words.obj", b"v a b c\nf 1 2 3\n"),
        ("nan.obj", b"v nan 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n"),
        ("far.obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n"),
        ("latin.obj", "# Gr\xfc\xdfe\nv 0 0 0\n".encode("latin1")),
        ("cut.glb", b"glTF\x02\x00\x00\x00\xff\x00\x00\x00"),
        ("text.glb", b"this is text"),
        ("cut.ply", b"ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\n"),
        ("wrong.stl", b"solid"),
    ],
)
def test_bad_meshes_meet_one_error(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_mesh(tmp_path / name)
    assert caught.value.came and caught.value.needed and caught.value.fix


def test_nothing_is_left_of_a_failed_export(tmp_path):
    mesh = tetrahedron()
    for bad in (mesh._replace(verts=mesh.verts * float("nan")), mesh._replace(faces=mesh.faces + 4), mesh._replace(colours=mesh.colours[:2])):
        for ending in (".obj", ".ply", ".glb", ".stl"):
            with pytest.raises(InputError):
                write_mesh(tmp_path / f"a{ending}", bad)
    assert list(tmp_path.iterdir()) == []
