"""D of every single weight: gradients summed in a file, and the best of all of them found with bounded memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surgery.attribution import answered
from surgery.entries import Entries, shapes_of
from surgery.gradient_hooks import as_live, collecting, in_runs
from surgery.opening import Weights
from surgery.predictions import Divergence, Loss, positions, summed
from surgery.prompts import Batch
from surgery.scratch import zeros_on_disk
from surgery.slots import Block, Slot
from surgery.trajectory import Trajectory
from surgery.units import Units
from surgery.weight_ranking import LAST, best, entries_of, histogram, starts_of


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
        """Where the ``count`` highest positive gains lie (see ``ranking.best``)."""
        return best(self.flat, count)

    def worth(self, limit: float) -> int:
        """How many of the highest positive numbers add up to at most ``limit``."""
        prefix, spent, number = None, 0.0, 0.0
        for _ in range(2):
            sums, counts = histogram(self.flat, prefix, "sum"), histogram(self.flat, prefix, "count")
            reached = sums.cumsum(0) + spent
            if reached[-1] <= limit:
                return int(number + counts.sum())
            at = int(torch.searchsorted(reached, limit, right=True))  # the first bin that no longer fits as a whole
            spent, number = float(reached[at] - sums[at]), number + float(counts[:at].sum())
            prefix = (prefix or 0) << 16 | LAST - at
        value = float(torch.tensor(prefix, dtype=torch.int32).view(torch.float32))
        return int(number + max(0.0, limit - spent) // value)

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
        float32, kept in a temporary file of 4 bytes a weight (in ``TMPDIR``), in the page cache and not in memory.

    Raises:
        ValueError: as ``damage``; a gradient is NaN or infinite.
        OSError: there is no room for the file.

    Source: ours, from Proposition 1.
    """
    batches, loss = answered(run, data, loss)
    model = run.load()
    live, earlier = run.live("earlier", units=units)
    shapes = shapes_of(live.layout)
    starts = starts_of(shapes)
    flat = zeros_on_disk(sum(neurons * width for neurons, width in shapes.values()))

    def add(block: Block, slot: Slot, grad: Tensor, _: Tensor) -> None:
        for first, (g,) in in_runs(slot, slot.view(grad)):
            at = starts[f"{block.name}/{slot.part}"] + first * slot.width
            flat[at : at + g.numel()] += g.flatten().cpu()

    tokens, value = sum(int(positions(batch).sum()) for batch in batches), 0.0
    with collecting(model, live.layout, add):
        for batch in batches:
            one = summed(loss, model, batch)
            one.backward()
            value += float(one.detach())
    _times_change(flat, starts, live, earlier, tokens)
    return Gains(flat, shapes, model, loss, batches, tokens, value / tokens)


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
