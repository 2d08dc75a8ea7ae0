"""Between the CPU and a GPU: what is sent is not waited for, and what comes back comes in one piece."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; where that is a GPU, the CPU does not wait until it has done all it was asked to do."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def fetched(numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU: all of one dtype that lie on one device come in one copy."""
    homes: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, one in numbers.items():
        homes.setdefault((one.device, one.dtype), []).append(name)
    found: dict[str, Tensor] = {}
    for names in homes.values():
        some = [numbers[name] for name in names]
        flat = torch.cat([one.flatten() for one in some]).cpu().split([one.numel() for one in some])
        found |= {name: one.view(like.shape) for name, one, like in zip(names, flat, some, strict=True)}
    return {name: found[name] for name in numbers}
