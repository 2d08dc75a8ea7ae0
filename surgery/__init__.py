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
    from surgery.evaluators import harness, likelihood
    from surgery.evidence_changes import Changes, changes
    from surgery.evidence_directions import Directions, directions
    from surgery.evidence_overlap import Overlap, overlap
    from surgery.evidence_profile import Profile, profile
    from surgery.gradient_callback import GradientCosines
    from surgery.gradient_cosines import Gradients, GradientSeries, gradients, gradients_along
    from surgery.histories import History, history
    from surgery.layout import find_layout
    from surgery.neurons import Neurons
    from surgery.operators import Rollback, RolledBack, rollback, rolled_back
    from surgery.predictions import Distillation, distillation
    from surgery.probing import probe
    from surgery.prompts import load_prompts
    from surgery.refresh_masked import Masked
    from surgery.refresh_report import Refresh
    from surgery.refreshing import refresh
    from surgery.report_inquiry import Inquiry, analyse
    from surgery.report_sections import write_report
    from surgery.resampling import Agreement, Stability, jaccard, stability
    from surgery.responses import respond
    from surgery.rows import Row, Sweep
    from surgery.saving import save
    from surgery.scores import activation, conflict, magnitude
    from surgery.selection import AMCSelector, DamageSelector, RandomSelector, Selector
    from surgery.significance import Paired
    from surgery.slots import Block, Layout, Slot
    from surgery.strength_search import strengths
    from surgery.swap import earlier_model
    from surgery.sweeps import sweep
    from surgery.theory import curvature, fisher
    from surgery.theory_contraction import Contraction, Neighbour, contraction
    from surgery.theory_damage import (
        CurvatureBounds,
        DamageSplit,
        DamageTerms,
        curvature_bounds,
        damage_split,
        damage_terms,
    )
    from surgery.theory_landscape import Landscape
    from surgery.theory_spectrum import DamageSpectrum, damage_spectrum
    from surgery.theory_subspaces import Span, eigenspace
    from surgery.trajectory import Trajectory
    from surgery.tuning import Repair, repair

_HOME = {
    "attribution": ("damage", "reversal_cost"),
    "budget": ("allocate", "top"),
    "checkpoint": ("Checkpoint",),
    "entries": ("Entries",),
    "evaluators": ("harness", "likelihood"),
    "evidence_changes": ("Changes", "changes"),
    "evidence_directions": ("Directions", "directions"),
    "evidence_overlap": ("Overlap", "overlap"),
    "evidence_profile": ("Profile", "profile"),
    "gradient_callback": ("GradientCosines",),
    "gradient_cosines": ("GradientSeries", "Gradients", "gradients", "gradients_along"),
    "histories": ("History", "history"),
    "layout": ("find_layout",),
    "neurons": ("Neurons",),
    "operators": ("Rollback", "RolledBack", "rollback", "rolled_back"),
    "predictions": ("Distillation", "distillation"),
    "probing": ("probe",),
    "prompts": ("load_prompts",),
    "refresh_masked": ("Masked",),
    "refresh_report": ("Refresh",),
    "refreshing": ("refresh",),
    "report_inquiry": ("Inquiry", "analyse"),
    "report_sections": ("write_report",),
    "resampling": ("Agreement", "Stability", "jaccard", "stability"),
    "responses": ("respond",),
    "rows": ("Row", "Sweep"),
    "saving": ("save",),
    "scores": ("activation", "conflict", "magnitude"),
    "selection": ("AMCSelector", "DamageSelector", "RandomSelector", "Selector"),
    "significance": ("Paired",),
    "slots": ("Block", "Layout", "Slot"),
    "strength_search": ("strengths",),
    "swap": ("earlier_model",),
    "sweeps": ("sweep",),
    "theory": ("curvature", "fisher"),
    "theory_contraction": ("Contraction", "Neighbour", "contraction"),
    "theory_damage": (
        "CurvatureBounds",
        "DamageSplit",
        "DamageTerms",
        "curvature_bounds",
        "damage_split",
        "damage_terms",
    ),
    "theory_landscape": ("Landscape",),
    "theory_spectrum": ("DamageSpectrum", "damage_spectrum"),
    "theory_subspaces": ("Span", "eigenspace"),
    "trajectory": ("Trajectory",),
    "tuning": ("Repair", "repair"),
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
    "Repair",
    "Rollback",
    "RolledBack",
    "Row",
    "Selector",
    "Slot",
    "Span",
    "Stability",
    "Sweep",
    "Trajectory",
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
    "refresh",
    "repair",
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
