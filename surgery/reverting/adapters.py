"""A rolled-back adapter as an adapter: zeroed rows of B and columns of A, beside those of the earlier adapter."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from surgery.checkpoints.checkpoint import Checkpoint
from surgery.checkpoints.opening import Weights, fingerprint
from surgery.formats.adapters import INNER, PREFIX, WEIGHTS, Adapter, targeted
from surgery.formats.factors import Factors
from surgery.formats.folders import ADAPTER, MERGE
from surgery.layout.finding import find_layout
from surgery.masks.edits import Edit, Rows
from surgery.masks.mask import Mask
from surgery.masks.neurons import Neurons
from surgery.reverting.writing import Strength, new_values
from surgery.tables import json_text

MERGE_LIVE = "call model.merge_adapter() and roll the merged model back, or save the adapter and roll its folder back"


def adapter_files(later: Weights, source: Weights, mask: Mask, strength: Strength) -> dict[str, bytes]:
    """File name → content of the adapter that a rolled-back adapter is.

    Where the earlier checkpoint is the base, row i of B (an output of the layer) or column i of A (an input) becomes
    zero. Where it is another adapter, the rank grows by its own: A = [A2; A1], B = [B2 with zeros | B1 on those rows
    only], or the same of the columns.

    Raises:
        ValueError: the result is no adapter: single weights; an earlier checkpoint that is neither the base nor another
            adapter of it; the columns of a layer under DoRA; a tensor that only the earlier adapter holds whole.
    """
    return _Writing(later, source, mask, strength).files()


def check_room(later: Weights, source: Weights) -> None:
    """Raise ``ValueError`` unless an adapter can hold the rollback of any units, told before they are chosen."""
    everything = {name: torch.ones(size, dtype=torch.bool) for name, size in later.layout.sizes.items()}
    adapter_files(later, source, Neurons(everything), 1.0)


def single_weights(adapter: object) -> ValueError:
    """Why single weights can't be set back in an adapter."""
    return ValueError(
        f"a mask of single weights can't be rolled back in the adapter {adapter}, since a product of low rank has "
        f"none: choose units (--units mlp,value_channel), or {MERGE}"
    )


@dataclass
class _Writing:
    later: Weights
    source: Weights
    mask: Mask
    strength: Strength

    def __post_init__(self) -> None:
        found = self.later.tensors
        adapter = found.adapter if isinstance(found, Checkpoint) else found
        assert isinstance(adapter, Adapter)
        self.adapter: Adapter = adapter
        self.other = self._other(adapter.base)
        self.config = dict(self.adapter.config)
        self.held = {key: self.adapter.held[key] for key in self.adapter.held}
        self.factors = dict(self.adapter.factors)

    def _other(self, base: Mapping[str, Tensor]) -> Adapter | None:
        """The earlier adapter; None where the earlier checkpoint is the base itself."""
        to = self.source.tensors
        if isinstance(to, Checkpoint) and isinstance(base, Checkpoint):
            if _same(self.source, to, base):
                return None
            if to.adapter is not None and to.base is not None and _same(self.source, to.base, base):
                return to.adapter
        if self._as_in(base):
            return None
        if not isinstance(base, Checkpoint):
            raise ValueError(
                f"{self.source.name} is not the base of {self.later.name}, and its numbers would raise the rank of the "
                f"adapter, which is fixed in a live model and its optimizer: {MERGE_LIVE}"
            )
        raise ValueError(
            f"{self.source.name} is neither the base of the adapter {self.later.name} nor another adapter of it, so "
            f"the difference has no low rank: pass {base.folder} to go back to the base, or {MERGE}"
        )

    def _as_in(self, base: Mapping[str, Tensor]) -> bool:
        """Whether what is reverted has in the earlier checkpoint, however that is stored, the bits of the base.

        What the adapter holds whole does not matter: the earlier checkpoint's own numbers are written there.
        """
        whole = {name for parameter in self.adapter.replaced for name in self.adapter.names(parameter)}
        for edit in self.mask.edits(self.later.layout, self.later.name):
            if edit.slot.tensor in whole:
                continue
            there = edit.take(base[edit.slot.tensor])
            if not torch.equal(there, new_values(edit, self.source, there, 1.0)):
                return False
        return True

    def files(self) -> dict[str, bytes]:
        from safetensors.torch import save

        edited = self._edits()
        for parameter, edits in edited.items():
            self._revert(parameter, edits)
        self._check_finite(edited)
        if any(factors.rank != self._rank(parameter) for parameter, factors in self.factors.items()):
            self._configure()
        for parameter, factors in self.factors.items():
            self._put(parameter, factors)
        tensors = {key: one.contiguous() for key, one in sorted(self.held.items())}
        found = {WEIGHTS: save(tensors, {"format": "pt"})}
        if self.config != self.adapter.config:
            found[ADAPTER] = json_text(self.config, 2).encode() + b"\n"
        return found

    def _check_finite(self, edited: Iterable[str]) -> None:
        """Refuse factors of which no number can be taken out: zero times infinity is no zero."""
        for parameter in edited:
            factors, (key, _) = self.factors.get(parameter), self.adapter.biases.get(parameter, ("", 0.0))
            held = [factors.a, factors.b] if factors else [self.held[key]] if key else []
            if not all(bool(one.isfinite().all()) for one in held):
                raise ValueError(
                    f"what {self.later.name} adds to {parameter!r} holds NaN or infinite numbers, and zero times those "
                    f"is no zero: {MERGE}"
                )

    def _edits(self) -> dict[str, list[Edit]]:
        """What is reverted of each parameter that one of the adapters changes."""
        changed = self.adapter.changed | (self.other.changed if self.other else set())
        on_disk: dict[str, list[Edit]] = {}
        for edit in self.mask.edits(self.later.layout, self.later.name):
            if not isinstance(edit, Rows):
                raise single_weights(self.later.name)
            on_disk.setdefault(edit.slot.tensor, []).append(edit)
        found = {one: on_disk[one] for one in changed if one in on_disk}
        others = {one for one in changed - found.keys() if on_disk.keys() & set(self.adapter.names(one))}
        if others and self.adapter.model is not None:  # experts lie one by one on disk, and together in memory
            layout = find_layout(self.adapter.model, units=self.later.layout.units)
            for edit in self.mask.edits(layout, self.later.name):
                if edit.slot.tensor in others:
                    found.setdefault(edit.slot.tensor, []).append(edit)
        return found

    def _revert(self, parameter: str, edits: list[Edit]) -> None:
        adapter, other = self.adapter, self.other
        if parameter in adapter.replaced:
            self._patch(adapter.replaced[parameter], edits)
        elif other is not None and parameter in other.replaced:
            raise self._whole(parameter)
        elif parameter in adapter.factors or (other is not None and parameter in other.factors):
            self._scale(parameter, edits)
        elif parameter in adapter.biases:
            key, scale = adapter.biases[parameter]
            marks = self._marks(edits)
            kept = self.held[key] * (1 - marks)
            if other is not None and parameter in other.biases:
                theirs, its = other.biases[parameter]
                kept = kept + other.held[theirs] * marks * (its / scale)
            self.held[key] = kept.to(self.held[key].dtype)
        else:
            raise self._whole(parameter)

    def _whole(self, parameter: str) -> ValueError:
        return ValueError(
            f"{self.source.name} holds {parameter!r} whole, and {self.later.name} does not, so what is reverted there "
            f"has no low rank: {MERGE}"
        )

    def _patch(self, key: str, edits: list[Edit]) -> None:
        """Write the earlier numbers into a tensor that the adapter holds whole."""
        there = {edit.slot.tensor: self.later.tensors[self.adapter.names(edit.slot.tensor)[0]].dtype for edit in edits}
        dtype = next(iter(there.values()))
        tensor = self.held[key].to(torch.promote_types(self.held[key].dtype, dtype), copy=True)
        for edit in edits:
            edit.put(tensor, new_values(edit, self.source, edit.take(tensor).to(dtype), self.strength).to(tensor.dtype))
        self.held[key] = tensor

    def _marks(self, edits: list[Edit]) -> Tensor:
        """How far each row or column of a parameter goes back, in its shape with the other axis cut to 1."""
        found: list[Tensor] = []
        for edit in edits:
            one, size = self.strength, len(edit.neurons)
            values = one[edit.block.name][edit.neurons] if isinstance(one, Neurons) else torch.full((size,), float(one))
            found.append(edit.slot.marked(edit.neurons - edit.slot.start, values))
        return torch.stack(found).sum(0)

    def _scale(self, parameter: str, edits: list[Edit]) -> None:
        """Take the reverted part out of B or A, and put the earlier adapter's beside it."""
        ours = self.adapter.factors.get(parameter)
        theirs = None if self.other is None else self.other.factors.get(parameter)
        marks = self._marks(edits)
        shape = (ours or theirs).shape  # type: ignore[union-attr]
        rows = marks.shape[-1] == 1 and shape[-1] != 1
        transposed = (ours or theirs).transposed  # type: ignore[union-attr]
        outputs = rows != transposed
        far = marks.reshape(-1, shape[-2] if rows else shape[-1])  # [expert, size]
        if (ours and ours.magnitude is not None) or (theirs and theirs.magnitude is not None):
            self.factors[parameter] = self._undirected(ours, theirs, far, outputs)
            return
        parts = []
        if ours is not None:
            parts.append(_weighed(ours, 1 - far, outputs, 1.0))
        if theirs is not None:
            parts.append(_weighed(theirs, far, outputs, 1.0 if ours is None else theirs.scale / ours.scale))
        a, b = (torch.cat(some, 1) for some in zip(*parts, strict=True))
        first = ours or theirs
        assert first is not None
        self.factors[parameter] = replace(first, a=a.flatten(0, 1), b=b.flatten(1, 2))

    def _undirected(self, ours: Factors | None, theirs: Factors | None, far: Tensor, outputs: bool) -> Factors:
        """DoRA: a row of the base is itself again once its magnitude is its norm; all rows share a column's norms."""
        if ours is None or theirs is not None or not outputs or bool(((far != 0) & (far != 1)).any()):
            what = "the columns of a layer" if not outputs else "rows of another adapter, or part of the way,"
            name = (ours or theirs).parameter  # type: ignore[union-attr]
            raise ValueError(
                f"{what} can't be set back under DoRA, which divides each row by its norm ({name!r} of "
                f"{self.later.name}): {MERGE}"
            )
        a, b = _weighed(ours, 1 - far, True, 1.0)
        before = self.adapter.base[self.adapter.names(ours.parameter)[0]].float()
        norms = torch.linalg.norm(before.T if ours.transposed else before, dim=1)
        assert ours.magnitude is not None
        magnitude = torch.where(far[0] == 1, norms, ours.magnitude.float())
        return replace(ours, a=a.flatten(0, 1), b=b.flatten(1, 2), magnitude=magnitude)

    def _configure(self) -> None:
        """Ranks, scales and targets as the new factors have them, each module named in full."""
        new = [one for one in self.factors if one not in self.adapter.factors]
        if new:
            theirs = self.other.config if self.other else {}
            by_name = [one for one in new if targeted(one, theirs)]
            modules = {one.rpartition(".")[0] for one in self.factors if not targeted(one, self.config)} - {
                one.rpartition(".")[0] for one in by_name
            }
            named = [*(self.config.get("target_parameters") or ()), *by_name]
            self.config |= {"target_modules": sorted(modules), "target_parameters": named or None}
            self.config |= dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        for parameter, factors in self.factors.items():
            key = self._key(parameter)
            alpha = self.adapter.alpha(key) if factors.rank == self._rank(parameter) else self._alpha(factors)
            if (factors.rank, alpha) != (self.config.get("r", 8), self.config.get("lora_alpha", 8)):
                ranks[f"^{re.escape(key)}"], alphas[f"^{re.escape(key)}"] = factors.rank, alpha
        self.config |= {"rank_pattern": ranks, "alpha_pattern": alphas}

    def _rank(self, parameter: str) -> int:
        return self.adapter.factors[parameter].rank if parameter in self.adapter.factors else 0

    def _alpha(self, factors: Factors) -> float:
        """α of which peft makes the same scale again, to the last bit where a number does."""
        by = math.sqrt(factors.rank) if self.config.get("use_rslora") else factors.rank
        near = factors.scale * by
        tried = (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
        found = next((one for one in tried if one / by == factors.scale), near)
        return int(found) if found == int(found) else found

    def _key(self, parameter: str) -> str:
        return parameter if targeted(parameter, self.config) else parameter.rpartition(".")[0]

    def _put(self, parameter: str, factors: Factors) -> None:
        """The factors under the keys that they have beside all others: a module's last parameter is the outermost."""
        before = self.adapter.keyed.get(parameter, {"A.weight": "", "B.weight": ""})
        module = parameter.rpartition(".")[0]
        beside = [one for one in self._of(module) if one in self.factors and targeted(one, self.config)]
        depth = len(beside) - 1 - beside.index(parameter) if parameter in beside else 0
        stem = f"{PREFIX}{module}{INNER * depth}.lora_"
        for what in before:
            if what == "B.bias":
                continue
            value = factors.magnitude if what.startswith("magnitude") else factors.a if "A" in what else factors.b
            assert value is not None
            self.held[f"{stem}{what}"] = value
        if self.config.get("lora_bias") and f"{stem}B.bias" not in self.held:
            self.held[f"{stem}B.bias"] = torch.zeros(factors.b.shape[0], dtype=factors.b.dtype)

    def _of(self, module: str) -> list[str]:
        return self.adapter.of(module) if self.config.get("target_parameters") else []


def _same(source: Weights, one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints are one: the same folder, or files of the same content."""
    if one.adapter is None and other.adapter is None and one.folder.resolve() == other.folder.resolve():
        return True
    first, second = (fingerprint(replace(source, tensors=tensors)) for tensors in (one, other))
    return bool(first["sha256"] == second["sha256"])


def _weighed(factors: Factors, far: Tensor, outputs: bool, ratio: float) -> tuple[Tensor, Tensor]:
    """A ``[expert, rank, in]`` and B ``[out, rank, expert]``, with the rows of B or the columns of A times ``far``."""
    a, b = factors.by_expert
    if ratio != 1 or bool(((far != 0) & (far != 1)).any()):
        a, b = (one.to(torch.promote_types(one.dtype, torch.float32)) for one in (a, b))
    if outputs:
        b = b * far.T[:, None, :].to(b.dtype)
    else:
        a = a * far[:, None, :].to(a.dtype)
    return a, (b.double() * ratio).to(b.dtype) if ratio != 1 else b
