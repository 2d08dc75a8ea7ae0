"""What people do with the activations of two domains: RegMean, on one pass over each domain for all its values.

For a linear layer W, least squares over both domains' inputs, ‖(W − WA) XA‖² + λ ‖(W − WB) XB‖², gives
W = WB + (WA − WB) GA (GA + λ GB)⁻¹ with G the mean of x xᵀ: what only the damaged domain's inputs see goes back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from benchmarks.pareto.baselines import layer_of
from benchmarks.pareto.changes import Change, Setting, prepared
from surgery.live import earlier_model
from surgery.live.hooks import evaluating
from surgery.live.prompts import Batch

EPS = 1e-3  # of the mean of the diagonal
SHRUNK = 0.9  # RegMean's own factor of what is off the diagonal


@dataclass(frozen=True)
class Grams:
    """Mean x xᵀ of the layers' inputs, float32: the earlier model's on its domain, the later one's on all others.

    ``reads``: of every linear layer's weight, the name that its input has in both; layers that share one share it.
    """

    earlier: Mapping[str, Tensor]
    later: Mapping[str, Tensor]
    reads: Mapping[str, str]


def grams(setting: Setting) -> Grams:
    """One forward pass of each model over its domain's calibration prompts."""
    others = chain.from_iterable(setting.others.values())
    later, reads = inputs(setting.model, others)
    with earlier_model(setting.run) as model:
        earlier, _ = inputs(model, setting.data)
    return Grams(earlier, later, reads)


@torch.no_grad()
def inputs(model: nn.Module, batches: Iterable[Batch]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Mean x xᵀ over the attended tokens of each input of the layers' linear modules, and who reads it."""
    sums: dict[str, Tensor] = {}
    reads: dict[str, str] = {}
    attended, last, tokens = torch.zeros(0), (torch.zeros(0), ""), 0

    def hear(name: str, x: Tensor) -> None:
        nonlocal last
        if x is not last[0]:
            last = x, name
            rows = x[attended].float()
            sums[name] = sums.get(name, 0) + rows.T @ rows
        reads[name] = last[1]

    linear = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: hear(name, args[0]))
        for name, module in linear.items()
        if layer_of(name) is not None
    ]
    try:
        with evaluating(model):
            for batch in batches:
                attended = batch["attention_mask"].bool()
                tokens += int(attended.sum())
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / tokens for name, total in sums.items()}, reads


def regression(setting: Setting, value: float, draw: int) -> Change:
    """λ = ``value``, with ``EPS`` of the mean diagonal added to what is inverted."""
    return solved(setting, prepared(setting, grams), value, EPS)


def regmean(setting: Setting, value: float, draw: int) -> Change:
    """RegMean as published: what is off the diagonal of G is shrunk to ``SHRUNK`` of it, and nothing is added."""
    return solved(setting, prepared(setting, grams), value, shrunk=SHRUNK)


def solved(setting: Setting, known: Grams, weight: float, eps: float = 0.0, shrunk: float = 1.0) -> dict[str, Tensor]:
    """The layers' linear weights; embeddings and norms stay the later model's.

    Source: Jin et al., RegMean (arXiv 2212.09849), which gives both domains the same weight and averages what is not
    linear; the weight λ is ours.
    """
    found, filters = {}, {"": torch.zeros(0)}
    for name, read in known.reads.items():
        if read not in filters:
            one, other = (
                shrunk * g + (1 - shrunk) * g.diagonal().diag() for g in (known.earlier[read], known.later[read])
            )
            both = one + weight * other
            both.diagonal().add_(eps * both.diagonal().mean())
            filters = {read: torch.linalg.solve(both, one).T}  # of the input at hand alone: 1536² numbers are 9 MB
        later = setting.later[name].float()
        back = (setting.earlier[name].float() - later) @ filters[read]
        found[name] = (later + back).to(setting.later[name].dtype)
    return found
