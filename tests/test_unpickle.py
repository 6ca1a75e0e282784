"Pickles are read as data: the fixtures' networks come out whole, and no file gets to run, to reach out or to take the memory."

import copyreg
import io
import os
import pickle
import struct
import subprocess
import sys
import time
import types
import zipfile

import numpy as np
import pytest
import scipy.sparse
import torch
from fixture_files import fixture

from facelab.lab.arrays import read_safetensors
from facelab.lab.errors import InputError, UnsafeFileError
from facelab.lab.inert import Stub
from facelab.lab.unpickle import load_checkpoint, load_pickle, state_dict_of


def put(folder, data, name="a.pkl"):
    "A file of these bytes (or of this object, pickled)."
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else pickle.dumps(data))
    return path


class Calls:
    "Pickles as a call of this function with these arguments."

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


# What the official files hold


@pytest.mark.parametrize("name", ["eg3d_small_stubsrc", "eg3d_small_stubsrc_fp32_distinct"])
def test_eg3d_networks_come_out_whole(name):
    "All 177 official keys of the generator; the embedded source (which raises when run) was never executed."
    data = load_pickle(fixture(f"eg3d/{name}.pkl"))
    official = read_safetensors(fixture("eg3d/fixture_A.state_dict.safetensors"))
    assert list(data) == ["training_set_kwargs", "G", "D", "G_ema", "augment_pipe"] and data["augment_pipe"] is None
    generator = data["G_ema"]
    assert generator.kind == "TriPlaneGenerator" and generator.kwargs["img_resolution"] == 128 and generator.kwargs["rendering_kwargs"]["clamp_mode"] == "softplus"
    tensors = state_dict_of(generator)
    assert set(tensors) == set(official) and all(tensors[key].ndim == official[key].ndim and torch.isfinite(tensors[key]).all() for key in official)
    assert len(state_dict_of(data["D"])) == 74
    assert (data["G"] is generator) == ("distinct" not in name)
    assert generator.state["_modules"]["renderer"].state["plane_axes"].shape == (3, 3, 3)


def test_eg3d_weights_give_the_official_w():
    "The mapping network, written out from its formula, gives the ws that the official code gave with these weights."
    data = load_pickle(fixture("eg3d/eg3d_small_stubsrc_fp32_distinct.pkl"))
    expected = read_safetensors(fixture("eg3d/eg3d_small_fp32_distinct.expected.safetensors"))
    weights = {key.removeprefix("backbone.mapping."): value.float() for key, value in state_dict_of(data["G_ema"]).items() if key.startswith("backbone.mapping.")}

    def dense(x, name, rate=1.0):
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return x @ (weight * rate / weight.shape[1] ** 0.5).T + bias * rate

    def unit(x):
        return x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt()

    x = torch.cat([unit(expected["z"].float()), unit(dense(expected["c"], "embed"))], 1)
    for layer in ("fc0", "fc1"):
        x = torch.nn.functional.leaky_relu(dense(x, layer, 0.01), 0.2) * 2**0.5
    ws = weights["w_avg"] + 0.7 * (x - weights["w_avg"])  # truncation psi 0.7
    assert (expected["ws"] - ws[:, None]).abs().max() < 1e-5


def test_eg3d_source_in_the_file_is_not_run(tmp_path):
    "A persistent object whose source writes a marker: the state comes out, the marker does not appear."
    module = types.ModuleType("torch_utils.persistence")
    marker = tmp_path / "marker"

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("ran")

    _reconstruct_persistent_obj.__module__, _reconstruct_persistent_obj.__qualname__ = module.__name__, "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    meta = {"type": "class", "version": 6, "module_src": f"open({str(marker)!r}, 'w')", "class_name": "Net", "state": {"_init_args": (1,), "_init_kwargs": {"w": 2}, "_parameters": {"a": torch.ones(2)}}}
    sys.modules |= {"torch_utils": types.ModuleType("torch_utils"), "torch_utils.persistence": module}
    try:
        path = put(tmp_path, Calls(_reconstruct_persistent_obj, meta))
    finally:
        del sys.modules["torch_utils"], sys.modules["torch_utils.persistence"]
    net = load_pickle(path)
    assert (net.kind, net.args, net.kwargs) == ("Net", (1,), {"w": 2}) and torch.equal(state_dict_of(net)["a"], torch.ones(2)) and not marker.exists()


class Python2(pickle._Pickler):
    "Writes text and bytes as Python 2 wrote its str."

    dispatch = dict(pickle._Pickler.dispatch)

    def save_text(self, value):
        raw = value if isinstance(value, bytes) else value.encode("latin1")
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_text


def test_flame_pickle_of_python_2(tmp_path):
    "Protocol 2, latin1 text, chumpy arrays and a sparse regressor, as in generic_model.pkl."
    module = types.ModuleType("chumpy.ch")
    Ch = type("Ch", (), {"__module__": "chumpy.ch"})
    module.Ch = Ch
    template = np.random.default_rng(0).normal(size=(7, 3))
    chumpy = Ch()
    chumpy.x, chumpy._status = template, "new"
    regressor = scipy.sparse.csc_matrix(np.eye(5, 7))
    model = {"v_template": chumpy, "f": np.arange(6, dtype=np.uint32).reshape(2, 3), "J_regressor": regressor, "bs_style": "lbs", "kintree_table": np.int64([[2**32 - 1, 0], [0, 1]]), "weird": "\xfc\xff"}
    held = io.BytesIO()
    sys.modules |= {"chumpy": types.ModuleType("chumpy"), "chumpy.ch": module}
    try:
        Python2(held, 2).dump(model)
    finally:
        del sys.modules["chumpy"], sys.modules["chumpy.ch"]
    assert b"cchumpy.ch\nCh" in held.getvalue()
    read = load_pickle(put(tmp_path, held.getvalue()))
    assert np.array_equal(read["v_template"], template) and np.array_equal(read["f"], model["f"]) and read["f"].dtype == np.uint32
    assert (read["J_regressor"].toarray() == regressor.toarray()).all() and read["bs_style"] == "lbs" and read["weird"] == "\xfc\xff"
    assert np.array_equal(read["kintree_table"], model["kintree_table"])


def test_text_pickles_of_python_2(tmp_path):
    "Protocol 0, Python 2's default: text as escapes, also of bytes that are no ASCII (FLAME_masks.pkl may be one)."
    raw = np.float32([1.5, -2]).tobytes()
    escaped = repr(raw)[1:].encode()  # 'b' off: what Python 2 printed
    data = (
        b"(dp0\nS'name'\np1\nS'gr\\xfcn'\np2\nsS'left'\np3\ncnumpy.core.multiarray\n_reconstruct\np4\n(cnumpy\nndarray\np5\n(I0\ntp6\nS'b'\np7\ntp8\nRp9\n"
        b"(I1\n(I2\ntp10\ncnumpy\ndtype\np11\n(S'f4'\np12\nI0\nI1\ntp13\nRp14\n(I3\nS'<'\np15\nNNNI-1\nI-1\nI0\ntp16\nbI00\n" + b"S" + escaped + b"\np17\ntp18\nbs."
    )
    held = load_pickle(put(tmp_path, data))
    assert held["name"] == "gr\xfcn" and held["left"].tolist() == [1.5, -2] and held["left"].dtype == np.float32


def test_the_time_grows_with_the_file_and_no_faster(tmp_path):
    "40,000 marks on 40,000 values: a search for each mark would take minutes."
    began = time.process_time()
    assert load_pickle(put(tmp_path, b"\x80\x02" + b"N" * 40_000 + b"(t" * 40_000 + b".")) == ()
    assert time.process_time() - began < 10


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_and_tensors_in_every_protocol(tmp_path, protocol):
    arrays = [np.arange(24).astype(dtype).reshape(2, 3, 4) for dtype in ("<f4", ">f8", "i1", "u2", "c16", "?", "<i8", "f2")]
    arrays += [np.asfortranarray(arrays[0]), arrays[0][:, ::2], np.zeros((0, 3)), np.array("text"), np.array([b"ab", b"c"]), np.array(3.5), np.array([None, "a", 1], dtype=object)]
    tensors = [torch.arange(6).reshape(2, 3).T, torch.ones(2, dtype=torch.bfloat16), torch.tensor(1.5), torch.nn.Parameter(torch.ones(3)), torch.zeros(0, 2), torch.tensor([True])]
    scalars = [np.float32(0.1), np.int64(5), np.bool_(True), 3 + 4j, b"\x00\xff", {1, "a"}, frozenset({2}), bytearray(b"xy")]
    read = load_pickle(put(tmp_path, pickle.dumps([arrays, tensors, scalars], protocol)))
    assert all(np.array_equal(a, b) and a.dtype == b.dtype and a.flags.f_contiguous == b.flags.f_contiguous for a, b in zip(arrays, read[0]))
    assert all(torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride() for a, b in zip(tensors, read[1]))
    assert read[2][:6] == scalars[:6] and set(read[2][6]) == {2} and bytes(read[2][7]) == b"xy"


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_as_torch_reads_them(tmp_path, zipped):
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.LSTM(3, 2))
    optimiser = torch.optim.Adam(net.parameters())
    net(torch.ones(2, 4))[0].sum().backward()
    optimiser.step()
    shared = torch.arange(10.0)
    saved = {"state_dict": net.state_dict(), "optimiser": optimiser.state_dict(), "shared": [shared[:4], shared[2:8:2]], "half": torch.ones(3).half(), "size": torch.Size([1, 2])}
    torch.save(saved, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    ours, theirs = load_checkpoint(tmp_path / "a.ckpt"), torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert list(ours["state_dict"]) == list(theirs["state_dict"]) and all(torch.equal(ours["state_dict"][key], value) for key, value in theirs["state_dict"].items())
    assert all(torch.equal(a, b) for a, b in zip(ours["shared"], saved["shared"])) and tuple(ours["size"]) == (1, 2) and ours["half"].dtype == torch.float16
    ours["shared"][0][2] = -1  # views of one storage stay views of one storage
    assert ours["shared"][1][0] == -1
    assert all(torch.equal(ours["optimiser"]["state"][place]["exp_avg"], value["exp_avg"]) for place, value in theirs["optimiser"]["state"].items())


def test_lightning_callbacks_stay_stubs(tmp_path):
    "taming's last.ckpt holds a ModelCheckpoint, at which torch.load(weights_only=True) stops."
    module = types.ModuleType("pytorch_lightning")
    Kept = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning"})
    module.ModelCheckpoint = Kept
    sys.modules["pytorch_lightning"] = module
    try:
        torch.save({"callbacks": {Kept: {"best": 1.0}}, "state_dict": {"a": torch.ones(2)}}, tmp_path / "last.ckpt")
    finally:
        del sys.modules["pytorch_lightning"]
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "last.ckpt", weights_only=True)
    held = load_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(held["state_dict"]["a"], torch.ones(2)) and held["callbacks"] == {"pytorch_lightning.ModelCheckpoint": {"best": 1.0}}


# What must not happen

SHELL = "touch {0}"
RUNS = {
    "os.system": lambda marker: Calls(os.system, SHELL.format(marker)),
    "eval": lambda marker: Calls(eval, f"open({str(marker)!r}, 'w')"),
    "exec": lambda marker: Calls(exec, f"open({str(marker)!r}, 'w')"),
    "compile": lambda marker: Calls(compile, "1", "a", "eval"),
    "import": lambda marker: Calls(__import__, "antigravity"),
    "open": lambda marker: Calls(open, str(marker), "w"),
    "getattr": lambda marker: Calls(getattr, "a", "__class__"),
    "subprocess": lambda marker: Calls(subprocess.Popen, ["touch", str(marker)]),
    "torch.load": lambda marker: Calls(torch.load, str(marker)),
    "numpy.load": lambda marker: Calls(np.load, str(marker)),
    "pickle.loads": lambda marker: Calls(pickle.loads, pickle.dumps(Calls(os.system, SHELL.format(marker)))),
    "partial": lambda marker: Calls(__import__("functools").partial, eval),
}


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("name", RUNS)
def test_calls_are_refused_and_not_made(tmp_path, name, protocol):
    marker = tmp_path / "marker"
    attack = pickle.dumps({"weights": np.zeros(3), "x": RUNS[name](marker)}, protocol)
    with pytest.raises(UnsafeFileError, match="asks for"):
        load_pickle(put(tmp_path, attack))
    torch.save({"weights": RUNS[name](marker)}, tmp_path / "a.ckpt")
    with pytest.raises(UnsafeFileError, match="asks for"):
        load_checkpoint(tmp_path / "a.ckpt")
    torch.save({"weights": RUNS[name](marker)}, tmp_path / "b.ckpt", _use_new_zipfile_serialization=False)
    with pytest.raises(UnsafeFileError, match="asks for"):
        load_checkpoint(tmp_path / "b.ckpt")
    assert not marker.exists()


def text(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("numpy", "dtype.__init__.__globals__"), ("training.x", "os.system"), ("collections", "OrderedDict.__init__"), ("torch.nn", "Module.__class__"), ("os", "system"), ("nt", "system"), ("builtins", "eval"),
        ("__builtin__", "eval"), ("torch._utils", "_import_dotted_name"), ("torch.storage", "io.os.system"), ("", ""), ("numpy", ""), ("training", "a b"), ("numpy.core.multiarray", "fromfile"), ("training_evil", "Net"),
    ],
)  # fmt: skip
def test_names_off_the_list_are_refused(tmp_path, module, name):
    "Also dotted names, which Python would resolve attribute by attribute."
    with pytest.raises(UnsafeFileError, match="asks for"):
        load_pickle(put(tmp_path, b"\x80\x04" + text(module) + text(name) + b"\x93."))


def test_a_nested_stream_is_read_with_the_same_care(tmp_path):
    "The bytes of a storage are a pickle stream of their own; an attack hidden there is refused too."
    marker = tmp_path / "marker"
    inner = io.BytesIO()
    torch.save(Calls(os.system, f"touch {marker}"), inner, _use_new_zipfile_serialization=False)
    for raw in (inner.getvalue(), pickle.dumps(Calls(os.system, f"touch {marker}"))):
        attack = pickle.dumps(Calls(torch.storage._load_from_bytes, raw))
        with pytest.raises(UnsafeFileError, match="system"):
            load_pickle(put(tmp_path, attack))
    assert not marker.exists()


def test_extension_codes_are_refused(tmp_path):
    "EXT1 names a class by a number that the process knows, past find_class when it is cached."
    copyreg.add_extension("posix", "system", 200)
    try:
        with pytest.raises(UnsafeFileError, match="EXT1"):
            load_pickle(put(tmp_path, b"\x80\x02\x82\xc8X\x04\x00\x00\x00true\x85R."))
    finally:
        copyreg.remove_extension("posix", "system", 200)


ODD = {
    "BUILD on a class": b"\x80\x02cnumpy\ndtype\n}(X\x07\x00\x00\x00__new__K\x01ub.",
    "BUILD with slots on a class": b"\x80\x02ctraining.a\nNet\nN}(X\x08\x00\x00\x00__call__cnumpy\ndtype\nu\x86b.",
    "BUILD on a string": b"\x80\x02X\x01\x00\x00\x00a}b.",
    "call of a stub": b"\x80\x02ctraining.a\nNet\n)R)R.",
    "call of a number": b"\x80\x02K\x01)R.",
    "append to a class": b"\x80\x02cnumpy\ndtype\nK\x01a.",
    "a persistent id": b"\x80\x02X\x01\x00\x00\x00aQ.",
    "bytes of a terabyte": pickle.dumps(Calls(bytes, 10**12)),
    "bytearray of a terabyte": pickle.dumps(Calls(bytearray, 10**12)),
    "list of a range": b"\x80\x02cbuiltins\nlist\ncbuiltins\nrange\nJ\xff\xff\xff\x7f\x85R\x85R.",
    "codecs to a file": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R.",
    "dtype of objects from text": b"\x80\x02cnumpy\ndtype\nX\x05\x00\x00\x00O,f8i\x85R.",
    "dtype of a terabyte": b"\x80\x02cnumpy\ndtype\nX\x0e\x00\x00\x00S1000000000000\x85R.",
    "array of a shape without bytes": pickle.dumps(np.zeros((2, 3)), 2).replace(b"K\x02K\x03\x86", b"J\xff\xff\xff\x7fK\x03\x86"),
    "tensor with negative stride": pickle.dumps(torch.zeros(4)).replace(b"K\x01\x85", b"J\xff\xff\xff\xff\x85"),
    "tensor beyond its storage": pickle.dumps(torch.zeros(3)).replace(b"K\x03\x85", b"K\x09\x85"),
    "tensor expanded to a terabyte": pickle.dumps(torch.zeros(1).expand(7)).replace(b"K\x07\x85", b"\x8a\x06\x00\x00\x00\x00\x00\x01\x85"),
    "memo index of two billion": b"\x80\x02]r\xff\xff\xff\x7f.",
    "a missing memo entry": b"\x80\x02h\x05.",
    "a length of four gigabytes": b"\x80\x03B\xff\xff\xff\xffabc.",
    "a bytearray of exabytes": b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x0fabc.",
    "a frame of exabytes": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x0fN.",
    "a number of a megabyte": b"\x80\x02\x8b" + struct.pack("<i", 10**6) + b"\x01" * 10**6 + b".",
    "tuples that double": b"\x80\x04})" + b"2\x86" * 60 + b"K\x01s.",
    "tuples 100,000 deep as a key": b"\x80\x02})" + b"\x85" * 100_000 + b"K\x01s.",
    "lists 100,000 deep": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "a tuple in itself": b"\x80\x02]q\x00h\x00\x85a.",
    "a stub in itself": b"\x80\x02ctraining.a\nNet\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb.",
    "a list as a key": b"\x80\x02}]K\x01s.",
    "an array as a key": b"\x80\x02ccollections\nOrderedDict\n]]cnumpy\ndtype\n)\x81aNaa\x85R.",
    "a reduce without arguments": b"\x80\x02cnumpy\ndtype\nR.",
    "a sparse matrix out of bounds": pickle.dumps(scipy.sparse.csc_matrix(np.eye(3, dtype=np.float32))).replace(np.int32([0, 1, 2]).tobytes(), np.int32([0, 1, 9]).tobytes()),
    "protocol 9": b"\x80\x09N.",
    "text": b"not a pickle at all",
    "no stop": b"\x80\x02N",
    "nothing on the stack": b"\x80\x02.",
    "an out-of-band buffer": b"\x80\x05\x97.",
}


@pytest.mark.parametrize("name", ODD)
def test_odd_pickles_are_refused_quickly(tmp_path, name):
    began = time.process_time()
    with pytest.raises(InputError) as error:
        load_pickle(put(tmp_path, ODD[name]))
    assert error.value.came and error.value.needed and error.value.fix and str(tmp_path / "a.pkl") in str(error.value)
    assert time.process_time() - began < 5


def test_every_cut_is_refused(tmp_path):
    "A pickle that stops anywhere before its end."
    whole = pickle.dumps({"a": np.arange(9.0), "t": torch.ones(3), "s": "text"})
    for end in range(0, len(whole), 7):
        with pytest.raises(InputError):
            load_pickle(put(tmp_path, whole[:end]))
    torch.save({"t": torch.ones(30)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "a.pt").read_bytes()
    for end in range(0, len(whole), 23):
        with pytest.raises(InputError):
            load_checkpoint(put(tmp_path, whole[:end], "b.pt"))


def test_flipped_bytes_never_escape(tmp_path):
    "1,000 damaged files: each gives a value or an InputError, none another exception, none takes long."
    rng = np.random.default_rng(0)
    whole = pickle.dumps({"a": np.arange(9.0), "t": torch.ones(3), "m": scipy.sparse.eye(3, format="csc"), "d": {"x": (1, [2.5, "é"], None)}}, 4)
    refused = 0
    for _ in range(1000):
        data = np.frombuffer(whole, np.uint8).copy()
        data[rng.integers(0, len(data), rng.integers(1, 4))] = rng.integers(0, 256)
        try:
            load_pickle(put(tmp_path, data.tobytes()), max_bytes=10**7)
        except InputError:
            refused += 1
    assert 100 < refused < 1000


def test_memory_is_bounded(tmp_path):
    "One buffer named by many arrays, and a zip bomb, both above the limit."
    raw = b"\x80\x04\x8c\x16numpy._core.multiarray\x8c\x0c_reconstruct\x93q\x01\x8c\x05numpy\x8c\x07ndarray\x93K\x00\x85C\x01b\x87q\x02"
    raw += b"\x8c\x05numpy\x8c\x05dtype\x93\x8c\x02f8\x85Rq\x03B" + struct.pack("<i", 8 * 10**5) + bytes(8 * 10**5) + b"q\x04"
    each = b"h\x01h\x02R(K\x01J" + struct.pack("<i", 10**5) + b"\x85h\x03\x89h\x04tb"
    assert len(load_pickle(put(tmp_path, raw + b"]" + (each + b"a") * 3 + b"."))) == 3  # 2.4 MB from one buffer of 0.8 MB: fine
    with pytest.raises(UnsafeFileError, match="larger than the limit"):
        load_pickle(put(tmp_path, raw + b"]" + (each + b"a") * 1000 + b"."), max_bytes=10**8)
    with zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", pickle.dumps({}))
        file.writestr("a/data/0", bytes(10**8))
    assert (tmp_path / "bomb.ckpt").stat().st_size < 10**6
    with pytest.raises(UnsafeFileError, match="limit"):
        load_checkpoint(tmp_path / "bomb.ckpt", max_bytes=10**7)


def test_the_user_can_allow_more(tmp_path):
    "A name that the user vouches for becomes a stub, or goes through the user's rule; even then nothing of it is imported."
    path = put(tmp_path, b"\x80\x02cshop.bakery\nBread\nK\x03\x85R.")
    with pytest.raises(UnsafeFileError, match="shop.bakery.Bread"):
        load_pickle(path)
    stub = load_pickle(path, allow={"shop.bakery.Bread": None})
    assert isinstance(stub, Stub) and stub.kind == "shop.bakery.Bread" and stub.args == (3,)
    assert load_pickle(path, allow={"shop.bakery.Bread": lambda build, args, state, items, pairs: args[0] * 2}) == 6


def test_other_kinds_of_file_are_told(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.zeros(2))
    with pytest.raises(InputError, match="read_npz"):
        load_pickle(tmp_path / "a.npz")
    with pytest.raises(InputError, match="state_dict"):
        torch.save(torch.zeros(2), tmp_path / "a.pt")
        load_checkpoint(tmp_path / "a.pt")
    with pytest.raises(InputError, match="G_ema"):
        state_dict_of({"G_ema": 1})
    np.save(tmp_path / "plain.npy", np.zeros(3))
    with pytest.raises(InputError):
        load_pickle(tmp_path / "plain.npy")
