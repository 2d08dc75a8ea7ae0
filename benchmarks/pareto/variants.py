"""The damage score's variants, as methods of ``benchmarks.pareto``: other estimates, and other lengths of the way back.

Is there a better estimate than the gradient at the later model? D integrated along the way back, D less or plus its own
curvature, a few rounds of select – revert – rescore. And is the earlier value the right place to go back to? One
strength for all or one for each neuron, fitted to the calibration prompts or read off a parabola. All choose as many
neurons as D does. They are computed on a float32 copy, where the way between two checkpoints has points; what they
choose is applied to the live model in its own dtype, as everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import minimize_scalar

from benchmarks.pareto.changes import BUDGETS, VARIANT, Method, Reversal, Setting, wide
from surgery import Neurons, RandomSelector, Trajectory, allocate, damage, rollback, strengths, top
from surgery.live import distillation, earlier_model
from surgery.live.heads import positions
from surgery.live.losses import Divergence, Loss, predicting
from surgery.live.prompts import Batch
from surgery.scores.damage import check_wide
from surgery.units import Units

SAMPLES = 4  # draws of labels for the curvature
Choose = Callable[[Trajectory, list[Batch], float], Reversal]  # the float32 run, calibration prompts, budget


def variants() -> list[Method]:
    """All of them, in the order of the tables."""
    named: dict[str, Choose] = {
        "D (KL), integrated, 2 nodes": lambda run, data, budget: _scored(integrated(run, data, 2), budget),
        "D (KL), integrated, 4 nodes": lambda run, data, budget: _scored(integrated(run, data, 4), budget),
        "D (KL) − own curvature": lambda run, data, budget: _scored(curved(run, data, -1), budget),
        "D (KL) + own curvature": lambda run, data, budget: _scored(curved(run, data, 1), budget),
        "D (KL), 2 rounds": lambda run, data, budget: Reversal(rounds(run, data, budget, 2)),
        "D (KL), 4 rounds": lambda run, data, budget: Reversal(rounds(run, data, budget, 4)),
        "D, 2 rounds": lambda run, data, budget: Reversal(rounds(run, data, budget, 2, "hellinger")),
        "D, 4 rounds": lambda run, data, budget: Reversal(rounds(run, data, budget, 4, "hellinger")),
        "D (KL), one strength, one parabola ≤ 3": lambda run, data, budget: predicted(run, data, budget, 3.0),
        "D (KL), each its own parabola ≤ 2": lambda run, data, budget: alone(run, data, budget, 2.0),
        "D (KL), one strength ≤ 2": lambda run, data, budget: together(run, data, budget, 2.0),
        "D (KL), one strength ≤ 3": lambda run, data, budget: together(run, data, budget, 3.0),
        "D (KL), strengths ≤ 1": lambda run, data, budget: optimal(run, data, budget, 1.0),
        "D (KL), strengths ≤ 3": lambda run, data, budget: optimal(run, data, budget, 3.0),
    }

    def method(name: str, choose: Choose) -> Method:
        def change(setting: Setting, value: float, draw: int) -> Reversal:
            return choose(wide(setting), setting.data, value)

        return Method(name, VARIANT, "β", BUDGETS, change)

    return [method(name, choose) for name, choose in named.items()]


def best(scores: Neurons, budget: float) -> Neurons:
    """The neurons with the highest scores of the whole model, as many as D's selector of neurons takes."""
    return top(scores, allocate(scores, budget, how="global"))


def _scored(scores: Neurons, budget: float) -> Reversal:
    return Reversal(best(scores, budget))


def _loss(run: Trajectory, data: list[Batch], divergence: Divergence = "kl") -> Loss:
    with earlier_model(run) as earlier:
        return distillation(earlier, data, divergence=divergence)


def integrated(
    run: Trajectory, data: list[Batch], nodes: int, divergence: Divergence = "kl", units: Units = "mlp"
) -> Neurons:
    """D along the way back, ∫⟨∇L(θ(t)), δB,n⟩dt from the reverted units to the later ones, by Gauss and Legendre.

    The scores add up to L(θB) − L(θB with all units reverted), but for the jumps of a router on the way.
    """
    loss, model, earlier = _loss(run, data, divergence), run.load(), run.tensors("earlier")
    check_wide(model)
    way, whole = replace(run, later=model), RandomSelector(1.0, units=units).select(run)
    total = {name: torch.zeros(len(every)) for name, every in whole.items()}
    for place, weight in zip(*np.polynomial.legendre.leggauss(nodes), strict=True):
        t = (1 + float(place)) / 2
        with rollback(model, to=earlier, mask=whole, strength=1 - t):
            for name, scores in damage(way, data, loss=loss, units=units).items():
                total[name] += float(weight) / 2 / t * scores  # what is left of δB is t · δB
    return Neurons(total)


def curvature(run: Trajectory, data: list[Batch]) -> Neurons:
    """½ ⟨δB,n, F δB,n⟩, F the Fisher information: (∇ log p(y) · δ_n)² over labels y that the model draws itself."""

    def drawn(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        logits = predicting(model, batch)
        labels = torch.distributions.Categorical(logits=logits.detach()).sample()
        return torch.nn.functional.cross_entropy(logits, labels)

    torch.manual_seed(0)
    tokens = [int(positions(batch).sum()) for batch in data]
    squares: dict[str, torch.Tensor] = {}
    for batch, count in [*zip(data, tokens, strict=True)] * SAMPLES:
        for name, dots in damage(run, [batch], loss=drawn).items():
            squares[name] = squares.get(name, 0) + (count * dots).square()
    return Neurons({name: value / (2 * SAMPLES * sum(tokens)) for name, value in squares.items()})


def curved(run: Trajectory, data: list[Batch], sign: float) -> Neurons:
    """The gain of reverting one neuron alone to second order is D less its curvature; plus is the control."""
    plain, bend = damage(run, data, loss="kl"), curvature(run, data)
    return Neurons({name: plain[name] + sign * bend[name] for name in plain})


def rounds(run: Trajectory, data: list[Batch], budget: float, count: int, divergence: Divergence = "kl") -> Neurons:
    """Spend the budget in equal parts; each sees the model with the parts before it reverted."""
    loss = _loss(run, data, divergence)
    mask = best(damage(run, data, loss=loss), budget / count)
    for at in range(2, count + 1):
        with rollback(run.load(), to=run.tensors("earlier"), mask=mask):
            now = damage(run, data, loss=loss)
        kept = Neurons({name: now[name].masked_fill(mask[name], 1e30) for name in now})
        mask = best(kept, budget * at / count)
    return mask


def predicted(run: Trajectory, data: list[Batch], budget: float, most: float) -> Reversal:
    """D's choice, at the strength where one parabola along its joint δ has its minimum.

    The slope is known at the later model (−D) and half way back; a parabola goes through two slopes.
    """
    loss = _loss(run, data)
    plain = damage(run, data, loss=loss)
    mask = best(plain, budget)
    start = sum(float(plain[name][mask[name]].sum()) for name in mask)
    with rollback(run.load(), to=run.tensors("earlier"), mask=mask, strength=0.5):
        now = damage(run, data, loss=loss)
    half = 2 * sum(float(now[name][mask[name]].sum()) for name in mask)  # half of δ is left there
    return Reversal(mask, min(most, start / (2 * (start - half))) if start > half else most)


def alone(run: Trajectory, data: list[Batch], budget: float, most: float) -> Reversal:
    """D's choice, each neuron at the best of its own parabola, s · D − s² · curvature, the others fixed."""
    plain, bend = damage(run, data, loss="kl"), curvature(run, data)
    furthest = Neurons({name: (plain[name] / (2 * bend[name])).nan_to_num(0).clamp(0, most) for name in plain})
    return Reversal(best(plain, budget), furthest)


def optimal(run: Trajectory, data: list[Batch], budget: float, most: float) -> Reversal:
    """D's choice, at the strengths with the least loss on the prompts."""
    mask = best(damage(run, data, loss="kl"), budget)
    return Reversal(mask, strengths(run, data, mask, most=most, loss="kl"))


def together(run: Trajectory, data: list[Batch], budget: float, most: float) -> Reversal:
    """D's choice, all at the one strength with the least loss on the prompts."""
    loss, mask = _loss(run, data), best(damage(run, data, loss="kl"), budget)
    model, earlier = run.load(), run.tensors("earlier")

    @torch.no_grad()
    def at(strength: float) -> float:
        with rollback(model, to=earlier, mask=mask, strength=float(strength)):
            return sum(float(loss(model, batch)) * int(positions(batch).sum()) for batch in data)

    found = minimize_scalar(at, bounds=(0, most), method="bounded", options={"xatol": 1e-2})
    return Reversal(mask, float(found.x))
