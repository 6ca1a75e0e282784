"Face models by name: where their 68 landmarks are from, what a run records of their files, and what cutting and moving a model keeps whole."

from dataclasses import replace

import numpy as np
import pytest
import torch
from fixture_files import fixture
from make_models import NAMED, write_bfm2009, write_bfm2009_original, write_bfm2017

from facelab.face.export import export_face, read_blendshapes, read_mesh
from facelab.face.ict import from_ict
from facelab.face.morphable import MorphableModel, face_model, model_inputs
from facelab.face.render import Mesh
from facelab.lab.assets import ASSETS, main
from facelab.lab.errors import AssetError, InputError, ShapeError
from facelab.lab.files import file_sha256

HEAD = MorphableModel.procedural()


@pytest.fixture
def assets(tmp_path, monkeypatch):
    "A folder of licensed files, for heads of any size."
    monkeypatch.setenv("FACELAB_ASSETS", str(tmp_path / "assets"))
    monkeypatch.delenv("FACELAB_FIXTURES", raising=False)
    for name in ("bfm2017", "bfm2017-face12", "bfm2009", "bfm2009-front"):
        monkeypatch.setitem(ASSETS, name, replace(ASSETS[name], holds={}))
        (tmp_path / "assets" / name).mkdir(parents=True)
    return tmp_path / "assets"


def bfm2017(assets, name="bfm2017"):
    return write_bfm2017(HEAD, assets / name / ASSETS[name].file)


# ---- landmarks ----------------------------------------------------------------------------------------------------------------------------------


def test_basels_file_has_no_68_points_and_gets_the_heads(assets):
    bfm2017(assets)
    assert MorphableModel.from_bfm2017().landmarks68 is None, "the reader says what is in the file"
    model = face_model("bfm2017")
    away = (model.landmarks(model.mean[None]) - HEAD.landmarks(HEAD.mean[None])).norm(dim=2)
    assert away.mean() < 3 and away[0, list(NAMED.values())].max() == 0
    assert model.info["landmarks68"] == f"carried over from procedural by {len(NAMED)} marks"


def test_the_users_list_comes_first(assets):
    own = bfm2017(assets).with_name("landmarks68.txt")
    own.write_text("\n".join(map(str, range(68))))
    model = face_model("bfm2017")
    assert model.landmarks68.tolist() == list(range(68)) and "landmarks68.txt" in model.info["landmarks68"]
    assert MorphableModel.from_bfm2017(landmarks68=[5] * 68).landmarks68.tolist() == [5] * 68
    own.write_text("1 2 3")
    with pytest.raises(ShapeError, match="3 ids"):
        face_model("bfm2017")
    own.write_text(f"{HEAD.num_verts} " * 68)
    with pytest.raises(ShapeError, match=f"{HEAD.num_verts}"):
        face_model("bfm2017")


def test_deep3ds_file_has_its_own_and_basels_of_2009_names_none(assets):
    write_bfm2009(HEAD, assets / "bfm2009-front" / "BFM_model_front.mat")
    assert torch.equal(face_model("bfm2009").landmarks68, HEAD.landmarks68)
    (assets / "bfm2009-front" / "BFM_model_front.mat").unlink()
    path = write_bfm2009_original(HEAD, assets / "bfm2009" / "01_MorphableModel.mat")
    with pytest.raises(InputError, match=r"none in its file.*landmarks68\.txt"):
        face_model("bfm2009")
    path.with_name("landmarks68.txt").write_text("\n".join(map(str, HEAD.landmarks68.tolist())))
    assert torch.equal(face_model("bfm2009").landmarks68, HEAD.landmarks68)


def test_the_list_of_assets_says_what_may_lie_beside(capsys):
    main(["bfm2017"])
    assert "landmarks68.txt" in capsys.readouterr().out


# ---- what a run records -------------------------------------------------------------------------------------------------------------------------


def test_a_record_names_the_file_that_was_read(assets):
    assert model_inputs("procedural") == {}
    with pytest.raises(AssetError, match="model2017-1_bfm_nomouth.h5"):
        model_inputs("bfm2017")
    small = bfm2017(assets, "bfm2017-face12")
    assert model_inputs("bfm2017") == {"asset:bfm2017-face12": file_sha256(small)}
    whole = bfm2017(assets)
    whole.with_name("landmarks68.txt").write_text("1 " * 68)
    held = model_inputs("bfm2017")
    assert held == {"asset:bfm2017": file_sha256(whole), "asset:bfm2017/landmarks68.txt": file_sha256(whole.with_name("landmarks68.txt"))}


# ---- fewer modes, fewer vertices, another dtype ---------------------------------------------------------------------------------------------------


def test_fewer_expressions_keep_their_names(tmp_path):
    model = from_ict(fixture("ict/ict_face9409.npz")).keep_modes(num_exp=10)
    assert len(model.info["exp_names"]) == 10 == model.num_exp
    shapes = read_blendshapes(export_face(tmp_path / "a.glb", model))
    assert list(shapes) == model.info["exp_names"]


def test_a_cropped_head_is_whole(tmp_path):
    keep = torch.zeros(HEAD.num_verts, dtype=torch.bool).index_fill(0, HEAD.faces[HEAD.region_ids != 17].flatten(), True)
    keep[HEAD.landmarks68] = True
    model = HEAD.crop(keep)
    assert 0 < model.num_verts < HEAD.num_verts and torch.equal(model.info["part_ids"], HEAD.info["part_ids"][keep])
    shapes, mesh = read_blendshapes(export_face(tmp_path / "a.glb", model)), read_mesh(tmp_path / "a.glb")
    assert set(shapes) == set(HEAD.info["blendshapes"]) and len(mesh.faces) == len(model.faces)
    assert all(torch.equal(move, HEAD.info["blendshapes"][name][keep]) for name, move in model.info["blendshapes"].items())
    assert model.crop(torch.ones(model.num_verts, dtype=torch.bool)).info["part_ids"].equal(model.info["part_ids"])


def test_a_cropped_basel_head_renumbers_names_and_front(tmp_path):
    from facelab.face.bfm import from_bfm2009, from_bfm2017

    keep = HEAD.mean[:, 2] > 0
    keep[HEAD.landmarks68] = True
    rows = keep.nonzero()[:, 0]
    model = from_bfm2017(write_bfm2017(HEAD, tmp_path / "a.h5"))
    keep[model.info["named"]["center.chin.tip"]] = False
    rows = keep.nonzero()[:, 0]
    part = model.crop(keep)
    assert set(part.info["named"]) == set(model.info["named"]) - {"center.chin.tip"}
    assert all(int(rows[vertex]) == model.info["named"][name] for name, vertex in part.info["named"].items())
    keep[HEAD.landmarks68] = True
    rows = keep.nonzero()[:, 0]
    model = from_bfm2009(write_bfm2009(HEAD, tmp_path / "a.mat"))
    found = rows[model.crop(keep).info["front_faces"]]
    whole = model.info["front_faces"][keep[model.info["front_faces"]].all(1)]
    assert torch.equal(found, whole) and 0 < len(whole) < len(model.info["front_faces"])


def test_vertices_with_a_uv_each_are_cut_with_it():
    model = replace(HEAD, uv=torch.rand(HEAD.num_verts, 2), uv_faces=None, landmarks68=None)
    keep = HEAD.mean[:, 1] > 0
    assert torch.equal(model.crop(keep).uv, model.uv[keep])


@pytest.mark.parametrize("corners", [False, True])
def test_a_dtype_is_for_floats(corners):
    model = replace(HEAD, landmarks68=(torch.arange(68), torch.full((68, 3), 1 / 3))) if corners else HEAD
    fine = model.to(torch.float64)
    assert fine.mean.dtype == fine.exp_basis.dtype == fine.uv.dtype == torch.float64
    assert fine.faces.dtype == fine.uv_faces.dtype == fine.region_ids.dtype == torch.int64 and fine.regions["nose"].dtype == torch.bool
    assert fine.landmarks(fine.verts()).dtype == torch.float64 and np.allclose(fine.landmarks(fine.verts()), model.landmarks(model.verts()))


def test_a_dtype_moves_no_mesh():
    mesh = Mesh(HEAD.verts(), HEAD.faces, labels=HEAD.region_ids).to("meta").to(torch.float64)
    assert mesh.verts.dtype == torch.float64 and mesh.faces.dtype == torch.int64 and {mesh.faces.device.type, mesh.labels.device.type} == {"meta"}
