"FaceGPT's stages with the paper profile's own parameters, on stand-ins of the files that it names: CelebA-HQ as it comes, BFM 2017, ArcFace, LLaVA-1.5, LLaVA's instructions."

import os
import sys
from collections import Counter
from types import ModuleType, SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from accelerate.utils import DistributedType
from make_models import write_bfm2017

import facelab.lab.run as lab_run
import facelab.lab.train as lab_train
from facelab.data.find_faces import FaceBox, FoundFace
from facelab.data.instruct import Talk, Turn, read_instructions, write_instructions
from facelab.face.coarse import coarse
from facelab.face.morphable import MorphableModel, face_model
from facelab.facegpt import dataset, face_tables, learn
from facelab.facegpt.picture import training_landmarks
from facelab.facegpt.use import FaceGPT
from facelab.facegpt.vlm import random_llava
from facelab.facegpt.wordings import QUESTIONS
from facelab.lab.arrays import read_safetensors
from facelab.lab.errors import InputError
from facelab.lab.files import read_json
from facelab.lab.profile import profile_values
from facelab.lab.run import Job
from facelab.nets import embedder
from facelab.nets.embedder import untrained_embedder

SPLITS = {"train": (1, 2, 3), "val": (162771,), "test": (182638, 182639)}  # CelebA's numbers


def celeba_hq(folder):
    "Six pictures in CelebAMask-HQ's layout: no landmarks, no partition, only the list of original numbers. Each is skin all over, and in one of train nobody is."
    (folder / "CelebA-HQ-img").mkdir(parents=True)
    rng, lines = np.random.default_rng(0), ["        idx    orig_idx   orig_file"]
    for k, number in enumerate(n for part in SPLITS.values() for n in part):
        picture = np.clip(rng.normal((200, 150, 125), 6, (96, 96, 3)), 0, 255).astype(np.uint8) if k != 2 else np.full((96, 96, 3), 7, np.uint8)
        Image.fromarray(picture).save(folder / "CelebA-HQ-img" / f"{k}.jpg")
        lines.append(f"{k:<11d} {number - 1:<11d} {number:06d}.jpg")
    (folder / "CelebA-HQ-to-CelebA-mapping.txt").write_text("\n".join(lines) + "\n")
    return folder


def face_alignment():
    "The package's face, for this test: the mean face's points, in the box that it is given."
    made = ModuleType("face_alignment")
    made.LandmarksType = SimpleNamespace(TWO_D="2d", TWO_HALF_D="2.5d")

    class FaceAlignment:
        calls = []

        def __init__(self, landmarks_type, device="cpu", flip_input=False, compile=True):
            assert (landmarks_type, device, compile) == ("2.5d", "cpu", False)

        def get_landmarks_from_image(self, image, detected_faces):
            self.calls.append(image.shape)
            left, top, right, bottom = detected_faces[0]
            return [training_landmarks().numpy() * (right - left, bottom - top) + (left, top)]

    made.FaceAlignment = FaceAlignment
    return made


@pytest.fixture(scope="module")
def bfm(tmp_path_factory):
    "A head in BFM 2017's file, which knows named points but not the 68."
    path = write_bfm2017(coarse(MorphableModel.procedural(), 600), tmp_path_factory.mktemp("bfm") / "model2017-1_bfm_nomouth.h5")
    with h5py.File(path) as file:
        assert list(file["metadata"]) == ["landmarks"]
    with pytest.MonkeyPatch.context() as inside:
        inside.setattr(MorphableModel, "from_bfm2017", lambda real=MorphableModel.from_bfm2017: real(path))
        return face_model("bfm2017")


@pytest.fixture
def paper(tmp_path, monkeypatch, bfm):
    "job(stage, **changes): the paper profile's job, its files stood in for and its sizes small."
    monkeypatch.setattr(lab_run, "build_dir", lambda *parts: (folder := tmp_path.joinpath("build", *parts)).mkdir(parents=True, exist_ok=True) or folder)
    monkeypatch.setattr(lab_run, "home", lambda profile: ())
    monkeypatch.setitem(sys.modules, "face_alignment", face_alignment())
    dataset.outline_finder.cache_clear()
    whole = lambda image, detector=None, **how: [] if image.std() < 1 else [FoundFace(FaceBox(8.0, 8.0, 80.0, 80.0, 1.0), dataset_points(image, detector), 1.0)]
    dataset_points = lambda image, detector: detector.landmarks(torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255)[0].numpy()
    monkeypatch.setattr(dataset, "faces_of", whole)
    torch.save(untrained_embedder().net.state_dict(), tmp_path / "backbone.pth")
    monkeypatch.setattr(embedder, "find_asset", lambda name: tmp_path / "backbone.pth")
    for module in (learn, face_tables):
        monkeypatch.setattr(module, "face_model", lambda name: {"bfm2017": bfm, "procedural": MorphableModel.procedural()}[name])
        monkeypatch.setattr(module, "model_inputs", lambda name: {f"asset:{name}": "0"})
    (tmp_path / "coco").mkdir()
    Image.fromarray(np.full((20, 60, 3), 250, np.uint8)).save(tmp_path / "coco" / "wide.png")
    say = (Turn("user", "What is this?"), Turn("assistant", "White."))
    write_instructions(tmp_path / "mix.json", [Talk("1", "wide.png", say), Talk("2", None, say)])
    llava, hq = str(random_llava(tmp_path / "llava", size=64, patch=16, context=2048)), str(celeba_hq(tmp_path / "hq"))
    at = lambda path: str(tmp_path / path)
    files = {
        "faces": hq, "data": hq, "llava": llava, "describer": llava, "instruct": at("mix.json"), "instruct_images": at("coco"), "talks": at("build/checkpoints/facegpt-data/talks.json"),
        "baselines": at("build/checkpoints/facegpt-baselines"), "trained": at("build/checkpoints/facegpt-train"), "teacher": at("build/checkpoints/facegpt-baselines/specialised"),
    }  # fmt: skip
    small = {"device": "cpu", "size": 64, "pixels": 64, "steps": 1, "key_steps": 1, "batch": 2, "refine_steps": 1, "fit_steps": 1}

    def job(stage, **changes):
        values = profile_values(stage, "paper")
        values |= {key: value for key, value in (files | small).items() if key in values and not (stage == "facegpt-data" and key == "talks")} | changes
        if values["landmarks"].startswith("build/"):
            values["landmarks"] = at(values["landmarks"])
        return Job(stage, "paper", values)

    return job


def test_the_papers_stages_one_after_another(paper, tmp_path, monkeypatch):
    questions = {text for texts in QUESTIONS.values() for text in texts}
    made = dataset.run(paper("facegpt-data"))
    held = tmp_path / "build" / "checkpoints" / "facegpt-data"
    assert sorted(p.stem for p in (held / "landmarks").rglob("*.pts")) == ["0", "1", "4", "5"]  # of train and of test; 2 has no face
    assert "landmarks found in 4 of 5 photos of the splits train and test" in made.notes and any("2.jpg" in note for note in made.notes)
    assert {talk.image or talk.targets[0] for talk in read_instructions(held / "talks.json")} == {"CelebA-HQ-img/0.jpg", "CelebA-HQ-img/1.jpg"}

    talks = list(read_instructions(held / "talks.json"))
    assert {row.data: row.value for row in made.rows if row.metric == "count"} == Counter(talk.kind for talk in talks)
    conversations = [talk for talk in talks if talk.kind == "face_conversation"]  # one a photo, of two to four questions, answered in words
    assert sorted(talk.image for talk in conversations) == ["CelebA-HQ-img/0.jpg", "CelebA-HQ-img/1.jpg"] and all(2 <= len(talk.turns) // 2 <= 4 and not talk.targets for talk in conversations)
    assert all(turn.text in questions for talk in conversations for turn in talk.turns[::2]) and not any("<FACE>" in turn.text for talk in conversations for turn in talk.turns)

    have = learn.given(paper("facegpt-train"))
    assert have.photos.names == ["CelebA-HQ-img/0.jpg", "CelebA-HQ-img/1.jpg", "wide.png"]
    assert have.photos.landmarks_2d[:2].any() and tuple(have.photos.images[2, :, 0, 0].tolist()) == (122, 116, 104)  # padded
    with monkeypatch.context() as inside:
        inside.setattr(learn, "embed_faces", lambda net, images, points: next(net.parameters()).device)
        assert have.embed(torch.zeros(1, 3, 8, 8, device="meta"), None).type == "meta"  # the network follows the pictures
    base = have.base()
    assert base.model.dtype == torch.bfloat16 and have.recipe.gradient_checkpointing and have.recipe.precision == "bf16"

    under_zero(monkeypatch)
    learn.run_baselines(paper("facegpt-baselines"))
    learn.run_train(paper("facegpt-train"))
    trained = tmp_path / "build" / "checkpoints" / "facegpt-train"
    card = read_json(trained / "facegpt" / "facegpt.json")
    assert (card["face_model"], card["focal"], card["pictures"]) == ("bfm2017", None, "pad")
    assert all(value.dtype == torch.float32 for value in read_safetensors(trained / "facegpt" / "adapter_model.safetensors").values())  # a step of 2e-5 is nothing to bf16
    assert FaceGPT.from_pretrained(trained / "facegpt").dims == (80, 64, 80)

    image = face_tables.run_image(paper("facegpt-image"))
    assert not image.not_run and "asset:bfm2017" in image.inputs and {row.n for row in image.rows} == {2}
    text = face_tables.run_text(paper("facegpt-text"))
    ours = {row.metric for row in text.rows if row.method == "FaceGPT"}
    assert ours == {"expression L2", "shape L2", "photo error", "keypoint error"} and any("fits of Eq. 5" in note for note in text.notes)
    for run, stage in ((face_tables.run_text, "facegpt-text"), (face_tables.run_image, "facegpt-image")):  # 80, 64 and 80 numbers of another head
        with pytest.raises(InputError, match="morphable model 'bfm2017'"):
            run(paper(stage, data="data/celeba", count=2, face_model="procedural", describer=""))
        with pytest.raises(InputError, match="orthographic camera; needed a camera of 4.53"):
            run(paper(stage, focal=4.53))


def under_zero(monkeypatch):
    "As `accelerate launch` with zero2.yaml, as far as checkpoints are concerned."
    plain, refuse = lab_train.make_accelerator, lab_train.refuse_under_zero
    zero = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=2)))

    def make(*how):
        with monkeypatch.context() as inside:
            inside.delenv("ACCELERATE_USE_DEEPSPEED")
            return plain(*how)

    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(lab_train, "make_accelerator", make)
    monkeypatch.setattr(lab_train, "refuse_under_zero", lambda config, scratch, accelerator: refuse(config, scratch, zero))


def test_landmarks_that_were_found_are_not_sought_again(paper, monkeypatch):
    calls = sys.modules["face_alignment"].FaceAlignment.calls
    described = dataset.described_set
    monkeypatch.setattr(dataset, "described_set", lambda *how: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        dataset.run(paper("facegpt-data"))
    looked = len(calls)
    monkeypatch.setattr(dataset, "described_set", described)
    dataset.run(paper("facegpt-data"))
    assert looked == len(calls) == 4


def test_landmarks_of_the_user(paper, tmp_path):
    with pytest.raises(InputError, match="nothing there"):
        learn.given(paper("facegpt-train", landmarks=str(tmp_path / "mine"), talks=str(tmp_path / "mix.json")))
    with pytest.raises(InputError, match="landmarks"):
        learn.given(paper("facegpt-train", landmarks=str(tmp_path / "mix.json"), talks=str(tmp_path / "mix.json")))
    from facelab.data.w300 import write_pts

    for k in (0, 1):
        write_pts(tmp_path / "mine" / f"{k}.pts", training_landmarks().numpy() * 96)
    have = learn.given(paper("facegpt-train", landmarks=str(tmp_path / "mine"), talks=str(tmp_path / "mix.json"), instruct=""))
    assert len(have.photos) == 2 and torch.allclose(have.photos.landmarks_2d[0], training_landmarks() * 64, atol=0.01)


def test_face_alignment_says_how_to_bring_it(paper, monkeypatch):
    monkeypatch.setitem(sys.modules, "face_alignment", None)
    with pytest.raises(InputError, match="pip install face-alignment"):
        dataset.run(paper("facegpt-data"))
