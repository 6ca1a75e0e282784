"My3DGen's adapters: against its own code's numbers (facts/eg3d_my3dgen.md 2.1 and 3), in a batch row by row, merged and taken out, saved and refused."

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from fixture_files import fixture

from facelab.lab.arrays import read_safetensors, write_safetensors
from facelab.lab.errors import InputError, ShapeError
from facelab.lab.files import read_json, write_json
from facelab.lab.train import Player, TrainConfig, train
from facelab.my3dgen.adapter import PLACES, Adapter, AdapterConfig, Merged, base_hash, changes_of, count_numbers, load_adapter, merged, save_adapter, size_table, targets
from facelab.nets.eg3d import EG3DS, EG3DConfig, Generator
from facelab.nets.stylegan2 import StyleGAN2Config
from facelab.nets.superres import SUPERRES
from facelab.nets.volume import VolumeConfig

SMALL = EG3DConfig(StyleGAN2Config(z_dim=32, embed=16, hidden=48, channel_base=1024, channel_max=8), VolumeConfig(12, 12), SUPERRES["2X"], neural_size=32)


def gap(ours, theirs):
    return float((ours - theirs).abs().max())


@pytest.fixture(scope="module")
def small():
    net = Generator(SMALL).eval().requires_grad_(False)
    net.load_state_dict(read_safetensors(fixture("eg3d/fixture_A.state_dict.safetensors")))
    return net


@pytest.fixture(scope="module")
def numbers():
    return read_safetensors(fixture("eg3d/fixture_A.io.safetensors"))


def official(net, rank, alpha):
    "The fixture's adapter of this rank, and the pictures that My3DGen's wrappers drew with it."
    held = read_safetensors(fixture("eg3d/fixture_A.lora.safetensors"))
    assert {"r": rank, "alpha": alpha} in json.loads(fixture("eg3d/fixture_A.lora.json").read_text())["sets"]
    adapter = Adapter(net, AdapterConfig(rank, float(alpha), extras=False)).requires_grad_(False)
    prefix = f"r{rank}_alpha{alpha}."
    adapter.load_state_dict({key.removeprefix(f"{prefix}lora."): value for key, value in held.items() if key.startswith(f"{prefix}lora.")}, strict=True)
    return adapter, {key.removeprefix(f"{prefix}out."): value for key, value in held.items() if key.startswith(f"{prefix}out.")}


@pytest.mark.parametrize(("rank", "alpha"), [(1, 1), (3, 2)])
def test_official_adapters(small, numbers, rank, alpha):
    adapter, theirs = official(small, rank, alpha)
    seen = small.synthesis(numbers["ws"], numbers["c"], changes=adapter.changes(small))
    assert gap(seen.image, theirs["image"]) < 1e-3 and gap(seen.raw, theirs["image_raw"]) < 3e-4
    alpha_map = small.features(small.planes(numbers["ws"], changes=adapter.changes(small)), numbers["c"])[2]
    off = (seen.depth - theirs["image_depth"]).abs()
    assert off[alpha_map > 1e-3].max() < 3e-4 and (off * alpha_map).max() < 3e-4
    assert gap(seen.raw, numbers["mid.image_raw"]) > 0.05, "the adapter changes nothing"
    base = base_hash(small)
    with merged(small, adapter):
        inside = small.synthesis(numbers["ws"], numbers["c"])
    assert gap(inside.image, theirs["image"]) < 1e-3 and gap(inside.raw, theirs["image_raw"]) < 3e-4 and base_hash(small) == base


def test_a_mixed_batch_of_official_people(small, numbers):
    "Rows: rank 3, the base, rank 1; each as its own code drew it."
    (one, first), (three, third) = official(small, 1, 1), official(small, 3, 2)
    order = [0, 1, 0]
    seen = small.synthesis(numbers["ws"][order], numbers["c"][order], changes=changes_of([one, None, three], small, [2, 1, 0]))
    for row, theirs in enumerate((third["image"][:1], numbers["mid.image"][1:], first["image"][:1])):
        assert gap(seen.image[row : row + 1], theirs) < 1e-3, row


def test_loralib_shapes_are_another_person(small, numbers):
    config = AdapterConfig(2, 2.0, shapes="loralib", extras=False)
    adapter = Adapter(small, config, torch.Generator().manual_seed(0))
    layer = small.backbone.synthesis.b8.conv0
    assert adapter.part("backbone.synthesis.b8.conv0", "lora_A").shape == (6, 24) and adapter.part("backbone.synthesis.b8.conv0", "lora_B").shape == (24, 6)
    with torch.no_grad():
        for name, value in adapter.named_parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
    change = adapter.changes(small)[layer]
    a, b = adapter.part("backbone.synthesis.b8.conv0", "lora_A"), adapter.part("backbone.synthesis.b8.conv0", "lora_B")
    assert torch.allclose((change.b[0] @ change.a[0]).view(8, 8, 3, 3), (b @ a).view(8, 8, 3, 3))
    with torch.no_grad():
        assert gap(small.synthesis(numbers["ws"], numbers["c"], changes=adapter.changes(small)).raw, numbers["mid.image_raw"]) > 0.01


# Counting


def test_numbers_of_the_paper():
    table = size_table().set_index(["shapes", "rank"])
    assert table.low_rank["my3dgen"].tolist() == [219_174, 438_348, 876_696, 1_753_392, 3_506_784]
    assert table.with_extras["my3dgen", 1] == 243_965 and table.with_extras["loralib", 4] == 585_839
    assert table.low_rank["loralib"].tolist()[:3] == [140_262, 280_524, 561_048]
    assert [round(x, 1) for x in table.fewer_low_rank["my3dgen"]] == [139.9, 69.9, 35.0, 17.5, 8.7] and round(table.fewer["my3dgen", 1], 1) == 125.7
    assert round(30.6e6 / 240e3, 1) == 127.5  # the printed 127x: both numbers rounded first
    assert table.loc[("my3dgen", 1), list(PLACES)].tolist() == [171_648, 3_616, 18_944, 20_448, 390, 4_128]


def test_numbers_by_place():
    with torch.device("meta"):
        full = Generator(EG3DS["ffhq512_128"])
    part = lambda *places: count_numbers(full, AdapterConfig(places=places, extras=False))["all"]
    assert part(*PLACES[:3]) == 194_208 and part(PLACES[0], PLACES[3]) == 192_096 and part(*(p for p in PLACES if "affine" not in p)) == 196_102
    assert count_numbers(full, AdapterConfig())["extras"] == 24_791
    assert not any("mapping" in name or "decoder" in name for name in targets(full))
    with torch.device("meta"):
        adapter = Adapter(full)
    assert sum(p.numel() for p in adapter.parameters()) == 243_965


# Mixed batches, on the small generator that the lab trains


@pytest.fixture(scope="module")
def mini():
    torch.manual_seed(0)
    net = Generator(EG3DS["mini64"]).eval().requires_grad_(False)
    net.decoder.net[2].weight[0].mul_(5)
    return net


def person(net, seed, **config):
    "An adapter with something in every number."
    adapter = Adapter(net, AdapterConfig(**config), torch.Generator().manual_seed(seed)).requires_grad_(False)
    for k, value in enumerate(adapter.parameters()):
        value.add_(0.15 * torch.randn(value.shape, generator=torch.Generator().manual_seed(100 * seed + k)))
    return adapter


def views(net, count, seed=0):
    "Styles, and cameras about the front."
    draw = torch.Generator().manual_seed(seed)
    ws = net.mapping(torch.randn(count, net.config.backbone.z_dim, generator=draw))
    yaw = 0.8 * torch.rand(count, generator=draw) - 0.4
    cams = torch.zeros(count, 25)
    cams[:, [0, 10]], cams[:, 2], cams[:, 8], cams[:, 5], cams[:, 15] = yaw.cos()[:, None] * torch.tensor([1.0, -1.0]), -yaw.sin(), -yaw.sin(), -1.0, 1.0
    cams[:, 3], cams[:, 11] = 2.7 * yaw.sin(), 2.7 * yaw.cos()
    cams[:, [16, 20]], cams[:, [18, 21]], cams[:, 24] = 4.2647, 0.5, 1.0
    return ws, cams


@pytest.mark.parametrize("people", [[dict(), dict(), dict(), dict()], [dict(rank=2, alpha=1.0), dict(rank=1), dict(rank=4, extras=False), dict(places=PLACES[:3])]])
def test_every_row_is_another_person(mini, people):
    ws, cams = views(mini, len(people))
    adapters = [person(mini, k + 1, **config) for k, config in enumerate(people)]
    together = mini.synthesis(ws, cams, changes=changes_of(adapters, mini))
    for k, adapter in enumerate(adapters):
        alone = mini.synthesis(ws[k : k + 1], cams[k : k + 1], changes=adapter.changes(mini))
        assert all(gap(a[k : k + 1], b) < 1e-3 for a, b in zip(together, alone)), k
        assert gap(mini.synthesis(ws[k : k + 1], cams[k : k + 1]).image, alone.image) > 0.02


def test_rows_may_repeat_people_in_any_order(mini):
    ws, cams = views(mini, 5)
    adapters, who = [person(mini, 1), person(mini, 2), person(mini, 3)], [2, 0, 2, 0, 2]  # nobody is person 1
    together = mini.synthesis(ws, cams, changes=changes_of(adapters, mini, who))
    for k, p in enumerate(who):
        assert gap(together.image[k : k + 1], mini.synthesis(ws[k : k + 1], cams[k : k + 1], changes=adapters[p].changes(mini)).image) < 1e-3


def test_views_share_planes(mini):
    ws, cams = views(mini, 3)
    changes = person(mini, 4).changes(mini)
    planes = mini.planes(ws[:1], changes=changes)
    for k in range(3):
        assert gap(mini.render(planes, ws[:1], cams, changes=changes).image[k], mini.synthesis(ws[:1], cams[k : k + 1], changes=changes).image[0]) < 1e-3


def test_gradients_of_a_mixed_batch_are_those_of_its_rows(mini):
    ws, cams = views(mini, 2)
    adapters = [person(mini, k).requires_grad_() for k in (1, 2)]
    mini.synthesis(ws, cams, neural_size=8, changes=changes_of(adapters, mini)).raw.square().sum().backward()
    for k, adapter in enumerate(adapters):
        alone = person(mini, k + 1).requires_grad_()
        mini.synthesis(ws[k : k + 1], cams[k : k + 1], neural_size=8, changes=alone.changes(mini)).raw.square().sum().backward()
        for (name, a), b in zip(adapter.named_parameters(), alone.parameters()):
            if "superresolution" not in name:
                assert (a.grad - b.grad).norm() <= 2e-3 * b.grad.norm() + 1e-6, name


def test_merge_and_unmerge(mini):
    ws, cams = views(mini, 2)
    before = {name: value.clone() for name, value in mini.state_dict().items()}
    adapter = person(mini, 5, rank=2)
    outside = mini.synthesis(ws, cams, changes=adapter.changes(mini))
    held = Merged(mini, adapter)
    inside = mini.synthesis(ws, cams)
    assert all(gap(a, b) < 1e-3 for a, b in zip(inside, outside))
    changed = [name for name, value in mini.state_dict().items() if not torch.equal(value, before[name])]
    assert len(changed) == len(held.before) and not any("mapping" in name or "decoder" in name for name in changed)
    held.undo()
    assert all(torch.equal(value, before[name]) and value.stride() == before[name].stride() for name, value in mini.state_dict().items())
    with pytest.raises(RuntimeError), merged(mini, adapter):
        raise RuntimeError("in the middle")
    assert all(torch.equal(value, before[name]) for name, value in mini.state_dict().items())


def test_nobody_leaves_before_those_who_came_later(mini):
    before = {name: value.clone() for name, value in mini.state_dict().items()}
    first, second = Merged(mini, person(mini, 5)), Merged(mini, person(mini, 6))
    with pytest.raises(InputError, match="reverse order"):
        first.undo()
    second.undo()
    first.undo()
    first.undo()  # again: nothing to do
    assert all(torch.equal(value, before[name]) for name, value in mini.state_dict().items())
    with merged(mini, person(mini, 5)), merged(mini, person(mini, 6)):
        assert not torch.equal(mini.state_dict()["superresolution.block0.conv0.weight"], before["superresolution.block0.conv0.weight"])
    assert all(torch.equal(value, before[name]) for name, value in mini.state_dict().items())


def test_an_adapter_says_that_it_belongs_elsewhere(mini):
    config = EG3DS["mini64"]
    narrow = Generator(replace(config, backbone=replace(config.backbone, channels=(64, 64, 32, 32, 16)))).eval()
    large = Generator(replace(config, backbone=replace(config.backbone, size=128, channels=(128, 96, 64, 32, 16, 8)))).eval()
    ws, cams = views(mini, 1)
    for other in (narrow, large):
        adapter = Adapter(other)
        for call in (lambda: adapter.changes(mini), lambda: changes_of([None, adapter], mini), lambda: Merged(mini, adapter), lambda: mini.synthesis(ws, cams, changes=adapter.changes(mini))):
            with pytest.raises(ShapeError, match="another generator|made for"):
                call()


def test_changes_for_another_copy_are_no_changes_here(mini):
    "The keys are layers: those of a copy are others, and would be looked up in vain."
    ws, cams = views(mini, 2)
    twin, adapter = copy.deepcopy(mini), person(mini, 3)
    own, other = adapter.changes(twin), adapter.changes(mini)
    assert gap(twin.synthesis(ws, cams, changes=own).image, mini.synthesis(ws, cams, changes=other).image) == 0
    planes, mixed = twin.planes(ws), own | dict(list(other.items())[:1])
    for call in (lambda: twin.synthesis(ws, cams, changes=other), lambda: twin.planes(ws, changes=other), lambda: twin.render(planes, ws, cams, changes=other), lambda: twin.planes(ws, changes=mixed), lambda: twin.planes(ws, changes=changes_of([None, adapter], mini))):
        with pytest.raises(ShapeError, match="not this network's"):
            call()


# Files


def test_file_of_the_full_size(tmp_path):
    torch.manual_seed(0)
    net = Generator(EG3DConfig())
    save_adapter(tmp_path, Adapter(net), net)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    size = sum(p.stat().st_size for p in tmp_path.iterdir())
    assert 0.48e6 < size < 0.55e6


def test_adapter_goes_onto_a_copy_of_its_base_and_no_other(mini, tmp_path):
    adapter = person(mini, 6)
    save_adapter(tmp_path, adapter, mini, half=False)
    twin = Generator(mini.config).eval().requires_grad_(False)
    with pytest.raises(InputError, match="base"):
        load_adapter(tmp_path, twin)
    twin.load_state_dict(mini.state_dict())
    back = load_adapter(tmp_path, twin)
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), adapter.state_dict().values()))
    ws, cams = views(mini, 1)
    assert torch.equal(twin.synthesis(ws, cams, changes=back.changes(twin)).image, mini.synthesis(ws, cams, changes=adapter.changes(mini)).image)
    with merged(twin, back), pytest.raises(InputError, match="base"):
        load_adapter(tmp_path, twin)
    twin.decoder.net[0].bias[0] += 1e-6
    with pytest.raises(InputError, match="base"):
        load_adapter(tmp_path, twin)
    assert load_adapter(tmp_path, twin, check=False).config == adapter.config


def test_half_precision_is_close(mini, tmp_path):
    adapter, (ws, cams) = person(mini, 7), views(mini, 1)
    save_adapter(tmp_path, adapter, mini)
    back = load_adapter(tmp_path, mini)
    assert gap(mini.synthesis(ws, cams, changes=back.changes(mini)).image, mini.synthesis(ws, cams, changes=adapter.changes(mini)).image) < 0.02


def test_bad_adapter_files(mini, tmp_path, monkeypatch):
    save_adapter(tmp_path, person(mini, 8), mini)
    said, tensors = read_json(tmp_path / "adapter_config.json"), read_safetensors(tmp_path / "adapter_model.safetensors")

    def refused(config=said, weights=tensors):
        write_json(tmp_path / "adapter_config.json", config)
        write_safetensors(tmp_path / "adapter_model.safetensors", weights)
        with pytest.raises(InputError) as caught:
            load_adapter(tmp_path, mini)
        return str(caught.value)

    name = next(iter(tensors))
    assert "rank 3" in refused(said | {"config": said["config"] | {"rank": 3}})
    assert name in refused(weights={key: value for key, value in tensors.items() if key != name})
    assert "finite" in refused(weights=tensors | {name: torch.full_like(tensors[name], torch.nan)})
    for name_, values in {"rank": (1.5, 0, 10_000_000, 10**30, True, "1", None), "alpha": ("x", None, True, [1.0], 10**400), "places": ([1], [], "backbone.conv", None, 3, {"backbone.conv": 1}), "extras": ("no", 0, None), "shapes": (None, 3, ["my3dgen"])}.items():
        for value in values:
            assert "AdapterConfig" in refused(said | {"config": said["config"] | {name_: value}}), (name_, value)
    for alpha in (math.nan, math.inf):
        with pytest.raises(InputError, match="alpha"):
            AdapterConfig(alpha=alpha)
    held = sum(value.numel() for value in tensors.values())
    with monkeypatch.context() as patched:  # a rank that the file has no numbers for is refused before any memory is asked for
        made, register = [], torch.nn.Module.register_parameter
        patched.setattr(torch.nn.Module, "register_parameter", lambda self, name, value: made.append(0 if value is None or value.is_meta else value.numel()) or register(self, name, value))
        assert "rank 32000" in refused(said | {"config": said["config"] | {"rank": 32_000}}) and sum(made) < held
    assert "colour" in refused(said | {"config": said["config"] | {"colour": 3}})
    assert "kind" in refused({"peft_type": "LORA", "r": 8})
    write_json(tmp_path / "adapter_config.json", said)
    raw = (tmp_path / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(InputError):
        load_adapter(tmp_path, mini)
    with pytest.raises(InputError):
        load_adapter(tmp_path / "nowhere", mini)
    broken = person(mini, 9)
    broken.part(broken.names[0], "lora_A").fill_(torch.inf)
    with pytest.raises(InputError, match="finite"):
        save_adapter(tmp_path / "new", broken, mini)
    assert not (tmp_path / "new").exists()


def test_adapters_that_do_not_go_together(mini, small):
    ws, cams = views(mini, 2)
    with pytest.raises(ShapeError):
        changes_of([person(mini, 1), person(mini, 2, shapes="loralib")], mini)
    with pytest.raises(ShapeError):
        mini.synthesis(ws, cams, changes=changes_of([person(mini, k) for k in (1, 2, 3)], mini))
    with pytest.raises(ShapeError):
        mini.synthesis(ws, cams, changes=changes_of([person(mini, k) for k in (1, 2)], mini, [0, 2]))
    with pytest.raises(InputError):
        Adapter(mini.decoder)


def test_the_lab_trains_an_adapter_and_nothing_else(mini, tmp_path):
    ws, cams = views(mini, 1)
    goal, before = mini.synthesis(ws, cams, neural_size=8, changes=person(mini, 1).changes(mini)).raw, base_hash(mini)
    adapter = Adapter(mini, AdapterConfig(), torch.Generator().manual_seed(0))

    def loss_fn(models, batch, step):
        raw = models["generator"].synthesis(ws, cams, neural_size=8, changes=models["adapter"].changes(models["generator"])).raw
        return {"loss": (raw - goal).square().mean()}

    player = Player("person", loss_fn, ["adapter"], lambda weights: torch.optim.Adam(weights, 5e-3))
    done = train(TrainConfig(6, 1, log_every=1, keep_frozen=False, device="cpu"), {"generator": mini, "adapter": adapter}, [player], None, tmp_path / "run", progress=False)
    losses = done.curve["person/loss"].tolist()
    assert losses[-1] < 0.9 * losses[0] and base_hash(mini) == before
    newest = sorted((tmp_path / "run").rglob("*.safetensors"), key=lambda p: p.stat().st_mtime)[-1]
    assert newest.stat().st_size < 1_000_000  # the generator is not in the checkpoint


def test_a_mixed_batch_costs_little_more(mini):
    "At most 1.25 of a batch of one person, in processor time; a busy machine gets three tries."
    from facelab.my3dgen.serving import mixed_batch_cost

    adapters, (_, cams) = [person(mini, k) for k in range(8)], views(mini, 1)
    ratios = []
    for _ in range(3):
        ratios.append(mixed_batch_cost(mini, adapters, cams, 7)["ratio"])
        if ratios[-1] <= 1.25:
            break
    assert min(ratios) <= 1.25, ratios
