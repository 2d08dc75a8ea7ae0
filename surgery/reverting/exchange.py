"""A mask's numbers in a model on a GPU, exchanged with a packed buffer in one launch over all tensors."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from surgery.checkpoints.checkpoint import State
from surgery.checkpoints.opening import Weights
from surgery.compat import writes_to
from surgery.devices import real, succeeds, takes_kernel
from surgery.layout.slots import Block, Slot
from surgery.masks.edits import Edit, Rows
from surgery.masks.mask import Mask
from surgery.reverting.plan import Plan, form, looks, plain
from surgery.reverting.writing import Strength, blended

_plans: dict[int, tuple[weakref.ref[Any], Any, Plan]] = {}  # by the identity of a mask that is still there


@dataclass
class Exchanged:
    """A rollback by the kernel: packed holds what the model held."""

    plan: Plan
    packed: Tensor
    found: Tensor  # as ``Plan.fetch`` returns it

    def read(self) -> tuple[int, Edit | None]:
        """How many numbers changed, and the first edit with a number that is not finite; the device is waited for."""
        changed, wild = self.found.sum(1).tolist()
        return changed, self.plan.edit_of(int(self.found[1].nonzero()[0])) if wild else None

    def pairs(self) -> list[tuple[Edit, Tensor]]:
        """Each edit with the rows that it overwrote, as a view."""
        return list(zip(self.plan.edits, self.plan.rows(self.packed), strict=True))

    def undo(self, tensors: Mapping[str, Tensor]) -> bool:
        """Swap back; False, and nothing is done, where the tensors lie otherwise now."""
        if not self.plan.fits(tensors):
            return False
        self.plan.swap(tensors, self.packed)
        return True


def planned(mask: Mask, edits: Sequence[Edit], tensors: Mapping[str, Tensor]) -> Plan | None:
    """A mask's plan on a model, the same for as long as both stay; None where the index path is to be taken."""
    now = form(edits, tensors) if edits else None
    if now is None or not takes_kernel(now[0][-1], _works):
        return None
    key, known = id(mask), _plans.get(id(mask))
    state = (
        now,
        [0 if edit.index.is_inference() else writes_to(edit.index) for edit in edits],
    )  # it may be the mask's own
    if known is None or known[1] != state or not all(map(_same, known[2].edits, edits)):
        known = _plans[key] = weakref.ref(mask, lambda _: _plans.pop(key, None)), state, Plan(edits, tensors)
    return known[2]


def _same(one: Edit, other: Edit) -> bool:
    return one.slot == other.slot and torch.equal(one.index, other.index)


def exchanged(plan: Plan, tensors: Mapping[str, Tensor], source: Weights, strength: Strength) -> Exchanged:
    """Write what a rollback writes, by the kernel; what may fail comes before the launch that writes."""
    if isinstance(strength, float | int) and strength == 1:
        if (there := _alike(plan, tensors, source)) is not None:
            packed = plan.empty()
            return Exchanged(plan, packed, plan.fetch(tensors, packed, there))
        found = _gathered(plan, source)
        packed = _read(plan, source) if found is None else found.to(plan.dtype)
    else:
        found, packed = _gathered(plan, source), plan.empty()
        plan.gather(tensors, packed)
        read = (edit.read(source) for edit in plan.edits) if found is None else iter(plan.rows(found))
        for edit, rows, new in zip(plan.edits, plan.rows(packed), read, strict=True):
            rows.copy_(blended(edit, new, rows, strength))
    counts = plan.swap(tensors, packed, count=True)
    assert counts is not None
    return Exchanged(plan, packed, counts)


def _alike(plan: Plan, tensors: Mapping[str, Tensor], source: Weights) -> list[Tensor] | None:
    """For each edit the source's tensor, if it lies as the model's does, and in memory of its own."""
    if not isinstance(source.tensors, State | dict):  # others make their tensors anew when they are asked for them
        return None
    found, written = [], {tensors[edit.slot.tensor].untyped_storage().data_ptr() for edit in plan.edits}
    alike = {name: block == source.layout[name] for name, block in {e.block.name: e.block for e in plan.edits}.items()}
    for edit in plan.edits:
        slots = [edit.slot] if alike[edit.block.name] else [one.slot for _, one in edit.pieces(source.layout)]
        ours, there = tensors[edit.slot.tensor], source.tensors[slots[0].tensor]
        if len(slots) > 1 or not (alike[edit.block.name] or replace(slots[0], tensor=edit.slot.tensor) == edit.slot):
            return None
        if not plain(there) or looks(there) != looks(ours) or there.untyped_storage().data_ptr() in written:
            return None
        found.append(there)
    return found


def _gathered(plan: Plan, source: Weights) -> Tensor | None:
    """The source's numbers in packed's order, by the kernel; None where they lie elsewhere, or in several dtypes."""
    if not isinstance(source.tensors, State | dict):
        return None
    pieces, places = [], []
    for edit, place in zip(plan.edits, plan.places, strict=True):
        for run, piece in edit.pieces(source.layout):
            pieces.append(piece)
            places.append(replace(place, start=place.start + run.start * place.unit))
    known = form(pieces, source.tensors)
    axes = (len(piece.spread(source.tensors[piece.slot.tensor])[2]) for piece in pieces)
    if (
        known is None
        or known[0][-1] != plan.device
        or any(a != len(p.order) for a, p in zip(axes, places, strict=True))
    ):
        return None
    there = Plan(pieces, source.tensors, places)
    packed = plan.empty(there.dtype)
    there.gather(source.tensors, packed)
    return packed


def _read(plan: Plan, source: Weights) -> Tensor:
    """The source's numbers in packed's order, read edit by edit.

    What lies on the CPU is sent block by block (or 256 MB), through pinned memory: while one is on its way, the next
    is gathered.
    """
    packed = plan.empty()
    numbered = zip(range(len(plan.edits)), plan.edits, strict=True)
    most = (1 << 28) // plan.dtype.itemsize
    for _, some in groupby(numbered, key=lambda one: (one[1].block.name, plan.places[one[0]].start // most)):
        run = list(some)
        low = plan.places[run[0][0]].start
        last = run[-1][0] + 1
        high = plan.places[last].start if last < len(plan.places) else plan.size
        stage: Tensor | None = None
        for number, edit in run:
            rows = edit.read(source).detach()
            if number == run[0][0] and rows.device.type == "cpu" != plan.device.type:
                stage = torch.empty(high - low, dtype=plan.dtype, pin_memory=real(plan.device))
            home, start = (packed, 0) if stage is None else (stage, low)
            plan.places[number].rows(home, *plan.shapes[number], start).copy_(rows)
        if stage is not None:
            packed[low:high].copy_(stage, non_blocking=True)
    return packed


@cache
def _works(device: torch.device) -> bool:
    return succeeds(_try, device, "rollbacks take a slower path to the same bits")


def _try(device: torch.device) -> None:
    """Raise ``RuntimeError`` unless the kernel moves a few numbers as it should."""
    square = torch.arange(1024.0, device=device).view(32, 32)
    slot = Slot("gate", "square", "n d -> n d", (32, 32))
    plan = Plan([Rows(Block("try", 32, (slot,), "try"), slot, torch.arange(0, 32, 3))], {"square": square})
    packed = torch.zeros_like(plan.empty())
    plan.swap({"square": square}, packed)
    moved = torch.arange(1024.0).view(32, 32)[::3]
    if bool(square[::3].any()) or not torch.equal(plan.rows(packed)[0].cpu(), moved):
        raise RuntimeError("it does not give the bits that it should")
