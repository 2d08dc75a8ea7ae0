"""Edits: what a mask changes in one slot, as rows (of neurons) or as single numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from surgery.layout.boxes import Lying
from surgery.layout.sharding import is_sharded
from surgery.layout.slots import Block, Layout, Slot


class Held(Protocol):
    """A checkpoint that is open: its tensors, and where the neurons lie in them."""

    @property
    def layout(self) -> Layout: ...

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class Rows:
    """The rows of one slot that a mask reverts."""

    block: Block
    slot: Slot
    index: Tensor  # of the neurons in the block, int64, ascending
    offsets: Tensor | None = None  # which numbers of each row, where not all of them

    @property
    def neurons(self) -> Tensor:
        """The neuron of each row."""
        return self.index

    @property
    def numbers(self) -> int:
        """How many numbers it writes."""
        return len(self.index) * (self.slot.width if self.offsets is None else len(self.offsets))

    @property
    def axes(self) -> int:
        """How many axes count the neurons, in a view as ``rows_in`` gives it; the others count a neuron's numbers."""
        return 1 + (self.slot.stacked if self.offsets is None else 0)

    def held(self, tensor: Tensor) -> Iterator[Rows]:
        """What of it this process holds: of a tensor that is not sharded, all."""
        if not is_sharded(tensor):
            yield self
            return
        for index, offsets in self.slot.held(tensor):
            both = self.index[torch.isin(self.index, index + self.slot.start, assume_unique=True)]
            if len(both):
                yield replace(self, index=both, offsets=offsets)

    def take(self, tensor: Lying) -> Tensor:
        """A copy of what the tensor holds there."""
        return self.slot.take(tensor, self.index - self.slot.start, self.offsets)

    def put(self, tensor: Lying, rows: Tensor) -> None:
        """Write there, in place."""
        self.slot.put(tensor, self.index - self.slot.start, rows, self.offsets)

    def read(self, source: Held) -> Tensor:
        """A copy of what another checkpoint holds there, whatever its names and shapes."""
        return source.layout[self.block.name].rows(source.tensors, self.slot.part, self.index, self.offsets)

    def spread(self, tensor: Tensor) -> tuple[Tensor, int, list[tuple[int, int]]]:
        """Where it lies in a tensor's memory, counted in numbers from the tensor's first.

        The first number of each row (int64, on the CPU), the way from a neuron to the next, and inside a row (size,
        way) of each axis. Nothing is read.
        """
        view, units = self.slot.view(tensor), 1 + self.slot.stacked
        axes = list(zip(view.shape[units:], view.stride()[units:], strict=True))
        first = _flat(view, self.index - self.slot.start, units)
        return first - int(tensor.storage_offset()), view.stride(units - 1), axes

    def pieces(self, layout: Layout) -> Iterator[tuple[slice, Rows]]:
        """The same rows in another layout, slot by slot, each with which of them it holds."""
        for slot, low, high in layout[self.block.name].cut(self.slot.part, self.index):
            yield slice(low, high), replace(self, slot=slot, index=self.index[low:high])


@dataclass(frozen=True)
class Numbers:
    """The single numbers of one slot that a mask reverts (see ``Rows``)."""

    block: Block
    slot: Slot
    index: Tensor  # positions in the part, int64, ascending

    @property
    def neurons(self) -> Tensor:
        return self.index // self.slot.width

    @property
    def numbers(self) -> int:
        return len(self.index)

    def held(self, tensor: Tensor) -> Iterator[Numbers]:
        if not is_sharded(tensor):
            yield self
            return
        here = self.slot.here(tensor, self.index - self.slot.span[0])
        if bool(here.any()):
            yield replace(self, index=self.index[here])

    def take(self, tensor: Lying) -> Tensor:
        return self.slot.take_entries(tensor, self.index - self.slot.span[0])

    def put(self, tensor: Lying, values: Tensor) -> None:
        self.slot.put_entries(tensor, self.index - self.slot.span[0], values)

    def read(self, source: Held) -> Tensor:
        return source.layout[self.block.name].entries(source.tensors, self.slot.part, self.index)

    def spread(self, tensor: Tensor) -> tuple[Tensor, int, list[tuple[int, int]]]:
        view = self.slot.view(tensor)
        return _flat(view, self.index - self.slot.span[0], view.ndim) - int(tensor.storage_offset()), 1, []

    def pieces(self, layout: Layout) -> Iterator[tuple[slice, Numbers]]:
        for slot, low, high in layout[self.block.name].cut_entries(self.slot.part, self.index):
            yield slice(low, high), replace(self, slot=slot, index=self.index[low:high])


def _flat(view: Tensor, index: Tensor, axes: int) -> Tensor:
    """Where in the storage the numbers lie that an index over a view's first axes leads to."""
    first = torch.full_like(index, int(view.storage_offset()))
    for size, stride in zip(view.shape[1:axes][::-1], view.stride()[1:axes][::-1], strict=True):
        first += index % size * stride
        index = index // size
    return first.add_(index, alpha=view.stride(0))


Edit = Rows | Numbers
