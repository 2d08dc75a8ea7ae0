"""How far back each masked neuron should go: the strengths with the smallest loss, found from its gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from surgery.checkpoints.trajectory import Trajectory
from surgery.devices import fetched
from surgery.layout.sharding import check_one_process
from surgery.layout.slots import Block, Slot
from surgery.live.hooks import collecting
from surgery.live.losses import Divergence, Loss, summed, tokens_in
from surgery.live.prompts import Batch, each
from surgery.masks.edits import Edit
from surgery.masks.mask import Mask, checked
from surgery.masks.neurons import Neurons
from surgery.reverting.rollback import rollback
from surgery.reverting.writing import MOST
from surgery.scores.damage import answered, check_wide

_STILL = 1e-3  # no strength moves further than this: the search has ended


def strengths(
    run: Trajectory,
    data: Iterable[Batch],
    mask: Mask,
    *,
    most: float = 2.0,
    passes: int = 16,
    loss: Loss | Divergence = "hellinger",
) -> Neurons:
    """How far back each masked neuron should go, s = argmin of L(θB − Σ_n s_n δB,n) over s in [0, most].

    One pass over the data gives the gradient by all strengths at once, ∂L/∂s_n = −⟨∇L, δB,n⟩. Two gradients give a
    curvature, and with it the next point (Barzilai and Borwein's step, clipped at the bounds). On a quadratic loss
    these steps lead to the optimum without any Hessian. The search starts from no reversal and full reversal, and it
    returns the point with the smallest loss: on these prompts (with ``most`` ≥ 1) never worse than ``strength=1``.

    The optimum often lies beyond 1, past the earlier values, because a few neurons have to make up for the loss of all.

    Args:
        run: a trajectory with ``earlier`` and ``later``; the later model has to be float32 or wider, because 16-bit
            dtypes have few values between two checkpoints: call run.load(dtype=torch.float32) first.
        data: batches of the damaged domain, as for ``damage``.
        mask: what is to be reverted. With Entries, all masked weights of a neuron have the same strength.
        most: the furthest that a neuron may go, in (0, 3]; 1 never goes past the earlier values.
        passes: forward and backward passes over the data, at least 2.
        loss: "hellinger", "kl" or your own loss (see ``damage``).

    Returns:
        Scores in [0, most], for ``rollback(..., strength=)``; 0 where the mask selects nothing. The losses at all
        points of the search are in ``made_by["strengths"]``.

    Raises:
        ValueError: ``most`` or ``passes`` is out of range, the model is narrower than float32; and as ``damage``.

    Source: ours, from Proposition 1. Barzilai and Borwein, IMA Journal of Numerical Analysis 8 (1988).
    """
    if not 0 < most <= MOST:
        raise ValueError(f"most={most!r}: expected a number in (0, {MOST:g}]")
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 2:
        raise ValueError(f"passes={passes!r}: expected how many passes over the data, 2 or more")
    run.check_whole()
    batches, loss = answered(run, data, loss)
    model = run.load()
    check_one_process(model, "strengths")
    check_wide(model)
    along = _Along(model, run, mask, batches, loss)
    seen = _search(along, most, passes)
    best = min(seen, key=lambda point: point[0])
    told = {"loss": [value for value, _ in seen], "least": best[0], "most": most}
    return Neurons(along.split(best[1].float()), made_by={"strengths": told})


def _search(along: _Along, most: float, passes: int) -> list[tuple[float, Tensor]]:
    """The points that were looked at, each with its loss: none, all, then projected Barzilai-Borwein steps."""
    everything = along.touched.double().clamp(max=most)
    seen: list[tuple[float, Tensor]] = []

    def looked(s: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = along.at(s)
        seen.append((value, s))
        return s, slope

    before, now = looked(torch.zeros_like(everything)), looked(everything)
    if seen[0][0] < seen[1][0]:
        before, now = now, before
    for _ in range(passes - 2):
        moved, turned = now[0] - before[0], now[1] - before[1]
        bend = float(moved @ turned)
        steepest = max(float(now[1].abs().max()), 1e-30)
        step = float(moved @ moved) / bend if bend > 0 else most / steepest  # where it bends down: to the bounds
        s = (now[0] - step * now[1]).clamp(0, most)
        if float((s - now[0]).abs().max()) < _STILL:
            break
        before, now = now, looked(s)
    return seen


class _Along:
    """The loss, and its slope along the way back of every neuron, at any strengths ``[neuron]`` of the whole model.

    δB of the masked numbers is held, in float32; of gradients one tensor's at a time.
    """

    def __init__(self, model: nn.Module, run: Trajectory, mask: Mask, batches: list[Batch], loss: Loss) -> None:
        self.model, self.run, self.mask, self.batches, self.loss = model, run, mask, batches, loss
        self.live, earlier = run.live("earlier", units=checked(mask).units)
        self.sizes = self.live.layout.sizes
        self.steps: dict[tuple[str, Slot], list[tuple[Edit, Tensor, Tensor]]] = {}
        flags = {name: torch.zeros(size, dtype=torch.bool) for name, size in self.sizes.items()}
        for edit in mask.edits(self.live.layout, "the model"):
            flags[edit.block.name][edit.neurons] = True
            now = edit.take(self.live.tensors[edit.slot.tensor]).detach()
            step = now.float() - edit.read(earlier).to(now.device, torch.float32)
            there = replace(edit, index=edit.index.to(now.device))
            self.steps.setdefault((edit.block.name, edit.slot), []).append((there, there.neurons, step))
        self.tokens = tokens_in(batches)
        self.touched = torch.cat(list(flags.values()))
        if not bool(self.touched.any()):
            raise ValueError("the mask selects nothing, so there is no strength to find: pass a larger budget")

    def split(self, s: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.sizes, s.split(list(self.sizes.values())), strict=True))

    def at(self, s: Tensor) -> tuple[float, Tensor]:
        """The loss per token, and its slope: float64 ``[neuron]``."""
        value: Any = 0.0
        slopes: dict[str, Tensor] = {}  # beside the weights

        def take(block: Block, slot: Slot, grad: Tensor, _: Tensor) -> None:
            for edit, neurons, step in self.steps.get((block.name, slot), ()):
                products = (edit.take(grad).float() * step).reshape(len(step), -1).sum(1)
                if block.name not in slopes:
                    slopes[block.name] = torch.zeros(block.neurons, dtype=torch.float64, device=step.device)
                slopes[block.name].index_add_(0, neurons, -products.double() / self.tokens)

        how_far, earlier = Neurons(self.split(s.float())), self.run.tensors("earlier")
        with (
            rollback(self.model, to=earlier, mask=self.mask, strength=how_far, layout=self.live.layout),
            collecting(self.model, self.live.layout, take),
        ):
            for batch in each("gradients", self.batches):
                one = summed(self.loss, self.model, batch)
                one.backward()
                value = value + one.detach().double()
        untouched = {name: torch.zeros(size, dtype=torch.float64) for name, size in self.sizes.items()}
        found, value = torch.cat(list((untouched | fetched(slopes)).values())), float(value)
        if not bool(found.isfinite().all()) or not math.isfinite(value):
            raise ValueError("the loss or its gradient is NaN or infinite on these prompts")
        return value / self.tokens, found
