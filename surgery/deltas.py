"""What training changed, read chunk by chunk: no checkpoint is ever in memory, whatever its size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from surgery.opening import Weights
from surgery.slots import Block
from surgery.trajectory import Trajectory
from surgery.units import Units

CHUNK = 1 << 20  # bytes of float32 that one chunk of a part may take: it stays in the processor's cache


def pieces(block: Block, part: str, others: list[Block], chunk: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Runs of neurons of one part that every layout holds in one tensor, each at most ``chunk`` bytes of float32."""
    slots = [slot for one in (block, *others) for slot in one.of(part)]
    cuts = sorted({edge for slot in slots for edge in (slot.start, slot.stop)})
    step = max(1, chunk // (4 * max(slots[0].width, 1)))
    for low, high in pairwise(cuts):
        for start in range(low, high, step):
            yield start, min(start + step, high)


def reading(weights: Weights, name: str, part: str) -> Callable[[int, int], Tensor]:
    """A function that reads neurons start…stop of one part as float32 ``[neuron, width]`` on the CPU."""
    views: dict[int, Tensor] = {}  # of the slot that was read last: making a view takes longer than reading a chunk

    def read(start: int, stop: int) -> Tensor:
        slot = next(s for s in weights.layout[name].of(part) if s.start <= start < s.stop)
        if slot.start not in views:
            views.clear()
            view = slot.view(weights.tensors[slot.tensor]).detach()
            views[slot.start] = view.flatten(1, slot.stacked) if slot.stacked else view
        view, first, last = views[slot.start], start - slot.start, stop - slot.start
        if slot.stacked:
            rows = view.shape[1]
            one, other = divmod(first, rows)[0], (last - 1) // rows
            view = view[one : other + 1].flatten(0, 1)[first - one * rows : last - one * rows]
        else:
            view = view[first:last]
        return view.to("cpu", torch.float32).reshape(stop - start, -1)

    return read


def displacements(
    run: Trajectory, *names: str, units: Units = "mlp"
) -> Iterator[tuple[str, str, int, int, tuple[Tensor, ...]]]:
    """What each step of training changed, chunk by chunk: ``(block, part, start, stop, (δ, ...))``.

    Args:
        run: the trajectory.
        names: the checkpoints in order: ("earlier", "later") gives δB, ("base", "earlier", "later") gives δA and δB.
        units: of which kinds of unit (see ``find_layout``).

    Yields:
        For one part of neurons start…stop of a block: the differences, float32 ``[neuron, width]``. Every part of
        every neuron comes exactly once, its row contiguous; memory is bounded by ``CHUNK`` per checkpoint. NaN and
        infinite weights come as they are (``check_finite``).
    """
    opened = run.weights(*names, units=units)
    for name, block in opened[-1].layout.items():
        others = [one.layout[name] for one in opened[:-1]]
        for part in block.parts:
            readers = [reading(one, name, part) for one in opened]
            for start, stop in pieces(block, part, others):
                read = [reader(start, stop) for reader in readers]
                yield name, part, start, stop, tuple((b - a).contiguous() for a, b in pairwise(read))


def _check_finite(weights: Weights, name: str, part: str, start: int, read: Tensor) -> None:
    if bad := int((~read.isfinite()).sum()):
        slot = next(s for s in weights.layout[name].of(part) if s.start <= start < s.stop)
        raise ValueError(f"{slot.tensor!r} of {weights.name} holds {bad} NaN or infinite numbers")


def check_finite(run: Trajectory, *names: str, units: Units = "mlp") -> None:
    """Find the NaN or infinite numbers that made a score so: costs a second reading, so it is asked for only then.

    Raises:
        ValueError: there are some among the units' weights; the message names the first tensor.
    """
    for one in run.weights(*names, units=units):
        for name, block in one.layout.items():
            for part in block.parts:
                read = reading(one, name, part)
                for start, stop in pieces(block, part, []):
                    _check_finite(one, name, part, start, read(start, stop))
