"""A second, independent check of a layout: autograd shows which rows a neuron's activation depends on."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from surgery.compat import uncompiled
from surgery.layout.slots import Block, Layout, Slot
from surgery.live.hooks import listening


class _Reached(Exception):
    """Stops a forward pass once the block has been computed."""


def probe(model: nn.Module, layout: Layout, block: Block, neurons: int = 4) -> list[str]:
    """Verify a block by autograd: if all activations but neuron i's are zero, only neuron i's slices get gradient.

    Args:
        model: the live model; unchanged afterwards.
        layout: its layout.
        block: which block.
        neurons: how many neurons to try, spread over the block.

    Returns:
        The problems, in words; empty if there is none.

    Source: ours.
    """
    model, inner = uncompiled(model), block.neurons // max(block.experts, 1)
    tensors = {slot.tensor: model.get_parameter(slot.tensor) for slot in block.slots}
    problems = []
    for i in torch.linspace(0, inner - 1, neurons).round().long().unique().tolist():
        grads = _gradients(model, block, i, tensors)
        for slot in block.slots:
            grad = grads[slot.tensor]
            hit = _rows_hit(slot, grad, inner) if grad is not None else set()
            if hit - {i}:
                problems.append(
                    f"{slot.tensor} ({slot.part}): neuron {i} also lies in the rows of {sorted(hit - {i})[:5]}"
                )
            elif not hit and slot.part != "k.bias":  # without rotation it shifts all of a query's scores alike
                problems.append(f"{slot.tensor} ({slot.part}): neuron {i} gets no gradient")
    return problems


def _rows_hit(slot: Slot, grad: Tensor, inner: int) -> set[int]:
    """Which neurons (of any expert, which has ``inner`` of them) have a gradient in the slot."""
    rows = slot.view(grad)
    found = rows.reshape(slot.neurons, -1).ne(0).any(1).nonzero().flatten()
    return {(int(i) + slot.start) % inner for i in found}


def _gradients(model: nn.Module, block: Block, i: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    def only(h: Tensor, _: Any) -> Tensor:
        keep = torch.zeros(h.shape[-1], dtype=h.dtype, device=h.device)
        if block.heard is None:
            keep[i] = 1
        else:
            block.heard.put(keep, torch.tensor([i]), keep.new_ones(()))
        return h * keep

    def stop(_m: nn.Module, _a: Any, out: Any) -> None:
        outputs.append(out[0] if isinstance(out, tuple) else out)
        raise _Reached

    outputs: list[Tensor] = []
    needed = {name: tensor.requires_grad for name, tensor in tensors.items()}
    device = next(iter(tensors.values())).device
    vocabulary = int(getattr(getattr(model, "config", None), "vocab_size", 0) or 32)
    ids = torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(0)).to(device)
    handle = model.get_submodule(block.consumer).register_forward_hook(stop)
    try:
        for tensor in tensors.values():
            tensor.requires_grad_(True)
        with torch.enable_grad(), listening(model, block, only):
            with suppress(_Reached):
                model(input_ids=ids, use_cache=False)
        weights = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(1)).to(outputs[0])
        found = torch.autograd.grad((outputs[0] * weights).sum(), list(tensors.values()), allow_unused=True)
    finally:
        handle.remove()
        for name, tensor in tensors.items():
            tensor.requires_grad_(needed[name])
    return dict(zip(tensors, found, strict=True))
