"""Deltas: a version folder as slime writes it and SGLang's servers read it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from surgery.formats.patches import runs
from surgery.formats.shards import INDEX, write_tensors

ENCODINGS = ("xor", "overwrite")
_FILE = "model-00000-of-00001.safetensors"


def write_delta(
    folder: Path, versions: Iterable[tuple[str, Tensor, Tensor]], encoding: str, base_version: int
) -> tuple[int, int]:
    """Write what changes from version ``base_version`` to the next one as ``folder/weight_vNNNNNN``.

    Args:
        folder: where to make the version's folder.
        versions: tensor name, the tensor in the base version, the tensor in the new one.
        encoding: "xor": the bytes of the one flipped by those of the other, so that applying it twice takes it back;
            or "overwrite": the count, the positions and the values of the changed bytes.
        base_version: the number of the version that the receiver holds.

    Returns:
        How many numbers and how many tensors change.

    Raises:
        ValueError: a package is missing, or a tensor is too large for the encoding's 32-bit positions.
    """
    zstandard, xxhash = _packages()
    level, checksums, changed = zstandard.ZstdCompressor(level=1), dict[str, str](), [0]

    def packed(name: str, before: Tensor, after: Tensor) -> bytes:
        size, hashed, count, start = before.numel() * before.element_size(), xxhash.xxh3_128(), 0, 0
        stream, pieces, values = level.compressobj(size=size), list[bytes](), list[bytes]()
        if encoding == "overwrite" and size > 1 << 32:
            raise ValueError(f"{name} has {size} bytes, too many for the encoding overwrite: take the encoding xor")
        for old, new in zip(runs(before), runs(after), strict=True):
            hashed.update(new)
            count += int((old != new).sum())
            was, becomes = old.view(np.uint8), new.view(np.uint8)
            if encoding == "xor":
                pieces.append(stream.compress((was ^ becomes).tobytes()))
            else:
                at = np.flatnonzero(was != becomes)
                pieces.append((at + start).astype("<u4").tobytes())
                values.append(becomes[at].tobytes())
            start += len(was)
        changed[0] += count
        if not count:
            return b""
        checksums[name] = hashed.hexdigest()
        if encoding == "xor":
            return b"".join([*pieces, stream.flush()])
        places = b"".join(pieces)
        return bytes(level.compress(np.array([len(places) // 4], "<u4").tobytes() + places + b"".join(values)))

    version = f"{base_version + 1:06d}"
    place = folder / f"weight_v{version}"
    place.mkdir()
    every = ((name, packed(name, before, after)) for name, before, after in versions)
    write_tensors(place / _FILE, ((name, "U8", len(data), data) for name, data in every if data), checksums)
    told = {
        "version": version,
        "base_version": f"{base_version:06d}",
        "delta_encoding": encoding,
        "compression_format": "zstd",
        "checksum_format": "xxh3-128",
    }
    index = {"metadata": told, "weight_map": dict.fromkeys(checksums, _FILE)}
    (place / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return changed[0], len(checksums)


def _packages() -> tuple[Any, Any]:
    try:
        import xxhash
        import zstandard
    except ImportError as error:
        raise ValueError(
            f'patches for slime need the package {error.name}: pip install "surgery[patch]" brings it'
        ) from error
    return zstandard, xxhash
