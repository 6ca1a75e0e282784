"The table of corners that is kept with a tensor of faces: the same bytes, never a stale one, nothing left behind, any number of threads."

import gc
import threading

import pytest
import torch

from facelab.face import interpolate
from facelab.face.camera import Camera
from facelab.face.interpolate import _KEPT, incidence, kept_incidence, vertex_normals
from facelab.face.morphable import MorphableModel
from facelab.face.render import Mesh, render

HEAD = MorphableModel.procedural()


@pytest.fixture
def counted(monkeypatch):
    "Each call of `incidence` is noted."
    calls = []

    def count(faces, num_verts):
        calls.append(num_verts)
        return incidence(faces, num_verts)

    monkeypatch.setattr(interpolate, "incidence", count)
    return calls


def test_normals_are_the_same_bytes_and_the_table_is_made_once(counted):
    faces, verts = HEAD.faces.clone(), HEAD.verts(torch.randn(2, 80)).double()
    with_table = vertex_normals(verts, faces, incidence(faces, verts.shape[1]))
    for _ in range(3):
        leaf = verts.clone().requires_grad_()
        assert torch.equal(vertex_normals(leaf, faces), with_table)
        vertex_normals(leaf, faces).sum().backward()
    assert len(counted) == 1


def test_render_makes_it_once(counted):
    model, camera = HEAD.to(torch.float64), Camera.scaled_orthographic(torch.zeros(1, 6, dtype=torch.float64))
    mesh = Mesh(model.verts(), model.faces.clone())
    first = render(mesh, camera, torch.ones(1, 3, 9, dtype=torch.float64), 24).image
    assert torch.equal(render(mesh, camera, torch.ones(1, 3, 9, dtype=torch.float64), 24).image, first) and len(counted) == 1


def test_changed_faces_and_another_count_are_seen():
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    old = kept_incidence(faces, 5)
    assert kept_incidence(faces, 5) is old and len(kept_incidence(faces, 6)) == 6
    faces[0] = torch.tensor([4, 3, 1])
    assert torch.equal(kept_incidence(faces, 5), incidence(faces, 5)) and not torch.equal(kept_incidence(faces, 5), old)
    faces.view(-1)[0] = 2  # through a view
    assert torch.equal(kept_incidence(faces, 5), incidence(faces, 5))


def test_nothing_is_left_and_a_reused_address_is_no_hit():
    gc.collect()
    before = len(_KEPT)
    for n in range(200):
        faces = torch.randint(0, 9, (7, 3))
        assert torch.equal(kept_incidence(faces, 9 + n % 2), incidence(faces, 9 + n % 2))
    del faces
    gc.collect()
    assert len(_KEPT) == before


def test_inference_tensors_are_not_kept():
    before = len(_KEPT)
    with torch.inference_mode():
        faces = torch.tensor([[0, 1, 2]])
        kept_incidence(faces, 3)
    assert len(_KEPT) == before
    faces = torch.tensor([[0, 1, 2], [2, 1, 3]])
    with torch.inference_mode():
        table = kept_incidence(faces, 4)
    assert not table.is_inference() and kept_incidence(faces, 4) is table
    verts = torch.rand(1, 4, 3, dtype=torch.float64, requires_grad=True)
    vertex_normals(verts, faces).sum().backward()


def test_many_threads():
    shared, wrong = torch.randint(0, 50, (90, 3)), []

    def work(seed):
        draw = torch.Generator().manual_seed(seed)
        for n in range(60):
            own = torch.randint(0, 50, (20, 3), generator=draw)
            for faces, count in ((shared, 50 + n % 3), (own, 50)):
                if not torch.equal(kept_incidence(faces, count), incidence(faces, count)):
                    wrong.append((seed, n))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not wrong
