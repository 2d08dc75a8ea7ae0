"""The best single weights by the lowest of their gains on several lots: compared where the weights are, and forgotten.

No number is kept per weight. Of the first lot only the gains above a bar are kept; of the others those of the same
weights. That is exact: a weight whose gain on the first lot is at most the bar can't have a lowest gain above it. So
where enough lowest gains exceed the bar, no other weight is among the best. Where too few do, the bar was too high: the
best so far are kept, and the lots are measured again for the weights between that bar and a lower one. So there is room
for no more than a sixteenth of the weights at once. On a GPU nothing is waited for until a lot is done.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from surgery.checkpoints.opening import Weights
from surgery.checkpoints.trajectory import Trajectory
from surgery.devices import sent
from surgery.layout.slots import Block, Slot
from surgery.live.hooks import collecting, rows_in
from surgery.live.losses import Loss, summed, tokens_in
from surgery.live.prompts import Batch, each
from surgery.live.resident import with_earlier
from surgery.scores.above import Above, Guess, Room, Sample
from surgery.scores.damage import unrounded
from surgery.scores.weight_places import Places, found_in
from surgery.scores.weights import best, best_of_all
from surgery.units import Units

LEAST = 1e-3  # a sample is asked for at least this fraction of the weights
ROOM, SURE = 6, 2  # there is room for so many times the fraction that the last search found, or a sample is asked for,
SPARE = 0.005  # and for this fraction beside
DROP = 1 / 3  # times the lowest gain that was taken is what the next search looks above
SMALL = 1 << 12  # places that there are at least, whatever the fraction is
MOST, STEP = 1 / 16, 0.05  # there is room for no larger fraction than this; and so many more are looked at at a time


@dataclass(frozen=True)
class Best:
    """Which weights are the best (int64, the best first, on the CPU), and where the next search may begin."""

    chosen: Tensor
    next: Guess


def best_of_lots(
    run: Trajectory,
    lots: list[list[Batch]],
    count: int,
    *,
    loss: Loss,
    units: Units,
    without: Tensor,
    begin: Guess | None = None,
) -> Best:
    """The ``count`` weights with the highest positive gains, of each weight the lowest of its gains on several lots.

    The weights with the highest gains on some prompts owe that in part to those prompts. The lowest of two independent
    gains is high only where both are. Ties: the lower block, part and position first.

    Products and sums over passes are float32. Memory: 16 bytes for each weight that there is room for, at most a
    sixteenth of them, and twice as much between two passes, where they are sorted; in the passes over the second lot 20
    for each that is looked at; and some 70 for each of ``count``. Equal gains can't be told apart by a bar: where they
    are more than a sixteenth there is room for all of them.

    Args:
        run: a trajectory with ``earlier`` and ``later``.
        lots: batches of the damaged domain, lot by lot. The first lot is one batch: its gradients are not summed.
        count: how many weights; fewer where fewer have a positive gain on every lot.
        loss: a loss as ``answered`` gives it.
        units: the kinds of unit whose weights are candidates.
        without: positions of weights that are not taken.
        begin: where a search begins (default: with as many weights as if the lots had nothing in common).

    Raises:
        ValueError: as ``damage``; a gradient is NaN or infinite on the first lot, or NaN at a weight looked at then.

    Source: ours.
    """
    live, earlier = with_earlier(run, units)
    (alone,), *others = lots
    places, later = Places(live), unrounded(run, live, units)
    first = _First(places, later, earlier, partial(_measure, run, live, loss, [alone]))
    begin = begin or Guess(math.sqrt(count / max(1, places.total)))
    bar, held = begin.bar, _Held.nothing()
    reach = begin.reach if bar else min(STEP, max(LEAST, begin.reach))
    while True:
        few = first.between(bar, held, reach)
        for lot in others:
            few.lower(lot, partial(_measure, run, live, loss, lot))
        found = few.best(count, without, held)
        del few
        if isinstance(found, Best):
            return found
        looked = found.seen / max(1, places.here)
        reach = min(looked + STEP, max(LEAST, 4 * looked, 4 * reach))
        held, bar = found, 0.0


class _First:
    """The first lot: it may be measured several times, each time for other weights.

    Args:
        measure: takes what gets the gradients of each slot.
    """

    def __init__(
        self, places: Places, later: Weights, earlier: Weights, measure: Callable[[Callable[..., None]], None]
    ) -> None:
        self.places, self.later, self.earlier, self.measure = places, later, earlier, measure
        self.sample: Sample | None = None  # all of it, once there is one

    def between(self, bar: float, held: _Held, reach: float) -> _Few:
        """The weights whose gain exceeds a bar, of those that were not looked at.

        Where that is more than there may be room for, the bar is raised.

        Args:
            bar: 0 for one by a sample.
            held: what was looked at before.
            reach: which fraction of all weights is expected to exceed the bar, or is to by a sample.
        """
        here, given = self.places.here, bar > 0
        most, more = SMALL + int(MOST * here), max(0, reach * here - held.seen)
        room = min(most, SMALL + int((ROOM if given else SURE) * more + SPARE * here))
        while True:
            if not bar and self.sample is not None:
                while (bar := float(self.sample.bar(reach))) >= held.bar > 0:
                    reach += STEP / 2  # the sample knows of none below what was looked at
                bar = min(bar, held.bar)
            rising = None if bar or self.sample is not None else (Sample(here), reach)
            above = Above(self.places, self.later, self.earlier, (bar, held.bar), min(here, room), rising)
            self.measure(above.add)
            came, bar = above.told()
            bar = min(bar, held.bar)
            room = came + came // 16  # gradients may differ a little the next time
            full = torch.tensor([came > above.size, came > above.size and room > most])
            some, much = self.places.ranks.sum(full.long()).tolist()  # on how many processes
            if rising:
                self.sample = rising[0]
            if not some:
                return _Few.of(self.places, above.room, came, bar)
            del above
            if much and given:
                bar, reach, given, room = 0.0, STEP, False, most  # nothing is held yet where a bar is given
            elif much and rising:  # not all of those exceed what the bar is now
                bar, room = min(max(bar, float(rising[0].bar(reach))), held.bar), most


def _measure(run: Trajectory, live: Weights, loss: Loss, lot: list[Batch], add: Callable[..., None]) -> None:
    """Gradients of a lot, handed over pass by pass."""
    tokens, model = tokens_in(lot), run.load()

    def take(block: Block, slot: Slot, grad: Tensor, _: Tensor) -> None:
        add(block, slot, grad, tokens)

    with collecting(model, live.layout, take):
        for batch in each("gradients", lot):
            summed(loss, model, batch).backward()


@dataclass(frozen=True)
class _Held:
    """The best of those weights that were looked at, by ascending places, and the lowest gain of each, on the CPU.

    As many as are looked for, and all that equal the last of them: of several processes' the first are not known yet.
    They were looked at down to ``bar``: no other weight has a gain above it on the first lot.
    """

    where: Tensor
    lowest: Tensor
    bar: float
    seen: int  # how many were looked at

    @classmethod
    def nothing(cls) -> _Held:
        """Before any was looked at."""
        return cls(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float32), math.inf, 0)

    def joined(self, where: Tensor, lowest: Tensor, bar: float, seen: int, count: int) -> _Held:
        """With the best of others: all that exceed a bar, so many."""
        least = lowest[best(lowest, count)[-1:]]  # all equal ones: which come first is told from all processes'
        at = (lowest >= least).nonzero().flatten() if len(least) else least.to(torch.int64)
        where, order = torch.cat([self.where, where[at].cpu()]).sort()
        return _Held(where, torch.cat([self.lowest, lowest[at].cpu()])[order], bar, self.seen + seen)


@dataclass
class _Few:
    """Some weights, by ascending places: the gain of each on the first lot, its δB, and the lowest gain so far.

    No other weight has a gain above ``bar`` on the first lot.
    """

    places: Places
    where: Tensor
    first: Tensor
    steps: Tensor
    bar: float
    lowest: Tensor = field(init=False)

    @classmethod
    def of(cls, places: Places, room: Room, count: int, bar: float) -> _Few:
        """Those in a room, which is given back number by number."""
        room.where, order = room.where[:count].sort()
        room.gains = room.gains[order]
        room.steps = room.steps[order]
        return cls(places, room.where, room.gains, room.steps, bar)

    def __post_init__(self) -> None:
        self.lowest = self.first
        edges = [(key, start, start + part.numbers) for key, part, start in self.places.parts()]
        bounds = torch.tensor([[low, high] for _, low, high in edges], dtype=torch.int64).reshape(-1, 2)
        cuts = torch.searchsorted(self.where, sent(bounds, self.where.device)).tolist()
        self.cuts = {(key, start): (low, high) for (key, start, _), (low, high) in zip(edges, cuts, strict=True)}

    def lower(self, lot: list[Batch], measure: Callable[[Callable[..., None]], None]) -> None:
        """Take another lot's gain where that is lower."""
        sums = torch.zeros_like(self.first)

        def add(block: Block, slot: Slot, grad: Tensor, _: int) -> None:
            for part, start in self.places.of(block, slot):
                low, high = self.cuts[(block.name, slot), start]
                if low < high:
                    found = rows_in(part, grad).take((self.where[low:high] - start).to(grad.device))
                    sums[low:high] += found.to(sums.device, torch.float32)

        measure(add)
        self.lowest = torch.minimum(self.lowest, self.steps * (1 / tokens_in(lot)) * sums)

    def best(self, count: int, without: Tensor, held: _Held) -> Best | _Held:
        """The best of all processes' weights, with those held; or what to hold, if others may be among the best."""
        ranks, places, device = self.places.ranks, self.places, self.where.device
        taken = sent(torch.cat([places.places(without), held.where]), device)  # gradients may differ from pass to pass
        above = self.first > self.bar  # it rose
        at, here = found_in(self.where, taken)
        lowest = self.lowest.index_fill(0, at[here], 0).masked_fill_(~above, 0)
        seen, wrong = torch.stack([above.sum(), (~lowest.isfinite()).sum()]).tolist()
        places.check_finite(["a weight of these"] * wrong)
        held = held.joined(self.where, lowest, self.bar, seen, count)
        bar = float(ranks.gathered(torch.tensor([held.bar], dtype=torch.float64)).max())
        if bar > 0 and int(ranks.sum((held.lowest > bar).sum())) < count:
            return held
        chosen, least = best_of_all(held.lowest, count, places, held.where)
        high = held.seen - int((above & (self.first < DROP * least)).sum())
        return Best(chosen, Guess(int(ranks.sum(torch.tensor(high))) / places.total, DROP * least))
