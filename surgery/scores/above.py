"""The weights whose gain lies between two bars: each gain is formed where the weight is, compared and forgotten.

On a GPU one kernel does that and reads each number once, and nothing is waited for. Of a model that several GPUs hold
one after the other, the first does it for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from threading import Lock

import torch
from torch import Tensor

from surgery.checkpoints.opening import Weights
from surgery.devices import sent, succeeds, takes_kernel
from surgery.layout.slots import Block, Slot
from surgery.live import hooks
from surgery.live.hooks import Unread, as_live, rows_in
from surgery.scores.tiles import Tiles, on
from surgery.scores.weight_places import Places
from surgery.scores.weights import between

SAMPLES = 1 << 16  # gains by which a bar is guessed


@dataclass(frozen=True)
class Guess:
    """Which fraction of the weights a search has to look at, and above which gain that is (0: by a sample)."""

    reach: float
    bar: float = 0.0


@dataclass
class Room:
    """Where the weights that exceed a bar are kept: their places, gains and δB, as they come, and how many came."""

    where: Tensor  # int64 [room]
    gains: Tensor  # float32 [room]
    steps: Tensor  # float32 [room]
    counts: Tensor  # int64: how many came, also beyond the room; then for each tensor whether a gain is not finite

    @classmethod
    def of(cls, size: int, tensors: int, device: torch.device) -> Room:
        """Room for so many."""
        gains, steps = (torch.empty(size, dtype=torch.float32, device=device) for _ in range(2))
        counts = torch.zeros(1 + tensors, dtype=torch.int64, device=device)
        return cls(torch.empty(size, dtype=torch.int64, device=device), gains, steps, counts)


class Sample:
    """Evenly spaced gains, which tell how many of all weights exceed a bar."""

    def __init__(self, count: int) -> None:
        self.every = max(1, count // SAMPLES) | 1
        self.gains: list[Tensor] = []

    def __len__(self) -> int:
        return sum(map(len, self.gains))

    def add(self, views: list[Tensor], scale: float, device: torch.device) -> None:
        """Some of a slot's gains."""
        g, now, then = _Order.of(views[0]).some(views, self.every)
        self.gains.append((g * ((now - then) * scale)).to(device))

    def bar(self, reach: float) -> Tensor:
        """The gain that about such a fraction of the weights seen so far exceeds, not below 0: float32, no axes."""
        count = len(self)
        wanted = max(1, round(reach * count))
        if wanted >= count:
            return torch.zeros((), dtype=torch.float32, device=self.gains[0].device if count else None)
        self.gains = [torch.cat(self.gains)]
        return self.gains[0].kthvalue(count - wanted).values.clamp(min=0)


class Above:
    """The weights whose gain exceeds a bar and not another one, as they come, in a room that is taken once.

    It is taken with the first gradients, when what the last layer needed for them is gone. Where the lower bar is not
    known, it is the one that a fraction of the weights exceeds, by a sample of those seen so far, and only rises.

    Args:
        places: which weights; later, earlier: what they are and were.
        bars: above which gain, and up to which.
        size: for how many weights there is room.
        rising: a sample to fill, and the fraction of the weights that is to exceed the lower bar.
    """

    def __init__(
        self,
        places: Places,
        later: Weights,
        earlier: Weights,
        bars: tuple[float, float],
        size: int,
        rising: tuple[Sample, float] | None = None,
    ) -> None:
        self.places, self.later, self.earlier, self.device = places, later, earlier, places.device
        self.size, self.rising, self.tensors = size, rising, {name: at for at, name in enumerate(places.tensors)}
        self.bars = torch.tensor(bars, dtype=torch.float32, device=self.device)
        self.due, self.kept, self.lock = 0, 0, Lock()

    @cached_property
    def room(self) -> Room:
        return Room.of(self.size, len(self.tensors), self.device)

    def add(self, block: Block, slot: Slot, grad: Tensor, tokens: int) -> None:
        """Look at the gains of one slot: (gradient / tokens) · (later − earlier)."""
        for part, start in self.places.of(block, slot):
            own = rows_in(part, grad)
            others = (as_live(one, self.places.live, part) for one in (self.later, self.earlier))
            read = (one[:] if isinstance(one, Unread) else one for one in others)  # as much as the gradient is there
            views = [own, *(one.detach().reshape(own.shape) for one in read)]
            if own.numel():
                with self.lock:  # a model that lies on several GPUs has a thread for each of them
                    self._look(views, part.axes, start, 1 / tokens, self.tensors[slot.tensor])

    def _look(self, views: list[Tensor], axes: int, start: int, scale: float, tensor: int) -> None:
        if self.rising:
            self._raise(views, scale, *self.rising)
        if takes_kernel(self.device, _works):
            keep(self.room, [sent(view, self.device) for view in views], axes, self.bars, start, scale, tensor)
        else:
            self._add(views, start, scale, tensor)

    def _raise(self, views: list[Tensor], scale: float, sample: Sample, reach: float) -> None:
        sample.add(views, scale, self.device)
        if len(sample) >= self.due:
            self.due = len(sample) + len(sample) // 8
            self.bars[:1] = torch.maximum(self.bars[:1], sample.bar(reach))

    def _add(self, views: list[Tensor], start: int, scale: float, tensor: int) -> None:
        order = _Order.of(views[0])
        for before, (g, now, then) in order.runs(views):
            steps = now - then
            gains = (steps * scale).mul_(g)
            if not bool(gains.sum().isfinite()) and not bool(gains.isfinite().all()):
                self.room.counts[1 + tensor] = 1
            at = between(gains, self.bars.to(gains.device))
            have, self.kept = self.kept, self.kept + len(at)
            if self.kept <= self.size:
                self.room.where[have : self.kept] = (start + order.places(at + before)).to(self.device)
                self.room.gains[have : self.kept] = gains[at].to(self.device)
                self.room.steps[have : self.kept] = steps[at].to(self.device)

    def told(self) -> tuple[int, float]:
        """How many weights were kept, with those beyond the room, and the lower bar; once, when all were looked at.

        Raises:
            ValueError: a gain is not finite.
        """
        came, *wrong, bar = torch.cat([self.room.counts.double(), self.bars[:1].double()]).tolist()
        self.places.check_finite([name for name, at in self.tensors.items() if wrong[at]])
        return self.kept + int(came), bar


def keep(room: Room, views: Sequence[Tensor], axes: int, bars: Tensor, start: int, scale: float, tensor: int) -> None:
    """Add those of some weights to a room whose gain lies between two bars: one launch of a kernel.

    Args:
        room: a room on the device; what does not fit is counted.
        views: gradient, later and earlier weights there, of any dtype and strides.
        axes: how many of their axes count neurons.
        bars: float32 [2], on the device: above which gain, and up to which.
        start: the place of the views' first number; they are counted row by row.
        scale: what the products are multiplied by.
        tensor: whose they are, in the order of ``room.counts``.
    """
    if (tiles := Tiles.of(views, axes)) is None:  # more axes than a kernel walks
        count = views[0].shape[:axes].numel()
        views = [view.reshape(count, -1) for view in views]
        tiles = Tiles.of(views, 1)
    assert tiles is not None
    _launch(room, views, tiles, bars, start, scale, tensor)


def _launch(
    room: Room, views: Sequence[Tensor], tiles: Tiles, bars: Tensor, start: int, scale: float, tensor: int
) -> None:
    from surgery.scores.kernel import above

    (count, width), (high, lanes) = tiles.shape, tiles.sides
    with on(bars.device):
        above[(-(-count // high) * -(-width // lanes),)](
            *(view.detach() for view in views), bars, room.where, room.gains, room.steps, room.counts,
            len(room.where), tensor, start, scale, *tiles.places(), *tiles.given, **tiles.fixed,
        )  # fmt: skip


@cache
def _works(device: torch.device) -> bool:
    return succeeds(_try, device, "gains of single weights are compared by slower operations, and waited for")


def _try(device: torch.device) -> None:
    """Raise ``RuntimeError`` unless the kernel keeps what it should."""
    room, bars = Room.of(64, 1, device), torch.tensor([1000.0, 3600.0], dtype=torch.float32, device=device)
    views = [torch.arange(64.0, device=device).view(8, 8) * sign for sign in (1, 1, -1)]
    keep(room, views, 1, bars, 7, 0.5, 0)  # 1000 < 0.5 · n · 2 n ≤ 3600 from n = 32 to 60
    wanted, order = torch.arange(32, 61, dtype=torch.float64, device=device), room.where[:29].argsort()
    kept = [one[:29][order].double() for one in (room.where, room.gains, room.steps)]
    if room.counts.tolist() != [29, 0] or not all(map(torch.equal, kept, (wanted + 7, wanted * wanted, 2 * wanted))):
        raise RuntimeError("it does not keep the weights that it should")


def _coordinates(at: Tensor, shape: Iterable[int]) -> tuple[Tensor, ...]:
    """Indices into a tensor of that shape from those into its numbers, row by row (``unravel_index`` makes the GPU
    wait)."""
    found: list[Tensor] = []
    for size in reversed(tuple(shape)):
        found, at = [at % size, *found], at // size
    return tuple(found)


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
