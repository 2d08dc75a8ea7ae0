"""What the rows of the real lab say: a page of tables, and one picture with a panel per pair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.hardware import statement
from benchmarks.pareto.changes import BASELINE, CONTROL, LIBRARY, REFERENCE
from benchmarks.pareto.points import Contest, Point, Seed, best, shown, verdict
from benchmarks.real.comparison import MAIN, PAIRS
from benchmarks.real.methods import UNITS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Runs = Mapping[str, Sequence[Mapping[str, Any]]]
Found = Mapping[str, Sequence[Point]]
UNITS_NAME, WEIGHTS_NAME = f"D of {UNITS}", "D of single weights"
HEADLINE = (
    (WEIGHTS_NAME, 0.001), (WEIGHTS_NAME, 0.0025), (UNITS_NAME, 0.02), (UNITS_NAME, 0.08), ("D", 0.04), ("A×M×C", 0.04),
    ("WiSE-FT", 0.4), ("WiSE-FT", 0.5), ("least squares", 1.0), ("least squares", 10.0),
    ("CRANE's gate, entries", 0.001), ("spectral (DG-Hard)", 1.0),
)  # fmt: skip
LOSSES = (0.0, 0.0025, 0.005, 0.01, 0.02, 1.0)
SIZES = (0.0005, 0.001, 0.0025, 0.01, 0.02, 0.08, 0.32, 1.0)
SECONDS = (30.0, 60.0, 120.0, 240.0)

HEAD = """# A real language model: SmolLM2-135M-Instruct, damaged by a later stage and repaired

Written by `python -m benchmarks.real`. {statement}

135 M parameters, 30 layers. A short supervised stage teaches it to answer with the answer alone; then Math (sums and
differences) and QA (facts on countries) are trained one after the other, in both orders, at a learning rate of 1e-4.
Besides: a third stage on instructions for the answer's form, Math trained by GRPO instead of examples, and both stages
as adapters of rank 8.

Scores are the exact probability of the right answer on 512 items that nobody trained on, so they have no sampling
noise; *greedy* is exact match. *Recovery* is the share of the damaged skill's loss that comes back; in brackets its
95 % interval (paired bootstrap over items), after ± the standard deviation over seeds. *Kept* is the change of the
later skill, in points (after three stages that of the later or of the first skill, whichever is less). *Differ*:
parameters whose bits differ from the later model's, in millions. *Seconds*: CPU seconds to choose and write on one
core, without the evaluation.
"""


def markdown(runs: Runs, found: Found) -> str:
    """The whole page; ``runs`` and ``found`` by the pair's name."""
    measured = sorted({one for group in runs.values() for run in group for one in run["measured"]})
    runs, found = ({pair.name: by[pair.name] for pair in PAIRS if pair.name in by} for by in (runs, found))
    parts = [HEAD.format(statement=measured[0] if measured else statement())]
    parts += ["## What was lost\n", _lost(runs), "## In short\n", _short(runs, found)]
    parts += ["## Accuracy before and after\n", _matrix(runs)]
    for name, group in found.items():
        parts.append(f"## {name}\n")
        if group:
            parts += ["### Who wins\n", *_wins(group), "### Everything\n", _everything(runs[name], group)]
        else:
            parts.append("No significant loss, so there is nothing to bring back.\n")
    return "\n".join(parts)


def main_pairs(by_pair: Mapping[str, Any]) -> dict[str, Any]:
    """What there is of the pairs that README and the defaults are chosen by."""
    return {pair.name: by_pair[pair.name] for pair in MAIN if pair.name in by_pair}


def kept_of(point: Point) -> tuple[float, float, float]:
    """The change of the skill to be kept, with its interval; of two such skills that which fell more."""
    return min(point.deltas.values())


def _lost(runs: Runs) -> str:
    lines = [
        "| pair | seed | earlier → later | lost | greedy | kept skill | text, nats | chat, nats |",
        "|---" * 8 + "|",
    ]
    for name, group in runs.items():
        for run in group:
            seed = Seed(run)
            before, after = seed.earlier["metrics"], seed.later["metrics"]
            metric, kept = run["pair"]["metric"], run["pair"]["kept"]
            low, high = (100 * value for value in seed.interval)
            lost = 100 * (before[metric] - after[metric])
            cells = [
                name,
                seed.name,
                f"{100 * before[metric]:.1f} → {100 * after[metric]:.1f}",
                f"{lost:.1f} [{low:.1f}, {high:.1f}]",
                *(f"{100 * before[one]:.1f} → {100 * after[one]:.1f}" for one in (f"{metric}, greedy", kept)),
                *(f"{before[one]:.3f} → {after[one]:.3f}" for one in ("text", "chat")),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _short(runs: Runs, found: Found) -> str:
    """The main rows, mean over both main pairs and all seeds."""
    found = main_pairs(found)
    lines = ["| | recovery | by greedy | kept, points | worst pair | differ, M | seconds |", "|---" * 7 + "|"]
    for name, value in HEADLINE:
        chosen = [x for group in found.values() for x in complete(group) if (x.method, x.value) == (name, value)]
        if len(chosen) < len(found) or not chosen:
            continue
        greedy = [_greedy(runs[pair], name, value) for pair in found]
        kept = [kept_of(one)[0] for one in chosen]
        entries = next(iter(next(iter(runs.values()))[0]["rows"]))["entries"]
        cells = [
            f"{name}, {chosen[0].knob} {shown(chosen[0])}",
            f"{100 * np.mean([one.recovery for one in chosen]):.0f} %",
            f"{100 * np.mean(greedy):.0f} %",
            f"{100 * np.mean(kept):+.2f}",
            f"{100 * min(one.recovery for one in chosen):.0f} %, {100 * min(kept):+.2f}",
            f"{np.mean([one.touched for one in chosen]) * entries / 1e6:.2f}",
            f"{_price(found, name):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _matrix(runs: Runs) -> str:
    """All skills after each stage and after the repair, with their mean (ACC) and the backward transfer (BWT)."""
    lines = [
        "Mean over seeds, in %. ACC: the mean of the skills. BWT: how far the damaged skill is from where it was",
        f"right after its own stage. Repaired: {WEIGHTS_NAME}, up to 0.25 %.\n",
        "| pair | model | damaged skill | later skill | the one before both | ACC | BWT |",
        "|---" * 7 + "|",
    ]
    for name, group in runs.items():
        pair = group[0]["pair"]
        skills = [one for one in (pair["metric"], pair["kept"], pair.get("also")) if one]
        before = None
        for label, key in (
            ("earlier", ("earlier", 1.0)),
            ("later", ("later", 0.0)),
            ("repaired", (WEIGHTS_NAME, 0.0025)),
        ):
            rows = [row for run in group for row in run["rows"] if (row["method"], row["value"]) == key]
            if len(rows) < len(group):
                continue
            scores = [100 * float(np.mean([row["metrics"][one] for row in rows])) for one in skills]
            before = scores[0] if before is None else before
            cells = [name, label, *(f"{one:.1f}" for one in scores), *["–"] * (3 - len(skills))]
            cells += [f"{np.mean(scores):.1f}", f"{scores[0] - before:+.1f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


README = {
    "0.1 % of single weights, **D**": (WEIGHTS_NAME, 0.001),
    "up to 0.25 % of single weights, **D**": (WEIGHTS_NAME, 0.0025),
    "2 % of neurons and value channels, **D**": (UNITS_NAME, 0.02),
    "8 % of neurons and value channels, **D**": (UNITS_NAME, 0.08),
    "4 % of the neurons, A×M×C (the paper's)": ("A×M×C", 0.04),
    "everything, half-way (WiSE-FT, α = 0.5)": ("WiSE-FT", 0.5),
    "least squares on both domains' activations, λ = 1": ("least squares", 1.0),
    "spectral thresholding (DG-Hard)": ("spectral (DG-Hard)", 1.0),
    "0.1 % of single weights, CRANE's gate": ("CRANE's gate, entries", 0.001),
}


def headline(runs: Runs, found: Found) -> str:
    """The README's table: recovery with its interval and the change of the later skill, for each main pair."""
    runs, found = main_pairs(runs), main_pairs(found)
    entries = next(iter(runs.values()))[0]["rows"][0]["entries"]
    lines = [f"| what is put back | {' | '.join(found)} | parameters that differ |", "|---" * (len(found) + 2) + "|"]
    for label, key in README.items():
        chosen = [x for group in found.values() for x in complete(group) if (x.method, x.value) == key]
        if len(chosen) < len(found):
            continue
        cells = []
        for one in chosen:
            kept, _, _ = kept_of(one)
            text = f"{100 * one.recovery:.0f} % [{100 * one.low:.0f}, {100 * one.high:.0f}]; {100 * kept:+.1f}"
            cells.append(text.replace("-", "−"))
        size = np.mean([one.touched for one in chosen])
        lines.append(f"| {label} | {' | '.join(cells)} | {size * entries / 1e6:.2f} M ({100 * size:.2g} %) |")
    return "\n".join(lines) + "\n"


def _price(found: Found, method: str) -> float:
    """What choosing costs the first time: later values of the knob find the scores cached."""
    return max(one.seconds for group in found.values() for one in group if one.method == method)


def _greedy(group: Sequence[Mapping[str, Any]], method: str, value: float) -> float:
    """Recovery of exact match: what came back over what was lost, both summed over seeds."""
    back = lost = 0.0
    for run in group:
        rows = {(row["method"], row["value"]): np.mean(row["greedy"]) for row in run["rows"]}
        if (method, value) in rows:
            back += rows[method, value] - rows["later", 0.0]
            lost += rows["earlier", 1.0] - rows["later", 0.0]
    return back / lost if lost else float("nan")


def _wins(found: Sequence[Point]) -> Iterator[str]:
    yield (
        "The best of each side within a bound, chosen on the same items, so both are a little too good; the bound on "
        "the loss is on the kept skill. Only what every seed has takes part. In brackets: 95 % of the "
        "difference, other minus library, over items.\n"
    )
    yield "| within | library | without training, not the library | difference | who wins |\n" + "|---" * 5 + "|"
    for one in _contests(found):
        cells = [f"{one.cost} {one.bound}", _named(one.library), _named(one.other), *verdict(one.library, one.other)]
        yield "| " + " | ".join(cells) + " |"
    yield ""


def complete(found: Sequence[Point]) -> list[Point]:
    """The points that every seed of the pair has: only those are compared."""
    seeds = max((len(one.seeds) for one in found), default=0)
    return [one for one in found if len(one.seeds) == seeds]


def _contests(found: Sequence[Point]) -> Iterator[Contest]:
    found = complete(found)

    def within(cost: str, bound: str, inside: Sequence[Point]) -> Contest:
        return Contest(cost, bound, best(inside, (LIBRARY,)), best(inside, (BASELINE, CONTROL)), None)

    price = {one.method: max(point.seconds for point in found if point.method == one.method) for one in found}
    for bound in LOSSES:
        text = f"at most {100 * bound:g} points" if bound < 1 else "without a bound"
        yield within("loss", text, [one for one in found if -one.worst <= bound])
    for bound in SIZES[:-1]:
        yield within("differ", f"at most {100 * bound:g} %", [one for one in found if one.touched <= bound])
    for bound in SECONDS:
        yield within("seconds", f"at most {bound:g}", [one for one in found if price[one.method] <= bound])


def _named(point: Point | None) -> str:
    return "–" if point is None else f"{100 * point.recovery:.0f} %: {point}"


def _everything(group: Sequence[Mapping[str, Any]], found: Sequence[Point]) -> str:
    entries = group[0]["rows"][0]["entries"]
    lines = [
        "| method | knob | recovery | greedy | kept, points | differ, M | text | seconds | seeds |",
        "|---" * 9 + "|",
    ]
    for one in found:
        if one.kind == REFERENCE and one.method == "later":
            continue
        mean, low, high = kept_of(one)
        rows = [row for run in group for row in run["rows"] if (row["method"], row["value"]) == (one.method, one.value)]
        later = [run for run in group if any(row in rows for row in run["rows"])]
        text = np.mean([row["metrics"]["text"] for row in rows]) - np.mean(
            [Seed(r).later["metrics"]["text"] for r in later]
        )
        spread = f" ± {100 * one.sd:.0f}" if len(one.seeds) > 1 else ""
        cells = [
            one.method,
            f"{one.knob} {shown(one)}" if one.knob else "",
            f"{100 * one.recovery:.0f}{spread} [{100 * one.low:.0f}, {100 * one.high:.0f}]",
            f"{100 * _greedy(group, one.method, one.value):.0f}",
            f"{100 * mean:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]",
            f"{one.touched * entries / 1e6:.2f}",
            f"{text:+.3f}",
            f"{one.seconds:.0f}",
            str(len(one.seeds)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


_STYLES = {
    WEIGHTS_NAME: ("#CC79A7", "*"), UNITS_NAME: ("black", "^"), "D": ("#56B4E9", "o"), "A×M×C": ("#0072B2", "D"),
    "WiSE-FT": ("#E69F00", "s"), "least squares": ("#009E73", "P"), "CRANE's gate, entries": ("#D55E00", "v"),
    "spectral (DG-Hard)": ("0.4", "X"), "LiNeS": ("#F0E442", "h"), "random neurons": ("0.7", "x"),
}  # fmt: skip


def picture(runs: Runs, found: Found) -> Figure:
    """Recovery against what the later skill lost; the larger a point, the more parameters differ.

    Filled: the mean over all seeds of the pair; hollow: of those seeds that have the point.
    """
    from matplotlib.figure import Figure

    found = main_pairs(found)
    figure = Figure(figsize=(4.6 * max(1, len(found)), 4.8), dpi=150, layout="constrained")
    for at, (name, group) in enumerate(found.items()):
        ax = figure.add_subplot(1, len(found), at + 1)
        ax.axhline(100, color="0.85", linewidth=1, zorder=0)
        ax.axvline(0, color="0.85", linewidth=1, zorder=0)
        for method, (colour, marker) in _STYLES.items():
            curve = sorted((one for one in group if one.method == method), key=lambda one: one.value)
            if not curve:
                continue
            whole = complete(group)
            for some, filled in (
                ([one for one in curve if one in whole], True),
                ([one for one in curve if one not in whole], False),
            ):
                x, y = [100 * kept_of(one)[0] for one in some], [100 * one.recovery for one in some]
                sizes = [20 + 130 * one.touched**0.5 for one in some]
                if filled:
                    ax.plot(x, y, color=colour, linewidth=1, alpha=0.6)
                style = {"color": colour} if filled or marker == "x" else {"facecolors": "none", "edgecolors": colour}
                ax.scatter(x, y, s=sizes, marker=marker, linewidths=0.8, zorder=3, **style)
            ax.plot([], [], color=colour, marker=marker, linewidth=1, label=method)
        ax.set_xscale("symlog", linthresh=1.0)
        ticks = [-20, -5, -2, -1, 0, 1]
        ax.set_xlim(-30, 2.5)
        ax.set_xticks(ticks, [f"{tick:g}".replace("-", "−") for tick in ticks])
        ax.minorticks_off()
        ax.set_ylim(-10, 115)
        ax.set_title(name, fontsize="medium")
        ax.set_xlabel("change of the later skill (points)")
        ax.set_ylabel("recovery of the earlier skill (%)" if at == 0 else "")
    labelled = {label: line for ax in figure.axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(
        list(labelled.values()), list(labelled), loc="outside lower center", ncols=4, frameon=False, fontsize="small"
    )
    return figure
