"""Any Trainer (GRPO, DPO, supervised) restricted to a mask: nothing outside its slices is trained, decayed or moved."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from surgery.masks import Mask
from surgery.refresh_copies import Leaves
from surgery.slots import Layout


class Masked(TrainerCallback):
    """Restricts a transformers or TRL Trainer to the masked units: a callback, and a ``with`` block around ``train``.

    The Trainer's optimiser is made of ``leaves``: float32 copies of the masked slices. Their gradients are taken out of
    every backward pass; after each optimiser step they are rounded into the model. So the optimiser's state is
    proportional to the mask, weight decay and momentum move nothing else, and steps that are too small for bfloat16
    add up. The Trainer's ``max_grad_norm`` clips the masked gradient (the norm that it logs is not this one).

    Args:
        model: live, the one that the Trainer trains, on its device already.
        mask: bool Neurons or Entries.
        keep_on: where the old bits are kept for ``undo`` (default: beside the weights).
        layout: where the neurons lie (default: found).

    An exception inside the block, Ctrl-C or a NaN puts the old bits back. Without one the trained weights stay when
    the block ends; ``undo`` puts the old bits back then. A Trainer's checkpoint can't be resumed from, since the leaves
    are no parameters of the model.

    Raises:
        ValueError: as ``refresh``; at the start of the training, where the optimiser is not made of ``leaves``.

    Source: ours.

    >>> # masked = Masked(model, mask)
    >>> # optimizer = torch.optim.AdamW(masked.leaves, lr=1e-5)
    >>> # trainer = GRPOTrainer(model=model, optimizers=(optimizer, None), callbacks=[masked], ...)
    >>> # with masked: trainer.train()
    """

    def __init__(
        self, model: nn.Module, mask: Mask, *, keep_on: torch.device | str | None = None, layout: Layout | None = None
    ) -> None:
        self._leaves = Leaves(model, mask, keep_on, layout)
        self._open: ExitStack | None = None

    @property
    def leaves(self) -> list[Tensor]:
        """What the optimiser has to be made of."""
        return self._leaves.values

    def __enter__(self) -> Masked:
        self._open = ExitStack()
        self._open.enter_context(self._leaves.collecting())
        self._leaves.clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None
        if kind is not None:
            self.undo()

    def undo(self) -> None:
        """Put the original bits back."""
        self._leaves.back()

    def on_train_begin(self, args: Any, state: Any, control: Any, **told: Any) -> None:
        if self._open is None:
            raise ValueError("train inside the block: with masked: trainer.train()")
        if told.get("model") is not None and not _holds(told["model"], self._leaves):
            raise ValueError("the Trainer trains another model than Masked(model, ...) was made for")
        held = {id(p) for group in told["optimizer"].param_groups for p in group["params"]}
        if held != {id(value) for value in self.leaves}:
            raise ValueError(
                "the optimiser is not made of the masked slices: pass the Trainer "
                "optimizers=(torch.optim.AdamW(masked.leaves, lr=...), None)"
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **told: Any) -> None:
        if args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.leaves, args.max_grad_norm)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **told: Any) -> None:
        self._leaves.write()
        self._leaves.clear()


def _holds(model: nn.Module, leaves: Leaves) -> bool:
    parameters = {id(p) for p in model.parameters()}
    return all(id(leaf.parameter) in parameters for leaf in leaves.leaves)
