"My3DGen's stages on other generators than the shipped one, and on photos of one's own."

import json
import shutil
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from facelab.data.semantic import Z_NAMES
from facelab.data.views import PIVOT, orbit_view
from facelab.lab.errors import InputError
from facelab.lab.paths import bases_dir
from facelab.lab.record import Record
from facelab.lab.run import Job, Outcome, save_results
from facelab.my3dgen import ablate, explore, reconstruct
from facelab.my3dgen.applications import yaw_cams
from facelab.my3dgen.directions import code_score, train_direction
from facelab.my3dgen.eg3d_base import open_eg3d
from facelab.my3dgen.explore import base_readings
from facelab.my3dgen.marked import MarkedPerson, album, own_view, take
from facelab.my3dgen.people import kept_out, own_people
from facelab.my3dgen.personalize import PersonalPrior
from facelab.nets.eg3d import EG3DConfig, Generator
from facelab.nets.eg3d_convert import save_eg3d
from facelab.nets.stylegan2 import StyleGAN2Config
from facelab.nets.superres import SuperresConfig
from facelab.nets.texture_planes import MeshViews, texture_views
from facelab.nets.volume import VolumeConfig

pytestmark = pytest.mark.skipif(not (bases_dir() / "identity" / "model.safetensors").is_file(), reason="no bases/identity/model.safetensors: dvc pull bases/identity/model.safetensors.dvc")

# as an official one: noise of 512 numbers, a camera in the mapping, rays a quarter of the picture's side
LIKE_OFFICIAL = EG3DConfig(
    StyleGAN2Config(z_dim=512, w_dim=16, c_dim=25, lr_mul=1.0, size=16, out_channels=12, channels=(8, 8, 8)), VolumeConfig(6, 6),
    SuperresConfig(8, 16, (8, 8), (True, True), clamp=None), neural_size=16, hidden=8, orbit=(0.0, 0.0, 0.0),
)  # fmt: skip
VALUES = dict(
    seed=0, threads=1, workers=1, photo_folder="", people_seed=3, people=1, photos=2, tests=1, recipe="mini", rank=1, anchor_steps=2, steps=2, full_rate=0.001, pti_steps=2,
    counts="1, 9", ranks="1", styles=40, samples=3, walk=3, strength=1.5, beta=0.02, embedder="base", device="cpu", trained="",
)  # fmt: skip


@dataclass(frozen=True)
class HereJob(Job):
    "A job that leaves nothing outside its folder."

    folder: Path = Path()

    def place(self, name):
        place = self.folder / self.stage / name
        place.mkdir(parents=True, exist_ok=True)
        return place

    def scratch(self):
        return self.place("scratch")

    def checkpoint(self):
        return self.place("checkpoint")


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    torch.manual_seed(0)
    net = Generator(LIKE_OFFICIAL).eval().requires_grad_(False)
    return save_eg3d(tmp_path_factory.mktemp("official"), LIKE_OFFICIAL, net.state_dict())


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    "A folder in EG3D's layout, of five photos."
    folder = tmp_path_factory.mktemp("own") / "me"
    folder.mkdir()
    photos, _ = album(MarkedPerson(5, 1), 5, 64, config=LIKE_OFFICIAL)
    for name, image in zip("abcde", photos.images):
        Image.fromarray(((image.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()).save(folder / f"{name}.png")
    (folder / "dataset.json").write_text(json.dumps({"labels": [[f"{name}.png", cam.tolist()] for name, cam in zip("abcde", photos.cams)] + [["f.png", photos.cams[0].tolist()]]}))
    return folder


def job(stage, folder, **more):
    return HereJob(stage, "smoke", VALUES | more, folder)


def by(rows, **said):
    return [row for row in rows if all(getattr(row, name) == value for name, value in said.items())]


def test_drawn_people_before_another_generator(tmp_path, official):
    done = reconstruct.run(job("reconstruct", tmp_path, generator=str(official)))
    assert by(done.rows, method="My3DGen", metric="depth error", data="30 degrees")[0].n == 2 and not done.not_run
    prior = tmp_path / "reconstruct" / "checkpoint"
    more = explore.run(job("explore", tmp_path, generator=str(official), trained=str(prior)))
    for data in ("samples", "between two anchors", "held-out, 30 degrees"):
        assert by(more.rows, metric="identity cosine", data=data), data
    assert set(more.not_run) == {"edit age"} and set(more.figures) == {"fig_samples", "fig_walks", "fig_edits", "fig_inversion"}, "landmarks show no age"
    assert {row.data for row in by(more.rows, method="My3DGen", metric="attribute change")} == {"edit smile", "edit jaw_open"} and "bases/landmarks" in more.inputs
    assert set(more.films) == {"film_views", "film_walk", "film_edit_smile"}
    again = explore.run(job("explore", tmp_path, generator=str(official), trained=str(prior)))
    for name, film in more.films.items():
        with Image.open(BytesIO(film)) as seen:
            assert seen.format == "GIF" and seen.n_frames > 8 and len(film) < 300_000 and film == again.films[name], name


def test_a_film_is_as_large_as_its_size_allows():
    noise = torch.rand(6, 2, 3, 200, 200, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sizes = []
    for most in (10**9, 180_000, 10):
        with Image.open(BytesIO(explore.small_film(noise, most=most))) as seen:
            sizes.append(seen.size)
    assert sizes == [(258, 128), (194, 96), (98, 48)]
    with Image.open(BytesIO(explore.small_film(noise[..., :64, :64]))) as seen:
        assert seen.size == (258, 128), "small pictures are enlarged, by whole pixels"


def test_films_lie_beside_the_figures(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").touch()
    monkeypatch.setenv("FACELAB_ROOT", str(tmp_path))
    film = explore.small_film(torch.linspace(-1, 1, 5)[:, None, None, None, None].expand(5, 1, 3, 16, 16))
    save_results(Record("toy-film", "toy", "smoke", "smoke", 0, {}, []), Outcome([], films={"film_walk": film}), tmp_path / "out", {})
    with Image.open(tmp_path / "out" / "film_walk.gif") as seen:
        assert seen.n_frames == 5 and seen.size == (128, 128)


@pytest.mark.skipif(not all((bases_dir() / name / "model.safetensors").is_file() for name in ("eg3d", "landmarks")), reason="no bases eg3d and landmarks")
def test_directions_from_landmarks_are_those_of_the_noise():
    "On the shipped base both are known: what its noise says, and what the detector sees."
    base = open_eg3d()
    readings, directions, _ = explore.landmark_edits(base, 160, 80, 0)
    z, images = explore.front_pictures(base, 80, 5)
    for reading, direction in zip(readings, directions):
        column = Z_NAMES.index(direction.name)
        known = train_direction(base, direction.name, code_score(column), count=600)
        assert float(direction.normal @ known.normal) > 0.2, direction.name
        assert float(torch.corrcoef(torch.stack([reading.of(images), z[:, column]]))[0, 1]) > 0.35, reading.name


def test_own_photos_in_the_stages(tmp_path, official, own):
    said = {"generator": str(official), "photo_folder": str(own), "photos": 9}
    done = reconstruct.run(job("reconstruct", tmp_path, **said))
    rows = by(done.rows, method="My3DGen")
    assert by(rows, metric="PSNR", data="0 degrees")[0].n == 1 and not by(rows, metric="PSNR", data="30 degrees") and not by(rows, metric="depth error")
    assert by(rows, metric="identity cosine", data="30 degrees")[0].n == 2 and by(rows, metric="PSNR", data="training photos")[0].n == 4
    assert any("depth" in name for name in done.not_run) and any("1 of 6 items skipped" in note for note in done.notes) and str(own) in done.inputs
    prior = tmp_path / "reconstruct" / "checkpoint"
    more = explore.run(job("explore", tmp_path, trained=str(prior), **said))
    assert by(more.rows, metric="identity cosine", data="held-out, 30 degrees") and not by(more.rows, metric="PSNR", data="held-out, 30 degrees")
    with pytest.raises(InputError, match="other photos"):
        explore.run(job("explore", tmp_path, trained=str(prior), **{**said, "tests": 2}))
    last = ablate.run(job("ablate", tmp_path, **said))
    assert by(last.rows, method="My3DGen, 1 photos", metric="identity cosine")[0].n == 2 and {"My3DGen, 9 photos", "My3DGen, 50 photos"} == set(last.not_run)
    assert "One person" in last.notes[-1]
    gain, mine, plain = (by(last.rows, method=method, metric=metric)[0].value for method, metric in (("My3DGen, 1 photos against pretrained", "identity cosine, difference"), ("My3DGen, 1 photos", "identity cosine"), ("pretrained", "identity cosine")))
    assert abs(gain - (mine - plain)) < 1e-6
    assert by(last.rows, method="pretrained", metric="PSNR")[0].data == "held-out, its own side"


class Killed(Exception):
    pass


def test_a_killed_person_goes_on_where_it_was(tmp_path, monkeypatch, official):
    "Killed in full fine-tuning, at the second pivotal tuning, before the measures, and when done: what was finished is not done again, and the numbers are those of a run that was not killed."
    values, draw, pivotal, calls = {"generator": str(official), "tests": 2}, Generator.synthesis, reconstruct.pivotal, [0]

    def never(*args, **how):
        raise Killed

    def second(*args, label, **how):
        return never() if "PTI 2" in label else pivotal(*args, label=label, **how)

    def counted(self, *args, **how):
        calls[0] += torch.is_grad_enabled()
        return draw(self, *args, **how)

    monkeypatch.setattr(Generator, "synthesis", counted)
    alone = reconstruct.one_person(job("alone", tmp_path, **values), 0)
    steps, calls[0] = calls[0], 0
    here = job("killed", tmp_path, **values)
    for name, by in (("tune_whole", never), ("pivotal", second), ("view_scores", never)):
        with monkeypatch.context() as patched:
            patched.setattr(reconstruct, name, by)
            with pytest.raises(Killed):
                reconstruct.one_person(here, 0)
        monkeypatch.setattr(PersonalPrior, "personalize", never)  # from the first kill on
    done = reconstruct.one_person(here, 0)
    assert calls[0] == steps, "a step was done twice"
    same = lambda one: (one.page == alone.page).all() and one._replace(page=None) == alone._replace(page=None)
    adapter = tmp_path / "killed" / "checkpoint" / "person_0" / "adapter_model.safetensors"
    assert same(done) and adapter.read_bytes() == (tmp_path / "alone" / "checkpoint" / "person_0" / "adapter_model.safetensors").read_bytes()
    assert not list((tmp_path / "killed" / "scratch").glob("person_0-*/work")), "the trainings of a person that is done"
    shutil.rmtree(tmp_path / "killed" / "checkpoint")  # as DVC does before it runs a stage again
    monkeypatch.setattr(reconstruct, "turned_by", never)
    assert same(reconstruct.one_person(here, 0)) and adapter.is_file() and calls[0] == steps
    with pytest.raises(Killed):
        reconstruct.one_person(job("killed", tmp_path, **values, people_seed=4), 0)


def test_folders_of_photos(tmp_path, own):
    assert own_people(own) == [own] and own_people(own.parent) == [own]
    with pytest.raises(InputError):
        own_people(tmp_path)
    for count, tests in ((50, 4), (7, 3), (2, 1)):
        learn, out = kept_out(count, tests)
        assert len(out) == tests and sorted([*learn, *out]) == list(range(count))
    for count, tests in ((3, 3), (0, 1), (4, 0)):
        with pytest.raises(InputError):
            kept_out(count, tests)


def test_a_generator_that_is_told_a_camera(official):
    net = Generator(LIKE_OFFICIAL).eval().requires_grad_(False)
    assert train_direction(net, "any", code_score(3), count=16).normal.shape == (16,)
    assert [reading.name for reading in base_readings(net, 16, 0)] == ["smile", "jaw_open", "age"]


def test_cameras_of_a_generator():
    front = yaw_cams(LIKE_OFFICIAL, [0.0])[0].view(-1)
    assert torch.allclose(front[[3, 7, 11]], torch.tensor([0.0, 0.0, 2.7]), atol=1e-5), "the eye is 2.7 from the origin, and looks at the pivot"
    turned = yaw_cams(LIKE_OFFICIAL, [0.5])[0]
    eye, ahead = turned[[3, 7, 11]], turned[[2, 6, 10]]
    assert torch.isclose(eye.norm(), torch.tensor(2.7), atol=1e-5) and torch.allclose(torch.linalg.cross(ahead, torch.tensor([0.0, 0.0, 0.2]) - eye), torch.zeros(3), atol=1e-5)
    shipped = replace(LIKE_OFFICIAL, orbit=None, pivot=PIVOT)
    assert np.array_equal(own_view(shipped, 0.3, 0.1, 0.05).pack(), orbit_view(0.3, 0.1, 0.05).pack())
    seen = take(MarkedPerson(3, 1), 0, [own_view(LIKE_OFFICIAL, yaw) for yaw in (0.0, 0.5)], 64, 16)
    assert seen.depth.shape == (2, 1, 16, 16) and torch.allclose(seen.cams[1], turned, atol=1e-4)
    assert (seen.landmarks[0].mean(0) - 32).abs().max() < 10, "the head is in the middle"
    assert "orbit" not in shipped.to_dict() and EG3DConfig.from_dict(json.loads(json.dumps(LIKE_OFFICIAL.to_dict()))) == LIKE_OFFICIAL


def test_views_of_a_mesh_follow_the_texture_to_its_device():
    views = MeshViews(torch.zeros(1, 4, 8, 8, 2), torch.ones(1, 4, 8, 8, dtype=torch.bool), torch.zeros(1, 12, 2))
    assert texture_views(torch.empty(1, 3, 16, 16, device="meta"), views).device.type == "meta"
