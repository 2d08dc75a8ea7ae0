"""Checkpoints as mappings: a lazy folder of safetensors, and a live module's state."""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from surgery.compat import writes_to
from surgery.files import path_of
from surgery.tables import LARGEST, briefly, read_json

INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
MERGE = "merge it (peft: merge_and_unload, then save_pretrained) and pass the folder of the result"
_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors format itself
_AXES = 64  # of a tensor; a damaged header may name a million
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}


def mapped(path: Path, header: Mapping[str, Any], writable: bool) -> dict[str, Tensor]:
    """Every tensor of a safetensors file as a view of the mapped file; writes reach the file only if ``writable``."""
    with open(path, "r+b" if writable else "rb") as file:
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_COPY
        memory = mmap.mmap(file.fileno(), 0, access=access)
    start = 8 + struct.unpack("<Q", memory[:8])[0]
    return {
        name: _tensor(memory, start + entry["data_offsets"][0], entry)
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"] in DTYPES
    }


def _tensor(memory: mmap.mmap, offset: int, entry: Mapping[str, Any]) -> Tensor:
    dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)


def header_of(path: Path) -> dict[str, Any]:
    """The header of a safetensors file; what the format's own reader can't open is refused."""
    from safetensors import SafetensorError, safe_open

    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if LARGEST < length <= _HEADER_LIMIT:
            raise ValueError(
                f"{path} has a header of {length} bytes, and at most {LARGEST} are read: save it in shards"
            )
        try:
            with safe_open(path, "np"):  # the offsets, which it does not tell, are checked against the file here
                header: dict[str, Any] = json.loads(file.read(length))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged, truncated or no safetensors file: {briefly(error)}") from error
    for name, entry in header.items():
        if name != "__metadata__" and not (isinstance(entry, dict) and len(entry["shape"]) <= _AXES):
            raise ValueError(f"{path} is damaged: the header's entry of {name!r} is no tensor of {_AXES} axes at most")
    return header


def weight_map(index: Path) -> dict[str, str]:
    try:
        found: dict[str, str] = read_json(index, {"weight_map": {str: str}})["weight_map"]
    except ValueError as error:
        raise ValueError(f"{index} is not an index of safetensors shards: {error}") from error
    if not found:
        raise ValueError(f"{index} is not an index of safetensors shards: its weight_map is empty")
    return found


def inside(folder: Path, name: str) -> Path:
    """The path of a shard, refused where it leaves the folder (a hub cache's own links into its blobs may)."""
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"the index of {folder} names a file outside the folder: {name[:200]!r}")
    if not os.path.isfile(path):  # Path's own raises for names that are too long
        raise LookupError(f"the index of {folder} names {name[:200]!r}, and there is no such file")
    home = folder.resolve()
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(path.resolve().is_relative_to(place) for place in allowed):
        raise ValueError(
            f"{path} is a link to {path.resolve()}, outside the folder: put the file itself there, or pass the folder "
            f"that it lies in"
        )
    return path


_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Checkpoint(Mapping[str, Tensor]):
    """A folder of safetensors shards, read lazily: a mapping from tensor name to tensor.

    Tensors are views of memory-mapped files: getting one takes no memory until its numbers are used, and a slice reads
    only its own pages. The views are read-only; ``save`` writes.

    Args:
        folder: a folder with ``model.safetensors``, or with shards and their index; or a hub id in the local cache.

    Raises:
        LookupError: no such folder, no weights in it, or a shard that the index names is missing.
        ValueError: pickled weights or an adapter only, an index that points outside the folder, or a truncated or
            damaged file.

    Source: ours (the file format is safetensors').
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = folder_of(folder)
        self.headers = {str(path.relative_to(self.folder)): header_of(path) for path in self._files()}
        self.where = {name: file for file, header in self.headers.items() for name in header if name != "__metadata__"}
        self._check_index()
        self._state = self._stat()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.where:
            near = [other for other in self.where if other.split(".")[-2:] == name.split(".")[-2:]][:3]
            raise KeyError(f"{self.folder} has no tensor {name!r}" + (f"; it has {near}" if near else ""))
        tensors = self._mapped(self.where[name])
        if name not in tensors:
            dtype = self.headers[self.where[name]][name]["dtype"]
            raise ValueError(f"{name!r} of {self.folder} has the dtype {dtype}, which can be copied but not read here")
        return tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)

    def __contains__(self, name: object) -> bool:
        return name in self.where

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.folder)!r}): {len(self)} tensors in {len(self.headers)} files"

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name → shape, from the headers alone."""
        return {name: tuple(self.headers[file][name]["shape"]) for name, file in self.where.items()}

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype | str]:
        """Tensor name → dtype, from the headers alone; the header's own word for one that torch does not have."""
        stored = {name: self.headers[file][name]["dtype"] for name, file in self.where.items()}
        return {name: DTYPES.get(dtype, dtype) for name, dtype in stored.items()}

    @property
    def state(self) -> tuple[tuple[str, int, int, int], ...]:
        """Name, inode, size and change time of every weight file and of ``config.json`` at the time of opening."""
        return self._state

    @property
    def is_current(self) -> bool:
        """Whether the files have not changed since they were opened."""
        try:
            return self._stat() == self._state
        except OSError:
            return False

    def _stat(self) -> tuple[tuple[str, int, int, int], ...]:
        config = ["config.json"] if (self.folder / "config.json").exists() else []
        found = ((file, (self.folder / file).stat()) for file in [*config, *self.headers])
        return tuple((file, one.st_ino, one.st_size, one.st_mtime_ns) for file, one in found)

    @cached_property
    def _open(self) -> dict[str, dict[str, Tensor]]:
        return {}

    def _mapped(self, file: str) -> dict[str, Tensor]:
        if file not in self._open:
            self._open[file] = mapped(self.folder / file, self.headers[file], writable=False)
        return self._open[file]

    def _files(self) -> list[Path]:
        index, single = self.folder / INDEX, self.folder / "model.safetensors"
        if index.exists():
            shards = [inside(self.folder, name) for name in dict.fromkeys(weight_map(index).values())]
            if single.exists() and single not in shards:  # transformers would read the one, others read the shards
                raise ValueError(f"{self.folder} holds both {single.name} and {INDEX}: remove the one that is stale")
            return shards
        if single.exists():
            return [inside(self.folder, single.name)]
        found = sorted(set(self.folder.glob("*.safetensors")) - set(self.folder.glob("adapter_*")))
        if len(found) == 1:
            return [inside(self.folder, found[0].name)]
        if found:
            raise LookupError(f"{self.folder} has {len(found)} safetensors files and no {INDEX} to say which belong")
        if adapter := next(self.folder.glob("adapter_*"), None):
            raise ValueError(f"{self.folder} holds an adapter ({adapter.name}) and no model: {MERGE}")
        if pickles := [path.name for pattern in _PICKLES for path in self.folder.glob(pattern)]:
            raise ValueError(
                f"{self.folder} holds pickled weights only ({', '.join(pickles[:3])}); loading a pickle can run code, "
                f"so they are never opened. Convert them once: model.save_pretrained(folder) writes safetensors"
            )
        raise LookupError(
            f"{self.folder} has no safetensors file: expected a checkpoint's folder, with its config.json"
        )

    def _check_index(self) -> None:
        index = self.folder / INDEX
        for name, file in weight_map(index).items() if index.exists() else ():
            if self.where.get(name) != file:
                raise ValueError(f"{index} says that {name!r} is in {file}, and it is not there")


class State(Mapping[str, Tensor]):
    """A live module's parameters and buffers by name, never copied (``state_dict`` without its hooks).

    Args:
        module: the model; its parameters may lie on any device, but not be offloaded to ``meta``.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        named: list[tuple[str, Tensor]] = [*module.named_parameters(remove_duplicate=False)]
        named += module.named_buffers(remove_duplicate=False)
        self._tensors = {name: tensor.detach() for name, tensor in named}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


Source = str | Path | nn.Module | Mapping[str, Tensor]
_in_force: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()


def in_force(module: nn.Module) -> list[str]:
    """The edits of a live module that were not undone, in words, the oldest first.

    ``rollback``, ``refresh`` and ``earlier_model`` add to it and take away from it.
    """
    return _in_force.setdefault(module, [])


@contextmanager
def edited(module: nn.Module, how: str) -> Iterator[None]:
    """While the body runs, ``how`` is among what is in force on the module."""
    edits = in_force(module)
    edits.append(how)
    try:
        yield
    finally:
        edits.remove(how)


class Moment:
    """What a live model's numbers were at some time; compared by identity."""


_moments: WeakKeyDictionary[nn.Module, tuple[Any, Moment]] = WeakKeyDictionary()


def moment_of(module: nn.Module) -> Moment:
    """The same object for as long as nothing is written into a live model, and again after an undo (``returned``).

    It notices what torch counts: optimiser steps, copies, moves, conversions; not what is written through ``.data``.
    """
    now = _written(module)
    known = _moments.get(module)
    if known is None or known[0] != now:
        known = _moments[module] = now, Moment()
    return known[1]


def returned(module: nn.Module, moment: Moment) -> None:
    """Note that every number of a live model is what it was at a moment, whatever was written since."""
    _moments[module] = _written(module), moment


def _written(module: nn.Module) -> tuple[Any, ...]:
    tensors = module.state_dict(keep_vars=True).values()
    return tuple((one.data_ptr(), one.dtype, 0 if one.is_inference() else writes_to(one)) for one in tensors)


def tensors_of(source: Source) -> Mapping[str, Tensor]:
    """Any source of weights as a mapping: a folder or hub id, a live module, or a mapping already."""
    if isinstance(source, nn.Module):
        return State(source)
    if isinstance(source, str | Path):
        return Checkpoint(source)
    if isinstance(source, Mapping):
        return source
    raise ValueError(
        f"expected a folder, a hub id, a torch module or a mapping of tensors, got {type(source).__name__}"
    )


def folder_of(source: str | Path) -> Path:
    """The folder that a path or a hub id in the local cache names; ``LookupError`` where there is none."""
    path = path_of(source)
    if path.is_dir():
        return path
    if path.is_file():
        raise LookupError(f"{path} is a file: pass the folder that holds it")
    if path.is_absolute() or str(source).startswith(".") or str(source).count("/") != 1:
        raise LookupError(f"there is no folder {path}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), local_files_only=True))
    except (LocalEntryNotFoundError, ValueError) as error:
        raise LookupError(f"there is no folder {source}, nor a model of that name in the local hub cache") from error
