"""A device that is none: tensors that say they are elsewhere, and compute on the CPU.

What a GPU refuses, this refuses: an operation on tensors of two devices, and NumPy reading a tensor in place. So code
that runs here puts every tensor where the model is. It says nothing of speed or rounding.
"""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")  # a device that torch knows and needs no driver for
_MAKE = _device_constructors.__wrapped__()  # transformers replaces one while it loads; a kept list may have that
_INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}


class Elsewhere(Tensor):
    @staticmethod
    def __new__(cls, inner: Tensor):
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=DEVICE,
            requires_grad=inner.requires_grad,
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def tolist(self):
        return self.inner.tolist()

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"Elsewhere({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class AsDefault(TorchFunctionMode):
    """`torch.set_default_device(DEVICE)`, which torch itself would answer with tensors that hold nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (Tensor.__getitem__, Tensor.__setitem__):  # torch would make an index that holds nothing of a list
            args = (args[0], _indices(args[1]), *args[2:])
        if func not in _MAKE or kwargs.get("device") not in (None, DEVICE):
            return func(*args, **kwargs)
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"{func.__name__}: a generator of the cpu cannot draw on {DEVICE}")
        learns = kwargs.pop("requires_grad", False)
        return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE).requires_grad_(learns)


def _indices(index):
    if isinstance(index, tuple):
        return tuple(map(_indices, index))
    return torch.tensor(index, dtype=torch.long, device="cpu") if isinstance(index, list | range) else index


class Simulated(TorchDispatchMode):
    """While it is on, tensors can be copied to the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args: tuple, kwargs: dict):
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    assert all(isinstance(x, Elsewhere) or not x.is_meta for x in given), f"{func}: a tensor that holds nothing"
    there = any(isinstance(x, Elsewhere) for x in given)
    target = kwargs.get("device")
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        there = torch.device(target).type == DEVICE.type
    elif there and func is not torch.ops.aten.copy_.default:
        together = given
        if func in _INDEXED and isinstance(args[0], Elsewhere):  # where to look may be said from the cpu
            together = [x for x in tree_flatten((args[0], args[2:]))[0] if isinstance(x, Tensor)]
        if strangers := [x for x in together if not isinstance(x, Elsewhere) and x.dim()]:
            raise RuntimeError(f"{func}: tensors on two devices, {DEVICE} and cpu of shape {tuple(strangers[0].shape)}")
    unwrapped = tree_map(lambda x: x.inner if isinstance(x, Elsewhere) else x, (args, kwargs))
    out = func(*unwrapped[0], **unwrapped[1])
    known = {id(x.inner): x for x in given if isinstance(x, Elsewhere)}  # what an in-place operation gives back

    def wrap(x):
        return known.get(id(x), Elsewhere(x) if there else x) if isinstance(x, Tensor) else x

    return tree_map(wrap, out)
