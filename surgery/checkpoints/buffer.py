"""Memory that chunks of checkpoints are read into, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor


class Buffer:
    """Memory that every chunk uses again: new memory for each would cost as much as the arithmetic."""

    def __init__(self) -> None:
        self.held = torch.empty(0)

    def of(self, some: Tensor, columns: bool) -> Tensor:
        """Some numbers in float32, each neuron a run of memory or a column of it."""
        if len(self.held) < some.numel():
            self.held = torch.empty(some.numel())
        flat = self.held[: some.numel()]
        return (flat.view(some.T.shape).T if columns else flat.view(some.shape)).copy_(some)
