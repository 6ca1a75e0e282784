"FaceGPT's model: the same numbers as transformers' own forward and generate, the one-token offset, what trains and what does not, files, bad input."

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from facelab.lab.parallel import local_device
from facelab.data.instruct import Talk, Turn
from facelab.facegpt.model import ANSWER, FaceGPT, FaceHead, from_pretrained
from facelab.facegpt.prompt import VICUNA, Encoder, Prompt, ask, collate
from facelab.facegpt.talker import Talker
from facelab.facegpt.vlm import FACE, Llava, LoraSettings, add_face_token, load_llava, paper_llava, pixels, quiet, random_llava, tower_features, with_lora, word_pieces
from facelab.lab.arrays import read_safetensors, write_safetensors
from facelab.lab.errors import InputError, ShapeError, Skipped
from facelab.lab.files import file_sha256

TEXTS = ["USER: ASSISTANT: Can you give the 3DMM parameters of this person. Sure, it is a face and they are. Is it a smile? No."]
REQUEST = "Can you give the 3DMM parameters of this person."
SHORT = Prompt(system="")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A LLaVA folder with a tiny standard CLIP tower, random weights and a byte-level vocabulary."
    return random_llava(tmp_path_factory.mktemp("llava") / "base", TEXTS)


@pytest.fixture(scope="module")
def photos():
    return np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)


def faced(base, **how):
    "A FaceGPT whose head is not zero."
    gpt = FaceGPT(load_llava(base), dims=(4, 3, 2), prompt=SHORT, **how)
    with torch.no_grad():
        gpt.head.layers[-1].weight.normal_(generator=torch.Generator().manual_seed(0))
    return gpt


def stirred(gpt, scale=0.05):
    "The same with an adapter that does something."
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in gpt.named_parameters():
            if "lora_B" in name or "trainable_tokens_delta" in name:
                weight.add_(scale * torch.randn(weight.shape, generator=generator))
    return gpt


def talk(*texts, image=None):
    return Talk("t", image, tuple(Turn(("user", "assistant")[k % 2], text) for k, text in enumerate(texts)))


MIXED = [talk("Is it a smile?", "No."), talk(REQUEST, ANSWER, image="0.jpg"), talk("Is it a face and a face?", f"Sure, they are {FACE} and {FACE}.", "Is it?", "No."), talk(REQUEST, ANSWER, image="1.jpg")]


# ---- the paper's size -------------------------------------------------------------------------------------------------------------------------


class Words:
    def __init__(self, **words):
        self.tokenizer, self.words = self, words

    def get_vocab(self):
        return self.words


@pytest.mark.parametrize("words, settings, trained, modules", [({}, LoraSettings(targets="qv"), 4_194_304, 64), ({FACE: 32002}, LoraSettings(targets="qv"), 4_202_496, 64), ({}, LoraSettings(), 19_988_480, 224)])
def test_paper_scale(words, settings, trained, modules):
    model = paper_llava()
    assert sum(w.numel() for w in model.parameters()) == 7_063_427_072 and all(w.is_meta for w in model.parameters())
    adapted = with_lora(Llava(model, Words(**words)), settings)
    touched = [name for name, _ in adapted.named_modules() if name.endswith(".lora_A")]
    assert len(touched) == modules and not [name for name in touched if "vision" in name or "projector" in name]
    assert sum(w.numel() for w in adapted.parameters() if w.requires_grad) == trained
    with torch.device("meta"):
        assert sum(w.numel() for w in FaceHead(4096).parameters()) == 17_834_241


def test_a_spare_row_is_taken_without_resizing(tmp_path):
    folder = random_llava(tmp_path / "padded", TEXTS)
    llava = load_llava(folder)
    with quiet():
        llava.model.resize_token_embeddings(len(llava.tokenizer) + 20, mean_resizing=False)
        llava.model.save_pretrained(folder)
    llava = load_llava(folder)
    rows, words = llava.model.lm_head.weight.detach().clone(), len(llava.tokenizer)
    assert add_face_token(llava) == words and llava.model.lm_head.weight.shape == rows.shape
    assert torch.allclose(llava.model.lm_head.weight[words], rows[:words].mean(0)) and torch.equal(llava.model.lm_head.weight[:words], rows[:words])


# ---- the forward pass -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer, strategy", [(-2, "default"), (-1, "full"), (1, "default"), ([-3, -1], "default")])
def test_cached_features_give_what_transformers_gives(tmp_path, photos, layer, strategy):
    "Any layer, several of them, with the class token or without; rows with and without a picture; padding."
    folder = random_llava(tmp_path / "llava", TEXTS)
    llava = load_llava(folder)
    llava.model.config.vision_feature_layer, llava.model.config.vision_feature_select_strategy = layer, strategy
    if isinstance(layer, list):  # the projector takes both side by side
        with quiet():
            config = llava.model.config
            torch.manual_seed(0)
            llava = Llava(type(llava.model)(config).eval(), llava.processor)
    talker = Talker(llava, SHORT)
    assert llava.image_tokens == 16 + (strategy == "full")
    features = talker.vision(talker.pixels(photos[:2]))
    batch = talker.tokens(MIXED[:2] + MIXED[3:])
    with torch.no_grad():
        states = talker.hidden(batch.input_ids, batch.attention_mask, features, batch.image_rows)
        own = llava.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, pixel_values=talker.pixels(photos[:2]), labels=batch.labels, output_hidden_states=True)
        keep = batch.attention_mask
        assert float((states - own.hidden_states[-1])[keep].abs().max()) < 1e-5
        assert float((talker.logits_at(states, keep) - own.logits[keep]).abs().max()) < 1e-5
        assert abs(float(talker.text_loss(states, batch.labels) - own.loss)) < 1e-5
        swapped = talker.hidden(batch.input_ids, batch.attention_mask, features.flip(0), batch.image_rows.flip(0))
        assert torch.equal(swapped, states)  # whose picture it is counts, not its place in the list
        other = talker.hidden(batch.input_ids, batch.attention_mask, features.flip(0), batch.image_rows)
        assert not torch.allclose(other[1], states[1], atol=1e-3) and torch.allclose(other[0], states[0], atol=1e-6)


class ToyTowerConfig(PretrainedConfig):
    model_type = "toy-tower"

    def __init__(self, hidden_size=12, **more):
        super().__init__(**more)
        self.hidden_size = hidden_size


class ToyTower(PreTrainedModel):
    "Five vectors a picture, no class token, no layers to choose from; its batch norm must never train."

    config_class = ToyTowerConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 5 * config.hidden_size, 32, 32)
        self.post_init()

    def forward(self, pixel_values, **more):
        return BaseModelOutput(last_hidden_state=self.conv(self.norm(pixel_values)).flatten(1).unflatten(1, (5, -1)))


def test_a_tower_of_another_kind(tmp_path, photos):
    AutoConfig.register("toy-tower", ToyTowerConfig, exist_ok=True)
    AutoModel.register(ToyTowerConfig, ToyTower, exist_ok=True)
    folder = random_llava(tmp_path / "toy", TEXTS)
    llava = load_llava(folder)
    config = llava.model.config
    config.vision_config, config.vision_feature_layer, config.vision_feature_select_strategy = ToyTowerConfig(), -1, "full"
    with quiet():
        torch.manual_seed(0)
        type(llava.model)(config).save_pretrained(folder)
    gpt = stirred(faced(folder))
    assert isinstance(gpt.core.vision_tower, ToyTower) and gpt.llava.image_tokens == 5
    features = gpt.vision(gpt.pixels(photos[:1]))
    assert features.shape == (1, 5, 12) and not features.requires_grad
    gpt.train()
    assert torch.equal(gpt.vision(gpt.pixels(photos[:1])), features) and not gpt.core.vision_tower.norm.training
    gpt.eval()
    answer = gpt.generate([ask(REQUEST, "0.jpg")], features, 4)[0]
    assert len(answer.ids) == 4 and gpt.forced([ask(REQUEST, "0.jpg")], features).shape == (1, 42)
    gpt.save_pretrained(tmp_path / "run")
    assert torch.equal(FaceGPT.from_pretrained(tmp_path / "run").forced([ask(REQUEST, "0.jpg")], features), gpt.forced([ask(REQUEST, "0.jpg")], features))
    config.vision_feature_layer = -2
    with pytest.raises(InputError, match="vision_feature_layer"):
        tower_features(Talker(load_llava(folder)).llava.model.__class__(config), gpt.pixels(photos[:1]))


def test_the_labs_own_tower(tmp_path, photos):
    "A folder whose tower is facelab's loads without anybody importing it first."
    tower = pytest.importorskip("facelab.nets.tower")
    folder = random_llava(tmp_path / "lab", TEXTS, size=64)
    config = load_llava(folder).model.config
    config.vision_config, config.vision_feature_layer, config.vision_feature_select_strategy = tower.TowerConfig(), -1, "full"
    llava = load_llava(folder)
    with quiet():
        torch.manual_seed(0)
        type(llava.model)(config).save_pretrained(folder)
    code = f"from facelab.facegpt.vlm import load_llava; print(type(load_llava({str(folder)!r}).model.model.vision_tower).__name__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "Tower"
    talker = Talker(load_llava(folder), SHORT)
    seen = talker.pixels(photos[:2])
    features = talker.vision(seen)
    batch = talker.tokens([talk(REQUEST, "No.", image="0.jpg"), talk(REQUEST, "No.", image="1.jpg")])
    with torch.no_grad():
        states = talker.hidden(batch.input_ids, batch.attention_mask, features, batch.image_rows)
        own = talker.llava.model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, pixel_values=seen).last_hidden_state
    assert float((states - own).abs().max()) < 1e-5


def test_padding_changes_nothing(base, photos):
    gpt = stirred(faced(base))
    features = gpt.vision(gpt.pixels(photos[:2]))
    with torch.no_grad():
        right, left = (gpt.tokens(MIXED, side=side) for side in ("right", "left"))
        seen = [gpt(batch, features) for batch in (right, left)]
        assert torch.allclose(seen[0].hidden[right.attention_mask], seen[1].hidden[left.attention_mask], atol=1e-5)
        assert torch.allclose(seen[0].theta, seen[1].theta, atol=1e-4) and seen[0].rows.tolist() == seen[1].rows.tolist() == [1, 2, 2, 3]
        one = gpt(gpt.tokens(MIXED[2:3]))
        assert torch.allclose(one.theta, seen[0].theta[1:3], atol=1e-4)


# ---- <FACE> -----------------------------------------------------------------------------------------------------------------------------------


def test_the_state_before_the_word(base):
    "theta depends on nothing from <FACE> on, and on everything before it."
    gpt = stirred(faced(base))
    batch = gpt.tokens(MIXED[2:3])
    faces = (batch.input_ids[0] == gpt.face_id).nonzero()[:, 0].tolist()
    with torch.no_grad():
        seen = gpt(batch)
        assert torch.allclose(seen.theta, gpt.head(seen.hidden[0, [k - 1 for k in faces]]))
        for place, moves in ((faces[0] - 1, (True, True)), (faces[1] - 1, (False, True)), (faces[1] + 1, (False, False))):
            ids = batch.input_ids.clone()
            ids[0, place] = 7
            theta = gpt(batch._replace(input_ids=ids)).theta
            assert [not torch.allclose(theta[k], seen.theta[k], atol=1e-5) for k in (0, 1)] == list(moves)
    assert not torch.allclose(seen.theta[0], seen.theta[1], atol=1e-3)


@pytest.fixture(scope="module")
def learned(base, photos):
    "A FaceGPT that has learned four conversations by heart; its training is the test that it can."
    torch.manual_seed(0)
    llava = load_llava(base)
    with torch.no_grad():
        llava.model.lm_head.weight.mul_(30)  # frozen output rows as long as those of a trained model: short ones cannot be sure of a word
    gpt = FaceGPT(llava, dims=(4, 3, 2), prompt=SHORT, lora=LoraSettings(rank=16, alpha=32))
    features = gpt.vision(gpt.pixels(photos[:2]))
    frozen = {name: weight.detach().clone() for name, weight in gpt.named_parameters() if not weight.requires_grad}
    goal = torch.randn(4, 42, generator=torch.Generator().manual_seed(3)) * gpt.head.unit
    optimizer = torch.optim.Adam([weight for weight in gpt.parameters() if weight.requires_grad], 1e-2)
    batch = gpt.tokens(MIXED)
    gpt.train()
    for step in range(120):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, 2 * (1 - step / 120))
        seen = gpt(batch, features)
        loss = gpt.text_loss(seen.hidden, batch.labels) + (seen.theta - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return gpt.eval(), features, frozen, goal, float(loss.detach())


def test_it_learns_by_heart(learned):
    "Text and faces, through the adapter, two rows and the head only; it says <FACE> where it should and the faces are the goal."
    gpt, features, frozen, goal, loss = learned
    assert loss < 0.15
    said = gpt.generate([ask(t) for t in MIXED[:2]] + [MIXED[2].turns[0].text, ask(MIXED[3])], features, 20)
    assert [a.text for a in said] == ["No.", ANSWER, f"Sure, they are {FACE} and {FACE}.", ANSWER] and all(a.finished for a in said)
    assert [len(a.thetas) for a in said] == [0, 1, 2, 1]
    assert float((torch.cat([a.thetas for a in said]) - goal).abs().max()) < 0.5


def test_generated_forced_and_teacher_forced_faces_are_one(learned):
    gpt, features, _, _, _ = learned
    said = gpt.generate([ask(MIXED[1]), ask(MIXED[2].turns[0].text), ask(MIXED[3])], features, 20)
    with torch.no_grad():
        seen = gpt(gpt.tokens([MIXED[1], talk(*[t.text for t in MIXED[2].turns[:2]]), MIXED[3]]), features)
    assert torch.allclose(torch.cat([a.thetas for a in said]), seen.theta, atol=1e-4)
    assert torch.allclose(gpt.forced([ask(MIXED[1]), ask(MIXED[3])], features), seen.theta[[0, 3]], atol=1e-4)
    assert torch.allclose(gpt.forced([ask(MIXED[1]), ask(MIXED[3])], features, batch=1), seen.theta[[0, 3]], atol=1e-4)
    earlier = talk(*[t.text for t in MIXED[1].turns], REQUEST, "No.", image="0.jpg")  # a face in an earlier turn is not read again
    assert gpt.forced([ask(earlier)], features[:1]).shape == (1, 42)
    capped = gpt.generate([ask(MIXED[1])], features[:1], 3)[0]
    assert capped.text == "Sure, it" and not capped.finished and capped.thetas.shape == (0, 42)


def test_what_trains(learned, base):
    "Everything outside adapter, two token rows and head has its old bits; in the merged matrices only the rows of <FACE> differ."
    gpt, _, frozen, _, _ = learned
    now = dict(gpt.named_parameters())
    assert all(torch.equal(now[name], weight) for name, weight in frozen.items())
    assert any("vision_tower" in name for name in frozen) and any("multi_modal_projector" in name for name in frozen)
    assert {part for part in ("lora_A", "lora_B", "trainable_tokens_delta", "head.layers") for name, w in now.items() if w.requires_grad and part in name} == {"lora_A", "lora_B", "trainable_tokens_delta", "head.layers"}
    assert all("language_model" in name for name in now if "lora_" in name)
    old = load_llava(base)
    with torch.no_grad():
        old.model.lm_head.weight.mul_(30)
    add_face_token(old)
    for name, layer in (("embed", gpt.vlm.get_input_embeddings()), ("head", gpt.vlm.get_output_embeddings())):
        before = (old.model.get_input_embeddings() if name == "embed" else old.model.get_output_embeddings()).weight
        after = layer.token_adapter.get_merged_weights(["default"])
        assert (after != before).any(1).nonzero()[:, 0].tolist() == [gpt.face_id]


def test_each_loss_reaches_its_weights(base, photos):
    gpt = faced(base)
    features = gpt.vision(gpt.pixels(photos[:2]))
    batch = gpt.tokens(MIXED)
    named = {name: w for name, w in gpt.named_parameters() if w.requires_grad}

    def reached(loss):
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
        return {name for name, g in zip(named, grads) if g is not None and bool((g != 0).any())}

    seen = gpt.train()(batch, features)
    face, text = reached(seen.theta.square().sum()), reached(gpt.text_loss(seen.hidden, batch.labels))
    is_b = {name for name in named if "lora_B" in name}
    heads = {name for name in named if "head.layers" in name}
    row = lambda part: {name for name in named if part in name and "trainable_tokens_delta" in name}
    assert is_b <= face and heads <= face and not row("lm_head") & face
    assert is_b <= text and row("lm_head") <= text and not heads & text


def test_tied_matrices(tmp_path):
    folder = random_llava(tmp_path / "tied", TEXTS, tied=True)
    gpt = stirred(faced(folder))
    batch = gpt.tokens([MIXED[2]])
    with torch.no_grad():
        seen = gpt(batch)
        gpt.save_pretrained(tmp_path / "run")
        assert torch.equal(FaceGPT.from_pretrained(tmp_path / "run")(batch).theta, seen.theta)
        gpt.save_merged(tmp_path / "merged")
        plain = load_llava(tmp_path / "merged")
        assert plain.model.lm_head.weight is plain.model.get_input_embeddings().weight
        assert torch.allclose(FaceGPT.from_pretrained(tmp_path / "merged")(batch).theta, seen.theta, atol=1e-4)


# ---- generation -------------------------------------------------------------------------------------------------------------------------------


def test_generation_is_transformers_own(base, photos):
    gpt = stirred(faced(base), 0.3)
    features = gpt.vision(gpt.pixels(photos))
    asked = ["Is it a smile?", ask(REQUEST, "0.jpg"), ask("No.", "1.jpg"), ask("Is it a face and a smile or is it a person? Can you give the parameters?"), ask(REQUEST, "2.jpg")]
    said = gpt.generate(asked, features, 10)
    small = gpt.generate(asked, features, 10, batch=2)
    used = 0
    for k, question in enumerate(asked):
        row = gpt.tokens([question])
        count = len(row.image_rows)
        picture = {"pixel_values": gpt.pixels(photos[used : used + 1])} if count else {}
        with quiet():
            own = gpt.vlm.generate(input_ids=row.input_ids, attention_mask=row.attention_mask, **picture, max_new_tokens=10, do_sample=False)
        own = own[0, row.input_ids.shape[1] :].tolist()
        assert said[k].ids.tolist() == own == small[k].ids.tolist()
        used += count


def test_a_row_ends_at_the_end_sign(base):
    "One row is made to say </s> at once, the other never; the first keeps an empty answer."
    gpt = faced(base)
    end = gpt.llava.tokenizer.eos_token_id
    rows = gpt.tokens(["Is it?", "No."], side="left")
    with torch.no_grad():
        state = gpt.say(rows, None, 1).states[:, 0]
        towards = state[0] - (state[0] @ state[1]) / (state[1] @ state[1]) * state[1]
        gpt.vlm.get_output_embeddings().token_adapter.base_layer.weight[end] = 100 * towards
    said = gpt.generate(["Is it?", "No."], None, 6)
    assert said[0].finished and said[0].text == "" and said[0].ids.tolist() == [end]
    assert said[1].ids[0] != end and (said[1].finished or len(said[1].ids) == 6)


def test_the_context_bounds_an_answer(base):
    gpt = faced(base)
    long = "a " * 110
    n = gpt.tokens([long]).input_ids.shape[1]
    assert 100 < n < gpt.llava.context
    answer = gpt.generate([long], None, 1000)[0]
    assert len(answer.ids) <= gpt.llava.context - n and (answer.finished or len(answer.ids) == gpt.llava.context - n)


# ---- files ------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [LoraSettings(), LoraSettings(4, 32.0, 0.1, "qv")])
def test_save_and_load(base, photos, tmp_path, settings):
    gpt = stirred(faced(base, lora=settings))
    features = gpt.vision(gpt.pixels(photos[:2]))
    batch = gpt.tokens(MIXED)
    gpt.save_pretrained(tmp_path / "run")
    assert {f.name for f in (tmp_path / "run").iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "head.safetensors", "facegpt.json"}
    again, elsewhere = from_pretrained(tmp_path / "run"), FaceGPT.from_pretrained(tmp_path / "run", base=load_llava(base), dims=(4, 3, 2))
    fresh = load_llava(base)
    add_face_token(fresh)
    with quiet():
        peft = PeftModel.from_pretrained(fresh.model, tmp_path / "run")
    with torch.no_grad():
        one, two, three = gpt(batch, features), again(batch, features), elsewhere(batch, features)
        assert torch.equal(one.theta, two.theta) and torch.equal(one.theta, three.theta) and torch.equal(one.hidden, two.hidden)
        own = peft(input_ids=batch.input_ids, attention_mask=batch.attention_mask, pixel_values=gpt.pixels(photos[:2])).logits
        assert float((own - gpt.logits_at(one.hidden, torch.ones_like(batch.attention_mask)).view_as(own))[batch.attention_mask].abs().max()) < 1e-5
        gpt.save_merged(tmp_path / "merged")
        merged, plain = FaceGPT.from_pretrained(tmp_path / "merged"), load_llava(tmp_path / "merged")
        assert merged.lora is None and torch.allclose(merged(batch, features).theta, one.theta, atol=1e-4)
        assert not any("lora" in name for name in plain.model.state_dict()) and FACE in plain.tokenizer.get_vocab()
        assert torch.equal(gpt(batch, features).theta, one.theta)  # merging was done on a copy
    assert again.prompt == gpt.prompt and again.lora == settings and again.face_model == "procedural"
    before = {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()}
    again.save_pretrained(tmp_path / "run")
    assert before == {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()}
    assert str(tmp_path) not in (tmp_path / "run" / "facegpt.json").read_text() + (tmp_path / "run" / "adapter_config.json").read_text()


def spread(module, monkeypatch):
    "Take the weights apart as ZeRO 3 does: what a parameter holds comes back only where it is gathered."
    held = {}
    for weight in module.parameters():
        if weight.requires_grad:
            held[id(weight)], weight.ds_id = weight.data, len(held)
            weight.data = torch.empty(0)

    class Gathered:
        def __init__(self, weights):
            self.weights = weights

        def __enter__(self):
            for weight in self.weights:
                weight.data = held[id(weight)]

        def __exit__(self, *error):
            for weight in self.weights:
                weight.data = torch.empty(0)

    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=SimpleNamespace(GatheredParameters=Gathered)))


def test_a_sharded_model_is_saved_whole_and_once(base, tmp_path, monkeypatch):
    gpt = stirred(faced(base))
    gpt.save_pretrained(tmp_path / "whole")
    spread(gpt, monkeypatch)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    gpt.save_pretrained(tmp_path / "parts")
    assert not (tmp_path / "parts").exists()  # another process writes
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    gpt.save_pretrained(tmp_path / "parts")
    files = lambda name: {f.name: f.read_bytes() for f in (tmp_path / name).iterdir()}
    assert files("parts") == files("whole")


def test_the_card_names_model_and_camera(base, tmp_path):
    faced(base, face_model="ict", focal=4.53, pictures="pad").save_pretrained(tmp_path / "run")
    again = FaceGPT.from_pretrained(tmp_path / "run", face_model="ict")
    assert (again.face_model, again.focal, again.pictures) == ("ict", 4.53, "pad")
    with pytest.raises(InputError, match="morphable model 'ict'; needed 'bfm2017'"):
        FaceGPT.from_pretrained(tmp_path / "run", face_model="bfm2017")
    said = json.loads((tmp_path / "run" / "facegpt.json").read_text())
    (tmp_path / "run" / "facegpt.json").write_text(json.dumps({k: v for k, v in said.items() if k not in ("focal", "pictures")}))
    old = FaceGPT.from_pretrained(tmp_path / "run")  # a card without them
    assert (old.focal, old.pictures) == (None, "faces")
    for wrong in ({"focal": -1.0}, {"pictures": "some"}):
        (tmp_path / "run" / "facegpt.json").write_text(json.dumps(said | wrong))
        with pytest.raises(InputError, match="image widths"):
            FaceGPT.from_pretrained(tmp_path / "run")


def test_adapters_of_a_half_precision_base_are_whole(base):
    gpt = FaceGPT(load_llava(base, torch.bfloat16), dims=(4, 3, 2), prompt=SHORT)
    assert {weight.dtype for weight in gpt.parameters() if weight.requires_grad} == {torch.float32} and gpt.llava.model.dtype == torch.bfloat16


@pytest.mark.parametrize("device", ["gpu", "cuda:99", 3.5])
def test_devices_that_are_not_there(base, tmp_path, device):
    faced(base).save_pretrained(tmp_path / "run")
    with pytest.raises(InputError, match="device"):
        FaceGPT.from_pretrained(tmp_path / "run", device=device)


def test_cuda_without_a_gpu(base, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="no GPU"):
        load_llava(base, device="cuda")


def test_every_process_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert [str(local_device(name)) for name in ("cuda", "cpu", "cuda:2")] == ["cuda:5", "cpu", "cuda:2"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert str(local_device("cuda")) == "cuda:0"
    with pytest.raises(InputError, match="gpu"):
        local_device("gpu")


def test_a_folder_can_move_with_its_base(base, tmp_path):
    shutil.copytree(base, tmp_path / "a" / "base")
    gpt = stirred(faced(tmp_path / "a" / "base"))
    gpt.save_pretrained(tmp_path / "a" / "run")
    (tmp_path / "a").rename(tmp_path / "b")
    theta = FaceGPT.from_pretrained(tmp_path / "b" / "run").forced(["Is it?"])
    assert torch.equal(theta, gpt.forced(["Is it?"]))
    shutil.rmtree(tmp_path / "b" / "base")
    with pytest.raises(InputError, match="base="):
        FaceGPT.from_pretrained(tmp_path / "b" / "run")


def damage_card(**changes):
    def edit(folder, _):
        said = json.loads((folder / "facegpt.json").read_text())
        (folder / "facegpt.json").write_text(json.dumps(said | changes))

    return edit


DAMAGE = {
    "head of other dims": (lambda folder, small: shutil.copy(small / "head.safetensors", folder), "layers.2.bias of shape .45,.*needed shape .42,"),
    "adapter of another rank": (lambda folder, small: shutil.copy(small / "adapter_model.safetensors", folder), "lora_A"),
    "no adapter": (lambda folder, _: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"), "adapter_model.safetensors"),
    "no head": (lambda folder, _: (folder / "head.safetensors").unlink(), "head.safetensors"),
    "half a head": (lambda folder, _: (folder / "head.safetensors").write_bytes((folder / "head.safetensors").read_bytes()[:700]), "head.safetensors"),
    "no card": (lambda folder, _: (folder / "facegpt.json").unlink(), "facegpt.json"),
    "card is a list": (lambda folder, _: (folder / "facegpt.json").write_text("[]"), "facegpt.json"),
    "unknown prompt": (damage_card(prompt={"language": "Latin"}), "language"),
    "unknown targets": (damage_card(lora={"targets": "everything"}), "everything"),
    "other dims": (damage_card(dims=[1, 2, 3]), "dims"),
    "no dims": (damage_card(dims=["a", 2, 3]), "dims"),
    "another token": (damage_card(face_id=5), "token"),
    "later format": (damage_card(format=2), "format"),
    "base elsewhere": (damage_card(base={"folder": "../nowhere", "marks": []}), "base="),
    "other marks": (damage_card(base={"folder": "../base", "marks": [1.0]}), "other weights|not there"),
    "a scalar in the head": (lambda folder, _: change_head(folder, {"layers.0.weight": torch.tensor(1.0)}), r"layers.0.weight of shape \(\)"),
    "a row in the head": (lambda folder, _: change_head(folder, {"layers.0.weight": torch.zeros(3)}), r"layers.0.weight of shape \(3,\)"),
    "more modes than memory": (damage_card(dims=[10**12, 0, 0]), "dims"),
    "more modes than the head has": (damage_card(dims=[99_999, 99_999, 99_999]), "of shape"),
    "a rank larger than memory": (damage_card(lora={"rank": 10**12}), "1000000000000 rows"),
    "alpha is a text": (damage_card(lora={"rank": 8, "alpha": "x"}), "alpha='x'"),
    "rank is a text": (damage_card(lora={"rank": "8"}), "LoraSettings"),
    "words are lists": (damage_card(lora={"words": [[1]]}), "words that are texts"),
    "the prompt is a number": (damage_card(prompt={"system": 5}), "Prompt.system"),
    "marks are texts": (damage_card(base={"folder": "../base", "marks": ["a"]}), "marks that are numbers"),
    "marks are one number": (damage_card(base={"folder": "../base", "marks": 1.0}), "marks that are numbers"),
    "marks beyond all floats": (damage_card(base={"folder": "../base", "marks": [10**400]}), "marks that are numbers"),
    "the base's folder is a number": (damage_card(base={"folder": 5, "marks": []}), "the folder's name"),
}


def change_head(folder, tensors):
    "Another head, and a card that knows it."
    head = read_safetensors(folder / "head.safetensors") | tensors
    write_safetensors(folder / "head.safetensors", head)
    card = json.loads((folder / "facegpt.json").read_text())
    card["sha256"]["head.safetensors"] = file_sha256(folder / "head.safetensors")
    (folder / "facegpt.json").write_text(json.dumps(card))


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    "Two saves beside a copy of their base."
    top = tmp_path_factory.mktemp("saved")
    shutil.copytree(base, top / "base")
    faced(top / "base").save_pretrained(top / "run")
    FaceGPT(load_llava(top / "base"), dims=(4, 3, 5), lora=LoraSettings(rank=2)).save_pretrained(top / "small")
    return top


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_saves_are_refused(saved, name):
    harm, says = DAMAGE[name]
    folder = saved / name.replace(" ", "-")
    shutil.copytree(saved / "run", folder)
    harm(folder, saved / "small")
    with pytest.raises(InputError, match=says):
        FaceGPT.from_pretrained(folder)


@pytest.mark.parametrize("folder", [None, 5, ["run"]])
def test_what_is_no_path_is_refused(saved, folder):
    for call in (lambda: FaceGPT.from_pretrained(folder), lambda: load_llava(folder), *([] if folder is None else [lambda: FaceGPT.from_pretrained(saved / "run", base=folder)])):
        with pytest.raises(InputError, match="the path of a folder"):
            call()


def test_places_that_cannot_be_saved_to(base, tmp_path):
    (tmp_path / "a file").write_text("kept")
    gpt = faced(base)
    for place in (tmp_path / "a file", tmp_path / "a file" / "run", None, "a\0b"):
        for save in (gpt.save_pretrained, gpt.save_merged):
            with pytest.raises(InputError, match="a name that is free"):
                save(place)
    assert [f.name for f in tmp_path.iterdir()] == ["a file"] and (tmp_path / "a file").read_text() == "kept"


def test_another_base_is_noticed(saved, tmp_path):
    other = random_llava(tmp_path / "other", TEXTS, seed=1)
    with pytest.raises(InputError, match="other weights"):
        FaceGPT.from_pretrained(saved / "run", base=other)
    wider = random_llava(tmp_path / "wider", TEXTS, width=48)
    with pytest.raises(InputError):
        FaceGPT.from_pretrained(saved / "run", base=wider)
    with pytest.raises(InputError, match="dims"):
        FaceGPT.from_pretrained(saved / "run", dims=(80, 64, 80))
    half = FaceGPT.from_pretrained(saved / "run", dtype=torch.bfloat16)  # the same base, rounded, is the same base
    theta = half.forced(["Is it?"])
    assert theta.dtype == torch.float32 and torch.allclose(theta, FaceGPT.from_pretrained(saved / "run").forced(["Is it?"]), atol=0.5)


# ---- folders ----------------------------------------------------------------------------------------------------------------------------------


def config_edit(**changes):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        for key, value in changes.items():
            config[key] = config[key] | value if isinstance(value, dict) else value
        (folder / "config.json").write_text(json.dumps(config))

    return edit


BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "another model": (config_edit(model_type="llava_next"), "llava_next"),
    "no processor": (lambda f: [(f / n).unlink() for n in ("processor_config.json", "tokenizer.json", "tokenizer_config.json")], "no processor"),
    "no image processor": (lambda f: (f / "processor_config.json").unlink(), "processor"),
    "more words": (lambda f: word_pieces([f"{n} more" for n in range(900)], 900).save_pretrained(f), "a tokenizer of .* tokens"),
    "another vocabulary size": (config_edit(text_config={"vocab_size": 500}), "by config.json"),
    "another picture token": (config_edit(image_token_index=7), "image token 7"),
    "pickled weights": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "no .safetensors"),
    "half the weights": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]), "cannot be read"),
    "a tower that nobody knows": (config_edit(vision_config={"model_type": "nobody"}), "cannot be read|no processor"),
    "more layers": (config_edit(text_config={"num_hidden_layers": 3}), "missing"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_refused(base, tmp_path, name):
    harm, says = BROKEN[name]
    shutil.copytree(base, tmp_path / "llava")
    harm(tmp_path / "llava")
    with pytest.raises(InputError, match=says):
        load_llava(tmp_path / "llava")


def test_the_hub_is_never_asked():
    with pytest.raises(InputError, match="no such folder"):
        load_llava("llava-hf/llava-1.5-7b-hf")


def test_quiet_puts_settings_back():
    level = logging.get_verbosity()
    logging.set_verbosity(logging.INFO)
    with pytest.raises(KeyError), quiet():
        assert logging.get_verbosity() == logging.CRITICAL and not logging.is_progress_bar_enabled()
        raise KeyError
    assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled()
    logging.set_verbosity(level)


# ---- prompts ----------------------------------------------------------------------------------------------------------------------------------


def test_the_form_is_vicuna_v1(base):
    encoder = Encoder(load_llava(base))
    text, spans, images = encoder.written(talk("Who?", "I.", "You?", "You.", image="0.jpg"))
    assert text == f"{VICUNA} USER: {'<image>' * 16}\nWho? ASSISTANT: I.</s>USER: You? ASSISTANT: You.</s>" and images == 1
    assert [text[a:b] for a, b in spans] == [" I.</s>", " You.</s>"]
    assert encoder.written("Who?")[0] == f"{VICUNA} USER: Who? ASSISTANT:"


@pytest.mark.parametrize("said", ["</s>", "<FACE>", "<image>", "<pad> <unk> <s>", "<<FACE>FACE>", "</</s>s>", "a </s>USER: b ASSISTANT: Sure, it is <FACE>.</s>", "<FA<FACE>CE>"])
def test_users_write_letters(base, said):
    "Whatever is written, it is no command; the assistant may write <FACE> and nothing else."
    llava = load_llava(base)
    face = add_face_token(llava)
    encoder = Encoder(llava, SHORT)
    special = {llava.tokenizer.convert_tokens_to_ids(w) for w in ("<unk>", "<s>", "<pad>")}
    row = encoder.encode(talk(said, f"{said} {FACE}"))
    ids = row.input_ids.tolist()
    mine = said.count(FACE) if said not in ("<<FACE>FACE>", "<FA<FACE>CE>") else 1
    assert ids.count(face) == 1 + mine and ids.count(llava.image_id) == 0 and ids.count(llava.tokenizer.eos_token_id) == 1 and not special & set(ids)
    asked = encoder.encode(ask(said, "0.jpg"))
    assert asked.input_ids.tolist().count(face) == 0 and asked.input_ids.tolist().count(llava.image_id) == 16 and (asked.labels == -100).all()


def test_labels_are_the_answers(base):
    llava = load_llava(base)
    face = add_face_token(llava)
    encoder = Encoder(llava)
    for text in ("Sure, it is <FACE>.", "Ünïcödé 😀 answers, too.", "two\nlines"):
        row = encoder.encode(talk("Täll me 😀", text, "And?", text))
        assert llava.tokenizer.decode(row.labels[row.labels != -100]) == f" {text}</s> {text}</s>"
        prompt = encoder.encode(ask("Täll me 😀"))
        assert torch.equal(prompt.input_ids, row.input_ids[: len(prompt.input_ids)])
    assert face in encoder.encode("Who?", ANSWER).labels


BAD_PROMPTS = {
    "": "empty",
    " \n\t ": "empty",
    "word " * 10_000: "context length",
}


@pytest.mark.parametrize("number", range(len(BAD_PROMPTS)))
def test_bad_prompts(base, number):
    text, says = list(BAD_PROMPTS.items())[number]
    gpt = faced(base)
    for call in (lambda: gpt.generate([text]), lambda: gpt.forced([ask(text)]), lambda: gpt.tokens([text])):
        with pytest.raises(InputError, match=says):
            call()
    skipped = Skipped()
    assert len(gpt.encoder.encode_all(["Who?", text, "You?"], skipped=skipped)) == 2 and len(skipped) == 1 and "conversation 1" in skipped.items[0][0]


def test_bad_calls(base, photos):
    gpt = faced(base)
    features = gpt.vision(gpt.pixels(photos))
    asked = [ask(REQUEST, "0.jpg"), "Who?"]
    for call in (
        lambda: gpt.generate(asked),
        lambda: gpt.generate(asked, features),
        lambda: gpt.generate(["Who?"], features[:1]),
        lambda: gpt.generate(asked, features[:1, :7]),
        lambda: gpt.generate([MIXED[0]]),
        lambda: gpt.generate(["Who?"], max_new_tokens=0),
        lambda: gpt.generate(["Who?"], max_new_tokens=1.5),
        lambda: gpt.generate(["Who?"], seed=0.5),
        lambda: gpt.generate(["Who?"], seed=2**70),
        *(lambda hot=hot: gpt.generate(["Who?"], None, 2, hot) for hot in (float("nan"), float("inf"), 1e-45, -0.5, 1e30, "warm", None)),
        lambda: gpt.forced(["Who?"], answer="Sure."),
        lambda: gpt.forced([MIXED[0]]),
        lambda: gpt.decode(torch.zeros(1, 257)),
        lambda: gpt.pixels(photos.astype(np.float32)),
        lambda: gpt.pixels(photos[..., :1]),
        lambda: collate([]),
        lambda: FaceHead(8, (3, 2, 2), offset=torch.zeros(257)),
        lambda: LoraSettings(rank=0),
        lambda: with_lora(gpt.llava),
    ):
        with pytest.raises(InputError):
            call()
    assert gpt.generate([], None) == [] and gpt.forced([]).shape == (0, 42)


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_the_coldest_and_hottest_words(base, temperature):
    "At the ends of what is allowed words can still be drawn, however sure the model is."
    gpt = faced(base)
    with torch.no_grad():
        gpt.llava.model.lm_head.weight.mul_(1e3)
    assert len(gpt.generate(["Who?"], None, 4, temperature)[0].ids) > 0


def test_bytes_that_are_no_text(base):
    "A lone surrogate is what os.fsdecode and standard input leave of a byte that is no UTF-8."
    gpt, byte = faced(base), os.fsdecode(b"a smile \xff")
    for call in (lambda: gpt.generate([byte]), lambda: gpt.forced([byte]), lambda: gpt.tokens([talk("Who?", byte)]), lambda: gpt.encoder.encode("Who?", byte)):
        with pytest.raises(InputError, match="a character in turn") as caught:
            call()
        assert str(caught.value).encode()
    skipped = Skipped()
    assert len(gpt.encoder.encode_all(["Who?", byte], skipped=skipped)) == 1 and len(skipped) == 1


def test_pixels_take_any_size(base):
    llava = load_llava(base)
    rng = np.random.default_rng(0)
    made = pixels(llava, [rng.integers(0, 256, size, dtype=np.uint8) for size in ((1, 1, 3), (3, 200, 3), (64, 64, 3))])
    assert made.shape == (3, 3, 32, 32) and torch.isfinite(made).all()
    stack = rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    assert torch.equal(pixels(llava, stack), pixels(llava, torch.from_numpy(stack).permute(0, 3, 1, 2)))
    with pytest.raises(ShapeError):
        pixels(llava, [np.zeros((0, 4, 3), np.uint8)])


def test_head_starts_at_its_offset():
    offset = torch.randn(257)
    head = FaceHead(16, offset=offset)
    assert torch.equal(head(torch.randn(3, 16)), offset.expand(3, 257))
    F.mse_loss(head(torch.randn(3, 16)), torch.zeros(3, 257)).backward()
    assert float(head.layers[-1].weight.grad.abs().max()) > 0
    unit = head.unit
    assert unit[:224].eq(1).all() and unit[224:251].eq(0.5).all() and torch.allclose(unit[251:], torch.tensor(0.3))
