"""Which neurons two domains share, compared with chance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from surgery.masks import budget
from surgery.masks.neurons import Neurons
from surgery.measure.stability import jaccard
from surgery.tables import Cell, Table, write_json
from surgery.units import kind_of, noun, units_in


@dataclass(frozen=True)
class Share:
    """One block: ``units`` in all, ``amount`` selected (for scores, their sum), and the block's share of the total.

    ``parameters``: those of the selected units, None if their cost is not known.
    """

    block: str
    kind: str
    units: int
    amount: float
    share: float
    parameters: int | None = None


@dataclass(frozen=True)
class Profile:
    """Where in the model a mask or a score lies: per block in the model's order, and per kind of unit.

    ``what`` is "selected units" of a mask or "sum of scores".

    Source: the paper, Figure 12 and its joint MLP + attention selector, in kind.
    """

    what: str
    blocks: tuple[Share, ...]
    kinds: tuple[Share, ...]

    def tables(self) -> tuple[Table, ...]:
        """Per block and per kind."""
        costed = any(one.parameters is not None for one in self.blocks)
        head = ("units", self.what, "share of all (%)", *(("parameters",) if costed else ()))

        def cells(one: Share) -> tuple[Cell, ...]:
            amount = int(one.amount) if self.what == "selected units" else one.amount
            return one.units, amount, 100 * one.share, *((one.parameters,) if costed else ())

        return (
            Table("by block", ("block", *head), tuple((one.block, *cells(one)) for one in self.blocks)),
            Table("by kind", ("kind", *head), tuple((one.kind, *cells(one)) for one in self.kinds)),
        )

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.tables()))

    def save(self, path: str | Path) -> None:
        """Write everything as JSON."""
        write_json(self, path)


def profile(scores_or_mask: Neurons, costs: Mapping[str, int] | None = None) -> Profile:
    """How a mask's units, or the sum of a score, are spread over the blocks and over attention and MLP.

    Args:
        scores_or_mask: a mask, whose units are counted, or scores ≥ 0, which are added up.
        costs: block → parameters per unit, to count the parameters of the mask as well (``Block.width``).

    Raises:
        ValueError: negative scores, or costs for other blocks.

    Source: the paper, Figure 12, in kind.
    """
    held = scores_or_mask
    if not held.is_mask and any(bool((value < 0).any()) for value in held.values()):
        raise ValueError("scores below zero have no share of a sum: select a mask of them first (surgery.top)")
    if costs is not None and (set(costs) != set(held) or not held.is_mask):
        raise ValueError(
            f"costs count the parameters of a mask: expected one per block of one, {sorted(held)[:2]}…, "
            f"got {sorted(costs)[:2]}…"
        )
    amounts = {block: float(value.double().sum()) for block, value in held.items()}
    total = sum(amounts.values())
    blocks = tuple(
        Share(block, kind_of(block), held.sizes[block], amount, amount / total if total else 0.0,
              None if costs is None else int(amount) * costs[block])
        for block, amount in amounts.items()
    )  # fmt: skip
    kinds = tuple(_kind(kind, [one for one in blocks if one.kind == kind]) for kind in units_in(held))
    return Profile("selected units" if held.is_mask else "sum of scores", blocks, kinds)


def _kind(kind: str, blocks: list[Share]) -> Share:
    parameters = [one.parameters for one in blocks if one.parameters is not None]
    return Share(
        noun((kind,)),
        kind,
        sum(one.units for one in blocks),
        sum(one.amount for one in blocks),
        sum(one.share for one in blocks),
        sum(parameters) if parameters else None,
    )


Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class LayerOverlap:
    """The overlap inside one block, of the top share of that block's own neurons.

    ``neurons``: those that have a score in every domain; ``jaccard`` and ``chance``: ``[domain][domain]``.
    """

    block: str
    neurons: int
    jaccard: Matrix
    chance: Matrix


@dataclass(frozen=True)
class Overlap:
    """The overlap of the domains' top neurons: Jaccard = |a ∩ b| / |a ∪ b|, in [0, 1], compared with chance.

    ``jaccard``: of each domain's top share of the whole model's neurons, ``[domain][domain]`` in the order of
    ``domains``; ``chance``: expected of two independent uniform draws of as many neurons; ``chance_in_layers``:
    expected of draws that take as many neurons from every layer as the domains do, so that overlap above it is more
    than a preference for the same layers. ``sizes``: the number of neurons in each domain's set; ``layers``: the top
    share of every block by itself. ``neurons``: how many have a score in every domain; ``without_score``: how many have
    none in some domain (experts that no token reached), and are in no set.

    Source: the paper, Section 4 (Jaccard of changed and of active neurons); chance and the per-layer sets are ours.
    """

    top: float
    domains: tuple[str, ...]
    neurons: int
    without_score: int
    sizes: Mapping[str, int]
    jaccard: Matrix
    chance: Matrix
    chance_in_layers: Matrix
    layers: tuple[LayerOverlap, ...] = field(repr=False)

    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Every two domains, in order."""
        return tuple(combinations(self.domains, 2))

    def of(self, one: str, other: str) -> float:
        """The whole model's Jaccard of two domains."""
        return self.jaccard[self.domains.index(one)][self.domains.index(other)]

    @property
    def mean(self) -> float:
        """The whole model's Jaccard, the mean over all pairs of different domains."""
        return mean([self.of(*pair) for pair in self.pairs()])

    def tables(self) -> tuple[Table, ...]:
        """Each pair of domains in the whole model, and in each layer."""
        at = {pair: tuple(self.domains.index(one) for one in pair) for pair in self.pairs()}
        rows = []
        for (one, other), (i, j) in at.items():
            whole = (self.jaccard[i][j], self.chance[i][j], self.chance_in_layers[i][j])
            inside = (
                mean([layer.jaccard[i][j] for layer in self.layers]),
                mean([one.chance[i][j] for one in self.layers]),
            )
            rows.append((f"{one}–{other}", *whole, *inside))
        head = ("pair", "whole model", "chance", "chance, layers kept", "mean over layers", "chance in a layer")
        title = f"Jaccard of the top {100 * self.top:g} % of {self.neurons:,} neurons"
        short = [f"{name} {size:,}" for name, size in self.sizes.items() if size < round(self.top * self.neurons)]
        told = f" (scores above zero: {', '.join(short)})" if short else ""
        told += f"; {self.without_score:,} without a score" if self.without_score else ""
        layers = Table(
            f"Jaccard of the top {100 * self.top:g} % of each layer",
            ("block", "neurons", *(f"{one}–{other}" for one, other in at), "chance"),
            tuple(
                (layer.block, layer.neurons, *(layer.jaccard[i][j] for i, j in at.values()),
                 mean([layer.chance[i][j] for i, j in at.values()]))
                for layer in self.layers
            ),
        )  # fmt: skip
        return Table(title + told, head, tuple(rows)), layers

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.tables()))

    def save(self, path: str | Path) -> None:
        """Write everything as JSON."""
        write_json(self, path)


def overlap(scores: Mapping[str, Neurons], top: float) -> Overlap:
    """The overlap of the top neurons of several domains, for the whole model and layer by layer.

    Of changed neurons (the paper's 10 %): ``overlap({name: magnitude(s) for name, s in run.steps().items()}, 0.1)``.
    Of active ones (its 5 %): ``overlap({name: activation(model, data[name]) for name in data}, 0.05)``.

    Whole model: the round(top · N) best of all N neurons, whatever layer they are in (the paper's definition according
    to its summary). Layers: the round(top · n) best of each block's n. A neuron with a score of 0 or less is in no set,
    so that neurons without change do not count as changed; the set may then be smaller.

    Args:
        scores: domain → scores of one model, larger = more changed or more active. At least two domains.
        top: the share of neurons that a set has, in (0, 1].

    Returns:
        An ``Overlap``; ``surgery.plots.overlap_matrix`` draws it.

    Raises:
        ValueError: fewer than two domains, masks, scores of different models, ``top`` outside (0, 1], or a domain
            without a score above zero.

    Source: the paper, Section 4; ties, chance and per-layer sets are ours.
    """
    if len(scores) < 2:
        raise ValueError(f"overlap compares two or more domains, got {list(scores) or 'none'}")
    if not (isinstance(top, int | float) and 0 < top <= 1):
        raise ValueError(f"top={top!r}: expected a share of the neurons in (0, 1] (0.1 is 10 %)")
    known = _comparable(scores)
    sizes = {block: int(has.sum()) for block, has in known.items()}
    total = sum(sizes.values())
    if not total:
        raise ValueError("no neuron has a score in every domain")
    if round(top * total) < 1:
        raise ValueError(f"top={top!r} selects none of {total} neurons: expected {1 / total:.2g} or more")
    first = next(iter(scores.values()))
    whole = {name: _top_of_all(name, one, round(top * total), known) for name, one in scores.items()}
    per_layer = {
        name: budget.top(_only(one, known), {block: _share_of(one[block][known[block]], top) for block in one})
        for name, one in scores.items()
    }
    return Overlap(
        top,
        tuple(scores),
        total,
        first.total - total,
        {name: sum(mask.count().values()) for name, mask in whole.items()},
        _matrix(whole, jaccard),
        _matrix(whole, lambda a, b: chance_jaccard(total, sum(a.count().values()), sum(b.count().values()))),
        _matrix(whole, lambda a, b: _chance_in_layers(a, b, sizes)),
        tuple(_layer(block, per_layer, sizes[block]) for block in first if sizes[block]),
    )


def _comparable(scores: Mapping[str, Neurons]) -> dict[str, Tensor]:
    """The neurons of each block that have a score in every domain."""
    (name, first), *others = scores.items()
    for who, one in scores.items():
        if one.is_mask:
            raise ValueError(
                f"{who!r} is a mask: overlap ranks scores (two masks are compared by surgery.measure.jaccard)"
            )
    for _, one in others:
        one.require(first.sizes, f"the scores of {name!r}")
    return {block: torch.stack([one.available(block) for one in scores.values()]).all(0) for block in first}


def _only(scores: Neurons, known: Mapping[str, Tensor]) -> Neurons:
    return Neurons(dict(scores), missing={block: ~has for block, has in known.items()})


def _share_of(scores: Tensor, top: float) -> int:
    """How many the top share is, of those above zero."""
    return min(round(top * len(scores)), int((scores > 0).sum()))


def _top_of_all(name: str, scores: Neurons, count: int, known: Mapping[str, Tensor]) -> Neurons:
    positive = sum(int((scores[block][has] > 0).sum()) for block, has in known.items())
    if not positive:
        raise ValueError(f"no score of {name!r} is above zero: did nothing change, or is the same checkpoint in twice?")
    only = _only(scores, known)
    return budget.top(only, budget.allocate(only, min(count, positive) / scores.total, "global"))


def _matrix(masks: Mapping[str, Neurons], function: Callable[[Neurons, Neurons], float]) -> Matrix:
    """A function of every two masks; of a mask with itself 1, by definition."""
    return tuple(tuple(1.0 if one == other else function(masks[one], masks[other]) for other in masks) for one in masks)


def _layer(block: str, masks: Mapping[str, Neurons], size: int) -> LayerOverlap:
    here = {name: Neurons({block: mask[block]}) for name, mask in masks.items()}
    return LayerOverlap(
        block,
        size,
        _matrix(here, jaccard),
        _matrix(here, lambda a, b: chance_jaccard(size, a.count()[block], b.count()[block])),
    )


def chance_jaccard(neurons: int, a: int, b: int) -> float:
    """The expected Jaccard of two independent uniform draws of ``a`` and ``b`` out of so many neurons, in [0, 1].

    E[x / (a + b − x)] with x hypergeometric, summed over every x: no approximation. 1 where both are empty.

    Raises:
        ValueError: more are drawn than there are.

    >>> round(chance_jaccard(1000, 100, 100), 3)
    0.053
    """
    if not 0 <= min(a, b) <= max(a, b) <= neurons:
        raise ValueError(f"{a} and {b} of {neurons} neurons: expected draws of 0 to {neurons}")
    if a == b == 0:
        return 1.0
    x = torch.arange(max(0, a + b - neurons), min(a, b) + 1, dtype=torch.float64)

    def log_choose(n: float, k: Tensor) -> Tensor:
        return torch.lgamma(torch.tensor(n + 1.0)) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)

    weights = (log_choose(a, x) + log_choose(neurons - a, b - x)).softmax(0)
    return float((weights * x / (a + b - x)).sum())


def _chance_in_layers(a: Neurons, b: Neurons, sizes: Mapping[str, int]) -> float:
    """As ``chance_jaccard``, of draws with as many neurons of each layer: E[x] / (a + b − E[x]), an approximation."""
    ours, theirs = a.count(), b.count()
    both = sum(ours[block] * theirs[block] / size for block, size in sizes.items() if size)
    return both / (sum(ours.values()) + sum(theirs.values()) - both)
