"""How a kernel walks tensors that lie in any way: as matrices of neurons and their numbers, tile after tile."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from surgery.devices import real

ALONG, ACROSS = 128, 16  # of a program's tile: numbers that follow each other in memory, and of the other axis
Axes = tuple[tuple[int, int], list[tuple[int, int]]]  # two sizes, and of each view two strides


def in_two(shape: Sequence[int], strides: Sequence[Sequence[int]], low: int, high: int) -> Axes | None:
    """Some axes of views as two, the first of size 1 where one will do for all views; None where they are more.

    Axes that follow each other in the memory of every view are one.
    """
    sizes: list[int] = []
    ways: list[tuple[int, ...]] = []  # of each axis the way that each view takes
    for axis in range(low, high):
        size, way = shape[axis], tuple(one[axis] for one in strides)
        if size != 1 and ways and all(before == size * own for before, own in zip(ways[-1], way, strict=True)):
            sizes[-1], ways[-1] = sizes[-1] * size, way
        elif size != 1:
            sizes.append(size)
            ways.append(way)
    if len(sizes) > 2:
        return None
    sizes = [1] * (2 - len(sizes)) + sizes
    ways = [(0,) * len(strides)] * (2 - len(ways)) + ways
    return (sizes[0], sizes[1]), list(zip(*ways, strict=True))


@dataclass(frozen=True)
class Tiles:
    """The tiles of some views of one shape, ``high`` neurons by ``lanes`` numbers each."""

    rows: Axes
    numbers: Axes
    turned: bool = False  # whether a neuron's numbers are walked along the first of two axes

    @classmethod
    def of(cls, views: Sequence[Tensor], cut: int) -> Tiles | None:
        """Of views whose first ``cut`` axes are the neurons'; None where they have more axes than a kernel walks."""
        return cls._of(tuple(views[0].shape), tuple([view.stride() for view in views]), cut)

    @classmethod
    @lru_cache(1 << 12)  # a pass asks for the same few hundreds of times
    def _of(cls, shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...], cut: int) -> Tiles | None:
        rows, numbers = (in_two(shape, strides, *axes) for axes in ((0, cut), (cut, len(shape))))
        if rows is None or numbers is None:
            return None
        (folds, across), ways = numbers
        if turned := folds > 1 and ways[0][0] < ways[0][1]:  # the first lies closer in memory
            numbers = (across, folds), [(second, first) for first, second in ways]
        return cls(rows, numbers, turned)

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

    @cached_property
    def given(self) -> tuple[int, ...]:
        """What a kernel is told: neurons, those of a block, numbers, those of a fold, and of each view four strides."""
        pairs = zip(self.rows[1], self.numbers[1], strict=True)
        ways = [way for pair in pairs for side in pair for way in side]
        (count, width), (_, inside), (_, across) = self.shape, self.rows[0], self.numbers[0]
        return count, inside, width, across, *ways

    def places(self) -> tuple[int, int]:
        """How far the next fold, and the next number in it, is when a neuron's numbers are counted row by row."""
        folds, across = self.numbers[0]
        return (1, folds) if self.turned else (across, 1)

    @cached_property
    def fixed(self) -> dict[str, int | bool]:
        """What it is compiled for."""
        high, lanes = self.sides
        return {"STACKED": self.rows[0][0] > 1, "FOLDED": self.numbers[0][0] > 1, "ROWS": high, "LANES": lanes}


def on(device: torch.device) -> AbstractContextManager[object]:
    """While the body runs, kernels are launched on that device."""
    return torch.cuda.device(device) if real(device) else nullcontext()
