"""``Patch``: what ``save_patch`` wrote, applied to a checkpoint or to a live model, and taken back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from surgery.checkpoints.checkpoint import Checkpoint, Source, tensors_of
from surgery.checkpoints.opening import Weights, open_weights
from surgery.files import path_of
from surgery.formats.folders import MERGE
from surgery.formats.patches import (
    KIND,
    MANIFEST,
    NUMBERS,
    VERSION,
    Numbers,
    Place,
    digest,
    flip,
    patched,
    unpack,
)
from surgery.formats.shards import DTYPES, WORDS, header_of, mapped
from surgery.formats.stored import Stored
from surgery.layout.boxes import Lying, at_flat
from surgery.layout.slots import Layout
from surgery.progress import steps
from surgery.reverting.flipped import Flipped, bits_at
from surgery.reverting.provenance import papers_of_patch
from surgery.reverting.rollback import Rollback, rollback
from surgery.tables import read_json
from surgery.units import kinds_of

_STATE = {"tensor": str, "numbers": str}
_PLACE = {"block": str, "part": str, "start": int, "offset": int, "sizes": [int], "strides": [int]}
_TENSOR = {"shape": [int], "dtype": str, "numbers": int, "before": _STATE, "after": _STATE, "places": [_PLACE]}
_RECORD = {"later": {"name": str}, "to": {"name": str}}
_TOLD = {"units": [str], "numbers": int, "record": _RECORD, "tensors": {str: _TENSOR}}


class Patch:
    """A rollback as a small folder, as ``save_patch`` wrote it: applied to what it was made from, and taken back.

    It flips bits, so that applying it and taking it back is the same: twice is the identity, bit for bit. Everything
    is verified before anything is written.

    Args:
        folder: the patch's folder.

    Raises:
        LookupError: there is no such folder, or no patch in it.
        ValueError: it is of another format or version, incomplete or damaged.

    Source: ours.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = path_of(folder)
        manifest = self.folder / MANIFEST
        if not manifest.is_file():
            theirs = next(self.folder.glob("weight_v*"), None)
            why = f"; {theirs.name} is a delta that SGLang's servers apply" if theirs else ""
            raise LookupError(
                f"there is no patch in {self.folder}: expected a {MANIFEST}, as surgery patch writes it{why}"
            )
        head = self._read({"kind": str, "version": int, "format": str})
        if head["kind"] != KIND:
            raise ValueError(f"{manifest} is no patch of surgery's: its kind is {head['kind']!r:.60}")
        if head["version"] != VERSION:
            raise ValueError(f"{manifest} is of version {head['version']}, and this surgery reads {VERSION}: update it")
        if head["format"] != "surgery":
            raise ValueError(
                f"{self.folder} is a patch in the format {head['format']!r:.60}, which is applied by the server: "
                f"write one with --format surgery"
            )
        self._told = self._read(_TOLD)
        if not (self.folder / NUMBERS).is_file():
            raise LookupError(f"{self.folder} is incomplete: there is no {NUMBERS}. Copy the whole folder again")
        self._header = header_of(self.folder / NUMBERS)
        held = {name for name, one in self._header.items() if name != "__metadata__" and one["dtype"] == "U8"}
        if held != set(self._told["tensors"]):
            raise ValueError(f"{self.folder} is damaged: {MANIFEST} and {NUMBERS} name different tensors")

    def _read(self, kind: Any) -> Any:
        """What the manifest says, checked."""
        try:
            found = read_json(self.folder / MANIFEST, kind)
            if "units" in kind:
                kinds_of(tuple(found["units"]))
        except ValueError as error:
            raise ValueError(f"the patch is damaged: {error!s:.300}. Copy its folder again") from error
        return found

    @property
    def record(self) -> dict[str, Any]:
        """What made it: versions, both parents, the selector, the counts."""
        return dict(self._told["record"])

    @property
    def numbers(self) -> int:
        """How many numbers it changes."""
        return sum(one["numbers"] for one in self._told["tensors"].values())

    @property
    def tensors(self) -> list[str]:
        """The tensors that it changes, by their names on disk."""
        return list(self._told["tensors"])

    @property
    def size(self) -> int:
        """Its bytes."""
        return size_of(self.folder)

    def __repr__(self) -> str:
        lead = f"{self.record['later']['name']} to {self.record['to']['name']}"
        return f"Patch({str(self.folder)!r}): {self.numbers} numbers in {len(self.tensors)} tensors, {lead}"

    def applied(self, later: Source, *, reverse: bool = False) -> Patched:
        """A checkpoint with the patch applied, as a lazy mapping; ``save`` writes it as a folder.

        Every tensor that the patch changes is read and verified at once, before and after the change. What it does not
        change is not looked at.

        Args:
            later: what the patch was made from, in whatever form: a folder, hub id or mapping with the same names.
            reverse: take the patch back; then ``later`` is a checkpoint with the patch applied.

        Raises:
            ValueError: it is another checkpoint, the patch is applied already (or, to be taken back, is not), it is
                damaged, or ``later`` is an adapter.
        """
        return Patched(tensors_of(later), self, reverse)

    def apply(
        self,
        model: nn.Module,
        *,
        reverse: bool = False,
        keep_on: torch.device | str | None = None,
        layout: Layout | None = None,
    ) -> Rollback:
        """Apply the patch to a live model, in place; undoable bit for bit, as a ``rollback`` is.

        The numbers are found by block and part, so a live model may hold them under other names and shapes than the
        disk (stacked experts). Only the numbers that change are verified, so that nothing of the model's size has to
        leave a GPU.

        Args:
            model: the live later model, in the dtype of the checkpoint that the patch was made from.
            reverse: take the patch back.
            keep_on, layout: as in ``rollback``.

        Returns:
            A report with ``undo``; used as a ``with`` block it undoes the patch on exit.

        Raises:
            ValueError: as ``applied``; or the model can't be rolled back (see ``rollback``).
        """
        live = open_weights(model, layout, units=tuple(self._told["units"]))
        target = Flipped(live, self._found(live, reverse))
        return rollback(model, to=target, mask=target.mask, keep_on=keep_on, layout=live.layout)

    def change(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype | str, whose: str
    ) -> tuple[Numbers, Numbers]:
        """The flat positions in a tensor and the bits to flip there.

        Raises:
            ValueError: the tensor has another shape or dtype than the patch expects, or the patch is damaged.
        """
        told = self._told["tensors"][name]
        expected = tuple(told["shape"]), told["dtype"]
        if (shape, WORDS.get(dtype, dtype)) != expected:  # type: ignore[arg-type]
            raise ValueError(
                f"{name!r} of {whose} is {WORDS.get(dtype, dtype)} {shape}, and {self.folder} changes one that is "  # type: ignore[arg-type]
                f"{expected[1][:10]} {str(expected[0])[:50]}: it was made for another checkpoint"
            )
        size, width = int(np.prod(shape, dtype=object)), DTYPES[told["dtype"]].itemsize
        try:
            return unpack(self._views[name].numpy().tobytes(), told["numbers"], size, width)
        except ValueError as error:
            raise ValueError(f"{self.folder} is damaged in {name!r}: {error}. Copy it again") from error

    @cached_property
    def _views(self) -> dict[str, Tensor]:
        return mapped(self.folder / NUMBERS, self._header, writable=False)

    def check(self, name: str, what: str, found: tuple[str, str], whose: str, reverse: bool) -> None:
        """Refuse (``ValueError``) unless ``found`` identifies a tensor before and after the change, as expected.

        Args:
            name: the tensor.
            what: "tensor" or "numbers".
            found: its digests as it is, and as it would become.
            whose: the name of what it is applied to.
            reverse: whether the patch is taken back.
        """
        told = self._told["tensors"][name]
        old, new = (told[when][what] for when in (("after", "before") if reverse else ("before", "after")))
        if found == (old, new):
            return
        if found[0] == new:
            way = "so it can't be taken back: leave out" if reverse else "and would be taken back by"
            raise ValueError(
                f"{self.folder} is {'not applied' if reverse else 'applied already'} to {whose}, {way} reverse=True "
                f"(--reverse)"
            )
        if found[0] == old:
            raise ValueError(f"{self.folder} is damaged: {name!r} would become something else. Copy it again")
        raise ValueError(
            f"{self.folder} was made for another checkpoint, {self.record['later']['name']!r}: {name!r} of {whose} "
            f"holds other numbers than it expects. Nothing was written"
        )

    def papers(self, reverse: bool, home: Path | None) -> dict[str, bytes]:
        """The files beside the weights of a saved folder."""
        return papers_of_patch(self.record, self.numbers, reverse, home)

    def _found(self, live: Weights, reverse: bool) -> dict[str, list[tuple[Numbers, Numbers]]]:
        """Part of a live model → positions in it and bits to flip; the numbers there are verified."""
        found: dict[str, list[tuple[Numbers, Numbers]]] = {}
        for name, told in self._told["tensors"].items():
            named = {(place["block"], place["part"]) for place in told["places"]}
            if told["numbers"] > sum(_size(live, *one) for one in named):  # before it is unpacked
                raise ValueError(
                    f"{live.name} has not the numbers that {self.folder} changes in {name!r}: it was made for another "
                    f"model"
                )
            at, xor = self.change(name, tuple(told["shape"]), told["dtype"], live.name)
            old, seen = np.zeros_like(xor), 0
            for place in told["places"]:
                try:
                    which, positions = Place(**place).positions(at)
                except (ValueError, TypeError) as error:  # TypeError: another field
                    raise ValueError(f"{self.folder} is damaged in {name!r}: {error}. Copy it again") from error
                if len(which):
                    order = positions.argsort()
                    which, positions = which[order], positions[order]
                    old[which] = self._numbers(live, name, place, positions)
                    found.setdefault(f"{place['block']}/{place['part']}", []).append((positions, xor[which]))
                    seen += len(which)
            if seen != len(at):
                raise ValueError(
                    f"{self.folder} does not say where all of {name!r} lies in a live model: apply it to a folder"
                )
            self.check(name, "numbers", (digest(old), digest(old ^ xor)), live.name, reverse)
        return found

    def _numbers(self, live: Weights, name: str, place: dict[str, Any], positions: Numbers) -> Numbers:
        """The bits of numbers of a live part."""
        block = live.layout.get(place["block"])
        slots = block.of(place["part"]) if block else ()
        if block is None or not slots or positions[-1] >= slots[-1].span[1]:
            raise ValueError(
                f"{live.name} has not the numbers that {self.folder} changes in {name!r}: it was made for another model"
            )
        expected = self._told["tensors"][name]["dtype"]
        if other := [slot.tensor for slot in slots if WORDS.get(live.read(slot.tensor).dtype) != expected]:
            raise ValueError(
                f"{other[0]!r} of {live.name} is {live.read(other[0]).dtype}, and {self.folder} changes {expected}: "
                f"load the model in its checkpoint's dtype"
            )
        held = bits_at(live, block, place["part"], torch.from_numpy(positions)).numpy()
        return held if held.itemsize == 1 else held.view(f"u{held.itemsize}")


def _size(live: Weights, block: str, part: str) -> int:
    slots = live.layout[block].of(part) if block in live.layout else ()
    return slots[-1].span[1] if slots else 0


class Patched(Mapping[str, Tensor]):
    """A checkpoint with a patch applied or taken back: a lazy mapping that reads its parent and never writes it."""

    def __init__(self, later: Mapping[str, Tensor], patch: Patch, reverse: bool) -> None:
        self.later, self.patch, self.reverse = later, patch, reverse
        self._name = str(self.folder or "the mapping")
        if isinstance(later, Checkpoint) and later.adapter is not None:  # a low-rank product can't hold it
            raise ValueError(f"{self._name} is an adapter, and a patch is of a whole model: {MERGE}")
        for name in steps("tensors", patch.tensors):
            if name not in later:
                raise ValueError(f"{self._name} has no tensor {name!r}: {patch.folder} was made for another model")
            tensor = later[name]
            at, xor = patch.change(name, tuple(tensor.shape), tensor.dtype, self._name)
            patch.check(name, "tensor", patched(tensor, at, xor), self._name, reverse)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.later[name]
        if name not in self.patch.tensors:
            return tensor
        tensor = tensor.detach().clone()
        self.edit(name, tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.later)

    def __len__(self) -> int:
        return len(self.later)

    @property
    def folder(self) -> Path | None:
        """The later checkpoint's folder, if it is one."""
        return self.later.folder if isinstance(self.later, Checkpoint) else None

    @property
    def parents(self) -> list[Checkpoint]:
        """The folders that it reads."""
        found: list[Checkpoint] = getattr(self.later, "parents", [])
        return [self.later] if isinstance(self.later, Checkpoint) else found

    @property
    def stored(self) -> Stored | None:
        """How the later folder stores its tensors, if it is one."""
        return self.later.stored if isinstance(self.later, Checkpoint) else None

    def touched(self, file: str) -> list[str]:
        """The tensors of a file that the patch changes."""
        return [name for name in (self.stored.files[file] if self.stored else ()) if name in self.patch.tensors]

    def edit(self, name: str, tensor: Lying) -> None:
        """Apply the patch to ``tensor``, which holds the later checkpoint's numbers."""
        flip(tensor, *self._change(name, tensor))

    def reset(self, name: str, tensor: Lying) -> None:
        """Write zeros where the patch changes the tensor of that name."""
        at, _ = self._change(name, self.later[name])
        tensor[at_flat(tensor, torch.from_numpy(at))] = torch.zeros(len(at), dtype=tensor.dtype)

    def _change(self, name: str, tensor: Lying) -> tuple[Numbers, Numbers]:
        return self.patch.change(name, tuple(tensor.shape), tensor.dtype, self._name)

    def remarks(self) -> list[str]:
        """Nothing: the numbers are the ones that the patch was made of."""
        return []

    def papers(self) -> dict[str, bytes]:
        """The files beside the weights in a saved folder: a record of what made the patch, a model card."""
        return self.patch.papers(self.reverse, self.later.home if isinstance(self.later, Checkpoint) else None)

    def __repr__(self) -> str:
        return f"Patched({self._name} with {self.patch!r}{' taken back' if self.reverse else ''})"


def size_of(folder: Path) -> int:
    """The bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
