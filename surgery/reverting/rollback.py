"""The verb and the participle: ``rollback`` writes into a live model and can undo; ``rolled_back`` is a lazy copy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from surgery.checkpoints.checkpoint import (
    Checkpoint,
    Moment,
    Source,
    State,
    in_force,
    moment_of,
    opened,
    returned,
    tensors_of,
)
from surgery.checkpoints.opening import Weights, open_weights
from surgery.checkpoints.wrapped import is_unmerged
from surgery.files import uninterrupted
from surgery.formats.stored import Stored
from surgery.layout.boxes import Lying
from surgery.layout.sharding import check_one_process, ranks_of
from surgery.layout.slots import Block, Layout, Slot
from surgery.masks.edits import Edit, Rows
from surgery.masks.mask import Mask, checked
from surgery.reverting.adapters import adapter_files
from surgery.reverting.exchange import Exchanged, exchanged, planned
from surgery.reverting.live_adapters import factor_edits
from surgery.reverting.provenance import papers, record_of, warn_if_made_for_others
from surgery.reverting.writing import (
    Strength,
    agreed_on,
    by_index,
    check_strength,
    check_writable,
    new_values,
    recorded,
    spoken,
    write,
)


@dataclass
class Rollback:
    """What a rollback did, and its undo.

    Use it as a ``with`` block (undone on exit), or keep it and call ``undo``.
    """

    neurons: dict[str, int]  # written, per block; of single weights their number, per part
    parameters: dict[str, int]  # written, per block
    tensors: int  # touched
    changed: int  # entries whose bits really differ now
    strength: Any  # the number, or of many what ``recorded`` gives
    noun: str  # what ``neurons`` counts
    _model: nn.Module = field(repr=False)
    _old: list[tuple[Edit, Tensor]] = field(repr=False)
    _before: Moment = field(repr=False)
    _exchanged: Exchanged | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._undone = not any(self.parameters.values())  # where nothing was written there is nothing to undo
        if not self._undone:
            in_force(self._model).append(self._named())
        self._after = moment_of(self._model)

    def _named(self) -> str:
        return f"a rollback of {sum(self.neurons.values())} {self.noun}"

    def undo(self) -> None:
        """Restore the original bits, even if the model was moved or converted since. A second call does nothing.

        Undo overlapping rollbacks in the reverse order in which they were made.
        """
        with uninterrupted():
            if self._undone:
                return
            self._undone = True
            in_force(self._model).remove(self._named())
            alone = moment_of(self._model) is self._after  # nobody else has written, or it was undone
            _put_back(self._model, self._old, self._exchanged)
            self._exchanged = None
            if alone:
                returned(self._model, self._before)

    def before(self, block: Block, slot: Slot, offsets: Tensor | None = None) -> Tensor:
        """What the reverted rows of a live slot held before: ``[neuron, ...]``, in their order.

        Of a slot that is sharded: those rows of which this process holds the numbers at ``offsets``.

        Raises:
            LookupError: none of its neurons was reverted, or the rollback was undone.
        """
        for edit, rows in self._old:
            if not isinstance(edit, Rows) or (edit.block.name, edit.slot) != (block.name, slot):
                continue
            if edit.offsets is None or (offsets is not None and torch.equal(edit.offsets, offsets)):
                return rows
        raise LookupError(f"no neuron of {slot.tensor} ({slot.part}) is reverted")

    def _beyond(self) -> int:
        if isinstance(self.strength, dict):
            return int(self.strength["beyond"])
        return sum(self.neurons.values()) if self.strength > 1 else 0

    def __enter__(self) -> Rollback:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        written = sum(self.parameters.values())
        homes = f"{len(self.neurons)} {'parts' if self.noun == 'weights' else 'blocks'}"
        lines = [
            f"rolled back {sum(self.neurons.values())} {self.noun} in {sum(n > 0 for n in self.neurons.values())} of "
            f"{homes}: {written} parameters in {self.tensors} tensors, {self.changed} really changed"
        ]
        if self.strength not in (0, 1) and written:
            lines.append(
                f"{spoken(self.strength)}: {self.changed / written:.1%} of the entries moved; "
                f"in 16-bit dtypes a small partial step rounds back to where it was"
            )
        if beyond := self._beyond():
            lines.append(f"{beyond} {self.noun} went beyond the earlier values, to numbers that no checkpoint held")
        return "\n".join(lines)


def rollback(
    model: nn.Module,
    *,
    to: Source,
    mask: Mask,
    strength: Strength = 1.0,
    keep_on: torch.device | str | None = None,
    layout: Layout | None = None,
) -> Rollback:
    """Set the masked neurons or weights of a live model back to their values in ``to``, in place; undoable bit for bit.

    w_n ← w_n + strength · (w_n(to) − w_n). Only the masked numbers of ``to`` are read, and only those of the model are
    kept for the undo. An exception or Ctrl-C restores the old weights before it propagates.

    Args:
        model: the later model; weights float32, bfloat16, float16 or float64, on any device. Of one of peft with an
            adapter that is not merged, the adapter's own matrices are written, and ``to`` has to be its base.
        to: the earlier checkpoint: a folder, hub id, module or mapping, on any device, of any floating dtype.
        mask: bool Neurons or Entries, as a selector returns it; the names of its blocks say which kinds of unit it has.
        strength: in [0, 3], or Neurons with one for each neuron (``strengths`` finds good ones). 1 copies the earlier
            bits and 0 keeps the later ones; else the blend is computed in float32 and rounded to the weights' dtype. A
            strength of 2 overshoots the earlier value by the full change; no checkpoint ever held such values.
        keep_on: where the original bits are kept (default: beside the weights).
        layout: where the neurons lie (default: found); also in ``to``, if its tensors have the same names.

    Returns:
        A report with ``undo``; used as a ``with`` block it undoes the rollback on exit.

    Raises:
        ValueError: the mask or ``to`` is of another model; weights are offloaded, quantised, or share their storage
            with weights outside the mask.

    Source: the paper, Section 6 and Appendix D.4; strength, undo and atomicity are ours.

    >>> # with rollback(model, to="runs/math", mask=mask): print(evaluate(model))
    """
    if is_unmerged(model):
        return _in_factors(model, to, checked(mask), strength, layout)
    live = open_weights(model, layout, units=checked(mask).units)
    check_strength(strength, live.layout)
    source = _opened(to, layout, live)
    whole = list(mask.edits(live.layout, "the model"))
    edits = [part for edit in whole for part in edit.held(live.tensors[edit.slot.tensor])]
    warn_if_made_for_others(mask, earlier=source)
    check_writable(live, edits)
    ranks, plan = ranks_of(model), None if keep_on else planned(mask, edits, live.tensors)
    old: list[tuple[Edit, Tensor]] = []
    done, swapped, agreed, start = None, None, False, moment_of(model)
    try:
        with uninterrupted() as pending:
            if plan is not None:
                swapped = exchanged(plan, live.tensors, source, strength)
                old += swapped.pairs()
                changed, wild = swapped.read()
            else:
                changed, wild = by_index(live, source, edits, strength, keep_on, old, pending)
            if pending:
                raise KeyboardInterrupt
            if wild is not None:
                raise ValueError(_not_finite(wild, source, strength))
            written, agreed = _written(whole, live.layout), True
            touched, differing = len({edit.slot.tensor for edit in whole}), agreed_on(ranks, changed)
            if ranks.mesh is not None and whole:
                returned(model, Moment())  # also where this process holds none of the numbers
            told = recorded(strength, mask)
            done = Rollback(mask.count(), written, touched, differing, told, mask.noun, model, old, start, swapped)
    except BaseException:  # also of a Ctrl-C that was held back to the end: nobody would have the undo
        if done is None:
            _put_back(model, old, swapped)
        else:
            done.undo()
        if not agreed:
            ranks.sum(torch.tensor([0, 1]))
        raise
    return done


def _in_factors(model: nn.Module, to: Source, mask: Mask, strength: Strength, layout: Layout | None) -> Rollback:
    """The same where an adapter of peft is not merged: in its matrices A and B."""
    layout, edits = factor_edits(model, to, mask, strength, layout)
    start, tensors, told = moment_of(model), State(model), recorded(strength, mask)
    old = [(edit, edit.take(tensors[edit.slot.tensor])) for edit, _ in edits]
    try:
        with uninterrupted():
            for edit, new in edits:
                write(tensors[edit.slot.tensor], edit, new)
        written, changed = _written(mask.edits(layout, "the model"), layout), sum(edit.numbers for edit, _ in edits)
        return Rollback(mask.count(), written, len(edits), changed, told, mask.noun, model, old, start)
    except BaseException:
        _put_back(model, old, None)
        raise


def _written(edits: Iterable[Edit], layout: Layout) -> dict[str, int]:
    found = dict.fromkeys(layout, 0)
    for edit in edits:
        found[edit.block.name] += edit.numbers
    return found


def _opened(to: Source, layout: Layout | None, later: Weights) -> Weights:
    """The earlier checkpoint by the user's layout, where that names its tensors, else by the one that is found there.

    A live model and its folder may hold one neuron under different names, so a layout of the one need not fit the
    other.
    """
    return open_weights(to, layout if layout is None or layout.fits(tensors_of(to)) else None, later)


def _put_back(model: nn.Module, old: list[tuple[Edit, Tensor]], swapped: Exchanged | None) -> None:
    tensors = State(model) if old or swapped else {}  # as they are now: a model that is moved gets other tensors
    with uninterrupted():
        for edit, rows in () if swapped is not None and swapped.undo(tensors) else reversed(old):
            tensor = tensors[edit.slot.tensor]
            write(tensor, edit, rows.to(tensor.device, tensor.dtype))
        old.clear()


def _not_finite(edit: Edit, source: Weights, strength: Strength) -> str:
    said = f"{edit.slot.tensor} of {source.name} holds NaN or infinite numbers in the masked neurons"
    return said if strength == 1 else f"{said}, or with this strength they leave the range of their dtype"


class RolledBack(Mapping[str, Tensor]):
    """A checkpoint with some neurons set back: a lazy mapping that reads its two parents and never writes them."""

    def __init__(self, later: Weights, source: Weights, mask: Mask, strength: Strength) -> None:
        self.later, self.source, self.mask, self.strength = later, source, mask, strength
        self._edits: dict[str, list[Edit]] = {}
        for edit in mask.edits(later.layout, later.name):
            self._edits.setdefault(edit.slot.tensor, []).append(edit)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.later.tensors[name]
        if name not in self._edits:
            return tensor
        tensor = tensor.detach().clone()
        self.edit(name, tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.later.tensors)

    def __len__(self) -> int:
        return len(self.later.tensors)

    @property
    def layout(self) -> Layout:
        """Where the neurons lie: as in the later checkpoint."""
        return self.later.layout

    @property
    def folder(self) -> Path | None:
        """The later checkpoint's folder, if it is one."""
        return self.later.tensors.folder if isinstance(self.later.tensors, Checkpoint) else None

    @property
    def parents(self) -> list[Checkpoint]:
        """The folders that it reads."""
        opened = (self.later.tensors, self.source.tensors)
        found = [one.parents if isinstance(one, RolledBack) else [one] for one in opened]
        named = [one for some in found for one in some if isinstance(one, Checkpoint)]
        return named + [one.base for one in named if one.base is not None]

    @property
    def stored(self) -> Stored | None:
        """How the later folder stores its tensors, if it is one."""
        return self.later.tensors.stored if isinstance(self.later.tensors, Checkpoint) else None

    @property
    def parameters(self) -> int:
        """How many numbers are set back."""
        return sum(edit.numbers for edits in self._edits.values() for edit in edits)

    @property
    def edited(self) -> list[str]:
        """The tensors in which numbers are set back."""
        return list(self._edits)

    def record(self) -> dict[str, Any]:
        """What made it, as JSON: versions, both parents, the selector, the counts."""
        return record_of(self.later, self.source, self.mask, self.strength, self.parameters, len(self._edits))

    def touched(self, file: str) -> list[str]:
        """The tensors of a file that differ from the later checkpoint's."""
        return [name for name in (self.stored.files[file] if self.stored else ()) if name in self._edits]

    def edit(self, name: str, tensor: Lying) -> None:
        """Write the reverted rows into ``tensor``, which holds the later checkpoint's numbers."""
        for edit in self._edits.get(name, ()):
            before = edit.take(tensor)
            after = new_values(edit, self.source, before, self.strength)
            if not bool(after.isfinite().all()):
                raise ValueError(_not_finite(edit, self.source, self.strength))
            write(tensor, edit, after)

    def reset(self, name: str, tensor: Lying) -> None:
        """Write zeros on the reverted rows of ``tensor``, a moment of the optimizer for the tensor of that name."""
        for edit in self._edits[name]:
            write(tensor, edit, torch.zeros_like(edit.take(tensor)))

    def remarks(self) -> list[str]:
        """What is to be known about the numbers that were set back."""
        if self.stored is None or not self.stored.training:
            return []
        for name, (edit, *_) in self._edits.items():
            there = self.source.layout[edit.block.name].of(edit.slot.part)[0].tensor
            held, taken = self.later.dtype(name), self.source.dtype(there)
            if torch.finfo(taken).bits < torch.finfo(held).bits:
                return [
                    f"the reverted numbers are {held} with the values of {taken}: the low bits of the earlier masters "
                    f"are gone; roll back to the earlier run's own training checkpoint to have them"
                ]
        return []

    def papers(self) -> dict[str, bytes]:
        """The files beside the weights in a saved folder: the mask, a record of what made it, a model card."""
        told = papers(self.record(), self.later, self.mask, self.strength)
        adapted = isinstance(self.later.tensors, Checkpoint) and self.later.tensors.adapter is not None
        return {**(adapter_files(self.later, self.source, self.mask, self.strength) if adapted else {}), **told}

    def __repr__(self) -> str:
        units = f"{sum(self.mask.count().values())} {self.mask.noun}"
        how_far = spoken(recorded(self.strength, self.mask))
        return f"RolledBack({self.later.name} with {units} of {self.source.name}, {how_far})"


def rolled_back(
    later: Source, *, to: Source, mask: Mask, strength: Strength = 1.0, layout: Layout | None = None
) -> RolledBack:
    """The later checkpoint with the masked neurons set back to ``to``, as a new lazy mapping; nothing is written.

    Of an adapter (LoRA) the mapping is the merged model's, and ``save`` writes an adapter.

    Args:
        later: the later checkpoint: a folder, hub id or mapping.
        to: the earlier one.
        mask: bool Neurons or Entries; strength, layout: as in ``rollback``.

    Returns:
        A mapping from tensor name to tensor: untouched tensors are the later checkpoint's own, touched ones fresh
        copies. ``save`` writes it as a folder.

    Raises:
        ValueError: the mask or ``to`` is of another model, or weights are quantised.

    Source: ours.
    """
    check_one_process(later, "rolled_back")
    found = opened(later, to)
    weights = open_weights(found, layout, units=checked(mask).units)
    check_strength(strength, weights.layout)
    view = RolledBack(weights, _opened(opened(to, found), layout, weights), mask, strength)
    warn_if_made_for_others(mask, earlier=view.source, later=weights)
    return view
