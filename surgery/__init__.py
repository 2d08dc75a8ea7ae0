"""surgery: ``git revert`` for LLM post-training.

Finds the few neurons through which a later training stage hurt an earlier skill and puts exactly those back:
bit for bit, reversibly, on a live model or from folder to folder.

Names are imported when they are first used, so that ``surgery --help`` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.alignment import Directions, directions
    from surgery.analysis import Overlap, overlap
    from surgery.attribution import damage, reversal_cost
    from surgery.budget import allocate, top
    from surgery.callbacks import GradientCosines
    from surgery.checkpoint import Checkpoint
    from surgery.contracting import Contraction, Neighbour, contraction
    from surgery.drift import Changes, changes
    from surgery.entries import Entries
    from surgery.evaluators import harness, likelihood
    from surgery.geometry import Gradients, GradientSeries, gradients, gradients_along
    from surgery.histories import History, history
    from surgery.inquiry import Inquiry, analyse
    from surgery.landscape import Landscape
    from surgery.layout import find_layout
    from surgery.masking import Masked
    from surgery.neurons import Neurons
    from surgery.operators import Rollback, RolledBack, rollback, rolled_back
    from surgery.optimum import strengths
    from surgery.perturbation import (
        CurvatureBounds,
        DamageSplit,
        DamageTerms,
        curvature_bounds,
        damage_split,
        damage_terms,
    )
    from surgery.predictions import Distillation, distillation
    from surgery.probing import probe
    from surgery.prompts import load_prompts
    from surgery.refreshing import refresh
    from surgery.resampling import Agreement, Stability, jaccard, stability
    from surgery.responses import respond
    from surgery.rows import Row, Sweep
    from surgery.saving import save
    from surgery.scores import activation, conflict, magnitude
    from surgery.sections import write_report
    from surgery.selection import AMCSelector, DamageSelector, RandomSelector, Selector
    from surgery.shares import Profile, profile
    from surgery.significance import Paired
    from surgery.singles import EntrySelector
    from surgery.slots import Block, Layout, Slot
    from surgery.spectrum import DamageSpectrum, damage_spectrum
    from surgery.steps import Refresh
    from surgery.subspaces import Span, eigenspace
    from surgery.swap import earlier_model
    from surgery.sweeps import sweep
    from surgery.theory import curvature, fisher
    from surgery.trajectory import Trajectory
    from surgery.tuning import Tuning, recommend

_HOME = {
    "alignment": ("Directions", "directions"),
    "analysis": ("Overlap", "overlap"),
    "attribution": ("damage", "reversal_cost"),
    "budget": ("allocate", "top"),
    "callbacks": ("GradientCosines",),
    "checkpoint": ("Checkpoint",),
    "contracting": ("Contraction", "Neighbour", "contraction"),
    "drift": ("Changes", "changes"),
    "entries": ("Entries",),
    "evaluators": ("harness", "likelihood"),
    "geometry": ("GradientSeries", "Gradients", "gradients", "gradients_along"),
    "histories": ("History", "history"),
    "inquiry": ("Inquiry", "analyse"),
    "landscape": ("Landscape",),
    "layout": ("find_layout",),
    "masking": ("Masked",),
    "neurons": ("Neurons",),
    "operators": ("Rollback", "RolledBack", "rollback", "rolled_back"),
    "optimum": ("strengths",),
    "perturbation": (
        "CurvatureBounds",
        "DamageSplit",
        "DamageTerms",
        "curvature_bounds",
        "damage_split",
        "damage_terms",
    ),
    "predictions": ("Distillation", "distillation"),
    "probing": ("probe",),
    "prompts": ("load_prompts",),
    "refreshing": ("refresh",),
    "resampling": ("Agreement", "Stability", "jaccard", "stability"),
    "responses": ("respond",),
    "rows": ("Row", "Sweep"),
    "saving": ("save",),
    "scores": ("activation", "conflict", "magnitude"),
    "sections": ("write_report",),
    "selection": ("AMCSelector", "DamageSelector", "RandomSelector", "Selector"),
    "shares": ("Profile", "profile"),
    "significance": ("Paired",),
    "singles": ("EntrySelector",),
    "slots": ("Block", "Layout", "Slot"),
    "spectrum": ("DamageSpectrum", "damage_spectrum"),
    "steps": ("Refresh",),
    "subspaces": ("Span", "eigenspace"),
    "swap": ("earlier_model",),
    "sweeps": ("sweep",),
    "theory": ("curvature", "fisher"),
    "trajectory": ("Trajectory",),
    "tuning": ("Tuning", "recommend"),
}

__all__ = [
    "AMCSelector",
    "Agreement",
    "Block",
    "Changes",
    "Checkpoint",
    "Contraction",
    "CurvatureBounds",
    "DamageSelector",
    "DamageSpectrum",
    "DamageSplit",
    "DamageTerms",
    "Directions",
    "Distillation",
    "Entries",
    "EntrySelector",
    "GradientCosines",
    "GradientSeries",
    "Gradients",
    "History",
    "Inquiry",
    "Landscape",
    "Layout",
    "Masked",
    "Neighbour",
    "Neurons",
    "Overlap",
    "Paired",
    "Profile",
    "RandomSelector",
    "Refresh",
    "Rollback",
    "RolledBack",
    "Row",
    "Selector",
    "Slot",
    "Span",
    "Stability",
    "Sweep",
    "Trajectory",
    "Tuning",
    "activation",
    "allocate",
    "analyse",
    "changes",
    "conflict",
    "contraction",
    "curvature",
    "curvature_bounds",
    "damage",
    "damage_spectrum",
    "damage_split",
    "damage_terms",
    "directions",
    "distillation",
    "earlier_model",
    "eigenspace",
    "find_layout",
    "fisher",
    "gradients",
    "gradients_along",
    "harness",
    "history",
    "jaccard",
    "likelihood",
    "load_prompts",
    "magnitude",
    "overlap",
    "probe",
    "profile",
    "recommend",
    "refresh",
    "respond",
    "reversal_cost",
    "rollback",
    "rolled_back",
    "save",
    "stability",
    "strengths",
    "sweep",
    "top",
    "write_report",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"surgery.{module}"), name)
    raise AttributeError(f"module 'surgery' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
