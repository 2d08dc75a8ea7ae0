"""What people do with the gradients of two domains: CRANE, its gate alone and its whole merge.

The improvement that going back promises a domain is −g · (θA − θB) = g · δB, with g the gradient of its cross-entropy
at the later model: ``entry_gains`` of the library with that loss, weight by weight of MLPs and attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from benchmarks.pareto.baselines import highest, layer_of, wide
from benchmarks.pareto.changes import Change, Reversal, Setting, prepared
from surgery.layout.slots import Layout
from surgery.live.losses import cross_entropy
from surgery.scores.weights import best, entries_of, entry_gains, starts_of
from surgery.units import Units, kind_of

UNITS: Units = ("mlp", "kv_group")  # together they are all weights of the layers' matrices


@dataclass(frozen=True)
class Gate:
    """max(0, min of both domains' improvements): ``flat`` ``[weight]``, part after part of ``shapes``."""

    flat: Tensor
    shapes: dict[str, tuple[int, int]]
    layout: Layout


def gate(setting: Setting) -> Gate:
    """The damaged domain's improvement and that of all other domains together, the lesser of the two.

    Source: Zhu et al., CRANE (arXiv 2605.14084), github.com/rpi-nsl/CRANE, ``crane_s_reason_auto.py``: its Conservative
    Taylor Gate, with the later model in the role of the one that is edited and δ = θA − θB. There a model's own answers
    are the targets, here the calibration prompts' responses.
    """
    others = list(chain.from_iterable(setting.others.values()))
    found = entry_gains(setting.run, setting.data, loss=cross_entropy, units=UNITS)
    kept = entry_gains(setting.run, others, loss=cross_entropy, units=UNITS)
    torch.minimum(found.flat, kept.flat, out=found.flat).clamp_(min=0)
    return Gate(found.flat, found.shapes, setting.run.live(units=UNITS)[0].layout)


def gated(setting: Setting, value: float, draw: int) -> Change:
    """The best-gated round(value · n) of the n weights, set back; fewer where fewer have a positive gate."""
    found = prepared(setting, gate)
    return Reversal(entries_of(best(found.flat, round(value * len(found.flat))), found.shapes))


def crane(setting: Setting, value: float, draw: int) -> Change:
    """θB + α S T(δ): T doubles the half of a matrix's δ = θA − θB that is larger, and drops the rest.

    S is 1 for a layer's MLP; for its attention the ratio of Σ gate / ‖θB‖ there to that of the MLP. α is ``value``.

    Source: as ``gate``, ``crane_merge.py`` and ``crane_denoise.py``. Left out is its third part, the projection away
    from tool-call and chat-template tokens. Embeddings and norms stay the later model's.
    """
    share = shares(prepared(setting, gate), setting)
    found = {}
    for name, factor in share.items():
        later = setting.later[name].to(wide(setting.later[name]))
        delta = setting.earlier[name].to(later.dtype) - later
        large = highest(delta.abs().flatten(), delta.numel() // 2).view(delta.shape)
        found[name] = (later + value * factor * 2 * torch.where(large, delta, 0)).to(setting.later[name].dtype)
    return found


def shares(found: Gate, setting: Setting) -> dict[str, float]:
    """S of every tensor of the units."""
    starts, raw, tensors = starts_of(found.shapes), {}, {}
    for block in found.layout.blocks:
        key = layer_of(block.name), kind_of(block.name)
        tensors[key] = sorted({slot.tensor for slot in block.slots})
        parts = [f"{block.name}/{part}" for part in block.parts]
        gates = [found.flat[starts[part] :][: math.prod(found.shapes[part])] for part in parts]
        norm = math.sqrt(sum(float(setting.later[name].double().square().sum()) for name in tensors[key]))
        raw[key] = sum(float(one.sum(dtype=torch.float64)) for one in gates) / norm
    factor = {key: 1.0 if key[1] == "mlp" else raw[key] / (raw[key[0], "mlp"] or 1e-12) for key in raw}
    return {name: factor[key] for key, names in tensors.items() for name in names}
