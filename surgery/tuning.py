"""Tuning: the smallest budget that reaches a wanted recovery under limits elsewhere, found in a few evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from torch import nn

from surgery.bench import Bench, units_of
from surgery.judging import compared, judged
from surgery.masks import Mask
from surgery.prompts import Batch
from surgery.rows import Evaluate, Row, Sweep, points
from surgery.scores import remembered
from surgery.selection import Selector
from surgery.significance import underpowered
from surgery.sweeps import metric_of
from surgery.trajectory import Trajectory

# 1, 1.5, 2, 3, 5, 7 of each decade, from 0.1 % to everything
BUDGETS = (*(round(x * 10**e, 4) for e in (-3, -2, -1) for x in (1, 1.5, 2, 3, 5, 7)), 1.0)


@dataclass(frozen=True)
class Tuning:
    """What ``recommend`` found; prints as the rows that it measured and a verdict in words.

    ``chosen``: the row of the smallest measured budget that reaches the ``wanted`` recovery of ``metric`` within the
    ``limits``, None if none does; ``best``: that row, or else the one of the highest recovery within the limits, None
    if none keeps them; ``ceiling``: all units of the selector's kinds; ``sweep``: every row measured, by budget;
    ``evaluations``: the models evaluated now; ``nested``: whether each measured mask contains the smaller ones;
    ``monotone``: whether recovery never fell and no limit was met again as the measured budgets grew; ``notes``: what
    to beware of.

    Source: ours.
    """

    metric: str
    wanted: float
    limits: dict[str, float]
    chosen: Row | None
    best: Row | None
    ceiling: Row
    sweep: Sweep
    evaluations: int
    nested: bool
    monotone: bool
    notes: tuple[str, ...]

    @property
    def budget(self) -> float | None:
        """The budget of ``chosen``."""
        return None if self.chosen is None else self.chosen.budget

    def __str__(self) -> str:
        return "\n".join([str(self.sweep), "", self._verdict(), *self.notes])

    def _verdict(self) -> str:
        asked = f"{100 * self.wanted:g} % recovery of {self.metric}" + _within(self.limits)
        whole = self.ceiling.selector.removeprefix("ceiling (").removesuffix(")")
        ceiling = f"ceiling: {_recovery(self.ceiling)} with {whole}"
        if any((row.recovery or 0.0) > (self.ceiling.recovery or 0.0) for row in self.sweep):
            ceiling += "; fewer can give more, as not everything that is reverted helps"
        if self.chosen is not None:
            least = "the smallest" if self.nested and self.monotone else "perhaps not the smallest"
            doubt, span = "", self.chosen.interval
            if span is not None and span[0] < self.wanted:
                doubt = f", but not for certain (its interval reaches down to {100 * span[0]:.0f} %)"
            found = f"budget {self.chosen.budget:g} gives {asked}, {least} that does{doubt}"
            return f"{found}: {_result(self.chosen)}. {ceiling}"
        if self.best is None:
            return f"no budget gives {asked}: none that was measured keeps the limits. {ceiling}"
        best = f"the best within the limits is budget {self.best.budget:g}: {_result(self.best)}"
        return f"no budget gives {asked}; {best if self.limits else best.replace(' within the limits', '')}. {ceiling}"


def recommend(
    model: nn.Module,
    run: Trajectory,
    data: Iterable[Batch] | None,
    *,
    selector: Selector,
    evaluate: Evaluate | str,
    recovery: float = 0.8,
    limits: Mapping[str, float] | None = None,
    budgets: Sequence[float] = BUDGETS,
    metric: str | None = None,
    path: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Tuning:
    """The smallest of ``budgets`` whose rollback reaches a wanted recovery and costs the other metrics little enough.

    Bisection for the smallest budget with recovery ≥ the wanted one; if a limit is broken there, bisection below it
    for the largest budget that keeps all limits. That is 3 references and at most 2·log2(budgets) + 2 rollbacks. It
    is right where recovery grows and the other metrics fall with the budget, as they tend to where masks are nested
    (``how="global"`` and ``RandomSelector``; single weights by D only without a stop); whether masks and measurements
    were so is checked and said. Whatever they are, a budget is only recommended where it was measured to keep what was
    asked.

    Args:
        model: the later model, live; bit-identical at the end, also after an error.
        run: its trajectory.
        data: calibration prompts (not those that ``evaluate`` uses), or None if the selector needs none.
        selector: a dataclass with a field ``budget`` (it is replaced).
        evaluate: as in ``sweep``; with one score per item the result comes with intervals.
        recovery: the wanted recovery, a fraction of what was lost, > 0.
        limits: metric → the least Δ against later that is allowed, like {"qa": -0.002}.
        budgets: fractions in (0, 1] to choose among.
        metric: whose recovery (default: the one that fell most from earlier to later).
        path: a JSON-lines file to resume from; it may be a sweep's.
        progress: called with a line of text before each evaluation.

    Returns:
        A ``Tuning``.

    Raises:
        ValueError: nothing was lost; a limit on no metric or on the damaged one; no budget, or one outside (0, 1];
            and as ``sweep``.

    Source: ours.
    """
    limits, grid = dict(limits or {}), sorted(set(budgets))
    if not grid or not 0 < grid[0] <= grid[-1] <= 1:
        raise ValueError(f"budgets={list(budgets)!r}: expected fractions in (0, 1], like [0.01, 0.02, 0.04]")
    if not 0 < recovery < math.inf:
        raise ValueError(f"recovery={recovery!r}: expected a fraction above 0 (0.8 is 80 % of what was lost)")
    bench = Bench(model, run, data, evaluate, path, progress)
    later, earlier = bench.later(), bench.earlier()
    metric = metric_of(earlier, later, metric)
    _check(limits, metric, earlier, later)
    rows: dict[float, Row] = {}

    def row(at: int) -> Row:
        budget = grid[at]
        if budget not in rows:
            rows[budget] = compared(bench.row(selector, budget), earlier, later, metric)
        return rows[budget]

    with remembered():
        ceiling = bench.ceiling(units_of(selector, bench.run))
        reached = _first(len(grid), lambda at: _recovers(row(at), recovery))
        if reached == len(grid) or not _keeps(row(reached), limits):
            _first(min(reached, len(grid)), lambda at: not _keeps(row(at), limits))
        found = [rows[budget] for budget in sorted(rows)]
        masks = (bench.mask(selector, one.budget) for one in found)
        nested = all(_inside(smaller, larger) for smaller, larger in pairwise(masks))
    table = Sweep(metric, tuple(judged([earlier, later, ceiling, *found], earlier, later, metric)))
    return _tuning(recovery, limits, table, len(grid), bench.evaluations, nested)


def _first(count: int, holds: Callable[[int], bool]) -> int:
    """The first index at which a monotone property holds, ``count`` if at none: at most log2(count) + 1 questions."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _check(limits: Mapping[str, float], metric: str, earlier: Row, later: Row) -> None:
    others = sorted(set(later.metrics) - {metric})
    for name in limits:
        if name not in others:
            raise ValueError(f"limits: {name!r} is none of the other metrics, which are {others}")
        if math.isnan(limits[name]):
            raise ValueError(f"limits: that of {name!r} is NaN: expected the least change allowed, like -0.002")
    if earlier.metrics[metric] <= later.metrics[metric]:
        raise ValueError(
            f"{metric!r} did not fall from earlier ({earlier.metrics[metric]:.4f}) to later "
            f"({later.metrics[metric]:.4f}): there is nothing to recover. Is another metric the damaged one?"
        )


def _recovers(row: Row, wanted: float) -> bool:
    return row.recovery is not None and row.recovery >= wanted


def _keeps(row: Row, limits: Mapping[str, float]) -> bool:
    return all(row.delta[name] >= least for name, least in limits.items())


def _inside(smaller: Mask, larger: Mask) -> bool:
    return (smaller & larger).equal(smaller)


def _tuning(
    wanted: float, limits: dict[str, float], table: Sweep, offered: int, evaluations: int, nested: bool
) -> Tuning:
    earlier, _, ceiling, *found = table
    within = [row for row in found if _keeps(row, limits)]
    chosen = next((row for row in within if _recovers(row, wanted)), None)
    best = chosen or max(within, key=lambda row: row.recovery or 0.0, default=None)
    recoveries = [row.recovery or 0.0 for row in found]
    kept = [_keeps(row, limits) for row in found]
    monotone = recoveries == sorted(recoveries) and kept == sorted(kept, reverse=True)
    notes = [
        f"{len(found)} of {offered} budgets were measured ({evaluations} evaluations now); "
        + _order(nested, monotone, chosen is not None)
    ]
    if best is not None:
        notes += _doubts(best, earlier, wanted, limits)
    return Tuning(
        table.metric, wanted, limits, chosen, best, ceiling, table, evaluations, nested, monotone, tuple(notes)
    )


def _order(nested: bool, monotone: bool, found: bool) -> str:
    if nested and monotone:
        return "recovery is taken to grow with the budget between them, as it does among them"
    why = [] if nested else ['the masks are not nested (with "global" they are, single weights by D without a stop)']
    why += [] if monotone else ["what was measured does not go one way with the budget"]
    other = "a smaller budget may do as well" if found else "a budget that was not measured may do"
    return f"{' and '.join(why)}: {other}, so measure those in question with a sweep"


def _doubts(row: Row, earlier: Row, wanted: float, limits: Mapping[str, float]) -> list[str]:
    """Where the items leave open whether the row keeps what was asked; nothing without items."""
    found = []
    lost = next((earlier.paired[name] for name in earlier.paired if name not in row.delta), None)
    if lost and (reason := underpowered(lost, row.interval, wanted)):
        found.append(f"underpowered: {reason}")
    for name, least in limits.items():
        if name in row.paired and row.paired[name].interval[0] < least:
            low = row.paired[name].interval[0]
            found.append(
                f"not certain: the interval of Δ {name} reaches down to {low:+.4f}, below its limit {least:+g}"
            )
    return found


def _within(limits: Mapping[str, float]) -> str:
    each = [f"Δ {name} ≥ {least:+g}" for name, least in limits.items()]
    return f" with {' and '.join(each)}" if each else ""


def _recovery(row: Row) -> str:
    return "nothing" if row.recovery is None else f"{100 * row.recovery:.1f} %"


def _result(row: Row) -> str:
    span = "" if row.interval is None else f" {points(row.interval)}"
    return f"{_recovery(row)}{span}" + "".join(f", Δ {name} {delta:+.4f}" for name, delta in row.delta.items())
