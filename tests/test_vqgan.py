"VQGAN's files, its bad inputs, its training; the numbers of the original are in test_vqgan_parity.py."

import json
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from facelab.gptface.vqgan_base import open_vqgan
from facelab.gptface.vqgan_training import CodeKeeper, VQGANTraining, reconstruction, tend, train_vqgan
from facelab.lab.arrays import write_safetensors
from facelab.lab.batches import Share
from facelab.lab.errors import AssetError, InputError, ShapeError, UnsafeFileError
from facelab.lab.paths import bases_dir, data_dir
from facelab.lab.train import Step, Stream
from facelab.nets.codec import VQGANConfig
from facelab.nets.lpips import LPIPS, GradientDistance, load_lpips, open_perceptual
from facelab.nets.patch_discriminator import PatchConfig
from facelab.nets.quantiser import VectorQuantiser, cluster_centres
from facelab.nets.vqgan import VQGAN, VQGANS, vqgan_config
from facelab.nets.vqgan_objective import VQGANObjective, autoencoder_loss, discriminator_loss

SMALL = VQGANConfig(ch=8, ch_mult=(1, 1, 2), num_res_blocks=1, attn_resolutions=(), z_channels=16, embed_dim=4, n_embed=64, groups=8, legacy=False, l2_norm=True)
TAMING = VQGANConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(128,), z_channels=32, embed_dim=8, n_embed=24)  # 32 groups and a square codebook norm, as all of taming-transformers


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return VQGAN(TAMING).eval()


@pytest.fixture(scope="module")
def photos():
    "Bytes of smooth pictures."
    generator = torch.Generator().manual_seed(1)
    grid = torch.rand(24, 3, 4, 4, generator=generator)
    return (torch.nn.functional.interpolate(grid, (16, 16), mode="bicubic").clamp(0, 1) * 255).round().to(torch.uint8)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# Files


def test_save_and_load(net, photos, tmp_path):
    net.save(tmp_path / "vq")
    assert sorted(p.name for p in (tmp_path / "vq").iterdir()) == ["config.json", "model.safetensors"]
    again = VQGAN.load(tmp_path / "vq")
    assert again.config == net.config and same(again.state_dict(), net.state_dict()) and not again.training
    assert torch.equal(again.token_ids(photos), net.token_ids(photos))
    first = (tmp_path / "vq" / "model.safetensors").read_bytes()
    net.save(tmp_path / "vq")
    assert (tmp_path / "vq" / "model.safetensors").read_bytes() == first


@pytest.mark.parametrize("kind", ["lightning", "legacy", "bare", "half", "transformer", "safetensors"])
def test_other_peoples_checkpoints(net, photos, tmp_path, kind):
    "A Lightning checkpoint with the training's networks and its hyper-parameters, and what people make of it."
    state, path = net.state_dict(), tmp_path / ("a.safetensors" if kind == "safetensors" else "last.ckpt")
    if kind in ("lightning", "legacy"):
        more = {f"loss.discriminator.main.{k}.weight": torch.zeros(2) for k in (0, 2)}
        torch.save({"epoch": 3, "global_step": 7, "pytorch-lightning_version": "1.0.8", "state_dict": state | more, "optimizer_states": [{"state": {}, "param_groups": []}], "callbacks": {}}, path, _use_new_zipfile_serialization=kind == "lightning")
    elif kind == "transformer":
        torch.save({"state_dict": {f"first_stage_model.{key}": value for key, value in state.items()} | {"transformer.pos_emb": torch.zeros(2)}}, path)
    elif kind == "safetensors":
        write_safetensors(path, state)
    else:
        torch.save({key: value.half() for key, value in state.items()} if kind == "half" else state, path)
    for read in (VQGAN.from_taming(path), VQGAN.from_taming(path, TAMING), open_vqgan(path)):
        assert read.config == TAMING
        assert same(read.state_dict(), {key: value.half().float() for key, value in state.items()} if kind == "half" else state)
        assert kind == "half" or torch.equal(read.token_ids(photos), net.token_ids(photos))


def test_the_config_is_read_off(net):
    for config in (TAMING, VQGANS["gptface"], VQGANS["f16-1024"], replace(TAMING, attn_resolutions=()), replace(TAMING, attn_resolutions=(256, 128), num_res_blocks=3), VQGANConfig(resolution=2048, ch_mult=(1,) * 10, attn_resolutions=(4,))):
        with torch.device("meta"):
            made = VQGAN(config)
            found = vqgan_config(made.state_dict())
            assert list(VQGAN(found).state_dict()) == list(made.state_dict())
    assert vqgan_config(net.state_dict()) == TAMING


def test_a_checkpoint_that_wants_to_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"state_dict": {"quantize.embedding.weight": Evil()}}, tmp_path / "a.ckpt")
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps({"state_dict": Evil()}))
    torch.save({"state_dict": {"quantize.embedding.weight": torch.zeros(2, 2)}, "hyper_parameters": Evil()}, tmp_path / "c.ckpt")
    for name in ("a", "c"):
        with pytest.raises(UnsafeFileError):
            VQGAN.from_taming(tmp_path / f"{name}.ckpt")
    with pytest.raises(InputError):
        VQGAN.from_taming(tmp_path / "b.ckpt")
    assert not (tmp_path / "ran").exists()


def test_another_codebook_size_names_both(net, tmp_path):
    torch.save({"state_dict": net.state_dict()}, tmp_path / "last.ckpt")
    with pytest.raises(InputError, match=r"24 codes.*8192 codes"):
        VQGAN.from_taming(tmp_path / "last.ckpt", VQGANS["gptface"])
    with pytest.raises(InputError, match=r"24 codes.*512 codes"):
        open_vqgan(tmp_path / "last.ckpt", 512)
    net.save(tmp_path / "vq")
    config = json.loads((tmp_path / "vq" / "config.json").read_text())
    (tmp_path / "vq" / "config.json").write_text(json.dumps(config | {"n_embed": 25}))
    with pytest.raises(InputError, match=r"24 codes.*25 codes"):
        VQGAN.load(tmp_path / "vq")


def spoiled(state, how):
    key = "decoder.conv_out.bias"
    return {
        "missing": {k: v for k, v in state.items() if k != key}, "shape": state | {key: torch.zeros(4)}, "nan": state | {key: torch.tensor([0.0, float("nan"), 0.0])}, "more": state | {"encoder.extra": torch.zeros(1)},
        "ints": state | {key: torch.zeros(3, dtype=torch.long)}, "gumbel": {k: v for k, v in state.items() if not k.startswith("quantize.")} | {"quantize.embed.weight": torch.zeros(24, 8)},
        "torn": {"quantize.embedding.weight": torch.zeros(24, 8)}, "other": {"fc.weight": torch.zeros(3)}, "flat": state | {"quantize.embedding.weight": torch.zeros(5)},
    }[how]  # fmt: skip


@pytest.mark.parametrize("how", ["missing", "shape", "nan", "more", "ints", "gumbel", "torn", "other", "flat"])
@pytest.mark.parametrize("given", [None, TAMING])
def test_broken_checkpoints(net, tmp_path, how, given):
    torch.save({"state_dict": spoiled(net.state_dict(), how)}, tmp_path / "a.ckpt")
    with pytest.raises(InputError) as error:
        VQGAN.from_taming(tmp_path / "a.ckpt", given)
    assert "a.ckpt" in str(error.value)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors", ".pt"])
@pytest.mark.parametrize("how", ["missing", "empty", "folder", "text", "cut"])
def test_files_that_are_none(net, tmp_path, suffix, how):
    path = tmp_path / f"a{suffix}"
    write_safetensors(path, net.state_dict()) if suffix == ".safetensors" else torch.save(net.state_dict(), path)
    whole = path.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "missing":
        path.write_bytes({"empty": b"", "text": b"a face\n" * 99, "cut": whole[: len(whole) // 2]}[how])
    for read in (VQGAN.from_taming, open_vqgan):
        with pytest.raises(InputError):
            read(path)


def test_folders_that_are_none(net, tmp_path):
    net.save(tmp_path / "vq")
    (tmp_path / "vq" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="codes"):
        VQGAN.load(tmp_path / "vq")
    (tmp_path / "vq" / "config.json").unlink()
    with pytest.raises(InputError, match="config.json"):
        VQGAN.load(tmp_path / "vq")


# Pictures and tokens


@pytest.mark.parametrize("shape", [(1, 3, 32, 33), (1, 3, 31, 32), (1, 1, 32, 32), (1, 3, 0, 32), (0, 3, 32, 32), (1, 4, 32, 32)])
def test_other_sizes_are_refused(net, shape):
    with pytest.raises(ShapeError, match="multiples of 2"):
        net.encode(torch.rand(*shape))


@pytest.mark.parametrize("images", [torch.rand(1, 3, 8, 8) * 2 - 1.2, torch.full((1, 3, 8, 8), 200.0), torch.full((1, 3, 8, 8), float("nan"))])
def test_other_ranges_are_refused(net, images):
    with pytest.raises(ShapeError, match=r"0\.\.1"):
        net.token_ids(images)


def test_tokens_that_are_none(net):
    for ids in (torch.tensor([[[24]]]), torch.tensor([[[-1]]]), torch.full((1, 2, 2), 30522)):
        with pytest.raises(ShapeError, match=r"0\.\.23"):
            net.pictures(ids)
    with pytest.raises(ShapeError, match="square"):
        net.pictures(torch.zeros(1, 441 + 66, dtype=torch.long))


def test_batches_and_bytes_change_nothing(net, photos):
    ids = net.token_ids(photos)
    assert torch.equal(ids, net.token_ids(photos, batch=5)) and torch.equal(ids, net.token_ids(photos.float() / 255))
    assert torch.equal(ids, torch.cat([net.token_ids(photo[None]) for photo in photos]))
    assert (net.pictures(ids) - net.pictures(ids, batch=5)).abs().max() < 1e-5
    assert torch.equal(net.pictures(ids), net.pictures(ids.flatten(1)))


def test_any_multiple_of_the_factor(net):
    for h, w in ((2, 2), (34, 6), (64, 128)):
        with torch.no_grad():
            out = net(torch.rand(2, 3, h, w))
        assert out.images.shape == (2, 3, h, w) and out.codes.token_ids.shape == (2, h // 2, w // 2)


def test_half_precision_finds_the_same_codes(photos):
    "Under autocast the distances to 8192 codes would be rounded to three digits."
    torch.manual_seed(0)
    vq = VectorQuantiser(4096, 8)
    with torch.no_grad():
        vq.embedding.weight.normal_()
    z = torch.randn(1, 8, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        half = vq(z)
    assert torch.equal(half.token_ids, vq(z).token_ids) and half.quantised.dtype == torch.float32


# The objective


def test_objective_refuses(photos):
    config, one = VQGANObjective(), photos[:1].float() / 255
    with pytest.raises(ShapeError):
        autoencoder_loss(one, one[..., :8], torch.tensor(0.0), GradientDistance(), 0, config)
    with pytest.raises(ShapeError):
        discriminator_loss(one, one[:0], torch.nn.Identity(), 0, config)
    for wrong in ({"disc_loss": "wgan"}, {"perceptual_weight": -1.0}, {"disc_start": -1}):
        with pytest.raises(InputError):
            VQGANObjective(**wrong)


def test_perceptual_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("FACELAB_ASSETS", str(tmp_path))
    assert open_perceptual("auto").name == "gradients"
    with pytest.raises(AssetError, match=r"vgg16-397923af\.pth"):
        open_perceptual("lpips")
    (tmp_path / "lpips-vgg").mkdir()
    with pytest.raises(AssetError, match="it is not there|no vgg16"):  # a folder that lacks files is a mistake, not an absence
        open_perceptual("auto")
    known = LPIPS().state_dict()
    torch.save({f"features.{key.split('.')[2]}.{key.split('.')[3]}": value for key, value in known.items() if key.startswith("net.")}, tmp_path / "lpips-vgg" / "vgg16-397923af.pth")
    torch.save({key: value for key, value in known.items() if key.startswith("lin")}, tmp_path / "lpips-vgg" / "vgg.pth")
    found = open_perceptual("auto")
    assert found.name == "lpips" and same(found.state_dict(), known)
    assert not any(weight.requires_grad for weight in found.parameters()) and not found.train().training


def alexnet_by_hand(state, x):
    "Features of AlexNet's five ReLUs, from torchvision's numbers: what its page says, layer by layer."
    x, maps = (x - torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), []
    for number, stride, padding, pooled in ((0, 4, 2, False), (3, 1, 2, True), (6, 1, 1, True), (8, 1, 1, False), (10, 1, 1, False)):
        x = F.max_pool2d(x, kernel_size=3, stride=2) if pooled else x
        x = F.relu(F.conv2d(x, state[f"features.{number}.weight"], state[f"features.{number}.bias"], stride=stride, padding=padding))
        maps.append(x.double().numpy())
    return maps


def test_lpips_with_alexnet(tmp_path, monkeypatch):
    "Files as torchvision and LPIPS write them, random numbers in them; against a slow twin."
    monkeypatch.setenv("FACELAB_ASSETS", str(tmp_path))
    with pytest.raises(AssetError, match=r"alexnet-owt-7be5be79\.pth"):
        open_perceptual("lpips_alex")
    random = torch.Generator().manual_seed(0)
    sides = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}
    vision = {f"features.{n}.weight": torch.randn(shape, generator=random) * (2 / (shape[1] * shape[2] ** 2)) ** 0.5 for n, shape in sides.items()} | {f"features.{n}.bias": 0.1 * torch.randn(shape[0], generator=random) for n, shape in sides.items()}
    lins = {f"lin{k}.model.1.weight": torch.rand(1, shape[0], 1, 1, generator=random) for k, shape in enumerate(sides.values())}
    (tmp_path / "lpips-alex").mkdir()
    torch.save(vision | {"classifier.1.weight": torch.zeros(4, 9216)}, tmp_path / "lpips-alex" / "alexnet-owt-7be5be79.pth")
    torch.save(dict(list(lins.items())[:4]), tmp_path / "lpips-alex" / "alex.pth")
    with pytest.raises(InputError, match=r"lin4.*lpips-alex"):
        open_perceptual("lpips_alex")
    torch.save(lins, tmp_path / "lpips-alex" / "alex.pth")
    net = open_perceptual("lpips_alex")
    a, b = (torch.rand(2, 3, 67, 45, generator=random) * 2 - 1 for _ in range(2))
    total = np.zeros(2)
    for one, two, weight in zip(alexnet_by_hand(vision, a), alexnet_by_hand(vision, b), lins.values()):
        one, two = (v / (np.sqrt((v**2).sum(1, keepdims=True)) + 1e-10) for v in (one, two))
        total += (weight.double().numpy() * (one - two) ** 2).sum(1).mean((1, 2))
    assert np.allclose(net(a, b).numpy(), total, rtol=1e-4) and net.name == "lpips_alex" and float(net(a, a).abs().max()) == 0
    with pytest.raises(ShapeError, match="31 pixels"):
        net(a[..., :30, :30], b[..., :30, :30])
    assert torch.isfinite(net(a[..., :31, :31], b[..., :31, :31])).all()
    with torch.no_grad():
        for weight in net.net.parameters():
            weight.neg_() if weight.ndim > 1 else weight.fill_(-9.0)  # features of 0
    grey = torch.zeros(1, 3, 40, 40, requires_grad=True)
    net(grey, b[:1, :, :40, :40]).sum().backward()
    assert torch.isfinite(grey.grad).all()
    with pytest.raises(InputError, match="lpips_alex has"):
        torch.save({"lin0.model.1.weight": torch.zeros(1)}, tmp_path / "one.pth")
        load_lpips(tmp_path / "one.pth", "lpips_alex")


def test_lpips_in_a_training_checkpoint(tmp_path):
    known = LPIPS().state_dict()
    torch.save({"state_dict": {f"loss.perceptual_loss.{key}": value for key, value in known.items()} | {"encoder.conv_in.bias": torch.zeros(3)}}, tmp_path / "last.ckpt")
    assert same(load_lpips(tmp_path / "last.ckpt").state_dict(), known)
    torch.save({"state_dict": {"loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1)}}, tmp_path / "half.ckpt")
    with pytest.raises(InputError, match="of 33 entries"):
        load_lpips(tmp_path / "half.ckpt")


# Training


def few(**more):
    return VQGANTraining(**{"net": SMALL, "perceptual": "gradients", "discriminator": None, "steps": 24, "batch": 4, "rate": 3e-3, "free_steps": 6, "pool": 512, "restart_every": 4, "threads": 1} | more)


def test_two_trainings_are_one(photos):
    first, again = (train_vqgan(few(), photos, photos[:4], progress=False) for _ in range(2))
    assert same(first.net.state_dict(), again.net.state_dict()) and first.curve.equals(again.curve) and first.perceptual == "gradients"
    assert not same(first.net.state_dict(), train_vqgan(few(seed=1), photos, progress=False).net.state_dict())


@pytest.mark.parametrize("disc", [None, PatchConfig(ndf=4, n_layers=1)])
def test_a_stopped_training_goes_on_to_the_same_bits(photos, tmp_path, disc):
    "Codebook, pool, counts and both players are in the checkpoint; the cut falls between a free step and the adversary's start."
    import facelab.gptface.vqgan_training as training

    config = few(discriminator=disc, objective=VQGANObjective(disc_start=14), ema=0.9)
    whole = train_vqgan(config, photos, progress=False)
    real = training.codec_loss

    def cut(config, distance):
        inner = real(config, distance)

        def loss_fn(models, batch, step):
            if step.number == 11:
                raise KeyboardInterrupt
            return inner(models, batch, step)

        return loss_fn

    quick = training.TrainConfig
    training.TrainConfig = lambda *args, **more: quick(*args, **more | {"save_every": 5})
    try:
        training.codec_loss = cut
        with pytest.raises(KeyboardInterrupt):
            train_vqgan(config, photos, scratch=tmp_path / "run", progress=False)
        training.codec_loss = real
        gone_on = train_vqgan(config, photos, scratch=tmp_path / "run", progress=False)
    finally:
        training.codec_loss, training.TrainConfig = real, quick
    assert same(gone_on.net.state_dict(), whole.net.state_dict())


def test_it_learns_and_keeps_its_codes(photos):
    "On 24 smooth pictures: better than their mean colour, and most codes in use."
    made = train_vqgan(few(steps=120, rate=5e-3, free_steps=40, restart_every=10), photos, progress=False)
    found = reconstruction(made.net, photos)
    grey = photos.float().div(255)
    flat = -10 * (grey - grey.mean((2, 3), keepdim=True)).square().mean((1, 2, 3)).log10()
    assert found.psnr.mean() > float(flat.mean()) + 0.7 and found.usage.used > 0.75
    dull = train_vqgan(few(steps=120, rate=5e-3, free_steps=0, pool=0, restart_every=0, net=replace(SMALL, l2_norm=False, legacy=True)), photos, progress=False)
    assert reconstruction(dull.net, photos).usage.perplexity < 0.6 * found.usage.perplexity, "the keeping of codes changes nothing"


def test_before_disc_start_there_is_no_adversary(photos):
    "A discriminator that has not started changes no bit of the codec, and is not changed."
    later = VQGANObjective(disc_start=99)
    alone, beside = (train_vqgan(few(discriminator=disc, objective=later), photos, progress=False) for disc in (None, PatchConfig(ndf=4, n_layers=1)))
    assert same(alone.net.state_dict(), beside.net.state_dict())
    assert (beside.curve["disc/loss"].dropna() == 0).all()
    playing = train_vqgan(few(discriminator=PatchConfig(ndf=4, n_layers=1), objective=VQGANObjective(disc_start=12)), photos, progress=False)
    rows = playing.curve.dropna(subset=["disc/loss"])
    assert (rows["disc/loss"][rows["step"] <= 12] == 0).all() and (rows["disc/loss"][rows["step"] > 12] > 0).all()
    assert not same(playing.net.state_dict(), alone.net.state_dict())


def test_a_stream_is_a_source_too(photos):
    def opened(seed, epoch, rank, world):
        return (photos[k] for k in np.random.default_rng([seed, epoch]).permutation(len(photos)))

    made = train_vqgan(few(steps=8, free_steps=2, restart_every=0), Stream(opened, torch.stack), progress=False)
    assert np.isfinite(made.curve["codec/loss"]).all()


def test_codes_start_on_what_was_seen():
    config = few()
    torch.manual_seed(0)
    net, keeper = VQGAN(SMALL), CodeKeeper(64, 4, 512)
    groups = torch.nn.functional.normalize(torch.randn(64, 4), dim=1)
    for key in range(8):
        keeper.remember(groups, torch.zeros(0, dtype=torch.long), key)
    tend(net, keeper, config, Step(6, 24, "codec", 0, Share(4), torch.device("cpu"), (0, 6)))
    nearest = torch.cdist(groups, net.quantize.embedding.weight).amin(1)
    assert nearest.max() < 1e-3


def test_training_refuses(photos):
    for wrong in (photos.float(), photos[:, :1], photos[..., :14]):
        with pytest.raises(ShapeError, match="multiples of 4"):
            train_vqgan(few(), wrong, progress=False)
    for wrong in ({"pool": 8}, {"free_steps": 24}, {"restart_every": -1}):
        with pytest.raises(InputError):
            few(**wrong)
    with pytest.raises(InputError):
        train_vqgan(few(perceptual="vgg"), photos, progress=False)
    with pytest.raises(InputError, match="40 centres|40 finite"):
        cluster_centres(torch.rand(5, 2), 40)


# The base


BASE = bases_dir() / "vqgan" / "model.safetensors"


@pytest.mark.skipif(not BASE.is_file(), reason="bases/vqgan is not here: dvc pull bases/vqgan/model.safetensors.dvc, or make bases BASE=vqgan")
def test_base_on_people_it_has_never_seen():
    "The issue's numbers, on the test people of the data set that ships."
    from facelab.data.celeba import read_celeba
    from facelab.lab.images import resize

    items = read_celeba(data_dir() / "celeba").split("test")
    faces = torch.from_numpy(np.stack([resize(items[k].image, 64) for k in range(len(items))])).permute(0, 3, 1, 2)
    net = open_vqgan(codes=VQGANS["face64"].n_embed)
    found = reconstruction(net, faces)
    assert net.config == VQGANS["face64"] and not net.training and not any(weight.requires_grad for weight in net.parameters())
    assert found.psnr.mean() >= 22 and found.usage.used >= 0.8
    assert BASE.stat().st_size < 3_000_000


def test_a_missing_base_says_how_to_bring_it(monkeypatch, tmp_path):
    monkeypatch.setattr("facelab.lab.base.bases_dir", lambda: tmp_path)
    (tmp_path / "vqgan").mkdir()
    (tmp_path / "vqgan" / "mini.yaml").write_text("seed: 0\n")
    with pytest.raises(InputError, match="It is not shipped; make bases BASE=vqgan makes it"):
        open_vqgan()
    (tmp_path / "vqgan" / "model.safetensors.dvc").write_text("outs: []\n")
    with pytest.raises(InputError, match=r"dvc pull bases/vqgan/model\.safetensors\.dvc"):
        open_vqgan()


def test_the_published_configuration_of_16384_codes():
    "Every key of a published file, spelled as it is there, whole or its params alone."
    net = {"double_z": False, "z_channels": 256, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [16], "dropout": 0.0}
    params = {"embed_dim": 256, "n_embed": 16384, "monitor": "val/rec_loss", "image_key": "image", "ckpt_path": "last.ckpt", "ignore_keys": [], "colorize_nlabels": None, "sane_index_shape": False, "remap": None, "ddconfig": net, "lossconfig": {"target": "loss", "params": {"disc_start": 0}}}
    for said in (params, {"params": params}, {"model": {"base_learning_rate": 4.5e-6, "target": "model", "params": params}, "data": {}}):
        assert VQGANConfig.from_dict(said) == VQGANS["f16-16384"]
    with pytest.raises(InputError, match="remap"):
        VQGANConfig.from_dict(params | {"remap": "used.npy"})
    with pytest.raises(InputError, match="unknown keys"):
        VQGANConfig.from_dict(params | {"n_codes": 3})
