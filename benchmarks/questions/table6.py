"""The paper's Table 6 in kind, on every lab seed.

``python -m benchmarks.questions.table6 benchmarks/lab/seed0 [more seeds]``.

Math was trained after Code and then damaged by QA. Every selector at every budget, with recovery of Math and Δ on the
other domains: the paper's selectors of MLP neurons, its joint MLP + attention selector, and D beside both. The layer
budgets (Figure 12) and the dose-response (Figure 13) of the paper's selectors of neurons as pictures. Scores are
measured on the calibration prompts, evaluated on others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from benchmarks.hardware import statement
from benchmarks.lab.evaluate import evaluator
from surgery import AMCSelector, DamageSelector, RandomSelector, Selector, Sweep, Trajectory, load_prompts, sweep
from surgery.bench import name_of
from surgery.plots import dose_response, layer_budgets
from surgery.rows import CEILING, EARLIER, LATER, ceiling_of

BUDGETS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
PAPER = (
    RandomSelector(0.01),
    AMCSelector(0.01, "AM", "AM"),
    AMCSelector(0.01, "AC", "AC"),
    AMCSelector(0.01, "MC", "MC"),
    AMCSelector(0.01, "AMC", "AMC"),
    AMCSelector(0.01, "A", "AMC"),
    AMCSelector(0.01, "A", "A"),
)
NEURONS = (*PAPER, DamageSelector(0.01))
GROUPS, CHANNELS = ("mlp", "kv_group"), ("mlp", "value_channel")
JOINT = (
    RandomSelector(0.01, units=GROUPS),
    AMCSelector(0.01, units=GROUPS),
    DamageSelector(0.01, units=GROUPS),
    DamageSelector(0.01, units=CHANNELS),
)

TEXT = """# The paper's Table 6 in kind

Recovery of Math in %, mean ± standard deviation over {seeds} seeds; Δ in points. A ceiling is what reverting every unit
of those kinds recovers. {statement}

{references}

## MLP neurons

The budget is a share of the MLP neurons. D is ours.

{neurons}

## MLP neurons and attention

The budget is a share of the parameters of both kinds of unit, so 2 % is a larger edit here than above. A×M×C of units
(neurons and KV groups) stands for the paper's row "Joint MLP+Attn"; which units of attention the paper takes, our
source does not say. D is ours.

{joint}
"""


def measure(folder: Path) -> tuple[Sweep, dict[str, dict[str, int]]]:
    """The sweep of one seed, and the layer budgets of its selectors at β = 2 %."""
    run = Trajectory(folder / "code", folder / "math", folder / "qa")
    run = replace(run, model=run.load())
    data = load_prompts(folder / "data" / "math.calibration.jsonl", folder / "qa")
    score = evaluator(folder / "data", AutoTokenizer.from_pretrained(folder / "qa"))
    found = sweep(
        run, data, selectors=NEURONS + JOINT, budgets=BUDGETS, evaluate=score, metric="math", progress=print
    )
    at_two = [replace(selector, budget=0.02) for selector in PAPER]
    return found, {selector.name: selector.select(run, data).count() for selector in at_two}


def table(sweeps: Sequence[Sweep], selectors: Sequence[Selector], ceilings: Sequence[tuple[str, ...]]) -> str:
    """Mean over seeds (± standard deviation) of recovery, the mean Δ on QA, the worst Δ anywhere, as Markdown.

    Below the selectors a ceiling for each of those kinds of unit.
    """
    lines = ["| selector | " + " | ".join(f"{100 * b:g} %" for b in BUDGETS) + " | Δ QA at 32 % | worst Δ elsewhere |"]
    lines.append("|---|" + "---|" * (len(BUDGETS) + 2))
    for name in map(name_of, selectors):
        rows = [sorted(one[name], key=lambda row: row.budget) for one in sweeps]
        recovery = 100 * np.array([[row.recovery for row in seed] for seed in rows], dtype=float)
        cells = [f"{m:.1f} ± {s:.1f}" for m, s in zip(recovery.mean(0), recovery.std(0), strict=True)]
        qa = 100 * np.mean([seed[-1].delta["qa"] for seed in rows])
        worst = 100 * min(value for seed in rows for row in seed for value in row.delta.values())
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {qa:+.2f} | {worst:+.2f} |")
    for name in map(ceiling_of, ceilings):
        rest = " | " * (len(BUDGETS) - 1)
        each = [100 * (row.recovery or 0) for one in sweeps for row in one[name]]
        lines.append(f"| {name} | {rest}{np.mean(each):.1f} ± {np.std(each):.1f} | | |")
    return "\n".join(lines)


def references(sweeps: Sequence[Sweep]) -> str:
    """What each seed lost: Math before and after QA."""
    lines = []
    for at, one in enumerate(sweeps):
        earlier, later = one[EARLIER][0].metrics, one[LATER][0].metrics
        lines.append(
            f"- seed {at}: math {earlier['math']:.4f} → {later['math']:.4f}, qa {earlier['qa']:.4f} → {later['qa']:.4f}"
        )
    return "\n".join(lines)


def of_the_paper(one: Sweep) -> Sweep:
    """Without our rows: more than its seven lines can't be told apart in a picture."""
    kept = {EARLIER, LATER, CEILING, *map(name_of, PAPER)}
    return Sweep(one.metric, tuple(row for row in one if row.selector in kept))


def main() -> None:
    """Measure every seed, write the table, the rows and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    found = [measure(folder) for folder in asked.seeds]
    sweeps = [one for one, _ in found]
    text = TEXT.format(
        seeds=len(sweeps),
        statement=statement(),
        references=references(sweeps),
        neurons=table(sweeps, NEURONS, [("mlp",)]),
        joint=table(sweeps, JOINT, [GROUPS, CHANNELS]),
    )
    (asked.out / "table6.md").write_text(text, encoding="utf-8")
    rows = [{"seed": at, "rows": [asdict(row) for row in one]} for at, one in enumerate(sweeps)]
    (asked.out / "table6.json").write_text(json.dumps({"statement": statement(), "seeds": rows}, indent=1) + "\n")
    dose_response(of_the_paper(sweeps[0])).figure.savefig(asked.out / "dose-response.png")
    layer_budgets(found[0][1]).figure.savefig(asked.out / "layer-budgets.png")
    print(text)


if __name__ == "__main__":
    main()
