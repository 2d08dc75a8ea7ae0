"""Choosing single weights: by D in rounds, while the loss falls; by M; or at random."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import count
from math import log
from typing import Any

import torch
from torch import Tensor

from surgery.checkpoints.trajectory import Trajectory
from surgery.layout.slots import Layout
from surgery.live.losses import Distillation, Divergence, Loss, mean_loss, tokens_in
from surgery.live.prompts import Batch, batches_of, dealt, joined, together
from surgery.live.resident import staying
from surgery.masks.budget import Allocation
from surgery.masks.entries import Entries, shapes_of
from surgery.progress import steps
from surgery.reverting.rollback import Rollback, rollback
from surgery.scores.above import Guess
from surgery.scores.damage import answered, counting, earlier_answers
from surgery.scores.lots import best_of_lots
from surgery.scores.memory import remember
from surgery.scores.weights import CHUNK, best, chosen, entries_of, entry_magnitude, zeros_on_disk
from surgery.selectors.settings import Data
from surgery.units import Units

ROUNDS = 16
_REACH, _GROWTH = 0.0025, 1.25  # what so many rounds take of the candidates; how much more a round takes than the last
_WIDEST = 0.01  # what a round takes of them at most: a search needs memory for each weight that it takes
_LOT, _PATIENCE = 16, 3  # prompts in a lot; measurements without a smaller loss after which rounds end
_DRAWN = (0x00800000, 0x7F800000)  # the bits of every positive normal float32, from the least to infinity
Point = tuple[int, float]  # how many weights are reverted, and the loss then, on prompts that do not choose


def check_rounds(rounds: int) -> None:
    """Raise ``ValueError`` unless so many rounds can be made."""
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds={rounds!r}: expected how many rounds make 0.25 % of the weights, 1 or more")


def check_rounds_how(how: Allocation) -> None:
    """Raise ``ValueError`` unless D of single weights can be spent so."""
    if how != "global":
        raise ValueError(
            f'how="{how}": D takes the best single weights of the whole model, in rounds; leave how out, or rank by '
            f'M: AMCSelector(budget, rank="M", allocate="M", how="{how}", units="weight")'
        )


def check_magnitude(rank: str, allocate: str) -> None:
    """Raise ``ValueError`` unless letters are those that rank single weights."""
    if (rank, allocate) != ("M", "M"):
        raise ValueError(
            f"rank={rank!r}, allocate={allocate!r}: single weights are ranked by M alone: "
            f'AMCSelector(budget, rank="M", allocate="M", units="weight"). A and C of single weights choose worse '
            f"(benchmarks/results/single-weights.md)"
        )


def by_damage(
    run: Trajectory,
    data: Data | None,
    budget: float,
    *,
    units: Units,
    stop: bool = True,
    rounds: int = ROUNDS,
    loss: Loss | Divergence = "hellinger",
) -> Entries:
    """The best by D of all weights of some units: D_w = g_w · δB,w, the first-order gain of reverting w alone.

    Gains of single weights do not add up, because each is measured with all others in place. So they are taken in many
    small rounds, each of which measures D again with all taken weights reverted. And the highest of a hundred million
    gains owe much to the prompts that they were measured on. So a round measures D on two lots of prompts, drawn anew
    in each round, and counts the lower of a weight's two gains. A weight without a positive gain on both is not taken.
    The first lot is what goes through the model in one pass: of 16 prompts, what 1024 tokens do not hold joins the
    second.

    The first round takes few weights, and each takes a quarter more than the one before, at most 1 % of the candidates;
    ``rounds`` of them make 0.25 % of those. They do not depend on the budget: a larger budget contains a smaller one
    (without ``stop``).

    A quarter of the prompts takes no part. With ``stop`` the number of weights with the smallest loss on those prompts
    is kept. Rounds end where six of them have not lowered it, but not before half of ``rounds``. So a larger budget may
    take fewer, and none are taken if that is the later model itself. The curve is in ``made_by["entries"]``. Fewer than
    16 prompts are not divided: all choose, and all measure.

    A round costs a forward and a backward pass over 32 prompts (or fewer), and every other one a forward pass over the
    prompts that measure.

    Args:
        run: a trajectory with ``earlier`` and ``later``.
        data: prompts of the damaged domain.
        budget: β, the fraction of the candidate weights, in [0, 1]; with ``stop`` the most that may be taken.
        units: the kinds of unit whose weights are candidates (``units_asked``).
        stop: keep only as many as lower the loss.
        rounds: how many rounds make 0.25 % of the candidates, at least 1.
        loss: "hellinger", "kl" or your own loss (see ``damage``), ≥ 0; 0 means that nothing is lost.

    Raises:
        ValueError: ``rounds`` is less than 1, no data, and as ``damage``.

    Source: ours, from Proposition 1.
    """
    check_rounds(rounds)
    if data is None:
        raise ValueError("D is measured on prompts of the damaged domain: pass data=load_prompts(file, tokenizer)")
    path = _path(run, data, loss=loss, rounds=rounds, units=units)
    allowed = round(budget * path.total)
    curve = path.to(allowed, stop)
    count = min(allowed, len(path.taken))
    rounds_done = bisect_left(path.ends, curve[-1][0]) + 1 if curve[-1][0] else 0
    told: dict[str, Any] = {"tokens": path.tokens, "allowed": allowed, "rounds": rounds_done}
    if count < allowed and path.ended:
        told["positive"] = count
    if stop:
        count = min(curve, key=lambda point: (point[1], point[0]))[0]
    told["curve"] = [list(point) for point in curve]
    return entries_of(path.taken[:count], path.shapes).signed({"entries": told})


def by_magnitude(run: Trajectory, budget: float, how: Allocation, units: Units) -> Entries:
    """The most changed of all weights of some units, of the whole model or of each layer its share."""
    flat, (later,) = entry_magnitude(run, units), run.weights("later", units=units)
    shapes = shapes_of(later.layout)
    allowed = round(budget * len(flat))
    mask = entries_of(chosen(flat, shapes, allowed, how), shapes)
    taken = sum(mask.count().values())
    return mask.signed({"entries": {"allowed": allowed, **({"positive": taken} if taken < allowed else {})}})


def at_random(run: Trajectory, budget: float, seed: int, units: Units) -> Entries:
    """Weights of those units, drawn uniformly without replacement; a larger budget contains a smaller one."""
    (later,) = run.weights("later", units=units)
    shapes = shapes_of(later.layout)
    lots = _lots(sum(neurons * width for neurons, width in shapes.values()), seed)
    allowed = round(budget * len(lots))
    return entries_of(best(lots, allowed), shapes).signed({"entries": {"allowed": allowed}})


def _lots(count: int, seed: int) -> Tensor:
    """A positive number for each weight, each of 31 bits and drawn by itself: their order is the order of drawing."""
    lots, generator = zeros_on_disk(count), torch.Generator().manual_seed(seed)
    for start in range(0, count, CHUNK):
        lots[start : start + CHUNK].view(torch.int32).random_(*_DRAWN, generator=generator)
    return lots


@dataclass
class _Path:
    """The order in which weights are taken, as far as it has been asked for."""

    run: Trajectory
    units: Units
    loss: Loss
    rounds: int
    layout: Layout  # of the live model, found once
    shapes: dict[str, tuple[int, int]]
    lots: list[list[Batch]]  # of which each round draws two
    held: list[Batch]  # what measures
    tokens: int  # that count, of all these
    taken: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    ends: list[int] = field(default_factory=list)  # how many weights are taken at the end of each round
    ended: bool = False  # there is nothing left to take
    begin: Guess | None = None  # where the search for a round's weights begins
    losses: dict[int, float] = field(default_factory=dict)  # how many of them are reverted → the loss on ``held``

    @property
    def total(self) -> int:
        return sum(neurons * width for neurons, width in self.shapes.values())

    def to(self, allowed: int, stop: bool) -> list[Point]:
        """Go on until so many weights are taken, or (with ``stop``) the loss has stopped falling; the curve till there.

        The curve is measured at the end of every other round, and at the last weight.
        """
        with staying():
            return self._walked(allowed, stop)

    def _walked(self, allowed: int, stop: bool) -> list[Point]:
        best, since = self._measured(0), 0
        curve = [(0, best)]
        for at in steps("rounds", range(next(n for n in count() if self._end(n) >= allowed))):
            if curve[-1][0] == allowed or (stop and since >= _PATIENCE and at >= self.rounds // 2):
                break
            if at == len(self.ends) and not self._round():
                break
            taken, last = min(self.ends[at], allowed), at + 1 == len(self.ends) and self.ended
            if taken < allowed and at % 2 == 0 and not last:
                continue
            value = self._measured(taken)
            curve.append((taken, value))
            best, since = (value, 0) if value < best else (best, since + 1)
        return curve

    def _end(self, rounds: int) -> int:
        """How many weights so many rounds take, or more where each takes at least one."""
        first = _REACH * (_GROWTH - 1) / (_GROWTH**self.rounds - 1)  # what the first round takes
        growing = min(rounds, 1 + int(log(_WIDEST / first) / log(_GROWTH)))
        return round(self.total * (first * (_GROWTH**growing - 1) / (_GROWTH - 1) + _WIDEST * (rounds - growing)))

    def _round(self) -> bool:
        """Take the next weights; False if there are none."""
        if self.ended:
            return False
        at = len(self.ends)
        wanted = max(1, self._end(at + 1) - len(self.taken))
        with self._reverted(len(self.taken)):
            found = best_of_lots(
                self.run, self._drawn(at), wanted, loss=self.loss, units=self.units, begin=self.begin,
                without=self.taken,  # where the earlier model is stored wider, what is left of them is rounding
            )  # fmt: skip
        self.begin, taken = found.next, len(found.chosen)
        self.ended = taken < wanted
        if taken:
            self.taken = torch.cat([self.taken, found.chosen])
            self.ends.append(len(self.taken))
        return bool(taken)

    def _drawn(self, at: int) -> list[list[Batch]]:
        """The two lots of a round: all are drawn before one is drawn again, each time in another order.

        The first is one pass, of whose gradients no sums are kept: what does not fit into it joins the second.
        """
        pairs = len(self.lots) // 2
        if not pairs:
            return self.lots
        order = torch.randperm(len(self.lots), generator=torch.Generator().manual_seed(at // pairs)).tolist()
        (alone, *more), second = (self.lots[one] for one in order[2 * (at % pairs) :][:2])
        return [[alone], [*more, *second]]

    def _measured(self, count: int) -> float:
        """The loss with the first ``count`` weights reverted, on the prompts that do not choose."""
        if count not in self.losses:
            with self._reverted(count):
                self.losses[count] = mean_loss(self.loss, self.run.load(), self.held)
        return self.losses[count]

    def _reverted(self, count: int) -> Rollback:
        mask = entries_of(self.taken[:count], self.shapes)
        return rollback(self.run.load(), to=self.run.tensors("earlier"), mask=mask, layout=self.layout)


@remember
def _path(run: Trajectory, data: Data, *, loss: Loss | Divergence, rounds: int, units: Units) -> _Path:
    """The way of some prompts, not gone yet: a quarter of them measures, the others are the lots."""
    told = batches_of(data) if callable(loss) else earlier_answers(run, data)
    batches, far = answered(run, counting(dealt(told, _LOT, 8)), loss)
    apart = sum(len(batch["input_ids"]) for batch in batches) >= _LOT
    held = batches[::4] if apart else batches
    choosing = [batch for at, batch in enumerate(batches) if at % 4] if apart else batches
    each = max(1, min(len(choosing) // 2, _LOT // len(choosing[0]["input_ids"])))  # batches in a lot
    lots = [choosing[at : at + each] for at in range(0, len(choosing) - each + 1, each)]
    tokens = tokens_in({id(batch): batch for batch in [*(b for lot in lots for b in lot), *held]}.values())
    *lots, held = (
        far.joined(some) if isinstance(far, Distillation) else [joined(parts) for parts in together(some)]
        for some in (*lots, held)
    )
    (live,) = run.live(units=units)
    return _Path(run, units, far, rounds, live.layout, shapes_of(live.layout), lots, held, tokens)
