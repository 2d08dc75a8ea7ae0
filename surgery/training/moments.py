"""What an optimiser remembers of the weights that a rollback reverts, and forgetting it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from surgery.checkpoints.opening import open_weights
from surgery.compat import uncompiled
from surgery.formats.folders import MOMENTS
from surgery.layout.slots import Layout
from surgery.masks.edits import Edit
from surgery.masks.mask import Mask

_ADVICE = (
    "and its next steps would undo a rollback: train with torch.optim.AdamW in one process, or repair the saved folder"
)
Moments = list[tuple[Edit, str, Tensor]]


def moments_of(
    optimizer: Any, model: nn.Module, mask: Mask, layout: Layout | None = None, edits: Iterable[Edit] | None = None
) -> Moments:
    """The optimiser's running means of the masked slices: the edit, the mean's name, and the whole tensor.

    ``edits`` are others than the mask makes in the weights: those of an adapter's matrices.

    Raises:
        ValueError: the optimiser steps on copies of the weights, or keeps something else of the parameter's shape
            (averaged or first weights, quantised moments): its next steps would write the reverted weights over.
    """
    if edits is None:
        edits = mask.edits(open_weights(model, layout, units=mask.units).layout, "the model")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    named, found = dict(uncompiled(model).named_parameters(remove_duplicate=False)), []
    whose = f"the optimiser {type(getattr(optimizer, 'optimizer', optimizer)).__name__}"
    for edit in edits:
        tensor = edit.slot.tensor
        parameter = named[tensor]
        if parameter.requires_grad and id(parameter) not in held:
            raise ValueError(f"{whose} does not step on {tensor} itself (on a copy?), {_ADVICE}")
        for name, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                continue
            if name not in MOMENTS or type(value) is not Tensor or not value.is_floating_point():
                raise ValueError(f"{whose} keeps {name!r} for {tensor}, which can't be set to zero, {_ADVICE}")
            found.append((edit, name, value))
    return found


def forget(moments: Moments) -> None:
    """Set the masked slices of the running means to zero, in place."""
    with torch.no_grad():
        for edit, _, whole in moments:
            edit.put(whole, torch.zeros_like(edit.take(whole)))
