"VQGAN against numbers of taming-transformers' own classes (fixture vqgan, facts/gptface.md 2)."

import json

import pytest
import torch
from fixture_files import fixture

from facelab.lab.arrays import read_safetensors
from facelab.lab.errors import InputError
from facelab.nets.codec import VQGANConfig
from facelab.nets.lpips import LPIPS, NoDistance
from facelab.nets.patch_discriminator import PatchConfig, PatchDiscriminator
from facelab.nets.quantiser import VectorQuantiser
from facelab.nets.vqgan import VQGAN, VQGANS, vqgan_config
from facelab.nets.vqgan_objective import VQGANObjective, autoencoder_loss, discriminator_loss


@pytest.fixture(scope="module")
def said():
    return json.loads(fixture("vqgan/A_config.json").read_text())


@pytest.fixture(scope="module")
def config(said):
    return VQGANConfig.from_dict({key: said[key] for key in ("ddconfig", "n_embed", "embed_dim", "beta")})


@pytest.fixture(scope="module")
def net(config):
    return VQGAN.from_taming(fixture("vqgan/A_state_dict.safetensors"), config)


@pytest.fixture(scope="module")
def numbers():
    return read_safetensors(fixture("vqgan/A_io.safetensors"))


def unit(signed):
    "Pictures in -1..1 as 0..1."
    return (signed + 1) / 2


def gap(ours, theirs):
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


# Names and shapes


def test_full_table_of_names_and_shapes():
    held = json.loads(fixture("vqgan/full_f16_8192_state_dict.json").read_text())
    config = VQGANConfig.from_dict({key: held["config"][key] for key in ("ddconfig", "n_embed", "embed_dim")})
    assert config == VQGANS["gptface"] == VQGANConfig()
    with torch.device("meta"):
        net = VQGAN(config)
    model = {key: shape for key, shape in held["state_dict"].items() if not key.startswith("loss.")}
    assert {key: list(value.shape) for key, value in net.state_dict().items()} == model and len(model) == held["n_keys"] == 343
    count = lambda part: sum(p.numel() for p in part.parameters())
    parts = ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv")
    assert {name: count(getattr(net, name)) for name in parts} | {"total": count(net)} == {name: held["param_counts"][name] for name in (*parts, "total")}


def test_at_336_attention_stays():
    "Read as taming-transformers reads it, resolution 336 loses 50 tensors; here it is refused, and the right ways agree."
    with torch.device("meta"):
        usual, moved, bare = (VQGAN(VQGANConfig(**more)) for more in ({}, {"resolution": 336, "attn_resolutions": (21,)}, {"attn_resolutions": ()}))
        assert usual.latents(torch.empty(1, 3, 336, 336)).shape == (1, 256, 21, 21)
    assert list(usual.state_dict()) == list(moved.state_dict())
    lost = sorted(set(usual.state_dict()) - set(bare.state_dict()))
    assert len(lost) == 50 and lost == json.loads(fixture("vqgan/full_f16_8192_state_dict.json").read_text())["note_resolution_336"]["missing_when_attn_resolutions_16"]
    with pytest.raises(InputError, match=r"336, 168, 84, 42, 21"):
        VQGANConfig(resolution=336)


def test_config_is_read_off_the_weights(config, net):
    found = vqgan_config(net.state_dict())
    with torch.device("meta"):
        assert {k: v.shape for k, v in VQGAN(found).state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}
    assert (found.n_embed, found.embed_dim, found.factor, found.ch_mult) == (config.n_embed, config.embed_dim, config.factor, config.ch_mult)
    assert len(found.attn_resolutions) == 1


# Values


def test_each_step_of_the_chain(net, numbers):
    with torch.no_grad():
        signed = numbers["input"]
        encoded = net.encoder(signed)
        latents = net.latents(unit(signed))
        codes = net.encode(unit(signed))
        post = net.post_quant_conv(codes.quantised)
        decoded = net.decode(codes.quantised)
    assert gap(encoded, numbers["encoder_out"]) < 1e-4 and gap(latents, numbers["pre_quant"]) < 1e-4
    assert torch.equal(codes.token_ids, numbers["indices"])
    assert gap(codes.quantised, numbers["quantized"]) < 1e-4 and gap(post, numbers["post_quant"]) < 1e-4
    assert gap(2 * decoded - 1, numbers["decoded"]) < 1e-4


def test_from_indices(net, numbers):
    with torch.no_grad():
        decoded = net.decode(net.quantize.lookup(numbers["indices"]))
    assert gap(2 * decoded - 1, numbers["decoded_from_indices"]) < 1e-4
    assert gap(net.pictures(numbers["indices"]), unit(numbers["decoded_from_indices"]).clamp(0, 1)) < 1e-4


def test_another_size(net, numbers):
    with torch.no_grad():
        out = net(unit(numbers["input_other_size"]))
    assert torch.equal(out.codes.token_ids, numbers["indices_other_size"])
    assert gap(2 * out.images - 1, numbers["decoded_other_size"]) < 1e-4


# Gradients


def test_gradient_to_the_picture(net, numbers, said):
    signed = numbers["input"].clone().requires_grad_()
    out = net(unit(signed))
    assert abs(float(out.codes.loss.detach()) - said["codebook_loss_legacy"]) < 1e-5
    loss = ((2 * out.images - 1) * numbers["grad_probe_w"]).mean() + out.codes.loss
    (grad,) = torch.autograd.grad(loss, signed)
    theirs = numbers["grad_input"]
    assert float((grad - theirs).norm() / theirs.norm()) < 1e-3 and gap(grad, theirs) < 1e-4 * float(theirs.abs().max()) + 1e-6


@pytest.mark.parametrize("reading", ["legacy", "fixed"])
def test_the_two_readings_of_beta(net, numbers, reading):
    "The same value, four times the gradient on one side and a quarter on the other."
    held = read_safetensors(fixture("vqgan/A_quant_grads.safetensors"))
    vq = VectorQuantiser(*net.quantize.embedding.weight.shape, legacy=reading == "legacy")
    vq.load_state_dict(net.quantize.state_dict())
    z = numbers["pre_quant"].clone().requires_grad_()
    out = vq(z)
    assert abs(float(out.loss.detach()) - float(held[f"{reading}.loss"])) < 1e-6
    grad_z, grad_codebook = torch.autograd.grad(out.loss, [z, vq.embedding.weight])
    for ours, name in ((grad_z, "grad_z"), (grad_codebook, "grad_codebook")):
        theirs, other = held[f"{reading}.{name}"], held[f"{'fixed' if reading == 'legacy' else 'legacy'}.{name}"]
        assert gap(ours, theirs) < 1e-4 * float(theirs.abs().max())
        assert gap(ours, other) > 0.5 * float(torch.minimum(theirs.abs().max(), other.abs().max())), "the other reading fits too: the test cannot tell them apart"


# Discriminator and losses around disc_start


@pytest.fixture(scope="module")
def loss_numbers():
    return json.loads(fixture("vqgan/A_loss.json").read_text()), read_safetensors(fixture("vqgan/A_loss.safetensors"))


@pytest.fixture
def played(loss_numbers):
    "The fixture's situation: discriminator, a last layer, pictures and drawings."
    meta, held = loss_numbers
    discriminator = PatchDiscriminator(PatchConfig(ndf=meta["ndf"], n_layers=meta["n_layers"]))
    discriminator.load_state_dict({key.removeprefix("sd.discriminator."): value for key, value in held.items() if key.startswith("sd.")})
    last = held["last_layer"].clone().requires_grad_()
    drawn = torch.tanh(torch.nn.functional.conv2d(held["feat"], last, padding=1))
    assert gap(drawn.detach(), held["recon"]) < 1e-5
    objective = VQGANObjective(meta["perceptual_weight"], meta["codebook_weight"], disc_factor=meta["disc_factor"], disc_start=meta["disc_start"], disc_loss=meta["disc_loss"])
    return discriminator, last, unit(held["input"]), unit(drawn), held["codebook_loss"], objective


def test_discriminator_in_eval_mode(played, loss_numbers):
    discriminator, images = played[0].eval(), played[2]
    with torch.no_grad():
        assert gap(discriminator(2 * images - 1), loss_numbers[1]["out.logits_real_evalmode"]) < 1e-4


@pytest.mark.parametrize("step", [4, 5, 15])
def test_losses_around_disc_start(played, loss_numbers, step):
    "disc_start is 5: before it the adversary counts for nothing, and is not trained."
    discriminator, last, images, drawn, codes_loss, objective = played
    said = {key.removesuffix(f"_step{step}"): value for key, value in loss_numbers[0]["values"].items() if key.endswith(f"_step{step}")}
    out = autoencoder_loss(images, drawn, codes_loss, NoDistance(), step, objective, discriminator, last)
    seen = discriminator_loss(images, drawn, discriminator, step, objective)
    ours = {"g_total": out["loss"], "d_weight": out["disc_weight"], "g_loss": out["adversary"], "nll": out["nll"], "d_loss": seen["loss"], "logits_real_mean": seen["real"], "logits_fake_mean": seen["fake"]}
    assert ours.keys() == said.keys()
    assert {name: float(value.detach()) for name, value in ours.items()} == pytest.approx(said, abs=1e-5)
    assert (said["d_loss"] == 0) == (step == 4) and out["disc_weight"].grad_fn is None
    grads = torch.autograd.grad(seen["loss"], list(discriminator.parameters()))
    assert all((grad == 0).all() for grad in grads) == (step == 4), "the discriminator is trained before its start, or not after it"


def test_names_of_the_training_networks():
    "The 55 loss tensors of a training checkpoint."
    full = json.loads(fixture("vqgan/full_f16_8192_state_dict.json").read_text())
    with torch.device("meta"):
        parts = {"discriminator": PatchDiscriminator(), "perceptual_loss": LPIPS()}
    ours = {f"loss.{name}.{key}": list(value.shape) for name, part in parts.items() for key, value in part.state_dict().items()}
    counts = [sum(p.numel() for p in part.parameters()) for part in parts.values()]
    assert counts == [full["param_counts"]["discriminator"], full["param_counts"]["lpips"]]
    assert len(ours) == 55 and ours == full["loss_state_dict_in_training_checkpoints"]
