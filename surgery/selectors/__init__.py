"""Selectors, which make a mask from a trajectory and prompts; and ``strengths``, how far back each unit should go."""

from surgery.selectors.selectors import AMCSelector, DamageSelector, RandomSelector, Selector
from surgery.selectors.strengths import strengths

__all__ = ["AMCSelector", "DamageSelector", "RandomSelector", "Selector", "strengths"]
