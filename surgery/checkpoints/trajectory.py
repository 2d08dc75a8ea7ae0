"""Trajectories: checkpoints in training order, and what training changed, read chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.checkpoints.buffer import Buffer
from surgery.checkpoints.checkpoint import Checkpoint, Source, in_force, merged, opened
from surgery.checkpoints.loading import Sharding, check_conversion, loaded, moved
from surgery.checkpoints.opening import Weights, open_weights
from surgery.files import path_of
from surgery.formats.folders import is_adapter
from surgery.layout.boxes import Boxes, boxes_in
from surgery.layout.slots import Block, Layout, Slot
from surgery.progress import steps
from surgery.units import Units, kinds_of, noun


@dataclass
class _Held:
    """What a run has opened and loaded so far."""

    folders: dict[str, Checkpoint] = field(default_factory=dict)
    weights: dict[tuple[str, tuple[str, ...]], tuple[Weights | None, Weights]] = field(default_factory=dict)
    model: nn.Module | None = None
    read: Checkpoint | None = None  # the files that ``model`` was read from
    memory: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trajectory:
    """Three checkpoints of one model in training order.

    Args:
        base: the checkpoint before the earlier domain was trained; only C needs it.
        earlier: the checkpoint after the earlier domain, whose values a rollback restores.
        later: the checkpoint after the later domain, which is rolled back. Pass a model that is already live here.
        layout: where the neurons lie, if surgery can't find them by itself; scores then use its kinds of unit.
        stages: every checkpoint in training order by name, if there are more than three (see ``through``).

    Each checkpoint is a folder, a hub id in the local cache, an ``nn.Module`` or a mapping of tensors. Nothing is read
    until it is needed; then each folder is opened once, and the later model is loaded once (``load``).

    Source: the paper, Section 5 (θ0, θA, θB).
    """

    base: Source | None = None
    earlier: Source | None = None
    later: Source | None = None
    layout: Layout | None = field(default=None, repr=False)
    stages: Mapping[str, Source] | None = field(default=None, repr=False)
    _held: _Held = field(init=False, repr=False, compare=False, default_factory=_Held)

    @classmethod
    def through(
        cls,
        stages: Mapping[str, Source],
        *,
        earlier: str | None = None,
        later: str | None = None,
        layout: Layout | None = None,
    ) -> Trajectory:
        """A trajectory of any number of checkpoints, by name in training order.

        Args:
            stages: name → checkpoint, like {"base": ..., "code": ..., "math": ..., "qa": ..., "cw": ...}. A stage's
                update is its checkpoint minus the one before.
            earlier: which of them a rollback goes back to (default: the one before ``later``).
            later: which of them is rolled back (default: the last).
            layout: as in ``Trajectory``.

        Raises:
            ValueError: fewer than two stages, a name that is not among them, or ``later`` not after ``earlier``.

        >>> Trajectory.through({"base": "runs/base", "math": "runs/math", "qa": "runs/qa"})
        Trajectory(base='runs/base', earlier='runs/math', later='runs/qa')
        """
        names = list(stages)
        if len(names) < 2:
            raise ValueError(f"a trajectory has two or more checkpoints, got {names}")
        if unknown := {earlier, later} - {None, *names}:
            raise ValueError(f"no stage is called {unknown.pop()!r}: expected one of {', '.join(names)}")
        last = names.index(later) if later is not None else len(names) - 1
        first = names.index(earlier) if earlier is not None else last - 1
        if not 0 <= first < last:
            raise ValueError(f"{later or names[last]!r} has to come after {earlier or 'another'!r} in {names}")
        base = stages[names[first - 1]] if first else None
        return cls(base, stages[names[first]], stages[names[last]], layout, dict(stages))

    def back_to(self, name: str) -> Trajectory:
        """The same run with another of its checkpoints as ``earlier``; the two share the live later model.

        Raises:
            ValueError: there is no such checkpoint before the later one.
        """
        later = next(one for one, source in self.checkpoints.items() if source is self.later)
        found = Trajectory.through(self.checkpoints, earlier=name, later=later, layout=self.layout)
        object.__setattr__(found, "_held", self._held)
        return found

    @property
    def checkpoints(self) -> dict[str, Source]:
        """Every checkpoint by name, in training order: the stages, or those given of base, earlier and later."""
        if self.stages is not None:
            return dict(self.stages)
        given = {"base": self.base, "earlier": self.earlier, "later": self.later}
        return {name: source for name, source in given.items() if source is not None}

    @property
    def memory(self) -> dict[str, Any]:
        """What was measured on the run, kept as long as the run itself (``surgery.scores.memory``)."""
        return self._held.memory

    def steps(self) -> dict[str, Trajectory]:
        """Each stage as a trajectory of its own, by the name of the checkpoint that it led to (``later``)."""
        found = {name: self._alone(source) for name, source in self.checkpoints.items()}
        bases = [None, *found.values()]
        return {
            after: Trajectory(base, found[before], found[after], self.layout)
            for base, (before, after) in zip(bases, pairwise(found), strict=False)
        }

    def kinds(self, units: Units = "mlp") -> tuple[str, ...]:
        """The kinds of unit that ``units`` means here: those of the trajectory's own layout, if it has one.

        Raises:
            ValueError: ``units`` are unknown, overlap, or contradict the layout.
        """
        kinds = kinds_of(units)
        if self.layout is not None and kinds not in (("mlp",), self.layout.units):
            raise ValueError(
                f"units={units!r}, and the trajectory's own layout has {noun(self.layout.units)}: pass only one of both"
            )
        return kinds if self.layout is None else self.layout.units

    def opened(self, units: Units = "mlp") -> dict[str, Weights]:
        """Every checkpoint by name, in training order, opened and checked to be of the same model."""
        *others, last = self.checkpoints.items()
        end = self._open(last[1], units)
        return {**{name: self._open(source, units, end) for name, source in others}, last[0]: end}

    def weights(self, *names: str, units: Units = "mlp") -> list[Weights]:
        """The checkpoints of those names, opened: "base", "earlier" and "later" are roles, all others stages.

        Args:
            names: roles or stages.
            units: which kinds of unit to find (see ``find_layout``) if the trajectory has no layout.
        """
        later = self._open(self.source("later"), units)
        return [later if name == "later" else self._open(self.source(name), units, later) for name in names]

    def live(self, *names: str, units: Units = "mlp") -> list[Weights]:
        """The live later model, opened, and then the checkpoints of those names (see ``weights``)."""
        model = open_weights(self.load(), self.layout, units=self.kinds(units))
        return [model, *(self._open(self.source(name), units, model) for name in names)]

    def tensors(self, name: str) -> Source:
        """The checkpoint of that name; for a folder, the opened one."""
        return self.held(self.source(name))

    def held(self, source: Source) -> Source:
        """One of ``checkpoints``: a folder, opened once for as long as its files stay as they are; a live model."""
        if isinstance(source, str | Path):
            return self._folder(source)
        return merged(source) if isinstance(source, nn.Module) else source

    def source(self, name: str) -> Source:
        """The checkpoint of that name as it was given; ``ValueError`` if it was not given."""
        if name not in ("base", "earlier", "later"):
            return self._stage(name)
        source: Source | None = getattr(self, name)
        if source is None:
            raise ValueError(f"this needs the {name} checkpoint: pass Trajectory({name}=...)")
        return source

    def load(self, device: Any = None, dtype: torch.dtype | None = None, shard: Sharding | None = None) -> nn.Module:
        """The run's live later model, in eval mode: the first call reads it, later calls return the same object.

        Every score and selector of this trajectory uses that model, on its device. A model that was given as ``later``
        is returned as it is. ``device`` and ``dtype`` move and convert the model in place.

        Args:
            device: where to put it (default: where it is, or the CPU); "auto" spreads it over all devices, as
                accelerate's device map does, when it is read.
            dtype: torch dtype (default: its own).
            shard: "fsdp" or "tp": when it is read, over all processes that torchrun started, on their devices.

        Raises:
            ValueError: there is no later checkpoint, or it is a bare mapping, which has no forward pass; its folder is
                not a whole model of plain numbers; the files have changed since the model was read; the model was
                already rounded to a narrower dtype than ``dtype``; with "auto" the model does not fit on the devices.
        """
        if isinstance(self.later, nn.Module):
            return moved(merged(self.later), device, dtype)
        if self._held.model is None:
            self._held.model = self._read(device, dtype, shard)
            return self._held.model
        assert self._held.read is not None
        if not self._held.read.is_current:
            raise ValueError(
                f"the files of {self.later} have changed since its model was loaded, so memory and disk are two "
                f"models: make a new Trajectory"
            )
        if dtype is not None:
            check_conversion(self._held.model, dtype, self._held.read)
        return moved(self._held.model, None if device == "auto" else device, dtype)

    def check_whole(self) -> None:
        """Raise ``ValueError`` if the live later model differs from ``later`` because an edit is in force."""
        if isinstance(self.later, nn.Module) or self._held.model is None:
            return
        if edits := in_force(self._held.model):
            raise ValueError(
                f"the live later model is edited ({'; '.join(edits)}), and its folder is not: what is read from both "
                f"would be a mixture of two models. Undo it first, or pass the live model: Trajectory(later=model)"
            )

    def _read(self, device: Any, dtype: torch.dtype | None, shard: Sharding | None) -> nn.Module:
        if self.later is None:
            raise ValueError("there is no later checkpoint to load: pass Trajectory(later=...)")
        if isinstance(self.later, Mapping) and not isinstance(self.later, Checkpoint):
            raise ValueError("a bare mapping of tensors has no forward pass: pass a folder or an nn.Module as later")
        source = self.tensors("later")
        assert isinstance(source, Checkpoint)
        if shard is not None and device is not None:
            raise ValueError(f"shard={shard!r} puts the model on the processes' own devices: leave device out")
        model = loaded(source, dtype, "auto" if device == "auto" else None, shard)
        if offloaded := [name for name, p in model.named_parameters() if p.is_meta]:
            raise ValueError(
                f"{offloaded[0]} and {len(offloaded) - 1} other tensors do not fit on the devices, and accelerate has "
                f"offloaded them: take a larger machine, or work on the folder (rolled_back and save need no model)"
            )
        self._held.read = source
        return (model.to(device) if device and device != "auto" else model).eval()

    def _alone(self, source: Source) -> Source:
        """A checkpoint as it is read without the others: the base of an adapter may be one of them."""
        return self.held(source) if isinstance(source, str | Path) and is_adapter(path_of(source)) else source

    def _stage(self, name: str) -> Source:
        if name not in (self.stages or {}):
            raise ValueError(f"no stage is called {name!r}: expected one of {', '.join(self.checkpoints)}")
        assert self.stages is not None
        return self.stages[name]

    def _folder(self, source: str | Path) -> Checkpoint:
        """A folder, opened once for as long as its files stay as they are."""
        found = self._held.folders.get(str(source))
        if found is None or not found.is_current:
            opening = opened(source, *self.checkpoints.values())
            assert isinstance(opening, Checkpoint)
            found = self._held.folders[str(source)] = opening
        return found

    def _open(self, source: Source, units: Units, like: Weights | None = None) -> Weights:
        """A source's weights; of a folder those that were opened before, if nothing has changed."""
        kinds = self.kinds(units)
        if not isinstance(source, str | Path):
            return open_weights(self.held(source), self.layout, like, kinds)
        tensors, key = self._folder(source), (str(source), kinds)
        known, found = self._held.weights.get(key, (None, None))
        if found is None or found.tensors is not tensors or known is not like:
            found = open_weights(tensors, self.layout, like, kinds)
            self._held.weights[key] = (like, found)
        return found


CHUNK = 1 << 20  # bytes of float32 that one chunk of a part may take: it stays in the processor's cache


def pieces(
    block: Block, part: str, others: list[Block], span: int | None = None, chunk: int = CHUNK
) -> Iterator[tuple[int, int]]:
    """Runs of neurons that every layout holds in one tensor: at most ``chunk`` bytes of ``span`` numbers (or all)."""
    slots = [slot for one in (block, *others) for slot in one.of(part)]
    cuts = sorted({edge for slot in slots for edge in (slot.start, slot.stop)})
    step = max(1, chunk // (4 * max(span or slots[0].width, 1)))
    for low, high in pairwise(cuts):
        for start in range(low, high, step):
            yield start, min(start + step, high)


def reading(weights: Weights, name: str, part: str) -> Callable[[int, int], Tensor]:
    """A function that reads neurons start…stop of one part as ``[neuron, width]``, a view where it can be."""
    # of the slot that was read last: making a view takes longer than reading a chunk
    views: dict[int, Tensor | Boxes] = {}

    def read(start: int, stop: int) -> Tensor:
        slot = next(s for s in weights.layout[name].of(part) if s.start <= start < s.stop)
        if slot.start not in views:
            views.clear()
            views[slot.start] = boxes_in(weights.tensors, slot.tensor) or _viewed(slot, weights.read(slot.tensor))
        view, first, last = views[slot.start], start - slot.start, stop - slot.start
        if isinstance(view, Boxes):
            view = slot.take(view, torch.arange(first, last))
        elif slot.stacked:
            rows = view.shape[1]
            one, other = first // rows, (last - 1) // rows
            view = view[one] if one == other else view[one : other + 1].flatten(0, 1)
            view = view[first - one * rows : last - one * rows]
        else:
            view = view[first:last]
        return view.reshape(stop - start, -1)

    return read


def _viewed(slot: Slot, tensor: Tensor) -> Tensor:
    view = slot.view(tensor).detach()
    return view.flatten(1, slot.stacked) if slot.stacked else view


def displacements(
    run: Trajectory, *names: str, units: Units = "mlp", whole: bool = True
) -> Iterator[tuple[str, str, int, int, tuple[Tensor, ...]]]:
    """What each step of training changed, chunk by chunk: ``(block, part, start, stop, (δ, ...))``.

    Args:
        names: the checkpoints in order: ("earlier", "later") gives δB, ("base", "earlier", "later") gives δA and δB.
        units: of which kinds of unit (see ``find_layout``).
        whole: whether a neuron's part comes whole. If not, columns come in runs of rows of their matrix, as these lie
            in memory, cut in the same places however much is read.

    Yields:
        For one part of neurons start…stop of a block: the differences, float32 ``[neuron, width]``, every number of
        every neuron once. The next chunk overwrites them. The neurons of down are columns in memory, too, which is
        bounded by ``CHUNK`` per checkpoint. NaN and infinite weights come as they are (``check_finite``).
    """
    opened = run.weights(*names, units=units)
    buffers = [Buffer() for _ in names]
    found = steps("the checkpoints", opened[-1].layout.items(), lambda item: float(item[1].neurons * item[1].width))
    for name, block in found:
        others = [one.layout[name] for one in opened[:-1]]
        for part in block.parts:
            readers = [reading(one, name, part) for one in opened]
            run_of = block.neurons // max(block.experts, 1)
            first = _first_two(opened[-1].layout[name].of(part)[0])
            columns, width = first.stride(0) < first.stride(1), first.shape[1]
            span = width if whole or not columns else min(width, _span(run_of))
            for start, stop in pieces(block, part, others, span):
                views = [reader(start, stop) for reader in readers]
                for low in range(0, width, span):
                    parts = zip(buffers, views, strict=True)
                    read = [buffer.of(view[:, low : low + span], columns) for buffer, view in parts]
                    for after, before in pairwise(reversed(read)):
                        after -= before
                    yield name, part, start, stop, tuple(read[1:])


def _first_two(slot: Slot) -> Tensor:
    """Two neurons of a slot, as they lie in a tensor that is in one piece: ``[neuron, width]``, without numbers."""
    view = slot.view(torch.empty(slot.shape, device="meta"))[(0,) * slot.stacked][:2]
    return view.reshape(len(view), -1)


def _span(columns: int) -> int:
    """How many rows of a matrix make up a chunk: a power of two, the same however many columns are read at once."""
    return max(64, 1 << (CHUNK // (4 * columns)).bit_length() >> 1)


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
