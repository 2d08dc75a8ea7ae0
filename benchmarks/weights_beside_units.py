"""Would whole units be taken beside single weights? ``python -m benchmarks.weights_beside_units SEED_FOLDER...``

Math was damaged by QA. One budget of parameters for units (neurons and KV groups) and single weights together, taken in
the order of what a parameter is worth: a unit's is its score, for D the mean over its weights. In favour of units, that
mean is over all its weights, also those that are taken already and cost nothing any more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.hardware import statement
from benchmarks.lab.evaluate import evaluator
from benchmarks.seeds import asked_for
from surgery import (
    AMCSelector,
    DamageSelector,
    Entries,
    Neurons,
    Trajectory,
    damage,
    load_prompts,
    magnitude,
    rollback,
)
from surgery.entries import shapes_of
from surgery.masks import Mask
from surgery.weight_damage import entry_gains
from surgery.weight_ranking import entries_of
from surgery.weight_scores import entry_magnitude
from surgery.weight_selection import by_damage

BUDGETS, UNITS = (0.002, 0.01, 0.02, 0.04, 0.08), ("mlp", "kv_group")
KINDS = ("D", "M")
Found = dict[tuple[str, float], tuple[float, ...]]  # the units' share of the budget; recovery: mixed, weights, units


@dataclass(frozen=True)
class Pool:
    """Units and weights, and the unit that each weight is of; units are counted through all blocks."""

    shapes: dict[str, tuple[int, int]]
    owner: Tensor
    width: Tensor

    @classmethod
    def of(cls, run: Trajectory) -> Pool:
        (later,) = run.weights("later")
        shapes, first, start = shapes_of(later.layout), {}, 0
        for name, block in later.layout.items():
            first[name], start = start, start + block.neurons
        owner = [
            (first[part.rpartition("/")[0]] + torch.arange(n)).repeat_interleave(w) for part, (n, w) in shapes.items()
        ]
        return cls(shapes, torch.cat(owner), torch.bincount(torch.cat(owner)))

    def mixed(self, units: Tensor, weights: Tensor, budget: float) -> tuple[Entries, float]:
        """The mask of the most worth per parameter that fits, and the part of the budget that went to whole units."""
        left = allowed = round(budget * len(weights))
        order, whole = torch.cat([units, weights]).sort(descending=True, stable=True).indices, 0
        taken = torch.zeros(len(weights), dtype=torch.bool)
        for at in order.tolist():
            new = (self.owner == at) & ~taken if at < len(units) else None
            cost = int(new.sum()) if new is not None else int(not taken[at - len(units)])
            if cost > left or not left:
                break
            left -= cost
            whole += cost if new is not None else 0
            taken[at - len(units) if new is None else new] = True
        return entries_of(taken.nonzero().flatten(), self.shapes), whole / allowed


def worths(run: Trajectory, data: list[dict[str, Tensor]], pool: Pool) -> dict[str, tuple[Tensor, Tensor]]:
    """What a parameter is worth, in units and by itself; M by its layer's mean."""
    return {
        "D": (_flat(damage(run, data)) / pool.width, entry_gains(run, data).flat),
        "M": (_flat(magnitude(run).relative()), entry_magnitude(run)),
    }


def _flat(scores: Neurons) -> Tensor:
    return torch.cat(list(scores.values()))


def measure(folder: Path) -> Found:
    """(score, budget) → the units' share of the mixed budget, and the recovery of Math of the three."""
    run = Trajectory(folder / "code", folder / "math", folder / "qa", units=UNITS)
    run = replace(run, model=run.load())
    score = evaluator(folder / "data", AutoTokenizer.from_pretrained(folder / "qa"))
    later, earlier = score(run.load())["math"], score(Trajectory(later=run.earlier).load())["math"]
    data = load_prompts(folder / "data" / "math.calibration.jsonl", folder / "qa")

    def recovery(mask: Mask) -> float:
        with rollback(run.load(), to=folder / "math", mask=mask):
            return (score(run.load())["math"] - later) / (earlier - later)

    found, pool = {}, Pool.of(run)
    for kind, (units, weights) in worths(run, data, pool).items():
        for budget in BUDGETS:
            mixed, share = pool.mixed(units, weights, budget)
            if kind == "D":
                masks = (
                    mixed,
                    by_damage(run, data, budget, stop=False, rounds=1),
                    DamageSelector(budget).select(run, data),
                )
            else:
                masks = mixed, *(AMCSelector(budget, "M", "M", "global", of).select(run) for of in ("weight", UNITS))
            found[kind, budget] = share, *map(recovery, masks)
    return found


def table(seeds: list[Found]) -> str:
    """Per score: the share of whole units, least … most; and the recovery of mixed / weights / units, means."""
    lines = ["| by | " + " | ".join(f"{100 * budget:g} %" for budget in BUDGETS) + " |"]
    lines.append("|---|" + "---|" * len(BUDGETS))
    for kind in KINDS:
        cells = []
        for budget in BUDGETS:
            share, *recoveries = 100 * np.array([seed[kind, budget] for seed in seeds]).T
            means = " / ".join(f"{values.mean():.1f}" for values in recoveries)
            cells.append(f"{share.min():.0f} … {share.max():.0f} %: {means}")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure every seed and write the table."""
    seeds, out = asked_for(__doc__)
    found = [measure(folder) for folder in seeds]
    text = (
        f"# Would whole units be taken beside single weights?\n\nOne budget of parameters for neurons, KV groups and "
        f"single weights, taken in the order of what a parameter is worth: the part of it that goes to whole units "
        f"(least … most of {len(seeds)} seeds), and the recovery of Math (damaged by QA) in %, means over seeds: both "
        f"together / single weights alone / whole units alone. D is measured once. {statement()}\n\n{table(found)}\n"
    )
    (out / "weights-beside-units.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
