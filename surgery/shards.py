"""The files of a checkpoint: safetensors headers and indexes, checked, and tensors as views of the mapped file."""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"
_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors format itself
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
        if begin > end or (dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - begin):
            raise ValueError(f"bytes {begin}–{end} for the shape {shape} of {dtype}")
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: the header's entry of {name!r} is damaged ({error!r})") from error
    return begin, end


def weight_map(index: Path) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads(index.read_text())["weight_map"]
        if not all(isinstance(name, str) and isinstance(file, str) for name, file in found.items()):
            raise ValueError("a weight_map maps names to file names")
        if not found:
            raise ValueError("its weight_map is empty")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is not an index of safetensors shards: {error!r}") from error
    return found


def inside(folder: Path, name: str) -> Path:
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
