"""What does protecting the other domains buy, and cost?

``python -m benchmarks.questions.protect SEED_FOLDER... [--out FOLDER]``.

Math was damaged by QA. D is reduced by ``weight`` times what reverting would cost QA, Code and CW; at budgets so large
that plain D begins to hurt them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.damaged import METRIC, OTHERS, Damaged, Judged
from benchmarks.hardware import statement
from benchmarks.seeds import asked_for, write
from surgery import DamageSelector

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BUDGETS, WEIGHTS = (0.08, 0.32, 0.64, 0.8), (0.0, 0.1, 0.3, 1.0, 3.0)
_COLOURS = ("black", "#0072B2", "#009E73", "#E69F00", "#D55E00")
Found = dict[tuple[float, float], Judged]


def measure(folder: Path) -> Found:
    """(weight, budget) → recovery of Math, Δ of the others."""
    lab, found = Damaged.of(folder), {}
    guarded = {domain: lab.data[domain] for domain in OTHERS}
    for weight in WEIGHTS:
        for budget in BUDGETS:
            selector = DamageSelector(budget, protect=guarded if weight else None, weight=weight, units="mlp")
            judged = lab.stored.get((selector.name, budget))
            found[weight, budget] = judged or lab.judged(selector.select(lab.run, lab.data[METRIC]))
    return found


def table(seeds: Sequence[Mapping[tuple[Any, float], Judged]], budgets: Sequence[float], first: str) -> str:
    """Recovery in % and the worst of the others' mean Δ in points, per guard and budget; means over seeds."""
    lines = [f"| {first} | " + " | ".join(f"{100 * budget:g} %" for budget in budgets) + " |"]
    lines.append("|---|" + "---|" * len(budgets))
    for guard in dict.fromkeys(guard for guard, _ in seeds[0]):
        cells = []
        for budget in budgets:
            recovery = 100 * np.array([seed[guard, budget][0] for seed in seeds])
            means = {one: 100 * np.mean([seed[guard, budget][1][one] for seed in seeds]) for one in OTHERS}
            worst = min(means, key=lambda one: means[one])
            cells.append(f"{recovery.mean():.1f} ± {recovery.std():.1f}, {worst} {means[worst]:+.2f}")
        lines.append(f"| {guard if isinstance(guard, str) else f'{guard:g}'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curves(seeds: Sequence[Found]) -> Figure:
    """The trade-off: recovery against the worst of the others' mean Δ, a curve per weight along the budgets."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.8), dpi=150, layout="constrained")
    ax = figure.add_subplot()
    for weight, colour, marker in zip(WEIGHTS, _COLOURS, "o^sDv", strict=True):
        recovery = [100 * np.mean([seed[weight, budget][0] for seed in seeds]) for budget in BUDGETS]
        worst = [
            100 * min(np.mean([seed[weight, budget][1][one] for seed in seeds]) for one in OTHERS) for budget in BUDGETS
        ]
        ax.plot(worst, recovery, color=colour, marker=marker, label=f"weight {weight:g}" if weight else "plain D")
    for budget, x, y in zip(BUDGETS, worst, recovery, strict=True):
        ax.annotate(f"{100 * budget:g} %", (x, y), xytext=(-6, -12), textcoords="offset points", fontsize="small")
    ax.axvline(0, color="0.8", linewidth=1, zorder=0)
    ax.set_xlabel("worst mean Δ on QA, Code or CW (points)")
    ax.set_ylabel("recovery of Math (%)")
    ax.legend(frameon=False, fontsize="small")
    return figure


def main() -> None:
    """Measure every seed, write the table and draw the curves."""
    seeds, out = asked_for(__doc__)
    found = [measure(folder) for folder in seeds]
    text = (
        f"# What protecting the other domains buys, and costs\n\nRecovery of Math in % (mean ± standard deviation over "
        f"{len(found)} seeds) and the worst mean Δ among QA, Code and CW in points, by the weight of what reverting "
        f"costs them (0: plain D) and the budget of MLP neurons. The same as curves: "
        f"[protect.png](protect.png). `python -m benchmarks.questions.protect SEED...`. "
        f"{statement()}\n\n{table(found, BUDGETS, 'weight')}\n"
    )
    write(out, "protect", text)
    curves(found).savefig(out / "protect.png")


if __name__ == "__main__":
    main()
