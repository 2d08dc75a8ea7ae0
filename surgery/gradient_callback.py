"""Callbacks for transformers' Trainer: what is watched while training runs, and leaves no trace in it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from surgery.gradient_cosines import Gradients, GradientSeries, gradients
from surgery.gradient_products import Data, losses_of
from surgery.predictions import Loss

KEPT = 128  # measurements in memory: beyond that every second one is dropped


class GradientCosines(TrainerCallback):
    """Logs how the gradients of some domains lie to each other while a Trainer trains (``gradients`` of the model).

    The training is the same with it and without it, bit for bit. Into the Trainer's log, and so into ``log_history``
    and all that it reports to, go ``gradient_cosine/math-qa`` for the whole model, ``gradient_cosine/math-qa/<part>``
    for each layer and each attention and MLP module, ``domain_loss/math`` and ``gradient_norm/math``; a cosine with a
    gradient that is zero is left out. ``series`` holds the same as a ``GradientSeries``.

    Args:
        trainer: the ``Trainer`` (or one of TRL's) that it is added to, by ``trainer.add_callback``.
        data: domain → batches with labels; a batch each is enough to watch by.
        loss: as for ``gradients``.
        every: measure at each multiple of so many steps. A batch of ``data`` costs about one and a half forward and
            backward passes of its size: two domains with a batch each, as large as training's, cost about 3 % of the
            training's time at the default of 100.
        parts: log the layers and modules, too, and not only the whole model.

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
        """What was measured, by step (the first and every second where there were more than 128, and so on)."""
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
