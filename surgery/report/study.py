"""What the parts of an inquiry share: models, prompts and the domain that lost most, found when first asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from surgery.checkpoints.trajectory import Trajectory
from surgery.live.answers import respond
from surgery.live.prompts import Batch, halved
from surgery.masks.mask import Mask
from surgery.measure.evaluators import evaluator, likelihood
from surgery.measure.history import Lost
from surgery.measure.rows import Evaluate

GIVEN, ASKED = "the given mask", "left out on request"  # a row; why a part is not there


class Missing(Exception):
    """What a part would need."""


@dataclass
class Study:
    """What the parts share, each loaded or computed when it is first asked for."""

    run: Trajectory
    prompts: dict[str, list[Batch]]
    evaluate: Evaluate | str | None
    budgets: tuple[float, ...]
    steps: int
    device: Any
    dtype: Any
    mask: Mask | None = None
    found: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @cached_property
    def last(self) -> nn.Module:
        """The last checkpoint, live."""
        return self.run.load(self.device, self.dtype)

    @cached_property
    def answered(self) -> dict[str, list[Batch]]:
        """The prompts with responses."""
        if not self.prompts:
            raise Missing("prompts of a domain or more: data={domain: batches}, in the shell --data domain=file")
        found = {}
        for domain, batches in self.prompts.items():
            if all("labels" in batch for batch in batches):
                found[domain] = batches
                continue
            own = self.run.checkpoints.get(domain)
            model = self.last if own is None else Trajectory(later=self.run.held(own)).load(self.device, self.dtype)
            found[domain] = respond(model, batches)
        return found

    def half(self, which: int) -> dict[str, list[Batch]]:
        """Every other prompt of each domain: 0 those that choose, 1 those that measure."""
        found = {domain: halved(batches, which) for domain, batches in self.answered.items()}
        if short := [domain for domain, batches in found.items() if not batches]:
            raise Missing(f"two prompts or more of {short[0]}: half of them choose, the other half measures")
        return found

    @cached_property
    def choosing(self) -> dict[str, list[Batch]]:
        return self.half(0)

    @cached_property
    def measure(self) -> Evaluate:
        return evaluator(self.evaluate) if self.evaluate is not None else likelihood(self.half(1))

    @cached_property
    def lost(self) -> Lost | None:
        """The largest significant loss."""
        first = self.found["history"].lost[0]
        return first if first.certain and first.amount > 0 else None

    @cached_property
    def focus(self) -> tuple[str, Trajectory]:
        """The domain that lost most, and the way from its best checkpoint to the last."""
        if "history" not in self.found:
            why = self.skipped["history"]  # the same reason, so that all of them are told together
            raise Missing("the history" if why == ASKED else why)
        if self.lost is None:
            raise Missing("a domain with a significant loss; more prompts may show one")
        if self.lost.domain not in self.choosing:
            raise Missing(f"prompts of {self.lost.domain}, which lost most: --data {self.lost.domain}=file")
        return self.lost.domain, self.run.back_to(self.lost.best)
