"""surgery: ``git revert`` for LLM post-training.

Finds the few neurons through which a later training stage hurt an earlier skill and puts exactly those back:
bit for bit, reversibly, on a live model or from folder to folder.
"""

from surgery.budget import allocate, top
from surgery.checkpoint import Checkpoint, save
from surgery.layout import find_layout, probe
from surgery.neurons import Neurons
from surgery.operators import Rollback, RolledBack, rollback, rolled_back
from surgery.prompts import load_prompts
from surgery.scores import activation, conflict, magnitude
from surgery.selection import AMCSelector, RandomSelector, Selector
from surgery.slots import Block, Layout, Slot
from surgery.sweeps import Row, Sweep, sweep
from surgery.trajectory import Trajectory

__all__ = [
    "AMCSelector",
    "Block",
    "Checkpoint",
    "Layout",
    "Neurons",
    "RandomSelector",
    "Rollback",
    "RolledBack",
    "Row",
    "Selector",
    "Slot",
    "Sweep",
    "Trajectory",
    "activation",
    "allocate",
    "conflict",
    "find_layout",
    "load_prompts",
    "magnitude",
    "probe",
    "rollback",
    "rolled_back",
    "save",
    "sweep",
    "top",
]
