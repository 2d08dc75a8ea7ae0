"""Figures of everything measured: numbers in, matplotlib ``Axes`` out (extra ``surgery[plots]``)."""

from surgery.plots.evidence import (
    change_histogram,
    directional_cosine,
    gradient_courses,
    gradient_extremes,
    gradient_heatmap,
    layer_lines,
    overlap_matrix,
    profile_bars,
    score_lines,
)
from surgery.plots.refresh import recovery_at_cost, refresh_dynamics
from surgery.plots.sweeps import dose_response, layer_budgets, pareto_front, prompt_stability
from surgery.plots.theory import contracting_distance, damage_curve, expansion

__all__ = [
    "change_histogram",
    "contracting_distance",
    "damage_curve",
    "directional_cosine",
    "dose_response",
    "expansion",
    "gradient_courses",
    "gradient_extremes",
    "gradient_heatmap",
    "layer_budgets",
    "layer_lines",
    "overlap_matrix",
    "pareto_front",
    "profile_bars",
    "prompt_stability",
    "recovery_at_cost",
    "refresh_dynamics",
    "score_lines",
]
