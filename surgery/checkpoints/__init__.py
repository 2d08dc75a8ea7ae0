"""Checkpoints as mappings of tensors, opened once, and the trajectory of checkpoints in training order."""

from surgery.checkpoints.checkpoint import Checkpoint
from surgery.checkpoints.trajectory import Trajectory

__all__ = ["Checkpoint", "Trajectory"]
