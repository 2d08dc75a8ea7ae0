"""What people do today to take back a training stage's damage: pure functions over tensors, and a way to try one.

Each function takes the later and the earlier weights (name → tensor) and a strength, and returns new tensors of the
later weights' dtypes for what it covers; it writes to neither input. Arithmetic is in float32 whatever the dtype
(float64 stays), and bits are copied, not computed, wherever the result is one of the two checkpoints' own numbers.
Neurons need no function here: the selectors of ``surgery`` choose them and ``rollback`` writes them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

Tensors = Mapping[str, Tensor]
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def interpolated(later: Tensors, earlier: Tensors, strength: float) -> dict[str, Tensor]:
    """WiSE-FT: every weight goes the same share of its way back, θB + α (θA − θB).

    Source: Wortsman et al., Robust fine-tuning of zero-shot models (arXiv 2109.01903), with θA in the zero-shot role.
    """
    return {name: _toward(tensor, earlier[name], strength) for name, tensor in later.items()}


def layer_scaled(later: Tensors, earlier: Tensors, first: float) -> dict[str, Tensor]:
    """LiNeS: layer ℓ of L keeps the share first + (1 − first) · ℓ / (L − 1) of δB, all else keeps ``first``.

    So the deepest layer stays the later model's, and shallow ones go back the furthest; first = 1 is the later model.

    Source: Wang et al., LiNeS (arXiv 2410.17146), github.com/wang-kee/LiNeS: its editing of one fine-tuned model
    (β = 1 − α), with θA as the pre-trained one; α, which we sweep, is ``first``.
    """
    deepest = max(layer_of(name) or 0 for name in later)
    depth = {name: (layer_of(name) or 0) / max(deepest, 1) for name in later}
    return {name: _toward(later[name], earlier[name], (1 - first) * (1 - depth[name])) for name in later}


def relative_change(later: Tensors, earlier: Tensors, eps: float = 1e-8) -> dict[str, Tensor]:
    """ParamRestore's score of an entry, |θB − θA| / (|θA| + eps), float32, for the weights of the layers without norms.

    Source: github.com/UmeanNever/ParamRestore (arXiv 2509.16596), its default region "transformer" and its eps. The
    tool ranks in bf16 by default; we rank in float32.
    """
    found = {}
    for name in layer_weights(later):
        before = earlier[name].float()
        found[name] = (later[name].float() - before).abs() / (before.abs() + eps)
    return found


def random_scores(later: Tensors, seed: int) -> dict[str, Tensor]:
    """The control of ``relative_change``: uniform random scores for the same entries."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(later[name].shape, generator=generator) for name in layer_weights(later)}


def entries_restored(later: Tensors, earlier: Tensors, scores: Tensors, fraction: float) -> dict[str, Tensor]:
    """The best-scored round(fraction · n) of the n scored entries, taken over all tensors together, set back to θA.

    Among equals the earlier tensor of ``scores``, then the lower index. Bigger fractions contain smaller ones.
    """
    flat = torch.cat([value.flatten() for value in scores.values()])
    masks = highest(flat, round(fraction * len(flat))).split([value.numel() for value in scores.values()])
    return {
        name: torch.where(mask.view(later[name].shape), earlier[name].to(later[name].dtype), later[name])
        for name, mask in zip(scores, masks, strict=True)
    }


def trimmed(later: Tensors, earlier: Tensors, density: float) -> dict[str, Tensor]:
    """TIES' first step: of each tensor's δB only the round(density · n) largest |δB| stay, the others are set back.

    θA + trim(δB) is θB where an entry stays and θA where it does not. With a single task vector TIES' other two steps,
    electing signs and averaging, change nothing. Among equals the lower index stays.

    Source: Yadav et al., TIES-Merging (arXiv 2306.01708); per tensor, as mergekit does it.
    """
    found = {}
    for name, tensor in later.items():
        size = (tensor.to(wide(tensor)) - earlier[name].to(wide(tensor))).abs().flatten()
        keep = highest(size, round(density * len(size)))
        found[name] = torch.where(keep.view(tensor.shape), tensor, earlier[name].to(tensor.dtype))
    return found


def dropped(later: Tensors, earlier: Tensors, probability: float, seed: int) -> dict[str, Tensor]:
    """DARE: each entry of δB is dropped with a probability p, the others are divided by 1 − p; p = 1 drops all.

    θA + δB / (1 − p) = θB + p / (1 − p) · δB, a step away from θA. A bigger p drops what a smaller one does.

    Source: Yu et al., Language Models are Super Mario (arXiv 2311.03099).
    """
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in later.items():
        drop = torch.rand(tensor.shape, generator=generator) < probability
        away = -probability / (1 - probability) if probability < 1 else 0.0
        found[name] = torch.where(drop, earlier[name].to(tensor.dtype), _toward(tensor, earlier[name], away))
    return found


def highest(flat: Tensor, count: int) -> Tensor:
    """Where the ``count`` highest numbers of a vector lie, as a mask; among equals the lower index."""
    if count <= 0 or count >= len(flat):
        return torch.full((len(flat),), count > 0)
    edge = float(np.partition(flat.numpy(), len(flat) - count)[len(flat) - count])
    chosen = flat > edge
    chosen[(flat == edge).nonzero()[: count - int(chosen.sum()), 0]] = True
    return chosen


def layer_of(name: str) -> int | None:
    """The number of the layer that a parameter belongs to; None outside the layers."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def layer_weights(names: Iterable[str]) -> list[str]:
    """The layers' parameters without norms: what ParamRestore calls the region "transformer".

    Raises:
        ValueError: no name has ``layers.<number>.`` in it.
    """
    found = [name for name in names if layer_of(name) is not None and "norm" not in name]
    if not found:
        raise ValueError("no parameter is called layers.<number>.…: these baselines know the names of Qwen and Llama")
    return found


def layers_by_displacement(later: Tensors, earlier: Tensors) -> list[int]:
    """The layers, the one with the largest ‖δB‖ (over all its parameters) first; among equals the lower."""
    squares: dict[int, float] = {}
    for name, tensor in later.items():
        if (layer := layer_of(name)) is not None:
            change = tensor.double() - earlier[name].double()
            squares[layer] = squares.get(layer, 0.0) + float(change.square().sum())
    return sorted(squares, key=lambda layer: (-squares[layer], layer))


def layers_restored(later: Tensors, earlier: Tensors, layers: Collection[int]) -> dict[str, Tensor]:
    """Whole layers set back: attention, MLP and norms."""
    return {name: earlier[name].to(tensor.dtype) for name, tensor in later.items() if layer_of(name) in layers}


@contextmanager
def edited(model: nn.Module, new: Tensors) -> Iterator[int]:
    """Write new values into a live model's parameters while the body runs; then put the old bits back.

    Yields:
        How many entries have other bits now.

    Raises:
        ValueError: a name, shape or dtype that the model does not have; nothing is written then.
    """
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, tensor in new.items():
        ours = parameters.get(name)
        if ours is None or ours.shape != tensor.shape or ours.dtype != tensor.dtype:
            has = "no such parameter" if ours is None else f"{tuple(ours.shape)} in {ours.dtype}"
            raise ValueError(f"{name}: the new value is {tuple(tensor.shape)} in {tensor.dtype}, the model has {has}")
    old = {name: parameters[name].clone() for name in new}
    try:
        for name, tensor in new.items():
            parameters[name].copy_(tensor)
        yield differing(old, {name: parameters[name] for name in new})
    finally:
        for name, tensor in old.items():
            parameters[name].copy_(tensor)


def differing(one: Tensors, other: Tensors) -> int:
    """How many entries have different bits, over the names of ``other``."""
    return sum(int((_bits(one[name]) != _bits(tensor)).sum()) for name, tensor in other.items())


def _toward(later: Tensor, earlier: Tensor, weight: float) -> Tensor:
    """later + weight · (earlier − later); the ends and entries that agree keep their bits."""
    if weight == 0:
        return later.clone()
    if weight == 1:
        return earlier.to(later.dtype)
    one, other = later.to(wide(later)), earlier.to(wide(later))
    return torch.where(one == other, later, one.lerp(other, weight).to(later.dtype))


def wide(tensor: Tensor) -> torch.dtype:
    """float32, or float64 where the tensor is that."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(_INTEGER[tensor.element_size()])
