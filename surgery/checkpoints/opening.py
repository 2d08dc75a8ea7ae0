"""Opening checkpoints, and fingerprints that identify one without reading all of it."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.checkpoints.checkpoint import Checkpoint, Source, State, tensors_of
from surgery.checkpoints.checks import check_source
from surgery.checkpoints.configuration import differences
from surgery.compat import passing_buffers
from surgery.layout.finding import find_layout
from surgery.layout.on_disk import folder_layout
from surgery.layout.plain import check_stored
from surgery.layout.sharding import ALONE, Ranks, check_one_process, is_sharded, local, places_in, ranks_among, ranks_of
from surgery.layout.slots import Block, Layout
from surgery.units import Units, kinds_of


@dataclass(frozen=True)
class Weights:
    """A source of weights, opened: its tensors and where its neurons lie."""

    tensors: Mapping[str, Tensor]
    layout: Layout
    name: str

    @property
    def ranks(self) -> Ranks:
        """The processes that hold them together: of a live model that is sharded."""
        return ranks_of(self.tensors.module) if isinstance(self.tensors, State) else ALONE

    def dtype(self, tensor: str) -> torch.dtype:
        """A tensor's dtype, without its numbers where a folder tells it."""
        if isinstance(self.tensors, Checkpoint) and isinstance(found := self.tensors.dtypes[tensor], torch.dtype):
            return found
        return self.tensors[tensor].dtype

    def read(self, tensor: str) -> Tensor:
        """A tensor whose numbers are asked for.

        Raises:
            ValueError: its numbers are elsewhere (offloaded by accelerate).
        """
        found = self.tensors[tensor]
        if found.is_meta:
            raise ValueError(
                f"{tensor!r} of {self.name} is on the meta device: its weights are offloaded. Load the model whole, or "
                f"pass its folder"
            )
        return found


def open_weights(
    source: Source, layout: Layout | None = None, like: Weights | None = None, units: Units = "mlp"
) -> Weights:
    """Open a folder, module or mapping and find its neurons or other units.

    Args:
        source: a folder, hub id, ``nn.Module`` or mapping of tensors.
        layout: the user's own layout; it is used instead of what would be found.
        like: weights of the same model: their layout is used where the names are the same, and their units are found.
        units: which kinds of unit to find (see ``find_layout``).

    Raises:
        ValueError: the weights are quantised, or an adapter's; the units can't be found, or are not those of
            ``like``; a tensor outside the MLPs has another shape there. Outside the layers another number of rows (a
            padded or extended vocabulary) is only a warning: such tensors are never touched. Other floating dtypes are
            fine, and so are tensors that only one has.
    """
    if like is not None and like.ranks.mesh is None:
        check_one_process(source, "a comparison with another checkpoint")
    tensors = tensors_of(source)
    name = _name(source)
    check_source(tensors, name)
    kinds = kinds_of(units) if like is None else like.layout.units
    found = layout or _layout(tensors, like, name, kinds)
    if like is not None and found.sizes != like.layout.sizes:
        raise ValueError(_differs(found.sizes, name, like.layout.sizes, like.name))
    _check_shapes(tensors, found, name)
    if like is not None:
        _check_alike(tensors, found, name, like)
    return Weights(tensors, found, name)


def _layout(tensors: Mapping[str, Tensor], like: Weights | None, name: str, kinds: tuple[str, ...]) -> Layout:
    if isinstance(own := getattr(tensors, "layout", None), Layout):
        later: Any = getattr(tensors, "later", None)  # a rolled-back view: its mask may be over other units
        return own if own.units == kinds or later is None else _layout(later.tensors, like, name, kinds)
    if isinstance(tensors, State):
        return find_layout(tensors.module, units=kinds)
    configured = isinstance(tensors, Checkpoint) and (tensors.home / "config.json").exists()
    if like is not None and like.layout.fits(tensors) and not (configured and _otherwise(tensors, like)):
        return like.layout
    if configured:
        assert isinstance(tensors, Checkpoint)
        return _folder_layout(_Folder(tensors.home, tensors.state, tensors.shapes), kinds)
    if like is not None:
        slots = (slot.tensor for block in like.layout.blocks for slot in block.slots)
        missing = [tensor for tensor in slots if tensor not in tensors]
        raise ValueError(f"{name} lacks {len(missing)} tensors that {like.name} has, the first of them {missing[0]!r}")
    raise ValueError(f"bare tensors do not show where the neurons of {name} lie: pass layout=")


def _otherwise(tensors: Mapping[str, Tensor], like: Weights) -> bool:
    """Whether a folder's units may lie elsewhere although it has the names: heads and gates are settings.

    And transformers transposes some tensors as it reads them, or does not, by their shapes.
    """
    shapes = tensors.shapes if isinstance(tensors, Checkpoint) else {}
    slots = (slot for block in like.layout.blocks for slot in block.slots)
    return any(shapes[slot.tensor] != slot.shape for slot in slots) or bool(differences(tensors, like.tensors))


@dataclass(frozen=True)
class _Folder:
    """A folder in a certain state of its files."""

    path: Path
    state: tuple[tuple[str, int, int, int], ...]
    shapes: Mapping[str, tuple[int, ...]] = field(compare=False)


@lru_cache(maxsize=8)
def _folder_layout(folder: _Folder, kinds: tuple[str, ...]) -> Layout:
    """The layout of a folder, found once for as long as its files stay as they are (seconds for a large MoE)."""
    return folder_layout(folder.path, folder.shapes, units=kinds)


def _check_shapes(tensors: Mapping[str, Tensor], layout: Layout, name: str) -> None:
    shapes, dtypes = (tensors.shapes, tensors.dtypes) if isinstance(tensors, Checkpoint) else (None, None)
    for slot in (slot for block in layout.blocks for slot in block.slots):
        if slot.tensor not in tensors:
            raise ValueError(f"{name} has no tensor {slot.tensor!r}")
        check_stored(slot.tensor, dtypes[slot.tensor] if dtypes else tensors[slot.tensor].dtype, name)
        shape = shapes[slot.tensor] if shapes else tuple(tensors[slot.tensor].shape)
        if shape != slot.shape:
            raise ValueError(f"{slot.tensor!r} has the shape {shape} in {name}, expected {slot.shape}")


def _check_alike(tensors: Mapping[str, Tensor], layout: Layout, name: str, like: Weights) -> None:
    for block in layout.blocks:
        ours, theirs = _widths(block), _widths(like.layout[block.name])
        if ours != theirs:
            raise ValueError(
                f"{name} and {like.name} are different models: a neuron of {block.name!r} is made of {ours} numbers in "
                f"the one and {theirs} in the other"
            )
        heads, others = (one.heard.sizes if one.heard else () for one in (block, like.layout[block.name]))
        if heads != others:
            raise ValueError(
                f"{name} and {like.name} are different models: the heads of {block.name!r} have the sizes "
                f"{dict(heads)} in the one and {dict(others)} in the other"
            )
    in_mlp = {slot.tensor for one in (layout, like.layout) for block in one.blocks for slot in block.slots}
    mine, its = _shapes(tensors, in_mlp), _shapes(like.tensors, in_mlp)
    other = [tensor for tensor in mine if tensor in its and mine[tensor] != its[tensor]]
    what = {
        tensor: f"{tensor!r} has the shape {mine[tensor]} in {name}, {its[tensor]} in {like.name}" for tensor in other
    }
    for tensor in other:
        if re.search(r"\.\d+\.", tensor) or mine[tensor][1:] != its[tensor][1:]:  # in a layer, or not only longer
            raise ValueError(f"{what[tensor]}: they are different models")
    if other:
        warnings.warn(
            f"{what[other[0]]}: another vocabulary, or another padding of it. This tensor lies outside the layers and "
            f"stays unchanged, and predictions are compared over the tokens that both have; make sure that token ids "
            f"mean the same in both",
            stacklevel=4,
        )


def _widths(block: Block) -> dict[str, int]:
    return {part: block.of(part)[0].width for part in block.parts}


def _shapes(tensors: Mapping[str, Tensor], without: set[str]) -> dict[str, tuple[int, ...]]:
    if isinstance(tensors, Checkpoint):
        return {name: shape for name, shape in tensors.shapes.items() if name not in without}
    without = without | passing_buffers(tensors.module) if isinstance(tensors, State) else without
    return {name: tuple(tensors[name].shape) for name in tensors if name not in without}


def _differs(ours: Mapping[str, int], name: str, theirs: Mapping[str, int], other: str) -> str:
    for block in dict.fromkeys([*ours, *theirs]):
        if ours.get(block) != theirs.get(block):
            return (
                f"{name} and {other} are different models: block {block!r} has {ours.get(block, 'no')} neurons in the "
                f"one and {theirs.get(block, 'none')} in the other"
            )
    return f"{name} and {other} are different models: their blocks come in another order"


def _name(source: Source) -> str:
    if isinstance(source, nn.Module):
        return f"the live {type(source).__name__}"
    folder = getattr(source, "folder", None)
    return str(folder or (source if not isinstance(source, Mapping) else "the mapping"))


_SAMPLES = 1024


def fingerprint(weights: Weights) -> dict[str, Any]:
    """What identifies a checkpoint: its name and, for a folder, a sha256 of every weight file.

    The hash covers a safetensors file's header, the size and 1024 evenly spaced runs of 4 KiB. Two training stages
    never agree on all of these, and hashing all of a large checkpoint would take longer than rolling it back.
    ``neurons`` is the same in every form in which a checkpoint may be stored: a hash of some numbers of its first and
    last layer.
    """
    if not isinstance(weights.tensors, Checkpoint):
        return {"name": weights.name}
    folder = weights.tensors.folder
    parts = folder.resolve().parts[-3 if weights.tensors.stored.training else -1 :]  # runs/qa/global_step_7/actor
    found = {"name": "/".join(parts), "sha256_of": "header, size and 1024 samples of 4 KiB"}
    return {**found, "sha256": _sha256s(weights.tensors), "neurons": _some_neurons(weights)}


def _sha256s(tensors: Checkpoint) -> dict[str, str]:
    """Weight file → its hash; under an adapter's file those of its base."""
    found = {} if tensors.base is None else {f"base/{file}": sha for file, sha in _sha256s(tensors.base).items()}
    for file in sorted(tensors.files):
        path = tensors.folder / file
        now = path.stat()
        found[file] = _sha256(path, now.st_size, (now.st_ino, now.st_mtime_ns))
    return found


def _some_neurons(weights: Weights, most: int = 64) -> str:
    """A sha256 of up to 64 neurons of the first and of the last block, rounded to bf16 as ``sampled`` does."""
    digest = hashlib.sha256()
    for block in dict.fromkeys(weights.layout.blocks[at] for at in (0, -1) if weights.layout.blocks):
        index = torch.linspace(0, block.neurons - 1, min(most, block.neurons), dtype=torch.float64).long()
        for part in sorted(block.parts) if len(index) else ():
            rows = block.rows(weights.tensors, part, index).detach()
            digest.update(rows.bfloat16().cpu().contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


@lru_cache(maxsize=256)
def _sha256(path: Path, size: int, state: tuple[int, int], samples: int = _SAMPLES, run: int = 4096) -> str:
    """The hash of a file in a certain state: every selection notes that of each checkpoint."""
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if path.suffix == ".safetensors":
            prefix = file.read(8)
            digest.update(prefix + file.read(int.from_bytes(prefix, "little")))
        start = file.tell()
        step = max(run, (size - start) // samples)
        for at in range(start, size, step):
            file.seek(at)
            digest.update(file.read(run))
    return digest.hexdigest()


def known(weights: Weights) -> dict[str, Any]:
    """The fingerprint; for live weights also their ``sampled`` hash, since a name alone does not identify them."""
    found = fingerprint(weights)
    return (
        found if "sha256" in found else {**found, "sampled": sampled(one for _, one in sorted(weights.tensors.items()))}
    )


def sampled(tensors: Iterable[Tensor]) -> str:
    """What identifies live weights: a sha256 of 1024 evenly spaced values of every tensor.

    The values are rounded to bf16, so that a checkpoint is the same one in bf16 and in float32, on a CPU and on a GPU.
    """
    digest, held = hashlib.sha256(), [tensor.detach() for tensor in tensors]
    for tensor, some in zip(held, _samples(held), strict=True):
        digest.update(str(tuple(tensor.shape)).encode())
        if not tensor.is_meta:  # offloaded: its values are elsewhere
            digest.update(some.to(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _samples(tensors: list[Tensor]) -> list[Tensor]:
    """The bits of those values; of sharded tensors the processes put them together, in one message."""
    ranks = ranks_among(tensors)
    found = {str(at): _bits(tensor, ranks) for at, tensor in enumerate(tensors)}
    found |= ranks.sums({at: bits for at, bits in found.items() if is_sharded(tensors[int(at)])})
    return list(found.values())


@lru_cache(maxsize=256)
def _places(size: int) -> Tensor:
    return torch.linspace(0, max(0, size - 1), min(_SAMPLES, size), dtype=torch.float64).long()


def _bits(tensor: Tensor, ranks: Ranks) -> Tensor:
    """The values' bits as bf16 (int32 ``[value]``); 0 in place of those that another process holds."""
    places = _places(tensor.numel())
    found = torch.zeros(len(places), dtype=torch.int32)
    if tensor.is_meta:
        return found
    if not is_sharded(tensor) and tensor.is_contiguous():
        return tensor.flatten()[places.to(tensor.device)].bfloat16().cpu().view(torch.int16).int()
    at = torch.unravel_index(places.to(tensor.device), tensor.shape)
    here = torch.ones(len(places), dtype=torch.bool)
    if is_sharded(tensor):
        here &= ranks.counts(tensor)
        at = tuple(table[one.cpu()] for table, one in zip(places_in(tensor), at, strict=True))
        here &= torch.stack(at).ge(0).all(0)
    where = tuple(one[here.to(one.device)].to(tensor.device) for one in at)
    found[here] = local(tensor)[where].bfloat16().cpu().view(torch.int16).int()
    return found
