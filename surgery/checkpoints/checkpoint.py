"""Checkpoints as mappings: a lazy folder of safetensors, and a live module's state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from surgery.checkpoints.wrapped import is_unmerged, merged_copy, plain_of
from surgery.compat import named_tensors, offloaded_weights, saved_by, writes_to
from surgery.files import path_of
from surgery.formats.adapters import Adapter, base_of
from surgery.formats.folders import home_of, is_adapter, stored_in
from surgery.formats.shards import INDEX, weight_map
from surgery.formats.stored import SAFETENSORS
from surgery.layout.boxes import Boxes
from surgery.layout.on_disk import meta_model
from surgery.layout.sharding import local, stored


class Checkpoint(Mapping[str, Tensor]):
    """A checkpoint's folder, read lazily: a mapping from tensor name to tensor.

    The folder holds safetensors (one file, or shards with their index), the rank files of FSDP (verl, SkyRL), or a
    distributed checkpoint of torch (``.metadata``, also in its safetensors form). A tensor that lies in one piece is a
    view of the memory-mapped file: getting one takes no memory until its numbers are used, and a slice reads only its
    own pages. One that several ranks hold is put together when it is asked for, but its rows are read where they lie
    (``boxes``). The views are read-only; ``save`` writes.

    The folder of an adapter (LoRA) is read as its base with the adapter merged into it: each tensor is computed when it
    is asked for, bit for bit as peft's merge does.

    Args:
        folder: the folder, or a hub id in the local cache.
        base: of an adapter, the checkpoint that it was trained on: a folder, a hub id, or a ``Checkpoint``, also that
            of another adapter (default: what its configuration names as ``base_model_name_or_path``).

    Raises:
        LookupError: no such folder, no weights in it, or a file that belongs to them is missing; the base of an adapter
            is neither named nor given.
        ValueError: pickled weights only, an index that points outside the folder, a truncated or damaged file, one that
            needs code to be read, or ranks of different runs; an adapter that is no LoRA, changes the base itself, or
            does not fit it.

    Source: ours (the formats are safetensors', torch's, verl's and peft's).
    """

    def __init__(self, folder: str | Path, base: str | Path | Checkpoint | None = None) -> None:
        self.folder = folder_of(folder)
        self.adapter: Adapter | None = None
        self.base: Checkpoint | None = None
        if is_adapter(self.folder):
            self.base = (
                base if isinstance(base, Checkpoint) else Checkpoint(_under(self.folder) if base is None else base)
            )
            self.adapter = Adapter(self.folder, self.base, self.base.model)
            self.stored = self.adapter.stored(self.base.shapes, self.base.dtypes)
        elif base is not None:
            raise ValueError(f"{self.folder} holds a whole model and no adapter: leave out base=")
        else:
            self.stored = stored_in(self.folder)
        self._check_index()
        self._state = self._stat()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            near = [other for other in self.shapes if other.split(".")[-2:] == name.split(".")[-2:]][:3]
            raise KeyError(f"{self.folder} has no tensor {name!r}" + (f"; it has {near}" if near else ""))
        if isinstance(dtype := self.dtypes[name], str):
            raise ValueError(f"{name!r} of {self.folder} has the dtype {dtype}, which can be copied but not read here")
        return self.stored.read(name, self._mapped)

    def boxes(self, name: str) -> Boxes | None:
        """The pieces of a tensor that several ranks hold, none of which is read yet; None where it is in one piece."""
        return self.stored.boxes(name, self._mapped)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __repr__(self) -> str:
        if self.adapter is not None:
            return (
                f"Checkpoint({str(self.folder)!r}): an adapter of {len(self.adapter.touched)} tensors on {self.base!r}"
            )
        return f"Checkpoint({str(self.folder)!r}): {len(self)} tensors in {len(self.files)} files"

    @property
    def home(self) -> Path:
        """The folder with ``config.json``: a training checkpoint may have one of its own, an adapter has its base's."""
        return home_of(self.folder) if self.base is None else self.base.home

    @property
    def tokenizer(self) -> Path:
        """The folder with the tokenizer: an adapter's own where it has one, else its base's."""
        if (self.folder / "tokenizer_config.json").is_file():
            return self.folder
        return self.home if self.base is None else self.base.tokenizer

    def model(self) -> nn.Module | None:
        """The model on the meta device, without numbers; None where no ``config.json`` says which one it is."""
        found: nn.Module | None = None
        if (self.home / "config.json").exists():
            found = meta_model(self.home, self.shapes)
        return found

    @property
    def files(self) -> dict[str, list[str]]:
        """Weight file → the tensors that lie in it, whole or in part."""
        return self.stored.files

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Tensor name → shape; no numbers are read."""
        return self.stored.shapes

    @property
    def dtypes(self) -> Mapping[str, torch.dtype | str]:
        """Tensor name → dtype; the file's own word for one that torch does not have."""
        return self.stored.dtypes

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
        config = self.home / "config.json"
        files = [self.folder / file for file in (*self.stored.beside, *self.files)]
        found = ((path, path.stat()) for path in ([config] if config.exists() else []) + files)
        state = tuple((str(path), one.st_ino, one.st_size, one.st_mtime_ns) for path, one in found)
        return state if self.base is None else state + self.base._stat()

    @cached_property
    def _open(self) -> dict[str, Mapping[str, Tensor]]:
        return {}

    def _mapped(self, file: str) -> Mapping[str, Tensor]:
        if file not in self._open:
            self._open[file] = self.stored.views(self.folder / file, file, False)
        return self._open[file]

    def _check_index(self) -> None:
        if self.base is not None:
            return
        index = self.home / INDEX
        place = "" if self.home == self.folder else f"{self.home.relative_to(self.folder)}/"
        named = weight_map(index) if index.exists() and self.stored.kind == SAFETENSORS else {}
        for name, file in named.items():
            if name not in self.shapes or self.stored.pieces[name][0].file != f"{place}{file}":
                raise ValueError(f"{index} says that {name!r} is in {file}, and it is not there")


def _under(folder: Path) -> Path:
    """The folder of the base that an adapter's configuration names; ``LookupError`` where it is not here."""
    named = base_of(folder)
    try:
        if named and folder_of(named).resolve() != folder.resolve():
            return folder_of(named)
    except LookupError:
        pass
    what = f"names {named!r:.300} as its base, which is not here" if named else "names no base"
    raise LookupError(
        f"{folder} holds an adapter that {what} (base_model_name_or_path): pass the base's folder (in the "
        f"shell as BASE, EARLIER, --to or --base; in Python Checkpoint(adapter, base=...))"
    )


def tokenizer_of(source: str | Path | Checkpoint) -> Path:
    """The folder whose tokenizer reads a checkpoint's prompts."""
    if isinstance(source, Checkpoint):
        return source.tokenizer
    folder = path_of(source)
    if (folder / "tokenizer_config.json").is_file() or not is_adapter(folder):
        return home_of(folder)
    return tokenizer_of(_under(folder))


def opened(source: Source, *others: Source | None) -> Source:
    """A source, opened if it is a folder; an adapter whose base is not here lies on the first whole model of others."""
    if not isinstance(source, str | Path) or not is_adapter(folder := folder_of(source)):
        return Checkpoint(source) if isinstance(source, str | Path) else source
    try:
        return Checkpoint(folder, _under(folder))
    except LookupError:
        for other in others:
            base = Checkpoint(other) if isinstance(other, str | Path) and not is_adapter(folder_of(other)) else other
            if isinstance(base, Checkpoint):
                return Checkpoint(folder, base.base or base)
        raise


class State(Mapping[str, Tensor]):
    """A live module's parameters and buffers by name, never copied (``state_dict`` without its hooks).

    Those of a sharded module have the shape of the whole tensor, and this process's numbers (``surgery.layout``).

    Args:
        module: the model; its parameters may lie on any device, also offloaded to the CPU by accelerate, but not to
            the disk. One of peft has its adapters merged (``merge_adapter``).
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module = plain_of(module)
        named = named_tensors(stored(module)) | offloaded_weights(module)
        self._tensors = {name: tensor.detach() for name, tensor in named.items()}

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


_merged: WeakKeyDictionary[nn.Module, tuple[Moment, nn.Module]] = WeakKeyDictionary()


def merged(module: nn.Module) -> nn.Module:
    """A live model; of one of peft whose adapters are not merged a merged copy, the same until something is written."""
    if not is_unmerged(module):
        return plain_of(module)
    now = moment_of(module)
    if module not in _merged or _merged[module][0] is not now:
        _merged[module] = now, merged_copy(module)
    return _merged[module][1]


def _written(module: nn.Module) -> tuple[Any, ...]:
    held = [*saved_by(stored(module)), *offloaded_weights(module).values()]
    tensors = [local(one) for one in held]
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
