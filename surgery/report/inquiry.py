"""The inquiry: everything that a trajectory and some prompts show about what a later stage cost, in one call."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surgery.checkpoints.checkpoint import Checkpoint
from surgery.checkpoints.opening import fingerprint
from surgery.checkpoints.trajectory import Trajectory
from surgery.evidence.changes import Changes, changes
from surgery.evidence.directions import Directions, directions
from surgery.evidence.gradients import Gradients, gradients
from surgery.evidence.overlap import Overlap, Profile, overlap, profile
from surgery.live.earlier import earlier_model
from surgery.live.losses import distillation, mean_loss
from surgery.live.prompts import Batch, batches_of, opened_tokenizer
from surgery.masks.budget import check_budget
from surgery.masks.mask import Mask, checked
from surgery.masks.neurons import Neurons
from surgery.measure.history import History, Lost, history
from surgery.measure.rows import EARLIER, LATER, Evaluate, Row, Sweep, judged, measured
from surgery.measure.sweep import Bench, sweep
from surgery.report.study import ASKED, GIVEN, Missing, Study
from surgery.report.tokens import Tokens, tokens
from surgery.reverting.provenance import versions
from surgery.scores.amc import activation, magnitude
from surgery.scores.damage import damage
from surgery.scores.memory import remembered
from surgery.selectors.selectors import AMCSelector, DamageSelector, RandomSelector, Selector
from surgery.tables import write_json
from surgery.theory.damage import DamageTerms, damage_terms
from surgery.theory.landscape import Landscape
from surgery.training.refresh import Refresh, refresh

CHANGED, ACTIVE = 0.10, 0.05  # the paper's shares of neurons
# Of the way that training went per parameter, what a refresh may go back: Adam's steps all have about one size, and the
# whole way, walked in all coordinates at once, does harm in the lab.
_SHARE = 0.25


@dataclass(frozen=True)
class Sites:
    """Where the damage is: D of every neuron, summed up.

    ``half``: the smallest share of all neurons that holds half of the positive D. ``gain``: the sum of the positive D;
    ``loss``: the Hellinger distance of the later from the earlier model's predictions, the mean over response tokens.
    ``blocks``: the positive D by block.
    """

    half: float
    gain: float
    loss: float
    blocks: Profile


@dataclass(frozen=True)
class Refreshed:
    """A short training on the damaged domain: its report, its learning rate, and its row, judged like a rollback's."""

    report: Refresh
    rate: float
    row: Row


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
    selectors: list[Selector] = [DamageSelector(first, units="mlp"), RandomSelector(first)]
    if run.base is not None:
        selectors.insert(1, AMCSelector(first))
    found = sweep(
        run, study.choosing[domain], selectors=selectors, budgets=study.budgets, evaluate=study.measure,
        metric=domain,
    )  # fmt: skip
    if study.mask is None:
        return found
    row = Bench(run, None, study.measure).tried(GIVEN, study.mask)
    return Sweep(domain, (*found, _judged(row, found)))


def _judged(row: Row, rows: Sweep) -> Row:
    (earlier,), (later,) = rows[EARLIER], rows[LATER]
    return judged([row], earlier, later, rows.metric)[0]


def best(rollbacks: Sweep) -> Row | None:
    """The rollback by D that brought back most, if one brought back anything."""
    rows = [row for row in rollbacks["D"] if (row.recovery or 0) > 0]
    return max(rows, key=lambda row: row.recovery or 0, default=None)


def _tokens(study: Study) -> Tokens:
    domain, run = study.focus
    last = run.tensors("later")
    folder = last if isinstance(last, Checkpoint) else getattr(study.last, "name_or_path", None)
    if not folder:
        raise Missing("a tokenizer: pass the last checkpoint as a folder that has one")
    masks = {} if study.mask is None else {GIVEN: study.mask}
    if not masks and "rollback" in study.found and (row := best(study.found["rollback"])) is not None:
        again = DamageSelector(row.budget, units="mlp").select(run, study.choosing[domain])
        masks = {f"D, {100 * row.budget:g} %": again}
    return tokens(run, study.half(1)[domain], opened_tokenizer(folder), masks)


def _refreshed(study: Study) -> Refreshed:
    domain, run = study.focus
    if not study.steps:
        raise Missing("a number of steps: refresh_steps=10, in the shell --refresh-steps 10")
    if "rollback" not in study.found:
        raise Missing("the reference rows of the rollbacks (see rollback)")
    batches = study.choosing[domain]
    moved = changes(Trajectory(earlier=run.earlier, later=run.later)).incremental[0].whole
    rate = _SHARE * moved.norm / math.sqrt(moved.parameters) / study.steps
    with earlier_model(run) as earlier:
        loss = distillation(earlier, batches)

    every, start = max(1, study.steps // 5), time.perf_counter()
    with refresh(
        study.last,
        loss,
        batches,
        study.steps,
        rate,
        validate=lambda model: -mean_loss(loss, model, batches),
        every=every,
    ) as done:
        metrics, items = measured(torch.no_grad()(study.measure)(study.last))
    row = Row(f"refresh, {study.steps} steps", 1.0, 0, metrics, time.perf_counter() - start, items=items)
    return Refreshed(done, rate, _judged(row, study.found["rollback"]))


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
    "tokens": _tokens,
    "refreshed": _refreshed,
}


LIKELIHOOD = "log-likelihood of the responses (nats per token)"
BUDGETS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32)


@dataclass(frozen=True)
class Inquiry:
    """What ``analyse`` found; a part is None where the inputs did not allow it or it was skipped: ``skipped`` says why.

    ``stages``: the checkpoints, in training order; ``domains``: those with prompts; ``score``: the measured score, in
    words. ``changes``: how far all parameters moved; ``changed``, ``directions``: overlap and cosines of the neurons
    that stages changed most. ``history``: every domain at every checkpoint. ``focus``: the domain with the largest
    significant loss; ``sites``, ``terms``, ``rollback`` and ``refreshed`` are about it. ``active``: overlap of the
    neurons that domains use most. ``gradients``: of all domains, at the last checkpoint. ``sites``: where D is large.
    ``terms``: Proposition 1 along the change since the domain's best checkpoint. ``rollback``: selectors × budgets.
    ``tokens``: the probability of each response token, before and after the best of them or the given mask.
    ``refreshed``: a short training on the domain, undone afterwards. ``skipped``: part that was not computed → what it
    needs. ``made``: versions, and hashes of the checkpoints.

    Source: ours; each part names its own.
    """

    stages: tuple[str, ...]
    domains: tuple[str, ...]
    score: str
    skipped: dict[str, str]
    made: dict[str, Any]
    changes: Changes | None = None
    changed: Overlap | None = None
    directions: Directions | None = None
    history: History | None = None
    focus: Lost | None = None
    active: Overlap | None = None
    gradients: Gradients | None = None
    sites: Sites | None = None
    terms: DamageTerms | None = None
    rollback: Sweep | None = None
    tokens: Tokens | None = None
    refreshed: Refreshed | None = None

    @property
    def needs(self) -> dict[str, str]:
        """Of ``skipped`` the parts with the same reason together: "history, active" → the reason."""
        reasons = dict.fromkeys(self.skipped.values())
        return {", ".join(name for name, why in self.skipped.items() if why == reason): reason for reason in reasons}

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        write_json(self, path)


def analyse(
    run: Trajectory,
    data: Mapping[str, Iterable[Batch]] | None = None,
    *,
    evaluate: Evaluate | str | None = None,
    budgets: Sequence[float] = BUDGETS,
    refresh_steps: int = 10,
    mask: Mask | None = None,
    skip: Iterable[str] = (),
    device: Any = None,
    dtype: Any = None,
    progress: Callable[[str], None] | None = None,
) -> Inquiry:
    """Does a later stage hurt an earlier one? All evidence that the inputs allow, and what a repair would bring back.

    Half of each domain's prompts (every other one) choose: scores, gradients, masks and the refresh use them. The other
    half measure the history and the repairs, so a repair is never measured on the prompts that chose it. The focus is
    the domain with the largest significant loss. It is rolled back to the checkpoint of its own name (or its best one),
    never further.

    Args:
        run: two checkpoints or more (see ``Trajectory.through``): folders or live models; the last is judged.
        data: domain → batches. Prompts without responses are answered by the domain's own stage, or else the last.
        evaluate: model → {domain: score or one per item}, larger = better, instead of the responses' likelihood.
        budgets: of the rollbacks, fractions of all MLP neurons.
        refresh_steps: steps of the refresh (distillation from the domain's own checkpoint, Adam, float32 copies).
        mask: a repair of your own: it is measured beside the rollbacks, and shown token by token. It sets back to the
            checkpoint where the damaged domain was best.
        skip: parts to leave out, by their names in ``Inquiry``.
        device: where models run; dtype: theirs (default: the checkpoints' own).
        progress: called with a line of text before each part.

    Returns:
        An ``Inquiry``; ``write_report`` makes a page of it. One model is in memory at a time; the last one is restored
        at the end, bit for bit.

    Raises:
        ValueError: fewer than two checkpoints, or checkpoints of different models; ``skip`` names no part; a budget or
            the data are invalid. If a single part refuses its inputs (``ValueError``, ``LookupError``, a full disk),
            the reason is in ``skipped`` and the other parts are computed; an error that shows a bug is raised.

    Source: ours.
    """
    asked = list(skip)
    if wrong := [name for name in asked if name not in PARTS]:
        raise ValueError(f"skip={wrong[0]!r}: expected some of {', '.join(PARTS)}")
    for budget in budgets:
        check_budget(budget)
    if data is not None and not isinstance(data, Mapping):
        raise ValueError('data has to say which domain the prompts are of: {"math": load_prompts(...)}')
    run.check_whole()
    prompts = {domain: list(batches_of(batches)) for domain, batches in (data or {}).items()}
    study = Study(run, prompts, evaluate, tuple(budgets), refresh_steps, device, dtype, mask and checked(mask))
    skipped = study.skipped = dict.fromkeys(asked, ASKED)
    with remembered(own=True):
        for name, part in PARTS.items():
            if name in skipped:
                continue
            if progress is not None:
                progress(name)
            try:
                study.found[name] = part(study)
            except Missing as why:
                skipped[name] = str(why)
            except (ValueError, LookupError, OSError) as error:
                if name == "changes" or not _on_purpose(error):
                    raise  # the checkpoints themselves are wrong, or there is a bug
                skipped[name] = str(error)
    hashes = {name: fingerprint(weights) for name, weights in run.opened().items()}
    made = {"versions": versions(), "checkpoints": hashes}
    lost = study.lost if "history" in study.found else None
    score = LIKELIHOOD if evaluate is None else "score"
    return Inquiry(tuple(run.checkpoints), tuple(prompts), score, skipped, made, focus=lost, **study.found)


def _on_purpose(error: Exception) -> bool:
    """Whether this library raised the error to refuse something: no KeyError, IndexError or missing file."""
    return isinstance(error, ValueError) or type(error) in (LookupError, OSError)
