"""A, M and C of every single weight: the paper's scores at their finest, streamed into a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgery.budget import Allocation, share
from surgery.deltas import check_finite, displacements
from surgery.entries import Entries, shapes_of
from surgery.prompts import Batch
from surgery.scores import activation, remember
from surgery.scratch import zeros_on_disk
from surgery.trajectory import Trajectory
from surgery.weight_ranking import best, entries_of, positive, starts_of


@dataclass(frozen=True)
class Traits:
    """A product of A, M and C of every candidate weight.

    ``flat``: float32 ``[weight]`` ≥ 0, part after part in the order of ``shapes``, mapped from a file that is gone with
    it; ``told``: what the activation had to say (experts that no token reached).
    """

    flat: Tensor
    shapes: dict[str, tuple[int, int]]
    told: dict[str, Any]

    def best(self, count: int, how: Allocation, spend: Traits) -> Tensor:
        """Where the ``count`` highest positive scores lie, of each block as many as ``spend`` gives it.

        As in ``allocate``; where the whole model's best are taken and both are the same scores they are just those. A
        block has no more to give than positive scores, so there are fewer only where all blocks together have.
        """
        if how == "global" and spend is self:
            return best(self.flat, count)
        spans = self._blocks()
        room = {name: positive(self.flat[low:high])[0] for name, (low, high) in spans.items()}
        counts = share(min(count, sum(room.values())), spend._claims(count, how), room)
        found = [best(self.flat[low:high], counts[name]) + low for name, (low, high) in spans.items()]
        return torch.cat([torch.zeros(0, dtype=torch.int64), *found])

    def entries(self, chosen: Tensor) -> Entries:
        """Indices into ``flat`` as a mask."""
        return entries_of(chosen, self.shapes)

    def _claims(self, count: int, how: Allocation) -> dict[str, float]:
        """What each block's part of a budget is in proportion to."""
        spans = self._blocks()
        if how == "uniform":
            return {name: float(high - low) for name, (low, high) in spans.items()}
        if how == "proportional":
            return {name: positive(self.flat[low:high])[1] for name, (low, high) in spans.items()}
        chosen = best(self.flat, count).sort().values
        edges = torch.tensor([0, *(high for _, high in spans.values())])
        return dict(zip(spans, torch.searchsorted(chosen, edges).diff().double().tolist(), strict=True))

    def _blocks(self) -> dict[str, tuple[int, int]]:
        """Where each block's scores lie in ``flat``."""
        found: dict[str, tuple[int, int]] = {}
        for part, start in starts_of(self.shapes).items():
            block = part.rpartition("/")[0]
            stop = start + self.shapes[part][0] * self.shapes[part][1]
            found[block] = found.get(block, (start, stop))[0], stop
        return found


@remember
def entry_traits(run: Trajectory, data: Iterable[Batch] | None, rank: str) -> Traits:
    """A, M and C of single weights, or a product of them.

    - M_w = abs(δB,w).
    - C_w = 1 where δA,w and δB,w have opposite signs, else 0: max(0, −cos) of two vectors of one number.
    - A_w = A of the weight's neuron (or KV group). A weight of down is multiplied by its neuron's activation and by
      nothing else, so this is exactly what Wanda multiplies a weight's size with: its input's. A weight of gate, up, q,
      k, v or a bias reaches the output only through that same activation, and its own input is shared by all neurons of
      the layer, so that it would tell none of them from another.

    As for neurons, A and M are divided by their layer's mean in a product (a layer is an MLP block or an attention),
    and where there are several kinds of unit also alone.

    Args:
        run: a trajectory with ``earlier``, ``later`` and for C ``base``; its units say whose weights are candidates.
        data: batches of the damaged domain, as for ``activation``; None where the letters hold no A.
        rank: letters of A, M and C.

    Returns:
        Scores ≥ 0. Sums are float64, products float32, in a temporary file of 4 bytes a weight (in ``TMPDIR``), in the
        page cache and not in memory; of the checkpoints a chunk is.

    Raises:
        ValueError: A without data, C without base; as ``activation``, ``magnitude`` and ``conflict``.
        OSError: there is no room for the file.

    Source: ours, after the paper's A, M and C of a neuron and Wanda (arXiv 2306.11695).
    """
    if "A" in rank and data is None:
        raise ValueError("A is measured on prompts of the damaged domain: pass data=load_prompts(file, tokenizer)")
    if "C" in rank and run.base is None:
        raise ValueError('C needs the base checkpoint: pass Trajectory(base=...), or choose letters without C ("AM")')
    (later,) = run.weights("later")
    level = len(rank) > 1 or len(later.layout.units) > 1
    A = activation(run.load(), data, layout=run.layout, units=run.units) if "A" in rank and data is not None else None
    if A is not None:
        A.require(later.layout.sizes, later.name)
    M = _means(run) if level and "M" in rank else {}
    shapes = shapes_of(later.layout)
    flat, starts = zeros_on_disk(sum(neurons * width for neurons, width in shapes.values())), starts_of(shapes)
    factor = A.relative() if A is not None and level else A
    for name, part, start, stop, steps in _steps(run, "C" in rank):
        score = torch.ones_like(steps[-1])
        if "M" in rank:
            score *= steps[-1].abs()
            score /= M.get(name) or 1.0
        if factor is not None:
            score *= factor[name][start:stop, None]
        if "C" in rank:
            score *= steps[0].sign() * steps[1].sign() < 0
        at = starts[f"{name}/{part}"] + start * score.shape[1]
        flat[at : at + score.numel()] = score.flatten()
    never = {} if A is None else {key: A.made_by[key] for key in ("never_routed",) if key in A.made_by}
    return Traits(flat, shapes, never)


def _steps(run: Trajectory, conflict: bool) -> Iterator[tuple[str, str, int, int, tuple[Tensor, ...]]]:
    """``displacements`` of δB, or of δA and δB; all finite."""
    names = ("base", "earlier", "later") if conflict else ("earlier", "later")
    for found in displacements(run, *names):
        if not all(bool(step.sum().isfinite()) for step in found[-1]):
            check_finite(run, *names)
        yield found


def _means(run: Trajectory) -> dict[str, float]:
    """The mean of abs(δB) over each block's weights."""
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for name, _, _, _, steps in _steps(run, conflict=False):
        sums[name] = sums.get(name, 0.0) + float(steps[-1].abs().double().sum())
        counts[name] = counts.get(name, 0) + steps[-1].numel()
    return {name: total / counts[name] for name, total in sums.items()}
