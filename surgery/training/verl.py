"""The same for verl: a class for ``trainer.checkpoint_callback_class``, which judges each saved checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from surgery.checkpoints.checkpoint import Checkpoint, Source
from surgery.checkpoints.trajectory import Trajectory
from surgery.formats.folders import moments_in
from surgery.measure.repair import BUDGETS
from surgery.measure.rows import Evaluate, Log
from surgery.measure.stage import Domains, answered, prompts, stage_damage
from surgery.reverting.folder import save
from surgery.reverting.rollback import rolled_back
from surgery.selectors.selectors import Selector

_WEIGHTS = ("actor/huggingface", "actor/model/huggingface", "actor")  # FSDP's hf_model; Megatron's; rank files
_logger = logging.getLogger(__name__)


class VerlRollbackCallback:
    """For verl's ``trainer.checkpoint_callback_class``: says of each saved checkpoint whether the stage hurt a domain.

    verl calls ``on_save`` on its driver after each save. The actor's checkpoint (Hugging Face weights where there are
    some, else rank files) is loaded there and compared with the model that training began with (``stage_damage``). The
    verdict, the numbers and the mask go into ``global_step_N/surgery/``. What the workers train is never changed; with
    ``repair`` a repaired checkpoint goes into ``global_step_N/surgery/repaired``. One of rank files can be resumed
    from: the optimizer's moments are zero there.

    verl makes the object itself, from its configuration alone, so name a subclass with your prompts.

    Args:
        domains: prompts of the domains that the stage may hurt, by name.
        config: verl's configuration, as it is handed to the class.
        earlier: the model that training began with (default: ``actor_rollout_ref.model.path`` of ``config``).
        keep, evaluate, recovery, limit, selector, budgets: as in ``stage_damage``.
        repair: write a repaired checkpoint as well.
        device, dtype: where the checkpoint is loaded (default: the CPU), and its dtype (default: its own).
        strict: raise where measuring fails, which ends the training (default: log a sentence and go on).
        log: called with one flat dictionary each time (``Stage.logged`` and ``step``), like ``wandb.log``.
        say: called with the verdict.

    Raises:
        ValueError: there are no prompts, or ``earlier`` is not known.

    Source: ours; the interface is verl's ``CheckpointCallback`` (verl #7513).

    >>> # class Watched(VerlRollbackCallback):
    >>> #     def __init__(self, config):
    >>> #         super().__init__({"math": load_prompts("math.jsonl", "runs/math")}, config=config)
    """

    def __init__(
        self,
        domains: Domains,
        *,
        config: Any = None,
        earlier: Source | None = None,
        keep: Domains | Iterable[str] | None = None,
        evaluate: Evaluate | str | None = None,
        repair: bool = False,
        recovery: float = 0.8,
        limit: float = 0.01,
        selector: Selector | None = None,
        budgets: Sequence[float] = BUDGETS,
        device: Any = None,
        dtype: torch.dtype | None = None,
        strict: bool = False,
        log: Log | None = None,
        say: Callable[[str], Any] = print,
    ) -> None:
        self.domains, self.config = prompts(domains), config
        self.earlier = earlier if earlier is not None else _start(config)
        self.repair, self.device, self.dtype, self.strict, self.log, self.say = repair, device, dtype, strict, log, say
        self._judge = partial(
            stage_damage, keep=keep, evaluate=evaluate, recovery=recovery, limit=limit, selector=selector,
            budgets=budgets,
        )  # fmt: skip

    def on_save(
        self, trainer: Any, global_step: int, checkpoint_dir: str, async_save: bool = False, **more: Any
    ) -> None:
        """Measure the checkpoint that was saved; a failure is logged, and raised only if ``strict``."""
        try:
            self._measure(global_step, Path(checkpoint_dir), async_save)
        except Exception as error:  # whatever it is, verl would end the training
            if self.strict:
                raise
            _logger.error("surgery did not measure %s: %s", checkpoint_dir, error)

    def _measure(self, step: int, checkpoint: Path, async_save: bool) -> None:
        if async_save:
            raise ValueError(
                "it is saved asynchronously, and its files may still be incomplete: set "
                "actor_rollout_ref.actor.checkpoint.async_save=False, or run surgery repair on it later"
            )
        places = [checkpoint / name for name in _WEIGHTS]
        later = next((one for one in places if any(one.glob("*.safetensors"))), places[-1])
        run = Trajectory(earlier=self.earlier, later=later)
        run.load(self.device, self.dtype)
        self.domains = answered(run, self.domains)
        found = self._judge(run, self.domains)
        place = checkpoint / "surgery"
        if found.mask is not None:
            done = f"{place / 'repaired'} holds the repaired checkpoint." if self.repair else "Nothing was repaired."
            found = replace(found, notes=(*found.notes, done))
        found.save(place, step=step, earlier=str(self.earlier)[:200])
        if found.mask is not None and self.repair:
            stored = Checkpoint(later)
            view = rolled_back(stored, to=run.tensors("earlier"), mask=found.mask)
            resumable = stored.stored.training and moments_in(stored.folder, stored.stored) is not None
            save(view, place / "repaired", reset_optimizer=resumable)
        if self.log is not None:
            self.log({"step": step, **found.logged()})
        self.say(f"step {step}: {found.verdict}\n(in {place})")


def _start(config: Any) -> str:
    """The folder that verl's actor begins with."""
    try:
        return str(config["actor_rollout_ref"]["model"]["path"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            "the model that training began with is not known: pass earlier=, or config= with "
            "actor_rollout_ref.model.path"
        ) from error
