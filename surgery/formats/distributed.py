"""Torch's distributed checkpoints (DCP): ``.metadata``, and ``*.distcp`` files of chunks."""

from __future__ import annotations

import io
import mmap
import pickle
import pickletools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from surgery.compat import saved_tensor
from surgery.formats.archives import Window, check_archive
from surgery.formats.shards import viewed
from surgery.formats.stored import DISTRIBUTED, Piece, Stored
from surgery.tables import briefly

METADATA = ".metadata"
_OPTIMIZERS = ("optim", "optimizer", "optimizers")
_Places = dict[str, tuple[Any, torch.dtype, tuple[int, ...]]]  # chunk → its place in a file, its dtype and shape
_HARMLESS = {  # what a .metadata is made of: records of names, sizes and places
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "collections": {"OrderedDict", "defaultdict"},
    "builtins": {"dict", "list", "set", "frozenset", "tuple", "int", "str"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath", "WindowsPath"},
}  # fmt: skip


class _Records(pickle.Unpickler):
    """Reads a ``.metadata``: records only; whatever else it names is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _HARMLESS.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype | torch.layout):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def stored_distributed(folder: Path, inside: str = "") -> Stored:
    """The model's tensors of a distributed checkpoint, under the names that its state dict had.

    Args:
        folder: the checkpoint's folder.
        inside: where in it ``.metadata`` lies, "" or with a slash at the end.

    Raises:
        ValueError: ``.metadata`` is damaged or names more than records; the tensors of several models are there; a
            chunk is compressed or damaged; or the chunks do not make up whole tensors.
        LookupError: a file that ``.metadata`` names is absent.
    """
    return _stored(folder, inside, optimizer=False)


def moments(folder: Path, inside: str = "") -> Stored:
    """The optimizer's tensors of a distributed checkpoint, as ``NAME/exp_avg``; none where it holds none."""
    return _stored(folder, inside, optimizer=True)


def _stored(folder: Path, inside: str, optimizer: bool) -> Stored:
    path = folder / inside / METADATA
    told = _metadata(path)
    names = _states(told, path) if optimizer else _model(told, path)
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype | str] = {}
    pieces: dict[str, list[Piece]] = {name: [] for name in names.values()}
    where: dict[str, _Places] = {}
    _check_files(folder, inside, told.storage_data.values())
    for index, info in told.storage_data.items():
        if (name := names.get(index.fqn)) is None:
            continue
        entry = told.state_dict_metadata[index.fqn]
        start = tuple(index.offset or (0,) * len(entry.size))
        shape = next((tuple(one.sizes) for one in entry.chunks if tuple(one.offsets) == start), None)
        if shape is None:
            raise ValueError(f"{path} does not say how large the chunk of {name!r} at {start} is")
        file, key = f"{inside}{info.relative_path}", f"{name}@{start}"
        shapes[name], dtypes[name] = tuple(entry.size), entry.properties.dtype
        pieces[name].append(Piece(file, key, start, shape))
        where.setdefault(file, {})[key] = info, entry.properties.dtype, shape
    some = {name: tuple(one) for name, one in pieces.items()}
    found = Stored(DISTRIBUTED, shapes, dtypes, some, partial(_views, where), (f"{inside}{METADATA}",))
    for name in set(some) - set(shapes):
        raise ValueError(f"{path} names the tensor {name!r}, and no chunk of it")
    found.check_tiled(folder)
    return found


def _metadata(path: Path) -> Any:
    from torch.distributed.checkpoint.metadata import Metadata

    raw = path.read_bytes()
    try:
        for at, (code, index, _) in enumerate(pickletools.genops(raw)):
            if "PUT" in code.name and int(index or 0) > at:  # unpickling would make room for so many records
                raise ValueError(f"it numbers {at} records up to {index}")
        found = _Records(io.BytesIO(raw)).load()
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is no record of tensors, and code is never run ({briefly(error)})") from error
    except Exception as error:  # whatever a damaged pickle raises
        raise ValueError(f"{path} is damaged: {briefly(error)}") from error
    if not isinstance(found, Metadata) or not _sound(found):
        raise ValueError(f"{path} is no metadata of a distributed checkpoint, or damaged")
    return found


def _sound(told: Any) -> bool:
    """Whether the records have the fields that their classes call for: a damaged pickle may leave some out."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    def box(value: Any, axes: int) -> bool:
        return isinstance(value, tuple) and len(value) == axes and all(isinstance(one, int) for one in value)

    def tensor(entry: Any) -> bool:
        axes = len(entry.size)
        chunks = all(box(one.offsets, axes) and box(one.sizes, axes) for one in entry.chunks)
        return box(entry.size, axes) and isinstance(entry.properties.dtype, torch.dtype) and chunks

    def place(index: Any, info: Any) -> bool:
        known = told.state_dict_metadata[index.fqn]
        starts = (
            index.offset is None or not isinstance(known, TensorStorageMetadata) or box(index.offset, len(known.size))
        )
        return starts and isinstance(info.relative_path, str) and box((info.offset, info.length), 2)

    try:
        entries = [one for one in told.state_dict_metadata.values() if isinstance(one, TensorStorageMetadata)]
        names = all(isinstance(name, str) for name in told.state_dict_metadata)
        paths = all(isinstance(keys, tuple | list) and keys for keys in (told.planner_data or {}).values())
        places = all(place(index, info) for index, info in told.storage_data.items())
        return names and paths and places and all(map(tensor, entries))
    except (AttributeError, TypeError, LookupError):
        return False


def _paths(told: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every tensor, and the keys that lead to it in the state dict that was saved."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    for name, entry in told.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            yield name, tuple(map(str, (told.planner_data or {}).get(name, (name,))))


def _is_state(keys: tuple[str, ...]) -> bool:
    return any(key in _OPTIMIZERS for key in keys[:-1]) or keys[-1].startswith(tuple(f"{o}." for o in _OPTIMIZERS))


def _model(told: Any, path: Path) -> dict[str, str]:
    """Name in the checkpoint → name in the model's state dict: what is no optimizer's, of the one model there."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for name, keys in _paths(told):
        if not _is_state(keys):
            found.setdefault(keys[:-1], {})[name] = keys[-1]
    models = {keys: names for keys, names in found.items() if any("." in one for one in names.values())}
    if len(models) != 1:
        raise ValueError(
            f"{path} holds {'no model' if not models else 'several models'}: expected the tensors of one state dict"
            + "".join(f", {'.'.join(keys) or 'the top'} has {len(names)}" for keys, names in models.items())
        )
    return next(iter(models.values()))


def _states(told: Any, path: Path) -> dict[str, str]:
    """Name in the checkpoint → ``NAME/exp_avg``."""
    found = {}
    for name, keys in _paths(told):
        if _is_state(keys):
            # nested: (..., "state", NAME, "exp_avg"); flat: "state.NAME.exp_avg", perhaps below "optimizer."
            flat = ".".join(keys).split("state.", 1)[-1]
            parameter, _, entry = flat.rpartition(".")
            found[name] = f"{parameter}/{entry}"
    return found


def _check_files(folder: Path, inside: str, chunks: Iterable[Any]) -> None:
    """Raise unless every chunk, also of what is no tensor, lies in a file of the folder."""
    sizes: dict[str, int] = {}
    for info in chunks:
        file = info.relative_path
        path = folder / inside / file
        if file not in sizes:
            if not path.resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"the metadata of {folder} names a file outside the folder: {file[:200]!r}")
            if not path.is_file():
                raise LookupError(f"the metadata of {folder} names {file[:200]!r}, and there is no such file")
            sizes[file] = path.stat().st_size
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"{path} is compressed ({info.transform_descriptors}): save it without a transform")
        if not 0 <= info.offset <= info.offset + info.length <= sizes[file]:
            raise ValueError(f"{path} is truncated: a chunk ends at byte {info.offset + info.length}, of {sizes[file]}")


def _views(chunks: Mapping[str, _Places], path: Path, file: str, writable: bool) -> Mapping[str, Tensor]:
    with open(path, "r+b" if writable else "rb") as opened:
        memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_COPY)
    return _Chunks(path, memory, chunks[file])


@dataclass(frozen=True)
class _Chunks(Mapping[str, Tensor]):
    """The chunks of a file as views, each looked up when it is asked for: a millisecond."""

    path: Path
    memory: mmap.mmap
    places: _Places

    def __getitem__(self, key: str) -> Tensor:
        info, dtype, shape = self.places[key]
        try:
            with open(self.path, "rb") as file:
                window = Window(file, info.offset, info.length)
                check_archive(cast("IO[bytes]", window))
                told, at = saved_tensor(window)
        except Exception as error:  # whatever a damaged archive makes torch raise
            raise ValueError(f"{self.path} is damaged: its chunk {key} can't be read: {briefly(error)}") from error
        if (told.shape, told.dtype, told.is_contiguous(), told.storage_offset()) != (torch.Size(shape), dtype, True, 0):
            raise ValueError(
                f"{self.path} holds {tuple(told.shape)} in {told.dtype} for the chunk {key}, expected {shape} in "
                f"{dtype}, contiguous: the file is of another step than {METADATA}"
            )
        return viewed(self.memory, info.offset + at, dtype, shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)
