"""Whether tensors are stored as plain numbers, by their names and dtypes alone."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

REAL = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_PACKED = re.compile(r"\.(qweight|weight_packed|W_q|codebooks)$")
_SCALES = re.compile(r"_scale(_inv|s)?$")


def quantised(what: str) -> ValueError:
    """The refusal of quantised weights; ``what`` says where they were seen."""
    return ValueError(
        f"{what}: quantised weights can't be read or reverted exactly. Take the checkpoint from before quantisation, "
        f"and quantise the result again"
    )


def check_stored(tensor: str, dtype: torch.dtype | str, name: str) -> None:
    """Raise ``ValueError`` unless a tensor whose numbers are needed is float16, bfloat16, float32 or float64.

    float8 is refused with or without scales beside it: they may lie elsewhere, and no model computes in it alone.
    """
    if dtype not in REAL:
        raise quantised(f"{tensor!r} of {name} is stored as {dtype}")


def check_all_stored(dtypes: Mapping[str, torch.dtype | str], name: str) -> None:
    """Raise ``ValueError`` where any weight of a source is quantised, whatever is needed of it.

    Integer buffers are no weights: attention masks, positions, counters.
    """
    for tensor, dtype in dtypes.items():
        if tensor.endswith(".weight"):
            check_stored(tensor, dtype, name)
        if _PACKED.search(tensor):
            raise quantised(f"{tensor!r} of {name} holds packed numbers")
        of = _SCALES.sub("", tensor)
        if of != tensor and {of, f"{of}_blocks"} & dtypes.keys():
            raise quantised(f"{tensor!r} of {name} holds scales, which the numbers beside it have to be multiplied by")
