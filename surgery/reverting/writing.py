"""Writing into live weights: what may be written, and how far back it goes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgery.checkpoints.opening import Weights
from surgery.formats.patches import bits
from surgery.layout.boxes import Lying
from surgery.layout.sharding import Ranks, local
from surgery.layout.slots import Layout
from surgery.masks.edits import Edit, Held
from surgery.masks.mask import Mask
from surgery.masks.neurons import Neurons


def numbers(scalars: list[Tensor]) -> list[int]:
    """The values of scalars, read with one wait per device."""
    found: dict[int, int] = {}
    for device in {scalar.device for scalar in scalars}:
        here = [at for at, scalar in enumerate(scalars) if scalar.device == device]
        found |= dict(zip(here, torch.stack([scalars[at] for at in here]).tolist(), strict=True))
    return [found[at] for at in range(len(scalars))]


def check_writable(live: Weights, edits: list[Edit]) -> None:
    """Refuse weights that are offloaded, or share their storage with others (``ValueError``)."""
    names = {edit.slot.tensor for edit in edits}
    owners: dict[tuple[torch.device, int], set[str]] = {}
    held = {name: local(tensor) for name, tensor in live.tensors.items()}
    for name, tensor in held.items():
        if tensor.device.type != "meta" and tensor.numel():
            owners.setdefault((tensor.device, tensor.untyped_storage().data_ptr()), set()).add(name)
    for name in names:
        tensor = held[name]
        if tensor.device.type == "meta":
            raise ValueError(
                f"{name} is on the meta device: its weights are offloaded, and an edit would be lost. Load the model "
                f"whole, or roll the folder back with rolled_back() and save()"
            )
        ours, storage = name, owners.get((tensor.device, tensor.untyped_storage().data_ptr()), {name})
        if shared := sorted(other for other in storage - {ours} if _overlap(held[other], tensor)):
            raise ValueError(f"{name} shares its memory with {shared[0]!r}: writing the one would change the other too")


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the address ranges of two tensors of one storage meet."""
    low_a, low_b = a.data_ptr(), b.data_ptr()
    return low_a < low_b + _span(b) and low_b < low_a + _span(a)


def _span(tensor: Tensor) -> int:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size() if tensor.numel() else 0


def agreed_on(ranks: Ranks, changed: int) -> int:
    """How many numbers changed on all processes together, once each has written its part."""
    total, failed = ranks.sum(torch.tensor([changed, 0])).tolist()
    if failed:
        raise ValueError(
            f"{failed} of the processes that hold the model could not write their part (each says why), and so the "
            f"others have put back theirs"
        )
    return int(total)


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
    return blended(edit, edit.read(source), old, strength)


def blended(edit: Edit, found: Tensor, old: Tensor, strength: Strength) -> Tensor:
    """The same, where the source's rows are at hand."""
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


def write(tensor: Lying, edit: Edit, rows: Tensor) -> None:
    """Write an edit's numbers into a live tensor, in place."""
    with torch.no_grad():
        edit.put(tensor, rows)


def by_index(
    live: Weights, source: Weights, edits: list[Edit], strength: Strength, keep_on: Any, old: list[Any], pending: Any
) -> tuple[int, Edit | None]:
    """Write edit by edit, and note in ``old`` what was there: how many numbers changed, and an edit that has a NaN."""
    finite: list[Tensor] = []  # read at the end: a GPU is waited for once, not once an edit
    changed, ranks = list[Tensor](), live.ranks
    for edit in edits:
        tensor = live.tensors[edit.slot.tensor]
        before = edit.take(tensor)
        after = new_values(edit, source, before, strength)
        finite.append(after.isfinite().all())
        changed.append((bits(before) != bits(after)).sum() * ranks.counts(tensor))
        old.append((edit, before.to(keep_on) if keep_on else before))
        write(tensor, edit, after)
        if pending:
            raise KeyboardInterrupt
    wild = (edit for edit, fine in zip(edits, numbers(finite), strict=True) if not fine)
    return sum(numbers(changed)), next(wild, None)
