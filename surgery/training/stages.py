"""A Trainer's callback that judges the stage it trains, and repairs it where it is asked to."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from surgery.checkpoints.checkpoint import Source, folder_of
from surgery.checkpoints.opening import sampled
from surgery.checkpoints.trajectory import Trajectory
from surgery.checkpoints.wrapped import is_unmerged
from surgery.layout.slots import Layout
from surgery.live.earlier import AsLive
from surgery.live.hooks import evaluating
from surgery.masks.edits import Edit
from surgery.masks.mask import Mask
from surgery.masks.neurons import Neurons
from surgery.measure.repair import BUDGETS
from surgery.measure.rows import Evaluate, Log
from surgery.measure.stage import Domains, Stage, answered, prompts, stage_damage
from surgery.reverting.live_adapters import factor_edits
from surgery.reverting.rollback import rollback
from surgery.selectors.selectors import Selector
from surgery.training.moments import Moments, forget, moments_of

PLACE = "surgery"  # the folder beside a checkpoint


class RollbackCallback(TrainerCallback):
    """Says whether the stage that a Trainer trains hurts other domains, and what would repair it; or repairs it.

    Each time it compares the model with the one that training began with (``stage_damage``). The verdict, the numbers
    and the mask go into ``checkpoint-N/surgery/`` (into ``output_dir/surgery/`` where that step was not saved). Without
    ``repair`` the training is bit for bit the same with and without it.

    With ``repair`` the mask is rolled back in the model that is being trained, and the optimiser's running means of the
    reverted weights are set to zero. What was saved before stays as it is: ``surgery rollback checkpoint-N --to EARLIER
    --mask checkpoint-N/surgery/mask.safetensors`` does the same to a folder.

    Args:
        domains: prompts of the domains that the stage may hurt, by name (two or more each).
        earlier: the model that training began with (default: the folder that the Trainer's model was loaded from).
        keep, evaluate, recovery, limit, selector, budgets: as in ``stage_damage``.
        when: "end" of the training, or at each "save".
        repair: roll back in place what was found.
        log: called with one flat dictionary each time (``Stage.logged`` and ``step``), like ``wandb.log``.
        say: called with the verdict.
        layout: where the neurons lie (default: found).

    ``measured`` holds what was found, by step.

    Raises:
        ValueError: settings out of range; when training begins: it runs in several processes, or it is not known where
            the model came from, or ``earlier`` is of another model.

    Source: ours.

    >>> # trainer = GRPOTrainer(model="runs/math", callbacks=[RollbackCallback({"math": math})], ...); trainer.train()
    """

    def __init__(
        self,
        domains: Domains,
        *,
        earlier: Source | None = None,
        keep: Domains | Iterable[str] | None = None,
        evaluate: Evaluate | str | None = None,
        when: Literal["end", "save"] = "end",
        repair: bool = False,
        recovery: float = 0.8,
        limit: float = 0.01,
        selector: Selector | None = None,
        budgets: Sequence[float] = BUDGETS,
        log: Log | None = None,
        say: Callable[[str], Any] = print,
        layout: Layout | None = None,
    ) -> None:
        if when not in ("end", "save"):
            raise ValueError(f'when={when!r}: expected "end" or "save"')
        self._given = prompts(domains), earlier
        self.when, self.repair, self.log, self.say, self.layout = when, repair, log, say, layout
        self.measured: dict[int, Stage] = {}
        self._judge = partial(
            stage_damage, keep=keep, evaluate=evaluate, recovery=recovery, limit=limit, selector=selector,
            budgets=budgets,
        )  # fmt: skip

    def on_train_begin(self, args: Any, state: Any, control: Any, **told: Any) -> None:
        """See that the stage can be measured, before it takes hours."""
        if args.world_size > 1:
            raise ValueError(
                f"training runs in {args.world_size} processes, and RollbackCallback measures in one: leave it out, "
                f"and run surgery repair on the saved folders"
            )
        self.measured.clear()
        self.domains, given = self._given  # the earlier model of this training answers them
        self.earlier = given if given is not None else _start(told["model"], self.layout, state.global_step)
        live, _ = self._run(told["model"]).live("earlier")
        if self.repair and is_unmerged(told["model"]):
            everything = Neurons({name: torch.ones(n, dtype=torch.bool) for name, n in live.layout.sizes.items()})
            self._factors(told["model"], everything)

    def on_save(self, args: Any, state: Any, control: Any, **told: Any) -> None:
        """Measure the model that was just saved."""
        if self.when == "save":
            self._measure(args, state, told["model"], told["optimizer"], over=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **told: Any) -> None:
        """Measure the trained model, or say so where nothing was measured."""
        if self.when == "end":
            self._measure(args, state, told["model"], told["optimizer"], over=True)
        elif not self.measured:
            warnings.warn(
                "the stage was never measured, because no checkpoint was saved: set save_steps=, or pass "
                'RollbackCallback(when="end")',
                stacklevel=2,
            )

    def _run(self, model: nn.Module) -> Trajectory:
        return Trajectory(earlier=self.earlier, later=model, layout=self.layout)

    def _measure(self, args: Any, state: Any, model: nn.Module, optimizer: Any, over: bool) -> None:
        run = self._run(model)
        with undisturbed(model):
            self.domains = answered(run, self.domains)
            found = self._judge(run, self.domains)
        if found.mask is not None:
            done = "The model was not changed."
            if self.repair:
                done = self._repaired(found.mask, run, model, optimizer, over)
            found = replace(found, notes=(done,))
        self.measured[state.global_step] = found
        place = found.save(_beside(args, state, over) / PLACE, step=state.global_step, earlier=str(self.earlier)[:200])
        if self.log is not None:
            self.log({"step": state.global_step, **found.logged()})
        self.say(f"step {state.global_step}: {found.verdict}\n(in {place})")

    def _repaired(self, mask: Mask, run: Trajectory, model: nn.Module, optimizer: Any, over: bool) -> str:
        """Roll back in place; what was done, or why it was not."""
        moments: Moments = []
        edits = self._factors(model, mask) if is_unmerged(model) else None
        try:
            moments = moments_of(optimizer, model, mask, self.layout, edits)
        except ValueError as error:
            if not over:
                return f"The model was not changed: {error}."
        done = rollback(model, to=run.tensors("earlier"), mask=mask, layout=self.layout, keep_on="cpu")
        forget(moments)
        names = ", ".join(dict.fromkeys(name for _, name, _ in moments))
        reset = f"{names} of the optimiser were set to zero there" if names else "the optimiser was left as it is"
        return f"In the model that was trained: {done}; {reset}."

    def _factors(self, model: nn.Module, mask: Mask) -> list[Edit]:
        """What a rollback writes into the matrices of an adapter that is not merged."""
        return [edit for edit, _ in factor_edits(model, self.earlier, mask, 1.0, self.layout)[1]]


def _start(model: Any, layout: Layout | None, step: int) -> Path:
    """The folder that a model was loaded from; before the first step it has to hold the model's own weights."""
    name = getattr(model, "name_or_path", None)
    advice = 'pass RollbackCallback(..., earlier="FOLDER") with the model as it was when training began'
    if not name:
        raise ValueError(
            f"the Trainer's model was not loaded from a folder, so nothing is known of its start: {advice}"
        )
    try:
        folder = folder_of(name)
    except LookupError as error:
        raise ValueError(f"the folder that the Trainer's model was loaded from is gone ({error}): {advice}") from error
    live, source = Trajectory(earlier=folder, later=model, layout=layout).live("earlier")
    there = AsLive(source, live)
    pairs = [(live.tensors[one], there[one]) for one in there]
    if step == 0 and sampled(one for one, _ in pairs) != sampled(other for _, other in pairs):
        raise ValueError(f"the Trainer's model has other weights than {folder}, which it was loaded from: {advice}")
    return folder


def _beside(args: Any, state: Any, over: bool) -> Path:
    """The checkpoint that holds the model as it is now, or the Trainer's folder where there is none."""
    best = state.best_model_checkpoint if over and args.load_best_model_at_end else None
    saved = Path(best or Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
    return saved if saved.is_dir() else Path(args.output_dir)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """While the body runs, the model is in eval mode; at the end its modes and all random states are what they were."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    drawn, arrays = random.getstate(), np.random.get_state()
    try:
        with evaluating(model), torch.random.fork_rng(devices=sorted(devices, key=str)):
            yield
    finally:
        random.setstate(drawn)
        np.random.set_state(arrays)
