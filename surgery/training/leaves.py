"""What is trained: float32 copies of slices of a live model, the gradients that reach them, and the way back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from surgery.checkpoints.opening import open_weights
from surgery.compat import uncompiled
from surgery.files import uninterrupted
from surgery.formats.patches import bits
from surgery.layout.plain import check_stored
from surgery.layout.sharding import check_one_process
from surgery.layout.slots import Layout
from surgery.live.hooks import only_these
from surgery.masks.edits import Edit
from surgery.masks.mask import Mask, checked
from surgery.reverting.writing import check_writable, numbers


@dataclass(frozen=True)
class Whole:
    """All of a tensor, where no mask restricts the training (see ``edits.Rows``)."""

    name: str

    def take(self, tensor: Tensor) -> Tensor:
        """A copy of what the tensor holds."""
        return tensor.clone()

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Write it, in place."""
        tensor.copy_(values)


@dataclass(frozen=True)
class Leaf:
    """One trained slice: where it lies, its wide copy (with ``.grad``), and the bits that it had."""

    parameter: nn.Parameter
    part: Edit | Whole
    value: Tensor
    old: Tensor


class Leaves:
    """The slices that a mask names, or all trainable parameters, as small float32 leaves for an optimiser.

    An optimiser steps on ``values``; ``write`` rounds them into the model. A step that is too small for the weights'
    dtype is not lost: it adds up in the leaves. Memory: per trained number the leaf, its gradient and the old bits.

    Args:
        model: live; float64 weights have float64 leaves.
        mask: bool Neurons or Entries, or None for every parameter that requires a gradient.
        keep_on: where the old bits are kept (default: beside the weights).
        layout: where the neurons lie (default: found).

    Raises:
        ValueError: nothing is selected, or what is is frozen, offloaded, quantised or shares its storage.

    Source: ours.
    """

    def __init__(
        self,
        model: nn.Module,
        mask: Mask | None = None,
        keep_on: torch.device | str | None = None,
        layout: Layout | None = None,
    ) -> None:
        check_one_process(model, "training masked weights")
        self.model = model
        chosen = _everything(model) if mask is None else _masked(model, mask, layout)
        self.leaves: list[Leaf] = []
        with torch.no_grad():
            for parameter, part in chosen:
                old = part.take(parameter.detach())
                value = old.to(torch.promote_types(old.dtype, torch.float32), copy=True)
                value.grad = torch.zeros_like(value)
                self.leaves.append(Leaf(parameter, part, value, old.to(keep_on) if keep_on else old))
        self.units = None if mask is None else mask.count()
        self.noun = "parameters" if mask is None else mask.noun

    @property
    def values(self) -> list[Tensor]:
        """The leaves themselves, each with its gradient in ``.grad``."""
        return [leaf.value for leaf in self.leaves]

    @property
    def count(self) -> int:
        """How many numbers are trained."""
        return sum(leaf.value.numel() for leaf in self.leaves)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """While the body runs, every backward pass adds to the leaves' gradients, and to nothing else's.

        One parameter's gradient is in memory at a time.
        """
        own: dict[nn.Parameter, list[Leaf]] = {}
        for leaf in self.leaves:
            own.setdefault(leaf.parameter, []).append(leaf)
        with only_these({p: partial(_add, leaves) for p, leaves in own.items()}, self.model):
            yield

    def clear(self) -> None:
        """Set the gradients to zero."""
        for value in self.values:
            assert value.grad is not None
            value.grad.zero_()

    def norm(self) -> float:
        """The L2 norm of the gradient over all leaves (NaN or infinite if one number of it is)."""
        norms = [torch.linalg.vector_norm(value.grad) for value in self.values if value.grad is not None]
        return float(torch.linalg.vector_norm(torch.stack([one.to(norms[0]) for one in norms])))

    def write(self) -> None:
        """Round the leaves into the model.

        Raises:
            ValueError: a number is NaN or infinite, or is in the weights' dtype (it is written all the same).
        """
        finite = []
        with torch.no_grad():
            for leaf in self.leaves:
                values = leaf.value.to(leaf.parameter.dtype)
                finite.append(values.isfinite().all())
                leaf.part.put(leaf.parameter.detach(), values)
        for leaf, fine in zip(self.leaves, numbers(finite), strict=True):
            if not fine:
                raise ValueError(f"{name_of(leaf)} would hold NaN or infinite numbers")

    def copy(self) -> list[Tensor]:
        """A copy of what the model holds in the trained slices, kept where the old bits are."""
        return [leaf.part.take(leaf.parameter.detach()).to(leaf.old.device) for leaf in self.leaves]

    def put(self, kept: Iterable[Tensor]) -> None:
        """Write such a copy into the model; Ctrl-C waits until it is whole."""
        with uninterrupted(), torch.no_grad():
            for leaf, values in zip(self.leaves, kept, strict=True):
                leaf.part.put(leaf.parameter.detach(), values.to(leaf.parameter.device, leaf.parameter.dtype))

    def back(self) -> None:
        """Put the old bits back."""
        self.put(leaf.old for leaf in self.leaves)

    def changed(self) -> int:
        """How many trained numbers have other bits in the model now than before."""
        now = ((leaf, leaf.part.take(leaf.parameter.detach())) for leaf in self.leaves)
        return sum(numbers([(bits(values) != bits(leaf.old.to(values.device))).sum() for leaf, values in now]))


def name_of(leaf: Leaf) -> str:
    """The tensor that a leaf is a slice of."""
    return leaf.part.name if isinstance(leaf.part, Whole) else leaf.part.slot.tensor


def _add(leaves: list[Leaf], grad: Tensor) -> None:
    for leaf in leaves:
        assert leaf.value.grad is not None
        if leaf.value.device != grad.device:
            raise ValueError(
                f"{name_of(leaf)} is on {grad.device} now, and was on {leaf.value.device} when it was copied to be "
                f'trained: move the model first, model.to("{grad.device}")'
            )
        leaf.value.grad += leaf.part.take(grad).to(leaf.value.dtype)


def _everything(model: nn.Module) -> list[tuple[nn.Parameter, Edit | Whole]]:
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError("every parameter is frozen, so there is nothing to train: model.requires_grad_(True)")
    for name, p in found.items():
        if p.device.type == "meta":
            raise ValueError(f"{name} is on the meta device: its weights are offloaded. Load the model whole")
        check_stored(name, p.dtype, "the model")
    return [(p, Whole(name)) for name, p in found.items()]


def _masked(model: nn.Module, mask: Mask, layout: Layout | None) -> list[tuple[nn.Parameter, Edit | Whole]]:
    live = open_weights(model, layout, units=checked(mask).units)
    edits = list(mask.edits(live.layout, "the model"))
    if not edits:
        raise ValueError("the mask selects nothing, so there is nothing to train")
    check_writable(live, edits)
    parameters = dict(uncompiled(model).named_parameters(remove_duplicate=False))
    if frozen := [e.slot.tensor for e in edits if not parameters[e.slot.tensor].requires_grad]:
        raise ValueError(
            f"{frozen[0]} is frozen (requires_grad is False), and the mask has units in it: "
            f"model.requires_grad_(True), or leave them out of the mask"
        )
    return [(parameters[edit.slot.tensor], edit) for edit in edits]
