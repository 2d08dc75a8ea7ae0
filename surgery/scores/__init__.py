"""Scores: one number per unit or weight that says how much it should be reverted (larger = first)."""

from surgery.scores.amc import activation, conflict, magnitude
from surgery.scores.damage import damage, reversal_cost
from surgery.scores.weights import Gains, entry_gains, entry_magnitude

__all__ = ["Gains", "activation", "conflict", "damage", "entry_gains", "entry_magnitude", "magnitude", "reversal_cost"]
