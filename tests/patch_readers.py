"""Readers of patches written from the formats' descriptions alone: nothing here comes from the package."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
import zstandard
from safetensors import safe_open
from torch import Tensor

Tensors = dict[str, Tensor]
WIDTHS = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8}
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def tensors_in(folder: Path) -> Tensors:
    """All tensors of a folder's shards."""
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def raw(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A tensor's bytes."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().copy()


def back(data: np.ndarray[Any, Any], like: Tensor) -> Tensor:
    return torch.from_numpy(data).view(like.dtype).view(like.shape)


def read_slime(source: Path, base: Tensors, holds: str = "000000") -> Tensors:
    """What a receiver holds once it pulls the only version in ``source``: wrong bases and bytes are refused."""
    (place,) = source.iterdir()
    index = json.loads((place / "model.safetensors.index.json").read_text())
    told = index["metadata"]
    assert place.name == f"weight_v{told['version']}"
    assert told["base_version"] == holds, "another base"
    assert (told["compression_format"], told["checksum_format"]) == ("zstd", "xxh3-128")
    assert {path.name for path in place.glob("*.safetensors")} == set(index["weight_map"].values()) or not index[
        "weight_map"
    ]
    found = dict(base)
    for name, file in index["weight_map"].items():
        with safe_open(place / file, "np") as shard:
            assert shard.get_slice(name).get_dtype() == "U8"
            packed, checksum = shard.get_tensor(name).tobytes(), shard.metadata()[name]
        delta = np.frombuffer(zstandard.ZstdDecompressor().decompress(packed), np.uint8)
        data = raw(base[name])
        if told["delta_encoding"] == "xor":
            data ^= delta
        else:
            count = int(delta[:4].view("<u4")[0])
            assert len(delta) == 4 + 5 * count
            at, values = delta[4 : 4 + 4 * count].view("<u4"), delta[4 + 4 * count :]
            data[at] = values
        assert xxhash.xxh3_128(data.tobytes()).hexdigest() == checksum, f"{name}: other bytes"
        found[name] = back(data, base[name])
    return found


def read_vllm(folder: Path, base: Tensors) -> Tensors:
    """What flat indices and values make of a checkpoint, under the conditions that vLLM's loader sets."""
    told = json.loads((folder / "patch.json").read_text())
    assert told["format"] == "vllm"
    found = dict(base)
    with safe_open(folder / "patch.safetensors", "pt") as file:
        assert set(file.keys()) == {f"{name}.{what}" for name in told["tensors"] for what in ("indices", "values")}
        for name, one in told["tensors"].items():
            indices, values = file.get_tensor(f"{name}.indices"), file.get_tensor(f"{name}.values")
            assert list(base[name].shape) == one["shape"]
            assert values.dtype == base[name].dtype == DTYPES[one["dtype"]]
            assert indices.dtype in (torch.int32, torch.int64)
            assert indices.ndim == values.ndim == 1
            assert len(indices) == len(values) == len(indices.unique())
            assert not values.isnan().any()
            assert hashlib.sha256(raw(base[name]).tobytes()).hexdigest() == one["before"]["tensor"], "another base"
            flat = base[name].flatten().clone()
            flat[indices.long()] = values
            found[name] = flat.view(base[name].shape)
            assert hashlib.sha256(raw(found[name]).tobytes()).hexdigest() == one["after"]["tensor"]
    return found


def read_surgery(folder: Path, base: Tensors) -> Tensors:
    """What the library's own patch says, read with struct, zlib and numpy."""
    told = json.loads((folder / "patch.json").read_text())
    data = (folder / "patch.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, start = json.loads(data[8 : 8 + length]), 8 + length
    found = dict(base)
    for name, one in told["tensors"].items():
        low, high = header[name]["data_offsets"]
        planes = np.frombuffer(zlib.decompress(data[start + low : start + high]), np.uint8)
        count, width = one["numbers"], WIDTHS[one["dtype"]]
        gaps = sum(planes[byte * count : (byte + 1) * count].astype(np.int64) << 8 * byte for byte in range(4))
        flips = planes[4 * count :].reshape(width, count).T  # [number, byte]
        old = raw(base[name])
        old.reshape(-1, width)[np.cumsum(gaps)] ^= flips
        found[name] = back(old, base[name])
    return found
