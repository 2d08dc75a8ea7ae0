"""Sweeps: budgets × selectors × an evaluation, in one process, on one model that is whole again at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path

from surgery.bench import Bench, at_budget, check_names, units_of
from surgery.judging import judged
from surgery.prompts import Batch
from surgery.rows import Evaluate, Row, Sweep
from surgery.scores import remembered
from surgery.selection import Selector
from surgery.trajectory import Trajectory


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
) -> Sweep:
    """Evaluate every selector at every budget, after the references: earlier, later and the ceiling (of every unit).

    Each score is computed once; rollbacks are applied and undone in place; nothing is reloaded. The model is
    bit-identical at the end, also after an error.

    Args:
        run: the trajectory; its later model is loaded once (``run.load``), where you put it.
        data: calibration prompts (not those that ``evaluate`` uses), or None if no selector needs them.
        selectors: dataclasses with a field ``budget`` (it is replaced), each with a ``select``.
        budgets: fractions in [0, 1].
        evaluate: model → {metric: score}, larger = better; where a score is a 1-D sequence, array or tensor of one
            number per item, rows get intervals and tests. Or "lm_eval:task,task" (see ``harness``).
        metric: whose recovery is reported (default: the one that fell most from earlier to later).
        path: a JSON-lines file: rows are appended as they come, and rows that it holds are not computed again.
        progress: called with a line of text before each evaluation.

    Returns:
        A ``Sweep``: rows, and a table when printed.

    Raises:
        ValueError: the file is of other checkpoints, a selector has no budget, two selectors have one name, there is no
            such metric, a score is NaN, models were scored on different metrics or items, or ``evaluate`` changed the
            weights.

    Source: the paper's Table 6 and Figure 13 in kind.
    """
    selectors, budgets = list(selectors), list(budgets)  # generators too are gone through more than once
    for selector, budget in product(selectors, budgets):  # said now, and not after hours of evaluations
        at_budget(selector, budget)
    check_names(selectors)
    bench = Bench(run, data, evaluate, path, progress)
    later, earlier = bench.later(), bench.earlier()
    metric = metric_of(earlier, later, metric)
    with remembered():
        asked = [units_of(one, bench.run) for one in selectors] or [("mlp",)]
        rows = [bench.ceiling(units) for units in dict.fromkeys(asked)]
        rows += [bench.row(selector, budget) for selector in selectors for budget in budgets]
    return Sweep(metric, tuple(judged([earlier, later, *rows], earlier, later, metric)))


def metric_of(earlier: Row, later: Row, metric: str | None = None) -> str:
    """The metric that was asked for, or the one that fell most from earlier to later.

    Raises:
        ValueError: there is no such metric.
    """
    if metric is not None and metric not in later.metrics:
        raise ValueError(f"the metric {metric!r} is none of those that evaluate returns: {sorted(later.metrics)}")
    return metric or max(earlier.metrics, key=lambda name: earlier.metrics[name] - later.metrics[name])
