"""What D's sum promises, and what reverting wins.

``python -m benchmarks.questions.promises SEED_FOLDER [--out FOLDER]``.

For three damaged pairs and two distances: the selected units' D, added up, and how much of the loss on the same prompts
is gone when they are reverted, both in parts of the loss that there is. Then what the Hellinger distance owes to its ε.
Everything is in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.hardware import statement
from benchmarks.pareto.variants import integrated
from benchmarks.seeds import asked_for, write
from surgery import Neurons, Trajectory, allocate, damage, load_prompts, rollback, top
from surgery.live import distillation, earlier_model
from surgery.live import losses as measured
from surgery.live.heads import positions
from surgery.live.losses import Distillation, Divergence, predicting
from surgery.live.prompts import Batch
from surgery.scores.amc import costs_of
from surgery.scores.damage import promised
from surgery.units import Units

BUDGETS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0)
PAIRS = (("math", "qa"), ("code", "qa"), ("code", "math"))
UNITS: dict[str, Units] = {"neurons": "mlp", "neurons, KV groups": ("mlp", "kv_group")}
LOSSES: tuple[Divergence, ...] = ("kl", "hellinger")
EPSILONS = (1e-6, 0.003, 0.01, 0.03)


class Pair:
    """A domain that a later stage damaged: the later model, live, and the earlier one's predictions."""

    def __init__(self, folder: Path, domain: str, stage: str, units: Units = "mlp") -> None:
        self.earlier = folder / domain
        self.run, self.units = Trajectory(earlier=self.earlier, later=folder / stage), units
        self.run.load(dtype=torch.float32)
        self.data: list[Batch] = list(load_prompts(folder / "data" / f"{domain}.calibration.jsonl", folder / stage))
        with earlier_model(self.run) as earlier:
            self.losses = {one: distillation(earlier, self.data, divergence=one) for one in LOSSES}

    def mean(self, loss: Distillation) -> float:
        """The loss of the model as it is now, per token."""
        counts = [int(positions(batch).sum()) for batch in self.data]
        with torch.no_grad():
            found = [float(loss(self.run.load(), batch)) for batch in self.data]
        return sum(value * count for value, count in zip(found, counts, strict=True)) / sum(counts)

    def best(self, scores: Neurons, budget: float) -> Neurons:
        return top(scores, allocate(scores, budget, how="global", costs=costs_of(self.run, self.units)))

    def won(self, loss: Distillation, mask: Neurons) -> float:
        """How much less the loss is with the mask reverted."""
        before = self.mean(loss)
        with rollback(self.run.load(), to=self.earlier, mask=mask):
            return before - self.mean(loss)


def rows(folder: Path) -> Iterator[str]:
    """Per pair, units and distance: the loss, and at each budget the promised and the won part of it."""
    for domain, stage in PAIRS:
        for name, units in UNITS.items():
            pair = Pair(folder, domain, stage, units)
            for loss in LOSSES:
                scores = damage(pair.run, pair.data, loss=loss, units=units)
                whole = scores.made_by["damage"]["loss"]
                masks = [pair.best(scores, budget) for budget in BUDGETS]
                parts = [(promised(scores, one) / whole, pair.won(pair.losses[loss], one) / whole) for one in masks]
                along = sum(
                    float(part.double().sum()) for part in integrated(pair.run, pair.data, 4, loss, units).values()
                )
                told = [f"{domain} by {stage}", name, loss, f"{whole:.4f}", f"{scores.made_by['damage']['sum']:.4f}"]
                yield "| " + " | ".join([*told, f"{along:.4f}", *(f"{p:.2f}, {w:.2f}" for p, w in parts)]) + " |"


@contextmanager
def noise(epsilon: float) -> Iterator[None]:
    before, measured._NOISE = measured._NOISE, epsilon
    try:
        yield
    finally:
        measured._NOISE = before


def by_epsilon(pair: Pair) -> Iterator[str]:
    """Per ε: how much of the Hellinger distance (with the usual ε) is won at each budget."""
    loss = pair.losses["hellinger"]
    whole = pair.mean(loss)
    for epsilon in EPSILONS:
        with noise(epsilon):
            scores = damage(pair.run, pair.data, loss="hellinger")
        won = [pair.won(loss, pair.best(scores, budget)) / whole for budget in BUDGETS[:-1]]
        yield f"| {epsilon:g} | " + " | ".join(f"{part:.2f}" for part in won) + " |"


def rounding(pair: Pair) -> float:
    """The Hellinger distance, without ε, of the later model's predictions from the same with logits in bfloat16."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in pair.data:
            logits = predicting(pair.run.load(), batch).double()
            apart = logits.softmax(-1).sqrt() - logits.bfloat16().double().softmax(-1).sqrt()
            total += float((apart.square().sum(-1) / 2).sqrt().sum())
            count += len(logits)
    return total / count


def table(first: str, budgets: tuple[float, ...], lines: Iterator[str]) -> str:
    head = f"{first} | " + " | ".join(f"{100 * budget:g} %" for budget in budgets) + " |"
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *lines])


def main() -> None:
    """Measure one seed and write the tables."""
    (folder, *_), out = asked_for(__doc__)
    pair = Pair(folder, *PAIRS[0])
    first = "| pair | units | distance | loss | Σ D, all units | Σ D along the way"
    text = (
        f"# What D's sum promises, and what reverting wins\n\nThe lab's {folder.name}, float32, calibration prompts. "
        f"At each budget: the selected units' D added up, and how much of the loss is won back by reverting them, both "
        f"in parts of the loss. Along the way: 4 nodes; it is what reverting all of these units wins. "
        f"`python -m benchmarks.questions.promises SEED`. {statement()}\n\n"
        f"{table(first, BUDGETS, rows(folder))}\n\n## The Hellinger distance by ε\n\nMath by QA, neurons: how much of "
        f"the distance (with ε = 0.01) is won back by those that D with another ε chooses.\n\n"
        f"{table('| ε', BUDGETS[:-1], by_epsilon(pair))}\n\nRounding its logits to bfloat16 moves the later model's "
        f"predictions by a Hellinger distance of {rounding(pair):.4f} (mean over tokens, without ε).\n"
    )
    write(out, "promises", text)


if __name__ == "__main__":
    main()
