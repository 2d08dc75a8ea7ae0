"""How far training moved all parameters: histograms, near-zero fractions and norms, read in one pass."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from surgery.checkpoints.checkpoint import tensors_of
from surgery.checkpoints.checks import check_source
from surgery.checkpoints.trajectory import Trajectory
from surgery.evidence.matching import KINDS, alike, places_of
from surgery.layout.sharding import check_one_process
from surgery.tables import Cell, Table, write_json

CHUNK = 1 << 18  # numbers per checkpoint that are in memory at a time
BINS = 256  # the exponents of float32
Group = tuple[str | None, str]  # a layer's path, and a kind of module


@dataclass
class Sums:
    """What adds up over the chunks of a group, for one comparison."""

    parameters: int = 0
    unchanged: int = 0
    from_zero: int = 0
    square: float = 0.0
    reference_square: float = 0.0
    bins: Tensor = field(default_factory=lambda: torch.zeros(2, BINS, dtype=torch.int64))

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


class Meter:
    """Reads tensors of all checkpoints side by side, in float32 rooms that every chunk uses again."""

    def __init__(self, units: tuple[int, int], pairs: list[tuple[int, int]], names: list[str]) -> None:
        self.units, self.pairs, self.names = units, pairs, names
        self.sums: dict[tuple[int, int], dict[Group, Sums]] = {pair: {} for pair in pairs}
        self.wide, self.size = torch.empty(len(names), CHUNK), torch.empty(CHUNK)
        self.delta, self.ratio = torch.empty(CHUNK), torch.empty(CHUNK)

    def read(self, name: str, group: Group, opened: list[Mapping[str, Tensor]]) -> None:
        """Add one tensor to its group."""
        held = {pair: self.sums[pair].setdefault(group, Sums()) for pair in self.pairs}
        for chunk in _chunks([tensors[name].detach() for tensors in opened]):
            wide = [room[: len(one)].copy_(one) for room, one in zip(self.wide, chunk, strict=True)]
            for reference in dict.fromkeys(first for first, _ in self.pairs):
                before = torch.abs(wide[reference], out=self.size[: len(wide[reference])])
                square, least = float(torch.dot(before, before)), float(before.amin())
                for pair in (pair for pair in self.pairs if pair[0] == reference):
                    sums = held[pair]
                    self._compare(sums, wide[reference], before, wide[pair[1]], least)
                    sums.reference_square += square
                    if not math.isfinite(sums.square + square):
                        self._refuse(name, chunk)

    def _compare(self, sums: Sums, old: Tensor, size: Tensor, new: Tensor, least: float) -> None:
        """Add one chunk of one comparison: ``old`` with its absolute values ``size`` and their least, and ``new``."""
        count = len(old)
        sums.parameters += count
        delta, ratio = torch.sub(new, old, out=self.delta[:count]).abs_(), self.ratio[:count]
        square = float(torch.dot(delta, delta))
        sums.square += square
        if square == 0 and not bool(delta.max()):  # frozen; a square alone may be 0 by underflow
            sums.unchanged += count
            return
        if not math.isfinite(square):
            return
        torch.div(delta, size, out=ratio)
        from_zero = 0
        if least == 0:
            zero = size == 0
            from_zero = int(torch.count_nonzero(delta[zero]))
            ratio.masked_fill_(zero, 0)
        if least < 1e-18:  # else no ratio is infinite: squares of Δ add up to a float32
            ratio.clamp_max_(1e38)
        unchanged = count - int(np.count_nonzero(delta.view(torch.int32).numpy()))  # twice as fast as torch counts
        both = self._bins(delta, ratio)
        bins = both.sum(1), both.sum(0)
        bins[0][0] -= unchanged
        bins[1][0] -= unchanged + from_zero
        sums.unchanged += unchanged
        sums.from_zero += from_zero
        for at in (0, 1):
            sums.bins[at] += bins[at]

    def _bins(self, *values: Tensor) -> Tensor:
        """How many pairs of float32 numbers ≥ 0 lie in each octave of the one and the other: ``[octave, octave]``.

        The bits of a positive float are a number whose upper part is the exponent: shifted so that the unit falls on
        an edge, it is the bin, exactly, at a tenth of what a logarithm and a search would take. Counting is the larger
        part of the work, so both are counted at once. The numbers are gone afterwards: their room is used.
        """
        one, other = (
            value.view(torch.int32).add_((1 << 23) - (unit & 0x7FFFFF)).bitwise_right_shift_(23)
            for value, unit in zip(values, self.units, strict=True)
        )
        return torch.bincount(other.add_(one, alpha=BINS), minlength=BINS * BINS).view(BINS, BINS)

    def _refuse(self, name: str, chunk: list[Tensor]) -> None:
        for whose, one in zip(self.names, chunk, strict=True):
            if bad := int((~one.isfinite()).sum()):
                raise ValueError(f"{name!r} of {whose!r} holds {bad} or more NaN or infinite numbers")
        raise ValueError(f"{name!r} holds numbers whose squares are no float32: they can't be weights")


def _chunks(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The same run of numbers of each tensor, at most ``CHUNK`` of them, one after the other."""
    first = tensors[0]
    if all(one.is_contiguous() for one in tensors):
        flat = [one.reshape(-1) for one in tensors]
        for at in range(0, first.numel(), CHUNK):
            yield [one[at : at + CHUNK] for one in flat]
    elif first.numel() <= CHUNK:
        yield [one.reshape(-1) for one in tensors]
    else:  # a transposed view: making it contiguous would copy all of it
        rows = CHUNK // first[0].numel()
        for low, high in pairwise([*range(0, len(first), max(rows, 1)), len(first)]):
            yield from _chunks([one[low:high] if rows else one[low] for one in tensors])


@dataclass(frozen=True)
class Histogram:
    """How many numbers lie in each octave: ``counts[i]`` of them in [unit · 2^(start + i), unit · 2^(start + i + 1)).

    The unit is the near-zero threshold, so that no bin straddles it. Zeros are in no bin.
    """

    unit: float
    start: int
    counts: tuple[int, ...]

    @property
    def edges(self) -> tuple[float, ...]:
        """The edges of the bins, one more than there are bins; the lowest possible bin reaches down to 0."""
        return tuple(math.ldexp(self.unit, self.start + at) for at in range(len(self.counts) + 1))


@dataclass(frozen=True)
class Change:
    """How a step changed a group of parameters, Δ = θ − θ_reference: how many moved, and how far.

    ``layer`` and ``kind`` name the group (None: all of them). Counts of parameters: ``unchanged`` (Δ = 0, 0/0
    included), ``from_zero`` (θ_reference = 0 and Δ ≠ 0, so there is no relative change, and no relative bin),
    ``near_absolute`` (abs(Δ) below the threshold) and ``near_relative`` (abs(Δ) / abs(θ_reference) below it); both
    count the unchanged. ``norm`` = ‖Δ‖₂ and ``reference_norm`` = ‖θ_reference‖₂, in the unit of the weights.
    """

    layer: str | None
    kind: str | None
    parameters: int
    unchanged: int
    from_zero: int
    near_absolute: int
    near_relative: int
    norm: float
    reference_norm: float
    absolute: Histogram = field(repr=False)
    relative: Histogram = field(repr=False)

    @property
    def relative_norm(self) -> float | None:
        """‖Δ‖₂ / ‖θ_reference‖₂; None where the reference is all zeros."""
        return self.norm / self.reference_norm if self.reference_norm else None

    def share(self, count: int) -> float:
        """A count as a fraction of the group's parameters, in [0, 1]."""
        return count / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class Step:
    """One comparison, ``stage`` against ``reference``: everything, each kind, each layer, each kind of each layer."""

    stage: str
    reference: str
    whole: Change
    kinds: tuple[Change, ...] = field(repr=False)
    layers: tuple[Change, ...] = field(repr=False)
    groups: tuple[Change, ...] = field(repr=False)


@dataclass(frozen=True)
class Changes:
    """How much each stage of training changed the model's parameters.

    ``cumulative`` compares every checkpoint with the first, ``incremental`` with the one before. A parameter is
    near-zero where its change stays below the threshold ``absolute`` or ``relative``. ``left_out`` names what could
    not be compared, with the reason.

    Source: the paper, Section 4 and Appendix B; thresholds from a second-hand source, bins and groups are ours.
    """

    absolute: float
    relative: float
    cumulative: tuple[Step, ...]
    incremental: tuple[Step, ...]
    left_out: tuple[str, ...] = ()

    def tables(self) -> tuple[Table, ...]:
        """The whole model, each kind of module, and each layer, stage by stage."""
        both = [*self.cumulative, *self.incremental[1:]]  # the first stage is the same in both
        head = ("stage", "against", *self._columns)
        whole = Table(
            f"change of {both[0].whole.parameters:,} parameters",
            head,
            tuple((step.stage, step.reference, *_cells(step.whole)) for step in both),
        )
        kinds = Table(
            "change by kind of module, against the checkpoint before",
            ("stage", "kind", "parameters", *self._columns),
            tuple(
                (step.stage, one.kind, one.parameters, *_cells(one)) for step in self.incremental for one in step.kinds
            ),
        )
        layers = Table(
            "‖Δ‖/‖θ‖ by layer, against the checkpoint before (%)",
            ("layer", *(step.stage for step in self.incremental)),
            tuple(
                (row[0].layer or "outside the layers", *(_percent(one.relative_norm) for one in row))
                for row in zip(*(step.layers for step in self.incremental), strict=True)
            ),
        )
        return whole, kinds, layers

    @property
    def _columns(self) -> tuple[str, ...]:
        near = (f"abs(Δ) < {self.absolute:g} (%)", f"abs(Δ/θ) < {self.relative:g} (%)")
        return (*near, "Δ = 0 (%)", "‖Δ‖", "‖Δ‖/‖θ‖ (%)")

    def __str__(self) -> str:
        told = [f"left out: {one}" for one in self.left_out]
        return "\n\n".join([*map(str, self.tables()), *(["\n".join(told)] if told else [])])

    def save(self, path: str | Path) -> None:
        """Write everything as JSON."""
        write_json(self, path)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _cells(one: Change) -> tuple[Cell, ...]:
    counts = (one.near_absolute, one.near_relative, one.unchanged)
    return (*(100 * one.share(count) for count in counts), one.norm, _percent(one.relative_norm))


def changes(run: Trajectory, *, absolute: float = 1e-7, relative: float = 1e-3) -> Changes:
    """How much training changed every parameter of the model: Δ = θ − θ_reference, and abs(Δ) / abs(θ_reference).

    Cumulative: each checkpoint against the first. Incremental: against the one before. Δ is computed in float32
    whatever the dtype; norms are summed in float64. In bfloat16 neighbouring numbers lie 0.4 to 0.8 % apart, so a
    relative change below 0.001 is no change at all.

    Args:
        run: a trajectory of two or more checkpoints: folders, live modules, mappings. Every tensor of each is read
            once, a chunk of each at a time. Tensors that share memory (tied embeddings) count once.
        absolute: a change is near zero where abs(Δ) is below it; in the unit of the weights.
        relative: a change is relatively near zero where abs(Δ) / abs(θ_reference) is below it; a change from exactly 0
            never is.

    Returns:
        A ``Changes``; ``surgery.plots.change_histogram`` draws it.

    Raises:
        ValueError: fewer than two checkpoints; checkpoints of different models, or with different tensor names (a
            mixture of experts in memory and on disk); NaN or infinite weights; a threshold that is not positive.

    Source: the paper, Section 4, Figure 2 and Appendix B.
    """
    units = _unit("absolute", absolute), _unit("relative", relative)
    found = run.checkpoints
    if len(found) < 2:
        raise ValueError(f"changes compares two or more checkpoints, got {list(found) or 'none'}")
    for source in found.values():
        check_one_process(source, "changes")
    names, opened = list(found), [tensors_of(run.held(source)) for source in found.values()]
    for name, tensors in zip(names, opened, strict=True):
        check_source(tensors, name)
    dims, left_out = alike(dict(zip(names, opened, strict=True)))
    last = range(1, len(names))
    pairs = list(dict.fromkeys([*((0, at) for at in last), *((at - 1, at) for at in last)]))
    meter = Meter(units, pairs, names)
    for tensor, place in sorted(places_of(dims).items(), key=lambda item: item[1].order):
        meter.read(tensor, (place.layer, place.kind), opened)
    steps = {pair: _step(names, pair, meter.sums[pair], units) for pair in pairs}
    return Changes(
        absolute,
        relative,
        tuple(steps[0, at] for at in last),
        tuple(steps[at - 1, at] for at in last),
        left_out,
    )


def _unit(name: str, threshold: float) -> int:
    """The bits of a threshold as float32."""
    if not (isinstance(threshold, int | float) and 1e-30 < threshold < 1e30):
        raise ValueError(f"{name}={threshold!r}: expected a positive threshold like 1e-7")
    return int(struct.unpack("<i", struct.pack("<f", threshold))[0])


def _step(names: Sequence[str], pair: tuple[int, int], groups: Mapping[Group, Sums], units: tuple[int, int]) -> Step:
    """One comparison, from the sums of each kind of each layer."""

    def total(some: Iterable[Group]) -> Sums:
        return sum((groups[place] for place in some), Sums())

    kinds = [kind for kind in KINDS if any(kind == one for _, one in groups)]
    layers = dict.fromkeys(layer for layer, _ in groups)
    return Step(
        names[pair[1]],
        names[pair[0]],
        _change(None, None, total(groups), units),
        tuple(_change(None, kind, total(p for p in groups if p[1] == kind), units) for kind in kinds),
        tuple(_change(layer, None, total(p for p in groups if p[0] == layer), units) for layer in layers),
        tuple(_change(*place, sums, units) for place, sums in groups.items()),
    )


def _change(layer: str | None, kind: str | None, sums: Sums, units: tuple[int, int]) -> Change:
    near, far = (int(sums.bins[at][: (unit >> 23) + 1].sum()) + sums.unchanged for at, unit in enumerate(units))
    return Change(
        layer,
        kind,
        sums.parameters,
        sums.unchanged,
        sums.from_zero,
        near,
        far,
        math.sqrt(sums.square),
        math.sqrt(sums.reference_square),
        _histogram(sums.bins[0], units[0]),
        _histogram(sums.bins[1], units[1]),
    )


def _histogram(bins: Tensor, unit: int) -> Histogram:
    filled = bins.nonzero().flatten().tolist()
    low, high = (filled[0], filled[-1] + 1) if filled else (0, 0)
    value = float(struct.unpack("<f", struct.pack("<i", unit))[0])
    return Histogram(value, low - (unit >> 23) - 1, tuple(bins[low:high].tolist()))
