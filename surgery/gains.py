"""D of every single weight: gradients summed in a file, and the best of all of them found with bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from surgery.attribution import answered
from surgery.backward import as_live, collecting, in_runs, zeros_on_disk
from surgery.entries import Entries, shapes_of
from surgery.predictions import Loss, positions
from surgery.prompts import Batch
from surgery.slots import Block, Slot
from surgery.trajectory import Trajectory, Weights, open_weights

CHUNK = 1 << 18  # scores that are looked at at a time
_LAST = (1 << 16) - 1
_HIGHEST = (1 << 31) - 1


@dataclass(frozen=True)
class Gains:
    """D of every candidate weight, and what it was measured with.

    ``flat``: float32 ``[weight]``, part after part in the order of ``shapes``, mapped from a file that is gone with it.
    """

    flat: Tensor
    shapes: dict[str, tuple[int, int]]
    model: nn.Module
    loss: Loss
    batches: list[Batch]
    tokens: int
    value: float  # the loss at the later model

    def best(self, count: int) -> Tensor:
        """Where the ``count`` highest positive numbers of ``flat`` lie, int64, the highest first (fewer if too few).

        Ties: the lower block, part and position first. So the first m of them are the best m.
        """
        threshold, equal = _threshold(self.flat, count)
        count = min(count, len(self.flat))
        found, held, have = torch.empty(count, dtype=torch.int64), torch.empty(count), 0
        for start, chunk, bits in _chunks(self.flat):
            taken = bits > threshold
            if equal and threshold:
                ties = (bits == threshold).nonzero().flatten()[:equal]
                taken[ties] = True
                equal -= len(ties)
            places = taken.nonzero().flatten()
            found[have : have + len(places)] = places + start
            held[have : have + len(places)] = chunk[places]
            have += len(places)
        return found[:have][held[:have].sort(descending=True, stable=True).indices]

    def worth(self, limit: float) -> int:
        """How many of the highest positive numbers add up to at most ``limit``."""
        prefix, spent, number = None, 0.0, 0.0
        for _ in range(2):
            sums, counts = _histogram(self.flat, prefix, "sum"), _histogram(self.flat, prefix, "count")
            reached = sums.cumsum(0) + spent
            if reached[-1] <= limit:
                return int(number + counts.sum())
            at = int(torch.searchsorted(reached, limit, right=True))  # the first bin that no longer fits as a whole
            spent, number = float(reached[at] - sums[at]), number + float(counts[:at].sum())
            prefix = (prefix or 0) << 16 | _LAST - at
        value = float(torch.tensor(prefix, dtype=torch.int32).view(torch.float32))
        return int(number + max(0.0, limit - spent) // value)

    def entries(self, chosen: Tensor) -> Entries:
        """Indices into ``flat`` as a mask."""
        sizes = [neurons * width for neurons, width in self.shapes.values()]
        edges = torch.tensor([0, *sizes]).cumsum(0)
        chosen = chosen.sort().values
        cuts = torch.searchsorted(chosen, edges).diff().tolist()
        parts = zip(self.shapes, chosen.split(cuts), edges.tolist(), strict=False)
        return Entries({part: found - first for part, found, first in parts}, shapes=self.shapes)


def entry_gains(run: Trajectory, data: Iterable[Batch], *, loss: Loss | None = None) -> Gains:
    """D of single weights: D_w = (Σ over batches of g_w) · δB,w, the first-order gain of reverting weight w.

    Args:
        run: a trajectory with ``earlier`` and ``later``; its units say whose weights are candidates.
        data: batches of the damaged domain, as for ``damage``.
        loss: as for ``damage``.

    Returns:
        Gains of either sign in the loss's unit; those of a neuron add up to its ``damage``. Products and sums are
        float32, kept in a temporary file of 4 bytes a weight (in ``TMPDIR``), in the page cache and not in memory.

    Raises:
        ValueError: as ``damage``; a gradient is NaN or infinite.
        OSError: there is no room for the file.

    Source: ours, from Proposition 1.
    """
    batches, loss = answered(run, data, loss)
    model = run.load()
    live = open_weights(model, run.layout, units=run.units)
    (earlier,) = replace(run, later=model).weights("earlier")
    shapes = shapes_of(live.layout)
    starts = _starts(shapes)
    flat = zeros_on_disk(sum(neurons * width for neurons, width in shapes.values()))

    def add(block: Block, slot: Slot, grad: Tensor, _: Tensor) -> None:
        for first, (g,) in in_runs(slot, slot.view(grad)):
            at = starts[f"{block.name}/{slot.part}"] + first * slot.width
            flat[at : at + g.numel()] += g.flatten().cpu()

    tokens, value = sum(int(positions(batch).sum()) for batch in batches), 0.0
    with collecting(model, live.layout, add):
        for batch in batches:
            one = loss(model, batch) * int(positions(batch).sum())
            one.backward()
            value += float(one.detach())
    _times_change(flat, starts, live, earlier, tokens)
    return Gains(flat, shapes, model, loss, batches, tokens, value / tokens)


def _starts(shapes: dict[str, tuple[int, int]]) -> dict[str, int]:
    sizes = [neurons * width for neurons, width in shapes.values()]
    return dict(zip(shapes, torch.tensor([0, *sizes]).cumsum(0).tolist(), strict=False))


def _times_change(flat: Tensor, starts: dict[str, int], live: Weights, earlier: Weights, tokens: int) -> None:
    """Turn the gradients' sums into gains per token, in place."""
    for block in live.layout.blocks:
        for slot in block.slots:
            views = slot.view(live.tensors[slot.tensor]), as_live(earlier, live, block, slot)
            for first, (now, before) in in_runs(slot, *views):
                at = starts[f"{block.name}/{slot.part}"] + first * slot.width
                gains = flat[at : at + now.numel()]
                gains *= ((now - before) / tokens).flatten().cpu()
                if not bool(gains.isfinite().all()):
                    raise ValueError(f"the gradient of {slot.tensor!r} is NaN or infinite on these prompts")


def _chunks(flat: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Runs of the numbers, and their bits as integers: positive floats are ordered as those, all others are ≤ 0."""
    for start in range(0, len(flat), CHUNK):
        chunk = flat[start : start + CHUNK]
        yield start, chunk, chunk.view(torch.int32)


def _histogram(flat: Tensor, prefix: int | None, what: str) -> Tensor:
    """How many positive numbers ("count"), or their sum, per value of 16 bits: the upper ones, or those after a prefix.

    From the highest value to the lowest: ``[65536]``, float64.
    """
    found = torch.zeros(1 << 16, dtype=torch.float64)
    for _, chunk, bits in _chunks(flat):
        chosen = bits > 0 if prefix is None else (bits > 0) & (bits >> 16 == prefix)
        held = bits[chosen]
        weights = chunk[chosen].double() if what == "sum" else None
        found += torch.bincount(held >> 16 if prefix is None else held & 0xFFFF, weights, minlength=1 << 16)
    return found.flip(0)


def _threshold(flat: Tensor, count: int) -> tuple[int, int]:
    """The bits of the ``count``-th highest positive number, and how many of those equal to it are among the highest.

    (0, 0) where there are fewer positive ones. Two passes: one over the upper halves of the bits, one over the lower.
    """
    if count <= 0:
        return _HIGHEST, 0
    prefix, above = None, 0.0
    for _ in range(2):
        counts = _histogram(flat, prefix, "count")
        reached = counts.cumsum(0) + above
        if reached[-1] < count:
            return 0, 0
        at = int(torch.searchsorted(reached, count))  # the first bin from the top with which there are enough
        above = float(reached[at] - counts[at])
        prefix = (prefix or 0) << 16 | _LAST - at
    return prefix or 0, count - int(above)
