"""A training stage, judged: which domains it hurt, and the smallest rollback that repairs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

from surgery.checkpoints.trajectory import Trajectory
from surgery.files import whole_folder
from surgery.live.answers import respond
from surgery.live.prompts import Batch, batches_of, halved
from surgery.masks.mask import Mask
from surgery.measure.evaluators import likelihood
from surgery.measure.repair import BUDGETS, NATS, Repair, default_selector, repair, told_loss
from surgery.measure.rows import Evaluate, Row, fell, judged
from surgery.measure.statistics import needed
from surgery.measure.sweep import Bench
from surgery.reverting.provenance import versions
from surgery.reverting.rollback import rollback
from surgery.scores.damage import earlier_answers
from surgery.selectors.selectors import Selector
from surgery.tables import as_json, json_text

VERDICT, RECORD, MASK = "verdict.txt", "stage.json", "mask.safetensors"
_OUTCOMES = {
    "repaired": "hurt, can be repaired",
    "not repairable": "hurt, can't be repaired within the limits",
    "intact": "hurt, and won back by the repairs before",
}
Domains = Mapping[str, Iterable[Batch]]


@dataclass(frozen=True)
class Stage:
    """What a training stage did to each domain (see ``stage_damage``); prints as a verdict in words.

    ``domains``: those that were asked about. ``earlier``, ``later``: their rows. ``repairs``: what ``repair`` found,
    for each domain that was hurt. ``mask``: what all repairs revert together, None where there is nothing to revert.
    ``notes``: what was done with it, and warnings.

    Source: ours.
    """

    domains: tuple[str, ...]
    earlier: Row
    later: Row
    repairs: dict[str, Repair]
    mask: Mask | None = field(repr=False)
    unit: str = ""
    notes: tuple[str, ...] = ()

    @property
    def hurt(self) -> tuple[str, ...]:
        """The domains that lost significantly."""
        return tuple(self.repairs)

    @property
    def repaired(self) -> Row | None:
        """The row of the model with ``mask`` reverted."""
        chosen = [done.chosen for done in self.repairs.values() if done.chosen is not None]
        return chosen[-1] if chosen else None

    @property
    def verdict(self) -> str:
        """A line on the stage, and a line on each domain."""
        fine = [name for name in self.domains if name not in self.repairs]
        parts = [f"The stage hurt {', '.join(self.hurt)}."] if self.hurt else ["The stage hurt no domain."]
        lines = [" ".join([*parts, *([f"Not hurt: {', '.join(fine)}."] if fine else [])])]
        for name in self.domains:
            if name in self.repairs:
                done = self.repairs[name]
                lines.append(f"{name}: {_OUTCOMES[done.outcome]}: {done.verdict.partition(': ')[2]}")
                lines += [f"{name}: {note}" for note in self.repairs[name].notes]
                continue
            lost = self.earlier.paired.get(name)
            lines.append(f"{name}: not hurt: {told_loss(name, self.unit, lost, self.earlier, self.later)}.")
            if lost and lost.gain > 0 and (more := needed(lost)):
                lines.append(f"{name}: underpowered: a loss of this size needs about {more} items to be significant")
        return "\n".join([*lines, *self.notes])

    def __str__(self) -> str:
        return self.verdict

    def logged(self) -> dict[str, str | float]:
        """One flat dictionary for experiment trackers: for each domain its scores, its loss with interval and p.

        ``hurt/math`` is 0 or 1; ``repaired/math`` is the score with the mask reverted, where there is one.
        """
        found: dict[str, str | float] = {}
        for name in self.domains:
            before, now, lost = self.earlier.metrics[name], self.later.metrics[name], self.earlier.paired.get(name)
            found |= {f"earlier/{name}": before, f"later/{name}": now, f"lost/{name}": before - now}
            if lost is not None:
                found |= {f"lost_low/{name}": lost.interval[0], f"lost_high/{name}": lost.interval[1]}
                found[f"p/{name}"] = lost.p
            found[f"hurt/{name}"] = int(name in self.repairs)
            if self.repaired is not None:
                found[f"repaired/{name}"] = self.repaired.metrics[name]
        return found if self.mask is None else {**found, "reverted": sum(self.mask.count().values())}

    def save(self, folder: str | Path, **more: Any) -> Path:
        """Write the verdict in words, the numbers, and the mask if there is one, as a folder of its own.

        Args:
            folder: it is replaced if it was written by ``save``.
            more: what else goes into the numbers' file, as JSON.
        """
        rows = {"earlier": self.earlier, "later": self.later, "repaired": self.repaired}
        metrics = {name: row.metrics for name, row in rows.items() if row is not None}
        lost = {name: one for name, one in self.earlier.paired.items() if name in self.domains}
        told = {**more, "hurt": self.hurt, "scores": metrics, "lost": lost, "notes": self.notes, "versions": versions()}
        with whole_folder(folder, (VERDICT,), overwrite=True) as new:
            new.mkdir()
            (new / VERDICT).write_text(self.verdict + "\n", encoding="utf-8")
            (new / RECORD).write_text(json_text(as_json(told)) + "\n", encoding="utf-8")
            if self.mask is not None:
                self.mask.save(new / MASK)
        return Path(folder)


def stage_damage(
    run: Trajectory,
    domains: Domains,
    *,
    keep: Domains | Iterable[str] | None = None,
    evaluate: Evaluate | str | None = None,
    recovery: float = 0.8,
    limit: float = 0.01,
    selector: Selector | None = None,
    budgets: Sequence[float] = BUDGETS,
    progress: Callable[[str], None] | None = None,
) -> Stage:
    """Say which domains the later model has lost against the earlier one, and find what repairs those.

    All domains are measured on the two models, and a domain is hurt where its loss is significant. Then ``repair`` is
    called for each that was hurt, in their order, on the model with the masks before reverted. It may hurt no other of
    the domains, and none in ``keep``, by more than ``limit``. The live model is the same at the end, bit for bit.

    Args:
        run: a trajectory with ``earlier`` and ``later``.
        domains: prompts by domain. Half of them choose what to revert, and half measure; with ``evaluate`` all choose.
            The earlier model first answers those without responses.
        keep: as in ``repair``: prompts of other domains, like the one that the stage trained.
        evaluate: as in ``repair``; it has to return a metric of each domain's name.
        recovery, limit, selector, budgets, progress: as in ``repair``.

    Raises:
        ValueError: there is no domain, or one without two prompts; a domain without a metric; and as ``repair``.

    Source: ours.

    >>> # found = stage_damage(Trajectory(earlier="runs/math", later="runs/qa"), {"math": math}); print(found)
    """
    data, selector = answered(run, domains), selector or default_selector(run)
    kept, unit = list(keep or ()), ""
    if evaluate is None:
        if keep is not None and not isinstance(keep, Mapping):
            raise ValueError('keep= names metrics of evaluate, and there is none: pass prompts, keep={"qa": batches}')
        if both := set(keep or ()) & set(data):
            raise ValueError(f"keep: {both.pop()!r} is one of the domains, which are kept in any case: name it once")
        spared = {name: respond(run.load(), batches_of(batches)) for name, batches in (keep or {}).items()}
        evaluate = likelihood({name: halved(batches, 1) for name, batches in data.items()} | spared)
        data, unit = {name: halved(batches, 0) for name, batches in data.items()}, NATS
    bench = Bench(run, None, evaluate, say=progress)
    later, earlier = bench.later(), bench.earlier()
    if missing := [name for name in [*data, *kept] if name not in later.metrics]:
        raise ValueError(f"evaluate returns no metric called {missing[0]!r}, only {sorted(later.metrics)}")
    earlier, later = judged([earlier, later], earlier, later, next(iter(data)))
    repairs: dict[str, Repair] = {}
    masks: list[Mask] = []
    with ExitStack() as tried:
        for name in (name for name in data if fell(earlier, later, name)):
            live = Trajectory(earlier=run.tensors("earlier"), later=run.load(), layout=run.layout)
            others = [other for other in [*data, *kept] if other != name]
            done = repair(
                live if masks else run, data[name], keep=others, recovery=recovery, limit=limit, selector=selector,
                budgets=budgets, evaluate=evaluate, metric=name, progress=progress,
            )  # fmt: skip
            repairs[name] = replace(done, unit=unit)
            if done.mask is not None:
                masks.append(done.mask)
                tried.enter_context(rollback(run.load(), to=run.tensors("earlier"), mask=done.mask, layout=run.layout))
    return Stage(tuple(data), earlier, later, repairs, reduce(or_, masks) if masks else None, unit)


def answered(run: Trajectory, domains: Domains) -> dict[str, list[Batch]]:
    """The prompts of each domain, answered by the earlier model where they have no responses.

    Raises:
        ValueError: there is no domain, or one without two prompts.
    """
    found = prompts(domains)
    return {name: earlier_answers(run, batches) for name, batches in found.items()}


def prompts(domains: Domains) -> dict[str, list[Batch]]:
    """The prompts of each domain, seen to be enough; as ``answered``."""
    if not isinstance(domains, Mapping) or not domains:
        raise ValueError(f'domains={str(domains)[:60]}: expected prompts by domain, {{"math": load_prompts(...)}}')
    found = {name: list(batches_of(batches)) for name, batches in domains.items()}
    for name, batches in found.items():
        if (count := sum(len(batch["input_ids"]) for batch in batches)) < 2:
            raise ValueError(
                f"the domain {name!r} has {count} prompts: expected two or more, half choose and half measure"
            )
    return found
