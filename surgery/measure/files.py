"""The files of sweeps: a line that says what was measured, then a row a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surgery.files import path_of
from surgery.measure.rows import EARLIER, LATER, Row, Sweep, check_items, judged
from surgery.tables import json_of

MEASURED = {"selector": str, "budget": float, "neurons": int, "metrics": {str: float}, "seconds": float}
_MORE = {"items?": {str: [float]}, "settings?": {str: str}}
Settings = dict[str, str]


def read_rows(text: str, path: Path) -> tuple[dict[str, Any], list[tuple[Row, Settings]]]:
    """What the first line of a sweep's file says, and its rows, each with its selector's settings.

    Raises:
        ValueError: a line is no row.
    """
    lines = [(f"line {number}", line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    try:
        head: dict[str, Any] = json_of(lines[0][1] if lines else "", "line 1", {str: object})
        return head, [_row(line, where) for where, line in lines[1:]]
    except ValueError as error:
        raise ValueError(
            f"{path} is not a sweep's file, or its last line was cut: {error}. Remove that line to go on, or choose "
            f"another file"
        ) from error


def _row(line: str, where: str) -> tuple[Row, Settings]:
    found = json_of(line, where, MEASURED | _MORE)
    items, metrics = found.get("items", {}), found["metrics"]
    if not (0 <= found["budget"] <= 1 and metrics and items.keys() <= metrics.keys() and all(items.values())):
        raise ValueError(f"{where} is no row: expected a budget in [0, 1], metrics, and items of those metrics")
    items = {name: [float(x) for x in held] for name, held in items.items()}
    return Row(**{name: found[name] for name in MEASURED}, items=items), found.get("settings", {})


def load_sweep(path: str | Path, metric: str | None = None) -> Sweep:
    """Read the rows that ``sweep(path=)`` or ``repair(path=)`` wrote, with recoveries, to print or draw them.

    Args:
        path: the JSON-lines file; it has to hold the rows "earlier" and "later".
        metric: as in ``sweep``.

    Raises:
        LookupError: there is no such file. ValueError: it is not a sweep's, or ends before its references.

    Source: ours.
    """
    path = path_of(path)
    if not path.is_file():
        raise LookupError(f"there is no sweep file {path}")
    held = [row for row, _ in read_rows(path.read_text(encoding="utf-8", errors="replace"), path)[1]]
    rows = list({(row.selector, row.budget): row for row in held}.values())  # two processes may have measured one
    named = {row.selector: row for row in rows}
    if not {EARLIER, LATER} <= named.keys():
        raise ValueError(f"{path} has no rows of the earlier and later models yet: let the sweep run on")
    earlier, later = named[EARLIER], named[LATER]
    for row in rows:
        check_items(row, later)
    metric = metric_of(earlier, later, metric)
    others = [row for row in rows if row.selector not in (EARLIER, LATER)]
    return Sweep(metric, tuple(judged([earlier, later, *others], earlier, later, metric)))


def metric_of(earlier: Row, later: Row, metric: str | None = None) -> str:
    """The metric that was asked for, or the one that fell most from earlier to later.

    Raises:
        ValueError: there is no such metric.
    """
    if metric is not None and metric not in later.metrics:
        raise ValueError(f"the metric {metric!r} is none of those that evaluate returns: {sorted(later.metrics)}")
    return metric or max(earlier.metrics, key=lambda name: earlier.metrics[name] - later.metrics[name])
