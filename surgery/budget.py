"""Budgets: how many neurons each layer may give (``allocate``) and which ones they are (``top``)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from surgery.neurons import Neurons

Allocation = Literal["proportional", "global", "uniform"]


def allocate(scores: Neurons, budget: float, how: Allocation = "proportional") -> dict[str, int]:
    """Split a budget of k = round(β·N) neurons over the blocks.

    - ``"proportional"``: block ℓ gets k·S_ℓ/ΣS, S_ℓ the sum of its scores; largest remainder, the lower layer first;
      never more than the block has (what is over goes to the others by the same rule).
    - ``"global"``: as many as the block has among the k best of the whole model.
    - ``"uniform"``: β of each block.

    Args:
        scores: the allocating score.
        budget: β, the fraction of all MLP neurons of the model, in [0, 1].
        how: see above.

    Returns:
        Block name → number of neurons; the numbers add up to round(β·N) exactly.

    Raises:
        ValueError: β is outside [0, 1]; a proportional split of scores that are negative or all zero; more neurons
            are asked for than have a score.

    Source: the paper's layer budgets (Appendix D.4, Figure 12); the rule for remainders and caps is ours.

    >>> scores = Neurons({"a": torch.tensor([3.0, 1.0, 0.0, 0.0]), "b": torch.tensor([1.0, 1.0, 1.0, 1.0])})
    >>> allocate(scores, 0.5), allocate(scores, 0.25, how="global")
    ({'a': 2, 'b': 2}, {'a': 2, 'b': 0})
    """
    k = _neurons(scores, budget)
    room = {name: int(scores.available(name).sum()) for name in scores}
    if k > sum(room.values()):
        raise ValueError(
            f"budget {budget:.4g} asks for {k} neurons, but only {sum(room.values())} of {scores.total} have a score "
            f"(the others belong to experts that the data never reached): lower the budget or pass more data"
        )
    if how == "global":
        order = _ranking(scores)[:k]
        edges = torch.tensor(list(scores.sizes.values())).cumsum(0)
        counts = torch.bincount(torch.searchsorted(edges, order, right=True), minlength=len(scores)).tolist()
        return dict(zip(scores, counts, strict=True))
    if how == "uniform":
        return _share(k, {name: float(size) for name, size in scores.sizes.items()}, room)
    if how != "proportional":
        raise ValueError(f'how={how!r}: expected "proportional", "global" or "uniform"')
    if any(bool((value < 0).any()) for value in scores.values()):
        raise ValueError('a proportional allocation needs scores ≥ 0, and some are negative: pass how="global"')
    sums = {name: float(value.double().sum()) for name, value in scores.items()}
    if sum(sums.values()) == 0 and 0 < k < scores.total:
        raise ValueError(
            "every score is zero, so nothing says which layer should get the budget: are two of the checkpoints "
            "the same, or (with C) is there no neuron on which the two updates point against each other?"
        )
    return _share(k, sums, room)


def top(scores: Neurons, counts: Mapping[str, int]) -> Neurons:
    """The mask of the highest scores: ``counts[block]`` of each block; among equals the lower index is taken.

    Args:
        scores: the ranking score.
        counts: block name → how many, as ``allocate`` returns it.

    Raises:
        ValueError: the counts name other blocks, or ask for more neurons than a block has scores.

    Source: the paper, Appendix D.4 (ties: ours).

    >>> top(Neurons({"a": torch.tensor([1.0, 5.0, 5.0])}), {"a": 1})["a"]
    tensor([False,  True, False])
    """
    if set(counts) != set(scores):
        raise ValueError(f"counts are for the blocks {sorted(counts)[:3]}…, the scores for {sorted(scores)[:3]}…")
    masks = {name: _best(name, scores, counts[name]) for name in scores}
    return Neurons(masks, made_by=scores.made_by)


def _neurons(scores: Neurons, budget: float) -> int:
    if scores.is_mask:
        raise ValueError("expected scores, got a mask")
    if not (isinstance(budget, int | float) and 0 <= budget <= 1):
        raise ValueError(f"budget={budget!r}: expected a fraction of the model's neurons in [0, 1] (0.02 is 2 %)")
    return round(budget * scores.total)


def _ranking(scores: Neurons) -> Tensor:
    """Indices into the whole model's neurons, best first; ties: lower layer, lower index; missing ones left out."""
    flat = torch.cat(list(scores.values()))
    has = torch.cat([scores.available(name) for name in scores]).nonzero().flatten()
    return has[flat[has].sort(descending=True, stable=True).indices]


def _best(name: str, scores: Neurons, count: int) -> Tensor:
    has = scores.available(name).nonzero().flatten()
    if not 0 <= count <= len(has):
        raise ValueError(f"block {name!r}: asked for {count} neurons, and {len(has)} have a score")
    chosen = has[scores[name][has].sort(descending=True, stable=True).indices[:count]]
    mask = torch.zeros(scores[name].numel(), dtype=torch.bool)
    mask[chosen] = True
    return mask


def _share(k: int, weights: dict[str, float], room: dict[str, int]) -> dict[str, int]:
    """Split k in proportion to the weights, largest remainder first, no part above its room; k ≤ Σ room.

    A part whose share exceeds its room is filled and leaves; the others share what is over. Parts of weight zero
    take part only when all others are full (then in proportion to their room), so that the counts always add up.
    """
    counts = dict.fromkeys(weights, 0)
    open_ = [name for name in weights if room[name]]
    while k and open_:
        weighted = [name for name in open_ if weights[name] > 0]
        pool = {name: weights[name] for name in weighted} or {name: float(room[name]) for name in open_}
        full = [name for name in pool if k * pool[name] >= room[name] * math.fsum(pool.values())]
        if full:
            for name in full:
                counts[name] = room[name]
            k -= sum(room[name] for name in full)
            open_ = [name for name in open_ if name not in full]
            continue
        exact = {name: k * weight / math.fsum(pool.values()) for name, weight in pool.items()}
        counts.update({name: math.floor(share) for name, share in exact.items()})
        rest = k - sum(counts[name] for name in pool)
        by_remainder = sorted(pool, key=lambda name: -(exact[name] - counts[name]))  # stable: the lower layer first
        for name in by_remainder[:rest]:
            counts[name] += 1
        break
    return counts
