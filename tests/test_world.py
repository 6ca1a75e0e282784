"The embedded world: the same bytes for any number of workers and after a kill, truth that agrees with the geometry, labels that agree with the pixels, variety, speed."

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from facelab.data.attributes import ATTRIBUTES
from facelab.data.dress import dress, expression_code
from facelab.data.paint_frame import LABELS11, LABELS19, TO_LAPA
from facelab.data.paint_skin import LIPSTICK_FROM, skin_colours
from facelab.data.person import sample_person, skin_colour
from facelab.data.photo import make_canvas, photograph
from facelab.data.rig import load_rig
from facelab.data.scene import EXPRESSIONS, make_view, sample_photo
from facelab.data.truth import STACKED, read_parts, read_truth, write_truth
from facelab.data.world import generate, people_of, variety
from facelab.lab.errors import InputError

AT = {name: i for i, name in enumerate(ATTRIBUTES)}
QUIET = {"every": 1e9}
BARE = {"glasses": "", "sunglasses": False, "hat": "", "occluder": "", "earrings": -1, "necklace": -1, "blur": 0.0}


def equal(a, b) -> bool:
    return a.jpeg == b.jpeg and (a.caption, a.weak_caption) == (b.caption, b.weak_caption) and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in (*STACKED, "depth"))


@pytest.fixture(scope="module")
def crowd():
    "160 people, one photo each."
    items, failed = generate(160, 1, 64, seed=7, supersample=2, workers=2, **QUIET)
    assert len(items) == 160 and not failed
    return items


def test_one_worker_and_two_make_the_same_bytes():
    a, _ = generate([3, 11, 4], 2, 32, seed=9, workers=1, **QUIET)
    b, _ = generate([3, 11, 4], 2, 32, seed=9, workers=2, **QUIET)
    c, _ = generate([4, 3], 2, 32, seed=9, workers=1, **QUIET)  # another order, other people kept in memory
    assert [i.identity for i in a] == [3, 3, 11, 11, 4, 4] and len({i.jpeg for i in a}) == 6
    assert all(equal(x, y) for x, y in zip(a, b, strict=True)) and equal(a[0], c[2]) and equal(a[5], c[1])


def test_a_killed_run_goes_on_to_the_same_files(tmp_path):
    code = "import sys; from facelab.data.world import generate; generate(12, 2, 32, seed=3, out_dir=sys.argv[1], workers=2, supersample=2, every=1e9)"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    generate(12, 2, 32, seed=3, out_dir=whole, workers=1, supersample=2, **QUIET)
    child = subprocess.Popen([sys.executable, "-c", code, str(cut)], start_new_session=True, stderr=subprocess.DEVNULL)
    began = time.monotonic()
    while len(list(cut.glob("truth/*.npz"))) < 4 and child.poll() is None and time.monotonic() - began < 120:
        time.sleep(0.005)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    left = {p.name: p.stat().st_mtime_ns for p in cut.glob("truth/person_*.npz")}
    assert 4 <= len(left) < 12, "the kill came too late to test anything"
    generate(12, 2, 32, seed=3, out_dir=cut, workers=2, supersample=2, **QUIET)
    files = sorted(p.name for p in whole.glob("truth/*"))
    assert [p for p in sorted(p.name for p in cut.glob("truth/*")) if not p.startswith(".") and "tmp" not in p] == files and len(files) == 13
    assert all((whole / "truth" / n).read_bytes() == (cut / "truth" / n).read_bytes() for n in files)
    assert all((cut / "truth" / n).stat().st_mtime_ns == t for n, t in left.items())  # what was there was not made again
    assert [i.identity for i in read_parts(cut)] == [n for n in range(12) for _ in range(2)]


def test_a_folder_of_another_world_is_refused(tmp_path):
    generate(1, 1, 16, seed=3, out_dir=tmp_path, workers=1, supersample=1, **QUIET)
    for other in ({"seed": 4}, {"size": 24}, {"supersample": 2}, {"photos_each": 2}):
        asked = {"people": 1, "photos_each": 1, "size": 16, "seed": 3, "supersample": 1} | other
        with pytest.raises(InputError):
            generate(out_dir=tmp_path, workers=1, **asked, **QUIET)


def test_wrong_questions_are_input_errors():
    scene = sample_photo(sample_person(1, 1), 0)
    for size, supersample in ((8, 1), (4096, 1), (64, 0), (64, 9)):
        with pytest.raises(InputError):
            photograph(scene, size, supersample)
    for people, photos in ((0, 1), ([], 1), ([1, 1], 1), (2, 0)):
        with pytest.raises(InputError):
            generate(people, photos, workers=1, **QUIET)
    with pytest.raises(InputError):
        sample_person(1, -1)
    with pytest.raises(InputError):
        people_of("dev", 3)


def test_a_person_that_fails_is_counted_and_the_rest_is_there():
    made, skipped = generate([5, -1, 6], 1, 16, seed=1, supersample=1, workers=2, **QUIET)
    assert [m.identity for m in made] == [5, 6] and len(skipped) == 1 and "person -1" in skipped.report(3)


def test_splits_share_nobody():
    sets = [set(people_of(split, 50)) for split in ("train", "val", "test")]
    assert all(len(s) == 50 for s in sets) and len(set.union(*sets)) == 150
    assert people_of("train", 20, 30) == people_of("train", 50)[30:]
    assert {sample_person(5, n).split for n in people_of("test", 6)} == {"test"}


@pytest.mark.parametrize("number", [2, 9, 21])
def test_landmarks_are_projected_vertices_and_depth_is_theirs(number):
    scene = replace(sample_photo(sample_person(1, number), 0, view=make_view(0.2, 0.05, 0.03)), **BARE)
    photo, rig = photograph(scene, 96, 3), load_rig()
    verts = (rig.mean.ravel() + photo.shape_code @ rig.shape_basis + photo.exp_code @ rig.exp_basis).reshape(-1, 3)
    points = verts[rig.landmarks].astype(float)
    assert np.abs(points - photo.landmarks).max() < 1e-3
    world, k = np.linalg.inv(photo.cam[:16].reshape(4, 4).astype(float)), photo.cam[16:].reshape(3, 3)
    seen = points @ world[:3, :3].T + world[:3, 3]
    pixels = (seen[:, :2] / seen[:, 2:] * k[[0, 1], [0, 1]] + k[:2, 2]) * 96
    assert np.abs(pixels - photo.landmarks_2d).max() < 0.01
    lib = photo.camera().project(torch.tensor(photo.landmarks)[None], 96)[0][0].numpy()
    assert np.abs(lib - photo.landmarks_2d).max() < 0.02
    col, row = np.floor(photo.landmarks_2d).astype(int).T
    off = photo.depth[row, col] - seen[:, 2]
    flat = photo.visible & (np.arange(68) >= 17) & (photo.depth[row, col] > 0)
    assert flat.sum() > 35 and np.median(np.abs(off[flat])) < 2.5 and (off[flat] > -9).all()
    assert photo.visible[[30, 33, 51, 57, 8]].all() or photo.visible[[30, 51]].all()


def test_a_face_from_the_side_hides_its_far_half():
    scene = replace(sample_photo(sample_person(1, 2), 0, "Neutral"), **BARE)
    right, left = (photograph(replace(scene, view=make_view(yaw)), 64, 2).visible for yaw in (1.0, -1.0))  # turned to the image right: its left half is seen
    near_left, near_right = np.r_[0:5, 36:40], np.r_[12:17, 42:46]
    assert right[near_left].all() and right[near_right].sum() < 5 and left[near_right].all() and left[near_left].sum() < 5
    covered = photograph(replace(scene, view=make_view(0.0), occluder="mask"), 64, 2).visible
    assert covered[48:68].sum() <= 4 and covered[[36, 39, 42, 45]].all()


def test_labels_are_where_the_regions_are(crowd):
    agree, wrong_side = [], 0
    for item in crowd:
        if not item.visible[27:].all():
            continue
        assert (item.depth[item.labels19 > 0] > 0).mean() > 0.97 and (item.depth >= 0).all() and item.depth.max() < 2000
        assert (TO_LAPA[item.labels19] == item.labels11).mean() > 0.9 and set(np.unique(item.labels11)) <= set(range(len(LABELS11)))
        xy = item.landmarks_2d
        at = {"l_eye": xy[36:42].mean(0), "r_eye": xy[42:48].mean(0), "nose": xy[28:31].mean(0), "l_brow": xy[19], "r_brow": xy[24], "u_lip": xy[[51, 62]].mean(0), "l_lip": xy[[57, 66]].mean(0)}
        scene = sample_photo(sample_person(7, item.identity), item.photo_id)
        thin = scene.person.brow_thickness < 0.9 or scene.person.hair.style in ("bangs", "fringe", "long", "wavy", "bob", "curly")  # less than half a pixel, or under hair
        for name, (x, y) in at.items():
            if scene.sunglasses and name.endswith("_eye") or thin and name.endswith("_brow"):
                continue
            part = item.labels11 if name in ("l_eye", "r_eye", "l_brow", "r_brow") and item.attributes[AT["Eyeglasses"]] > 0 else item.labels19
            reach = 2 if "brow" in name else 1
            near = part[max(int(y) - reach, 0) : int(y) + reach + 1, max(int(x) - reach, 0) : int(x) + reach + 1]
            number = TO_LAPA[LABELS19.index(name)] if part is item.labels11 else LABELS19.index(name)
            agree.append((name, (near == number).any()))
        for left, right in (("l_eye", "r_eye"), ("l_brow", "r_brow"), ("l_ear", "r_ear")):
            columns = [np.flatnonzero((item.labels19 == LABELS19.index(n)).any(0)) for n in (left, right)]
            wrong_side += bool(all(map(len, columns)) and columns[0].mean() > columns[1].mean())
    assert len(agree) > 300 and wrong_side == 0
    for name in ("l_eye", "r_eye", "nose", "l_brow", "r_brow", "u_lip", "l_lip"):
        assert np.mean([ok for n, ok in agree if n == name]) > {"brow": 0.85, "eye": 0.9}.get(name[2:], 0.95), name  # some eyes are nearly shut


def worn(scene, **bare):
    "The photo, the photo without a thing, and where they differ."
    sharp = replace(scene, noise=0.0, quality=95, blur=0.0, occluder="")
    with_it, without = photograph(sharp, 64, 2), photograph(replace(sharp, **bare), 64, 2)
    return with_it, without, np.abs(with_it.image.astype(int) - without.image).max(2) > 12


@pytest.mark.parametrize("thing, label, bare", [("Eyeglasses", "eye_g", {"glasses": "", "sunglasses": False}), ("Wearing_Hat", "hat", {"hat": ""})])
def test_what_is_worn_is_drawn_where_its_label_is(thing, label, bare):
    found, number = 0, LABELS19.index(label)
    for i in range(200):
        scene = sample_photo(sample_person(4, i), 0)
        if not (scene.hat if thing == "Wearing_Hat" else scene.sunglasses or scene.glasses in ("square", "aviator") and abs(scene.view.yaw) < 0.4):
            continue
        with_it, without, differ = worn(scene, **bare)
        assert with_it.attributes[AT[thing]] == 1 and without.attributes[AT[thing]] == -1 and not (without.labels19 == number).any()
        area = with_it.labels19 == number
        assert area.sum() > 20 and differ[area].mean() > (0.75 if thing == "Wearing_Hat" or scene.sunglasses else 0.08)
        assert differ[~area].mean() < 0.2
        found += 1
        if found == 4:
            break
    assert found == 4


def test_hair_colour_labels_agree_with_the_pixels(crowd):
    tones = {name: [] for name in ("Black_Hair", "Brown_Hair", "Blond_Hair", "Gray_Hair")}
    for item in crowd:
        hair = item.labels19 == LABELS19.index("hair")
        named = [n for n in tones if item.attributes[AT[n]] > 0]
        assert len(named) <= 1 and (hair.sum() > 40 or not named)
        if hair.sum() > 80 and named:
            colour = item.image[hair].astype(float).mean(0)
            tones[named[0]].append((colour @ (0.2126, 0.7152, 0.0722), (colour[0] - colour[2]) / colour.mean()))
    light, warm = ({n: np.array([v[k] for v in values]) for n, values in tones.items()} for k in (0, 1))
    assert all(len(v) > 4 for v in light.values())
    dark = np.concatenate([light["Black_Hair"], light["Brown_Hair"]])
    assert (light["Blond_Hair"][:, None] > dark).mean() > 0.95 and (light["Gray_Hair"][:, None] > light["Black_Hair"]).mean() > 0.95
    assert (warm["Brown_Hair"][:, None] > warm["Black_Hair"]).mean() > 0.75 and (warm["Blond_Hair"][:, None] > warm["Gray_Hair"]).mean() > 0.95


def test_a_smile_lifts_and_widens_the_mouth_and_an_open_mouth_is_open(crowd):
    rig, score, smiles, gap, opened, inside = load_rig(), [], [], [], [], []
    for item in crowd:
        rest, now = (rig.mean.ravel() + item.shape_code @ rig.shape_basis).reshape(-1, 3)[rig.landmarks], item.landmarks
        wider = np.linalg.norm(now[54] - now[48]) - np.linalg.norm(rest[54] - rest[48])
        score.append(wider + 2 * (now[[48, 54], 1] - rest[[48, 54], 1]).mean())
        smiles.append(item.attributes[AT["Smiling"]] > 0)
        gap.append(np.linalg.norm(now[62] - now[66]))
        opened.append(item.attributes[AT["Mouth_Slightly_Open"]] > 0)
        inside.append((item.labels19 == LABELS19.index("mouth")).sum())
    score, smiles, gap, opened, inside = map(np.array, (score, smiles, gap, opened, inside))
    free = smiles | np.array([i.expression != "Happiness" for i in crowd])  # a covered smile is no label
    assert smiles.sum() > 25 and (score[smiles][:, None] > score[free & ~smiles]).mean() > 0.97
    assert gap[opened].min() > 2.2 and (inside[opened] > 0).mean() > 0.7 > 0.3 > (inside[~opened] > 0).mean()


def test_attributes_that_exclude_each_other(crowd):
    for item in crowd:
        has = {n for n, v in zip(ATTRIBUTES, item.attributes, strict=True) if v > 0}
        assert not {"Mustache", "No_Beard"} <= has and not {"Bald", "Wearing_Hat"} <= has and ("Male" in has or not has & {"Mustache", "Goatee", "Sideburns", "5_o_Clock_Shadow"})
        assert ("glasses" in item.caption) == ("Eyeglasses" in has) and set(np.unique(item.attributes)) <= {-1, 1}


def test_the_world_is_varied_and_nothing_is_a_near_copy(crowd):
    numbers = variety(crowd)
    assert 10 < numbers["skin_lightness_sd"] < 20 and numbers["skin_lightness_range"][0] < 32 and numbers["skin_lightness_range"][1] > 72
    assert 14 < numbers["yaw_sd"] < 24 and 3.5 < numbers["pitch_sd"] < 8 and 1.8 < numbers["roll_sd"] < 4.5
    assert numbers["nearest_min"] > 10 and numbers["nearest_median"] > 24  # of 255, at 16 x 16
    assert all(numbers["expressions"][e] > 0.015 for e in EXPRESSIONS) and numbers["expressions"]["Happiness"] > 0.2
    shares = numbers["attributes"]
    assert sum(0.02 < v < 0.98 for v in shares.values()) >= 36 and 0.35 < shares["Male"] < 0.62
    assert 0.15 < shares["Eyeglasses"] < 0.38 and 0.04 < shares["Wearing_Hat"] < 0.2 and shares["Blurry"] < 0.12
    dyed = np.mean([sample_person(7, i).hair.colour in ("purple", "blue", "pink", "green") for i in range(1500)])
    assert 0.003 < dyed < 0.03


def test_photos_of_one_person_share_the_person_and_nothing_else():
    items, _ = generate([4], 4, 64, seed=2, workers=1, supersample=2, **QUIET)
    assert all(np.array_equal(items[0].shape_code, i.shape_code) and np.array_equal(items[0].tex_code, i.tex_code) for i in items)
    assert len({i.exp_code.tobytes() for i in items}) == len({i.cam.tobytes() for i in items}) == len({i.light.tobytes() for i in items}) == 4


def test_truth_comes_back_whole_and_damage_is_told(tmp_path):
    items, _ = generate([8], 3, 48, seed=6, workers=1, supersample=1, **QUIET)
    path = tmp_path / "a.npz"
    write_truth(path, items)
    first = path.read_bytes()
    write_truth(path, items)
    back = read_truth(path)
    assert path.read_bytes() == first and len(back) == 3
    for a, b in zip(items, back, strict=True):
        assert a.jpeg == b.jpeg and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in STACKED) and np.abs(a.depth - b.depth).max() <= 0.0251
        assert (a.identity, a.split, a.expression, a.tone, a.age, a.caption) == (b.identity, b.split, b.expression, b.tone, b.age, b.caption)
    held = dict(np.load(path))
    wrong = {
        "empty": lambda: path.write_bytes(b""),
        "cut": lambda: path.write_bytes(first[: len(first) // 2]),
        "no depth": lambda: np.savez(path, **{k: v for k, v in held.items() if k != "depth20"}),
        "NaN": lambda: np.savez(path, **(held | {"landmarks": np.full_like(held["landmarks"], np.nan)})),
        "fewer codes": lambda: np.savez(path, **(held | {"shape_code": held["shape_code"][:2]})),
        "text": lambda: np.savez(path, **(held | {"words": np.frombuffer(b"[1, 2, 3]", np.uint8)})),
        "JPEGs that overlap": lambda: np.savez(path, **(held | {"jpeg_end": held["jpeg_end"][::-1]})),
    }
    for what, spoil in wrong.items():
        spoil()
        with pytest.raises(InputError):
            read_truth(path)
            pytest.fail(what)
    with pytest.raises(InputError):
        list(read_parts(tmp_path / "nothing"))
    with pytest.raises(InputError):
        write_truth(path, [])


def test_compiled_paint_is_tied_to_all_its_sources(tmp_path):
    from facelab.data.paint_frame import paint_samples
    from facelab.data.paint_kernel import SOURCES
    from facelab.face.raster_kernels import hard_rows, source_stamp

    paint, raster = source_stamp(*SOURCES), source_stamp("face/raster*.py", "face/surface_kernels.py")
    assert {"paint_kernel.py", "paint_skin.py", "hair_kernel.py", "head_base.py", "head_mean.py"} <= {name for name, _ in paint}
    assert {"raster_kernels.py", "raster_soft.py", "surface_kernels.py"} <= {name for name, _ in raster}
    for kernel, stamp in ((paint_samples, paint), (hard_rows, raster)):
        store = getattr(kernel._cache, "_cache_file", None)
        assert store is None or stamp in store._source_stamp


def test_no_background_shows_in_the_corners_of_eyes():
    rig = load_rig()
    for number in (39, 45, 41):  # eyes wider than their balls
        scene = replace(sample_photo(sample_person(1, number), 1, view=make_view(0.0, frame=45.0, centre=(36.0, 34.0, 60.0))), **BARE)
        dressed = dress(scene.person)
        canvas, depth = make_canvas(scene, rig, dressed, dressed.express(rig, expression_code(scene, dressed.neutral)), 200, 1)
        assert (canvas.ids >= 0).all() and (depth > 0).all() and 0.1 < np.isin(canvas.kind[canvas.ids], (3, 4)).mean() < 0.5


def test_lipstick_is_told_from_lips_and_most_neutral_mouths_are_shut():
    places, red = np.array([[6.0, -30.0, 108.0], [8.0, -39.0, 108.0]]), {False: [], True: []}
    for number in range(40):
        who = sample_person(1, number)
        for makeup in (LIPSTICK_FROM, LIPSTICK_FROM + 0.05):
            colour = skin_colours(places, who, fine=False, makeup=makeup).mean(0)
            red[makeup > LIPSTICK_FROM].append(1 - colour[1:].mean() / colour[0] - (1 - skin_colour(who.tone)[1:].mean() / skin_colour(who.tone)[0]))
    own, painted = np.array(red[False]), np.array(red[True])
    assert (own > 0).all() and (painted > own + 0.05).mean() > 0.95
    jaw = [sample_photo(sample_person(1, i), 0, "Neutral").moves["jaw_open"] for i in range(100)]
    assert 0 < np.mean(jaw) < 0.03


def test_no_notebook_path_in_module_files():
    "Two notebooks of one number were confusing once."
    numbers = [p.name.split("_")[0] for p in sorted((Path(__file__).parent.parent / "nbs" / "data").glob("*.ipynb"))]
    assert len(numbers) == len(set(numbers))


def test_face_code_has_the_light_of_the_photo():
    import torch

    from facelab.data.person import sample_person
    from facelab.data.photo import photograph
    from facelab.data.scene import sample_photo

    photo = photograph(sample_photo(sample_person(5, 3), 0), 32, 1)
    assert torch.allclose(photo.face_code().sh_coeffs()[0], torch.as_tensor(photo.light), atol=1e-5)
