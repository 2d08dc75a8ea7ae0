"""Figures of sweeps, layer budgets and stability; what all figures share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from surgery.measure.rows import CEILING, EARLIER, LATER, Row, Sweep, is_ceiling
from surgery.measure.stability import Stability

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart by readers with any colour vision
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vP*"


def layer_budgets(budgets: Mapping[str, Mapping[str, int]], ax: Axes | None = None) -> Axes:
    """How many neurons each block gives, one line per selector (the paper's Figure 12).

    Args:
        budgets: selector name → {block: neurons}, as ``Neurons.count`` or ``allocate`` gives it.
        ax: where to draw (default: a new figure).
    """
    ax = ax or new_axes()
    for at, (name, counts) in enumerate(budgets.items()):
        ax.plot(range(len(counts)), list(counts.values()), label=name, **line_style(at))
    number_blocks(ax)
    ax.set_xlabel("MLP block, in layer order")
    ax.set_ylabel("neurons reverted")
    ax.set_ylim(bottom=0)
    legend_outside(ax)
    return ax


def dose_response(sweep: Sweep, ax: Axes | None = None) -> Axes:
    """Recovery against the budget, one line per selector, with its interval and the ceiling (the paper's Figure 13).

    Raises:
        ValueError: no row has a recovery.
    """
    names = dict.fromkeys(
        row.selector for row in sweep if row.selector not in (EARLIER, LATER) and not is_ceiling(row.selector)
    )
    if names and not any(row.recovery is not None for row in sweep):
        raise ValueError(f"no row has a recovery of {sweep.metric}, which did not fall: nothing to draw")
    ax = ax or new_axes()
    for at, name in enumerate(names):
        drawn = (row for row in sweep[name] if row.recovery is not None and row.budget > 0)  # the axis has no 0
        rows = sorted(drawn, key=lambda row: row.budget)
        ax.plot(
            [100 * row.budget for row in rows],
            [100 * (row.recovery or 0) for row in rows],
            label=name,
            **line_style(at),
        )
        if spans := [(100 * row.budget, row.interval) for row in rows if row.interval]:
            lows, highs = ([100 * span[end] for _, span in spans] for end in (0, 1))
            ax.fill_between([budget for budget, _ in spans], lows, highs, color=COLOURS[at % 7], alpha=0.12)
    ceilings = [row for row in sweep if is_ceiling(row.selector)]
    for row, style in zip(ceilings, cycle(("--", ":", "-."))):
        if row.recovery is not None:
            ax.axhline(100 * row.recovery, color="0.5", linestyle=style, linewidth=1, label=row.selector)
    ax.axhline(0, color="0.8", linewidth=1)
    ax.set_xscale("log", base=2)
    budgets = sorted({100 * row.budget for row in sweep if row.neurons and row.selector in names})
    ax.set_xticks(budgets, [f"{budget:.3g}" for budget in budgets])
    ax.set_xlabel("budget β (% of MLP neurons)" if {row.selector for row in ceilings} <= {CEILING} else "budget β (%)")
    ax.set_ylabel(f"recovery of {sweep.metric} (%)")
    legend_outside(ax)
    return ax


def pareto_front(sweep: Sweep, ax: Axes | None = None) -> Axes:
    """Recovery against the worst loss elsewhere, one mark per row; the front joins the rows that no other row beats.

    A row beats another if it recovers as much for a smaller loss, or more for the same loss. The loss elsewhere is that
    of the metric that fell most, without the damaged one; it is zero if all of them rose.

    Args:
        sweep: the result of ``surgery.sweep``, over two metrics or more.
        ax: where to draw (default: a new figure).

    Raises:
        ValueError: no row has both a recovery and a change of another metric.
    """
    rows = [row for row in sweep if row.recovery is not None and row.delta]
    if not rows:
        raise ValueError(f"no row has a recovery of {sweep.metric} and a change of another metric: nothing to draw")
    ax = ax or new_axes()
    names = sorted(dict.fromkeys(row.selector for row in rows), key=is_ceiling)  # colours as elsewhere
    for at, name in enumerate(names):
        points = [_cost_and_gain(row) for row in rows if row.selector == name]
        style = {**line_style(at), "linestyle": "none", "markersize": 6}
        ax.plot([cost for cost, _ in points], [gain for _, gain in points], label=name, **style)
    front: list[tuple[float, float]] = []
    for cost, gain in sorted(map(_cost_and_gain, rows), key=lambda point: (point[0], -point[1])):
        if not front or gain > front[-1][1]:
            front.append((cost, gain))
    front.append((max(cost for cost, _ in map(_cost_and_gain, rows)), front[-1][1]))
    ax.step(*zip(*front, strict=True), where="post", color="0.4", linewidth=1, label="front", zorder=0)
    ax.set_xlabel("worst loss of another metric (its own unit)")
    ax.set_ylabel(f"recovery of {sweep.metric} (%)")
    legend_outside(ax)
    return ax


def _cost_and_gain(row: Row) -> tuple[float, float]:
    return max(0.0, -min(row.delta.values())), 100 * (row.recovery or 0.0)


def prompt_stability(stability: Stability, ax: Axes | None = None, of: str = "jaccard") -> Axes:
    """How much the mask depends on the calibration prompts, against their number: mean and range over the draws.

    Args:
        stability: the result of ``surgery.measure.stability``.
        ax: where to draw (default: a new figure).
        of: "jaccard", the agreement of masks compared with chance, or "recovery", compared with that of all prompts.

    Raises:
        ValueError: another ``of``, or recovery where none was measured (``evaluate=`` was not passed).
    """
    sizes, found = [one.size for one in stability.agreements], stability.agreements
    if of == "jaccard":
        curves = {"two draws": [one.jaccard for one in found], "a draw and all prompts": [one.to_all for one in found]}
        label, scale, level, name = "Jaccard of the masks", 1, stability.chance, "unrelated masks"
    elif of == "recovery" and stability.recovery is not None:
        curves = {f"draws, {stability.selector}": [one.recovery for one in found]}
        label, scale, level = f"recovery of {stability.metric} (%)", 100, stability.recovery
        name = f"all {stability.prompts} prompts"
    else:
        raise ValueError(
            f'of={of!r}: expected "jaccard", or "recovery" of a stability that was measured with evaluate='
        )
    ax = ax or new_axes()
    for at, (curve, every) in enumerate(curves.items()):
        ax.plot(sizes, [scale * sum(values) / len(values) for values in every], label=curve, **line_style(at))
        low, high = ([scale * end(values) for values in every] for end in (min, max))
        ax.fill_between(sizes, low, high, color=COLOURS[at], alpha=0.15)
    ax.axhline(scale * level, color="0.5", linestyle="--", linewidth=1, label=name)
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.set_xlabel(f"calibration prompts (of {stability.prompts})")
    ax.set_ylabel(label)
    lowest = min((scale * min(values) for every in curves.values() for values in every), default=0)
    ax.set_ylim(min(0, lowest), 1.02 if of == "jaccard" else None)
    legend_outside(ax)
    return ax


def line_style(at: int) -> dict[str, Any]:
    """Colour, marker and width of the line at that place among its figure's lines."""
    return {"color": COLOURS[at % 7], "marker": _MARKERS[at % 7], "markersize": 4, "linewidth": 1.5}


def new_axes() -> Axes:
    """A figure of half a page."""
    from matplotlib.figure import Figure

    return Figure(figsize=(6.4, 3.8), dpi=150, layout="constrained").subplots()


_LONG, _ACROSS = 24, 80  # letters: a label that would leave the axes little room beside it; what fits above them


def legend_outside(ax: Axes, handlelength: float = 2) -> None:
    """A legend where it covers nothing: to the right of the axes, or above them where a label is long."""
    labels = ax.get_legend_handles_labels()[1]
    lines = [line for label in labels for line in label.split("\n")]
    longest = max(map(len, lines), default=0)
    columns = max(1, min(len(labels), _ACROSS // (longest + 6)))
    how = {"frameon": False, "fontsize": "small", "handlelength": handlelength}
    tall = len(lines) > 16
    if tall:
        how |= {"fontsize": "x-small", "labelspacing": 0.1}
    if longest > _LONG and len(lines) <= 4 * columns and not ax.get_title():
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, **how)
    else:
        ax.legend(loc="upper left" if tall else "center left", bbox_to_anchor=(1, 1 if tall else 0.5), **how)


def number_blocks(ax: Axes) -> None:
    """Blocks are numbered from 0, as many of them as there is room for."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def name_stages(ax: Axes, names: Sequence[str]) -> None:
    """Ticks with names, aslant where they would run into each other."""
    aslant = sum(len(name) + 2 for name in names) > _ACROSS * 0.7
    ax.set_xticks(range(len(names)), list(names))
    ax.tick_params("x", rotation=25 if aslant else 0)
    for label in ax.get_xticklabels() if aslant else ():
        label.set(ha="right", rotation_mode="anchor")
