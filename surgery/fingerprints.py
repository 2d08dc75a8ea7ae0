"""What tells one checkpoint from another, without reading all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.checkpoint import Checkpoint
from surgery.opening import Weights

_SAMPLES = 1024


def fingerprint(weights: Weights) -> dict[str, Any]:
    """What tells a checkpoint from another: its name and, for a folder, a sha256 of every weight file.

    The hash is taken over the file's header, its size and 1024 evenly spaced runs of 4 KiB: two training stages never
    agree on those, and hashing all of a large checkpoint would cost more than rolling it back.
    """
    if not isinstance(weights.tensors, Checkpoint):
        return {"name": weights.name}
    folder, files = weights.tensors.folder, sorted(weights.tensors.headers)
    found = {"name": folder.resolve().name, "sha256_of": "header, size and 1024 samples of 4 KiB"}
    return {**found, "sha256": {file: _sha256(folder / file) for file in files}}


def _sha256(path: Path, samples: int = _SAMPLES, run: int = 4096) -> str:
    digest, size = hashlib.sha256(str(path.stat().st_size).encode()), path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        digest.update(prefix + file.read(int.from_bytes(prefix, "little")))
        start = file.tell()
        step = max(run, (size - start) // samples)
        for at in range(start, size, step):
            file.seek(at)
            digest.update(file.read(run))
    return digest.hexdigest()


def known(weights: Weights) -> dict[str, Any]:
    """The fingerprint, and of live weights what ``sampled`` says of them, since a name tells them from nothing."""
    found = fingerprint(weights)
    return (
        found if "sha256" in found else {**found, "sampled": sampled(one for _, one in sorted(weights.tensors.items()))}
    )


def sampled(tensors: Iterable[Tensor]) -> str:
    """What tells live weights from others: a sha256 of 1024 evenly spaced values of every tensor.

    The values are rounded to bf16, so that a checkpoint is the same one in bf16 and in float32, on a CPU and on a GPU.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        if tensor.is_meta:  # offloaded: its values are elsewhere
            continue
        places = torch.linspace(0, max(0, tensor.numel() - 1), min(_SAMPLES, tensor.numel()), dtype=torch.float64)
        some = tensor.detach()[torch.unravel_index(places.long().to(tensor.device), tensor.shape)]
        digest.update(some.bfloat16().cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
