"""A GPU that is not there: tensors that say they are on "cuda", and torch's rule that the CPU's and the GPU's do not mix. The numbers stay where they are."""

from contextlib import contextmanager

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
NUMPY = {torch.Tensor.numpy, torch.Tensor.__array__}
MOVES = {torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda}
ANYWHERE = {torch.Tensor.copy_, torch.Tensor.data.__set__, torch.Tensor.grad.__set__, torch.Tensor.requires_grad_, torch.Tensor.__repr__, torch._has_compatible_shallow_copy_type}
LIKE = {torch.Tensor.new_tensor, torch.Tensor.new_zeros, torch.Tensor.new_ones, torch.Tensor.new_full, torch.Tensor.new_empty}


def on_gpu(tensor):
    "Does a tensor say so?"
    return getattr(tensor, "_on_gpu", False)


def tensors_in(value):
    "The tensors of arguments, whatever holds them."
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


def put(value, gpu):
    "Let results say where they are."
    for tensor in tensors_in(value):
        tensor._on_gpu = gpu
    return value


class FakeGpu(TorchFunctionMode):
    "While it is on, `cuda` can be asked for."

    def __torch_function__(self, fn, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if fn == torch.Tensor.device.__get__:
            return CUDA if on_gpu(args[0]) else CPU
        if fn == torch.Tensor.is_cuda.__get__:
            return on_gpu(args[0])
        if fn in NUMPY and on_gpu(args[0]):
            raise TypeError("can't convert cuda device type tensor to numpy. Use Tensor.cpu() first")
        if fn in MOVES:
            return self.move(fn, args, kwargs)
        there = [on_gpu(tensor) for tensor in tensors_in([args, kwargs])]
        gpu = any(there)
        if fn in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            self.check_index(fn, args)
            gpu = on_gpu(args[0])
        elif fn not in ANYWHERE:
            self.check(fn, args, kwargs)
        if "device" in kwargs:  # a factory
            gpu = kwargs["device"] is not None and torch.device(kwargs["device"]).type == "cuda" or (kwargs["device"] is None and gpu)
            if gpu and isinstance(kwargs.get("generator"), torch.Generator):
                raise RuntimeError(f"{fn.__name__}: Expected a 'cuda' device type for generator but found 'cpu'")
            kwargs["device"] = CPU
        elif fn in LIKE:
            gpu = on_gpu(args[0])
        if fn == torch.Tensor.data.__set__:
            put(args[0], on_gpu(args[1]))
            return fn(*args, **kwargs)
        if fn is torch.Tensor.copy_:
            return put(fn(*args, **kwargs), on_gpu(args[0]))
        found = fn(*args, **kwargs)
        return found if fn in ANYWHERE else put(found, gpu)

    def check(self, fn, args, kwargs):
        "Tensors of one place, and numbers (no axis) of the CPU."
        held = [tensor for tensor in tensors_in([args, kwargs])]
        if any(on_gpu(tensor) for tensor in held) and (odd := [tensor for tensor in held if not on_gpu(tensor) and tensor.ndim]):
            raise RuntimeError(f"{getattr(fn, '__name__', fn)}: Expected all tensors to be on the same device, but found cuda and cpu (a tensor of shape {tuple(odd[0].shape)})")

    def check_index(self, fn, args):
        "The GPU's tensors take the CPU's index; not the other way round. What is written comes from the same place."
        own, index = on_gpu(args[0]), list(tensors_in(args[1]))
        if not own and any(on_gpu(tensor) and tensor.ndim for tensor in index):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if fn is torch.Tensor.__setitem__ and any(on_gpu(tensor) != own and tensor.ndim for tensor in tensors_in(args[2])):
            raise RuntimeError("__setitem__: Expected all tensors to be on the same device, but found cuda and cpu")

    def move(self, fn, args, kwargs):
        "`to`, `cpu` and `cuda`, without moving anything."
        own, rest = args[0], list(args[1:])
        goes = {torch.Tensor.cpu: False, torch.Tensor.cuda: True}.get(fn, on_gpu(own))
        for place in [*rest, kwargs.pop("device", None), kwargs.pop("other", None)] if fn is torch.Tensor.to else []:
            if isinstance(place, torch.Tensor):
                goes = on_gpu(place)
            elif isinstance(place, str | torch.device):
                goes = torch.device(place).type == "cuda"
        if fn is torch.Tensor.to:
            kind = next((value for value in (*rest, kwargs.get("dtype")) if isinstance(value, torch.dtype)), next((value.dtype for value in rest if isinstance(value, torch.Tensor)), own.dtype))
            made = own.to(kind)
        else:
            made = own
        made = made.view_as(made) if made is own and goes != on_gpu(own) else made  # another object that says another place
        return put(made, goes)


def send(value, gpu=True):
    "A batch as the training loop hands it over."
    if isinstance(value, torch.Tensor):
        return value.to("cuda" if gpu else "cpu")
    if isinstance(value, dict):
        return {key: send(part, gpu) for key, part in value.items()}
    return type(value)(send(part, gpu) for part in value) if isinstance(value, list | tuple) and not hasattr(value, "_fields") else value


@contextmanager
def fake_gpu():
    "Inside, `.to('cuda')` works."
    made = nn.Parameter.__new__

    def keeps_its_place(cls, data=None, requires_grad=True):
        return put(made(cls, data, requires_grad), on_gpu(data))

    nn.Parameter.__new__ = keeps_its_place
    try:
        with FakeGpu():
            yield
    finally:
        nn.Parameter.__new__ = made
