"""M of every single weight, streamed into a file, and how many of them each layer gives."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from surgery.budget import Allocation, share
from surgery.deltas import check_finite, displacements
from surgery.entries import shapes_of
from surgery.scores import remember
from surgery.scratch import zeros_on_disk
from surgery.trajectory import Trajectory
from surgery.units import Units
from surgery.weight_ranking import best, positive, starts_of

_Shapes = dict[str, tuple[int, int]]


@remember
def entry_magnitude(run: Trajectory, units: Units = "mlp") -> Tensor:
    """M of single weights: M_w = abs(δB,w), divided by the mean of its layer (of an MLP block or an attention).

    Args:
        run: a trajectory with ``earlier`` and ``later``.
        units: the kinds of unit whose weights are candidates.

    Returns:
        float32 ``[weight]`` ≥ 0, part after part as in ``shapes_of(layout)``, in a temporary file of 4 bytes a weight
        (in ``TMPDIR``) that is gone with it: in the page cache and not in memory. Of the checkpoints a chunk is.

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
