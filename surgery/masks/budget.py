"""Budgets: how many neurons each layer may give (``allocate``) and which ones they are (``top``)."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from surgery.masks.neurons import Neurons

Allocation = Literal["proportional", "global", "uniform"]


def allocate(
    scores: Neurons, budget: float, how: Allocation = "proportional", costs: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Split a budget of k = round(β·N) neurons over the blocks.

    - ``"proportional"``: block ℓ gets k·S_ℓ/ΣS, S_ℓ the sum of its scores; largest remainder, the lower layer first;
      never more than the block has (the excess goes to the other blocks by the same rule).
    - ``"global"``: as many as the block has among the k best of the whole model.
    - ``"uniform"``: β of each block.

    With ``costs``, kinds of unit share one budget of parameters, K = ⌊β·P⌋, P the parameters of all units; a score is
    what a unit as a whole is worth. K is never exceeded:

    - ``"global"``: units in the order of score / cost, up to the first that no longer fits (so a larger budget
      contains a smaller one); ties as above.
    - ``"proportional"`` and ``"uniform"``: block ℓ gets K·S_ℓ/ΣS or K·P_ℓ/P parameters, and as many whole units as
      these pay for. The rest pays for one unit after the other, the block with the largest remainder first, while any
      unit fits.

    Args:
        scores: the allocating score.
        budget: β, the fraction of all neurons of the model, in [0, 1] (with ``costs``: of the parameters of all units).
        how: see above.
        costs: block name → parameters per unit (``Layout.costs``); None counts every unit the same.

    Returns:
        Block name → number of neurons; the numbers add up to round(β·N) exactly (with ``costs``: cost at most K).

    Raises:
        ValueError: β is outside [0, 1]; a proportional split of scores that are negative; scores that are all zero
            (unless the split is uniform); more neurons are asked for than have a score.

    Source: the paper's layer budgets (Appendix D.4, Figure 12); the rule for remainders and caps is ours.

    >>> scores = Neurons({"a": torch.tensor([3.0, 1.0, 0.0, 0.0]), "b": torch.tensor([1.0, 1.0, 1.0, 1.0])})
    >>> allocate(scores, 0.5), allocate(scores, 0.25, how="global")
    ({'a': 2, 'b': 2}, {'a': 2, 'b': 0})
    """
    room = {name: int(scores.available(name).sum()) for name in scores}
    if how not in ("proportional", "global", "uniform"):
        raise ValueError(f'how={how!r}: expected "proportional", "global" or "uniform"')
    if costs is not None:
        return _joint(scores, _checked(scores, budget), how, costs, room)
    k = _neurons(scores, budget)
    if k > sum(room.values()):
        raise ValueError(_too_few(budget, f"{k} neurons", f"{sum(room.values())} of {scores.total}"))
    if how == "global":
        _check_some(scores, 0 < k < scores.total)
        return _per_block(scores, _ranking(scores, scores)[:k])
    if how == "uniform":
        return share(k, {name: float(size) for name, size in scores.sizes.items()}, room)
    return share(k, _sums(scores, 0 < k < scores.total), room)


def _too_few(budget: float, asked: str, there: str) -> str:
    return (
        f"budget {budget:.4g} asks for {asked}, but only {there} have a score "
        f"(the others belong to experts that the data never reached): lower the budget or pass more data"
    )


def _sums(scores: Neurons, needed: bool) -> dict[str, float]:
    """The sum of each block's scores, refused where a proportional split can't use them."""
    if any(bool((value < 0).any()) for value in scores.values()):
        raise ValueError('a proportional allocation needs scores ≥ 0, and some are negative: pass how="global"')
    _check_some(scores, needed)
    return {name: float(value.double().sum()) for name, value in scores.items()}


def _check_some(scores: Neurons, needed: bool) -> None:
    """Refuse scores that are all zero where they are needed: the first neurons would be taken, silently."""
    if needed and not any(bool(value.any()) for value in scores.values()):
        raise ValueError(
            "every score is zero, so the budget can't be split over the layers: are two of the checkpoints "
            "the same, or (with C) is there no neuron on which the two updates point against each other?"
        )


def _joint(
    scores: Neurons, budget: float, how: Allocation, costs: Mapping[str, int], room: Mapping[str, int]
) -> dict[str, int]:
    """The split of a budget of parameters (see ``allocate``)."""
    if set(costs) != set(scores) or any(cost <= 0 for cost in costs.values()):
        raise ValueError(f"costs are for the blocks {sorted(costs)[:3]}…, the scores for {sorted(scores)[:3]}…")
    parameters = {name: costs[name] * size for name, size in scores.sizes.items()}
    there = {name: float(costs[name] * count) for name, count in room.items()}
    k, total = math.floor(budget * sum(parameters.values())), sum(parameters.values())
    if k > sum(there.values()):
        raise ValueError(_too_few(budget, f"{k} parameters", f"units of {sum(there.values()):.0f} of {total}"))
    if how == "global":
        _check_some(scores, 0 < k < total)
        order = _ranking(scores, {name: value.double() / costs[name] for name, value in scores.items()})
        each = torch.cat([torch.full((size,), costs[name]) for name, size in scores.sizes.items()])[order]
        return _per_block(scores, order[: int((each.cumsum(0) <= k).sum())])
    weights = _sums(scores, 0 < k < total) if how == "proportional" else {n: float(p) for n, p in parameters.items()}
    exact = {name: share / costs[name] for name, share in _shares(k, weights, there).items()}
    counts = {name: math.floor(share) for name, share in exact.items()}
    left = k - sum(counts[name] * costs[name] for name in scores)
    # blocks without any weight come last; among equals the lower layer first
    heap = [(weights[name] == 0, counts[name] - exact[name], at, name) for at, name in enumerate(scores)]
    heapq.heapify(heap)
    while heap:
        last, missing, at, name = heapq.heappop(heap)
        if counts[name] < room[name] and costs[name] <= left:
            counts[name] += 1
            left -= costs[name]
            heapq.heappush(heap, (last, missing + 1, at, name))
    return counts


def _per_block(scores: Neurons, order: Tensor) -> dict[str, int]:
    """How many of the whole model's neurons at those indices lie in each block."""
    edges = torch.tensor(list(scores.sizes.values())).cumsum(0)
    counts = torch.bincount(torch.searchsorted(edges, order, right=True), minlength=len(scores)).tolist()
    return dict(zip(scores, counts, strict=True))


def top(scores: Neurons, counts: Mapping[str, int]) -> Neurons:
    """The mask of the highest scores: ``counts[block]`` of each block; ties go to the lower index.

    Args:
        scores: the ranking score.
        counts: block name → how many, as ``allocate`` returns it.

    Raises:
        ValueError: the counts name other blocks, or ask for more neurons than a block has scores.

    Source: the paper, Appendix D.4 (ties: ours).

    >>> top(Neurons({"a": torch.tensor([1.0, 5.0, 5.0])}), {"a": 1})["a"]
    tensor([False,  True, False])
    """
    if not isinstance(counts, Mapping):
        raise ValueError(f"counts={counts!r}: expected how many of each block, as allocate(scores, budget) gives them")
    if set(counts) != set(scores):
        raise ValueError(f"counts are for the blocks {sorted(counts)[:3]}…, the scores for {sorted(scores)[:3]}…")
    masks = {name: _best(name, scores, counts[name]) for name in scores}
    return Neurons(masks, made_by=scores.made_by)


def check_budget(budget: Any) -> None:
    """Raise ``ValueError`` unless a budget is a fraction."""
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 <= budget <= 1:
        kind = "a fraction" if isinstance(budget, int | float) else "a plain number, a fraction"
        raise ValueError(f"budget={budget!r}: expected {kind} of the model's neurons in [0, 1] (0.02 is 2 %)")


def _neurons(scores: Neurons, budget: float) -> int:
    return round(_checked(scores, budget) * scores.total)


def _checked(scores: Neurons, budget: float) -> float:
    if scores.is_mask:
        raise ValueError("expected scores, got a mask")
    check_budget(budget)
    return budget


def _ranking(scores: Neurons, worth: Mapping[str, Tensor]) -> Tensor:
    """Indices into the whole model's neurons, most worth first; ties: lower layer, lower index; missing left out."""
    flat = torch.cat(list(worth.values()))
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


def share(k: int, weights: dict[str, float], room: Mapping[str, int]) -> dict[str, int]:
    """Split k in proportion to the weights, largest remainder first, no part above its room; k ≤ Σ room."""
    exact = _shares(k, weights, {name: float(size) for name, size in room.items()})
    counts = {name: math.floor(share) for name, share in exact.items()}
    open_ = [name for name in weights if counts[name] < room[name] and exact[name] > 0]
    by_remainder = sorted(open_, key=lambda name: -(exact[name] - counts[name]))  # stable: the lower layer first
    for name in by_remainder[: k - sum(counts.values())]:
        counts[name] += 1
    return counts


def _shares(k: int, weights: Mapping[str, float], room: Mapping[str, float]) -> dict[str, float]:
    """k in proportion to the weights, no part above its room; k ≤ Σ room.

    A part whose share exceeds its room is filled and leaves; the others share what is over. Parts of weight zero
    take part only when all others are full (then in proportion to their room), so that the shares always add up.
    """
    exact, over = dict.fromkeys(weights, 0.0), float(k)
    open_ = [name for name in weights if room[name]]
    while over > 0 and open_:
        weighted = [name for name in open_ if weights[name] > 0]
        pool = {name: weights[name] for name in weighted} or {name: room[name] for name in open_}
        full = [name for name in pool if over * pool[name] >= room[name] * math.fsum(pool.values())]
        if not full:
            total = math.fsum(pool.values())
            return {**exact, **{name: over * weight / total for name, weight in pool.items()}}
        exact.update({name: room[name] for name in full})
        over -= sum(room[name] for name in full)
        open_ = [name for name in open_ if name not in full]
    return exact
