"""Gradients of the neurons' weights, tensor by tensor: each is handed over as soon as it is there, and then freed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from surgery.slots import Block, Layout, Slot
from surgery.trajectory import Weights

Take = Callable[[Block, Slot, Tensor, Tensor], None]  # block, slot, the tensor's gradient, the tensor
CHUNK = 1 << 22  # numbers of a gradient that are turned into float32 at a time


@contextmanager
def collecting(model: nn.Module, layout: Layout, take: Take) -> Iterator[None]:
    """While the body runs, the weights of a layout's neurons take gradients, and nothing else does.

    Every backward pass calls ``take`` for each slot of each tensor. One tensor's gradient is in memory at a time.
    """
    slots: dict[str, list[tuple[Block, Slot]]] = {}
    for block in layout.blocks:
        for slot in block.slots:
            slots.setdefault(slot.tensor, []).append((block, slot))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    before = {name: (p.requires_grad, p.grad) for name, p in parameters.items()}
    training, handles = model.training, []
    try:
        model.eval()
        for name, p in parameters.items():
            p.grad = None
            p.requires_grad_(name in slots)
            if name in slots:
                handles.append(p.register_post_accumulate_grad_hook(_hook(take, slots[name])))
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for name, p in parameters.items():
            p.requires_grad_(before[name][0])
            p.grad = before[name][1]
        model.train(training)


def _hook(take: Take, slots: list[tuple[Block, Slot]]) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        for block, slot in slots:
            take(block, slot, parameter.grad, parameter.detach())
        parameter.grad = None

    return hook


def in_runs(slot: Slot, *views: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Runs of a slot's neurons: the first one's index in the block, and each view's rows, float32 ``[neuron, width]``.

    The rows come on the device of the first view.
    """
    inner = views[0].shape[1 : 1 + slot.stacked].numel()  # neurons per entry of the first axis
    step = max(1, CHUNK // max(1, views[0][:1].numel()))
    for at in range(0, len(views[0]), step):
        rows = [view[at : at + step] for view in views]
        count = len(rows[0]) * inner
        yield (
            slot.start + at * inner,
            tuple(one.to(views[0].device, torch.float32).reshape(count, -1) for one in rows),
        )


def as_live(source: Weights, live: Weights, block: Block, slot: Slot) -> Tensor:
    """A live slot's rows in another checkpoint, shaped as in the live one: a view where the names agree."""
    theirs = source.layout[block.name]
    for other in theirs.of(slot.part):
        if replace(other, tensor=slot.tensor) == slot:
            return other.view(source.tensors[other.tensor])
    rows = theirs.rows(source.tensors, slot.part, torch.arange(slot.start, slot.stop))
    return rows.reshape(slot.view(live.tensors[slot.tensor]).shape)
