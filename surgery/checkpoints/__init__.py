"""Checkpoints as mappings of tensors, opened once, and the trajectory that they make up."""

from surgery.checkpoints.checkpoint import Checkpoint
from surgery.checkpoints.trajectory import Trajectory

__all__ = ["Checkpoint", "Trajectory"]
