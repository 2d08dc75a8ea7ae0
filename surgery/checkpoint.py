"""Checkpoints as mappings: a lazy folder of safetensors, and a live module's state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from surgery.shards import DTYPES, INDEX, header_of, inside, mapped, weight_map

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Checkpoint(Mapping[str, Tensor]):
    """A folder of safetensors shards, read lazily: a mapping from tensor name to tensor.

    Tensors are views of the mapped files: asking for one costs no memory until its numbers are used, and a slice
    reads only its own pages. Nothing can be written through them (``save`` writes).

    Args:
        folder: a folder with ``model.safetensors``, or shards and their index; or a hub id that is in the local cache.

    Raises:
        LookupError: no such folder, no weights in it, or a shard that the index names is missing.
        ValueError: pickled weights only, an index that points outside the folder, or a truncated or damaged file.

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

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The dtypes of the tensors, as far as they can be read here."""
        entries = (self.headers[file][name] for name, file in self.where.items())
        return {DTYPES[entry["dtype"]] for entry in entries if entry["dtype"] in DTYPES}

    @property
    def state(self) -> tuple[tuple[str, int, int, int], ...]:
        """Name, inode, size and time of change of every weight file and of ``config.json`` when this was opened."""
        return self._state

    @property
    def is_current(self) -> bool:
        """Whether the files are still those that were opened."""
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
        found = sorted(self.folder.glob("*.safetensors"))
        if len(found) == 1:
            return [inside(self.folder, found[0].name)]
        if found:
            raise LookupError(f"{self.folder} has {len(found)} safetensors files and no {INDEX} to say which belong")
        if pickles := [path.name for pattern in _PICKLES for path in self.folder.glob(pattern)]:
            raise ValueError(
                f"{self.folder} holds pickled weights only ({', '.join(pickles[:3])}); loading a pickle can run code, "
                f"so they are never opened. Convert them once: model.save_pretrained(folder) writes safetensors"
            )
        raise LookupError(f"{self.folder} has no safetensors file")

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
    """What has been written into a live module and not been undone, in words; the oldest first.

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
    path = Path(source)
    if path.is_dir():
        return path
    if path.is_file():
        raise LookupError(f"{path} is a file: pass the folder that holds it")
    if path.is_absolute() or str(source).startswith(".") or str(source).count("/") != 1:
        raise LookupError(f"there is no folder {source}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), local_files_only=True))
    except (LocalEntryNotFoundError, ValueError) as error:
        raise LookupError(f"there is no folder {source}, nor a model of that name in the local hub cache") from error
