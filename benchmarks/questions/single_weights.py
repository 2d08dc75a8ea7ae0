"""Which single weights? ``python -m benchmarks.questions.single_weights SEED_FOLDER... [--out FOLDER]``

Math was damaged by QA. D of each weight, by KL and by the Hellinger distance, of all and of one kind of unit alone, in
rounds and from one look; M of each; and weights drawn at random, at equal numbers of weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from benchmarks.hardware import statement
from benchmarks.lab.evaluate import evaluator
from benchmarks.seeds import asked_for, write
from surgery import AMCSelector, DamageSelector, Entries, RandomSelector, Trajectory, load_prompts, rollback
from surgery.prompts import Batch
from surgery.scores import remembered
from surgery.weight_selection import ROUNDS, by_damage, over_weights

BUDGETS, DRAWS = (0.002, 0.01, 0.02, 0.04), 3
Found = dict[tuple[str, float], tuple[float, float]]


@dataclass(frozen=True)
class ToTheEnd:
    """D of single weights without a stop: the whole budget, also where fewer lower the loss."""

    budget: float
    rounds: int = ROUNDS
    units: str = "weight"

    @property
    def name(self) -> str:
        return f"D of single weights, {'1 round, ' if self.rounds == 1 else ''}no stop"

    def select(self, run: Trajectory, data: list[Batch]) -> Entries:
        return by_damage(over_weights(run), data, self.budget, stop=False, rounds=self.rounds)


SELECTORS: tuple[Any, ...] = (
    ToTheEnd(0.01),
    DamageSelector(0.01, units="weight"),
    ToTheEnd(0.01, rounds=1),
    *(DamageSelector(0.01, units=(kind, "weight")) for kind in ("mlp", "kv_group")),
    *(
        DamageSelector(0.01, loss="hellinger", units=units)
        for units in ("weight", ("mlp", "weight"), ("kv_group", "weight"))
    ),
    AMCSelector(0.01, "M", "M", "global", "weight"),
    *(RandomSelector(0.01, seed, "weight") for seed in range(DRAWS)),
)


def measure(folder: Path) -> list[Found]:
    """Per draw: (selector, budget) → recovery of Math, the worst change elsewhere."""
    run = Trajectory(folder / "code", folder / "math", folder / "qa")
    model = run.load()
    live = replace(run, model=model)
    score = evaluator(folder / "data", AutoTokenizer.from_pretrained(folder / "qa"))
    later, earlier = score(model), score(Trajectory(later=run.earlier).load())
    data = load_prompts(folder / "data" / "math.calibration.jsonl", folder / "qa")
    found: list[Found] = [{} for _ in range(DRAWS)]
    with remembered():
        for selector in SELECTORS:
            for budget in BUDGETS:
                mask = replace(selector, budget=budget * share(live, selector.units)).select(live, data)
                with rollback(model, to=run.earlier, mask=mask):
                    now = score(model)
                recovery = (now["math"] - later["math"]) / (earlier["math"] - later["math"])
                worst = min(now[domain] - later[domain] for domain in now if domain != "math")
                found[getattr(selector, "seed", 0)][selector.name, budget] = recovery, worst
    return found


def share(run: Trajectory, units: Any) -> float:
    """How many weights of MLPs and KV groups there are for each of those units'."""
    whole, own = (RandomSelector(0.0, units=one).select(run).total for one in ("weight", units))
    return whole / own


def table(runs: list[Found]) -> str:
    """Recovery in %, mean ± standard deviation over seeds (random: and draws); the worst mean Δ elsewhere in points."""
    lines = ["| selector | " + " | ".join(f"{100 * b:g} %" for b in BUDGETS) + " | worst Δ elsewhere |"]
    lines.append("|---|" + "---|" * (len(BUDGETS) + 1))
    for name in dict.fromkeys(selector.name for selector in SELECTORS):
        rows = [[run[name, budget] for run in runs if (name, budget) in run] for budget in BUDGETS]
        each = [100 * np.array([recovery for recovery, _ in row]) for row in rows]
        worst = 100 * min(float(np.mean([worst for _, worst in row])) for row in rows)
        cells = [f"{values.mean():.1f} ± {values.std():.1f}" for values in each]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {worst:+.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure every seed and write the table."""
    seeds, out = asked_for(__doc__)
    found = [run for folder in seeds for run in measure(folder)]
    text = (
        f"# Which single weights?\n\nRecovery of Math (damaged by QA) in %, mean ± standard deviation over "
        f"{len(seeds)} seeds, by fraction of the weights of MLPs and KV groups that may be reverted (also where "
        f"those of one kind are chosen from); all but D with its stop take as many as they may. Δ: the worst of the "
        f"other domains in points, mean over seeds, at the budget where it is worst. {statement()}\n\n{table(found)}\n"
    )
    write(out, "single-weights", text)


if __name__ == "__main__":
    main()
