"""The best single weights by the lowest of their gains on several lots: compared where the weights are, and forgotten.

No number is kept per weight. Of the first lot only the gains above a bar are kept; of the others those of the same
weights. That is exact: a weight whose gain on the first lot is at most the bar can't have a lowest gain above it. So
where enough lowest gains exceed the bar, no other weight is among the best, and where too few do, the bar was too high,
and the lots are measured again with a lower one. On a GPU nothing is waited for until a lot is done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from surgery.checkpoints.opening import Weights
from surgery.checkpoints.trajectory import Trajectory
from surgery.devices import sent
from surgery.layout.slots import Block, Slot
from surgery.live import hooks
from surgery.live.hooks import Unread, as_live, collecting, rows_in
from surgery.live.losses import Loss, summed, tokens_in
from surgery.live.prompts import Batch, each
from surgery.live.resident import with_earlier
from surgery.scores.damage import unrounded
from surgery.scores.weight_places import Places
from surgery.scores.weights import best_of_all
from surgery.units import Units

SAMPLES = 1 << 16  # gains by which the bar is guessed
LEAST = 1e-2  # the fraction looked for by a sample is at least this
ROOM, WIDE = 2, 3e-2  # there is room for so many times the fraction looked for, or times this
DROP = 0.25  # times the lowest gain that was taken is what the next search looks above
SMALL = 1 << 12  # places that there are at least, whatever the fraction is


@dataclass(frozen=True)
class Guess:
    """Which fraction of the weights a search may have to look at, and above which gain (0: by a sample)."""

    reach: float
    bar: float = 0.0


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

    Gradients have the weights' dtype; where a lot takes several passes, the first lot's are summed in it, as torch sums
    gradients, and take its room until the last pass. Products, and sums over the passes of the others, are float32.
    Memory: 20 bytes for each weight that is looked at, some percent of all.

    Args:
        run: a trajectory with ``earlier`` and ``later``.
        lots: batches of the damaged domain, lot by lot.
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
    places, later = Places(live), unrounded(run, live, units)
    begin, room = begin or Guess(1.5 * math.sqrt(count / max(1, places.total))), ROOM
    while True:
        begin = Guess(min(1.0, max(LEAST, begin.reach)), begin.bar)
        first = _Above(places, later, earlier, begin, room)
        _measure(run, live, loss, lots[0], first.add, at_once=True)
        found = first.found()
        if found is None:
            begin, room = Guess(begin.reach, first.reached), 4 * room
            continue
        for lot in lots[1:]:
            found.lower(lot, partial(_measure, run, live, loss, lot))
        best = found.best(count, without)
        if best is not None:
            return best
        begin = Guess(4 * begin.reach)


def _measure(
    run: Trajectory, live: Weights, loss: Loss, lot: list[Batch], add: Callable[..., None], at_once: bool = False
) -> None:
    """Gradients of a lot: handed over pass by pass, or summed with the last pass."""
    last, tokens, model = lot[-1], tokens_in(lot), run.load()
    now: list[Batch] = []

    def take(block: Block, slot: Slot, grad: Tensor, _: Tensor) -> None:
        add(block, slot, grad, tokens)

    with collecting(model, live.layout, take, (lambda: now[-1] is last) if at_once else None):
        for batch in each("gradients", lot):
            now[:] = [batch]
            summed(loss, model, batch).backward()


@dataclass(frozen=True)
class _Order:
    """In which order the numbers of a view lie in memory, and which of the view's numbers, row by row, each is."""

    axes: tuple[int, ...]
    shape: tuple[int, ...]
    steps: tuple[int, ...]

    @classmethod
    def of(cls, view: Tensor) -> _Order:
        strides: tuple[int, ...] = view.stride()
        axes = sorted(range(view.ndim), key=lambda axis: -strides[axis])
        steps = [view.shape[axis + 1 :].numel() for axis in range(view.ndim)]
        return cls(tuple(axes), tuple(view.shape[axis] for axis in axes), tuple(steps[axis] for axis in axes))

    def runs(self, views: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        """Runs of the views' numbers: how many come before, and each view's as float32, on the first one's device."""
        turned = [view.permute(self.axes) for view in views]
        if all(view.is_contiguous() for view in turned):
            turned = [view.view(-1) for view in turned]
        device, inner = views[0].device, turned[0][:1].numel()
        step = max(1, (hooks.CHUNK if device.type == "cpu" else hooks.LARGE) // max(1, inner))
        for at in range(0, len(turned[0]), step):
            yield at * inner, [sent(one[at : at + step], device).to(torch.float32).flatten() for one in turned]

    def some(self, views: list[Tensor], every: int) -> list[Tensor]:
        """Evenly spaced numbers of the views, as they lie in memory."""
        found, count, device = [], views[0].numel(), views[0].device
        for view in views:
            at = torch.arange(min(every // 2, count - 1), count, every, device=view.device)
            found.append(sent(view.permute(self.axes)[_coordinates(at, self.shape)], device).to(torch.float32))
        return found

    def places(self, at: Tensor) -> Tensor:
        """Which of the view's numbers, row by row, those are that lie at some places in memory."""
        if self.axes == tuple(range(len(self.axes))):
            return at
        found = zip(_coordinates(at, self.shape), self.steps, strict=True)
        return torch.stack([one * step for one, step in found]).sum(0)


def _coordinates(at: Tensor, shape: Iterable[int]) -> tuple[Tensor, ...]:
    """Indices into a tensor of that shape from those into its numbers, row by row (``unravel_index`` makes the GPU
    wait)."""
    found: list[Tensor] = []
    for size in reversed(tuple(shape)):
        found, at = [at % size, *found], at // size
    return tuple(found)


def is_waited_for(device: torch.device) -> bool:
    """Whether asking a device how many numbers it found costs nothing but the asking."""
    return device.type == "cpu"


class _Above:
    """The weights whose gain exceeds a bar, as they come, in a room that is taken once.

    Where none is given, the bar is the gain that a fraction of the weights exceeds, by a sample of those seen so far;
    it only rises.
    """

    def __init__(self, places: Places, later: Weights, earlier: Weights, begin: Guess, room: float) -> None:
        self.places, self.later, self.earlier, self.begin, reach = places, later, earlier, begin, begin.reach
        self.device = places.device
        self.every = max(1, places.here // SAMPLES) | 1
        self.room = min(places.here, SMALL + int(room * max(reach, WIDE) * places.here))
        self.part = min(1.0, room * max(reach, 1 / 16))  # of one run of weights, so many may be found on a GPU
        self.where = torch.empty(self.room + 1, dtype=torch.int64, device=self.device)
        self.gains, self.steps = torch.empty(2, self.room + 1, dtype=torch.float32, device=self.device)
        self.bar = torch.full((), begin.bar, dtype=torch.float32, device=self.device)
        self.have = torch.zeros((), dtype=torch.int64, device=self.device)
        self.lost = torch.zeros((), dtype=torch.bool, device=self.device)
        self.spread = {name: torch.zeros((), dtype=torch.float32, device=self.device) for name in places.tensors}
        self.seen: list[Tensor] = []
        self.due, self.reached = 0, begin.bar

    def add(self, block: Block, slot: Slot, grad: Tensor, tokens: int) -> None:
        """Look at the gains of one slot."""
        for part, start in self.places.of(block, slot):
            own = rows_in(part, grad)
            others = (as_live(one, self.places.live, part) for one in (self.later, self.earlier))
            read = (one[:] if isinstance(one, Unread) else one for one in others)  # as much as the gradient is there
            views, order = [own, *(one.detach().reshape(own.shape) for one in read)], _Order.of(own)
            self._raise(order, views, tokens)
            for before, (g, now, then) in order.runs(views):
                steps = now - then
                gains = g * (steps / tokens)
                gains, steps = gains.to(self.device), steps.to(self.device)
                low, high = gains.aminmax()
                self.spread[slot.tensor] = torch.maximum(self.spread[slot.tensor], high - low)
                at, to = self._above(gains)
                self.where[to] = start + order.places(at + before)
                self.gains[to], self.steps[to] = gains[at], steps[at]

    def _raise(self, order: _Order, views: list[Tensor], tokens: int) -> None:
        if self.begin.reach >= 1 or self.begin.bar > 0:
            return
        g, now, then = order.some(views, self.every)
        self.seen.append((g * ((now - then) / tokens)).to(self.device))
        count = sum(map(len, self.seen))
        if count >= self.due:
            self.seen, self.due = [torch.cat(self.seen)], count + count // 8
            wanted = max(1, round(self.begin.reach * count))
            self.bar = torch.maximum(self.bar, self.seen[0].kthvalue(count + 1 - wanted).values)

    def _above(self, gains: Tensor) -> tuple[Tensor, Tensor]:
        """Where in a run the gains are above the bar, and where they are kept; what is beyond the room goes there."""
        flags = gains > self.bar
        if is_waited_for(self.device):
            at = flags.nonzero().flatten()
            found, above = torch.arange(len(at)), torch.tensor(len(at))
        else:
            size = min(len(gains), SMALL + int(self.part * len(gains)))
            found = torch.arange(size, device=self.device)
            at = flags.nonzero_static(size=size, fill_value=-1).flatten()
            above = flags.sum()
            self.lost |= above > size
        to = (found + self.have).masked_fill(at < 0, self.room).clamp(max=self.room)
        self.have += above
        return at.clamp(min=0), to

    def found(self) -> _Few | None:
        """What was kept, in the order of the places; None where the room was too small, on one of the processes."""
        told = torch.stack(
            [self.have.double(), self.lost.double(), self.bar.double(), *map(torch.Tensor.double, self.spread.values())]
        )
        have, lost, self.reached, *spread = told.tolist()
        ranks = self.places.ranks
        wrong = [name for name, one in zip(self.spread, spread, strict=True) if not math.isfinite(one)]
        self.places.check_finite(wrong)
        if int(ranks.sum(torch.tensor(int(lost or have > self.room)))):
            return None
        order = self.where[: int(have)].argsort()
        where = self.where[order]
        return _Few(self.places, where, self.gains[order], self.steps[order], self.reached)


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
                    rows = rows_in(part, grad)
                    at = _coordinates((self.where[low:high] - start).to(rows.device), rows.shape)
                    sums[low:high] += rows[at].to(sums.device, torch.float32)

        measure(add)
        self.lowest = torch.minimum(self.lowest, sums * (self.steps / tokens_in(lot)))

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
