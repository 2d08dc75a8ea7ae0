"""Rows: what was measured of one model, judged against the references, and the table that they print as."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from surgery.measure.statistics import (
    ALPHA,
    DRAWS,
    Array,
    Interval,
    Paired,
    healing,
    paired,
    preservation,
    recovery_intervals,
    retention,
    underpowered,
)
from surgery.tables import aligned
from surgery.units import noun

Score = float | Sequence[float] | Sequence[bool] | Array | Tensor
Evaluate = Callable[[nn.Module], Mapping[str, Score]]
Log = Callable[[dict[str, str | float]], Any]
EARLIER, LATER, CEILING = "earlier", "later", "ceiling (all MLP neurons)"


def ceiling_of(units: tuple[str, ...]) -> str:
    """The name of the row in which every unit of those kinds is reverted."""
    return CEILING if units == ("mlp",) else f"ceiling (all {noun(units)})"


def is_ceiling(name: str) -> bool:
    """Whether a row's name is ``ceiling_of`` some units."""
    return name.startswith("ceiling (all ")


@dataclass(frozen=True)
class Row:
    """One evaluated model.

    Measured: ``budget`` is the requested fraction of neurons (or other units, or single weights), and ``neurons`` how
    many were reverted; ``metrics`` are the scores (means, where ``evaluate`` returned one number per item), ``items``
    those numbers; ``seconds`` is the wall-clock time of selection and evaluation together.

    Judged against the references, on the chosen metric: ``recovery`` = (score − later) / (earlier − later), None for
    the references and where nothing was lost; ``interval``, its 95 % paired bootstrap interval, None without items
    or where there is no finite one; ``underpowered``, why recovery is not reliable, None if it is; ``healing`` and
    ``preservation`` as in ``surgery.measure.statistics``. On the others: ``delta`` = score − later, ``retention``. On
    all: ``paired``, against later.

    Source: recovery and Δ, the paper's Table 6; the statistics are ours.
    """

    selector: str
    budget: float
    neurons: int
    metrics: dict[str, float]
    seconds: float
    recovery: float | None = None
    delta: dict[str, float] = field(default_factory=dict)
    items: dict[str, list[float]] = field(default_factory=dict, repr=False)
    interval: Interval | None = None
    underpowered: str | None = None
    healing: float | None = None
    preservation: float | None = None
    retention: dict[str, float] = field(default_factory=dict)
    paired: dict[str, Paired] = field(default_factory=dict, repr=False)

    def logged(self) -> dict[str, str | float]:
        """One flat dictionary for experiment trackers.

        ``score/math`` and, where there are items, ``change/math`` against later with ``change_low``, ``change_high``
        and ``p``; ``selector``, ``budget``, ``reverted``, ``seconds``, and the recovery where there is one.
        """
        found: dict[str, str | float] = {"selector": self.selector, "budget": self.budget, "reverted": self.neurons}
        found["seconds"] = self.seconds
        if self.recovery is not None:
            found["recovery"] = self.recovery
        if self.interval is not None:
            found["recovery_low"], found["recovery_high"] = self.interval
        found |= {f"score/{name}": score for name, score in self.metrics.items()}
        found |= {f"change/{name}": change for name, change in self.delta.items()}
        for name, one in self.paired.items() if self.selector != LATER else ():
            found |= {f"change/{name}": one.gain, f"p/{name}": one.p}
            found |= dict(zip((f"change_low/{name}", f"change_high/{name}"), one.interval, strict=True))
        return found


def scored(values: Mapping[str, Score]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The scores that ``evaluate`` returned, and the items of those with one number per item.

    Items are rounded to float32, so that a row read from a file is the row that was written; a score is their mean.

    Raises:
        ValueError: no names, something that is no number, items in more than one dimension, none at all, or NaN among
            them.
    """
    if not isinstance(values, Mapping) or not values:
        raise ValueError(f'evaluate returned {str(values)[:60]!r}: expected scores by name, like {{"math": 0.8}}')
    metrics, items = {}, {}
    for name, value in values.items():
        try:
            found = np.asarray(value.detach().cpu().double() if isinstance(value, Tensor) else value, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"evaluate's {name!r}: expected a number, or one per item ({error})") from error
        if found.ndim > 1 or not found.size:
            raise ValueError(f"evaluate's {name!r} has the shape {found.shape}: expected a number, or one per item")
        if found.ndim and not np.isfinite(found).all():
            raise ValueError(f"evaluate's {name!r} is NaN or infinite on {int((~np.isfinite(found)).sum())} items")
        if found.ndim:
            items[name] = [_short_float(x) for x in found]
        metrics[name] = float(np.mean(items.get(name, found)))
    return metrics, items


def measured(values: Mapping[str, Score]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """``scored``, and refused where a score as a whole is NaN or infinite: no model could be compared with it."""
    metrics, items = scored(values)
    if wrong := [name for name, score in metrics.items() if not np.isfinite(score)]:
        raise ValueError(f"evaluate's {wrong[0]!r} is {metrics[wrong[0]]}: expected a finite number")
    return metrics, items


def _short_float(x: float) -> float:
    return float(str(np.float32(x)))  # 0.1 stays 0.1, and not 0.10000000149


@dataclass(frozen=True)
class Sweep:
    """The rows of a sweep; prints as a table."""

    metric: str
    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> list[Row]:
        """The rows of one selector."""
        return [row for row in self.rows if row.selector == name]

    def __str__(self) -> str:
        others = [name for name in self.rows[0].metrics if name != self.metric]
        columns: list[tuple[str, Callable[[Row], str]]] = [
            ("selector", lambda row: row.selector),
            ("budget", lambda row: "" if row.selector in (EARLIER, LATER) else f"{100 * row.budget:g} %"),
            ("reverted", lambda row: str(row.neurons)),
            (self.metric, lambda row: f"{row.metrics[self.metric]:.4f}"),
            ("recovery", lambda row: _recovery(row, self.metric)),
        ]
        if any(row.items for row in self.rows):
            columns += [column for column in self._both_ways(others) if any(map(column[1], self.rows))]
        columns += [(f"Δ {name}", lambda row, name=name: _delta(row, name)) for name in others]  # type: ignore[misc]
        if not any(row.items for row in self.rows):
            columns.append(("seconds", lambda row: f"{row.seconds:.1f}"))
        lines = [[head for head, _ in columns], *([cell(row) for _, cell in columns] for row in self.rows)]
        return "\n".join([*aligned(lines, [at == 0 for at in range(len(columns))]), *self._notes()])

    def _both_ways(self, others: list[str]) -> list[tuple[str, Callable[[Row], str]]]:
        """Healed and kept of the damaged metric, and kept of the metric on which the later stage won most."""
        columns: list[tuple[str, Callable[[Row], str]]] = [
            ("healed", lambda row: _percent(row.healing)),
            ("kept", lambda row: _percent(row.preservation)),
        ]
        won = {name: rows[-1].metrics[name] for name in others if (rows := self[LATER])}
        for row in self[EARLIER]:
            won = {name: score - row.metrics[name] for name, score in won.items() if score > row.metrics[name]}
        if won:
            most = max(won, key=lambda name: won[name])
            columns.append((f"kept {most}", lambda row: _percent(row.retention.get(most))))
        return columns

    def _notes(self) -> list[str]:
        """Why there is no recovery, and what the signs in the table mean where rows have items."""
        risen = [
            f"no recovery: {self.metric} did not fall from earlier ({before:.4f}) to later ({after:.4f}). Is another "
            f"metric the damaged one, or are the checkpoints in the wrong order?"
            for one, other in zip(self[EARLIER], self[LATER], strict=False)
            if (before := one.metrics[self.metric]) <= (after := other.metrics[self.metric])
            and one.metrics != other.metrics
        ]
        risen += [
            f"no recovery: earlier and later score exactly alike ({self.metric} {one.metrics[self.metric]:.4f}). "
            f"Are they the same checkpoint?"
            for one, other in zip(self[EARLIER], self[LATER], strict=False)
            if one.metrics == other.metrics
        ]
        counts = {one.items for row in self.rows for one in row.paired.values()}
        if not counts:
            return ["", *risen] if risen else []
        tests = sum(len(row.paired) for row in self.rows if row.selector not in (EARLIER, LATER))
        many = f"{min(counts)} items" if len(counts) == 1 else f"{min(counts)} to {max(counts)} items"
        names = " and ".join(sorted({_TESTS[one.test] for row in self.rows for one in row.paired.values()}))
        compared = f"* p < {ALPHA} against later, {names}, not corrected for the {tests} comparisons"
        notes = [f"[ ] 95 % paired bootstrap over {many} ({DRAWS} draws); {compared if tests else f'p: {names}'}"]
        notes += [
            f"{self.metric} lost {one.gain:.4f} [{one.interval[0]:.4f}, {one.interval[1]:.4f}] from earlier to later, "
            f"p = {one.p:.2g}"
            for row in self[EARLIER]
            if (one := row.paired.get(self.metric)) and not risen
        ] + risen
        notes += self._meanings()
        unsure: dict[str, int] = {}
        for row in self.rows:
            if row.underpowered:
                unsure[row.underpowered] = unsure.get(row.underpowered, 0) + 1
        if len(unsure) == 1:
            notes.append(f"? underpowered: {next(iter(unsure))}")
        elif unsure:
            widest = max(row.interval[1] - row.interval[0] for row in self.rows if row.underpowered and row.interval)
            notes.append(
                f"? underpowered, {sum(unsure.values())} rows: the interval of recovery is wider than the whole loss "
                f"(up to {100 * widest:.0f} points); score more items"
            )
        return ["", *notes]

    def _meanings(self) -> list[str]:
        """What those columns mean whose heads do not say it."""
        said = []
        if any(row.healing is not None for row in self.rows):
            said.append(f"healed: the part of each item's loss in {self.metric} that came back, over all items")
        if any(row.preservation is not None for row in self.rows):
            said.append(f"kept: the part of {self.metric} that later still had and that stayed")
        if any(row.retention for row in self.rows):
            said.append("kept with a name: the part of what later had won there that stayed")
        if any(row.selector.startswith("D") and "single weights" in row.selector for row in self.rows):
            said.append(
                "budget: the most that is reverted; single weights by D are fewer where more would not lower the loss"
            )
        if said and len(self.rows[0].metrics) > 1:
            said.append("Δ: the change against later; in round brackets the score itself")
        return ["; ".join(said)] if said else []


_TESTS = {"McNemar": "exact McNemar", "sign flip": "sign-flip permutation"}


def points(span: Interval) -> str:
    """An interval of fractions in whole percent, like "[12, 31]"."""
    return f"[{round(100 * span[0])}, {round(100 * span[1])}]"


def _percent(part: float | None) -> str:
    return "" if part is None else f"{100 * part:.0f} %"


def _star(row: Row, name: str) -> str:
    return "*" if name in row.paired and row.paired[name].p < ALPHA else " " if row.paired else ""


def _recovery(row: Row, metric: str) -> str:
    if row.recovery is None:
        return ""
    cell = f"{100 * row.recovery:.1f} %"
    if row.interval is not None:
        cell += f" {points(row.interval)}"
    elif row.underpowered:
        cell += " [no interval]"
    return cell + ("?" if row.underpowered else _star(row, metric))


def _delta(row: Row, name: str) -> str:
    if name not in row.delta:
        return f"({row.metrics[name]:.4f})"
    if name not in row.paired:
        return f"{row.delta[name]:+.4f}"
    low, high = row.paired[name].interval
    return f"{_brief(row.delta[name])} [{_brief(low)}, {_brief(high)}]{_star(row, name)}"


def _brief(x: float) -> str:
    """Three decimals, the sign, and no zero before the point."""
    return f"{x:+.3f}".replace("0.", ".", 1) if abs(x) < 1 else f"{x:+.3f}"


def judged(rows: Sequence[Row], earlier: Row, later: Row, metric: str) -> list[Row]:
    """The rows judged against the references (see ``Row``): recovery on ``metric``, Δ on the others.

    Raises:
        ValueError: two models were scored on different numbers of items.
    """
    for row in (*rows, earlier):
        check_items(row, later)
    found = [compared(row, earlier, later, metric) for row in rows]
    for name in later.items:
        having = [at for at, row in enumerate(rows) if name in row.items]
        held = [*(rows[at] for at in having), *([earlier] if name in earlier.items else [])]
        before = np.array(later.items[name])
        now = np.array([row.items[name] for row in held])
        each = paired(now, before) if having else []
        for at, one in zip(having, each, strict=False):
            found[at].paired[name] = one
        if name != metric or len(each) == len(having):
            continue
        for at, span in zip(having, recovery_intervals(now[:-1], now[-1], before), strict=True):
            if found[at].recovery is not None:
                found[at] = dataclasses.replace(found[at], interval=span, underpowered=underpowered(each[-1], span))
    return found


def tell(log: Log | None, row: Row, earlier: Row, later: Row, metric: str) -> Row:
    """The row; a log gets it judged (see ``Row.logged``)."""
    if log is not None:
        log(judged([row], earlier, later, metric)[0].logged())
    return row


def fell(earlier: Row, later: Row, metric: str) -> bool:
    """Whether a metric is significantly lower in the later model: by the paired test, or without items by its mean."""
    lost = earlier.paired.get(metric)
    if lost is None:
        return earlier.metrics[metric] > later.metrics[metric]
    return lost.gain > 0 and lost.interval[0] > 0 and lost.p < ALPHA


def check_items(row: Row, later: Row) -> None:
    """Raise ``ValueError`` where a row has other metrics than the later model's, or another number of items."""
    if row.metrics.keys() != later.metrics.keys():
        raise ValueError(
            f"{row.selector!r} has the metrics {sorted(row.metrics)}, and 'later' {sorted(later.metrics)}: "
            f"evaluate has to return the same for every model (and rows of another evaluate need another file)"
        )
    for name, items in later.items.items():
        if name in row.items and len(row.items[name]) != len(items):
            raise ValueError(
                f"{name!r} has {len(row.items[name])} items in {row.selector!r} and {len(items)} in 'later': evaluate "
                f"has to score the same items in the same order (and rows of other items need another file)"
            )


def compared(row: Row, earlier: Row, later: Row, metric: str) -> Row:
    """The part of ``judged`` that needs no statistics. Without items the mean serves as the only one."""

    def three(name: str) -> tuple[list[float], ...]:
        held = [one.items.get(name) for one in (row, earlier, later)]
        means = [[one.metrics[name]] for one in (row, earlier, later)]
        return tuple(one for one in held if one) if all(held) else tuple(means)

    if row.selector in (EARLIER, LATER):
        return dataclasses.replace(row, paired={})
    lost = earlier.metrics[metric] - later.metrics[metric]
    others = [name for name in row.metrics if name != metric]
    kept = {name: retention(*three(name)) for name in others}
    return dataclasses.replace(
        row,
        recovery=(row.metrics[metric] - later.metrics[metric]) / lost if lost > 0 else None,
        delta={name: row.metrics[name] - later.metrics[name] for name in others},
        healing=healing(*three(metric)) if lost > 0 else None,
        preservation=preservation(*three(metric)),
        retention={name: part for name, part in kept.items() if part is not None},
        paired={},
    )
