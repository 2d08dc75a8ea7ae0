"""The paper's structural evidence: changes of parameters, overlap of neurons, directions, conflict of gradients."""

from surgery.evidence.changes import Changes, changes
from surgery.evidence.directions import Directions, directions
from surgery.evidence.gradients import Gradients, GradientSeries, gradients, gradients_along
from surgery.evidence.overlap import Overlap, Profile, overlap, profile

__all__ = [
    "Changes",
    "Directions",
    "GradientSeries",
    "Gradients",
    "Overlap",
    "Profile",
    "changes",
    "directions",
    "gradients",
    "gradients_along",
    "overlap",
    "profile",
]
