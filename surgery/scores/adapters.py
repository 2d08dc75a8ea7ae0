"""What an adapter changed in each unit, from its small matrices alone: neither B·A nor the base is read."""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.checkpoints.checkpoint import Checkpoint
from surgery.checkpoints.opening import Weights
from surgery.formats.adapters import Adapter
from surgery.layout.finding import find_layout
from surgery.layout.slots import Layout, Slot


def squares_of(later: Weights, earlier: Weights) -> dict[str, Tensor] | None:
    """Block → the squared norm of each unit's change, float64; None unless B·A on the earlier checkpoint is all of it.

    A row of B·A has the squared norm b·(A·Aᵀ)·bᵀ, a column aᵀ·(Bᵀ·B)·a: right to the last digits of float64, before
    the merged weights are rounded to the base's dtype.
    """
    tensors, base = later.tensors, earlier.tensors
    if not (isinstance(tensors, Checkpoint) and isinstance(base, Checkpoint) and tensors.adapter and tensors.base):
        return None
    if base.adapter is not None or tensors.base.folder.resolve() != base.folder.resolve():
        return None
    adapter, layout = tensors.adapter, _in_memory(tensors.adapter, later.layout)
    names = {slot.tensor for block in layout.blocks for slot in block.slots}
    if any(one.magnitude is not None for one in adapter.factors.values()) or layout.sizes != later.layout.sizes:
        return None
    if names & (adapter.replaced.keys() | adapter.biases.keys()) or not _inside(adapter, later.layout) <= names:
        return None
    found = {block.name: torch.zeros(block.neurons, dtype=torch.float64) for block in layout.blocks}
    for block in layout.blocks:
        for slot in block.slots:
            if slot.tensor in adapter.factors:
                found[block.name][slot.start : slot.stop] += _squares(adapter, slot)
    return found


def _in_memory(adapter: Adapter, layout: Layout) -> Layout:
    """The layout by the names that the adapter has: those in memory, where the base's files have others."""
    on_disk = {slot.tensor for block in layout.blocks for slot in block.slots}
    inside = _inside(adapter, layout)
    if inside <= on_disk or adapter.model is None:
        return layout
    return find_layout(adapter.model, units=layout.units)


def _inside(adapter: Adapter, layout: Layout) -> set[str]:
    """The parameters of units that B·A changes."""
    on_disk = {slot.tensor for block in layout.blocks for slot in block.slots}
    return {one for one in adapter.factors if on_disk & set(adapter.names(one))}


def _squares(adapter: Adapter, slot: Slot) -> Tensor:
    nowhere = torch.empty(0, dtype=torch.long)
    thin = slot.marked(nowhere, nowhere)  # the tensor's shape, without the axis that every row takes whole
    squares = adapter.factors[slot.tensor].squares(rows=thin.shape[-1] == 1)
    return slot.view(squares.reshape(thin.shape)).reshape(slot.neurons, -1).sum(1)
