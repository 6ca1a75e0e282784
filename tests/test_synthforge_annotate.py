"Labels, depth and landmarks tell the same story, exactly; textures without labels are counted; the alignment map is found again."

import numpy as np
import pytest
import torch
from fixture_files import fixture

from facelab.face.camera import Camera, sample_orbit
from facelab.face.flame import from_flame
from facelab.face.morphable import MorphableModel
from facelab.face.render import Mesh, render
from facelab.lab.errors import InputError, ShapeError
from facelab.synthforge.align_map import RELEASED, AlignConfig, AlignMap, AlignSample, align_terms, chamfer, fit_align_map, mesh_depth
from facelab.synthforge.annotate import HeadTopology, annotate, annotated_faces, front_depth, relabelled, seen_in_depth
from facelab.synthforge.annotated import SYNTH20, SYNTH20_FLIPS
from facelab.synthforge.augment import swapped_labels
from facelab.synthforge.uv_labels import UNLABELLED, UVLabels, chart_texels, complete, merge_uv_labels, uv_labels_of


@pytest.fixture(scope="module")
def head():
    return MorphableModel.procedural()


@pytest.fixture(scope="module")
def topology(head):
    return HeadTopology.of_model(head, uv_labels_of(head, 2048))


@pytest.fixture(scope="module")
def shot(head, topology):
    "Four heads from four sides, with their annotation at 256 pixels."
    draw = torch.Generator().manual_seed(0)
    verts = head.verts(torch.randn(4, 30, generator=draw), 0.6 * torch.randn(4, 30, generator=draw))
    camera = sample_orbit(4, draw, 0.6, 0.25, focal=3.4)
    return verts, camera, annotate(topology, verts, camera, 256)


def test_texture_labels_are_those_of_the_faces(head, shot):
    verts, camera, found = shot
    seen = render(Mesh(verts, head.faces, labels=head.region_ids), camera, None, 256)
    own = torch.where(seen.labels < 0, 19, seen.labels)
    assert torch.equal(own == 19, found.labels == 19)
    wrong = (own != found.labels) & (own != 19)
    assert wrong.float().sum() / (own != 19).sum() < 0.005  # a texel is not a triangle: only at borders
    near = torch.zeros_like(wrong)
    for dy, dx in ((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)):
        near |= own != torch.roll(own, (dy, dx), (1, 2))
    assert int((wrong & ~near).sum()) <= 3  # of 117,000: slivers thinner than a texel


def test_every_pixel_is_what_a_ray_meets_first(topology, shot):
    "A slow twin: at random pixel centres, the nearest of all triangles says depth, and its texel the label."
    verts, camera, found = shot
    rng = np.random.default_rng(0)
    for image in range(2):
        xy, z = camera[image].project(verts[image : image + 1], 256)
        corners = torch.cat([xy, z[..., None]], -1)[0][topology.faces]
        cells = torch.from_numpy(rng.integers(0, 256, (300, 2)))
        depth = front_depth(cells + 0.5, corners)
        ours = found.depth[image][cells[:, 1], cells[:, 0]]
        assert torch.equal(depth.isinf(), ours == 0) and (depth[ours > 0] - ours[ours > 0]).abs().max() < 0.02
        assert torch.equal(found.labels[image][cells[:, 1], cells[:, 0]] == 19, ours == 0)


def test_projection_is_exact(shot):
    "Against plain float64 arithmetic with the camera's 25 numbers."
    verts, camera, found = shot
    label = camera.pack(unit_mm=1.0).double().numpy()
    for k in range(4):
        world, intrinsics = label[k, :16].reshape(4, 4), label[k, 16:].reshape(3, 3)
        points = found.landmarks[k].double().numpy()
        seen = (np.c_[points, np.ones(len(points))] @ np.linalg.inv(world).T)[:, :3] @ intrinsics.T
        assert np.abs(256 * seen[:, :2] / seen[:, 2:] - found.landmarks_2d[k].numpy()).max() < 2e-3


def test_labels_lie_under_their_landmarks(shot):
    "A landmark that one sees lies on its own part; one that is hidden has something nearer in the depth map."
    _, camera, found = shot
    parts = {30: {16}, 33: {16}, 57: {13, 0}, 51: {14, 0, 16}, 19: {8, 9, 10, 2}, 24: {8, 9, 10, 2}, 8: {0, 3}}
    hits = 0
    for image in range(4):
        for point, names in parts.items():
            x, y = found.landmarks_2d[image, point].floor().long().tolist()
            if found.visible[image, point]:
                around = set(found.labels[image, max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3].flatten().tolist())
                assert around & names, (image, point, around)
                hits += 1
    assert hits > 15
    away = camera.project(found.landmarks, 256)[1]
    at = found.landmarks_2d.floor().long().clamp(0, 255)
    front = found.depth[torch.arange(4)[:, None], at[..., 1], at[..., 0]]
    hidden = ~found.visible & (front > 0) & (found.landmarks_2d > 0).all(-1) & (found.landmarks_2d < 256).all(-1)
    assert (front[hidden] < away[hidden] + 3).float().mean() > 0.95 and (away - front)[hidden].median() > 5


def test_visibility_agrees_with_a_fine_depth_map(head, topology, shot):
    verts, camera, found = shot
    fine = render(Mesh(verts, head.faces), camera, None, 1024)
    at, away = camera.project(found.landmarks, 1024)
    agree = seen_in_depth(at, away, fine.depth[:, 0], 2.0) == found.visible
    assert agree.float().mean() > 0.97
    coarse = annotate(topology, verts, camera, 48)
    assert torch.equal(coarse.visible, found.visible)  # the size of the picture plays no part


def test_a_mirrored_head_has_mirrored_labels(head, topology):
    "The head at rest is symmetric: from the mirrored camera, left and right change places."
    draw = torch.tensor([[0.35], [-0.35]])
    cams = [Camera.orbit(torch.pi / 2 + d, torch.tensor([torch.pi / 2]), focal=3.4) for d in draw]
    one, other = (annotate(topology, head.mean[None], cam, 256).labels[0].numpy() for cam in cams)
    turned = swapped_labels(other[:, ::-1], SYNTH20_FLIPS)
    assert (one == turned).mean() > 0.985 and (one == other[:, ::-1]).mean() < (one == turned).mean() - 0.01


def test_unlabelled_texels_are_counted(head):
    labels = uv_labels_of(head, 512)
    on = chart_texels(head.uv, head.uv_faces, (512, 512))
    bare = labels.ids.copy()
    bare[~on] = UNLABELLED  # between the charts: allowed
    assert np.array_equal(complete(UVLabels(bare, SYNTH20, 19), head.uv, head.uv_faces).ids[on], labels.ids[on])
    rows, cols = np.argwhere(on)[::50].T
    bare[rows, cols] = UNLABELLED
    with pytest.raises(InputError, match=f"{len(rows):,} of {int(on.sum()):,} texels"):
        HeadTopology.of_model(head, UVLabels(bare, SYNTH20, 19))
    with pytest.raises(ShapeError):
        UVLabels(np.full((4, 4), 30, np.uint8), SYNTH20, 19)


def test_another_scheme_by_another_texture(head, topology, shot):
    verts, camera, found = shot
    names = ("nothing", "face", "mouth")
    into = {n: "mouth" if "lip" in n or "mouth" in n else "face" for n in SYNTH20[:19]}
    coarse = HeadTopology.of_model(head, merge_uv_labels(topology.labels, into, names, "nothing"))
    faces = annotated_faces(np.zeros((4, 256, 256, 3), np.uint8), found, camera, list("abcd"))
    for k, face in enumerate(relabelled(faces, coarse, lambda face: verts["abcd".index(face.name)])):
        mouth = np.isin(faces[k].labels, (13, 14, 15))
        assert np.array_equal(face.labels == 2, mouth) and np.array_equal(face.labels == 0, faces[k].labels == 19)
    del faces[0].facts["camera"]
    with pytest.raises(InputError, match="camera"):
        next(relabelled(faces, coarse, lambda face: verts[0]))


def test_a_volume_renderers_depth_hides_landmarks(topology, shot):
    "Hair in front of the brow: known to the depth of the volume only."
    verts, camera, found = shot
    volume = found.depth.clone()
    volume[:, :128] = torch.where(volume[:, :128] > 0, volume[:, :128] - 40, 700.0)
    both = annotate(topology, verts, camera, 256, depth=volume)
    upper = found.landmarks_2d[..., 1] < 124
    assert not bool(both.visible[upper].any()) and torch.equal(both.visible[found.landmarks_2d[..., 1] > 132], found.visible[found.landmarks_2d[..., 1] > 132])


def test_meshes_of_flames_topology_and_of_any_size():
    mesh = np.load(fixture("next3d/mesh.npz"))
    verts = torch.from_numpy(mesh["v"]).float()
    verts = verts * 1000 if float(verts.abs().max()) < 2 else verts
    uv, faces, uv_faces = (torch.from_numpy(mesh[k]) for k in ("vt", "f", "ft"))
    ids = np.repeat(np.uint8([[0], [1]]), 64, 0).repeat(128, 1)
    labels = UVLabels(ids, ("lower", "upper", "background"), 2)
    whole = HeadTopology(faces.long(), uv.float(), uv_faces.long(), labels, torch.arange(68))
    camera = sample_orbit(1, torch.Generator().manual_seed(0), 0.1, 0.1, target=tuple(verts.mean(0).tolist()))
    found = annotate(whole, verts[None], camera, 96)
    assert found.solid.float().mean() > 0.02 and set(found.labels.unique().tolist()) >= {0, 1, 2} and found.landmarks_2d.shape == (1, 68, 2)
    few = from_flame(fixture("flame/FLAME_NEUTRAL.npz"), fixture("flame/landmark_embedding.npz"))
    flat = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
    small = HeadTopology.of_flame(few, flat, few.faces, labels)
    verts = few.verts(torch.randn(2, 10), None)
    found = annotate(small, verts, sample_orbit(2, torch.Generator().manual_seed(0)), 64, few.landmarks(verts))
    assert found.labels.shape == (2, 64, 64) and found.landmarks.shape == (2, 68, 3)
    with pytest.raises(ShapeError, match="vertices or more"):
        annotate(small, torch.zeros(1, 100, 3), camera, 64)
    with pytest.raises(InputError, match="no landmarks"):  # a FLAME file without the fixed 68
        annotate(small, verts, camera, 64)
    with pytest.raises(ShapeError, match="texture triangles"):
        HeadTopology(few.faces, flat, few.faces[:-1], labels)


def test_released_map_and_its_composition():
    released = AlignMap.released()
    point = torch.tensor([[0.1, -0.2, 0.3]])
    by_hand = np.array(RELEASED[0]) @ np.array([0.1, -0.2, 0.3]) + np.array(RELEASED[1])
    assert np.allclose(released(point).detach().numpy()[0], by_hand, atol=1e-6)
    fresh = AlignMap()
    assert torch.allclose(fresh(point).detach(), point + 0.01) and sum(p.numel() for p in fresh.parameters()) == 12


def test_alignment_terms_vanish_where_everything_fits(head):
    "At the true map depth, landmarks and jaw cost nothing, and the chamfer distance is that of a sampled surface; away from it all four rise."
    verts = head.mean / AlignMap().unit_mm
    camera = sample_orbit(1, torch.Generator().manual_seed(0), 0.1, 0.1)
    marks = head.landmarks(head.mean[None])[0] / AlignMap().unit_mm
    found = camera.project(head.landmarks(head.mean[None]), 1)[0][0]
    sample = AlignSample(verts, marks, camera.pack()[0], verts[verts[:, 2] > 0.09], mesh_depth(verts, head.faces, camera, 48), found)
    with torch.no_grad():
        exact = align_terms(AlignMap(0.0), head.faces, sample)
        moved = align_terms(AlignMap(0.02), head.faces, sample)
    assert exact["depth"] < 1e-6 and exact["points"] < 1e-4 and exact["jaw"] < 1e-4 and exact["chamfer"] < 0.05
    assert all(moved[name] > 5 * exact[name] + 1e-3 for name in exact)
    gradient = torch.autograd.grad(sum(align_terms(mover := AlignMap(0.02), head.faces, sample).values()), mover.shift)[0]
    assert torch.isfinite(gradient).all() and (gradient.abs() > 0).all()


def test_alignment_readings_of_the_batch_and_the_mask(head, monkeypatch):
    "Ten faces: chamfer and depth count ten times by the authors' sum, once by the mean; landmarks once in both. Off the volume, depth counts where the mesh is, or not at all."
    assert [AlignConfig().weight(name, 10) for name in ("chamfer", "depth", "points", "jaw")] == [10, 10, 1, 1]
    assert {AlignConfig(over_batch="mean").weight(name, 10) for name in ("chamfer", "depth", "points", "jaw")} == {1}
    verts, camera = head.mean / AlignMap().unit_mm, sample_orbit(1, torch.Generator().manual_seed(0), 0.1, 0.1)
    marks = head.landmarks(head.mean[None])[0] / AlignMap().unit_mm
    depth = mesh_depth(verts, head.faces, camera, 32)
    found = camera.project(head.landmarks(head.mean[None]), 1)[0][0]
    part = depth.clone()
    part[:, :16] = 0  # unknown on the left
    sample = AlignSample(verts, marks, camera.pack()[0], verts[verts[:, 2] > 0.09], part, found)
    own = depth > 0
    wrong = (depth - part)[own].square().sum() / own.sum()
    with torch.no_grad():
        on_mesh, on_both = (align_terms(AlignMap(0.0), head.faces, sample, AlignConfig(depth_on=kind))["depth"] for kind in ("mesh", "both"))
    assert torch.isclose(on_mesh, 1000 * wrong, rtol=1e-4) and on_both < 1e-6
    losses = []
    monkeypatch.setattr("facelab.synthforge.align_map.train", lambda how, models, players, source, *rest: losses.append(players[0].loss_fn(models, [sample, sample], None)) or 1 / 0)
    for kind in ("sum", "mean"):
        with pytest.raises(ZeroDivisionError):
            fit_align_map(lambda index, rng: sample, 2, [sample], head.faces, AlignConfig(batch=2, over_batch=kind, depth_on="both"))
    one, other = losses
    assert torch.isclose(one["chamfer"], 2 * other["chamfer"]) and torch.isclose(one["points"], other["points"]) and torch.isclose(one["loss"], sum(one[n] for n in ("chamfer", "depth", "points", "jaw")))
    for bad in (dict(over_batch="max"), dict(depth_on="sky")):
        with pytest.raises(InputError, match="the authors'"):
            AlignConfig(**bad)


def test_alignment_resumes_to_the_same_map(head, tmp_path):
    unit, true = AlignMap().unit_mm, AlignMap(0.03)
    keep = torch.arange(0, head.num_verts, 6)

    @torch.no_grad()
    def painted(index, rng):
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        verts, camera = head.verts(torch.randn(1, 5, generator=generator))[0] / unit, sample_orbit(1, generator, 0.3, 0.2)
        marks = head.landmarks(verts[None])[0]
        there = true(verts)
        dense = there[keep][there[keep][:, 2] > 0.1]
        return AlignSample(verts, marks, camera.pack()[0], dense, mesh_depth(there, head.faces, camera, 24), camera.project(true(marks)[None] * unit, 1)[0][0])

    val = [painted(0, np.random.default_rng(9))]
    config = AlignConfig(batch=2, rate=3e-3, epochs=3, depth_on="both")
    folder = tmp_path / "align"
    first, curve = fit_align_map(painted, 4, val, head.faces, config, folder, False)
    again, same = fit_align_map(painted, 4, val, head.faces, config, folder, False)  # finds it finished
    assert torch.equal(first.matrix, again.matrix) and torch.equal(first.shift, again.shift) and curve.equals(same)
    assert curve["val/nme"].iloc[-1] < curve["val/nme"].iloc[0] < 1


def test_chamfer_refuses_nothing():
    with pytest.raises(InputError):
        chamfer(torch.zeros(3, 3), torch.zeros(0, 3))
    with pytest.raises(InputError, match="batches of"):
        fit_align_map(lambda index, rng: None, 4, [], torch.zeros(1, 3, dtype=torch.long))
