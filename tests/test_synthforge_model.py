"SynthForge's networks: frozen stays frozen through the lab's own loop; what is written is read back."

from functools import partial

import pytest
import torch

from facelab.lab.errors import InputError, ShapeError
from facelab.lab.train import Every, Items, Player, TrainConfig, train
from facelab.synthforge.model import MINI, PAPER, TASKS, BackboneConfig, FineTuned, LabelConfig, LabelNets, SyntheticBackbone, net_of, plain_config


def picture(index, rng):
    return torch.from_numpy(rng.uniform(-1, 1, (3, 64, 64)).astype("float32"))


def loss_fn(models, batch, step):
    found = models["net"](batch)
    return {"loss": found.seg.square().mean() + found.depth.square().mean() + found.coords.square().mean()}


@pytest.mark.parametrize("with_features", [False, True])
def test_stage_two_leaves_the_backbone_as_it_is(with_features):
    torch.manual_seed(0)
    net = FineTuned(SyntheticBackbone(MINI), LabelConfig(TASKS, 11, with_features, width=4))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    callbacks = [Every(1, lambda run: run.models.train() and None)]  # a careless callback
    player = Player("labels", loss_fn, ["net"], partial(torch.optim.AdamW, lr=1e-2))
    train(TrainConfig(3, batch=4, device="cpu", threads=1), {"net": net}, [player], Items(16, picture), callbacks=callbacks, progress=False)
    after = net.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not [name for name in moved if name.startswith("backbone.")]
    assert {"labels.seg.outc.conv.weight", "labels.depth.inc.double_conv.1.running_var", "labels.kps.features.1.1.bn.running_mean"} <= moved
    assert not any(p.requires_grad for p in net.backbone.parameters())


def test_a_plain_module_would_have_moved():
    "The same steps without the frozen wrapper do move batch normalisation, so the test above can fail."
    net = SyntheticBackbone(MINI).requires_grad_(False).train()
    before = net.encoder.inc.double_conv[1].running_mean.clone()
    net(torch.rand(4, 3, 64, 64))
    assert not torch.equal(before, net.encoder.inc.double_conv[1].running_mean)


def test_published_sizes():
    with torch.device("meta"):
        whole = SyntheticBackbone(PAPER)
        plain, rich = (LabelNets(LabelConfig(TASKS, 20, flag), PAPER) for flag in (False, True))
    count = lambda net: sum(p.numel() for p in net.parameters())
    assert count(whole) == 52_772_471 and count(plain["kps"]) == 608_006 and count(rich["kps"]) == 963_910
    assert plain["seg"].cin == 20 and rich["seg"].cin == 84 and plain["depth"].cin == 1 and rich["depth"].cin == 65
    with torch.device("meta"):
        assert LabelNets(LabelConfig(("seg",), 11, True, True), PAPER)["seg"].cin == 85


def test_only_the_wanted_tasks_are_built_and_answered():
    net = FineTuned(SyntheticBackbone(MINI), LabelConfig(("kps",), 11, False)).eval()
    found = net(torch.zeros(1, 3, 64, 64))
    assert found.seg is None and found.depth is None and found.coords.shape == (1, 68, 2) and set(net.labels) == {"kps"}
    assert found.features.shape == (1, 16, 64, 64)


def test_networks_come_back_from_their_parts(tmp_path):
    from safetensors.torch import load_file, save_file

    net = FineTuned(SyntheticBackbone(MINI), LabelConfig(("seg", "kps"), 19, True, True, 4)).eval()
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / "net.safetensors")
    again = net_of(load_file(tmp_path / "net.safetensors"), plain_config(net))
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(again(x).seg, net(x).seg) and torch.equal(again(x).coords, net(x).coords) and not again.training
    for tensors, config in ((net.backbone.state_dict(), plain_config(net)), (net.state_dict(), plain_config(net.backbone)), (net.state_dict(), {"backbone": {}, "labels": {}})):
        with pytest.raises(InputError, match="SynthForge network"):
            net_of(tensors, config)


def test_wrong_sizes_are_refused():
    with pytest.raises(InputError):
        BackboneConfig(features=32)
    with pytest.raises(InputError):
        BackboneConfig(size=100)
    with pytest.raises(InputError):
        LabelConfig(())
    with pytest.raises(ShapeError, match="64, 64"):
        SyntheticBackbone(MINI)(torch.zeros(1, 3, 32, 32))


def test_heads_that_nobody_asks_stay_silent():
    torch.manual_seed(0)
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    for tasks, with_depth, silent in ((("seg",), False, ("depth", "kps")), (("seg",), True, ("kps",)), (("kps",), False, ("seg", "depth"))):
        net = FineTuned(SyntheticBackbone(MINI), LabelConfig(tasks, 11, True, with_depth, width=4)).eval()
        asked = []
        for name in TASKS:
            getattr(net.backbone, name).register_forward_hook(lambda *_, name=name, asked=asked: asked.append(name))
        net(images)
        assert set(asked) == set(TASKS) - set(silent)
        said = net.synthetic(images)
        assert said.seg is not None and said.depth is not None and said.coords is not None
    assert SyntheticBackbone(BackboneConfig(64, 16, 8, 20, MINI.hourglass, 4)).seg.width == 4
