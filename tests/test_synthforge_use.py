"What a user brings and takes: predictors by name, crops by name, a parser of two translators, copies of 300-W with mirrored files, loaders and devices."

import json
import shutil
import sys
import types

import numpy as np
import pytest
import torch

import facelab.lab.run as lab_run
from facelab.lab.parallel import local_device
from facelab.data.w300 import extra_w300, read_w300, write_pts
from facelab.lab.errors import InputError, Skipped
from facelab.lab.images import write_image
from facelab.lab.profile import profile_values
from facelab.lab.paths import root
from facelab.lab.run import Job, main
from facelab.nets.hourglass import HourglassConfig, heat_place
from facelab.synthforge import learn, synth_data
from facelab.synthforge.annotated import AnnotatedFace
from facelab.synthforge.evaluate import WHOLE, Scoring, evaluate
from facelab.synthforge.generate import SynthSpec, generate_faces
from facelab.synthforge.learn import stages_of
from facelab.synthforge.model import BackboneConfig, FineTuned, LabelConfig, SyntheticBackbone
from facelab.synthforge.parse_tables import ParseMethod, crop_of, evaluated, named_method, open_methods, paired_rows, run_eval, scored_rows
from facelab.synthforge.predictor import FunctionPredictor, Prediction
from facelab.synthforge.real_sets import KINDS, RealRecipe, RealSet, write_real_sets
from facelab.synthforge.shard_set import ShardSet, read_shards
from facelab.synthforge.use import TrainedParser, load_parser, read_net, save_net, trained_parser, with_landmarks

TINY = BackboneConfig(32, 4, 2, 20, HourglassConfig(cin=4, halvings=1, channels=8, levels=2, grid="centres"))


class Answers:
    "A predictor that gives so many answers more than it was asked for."

    name, size = "answers", 16

    def __init__(self, more, whole_batches=True):
        self.more, self.whole_batches = more, whole_batches

    def __call__(self, pictures):
        if not self.whole_batches and len(pictures) > 1:
            raise InputError("answers", "many", "one", "One at a time.")
        return [Prediction(labels=np.zeros((16, 16), np.uint8))] * (len(pictures) + self.more)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("more", [-1, 2])
def test_answers_that_are_not_one_each_are_refused(more, whole):
    faces = [AnnotatedFace(f"face {k}", np.zeros((20, 20, 3), np.uint8), np.ones((20, 20), np.uint8)) for k in range(3)]
    scoring = Scoring(("a", "b"), points=False)
    assert len(evaluate(Answers(0, whole), faces, WHOLE, scoring).counts) == 3
    if whole:
        with pytest.raises(InputError, match="answers to 3 pictures"):
            evaluate(Answers(more), faces, WHOLE, scoring)
    else:  # one at a time, each without an answer that could be told
        result = evaluate(Answers(more, False), faces, WHOLE, scoring)
        assert len(result.failed) == 3 and "answers to 1 pictures" in str(result.failed.items[0][1])


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    top = tmp_path_factory.mktemp("real")
    write_real_sets(top, RealRecipe(seed=78, people=(2, 1, 2), photos=1, pixels=48, mask_side=48), 1)
    return top


@pytest.fixture
def mine(monkeypatch):
    "A user's module."
    module = types.ModuleType("mine")
    module.skin = lambda picture: np.ones(picture.shape[:2], np.uint8)
    module.skin.__name__ = "skin"

    class Ours:
        name, size, scheme = "ours", 32, "synthforge"

        def __call__(self, pictures):
            return [Prediction(labels=np.full(p.shape[:2], 16, np.uint8), landmarks_2d=np.full((68, 2), 16, np.float32)) for p in pictures]

    module.Ours, module.ours, module.number = Ours, Ours(), 3
    monkeypatch.setitem(sys.modules, "mine", module)
    return module


def test_any_predictor_by_name(mine, sets):
    "A function of a picture in the set's own classes, an object or a class with a scheme of its own; no checkpoint is asked for."
    lapa = RealSet("lapa", str(sets / "lapa"))
    assert named_method("mine:skin", lapa).ids is None and named_method("mine:ours", lapa).ids[16] == 6 and named_method("mine:Ours", lapa).name == "ours"
    assert named_method("mine:ours", RealSet("300w", str(sets / "300w"))).ids is None
    for wrong in ("mine:number", "mine:nobody", "nowhere:at_all"):
        with pytest.raises(InputError):
            named_method(wrong, lapa)
    values = {**profile_values("synthforge-eval", "smoke"), **{name: str(sets / folder) for name, folder in (("w300", "300w"), ("lapa", "lapa"), ("celebamask", "celebamask"))}}
    outcome = run_eval(Job("synthforge-eval", "smoke", {**values, "trained": "nowhere", "shards": "nowhere", "predictor": "mine:ours"}))
    assert {row.method for row in outcome.rows} == {"ours"} and {row.table for row in outcome.rows} == {"Table 1", "Table 2", "Table 3"} and not outcome.figures


def test_what_gives_a_predictor_is_called_for_one(mine, sets, tmp_path, monkeypatch):
    "`facelab.synthforge:load_parser` takes no picture: it is called without arguments; so are a function that gives a detector, and one that gives nothing of use is refused."
    save_net(tmp_path / "net.safetensors", trained(("seg", "kps"), 19), "celebamask_farl")
    parser = load_parser(tmp_path / "net.safetensors")
    monkeypatch.setattr("facelab.synthforge.use.load_parser", lambda name="": parser)
    for one in (RealSet("300w", str(sets / "300w")), RealSet("lapa", str(sets / "lapa")), RealSet("celebamask", str(sets / "celebamask"), "readme")):
        method = named_method("facelab.synthforge:load_parser", one)
        assert method.predictor is parser and (method.ids is None) == (one.kind == "300w")
        assert len(evaluated(method, one).failed) == 0
    mine.detector, mine.nothing = (lambda: types.SimpleNamespace(name="marks", size=16, room=1.6, landmarks=lambda images: torch.full((len(images), 68, 2), 8.0))), lambda: 3
    assert named_method("mine:detector", RealSet("300w", str(sets / "300w"))).predictor([np.zeros((16, 16, 3), np.uint8)])[0].landmarks_2d.shape == (68, 2)
    with pytest.raises(InputError, match="LandmarkDetector"):
        named_method("mine:nothing", RealSet("lapa", str(sets / "lapa")))


def test_sets_that_are_not_given_are_said_and_named_ones_have_to_be_there(mine, sets, monkeypatch, capsys):
    "A default root where nothing is: not run, with the reason. A root by hand where nothing is: an error, before anything is scored."
    usual = {**profile_values("synthforge-eval", "paper"), "device": "cpu", "predictor": "mine:ours"}
    outcome = run_eval(Job("synthforge-eval", "paper", {**usual, "w300": str(sets / "300w")}))
    assert {row.table for row in outcome.rows} == {"Table 1"} and "asset:lapa" in outcome.not_run["LaPa"] and "--set celebamask=" in outcome.not_run["CelebAMask-HQ, merged as farl"]
    hq = run_eval(Job("synthforge-eval", "paper", {**usual, "celebamask": str(sets / "celebamask")}))  # CelebA's folder by default is not there either
    assert {row.table for row in hq.rows} == {"Table 3"} and set(hq.not_run) >= {"300-W", "LaPa"}
    asked = []
    monkeypatch.setattr(mine.Ours, "__call__", lambda self, pictures: asked.append(1))
    for wrong, error in (({"w300": str(sets / "300w"), "celebamask": "/nowhere/at/all"}, "nothing there"), ({"lapa": str(sets / "300w"), "w300": str(sets / "300w")}, "no pictures with labels"), ({}, "no set")):
        with pytest.raises(InputError, match=error):
            run_eval(Job("synthforge-eval", "paper", {**usual, **wrong}))
    assert not asked
    assert main(["synthforge_eval", "--profile", "paper", "--set", "device=cpu", "--set", "predictor=mine:ours"]) == 2 and "no set" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["synthforge_eval", "--profile", "paper", "--set", f"w300={sets / '300w'}", "--set", "predictor=mine:ours"]) == 2 and "no GPU" in capsys.readouterr().err


def test_the_command_of_the_page_works_as_typed(mine, sets, tmp_path, capsys):
    "Of the page of the stage and of the component's: with a folder, a predictor, no GPU and nothing else."
    for page in ("nbs/experiments/synthforge/30_eval.ipynb", "nbs/synthforge/76_parse_tables.ipynb"):
        text = "\n".join(cell["source"] for cell in json.loads((root() / page).read_text())["cells"])
        words = next(line for line in text.splitlines() if line.startswith("    python -m facelab.lab.run")).split()[3:]
        assert words[0] == "synthforge_eval" and "predictor=facelab.synthforge:load_parser" in words
    words = [{"w300=/data/300W": f"w300={sets / '300w'}", "predictor=facelab.synthforge:load_parser": "predictor=mine:ours"}.get(word, word) for word in words]
    assert main([*words, "--out", str(tmp_path)]) == 0 and "NME full" in capsys.readouterr().out


def test_intervals_draw_people_on_all_three_sets(tmp_path):
    "Four photos of two people: in each set's names or lists."
    write_real_sets(tmp_path, RealRecipe(seed=79, people=(0, 0, 2), photos=2, pixels=48, mask_side=48), 1)
    for kind in KINDS:
        one = RealSet(kind, str(tmp_path / kind), "farl" if kind == "celebamask" else "")
        people = one.people([item.name for item in one.items("test")])
        assert len(people) == 4 and len(set(people)) == 2, (kind, people)
        asked = iter(range(100))

        def half(picture):  # right on every other picture
            return Prediction(labels=np.full(picture.shape[:2], 1 + next(asked) // 2 % 2, np.uint8), landmarks_2d=np.full((68, 2), 20.0 + next(asked)))

        found = evaluated(ParseMethod("half", FunctionPredictor("half", half)), one)
        if kind == "300w":
            errors = {who: np.mean([e for e, w in zip(found.errors, people) if w == who]) for who in people}
            row = next(row for row in scored_rows(found, one) if row.metric == "NME full")
            assert (row.low, row.high) == pytest.approx((min(errors.values()), max(errors.values())), rel=1e-4)  # one of two people twice: a quarter of the draws
        apart = paired_rows(found, found, one)
        assert apart and all(row.value == row.low == row.high == 0 for row in apart)


def test_names_of_the_networks_in_tables(tmp_path, sets):
    "Of several parts the tenth is the paper's RS; Next3D's backbone has its own name."
    torch.manual_seed(0)
    for stem in ("sb", "rs3", "rs10", "next3d"):
        save_net(tmp_path / f"{stem}.safetensors", SyntheticBackbone(TINY), "synthforge")
    for stem in ("sb-lapa", "next3d-lapa-f", "rs10-lapa"):
        save_net(tmp_path / f"{stem}.safetensors", trained(("seg",), 11, stem.endswith("-f")), "lapa")
    found = [method.name for method in open_methods(str(tmp_path), RealSet("lapa", str(sets / "lapa")), [0.1, 0.03])]
    assert found == ["SB", "SB + LF", "SB (Next3D)", "SB (Next3D) + LF w/ f_s", "RS", "RS + LF", "RS 3 %"]


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    "Stages write here."
    monkeypatch.setattr(lab_run, "build_dir", lambda *parts: (folder := tmp_path.joinpath("build", *parts)).mkdir(parents=True, exist_ok=True) or folder)
    monkeypatch.setattr(lab_run, "home", lambda profile: ())
    return tmp_path / "build"


def test_a_guide_of_a_profile_moves_the_draws(scratch, tmp_path):
    torch.manual_seed(0)
    save_net(tmp_path / "sb.safetensors", SyntheticBackbone(TINY), "synthforge")
    values = {**profile_values("synthforge-data", "smoke"), "generator": "facelab.synthforge.generate:grey_faces", "faces": 12, "each": 6, "size": 32, "people": "", "workers": 1, "next3d_faces": 0, "next3d_heads": 0}
    drawn = {}
    for guide in ("", str(tmp_path / "sb.safetensors")):
        outcome = synth_data.run_data(Job("synthforge-data", "smoke", {**values, "guide": guide}))
        data = read_shards(scratch / "checkpoints" / "synthforge-data" / "shards")
        drawn[guide] = [face.facts["yaw"] for face in data.items()]
        assert (data.plan.recipe["guide"] is not None) == bool(guide) == ("errs" in outcome.notes[0])
    one, other = drawn.values()
    assert one != other and 1 <= sum(a == b for a, b in zip(one, other)) < 12  # a share stays even
    save_net(tmp_path / "more.safetensors", trained(("seg",), 11), "lapa")
    with pytest.raises(InputError, match="backbone"):
        synth_data.run_data(Job("synthforge-data", "smoke", {**values, "guide": str(tmp_path / "more.safetensors")}))


def test_guided_draws_are_measured_against_even_ones(scratch, tmp_path):
    "As many faces, as many steps, the same held-out ones."
    generate_faces(SynthSpec(8, "world", "narrow", 64, 1, each=8), tmp_path / "shards", every=1e9)
    save_net(scratch / "checkpoints" / "synthforge-train" / "sb.safetensors", SyntheticBackbone(learn.SMALL), "synthforge")
    values = {**profile_values("synthforge-train", "smoke"), "shards": str(tmp_path / "shards"), "held_out": 3, "guided": 3, "guided_steps": 1, "workers": 1}
    rows = learn.guided_rows(Job("synthforge-train", "smoke", values))
    assert [row.method for row in rows] == ["even draws", "guided draws", "guided draws against even draws"] * 2 and {row.table for row in rows} == {"guided draws"}
    assert rows[0].n == 3 and rows[2].value == pytest.approx(rows[1].value - rows[0].value) and rows[3].n >= 1 and "SB and 3 new faces, 1 steps" in rows[0].data
    with pytest.raises(InputError, match="start"):
        learn.train_backbone(read_shards(tmp_path / "shards"), learn.SMALL_I, learn.SMALL, start=SyntheticBackbone(TINY))


def test_crops_of_a_profile_keep_the_margin(sets):
    lapa = RealSet("lapa", str(sets / "lapa"))
    assert crop_of("detector", lapa, 1.3).margin == 1.3 and crop_of("landmarks", lapa, 1.2).margin == 1.2
    assert crop_of("picture", lapa, 1.6).margin == 1.0 and str(crop_of("picture", lapa, 1.6)) == "whole picture"
    assert crop_of("", lapa, 1.3) is None and crop_of("labels", lapa, 1.3) is None  # the set's own: no hair, no neck, no clothes
    assert 10 in lapa.crop(1.3).background and lapa.crop(1.3).margin == pytest.approx(1.3 * 0.78)
    with pytest.raises(InputError, match="crop"):
        crop_of("square", lapa, 1.0)


def test_mean_places_in_half_precision_are_those_of_single():
    "Gaussians of 64 cells: in bf16 alone places are off by most of a pixel of 256."
    at, rng = torch.arange(64.0), np.random.default_rng(0)
    x, y = (torch.tensor(rng.uniform(8, 55, 100), dtype=torch.float32)[:, None] for _ in range(2))
    heat = (torch.exp(-((at - x) ** 2) / 2)[:, None, :] * torch.exp(-((at - y) ** 2) / 2)[:, :, None])[None]
    exact = heat_place(heat)
    with torch.autocast("cpu", torch.bfloat16):
        found = heat_place(heat.bfloat16())
        same = heat_place(heat)
    assert found.dtype == torch.float32 and torch.equal(same, exact)
    assert ((found - exact).abs().amax(-1) / 2 * 256).max() < 0.05


def trained(tasks, classes, with_features=True, seed=0):
    torch.manual_seed(0)
    backbone = SyntheticBackbone(TINY)
    torch.manual_seed(seed)
    return FineTuned(backbone, LabelConfig(tasks, classes, with_features, width=2)).eval()


def test_the_parser_takes_landmarks_from_their_own_translator(tmp_path):
    labels, points = trained(("seg",), 19, seed=1), trained(("kps",), 2, seed=2)
    save_net(tmp_path / "sb-celebamask-f.safetensors", labels, "celebamask_farl")
    alone = trained_parser(tmp_path)
    save_net(tmp_path / "sb-300w-f.safetensors", points, "")
    both = trained_parser(tmp_path)
    images = torch.rand(2, 3, 32, 32)
    own, theirs = (TrainedParser(net, "").landmarks(images) for net in (labels, points))
    assert torch.equal(alone.landmarks(images), own) and torch.equal(both.landmarks(images), theirs) and not torch.allclose(own, theirs)
    with torch.no_grad():
        assert torch.equal(both.net(2 * images - 1).seg, labels(2 * images - 1).seg)
    save_net(tmp_path / "both.safetensors", both.net, "celebamask_farl")
    again, _ = read_net(tmp_path / "both.safetensors")
    with torch.no_grad():
        assert torch.equal(again(images).coords, both.net(images).coords)
    other = trained(("kps",), 2)
    next(other.backbone.parameters()).data.add_(1)
    for wrong in (other, trained(("kps",), 2, False), trained(("seg",), 19)):
        with pytest.raises(InputError, match="two backbones"):
            with_landmarks(labels, wrong)


def test_advice_names_only_what_can_be_had(tmp_path):
    "There is no .dvc file of a base that was never pinned."
    with pytest.raises(InputError) as error:
        trained_parser(tmp_path)
    assert "dvc repro synthforge-train" in str(error.value) and ".dvc" not in str(error.value)


def test_mirrored_copies_of_300w_are_said(tmp_path, sets):
    home = tmp_path / "300W" / "ibug"
    home.mkdir(parents=True)
    for k in range(136):
        name = f"image_{k:03d}" + ("_mirror" if k >= 130 else "")
        write_image(home / f"{name}.png", np.zeros((4, 4, 3), np.uint8))
        write_pts(home / f"{name}.pts", np.zeros((68, 2)))
    notes = extra_w300(read_w300(tmp_path / "300W", "challenging"))
    assert len(notes) == 2 and "136 pictures, 135 published" in notes[0] and "6 of 136" in notes[1]
    assert RealSet("300w", str(sets / "300w")).extra("test") == [] and RealSet("lapa", str(sets / "lapa")).extra("test") == []
    shutil.rmtree(home)


def test_loaders_and_devices_reach_the_training(monkeypatch):
    for profile, count in (("mini", 0), ("gpu", 8), ("paper", 16)):
        size = stages_of(Job("synthforge-train", profile, profile_values("synthforge-train", profile)))
        assert (size.one.workers, size.two.workers) == (count, count)
    assert local_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert local_device("auto").type == "cpu"
    with pytest.raises(InputError, match="no GPU"):
        local_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert str(local_device("auto")) == str(local_device("cuda")) == "cuda:3"




@pytest.mark.parametrize("kind", ["300w", "lapa"])
def test_large_sets_are_cut_once_and_read_lazily(sets, tmp_path, monkeypatch, kind):
    "The faces are those that are held in memory; landmarks to the file's four digits; a broken picture is left out and counted."
    copied = tmp_path / kind
    shutil.copytree(sets / kind, copied)
    home = copied / {"300w": "helen/trainset", "lapa": "train/images"}[kind]
    values = {**profile_values("synthforge-train", "smoke"), "w300": "", "lapa": "", "celebamask": "", {"300w": "w300"}.get(kind, kind): str(copied)}
    job = Job("synthforge-train", "smoke", values)
    one = RealSet(kind, str(copied))
    held = learn.real_faces(job, one, 40, Skipped())
    assert isinstance(held, list) and not learn.on_disk(job, one, 40)
    monkeypatch.setattr(learn, "IN_MEMORY", 0)
    monkeypatch.setattr(learn, "crops_folder", lambda job, one: tmp_path / "crops" / one.kind)
    monkeypatch.setattr(learn, "stages_of", lambda job: types.SimpleNamespace(cut=40))
    learn.prepare_crops(job)
    faces = learn.real_faces(job, one, 40, Skipped())
    assert isinstance(faces, ShardSet) and len(faces) == len(held)
    for ours, theirs in zip(faces.items(), held, strict=True):
        assert ours.name == theirs.name and np.array_equal(ours.image, theirs.image)
        assert theirs.labels is None if ours.labels is None else np.array_equal(ours.labels, theirs.labels)
        assert theirs.landmarks_2d is None if ours.landmarks_2d is None else np.abs(ours.landmarks_2d - theirs.landmarks_2d).max() < 1e-4
    written = (tmp_path / "crops" / kind / "index.json").stat().st_mtime_ns
    learn.prepare_crops(job)  # is there already
    assert (tmp_path / "crops" / kind / "shard-000000.tar").stat().st_mtime_ns <= written
    first = sorted(home.glob("*.jpg"))[0]
    first.write_bytes(first.read_bytes()[:200])  # another set now: other cut-outs, one fewer
    learn.prepare_crops(job)
    again = learn.real_faces(job, one, 40, Skipped())
    assert len(again) == len(held) - 1 and again.shards[0]["skipped"] == 1
    values["real_faces"] = 1
    assert len(learn.real_faces(Job("synthforge-train", "smoke", values), one, 40, Skipped())) == 1
