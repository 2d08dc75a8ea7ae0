"""Figures of a history: numbers in, matplotlib ``Axes`` out (extra ``surgery[plots]``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.histories import History
from surgery.plots import line_style, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def score_lines(history: History, ax: Axes | None = None) -> Axes:
    """The score of every domain after each stage, one line a domain; a ring marks its own stage.

    Args:
        history: what ``surgery.history`` returned.
        ax: where to draw (default: a new figure).
    """
    ax = ax or new_axes()
    for at, (domain, scores) in enumerate(history.scores.items()):
        style = line_style(at)
        ax.plot(range(len(scores)), scores, label=domain, **style)
        if domain in history.stages:
            own = history.stages.index(domain)
            ax.plot([own], [scores[own]], marker="o", markersize=12, fillstyle="none", color=style["color"])
    ax.set_xticks(range(len(history.stages)), history.stages)
    ax.set_xlabel("checkpoint, in training order")
    ax.set_ylabel("score (larger is better)")
    ax.legend(frameon=False, fontsize="small")
    return ax
