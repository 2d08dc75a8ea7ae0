"""Can single weights be chosen so that other domains are protected?

``python -m benchmarks.questions.protect_weights SEED...``.

Math was damaged by QA. The library refuses ``protect=`` with ``units="weight"``, and this is why. D of each weight is
reduced by what reverting it costs QA, Code and CW: measured as the cost of neurons is (``reversal_cost``, where
everything is reverted); only where that is a cost and no gain; or on the way, in every round as D itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.damaged import METRIC, OTHERS, Damaged, Judged
from benchmarks.hardware import statement
from benchmarks.questions.protect import table
from benchmarks.seeds import asked_for, write
from surgery import Trajectory, rollback
from surgery.live import respond
from surgery.live.losses import distillation
from surgery.live.prompts import Batch
from surgery.reverting import Rollback
from surgery.scores import reversal_cost
from surgery.scores.weights import Gains, entry_gains

BUDGETS, WEIGHTS, UNITS, ROUNDS = (0.002, 0.01, 0.04), (0.3,), ("mlp", "kv_group"), 16
Found = dict[tuple[str, float], Judged]


class Lab:
    """One seed: D of the later model's weights, and what they cost the other domains."""

    def __init__(self, folder: Path) -> None:
        self.lab = Damaged.of(folder)
        self.run, self.model, self.data = self.lab.run, self.lab.model, self.lab.data
        self.start = self.gains(self.run, self.data[METRIC])
        answered = {domain: respond(self.model, self.data[domain]) for domain in OTHERS}
        self.guarded = {
            domain: (some, distillation(self.model, some, divergence="kl")) for domain, some in answered.items()
        }
        self.far = self.costs()

    def gains(self, run: Trajectory, data: list[Batch], loss: Any = "kl") -> Gains:
        return entry_gains(run, data, loss=loss, units=UNITS)

    def reverted(self, chosen: Tensor) -> Rollback:
        return rollback(self.model, to=self.run.tensors("earlier"), mask=self.start.entries(chosen))

    def costs(self) -> dict[str, Tensor]:
        """``reversal_cost`` of single weights: D of a domain with the ends exchanged."""
        with self.reverted(torch.arange(len(self.start.flat))):
            back = replace(self.run, earlier=self.run.later, later=self.model)
            return {domain: self.gains(back, some, loss).flat for domain, (some, loss) in self.guarded.items()}

    def on_the_way(self) -> Tensor:
        """What going on costs the others where the model is now; nothing at all at the later model itself."""
        each = (self.gains(self.run, some, loss).flat for some, loss in self.guarded.values())
        return -torch.stack(list(each)).sum(0)

    def order(self, cost: Callable[[], Tensor | float]) -> Tensor:
        """The weights by D less their cost, as many as the largest budget.

        In rounds: each takes weights until their gains add up to what is left of the loss, and the last takes the rest.
        """
        taken, most = torch.zeros(0, dtype=torch.int64), round(max(BUDGETS) * len(self.start.flat))
        for at in range(ROUNDS):
            with self.reverted(taken):
                now = self.gains(self.run, self.start.batches, self.start.loss)
                now.flat.sub_(cost())
            now.flat[taken] = 0
            last = at == ROUNDS - 1 or len(taken) >= most
            new = now.best(max(0, most - len(taken)) if last else max(1, worth(now.flat, now.value)))
            taken = torch.cat([taken, new])
            if last or not len(new):
                break
        return taken


def worth(gains: Tensor, limit: float) -> int:
    """How many of the highest gains add up to at most the limit."""
    sums = gains[gains > 0].sort(descending=True).values.double().cumsum(0)
    return int((sums <= limit).sum())


def guards(lab: Lab) -> dict[str, Callable[[], Tensor | float]]:
    """Name → what is taken off D."""
    far, only = (torch.stack([cost.clamp(min=low) for cost in lab.far.values()]).sum(0) for low in (-torch.inf, 0))
    found: dict[str, Callable[[], Tensor | float]] = {"nothing": lambda: 0.0}
    for weight in WEIGHTS:
        found[f"{weight:g} × cost"] = partial(far.mul, weight)
    for weight in WEIGHTS:
        found[f"{weight:g} × cost where above 0"] = partial(only.mul, weight)
    for weight in WEIGHTS:
        found[f"{weight:g} × cost on the way"] = lambda weight=weight: weight * lab.on_the_way()  # type: ignore[misc]
    return found


def measure(folder: Path) -> tuple[Found, dict[str, tuple[float, ...]]]:
    """(guard, budget) → recovery and Δ; domain → the sum of the costs and of their sizes, of weights and of neurons."""
    lab, found = Lab(folder), {}
    for name, cost in guards(lab).items():
        order = lab.order(cost)
        for budget in BUDGETS:
            found[name, budget] = lab.lab.judged(lab.start.entries(order[: round(budget * len(lab.start.flat))]))
    sums = {}
    for domain, cost in lab.far.items():
        units = torch.cat(list(reversal_cost(lab.run, lab.data[domain], loss="kl", units=UNITS).values()))
        sums[domain] = tuple(float(one) for one in (cost.sum(), cost.abs().sum(), units.sum(), units.abs().sum()))
    return found, sums


def sums_table(seeds: list[dict[str, tuple[float, ...]]]) -> str:
    """How far costs cancel, in nats per response token; means over seeds."""
    lines = ["| domain | costs of single weights: sum, of sizes | of units: sum, of sizes |", "|---|---|---|"]
    for domain in OTHERS:
        one, sizes, units, whole = np.mean([seed[domain] for seed in seeds], axis=0)
        lines.append(f"| {domain} | {one:.2f}, {sizes:.2f} | {units:.2f}, {whole:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure every seed and write the tables."""
    seeds, out = asked_for(__doc__)
    found = [measure(folder) for folder in seeds]
    rows, sums = table([one for one, _ in found], BUDGETS, "taken off D"), sums_table([one for _, one in found])
    command = "`python -m benchmarks.questions.protect_weights SEED...`"
    text = (
        f"# Can single weights be chosen so that other domains are protected?\n\nRecovery of Math (damaged by QA) in % "
        f"(mean ± standard deviation over {len(found)} seeds) and the worst mean Δ among the other domains in points, "
        f"by what is taken off D (by KL) and the part of the weights of MLPs and KV groups that is reverted, in "
        f"{ROUNDS} rounds without a stop. {command}. {statement()}\n\n{rows}\n\n## How far costs cancel\n\nIn nats "
        f"per response token, where everything is reverted; means over seeds.\n\n{sums}\n"
    )
    write(out, "protect-weights", text)


if __name__ == "__main__":
    main()
