"""A GPU that isn't there: tensors that say they are on cuda:0, and are refused wherever a real one would refuse them.

They are ordinary CPU tensors whose storage carries a mark. One mode answers for them (``.device``, ``.to``,
``device=``, ``.numpy()``), another looks at every operation, also of a backward pass: what it makes of marked tensors
is marked, and what mixes them with unmarked ones raises as CUDA does. So results are the CPU's, and what can be tested
is everything that goes wrong between two devices; not speed, memory, or how a GPU rounds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

CPU, GPU, META = torch.device("cpu"), torch.device("cuda:0"), torch.device("meta")
ON_GPU, ANYWHERE, ON_CPU = True, None, False  # the mark; anywhere: what torch made on its own inside an operation
_COPIES = {torch.ops.aten.copy_.default, torch.ops.aten.set_.source_Tensor}
_aten = torch.ops.aten
_ASKED = {
    _aten._local_scalar_dense.default, _aten.nonzero.default, _aten.masked_select.default, _aten.equal.default,
    _aten.bincount.default, _aten.repeat_interleave.Tensor, _aten._unique2.default, _aten.unique_dim.default,
}  # fmt: skip
_waits: list[Waits] = []
_INDEXES = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}


class Waits(list[str]):
    """Where Python code waited for the GPU: "file:line, what", in the order in which it did.

    What runs inside transformers is the model's own, and is not in here.
    """

    def note(self, what: str) -> None:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
            frame = frame.f_back
        if frame is not None and "/transformers/" not in frame.f_code.co_filename:
            self.append(f"{frame.f_code.co_filename}:{frame.f_lineno}, {what}")


@contextmanager
def gpu() -> Iterator[Waits]:
    """While it lasts "cuda" is a device. What it gives says where the CPU waited for it."""
    asked = {
        "get_device_capability": lambda device=None: (8, 0),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: None,
        "synchronize": lambda device=None: None,
    }
    with patch.multiple(torch.cuda, **asked), patch("torch.autograd._engine_run_backward", _backward):
        with _Names(waits := Waits()), _Operations(waits):
            _waits.append(waits)
            try:
                yield waits
            finally:
                _waits.pop()


@contextmanager
def bare() -> Iterator[None]:
    """While the body runs, tensors are what they are: for what stands in for a kernel of the GPU."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor says that it is on the GPU."""
    return _mark(tensor) is ON_GPU


def _backward(*args: Any, **kwargs: Any) -> Any:
    with _Names(_waits[-1]):  # it was popped where ``Tensor.backward`` was asked for, and hooks run in here
        return _engine_run_backward(*args, **kwargs)


class _Names(TorchFunctionMode):
    """What Python code asks of a tensor or of torch."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        whose = getattr(function, "__self__", None)
        if whose is torch.Tensor.device:
            return GPU if on_gpu(args[0]) else function(*args)
        if whose is torch.Tensor.is_cuda:
            return on_gpu(args[0])
        if function in (torch.Tensor.numpy, torch.Tensor.__array__) and on_gpu(args[0]):
            raise TypeError(f"can't convert {GPU} device type tensor to numpy. Use Tensor.cpu() first.")
        if function is torch.Tensor.__deepcopy__:
            return _marked(function(*args, **kwargs), _mark(args[0]))
        if function in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            quiet = kwargs.get("non_blocking")
            found = _moved(function, args, kwargs)
            if on_gpu(args[0]) is not on_gpu(found) and not quiet:
                self.waits.note("a copy to the CPU" if on_gpu(args[0]) else "an upload")
            return found
        if function is torch.Tensor.tolist and on_gpu(args[0]):  # it reads memory, and is no operation
            self.waits.note("a copy to the CPU")
        if function is torch.Tensor.pin_memory:
            return args[0]
        if function is torch.unravel_index:  # written in Python, and asks for a device
            with self:
                return torch.functional._unravel_index(*args, **kwargs).unbind(-1)
        if function is torch.device:
            return function(*args, **kwargs)
        if kwargs.get("device") not in (None, "meta", META):  # what is on the meta device is on no device
            goal = torch.device(kwargs.pop("device"))
            _check_generators(kwargs, goal)
            return _at(function(*args, **kwargs, device="cpu"), args, goal)
        found = function(*args, **kwargs)
        return found if _tensors((args, kwargs)) else _at(found, args, CPU)


class _Operations(TorchDispatchMode):
    """What torch does, forwards and backwards."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        gpu = any(map(on_gpu, given)) and operation not in _COPIES
        if _is_waited_for(operation, args):
            self.waits.note(str(operation))
        if gpu:
            _check_generators((args, kwargs), GPU)
            # a tensor on the GPU may be indexed by one that is not
            strict = _tensors((args[:1], args[2:])) if operation in _INDEXES and on_gpu(args[0]) else given
            if any(one.dim() and _mark(one) is ON_CPU for one in strict):
                _refuse(operation)
        if gpu and operation is torch.ops.aten.histc.default:  # the CPU has none of integers
            found = operation(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        else:
            found = operation(*args, **kwargs)
        if gpu or all(_mark(one) is ANYWHERE for one in given):
            tree_map_only(torch.Tensor, lambda one: _marked(one, ON_GPU if gpu else ANYWHERE), found)
        return found


def _is_waited_for(operation: Any, args: Any) -> bool:
    """Whether what an operation gives has a size, or is a number, that only the GPU knows."""
    if operation is _aten.copy_.default:
        return on_gpu(args[1]) and not on_gpu(args[0])
    if not any(map(on_gpu, _tensors(args))):
        return False
    chosen = [one for one in _tensors(args[1:2]) if one.dtype == torch.bool] if operation in _INDEXES else []
    return operation in _ASKED or bool(chosen)


def _refuse(operation: Any) -> None:
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {GPU} and cpu! "
        f"(when checking arguments of {operation})"
    )


def _tensors(values: Any) -> list[torch.Tensor]:
    return [one for one in tree_leaves(values) if isinstance(one, torch.Tensor)]


def _memory(tensor: torch.Tensor) -> Any:
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor.untyped_storage()


def _mark(tensor: torch.Tensor) -> bool | None:
    return getattr(_memory(tensor), "on_gpu", ON_CPU)


def _marked(tensor: torch.Tensor, mark: bool | None) -> torch.Tensor:
    _memory(tensor).on_gpu = mark
    return tensor


def _at(found: Any, args: Any, goal: torch.device) -> Any:
    """What a call gave, on the device that it named; what shares memory with what it was given is copied first."""
    mark, held = goal.type == "cuda", {_memory(one)._cdata for one in _tensors(args)}

    def one(tensor: torch.Tensor) -> torch.Tensor:
        if _mark(tensor) is mark:
            return tensor
        return _marked(tensor.clone() if _memory(tensor)._cdata in held else tensor, mark)

    return tree_map_only(torch.Tensor, one, found)


def _moved(function: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """``to``, ``cpu`` and ``cuda``: everything else that they do is done where the tensor lies."""
    tensor, *rest = args
    if function is not torch.Tensor.to:
        return _at(tensor, args, GPU if function is torch.Tensor.cuda else CPU)
    if rest and isinstance(rest[0], torch.Tensor):
        rest[:1] = [GPU if on_gpu(rest[0]) else CPU, rest[0].dtype]
    asked = rest[0] if rest and isinstance(rest[0], str | torch.device) else kwargs.get("device")
    if asked is None or torch.device(asked) == META:
        return tensor.to(*rest, **kwargs)
    if "device" in kwargs:
        kwargs["device"] = CPU
    else:
        rest[0] = CPU
    return _at(tensor.to(*rest, **kwargs), args, torch.device(asked))


def _check_generators(values: Any, goal: torch.device) -> None:
    if goal.type == "cuda" and any(isinstance(one, torch.Generator) for one in tree_leaves(values)):
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
