"""D and M of every single weight, in files and not in memory, and the best of them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from surgery.checkpoints.opening import Weights
from surgery.checkpoints.trajectory import Trajectory, check_finite, displacements
from surgery.layout.sharding import ALONE, Ranks
from surgery.layout.slots import Block, Slot
from surgery.live.hooks import as_live, collecting, in_runs, rows_in
from surgery.live.losses import Divergence, Loss, summed, tokens_in
from surgery.live.prompts import Batch, each
from surgery.masks.budget import Allocation, share
from surgery.masks.entries import Entries, shapes_of
from surgery.scores.damage import answered, unrounded
from surgery.scores.memory import remembering
from surgery.scores.weight_places import Places, starts_of
from surgery.units import Units


def zeros_on_disk(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros ``[count]`` in a file (in ``TMPDIR``) whose name is gone already: its room goes with the tensor.

    They lie in the page cache, not in anonymous memory. The room is taken now: where the disk is full that is an error
    here, and no crash at some later write.
    """
    size = max(count, 1) * dtype.itemsize
    with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
        path = Path(folder) / "numbers"
        with open(path, "wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        return torch.from_file(str(path), shared=True, size=count, dtype=dtype)


CHUNK = 1 << 18  # scores that are looked at at a time
LAST = (1 << 16) - 1
_HIGHEST = (1 << 31) - 1


def best(flat: Tensor, count: int) -> Tensor:
    """Where the ``count`` highest positive numbers of ``flat`` lie, int64, the highest first (fewer if too few).

    Ties: the lower block, part and position first. So the first m of them are the best m. Where few are wanted, a
    sample tells about how high they are, and one pass finds them; where that finds too few, or many are wanted, the
    exact threshold is found first.
    """
    count = min(count, len(flat))
    found = _above(flat, _guess(flat, count), 4 * count + 1000) if count else None
    if found is None or len(found[0]) < count:
        found = _above(flat, *_threshold(flat, count))
    assert found is not None
    places, held = found
    return places[held.sort(descending=True, stable=True).indices[:count]]


_SAMPLE = 1 << 18  # how many numbers it looks at, at most


def best_of_all(flat: Tensor, count: int, places: Places, where: Tensor | None = None) -> tuple[Tensor, float]:
    """``best`` of the numbers of all processes, on each of them: their positions (on the CPU), and the least number.

    They find the threshold together, by a histogram that they add up. Then each tells which of its own exceed it.

    Args:
        flat: the numbers; count: how many of them.
        places: whose numbers they are; where: the place of each, ascending (default: ``flat`` has all of them).
    """

    def positions(at: Tensor) -> Tensor:
        return places.positions((at if where is None else where[at]).cpu())

    if not places.shared:
        found = best(flat, count)
        return positions(found), float(flat[found[-1]]) if len(found) else 0.0
    bits, _, equal = _threshold(flat, min(count, places.total), places.ranks)
    above = _above(flat, bits, count)
    assert above is not None
    ties = [(some == bits).nonzero().flatten() + start for start, _, some in _chunks(flat)] if equal else []
    which = positions(torch.cat([torch.zeros(0, dtype=torch.int64, device=flat.device), *ties])).sort().values[:equal]
    same = places.ranks.gathered(which).sort().values[:equal]
    higher, values = places.ranks.gathered(positions(above[0])), places.ranks.gathered(above[1].cpu())
    order = higher.argsort()
    order = order[values[order].sort(descending=True, stable=True).indices]
    least = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    return torch.cat([higher[order], same]), float(least) if count else 0.0


def _guess(flat: Tensor, count: int) -> int:
    """The bits of a number below which the ``count`` highest hardly lie, from a sample; 0 where it can't tell."""
    step = max(64, -(-len(flat) // _SAMPLE))
    wanted, sample = 1.2 * count / step + 50, flat[::step].view(torch.int32)
    if wanted >= len(sample) / 4:
        return 0
    return max(0, int(sample.topk(int(wanted)).values[-1]) - 1)


def _above(flat: Tensor, threshold: int, room: int, equal: int = 0) -> tuple[Tensor, Tensor] | None:
    """Where the numbers lie whose bits exceed the threshold, in their order, and the numbers; None if there is no room.

    With them come the first ``equal`` of those that equal it. The room is taken once: small results between large
    temporary ones would leave holes in memory.
    """
    size, have = min(room, len(flat)), 0
    found, held = (torch.empty(size, dtype=one, device=flat.device) for one in (torch.int64, torch.float32))
    for start, chunk, bits in _chunks(flat):
        places = exceeding(bits, threshold)
        if equal:
            ties = (bits == threshold).nonzero().flatten()[:equal]
            places = torch.cat([places, ties]).sort().values
            equal -= len(ties)
        if have + len(places) > len(found):
            return None
        found[have : have + len(places)] = places + start
        held[have : have + len(places)] = chunk[places]
        have += len(places)
    return found[:have], held[:have]


def exceeding(numbers: Tensor, bar: Tensor | int) -> Tensor:
    """Where numbers in a row exceed a bar, int64, ascending; a GPU is waited for."""
    if numbers.device.type == "cpu":  # six times as fast as torch there
        limit = bar.numpy() if isinstance(bar, Tensor) else bar
        return torch.from_numpy(np.flatnonzero(numbers.numpy() > limit))
    return (numbers > bar).nonzero().flatten()


def between(numbers: Tensor, bars: Tensor) -> Tensor:
    """Where numbers in a row exceed one bar and not the other, int64, ascending; a GPU is waited for."""
    at = exceeding(numbers, bars[0])
    return at[numbers[at] <= bars[1]]


def positive(flat: Tensor) -> int:
    """How many numbers are positive."""
    return sum(int((bits > 0).sum()) for _, _, bits in _chunks(flat))


def entries_of(chosen: Tensor, shapes: dict[str, tuple[int, int]]) -> Entries:
    """Indices into the numbers of all parts, one after the other, as a mask."""
    starts = starts_of(shapes)
    edges = torch.tensor([*starts.values(), sum(neurons * width for neurons, width in shapes.values())])
    chosen = chosen.sort().values
    cuts = torch.searchsorted(chosen, edges).diff().tolist()
    parts = zip(starts.items(), chosen.split(cuts), strict=True)
    return Entries({part: found - first for (part, first), found in parts}, shapes=shapes)


def _chunks(flat: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Runs of the numbers, and their bits as integers: positive floats are ordered as those, all others are ≤ 0."""
    step = CHUNK if flat.device.type == "cpu" else max(1, len(flat))
    for start in range(0, len(flat), step):
        chunk = flat[start : start + step]
        yield start, chunk, chunk.view(torch.int32)


def _histogram(flat: Tensor, prefix: int | None) -> Tensor:
    """How many positive numbers there are per value of 16 bits: the upper ones, or those after a prefix.

    From the highest value to the lowest: ``[65536]``, float64.
    """
    found = torch.zeros(1 << 16, dtype=torch.float64, device=flat.device)
    for _, _, bits in _chunks(flat):
        held = bits[bits > 0 if prefix is None else (bits > 0) & (bits >> 16 == prefix)]
        found += torch.bincount(held >> 16 if prefix is None else held & 0xFFFF, minlength=1 << 16)
    return found.flip(0)


def _threshold(flat: Tensor, count: int, ranks: Ranks = ALONE) -> tuple[int, int, int]:
    """The bits of the ``count``-th highest positive number, how many numbers that takes, and how many equal it of them.

    (0, how many are positive, 0) where there are fewer positive ones. Two passes: one over the upper halves of the
    bits, one over the lower.
    """
    if not count:
        return _HIGHEST, 0, 0
    prefix, above = None, 0.0
    for _ in range(2):
        counts = ranks.sum(_histogram(flat, prefix))
        reached = counts.cumsum(0) + above
        if reached[-1] < count:
            return 0, int(reached[-1]), 0
        at = int(torch.searchsorted(reached, count))  # the first bin from the top with which there are enough
        above = float(reached[at] - counts[at])
        prefix = (prefix or 0) << 16 | LAST - at
    return prefix or 0, count, count - int(above)


@dataclass(frozen=True)
class Gains:
    """D of every candidate weight, and what it was measured with.

    ``flat``: float32 ``[weight]``, part after part in the order of ``shapes``, mapped from a temporary file. Of a model
    that several processes hold, those of this process.
    """

    flat: Tensor
    shapes: dict[str, tuple[int, int]]
    model: nn.Module
    loss: Loss
    batches: list[Batch]
    tokens: int
    value: float  # the loss at the later model
    places: Places | None = None  # where several processes hold the model: which of all weights ``flat`` is of

    def best(self, count: int) -> Tensor:
        """Which weights have the ``count`` highest positive gains (see ``surgery.scores.weights.best``)."""
        return best(self.flat, count) if self.places is None else best_of_all(self.flat, count, self.places)[0]

    def entries(self, chosen: Tensor) -> Entries:
        """Indices into ``flat`` as a mask."""
        return entries_of(chosen, self.shapes)


def entry_gains(
    run: Trajectory, data: Iterable[Batch], *, loss: Loss | Divergence = "hellinger", units: Units = "mlp"
) -> Gains:
    """D of single weights: D_w = (Σ over batches of g_w) · δB,w, the first-order gain of reverting weight w.

    Args:
        run: a trajectory with ``earlier`` and ``later``.
        data: batches of the damaged domain, as for ``damage``.
        loss: as for ``damage``.
        units: the kinds of unit whose weights are candidates.

    Returns:
        Gains of either sign in the loss's unit; those of a neuron add up to its ``damage``. Products and sums are
        float32, kept in a temporary file of 4 bytes a weight (in ``TMPDIR``), not in memory.

    Raises:
        ValueError: as ``damage``; a gradient is NaN or infinite.
        OSError: there is no room for the file.

    Source: ours, from Proposition 1.
    """
    batches, loss = answered(run, data, loss)
    model = run.load()
    live, earlier = run.live("earlier", units=units)
    places = Places(live)
    flat = zeros_on_disk(places.here)

    def add(block: Block, slot: Slot, grad: Tensor, _: Tensor) -> None:
        for part, start in places.of(block, slot):
            for before, (g,) in in_runs(part, rows_in(part, grad)):
                at = start + before * g.shape[1]
                flat[at : at + g.numel()] += g.flatten().cpu()

    tokens = tokens_in(batches)
    value: Any = 0.0
    with collecting(model, live.layout, add):
        for batch in each("gradients", batches):
            one = summed(loss, model, batch)
            one.backward()
            value = value + one.detach().double()
    _times_change(flat, places, unrounded(run, live, units), earlier, tokens)
    value = places.ranks.same(float(value) / tokens)
    return Gains(flat, places.shapes, model, loss, batches, tokens, value, places if places.shared else None)


def _times_change(flat: Tensor, places: Places, later: Weights, earlier: Weights, tokens: int) -> None:
    """Turn the gradients' sums into gains per token, in place."""
    live, wrong = places.live, []
    slots = ((block, slot) for block in live.layout.blocks for slot in block.slots)
    for (_, slot), part, start in ((one, *found) for one in slots for found in places.of(*one)):
        for before, (now, then) in in_runs(part, as_live(later, live, part), as_live(earlier, live, part)):
            at = start + before * now.shape[1]
            gains = flat[at : at + now.numel()]
            gains *= ((now - then) * (1 / tokens)).flatten().cpu()
            if not bool(gains.sum().isfinite()) and not bool(gains.isfinite().all()):
                wrong.append(slot.tensor)
    places.check_finite(wrong)


_Shapes = dict[str, tuple[int, int]]


@remembering(live=False)
def entry_magnitude(run: Trajectory, units: Units = "mlp") -> Tensor:
    """M of single weights: M_w = abs(δB,w), divided by the mean of its layer (of an MLP block or an attention).

    Args:
        run: a trajectory with ``earlier`` and ``later``.
        units: the kinds of unit whose weights are candidates.

    Returns:
        float32 ``[weight]`` ≥ 0, part after part as in ``shapes_of(layout)``, mapped from a temporary file of 4 bytes a
        weight (in ``TMPDIR``) that is deleted with the tensor. One chunk of each checkpoint is in memory at a time.

    Raises:
        ValueError: as ``magnitude``. OSError: there is no room for the file.

    Source: ours, after the paper's M of a neuron.
    """
    (later,) = run.weights("later", units=units)
    shapes, means = shapes_of(later.layout), _means(run, units)
    flat, starts = zeros_on_disk(sum(neurons * width for neurons, width in shapes.values())), starts_of(shapes)
    for name, part, start, step in _steps(run, units):
        at = starts[f"{name}/{part}"] + start * step.shape[1]
        flat[at : at + step.numel()] = (step.abs() / (means[name] or 1.0)).flatten()
    return flat


def chosen(flat: Tensor, shapes: _Shapes, count: int, how: Allocation) -> Tensor:
    """Where the ``count`` highest positive scores lie: of the whole model ("global"), or of each layer its share.

    Divided by its mean, every layer's M adds up to the number of its weights. So "proportional" and "uniform" are one:
    each layer gives the same fraction of its weights, and where it has fewer positive ones the others give the rest.
    """
    if how == "global":
        return best(flat, count)
    spans = _blocks(shapes)
    room = {name: positive(flat[low:high]) for name, (low, high) in spans.items()}
    claims = {name: float(high - low) for name, (low, high) in spans.items()}
    counts = share(min(count, sum(room.values())), claims, room)
    found = [best(flat[low:high], counts[name]) + low for name, (low, high) in spans.items()]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *found])


def _blocks(shapes: _Shapes) -> dict[str, tuple[int, int]]:
    """Where each block's scores lie among those of all parts."""
    found: dict[str, tuple[int, int]] = {}
    for part, start in starts_of(shapes).items():
        block, stop = part.rpartition("/")[0], start + shapes[part][0] * shapes[part][1]
        found[block] = found.get(block, (start, stop))[0], stop
    return found


def _steps(run: Trajectory, units: Units) -> Iterator[tuple[str, str, int, Tensor]]:
    """Block, part, first neuron and δB of each piece; all finite."""
    for name, part, start, _, (step,) in displacements(run, "earlier", "later", units=units):
        if not bool(step.sum().isfinite()):
            check_finite(run, "earlier", "later", units=units)
        yield name, part, start, step


def _means(run: Trajectory, units: Units) -> dict[str, float]:
    """The mean of abs(δB) over each block's weights."""
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for name, _, _, step in _steps(run, units):
        sums[name] = sums.get(name, 0.0) + float(step.abs().double().sum())
        counts[name] = counts.get(name, 0) + step.numel()
    return {name: total / counts[name] for name, total in sums.items()}
