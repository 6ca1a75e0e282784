"Both stages in the lab's loop: resumed to the same bits, frozen where frozen, refused where the set lacks something; the world as its mesh sees it."

from dataclasses import replace

import numpy as np
import pytest
import torch

from facelab.data.world import generate, people_of
from facelab.face.morphable import MorphableModel
from facelab.lab.errors import InputError
from facelab.lab.train import Training
from facelab.nets.hourglass import HourglassConfig
from facelab.synthforge.annotate import HeadTopology, world_as_mesh
from facelab.synthforge.annotated import SYNTH20_FLIPS, face_batch, world_face
from facelab.synthforge.augment import augment_face, item_rng, still
from facelab.synthforge.model import MINI, TASKS, BackboneConfig, FineTuned, LabelConfig, Predictions, SyntheticBackbone
from facelab.synthforge.objective import TaskWeights
from facelab.synthforge.shard_set import read_shards
from facelab.synthforge.shards import ShardPlan, write_shards
from facelab.synthforge.training import CODE_I, CODE_II, MINI_CROPS, MINI_I, PAPER_I, StageConfig, check_faces, crop_scores, train_backbone, train_labels

TINY = BackboneConfig(32, 4, 2, 20, HourglassConfig(cin=4, halvings=1, channels=8, levels=2, grid="centres"))
FEW = replace(MINI_I, steps=6, batch=4, crops=replace(MINI_CROPS, size=32), threads=1, device="cpu")


@pytest.fixture(scope="module")
def photos():
    return generate(people_of("train", 4), 2, 64, 31, workers=1, supersample=1, every=1e9)[0]


@pytest.fixture(scope="module")
def synthetic(photos):
    head = MorphableModel.procedural()
    topology = HeadTopology.of_model(head)
    return [world_as_mesh(photo, topology, head) for photo in photos]


def test_the_mesh_is_where_the_photo_shows_it(photos, synthetic):
    for photo, face in zip(photos, synthetic, strict=True):
        assert np.abs(face.landmarks_2d - photo.landmarks_2d).max() < 1e-3 and face.facts["identity"] == photo.identity
        skin = (photo.labels19 == 1) & (face.depth > 0) & (face.labels == 0)
        assert np.median(np.abs(face.depth - photo.depth)[skin]) < 1.0 and skin.sum() > 100
        nose = photo.labels19 == 2
        assert np.isin(face.labels[nose], (16, 0, 2, 14)).mean() > 0.9
        assert not np.isin(face.labels, (20, 255)).any()


def test_stage_one_resumes_to_the_same_bits(synthetic, tmp_path):
    whole = train_backbone(synthetic, FEW, TINY, SYNTH20_FLIPS, progress=False)

    class Cut(Exception):
        pass

    def cut(run: Training):
        if run.step == 4:
            raise Cut

    import facelab.synthforge.training as page

    real = page.train

    def cut_short(how, *rest, **options):
        models, players, source, scratch, calls, *more = rest
        return real(replace(how, save_every=3), models, players, source, scratch, [*calls, cut], *more, **options)

    page.train = cut_short
    try:
        with pytest.raises(Cut):
            train_backbone(synthetic, FEW, TINY, SYNTH20_FLIPS, scratch=tmp_path / "one", progress=False)
    finally:
        page.train = real
    assert list((tmp_path / "one").rglob("*.safetensors"))
    again = train_backbone(synthetic, FEW, TINY, SYNTH20_FLIPS, scratch=tmp_path / "one", progress=False)
    other = whole.net.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in again.net.state_dict().items())
    assert again.curve.equals(whole.curve)


@pytest.mark.parametrize("with_features", [False, True])
def test_stage_two_moves_the_translators_only(photos, with_features):
    real = [world_face(photo, "labels11") for photo in photos]
    torch.manual_seed(0)
    backbone = SyntheticBackbone(TINY)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    done = train_labels(backbone, real, LabelConfig(TASKS, 11, with_features, width=2), replace(FEW, weights=TaskWeights(ssl=0.0)), ((2, 3), (4, 5)), val=real, progress=False)
    assert isinstance(done.net, FineTuned) and not done.net.training
    assert all(torch.equal(before[name], value) for name, value in done.net.backbone.state_dict().items())
    assert {"net/seg", "net/depth", "net/kps", "val/nme", "val/f1"} <= set(done.curve.columns) and "net/ssl" not in done.curve.columns


def test_stage_one_learns_from_shards_as_from_memory(synthetic, tmp_path):
    write_shards(tmp_path / "set", ShardPlan(8, 3), lambda numbers: [synthetic[n] for n in numbers], every=1e9)
    shards = read_shards(tmp_path / "set")
    one, two = (train_backbone(faces, replace(FEW, steps=1), TINY, SYNTH20_FLIPS, progress=False).curve.drop(columns="net/grad_norm").iloc[0] for faces in (synthetic, shards))
    assert one.keys().equals(two.keys()) and np.allclose(one.to_numpy(float), two.to_numpy(float), rtol=2e-3)  # landmarks have four decimals there, depth 0.05 mm


@pytest.mark.parametrize("reading", ["norm", "l1", "mse"])
def test_all_readings_of_equation_two_run(synthetic, reading):
    done = train_backbone(synthetic, replace(FEW, steps=2, weights=TaskWeights(1.0, 1.0, 1.0, 1e-4, reading)), TINY, SYNTH20_FLIPS, progress=False)
    assert np.isfinite(done.curve["net/ssl"]).all() and (done.curve["net/ssl"] > 0).all()


def test_presets_are_those_of_the_facts():
    assert (PAPER_I.rates.heads, PAPER_I.rates.encoder, PAPER_I.rates.least) == (1e-3, 1e-4, 1e-6) and PAPER_I.crops.perspective > 0 == CODE_I.crops.perspective
    assert (CODE_I.rates.heads, CODE_I.rates.encoder, CODE_I.rates.least, CODE_I.epochs) == (1e-4, 1e-5, 1e-5, 20)
    assert (CODE_II.weights.seg, CODE_II.weights.depth, CODE_II.weights.kps, CODE_II.rates.least, CODE_II.epochs, CODE_II.batch) == (1.0, 0.5, 0.2, 1e-6, 500, 64)
    schedule = StageConfig(40, 4, epochs=20).schedule()
    assert schedule(0) == schedule(1) == 1.0 and schedule(2) == schedule(3) < 1.0
    assert CODE_I.steps * CODE_I.batch * CODE_I.accumulate / 100_000 == pytest.approx(20, rel=0.03)


def test_what_a_set_lacks_is_said_before_training(photos, synthetic):
    bare = replace(synthetic[0], depth=None)
    with pytest.raises(InputError, match="depth"):
        train_backbone([bare], FEW, TINY, progress=False)
    with pytest.raises(InputError, match="class 18|class 19"):
        check_faces(synthetic[0], 11, ("seg",))
    with pytest.raises(InputError, match="64"):
        train_backbone(synthetic, FEW, MINI, progress=False)


def test_scores_of_a_perfect_network(synthetic):
    class Knows(torch.nn.Module):
        "Answers the crops that it is shown with their truth."

        def __init__(self):
            super().__init__()
            self.weight, self.at = torch.nn.Parameter(torch.zeros(1)), 0

        def forward(self, images):
            crops = [augment_face(synthetic[self.at + k], still(FEW.crops, FEW.crops.side[0]), item_rng(0, self.at + k)) for k in range(len(images))]
            self.at += len(images)
            _, true = face_batch(crops)
            scores = torch.nn.functional.one_hot(true.labels.clamp(max=19), 20).movedim(-1, 1).float()
            return Predictions(scores, None, true.coords, None, None)

    assert crop_scores(Knows(), synthetic, FEW.crops, 19, batch=3) == {"nme": 0.0, "f1": 100.0}
