"""The paper's local perturbation theory, measured: curvature, damage terms, subspaces, contraction."""

from surgery.theory.contraction import Contraction, Neighbour, contraction
from surgery.theory.damage import (
    CurvatureBounds,
    DamageSpectrum,
    DamageSplit,
    DamageTerms,
    curvature_bounds,
    damage_spectrum,
    damage_split,
    damage_terms,
)
from surgery.theory.landscape import Landscape, Span, eigenspace
from surgery.theory.vectors import curvature, fisher

__all__ = [
    "Contraction",
    "CurvatureBounds",
    "DamageSpectrum",
    "DamageSplit",
    "DamageTerms",
    "Landscape",
    "Neighbour",
    "Span",
    "contraction",
    "curvature",
    "curvature_bounds",
    "damage_spectrum",
    "damage_split",
    "damage_terms",
    "eigenspace",
    "fisher",
]
