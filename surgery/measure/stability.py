"""Resampling: how much a mask depends on which calibration prompts chose it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch

from surgery.checkpoints.trajectory import Trajectory
from surgery.live.prompts import Batch, batches_of
from surgery.masks.mask import Mask
from surgery.masks.neurons import Neurons
from surgery.measure.files import metric_of
from surgery.measure.rows import Evaluate, judged
from surgery.measure.sweep import Bench, name_of
from surgery.scores.memory import remembered
from surgery.selectors.selectors import Selector
from surgery.tables import aligned


@dataclass(frozen=True)
class Agreement:
    """The masks of several draws of ``size`` prompts.

    ``jaccard``: of every pair of draws, in [0, 1]; ``to_all``: of every draw with the mask that all prompts chose;
    ``recovery``: of every draw, empty without ``evaluate`` (and where nothing was lost).
    """

    size: int
    jaccard: tuple[float, ...]
    to_all: tuple[float, ...]
    recovery: tuple[float, ...] = ()


@dataclass(frozen=True)
class Stability:
    """What ``stability`` measured; prints as a table.

    ``chance``: the Jaccard of two unrelated masks of that many neurons; ``prompts``: how many there were to draw from;
    ``recovery``: of the mask that all prompts chose; ``agreements``: one per size.

    Source: ours.
    """

    selector: str
    prompts: int
    neurons: int
    chance: float
    agreements: tuple[Agreement, ...]
    metric: str | None = None
    recovery: float | None = None
    mask: Mask = field(repr=False, compare=False, default_factory=lambda: Neurons({}))

    def __str__(self) -> str:
        head = ["prompts", "draws", "jaccard (min … max)", "with all", "chance"]
        lines = [head + ([f"recovery of {self.metric} (min … max)"] if self.metric else [])]
        for one in self.agreements:
            cells = [str(one.size), str(len(one.to_all)), _span(one.jaccard, 1, ""), f"{np.mean(one.to_all):.2f}"]
            cells += [f"{self.chance:.2f}", *([_span(one.recovery, 100, " %")] if self.metric else [])]
            lines.append(cells)
        if self.metric:
            every = "" if self.recovery is None else f"{100 * self.recovery:.1f} %"
            lines.append([str(self.prompts), "all", "", "1.00", "", every])
        table = aligned(lines, [False] * len(lines[0]))
        what = f"{self.neurons} {self.mask.noun}"
        return "\n".join([f"{self.selector}: {what}, {self.prompts} prompts to draw from", *table])


def stability(
    run: Trajectory,
    data: Iterable[Batch],
    selector: Selector,
    sizes: Sequence[int] = (4, 16, 64),
    draws: int = 5,
    seed: int = 0,
    evaluate: Evaluate | str | None = None,
    metric: str | None = None,
) -> Stability:
    """How much the mask depends on the calibration prompts: draw some of them, select, compare the masks.

    Jaccard = |a ∩ b| / |a ∪ b| of the masks of two draws. Each draw takes its prompts (rows of the batches) without
    replacement. Two draws of s out of P prompts share a fraction s/P of them, so only sizes well below P show what
    other prompts would do. Chance: the Jaccard of unrelated masks of k of N neurons, k/(2N − k).

    Args:
        run: the trajectory; its later model is loaded once (``run.load``).
        data: calibration prompts; batches may differ in length.
        selector: anything with ``select``.
        sizes: how many prompts a draw takes, each below their number.
        draws: how many draws per size, at least 2.
        seed: of the draws.
        evaluate: as in ``sweep``; if given, every draw's mask is also rolled back and its recovery measured.
        metric: whose recovery is measured (default: the one that fell most from earlier to later).

    Returns:
        A ``Stability``; ``surgery.plots.prompt_stability`` draws it.

    Raises:
        ValueError: a size is not below the number of prompts, there is no size, or there are fewer than 2 draws.

    Source: ours.
    """
    batches, sizes = list(batches_of(data)), list(sizes)  # a generator too is gone through more than once
    prompts = sum(_rows(batch) for batch in batches)
    if bad := [size for size in sizes if not isinstance(size, int | np.integer) or not 0 < size < prompts]:
        raise ValueError(
            f"sizes: {bad[0]} of {prompts} prompts: expected sizes from 1 to {prompts - 1}, or more prompts"
        )
    if not sizes:
        raise ValueError("sizes is empty: expected how many prompts a draw takes, like (4, 16, 64)")
    sizes = [int(size) for size in sizes]
    if draws < 2:
        raise ValueError(f"draws={draws}: expected 2 or more, to have a pair to compare")
    generator = torch.Generator().manual_seed(seed)
    parts = {
        size: [_drawn(batches, torch.randperm(prompts, generator=generator)[:size]) for _ in range(draws)]
        for size in sizes
    }
    with remembered(own=True):
        whole = selector.select(run, batches)
        masks = {size: [selector.select(run, part) for part in parts[size]] for size in sizes}
    recoveries: dict[int, list[float]] = {}
    if evaluate is not None:
        bench = Bench(run, None, evaluate)
        recoveries, metric = _recoveries(bench, {0: [whole], **masks}, metric)
    agreements = [
        Agreement(
            size,
            tuple(jaccard(a, b) for a, b in combinations(found, 2)),
            tuple(jaccard(one, whole) for one in found),
            tuple(recoveries.get(size, ())),
        )
        for size, found in masks.items()
    ]
    taken = sum(whole.count().values())
    every = next(iter(recoveries.get(0, ())), None)
    chance = taken / (2 * whole.total - taken)
    return Stability(
        name_of(selector), prompts, taken, chance, tuple(agreements), metric if recoveries else None, every, whole
    )


def jaccard(a: Mask, b: Mask) -> float:
    """|a ∩ b| / |a ∪ b| of two masks of one model, in [0, 1]; 1 where both are empty.

    Raises:
        ValueError: they are scores, or of different models.

    >>> one, two = torch.tensor([True, True, False]), torch.tensor([True, False, False])
    >>> jaccard(Neurons({"a": one}), Neurons({"a": two}))
    0.5
    """
    union = sum((a | b).count().values())
    return sum((a & b).count().values()) / union if union else 1.0


def _rows(batch: Batch) -> int:
    return len(batch["input_ids"])


def _drawn(batches: list[Batch], chosen: torch.Tensor) -> list[Batch]:
    """The chosen rows, counted over all batches; each stays among those of its own batch, as long as they are."""
    found, start = [], 0
    for batch in batches:
        rows = chosen[(chosen >= start) & (chosen < start + _rows(batch))].sort().values - start
        if len(rows):
            found.append({name: _picked(value, rows) for name, value in batch.items()})
        start += _rows(batch)
    return found


def _picked(value: Any, rows: torch.Tensor) -> Any:
    """The rows of a tensor, or of a list of texts that a batch carries along."""
    return value[rows.to(value.device)] if isinstance(value, torch.Tensor) else [value[row] for row in rows.tolist()]


def _recoveries(bench: Bench, masks: dict[int, list[Mask]], metric: str | None) -> tuple[dict[int, list[float]], str]:
    later, earlier = bench.later(), bench.earlier()
    metric = metric_of(earlier, later, metric)
    found = {
        size: judged([bench.tried(f"{size} prompts", one) for one in some], earlier, later, metric)
        for size, some in masks.items()
    }
    return {size: [row.recovery for row in rows if row.recovery is not None] for size, rows in found.items()}, metric


def _span(values: Sequence[float], scale: float, unit: str) -> str:
    if not values:
        return ""
    digits = 2 if scale == 1 else 1
    mean, low, high = (f"{scale * float(x):.{digits}f}" for x in (np.mean(values), min(values), max(values)))
    return f"{mean}{unit} ({low} … {high})"
