"""Repair: measure the damage, choose what to revert, try it, and stop where another domain would be hurt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

from torch import nn

from surgery.checkpoints.trajectory import Trajectory
from surgery.checkpoints.wrapped import is_unmerged
from surgery.layout.sharding import ranks_of
from surgery.live.answers import respond
from surgery.live.prompts import Batch, batches_of, halved
from surgery.masks.mask import Mask, inside
from surgery.measure.evaluators import likelihood
from surgery.measure.files import metric_of
from surgery.measure.rows import Evaluate, Log, Row, Sweep, compared, fell, judged, points, tell
from surgery.measure.statistics import Paired, needed, underpowered
from surgery.measure.sweep import Bench, at_budget
from surgery.reverting.folder import save
from surgery.reverting.rollback import rolled_back
from surgery.scores.damage import earlier_answers
from surgery.scores.memory import remembered
from surgery.selectors.selectors import DamageSelector, Selector
from surgery.selectors.settings import units_asked

# 2, 3, 5, 7 and 1, 1.5 of each decade, from 0.02 % to everything
BUDGETS = (*[round(x * 10**e, 6) for e in (-4, -3, -2, -1) for x in (1, 1.5, 2, 3, 5, 7)][2:], 1.0)
Outcome = Literal["intact", "repaired", "not repairable"]
NATS = " nats per response token"
_ROUNDING = 1e-9  # 0.79 − 0.80 is a little less than −0.01, and keeps a limit of one point all the same


@dataclass(frozen=True)
class Repair:
    """What ``repair`` found; prints as a verdict in words, the rows that were measured, and warnings.

    ``outcome``: "intact" (no significant loss, nothing was chosen), "repaired", or "not repairable" within the limits.
    ``metric``: the damaged metric; ``lost``: its loss, earlier against later (None without one score per item).
    ``mask``: what to revert, None unless repaired; ``chosen``: its row. ``best``: the row of the highest recovery
    within the limits. ``goal``: the recovery that was needed, the wanted share of what can be won back. ``limits``: the
    lowest change allowed, by kept metric. ``ceiling``: the row with everything reverted that the selector may choose.
    ``sweep``: every row measured, by budget. ``notes``: warnings.

    Source: ours.
    """

    run: Trajectory = field(repr=False)
    outcome: Outcome
    metric: str
    lost: Paired | None
    wanted: float
    goal: float
    limits: dict[str, float]
    chosen: Row | None
    best: Row | None
    ceiling: Row | None
    mask: Mask | None = field(repr=False)
    sweep: Sweep = field(repr=False)
    notes: tuple[str, ...] = ()
    unit: str = ""  # of the scores, in words

    def save(self, folder: str | Path, *, overwrite: bool = False, reset_optimizer: bool = False) -> Path:
        """Write the later checkpoint with the chosen weights reverted (see ``surgery.save``).

        Raises:
            ValueError: there is nothing to write, because the outcome is not "repaired"; and as ``save``.
        """
        if self.mask is None:
            raise ValueError(f"there is nothing to write: {self.verdict}")
        later, earlier = self.run.tensors("later"), self.run.tensors("earlier")
        view = rolled_back(later, to=earlier, mask=self.mask, layout=self.run.layout)
        return ranks_of(self.run.load()).from_first(
            lambda: save(view, folder, overwrite=overwrite, reset_optimizer=reset_optimizer)
        )

    @property
    def verdict(self) -> str:
        """The result in a sentence or two."""
        lost = told_loss(self.metric, self.unit, self.lost, *self.sweep.rows[:2])
        if self.outcome == "intact":
            earlier, later = (row.metrics[self.metric] for row in self.sweep.rows[:2])
            said = "Nothing was lost" if later > earlier else "No significant loss"
            return f"{said}: {lost}. Nothing was changed."
        if self.chosen is not None and self.mask is not None:
            taken = f"{self.chosen.neurons} of {self.mask.total} {self.mask.noun} ({self.mask.fraction:.2%})"
            return f"Repaired: {lost}. Reverting {taken} brings back {_result(self.chosen)}."
        within = "".join(
            f" while {name} loses {f'at most {-least:g}' if least else 'nothing'}"
            for name, least in self.limits.items()
        )
        asked = f"{100 * self.wanted:g} % of what can be won back ({100 * self.goal:.0f} % of the loss){within}"
        if self.goal <= 0:
            asked = "anything"
        found = "no measured budget keeps the limits"
        if self.best is not None:
            found = f"the best within the limits, budget {self.best.budget:g}, brings back {_result(self.best)}"
        return f"Not repaired: {lost}. No budget brings back {asked}; {found}."

    def __str__(self) -> str:
        return "\n".join([self.verdict, "", str(self.sweep), *(["", *self.notes] if self.notes else [])])


def repair(
    run: Trajectory,
    data: Iterable[Batch] | None,
    *,
    keep: Mapping[str, Iterable[Batch]] | Iterable[str] | None = None,
    recovery: float = 0.8,
    limit: float | Mapping[str, float] = 0.01,
    selector: Selector | None = None,
    budgets: Sequence[float] = BUDGETS,
    evaluate: Evaluate | str | None = None,
    metric: str | None = None,
    path: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
    log: Log | None = None,
) -> Repair:
    """Find the smallest rollback that wins back the wanted share of a lost skill and does not hurt the kept domains.

    Half of the prompts (every other one) choose what to revert. The other half measure it, by the likelihood of their
    responses; with ``evaluate`` all prompts choose, and ``evaluate`` measures. Where the loss is not significant (its
    95 % interval reaches zero, or p ≥ 0.05), the outcome is "intact" and nothing is chosen.

    *What can be won back* is the highest recovery measured, at most the whole loss. The first one measured is the
    ceiling, with everything reverted that the selector may choose. Bisection finds the smallest budget that reaches the
    wanted share of it; if that budget breaks a limit, the largest smaller budget that keeps all limits. Bisection is
    right where recovery grows with the budget; a note says if it did not. If the ceiling wins nothing back, every
    budget is measured. In every case a mask is returned only if it was measured to reach the goal within the limits.

    Args:
        run: a trajectory with ``earlier`` and ``later``; the later model is loaded once (``run.load``), and is
            bit-identical at the end, also after an error.
        data: prompts of the damaged domain. Without responses the earlier model answers them first, and any change of
            its answers counts as a loss. None only with ``evaluate`` and a selector that needs none.
        keep: prompts of domains that must not be hurt, by name (without responses the later model answers them); with
            ``evaluate`` the names of its metrics are enough.
        recovery: the wanted share of what can be won back, in (0, 1].
        limit: how much a kept metric may lose against the later model, ≥ 0, in its own unit (0.01 is one point of
            accuracy, or 1 % of the probability of each response token); or one for each by name.
        selector: a dataclass with a field ``budget``, which is replaced (default: single weights by D; where the later
            checkpoint is an adapter, which has no room for single weights, neurons and value channels).
        budgets: fractions in (0, 1] to choose among (default: 23 from 0.02 % to everything).
        evaluate: as in ``sweep``; with one score per item the result comes with intervals.
        metric: the damaged metric (default: "the damaged domain"; with ``evaluate`` the one that fell most).
        path: a JSON-lines file for the rows; an interrupted run resumes from it.
        progress: called with a line of text before each choice and each evaluation.
        log: as in ``sweep``.

    Returns:
        A ``Repair``: print it, and ``save`` it if its outcome is "repaired".

    Raises:
        ValueError: fewer than two prompts; a kept metric that does not exist; a setting out of range; and as ``sweep``.

    Source: ours.

    >>> # done = repair(run, math, keep={"qa": qa}); print(done); done.save("runs/qa-healed")
    """
    grid = sorted(set(budgets))
    if not grid or not 0 < grid[0] <= grid[-1] <= 1:
        raise ValueError(f"budgets={list(budgets)!r}: expected fractions in (0, 1], like [0.01, 0.02, 0.04]")
    if not 0 < recovery <= 1:
        raise ValueError(f"recovery={recovery!r}: expected a share in (0, 1] (0.8 is 80 % of what can be won back)")
    selector = selector or default_selector(run)
    at_budget(selector, grid[0])  # said now, and not after evaluations
    run.check_whole()
    batches, notes = None if data is None else list(batches_of(data)), []
    unit = "" if evaluate is not None else NATS
    if evaluate is None:
        if batches is None:
            raise ValueError("the loss is measured on prompts of the damaged domain: pass data, or evaluate=")
        metric = metric or "the damaged domain"
        kept = _kept(run, keep, metric)
        if any("labels" not in batch for batch in batches):
            notes.append(
                "the prompts have no responses, so the earlier model's own answers are measured: any change of them "
                "counts as a loss"
            )
        batches = earlier_answers(run, batches)
        choosing, measuring = halved(batches, 0), halved(batches, 1)
        if not measuring:
            raise ValueError("repair needs two prompts or more: one half chooses, the other half measures")
        evaluate = likelihood({metric: measuring, **kept})
        batches = choosing
    search = _Search(Bench(run, batches, evaluate, path, progress), selector, grid, metric, log)
    limits = _limits(keep, limit, search)
    with remembered(own=True):
        return replace(search.found(recovery, limits, notes), unit=unit)


def default_selector(run: Trajectory) -> Selector:
    """Single weights by D; units where the later model is an adapter, which has no room for single weights."""
    later = None if run.later is None else run.tensors("later")
    adapted = getattr(later, "adapter", None) is not None
    adapted |= isinstance(run.later, nn.Module) and is_unmerged(run.later)
    return DamageSelector(0.01, units=None if adapted else "weight")


def _kept(
    run: Trajectory, keep: Mapping[str, Iterable[Batch]] | Iterable[str] | None, metric: str
) -> dict[str, list[Batch]]:
    """The prompts of each domain to keep, with responses."""
    if keep is None:
        return {}
    if not isinstance(keep, Mapping):
        raise ValueError('keep= names metrics of evaluate, and there is none: pass prompts, keep={"qa": batches}')
    if metric in keep:
        raise ValueError(f"keep: {metric!r} is the damaged domain's own name: pass metric= with another")
    return {name: respond(run.load(), batches_of(batches)) for name, batches in keep.items()}


def _limits(keep: Iterable[str] | None, limit: float | Mapping[str, float], search: _Search) -> dict[str, float]:
    """The least change allowed, by kept metric."""
    if isinstance(keep, str):
        raise ValueError(f"keep={keep!r}: expected a list of metrics, [{keep!r}]")
    names = list(keep or ())
    others = sorted(set(search.later.metrics) - {search.metric})
    for name in (*names, *(limit if isinstance(limit, Mapping) else ())):
        if name not in others:
            raise ValueError(f"keep: {name!r} is none of the other metrics, which are {others}")
    found = {name: limit.get(name, 0.01) if isinstance(limit, Mapping) else limit for name in names}
    found |= dict(limit) if isinstance(limit, Mapping) else {}
    named = found or ({} if isinstance(limit, Mapping) else {"any kept metric": limit})  # checked though none is kept
    for name, most in named.items():
        if isinstance(most, bool) or not isinstance(most, int | float) or not 0 <= most < math.inf:
            raise ValueError(f"limit={most!r} of {name!r}: expected how much it may lose, a number ≥ 0")
    return {name: -float(most) for name, most in found.items()}


class _Search:
    """Rows by budget, each measured when it is first asked for."""

    def __init__(
        self, bench: Bench, selector: Selector, grid: list[float], metric: str | None, log: Log | None
    ) -> None:
        self.bench, self.selector, self.grid = bench, selector, grid
        self.later, self.earlier = bench.later(), bench.earlier()
        self.metric = metric_of(self.earlier, self.later, metric)
        self.tell = partial(tell, bench.only_first(log), earlier=self.earlier, later=self.later, metric=self.metric)
        self.rows: dict[float, Row] = {}
        self.masks: dict[float, Mask] = {}

    def found(self, wanted: float, limits: dict[str, float], notes: list[str]) -> Repair:
        earlier, later = judged([self.earlier, self.later], self.earlier, self.later, self.metric)
        self.tell(self.earlier)
        self.tell(self.later)
        lost = earlier.paired.get(self.metric)
        if not fell(earlier, later, self.metric):
            if lost and lost.gain > 0 and (more := needed(lost)):
                notes.append(f"underpowered: a loss of this size needs about {more} prompts or items to be significant")
            table = Sweep(self.metric, (earlier, later))
            return Repair(
                self.bench.run, "intact", self.metric, lost, wanted, 0.0, limits, None, None, None, None, table,
                tuple(notes),
            )  # fmt: skip
        everything = self.bench.ceiling(units_asked(self.bench.run, getattr(self.selector, "units", "mlp")))
        ceiling = compared(self.tell(everything), self.earlier, self.later, self.metric)
        if self._goal(wanted, ceiling) <= 0:  # everything at once does harm, so bisection would look among the largest
            for at in range(len(self.grid)):
                self._row(at)
        goal, before = self._goal(wanted, ceiling), 0.0
        while goal > before:  # a measured row may show that more can be won back
            self._bisect(goal, limits)
            goal, before = self._goal(wanted, ceiling), goal
        table = Sweep(
            self.metric, tuple(judged([earlier, later, ceiling, *self._measured()], earlier, later, self.metric))
        )
        rows = table.rows[3:]
        within = [row for row in rows if _keeps(row, limits)]
        chosen = next((row for row in within if goal > 0 and _recovers(row, goal)), None)
        best = chosen or max(within, key=lambda row: row.recovery or 0.0, default=None)
        notes += self._order(rows, limits, chosen)
        if lost is None:
            notes.append("evaluate returned no score per item, so there are no intervals and no test")
        notes += _doubts(best, lost, goal, limits) if best is not None else []
        mask = None if chosen is None else self.masks[chosen.budget]
        return Repair(
            self.bench.run, "repaired" if chosen else "not repairable", self.metric, lost, wanted, goal, limits,
            chosen, best, table.rows[2], mask, table, tuple(notes),
        )  # fmt: skip

    def _goal(self, wanted: float, ceiling: Row) -> float:
        return wanted * min(1.0, max(row.recovery or 0.0 for row in (ceiling, *self.rows.values())))

    def _bisect(self, goal: float, limits: dict[str, float]) -> None:
        """Measure what tells the smallest budget that reaches the goal, and the largest below that keeps the limits."""
        count = len(self.grid)
        reached = _first(count, lambda at: _recovers(self._row(at), goal))
        if reached == count or not _keeps(self._row(reached), limits):
            _first(min(reached, count), lambda at: not _keeps(self._row(at), limits))

    def _row(self, at: int) -> Row:
        budget = self.grid[at]
        if budget not in self.rows:
            mask = self.bench.mask(self.selector, budget)
            same = next((one for one, known in self.masks.items() if known.equal(mask)), None)
            self.masks[budget] = mask
            if same is None:
                one = self.tell(self.bench.row(self.selector, budget, mask))
                row = compared(one, self.earlier, self.later, self.metric)
            else:  # a selector that stops by itself takes as many at a larger budget
                row = replace(self.rows[same], budget=budget)
            self.rows[budget] = row
        return self.rows[budget]

    def _measured(self) -> list[Row]:
        return [self.rows[budget] for budget in sorted(self.rows)]

    def _order(self, rows: Sequence[Row], limits: dict[str, float], chosen: Row | None) -> list[str]:
        """Whether what was measured is ordered as bisection needs it."""
        masks = (self.masks[row.budget] for row in rows)
        nested = all(inside(smaller, larger) for smaller, larger in pairwise(masks))
        recoveries, kept = [row.recovery or 0.0 for row in rows], [_keeps(row, limits) for row in rows]
        if nested and recoveries == sorted(recoveries) and kept == sorted(kept, reverse=True):
            return []
        other = "a smaller budget may be enough" if chosen else "a budget that was not measured may be enough"
        return [
            f"{len(rows)} of {len(self.grid)} budgets were measured, and they are not ordered (a larger one does not "
            f"always recover more, or contain the smaller one): {other}"
        ]


def _first(count: int, holds: Callable[[int], bool]) -> int:
    """The first index at which a monotone property holds, ``count`` if at none: at most log1.5(count) + 1 questions.

    It asks a third of the way, since what a small budget takes is found sooner (single weights: in fewer rounds).
    """
    low, high = 0, count
    while low < high:
        middle = low + (high - low) // 3
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _recovers(row: Row, wanted: float) -> bool:
    return row.recovery is not None and row.recovery >= wanted - _ROUNDING


def _keeps(row: Row, limits: Mapping[str, float]) -> bool:
    return all(row.delta[name] >= least - _ROUNDING for name, least in limits.items())


def _doubts(row: Row, lost: Paired | None, goal: float, limits: Mapping[str, float]) -> list[str]:
    """Warnings where the items do not show for certain that the row reaches the goal; none without items."""
    found = []
    if lost and (reason := underpowered(lost, row.interval, max(goal, 0.01))):
        found.append(f"underpowered: {reason}")
    if row.interval is not None and row.interval[0] < goal and _recovers(row, goal):
        found.append(
            f"not certain: the interval of recovery reaches down to {100 * row.interval[0]:.0f} %, below the goal of "
            f"{100 * goal:.0f} %"
        )
    for name, least in limits.items():
        if name in row.paired and row.paired[name].interval[0] < least and _keeps(row, {name: least}):
            low = row.paired[name].interval[0]
            found.append(f"not certain: the change of {name} may be {low:+.4f}, beyond its limit {least:+g}")
    return found


def told_loss(metric: str, unit: str, lost: Paired | None, first: Row, second: Row) -> str:
    """How a metric changed from the earlier row to the later one, in words, with its interval and p."""
    earlier, later = first.metrics[metric], second.metrics[metric]
    rose = earlier < later
    said = f"{metric} {'rose by' if rose else 'lost'} {abs(earlier - later):.4f}{unit}"
    if lost is not None:
        low, high = (-lost.interval[1], -lost.interval[0]) if rose else lost.interval
        said += f" [{low:.4f}, {high:.4f}] (p = {lost.p:.2g}, {lost.items} items)"
    return f"{said}, from {earlier:.4f} to {later:.4f}"


def _result(row: Row) -> str:
    span = "" if row.interval is None else f" {points(row.interval)}"
    changes = "".join(f"; {name} changes by {delta:+.4f}" for name, delta in row.delta.items())
    return f"{100 * (row.recovery or 0.0):.1f} %{span} of the loss{changes}"
