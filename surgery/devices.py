"""Between the CPU and a GPU: what is sent is not waited for, what comes back comes in one piece; who takes kernels."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor

_asked: list[bool] = []


@contextmanager
def by_kernel(wanted: bool) -> Iterator[None]:
    """While the body runs, rollbacks and D take their kernels, or torch's operations, whatever there is.

    For comparisons. A rollback's bits are the same, and sums the same but for rounding. Off a GPU a kernel needs
    Triton's interpreter (``TRITON_INTERPRET=1`` before it is imported).
    """
    _asked.append(wanted)
    try:
        yield
    finally:
        _asked.pop()


def takes_kernel(device: torch.device, works: Callable[[torch.device], bool]) -> bool:
    """Whether to take a kernel on a device: where it is a GPU on which it ``works``, or as ``by_kernel`` says."""
    if _asked:
        return _asked[-1]
    # an interpreter would take a GPU's addresses for its own
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    return real(device) and not interpreted and works(device)


def succeeds(attempt: Callable[[torch.device], None], device: torch.device, instead: str) -> bool:
    """Whether a kernel runs on a device, tried on a few numbers: Triton needs a driver and a C compiler, too.

    Where Triton is installed and it fails, a warning says what is done instead.
    """
    if find_spec("triton") is None:
        return False
    try:
        attempt(device)
        return True
    except Exception as error:  # whatever Triton, its compiler or the driver raise where they don't go together
        warnings.warn(f"Triton can't run on {device}, so {instead}: {error}", stacklevel=2)
        return False


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; where that is a GPU, the CPU does not wait until it has done all it was asked to do."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def after_sending(device: torch.device) -> Callable[[], None]:
    """Makes what is asked of a device later, on whichever stream, wait for what was sent there by now."""
    if not real(device):
        return lambda: None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return lambda: torch.cuda.current_stream(device).wait_event(event)


def joined(pieces: list[Tensor]) -> Tensor:
    """Rows of several tensors as one; of a checkpoint that lies in part on a GPU, there."""
    if len(pieces) == 1:
        return pieces[0]
    homes = dict.fromkeys(piece.device for piece in pieces)
    home = next((one for one in homes if one.type != "cpu"), pieces[0].device)
    return torch.cat([sent(piece, home) for piece in pieces] if len(homes) > 1 else pieces)


def real(device: torch.device) -> bool:
    """Whether it is a GPU that is there."""
    return device.type == "cuda" and torch.cuda.is_available()


def room(device: torch.device) -> int:
    """Bytes of a GPU's memory beyond the most that torch has held of it at once; 0 where there is no GPU."""
    if not real(device):
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)


def sent_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of the CPU on a device: one piece of memory, one copy, which nothing waits for."""
    parts = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    starts = [0]
    for part in parts:
        starts.append(-(-(starts[-1] + len(part)) // 16) * 16)
    here = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=real(device))
    for part, start in zip(parts, starts, strict=False):
        here[start : start + len(part)] = part
    there = here.to(device, non_blocking=True)
    sizes = zip(tensors, parts, starts, strict=False)
    return [there[at : at + len(part)].view(one.dtype).view(one.shape) for one, part, at in sizes]


def fetched(numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU: all of one dtype that lie on one device come in one copy."""
    homes: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, one in numbers.items():
        homes.setdefault((one.device, one.dtype), []).append(name)
    found: dict[str, Tensor] = {}
    for names in homes.values():
        some = [numbers[name] for name in names]
        flat = torch.cat([one.flatten() for one in some]).cpu().split([one.numel() for one in some])
        found |= {name: one.view(like.shape) for name, one, like in zip(names, flat, some, strict=True)}
    return {name: found[name] for name in numbers}
