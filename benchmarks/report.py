"""What the rows of ``benchmarks.pareto`` say, as tables that a person reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.hardware import statement
from benchmarks.methods import BUDGETS
from benchmarks.points import OTHER, OURS, UNDECIDED, Point, Seed, contests, shown, verdict
from surgery.rows import CEILING, EARLIER

HEAD = """# Recovery, and what it costs elsewhere: every selector beside everything people use today

Written by `python -m benchmarks.pareto`; how it was done: [README.md](README.md). {statement}

All numbers but seconds in %. Recovery: mean ± standard deviation over seeds, in brackets its 95 % interval (paired
bootstrap over evaluation items within each seed; it says nothing about other seeds). Touched: parameters whose bits
differ from the later model's. Worst Δ: the least change among the other domains, in points, mean over seeds (below 0
something is lost). Seconds: choosing and writing, or training, on one core; without the evaluation.
"""


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
    for seed in map(Seed, group):
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


def _named(point: Point | None) -> str:
    return f"{100 * point.recovery:.1f}: {point}" if point else "–"
