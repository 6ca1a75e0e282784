"VQGAN against numbers of taming-transformers' own classes (fixture vqgan, facts/gptface.md 2)."

import json

import pytest
import torch
from fixture_files import fixture

from facelab.lab.arrays import read_safetensors
from facelab.nets.codec import VQGANConfig
from facelab.nets.quantiser import VectorQuantiser
from facelab.nets.vqgan import VQGAN, VQGANS, vqgan_config


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
    lost = set(usual.state_dict()) - set(bare.state_dict())
    assert len(lost) == 50 and {key.rsplit(".", 3)[0] for key in lost} == {"encoder.down.4.attn", "decoder.up.4.attn"}


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
    assert abs(float(out.codes.loss) - said["codebook_loss_legacy"]) < 1e-5
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
    assert abs(float(out.loss) - float(held[f"{reading}.loss"])) < 1e-6
    grad_z, grad_codebook = torch.autograd.grad(out.loss, [z, vq.embedding.weight])
    for ours, name in ((grad_z, "grad_z"), (grad_codebook, "grad_codebook")):
        theirs, other = held[f"{reading}.{name}"], held[f"{'fixed' if reading == 'legacy' else 'legacy'}.{name}"]
        assert gap(ours, theirs) < 1e-4 * float(theirs.abs().max())
        assert gap(ours, other) > 0.5 * float(torch.minimum(theirs.abs().max(), other.abs().max())), "the other reading fits too: the test cannot tell them apart"
