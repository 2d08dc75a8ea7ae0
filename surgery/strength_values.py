"""How far back a rollback goes: one strength for all that it reverts, or one for each neuron."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgery.edits import Edit, Held
from surgery.masks import Mask
from surgery.neurons import Neurons
from surgery.slots import Layout

Strength = float | Neurons
MOST = 3.0  # the furthest: three times the way from the later values to the earlier ones


def check_strength(strength: Strength, layout: Layout) -> None:
    """Raise ``ValueError`` unless it is a number in [0, MOST], or such a number for every neuron of a layout."""
    if isinstance(strength, Neurons):
        if strength.is_mask:
            raise ValueError("strength= holds a mask: expected a number, or scores that say how far each neuron goes")
        strength.require(layout.sizes, "the model")
        wrong = [float(value.min()) for value in strength.values() if len(value) and value.min() < 0]
        wrong += [float(value.max()) for value in strength.values() if len(value) and value.max() > MOST]
        if wrong:
            raise ValueError(f"strength= holds {wrong[0]:g}: expected numbers in [0, {MOST:g}]")
    elif isinstance(strength, bool) or not (isinstance(strength, int | float) and 0 <= strength <= MOST):
        raise ValueError(
            f"strength={strength!r}: expected a number in [0, {MOST:g}] (1 copies the earlier bits), or Neurons of them"
        )


def new_values(edit: Edit, source: Held, old: Tensor, strength: Strength) -> Tensor:
    """What the numbers become, in ``old``'s dtype and on its device.

    Strength 1 copies the source's bits and 0 leaves the old ones, also where it is that of some neurons only.
    """
    found = edit.read(source)
    there = found.to(old.device, old.dtype)
    if not isinstance(strength, Neurons) and strength in (0, 1):
        return there if strength else old
    wide = torch.promote_types(old.dtype, torch.float32)
    each = torch.tensor(strength, dtype=wide) if not isinstance(strength, Neurons) else _each(edit, strength, old)
    each = each.to(old.device, wide)
    blend = old.to(wide).lerp(found.to(old.device, wide), each).to(old.dtype)
    return torch.where(each == 1, there, torch.where(each == 0, old, blend))


def _each(edit: Edit, strength: Neurons, rows: Tensor) -> Tensor:
    """The strength of each row, shaped so that it goes with ``rows``."""
    return strength[edit.block.name][edit.neurons].reshape(-1, *[1] * (rows.ndim - 1))


def applied(strength: Strength, mask: Mask) -> Tensor:
    """The strength of every neuron (or weight) that a mask selects, in its order: float32 ``[selected]``."""
    if not isinstance(strength, Neurons):
        return torch.full((sum(mask.count().values()),), float(strength))
    return mask.strengths(strength)


def recorded(strength: Strength, mask: Mask) -> Any:
    """A strength as JSON: the number, or of those that a mask uses least, mean and most, how many exceed 1 or are 0."""
    if not isinstance(strength, Neurons):
        return float(strength)
    used = applied(strength, mask)
    if not len(used):
        return {"least": 0.0, "mean": 0.0, "most": 0.0, "beyond": 0, "unmoved": 0}
    low, mean, high = float(used.min()), float(used.double().mean()), float(used.max())
    counts = {"beyond": int((used > 1).sum()), "unmoved": int((used == 0).sum())}
    return {"least": low, "mean": mean, "most": high, **counts}


def spoken(strength: Any) -> str:
    """What ``recorded`` gave, in words."""
    if not isinstance(strength, dict):
        return f"strength {strength}" + (", past the earlier values" if strength > 1 else "")
    past = f", {strength['beyond']} of them past the earlier values" if strength["beyond"] else ""
    past += f", {strength['unmoved']} of them 0, which stay as they are" if strength["unmoved"] else ""
    return f"strengths from {strength['least']:.3g} to {strength['most']:.3g}, {strength['mean']:.3g} on average{past}"
