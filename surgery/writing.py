"""Writing into live weights: which may be written, how bits are told, and no interruption half-way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from surgery.edits import Edit
from surgery.opening import Weights

REAL = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bits as integers."""
    return tensor.contiguous().view(_WIDTH[tensor.element_size()])


def numbers(scalars: list[Tensor]) -> list[int]:
    """The values of scalars, read with one wait per device."""
    found: dict[int, int] = {}
    for device in {scalar.device for scalar in scalars}:
        here = [at for at, scalar in enumerate(scalars) if scalar.device == device]
        found |= dict(zip(here, torch.stack([scalars[at] for at in here]).tolist(), strict=True))
    return [found[at] for at in range(len(scalars))]


def check_writable(live: Weights, edits: list[Edit]) -> None:
    """Refuse weights that are offloaded, quantised, or share their storage with others (``ValueError``)."""
    names = {edit.slot.tensor for edit in edits}
    owners: dict[tuple[torch.device, int], set[str]] = {}
    for name, tensor in live.tensors.items():
        if tensor.device.type != "meta":
            owners.setdefault((tensor.device, tensor.untyped_storage().data_ptr()), set()).add(name)
    for name in names:
        tensor = live.tensors[name]
        if tensor.device.type == "meta":
            raise ValueError(
                f"{name} is on the meta device: its weights are offloaded, and an edit would be lost. Load the model "
                f"whole, or roll the folder back with rolled_back() and save()"
            )
        if tensor.dtype not in REAL:
            raise ValueError(f"{name} is stored as {tensor.dtype}: quantised weights can't be reverted exactly")
        ours, storage = name, owners[tensor.device, tensor.untyped_storage().data_ptr()]
        if shared := sorted(other for other in storage - {ours} if _overlap(live.tensors[other], tensor)):
            raise ValueError(f"{name} shares its memory with {shared[0]!r}: writing the one would change the other too")


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the address ranges of two tensors of one storage meet."""
    low_a, low_b = a.data_ptr(), b.data_ptr()
    return low_a < low_b + _span(b) and low_b < low_a + _span(a)


def _span(tensor: Tensor) -> int:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size() if tensor.numel() else 0


@contextmanager
def uninterrupted() -> Iterator[list[int]]:
    """Hold Ctrl-C back while the body runs; the list that it yields is filled by one. Raised again at the end."""
    pending: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield pending  # signals only ever reach the main thread
        return
    before = signal.signal(signal.SIGINT, lambda number, _frame: pending.append(number))
    try:
        yield pending
    finally:
        signal.signal(signal.SIGINT, before)
    if pending:
        raise KeyboardInterrupt
