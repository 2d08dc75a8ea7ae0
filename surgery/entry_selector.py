"""EntrySelector: single weights, with every setting there is."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.budget import Allocation, check_budget
from surgery.entries import Entries
from surgery.predictions import Divergence, Loss, check_loss
from surgery.selector_settings import Data, check_how, check_letters, named, signed
from surgery.trajectory import Trajectory
from surgery.units import Units, kinds_of, single
from surgery.weight_selection import (
    ROUNDS,
    by_damage,
    by_letters,
    check_rounds_how,
    name_by_damage,
    name_by_letters,
    over_weights,
)


@dataclass(frozen=True)
class EntrySelector:
    """Single weights, as the other selectors with ``units="weight"`` choose them, and with what only weights have.

    They are ranked by D of each: D_w = g_w · δB,w, the first-order gain of going back in w alone.

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
        loss: for D "kl", "hellinger" or a loss of your own (see ``damage``); ≥ 0, 0 is nothing lost.
        units: whose weights are candidates (see ``find_layout``); None: those of the MLPs and of KV groups, whatever
            the trajectory's units; of the MLPs alone where a model's attention can't be told for certain, of the
            trajectory's own layout where it has one.

    ``select`` raises ValueError where D or A is asked for without data, or C without a base; and as ``damage``.

    Source: ours; D from Proposition 1, A, M and C after the paper's of a neuron.
    """

    budget: float
    rank: str = "D"
    how: Allocation = "global"
    stop: bool = True
    rounds: int = ROUNDS
    loss: Loss | Divergence = "kl"
    units: Units | None = None

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_how(self.how)
        check_loss(self.loss)
        if self.rank == "D":
            check_rounds_how(self.how)
        else:
            check_letters("rank", self.rank)
        if single(self.units):
            raise ValueError(f"units={self.units!r}: here units= says whose weights; leave it out for those of all")
        kinds_of(self.units or "mlp")
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or self.rounds < 1:
            raise ValueError(f"rounds={self.rounds!r}: expected how often D is measured, 1 or more")

    @property
    def name(self) -> str:
        """What a table calls it."""
        if self.rank != "D":
            return named(name_by_letters(self.rank, self.rank, self.how), self.units)
        own = name_by_damage(self.loss)
        if self.rounds != ROUNDS:
            own += f", {self.rounds} round{'s' if self.rounds > 1 else ''}"
        return named(own if self.stop else f"{own}, no stop", self.units)

    def over(self, run: Trajectory) -> Trajectory:
        """The trajectory over the units whose weights are candidates."""
        return over_weights(run, self.units)

    def select(self, run: Trajectory, data: Data | None = None) -> Entries:
        """The mask; ``data`` are prompts of the damaged domain, with responses or without (for M and C none)."""
        run = self.over(run)
        if self.rank != "D":
            return signed(by_letters(run, data, self.budget, self.rank, self.rank, self.how), self, run)
        found = by_damage(run, data, self.budget, stop=self.stop, rounds=self.rounds, loss=self.loss)
        return signed(found, self, run)
