"""History: how every domain fares at every checkpoint of a trajectory, and what it lost on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from surgery.checkpoints.trajectory import Trajectory
from surgery.measure.evaluators import evaluator
from surgery.measure.rows import Evaluate, measured
from surgery.measure.statistics import ALPHA, Paired, paired
from surgery.tables import Cell, Estimate, Table, fixed, places, write_json

_DEFINITION = (
    "The score of every domain at every checkpoint. A domain's loss is its score at its own stage (the checkpoint of "
    "the same name, else its best one before the last) minus its score at the last checkpoint. The largest step is the "
    "stage that lowered the score most. Intervals and p are paired over items. A loss is significant where its 95 % "
    "interval lies above zero and p < 0.05."
)


@dataclass(frozen=True)
class Lost:
    """What one domain lost from its ``best`` checkpoint to the ``last``: ``amount`` > 0 is a loss, in its score's unit.

    ``paired`` is the loss item by item (gain = amount), None without items; ``at`` is the stage that cost most, and
    ``step`` how much it cost.
    """

    domain: str
    best: str
    last: str
    amount: float
    at: str
    step: float
    paired: Paired | None

    @property
    def certain(self) -> bool:
        """Whether the loss is significant: its 95 % interval lies above zero and p < 0.05."""
        return self.paired is not None and self.paired.interval[0] > 0 and self.paired.p < ALPHA

    def cells(self) -> tuple[Cell, ...]:
        """Its row in a table."""
        if self.paired is None:
            return self.domain, self.best, self.last, self.amount, None, f"{self.at} ({-self.step:+.3g})"
        lost = Estimate(self.amount, *self.paired.interval)
        step = fixed(-self.step, places(lost.low, lost.high), "+")
        return self.domain, self.best, self.last, lost, self.paired.p, f"{self.at} ({step})"


@dataclass(frozen=True)
class History:
    """What ``history`` found: the score of every domain at every checkpoint, and what each domain lost.

    ``scores``: domain → its score at each of ``stages``, in their order; ``lost``: one per domain, significant losses
    first, and the largest of them first.

    Source: the paper's Table 5 in kind; the tests are ours.
    """

    stages: tuple[str, ...]
    scores: dict[str, tuple[float, ...]]
    lost: tuple[Lost, ...]

    @property
    def definition(self) -> str:
        """What the numbers are, in words."""
        return _DEFINITION

    def tables(self) -> tuple[Table, ...]:
        """Scores by domain and checkpoint, and what was lost."""
        rows: tuple[tuple[Cell, ...], ...] = tuple((domain, *values) for domain, values in self.scores.items())
        losses = tuple(one.cells() for one in self.lost)
        head = ("domain", "from", "to", "lost", "p", "largest step")
        return Table("score after each stage", ("domain", *self.stages), rows), Table("what was lost", head, losses)

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.tables()))

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        write_json(self, path)


def history(
    run: Trajectory,
    evaluate: Evaluate | str,
    *,
    device: Any = None,
    dtype: Any = None,
    progress: Callable[[str], None] | None = None,
) -> History:
    """Evaluate every checkpoint of a trajectory; compute what each domain lost, and at which stage.

    lost = score(best) − score(last). *best* is the checkpoint that has the domain's name, if there is one before the
    last; else the one before the last where the domain scored highest.

    Args:
        run: two checkpoints or more (see ``Trajectory.through``); one model is in memory at a time.
        evaluate: model → {domain: score, or one score per item}, larger = better (see ``sweep`` and ``likelihood``).
        device: where the models run; dtype: theirs (default: the checkpoints' own).
        progress: called with a line of text before each evaluation.

    Raises:
        ValueError: there are fewer than two checkpoints, or they were scored on different items.

    Source: the paper's Table 5 in kind.
    """
    names = tuple(run.checkpoints)
    if len(names) < 2:
        raise ValueError(f"a history needs two or more checkpoints, got {list(names)}")
    run.check_whole()
    measure, means, items = torch.no_grad()(evaluator(evaluate)), {}, {}
    for name, source in run.checkpoints.items():
        if progress is not None:
            progress(f"evaluating {name}")
        model = (run if source is run.later else Trajectory(later=run.held(source))).load(device, dtype)
        means[name], items[name] = measured(measure(model))
        del model
    domains = list(means[names[0]])
    scores = {domain: tuple(means[name][domain] for name in names) for domain in domains}
    lost = [
        _lost(domain, names, scores[domain], {name: items[name].get(domain) for name in names}) for domain in domains
    ]
    return History(names, scores, tuple(sorted(lost, key=lambda one: (not one.certain, -one.amount))))


def _lost(domain: str, names: tuple[str, ...], scores: tuple[float, ...], items: Mapping[str, Any]) -> Lost:
    best = names.index(domain) if domain in names[:-1] else int(np.argmax(scores[:-1]))
    steps = -np.diff(scores)[best:]
    at = best + 1 + int(np.argmax(steps))
    before, now = items[names[-1]], items[names[best]]
    tested = paired(np.array([now]), np.array(before))[0] if before is not None and now is not None else None
    lost = scores[best] - scores[-1]
    return Lost(domain, names[best], names[-1], lost, names[at], float(steps[at - best - 1]), tested)
