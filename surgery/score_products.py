"""How A, M and C make one score, and what a unit is worth where kinds of unit share a budget of parameters."""

from __future__ import annotations

import torch

from surgery.neurons import Neurons
from surgery.trajectory import Trajectory
from surgery.units import Units, kind_of


def product(found: dict[str, Neurons], letters: str, joint: bool) -> Neurons:
    """The product of some letters, or one alone: A and M divided by their layer's mean, C as it is.

    Where kinds share a budget C is divided by the mean of its kind: a cosine of long vectors is smaller than one of
    short vectors, whatever the units did.
    """
    level = {letter: score.relative() for letter, score in found.items() if letter != "C"}
    if "C" in found:
        level["C"] = _by_kind(found["C"]) if joint else found["C"]
    made, *others = (level[letter] for letter in "AMC" if letter in letters)
    for factor in others:
        made = made * factor
    return made


def _by_kind(scores: Neurons) -> Neurons:
    """Each score divided by the mean over all units of its kind in the model; zeros stay zeros."""
    held: dict[str, list[torch.Tensor]] = {}
    for name, value in scores.items():
        held.setdefault(kind_of(name), []).append(value.double())
    means = {kind: float(torch.cat(values).mean()) or 1.0 for kind, values in held.items()}
    return Neurons({n: value.double() / means[kind_of(n)] for n, value in scores.items()}, made_by=scores.made_by)


def costs_of(run: Trajectory, units: Units) -> dict[str, int] | None:
    """What ``allocate`` needs as ``costs``: parameters per unit where kinds share the budget, None with one kind."""
    (later,) = run.weights("later", units=units)
    return later.layout.costs


def worth(scores: Neurons, costs: dict[str, int] | None) -> Neurons:
    """What each unit is worth as a whole, from what one parameter of it is worth; the same with one kind of unit."""
    return (
        scores
        if costs is None
        else scores * Neurons({n: torch.full((s,), float(costs[n])) for n, s in scores.sizes.items()})
    )
