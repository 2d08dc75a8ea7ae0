"""Sweeps: budgets × selectors × an evaluation, in one process, on one model that is whole again at the end."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.checkpoint import Checkpoint, State
from surgery.neurons import Neurons
from surgery.operators import rollback
from surgery.papers import fingerprint
from surgery.prompts import Batch
from surgery.scores import remembered
from surgery.selection import Selector
from surgery.trajectory import Trajectory
from surgery.units import kinds_of, noun

Evaluate = Callable[[nn.Module], Mapping[str, float]]
EARLIER, LATER, CEILING = "earlier", "later", "ceiling (all MLP neurons)"


@dataclass(frozen=True)
class Row:
    """One evaluated model.

    ``budget`` is the fraction of neurons asked for and ``neurons`` how many were reverted; ``metrics`` is what
    ``evaluate`` returned; ``recovery`` = (score − later) / (earlier − later) on the chosen metric, None for the
    references and where nothing was lost; ``delta`` = score − later for the other metrics; ``seconds`` are of wall
    clock, selection and evaluation together.
    """

    selector: str
    budget: float
    neurons: int
    metrics: dict[str, float]
    seconds: float
    recovery: float | None = None
    delta: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """The rows of a sweep; prints as a table."""

    metric: str
    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> list[Row]:
        """The rows of one selector."""
        return [row for row in self.rows if row.selector == name]

    def __str__(self) -> str:
        others = [name for name in self.rows[0].metrics if name != self.metric]
        head = ["selector", "budget", "neurons", self.metric, "recovery", *(f"Δ {name}" for name in others), "seconds"]
        lines = [head]
        for row in self.rows:
            recovery = "" if row.recovery is None else f"{100 * row.recovery:.1f} %"
            deltas = [
                f"{row.delta[name]:+.4f}" if name in row.delta else f"({row.metrics[name]:.4f})" for name in others
            ]
            budget = f"{100 * row.budget:g} %" if row.neurons else ""
            lines.append(
                [
                    row.selector,
                    budget,
                    str(row.neurons),
                    f"{row.metrics[self.metric]:.4f}",
                    recovery,
                    *deltas,
                    f"{row.seconds:.1f}",
                ]
            )
        widths = [max(len(line[at]) for line in lines) for at in range(len(head))]
        return "\n".join(
            "  ".join(
                cell.ljust(w) if at == 0 else cell.rjust(w)
                for at, (cell, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )


def sweep(
    model: nn.Module,
    run: Trajectory,
    data: Iterable[Batch] | None,
    *,
    selectors: Sequence[Selector],
    budgets: Sequence[float],
    evaluate: Evaluate,
    metric: str | None = None,
    path: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Sweep:
    """Evaluate every selector at every budget, after the references: earlier, later and the ceiling (of every unit).

    Each score is computed once; rollbacks are applied and undone in place; nothing is reloaded. The model is
    bit-identical at the end, also after an error.

    Args:
        model: the later model, live.
        run: its trajectory.
        data: calibration prompts (not those that ``evaluate`` uses), or None if no selector needs them.
        selectors: dataclasses with a field ``budget`` (it is replaced), each with a ``select``.
        budgets: fractions in [0, 1].
        evaluate: model → {metric: score}, larger = better.
        metric: whose recovery is reported (default: the one that fell most from earlier to later).
        path: a JSON-lines file: rows are appended as they come, and rows that it holds are not computed again.
        progress: called with a line of text before each evaluation.

    Returns:
        A ``Sweep``: rows, and a table when printed.

    Raises:
        ValueError: the file is of other checkpoints, a selector has no budget, there is no such metric, or ``evaluate``
            changed the weights.

    Source: the paper's Table 6 and Figure 13 in kind.
    """
    say = progress or (lambda _: None)
    live = dataclasses.replace(run, model=model)
    batches = None if data is None else list(data)
    evaluate = _watched(torch.no_grad()(evaluate))
    done = _Done(path, live)
    references = [
        done.row(LATER, 0.0, lambda: (0, evaluate(model)), say),
        done.row(EARLIER, 0.0, lambda: (0, _evaluate_earlier(live, model, evaluate)), say),
    ]
    metric = metric or _fell_most(references[1].metrics, references[0].metrics)
    if metric not in references[0].metrics:
        raise ValueError(f"metric={metric!r}: evaluate returns {sorted(references[0].metrics)}")
    with remembered():
        rows, asked = [], [getattr(one, "units", None) or live.units for one in selectors]
        for units in dict.fromkeys(kinds_of(one) for one in asked or [live.units]):
            everything = ~_nothing(dataclasses.replace(live, units=units))
            measure = partial(_try, model, live, everything, evaluate)
            rows.append(done.row(ceiling(units), 1.0, measure, say))
        for selector in selectors:
            for budget in budgets:
                one = _at(selector, budget)
                measure = partial(_select_and_try, model, live, one, batches, evaluate)
                rows.append(done.row(_name(one), budget, measure, say))
    found = [judged(row, references[1].metrics, references[0].metrics, metric) for row in rows]
    return Sweep(metric, (references[1], references[0], *found))


def ceiling(units: tuple[str, ...]) -> str:
    """The name of the row in which every unit of those kinds is reverted."""
    return CEILING if units == ("mlp",) else f"ceiling (all {noun(units)})"


def _watched(evaluate: Evaluate) -> Evaluate:
    """The evaluation, refused where it writes into or moves the parameters: later rows would be of another model."""

    def marks(model: nn.Module) -> dict[str, tuple[int, int]]:
        named = model.named_parameters(remove_duplicate=False)
        return {name: (p.data_ptr(), p._version) for name, p in named if not p.is_inference()}

    def measure(model: nn.Module) -> Mapping[str, float]:
        before = marks(model)
        metrics = evaluate(model)
        if changed := [name for name, mark in marks(model).items() if before.get(name) != mark]:
            raise ValueError(
                f"evaluate changed the weights ({len(changed)} tensors, the first of them {changed[0]!r}); it has to "
                f"leave the model as it was: no training, no .to(...), no merging of adapters"
            )
        return metrics

    return measure


def _select_and_try(
    model: nn.Module, run: Trajectory, selector: Selector, data: list[Batch] | None, evaluate: Evaluate
) -> tuple[int, Mapping[str, float]]:
    return _try(model, run, selector.select(run, data), evaluate)


def _try(model: nn.Module, run: Trajectory, mask: Neurons, evaluate: Evaluate) -> tuple[int, Mapping[str, float]]:
    with rollback(model, to=run.earlier, mask=mask, layout=run.layout) as done:  # type: ignore[arg-type]
        return sum(done.neurons.values()), evaluate(model)


def _nothing(run: Trajectory) -> Neurons:
    (later,) = dataclasses.replace(run, later=run.model).weights("later")
    return Neurons({name: torch.zeros(size, dtype=torch.bool) for name, size in later.layout.sizes.items()})


def _evaluate_earlier(run: Trajectory, model: nn.Module, evaluate: Evaluate) -> Mapping[str, float]:
    """The earlier model, beside the later one for as long as its evaluation takes."""
    tensors = next(model.parameters())
    if isinstance(run.earlier, Mapping) and not isinstance(run.earlier, Checkpoint):
        other = copy.deepcopy(model)
        other.load_state_dict({**State(model), **run.earlier})
        return evaluate(other)
    return evaluate(Trajectory(later=run.earlier).load(device=tensors.device, dtype=tensors.dtype))


def _at(selector: Any, budget: float) -> Any:
    if not dataclasses.is_dataclass(selector) or not any(f.name == "budget" for f in dataclasses.fields(selector)):
        raise ValueError(f"{selector!r} has no field 'budget' to sweep over: make it a dataclass with one")
    return dataclasses.replace(selector, budget=budget)  # type: ignore[type-var]


def _name(selector: Any) -> str:
    """What tells its rows from another's: its own name and seed, or its class and everything but the budget."""
    if name := getattr(selector, "name", None):
        seed = getattr(selector, "seed", None)
        return str(name) if not seed else f"{name}, seed {seed}"
    settings = {f.name: getattr(selector, f.name) for f in dataclasses.fields(selector) if f.name != "budget"}
    listed = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    return f"{type(selector).__name__}({listed})" if settings else type(selector).__name__


def _fell_most(earlier: Mapping[str, float], later: Mapping[str, float]) -> str:
    return max(earlier, key=lambda name: earlier[name] - later[name])


def judged(row: Row, earlier: Mapping[str, float], later: Mapping[str, float], metric: str) -> Row:
    """The row with its recovery on ``metric`` and its Δ on every other one (method: recovery)."""
    lost = earlier[metric] - later[metric]
    recovery = (row.metrics[metric] - later[metric]) / lost if lost else None
    delta = {name: score - later[name] for name, score in row.metrics.items() if name != metric}
    return dataclasses.replace(row, recovery=recovery, delta=delta)


class _Done:
    """Rows already measured: read from the file at the start, appended to it as they come."""

    def __init__(self, path: str | Path | None, run: Trajectory) -> None:
        self.path = Path(path) if path is not None else None
        self.rows: dict[tuple[str, float], Row] = {}
        names = ("earlier", "later")
        head = {name: fingerprint(weights) for name, weights in zip(names, run.weights(*names), strict=True)}
        units = list(kinds_of(run.units))
        if self.path is None:
            return
        if self.path.exists() and self.path.stat().st_size:
            first, *rest = self.path.read_text(encoding="utf-8").splitlines()
            found = _parsed(first, self.path)
            if found.get("checkpoints") != head or found.get("units", ["mlp"]) != units:
                raise ValueError(f"{self.path} holds a sweep of other checkpoints or units: choose another file")
            for line in rest:
                row = Row(**_parsed(line, self.path))
                self.rows[row.selector, row.budget] = row
        else:
            self._append({"checkpoints": head, "units": units})

    def row(
        self,
        name: str,
        budget: float,
        measure: Callable[[], tuple[int, Mapping[str, float]]],
        say: Callable[[str], None],
    ) -> Row:
        if (name, budget) not in self.rows:
            say(f"{name}, {100 * budget:g} %" if budget else name)
            start = time.perf_counter()
            neurons, metrics = measure()
            scores = {key: float(value) for key, value in metrics.items()}
            self.rows[name, budget] = Row(name, float(budget), neurons, scores, time.perf_counter() - start)
            self._append(asdict(self.rows[name, budget]))
        return self.rows[name, budget]

    def _append(self, line: Mapping[str, Any]) -> None:
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _parsed(line: str, path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except ValueError as error:
        raise ValueError(f"{path} is not a sweep's file, or its last line was cut: {error}") from error
