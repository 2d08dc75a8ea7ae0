"""Is there a better estimate than the gradient at the later model? ``python -m benchmarks.variants SEED_FOLDER...``

Math was damaged by QA. Beside plain D: D integrated along the way back, D less or plus its own curvature, a few rounds
of select – revert – rescore; and going less or more far back than to the earlier values, by one strength for all or by
one for each neuron. Everything is in float32, where the way between two checkpoints has points, but for two rows that
are rounded to bf16 afterwards; all choose the same number of neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from benchmarks.hardware import statement
from benchmarks.lab.evaluate import evaluator
from benchmarks.seeds import asked_for
from surgery import (
    Neurons,
    Trajectory,
    allocate,
    damage,
    distillation,
    earlier_model,
    load_prompts,
    rollback,
    strengths,
    top,
)  # fmt: skip
from surgery.predictions import positions, predicting
from surgery.prompts import Batch
from surgery.strength_values import Strength, applied

BUDGETS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
Choice = tuple[Neurons, Strength]  # a mask, and how far back
ROUNDED = ", rounded to bf16"


class Scorer:
    """D in all its variants on one seed."""

    def __init__(self, run: Trajectory, data: list[Batch]) -> None:
        self.run, self.data = run, data
        with earlier_model(run) as earlier:
            self.loss = distillation(earlier, data)
        self.plain = damage(run, data, loss=self.loss)
        self.integrated = {nodes: damage(run, data, loss=self.loss, nodes=nodes) for nodes in (2, 4)}
        self.curvature = self._curvature(samples=4)

    def _curvature(self, samples: int) -> Neurons:
        """½ ⟨δB,n, F δB,n⟩, F the Fisher information: (∇ log p(y) · δ_n)² over labels y that the model draws itself."""

        def drawn(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
            logits = predicting(model, batch)
            labels = torch.distributions.Categorical(logits=logits.detach()).sample()
            return torch.nn.functional.cross_entropy(logits, labels)

        torch.manual_seed(0)
        squares = {name: torch.zeros_like(value) for name, value in self.plain.items()}
        tokens = [int(positions(batch).sum()) for batch in self.data]
        for batch, count in [*zip(self.data, tokens, strict=True)] * samples:
            for name, dots in damage(self.run, [batch], loss=drawn).items():
                squares[name] += (count * dots).square()
        return Neurons({name: value / (2 * samples * sum(tokens)) for name, value in squares.items()})

    def best(self, scores: Neurons, budget: float) -> Neurons:
        return top(scores, allocate(scores, budget, how="global"))

    def curved(self, sign: float) -> Neurons:
        """The gain of reverting one neuron alone to second order is D less its curvature; plus is the control."""
        return Neurons({name: self.plain[name] + sign * self.curvature[name] for name in self.plain})

    def rounds(self, budget: float, count: int) -> Neurons:
        """Spend the budget in equal parts; each sees the model with the parts before it reverted."""
        mask = self.best(self.plain, budget / count)
        for at in range(2, count + 1):
            with rollback(self.run.load(), to=self.run.weights("earlier")[0].tensors, mask=mask):
                now = damage(self.run, self.data, loss=self.loss)
            kept = Neurons({name: now[name].masked_fill(mask[name], 1e30) for name in now})
            mask = self.best(kept, budget * at / count)
        return mask

    def predicted(self, budget: float) -> Choice:
        """Plain D's choice, at the strength where one parabola along its joint δ has its minimum, at most 3.

        The slope is known at the later model (−D) and half way back; a parabola goes through two slopes.
        """
        mask = self.best(self.plain, budget)
        start = sum(float(self.plain[name][mask[name]].sum()) for name in mask)
        with rollback(self.run.load(), to=self.run.weights("earlier")[0].tensors, mask=mask, strength=0.5):
            now = damage(self.run, self.data, loss=self.loss)
        half = 2 * sum(float(now[name][mask[name]].sum()) for name in mask)  # half of δ is left there
        return mask, min(3.0, start / (2 * (start - half))) if start > half else 3.0

    def alone(self, budget: float, most: float) -> Choice:
        """Plain D's choice, each neuron at the best of its own parabola, s · D − s² · curvature, the others fixed."""
        mask = self.best(self.plain, budget)
        return mask, Neurons({n: (self.plain[n] / (2 * self.curvature[n])).clamp(0, most) for n in self.plain})

    def optimal(self, budget: float, most: float, joint: bool = False) -> Choice:
        """Plain D's choice, at the strengths with the least loss."""
        mask = self.best(self.plain, budget)
        return mask, strengths(self.run, self.data, mask, most=most, joint=joint, loss=self.loss)

    def variants(self) -> dict[str, Callable[[float], Choice]]:
        """Name → budget → what to revert, and how far."""
        return {
            "D": lambda b: (self.best(self.plain, b), 1.0),
            "integrated, 2 nodes": lambda b: (self.best(self.integrated[2], b), 1.0),
            "integrated, 4 nodes": lambda b: (self.best(self.integrated[4], b), 1.0),
            "D − own curvature": lambda b: (self.best(self.curved(-1), b), 1.0),
            "D + own curvature": lambda b: (self.best(self.curved(1), b), 1.0),
            "2 rounds": lambda b: (self.rounds(b, 2), 1.0),
            "4 rounds": lambda b: (self.rounds(b, 4), 1.0),
            "D, one strength, one parabola": self.predicted,
            "D, each its own parabola ≤ 2": lambda b: self.alone(b, 2.0),
            "D, one strength ≤ 3": lambda b: self.optimal(b, 3.0, joint=True),
            "D, one strength ≤ 2": lambda b: self.optimal(b, 2.0, joint=True),
            "D, each its own ≤ 1": lambda b: self.optimal(b, 1.0),
            "D, each its own ≤ 2": lambda b: self.optimal(b, 2.0),
            "D, each its own ≤ 3": lambda b: self.optimal(b, 3.0),
            f"D, one strength ≤ 3{ROUNDED}": lambda b: self.optimal(b, 3.0, joint=True),
            f"D, each its own ≤ 2{ROUNDED}": lambda b: self.optimal(b, 2.0),
        }


@contextmanager
def reverted(run: Trajectory, choice: Choice, rounded: bool) -> Iterator[None]:
    """The model rolled back; if asked for, its weights are those that a bf16 folder would hold."""
    model, (mask, strength) = run.load(), choice
    with rollback(model, to=run.weights("earlier")[0].tensors, mask=mask, strength=strength), torch.no_grad():
        kept = {name: p.detach().clone() for name, p in model.named_parameters()} if rounded else {}
        for name, p in model.named_parameters() if rounded else ():
            p.copy_(kept[name].bfloat16())
        yield
        for name, p in model.named_parameters() if rounded else ():
            p.copy_(kept[name])


def measure(folder: Path) -> dict[tuple[str, float], tuple[float, float, float]]:
    """(variant, budget) → recovery, the worst change elsewhere, the mean strength."""
    run = Trajectory(earlier=folder / "math", later=folder / "qa")
    model = run.load(dtype=torch.float32)
    score = evaluator(folder / "data", AutoTokenizer.from_pretrained(folder / "qa"))
    later, earlier = score(model), score(Trajectory(later=run.earlier).load(dtype=torch.float32))
    data = load_prompts(folder / "data" / "math.calibration.jsonl", folder / "qa")
    live = replace(run, model=model)
    found = {}
    for name, choose in Scorer(live, data).variants().items():
        print(f"{folder.name}: {name}", flush=True)
        for budget in BUDGETS:
            mask, strength = choose(budget)
            with reverted(live, (mask, strength), name.endswith(ROUNDED)):
                now = score(model)
            recovery = (now["math"] - later["math"]) / (earlier["math"] - later["math"])
            worst = min(now[domain] - later[domain] for domain in now if domain != "math")
            found[name, budget] = recovery, worst, float(applied(strength, mask).mean())
    return found


def table(seeds: list[dict[tuple[str, float], tuple[float, float, float]]]) -> str:
    """Recovery in %, mean ± standard deviation over seeds; the strengths below where they are not 1."""
    names = dict.fromkeys(name for name, _ in seeds[0])
    lines = ["| variant | " + " | ".join(f"{100 * b:g} %" for b in BUDGETS) + " | worst Δ elsewhere to 4 % | to 32 % |"]
    lines.append("|---|" + "---|" * (len(BUDGETS) + 2))
    for name in names:
        cells = []
        for budget in BUDGETS:
            values = 100 * np.array([seed[name, budget][0] for seed in seeds])
            strength = float(np.mean([seed[name, budget][2] for seed in seeds]))
            cells.append(
                f"{values.mean():.1f} ± {values.std():.1f}" + (f" (× {strength:.2f})" if strength != 1 else "")
            )
        for end in (0.04, 0.32):
            worst = min(seed[name, budget][1] for seed in seeds for budget in BUDGETS if budget <= end)
            cells.append(f"{100 * worst:+.2f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gains(seeds: list[dict[tuple[str, float], tuple[float, float, float]]]) -> str:
    """What each variant recovers more than plain D at the same budget, in points: mean (least … most over seeds)."""
    names = dict.fromkeys(name for name, _ in seeds[0] if name != "D")
    lines = ["| variant | " + " | ".join(f"{100 * b:g} %" for b in BUDGETS) + " | seeds × budgets above D |"]
    lines.append("|---|" + "---|" * (len(BUDGETS) + 1))
    for name in names:
        cells, above = [], 0
        for budget in BUDGETS:
            values = 100 * np.array([seed[name, budget][0] - seed["D", budget][0] for seed in seeds])
            cells.append(f"{values.mean():+.1f} ({values.min():+.1f} … {values.max():+.1f})")
            above += int((values > 0).sum())
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {above} of {len(seeds) * len(BUDGETS)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure every seed and write the table."""
    seeds, out = asked_for(__doc__)
    found = [measure(folder) for folder in seeds]
    text = (
        f"# Variants of the damage score\n\nRecovery of Math (damaged by QA) in %, mean ± standard deviation over "
        f"{len(found)} seeds, by budget of MLP neurons; Δ in points; float32 unless said; in brackets the mean "
        f"strength where it is not 1. {statement()}\n\n{table(found)}\n\n"
        f"## More than plain D at the same budget\n\n"
        f"In points of recovery, seed by seed: mean (least … most).\n\n{gains(found)}\n"
    )
    (out / "variants.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
