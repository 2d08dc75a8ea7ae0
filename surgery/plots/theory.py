"""Figures of the theory, measured: one function each, what was measured in, matplotlib ``Axes`` out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.plots.sweeps import COLOURS, legend_outside, line_style, new_axes
from surgery.theory.contraction import Contraction
from surgery.theory.damage import DamageSpectrum, DamageTerms

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def expansion(terms: DamageTerms, ax: Axes | None = None) -> Axes:
    """Proposition 1: the true rise of the loss along δB, and its first- and second-order terms.

    Args:
        terms: the result of ``surgery.theory.damage_terms``.
        ax: where to draw (default: a new figure).
    """
    ax = ax or new_axes()
    at = (0.0, *terms.fractions)
    first, second = terms.first[-1] / terms.fractions[-1], terms.second[-1] / terms.fractions[-1] ** 2
    fine = [terms.fractions[-1] * step / 50 for step in range(51)]
    told = [first * t + second * t * t for t in at]
    ax.plot(at, (0.0, *terms.true), label="true", **line_style(0))
    ax.plot(fine, [first * t + second * t * t for t in fine], color=COLOURS[1], label="first + second order")
    ax.plot(fine, [first * t for t in fine], color=COLOURS[2], linestyle="--", label="first order")
    ax.fill_between(at, (0.0, *terms.true), told, color="0.5", alpha=0.15, label="remainder")
    ax.set_xlabel("t, fraction of δB (0 = earlier, 1 = later)")
    ax.set_ylabel("rise of the earlier domain's loss\n(nats per response token)")
    ax.set_xlim(0, None)
    legend_outside(ax)
    return ax


def damage_curve(spectrum: DamageSpectrum, ax: Axes | None = None) -> Axes:
    """The quadratic damage by number of dimensions: directions of largest curvature, random ones, ranked neurons.

    Args:
        spectrum: the result of ``surgery.theory.damage_spectrum``.
        ax: where to draw (default: a new figure).
    """
    ax = ax or new_axes()
    whole = spectrum.home or 1.0
    held = [100 * one / whole for one in spectrum.cumulative]
    ax.plot(range(1, len(held) + 1), held, label="directions of largest curvature", **line_style(0))
    means = [100 * sum(draws) / len(draws) / whole for draws in spectrum.random]
    low, high = ([100 * end(draws) / whole for draws in spectrum.random] for end in (min, max))
    ax.plot(spectrum.sizes, means, label="random subspaces (mean, range)", **line_style(1))
    ax.fill_between(spectrum.sizes, low, high, color=COLOURS[1], alpha=0.2)
    for at, (name, curve) in enumerate(spectrum.ranked.items()):
        sizes, shares = zip(*curve, strict=True)
        ax.plot(sizes, [100 * one / whole for one in shares], label=f"best neurons by {name}", **line_style(2 + at))
    ax.axhline(100, color="0.5", linestyle="--", linewidth=1)
    ax.set_xscale("log")
    ax.set_xlabel(f"dimensions of the subspace (of {spectrum.dimension:,})")
    ax.set_ylabel("share of the quadratic damage ½ δᵀHδ (%)")
    legend_outside(ax)
    return ax


def contracting_distance(found: Contraction, ax: Axes | None = None) -> Axes:
    """Theorem 1: the distance to θA inside S over a refresh's steps, and its bounds (log scale).

    Args:
        found: the result of ``surgery.theory.contraction``.
        ax: where to draw (default: a new figure).
    """
    from matplotlib.ticker import MaxNLocator

    ax = ax or new_axes()
    steps = range(len(found.inside))
    style = {**line_style(0), "marker": "o" if len(steps) <= 40 else ""}
    ax.plot(steps, found.inside, label="measured, ‖P$_S$(θ$_t$ − θ$_A$)‖", **style)
    ax.plot(steps, found.bound, color=COLOURS[1], linestyle="--", label="bound, (1 − αμ)$^t$ ‖P$_S$δ‖")
    ax.plot(steps, found.coupled, color=COLOURS[2], linestyle=":", label="bound with coupling ξ")
    ax.set_yscale("log")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("refresh step t")
    ax.set_ylabel("distance to the earlier checkpoint in S\n(units of the parameters)")
    legend_outside(ax)
    return ax
