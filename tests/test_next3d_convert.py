"An official Next3D pickle becomes safetensors, a configuration and a mask; nothing in it is run."

import pickle
import sys
import types

import numpy as np
import pytest
import torch
from fixture_files import fixture
from PIL import Image

from facelab.lab.arrays import read_safetensors, write_safetensors
from facelab.lab.errors import InputError, UnsafeFileError
from facelab.lab.files import read_json, write_json
from facelab.nets.next3d_convert import convert_next3d, load_next3d, read_official_next3d

RENDERING = {
    "superresolution_module": "training_avatar_texture.superresolution.SuperresolutionHybrid2X", "depth_resolution": 12, "depth_resolution_importance": 12, "ray_start": 2.25, "ray_end": 3.3,
    "box_warp": 1, "avg_camera_radius": 2.7, "avg_camera_pivot": [0, 0, 0.2], "c_scale": 1, "decoder_lr_mul": 1, "superresolution_noise_mode": "none", "sr_antialias": True, "clamp_mode": "softplus",
}  # fmt: skip
KWARGS = {"z_dim": 16, "c_dim": 25, "w_dim": 512, "img_resolution": 128, "img_channels": 3, "channel_base": 1024, "channel_max": 16, "mapping_kwargs": {"num_layers": 2}, "sr_num_fp16_res": 0, "rendering_kwargs": RENDERING}  # fmt: skip


class Calls:
    "Pickles as a call."

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def persistent(function, kind, tensors, above=""):
    "Stubs of the official form for a state dict."
    own = {name: value for name, value in tensors.items() if "." not in name}
    inner = {}
    for name, value in tensors.items():
        if "." in name:
            first, rest = name.split(".", 1)
            inner.setdefault(first, {})[rest] = value
    modules = {name: persistent(function, "SuperresolutionHybrid2X" if name == "superresolution" else "Layer", parts) for name, parts in inner.items()}
    state = {"_init_args": (), "_init_kwargs": {}, "_parameters": {}, "_buffers": own, "_modules": modules}
    if kind == "TriPlaneGenerator":
        state |= {"_init_kwargs": KWARGS, "rendering_kwargs": RENDERING, "neural_rendering_resolution": 32}
    return Calls(function, {"type": "class", "version": 6, "module_src": "raise SystemExit('ran')", "class_name": kind, "state": state})


def put(path, tensors, kind="TriPlaneGenerator"):
    "Write a pickle whose classes are not there when it is read."
    module = types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("ran")

    _reconstruct_persistent_obj.__module__, _reconstruct_persistent_obj.__qualname__ = module.__name__, "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    sys.modules |= {"torch_utils": types.ModuleType("torch_utils"), "torch_utils.persistence": module}
    try:
        path.write_bytes(pickle.dumps({"G_ema": persistent(_reconstruct_persistent_obj, kind, tensors)}))
    finally:
        del sys.modules["torch_utils"], sys.modules["torch_utils.persistence"]
    return path


@pytest.fixture(scope="module")
def tensors():
    with np.load(fixture("next3d/state_dict.npz")) as file:
        return {key: torch.from_numpy(file[key].astype(np.int64) if file[key].dtype == np.int32 else file[key]) for key in file.files}


@pytest.fixture(scope="module")
def mask(tmp_path_factory):
    with np.load(fixture("next3d/mesh.npz")) as file:
        grey = file["uv_face_eye_mask"]
    path = tmp_path_factory.mktemp("mask") / "uv_face_eye_mask.png"
    Image.fromarray(np.repeat(grey[..., None], 3, 2)).save(path)
    return path


@pytest.fixture(scope="module")
def converted(tensors, mask, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    return convert_next3d(put(folder / "net.pkl", tensors), mask, folder / "next3d"), folder


def test_converted_generator_holds_the_official_weights(converted, tensors):
    config, folder = converted
    assert sorted(path.name for path in (folder / "next3d").iterdir()) == ["config.json", "mask.safetensors", "model.safetensors"]
    assert (config.num_faces, config.num_uv, config.num_dense) == (2472, 1276, 0)
    assert (config.mouth_low, config.blend_low, config.neural_size, config.hidden) == (4, 32, 32, 64)
    assert config.volume.axes == ("xy", "xz", "zy") and config.volume.coarse == 12 and not config.both_sides and not config.aligned and config.size == 128
    net = load_next3d(folder / "next3d")
    state = net.state_dict()
    assert net.config == config and all(torch.equal(state[name].to(value.dtype), value) for name, value in tensors.items()) and not net.training
    assert 0.4 < net.face_mask.mean() < 0.95 and set(net.face_mask.unique().tolist()) == {0.0, 1.0}
    with np.load(fixture("next3d/io.npz")) as io:
        ws = net.mapping(torch.from_numpy(io["z"]), torch.from_numpy(io["c"]), 0.7, 14)
        assert np.abs(ws.numpy() - io["ws"]).max() < 1e-4


def test_damaged_files(converted, tensors, mask, tmp_path):
    folder = converted[1] / "next3d"
    for name, change in (
        ("gone", lambda t: t.pop("decoder.net.0.bias")),
        ("shape", lambda t: t.update({"decoder.net.0.bias": torch.zeros(3)})),
        ("finite", lambda t: t.update({"decoder.net.0.bias": torch.full((64,), torch.nan)})),
        ("points", lambda t: t.update({"uvfaces": t["uvfaces"] + 5000})),
        ("eg3d", lambda t: [t.pop(key) for key in list(t) if key.startswith("mouth_backbone")]),
    ):
        broken = dict(tensors)
        change(broken)
        with pytest.raises(InputError):
            convert_next3d(put(tmp_path / f"{name}.pkl", broken), mask, tmp_path / name)
        assert not (tmp_path / name).exists()
    for part in (0.0, 0.3, 0.99):
        raw = (converted[1] / "net.pkl").read_bytes()
        (tmp_path / "cut.pkl").write_bytes(raw[: int(part * len(raw))])
        with pytest.raises(InputError):
            read_official_next3d(tmp_path / "cut.pkl")
    said = read_json(folder / "config.json")
    for name, config in (("kind", said | {"kind": "eg3d"}), ("unknown", said | {"config": said["config"] | {"mouths": 2}})):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "config.json", config)
        with pytest.raises(InputError):
            load_next3d(tmp_path / name)
    for value in (torch.ones(3, 3), torch.full((256, 256), torch.nan)):
        write_json(tmp_path / "config.json", said)
        write_safetensors(tmp_path / "model.safetensors", read_safetensors(folder / "model.safetensors"))
        write_safetensors(tmp_path / "mask.safetensors", {"face_mask": value})
        with pytest.raises(InputError):
            load_next3d(tmp_path)


def test_masks_that_are_none(converted, tmp_path):
    Image.fromarray(np.zeros((256, 256, 3), np.uint8)).save(tmp_path / "black.png")
    Image.fromarray(np.full((64, 64, 3), 255, np.uint8)).save(tmp_path / "small.png")
    for name in ("black.png", "small.png", "none.png"):
        with pytest.raises(InputError):
            convert_next3d(converted[1] / "net.pkl", tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pickle_that_runs_code(mask, tmp_path):
    marker = tmp_path / "marker"
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"G_ema": Calls(exec, f"open({str(marker)!r}, 'w')")}))
    with pytest.raises(UnsafeFileError):
        convert_next3d(tmp_path / "evil.pkl", mask, tmp_path / "out")
    for name, value in (("list", [1, 2]), ("numbers", {"G_ema": 3}), ("none", {"D": None})):
        (tmp_path / name).write_bytes(pickle.dumps(value))
        with pytest.raises(InputError):
            convert_next3d(tmp_path / name, mask, tmp_path / "out")
    assert not marker.exists() and not (tmp_path / "out").exists()
