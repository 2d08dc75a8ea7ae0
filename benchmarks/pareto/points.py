"""From rows to points: means over seeds, intervals over items, and who wins within a bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.lab.evaluate import bootstrap_interval
from benchmarks.pareto.changes import BASELINE, CONTROL, LIBRARY, TRAINED
from surgery.measure.rows import EARLIER, LATER

SCALE = 10_000  # stored per-item probabilities are whole numbers of 1/SCALE
RESAMPLES = 2_000
LOSSES = (0.0, 0.0025, 0.005, 0.01, 0.02, 0.05, 1.0)
SIZES = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0)
OURS, OTHER, UNDECIDED = "library", "**baseline**", "not separated"


@dataclass(frozen=True)
class Point:
    """One method at one value of its knob, over the damaged seeds; all but seconds are fractions.

    ``deltas``: Δ of every other domain, mean over seeds, and its 95 % interval: that of a mean of seeds whose items are
    drawn independently. ``worst``: the least of a seed's Δ, mean over seeds. ``samples``: the bootstrap's recoveries
    ``[RESAMPLES]``, from the same resampled items for every point of a pair.
    """

    method: str
    kind: str
    knob: str
    value: float
    recovery: float
    sd: float
    low: float
    high: float
    touched: float
    worst: float
    seconds: float
    seeds: tuple[str, ...]
    deltas: Mapping[str, tuple[float, float, float]] = field(repr=False, compare=False)
    samples: np.ndarray = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.method}, {self.knob} {shown(self)}" if self.knob else self.method


class Seed:
    """One run's rows by (method, value), and its resampled items."""

    def __init__(self, run: Mapping[str, Any]) -> None:
        self.name = run["seed"]
        self.rows: dict[tuple[str, float], list[dict[str, Any]]] = {}
        for row in run["rows"]:
            self.rows.setdefault((row["method"], row["value"]), []).append(row)
        self.metric = run["pair"]["metric"]
        (later,), (earlier,) = self.rows[LATER, 0.0], self.rows[EARLIER, 1.0]
        self.later, self.earlier = later, earlier
        self.lost_items = self.items([earlier]) - self.items([later])
        self.interval = bootstrap_interval(self.lost_items)
        n = len(self.lost_items)
        self._shares = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES) / n
        self._lost = self._shares @ self.lost_items

    def items(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        return np.mean([row["items"] for row in rows], axis=0) / SCALE

    @property
    def damaged(self) -> bool:
        """Whether the later model is significantly worse: only then is a recovery a number."""
        return self.interval[0] > 0

    def recovery(self, rows: Sequence[Mapping[str, Any]]) -> tuple[float, np.ndarray]:
        """The recovery (mean over draws) and its bootstrap samples."""
        later, earlier = self.later["metrics"][self.metric], self.earlier["metrics"][self.metric]
        score = float(np.mean([row["metrics"][self.metric] for row in rows]))
        gained = self._shares @ (self.items(rows) - self.items([self.later]))
        return (score - later) / (earlier - later), gained / self._lost


def worst(row: Mapping[str, Any]) -> float:
    """The least change among the other domains: below 0 where one of them falls."""
    return float(min(change[0] for change in row["delta"].values()))


def points(runs: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The rows of one pair, over its damaged seeds, in the order of the methods."""
    seeds = [seed for seed in map(Seed, runs) if seed.damaged]
    keys = dict.fromkeys(key for seed in seeds for key in seed.rows)
    return [_point([seed for seed in seeds if key in seed.rows], key) for key in keys]


def _point(seeds: Sequence[Seed], key: tuple[str, float]) -> Point:
    groups = [seed.rows[key] for seed in seeds]
    found = [seed.recovery(rows) for seed, rows in zip(seeds, groups, strict=True)]
    each, samples = np.array([value for value, _ in found]), np.mean([drawn for _, drawn in found], axis=0)
    first = groups[0][0]

    def mean(of: Callable[[Mapping[str, Any]], float]) -> float:
        return float(np.mean([np.mean([of(row) for row in rows]) for rows in groups]))

    return Point(
        *(first[name] for name in ("method", "kind", "knob", "value")),
        float(each.mean()),
        float(each.std()),
        *map(float, np.quantile(samples, [0.025, 0.975])),
        mean(lambda row: row["touched"] / row["entries"]),
        mean(worst),
        mean(lambda row: row["seconds"]),
        tuple(seed.name for seed in seeds),
        {domain: _delta([[row["delta"][domain] for row in rows] for rows in groups]) for domain in first["delta"]},
        samples,
    )


def _delta(groups: Sequence[Sequence[Sequence[float]]]) -> tuple[float, float, float]:
    """The mean over seeds (each a mean over draws) of Δ with its interval; distances to the ends add as squares."""
    mean = np.mean([np.mean([row[0] for row in rows]) for rows in groups])
    below, above = (
        np.sqrt(sum(np.mean([row[0] - row[at] for row in rows]) ** 2 for rows in groups)) / len(groups) for at in (1, 2)
    )
    return float(mean), float(mean - below), float(mean + above)


def shown(point: Point) -> str:
    """The knob's value as a person writes it."""
    return f"{100 * point.value:g} %" if point.knob in ("β", "entries") else f"{point.value:g}"


@dataclass(frozen=True)
class Contest:
    """The best of the library, of everything else that trains nothing, and of training, within a bound on one cost."""

    cost: str
    bound: str
    library: Point | None
    other: Point | None
    trained: Point | None


def contests(found: Sequence[Point]) -> Iterator[Contest]:
    """One for every bound on the loss elsewhere and on the parameters touched; all MLP neurons is a library's point.

    Variants of D take no part: they are no selectors of the library.
    """

    def within(inside: Sequence[Point], cost: str, bound: str) -> Contest:
        return Contest(cost, bound, *(best(inside, kinds) for kinds in ((LIBRARY,), (BASELINE, CONTROL), (TRAINED,))))

    for bound in LOSSES:
        text = "no bound" if bound == 1 else f"at most {100 * bound:g} points"
        yield within([point for point in found if -point.worst <= bound], "loss elsewhere", text)
    for bound in SIZES:
        text = "no bound" if bound == 1 else f"at most {100 * bound:g} %"
        yield within([point for point in found if point.touched <= bound], "touched", text)


def best(found: Sequence[Point], kinds: Sequence[str]) -> Point | None:
    """The highest recovery among the points of those kinds."""
    return max((point for point in found if point.kind in kinds), key=lambda point: point.recovery, default=None)


def verdict(library: Point | None, other: Point | None) -> tuple[str, str]:
    """The difference with its interval, and who wins: nobody where the interval holds zero or the seeds differ."""
    if library is None or other is None:
        return "", "" if library is other else OTHER if library is None else OURS
    low, high = (float(value) for value in np.quantile(other.samples - library.samples, [0.025, 0.975]))
    text = f"{100 * (other.recovery - library.recovery):+.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    if library.seeds != other.seeds:
        return text, UNDECIDED
    return text, OTHER if low > 0 else OURS if high < 0 else UNDECIDED
