"""The trained counterpart of a rollback: a few optimiser steps on the damaged domain, which can be undone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, cycle
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from surgery import progress
from surgery.checkpoints.checkpoint import in_force
from surgery.layout.slots import Layout
from surgery.live.hooks import evaluating
from surgery.live.losses import Loss
from surgery.live.prompts import check_many
from surgery.masks.mask import Mask
from surgery.measure.rows import Score, scored
from surgery.tables import Table, write_json
from surgery.training.leaves import Leaves

_NOTE = "a refresh"


@dataclass(frozen=True)
class Step:
    """One step of a refresh; step 0 is the model before the first.

    ``loss``: of the damaged domain, on the step's own batch, before the update. ``others``: those of the other domains.
    ``gradient``: L2 norm over the trained numbers. ``scores``: what ``validate`` found after the update, empty where it
    was not asked. ``seconds``: of the step, without validation and callback.
    """

    step: int
    loss: float | None = None
    others: dict[str, float] = field(default_factory=dict)
    gradient: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Refresh:
    """What a refresh did, and its undo: use it as a ``with`` block (undone on exit) or call ``undo``.

    ``kept``: the step whose weights the model has now, the best validated one or the last. ``passes``: number of
    forward and backward passes. ``units``: how many were trained in each block (None: all parameters). ``changed``:
    numbers whose bits differ now.
    """

    steps: tuple[Step, ...]
    kept: int
    metric: str | None  # which score chose the step
    passes: int
    units: dict[str, int] | None
    noun: str
    trained: int  # numbers
    changed: int
    _leaves: list[Leaves] = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        for leaves in self._leaves:
            in_force(leaves.model).append(_NOTE)

    @property
    def seconds(self) -> float:
        """Duration of all steps, without validation and callbacks."""
        return sum(step.seconds for step in self.steps)

    def undo(self) -> None:
        """Restore the original bits. A second call does nothing."""
        for leaves in self._leaves:
            leaves.back()
            in_force(leaves.model).remove(_NOTE)
        self._leaves.clear()

    def __enter__(self) -> Refresh:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def table(self) -> Table:
        """One row per step."""
        scores = list(dict.fromkeys(name for step in self.steps for name in step.scores))
        others = list(dict.fromkeys(name for step in self.steps for name in step.others))
        head = ("step", "loss", *(f"loss of {name}" for name in others), "gradient", *scores, "seconds", "")
        rows = tuple(
            (
                one.step, one.loss, *(one.others.get(name) for name in others), one.gradient,
                *(one.scores.get(name) for name in scores), one.seconds, "kept" if one.step == self.kept else "",
            )
            for one in self.steps
        )  # fmt: skip
        what = f"all {self.noun}" if self.units is None else f"{sum(self.units.values())} {self.noun}"
        title = (
            f"refreshed {what} ({self.trained:,} numbers): {self.steps[-1].step} steps, {self.passes} passes, "
            f"{self.seconds:.3g} s; the weights of step {self.kept} are kept, {self.changed:,} numbers really changed"
        )
        return Table(title, head, rows)

    def __str__(self) -> str:
        return str(self.table())

    def save(self, path: str | Path) -> None:
        """Write it as JSON (without the undo)."""
        write_json(self, path)


Validate = Callable[[nn.Module], float | Mapping[str, Score]]
Alternate = Mapping[str, tuple[Loss, Iterable[Any], float]]
Optimizer = Callable[..., torch.optim.Optimizer]


def refresh(
    model: nn.Module,
    loss: Loss,
    data: Iterable[Any],
    steps: int,
    lr: float,
    mask: Mask | None = None,
    alternate: Alternate | None = None,
    *,
    optimizer: Optimizer = torch.optim.Adam,
    validate: Validate | None = None,
    metric: str | None = None,
    every: int = 1,
    patience: int | None = None,
    after_step: Callable[[int, nn.Module], object] | None = None,
    keep_on: torch.device | str | None = None,
    layout: Layout | None = None,
) -> Refresh:
    """A few optimiser steps on the damaged domain, on the masked units of a live model or on all of it; undoable.

    θ ← θ − lr · g with ``torch.optim.SGD``, g = ∇L(θ) + Σ_d w_d ∇L_d(θ), each on one batch. Only the masked slices have
    gradients, optimiser state and updates; all else stays the same bit for bit. The steps are made on float32 copies,
    which are rounded to the weights' dtype, so a step too small for bfloat16 is not lost. The model is in eval mode
    meanwhile (no dropout), and no random number is drawn. An exception, Ctrl-C or a NaN restores the original bits.

    Args:
        model: live; float32, bfloat16, float16 or float64, on any device.
        loss: ``loss(model, batch)``, a scalar; ``distillation(earlier, data)`` needs no rewards and no labels.
        data: batches of the damaged domain, one per step, in their order and then from the beginning again.
        steps: number of optimiser steps.
        lr: the optimiser's learning rate.
        mask: bool Neurons or Entries; None trains every parameter that requires a gradient.
        alternate: other domains to train on as well: name → (loss, batches, weight w ≥ 0). Every step takes one batch
            of each and descends on the weighted sum; this costs one more pass per domain with a weight above 0.
        optimizer: a class of ``torch.optim``, or any callable that takes the trained tensors and ``lr=``.
        validate: model → a score, or name → score; larger is better. Called before the first step, after every
            ``every`` steps and after the last; the best weights are kept.
        metric: which of the named scores counts (default: the first).
        every: see ``validate``.
        patience: stop after this many validations without a better one (default: never).
        after_step: called with the step (1, 2, ...) and the model after each update, for measurements.
        keep_on: where the original bits are kept (default: beside the weights).
        layout: where the neurons lie (default: found).

    Returns:
        A report with the history and ``undo``. Memory, per trained number: original bits, leaf and gradient, the
        optimiser's state, and with ``validate`` the best bits.

    Raises:
        ValueError: there is no batch or nothing to train; a loss, gradient or score is NaN; weights are frozen,
            offloaded or quantised; the mask is of another model.

    Source: the paper, Sections 5 and 6 (Theorem 1 and its extension); mask, undo and validation are ours.

    >>> # with refresh(model, distillation(earlier, data), data, steps=20, lr=1e-5, mask=mask) as done: print(done)
    """
    _check(steps, lr, every, patience)
    domains = _domains(loss, data, alternate)
    leaves = Leaves(model, mask, keep_on, layout)
    judge = _Judge(leaves, validate, metric, patience)
    rule = optimizer(leaves.values, lr=lr)
    passes, history = 0, []
    try:
        with evaluating(model):
            history.append(Step(0, scores=judge(0)))
            for step in progress.steps("steps of the refresh", range(1, steps + 1)):
                start = time.perf_counter()
                losses = _gradient(leaves, domains, step)
                passes += len(losses)
                norm = leaves.norm()
                if not math.isfinite(norm):
                    raise ValueError(f"the gradient is NaN or infinite in step {step}: the weights are as they were")
                rule.step()
                leaves.write()
                seconds = time.perf_counter() - start
                scores = judge(step) if step % every == 0 or step == steps else {}
                own = losses.pop("")
                history.append(Step(step, own, losses, norm, scores, seconds))
                if after_step is not None:
                    after_step(step, model)
                if judge.tired:
                    break
            kept = judge.settle(history[-1].step)
            changed = leaves.changed()
    except BaseException:
        leaves.back()
        raise
    return Refresh(
        tuple(history), kept, judge.metric, passes, leaves.units, leaves.noun, leaves.count, changed, [leaves]
    )


def _check(steps: int, lr: float, every: int, patience: int | None) -> None:
    for name, number, least in (("steps", steps, 0), ("every", every, 1), ("patience", patience, 1)):
        if number is not None and (not isinstance(number, int) or number < least):
            raise ValueError(f"{name}={number!r}: expected an integer of {least} or more")
    if not (isinstance(lr, int | float) and 0 < lr < math.inf):
        raise ValueError(f"lr={lr!r}: expected a number above 0, like 1e-5")


@dataclass(frozen=True)
class _Domain:
    name: str  # "" is the damaged one
    loss: Loss
    batches: Iterator[Any]
    weight: float


def _domains(loss: Loss, data: Iterable[Any], alternate: Alternate | None) -> list[_Domain]:
    found = [_Domain("", loss, _cycled(data, "data"), 1.0)]
    for name, given in (alternate or {}).items():
        if not name or not isinstance(given, tuple) or len(given) != 3:
            raise ValueError(f"alternate[{name!r}]: expected (loss, batches, weight), got {given!r}")
        theirs, batches, weight = given
        if not (isinstance(weight, int | float) and 0 <= weight < math.inf):
            raise ValueError(f"alternate[{name!r}] has the weight {weight!r}: expected a number of 0 or more")
        if weight:
            found.append(_Domain(name, theirs, _cycled(batches, f"alternate[{name!r}]"), float(weight)))
    return found


def _cycled(data: Iterable[Any], what: str) -> Iterator[Any]:
    """The batches for ever; they are asked for one by one, so that they may be made as training goes on."""
    check_many(data)
    batches = cycle(data)
    for first in batches:
        return chain([first], batches)
    raise ValueError(f"{what} holds no batch: there is nothing to train on")


def _gradient(leaves: Leaves, domains: list[_Domain], step: int) -> dict[str, float]:
    """The gradient of the weighted sum, in the leaves; the losses by the domain's name."""
    leaves.clear()
    losses, batches = {}, [next(domain.batches) for domain in domains]
    with leaves.collecting():
        for domain, batch in zip(domains, batches, strict=True):
            found: Tensor = domain.loss(leaves.model, batch)
            of = f"the loss of {domain.name}" if domain.name else "the loss"
            losses[domain.name] = float(found.detach())
            if not math.isfinite(losses[domain.name]):
                raise ValueError(f"{of} is {losses[domain.name]} in step {step}: the weights are as they were")
            if not found.requires_grad:
                raise ValueError(f"{of} does not depend on what is trained, or was computed under no_grad")
            (found if domain.weight == 1 else found * domain.weight).backward()
    return losses


@dataclass
class _Judge:
    """Asks for validations, and keeps the weights of the best."""

    leaves: Leaves
    validate: Validate | None
    metric: str | None
    patience: int | None
    best: float = -math.inf
    step: int = 0
    since: int = 0
    kept: list[Tensor] | None = None

    def __call__(self, step: int) -> dict[str, float]:
        if self.validate is None:
            return {}
        found = self.validate(self.leaves.model)
        scores, _ = scored(found if isinstance(found, Mapping) else {self.metric or "score": found})
        self.metric = self.metric or next(iter(scores), "score")
        if self.metric not in scores:
            raise ValueError(f"validate gave no {self.metric!r}; it gave {', '.join(scores) or 'nothing'}")
        value = scores[self.metric]
        if math.isnan(value):
            raise ValueError(f"validate's {self.metric!r} is NaN after step {step}: the weights are as they were")
        self.since += 1
        if step == 0 or value > self.best:
            self.best, self.step, self.since = value, step, 0
            self.kept = self.leaves.copy() if step else None  # the bits before the first step are kept anyway
        return scores

    @property
    def tired(self) -> bool:
        return self.patience is not None and self.since >= self.patience

    def settle(self, last: int) -> int:
        """Leave the model with the best weights; the step that they are of."""
        if self.validate is None:
            return last
        if self.kept is None:
            self.leaves.back()
        else:
            self.leaves.put(self.kept)
        return self.step
