"""Callbacks for transformers' Trainer: training restricted to a mask, and gradient cosines while it runs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from surgery.evidence.gradients import Gradients, GradientSeries, gradients
from surgery.evidence.products import Data, losses_of
from surgery.layout.slots import Layout
from surgery.live.losses import Loss
from surgery.masks.mask import Mask
from surgery.training.leaves import Leaves


class Masked(TrainerCallback):
    """Restricts a transformers or TRL Trainer to the masked units: a callback, and a ``with`` block around ``train``.

    The Trainer's optimiser steps on ``leaves``, float32 copies of the masked slices. Every backward pass gives them
    their gradients, and after each optimiser step they are rounded into the model. So the optimiser's state is
    proportional to the mask, weight decay and momentum move nothing else, and steps that are too small for bfloat16 add
    up. The Trainer's ``max_grad_norm`` clips the masked gradient (the norm that the Trainer logs is another one).

    Args:
        model: live, the same model that the Trainer trains, already on its device.
        mask: bool Neurons or Entries.
        keep_on: where the original bits are kept for ``undo`` (default: beside the weights).
        layout: where the neurons lie (default: found).

    An exception inside the block, Ctrl-C or a NaN restores the original bits. Otherwise the trained weights stay when
    the block ends, and ``undo`` restores the original bits. Training can't resume from a Trainer's checkpoint, because
    the leaves are not parameters of the model.

    Raises:
        ValueError: as ``refresh``; at the start of the training, if the optimiser does not step on ``leaves``.

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
        """The tensors that the optimiser has to step on."""
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


KEPT = 128  # measurements in memory: beyond that every second one is dropped


class GradientCosines(TrainerCallback):
    """Logs the cosines of some domains' gradients while a Trainer trains (``gradients`` of the model).

    The training is bit for bit the same with and without it. The Trainer's log, ``log_history`` and all reporting
    integrations get ``gradient_cosine/math-qa`` for the whole model, ``gradient_cosine/math-qa/<part>`` for each layer
    and each attention and MLP module, ``domain_loss/math`` and ``gradient_norm/math``; a cosine with a zero gradient is
    left out. ``series`` holds the same as a ``GradientSeries``.

    Args:
        trainer: the ``Trainer`` (or one of TRL's) to which it is added by ``trainer.add_callback``.
        data: domain → batches with labels; one batch per domain is enough.
        loss: as for ``gradients``.
        every: measure at each multiple of this many steps. A batch of ``data`` costs about one and a half forward and
            backward passes of its size. At the default of 100, two domains with one batch each, as large as training's,
            cost about 3 % of the training time.
        parts: log the layers and modules as well, not only the whole model.

    Raises:
        ValueError: as ``gradients``; settings out of range; training in more than one process.

    Source: the paper, Section 4 (over training steps).
    """

    def __init__(
        self,
        trainer: Trainer,
        data: Data,
        *,
        loss: Loss | Mapping[str, Loss] | None = None,
        every: int = 100,
        parts: bool = True,
    ) -> None:
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r}: expected a number of steps, 1 or more")
        self.trainer, self.losses = trainer, losses_of(data, loss)
        self.data = {domain: list(batches) for domain, batches in data.items()}
        self.every, self.parts = every, parts
        self.measured: dict[int, Gradients] = {}

    @property
    def series(self) -> GradientSeries:
        """The measurements by step (if there were more than 128, the first and every second one, and so on)."""
        return GradientSeries.over({str(step): found for step, found in self.measured.items()})

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget an earlier training's measurements."""
        if args.world_size > 1:
            raise ValueError(f"training runs in {args.world_size} processes: gradients are compared in one process")
        self.measured.clear()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure at a multiple of ``every``, and log what was found."""
        if state.global_step % self.every:
            return
        model = self.trainer.model
        assert isinstance(model, nn.Module)  # it trains
        found = gradients(model, self.data, self.losses)
        self.measured[state.global_step] = found
        if len(self.measured) > KEPT:
            self.measured = dict(list(self.measured.items())[::2])
        due = control.should_log
        # Trainer's own, since TRL's would hand over its running means and clear them, and with the flag put back, since
        # logging anything takes down that the step's own entry is due.
        Trainer.log(self.trainer, self._entries(found))
        control.should_log = due

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say so where nothing was measured."""
        if not self.measured:
            warnings.warn(
                f"gradients were never measured: the training ended after {state.global_step} steps, before a multiple "
                f"of every={self.every}; pass a smaller every=",
                stacklevel=2,
            )

    def _entries(self, found: Gradients) -> dict[str, float]:
        modules = [part for part in found.modules if part.kind in ("attention", "mlp")]
        parts = [(f"/{part.name}", part) for part in (*found.layers, *modules)] if self.parts else []
        cosines = {
            f"gradient_cosine/{a}-{b}{place}": value
            for a, b in found.pairs
            for place, part in [("", found.whole), *parts]
            if (value := part.cosines[a][b]) is not None
        }
        losses = {f"domain_loss/{domain}": value for domain, value in found.losses.items()}
        return cosines | losses | {f"gradient_norm/{domain}": value for domain, value in found.whole.norms.items()}
