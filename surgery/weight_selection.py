"""EntrySelector: single weights in the order of D, as far as going on still helps, or of the paper's A, M and C."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from surgery.budget import Allocation
from surgery.entries import Entries
from surgery.operators import rollback
from surgery.predictions import Loss, positions
from surgery.scores import remember
from surgery.selection import Data, check_budget, check_how, check_letters, named, over, record
from surgery.trajectory import Trajectory
from surgery.units import Units, kinds_of
from surgery.weight_damage import Gains, entry_gains
from surgery.weight_scores import entry_traits

_FINEST: Units = ("mlp", "kv_group")
_ROUNDS, _HALVINGS = 16, 6
Point = tuple[int, float]  # how many weights are reverted, and the loss then


@dataclass(frozen=True)
class EntrySelector:
    """Revert single weights, ranked by D of each: D_w = g_w · δB,w, the first-order gain of going back in w alone.

    Or by a product of A, M and C of each: M_w = abs(δB,w), C_w = 1 where δA,w and δB,w have opposite signs and else 0,
    A_w that of the weight's neuron; A and M relative to their layer's mean. Those look at no loss: the whole budget is
    taken, and what follows is about D. A weight whose score is not positive is never taken, so there may be fewer.

    Gains of single weights do not add up: each was measured with all others in place. So they are taken in rounds. A
    round takes the best until their gains add up to the loss that is left, which is more than they can give, and then
    D is measured again with all that was taken reverted. The last round takes what is left of the budget. The rounds do
    not depend on the budget: a bigger one contains the smaller (without ``stop``).

    Some number of weights is best, and more of them do harm. With ``stop`` the loss is looked at after each round, and
    with 1/64, 1/32, ... 1/2 and all of the last one reverted; the number with the least loss is kept, none if the later
    model itself has it. That is one forward and backward pass per round and 7 forward passes more, on the same prompts;
    the curve is in ``made_by["entries"]``.

    Args:
        budget: β, the fraction of the candidate weights, in [0, 1]; with ``stop`` the most that may be taken.
        rank: "D", or which of the letters A, M, C make the score, as a product ("AMC", "MC", "A", ...).
        how: "global", or for A, M, C also "proportional" or "uniform": what each layer gives (see ``allocate``).
        stop: of D keep only as many as lower the loss (see above).
        rounds: how often D is measured, at least 1.
        loss: for D another loss than the divergence from the earlier model (see ``damage``); ≥ 0, 0 is nothing lost.
        units: whose weights are candidates (see ``find_layout``); None: those of the MLPs and of KV groups, of the
            MLPs alone where a model's attention can't be told for certain or the trajectory has a layout of its own.

    ``select`` raises ValueError where D or A is asked for without data, or C without a base; and as ``damage``.

    Source: ours; D from Proposition 1, A, M and C after the paper's of a neuron.
    """

    budget: float
    rank: str = "D"
    how: Allocation = "global"
    stop: bool = True
    rounds: int = _ROUNDS
    loss: Loss | None = field(default=None, repr=False, compare=False)
    units: Units | None = None

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_how(self.how)
        if self.rank != "D":
            check_letters("rank", self.rank)
        elif self.how != "global":
            raise ValueError(f"how={self.how!r}: D takes the best single weights of the whole model, in rounds")
        kinds_of(self.units or "mlp")
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or self.rounds < 1:
            raise ValueError(f"rounds={self.rounds!r}: expected how often D is measured, 1 or more")

    @property
    def name(self) -> str:
        """What a table calls it."""
        if self.rank != "D":
            own = f"{'×'.join(self.rank)} of single weights"
            return named(own if self.how == "global" else f"{own} ({self.how})", self.units)
        own = "D of single weights" if self.loss is None else "D (own loss) of single weights"
        if self.rounds != _ROUNDS:
            own += f", {self.rounds} round{'s' if self.rounds > 1 else ''}"
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
        """The mask; ``data`` are prompts of the damaged domain, with responses or without (for M and C none)."""
        if self.rank != "D":
            return self._by_traits(self.over(run), data)
        if data is None:
            raise ValueError("D is measured on prompts of the damaged domain: pass data=load_prompts(file, tokenizer)")
        run = self.over(run)
        path = _path(run, data, loss=self.loss, rounds=self.rounds)
        allowed = round(self.budget * len(path.gains.flat))
        order = path.best(allowed)
        curve = [point for point in path.curve if point[0] <= len(order)]
        told: dict[str, Any] = {"tokens": path.gains.tokens, "allowed": allowed, "rounds": len(path.curve)}
        if len(order) < allowed:
            told["positive"] = len(order)
        if self.stop:
            curve += _tried(run, path.gains, order, curve[-1][0])
            order = order[: min(curve, key=lambda point: (point[1], point[0]))[0]]
        told["curve"] = [list(point) for point in curve]
        mask = path.gains.entries(order)
        return Entries(mask, shapes=mask.shapes, made_by={"entries": told, **record(self, run)})

    def _by_traits(self, run: Trajectory, data: Data | None) -> Entries:
        traits = entry_traits(run, data if "A" in self.rank else None, self.rank)
        allowed = round(self.budget * len(traits.flat))
        mask = traits.entries(traits.best(allowed, self.how))
        taken = sum(mask.count().values())
        told = {"allowed": allowed, **({"positive": taken} if taken < allowed else {})}
        return Entries(mask, shapes=mask.shapes, made_by={"entries": told, **traits.told, **record(self, run)})


@dataclass(frozen=True)
class _Path:
    """The order in which weights are taken: those of all rounds but the last, then the best of the last one's gains."""

    taken: Tensor
    curve: list[Point]  # at the start of each round
    gains: Gains  # of the last round

    def best(self, count: int) -> Tensor:
        if count <= len(self.taken):
            return self.taken[:count]
        return torch.cat([self.taken, self.gains.best(count - len(self.taken))])


@remember
def _path(run: Trajectory, data: Data, *, loss: Loss | None, rounds: int) -> _Path:
    gains = entry_gains(run, data, loss=loss)
    run = replace(run, model=gains.model)
    taken, curve = torch.zeros(0, dtype=torch.int64), [(0, gains.value)]
    for _ in range(rounds - 1):
        best = gains.best(max(1, gains.worth(gains.value)))
        if not len(best) or gains.value <= 0:
            break
        taken = torch.cat([taken, best])
        with rollback(gains.model, to=run.source("earlier"), mask=gains.entries(taken), layout=run.layout):
            gains = entry_gains(run, gains.batches, loss=gains.loss)
        gains.flat[taken] = 0  # where the earlier model is stored wider, what is left is rounding
        curve.append((len(taken), gains.value))
    return _Path(taken, curve, gains)


def _tried(run: Trajectory, gains: Gains, order: Tensor, start: int) -> list[Point]:
    """The loss with more and more reverted, from ``start`` to all of them."""
    found = []
    for count in sorted({start + round((len(order) - start) / 2**at) for at in range(_HALVINGS + 1)} - {start}):
        with rollback(gains.model, to=run.source("earlier"), mask=gains.entries(order[:count]), layout=run.layout):
            found.append((count, _mean(gains)))
    return found


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
