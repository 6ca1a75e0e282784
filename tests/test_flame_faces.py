"The published Next3D by name: files of its forms with random numbers become annotated faces; nothing of it is the shipped generator."

import numpy as np
import pytest
import scipy.sparse
import torch
from fixture_files import fixture
from make_models import write_python2_pickle
from PIL import Image

from facelab.face.flame import from_flame
from facelab.face.morphable import MorphableModel
from facelab.lab.arrays import read_npz
from facelab.lab.errors import AssetError, InputError
from facelab.lab.paths import root
from facelab.lab.profile import profile_values
from facelab.lab.run import Job
from facelab.nets.next3d import NEXT3DS, Next3D, Next3DConfig, Next3DVolume
from facelab.nets.next3d_convert import load_next3d, save_next3d
from facelab.nets.stylegan2 import StyleGAN2Config
from facelab.nets.superres import SuperresConfig
from facelab.synthforge import flame_faces, throughput
from facelab.synthforge.align_map import RELEASED, AlignMap
from facelab.synthforge.annotated import SYNTH20
from facelab.synthforge.draws import PAPER_RANGES, draw_face, focal_of
from facelab.synthforge.flame_faces import FlameFaces, flame_points, next3d_random, one_joint_flame, random_next3d
from facelab.synthforge.generate import SynthSpec, generate_faces
from facelab.synthforge.generator import FaceMaker, open_generator
from facelab.synthforge.next3d_faces import Next3DFaces, affine_move
from facelab.synthforge.next3d_planes import FRAMES, mesh_views, views_for
from facelab.synthforge.uv_labels import SYNTH_COLOURS, uv_labels_of

TINY = Next3DConfig(
    StyleGAN2Config(z_dim=8, w_dim=16, c_dim=25, layers=2, size=32, out_channels=24, channels=(16, 16, 8, 8)),
    Next3DVolume(8, 8), SuperresConfig(8, 16, (8, 8), (False, True), clamp=None), 16, 16, mouth_size=16, mouth_low=4, blend_low=8, num_faces=2472, num_uv=1276, num_dense=3,
)  # fmt: skip


def write_flame(path, verts, faces):
    "A FLAME pickle of a mesh, with random bases."
    rng, v = np.random.default_rng(0), len(verts)
    regressor = np.zeros((5, v), np.float32)
    regressor[np.arange(5), [10, 200, 300, 400, 500]] = 1
    held = {
        "v_template": verts, "f": faces.astype(np.uint32), "shapedirs": (1e-3 * rng.standard_normal((v, 3, 400))).astype(np.float32), "posedirs": np.zeros((v, 3, 36), np.float32),
        "J_regressor": scipy.sparse.csc_matrix(regressor), "weights": np.full((v, 5), 0.2, np.float32), "kintree_table": np.array([[2**32 - 1, 0, 1, 1, 1], range(5)], np.int64),
    }  # fmt: skip
    return write_python2_pickle(held, path)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A folder of assets: generator, FLAME, landmarks, labelled texture."
    top = tmp_path_factory.mktemp("assets")
    mesh = read_npz(fixture("next3d/mesh.npz"))
    for name in ("flame2020", "flame-landmarks", "flame-labels"):
        (top / name).mkdir()
    write_flame(top / "flame2020" / "generic_model.pkl", mesh["v"], mesh["f"])
    rng = np.random.default_rng(1)
    face = {"static": rng.integers(0, 2472, 51), "dynamic": rng.integers(0, 2472, (79, 17)), "full": rng.integers(0, 2472, 68)}
    held = {f"{part}_lmk_faces_idx": index for part, index in face.items()} | {f"{part}_lmk_bary_coords": np.full((*index.shape, 3), 1 / 3, np.float32) for part, index in face.items()}
    np.save(top / "flame-landmarks" / "landmark_embedding.npy", np.array(held, dtype=object))
    stripes = np.array([[int(SYNTH_COLOURS[name][k : k + 2], 16) for k in (0, 2, 4)] for name in SYNTH20[:19]], np.uint8)
    picture = stripes[np.arange(256) * 19 // 256][:, None].repeat(256, 1)
    picture[::61, ::67] = 1  # a few texels of no class
    Image.fromarray(picture).save(top / "flame-labels" / "flame_seg_tex.png")
    torch.manual_seed(0)
    net = Next3D(TINY)
    tensors = net.state_dict()
    uv, uv_faces = torch.from_numpy(mesh["vt"]), torch.from_numpy(mesh["ft"].astype(np.int64))
    place = torch.stack([2 * uv[:, 0] - 1, 1 - 2 * uv[:, 1], torch.ones(len(uv))], -1)
    tensors |= {"faces": torch.from_numpy(mesh["f"].astype(np.int64))[None], "uvfaces": uv_faces[None], "raw_uvcoords": uv[None], "uvcoords": place[None], "face_uvcoords": place[uv_faces][None]}
    save_next3d(top / "next3d", TINY, tensors, torch.ones(32, 32), source="random")
    return top


@pytest.fixture
def maker(home, monkeypatch):
    monkeypatch.setenv("FACELAB_ASSETS", str(home))
    return open_generator("next3d-official", PAPER_RANGES, 48)


def test_the_official_generator_by_name(maker, home):
    "The picture is the user's network on FLAME's mesh: front plane only, truncated at .7, the drawn camera on FFHQ's sphere."
    assert isinstance(maker, FaceMaker) and maker.name == "next3d-official" and maker.classes == SYNTH20
    draws = [draw_face(PAPER_RANGES, 2, number) for number in range(3)]
    faces = maker(draws)
    again = maker(draws[1:2])[0]
    assert np.array_equal(again.image, faces[1].image) and np.array_equal(again.labels, faces[1].labels)
    flame = from_flame(home / "flame2020" / "generic_model.pkl", home / "flame-landmarks" / "landmark_embedding.npy")
    net = load_next3d(home / "next3d")
    object.__setattr__(net.config, "front_only", True)
    draw = draws[1]
    verts = flame.verts(torch.tensor(draw.shape[None], dtype=torch.float32), torch.tensor(draw.exp[None], dtype=torch.float32))
    yaw, pitch = -draw.yaw, np.sin(draw.pitch)
    cam = torch.tensor(again.facts["camera"])[None]
    cam[:, [3, 7, 11]] /= 400
    assert cam[0, 16] == pytest.approx(focal_of(draw.fov), rel=1e-4) and cam[0, 7] == pytest.approx(2.7 * pitch, abs=1e-3) and np.sign(cam[0, 3]) == np.sign(yaw)
    assert cam[0, [3, 7, 11]].norm() == pytest.approx(2.7, abs=1e-3)  # about the origin, as EG3D's sampler
    with torch.no_grad():
        z = torch.from_numpy(np.random.default_rng([draw.seed, 3]).standard_normal(8).astype(np.float32))[None]
        ws = net.mapping(z, cam, 0.7, net.num_ws // 2)
        image = net.synthesis(ws, cam, views_for(net, verts / 1000, flame_points(flame, verts) / 1000)).image
        image = torch.nn.functional.interpolate(image, (48, 48), mode="bilinear", antialias=True)
    expected = ((image / 2 + 0.5).clamp(0, 1) * 255 + 0.5).to(torch.uint8)[0].permute(1, 2, 0).numpy()
    assert np.abs(expected.astype(int) - again.image).max() <= 1


def test_landmarks_are_flames_by_the_authors_formula(maker):
    "Float64: 2.5 (v + (0, -.01, -.01)), z + sqrt(2) / 10, the released map, the camera's 25 numbers."
    face = maker([draw_face(PAPER_RANGES, 2, 5)])[0]
    flame = maker.head
    verts = flame.verts(torch.tensor([face.facts["shape_code"]]), torch.tensor([face.facts["exp_code"]]))
    own = flame_points(flame, verts)[0].double().numpy() / 1000
    world = 2.5 * (own + [0, -0.01, -0.01]) + [0, 0, np.sqrt(2) / 10]
    world = world @ np.array(RELEASED[0]).T + np.array(RELEASED[1])
    label = np.array(face.facts["camera"])
    pose, k = label[:16].reshape(4, 4).copy(), label[16:].reshape(3, 3)
    pose[:3, 3] /= 400
    seen = (np.c_[world, np.ones(68)] @ np.linalg.inv(pose).T)[:, :3] @ k.T
    assert np.abs(48 * seen[:, :2] / seen[:, 2:] - face.landmarks_2d).max() < 5e-3
    moved = affine_move(flame_points(flame, verts), face.facts["placed"])[0].numpy()
    assert np.abs(moved - 400 * world).max() < 0.02 and np.abs(moved - face.landmarks).max() < 0.02


def test_official_faces_go_into_shards(home, monkeypatch, tmp_path):
    monkeypatch.setenv("FACELAB_ASSETS", str(home))
    data = generate_faces(SynthSpec(3, "next3d-official", "paper", 32, each=2), tmp_path / "set", every=1e9)
    recipe = data.plan.recipe
    assert recipe["generator"] == "next3d-official" and recipe["native_size"] == 32 and recipe["truncation"] == 0.7 and recipe["parameters"] == sum(w.numel() for w in Next3D(TINY).parameters())


@pytest.mark.parametrize("lost", ["next3d", "flame2020", "flame-landmarks", "flame-labels"])
def test_a_missing_file_is_named(home, tmp_path, monkeypatch, lost):
    for folder in home.iterdir():
        if folder.name != lost:
            (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.setenv("FACELAB_ASSETS", str(tmp_path))
    with pytest.raises(AssetError, match=lost):
        open_generator("next3d-official", PAPER_RANGES, 48)


def test_a_mesh_of_another_topology_is_refused(maker):
    model = MorphableModel.procedural()
    with pytest.raises(InputError, match="2472 triangles, a head of 15036"):
        FlameFaces(PAPER_RANGES, 48, maker.net, head=one_joint_flame(model), labels=uv_labels_of(model, 64))
    with pytest.raises(InputError, match="next3d-official"):
        Next3DFaces(PAPER_RANGES, 48, maker.net)


def test_front_only_draws_the_same_front(maker):
    drawn = maker.drawn([draw_face(PAPER_RANGES, 2, 0)])
    net, (verts, points) = maker.net, (drawn.verts / 1000, drawn.points / 1000)
    all_four = mesh_views(verts, points[:, 48:60], net.faces[0], net.face_uvcoords[0, :, :, :2], FRAMES["flame"], 32)
    front = maker.views(drawn)
    assert torch.equal(front.hit[:, 0], all_four.hit[:, 0]) and torch.equal(front.uv[:, 0], all_four.uv[:, 0]) and torch.equal(front.mouth, all_four.mouth)
    assert all_four.hit[:, 1:].any() and not front.hit[:, 1:].any()
    with torch.no_grad():
        assert torch.equal(net.planes(drawn.ws, front), net.planes(drawn.ws, all_four))


def test_the_random_generator_has_the_published_size():
    "On the meta device: the weights are counted without memory. It stands on the lab's head, so no licensed file is asked for."
    model = MorphableModel.procedural()
    with torch.device("meta"):
        net = Next3D(NEXT3DS["ffhq512"])
    assert sum(w.numel() for w in net.parameters()) == 172_815_807 and net.config.size == 512
    flame = one_joint_flame(model)
    code = torch.randn(2, 30)
    assert torch.allclose(flame.verts(code), model.verts(code), atol=1e-3) and torch.allclose(flame_points(flame, model.mean[None]), model.landmarks(model.mean[None]), atol=1e-3)


@pytest.mark.parametrize("name", ["next3d-random", "next3d"])
def test_the_speed_row_says_which_network_it_timed(name, monkeypatch):
    "A small generator enlarged to 512 pixels is no evidence for the paper's claim: weights and native size are in the row's name, and the claim asks for both."
    model = MorphableModel.procedural()
    small = random_next3d(TINY, model)
    made = lambda ranges, size, supersample=1, device="cpu": FlameFaces(ranges, size, small, AlignMap.released(), head=one_joint_flame(model), labels=uv_labels_of(model, 64), name=name)
    monkeypatch.setattr(flame_faces, "next3d_random", made)
    monkeypatch.setattr("facelab.synthforge.next3d_faces.next3d_faces", made)
    values = dict(generator=name, ranges="code", faces=2, size=64, supersample=1, workers=1, loaders=0, batch=2, steps=1, device="cpu", seed=0, threads=1)
    job = Job("synthforge-benchmark", "smoke", values)
    row = throughput.run_speed(job).rows[0]
    assert row.method.startswith(f"generator {name} (") and "native 32 px" in row.method and ", 64 px, 1 processes" in row.method and row.value > 0
    assert next3d_random is not made and "172.8 M weights" not in row.method


def test_the_claim_asks_for_the_published_network():
    ledger = (root() / "nbs" / "synthforge" / "00_paper.ipynb").read_text()
    spec, full = SynthSpec(1, "next3d-random", size=512), {"parameters": 172_815_807, "native_size": 512}
    assert throughput.speed_name(spec, full, 1) in ledger and "generator next3d, 512 px" not in ledger
    for profile in ("gpu", "paper"):
        values = profile_values("synthforge-benchmark", profile)
        assert (values["generator"], values["size"], values["workers"]) == ("next3d-random", 512, 1)
    assert profile_values("synthforge-data", "paper")["generator"] == "next3d-official"
