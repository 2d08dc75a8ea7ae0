"""Figures of the structural evidence, of gradient cosines and of a history."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from surgery.evidence.changes import Changes
from surgery.evidence.directions import Directions
from surgery.evidence.gradients import Gradients, GradientSeries
from surgery.evidence.overlap import Matrix, Overlap, Profile
from surgery.evidence.products import Pull
from surgery.measure.history import History
from surgery.plots.sweeps import legend_outside, line_style, name_stages, new_axes, number_blocks

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def change_histogram(
    changes: Changes,
    what: Literal["absolute", "relative"] = "absolute",
    against: Literal["base", "before"] = "base",
    ax: Axes | None = None,
) -> Axes:
    """How far parameters moved, one line per stage, on a logarithmic axis (the paper's Figure 2 and Appendix B).

    The line of a stage is the share of all parameters in each octave; the legend says how many did not move.

    Args:
        changes: the result of ``surgery.evidence.changes``.
        what: "absolute", abs(Δ), or "relative", abs(Δ) / abs(θ_reference).
        against: "base", the first checkpoint (cumulative), or "before", the one before (incremental).
        ax: where to draw (default: a new figure).

    Raises:
        ValueError: another ``what`` or ``against``.
    """
    if what not in ("absolute", "relative") or against not in ("base", "before"):
        raise ValueError(f'what={what!r}, against={against!r}: expected "absolute" or "relative", "base" or "before"')
    ax = ax or new_axes()
    for at, step in enumerate(changes.cumulative if against == "base" else changes.incremental):
        one = step.whole
        held = one.absolute if what == "absolute" else one.relative
        label = f"{step.stage} − {step.reference} ({100 * one.share(one.unchanged):.1f} % unchanged)"
        shares = [100 * one.share(count) for count in held.counts]
        if held.counts:
            ax.stairs(shares, [max(edge, 1e-38) for edge in held.edges], label=label, **_line(at))
        else:
            ax.plot([], [], label=label, **_line(at))
    threshold = changes.absolute if what == "absolute" else changes.relative
    ax.axvline(threshold, color="0.5", linestyle="--", linewidth=1, label=f"near zero: below {threshold:g}")
    ax.set_xscale("log")
    ax.set_xlabel("abs(Δ), in the unit of the weights" if what == "absolute" else "abs(Δ) / abs(θ of the reference)")
    ax.set_ylabel("parameters per octave (%)")
    ax.set_ylim(bottom=0)
    legend_outside(ax)
    return ax


def _line(at: int) -> dict[str, Any]:
    return {key: value for key, value in line_style(at).items() if key in ("color", "linewidth")}


def overlap_matrix(overlap: Overlap, ax: Axes | None = None, title: str = "") -> Axes:
    """Jaccard of every two domains' top neurons, each cell with chance in brackets.

    Args:
        overlap: the result of ``surgery.evidence.overlap``, of changed or of active neurons.
        ax: where to draw (default: a new figure); two of them side by side share the scale 0 to 1.
        title: such as "changed" or "active".
    """
    ax = ax or new_axes()
    _matrix(ax, overlap.jaccard, overlap.chance, overlap.domains)
    ax.set_title(f"{title} neurons, top {100 * overlap.top:g} %".strip(), fontsize="medium")
    return ax


def _matrix(ax: Axes, values: Matrix, chance: Matrix, names: tuple[str, ...]) -> None:
    image = ax.imshow(values, cmap="cividis", vmin=0, vmax=1)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            text = f"{value:.2f}" if i == j else f"{value:.2f}\n({chance[i][j]:.2f})"
            ax.text(j, i, text, ha="center", va="center", fontsize=9, color="black" if value > 0.45 else "white")
    name_stages(ax, names)
    ax.set_yticks(range(len(names)), names)
    ax.figure.colorbar(image, ax=ax, label="Jaccard (chance in brackets)", shrink=0.8)


def directional_cosine(
    directions: Directions, pairs: list[tuple[str, str]] | None = None, ax: Axes | None = None
) -> Axes:
    """Mean cosine of two stages' updates in each block, one line per pair, with the null's 95 % band (Figure 4).

    Args:
        directions: the result of ``surgery.evidence.directions``.
        pairs: which pairs of stages (default: all).
        ax: where to draw (default: a new figure). A block without shared neurons leaves a gap; a hollow mark is
            a single neuron, which has no null.
    """
    ax = ax or new_axes()
    chosen = [directions.of(*pair) for pair in pairs] if pairs else list(directions.pairs)
    for at, pair in enumerate(chosen):
        style = line_style(at)
        means = [float("nan") if one.mean is None else one.mean for one in pair.blocks]
        ax.plot(range(len(means)), means, label=f"{pair.first}–{pair.second}", **style)
        bands = [(float("nan"),) * 3 if one.null is None else one.null for one in pair.blocks]
        lows, highs = ([band[end] for band in bands] for end in (0, 2))
        ax.fill_between(range(len(means)), lows, highs, color=style["color"], alpha=0.12, linewidth=0)
        single = [(x, one.mean) for x, one in enumerate(pair.blocks) if one.mean is not None and one.null is None]
        hollow = {**style, "linestyle": "none", "markerfacecolor": "white"}
        ax.plot([x for x, _ in single], [y for _, y in single], **hollow)
    ax.axhline(0, color="0.6", linewidth=1)
    number_blocks(ax)
    ax.set_xlabel("block, in layer order")
    ax.set_ylabel("mean cosine of the updates")
    legend_outside(ax)
    return ax


def profile_bars(profile: Profile, ax: Axes | None = None) -> Axes:
    """The share of each block in a mask's units, or in a score's sum, coloured by kind of unit.

    Args:
        profile: the result of ``surgery.evidence.profile``.
        ax: where to draw (default: a new figure).
    """
    ax = ax or new_axes()
    for at, kind in enumerate(one.kind for one in profile.kinds):
        rows = [(x, 100 * one.share) for x, one in enumerate(profile.blocks) if one.kind == kind]
        ax.bar([x for x, _ in rows], [share for _, share in rows], color=line_style(at)["color"], label=kind)
    number_blocks(ax)
    ax.set_xlabel("block, in layer order")
    ax.set_ylabel(f"share of the {profile.what} (%)")
    if len(profile.kinds) > 1:
        legend_outside(ax)
    return ax


def layer_lines(curves: Mapping[str, Sequence[float | None]], label: str, ax: Axes | None = None) -> Axes:
    """Any numbers by layer, one line per name; None leaves a gap.

    Args:
        curves: name → one number per layer, in their order.
        label: of the axis: what the numbers are, with their unit.
        ax: where to draw (default: a new figure).
    """
    ax = ax or new_axes()
    for at, (name, values) in enumerate(curves.items()):
        ax.plot([math.nan if value is None else value for value in values], label=name, **line_style(at))
    number_blocks(ax)
    ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    ax.set_xlabel("layer")
    ax.set_ylabel(label)
    legend_outside(ax)
    return ax


_CONFLICT, _SYNERGY = "#D55E00", "#0072B2"
_WRITTEN = 80  # cells of a heatmap up to which each one's number is written into it


def gradient_heatmap(found: Gradients, kind: str = "mlp", ax: Axes | None = None, limit: float | None = None) -> Axes:
    """The cosine of every two domains' gradients in each layer's modules of one kind (after the paper's heatmaps).

    Args:
        found: the result of ``surgery.evidence.gradients``.
        kind: "attention", "mlp", "norm" or "other".
        ax: where to draw (default: a new figure).
        limit: the cosine at the ends of the colour scale (default: the largest one; to compare two heatmaps, pass the
            same limit for both).

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
    step = 1 + len(parts) // 12
    ax.set_xticks(range(0, len(parts), step), [str(part.layer) for part in parts[::step]])
    ax.set_yticks(range(len(rows)), [f"{a}–{b}" for a, b in found.pairs])
    ax.set_xlabel("layer")
    ax.set_title({"mlp": "MLP", "other": "other modules"}.get(kind, kind), fontsize="medium")
    ax.figure.colorbar(image, ax=ax, label="cosine of the gradients")
    return ax


def gradient_extremes(found: Gradients, ax: Axes | None = None) -> Axes:
    """The strongest conflicts and synergies as bars, by module and pair of domains.

    Args:
        found: the result of ``surgery.evidence.gradients``.
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
        series: the result of ``surgery.evidence.gradients_along``, or a callback's ``series``.
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
            ax.plot(places, values, **style, label=_label(pull).replace(", ", ",\n"))
    ax.axhline(0, color="0.5", linewidth=1)
    if not steps:
        name_stages(ax, names)
    ax.set_xlabel("training step" if steps else "checkpoint")
    ax.set_ylabel("cosine of the gradients")
    legend_outside(ax, handlelength=3.5)
    return ax


def _label(pull: Pull) -> str:
    return f"layer {pull.layer} {'MLP' if pull.kind == 'mlp' else pull.kind}, {pull.first}–{pull.second}"


def score_lines(history: History, ax: Axes | None = None) -> Axes:
    """The score of every domain after each stage, one line per domain; a ring marks the domain's own stage.

    Args:
        history: the result of ``surgery.measure.history``.
        ax: where to draw (default: a new figure).
    """
    ax = ax or new_axes()
    for at, (domain, scores) in enumerate(history.scores.items()):
        style = line_style(at)
        ax.plot(range(len(scores)), scores, label=domain, **style)
        if domain in history.stages:
            own = history.stages.index(domain)
            ax.plot([own], [scores[own]], marker="o", markersize=12, fillstyle="none", color=style["color"])
    name_stages(ax, history.stages)
    ax.set_xlabel("checkpoint, in training order")
    ax.set_ylabel("score (larger is better)")
    legend_outside(ax)
    return ax
