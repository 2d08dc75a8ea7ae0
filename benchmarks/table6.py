"""The paper's Table 6 in kind, on every lab seed: ``python -m benchmarks.table6 benchmarks/lab/seed0 [more seeds]``.

Math was trained after Code and then damaged by QA. Every selector at every budget, with recovery of Math and Δ on the
other domains; the layer budgets (Figure 12) and the dose-response (Figure 13) as pictures. Scores are measured on the
calibration prompts, evaluated on others.
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
from surgery import AMCSelector, RandomSelector, Sweep, Trajectory, load_prompts, sweep
from surgery.plots import dose_response, layer_budgets
from surgery.rows import CEILING, EARLIER, LATER

BUDGETS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
SELECTORS = (
    RandomSelector(0.01),
    AMCSelector(0.01, "AM", "AM"),
    AMCSelector(0.01, "AC", "AC"),
    AMCSelector(0.01, "MC", "MC"),
    AMCSelector(0.01, "AMC", "AMC"),
    AMCSelector(0.01, "A", "AMC"),
    AMCSelector(0.01, "A", "A"),
)


def measure(folder: Path) -> tuple[Sweep, dict[str, dict[str, int]]]:
    """The sweep of one seed, and the layer budgets of its selectors at β = 2 %."""
    run = Trajectory(folder / "code", folder / "math", folder / "qa")
    run = replace(run, model=run.load())
    data = load_prompts(folder / "data" / "math.calibration.jsonl", folder / "qa")
    score = evaluator(folder / "data", AutoTokenizer.from_pretrained(folder / "qa"))
    found = sweep(
        run.load(), run, data, selectors=SELECTORS, budgets=BUDGETS, evaluate=score, metric="math", progress=print
    )
    at_two = [replace(selector, budget=0.02) for selector in SELECTORS]
    return found, {selector.name: selector.select(run, data).count() for selector in at_two}


def table(sweeps: Sequence[Sweep]) -> str:
    """Mean over seeds (± standard deviation) of recovery, and the mean and worst Δ on QA, as Markdown."""
    lines = ["| selector | " + " | ".join(f"{100 * b:g} %" for b in BUDGETS) + " | Δ QA at 32 % | worst Δ elsewhere |"]
    lines.append("|---|" + "---|" * (len(BUDGETS) + 2))
    for selector in SELECTORS:
        rows = [sorted(one[selector.name], key=lambda row: row.budget) for one in sweeps]
        recovery = 100 * np.array([[row.recovery for row in seed] for seed in rows], dtype=float)
        cells = [f"{m:.1f} ± {s:.1f}" for m, s in zip(recovery.mean(0), recovery.std(0), strict=True)]
        qa = 100 * np.mean([seed[-1].delta["qa"] for seed in rows])
        worst = 100 * min(value for seed in rows for row in seed for value in row.delta.values())
        lines.append(f"| {selector.name} | " + " | ".join(cells) + f" | {qa:+.2f} | {worst:+.2f} |")
    ceiling = [100 * (row.recovery or 0) for one in sweeps for row in one[CEILING]]
    lines.append(
        f"| {CEILING} | " + " | " * (len(BUDGETS) - 1) + f"{np.mean(ceiling):.1f} ± {np.std(ceiling):.1f} | | |"
    )
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


def main() -> None:
    """Measure every seed, write the table, the rows and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    found = [measure(folder) for folder in asked.seeds]
    sweeps = [one for one, _ in found]
    text = (
        f"# The paper's Table 6 in kind\n\nRecovery of Math in %, mean ± standard deviation over {len(sweeps)} seeds; "
        f"Δ in points. {statement()}\n\n{references(sweeps)}\n\n{table(sweeps)}\n"
    )
    (asked.out / "table6.md").write_text(text)
    rows = [{"seed": at, "rows": [asdict(row) for row in one]} for at, one in enumerate(sweeps)]
    (asked.out / "table6.json").write_text(json.dumps({"statement": statement(), "seeds": rows}, indent=1) + "\n")
    dose_response(sweeps[0]).figure.savefig(asked.out / "dose-response.png")
    layer_budgets(found[0][1]).figure.savefig(asked.out / "layer-budgets.png")
    print(text)


if __name__ == "__main__":
    main()
