"LAION-Face's tars: what img2dataset writes is read, what is broken is counted by its reason, the stream's order hangs on the seed alone and goes on where it was stopped."

import io
import itertools
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from facelab.data.laion_face import PARTS_20M, LaionItem, TarLimits, check_laion_face, find_shards, read_laion_face, read_shard, read_stats, write_laion_face
from facelab.data.reading import LeftOut
from facelab.data.shard_stream import ShardStream, shards_of
from facelab.data.world import generate
from facelab.lab.batches import Share
from facelab.lab.errors import AssetError, InputError, Skipped
from facelab.lab.train import Player, TrainConfig, train


@pytest.fixture(scope="module")
def items():
    return generate(30, 1, 16, seed=8, supersample=1, workers=1, every=1e9)[0]


@pytest.fixture(scope="module")
def whole(items, tmp_path_factory):
    root = tmp_path_factory.mktemp("laion")
    assert [p.name for p in write_laion_face(root, items, per_shard=4)] == [f"{k:05d}.tar" for k in range(8)]
    return root


def jpeg(side=8):
    held = io.BytesIO()
    Image.new("RGB", (side, side), (200, 150, 120)).save(held, "JPEG")
    return held.getvalue()


def tar_of(path, *members, cut=0):
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if isinstance(data, str):  # a link
                info.type, info.linkname, info.size = tarfile.SYMTYPE, data, 0
            tar.addfile(info, io.BytesIO(data) if isinstance(data, bytes) else None)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(held.getvalue()[: len(held.getvalue()) - cut])
    return path


def pair(key, picture=None, text=b"a face", facts=b"{}"):
    return (f"{key}.jpg", jpeg() if picture is None else picture), (f"{key}.json", facts), (f"{key}.txt", text)


# Writing and reading


def test_tars_are_as_img2dataset_writes_them(whole, items):
    with tarfile.open(find_shards(whole)[1]) as tar:
        members = tar.getmembers()
        assert [m.name for m in members[:3]] == ["000010000.jpg", "000010000.json", "000010000.txt"]
        assert {(m.mode, m.mtime, m.uid, m.gid, m.uname) for m in members} == {(0o444, 0, 0, 0, "bigdata")}
        facts = json.load(tar.extractfile(members[1]))
    assert facts["key"] == "000010000" and facts["caption"] == items[4].weak_caption and (facts["width"], facts["status"], facts["SAMPLE_ID"]) == (16, "success", 4)
    assert facts["similarity"] is None and facts["NSFW"] is None  # nobody measured them
    assert read_stats(whole) == {"shards": 8, "shards_with_stats": 8, "count": 30, "successes": 30, "failed_to_download": 0, "failed_to_resize": 0}


@pytest.mark.parametrize("way", ["number", "stream"])
def test_what_went_in_comes_back(whole, items, way):
    found = list(read_laion_face(whole).items()) if way == "number" else [i for p in find_shards(whole) for i in read_shard(p)]
    for k, (item, truth) in enumerate(zip(found, items, strict=True)):
        assert item.jpeg == truth.jpeg and item.caption == truth.weak_caption and item.key == f"{k // 4:05d}{k % 4:04d}" and item.shard == f"split_00000/{k // 4:05d}.tar"
        assert np.array_equal(item.image, truth.image) and item.facts["SAMPLE_ID"] == k


def test_writing_twice_gives_the_same_bytes(whole, items, tmp_path):
    write_laion_face(tmp_path, items, per_shard=4)
    files = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
    assert len(files) == 16 and all((whole / f).read_bytes() == (tmp_path / f).read_bytes() for f in files)


def test_true_captions_and_another_split(items, tmp_path):
    write_laion_face(tmp_path, items[:3], captions="faithful", part=5)
    assert [i.caption for i in read_laion_face(tmp_path, parts=[5]).items()] == [i.caption for i in items[:3]] and (tmp_path / "split_00005").is_dir()
    for wrong in ({"items": []}, {"per_shard": 0}, {"per_shard": 10_001}, {"captions": "long"}, {"part": -1}):
        with pytest.raises(InputError):
            write_laion_face(**{"root": tmp_path, "items": items[:1]} | wrong)


def test_by_number(whole):
    data = read_laion_face(whole)
    assert len(data) == 30 and data[-1].key == "000070001" and data.name_of(5) == "split_00000/00001.tar/000010001"
    with pytest.raises(IndexError):
        data[30]
    data.shards[0] = data.shards[0].with_name("gone.tar")
    with pytest.raises(InputError, match="moved"):
        data[0]


def test_which_splits(whole, tmp_path):
    for n in (0, 2, 31):
        tar_of(tmp_path / f"split_{n:05d}" / "00000.tar", *pair("0"))
    assert [p.parent.name for p in find_shards(tmp_path)] == ["split_00000", "split_00002", "split_00031"] and len(find_shards(tmp_path, [2])) == 1
    assert len(find_shards(tmp_path / "split_00002")) == 1 and len(PARTS_20M) == 13
    with pytest.raises(AssetError, match="split_00005 and 10 more"):
        find_shards(tmp_path, PARTS_20M)
    for place in (tmp_path / "none", tmp_path / "split_00002" / "00000.tar"):
        with pytest.raises(AssetError, match="img2dataset"):
            find_shards(place)


# What is broken


DAMAGE = {  # reason -> members of a tar whose first and last samples are good
    "picture empty": pair("b", b""),
    "picture missing": pair("b")[1:],
    "picture damaged": pair("b", b"\xff\xd8no picture"),
    "picture unsafe or too large": pair("b", jpeg(64)),
    "picture too large": pair("b", bytes(40_000)),
    "suffix unknown": (("b.html", b"<html>404</html>"), *pair("b")[1:]),
    "text missing": pair("b")[:2],
    "text empty": pair("b", text=b" \n"),
    "text damaged": pair("b", text=b"caf\xe9"),
    "text damaged ": pair("b", text=b"a\0b"),
    "text too large": pair("b", text=b"x" * 70_000),
    "facts damaged": pair("b", facts=b"{"),
    "key twice": pair("a"),
    "name that leaves the folder": (("../../etc/b.jpg", jpeg()),),
    "name that leaves the folder ": (("/etc/b.jpg", jpeg()),),
    "name that leaves the folder  ": (("C:\\b.jpg", jpeg()),),
    "no plain file": (("b.jpg", "/etc/passwd"),),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_counted_by_reason_and_the_rest_is_used(tmp_path, what):
    tar_of(tmp_path / "split_00000" / "00000.tar", *pair("a"), *pair("c"), *DAMAGE[what], *pair("d"))
    report = check_laion_face(tmp_path, limits=TarLimits(pixels=1000, picture_bytes=30_000), every=1e9)
    assert report.left_out.reasons == {what.strip(): 1} and report.used == 3 and report.found == 4
    tally = LeftOut()
    keys = [i.key for i in read_shard(tmp_path / "split_00000" / "00000.tar", tally, TarLimits(picture_bytes=30_000))]
    assert keys[:2] == ["a", "c"] and keys[-1] == "d"


def test_a_tar_may_break_off_anywhere(tmp_path):
    members = [m for k in range(4) for m in pair(f"{k}", bytes(3000))]
    data = tar_of(tmp_path / "whole.tar", *members).read_bytes()
    size = 4 * (512 + 3072 + 2 * 1024)
    lost = Counter()
    for cut in range(1, size + 600, 97):
        (tmp_path / "a.tar").write_bytes(data[:cut])
        for stream in (True, False):
            tally = LeftOut()
            found = list(read_shard(tmp_path / "a.tar", tally)) if stream else list(read_laion_face_of(tmp_path / "a.tar", tally))
            assert [i.key for i in found] == [str(k) for k in range(len(found))] and all(len(i.jpeg) == 3000 and i.caption == "a face" for i in found)
            lost[stream] += 4 - len(found)
            assert len(found) == 4 or tally.reasons["tar broken off"] >= 1
    assert lost[True] > 0 and abs(lost[True] - lost[False]) <= lost[True] // 10


def read_laion_face_of(path, tally):
    "By number, from a folder with this tar alone."
    place = path.parent / "one"
    place.mkdir(exist_ok=True)
    (place / "00000.tar").write_bytes(path.read_bytes())
    return read_laion_face(place, skipped=tally).items(tally)


def test_a_cut_that_tarfile_does_not_notice(tmp_path):
    data = tar_of(tmp_path / "a.tar", *pair("0", bytes(400)), *pair("1", bytes(400))).read_bytes()
    for wrong in (data[: 2 * 3 * 1024], data[: 3 * 1024], data[: 3 * 1024 + 7] + b"!!" + data[3 * 1024 + 9 :]):
        (tmp_path / "a.tar").write_bytes(wrong)
        tally = LeftOut()
        assert 1 <= len(list(read_shard(tmp_path / "a.tar", tally))) <= 2 and tally.reasons["tar broken off"] == 1


def test_one_broken_tar_does_not_stop_the_others(whole, tmp_path):
    for k, path in enumerate(find_shards(whole)):
        (tmp_path / f"{k:05d}.tar").write_bytes(path.read_bytes() if k % 2 else b"no tar at all")
    (tmp_path / "00009.tar").write_bytes(b"")
    skipped = Skipped()
    assert len(read_laion_face(tmp_path, skipped=skipped)) == 14 and len(skipped) == 5
    with pytest.raises(InputError):
        read_laion_face(tmp_path)


def test_more_than_three_members_and_folders_inside(tmp_path):
    tar_of(tmp_path / "a.tar", ("a.jpg", jpeg()), ("a.npz", b"x"), ("a.txt", b"one"), ("x/b.jpeg", jpeg()), ("x/b.txt", b"\xef\xbb\xbftwo"), ("c.PNG", jpeg()), ("c.cls", b"3"), ("c.txt", b"three"))
    assert [(i.key, i.caption, i.facts) for i in read_shard(tmp_path / "a.tar")] == [("a", "one", {}), ("x/b", "two", {}), ("c", "three", {})]


def test_facts_that_are_no_object():
    item = LaionItem("k", "s", b"", "c", b"[1]")
    assert item.facts == {} and item.name == "s/k"
    with pytest.raises(InputError):
        assert LaionItem("k", "s", b"", "c", b"[" * 100_000).facts


def test_stats_that_are_none(whole, tmp_path):
    tar_of(tmp_path / "00000.tar", *pair("0"))
    (tmp_path / "00000_stats.json").write_text('{"count": "many"}')
    with pytest.raises(InputError, match="counts"):
        read_stats(tmp_path)
    (tmp_path / "00000_stats.json").write_text('{"count": 3, "successes": 2, "failed_to_download": 1, "failed_to_resize": 0}')
    assert read_stats(tmp_path)["failed_to_download"] == 1 and any("says 2 samples" in n for n in check_laion_face(tmp_path, every=1e9).notes)


# The stream


def number(item, rng):
    return torch.tensor(int(item.key[:5]) * 4 + int(item.key[5:]) + rng.uniform() / 2, dtype=torch.float64)


def careless(item, rng):  # draws from the global generators
    return number(item, rng) + float(torch.rand(())) / 8 + np.random.rand() / 8


def take(source, n, position=None, share=None):
    return list(itertools.islice(source.batches(position, share or Share(3, seed=1)), n))


def said(steps):
    return [batch.tolist() for batch, _ in steps]


def ids(steps):
    return [int(x) for batch in said(steps) for x in batch]


@pytest.mark.parametrize("buffer", [1, 4, 7, 100])
def test_an_epoch_gives_each_sample_once_in_another_order(whole, buffer):
    source = ShardStream(find_shards(whole), number, buffer=buffer)
    seen = ids(take(source, 30))
    assert sorted(seen[:30]) == sorted(seen[30:60]) == sorted(seen[60:]) == list(range(30)) and len({tuple(seen[k : k + 30]) for k in (0, 30, 60)}) == 3
    assert ids(take(ShardStream(find_shards(whole), number, buffer=buffer), 30)) == seen and ids(take(source, 10, None, Share(3, seed=2))) != seen[:30]


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_going_on_from_any_batch_gives_what_would_have_come(whole, lanes):
    source = ShardStream(find_shards(whole), careless, buffer=5, lanes=lanes)
    steps = take(source, 24)
    for k in range(0, 20):
        position = json.loads(json.dumps(steps[k][1]))  # as it comes back from a checkpoint
        assert said(take(ShardStream(find_shards(whole), careless, buffer=5, lanes=lanes), 3, position)) == said(steps[k + 1 : k + 4])


def test_processes_change_nothing(whole):
    inside, outside = (ShardStream(find_shards(whole), careless, buffer=5, lanes=2, processes=p) for p in (False, True))
    steps = take(inside, 11)
    assert said(take(outside, 11)) == said(steps) and said(take(outside, 3, steps[4][1])) == said(steps)[5:8]
    assert [p for _, p in take(outside, 5)] == [p for _, p in steps[:5]]


def test_each_shard_has_one_reader(whole):
    for world, lanes in ((1, 1), (2, 1), (2, 2), (3, 1), (4, 2)):
        for epoch in range(3):
            dealt = [s for rank in range(world) for lane in range(lanes) for s in shards_of(8, 5, epoch, rank, world, lane, lanes).tolist()]
            assert sorted(dealt) == list(range(8))
    with pytest.raises(InputError, match="fewer lanes"):
        shards_of(3, 0, 0, world=2, lanes=2)
    ranks = [ids(take(ShardStream(find_shards(whole), number), 2, None, Share(6, seed=1, rank=r, world=2))) for r in range(2)]
    assert not set(ranks[0]) & set(ranks[1])


def test_without_shuffling_the_order_is_the_disks(whole):
    assert ids(take(ShardStream(find_shards(whole), number, shuffle=False, buffer=4), 10)) == list(range(30))


def test_broken_samples_are_left_out_of_the_stream_and_counted(whole, items, tmp_path):
    write_laion_face(tmp_path, items, per_shard=4)
    tars = find_shards(tmp_path)
    tars[2].write_bytes(tars[2].read_bytes()[:3000])
    tars[4].write_bytes(b"nonsense")

    def strict(item, rng):
        if item.key == "000000002":
            raise InputError(item.name, "no face", "a face", "Leave it out.")
        return number(item, rng)

    for processes in (False, True):
        source = ShardStream(tars, strict, buffer=6, lanes=2, processes=processes)
        steps = take(source, 30)
        assert not set(ids(steps)) & {2, 16, 17, 18, 19} and {0, 1, 3, 4, 20, 29} <= set(ids(steps))
        assert source.left_out.reasons["tar broken off"] >= 2 and source.left_out.reasons["item damaged"] >= 1
        later = take(source, 4, steps[10][1])
        assert said(later) == said(steps[11:15])


def test_a_set_of_nothing_good_is_an_error_and_not_a_hang(tmp_path):
    for k in range(2):
        tar_of(tmp_path / f"{k:05d}.tar", *pair("a", b""))
    for processes in (False, True):
        with pytest.raises(InputError, match="no sample that can be used"):
            take(ShardStream(find_shards(tmp_path), number, lanes=2, processes=processes), 1)
    with pytest.raises(InputError):
        ShardStream([], number)
    with pytest.raises(InputError, match="lanes"):
        take(ShardStream(find_shards(tmp_path), number), 1, {"turn": 0, "lanes": [[0] * 5] * 2})


def test_other_shards_are_another_run(whole, items, tmp_path):
    write_laion_face(tmp_path, items[:-1], per_shard=4)
    facts = [ShardStream(find_shards(root), number, buffer=buffer).facts() for root, buffer in ((whole, 5), (whole, 5), (tmp_path, 5), (whole, 6))]
    assert facts[0] == facts[1] and facts[0] != facts[2] and facts[0] != facts[3]


def test_training_stopped_and_resumed_is_training_that_was_not_stopped(whole, tmp_path):
    def run(scratch=None, stop=None):
        torch.manual_seed(0)
        net = nn.Linear(1, 1).double()
        loss = lambda models, batch, step: {"loss": (models["net"](batch[:, None] / 30) - 1).square().mean()}

        def cut(state):
            if stop and state.step == stop:
                raise KeyboardInterrupt

        player = Player("net", loss, ["net"], lambda weights: torch.optim.Adam(weights, lr=0.1))
        config = TrainConfig(steps=14, batch=4, seed=3, log_every=1, save_every=3)
        return train(config, {"net": net}, [player], ShardStream(find_shards(whole), careless, buffer=5, lanes=2), scratch, [cut] if stop else (), progress=False)

    straight = run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", stop=8)
    again = run(tmp_path / "b")
    assert 0 < again.resumed < 8 and again.curve.equals(straight.curve) and torch.equal(again.models["net"].weight, straight.models["net"].weight)
