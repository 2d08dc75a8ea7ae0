"""The best single weights by the lowest of their gains on several lots: compared where the weights are, and forgotten.

No number is kept per weight. Of the first lot only the gains above a bar are kept; of the others those of the same
weights. That is exact: a weight whose gain on the first lot is at most the bar can't have a lowest gain above it. So
where enough lowest gains exceed the bar, no other weight is among the best, and where too few do, the bar was too high,
and the lots are measured again with a lower one. On a GPU nothing is waited for until a lot is done.
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
from surgery.scores.above import Above, Guess, Room
from surgery.scores.damage import unrounded
from surgery.scores.weight_places import Places
from surgery.scores.weights import best_of_all
from surgery.units import Units

LEAST = 3e-3  # the fraction looked for is at least this
ROOM, SPARE = 2, 0.015  # there is room for so many times the fraction looked for, and for this beside
DROP = 0.25  # times the lowest gain that was taken is what the next search looks above
SMALL = 1 << 12  # places that there are at least, whatever the fraction is


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

    Products and sums over passes are float32. Memory: 16 bytes for each weight that there is room for: twice as many as
    are expected to be looked at, and 1.5 % of all. After the first lot 24 for each that is looked at.

    Args:
        run: a trajectory with ``earlier`` and ``later``.
        lots: batches of the damaged domain, lot by lot. The first lot is one batch: its gradients are not summed.
        count: how many weights; fewer where fewer have a positive gain on every lot.
        loss: a loss as ``answered`` gives it.
        units: the kinds of unit whose weights are candidates.
        without: positions of weights that are not taken.
        begin: where a search begins (default: with as many weights as if the lots had nothing in common).

    Raises:
        ValueError: as ``damage``; a gradient is NaN or infinite.

    Source: ours.
    """
    live, earlier = with_earlier(run, units)
    (alone,), *others = lots
    places, later, room = Places(live), unrounded(run, live, units), 0
    begin = begin or Guess(1.5 * math.sqrt(count / max(1, places.total)))
    while True:
        begin = Guess(min(1.0, max(LEAST, begin.reach)), begin.bar)
        size = SMALL + max(room, int((ROOM * begin.reach + SPARE) * places.here))
        above = Above(places, later, earlier, begin, min(places.here, size))
        _measure(run, live, loss, [alone], above.add)
        came, bar = above.told()
        short = int(places.ranks.sum(torch.tensor(int(came > above.size))))  # on how many processes
        few = None if short else _Few.of(places, above.room, came, bar)
        del above
        if few is None:  # gradients may differ a little the next time
            begin, room = Guess(begin.reach, bar), came + came // 16
            continue
        for lot in others:
            few.lower(lot, partial(_measure, run, live, loss, lot))
        best = few.best(count, without)
        if best is not None:
            return best
        del few
        begin, room = Guess(4 * begin.reach), 0


def _measure(run: Trajectory, live: Weights, loss: Loss, lot: list[Batch], add: Callable[..., None]) -> None:
    """Gradients of a lot, handed over pass by pass."""
    tokens, model = tokens_in(lot), run.load()

    def take(block: Block, slot: Slot, grad: Tensor, _: Tensor) -> None:
        add(block, slot, grad, tokens)

    with collecting(model, live.layout, take):
        for batch in each("gradients", lot):
            summed(loss, model, batch).backward()


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
        """Those in a room."""
        where, order = room.where[:count].sort()
        room.where = where  # the room is given back
        return cls(places, where, room.gains[order], room.steps[order], bar)

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

    def best(self, count: int, without: Tensor) -> Best | None:
        """The best of all processes' weights; None where one that was not looked at may be among them."""
        ranks, places, device = self.places.ranks, self.places, self.where.device
        taken = sent(places.places(without), device)
        lowest = self.lowest.masked_fill(torch.isin(self.where, taken), 0)
        bar = float(ranks.gathered(torch.tensor([self.bar], dtype=torch.float64)).max())
        told = torch.stack([(lowest > bar).sum(), (~lowest.isfinite()).sum()]).tolist()
        places.check_finite(["a weight of these"] * told[1])
        if bar > 0 and int(ranks.sum(torch.tensor(told[0]))) < count:
            return None
        chosen, least = best_of_all(lowest, count, places, self.where)
        above = int(ranks.sum((self.first >= DROP * least).sum().cpu())) if least > 0 else places.total
        return Best(chosen, Guess(above / places.total, DROP * least))
