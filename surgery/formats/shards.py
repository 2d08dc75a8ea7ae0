"""Safetensors files: a model in one file or in shards with their index, and torch's distributed form of it."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import struct
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import torch
from torch import Tensor

from surgery.formats.stored import CUT, SAFETENSORS, Piece, Stored
from surgery.tables import LARGEST, briefly, json_of, read_json

INDEX = "model.safetensors.index.json"
SHARDING = "DCP_SHARDING_INFO"  # in a header: where each piece begins in its tensor
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
WORDS = {dtype: word for word, dtype in DTYPES.items()}


def stored_shards(folder: Path, files: Iterable[str]) -> Stored:
    """The tensors of safetensors files; one that a header cuts into pieces is put together again.

    Args:
        folder: the checkpoint's folder.
        files: their names in it.

    Raises:
        ValueError: a file is damaged, or the pieces of a tensor do not cover it.
    """
    headers = {file: header_of(folder / file) for file in files}
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype | str] = {}
    pieces: dict[str, list[Piece]] = {}
    starts: dict[str, tuple[int, ...]] = {}
    for file, header in headers.items():
        starts = _starts(folder / file, header)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            shape = tuple(entry["shape"])
            start = starts.get(name, (0,) * len(shape))
            if name not in starts:
                pieces[name] = []  # of two shards that hold a tensor whole, the last one counts
            pieces.setdefault(name, []).append(Piece(file, name, start, shape))
            ends = tuple(map(sum, zip(start, shape, strict=True)))
            shapes[name] = tuple(map(max, zip(shapes[name], ends, strict=True))) if len(pieces[name]) > 1 else ends
            dtypes[name] = DTYPES.get(entry["dtype"], entry["dtype"])
    found = Stored(
        CUT if starts else SAFETENSORS,
        shapes,
        dtypes,
        {name: tuple(some) for name, some in pieces.items()},
        partial(_views, headers),
    )
    if starts:
        found.check_tiled(folder)
    return found


def _views(headers: Mapping[str, Mapping[str, Any]], path: Path, file: str, writable: bool) -> dict[str, Tensor]:
    return mapped(path, headers[file], writable)


def _starts(path: Path, header: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Where each piece of a distributed file begins; empty for a file of whole tensors."""
    text = (header.get("__metadata__") or {}).get(SHARDING)
    if text is None:
        return {}
    told = json_of(text, f"{SHARDING} of {path}", {str: {"saved_offsets": [int]}})
    found = {name: tuple(one["saved_offsets"]) for name, one in told.items()}
    for name, entry in header.items():
        if name != "__metadata__" and len(found.get(name, ())) != len(entry["shape"]):
            raise ValueError(f"{SHARDING} of {path} does not say where the piece of {name!r} begins")
    return found


def mapped(path: Path, header: Mapping[str, Any], writable: bool) -> dict[str, Tensor]:
    """Every tensor of a safetensors file as a view of the mapped file; writes reach the file only if ``writable``."""
    with open(path, "r+b" if writable else "rb") as file:
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_COPY
        memory = mmap.mmap(file.fileno(), 0, access=access)
    start = 8 + struct.unpack("<Q", memory[:8])[0]
    return {
        name: viewed(memory, start + entry["data_offsets"][0], DTYPES[entry["dtype"]], entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"] in DTYPES
    }


def viewed(memory: mmap.mmap, offset: int, dtype: torch.dtype, shape: Iterable[int]) -> Tensor:
    """The contiguous tensor at an offset of a mapped file, as a view."""
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(torch.Size(shape), dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(torch.Size(shape))


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
    """Tensor name → shard, as an index says."""
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


def write_tensors(path: Path, tensors: Iterable[tuple[str, str, int, bytes]], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file of vectors, one in memory at a time; ``metadata`` may grow until the last one.

    Args:
        path: the file.
        tensors: name, dtype as the format spells it, how many numbers, and their bytes.
        metadata: texts for the header.
    """
    head: dict[str, Any] = {}
    with ExitStack() as held:
        parts: dict[int, IO[bytes]] = {}  # by the width of a number: the widest first, so that all are aligned
        for name, dtype, count, data in tensors:
            width = DTYPES[dtype].itemsize
            if width not in parts:
                parts[width] = held.enter_context(TemporaryFile(dir=path.parent))
            start = parts[width].tell()
            parts[width].write(data)
            head[name] = {"dtype": dtype, "shape": [count], "data_offsets": [start, start + len(data)]}
        ordered = sorted(parts.items(), reverse=True)
        bases = dict(
            zip(
                (width for width, _ in ordered),
                accumulate((file.tell() for _, file in ordered), initial=0),
                strict=False,
            )
        )
        for entry in head.values():
            base = bases[DTYPES[entry["dtype"]].itemsize]
            entry["data_offsets"] = [base + at for at in entry["data_offsets"]]
        text = json.dumps({"__metadata__": dict(metadata), **head}).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for _, part in ordered:
                part.seek(0)
                shutil.copyfileobj(part, file, 1 << 24)
