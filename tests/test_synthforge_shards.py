"Shards: the same bytes for any number of workers and ranks, killed at random and at every file operation, on a full disk, damaged; and what other layouts read back."

import errno
import io
import json
import multiprocessing
import os
import resource
import signal
import tarfile
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from facelab.data.celebamask_hq import read_celebamask_hq
from facelab.data.label_sets import label_set, remap_table
from facelab.data.w300 import read_w300
from facelab.face.align import FLIP68
from facelab.lab.errors import AssetError, InputError, Skipped
from facelab.lab.images import read_image
from facelab.synthforge.annotated import SYNTH20, AnnotatedFace
from facelab.synthforge.layouts import SetLayout, write_layout
from facelab.synthforge.shard_set import check_shards, read_shards
from facelab.synthforge.shards import PARTS, ShardPlan, encode_face, is_written, png_bytes, write_shards

CLASSES = ("skin", "hair", "nose", "background")
PLAN = ShardPlan(23, 4, CLASSES, 3, recipe={"seed": 11})


def face_of(number, size=24):
    rng = np.random.default_rng([11, number])
    normals = rng.standard_normal((size, size, 3))
    normals /= np.linalg.norm(normals, axis=2, keepdims=True)
    points = rng.uniform(1, size - 1, (68, 3)).astype(np.float32)
    depth = np.where(rng.random((size, size)) < 0.3, 0, rng.uniform(800, 1200, (size, size)))
    labels = rng.integers(0, 4, (size, size)).astype(np.uint8)
    return AnnotatedFace(f"face {number}", rng.integers(0, 255, (size, size, 3)).astype(np.uint8), labels, depth, normals, points[:, :2], points, rng.random(68) < 0.7, {"number": number, "code": [0.5, number / 7]})


def make(numbers):
    return [InputError(f"face {n}", "no face in the picture", "a face", "Draw again.") if n == 9 else face_of(n) for n in numbers]


def slow(numbers):
    time.sleep(0.02)
    return make(numbers)


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture
def tmp_path():
    "In memory where there is such a folder: hundreds of fsyncs on a busy disk take minutes, and a kill, unlike a power cut, loses nothing that was written."
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "whole"
    assert write_shards(folder, PLAN, make, workers=1, every=1e9)
    return folder


def in_child(target, *args):
    child = multiprocessing.get_context("fork").Process(target=target, args=args)
    child.start()
    return child


@pytest.mark.parametrize("workers, batch", [(4, 16), (2, 1), (3, 5)])
def test_workers_change_nothing(whole, tmp_path, workers, batch):
    assert write_shards(tmp_path / "other", PLAN, make, workers=workers, batch=batch, every=1e9)
    assert contents(tmp_path / "other") == contents(whole)


def test_ranks_share_the_work_and_change_nothing(whole, tmp_path):
    made = []
    for rank in (2, 0, 1):
        own = []
        finished = write_shards(tmp_path / "ranks", PLAN, lambda numbers, own=own: own.extend(numbers) or make(numbers), 1, rank, 3, every=1e9)
        assert finished == (rank == 1)
        made += own
    assert sorted(made) == list(range(23)) and contents(tmp_path / "ranks") == contents(whole)


def test_another_seed_is_other_bytes(whole, tmp_path):
    other = lambda numbers: [face_of(n + 100) for n in numbers]
    write_shards(tmp_path / "other", PLAN, other, every=1e9)
    assert contents(tmp_path / "other")["shard-000000.tar"] != contents(whole)["shard-000000.tar"]


def test_killed_at_random_and_resumed_nothing_is_lost_or_doubled(whole, tmp_path):
    "Eight kills, each a random number of faces and milliseconds after the start; then one run to the end."
    rng, folder, made = np.random.default_rng(0), tmp_path / "killed", multiprocessing.get_context("fork").Value("i", 0)

    def counting(numbers):
        time.sleep(0.01)
        made.value += len(numbers)
        return make(numbers)

    kept = []
    for _ in range(8):
        made.value = 0
        child = in_child(lambda: write_shards(folder, PLAN, counting, workers=2, batch=1, every=1e9))
        target, until = int(rng.integers(0, 8)), time.monotonic() + 60
        while made.value < target and child.is_alive() and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(0.02 * rng.random())
        if not child.is_alive():
            break
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kept.append(sum(is_written(folder, shard) for shard in range(PLAN.shards)))
    assert len(kept) >= 5 and kept == sorted(kept) and kept[-1] > 0, kept  # work is kept from kill to kill
    assert write_shards(folder, PLAN, make, every=1e9) and contents(folder) == contents(whole)
    assert [face.facts["number"] for face in read_shards(folder).items()] == [n for n in range(23) if n != 9]


def killed_at(folder, count):
    "In a child: die before the `count`-th of the file operations that make something visible or durable."
    calls = [0]

    def counted(real):
        def call(*args, **how):
            calls[0] += 1
            if calls[0] == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **how)

        return call

    for name in ("replace", "fsync", "open"):
        setattr(os, name, counted(getattr(os, name)))
    write_shards(folder, ShardPlan(5, 2, CLASSES, 3, recipe={"seed": 11}), make, workers=1, every=1e9)
    os._exit(0)


def test_killed_before_each_file_operation(tmp_path):
    plan = ShardPlan(5, 2, CLASSES, 3, recipe={"seed": 11})
    write_shards(tmp_path / "whole", plan, make, every=1e9)
    right, deaths = contents(tmp_path / "whole"), 0
    for count in range(1, 200):
        folder = tmp_path / f"at{count}"
        child = in_child(killed_at, folder, count)
        child.join()
        if child.exitcode == 0:
            break
        deaths += 1
        if folder.exists():
            visible = {name: data for name, data in contents(folder).items() if not name.startswith(".")}
            assert all(right[name] == data for name, data in visible.items()), count  # whole, or not there
        assert write_shards(folder, plan, make, every=1e9) and contents(folder) == right, count
    assert deaths >= 20


def limited(folder, limit, queue):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        write_shards(folder, PLAN, make, every=1e9)
    except InputError as error:
        queue.put(str(error))
    else:
        queue.put("nothing was wrong")


def test_a_disk_without_room_is_one_clear_error_and_nothing_half_written(whole, tmp_path):
    "A limit on the size of a file stands in for a full disk: the write itself fails, in the middle of the second shard."
    folder, queue = tmp_path / "full", multiprocessing.get_context("fork").SimpleQueue()
    assert write_shards(folder, ShardPlan(23, 4, CLASSES, 3, recipe={"seed": 11}), make, rank=1, world=6, every=1e9) is False
    child = in_child(limited, folder, is_size(folder) // 2, queue)
    said = queue.get()
    child.join()
    assert "1 of 6 shards" in said and "the same command goes on" in said and "MB more" in said
    assert sorted(contents(folder)) == ["plan.json", "shard-000001.json", "shard-000001.tar"]
    assert write_shards(folder, PLAN, make, every=1e9) and contents(folder) == contents(whole)


def is_size(folder):
    return (folder / "shard-000001.tar").stat().st_size


@pytest.mark.parametrize("when", [1, 5, 9])
def test_no_space_left_on_device(whole, tmp_path, monkeypatch, when):
    import facelab.lab.files as files

    calls, real = [0], os.fsync

    def full(handle):
        calls[0] += 1
        if calls[0] >= when:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        write_shards(tmp_path / "full", PLAN, make, every=1e9)
    monkeypatch.undo()
    assert not list((tmp_path / "full").glob(".*"))
    assert all(contents(whole)[name] == data for name, data in contents(tmp_path / "full").items())
    assert write_shards(tmp_path / "full", PLAN, make, every=1e9) and contents(tmp_path / "full") == contents(whole)


def test_another_error_of_the_disk_is_not_taken_for_a_full_one(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError) as caught:
        write_shards(tmp_path / "file" / "set", PLAN, make, every=1e9)
    assert not isinstance(caught.value, InputError)


def test_another_plan_is_refused(whole):
    for plan in (ShardPlan(24, 4, CLASSES, 3, recipe={"seed": 11}), ShardPlan(23, 4, CLASSES, 3, recipe={"seed": 12}), ShardPlan(23, 5, CLASSES, 3, recipe={"seed": 11})):
        before = contents(whole)
        with pytest.raises(InputError, match="another plan"):
            write_shards(whole, plan, make, every=1e9)
        assert contents(whole) == before


def test_progress_says_rate_and_time_left(tmp_path, capsys):
    write_shards(tmp_path / "set", PLAN, slow, every=0.0, label="toy faces")
    lines = capsys.readouterr().err.splitlines()
    assert any("toy faces 10/23" in line and "img/s" in line and "left" in line for line in lines) and "took" in lines[-1]


def test_faces_come_back(whole):
    faces = read_shards(whole)
    assert len(faces) == 22 and faces.classes == CLASSES and check_shards(whole) == 22
    for at, number in ((0, 0), (8, 8), (9, 10), (21, 22), (-1, 22)):
        face, true = faces[at], face_of(number)
        assert face.name == true.name and face.facts == true.facts and np.array_equal(face.image, true.image) and np.array_equal(face.labels, true.labels)
        assert np.abs(face.depth - true.depth).max() <= 0.0251 and np.array_equal(face.depth > 0, true.depth > 0)
        assert np.abs(face.landmarks_2d - true.landmarks_2d).max() < 1e-4 and np.array_equal(face.visible, true.visible)
        assert (face.normals * true.normals).sum(2).min() > np.cos(np.radians(1.0))
    with pytest.raises(IndexError):
        faces[22]
    index = json.loads((whole / "index.json").read_text())
    assert index["total"]["items"] == 22 and index["total"]["skipped"] == 1
    beside = json.loads((whole / "shard-000002.json").read_text())
    assert beside["skipped"][0][0] == 9 and "no face in the picture" in beside["skipped"][0][1] and beside["items"] == [8, 10, 11]


def test_a_plain_tar_reader_sees_webdataset_samples(whole):
    samples = defaultdict(set)
    with tarfile.open(whole / "shard-000000.tar") as tar:
        for member in tar:
            key, ending = member.name.split(".", 1)
            samples[key].add(ending)
            assert (member.mtime, member.uid, member.uname, member.mode) == (0, 0, "", 0o644)
    assert set(samples) == {f"{n:09d}" for n in range(4)} and all(endings == {"image.png", "labels.png", "depth.png", "normals.png", "json"} for endings in samples.values())


def test_parts_that_are_not_wanted_are_not_written(tmp_path):
    write_shards(tmp_path / "few", ShardPlan(3, 2, CLASSES, 3, parts=("labels",)), make, every=1e9)
    face = read_shards(tmp_path / "few")[1]
    assert face.labels is not None and face.depth is None and face.normals is None and face.landmarks_2d is None
    with pytest.raises(InputError, match="parts"):
        ShardPlan(3, 2, parts=("colour",))
    assert set(PARTS) == {"image", "labels", "depth", "normals", "landmarks"}


def test_png_against_pillow():
    from PIL import Image

    rng = np.random.default_rng(0)
    for shape, kind in (((33, 17, 3), np.uint8), ((1, 1), np.uint8), ((64, 64), np.uint16), ((7, 300), np.uint16), ((300, 7, 3), np.uint8)):
        pixels = rng.integers(0, np.iinfo(kind).max + 1, shape).astype(kind)
        with Image.open(io.BytesIO(png_bytes(pixels))) as picture:
            picture.verify()
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(png_bytes(pixels)))), pixels)


@pytest.mark.parametrize("wrong", [dict(depth=np.full((24, 24), -1.0)), dict(depth=np.full((24, 24), 4000.0)), dict(landmarks_2d=np.full((68, 2), np.nan)), dict(depth=np.full((24, 24), np.inf))])
def test_a_face_that_cannot_be_encoded_is_left_out_and_counted(tmp_path, wrong):
    bad = AnnotatedFace("bad", face_of(0).image, **wrong)
    with pytest.raises(InputError, match="bad"):
        encode_face(bad)
    write_shards(tmp_path / "set", ShardPlan(3, 3), lambda numbers: [bad if n == 1 else face_of(n) for n in numbers], every=1e9)
    assert [face.facts["number"] for face in read_shards(tmp_path / "set").items()] == [0, 2]


def test_damaged_and_unfinished_sets_are_refused(whole, tmp_path):
    import shutil

    def copy(name):
        shutil.copytree(whole, tmp_path / name)
        return tmp_path / name

    cut = copy("cut")
    tar = cut / "shard-000002.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    with pytest.raises(InputError, match="shard-000002"):
        [*read_shards(cut).items()]
    left = Skipped()
    assert len([*read_shards(cut).items(left)]) == 19 and len(left) == 3
    assert not is_written(cut, 2) and is_written(cut, 1)
    foreign = copy("foreign")
    with tarfile.open(foreign / "shard-000001.tar", "w") as other:
        info = tarfile.TarInfo("../../evil.sh")
        info.size = 2
        other.addfile(info, io.BytesIO(b"hi"))
    with pytest.raises(InputError, match="inside"):
        read_shards(foreign)[5]
    flipped = copy("flipped")
    tar = flipped / "shard-000003.tar"
    data = bytearray(tar.read_bytes())
    at = data.index(b"IDAT") + 40
    data[at] ^= 255
    tar.write_bytes(bytes(data))
    with pytest.raises(InputError, match="SHA-256"):
        check_shards(flipped)
    for name in ("index.json", "shard-000000.tar"):
        gone = copy(f"no-{name}")
        (gone / name).unlink()
        with pytest.raises(InputError):
            check_shards(gone)
    with pytest.raises(AssetError):
        read_shards(tmp_path / "nowhere")


def test_make_has_to_answer_each_number(tmp_path):
    with pytest.raises(InputError, match="1 faces for 4 numbers"):
        write_shards(tmp_path / "set", ShardPlan(4, 4), lambda numbers: [face_of(0)], every=1e9)
    for how in (dict(rank=2, world=2), dict(batch=0), dict(workers=0)):
        with pytest.raises(InputError, match="write_shards"):
            write_shards(tmp_path / "set", ShardPlan(4, 4), make, every=1e9, **how)


def test_layouts_from_shards(whole, tmp_path):
    faces = read_shards(whole)
    assert write_layout(faces.items(), tmp_path / "w", SetLayout("300w", "ibug")) == 22
    back = [*read_w300(tmp_path / "w", "challenging").items()]
    assert len(back) == 22 and np.abs(back[9].landmarks_2d - face_of(10).landmarks_2d).max() < 2e-3
    assert write_layout(faces.items(), tmp_path / "l", SetLayout("lapa", "test", ids=(1, 10, 6, 0))) == 22
    labels = read_image(tmp_path / "l/test/labels/000009_0.png", "labels")
    assert np.array_equal(labels, np.array([1, 10, 6, 0])[face_of(10).labels])
    names = ("background", "skin", "hair", "nose")
    assert write_layout(faces.items(), tmp_path / "c", SetLayout("celebamask", ids=(1, 2, 3, 0), names=names, mask_side=48)) == 22
    hair = read_image(tmp_path / "c/CelebAMask-HQ-mask-anno/0/00009_hair.png", "L")
    assert hair.shape == (48, 48) and np.array_equal(hair[::2, ::2] > 0, face_of(10).labels == 1)


def test_celebamask_layout_is_opened_by_its_split(whole, tmp_path):
    "The lists that the reader takes the split from are written too; numbers that were left out are not in them."
    faces, names = list(read_shards(whole).items())[:5], ("background", "skin", "hair", "nose")
    faces[2], left = replace(faces[2], labels=None), Skipped()
    write_layout(faces, tmp_path / "c", SetLayout("celebamask", "test", ids=(1, 2, 3, 0), names=names, mask_side=0), left)
    opened = read_celebamask_hq(tmp_path / "c", "readme")
    test = list(opened.split("test").items())
    assert len(left) == 1 and len(test) == 4 and [item.original for item in test] == ["000001.jpg", "000002.jpg", "000004.jpg", "000005.jpg"]
    classes = np.array([opened.classes.id_of(name) for name in ("skin", "hair", "nose", "skin")])
    for item, face in zip(test, (faces[k] for k in (0, 1, 3, 4)), strict=True):
        assert np.array_equal(item.labels[face.labels < 3], classes[face.labels][face.labels < 3]) and not item.labels[face.labels == 3].any()
    with pytest.raises(InputError, match="train, val or test"):
        opened.split("train")
    with pytest.raises(InputError, match="one folder"):
        SetLayout("celebamask", "faces", ids=(1, 2, 3, 0), names=names)


def test_coco_is_consistent(whole, tmp_path):
    names = ("background", "skin", "hair", "nose")
    write_layout(read_shards(whole).items(), tmp_path / "o", SetLayout("coco", ids=(1, 2, 3, 0), names=names))
    points, panoptic = (json.loads((tmp_path / "o/annotations" / f"{kind}_train.json").read_text()) for kind in ("face_keypoints", "panoptic"))
    true = face_of(10)
    row = next(a for a in points["annotations"] if a["image_id"] == 9)
    x, y, v = (np.array(row["keypoints"][k::3]) for k in range(3))
    assert np.abs(np.stack([x, y], 1) + 0.5 - true.landmarks_2d).max() < 0.006 and np.array_equal(v == 2, true.visible) and row["num_keypoints"] == 68
    assert len(points["categories"][0]["keypoints"]) == 68 and all(1 <= k <= 68 for bone in points["categories"][0]["skeleton"] for k in bone)
    one = next(a for a in panoptic["annotations"] if a["image_id"] == 9)
    ids = read_image(tmp_path / "o/panoptic_train" / one["file_name"]).astype(int) @ [1, 256, 65536]
    for segment in one["segments_info"]:
        mask = ids == segment["id"]
        rows, cols = np.nonzero(mask)
        assert segment["area"] == mask.sum() and segment["bbox"] == [cols.min(), rows.min(), cols.max() - cols.min() + 1, rows.max() - rows.min() + 1]
        assert names[segment["category_id"] - 1] == {0: "skin", 1: "hair", 2: "nose"}[int(true.labels[rows[0], cols[0]])]
    assert {c["name"] for c in panoptic["categories"]} == set(names[1:])


def test_layouts_never_write_numbers_of_another_scheme(tmp_path):
    "SynthForge's twenty classes in LaPa's numbers: by the said scheme, or not at all."
    labels = np.arange(20, dtype=np.uint8).repeat(2).reshape(5, 8)
    face = AnnotatedFace("face", np.zeros((5, 8, 3), np.uint8), labels)
    with pytest.raises(InputError, match="source"):
        write_layout([face], tmp_path / "a", SetLayout("lapa"))
    for kind, target in (("lapa", "lapa"), ("celebamask", "celebamask_readme")):
        for source in ("synthforge", SYNTH20):
            table = remap_table("synthforge", target).ids
            layout = SetLayout(kind, source=source)
            assert write_layout([face], tmp_path / kind, layout) == 1 and layout.names == label_set(target).classes
            assert np.array_equal(layout.labels(face), np.array(table)[labels])
    written = read_image(tmp_path / "lapa/train/labels/000000_0.png", "labels")
    assert written.max() <= 10 and (written[labels == 19] == 0).all() and (written[labels == 16] == 6).all()
    for wrong in (dict(source="lapa"), dict(ids=tuple(range(20)))):  # said to be LaPa's, or written as it is: numbers above 10
        with pytest.raises(InputError, match="another scheme"):
            write_layout([face], tmp_path / "b", SetLayout("lapa", **wrong))
    with pytest.raises(InputError, match="no table knows"):
        SetLayout("lapa", source=("a", "b"))
    with pytest.raises(InputError, match="left and right"):  # two schemes of the same names
        SetLayout("lapa", source=label_set("world19").classes)
    mirrored = SetLayout("celebamask", source="world19").ids
    assert mirrored != tuple(range(19)) and SetLayout("celebamask", source="celebamask_readme").ids == tuple(range(19))
    coco = SetLayout("coco", source=SYNTH20)
    assert coco.names == SYNTH20 and coco.background == 19 and SetLayout("300w").kind == "300w"


def test_what_a_layout_cannot_hold_is_counted(tmp_path):
    bare, left = AnnotatedFace("bare", face_of(0).image), Skipped()
    assert write_layout([face_of(1), bare], tmp_path / "l", SetLayout("lapa", source="lapa"), left) == 1 and left.items[0][0] == "bare"
    with pytest.raises(InputError, match="without labels"):
        write_layout([bare], tmp_path / "x", SetLayout("lapa", source="lapa"))
    assert len(FLIP68) == 68
