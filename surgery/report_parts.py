"""The parts of an inquiry, and what they share: models, halves of the prompts, the domain that lost most."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from surgery.attribution import damage
from surgery.evaluators import evaluator, likelihood
from surgery.evidence_changes import changes
from surgery.evidence_directions import Directions, directions
from surgery.evidence_overlap import Overlap, overlap
from surgery.evidence_profile import Profile, profile
from surgery.gradient_cosines import Gradients, gradients
from surgery.histories import History, Lost, history
from surgery.judging import judged
from surgery.neurons import Neurons
from surgery.predictions import distillation, positions
from surgery.prompts import Batch, halved
from surgery.refresh_report import Refresh
from surgery.refreshing import refresh
from surgery.responses import respond
from surgery.rows import EARLIER, LATER, Evaluate, Row, Sweep, measured
from surgery.scores import activation, magnitude
from surgery.selection import AMCSelector, DamageSelector, RandomSelector, Selector
from surgery.swap import earlier_model
from surgery.sweeps import sweep
from surgery.theory_damage import DamageTerms, damage_terms
from surgery.theory_landscape import Landscape
from surgery.trajectory import Trajectory

CHANGED, ACTIVE = 0.10, 0.05  # the paper's shares of neurons
# Of the way that training went per parameter, what a refresh may go back: Adam's steps all have about one size, and the
# whole way, walked in all coordinates at once, does harm in the lab.
_SHARE = 0.25


@dataclass(frozen=True)
class Sites:
    """Where the damage sits: D of every neuron, summed up.

    ``half``: the smallest share of all neurons that holds half of the positive D. ``gain`` = Σ of the positive D and
    ``loss`` = KL(p_earlier ‖ p_later) are in nats per response token. ``blocks``: the positive D by block.
    """

    half: float
    gain: float
    loss: float
    blocks: Profile


@dataclass(frozen=True)
class Refreshed:
    """A short training on the damaged domain: its report, its rate, and what it brought, judged as a rollback is."""

    report: Refresh
    rate: float
    row: Row


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
    found: dict[str, Any] = field(default_factory=dict)

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
            model = self.last if own is None else Trajectory(later=own).load(self.device, self.dtype)
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
        """The largest loss that can be told from nothing."""
        first = self.found["history"].lost[0]
        return first if first.certain and first.amount > 0 else None

    @cached_property
    def focus(self) -> tuple[str, Trajectory]:
        """The domain that lost most, and the way from its best checkpoint to the last."""
        if "history" not in self.found:
            raise Missing("to know which domain lost most (see history)")
        if self.lost is None:
            raise Missing("a domain whose loss can be told from nothing; more prompts may show one")
        if self.lost.domain not in self.choosing:
            raise Missing(f"prompts of {self.lost.domain}, which lost most: --data {self.lost.domain}=file")
        return self.lost.domain, self.run.back_to(self.lost.best)


def _several(study: Study) -> dict[str, Trajectory]:
    steps = study.run.steps()
    if len(steps) < 2:
        raise Missing("three checkpoints or more, to compare the updates of two stages")
    return steps


def _changed(study: Study) -> Overlap:
    return overlap({name: magnitude(step) for name, step in _several(study).items()}, top=CHANGED)


def _directions(study: Study) -> Directions:
    _several(study)
    return directions(study.run, top=CHANGED, how="uniform")


def _history(study: Study) -> History:
    return history(study.run, study.measure, device=study.device, dtype=study.dtype)


def _active(study: Study) -> Overlap:
    found = {domain: activation(study.last, batches, layout=study.run.layout) for domain, batches in _domains(study)}
    return overlap(found, top=ACTIVE)


def _gradients(study: Study) -> Gradients:
    return gradients(study.last, dict(_domains(study)))


def _domains(study: Study) -> Iterable[tuple[str, list[Batch]]]:
    if len(study.choosing) < 2:
        raise Missing("prompts of two domains or more: --data domain=file, again for each")
    return study.choosing.items()


def _sites(study: Study) -> Sites:
    domain, run = study.focus
    scores = damage(run, study.choosing[domain])
    positive = Neurons({name: value.double().clamp(min=0) for name, value in scores.items()})
    flat = torch.cat(list(positive.values())).sort(descending=True).values
    gain = float(flat.sum())
    half = int(torch.searchsorted(flat.cumsum(0), gain / 2)) + 1
    return Sites(half / len(flat), gain, float(scores.made_by["damage"]["loss"]), profile(positive))


def _terms(study: Study) -> DamageTerms:
    domain, run = study.focus
    return damage_terms(Landscape.around(run, study.choosing[domain]))


def _rollback(study: Study) -> Sweep:
    domain, run = study.focus
    first = study.budgets[0]
    selectors: list[Selector] = [DamageSelector(first), RandomSelector(first)]
    if run.base is not None:
        selectors.insert(1, AMCSelector(first))
    return sweep(
        run, study.choosing[domain], selectors=selectors, budgets=study.budgets, evaluate=study.measure,
        metric=domain,
    )  # fmt: skip


def _refreshed(study: Study) -> Refreshed:
    domain, run = study.focus
    if not study.steps:
        raise Missing("a number of steps: refresh_steps=10, in the shell --refresh-steps 10")
    if "rollback" not in study.found:
        raise Missing("what the rollbacks are measured against (see rollback)")
    batches = study.choosing[domain]
    moved = changes(Trajectory(earlier=run.earlier, later=run.later)).incremental[0].whole
    rate = _SHARE * moved.norm / math.sqrt(moved.parameters) / study.steps
    with earlier_model(run) as earlier:
        loss = distillation(earlier, batches)

    def closeness(model: nn.Module) -> float:
        with torch.no_grad():
            return -sum(float(loss(model, batch)) * int(positions(batch).sum()) for batch in batches)

    every, start = max(1, study.steps // 5), time.perf_counter()
    with refresh(study.last, loss, batches, study.steps, rate, validate=closeness, every=every) as done:
        metrics, items = measured(torch.no_grad()(study.measure)(study.last))
    row = Row(f"refresh, {study.steps} steps", 1.0, 0, metrics, time.perf_counter() - start, items=items)
    rows = study.found["rollback"]
    (earlier_row,), (later_row,) = rows[EARLIER], rows[LATER]
    return Refreshed(done, rate, judged([row], earlier_row, later_row, domain)[0])


PARTS: dict[str, Callable[[Study], Any]] = {
    "changes": lambda study: changes(study.run),
    "changed": _changed,
    "directions": _directions,
    "history": _history,
    "active": _active,
    "gradients": _gradients,
    "sites": _sites,
    "terms": _terms,
    "rollback": _rollback,
    "refreshed": _refreshed,
}
