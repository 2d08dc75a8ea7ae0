"""Which single weights? ``python -m benchmarks.questions.single_weights SEED_FOLDER... [--out FOLDER]``

Math was damaged by QA. D of each weight, by the Hellinger distance and by KL, of all and of one kind of unit alone,
with and without its stop; the letters A, M and C of each; and weights drawn at random, at equal numbers of weights. Of
the letters the library has M alone, and this is why.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.damaged import METRIC, Damaged
from benchmarks.hardware import statement
from benchmarks.seeds import asked_for, write
from surgery import AMCSelector, DamageSelector, Entries, RandomSelector, Trajectory, activation
from surgery.checkpoints.trajectory import displacements
from surgery.live.prompts import Batch
from surgery.masks.entries import shapes_of
from surgery.scores.weights import best, entries_of
from surgery.selectors.rounds import ROUNDS, by_damage
from surgery.selectors.settings import damage_named, units_asked

BUDGETS, DRAWS = (0.002, 0.01, 0.02, 0.04), 3
Found = dict[tuple[str, float], tuple[float, float]]


@dataclass(frozen=True)
class ToTheEnd:
    """D of single weights without a stop: the whole budget, also where fewer lower the loss."""

    budget: float
    loss: Any = "hellinger"
    rounds: int = ROUNDS
    units: str = "weight"

    @property
    def name(self) -> str:
        return f"{damage_named(self.loss)} of single weights, {'1 round, ' if self.rounds == 1 else ''}no stop"

    def select(self, run: Trajectory, data: list[Batch]) -> Entries:
        units, given = units_asked(run, "weight"), {"stop": False, "rounds": self.rounds, "loss": self.loss}
        return by_damage(run, data, self.budget, units=units, **given)


@dataclass(frozen=True)
class ByLetters:
    """The paper's letters of single weights: A of the weight's neuron, M = abs(δB,w), both by their layer's mean.

    C is 1 where δA,w and δB,w have opposite signs, else 0: max(0, −cos) of two vectors of one number. A weight whose
    score is 0 is never taken.
    """

    budget: float
    letters: str
    units: str = "weight"

    @property
    def name(self) -> str:
        return f"{'×'.join(self.letters)} of single weights"

    def select(self, run: Trajectory, data: list[Batch]) -> Entries:
        units = units_asked(run, "weight")
        (later,) = run.weights("later", units=units)
        shapes, scores = shapes_of(later.layout), self.scores(run, data, units)
        flat = torch.cat([scores[part].flatten() for part in shapes])
        return entries_of(best(flat, round(self.budget * len(flat))), shapes)

    def scores(self, run: Trajectory, data: list[Batch], units: tuple[str, ...]) -> dict[str, Tensor]:
        """``[neuron, width]`` of every part."""
        A = activation(run.load(), data, units=units).relative()
        pieces: dict[str, list[Tensor]] = {}
        for block, part, start, stop, (a, b) in displacements(run, "base", "earlier", "later", units=units):
            score = torch.ones_like(b)
            if "A" in self.letters:
                score *= A[block][start:stop, None]
            if "M" in self.letters:
                score *= b.abs()
            if "C" in self.letters:
                score *= a.sign() * b.sign() < 0
            pieces.setdefault(f"{block}/{part}", []).append(score)
        found = {part: torch.cat(some) for part, some in pieces.items()}
        return found if "M" not in self.letters else by_layer(found, run, units)


def by_layer(scores: dict[str, Tensor], run: Trajectory, units: tuple[str, ...]) -> dict[str, Tensor]:
    """Each score divided by the mean M of its layer."""
    sums: dict[str, list[float]] = {}
    for block, *_, (step,) in displacements(run, "earlier", "later", units=units):
        held = sums.setdefault(block, [0.0, 0])
        sums[block] = [held[0] + float(step.abs().double().sum()), held[1] + step.numel()]
    means = {block: total / count for block, (total, count) in sums.items()}
    return {part: score / means[part.rpartition("/")[0]] for part, score in scores.items()}


SELECTORS: tuple[Any, ...] = (
    DamageSelector(0.01, units="weight"),
    ToTheEnd(0.01),
    ToTheEnd(0.01, rounds=1),
    *(DamageSelector(0.01, units=(kind, "weight")) for kind in ("mlp", "kv_group")),
    DamageSelector(0.01, loss="kl", units="weight"),
    ToTheEnd(0.01, "kl"),
    ToTheEnd(0.01, "kl", 1),
    AMCSelector(0.01, "M", "M", "global", "weight"),
    *(ByLetters(0.01, letters) for letters in ("AMC", "MC", "A", "C")),
    *(RandomSelector(0.01, seed, "weight") for seed in range(DRAWS)),
)


def measure(folder: Path) -> list[Found]:
    """Per draw: (selector, budget) → recovery of Math, the worst change elsewhere."""
    lab = Damaged.of(folder)
    found: list[Found] = [{} for _ in range(DRAWS)]
    for selector in SELECTORS:
        for budget in BUDGETS:
            judged = lab.stored.get((selector.name, budget))
            if judged is None:
                one = replace(selector, budget=budget * share(lab.run, selector.units))
                judged = lab.judged(one.select(lab.run, lab.data[METRIC]))
            recovery, others = judged
            found[getattr(selector, "seed", 0)][selector.name, budget] = recovery, min(others.values())
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
        f"other domains in points, mean over seeds, at the budget where it is worst. "
        f"`python -m benchmarks.questions.single_weights SEED...`. {statement()}\n\n{table(found)}\n"
    )
    write(out, "single-weights", text)


if __name__ == "__main__":
    main()
