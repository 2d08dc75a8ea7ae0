"""surgery: ``git revert`` for LLM post-training.

Finds the few neurons through which a later training stage hurt an earlier skill and puts exactly those back:
bit for bit, reversibly, on a live model or from folder to folder.

Names are imported when they are first used, so that ``surgery --help`` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.attribution import damage, reversal_cost
    from surgery.budget import allocate, top
    from surgery.checkpoint import Checkpoint
    from surgery.entries import Entries
    from surgery.evaluators import harness
    from surgery.layout import find_layout
    from surgery.masking import Masked
    from surgery.neurons import Neurons
    from surgery.operators import Rollback, RolledBack, rollback, rolled_back
    from surgery.predictions import Distillation, distillation
    from surgery.probing import probe
    from surgery.prompts import load_prompts
    from surgery.refreshing import refresh
    from surgery.resampling import Agreement, Stability, jaccard, stability
    from surgery.responses import respond
    from surgery.rows import Row, Sweep
    from surgery.saving import save
    from surgery.scores import activation, conflict, magnitude
    from surgery.selection import AMCSelector, DamageSelector, RandomSelector, Selector
    from surgery.significance import Paired
    from surgery.singles import EntrySelector
    from surgery.slots import Block, Layout, Slot
    from surgery.steps import Refresh
    from surgery.swap import earlier_model
    from surgery.sweeps import sweep
    from surgery.trajectory import Trajectory
    from surgery.tuning import Tuning, recommend

_HOME = {
    "attribution": ("damage", "reversal_cost"),
    "budget": ("allocate", "top"),
    "checkpoint": ("Checkpoint",),
    "entries": ("Entries",),
    "evaluators": ("harness",),
    "layout": ("find_layout",),
    "masking": ("Masked",),
    "neurons": ("Neurons",),
    "operators": ("Rollback", "RolledBack", "rollback", "rolled_back"),
    "predictions": ("Distillation", "distillation"),
    "probing": ("probe",),
    "prompts": ("load_prompts",),
    "refreshing": ("refresh",),
    "resampling": ("Agreement", "Stability", "jaccard", "stability"),
    "responses": ("respond",),
    "rows": ("Row", "Sweep"),
    "saving": ("save",),
    "scores": ("activation", "conflict", "magnitude"),
    "selection": ("AMCSelector", "DamageSelector", "RandomSelector", "Selector"),
    "significance": ("Paired",),
    "singles": ("EntrySelector",),
    "slots": ("Block", "Layout", "Slot"),
    "steps": ("Refresh",),
    "swap": ("earlier_model",),
    "sweeps": ("sweep",),
    "trajectory": ("Trajectory",),
    "tuning": ("Tuning", "recommend"),
}

__all__ = [
    "AMCSelector",
    "Agreement",
    "Block",
    "Checkpoint",
    "DamageSelector",
    "Distillation",
    "Entries",
    "EntrySelector",
    "Layout",
    "Masked",
    "Neurons",
    "Paired",
    "RandomSelector",
    "Refresh",
    "Rollback",
    "RolledBack",
    "Row",
    "Selector",
    "Slot",
    "Stability",
    "Sweep",
    "Trajectory",
    "Tuning",
    "activation",
    "allocate",
    "conflict",
    "damage",
    "distillation",
    "earlier_model",
    "find_layout",
    "harness",
    "jaccard",
    "load_prompts",
    "magnitude",
    "probe",
    "recommend",
    "refresh",
    "respond",
    "reversal_cost",
    "rollback",
    "rolled_back",
    "save",
    "stability",
    "sweep",
    "top",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"surgery.{module}"), name)
    raise AttributeError(f"module 'surgery' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
