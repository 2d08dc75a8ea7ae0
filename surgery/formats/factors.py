"""The low-rank change of one parameter, ΔW = scale · B·A, with peft's own arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Factors:
    """What an adapter adds to one parameter.

    ΔW[e] = scale · B[e]·A[e], transposed where the parameter is ``[expert, in, out]``; a matrix is one expert.

    Args:
        parameter: its name in memory.
        a: ``[expert · rank, in]``, the experts' blocks one after the other.
        b: ``[out, rank · expert]``, the experts of each rank beside each other.
        shape: of the parameter: ``[out, in]``, ``[expert, out, in]``, or transposed.
        scale: α / r, or α / √r.
        transposed: whether the parameter has the inputs before the outputs (Conv1D, embeddings, some experts).
        rounded: whether peft rounds ΔW to the parameter's dtype before it adds it (parameters that are targeted by
            name, and embeddings).
        magnitude: DoRA's norm of each output, ``[out]``.
    """

    parameter: str
    a: Tensor
    b: Tensor
    shape: tuple[int, ...]
    scale: float
    transposed: bool = False
    rounded: bool = False
    magnitude: Tensor | None = None

    @property
    def experts(self) -> int:
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def rank(self) -> int:
        return self.a.shape[0] // self.experts

    @cached_property
    def by_expert(self) -> tuple[Tensor, Tensor]:
        """A as ``[expert, rank, in]`` and B as ``[out, rank, expert]``: views."""
        return self.a.unflatten(0, (self.experts, -1)), self.b.unflatten(1, (-1, self.experts))

    def delta(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """ΔW in the shape of the parameter, as peft computes it for a parameter of that dtype."""
        wide = torch.promote_types(dtype, torch.float32)
        # peft multiplies freshly allocated tensors, and a product's last bits may depend on where its factors lie
        a, b = (one.to(device, wide, copy=True) for one in (self.a, self.b))
        if len(self.shape) == 3:
            form = "o r e, e r i -> e i o" if self.transposed else "o r e, e r i -> e o i"
            a, b = replace(self, a=a, b=b).by_expert
            return torch.einsum(form, b, a) * self.scale
        product = b @ a
        return (product.T if self.transposed else product) * self.scale

    def merged(self, before: Tensor, delta: Tensor) -> Tensor:
        """The parameter (or a piece of it) with its ΔW: bit for bit what peft's merge makes of it."""
        if self.magnitude is not None:
            return self._rescaled(before, delta)
        return before.clone().add_(delta.to(before.dtype) if self.rounded else delta)

    def _rescaled(self, before: Tensor, delta: Tensor) -> Tensor:
        assert self.magnitude is not None
        rows = (before.T if self.transposed else before) + (delta.T if self.transposed else delta)
        factor = self.magnitude.to(delta.device, delta.dtype) / torch.linalg.norm(rows, dim=1).to(rows.dtype)
        column = factor[None, :] if self.transposed else factor[:, None]
        merged: Tensor = column * (before + delta)
        return merged.to(before.dtype)

    def squares(self, rows: bool) -> Tensor:
        """The squared norms of ΔW's rows (or columns), ``[expert, size]`` in float64, without ΔW itself.

        Outputs: diag(B·(A·Aᵀ)·Bᵀ)·scale²; inputs: diag(Aᵀ·(Bᵀ·B)·A)·scale².
        """
        a, b = (one.double() for one in self.by_expert)
        b = b.permute(2, 0, 1)  # [expert, out, rank]
        ahead, across = b @ (a @ a.mT), (b.mT @ b) @ a
        found: Tensor = (ahead * b).sum(2) if rows != self.transposed else (a * across).sum(1)
        return torch.clamp(found, min=0) * self.scale**2
