"""How a kernel walks tensors that lie in any way: as matrices of neurons and their numbers, tile after tile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from surgery.devices import real, sent
from surgery.live import hooks

ALONG, ACROSS = 128, 16  # of a program's tile: numbers that follow each other in memory, and of the other axis
Axes = tuple[tuple[int, int], list[tuple[int, int]]]  # two sizes, and of each view two strides


def in_two(views: Sequence[Tensor], low: int, high: int) -> Axes | None:
    """Some axes of views as two, the first of size 1 where one will do for all views; None where they are more."""
    sizes, ways = tuple(views[0].shape[low:high]), [view.stride()[low:high] for view in views]
    if not 1 <= len(sizes) <= 2:
        return None
    if len(sizes) == 2 and not (sizes[0] == 1 or all(first == sizes[1] * second for first, second in ways)):
        return (sizes[0], sizes[1]), [(first, second) for first, second in ways]
    return (1, prod(sizes)), [(0, way[-1]) for way in ways]


@dataclass(frozen=True)
class Tiles:
    """The tiles of some views of one shape, ``high`` neurons by ``lanes`` numbers each."""

    rows: Axes
    numbers: Axes

    @classmethod
    def of(cls, views: Sequence[Tensor], cut: int) -> Tiles | None:
        """Of views whose first ``cut`` axes are the neurons'; None where they have more axes than a kernel walks."""
        rows, numbers = in_two(views, 0, cut), in_two(views, cut, views[0].ndim)
        return None if rows is None or numbers is None else cls(rows, numbers)

    @property
    def shape(self) -> tuple[int, int]:
        """Neurons, and numbers of each."""
        (blocks, inside), (folds, across) = self.rows[0], self.numbers[0]
        return blocks * inside, folds * across

    @property
    def sides(self) -> tuple[int, int]:
        """Of a tile: the longer side lies along the axis whose numbers follow each other in memory."""
        columns = self.rows[1][0][1] < self.numbers[1][0][1]  # neurons lie closer than a neuron's numbers
        return (ALONG, ACROSS) if columns else (ACROSS, ALONG)

    def given(self) -> tuple[int, ...]:
        """What a kernel is told: neurons, those of a block, numbers, those of a fold, and of each view four strides."""
        pairs = zip(self.rows[1], self.numbers[1], strict=True)
        ways = [way for pair in pairs for side in pair for way in side]
        (count, width), (_, inside), (_, across) = self.shape, self.rows[0], self.numbers[0]
        return count, inside, width, across, *ways

    def fixed(self) -> dict[str, int | bool]:
        """What it is compiled for."""
        high, lanes = self.sides
        return {"STACKED": self.rows[0][0] > 1, "FOLDED": self.numbers[0][0] > 1, "ROWS": high, "LANES": lanes}


def on(device: torch.device) -> AbstractContextManager[object]:
    """While the body runs, kernels are launched on that device."""
    return torch.cuda.device(device) if real(device) else nullcontext()


def brought(views: Sequence[Tensor], device: torch.device) -> Iterator[tuple[int, list[Tensor]]]:
    """The views on a device, in runs where one of them has to be sent: how many numbers come before, and each's run."""
    each = max(1, views[0][:1].numel())
    step = len(views[0]) if all(view.device == device for view in views) else max(1, hooks.LARGE // each)
    for at in range(0, len(views[0]), max(1, step)):
        yield at * each, [sent(view[at : at + step], device) for view in views]
