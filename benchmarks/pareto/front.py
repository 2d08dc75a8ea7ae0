"""The two pictures of ``benchmarks.pareto``: recovery against what it costs elsewhere, and against its size."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.pareto.changes import BASELINE, LIBRARY, TRAINED, VARIANT
from benchmarks.pareto.points import Point
from surgery.measure.rows import CEILING, EARLIER, LATER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What is drawn in full, in Okabe and Ito's palette, and a marker of its own: no reader depends on the colour
_STYLES: dict[str, tuple[str, str]] = {
    "A×M×C": ("#0072B2", "o"),
    "D (KL)": ("black", "o"),
    "D": ("black", "h"),
    "D of units (neurons and value channels)": ("black", "^"),
    "D of units (neurons and KV groups)": ("black", "d"),
    "D of single weights": ("#CC79A7", "*"),
    "WiSE-FT": ("#E69F00", "s"),
    "most-changed entries": ("#009E73", "v"),
    "spectral (DG-Hard)": ("#D55E00", "P"),
    "random neurons": ("0.45", "x"),
}
_THIN = {
    LIBRARY: ("#56B4E9", "other selectors of the library"),
    VARIANT: ("#F0A0C8", "variants of D"),
    BASELINE: ("0.6", "other baselines and controls"),
}
_FLOOR = -35  # percent


def front(found: Sequence[Point], cost: Callable[[Point], float]) -> list[Point]:
    """The points that no other one beats: none costs as little and recovers more. By rising cost."""
    kept: list[Point] = []
    for point in sorted(found, key=lambda point: (cost(point), -point.recovery)):
        if not kept or point.recovery > kept[-1].recovery:
            kept.append(point)
    return kept


def against_loss(found: Mapping[str, Sequence[Point]]) -> Figure:
    """Recovery against the worst Δ elsewhere: linear within half a point of zero, logarithmic beyond."""

    def prepare(ax: Axes) -> None:
        ax.set_xscale("symlog", linthresh=0.5, linscale=1.0)
        ticks = [-30, -10, -3, -1, 0, 1, 3]
        ax.set_xticks(ticks, [f"{tick:g}".replace("-", "−") for tick in ticks])
        ax.minorticks_off()
        ax.axvline(0, color="0.8", linewidth=1, zorder=0)
        ax.set_xlabel("worst Δ on another domain (points)")

    return _figure(found, lambda point: 100 * point.worst, -1, prepare)


def against_size(found: Mapping[str, Sequence[Point]]) -> Figure:
    """Recovery against the share of the parameters whose bits changed, on a logarithmic axis."""

    def prepare(ax: Axes) -> None:
        ax.set_xscale("log")
        ax.set_xlim(0.03, 130)
        ticks = [0.05, 0.2, 1, 4, 16, 64]
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.set_xlabel("parameters touched (%)")

    return _figure(found, lambda point: 100 * point.touched, 1, prepare)


def _figure(
    found: Mapping[str, Sequence[Point]], x: Callable[[Point], float], sign: int, prepare: Callable[[Axes], None]
) -> Figure:
    """A panel per pair; ``sign`` · x is the cost. One legend below."""
    from matplotlib.figure import Figure

    drawn = {name: group for name, group in found.items() if group}
    columns = max(1, min(2, len(drawn)))
    rows = max(1, -(-len(drawn) // columns))
    figure = Figure(figsize=(4.3 * columns, 3.5 * rows + 1.7), dpi=150, layout="constrained")
    for at, (name, group) in enumerate(drawn.items()):
        ax = figure.add_subplot(rows, columns, at + 1)
        _panel(ax, group, x, sign)
        prepare(ax)
        ax.set_title(name, fontsize="medium")
        ax.set_ylabel("recovery (%)" if at % columns == 0 else "")
    labelled = {label: line for ax in figure.axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(
        list(labelled.values()), list(labelled), loc="outside lower center", ncols=3 if columns > 1 else 2,
        frameon=False, fontsize="small",
    )  # fmt: skip
    return figure


def _panel(ax: Axes, found: Sequence[Point], x: Callable[[Point], float], sign: int) -> None:
    ends = front([point for point in found if point.kind != TRAINED], lambda point: sign * x(point))
    last = max((sign * x(point) for point in found), default=0) * sign
    ax.step(
        [x(point) for point in ends] + [last],
        [100 * point.recovery for point in ends] + [100 * ends[-1].recovery],
        where="post", color="black", linewidth=6, alpha=0.13, label="best without training", zorder=1,
    )  # fmt: skip
    for name in dict.fromkeys(point.method for point in found if point.method not in (EARLIER, LATER, CEILING)):
        curve = [point for point in found if point.method == name]
        style = _style(curve[0])
        ax.plot([x(point) for point in curve], [100 * point.recovery for point in curve], **style)
        if name in _STYLES:  # 95 % over items
            span = [100 * point.low for point in curve], [100 * point.high for point in curve]
            ax.vlines([x(point) for point in curve], *span, color=style["color"], alpha=0.3, linewidth=1, zorder=2)
    for point in found:
        if point.method == CEILING:
            ax.plot(x(point), 100 * point.recovery, "h", color="#0072B2", mfc="white", markersize=8, label=CEILING)
    for height in (0, 100):
        ax.axhline(height, color="0.8", linewidth=1, zorder=0)
    ax.set_ylim(_FLOOR, 8 + 100 * max(1.0, *(point.recovery for point in found)))
    if below := sorted({point.method for point in found if 100 * point.recovery < _FLOOR}):
        ax.text(
            0.03, 0.02, textwrap.fill(f"off the picture, below: {', '.join(below)}", 60), transform=ax.transAxes,
            fontsize="x-small",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )  # fmt: skip


def _style(point: Point) -> dict[str, Any]:
    if point.kind == TRAINED:
        filled = "training" in point.method
        return {
            "color": "black", "marker": "X", "markersize": 7, "linestyle": "none", "label": point.method,
            "markerfacecolor": "black" if filled else "none", "zorder": 3,
        }  # fmt: skip
    if point.method in _STYLES:
        colour, marker = _STYLES[point.method]
        label = re.sub(r"units \((.*?)\)", r"\1", point.method)
        return {
            "color": colour, "marker": marker, "markersize": 9 if marker == "*" else 5, "linewidth": 1.4, "zorder": 3,
            "markerfacecolor": "white" if point.method == "D (KL)" else colour,
            "label": f"{label} of neurons" if point.method in ("A×M×C", "D", "D (KL)") else label,
        }  # fmt: skip
    colour, label = _THIN.get(point.kind, _THIN[BASELINE])
    return {
        "color": colour, "marker": ".", "markersize": 3, "linewidth": 0.7, "alpha": 0.5, "label": label,
        "linestyle": "none" if point.method == "one layer" else "-",
    }  # fmt: skip
