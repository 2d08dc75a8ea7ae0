"""What selectors have in common: which settings they take, what they are called, and what a mask says of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, TypeVar

from surgery.checkpoints.opening import Weights, fingerprint
from surgery.checkpoints.trajectory import Trajectory
from surgery.layout.attention import NoAttention
from surgery.live.losses import Divergence, Loss
from surgery.live.prompts import Batch
from surgery.masks.mask import Mask
from surgery.reverting.provenance import path_in, versions
from surgery.units import FINEST, Units, kinds_of, noun, owners_of, single

Data = Iterable[Batch]
Chosen = TypeVar("Chosen", bound=Mask)


def check_letters(name: str, letters: str) -> None:
    """Raise ``ValueError`` unless letters are some of A, M and C."""
    if not letters or set(letters) - set("AMC") or len(set(letters)) != len(letters):
        raise ValueError(f'{name}={letters!r}: expected some of the letters A, M and C, each once, like "AMC"')


def check_how(how: Any) -> None:
    """Raise ``ValueError`` unless an allocation is known."""
    if how not in ("proportional", "global", "uniform"):
        raise ValueError(f'how={how!r}: expected "proportional", "global" or "uniform"')


def check_units(units: Units | None) -> None:
    """Raise ``ValueError`` unless ``units`` are kinds of unit, or single weights (of some)."""
    kinds_of(owners_of(units) or "mlp")


def units_asked(run: Trajectory, units: Units | None) -> tuple[str, ...]:
    """The kinds of unit that a selector with those ``units`` chooses among, or among whose weights.

    ``units=None`` means neurons and value channels, "weight" alone the weights of neurons and KV groups, or either the
    units of the trajectory's own layout. If a model's attention is not found for certain, they mean the neurons, with a
    warning that says why.
    """
    if units is None:
        return _found(run, FINEST, "value channels can't be chosen, and the budget counts neurons alone", '"mlp"')
    if not single(units) or owners_of(units) is not None:
        return run.kinds(owners_of(units) or units)
    told = "weights of attention are no candidates, and the budget counts those of the MLPs alone"
    return _found(run, ("mlp", "kv_group"), told, '("mlp", "weight")')


def _found(run: Trajectory, wanted: tuple[str, ...], told: str, instead: str) -> tuple[str, ...]:
    """Those kinds, or the MLPs' alone where the others are not found for certain."""
    if run.layout is not None:
        return run.kinds("mlp")
    try:
        run.weights("later", units=wanted)
    except NoAttention as reason:
        warnings.warn(f"{told}: {reason}. Pass units={instead} to choose that yourself", stacklevel=5)
        return ("mlp",)
    return wanted


def named(name: str, units: Units | None) -> str:
    """A selector's name, with its units where they are not MLP neurons, or the weights of all."""
    units = FINEST if units is None else units
    kinds, plain = owners_of(units), None if single(units) else ("mlp",)
    name = f"{name} of single weights" if single(units) else name
    return name if kinds == plain else f"{name} of {noun(kinds_of(kinds or ()))}"


def damage_named(loss: Loss | Divergence) -> str:
    """What D is called, by its loss."""
    if callable(loss):
        return "D (own loss)"
    return "D" if loss == "hellinger" else "D (KL)"


def letters_named(rank: str, allocate: str) -> str:
    """What a score of letters is called, and the one that splits the budget where it is another."""
    own = "×".join(rank)
    return own if rank == allocate else f"rank {own}, budgets {'×'.join(allocate)}"


def signed(mask: Chosen, selector: Any, run: Trajectory, units: Units) -> Chosen:
    """The mask with a record of the selector that made it."""
    return mask.signed(record(selector, run, units))


def record(selector: Any, run: Trajectory, units: Units) -> dict[str, Any]:
    """What a mask's ``made_by`` says of the selector that made it, of the checkpoints and of the versions."""
    settings = {f.name: getattr(selector, f.name) for f in fields(selector)}
    told: dict[str, Any] = {name: value for name, value in settings.items() if isinstance(value, str | int | float)}
    told |= {name: list(value) for name, value in settings.items() if isinstance(value, tuple)}
    if getattr(selector, "protect", None):
        told["protect"] = sorted(selector.protect)
    elif "protect" in settings:
        told.pop("weight", None)  # of what is protected, and nothing is
    names = [name for name in ("base", "earlier", "later") if getattr(run, name) is not None]
    *opened, later = run.weights(*names, "later", units=units)
    return {
        "units": list(later.layout.units),
        **({"not_covered": list(later.layout.notes)} if later.layout.notes else {}),
        "selector": {"class": type(selector).__name__, **told},
        "checkpoints": {name: _told(weights) for name, weights in zip(names, opened, strict=True)},
        "versions": versions(),
    }


def _told(weights: Weights) -> dict[str, Any]:
    path = path_in(weights)
    return fingerprint(weights) | ({} if path is None else {"path": path})
