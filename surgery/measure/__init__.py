"""Measuring models: sweeps, repair, stability, history, and their statistics."""

from surgery.measure.evaluators import harness, likelihood
from surgery.measure.exports import AccuracyMatrix, accuracy_matrix, before_after, write_eval_results
from surgery.measure.files import load_sweep
from surgery.measure.history import History, history
from surgery.measure.repair import Repair, repair
from surgery.measure.rows import Row, Sweep
from surgery.measure.stability import Agreement, Stability, jaccard, stability
from surgery.measure.stage import Stage, stage_damage
from surgery.measure.statistics import Paired
from surgery.measure.sweep import sweep

__all__ = [
    "AccuracyMatrix",
    "Agreement",
    "History",
    "Paired",
    "Repair",
    "Row",
    "Stability",
    "Stage",
    "Sweep",
    "accuracy_matrix",
    "before_after",
    "harness",
    "history",
    "jaccard",
    "likelihood",
    "load_sweep",
    "repair",
    "stability",
    "stage_damage",
    "sweep",
    "write_eval_results",
]
