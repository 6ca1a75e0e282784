"Official EG3D pickles become safetensors and JSON; nothing in them is run, and what is wrong with a file is said."

import pickle
import subprocess
import sys
import types

import pytest
import torch
from fixture_files import fixture

from facelab.lab.arrays import read_safetensors, write_safetensors
from facelab.lab.errors import InputError, UnsafeFileError
from facelab.lab.files import read_json, write_json
from facelab.nets.eg3d import Generator
from facelab.nets.eg3d_convert import backbone_config, convert_eg3d, load_eg3d, read_official, read_official_discriminator
from facelab.nets.stylegan2_discriminator import DualDiscriminator
from facelab.nets.triplane import NEXT3D_AXES, RELEASED_AXES

DISTINCT = "eg3d/eg3d_small_stubsrc_fp32_distinct.pkl"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "eg3d"
    config = convert_eg3d(fixture(DISTINCT), folder)
    return config, folder


def test_converted_generator_gives_the_official_picture(converted):
    config, folder = converted
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert config.volume.axes == RELEASED_AXES and config.volume.coarse == config.volume.fine == 8 and config.neural_size == 32 and config.size == 128
    net = load_eg3d(folder)
    assert net.config == config and not net.training and not any(p.requires_grad for p in net.parameters())
    expected = read_safetensors(fixture("eg3d/eg3d_small_fp32_distinct.expected.safetensors"))
    ws = net.mapping(expected["z"], expected["c"], 0.7)
    assert (ws - expected["ws"]).abs().max() < 1e-4
    seen = net.synthesis(ws, expected["c"])
    assert (seen.image - expected["mid.image"]).abs().max() < 1e-3 and (seen.raw - expected["mid.image_raw"]).abs().max() < 3e-4
    assert (seen.depth - expected["mid.image_depth"]).abs().max() < 1e-2


def test_pickle_and_folder_are_one_generator(converted, tmp_path):
    direct, folder = load_eg3d(fixture(DISTINCT)), load_eg3d(converted[1])
    assert direct.config == folder.config and all(torch.equal(a, b) for a, b in zip(direct.state_dict().values(), folder.state_dict().values()))
    assert read_official(fixture(DISTINCT), "G")[1].keys() == direct.state_dict().keys()
    convert_eg3d(fixture(DISTINCT), tmp_path / "half", half=True)
    gaps = [(a - b).abs().max() / a.abs().max().clamp(min=1e-6) for a, b in zip(direct.state_dict().values(), load_eg3d(tmp_path / "half").state_dict().values())]
    assert max(gaps) < 1e-3 and (tmp_path / "half" / "model.safetensors").stat().st_size < 0.52 * (converted[1] / "model.safetensors").stat().st_size


def test_half_precision_file(tmp_path):
    config, state = read_official(fixture("eg3d/eg3d_small_stubsrc.pkl"))
    assert len(state) == 177 and all(value.dtype == torch.float32 for value in state.values())


def test_discriminator():
    config, state = read_official_discriminator(fixture(DISTINCT))
    net = DualDiscriminator(config)
    net.load_state_dict(state)
    assert config.size == 128 and config.group == 2 and len(state) == 74
    assert torch.isfinite(net(torch.randn(2, 3, 128, 128), torch.randn(2, 3, 32, 32), torch.randn(2, 25))).all()


def test_largest_values_are_the_files(monkeypatch):
    "Written down, as a number or as none; where the file says nothing, the official blocks' 256."
    import facelab.nets.eg3d_convert as page

    plain = {"z_dim": 32, "c_dim": 25, "w_dim": 32}
    assert [backbone_config(plain | more).clamp for more in ({}, {"conv_clamp": None}, {"conv_clamp": 64})] == [256, None, 64]
    data = page.load_pickle(fixture(DISTINCT))
    for said, clamp in ((None, None), (8.0, 8.0), ("nothing", 256)):
        kwargs = {name: value for name, value in data["D"].kwargs.items() if name != "conv_clamp"}
        data["D"].kwargs.clear()
        data["D"].kwargs.update(kwargs | ({} if said == "nothing" else {"conv_clamp": said}))
        monkeypatch.setattr(page, "load_pickle", lambda path: data)
        net = DualDiscriminator(read_official_discriminator("any.pkl")[0])
        assert net.b128.conv0.clamp == net.b4.conv.clamp == clamp


@pytest.fixture()
def altered(monkeypatch):
    "The official pickle, with something else in its generator."
    import facelab.nets.eg3d_convert as page

    def alter(**parts):
        data = page.load_pickle(fixture(DISTINCT))
        network = data["G_ema"]
        for name, value in parts.items():
            if name == "plane_axes":
                network.state["_modules"]["renderer"].state[name] = value
            elif name in network.kwargs:
                network.kwargs[name] = value
            else:
                network.state["rendering_kwargs"][name] = value
        with monkeypatch.context() as patched:
            patched.setattr(page, "load_pickle", lambda path: data)
            return read_official("altered.pkl")

    return alter


def test_corrected_axes_are_the_files(altered):
    "A fork's third plane: read where its own matrices put a point, by the authors' rule, point @ inverse."
    eye = torch.eye(3)
    matrices = torch.stack([eye, eye[[0, 2, 1]], eye[[2, 1, 0]]])
    config, state = altered(plane_axes=matrices)
    assert config.volume.axes == NEXT3D_AXES != RELEASED_AXES
    net = Generator(config).eval()
    net.load_state_dict(state)
    planes, points = torch.randn(1, 3, 32, 8, 8, generator=torch.Generator().manual_seed(0)), torch.rand(1, 20, 3, generator=torch.Generator().manual_seed(1)) - 0.5
    at = (2 / config.volume.box * points[0] @ torch.linalg.inv(matrices))[..., :2]
    by_hand = torch.nn.functional.grid_sample(planes[0], at[:, None], align_corners=False)[:, :, 0].mean(0).T[None]
    density, _ = net.sample_density(planes, points)
    assert torch.allclose(density, net.decoder(by_hand)[0], atol=1e-5)
    assert not torch.allclose(density, load_eg3d(fixture(DISTINCT)).sample_density(planes, points)[0], atol=1e-3)


@pytest.mark.parametrize(
    "parts",
    [{"plane_axes": torch.zeros(3, 3, 3)}, {"plane_axes": torch.eye(3)}, {"plane_axes": torch.full((3, 3, 3), torch.nan)}, {"plane_axes": torch.zeros(0, 3, 3)}, {"plane_axes": "xyz"}, {"plane_axes": torch.eye(3).expand(3, 3, 3) * 0.5}]
    + [{name: value} for name in ("z_dim", "w_dim", "channel_base") for value in ("x", 10**12, 10**30, -3, 0, 2.5, None)]
    + [{"box_warp": "wide"}, {"ray_start": float("nan")}, {"depth_resolution": 1.5}, {"depth_resolution": 10**12}, {"avg_camera_pivot": [0, 0]}, {"mapping_kwargs": {"num_layers": "two"}}],
    ids=str,
)
def test_numbers_that_no_generator_has(altered, parts):
    with pytest.raises(InputError):
        altered(**parts)


def test_from_a_shell(tmp_path):
    call = [sys.executable, "-m", "facelab.nets.eg3d_convert"]
    bad = subprocess.run([*call, str(tmp_path / "none.pkl"), str(tmp_path / "no")], capture_output=True, text=True)
    assert bad.returncode == 1 and "facelab:" in bad.stderr and "Traceback" not in bad.stderr and not (tmp_path / "no").exists()


class Runs:
    "Pickles as a call."

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_a_pickle_that_runs_code(tmp_path):
    marker = tmp_path / "marker"
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"G_ema": Runs(exec, f"open({str(marker)!r}, 'w')")}))
    with pytest.raises(UnsafeFileError):
        convert_eg3d(path, tmp_path / "out")
    assert not marker.exists() and not (tmp_path / "out").exists()


def test_source_in_a_persistent_network_is_not_run(tmp_path):
    "A network of the official form whose source writes a marker: refused for its content, and the marker does not appear."
    marker, module = tmp_path / "marker", types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("ran")

    _reconstruct_persistent_obj.__module__, _reconstruct_persistent_obj.__qualname__ = module.__name__, "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    meta = {"type": "class", "version": 6, "module_src": f"open({str(marker)!r}, 'w')", "class_name": "TriPlaneGenerator", "state": {"_init_args": (), "_init_kwargs": {}}}
    sys.modules |= {"torch_utils": types.ModuleType("torch_utils"), "torch_utils.persistence": module}
    try:
        (tmp_path / "net.pkl").write_bytes(pickle.dumps({"G_ema": Runs(_reconstruct_persistent_obj, meta)}))
    finally:
        del sys.modules["torch_utils"], sys.modules["torch_utils.persistence"]
    with pytest.raises(InputError, match="TriPlaneGenerator"):
        convert_eg3d(tmp_path / "net.pkl", tmp_path / "out")
    assert not marker.exists()


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.999])
def test_a_truncated_pickle(tmp_path, part):
    raw = fixture("eg3d/eg3d_small_stubsrc.pkl").read_bytes()
    (tmp_path / "cut.pkl").write_bytes(raw[: int(part * len(raw))])
    with pytest.raises(InputError):
        convert_eg3d(tmp_path / "cut.pkl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_pickles(tmp_path):
    for name, value in (("list", [1, 2]), ("numbers", {"G_ema": 3}), ("none", {"D": None})):
        (tmp_path / name).write_bytes(pickle.dumps(value))
        with pytest.raises(InputError):
            load_eg3d(tmp_path / name)
    with pytest.raises(InputError):
        read_official_discriminator(tmp_path / "none")


def test_damaged_folders(converted, tmp_path):
    config, state = read_json(converted[1] / "config.json"), read_safetensors(converted[1] / "model.safetensors")

    def put(said, tensors):
        write_json(tmp_path / "config.json", said)
        write_safetensors(tmp_path / "model.safetensors", tensors)
        with pytest.raises(InputError) as caught:
            load_eg3d(tmp_path)
        return str(caught.value)

    assert "w_avg" in put(config, {name: value for name, value in state.items() if not name.endswith("w_avg")})
    assert "(17,)" in put(config, state | {"decoder.net.0.bias": torch.zeros(17)})
    assert "finite" in put(config, state | {"decoder.net.0.bias": torch.full((64,), torch.nan)})
    assert "surprise" in put(config, state | {"surprise": torch.zeros(1)})
    assert "kind" in put(config | {"kind": "vqgan"}, state)
    assert "neural_res" in put(config | {"config": config["config"] | {"neural_res": 3}}, state)
    for name, value in (("z_dim", "x"), ("z_dim", 10**12), ("w_dim", 0), ("channels", ["a"]), ("size", 2.0)):
        assert "StyleGAN2Config" in put(config | {"config": config["config"] | {"backbone": config["config"]["backbone"] | {name: value}}}, state)
    assert "InputError" not in put(config | {"config": None}, state)
