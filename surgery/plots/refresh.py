"""Figures of refreshes: every domain over steps, and what is recovered against what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from surgery.plots.sweeps import _MARKERS, COLOURS, legend_outside, new_axes
from surgery.training.refresh import Refresh

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curves = Mapping[str, Mapping[int, float | Sequence[float]]]


def refresh_dynamics(curves: Refresh | Curves, ax: Axes | None = None) -> Axes:
    """Every score over the steps of a refresh, with its starting value (the paper's Figures 9 and 11).

    Args:
        curves: a ``Refresh`` with ``validate``, or name → {step: a score in [0, 1], or one per run}. With several runs
            the line is their mean and the band their range. Step 0 is the model before the first step.
        ax: where to draw (default: a new figure).

    Raises:
        ValueError: there is no score.
    """
    found = _of(curves) if isinstance(curves, Refresh) else curves
    if not found or not all(found.values()):
        raise ValueError("no score to draw: pass validate= to refresh, a function from the model to named scores")
    ax = ax or new_axes()
    last = max(max(steps) for steps in found.values())
    for at, (name, steps) in enumerate(found.items()):
        runs = {step: _runs(value) for step, value in sorted(steps.items())}
        means = [100 * sum(values) / len(values) for values in runs.values()]
        colour, marker = COLOURS[at % 7], _MARKERS[at % 7]
        ax.plot(
            list(runs), means, label=name, color=colour, marker=marker, linewidth=1.5, markersize=3,
            markevery=max(1, len(runs) // 12),
        )  # fmt: skip
        if max(map(len, runs.values())) > 1:
            lows, highs = ([100 * end(values) for values in runs.values()] for end in (min, max))
            ax.fill_between(list(runs), lows, highs, color=colour, alpha=0.12, linewidth=0)
        first = next(iter(runs))
        ax.plot(first, means[0], marker=marker, markersize=8, markerfacecolor="white", color=colour, clip_on=False)
        ax.axhline(means[0], color=colour, linestyle=":", linewidth=0.8, alpha=0.8)
    ax.set_xlim(-0.02 * last, 1.02 * last)
    ax.set_xlabel("step (open marker and dotted line: before the first)")
    ax.set_ylabel("score (%)")
    legend_outside(ax)
    return ax


def recovery_at_cost(curves: Mapping[str, Sequence[tuple[float, float]]], ax: Axes | None = None) -> Axes:
    """Recovery against its cost, one line per method; a method with one point, like a rollback, is a large marker.

    Args:
        curves: method → (cost > 0, recovery as a fraction), in the order of the cost. Label the axis with the unit:
            ``ax.set_xlabel``.
        ax: where to draw (default: a new figure).
    """
    from matplotlib.ticker import LogLocator

    ax = ax or new_axes()
    for at, (name, points) in enumerate(curves.items()):
        costs, values = [cost for cost, _ in points], [100 * value for _, value in points]
        single = len(points) == 1
        ax.plot(
            costs, values, label=name, color=COLOURS[at % 7], marker=_MARKERS[at % 7], linewidth=1.5,
            markersize=10 if single else 4, linestyle="none" if single else "-",
        )  # fmt: skip
    ax.axhline(0, color="0.8", linewidth=1, zorder=0)
    ax.axhline(100, color="0.5", linewidth=1, linestyle="--", zorder=0)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:,.6g}")
    ax.minorticks_off()
    ax.set_xlabel("cost")
    ax.set_ylabel("recovery (%)")
    legend_outside(ax)
    return ax


def _of(done: Refresh) -> Curves:
    names = dict.fromkeys(name for step in done.steps for name in step.scores)
    return {name: {one.step: one.scores[name] for one in done.steps if name in one.scores} for name in names}


def _runs(value: float | Sequence[float]) -> Sequence[float]:
    return value if isinstance(value, Sequence) else (value,)
