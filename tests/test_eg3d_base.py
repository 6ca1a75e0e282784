"""The shipped EG3D, meshes of its heads, and cameras of own photos: what a notebook does not show."""

import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy.ndimage import gaussian_filter

from facelab.data.face_crop import FaceBox
from facelab.data.find_faces import FoundFace
from facelab.data.scene import make_view
from facelab.data.w300 import write_pts
from facelab.lab.base import make_base
from facelab.lab.errors import AssetError, InputError, ShapeError
from facelab.lab.files import read_yaml
from facelab.lab.paths import bases_dir, root
from facelab.lab.profile import profile_values
from facelab.my3dgen import eg3d_base
from facelab.my3dgen.base_quality import as_images, face_share, held_out_heads, points_of, turned_views, world_scene
from facelab.my3dgen.distillation import FACE128_EG3D, draw_from
from facelab.my3dgen.eg3d_base import open_eg3d
from facelab.my3dgen.head_mesh import orbit_labels, save_head, turntable, write_video
from facelab.my3dgen.marked import MarkedPerson, album
from facelab.my3dgen.own_photos import face_points, fit_pose, own_photo, own_photos
from facelab.my3dgen.personalize import strange_names
from facelab.my3dgen.portraits import Portraits, check_label
from facelab.data.views import PIVOT, Actor, label_of, orbit_view, shoot
from facelab.nets.view_losses import picture_psnr
from facelab.nets.volume import camera_rays


@pytest.fixture(scope="module")
def base():
    if not (bases_dir() / "eg3d" / "model.safetensors").is_file():
        pytest.skip("no bases/eg3d/model.safetensors: dvc pull bases/eg3d/model.safetensors.dvc")
    torch.set_num_threads(1)
    return open_eg3d()


@pytest.fixture(scope="module")
def actor():
    return Actor(world_scene(62, 3, 0))


GPU_RECIPE = root() / "bases" / "eg3d-128" / "gpu.yaml"


def test_a_base_of_128_pixels_is_made_and_found_by_its_name(tmp_path, monkeypatch):
    "The recipe for a GPU, walked with two heads; what judges a base takes minutes at this size, and is not asked."
    folder, recipe = tmp_path / "bases" / "eg3d-128", read_yaml(GPU_RECIPE)
    folder.mkdir(parents=True)
    (tmp_path / "settings.ini").touch()
    small = recipe | {"threads": 1, "heads": 2, "views": 2, "val_heads": 1, "lesson_heads": 20, "lesson_steps": 2, "steps": 2, "batch": 2}
    (folder / "gpu.yaml").write_text(yaml.safe_dump(small))
    monkeypatch.setenv("FACELAB_ROOT", str(tmp_path))
    monkeypatch.setenv("FACELAB_BASES", "1")
    for name, found in (("view_rows", []), ("inversion_rows", ([], None)), ("frechet_rows", []), ("trained_embedder", None)):
        monkeypatch.setattr(eg3d_base, name, lambda *args, found=found, **how: found)
    with pytest.raises(InputError, match="make bases BASE=eg3d-128"):
        open_eg3d("eg3d-128")
    make_base("eg3d-128", "gpu")
    net = open_eg3d("eg3d-128")
    assert net.config == FACE128_EG3D and (net.config.size, net.config.neural_size) == (128, 64)
    assert list(eg3d_base.generator_inputs("eg3d-128")) == ["bases/eg3d-128"] and torch.isfinite(net.render(*(part(torch.zeros(1, net.num_ws, 128)) for part in (net.planes, lambda ws: ws)), torch.from_numpy(label_of(orbit_view()))[None]).image).all()


def test_profiles_for_a_gpu_name_a_base_that_has_a_recipe():
    recipe = read_yaml(GPU_RECIPE)
    assert recipe["run"] == "facelab.my3dgen.eg3d_base:make" and recipe["pixels"] >= 128 and set(recipe) == set(read_yaml(GPU_RECIPE.parent.parent / "eg3d" / "mini.yaml"))
    for stage in ("reconstruct", "explore", "ablate", "serving"):
        assert profile_values(f"my3dgen-{stage}", "gpu")["generator"] == GPU_RECIPE.parent.name


def test_new_heads_are_drawn_from_all_sides(base):
    shots = held_out_heads(977, 4, turned_views((0, 30, -30)))
    psnr = picture_psnr(draw_from(base, torch.from_numpy(shots.z), torch.from_numpy(shots.cams)), as_images(shots.images), face_share(shots.labels19))
    assert psnr.mean() > 22 and psnr.min() > 17


def test_depth_of_the_generator_is_that_of_the_simulator(base):
    shots = held_out_heads(977, 4, turned_views((0, 30)))
    with torch.no_grad():
        depth = torch.cat([base.synthesis(base.mapping(torch.from_numpy(shots.z[k : k + 1])), torch.from_numpy(shots.cams[2 * k : 2 * k + 2])).depth[:, 0] for k in range(4)]).numpy()
    solid = (shots.alpha > 250) & (shots.depth > 0)
    assert np.abs(depth - shots.depth.astype(np.float32))[solid].mean() < 0.03  # units: 11 mm


def test_a_head_becomes_a_mesh_and_a_video(base, tmp_path):
    ws = base.mapping(torch.randn(1, 64, generator=torch.Generator().manual_seed(0)))
    mesh = save_head(tmp_path / "head.glb", base, ws, 48)
    video = turntable(tmp_path / "head.gif", base, ws, 4, with_depth=True)
    assert mesh.stat().st_size > 10_000 and video.read_bytes()[:6] == b"GIF89a"
    with pytest.raises(InputError):
        turntable(tmp_path / "head.avi", base, ws, 2)
    assert not (tmp_path / "head.avi").exists()


def test_cameras_of_the_two_makers_agree():
    ours = torch.from_numpy(np.stack([label_of(orbit_view(y, p)) for y, p in ((0.0, 0.0), (0.4, 0.1), (-0.7, -0.2))]))

    class Config:
        pivot, radius, orbit = PIVOT, 2.7, None

    theirs = orbit_labels(Config, [0.0, 0.4, -0.7], [0.0, 0.1, -0.2])
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_simulator_depth_and_label_give_the_same_points_from_two_sides(actor):
    shot = shoot(actor, [orbit_view(0.0), orbit_view(0.3)], 64)
    origins, directions = camera_rays(torch.from_numpy(shot["cams"]), 32)
    depth = torch.from_numpy(shot["depth"].astype(np.float32)).flatten(1)
    one, two = ((origins[k] + directions[k] * depth[k][:, None])[depth[k] > 0] for k in (0, 1))
    near = torch.cdist(one, two).min(1).values
    assert near.median() < 0.015  # units: 5 mm; a pixel is 9 mm apart at 32 rays


@pytest.mark.parametrize("part", ["rotation", "mirror", "intrinsics", "nan", "short", "away", "columns", "opengl", "far"])
def test_bad_labels_are_refused(part):
    label = label_of(orbit_view(0.3))
    if part == "rotation":
        label[:3] *= 1.05
    elif part == "mirror":
        label[[1, 5, 9]] *= -1
    elif part == "intrinsics":
        label[16:] *= 64
    elif part == "nan":
        label[3] = np.nan
    elif part == "short":
        label = label[:16]
    elif part == "columns":
        label[:16] = label[:16].reshape(4, 4).T.ravel()
    elif part == "opengl":
        label[[1, 5, 9, 2, 6, 10]] *= -1
    elif part == "far":
        label[[3, 7, 11]] *= 10
    else:
        label[[3, 7, 11]] *= -1
    with pytest.raises(ShapeError):
        check_label(label)
    photo, good = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8), label_of(orbit_view(0.3))
    some = Portraits.of([photo, photo], [label, good], 64)
    assert some.names == ("photo 1",) and len(some.skipped) == 1
    if part in ("opengl", "far", "away"):  # a camera all the same, of something else
        assert len(Portraits.of([photo, photo], [label, good], 64, head=False)) == 2


def test_a_generator_refuses_what_is_no_rotation(base):
    ws = base.mapping(torch.zeros(1, 64))
    for at, factor in ((0, 3.0), (slice(0, 16, 4), -1.0), (5, 0.0)):
        label = torch.from_numpy(label_of(orbit_view(0.3)))[None]
        label[0, at] *= factor
        with pytest.raises(ShapeError, match="rotation"):
            base.synthesis(ws, label)
    for at, focal in ((16, 0.0), (20, -4.2647)):
        label = torch.from_numpy(label_of(orbit_view(0.3)))[None]
        label[0, at] = focal
        with pytest.raises(ShapeError, match="focal length"):
            base.synthesis(ws, label)
    for rays in (0, -1):
        with pytest.raises(ShapeError, match="rays a side"):
            base.synthesis(ws, torch.from_numpy(label_of(orbit_view(0.3)))[None], rays)


@pytest.mark.parametrize("yaw", [-0.7, 0.0, 0.7])
def test_poses_come_back_at_any_size_and_lean(actor, yaw):
    for roll, size in ((0.0, 64), (1.2, 400), (3.0, 200)):
        view = orbit_view(yaw, 0.1, roll)
        found = fit_pose(points_of(actor, view, size))
        cos = (np.trace(found.rotation @ view.rotation.T) - 1) / 2
        assert np.degrees(np.arccos(np.clip(cos, -1, 1))) < 8, (roll, size)


def test_the_crop_does_not_depend_on_where_the_face_is(actor):
    near, far = orbit_view(0.2), make_view(0.2, 0.0, 0.0, 2 * 1000.0, 2 * 234.48, (0.0, 60.0, 35.0))
    one, two = (own_photo(shoot(actor, [view], 256)["images"][0], 96, points=points_of(actor, view, 256)) for view in (near, far))
    assert np.abs(one.landmarks_2d - two.landmarks_2d).max() < 6 and np.abs(one.label - two.label).max() < 0.25


def test_a_face_from_the_very_front_has_a_pose():
    label = torch.tensor([1.0, 0, 0, 0, 0, -1, 0, 0, 0, 0, -1, 2.7, 0, 0, 0, 1, 4.2647, 0, 0.5, 0, 4.2647, 0.5, 0, 0, 1])
    points = face_points(label[None], 512)[0].double().numpy()
    points[:, 0] -= 256
    points[48:60, 0] -= points[48:60, 0].mean() - points[36:48, 0].mean()
    for lean in (0.0, 1e-17, 1e-13, 1e-10, 1e-3):
        leans = points.copy()
        leans[48:60, 0] += lean * (points[48:60, 1].mean() - points[36:48, 1].mean())
        assert fit_pose(leans).error < 2


def drawn_photos(number, count):
    photos, points = album(MarkedPerson(4, number), count, 128)
    return [((image.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy() for image in photos.images], list(points.numpy())


@pytest.mark.parametrize("number", range(6))
def test_a_blurred_face_is_refused_whoever_it_is(number):
    photos, points = album(MarkedPerson(7, 2 * number + 1), 2, 256)
    for image, at in zip(photos.images, points.numpy()):
        photo = ((image.permute(1, 2, 0) + 1) * 127.5).round().numpy()
        for deviation in (0, 1, 2, 6, 8, 12, 20, 40):  # pixels of 256
            blurred = gaussian_filter(photo, (deviation, deviation, 0)).round().astype(np.uint8)
            if deviation <= 2:
                assert own_photo(blurred, 64, points=at).sharpness > 7
            else:
                with pytest.raises(InputError, match="blurred"):
                    own_photo(blurred, 64, points=at)
    small = np.asarray(Image.fromarray(photo.astype(np.uint8)).resize((64, 64), Image.BOX))
    assert own_photo(small, 64, points=at / 4).sharpness > 7, "few pixels are no blur"


def test_points_that_are_not_finite_leave_one_photo_out():
    (mine, other), (at, there) = drawn_photos(1, 2)
    for bad in (np.full((68, 2), np.nan), np.full((68, 2), np.inf), np.where(np.arange(136).reshape(68, 2) == 5, np.nan, there), np.zeros((0, 2)), np.zeros(3)):
        with pytest.raises(InputError, match="68 finite points"):
            fit_pose(bad)
        seen = iter([FoundFace(FaceBox(10.0, 10.0, 80.0, 80.0, 1.0), points, 1.0) for points in (at, bad)])
        kept, skipped = own_photos([mine, other], 64, finder=lambda photo, seen=seen: [next(seen)])
        assert len(kept) == len(skipped) == 1


@pytest.mark.skipif(not (bases_dir() / "identity" / "model.safetensors").is_file(), reason="no bases/identity/model.safetensors")
def test_somebody_else_is_found_without_being_asked(tmp_path):
    mine, at = drawn_photos(1, 6)
    other, there = drawn_photos(4, 1)
    paths = []
    for k, (image, points) in enumerate(zip([*mine, *other], [*at, *there])):
        paths.append(tmp_path / f"{k}.png")
        Image.fromarray(image).save(paths[-1])
        write_pts(paths[-1].with_suffix(".pts"), points)
    kept, skipped = own_photos(paths, 64)
    assert [one.name for one in kept] == [f"{k}.png" for k in range(6)] and "another person" in skipped.items[0][1]
    assert len(own_photos(paths, 64, embed=None)[0]) == 7
    album_ = Portraits.of([one.image for one in own_photos(paths, 64, embed=None)[0]], [one.label for one in own_photos(paths, 64, embed=None)[0]], 64, [path.name for path in paths])
    assert strange_names(album_) == ["6.png"] and strange_names(album_, None) == []


def test_nobody_who_finds_faces_is_no_fault_of_the_photos(monkeypatch, tmp_path):
    import facelab.my3dgen.own_photos as page

    def missing():
        raise InputError("model.safetensors", "no base 'landmarks'", "the shipped weights", "dvc pull")

    monkeypatch.setattr(page, "shipped_detector", missing)
    monkeypatch.setattr(page, "alignment_detector", lambda: None)
    (mine,), (at,) = drawn_photos(1, 1)
    with pytest.raises(AssetError, match=r"\.pts.*make bases BASE=landmarks.*face-alignment"):
        own_photos([mine, mine], 64)
    Image.fromarray(mine).save(tmp_path / "a.png")
    write_pts(tmp_path / "a.pts", at)
    assert len(own_photos([tmp_path / "a.png"], 64)[0]) == 1, "a .pts beside it needs nobody"

    class Marks:  # as face-alignment: it marks, and the cascade finds
        name, size, room = "marks", 64, 1.6

        def landmarks(self, images):
            return torch.from_numpy(at)[None] * images.shape[-1] / 128

    monkeypatch.setattr(page, "cascade_faces", lambda photo: [FaceBox(0.0, 0.0, 80.0, 80.0, 1.0)])
    faces = page.face_finder(Marks())(mine)
    assert len(faces) == 1 and faces[0].landmarks_2d.shape == (68, 2)


def test_a_video_for_other_programs(tmp_path, monkeypatch):
    frames = np.zeros((12, 33, 48, 3), np.uint8)
    frames[:, :, :, 1] = np.linspace(0, 250, 12, dtype=np.uint8)[:, None, None]
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "imageio_ffmpeg", None)  # as where it is not installed
        with pytest.raises(AssetError, match=r"facelab\[video\]"):
            write_video(tmp_path / "a.mp4", frames)
        assert not (tmp_path / "a.mp4").exists()
    program = pytest.importorskip("imageio_ffmpeg", reason="no imageio-ffmpeg: pip install 'facelab[video]'")
    try:
        program.get_ffmpeg_exe()
    except RuntimeError:
        with pytest.raises(AssetError, match="no ffmpeg"):
            write_video(tmp_path / "b.mp4", frames)
        pytest.skip("imageio-ffmpeg without a program")
    import imageio.v3 as iio

    seen = iio.imread(write_video(tmp_path / "b.mp4", frames, 12.0))
    assert (tmp_path / "b.mp4").read_bytes()[4:8] == b"ftyp" and seen.shape == (12, 32, 48, 3)
    assert np.abs(seen[..., 1].mean((1, 2)) - frames[..., 1].mean((1, 2))).max() < 12
