"""The inquiry: everything that a trajectory and some prompts can tell about what a later stage cost, in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.budget import check_budget
from surgery.evidence import write_json
from surgery.evidence_changes import Changes
from surgery.evidence_directions import Directions
from surgery.evidence_overlap import Overlap
from surgery.fingerprints import fingerprint
from surgery.gradient_cosines import Gradients
from surgery.histories import History, Lost
from surgery.papers import versions
from surgery.prompts import Batch, batches_of
from surgery.report_parts import PARTS, Missing, Refreshed, Sites, Study
from surgery.rows import Evaluate, Sweep
from surgery.scores import remembered
from surgery.theory_damage import DamageTerms
from surgery.trajectory import Trajectory

LIKELIHOOD = "log-likelihood of the responses (nats per token)"
BUDGETS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32)


@dataclass(frozen=True)
class Inquiry:
    """What ``analyse`` found; a part is None where inputs did not allow it or it was left out: ``skipped`` says why.

    ``stages``: the checkpoints, in training order; ``domains``: those that there are prompts of; ``score``: what is
    measured of them, in words.
    ``changes``, ``changed``, ``directions``: of all parameters, and of the neurons that stages changed most.
    ``history``: every domain at every checkpoint. ``focus``: the domain that certainly lost most; what follows is about
    it. ``active``: overlap of the neurons that domains use most. ``gradients``: of all domains, at the last checkpoint.
    ``sites``: where D sits. ``terms``: Proposition 1 along what training changed since the domain's best. ``rollback``:
    selectors × budgets. ``refreshed``: a short training on the domain, taken back. ``skipped``: what was not computed →
    what it would need. ``made``: versions, and hashes of the checkpoints.

    Source: ours; the parts say theirs.
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
    refreshed: Refreshed | None = None

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
    skip: Iterable[str] = (),
    device: Any = None,
    dtype: Any = None,
    progress: Callable[[str], None] | None = None,
) -> Inquiry:
    """Is a later stage hurting an earlier one? All evidence that the inputs allow, and what a repair would bring.

    Half of each domain's prompts (every other one) choose: scores, gradients, masks and the refresh see them. The
    other half measures: the history, and what comes back. So what is told of a repair is not told of the prompts that
    made it. The focus is the domain that certainly lost most; it is rolled back to the checkpoint of its own name (or
    its best), never further.

    Args:
        run: two checkpoints or more (see ``Trajectory.through``): folders or live models; the last is judged.
        data: domain → batches. Prompts without responses are answered by the domain's own stage, or else the last.
        evaluate: model → {domain: score or one per item}, larger = better, in the place of the responses' likelihood.
        budgets: of the rollbacks, fractions of all MLP neurons.
        refresh_steps: of the refresh (distillation from the domain's own checkpoint, Adam, float32 copies).
        skip: parts to leave out, by their names in ``Inquiry``.
        device: where models run; dtype: theirs (default: the checkpoints' own).
        progress: called with a line of text before each part.

    Returns:
        An ``Inquiry``; ``write_report`` makes a page of it. One model is in memory at a time; the last is whole again
        at the end, bit for bit.

    Raises:
        ValueError: fewer than two checkpoints, or of different models; ``skip`` names no part; a budget or the data are
            none. What a single part refuses (``ValueError``, ``LookupError``, a full disk) stands in ``skipped``, and
            the other parts are computed; an error that is a bug is raised.

    Source: ours.
    """
    asked = list(skip)
    if wrong := [name for name in asked if name not in PARTS]:
        raise ValueError(f"skip={wrong[0]!r}: expected some of {', '.join(PARTS)}")
    for budget in budgets:
        check_budget(budget)
    if data is not None and not isinstance(data, Mapping):
        raise ValueError('data has to say which domain the prompts are of: {"math": load_prompts(...)}')
    prompts = {domain: list(batches_of(batches)) for domain, batches in (data or {}).items()}
    study = Study(run, prompts, evaluate, tuple(budgets), refresh_steps, device, dtype)
    skipped = dict.fromkeys(asked, "left out, as asked")
    with remembered():
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
    """Whether it is an error that this library raises to refuse something: no KeyError, IndexError or missing file."""
    return isinstance(error, ValueError) or type(error) in (LookupError, OSError)
