"""Rows judged against the references: recovery, Δ, and the statistics of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from surgery.rows import EARLIER, LATER, Row
from surgery.significance import healing, paired, preservation, recovery_intervals, retention, underpowered


def judged(rows: Sequence[Row], earlier: Row, later: Row, metric: str) -> list[Row]:
    """The rows with what follows from the references (see ``Row``): recovery on ``metric``, Δ on the others.

    Raises:
        ValueError: two models were scored on different numbers of items.
    """
    for row in (*rows, earlier):
        check_items(row, later)
    found = [compared(row, earlier, later, metric) for row in rows]
    for name in later.items:
        having = [at for at, row in enumerate(rows) if name in row.items]
        held = [*(rows[at] for at in having), *([earlier] if name in earlier.items else [])]
        before = np.array(later.items[name])
        now = np.array([row.items[name] for row in held])
        each = paired(now, before) if having else []
        for at, one in zip(having, each, strict=False):
            found[at].paired[name] = one
        if name != metric or len(each) == len(having):
            continue
        for at, span in zip(having, recovery_intervals(now[:-1], now[-1], before), strict=True):
            if found[at].recovery is not None:
                found[at] = dataclasses.replace(found[at], interval=span, underpowered=underpowered(each[-1], span))
    return found


def check_items(row: Row, later: Row) -> None:
    """Raise ``ValueError`` where a row was scored on another number of items than the later model."""
    for name, items in later.items.items():
        if name in row.items and len(row.items[name]) != len(items):
            raise ValueError(
                f"{name!r} has {len(row.items[name])} items in {row.selector!r} and {len(items)} in 'later': evaluate "
                f"has to score the same items in the same order (and rows of other items need another file)"
            )


def compared(row: Row, earlier: Row, later: Row, metric: str) -> Row:
    """The part of ``judged`` that needs no statistics. Without items the mean serves as the only one."""

    def three(name: str) -> tuple[list[float], ...]:
        held = [one.items.get(name) for one in (row, earlier, later)]
        means = [[one.metrics[name]] for one in (row, earlier, later)]
        return tuple(one for one in held if one) if all(held) else tuple(means)

    if row.selector in (EARLIER, LATER):
        return dataclasses.replace(row, paired={})
    lost = earlier.metrics[metric] - later.metrics[metric]
    others = [name for name in row.metrics if name != metric]
    kept = {name: retention(*three(name)) for name in others}
    return dataclasses.replace(
        row,
        recovery=(row.metrics[metric] - later.metrics[metric]) / lost if lost > 0 else None,
        delta={name: row.metrics[name] - later.metrics[name] for name in others},
        healing=healing(*three(metric)) if lost > 0 else None,
        preservation=preservation(*three(metric)),
        retention={name: part for name, part in kept.items() if part is not None},
        paired={},
    )
