"""Sweeps: budgets × selectors × an evaluation, in one process, on one model that is restored at the end."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.checkpoints.opening import known
from surgery.checkpoints.trajectory import Trajectory
from surgery.compat import writes_to
from surgery.files import alone, end_line, path_of, uncut
from surgery.layout.sharding import local, ranks_of, stored
from surgery.live.earlier import earlier_model
from surgery.live.prompts import Batch, batches_of, digest_of
from surgery.masks.mask import Mask, checked
from surgery.masks.neurons import Neurons
from surgery.measure.evaluators import evaluator, signature
from surgery.measure.files import MEASURED, metric_of, read_rows
from surgery.measure.rows import (
    EARLIER,
    LATER,
    Evaluate,
    Log,
    Row,
    Score,
    Sweep,
    ceiling_of,
    check_items,
    judged,
    measured,
    tell,
)
from surgery.progress import steps
from surgery.reverting.rollback import rollback
from surgery.reverting.successive import Successive
from surgery.scores.memory import identity, remembered
from surgery.selectors.selectors import Selector
from surgery.selectors.settings import units_asked
from surgery.units import Units, kinds_of

NONE: Mapping[str, str] = {}


class Bench:
    """Measures rows on one live model, which is bit-identical after each call, also after an error.

    Args:
        run: the trajectory; its later model is loaded once (``run.load``).
        data: calibration prompts, or None.
        evaluate: model → {metric: score or one score per item}, or "lm_eval:task,task".
        path: a JSON-lines file: rows are appended as they are measured, and cached rows are not measured again.
        say: called with a line of text before each choice and each evaluation.

    ``evaluations`` counts the models that were really evaluated.

    Raises:
        ValueError: the file is of other checkpoints; ``evaluate`` changed the weights.
    """

    def __init__(
        self,
        run: Trajectory,
        data: Iterable[Batch] | None,
        evaluate: Evaluate | str,
        path: str | Path | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        run.check_whole()
        self.model, self.run = run.load(), run
        self._ranks = ranks_of(self.model)  # every process measures every row; the first one's scores count
        self.data = None if data is None else list(batches_of(data))
        self.path = path_of(path) if path is not None else None
        self.evaluations = 0
        self._say = say or (lambda _: None)
        measure = evaluator(evaluate)
        self._scores = _watched(torch.no_grad()(measure))
        self._settings: dict[tuple[str, float], dict[str, str]] = {}  # of the selectors of the file's rows
        self._rows = self._read(signature(measure))

    def later(self) -> Row:
        """The model as it is."""
        return self._measured(LATER, 0.0, lambda: (0, self._evaluate(self.model)))

    def earlier(self) -> Row:
        """The earlier model, in the later one's place for as long as its evaluation takes."""
        return self._measured(EARLIER, 0.0, lambda: (0, self._earlier_scores()))

    def ceiling(self, units: Units = "mlp") -> Row:
        """All units of those kinds rolled back."""
        kinds = kinds_of(units)
        return self._measured(ceiling_of(kinds), 1.0, lambda: self._tried(~self._nothing(kinds)))

    def row(self, selector: Any, budget: float, mask: Mask) -> Row:
        """A selector at a budget, for which it has chosen the mask."""
        return self._row(selector, budget, lambda: self._tried(mask))

    def rows(self, selector: Any, budgets: Iterable[float], told: Callable[[Row], Row]) -> list[Row]:
        """A selector at several budgets, each row ``told`` when it is there.

        Every mask is chosen before the first is rolled back, and from one to the next only what differs is written. If
        a choice fails, the budgets before it are measured, and then the error is raised.
        """
        missing = [budget for budget in dict.fromkeys(budgets) if not self._is_known(selector, budget)]
        chosen: dict[float, tuple[Mask, float]] = {}
        failed: Exception | None = None
        for budget in steps("choices", missing):
            start = time.perf_counter()
            try:
                chosen[budget] = self.mask(selector, budget), time.perf_counter() - start
            except Exception as error:
                failed = error
                break
        with Successive(self.model, to=self.run.tensors("earlier"), layout=self.run.layout) as turn:

            def measure(budget: float) -> tuple[int, Mapping[str, Score]]:
                mask = chosen[budget][0]
                turn.now(mask)
                return sum(mask.count().values()), self._evaluate(self.model)

            found = []
            for budget in steps("rows", budgets):
                if failed is not None and budget in missing and budget not in chosen:
                    raise failed
                spent = chosen[budget][1] if budget in chosen else 0.0
                found.append(told(self._row(selector, budget, partial(measure, budget), spent)))
        return found

    def _row(
        self, selector: Any, budget: float, measure: Callable[[], tuple[int, Mapping[str, Score]]], spent: float = 0.0
    ) -> Row:
        one = at_budget(selector, budget)
        return self._measured(name_of(one), budget, measure, settings_of(one), spent)

    def _is_known(self, selector: Any, budget: float) -> bool:
        """Whether the row is there; refused where it is one of other settings."""
        one = at_budget(selector, budget)
        return self._check_settings((name_of(one), float(budget)), settings_of(one)) in self._rows

    def tried(self, name: str, mask: Mask) -> Row:
        """A mask that is there already; it is named, and not remembered."""
        start = time.perf_counter()
        self._say(name)
        neurons, values = self._tried(mask)
        metrics, items = measured(values)
        return self._comparable(Row(name, mask.fraction, neurons, metrics, time.perf_counter() - start, items=items))

    def mask(self, selector: Any, budget: float) -> Mask:
        """What the selector chooses at a budget."""
        one = at_budget(selector, budget)
        self._say(f"{name_of(one)}, {100 * budget:g} %: choosing")
        return checked(one.select(self.run, self.data))

    def only_first(self, log: Log | None) -> Log | None:
        """A log, in the first of the processes that hold the model together; None in the others."""
        return log if self._ranks.first else None

    def _evaluate(self, model: nn.Module) -> Mapping[str, Score]:
        self.evaluations += 1
        found = self._scores(model)
        return self._ranks.from_first(lambda: found)

    def _tried(self, mask: Mask) -> tuple[int, Mapping[str, Score]]:
        with rollback(self.model, to=self.run.tensors("earlier"), mask=mask, layout=self.run.layout) as done:
            return sum(done.neurons.values()), self._evaluate(self.model)

    def _nothing(self, units: Units) -> Neurons:
        (live,) = self.run.live(units=units)
        return Neurons({name: torch.zeros(size, dtype=torch.bool) for name, size in live.layout.sizes.items()})

    def _earlier_scores(self) -> Mapping[str, Score]:
        with earlier_model(self.run) as model:
            return self._evaluate(model)

    def _measured(
        self,
        name: str,
        budget: float,
        measure: Callable[[], tuple[int, Mapping[str, Score]]],
        settings: Mapping[str, str] = NONE,
        spent: float = 0.0,
    ) -> Row:
        key = self._check_settings((name, float(budget)), settings)
        if key not in self._rows:
            self._say(f"{name}, {100 * budget:g} %" if budget else name)
            start = time.perf_counter()
            neurons, values = measure()
            metrics, items = measured(values)
            seconds = spent + time.perf_counter() - start
            row = Row(name, key[1], neurons, metrics, seconds, items=items)
            self._rows[key] = self._comparable(row)
            written = {one: getattr(row, one) for one in MEASURED} | ({"settings": dict(settings)} if settings else {})
            self._append({**written, "items": {one: _compact(held) for one, held in items.items()}})
        return self._comparable(self._rows[key])

    def _check_settings(self, key: tuple[str, float], settings: Mapping[str, str]) -> tuple[str, float]:
        """The key of a row, refused where the file's row has other settings."""
        other = self._settings.get(key, settings)
        if wrong := [one for one in {**other, **settings} if other.get(one) != settings.get(one)]:
            raise ValueError(
                f"{self.path} holds rows of {key[0]!r} with another {' and '.join(wrong)}: choose another file"
            )
        return key

    def _comparable(self, row: Row) -> Row:
        """The row, refused where it has other metrics than the later model's, or other items."""
        check_items(row, self._rows.get((LATER, 0.0), row))
        return row

    def _read(self, how: str) -> dict[tuple[str, float], Row]:
        """The rows of the file, which has to be of these checkpoints, prompts and evaluation; a new one says which."""
        if self.path is None:
            return {}
        names = [name for name in ("base", "earlier", "later") if getattr(self.run, name) is not None]
        opened = zip(names, self.run.weights(*names), strict=True)
        head = {
            "checkpoints": {name: known(weights) for name, weights in opened},
            "prompts": None if self.data is None else digest_of(self.data),
            "evaluate": how,
        }
        held = self._ranks.from_first(lambda: self._begun(head))
        self._settings = {(row.selector, row.budget): settings for row, settings in held if settings}
        return {(row.selector, row.budget): row for row, _ in held}

    def _begun(self, head: dict[str, Any]) -> list[tuple[Row, dict[str, str]]]:
        """The rows of the file with their selectors' settings; a new one gets its first line."""
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with alone(self.path) as file:
            text = uncut(file.read(), json.dumps(head))
            if not text.strip():
                file.truncate(0)
                file.write(json.dumps(head) + "\n")
                return []
            found, held = read_rows(text, self.path)
            for name, mine in head.items():
                if found.get(name) != mine:
                    raise ValueError(f"{self.path} holds rows of {_OTHERS[name]}: choose another file")
            end_line(self.path, file)
        return held

    def _append(self, line: Mapping[str, Any]) -> None:
        if self.path is not None and self._ranks.first:
            with alone(self.path) as file:
                end_line(self.path, file)  # another process may have been killed
                file.write(json.dumps(line) + "\n")


_OTHERS = {"checkpoints": "other checkpoints", "prompts": "other prompts", "evaluate": "another evaluation"}


def _compact(items: list[float]) -> list[float]:
    return [int(x) if x.is_integer() else x for x in items]


def _watched(evaluate: Evaluate) -> Evaluate:
    """The evaluation, refused where it writes into or moves the parameters: later rows would be of another model."""

    def marks(model: nn.Module) -> dict[str, tuple[int, int]]:
        named = ((name, local(p)) for name, p in stored(model).named_parameters(remove_duplicate=False))
        return {name: (p.data_ptr(), writes_to(p)) for name, p in named if not p.is_inference()}

    def measure(model: nn.Module) -> Mapping[str, Score]:
        before = marks(model)
        metrics = evaluate(model)
        if changed := [name for name, mark in marks(model).items() if before.get(name) != mark]:
            raise ValueError(
                f"evaluate changed the weights ({len(changed)} tensors, the first of them {changed[0]!r}); it has to "
                f"leave the model as it was: no training, no .to(...), no merging of adapters"
            )
        return metrics

    return measure


def at_budget(selector: Any, budget: float) -> Any:
    """The same selector with another budget.

    Raises:
        ValueError: it has no field ``budget``.
    """
    if not dataclasses.is_dataclass(selector) or not any(f.name == "budget" for f in dataclasses.fields(selector)):
        raise ValueError(f"{selector!r} has no field 'budget' to sweep over: make it a dataclass with one")
    return dataclasses.replace(selector, budget=budget)  # type: ignore[type-var]


def check_names(selectors: Sequence[Any]) -> None:
    """Raise ``ValueError`` where rows of two selectors could not be told apart: one name, other settings."""
    seen: dict[str, tuple[Any, ...]] = {}
    for selector in selectors:
        own = dataclasses.fields(selector) if dataclasses.is_dataclass(selector) else ()
        held = (type(selector), *(identity(getattr(selector, f.name)) for f in own if f.name != "budget"))
        if seen.setdefault(name_of(selector), held) != held:
            raise ValueError(
                f"two selectors with different settings are both called {name_of(selector)!r}, and a row is known by "
                f"its name: sweep them one by one, each with its own file"
            )


def name_of(selector: Any) -> str:
    """What tells its rows from another's: its own name and seed, or its class and everything but the budget."""
    if name := getattr(selector, "name", None):
        seed = getattr(selector, "seed", None)
        return str(name) if not seed else f"{name}, seed {seed}"
    if not dataclasses.is_dataclass(selector):
        return type(selector).__name__
    settings = {f.name: getattr(selector, f.name) for f in dataclasses.fields(selector) if f.name != "budget"}
    listed = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    return f"{type(selector).__name__}({listed})" if settings else type(selector).__name__


def settings_of(selector: Any) -> dict[str, str]:
    """A selector's settings without the budget, as texts that identify them: its name does not hold them all.

    Prompts are told by what is in them and functions as in ``signature``; objects of other kinds are left out.
    """
    found = {f.name: _text(getattr(selector, f.name)) for f in dataclasses.fields(selector) if f.name != "budget"}
    return {name: text for name, text in found.items() if text is not None}


def _text(value: Any) -> str | None:
    if isinstance(value, str | int | float | tuple | None):
        return repr(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(one)}" for name, one in value.items())
    if isinstance(value, list) and all(isinstance(one, Mapping) and "input_ids" in one for one in value):
        return digest_of(value)
    if dataclasses.is_dataclass(value):
        return str(settings_of(value))
    return signature(value) if callable(value) else None


def sweep(
    run: Trajectory,
    data: Iterable[Batch] | None,
    *,
    selectors: Sequence[Selector],
    budgets: Sequence[float],
    evaluate: Evaluate | str,
    metric: str | None = None,
    path: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
    log: Log | None = None,
) -> Sweep:
    """Evaluate every selector at every budget, after the references: earlier, later and the ceiling (of every unit).

    Each score is computed once. Every mask of a selector is chosen first; then rollbacks are applied in place, from one
    budget to the next only what differs, and nothing is reloaded. The model is bit-identical at the end, also after an
    error.

    Args:
        run: the trajectory; its later model is loaded once (``run.load``), where you put it.
        data: calibration prompts (not those that ``evaluate`` uses), or None if no selector needs them.
        selectors: dataclasses with a field ``budget`` (it is replaced), each with a ``select``.
        budgets: fractions in [0, 1].
        evaluate: model → {metric: score}, larger = better; where a score is a 1-D sequence, array or tensor of one
            number per item, rows get intervals and tests. Or "lm_eval:task,task" (see ``harness``).
        metric: whose recovery is reported (default: the one that fell most from earlier to later).
        path: a JSON-lines file: rows are appended as they are measured, and cached rows are not measured again.
        progress: called with a line of text before each choice and each evaluation.
        log: called with each row as a flat dictionary (``Row.logged``), like ``trackio.log`` or ``wandb.log``; the
            model is still rolled back then.

    Returns:
        A ``Sweep``: rows, and a table when printed.

    Raises:
        ValueError: the file has rows of other checkpoints, prompts or another evaluation; a selector has no budget; two
            selectors have the same name; there is no such metric; a score is NaN; models were scored on different
            metrics or items; or ``evaluate`` changed the weights.

    Source: the paper's Table 6 and Figure 13 in kind.
    """
    selectors, budgets = list(selectors), list(budgets)  # generators too are gone through more than once
    for selector, budget in product(selectors, budgets):  # said now, and not after hours of evaluations
        at_budget(selector, budget)
    check_names(selectors)
    bench = Bench(run, data, evaluate, path, progress)
    later, earlier = bench.later(), bench.earlier()
    metric = metric_of(earlier, later, metric)
    told = partial(tell, bench.only_first(log), earlier=earlier, later=later, metric=metric)
    told(earlier)
    told(later)
    with remembered(own=True):
        asked = [units_asked(bench.run, getattr(one, "units", "mlp")) for one in selectors] or [("mlp",)]
        rows = [told(bench.ceiling(units)) for units in dict.fromkeys(asked)]
        for selector in steps("selectors", selectors):
            rows += bench.rows(selector, budgets, told)
    return Sweep(metric, tuple(judged([earlier, later, *rows], earlier, later, metric)))
