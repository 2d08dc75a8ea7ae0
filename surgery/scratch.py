"""Numbers that would not fit in memory: zeros in a temporary file, to be added to like any tensor."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor


def zeros_on_disk(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros ``[count]`` in a file (in ``TMPDIR``) whose name is gone already: its room goes with the tensor.

    They lie in the page cache, not in anonymous memory. The room is taken now: where the disk is full that is an error
    here, and no crash at some later write.
    """
    size = max(count, 1) * dtype.itemsize
    with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
        path = Path(folder) / "numbers"
        with open(path, "wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        return torch.from_file(str(path), shared=True, size=count, dtype=dtype)
