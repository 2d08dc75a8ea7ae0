"""What the rows of ``benchmarks.pareto`` say: means over seeds, intervals over items, tables, and who wins where."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.hardware import statement
from benchmarks.lab.evaluate import bootstrap_interval
from benchmarks.methods import BASELINE, BUDGETS, CONTROL, LIBRARY, TRAINED
from surgery.sweeps import CEILING, EARLIER, LATER

SCALE = 10_000  # stored per-item probabilities are whole numbers of 1/SCALE
RESAMPLES = 2_000
LOSSES = (0.0, 0.0025, 0.005, 0.01, 0.02, 0.05, 1.0)
SIZES = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0)
OURS, OTHER, UNDECIDED = "library", "**baseline**", "not separated"
HEAD = """# Recovery, and what it costs elsewhere: every selector beside everything people use today

Written by `python -m benchmarks.pareto`; how it was done: [README.md](README.md). {statement}

All numbers but seconds in %. Recovery: mean ± standard deviation over seeds, in brackets its 95 % interval (paired
bootstrap over evaluation items within each seed; it says nothing about other seeds). Touched: parameters whose bits
differ from the later model's. Worst Δ: the least change among the other domains, in points, mean over seeds (below 0
something is lost). Seconds: choosing and writing, or training, on one core; without the evaluation.
"""


@dataclass(frozen=True)
class Point:
    """One method at one value of its knob, over the damaged seeds; all but seconds are fractions.

    ``samples``: the bootstrap's recoveries ``[RESAMPLES]``, from the same resampled items for every point of a pair.
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
    samples: np.ndarray = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.method}, {self.knob} {shown(self)}" if self.knob else self.method


class _Seed:
    """One run's rows by (method, value), and its resampled items."""

    def __init__(self, run: Mapping[str, Any]) -> None:
        self.name = run["seed"]
        self.rows: dict[tuple[str, float], list[dict[str, Any]]] = {}
        for row in run["rows"]:
            self.rows.setdefault((row["method"], row["value"]), []).append(row)
        self.metric = run["pair"]["metric"]
        (later,), (earlier,) = self.rows[LATER, 0.0], self.rows[EARLIER, 1.0]
        self.later, self.earlier = later, earlier
        self.lost_items = self._items([earlier]) - self._items([later])
        self.interval = bootstrap_interval(self.lost_items)
        n = len(self.lost_items)
        self._shares = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES) / n
        self._lost = self._shares @ self.lost_items

    def _items(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        return np.mean([row["items"] for row in rows], axis=0) / SCALE

    @property
    def damaged(self) -> bool:
        """Whether the later model is worse beyond doubt: only then is a recovery a number."""
        return self.interval[0] > 0

    def recovery(self, rows: Sequence[Mapping[str, Any]]) -> tuple[float, np.ndarray]:
        """The recovery (mean over draws) and its bootstrap samples."""
        later, earlier = self.later["metrics"][self.metric], self.earlier["metrics"][self.metric]
        score = float(np.mean([row["metrics"][self.metric] for row in rows]))
        gained = self._shares @ (self._items(rows) - self._items([self.later]))
        return (score - later) / (earlier - later), gained / self._lost


def worst(row: Mapping[str, Any]) -> float:
    """The least change among the other domains: below 0 where one of them falls."""
    return float(min(change[0] for change in row["delta"].values()))


def points(runs: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The rows of one pair, over its damaged seeds, in the order of the methods."""
    seeds = [seed for seed in map(_Seed, runs) if seed.damaged]
    keys = dict.fromkeys(key for seed in seeds for key in seed.rows)
    return [_point([seed for seed in seeds if key in seed.rows], key) for key in keys]


def _point(seeds: Sequence[_Seed], key: tuple[str, float]) -> Point:
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
        samples,
    )


def shown(point: Point) -> str:
    """The knob's value as a person writes it."""
    return f"{100 * point.value:g} %" if point.knob in ("β", "entries") else f"{point.value:g}"


def _recovery(point: Point) -> str:
    spread = f" ± {100 * point.sd:.1f}" if len(point.seeds) > 1 else ""
    return f"{100 * point.recovery:.1f}{spread} [{100 * point.low:.1f}, {100 * point.high:.1f}]"


def markdown(runs: Mapping[str, Sequence[Mapping[str, Any]]], found: Mapping[str, Sequence[Point]]) -> str:
    """The whole report; ``runs`` and ``found`` by the pair's name."""
    parts = [HEAD.format(statement=statement()), *map(_summary, found, found.values()), ""]
    measured = sorted({run["measured"] for group in runs.values() for run in group} - {statement()})
    parts += [f"Some rows were measured earlier: {one}.\n" for one in measured]
    for name, group in runs.items():
        parts += [f"## {name}\n", _references(group)]
        if not found[name]:
            parts.append("No seed lost anything beyond doubt: there is nothing to recover.\n")
            continue
        parts += ["### Who wins\n", *_wins(found[name]), "### Neuron selectors\n", _budgets(found[name])]
        everything = _everything(found[name], len(group))
        parts.append(
            f"<details><summary>Everything, at every value of its knob</summary>\n\n{everything}\n</details>\n"
        )
    return "\n".join(parts)


def _references(group: Sequence[Mapping[str, Any]]) -> str:
    """What each seed lost, and every domain before and after."""
    lines = []
    for seed in map(_Seed, group):
        low, high = (100 * value for value in seed.interval)
        moved = ", ".join(
            f"{domain} {100 * seed.earlier['metrics'][domain]:.1f} → {100 * score:.1f}"
            for domain, score in seed.later["metrics"].items()
        )
        note = "" if seed.damaged else " **Not damaged beyond doubt: left out below.**"
        lost = 100 * float(seed.lost_items.mean())
        lines.append(f"- {seed.name}: lost {lost:.1f} points [{low:.1f}, {high:.1f}] ({moved}).{note}")
    return "\n".join(lines) + "\n"


def _budgets(found: Sequence[Point]) -> str:
    """Recovery of everything that reverts whole MLP neurons, by budget."""
    lines = ["| | " + " | ".join(f"{100 * b:g} %" for b in BUDGETS) + " | touched | worst Δ | seconds |"]
    lines.append("|---|" + "---|" * (len(BUDGETS) + 3))
    for name in dict.fromkeys(point.method for point in found if point.knob == "β" and point.method != CEILING):
        row = sorted((point for point in found if point.method == name), key=lambda point: point.value)
        last = f"{100 * row[-1].touched:.1f} | {100 * min(point.worst for point in row):+.2f}"
        seconds = np.mean([point.seconds for point in row])
        lines.append(f"| {name} | " + " | ".join(map(_recovery, row)) + f" | {last} | {seconds:.2f} |")
    for point in found:
        if point.method in (CEILING, EARLIER):
            last = f"{100 * point.touched:.1f} | {100 * point.worst:+.2f} | {point.seconds:.2f} |"
            lines.append(f"| {point.method} | " + " | " * (len(BUDGETS) - 1) + f"{_recovery(point)} | {last}")
    return "\n".join(lines) + "\n\nTouched at the largest budget; the worst Δ over all budgets.\n"


def _everything(found: Sequence[Point], seeds: int) -> str:
    lines = ["| method | knob | recovery | touched | worst Δ | seconds |", "|---|---|---|---|---|---|"]
    for point in found:
        seen = f" ({len(point.seeds)} of {seeds} seeds)" if len(point.seeds) < seeds else ""
        lines.append(
            f"| {point.method}{seen} | {f'{point.knob} {shown(point)}' if point.knob else ''} | {_recovery(point)} "
            f"| {100 * point.touched:.1f} | {100 * point.worst:+.2f} | {point.seconds:.2f} |"
        )
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Contest:
    """The best of the library, of everything else that trains nothing, and of training, within a bound on one cost."""

    cost: str
    bound: str
    library: Point | None
    other: Point | None
    trained: Point | None


def contests(found: Sequence[Point]) -> Iterator[Contest]:
    """One for every bound on the loss elsewhere and on the parameters touched; all MLP neurons is a library's point."""

    def within(inside: Sequence[Point], cost: str, bound: str) -> Contest:
        return Contest(cost, bound, *(best(inside, kinds) for kinds in ((LIBRARY,), (BASELINE, CONTROL), (TRAINED,))))

    for bound in LOSSES:
        text = "no bound" if bound == 1 else f"at most {100 * bound:g} points"
        yield within([point for point in found if -point.worst <= bound], "loss elsewhere", text)
    for bound in SIZES:
        text = "no bound" if bound == 1 else f"at most {100 * bound:g} %"
        yield within([point for point in found if point.touched <= bound], "touched", text)


def _summary(name: str, found: Sequence[Point]) -> str:
    """One line: how many of the contests each side wins."""
    results = [verdict(one.library, one.other)[1] for one in contests(found)]
    counts = f"a baseline or control wins {results.count(OTHER)} of {len(results)} comparisons, a selector of surgery "
    return f"- {name}: {counts}{results.count(OURS)}, {results.count(UNDECIDED)} are not separated."


def _wins(found: Sequence[Point]) -> Iterator[str]:
    yield (
        "The best of each kind within a bound, chosen on the same evaluation items (so all are a little too good). "
        "In brackets: 95 % of the difference, other minus library, over items.\n"
    )
    rows: dict[str, list[str]] = {}
    for one in contests(found):
        cells = [
            one.bound,
            _named(one.library),
            _named(one.other),
            *verdict(one.library, one.other),
            _named(one.trained),
        ]
        rows.setdefault(one.cost, []).append("| " + " | ".join(cells) + " |")
    for cost, lines in rows.items():
        head = f"| {cost} | library | baselines and controls | difference | who wins | trained |\n" + "|---" * 6 + "|"
        yield "\n".join([head, *lines]) + "\n"


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


def _named(point: Point | None) -> str:
    return f"{100 * point.recovery:.1f}: {point}" if point else "–"
