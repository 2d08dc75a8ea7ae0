"""One number for every single weight, in a file, and the best of all of them found with bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from surgery.entries import Entries

CHUNK = 1 << 18  # scores that are looked at at a time
LAST = (1 << 16) - 1
_HIGHEST = (1 << 31) - 1


def best(flat: Tensor, count: int) -> Tensor:
    """Where the ``count`` highest positive numbers of ``flat`` lie, int64, the highest first (fewer if too few).

    Ties: the lower block, part and position first. So the first m of them are the best m.
    """
    threshold, equal = _threshold(flat, count)
    count = min(count, len(flat))
    found, held, have = torch.empty(count, dtype=torch.int64), torch.empty(count), 0
    for start, chunk, bits in _chunks(flat):
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


def starts_of(shapes: dict[str, tuple[int, int]]) -> dict[str, int]:
    """Where the numbers of each part begin, part after part."""
    sizes = [neurons * width for neurons, width in shapes.values()]
    return dict(zip(shapes, torch.tensor([0, *sizes]).cumsum(0).tolist(), strict=False))


def _chunks(flat: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Runs of the numbers, and their bits as integers: positive floats are ordered as those, all others are ≤ 0."""
    for start in range(0, len(flat), CHUNK):
        chunk = flat[start : start + CHUNK]
        yield start, chunk, chunk.view(torch.int32)


def histogram(flat: Tensor, prefix: int | None, what: str) -> Tensor:
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
        counts = histogram(flat, prefix, "count")
        reached = counts.cumsum(0) + above
        if reached[-1] < count:
            return 0, 0
        at = int(torch.searchsorted(reached, count))  # the first bin from the top with which there are enough
        above = float(reached[at] - counts[at])
        prefix = (prefix or 0) << 16 | LAST - at
    return prefix or 0, count - int(above)
