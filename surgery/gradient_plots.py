"""Figures of gradient conflict: numbers in, matplotlib ``Axes`` out (extra ``surgery[plots]``)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from surgery.gradient_cosines import Gradients, GradientSeries
from surgery.gradient_parts import Pull
from surgery.plots import line_style, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CONFLICT, _SYNERGY = "#D55E00", "#0072B2"
_WRITTEN = 80  # cells of a heatmap up to which each one's number is written into it


def gradient_heatmap(found: Gradients, kind: str = "mlp", ax: Axes | None = None, limit: float | None = None) -> Axes:
    """The cosine of every two domains' gradients in each layer's modules of one kind (the paper's heatmaps in kind).

    Args:
        found: what ``surgery.gradients`` returned.
        kind: "attention", "mlp", "norm" or "other".
        ax: where to draw (default: a new figure).
        limit: the cosine at the ends of the colour scale (default: the largest there is; give both of two heatmaps the
            same to compare them).

    Raises:
        ValueError: no layer has a module of that kind.
    """
    parts = [part for part in found.modules if part.kind == kind]
    if not parts:
        raise ValueError(
            f"no layer has a module of the kind {kind!r}: there are {sorted({p.kind for p in found.modules})}"
        )
    ax = ax or new_axes()
    rows = [[math.nan if c is None else c for c in (part.cosines[a][b] for part in parts)] for a, b in found.pairs]
    known = [abs(value) for row in rows for value in row if value == value]
    limit = limit or max(known, default=0.0) or 1.0
    image = ax.imshow(rows, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    ax.set_facecolor("0.8")  # where a cosine is not defined
    if len(parts) * len(rows) <= _WRITTEN:
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                colour = "white" if abs(value) > 0.65 * limit else "black"
                text = "–" if value != value else f"{value:.2f}" if abs(value) >= 0.095 else f"{value:.3f}"
                ax.text(x, y, text.replace("-", "−"), ha="center", va="center", color=colour, fontsize="x-small")
    step = max(1, len(parts) // 16)
    ax.set_xticks(range(0, len(parts), step), [str(part.layer) for part in parts[::step]])
    ax.set_yticks(range(len(rows)), [f"{a}–{b}" for a, b in found.pairs])
    ax.set_xlabel("layer")
    ax.set_title({"mlp": "MLP", "other": "other modules"}.get(kind, kind), fontsize="medium")
    ax.figure.colorbar(image, ax=ax, label="cosine of the gradients")
    return ax


def gradient_extremes(found: Gradients, ax: Axes | None = None) -> Axes:
    """The strongest conflicts and synergies as bars, by module and pair of domains.

    Args:
        found: what ``surgery.gradients`` returned.
        ax: where to draw (default: a new figure).
    """
    ax = ax or new_axes()
    pulls = (*found.conflicts, *reversed(found.synergies))
    colours = [_CONFLICT if pull.cosine < 0 else _SYNERGY for pull in pulls]
    ax.barh(range(len(pulls)), [pull.cosine for pull in pulls], color=colours)
    ax.set_yticks(range(len(pulls)), [_label(pull) for pull in pulls], fontsize="small")
    ax.invert_yaxis()
    ax.axvline(0, color="0.5", linewidth=1)
    ax.set_xlabel("cosine of the gradients (below 0: conflict, above 0: synergy)")
    return ax


def gradient_courses(series: GradientSeries, which: str = "both", ax: Axes | None = None) -> Axes:
    """The cosine of the strongest conflicts (solid) and synergies (dashed) over checkpoints or training steps.

    Args:
        series: what ``surgery.gradients_along`` returned, or a callback's ``series``.
        which: "conflicts", "synergies" or "both" (one may be much larger than the other).
        ax: where to draw (default: a new figure).

    Raises:
        ValueError: ``which`` is none of the three.
    """
    if which not in ("both", "conflicts", "synergies"):
        raise ValueError(f"which={which!r}: expected 'conflicts', 'synergies' or 'both'")
    ax = ax or new_axes()
    names = list(series.stages)
    steps = all(name.isdecimal() for name in names)
    places = [int(name) for name in names] if steps else list(range(len(names)))
    for pulls, name, line in ((series.synergies, "synergies", "--"), (series.conflicts, "conflicts", "-")):
        for at, pull in enumerate(pulls if which in ("both", name) else ()):
            values = [math.nan if value is None else value for value in series.course(pull)]
            style = line_style(at) | {"linestyle": line, "markerfacecolor": "white" if line == "--" else None}
            ax.plot(places, values, **style, label=_label(pull))
    ax.axhline(0, color="0.5", linewidth=1)
    if not steps:
        ax.set_xticks(places, names)
    ax.set_xlabel("training step" if steps else "checkpoint")
    ax.set_ylabel("cosine of the gradients")
    ax.legend(frameon=False, fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5), handlelength=3.5)
    return ax


def _label(pull: Pull) -> str:
    return f"layer {pull.layer} {'MLP' if pull.kind == 'mlp' else pull.kind}, {pull.first}–{pull.second}"
