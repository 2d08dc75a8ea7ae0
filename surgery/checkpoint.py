"""Checkpoints as mappings: a lazy folder of safetensors, a live module's state, and ``save``, which writes a folder."""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import shutil
import stat
import struct
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors format itself
_DTYPES = {
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
        self.folder = _folder(folder)
        self.headers = {str(path.relative_to(self.folder)): _header(path) for path in self._files()}
        self.where = {name: file for file, header in self.headers.items() for name in header if name != "__metadata__"}
        self._check_index()

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

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name → shape, from the headers alone."""
        return {name: tuple(self.headers[file][name]["shape"]) for name, file in self.where.items()}

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
            shards = [_inside(self.folder, name) for name in dict.fromkeys(_weight_map(index).values())]
            if single.exists() and single not in shards:  # transformers would read the one, others read the shards
                raise ValueError(f"{self.folder} holds both {single.name} and {INDEX}: remove the one that is stale")
            return shards
        if single.exists():
            return [_inside(self.folder, single.name)]
        found = sorted(self.folder.glob("*.safetensors"))
        if len(found) == 1:
            return [_inside(self.folder, found[0].name)]
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
        for name, file in _weight_map(index).items() if index.exists() else ():
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


@runtime_checkable
class _Edited(Protocol):
    """What ``save`` needs of a rolled-back view: its shards, its edits, and the papers that go beside them."""

    headers: dict[str, Any]

    def touched(self, file: str) -> list[str]: ...
    def edit(self, name: str, tensor: Tensor) -> None: ...
    def papers(self) -> dict[str, bytes]: ...


def save(tensors: Mapping[str, Tensor], folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write a checkpoint (usually a ``rolled_back`` one) as a folder, byte for byte like the folder it comes from.

    The later folder is copied (by the file system's own means where it can), the reverted slices are written into the
    copy one tensor at a time, and the copy takes its final name only when all of it is on the disk: a crash leaves no
    folder that loads. Outside the reverted slices every byte stays as it was: shards, index, header order, dtype,
    tokenizer, config and files that nobody here knows.

    Args:
        tensors: a ``Checkpoint`` or a ``rolled_back`` view of one.
        folder: where to write; it must not exist unless ``overwrite``.
        overwrite: replace an existing folder (it stays as it was until the new one is complete).

    Returns:
        The folder's path.

    Raises:
        ValueError: ``tensors`` does not come from a folder; the output exists, or is one of the inputs.
        OSError: the disk is full or the place can't be written; nothing is left behind.

    Source: ours.
    """
    target = Path(os.path.abspath(folder))
    source: Path | None = getattr(tensors, "folder", None)
    if source is None:
        raise ValueError(
            "save() writes what comes from a folder (a Checkpoint, or rolled_back(folder, ...)); "
            "a live model writes itself with model.save_pretrained(folder)"
        )
    for parent in (source, *getattr(tensors, "parents", ())):
        here, there = target.resolve(), Path(parent).resolve()
        if here.is_relative_to(there) or there.is_relative_to(here):
            raise ValueError(f"the output {target} is, holds or lies in one of the inputs: choose another folder")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ValueError(f"{target} is a file or a link, and never replaced: choose another folder")
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists: choose another folder, or pass overwrite=True (--overwrite)")
    made = [parent for parent in target.parents if not parent.exists()]
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _copy(source, partial, tensors)
        _put_in_place(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            for parent in made:
                parent.rmdir()
        raise
    return target


def _copy(source: Path, partial: Path, tensors: Mapping[str, Tensor]) -> None:
    """Everything of the source's tree, symbolic links resolved, then the edits, then what says where it came from."""
    # A weight file carries its final name only once it is whole: a killed process leaves no folder that loads.
    weights: set[str] = set(getattr(tensors, "headers", ()))
    unfinished = {file: partial / f"{file}.{uuid.uuid4().hex}.partial" for file in weights}
    partial.mkdir()
    for path, inside in _tree(source):
        if path.is_dir():
            (partial / inside).mkdir()
        else:
            _clone(path, unfinished.get(inside, partial / inside))
    if isinstance(tensors, _Edited):
        for file, path in sorted(unfinished.items()):
            _edit_file(path, tensors, file)
        for name, text in tensors.papers().items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(text)
    for file, path in unfinished.items():
        path.rename(partial / file)
    for path in [*partial.rglob("*"), partial]:
        _sync(path)


def _tree(folder: Path, inside: str = "", above: tuple[Path, ...] = ()) -> Iterator[tuple[Path, str]]:
    """Everything in a folder with its name from there, folders before what they hold, symbolic links followed."""
    if folder.resolve() in above:
        raise ValueError(f"{folder} is a link to a folder that it lies in: remove the link")
    for path in sorted(folder.iterdir()):
        if not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is neither a file nor a folder (a dangling link?): remove it or copy it yourself")
        yield path, f"{inside}{path.name}"
        if path.is_dir():
            yield from _tree(path, f"{inside}{path.name}/", (*above, folder.resolve()))


def _edit_file(path: Path, tensors: _Edited, file: str) -> None:
    """Write the edits of one shard into ``path``, through the page cache; no tensor is ever held in memory whole."""
    names = tensors.touched(file)
    if not names:
        return
    if _header(path) != tensors.headers[file]:
        raise ValueError(f"{file} was changed while it was being rolled back: nothing was written")
    views = mapped(path, tensors.headers[file], writable=True)
    for name in names:
        tensors.edit(name, views[name])


def _put_in_place(partial: Path, target: Path) -> None:
    old = None
    if target.exists():
        old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old")
        target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        if old:
            old.rename(target)
        raise
    _sync(target.parent)
    if old:
        shutil.rmtree(old)


def _clone(source: Path, target: Path) -> None:
    """Copy one file: a reflink where the file system has them, else in the kernel; the mode is kept, plus ``u+w``."""
    with open(source, "rb") as reader, open(target, "wb") as writer:
        size, done = os.fstat(reader.fileno()).st_size, 0
        try:
            while done < size:
                sent = os.copy_file_range(reader.fileno(), writer.fileno(), size - done)
                if sent == 0:
                    break
                done += sent
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                raise
        if done < size:
            reader.seek(done)
            writer.seek(done)
            shutil.copyfileobj(reader, writer, 1 << 24)
    target.chmod(source.stat().st_mode | stat.S_IWUSR)  # a hub cache's files are read-only; the edits come next


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def mapped(path: Path, header: Mapping[str, Any], writable: bool) -> dict[str, Tensor]:
    """Every tensor of a safetensors file as a view of the mapped file; writes reach the file only if ``writable``."""
    with open(path, "r+b" if writable else "rb") as file:
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_COPY
        memory = mmap.mmap(file.fileno(), 0, access=access)
    start = 8 + struct.unpack("<Q", memory[:8])[0]
    return {
        name: _tensor(memory, start + entry["data_offsets"][0], entry)
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"] in _DTYPES
    }


def _tensor(memory: mmap.mmap, offset: int, entry: Mapping[str, Any]) -> Tensor:
    dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)


def _header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, checked against the file: nothing that it names may lie outside."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(_HEADER_LIMIT, size - 8):
            raise ValueError(
                f"{path} is truncated or not a safetensors file: its header wants {length} of {size} bytes"
            )
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a safetensors file: its header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a safetensors file: its header is a {type(header).__name__}")
    held, reached = size - 8 - length, 0
    spans = sorted((*_span(path, name, entry), name) for name, entry in header.items() if name != "__metadata__")
    for begin, end, name in spans:  # the format allows neither holes nor overlaps
        if begin != reached or end > held:
            raise ValueError(
                f"{path} is truncated or damaged: {name!r} should lie at bytes {begin}–{end} of {held}, "
                f"and the tensors before it end at {reached}"
            )
        reached = end
    if reached != held:
        raise ValueError(f"{path} is damaged: its tensors end at byte {reached}, and it holds {held}")
    return header


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Where a header's entry says that its tensor lies; refused where it contradicts itself."""
    try:
        (begin, end), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
        if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
            raise ValueError("a size or an offset that is no natural number")
        if begin > end or (dtype in _DTYPES and math.prod(shape) * _DTYPES[dtype].itemsize != end - begin):
            raise ValueError(f"bytes {begin}–{end} for the shape {shape} of {dtype}")
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: the header's entry of {name!r} is damaged ({error!r})") from error
    return begin, end


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads(index.read_text())["weight_map"]
        if not all(isinstance(name, str) and isinstance(file, str) for name, file in found.items()):
            raise ValueError("a weight_map maps names to file names")
        if not found:
            raise ValueError("its weight_map is empty")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is not an index of safetensors shards: {error!r}") from error
    return found


def _inside(folder: Path, name: str) -> Path:
    """The path of a shard, refused where it leaves the folder (a hub cache's own links into its blobs may)."""
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"the index of {folder} names a file outside the folder: {name!r}")
    if not path.is_file():
        raise LookupError(f"the index of {folder} names {name!r}, and there is no such file")
    home = folder.resolve()
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(path.resolve().is_relative_to(place) for place in allowed):
        raise ValueError(f"{path} is a link to {path.resolve()}, outside the folder")
    return path


def _folder(source: str | Path) -> Path:
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
