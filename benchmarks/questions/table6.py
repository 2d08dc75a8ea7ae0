"""The paper's Table 6 in kind: ``python -m benchmarks.questions.table6 SEED_FOLDER... [--out FOLDER]``

Math was trained after Code and then damaged by QA: the paper's selectors of MLP neurons, its joint MLP + attention
selector, and D beside both. No model is evaluated here: the rows are those of ``benchmarks.pareto``, so the two reports
agree. The dose-response (the paper's Figure 13) is drawn from them too; for the layer budgets (Figure 12) the selectors
choose once more on the first seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.hardware import statement
from benchmarks.pareto.comparison import Store, pairs
from benchmarks.pareto.methods import CHANNELS, GROUPS, PAPER
from benchmarks.pareto.points import Point, Seed, points
from benchmarks.seeds import asked_for, write
from surgery import AMCSelector, DamageSelector, RandomSelector, Trajectory, load_prompts
from surgery.measure import Sweep
from surgery.measure.rows import CEILING, Row, ceiling_of
from surgery.plots.sweeps import dose_response, layer_budgets

BUDGETS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
RANDOM = "random neurons"
PAPERS = [RANDOM, *(one.name for one in PAPER if not isinstance(one, RandomSelector))]
NEURONS = [*PAPERS, DamageSelector(0.01, units="mlp").name]
JOINT = [
    one.name
    for one in (
        RandomSelector(0.01, units=GROUPS),
        AMCSelector(0.01, units=GROUPS),
        *(DamageSelector(0.01, units=units) for units in (GROUPS, CHANNELS)),
    )
]
Points = Mapping[tuple[str, float], Point]

TEXT = """# The paper's Table 6 in kind

Math damaged by QA, from the rows of [pareto](pareto.md), which says when and on what they were measured. Recovery of
Math in %, mean ± standard deviation over {seeds} seeds (random: means of {draws} draws); Δ in points: of QA at 32 %,
and the worst mean of any other domain at any of these budgets. A ceiling is what reverting every unit of those
kinds recovers.
`python -m benchmarks.questions.table6`. {statement}

{references}

## MLP neurons

The budget is a share of the MLP neurons. D is ours.

{neurons}

![recovery by budget: mean over seeds, and the 95 % interval over items](dose-response.png)

How many neurons each layer gives at 2 %, on {first}:

![neurons reverted by layer](layer-budgets.png)

## MLP neurons and attention

The budget is a share of the parameters of both kinds of unit, so 2 % is a larger edit here than above. A×M×C of units
(neurons and KV groups) stands for the paper's row "Joint MLP+Attn"; which units of attention the paper takes, our
source does not say. D is ours.

{joint}
"""


def table(found: Points, names: Sequence[str], ceilings: Sequence[str]) -> str:
    """Recovery at each budget, Δ of QA, the worst Δ, as Markdown; below the selectors the ceilings."""
    lines = ["| selector | " + " | ".join(f"{100 * b:g} %" for b in BUDGETS) + " | Δ QA at 32 % | worst Δ elsewhere |"]
    lines.append("|---|" + "---|" * (len(BUDGETS) + 2))
    for name in names:
        row = [found[name, budget] for budget in BUDGETS]
        worst = min(mean for point in row for mean, _, _ in point.deltas.values())
        last = f"{100 * row[-1].deltas['qa'][0]:+.2f} | {100 * worst:+.2f} |"
        lines.append(f"| {name} | " + " | ".join(map(recovery, row)) + f" | {last}")
    for name in ceilings:
        rest = " | " * (len(BUDGETS) - 1)
        lines.append(f"| {name} | {rest}{recovery(found[name, 1.0])} | | |")
    return "\n".join(lines)


def recovery(point: Point) -> str:
    return f"{100 * point.recovery:.1f} ± {100 * point.sd:.1f}"


def reference(seed: Seed) -> str:
    """What a seed lost: Math and QA before and after."""
    earlier, later = seed.earlier["metrics"], seed.later["metrics"]
    moved = (f"{domain} {100 * earlier[domain]:.2f} → {100 * later[domain]:.2f}" for domain in ("math", "qa"))
    return f"- {seed.name}: {', '.join(moved)}"


def responses(found: Points) -> Sweep:
    """The paper's selectors of neurons as a sweep's rows; with D as well the lines can't be told apart."""
    shown = [found[name, budget] for name in PAPERS for budget in BUDGETS]
    rows = [Row(one.method, one.value, 1, {}, 0.0, one.recovery, interval=(one.low, one.high)) for one in shown]
    return Sweep("math", (*rows, Row(CEILING, 1.0, 1, {}, 0.0, found[CEILING, 1.0].recovery)))


def layers(folder: Path) -> dict[str, dict[str, int]]:
    """Selector → block → neurons at 2 %."""
    run = Trajectory(folder / "code", folder / "math", folder / "qa")
    data = load_prompts(folder / "data" / "math.calibration.jsonl", folder / "qa")
    return {one.name: replace(one, budget=0.02).select(run, data).count() for one in PAPER}


def main() -> None:
    """Write the table and the two pictures."""
    seeds, out = asked_for(__doc__)
    asked = {(folder.name, pairs()[0].name) for folder in seeds}
    runs = [run for run in Store(out / "pareto.json.gz").runs if (run["seed"], run["pair"]["name"]) in asked]
    found = {(point.method, point.value): point for point in points(runs)}
    text = TEXT.format(
        seeds=len(runs),
        draws=len({row["draw"] for row in runs[0]["rows"] if row["method"] == RANDOM}),
        statement=statement(),
        references="\n".join(reference(Seed(run)) for run in runs),
        neurons=table(found, NEURONS, [CEILING]),
        first=seeds[0].name,
        joint=table(found, JOINT, [ceiling_of(GROUPS), ceiling_of(CHANNELS)]),
    )
    write(out, "table6", text)
    dose_response(responses(found)).figure.savefig(out / "dose-response.png")
    layer_budgets(layers(seeds[0])).figure.savefig(out / "layer-budgets.png")


if __name__ == "__main__":
    main()
