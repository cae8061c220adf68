"""A GPU that is not there: tensors that compute on the CPU, say they are on another device, and are as strict as CUDA's.

``pretend_gpu()`` is a context in which ``tensor.to(GPU)``, ``torch.zeros(3, device=GPU)`` and so on make such tensors. Like
those of CUDA they refuse to meet a tensor of the CPU (a single number may, and numbers of rows), and to become a numpy
array. The device is called ``meta``, as torch allows that name without hardware; the numbers are real. What the host reads
from the device and every launch are counted, as either is what makes a GPU wait.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("meta")
CPU = torch.device("cpu")

# What makes the host wait for the device: reading a number, or a result whose size depends on the values.
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero"}
READS |= {"aten::unique_dim", "aten::_unique2", "aten::bincount", "aten::repeat_interleave"}
# A tensor of the CPU may say which rows are meant.
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
FREE = {
    "view",
    "unbind",
    "split",
    "alias",
    "detach",
    "t",
    "transpose",
    "permute",
    "expand",
    "slice",
    "select",
    "unfold",
}
FREE |= {
    "unsqueeze",
    "squeeze",
    "as_strided",
    "lift_fresh",
    "chunk",
    "diagonal",
    "_unsafe_view",
    "_reshape_alias",
}  # views
FREE |= {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}  # memory; no launch either


class DeviceTensor(Tensor):
    """A tensor of the pretended device; ``numbers`` has its numbers."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> DeviceTensor:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            layout=numbers.layout,
            device=GPU,
            requires_grad=False,
        )
        made.numbers = numbers
        return made  # type: ignore[no-any-return]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.numbers})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return compute(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def new_tensor(self, data: Any, **options: Any) -> Tensor:  # type: ignore[override]
        return torch.tensor(data, **{"dtype": self.dtype, **options}).to(GPU)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")


class Counts:
    """What was asked of the device: ``launches``, and ``waits`` of the host for it, by operator."""

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()


_counts = Counts()
_pinned: set[int] = set()  # where page-locked memory lies, from which a copy need not be waited for


def _pin(tensor: Tensor) -> Tensor:
    """``tensor.pin_memory()``, for which torch wants hardware."""
    pinned = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype).copy_(tensor)  # as torch does it
    _pinned.add(pinned.data_ptr())
    weakref.finalize(pinned, _pinned.discard, pinned.data_ptr())
    return pinned


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the numbers inside; refuse what CUDA refuses."""
    name = func._schema.name
    leaves = [*_leaves(args), *kwargs.values()]
    device_leaves = [leaf for leaf in leaves if isinstance(leaf, DeviceTensor)]
    asked = kwargs.get("device")
    if asked is None and not device_leaves:
        return func(*args, **kwargs)
    to_device = bool(device_leaves) if asked is None else torch.device(asked).type == GPU.type
    if name == "aten::copy_":
        to_device = isinstance(args[0], DeviceTensor)
    if asked is not None and not device_leaves and not to_device:
        return func(*args, **kwargs)
    if name in ("aten::_to_copy", "aten::copy_"):
        source = args[1] if name == "aten::copy_" else args[0]
        queued = kwargs.get("non_blocking") and (not to_device or source.data_ptr() in _pinned)
        if isinstance(source, DeviceTensor) != to_device and source.numel() and not queued:
            _counts.waits[name] += 1
    elif device_leaves:
        guests = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, DeviceTensor) and x.ndim > 0]
        if guests and not (name in INDEXING and isinstance(args[0], DeviceTensor)):
            shapes = ", ".join(str(tuple(guest.shape)) for guest in guests)
            raise RuntimeError(f"Expected all tensors to be on the same device: {name} met {shapes} of the CPU")
        if name in READS or (name in INDEXING and any(x.dtype == torch.bool for x in _indices(args))):
            _counts.waits[name] += 1
    if name.partition("::")[2] not in FREE:
        _counts.launches[name] += 1
    plain_args, plain_kwargs = _map(_inside, args), {key: _inside(value) for key, value in kwargs.items()}
    if asked is not None:
        plain_kwargs["device"] = CPU
    given = {id(leaf.numbers): leaf for leaf in device_leaves}
    result = func(*plain_args, **plain_kwargs)
    if not to_device or name == "aten::_local_scalar_dense":
        return result
    return _map(lambda x: _outside(x, given), result)


def _outside(x: Any, given: dict[int, DeviceTensor]) -> Any:
    """A result as a device tensor; the same one where the operator changed it in place."""
    return given[id(x)] if id(x) in given else DeviceTensor(x) if isinstance(x, Tensor) else x


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    """An operator's arguments or results, lists and tuples within them too, with ``change`` applied to each."""
    if isinstance(value, list | tuple):
        return type(value)([_map(change, item) for item in value])
    return change(value)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _inside(x: Any) -> Any:
    return x.numbers if isinstance(x, DeviceTensor) else x


def _indices(args: Any) -> list[Tensor]:
    return [_inside(x) for x in args[1] if isinstance(x, Tensor)]


class _Factories(TorchDispatchMode):
    """Makes device tensors where the device is named."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


@contextmanager
def pretend_gpu() -> Iterator[Counts]:
    """The device is there; yields what is asked of it from now on."""
    global _counts
    _counts, before = Counts(), _counts
    autocast, tensor = torch.autocast, torch.tensor

    def make(*values: Any, device: Any = None, **options: Any) -> Tensor:  # torch.tensor makes it past every mode
        made = tensor(*values, **options)
        return made if device is None else made.to(device)

    with pytest.MonkeyPatch.context() as patch, _Factories():
        # torch's autocast knows no `meta`; in float32 it does nothing.
        patch.setattr(
            torch, "autocast", lambda kind, *a, **k: nullcontext() if kind == GPU.type else autocast(kind, *a, **k)
        )
        asked = torch.is_autocast_enabled
        patch.setattr(torch, "is_autocast_enabled", lambda *kind: GPU.type not in kind and asked(*kind))
        patch.setattr(torch, "tensor", make)
        patch.setattr(Tensor, "pin_memory", _pin)
        try:
            yield _counts
        finally:
            _counts = before
