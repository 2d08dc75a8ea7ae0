"""EntrySelector: single weights in the order of D, and only as far as going on still helps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from surgery.entries import Entries
from surgery.gains import Gains, entry_gains
from surgery.operators import rollback
from surgery.predictions import Loss, positions
from surgery.selection import Data, check_budget, named, over, record
from surgery.trajectory import Trajectory
from surgery.units import Units, kinds_of

_FINEST: Units = ("mlp", "kv_group")
_HALVINGS = 6


@dataclass(frozen=True)
class EntrySelector:
    """Revert single weights, ranked by D of each: D_w = g_w · δB,w, the first-order gain of going back in w alone.

    Weights whose gain is not positive are never taken, so there may be fewer than the budget allows. A first-order
    gain is too good to be true for many weights at once: each was measured with all others in place, so that at some
    point more of them do harm (docs/explanation/limits.md). ``stop`` guards against that: the loss is measured with
    the best 1/64, 1/32, ... 1/2 and all of the budget reverted, forward passes on the same prompts, and the number
    with the least loss is kept, none if the later model itself has it. 7 forward passes per batch beside the forward
    and backward pass for D; the curve is in ``made_by["entries"]``.

    Args:
        budget: β, the fraction of the candidate weights, in [0, 1]; with ``stop`` the most that may be taken.
        stop: keep only as many as lower the loss (see above).
        loss: another loss than the divergence from the earlier model (see ``damage``).
        units: whose weights are candidates (see ``find_layout``); None: those of the MLPs and of KV groups, of the
            MLPs alone where a model's attention can't be told for certain or the trajectory has a layout of its own.

    ``select`` raises ValueError without data, and as ``damage``.

    Source: ours, from Proposition 1.
    """

    budget: float
    stop: bool = True
    loss: Loss | None = field(default=None, repr=False, compare=False)
    units: Units | None = None

    def __post_init__(self) -> None:
        check_budget(self.budget)
        kinds_of(self.units or "mlp")

    @property
    def name(self) -> str:
        """What a table calls it."""
        own = "D of single weights" if self.loss is None else "D (own loss) of single weights"
        return named(own if self.stop else f"{own}, no stop", self.units)

    def over(self, run: Trajectory) -> Trajectory:
        """The trajectory over the units whose weights are candidates."""
        if self.units is not None or run.layout is not None:
            return over(run, self.units)
        finest = over(run, _FINEST)
        try:
            finest.weights("later")
        except ValueError:
            return over(run, "mlp")
        return finest

    def select(self, run: Trajectory, data: Data | None = None) -> Entries:
        """The mask; ``data`` are prompts of the damaged domain, with responses or without."""
        if data is None:
            raise ValueError("D is measured on prompts of the damaged domain: pass data=load_prompts(file, tokenizer)")
        run = self.over(run)
        gains = entry_gains(run, data, loss=self.loss)
        allowed = round(self.budget * len(gains.flat))
        order = gains.best(allowed)
        told: dict[str, Any] = {"tokens": gains.tokens, "loss": gains.value, "allowed": allowed}
        if len(order) < allowed:
            told["positive"] = len(order)
        if self.stop:
            curve = _curve(run, gains, order)
            told |= {"curve": [list(point) for point in curve], "forward_passes": (len(curve) - 1) * len(gains.batches)}
            order = order[: min(curve, key=lambda point: (point[1], point[0]))[0]]
        mask = gains.entries(order)
        return Entries(mask, shapes=mask.shapes, made_by={"entries": told, **record(self, run)})


def _curve(run: Trajectory, gains: Gains, order: Tensor) -> list[tuple[int, float]]:
    """(how many of the best are reverted, the loss then), from none to all of them."""
    halves = sorted({round(len(order) / 2**at) for at in range(_HALVINGS + 1)} - {0})
    curve = [(0, gains.value)]
    for count in halves:
        with rollback(gains.model, to=run.source("earlier"), mask=gains.entries(order[:count]), layout=run.layout):
            curve.append((count, _mean(gains)))
    return curve


def _mean(gains: Gains) -> float:
    """The loss of the model as it is now, per token."""
    training, total = gains.model.training, 0.0
    gains.model.eval()
    try:
        with torch.no_grad():
            for batch in gains.batches:
                total += float(gains.loss(gains.model, batch)) * int(positions(batch).sum())
    finally:
        gains.model.train(training)
    return total / gains.tokens
