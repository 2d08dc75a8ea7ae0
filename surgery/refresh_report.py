"""What a refresh did, step by step, and the way back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from surgery.checkpoint import in_force
from surgery.evidence import Table, write_json
from surgery.refresh_copies import Leaves

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
    """What a refresh did, and the way back: use it as a ``with`` block (undone on exit) or call ``undo``.

    ``kept`` is the step whose weights the model has now: the best validated one, or the last. ``passes``: forward and
    backward passes. ``units``: trained per block (None: all parameters). ``changed``: numbers whose bits differ now.
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
        """Of all steps, without validation and callbacks."""
        return sum(step.seconds for step in self.steps)

    def undo(self) -> None:
        """Put the original bits back. Undoing twice is undoing once."""
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
        """One row a step."""
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
        """Write it as JSON (without the way back)."""
        write_json(self, path)
