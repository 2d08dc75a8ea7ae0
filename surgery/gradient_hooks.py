"""Gradients, tensor by tensor: each is handed over as soon as it is there, and then freed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from surgery.hooks import evaluating
from surgery.opening import Weights
from surgery.slots import Block, Layout, Slot

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

    def spread(name: str, grad: Tensor) -> None:
        for block, slot in slots[name]:
            take(block, slot, grad, parameters[name].detach())

    with collecting_from(model, {name: p for name, p in parameters.items() if name in slots}, spread):
        yield


@contextmanager
def collecting_from(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], take: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """While the body runs, those parameters take gradients, nothing else does, and the model is in eval mode.

    Every backward pass calls ``take(name, gradient)`` once for each that has one, when it is complete (a parameter used
    in several places has one); then the gradient is freed. At the end all is as it was: gradients, flags, modes.
    """
    with evaluating(model), only_these({p: partial(take, name) for name, p in parameters.items()}, model):
        yield


@contextmanager
def only_these(takes: Mapping[nn.Parameter, Callable[[Tensor], None]], model: nn.Module) -> Iterator[None]:
    """While the body runs, those parameters take gradients, and nothing else does; at the end all is as it was.

    A gradient is handed over when it is complete, and then freed: one parameter's is in memory at a time.
    """
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    handles = []

    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        takes[parameter](parameter.grad)  # type: ignore[index]
        parameter.grad = None

    try:
        for p, _, _ in before:
            p.grad = None
            p.requires_grad_(p in takes)
            if p in takes:
                handles.append(p.register_post_accumulate_grad_hook(hook))
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for p, required, grad in before:
            p.requires_grad_(required)
            p.grad = grad


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
