"""Results in the shapes that others read: tables like lm-eval's, the accuracy matrix, the Hub's evaluation results."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgery.files import path_of, whole_file
from surgery.measure.history import History
from surgery.measure.rows import Row, check_items
from surgery.measure.statistics import paired
from surgery.tables import Cell, Table

_HEAD = ("Tasks", "Items", "Before", "", "Stderr", "After", "", "Stderr", "Difference", "95 % interval", "p")


def before_after(before: Row, after: Row) -> str:
    """Two rows as a Markdown table in lm-eval's shape, with the paired difference.

    Score and standard error of the mean, before and after, and then the difference with its 95 % paired bootstrap
    interval and the p of the paired test. Scores without items have neither errors nor intervals.

    Args:
        before, after: rows of one sweep or repair: ``before_after(done.sweep["later"][0], done.chosen)``.

    Raises:
        ValueError: the rows have other metrics or items.

    Source: the shape is lm-eval's ``make_table``; the statistics are ours.
    """
    check_items(before, after)
    lines = [_HEAD, tuple("---:" if name not in ("Tasks", "") else "---" for name in _HEAD)]
    for task, value in after.metrics.items():
        held = before.items.get(task), after.items.get(task)
        cells = [task, str(len(held[1])) if held[1] else "", *_score(before, task), *_score(after, task)]
        difference = f"{value - before.metrics[task]:+.4f}"
        if held[0] and held[1]:
            (one,) = paired(np.array([held[1]]), np.array(held[0]))
            cells += [difference, f"[{one.interval[0]:+.4f}, {one.interval[1]:+.4f}]", f"{one.p:.2g}"]
        else:
            cells += [difference, "", ""]
        lines.append(tuple(cells))
    return "\n".join(f"|{'|'.join(line)}|" for line in lines)


def _score(row: Row, task: str) -> tuple[str, str, str]:
    items = row.items.get(task, [])
    if len(items) < 2:
        return f"{row.metrics[task]:.4f}", "", ""
    return f"{row.metrics[task]:.4f}", "±", f"{np.std(items, ddof=1) / len(items) ** 0.5:.4f}"


@dataclass(frozen=True)
class AccuracyMatrix:
    """R of continual learning: ``scores[i][j]`` is the score on domain j after stage i; both are named ``stages``.

    ``repaired``: the last row after a repair, None without one. ACC is the mean of the last row: how good the final
    model is on everything. BWT (backward transfer) is the mean over all domains but the last of R[last][j] − R[j][j]:
    below zero, later stages took away what earlier ones had taught.

    Source: Lopez-Paz and Ranzato, Gradient Episodic Memory (2017).
    """

    stages: tuple[str, ...]
    scores: tuple[tuple[float, ...], ...]
    repaired: tuple[float, ...] | None = None

    @property
    def acc(self) -> float:
        """ACC of the last stage."""
        return float(np.mean(self.scores[-1]))

    @property
    def bwt(self) -> float:
        """BWT of the last stage."""
        return self._transfer(self.scores[-1])

    @property
    def acc_repaired(self) -> float | None:
        """ACC after the repair."""
        return None if self.repaired is None else float(np.mean(self.repaired))

    @property
    def bwt_repaired(self) -> float | None:
        """BWT after the repair."""
        return None if self.repaired is None else self._transfer(self.repaired)

    def _transfer(self, last: tuple[float, ...]) -> float:
        return float(np.mean([last[at] - self.scores[at][at] for at in range(len(self.stages) - 1)]))

    def table(self) -> Table:
        """The rows of R, and that of the repair."""
        rows: list[tuple[Cell, ...]] = [
            (f"after {stage}", *row) for stage, row in zip(self.stages, self.scores, strict=True)
        ]
        rows += [] if self.repaired is None else [("repaired", *self.repaired)]
        return Table("score on each domain", ("", *self.stages), tuple(rows))

    def __str__(self) -> str:
        said = f"ACC {self.acc:.4f}, BWT {self.bwt:+.4f}"
        if self.repaired is not None:
            said = f"ACC {self.acc:.4f} → {self.acc_repaired:.4f}, BWT {self.bwt:+.4f} → {self.bwt_repaired:+.4f}"
        return f"{self.table()}\n\n{said}"


def accuracy_matrix(found: History, repaired: Row | None = None) -> AccuracyMatrix:
    """The accuracy matrix of a history, and of a repair of its last stage.

    Args:
        found: of checkpoints and domains; those stages count that a domain is called like, in training order, and the
            last of them has to be the last checkpoint.
        repaired: the row of the repaired last checkpoint, measured by the same evaluation (``repair(...).chosen``).

    Raises:
        ValueError: fewer than two stages have a domain of their name, the last checkpoint has none, or the row lacks a
            domain.

    Source: as ``AccuracyMatrix``.
    """
    stages = [stage for stage in found.stages if stage in found.scores]
    if len(stages) < 2 or stages[-1] != found.stages[-1]:
        raise ValueError(
            f"an accuracy matrix needs a domain for two stages or more and for the last one, of the same names: the "
            f"stages are {list(found.stages)}, the domains {list(found.scores)}"
        )
    rows = tuple(tuple(found.scores[name][found.stages.index(stage)] for name in stages) for stage in stages)
    if repaired is None:
        return AccuracyMatrix(tuple(stages), rows)
    if missing := [name for name in stages if name not in repaired.metrics]:
        raise ValueError(f"the repaired row has no score of {missing[0]!r}, only of {sorted(repaired.metrics)}")
    return AccuracyMatrix(tuple(stages), rows, tuple(repaired.metrics[name] for name in stages))


def write_eval_results(
    folder: str | Path, row: Row, benchmarks: Mapping[str, Mapping[str, Any]], *, notes: str | None = None
) -> list[Path]:
    """Write a row's scores into ``.eval_results/`` of a model's folder, a file for each metric, as the Hub reads them.

    Args:
        folder: the model's folder, with its model card.
        row: the scores, like ``repair(...).chosen`` for the folder that ``save`` wrote.
        benchmarks: metric → which benchmark it is on the Hub, by the fields of ``huggingface_hub.EvalResultEntry``:
            ``{"gsm8k": {"dataset_id": "openai/gsm8k", "task_id": "gsm8k"}}``. The Hub accepts only data sets that are
            registered as benchmarks, with the tasks of their ``eval.yaml``.
        notes: on how it was evaluated.

    Returns:
        The files, in the order of ``benchmarks``.

    Raises:
        LookupError: there is no such folder. ValueError: the row has no such metric, a field is missing or unknown, or
            huggingface_hub is too old.

    Source: https://huggingface.co/docs/hub/eval-results.
    """
    import yaml

    try:
        from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    except ImportError as error:
        raise ValueError(
            f".eval_results needs a newer huggingface_hub: pip install -U huggingface_hub ({error})"
        ) from error
    target = path_of(folder)
    if not target.is_dir():
        raise LookupError(f"there is no folder {target}")
    texts = {}
    for metric, which in benchmarks.items():
        if metric not in row.metrics:
            raise ValueError(f"the row has no score of {metric!r}, only of {sorted(row.metrics)}")
        try:
            entry = EvalResultEntry(value=row.metrics[metric], **({"notes": notes} if notes else {}), **which)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the benchmark of {metric!r} is {dict(which)}: {error}") from error
        name = re.sub(r"[^\w.-]+", "-", metric).strip("-.") or "results"
        texts[target / ".eval_results" / f"{name}.yaml"] = yaml.safe_dump(
            eval_result_entries_to_yaml([entry]), sort_keys=False
        )
    for path, text in texts.items():
        with whole_file(path) as new:
            new.write_text(text, encoding="utf-8")
    return list(texts)
