"""What is trained on a GPU: every loss takes its batch there, its data from the CPU, and the network comes back. The GPU is a pretended one (fake_gpu.py).

Another training joins by name: a line in TRAININGS, with the module whose `train` it calls and a call that takes the device."""

import importlib

import numpy as np
import pandas as pd
import pytest
import torch
from fake_gpu import fake_gpu, on_gpu, send
from torch import nn

from facelab.gptface.decode import fill_region, fill_tags
from facelab.gptface.edit_scores import train_attributes
from facelab.gptface.few_shot import HeadTraining, gptface_features, rival_features, train_heads
from facelab.gptface.guidance import Guidance
from facelab.gptface.guidance_toy import ToyTraining, train_toy
from facelab.gptface.head_tables import masked_codes, masked_words
from facelab.gptface.model import GPTFaceConfig, build_gptface
from facelab.gptface.pairs import encode_images, encoder_of
from facelab.gptface.pretrain import Pretraining, TokenSet, held_out, pair_stream, pretrain
from facelab.gptface.regions import ParserTraining, part_overlap, train_parser
from facelab.gptface.rivals import RIVALS, Rival, RivalConfig, RivalData, train_rival
from facelab.gptface.small_gptface import pretrain_small
from facelab.gptface.tagging import rank_by_clip, rank_by_mask, rank_by_match, rank_by_template
from facelab.gptface.tokens import Vocabulary, text_ids
from facelab.gptface.vqgan_training import VQGANTraining, reconstruction, train_vqgan
from facelab.lab.batches import Items, Share
from facelab.lab.train import Step, TrainResult
from facelab.nets.codec import VQGANConfig
from facelab.nets.parser import UNetParser
from facelab.nets.patch_discriminator import PatchConfig
from facelab.nets.vqgan import VQGAN
from facelab.nets.vqgan_objective import VQGANObjective

rng = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=rng)
VOCAB = Vocabulary.learn(["tags: man, woman, hair, hat", "a man with glasses", "a woman looks happy"], 60)
LAYOUT = VOCAB.layout(6, 4, 4, 12)
CAPTIONS = ["a man with glasses", "a woman looks happy", "woman hair", "man hat"] * 2
TEXT = torch.tensor([(VOCAB.encode(caption) + [0] * 12)[:12] for caption in CAPTIONS])
CODES = torch.randint(0, 6, (8, 4, 4), generator=rng)
PAIRS = TokenSet(CODES, TEXT)
CODEC = VQGANConfig(ch=8, ch_mult=(1, 2, 2, 2), num_res_blocks=1, attn_resolutions=(), resolution=32, z_channels=8, embed_dim=8, n_embed=6, groups=4)
FOUND = RivalData(IMAGES, CODES, torch.arange(8), TEXT, torch.arange(8) % 2)


def gptface():
    return build_gptface(GPTFaceConfig(LAYOUT, 2, 16, 2, 24))


def rival(method, device="auto", steps=3):
    return train_rival(RivalConfig(method, 32, 8, 1, 16, 2, 16, classes=2, codes=6, words=len(VOCAB), text=12), FOUND, steps, 4, device=device, progress=False)[0]


def rival_from_stream(method, device):
    config, vqgan = RivalConfig(method, 32, 8, 1, 16, 2, 16, classes=2, codes=6, words=len(VOCAB), text=12), VQGAN(CODEC).eval()
    source = Items(8, lambda at, rng: (IMAGES[at], at % 2)) if method == "vit" else pair_stream(list(zip(IMAGES, CAPTIONS)), VOCAB, LAYOUT)
    return train_rival(config, source, 3, 4, device=device, progress=False, encode=encoder_of(vqgan))[0]


def streamed(device):
    model, codec = gptface(), VQGAN(CODEC).eval()  # a tokenizer that stays where it is
    pretrain(Pretraining(3, 4, warmup=0, device=device), model, pair_stream(list(zip(IMAGES, CAPTIONS)), VOCAB, LAYOUT), codec.token_ids, progress=False)
    return model


def in_memory(device):
    model = gptface()
    pretrain(Pretraining(3, 4, warmup=0, device=device), model, PAIRS, starts=VOCAB.starts_word, progress=False)
    return model


def in_lessons(device):
    model = gptface()
    pretrain_small(model, PAIRS, PAIRS, VOCAB, (3, 3, 3, 3), 4, device=device, progress=False)
    return model


def codec(device):
    config = VQGANTraining(CODEC, VQGANObjective(disc_start=1), "gradients", PatchConfig(8, 1), steps=4, batch=4, rate=1e-3, emphasis=1.0, free_steps=1, pool=64, restart_every=1, device=device)
    return train_vqgan(config, torch.cat([IMAGES, IMAGES[:, :1]], 1), progress=False).net


TRAININGS = {  # name: (module whose `train` is called, call -> the network that it gives)
    "gptface.train_parser": ("gptface.regions", lambda device: train_parser(IMAGES, IMAGES[:, 0] % 3, ("skin", "left_eye", "right_eye"), ParserTraining(3, 4, width=4, device=device), progress=False)),
    "gptface.train_attributes": ("gptface.edit_scores", lambda device: train_attributes(IMAGES, np.tile([1, -1], (8, 20)), 3, 4, progress=False, device=device)),
    "gptface.pretrain, tokens": ("gptface.pretrain", in_memory),
    "gptface.pretrain, stream": ("gptface.pretrain", streamed),
    "gptface.pretrain_small": ("gptface.pretrain", in_lessons),
    "gptface.train_vqgan": ("gptface.vqgan_training", codec),
    **{f"gptface.train_rival, {method}": ("gptface.rivals", lambda device, method=method: rival(method, device)) for method in RIVALS},
}
TRAININGS |= {f"gptface.train_rival, {method}, stream": ("gptface.rivals", lambda device, method=method: rival_from_stream(method, device)) for method in RIVALS}
ON_THE_CPU = {  # trainings that say that they stay there
    "gptface.train_heads": ("gptface.few_shot", lambda: train_heads({"a": torch.rand(8, 4)}, torch.arange(8) % 2, 2, HeadTraining(3, 4))["a"]),
    "gptface.train_toy": ("gptface.pretrain", lambda: train_toy(ToyTraining(1, 16, 2, steps=4, batch=4, pairs=20))[0]),
}


def pretended(asked):
    "A training loop that walks through the losses on the device that its configuration names."

    def train(config, models, players, data, *rest, **more):
        asked.append(config.device)
        gpu = config.device in ("auto", "cuda")
        together, share = nn.ModuleDict(models).to("cuda" if gpu else "cpu"), Share(config.batch, config.seed)
        batches = data.batches(None, share)
        for number in range(config.steps):
            batch, _ = next(batches)
            for place, player in enumerate(players):
                step = Step(number, config.steps, player.name, 0, share, torch.device("cuda" if gpu else "cpu"), (config.seed, number, place, 0))
                losses = player.loss_fn(together, send(batch, gpu), step)
                assert torch.isfinite(losses["loss"]) and on_gpu(losses["loss"]) == gpu
        return TrainResult(dict(models), pd.DataFrame({"step": [config.steps]}), None, config.steps, "", 0, None)

    return train


def walk(monkeypatch, module, call):
    asked = []
    monkeypatch.setattr(importlib.import_module(f"facelab.{module}"), "train", pretended(asked))
    with fake_gpu():
        net = call()
        left = [name for name, weight in net.state_dict(keep_vars=True).items() if on_gpu(weight)]
    return asked, left


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize("device", ["cuda", "cpu", "auto"])
def test_a_training_on_a_gpu(monkeypatch, name, device):
    module, call = TRAININGS[name]
    asked, left = walk(monkeypatch, module, lambda: call(device))
    assert asked and set(asked) == {device}, f"asked for {device}, trained on {asked}"
    assert not left, f"left on the GPU: {left[:3]}"


@pytest.mark.parametrize("name", ON_THE_CPU)
def test_a_training_that_stays_on_the_cpu(monkeypatch, name):
    asked, left = walk(monkeypatch, *ON_THE_CPU[name])
    assert set(asked) == {"cpu"} and not left


def test_the_pretended_gpu_keeps_torchs_rules():
    with fake_gpu():
        there, here = torch.ones(4).to("cuda"), torch.arange(4)
        assert there[here].device.type == "cuda" and (there * 2).sum().item() == 8 and torch.zeros_like(there).device == there.device
        for wrong in (lambda: torch.ones(4)[here.to("cuda")], lambda: there + torch.ones(4), lambda: there.numpy(), lambda: nn.Linear(4, 2)(there), lambda: torch.rand(2, generator=torch.Generator(), device="cuda")):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()
        net = nn.BatchNorm1d(4).to("cuda")
        assert on_gpu(net(there[None].expand(3, -1))) and not any(map(on_gpu, net.cpu().state_dict(keep_vars=True).values()))


def test_looks_on_a_gpu():
    "Held-out scores and features of networks that are there, of data that is not."
    with fake_gpu():
        model, net = gptface().eval().to("cuda"), Rival(RivalConfig("mae", 32, 8, 1, 16, 2, 16)).eval().to("cuda")
        assert 0 <= held_out(model, PAIRS)["itm_accuracy"] <= 1
        assert not on_gpu(gptface_features(model, CODES)) and not on_gpu(rival_features(net, IMAGES))
        parser = UNetParser(("skin", "hair"), 32, width=4).eval().to("cuda")
        assert set(part_overlap(parser, IMAGES, IMAGES[:, 0] % 2)) == {"skin", "hair"}


def test_tables_on_a_gpu():
    "What Tables 2 and 3 ask of networks that are there, of pictures that are not."
    words, hidden = ["man", "woman", "hair"], torch.arange(16).reshape(1, 4, 4).expand(8, -1, -1) < 5
    with fake_gpu():
        model, clip, vqgan = gptface().eval().to("cuda"), Rival(RivalConfig("clip", 32, 8, 1, 16, 2, 16, words=len(VOCAB), text=12)).eval().to("cuda"), VQGAN(CODEC).eval().to("cuda")
        codes = encode_images(vqgan, IMAGES)
        assert not on_gpu(codes)
        text = text_ids(VOCAB, LAYOUT, [f"tags: {word}" for word in words]).ids
        ranked = [rank_by_mask(model, VOCAB, codes, words, 3), rank_by_match(model, VOCAB, codes, words, 3), rank_by_clip(clip, IMAGES, text, 3), rank_by_template(model, VOCAB, codes, words, 3)]
        assert all(sorted(row) == [0, 1, 2] for table in ranked for row in table.tolist())
        hits, nats = masked_codes(model, PAIRS, hidden)
        assert len(hits) == len(nats) == len(masked_words(model, PAIRS, 0.4)) == 8
        assert reconstruction(vqgan, IMAGES).psnr.shape == (8,) and set(fill_tags(model, VOCAB, codes[:2], 2)[0][0]) <= set(VOCAB.pieces)
        mixed = torch.stack([hidden[0], hidden[0] & False])
        filled, _ = fill_region(model, codes[:2], mixed, TEXT[:2], Guidance.paper(0.05))
        assert torch.equal(filled[1].cpu(), codes[1])
