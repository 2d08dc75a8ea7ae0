"""Edits: what a mask changes in each tensor, as rows (neurons) or as single numbers (entries) of one slot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.entries import Entries, Mask, shapes_of
from surgery.neurons import Neurons
from surgery.opening import Weights
from surgery.slots import Block, Layout, Slot
from surgery.strength_values import Strength

_RUN = 1 << 20  # single numbers that one edit may hold: their coordinates take several times the numbers' own room


@dataclass(frozen=True)
class Rows:
    """The rows of one slot that a mask reverts."""

    block: Block
    slot: Slot
    index: Tensor  # of the neurons in the block, int64, ascending

    @property
    def neurons(self) -> Tensor:
        """The neuron of each row."""
        return self.index

    @property
    def numbers(self) -> int:
        """How many numbers it writes."""
        return len(self.index) * self.slot.width

    def take(self, tensor: Tensor) -> Tensor:
        """A copy of what the tensor holds there."""
        return self.slot.take(tensor, self.index - self.slot.start)

    def put(self, tensor: Tensor, rows: Tensor) -> None:
        """Write there, in place."""
        self.slot.put(tensor, self.index - self.slot.start, rows)

    def read(self, source: Weights) -> Tensor:
        """A copy of what another checkpoint holds there, whatever its names and shapes."""
        return source.layout[self.block.name].rows(source.tensors, self.slot.part, self.index)


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

    def take(self, tensor: Tensor) -> Tensor:
        return self.slot.take_entries(tensor, self.index - self.slot.span[0])

    def put(self, tensor: Tensor, values: Tensor) -> None:
        self.slot.put_entries(tensor, self.index - self.slot.span[0], values)

    def read(self, source: Weights) -> Tensor:
        return source.layout[self.block.name].entries(source.tensors, self.slot.part, self.index)


Edit = Rows | Numbers


def edits_of(layout: Layout, mask: Mask, whose: str) -> Iterator[Edit]:
    """What a mask changes, slot by slot in layer order.

    Raises:
        ValueError: the mask holds scores, or is of another model than ``whose`` layout.
    """
    if isinstance(mask, Entries):
        mask.require(shapes_of(layout), whose)
        yield from _numbers(layout, mask)
    else:
        if not mask.is_mask:
            raise ValueError("mask= holds scores: choose neurons with top(scores, allocate(scores, budget))")
        mask.require(layout.sizes, whose)
        yield from _rows(layout, mask)


def _rows(layout: Layout, mask: Neurons) -> Iterator[Rows]:
    for name, block in layout.items():
        index = mask.indices(name)
        for slot in block.slots if len(index) else ():
            low, high = torch.searchsorted(index, torch.tensor([slot.start, slot.stop])).tolist()
            if low < high:
                yield Rows(block, slot, index[low:high])


def _numbers(layout: Layout, mask: Entries) -> Iterator[Numbers]:
    for name, block in layout.items():
        for slot in block.slots:
            positions = mask[f"{name}/{slot.part}"]
            low, high = torch.searchsorted(positions, torch.tensor(slot.span)).tolist()
            for run in positions[low:high].split(_RUN) if low < high else ():
                yield Numbers(block, slot, run)


def new_values(edit: Edit, source: Weights, old: Tensor, strength: Strength) -> Tensor:
    """What the numbers become, in ``old``'s dtype and on its device.

    Strength 1 copies the source's bits and 0 leaves the old ones, also where it is that of some neurons only.
    """
    found = edit.read(source)
    there = found.to(old.device, old.dtype)
    if not isinstance(strength, Neurons) and strength in (0, 1):
        return there if strength else old
    wide = torch.promote_types(old.dtype, torch.float32)
    each = torch.tensor(strength, dtype=wide) if not isinstance(strength, Neurons) else _each(edit, strength, old)
    each = each.to(old.device, wide)
    blend = old.to(wide).lerp(found.to(old.device, wide), each).to(old.dtype)
    return torch.where(each == 1, there, torch.where(each == 0, old, blend))


def _each(edit: Edit, strength: Neurons, rows: Tensor) -> Tensor:
    """The strength of each row, shaped so that it goes with ``rows``."""
    return strength[edit.block.name][edit.neurons].reshape(-1, *[1] * (rows.ndim - 1))
