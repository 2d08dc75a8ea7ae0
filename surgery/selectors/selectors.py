"""Selectors: from a trajectory and some prompts to a mask."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch

from surgery.checkpoints.trajectory import Trajectory
from surgery.live.losses import Divergence, Loss, check_loss
from surgery.masks.budget import Allocation, allocate, check_budget, top
from surgery.masks.mask import Mask
from surgery.masks.neurons import Neurons
from surgery.scores.amc import activation, conflict, costs_of, magnitude, product, worth
from surgery.scores.damage import damage, promised, reversal_cost
from surgery.scores.memory import remembered
from surgery.selectors.rounds import (
    ROUNDS,
    at_random,
    by_damage,
    by_magnitude,
    check_magnitude,
    check_rounds,
    check_rounds_how,
)
from surgery.selectors.settings import (
    Data,
    check_how,
    check_letters,
    check_units,
    damage_named,
    letters_named,
    named,
    signed,
    units_asked,
)
from surgery.units import Units, single


@runtime_checkable
class Selector(Protocol):
    """Anything with ``select``: a trajectory and prompts in, a mask out.

    Your own selector takes eight lines; with a field ``budget`` a sweep can run it at many budgets::

        @dataclass(frozen=True)
        class Largest:
            budget: float

            def select(self, run, data=None):
                M = magnitude(run)
                return top(M, allocate(M, self.budget, how="global"))
    """

    def select(self, run: Trajectory, data: Data | None = None) -> Mask:
        """The mask of what to revert: bool Neurons, or Entries. Stores nothing."""
        ...


@dataclass(frozen=True)
class AMCSelector:
    """The paper's selector: rank by one product of A, M and C, and split the budget over layers by another.

    Args:
        budget: β, the fraction of all MLP neurons (or of other units; with several kinds, of their parameters; or of
            the candidate weights), in [0, 1].
        rank: which of the letters A, M, C make the ranking score, as a product ("AMC", "MC", "A", ...).
        allocate: the same for the score that splits the budget over layers.
        how: "proportional", "global" or "uniform" (see ``surgery.allocate``).
        units: "mlp", "kv_group", "value_channel" or a tuple (see ``find_layout``); or "weight", single weights of MLPs
            and KV groups; or ("mlp", "weight"), single weights of MLPs.

    A and M are divided by their layer's mean, and C is used as it is. Several kinds of unit share a budget of
    parameters. Then C is divided by the mean of its kind, the score is what one parameter of a unit is worth, and the
    unit is worth score × parameters.

    Single weights are ranked by M alone, rank="M" and allocate="M": abs(δB,w) divided by its layer's mean. ``select``
    then returns Entries. A weight that did not change is never taken, so there may be fewer than the budget allows.

    Raises:
        ValueError: a setting is invalid; from ``select``: C without a base checkpoint, A without data, and as the
            scores.

    Source: the paper, Appendix D.4. The division by the layer's mean and single weights are ours.
    """

    budget: float
    rank: str = "AMC"
    allocate: str = "AMC"
    how: Allocation = "proportional"
    units: Units = "mlp"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_letters("rank", self.rank)
        check_letters("allocate", self.allocate)
        check_how(self.how)
        check_units(self.units)
        if single(self.units):
            check_magnitude(self.rank, self.allocate)

    @property
    def name(self) -> str:
        """What a table calls it."""
        own, plain = letters_named(self.rank, self.allocate), "global" if single(self.units) else "proportional"
        return named(own if self.how == plain else f"{own} ({self.how})", self.units)

    @remembered()
    def select(self, run: Trajectory, data: Data | None = None) -> Mask:
        """The mask; ``data`` may be left out where neither score contains A."""
        run.check_whole()
        if single(self.units):
            units = units_asked(run, self.units)
            return signed(by_magnitude(run, self.budget, self.how, units), self, run, units)
        units, letters = run.kinds(self.units), set(self.rank + self.allocate)
        if "A" in letters and data is None:
            raise ValueError("A is measured on prompts of the damaged domain: pass data=load_prompts(file, tokenizer)")
        if "C" in letters and run.base is None:
            raise ValueError(
                'C needs the base checkpoint: pass Trajectory(base=...), or choose letters without C ("AM")'
            )
        found = {}
        if "M" in letters:
            found["M"] = magnitude(run, units=units)
        if "C" in letters:
            found["C"] = conflict(run, units=units)
        if "A" in letters and data is not None:
            found["A"] = activation(run.load(), data, layout=run.layout, units=units)
        costs = costs_of(run, units)
        spent = worth(product(found, self.allocate, costs is not None), costs)
        counts = allocate(spent, self.budget, how=self.how, costs=costs)
        return signed(top(product(found, self.rank, costs is not None), counts), self, run, units)


@dataclass(frozen=True)
class DamageSelector:
    """Rank by D, the damage score: the first-order gain of reverting a unit, on the damaged domain.

    Args:
        budget: β, the fraction of all MLP neurons (or other units, or candidate weights), in [0, 1].
        how: "global" (the best of the whole model), "proportional" or "uniform" (see ``surgery.allocate``). Negative
            scores (neurons whose change helps the damaged domain) count as zero where a share is computed.
        protect: prompts of domains to protect, by name: D is reduced by ``weight`` times what reverting would cost them
            (``reversal_cost``).
        weight: the weight of a protected domain's loss against the damaged domain's gain; what 0.3 keeps and costs in
            the lab is in benchmarks/results/protect.md.
        loss: "hellinger", "kl" or your own loss (see ``damage``).
        units: as in ``AMCSelector``; several kinds share a budget of parameters, spent by D per parameter. None:
            neurons and value channels, which recovered more than neurons alone in both labs (benchmarks/results);
            neurons alone, with a warning, where a model's attention is not found for certain.
        rounds: of single weights: how many rounds make 0.25 % of them. Fewer are faster.

    ``made_by["damage"]["promised"]`` of the mask is the sum of its units' D. Where it exceeds ``["loss"]``, the units
    can't gain that much together, and ``surgery select`` says so.

    ``units="weight"`` takes single weights in rounds, and only as many as lower the loss on ``data`` (``by_damage`` in
    ``surgery.selectors.rounds``); ``select`` then returns Entries. It allows no other ``how`` and no ``protect``: the
    costs of single weights do not add up (benchmarks/results/protect-weights.md).

    Raises:
        ValueError: a setting is invalid; from ``select``: no data, and as ``damage``.

    Source: ours, from Proposition 1.
    """

    budget: float
    how: Allocation = "global"
    protect: Mapping[str, Data] | None = field(default=None, repr=False, compare=False)
    weight: float = 0.3
    loss: Loss | Divergence = "hellinger"
    units: Units | None = None
    rounds: int = ROUNDS

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_how(self.how)
        check_units(self.units)
        check_loss(self.loss)
        check_rounds(self.rounds)
        if not isinstance(self.weight, int | float) or not 0 <= self.weight < math.inf:
            raise ValueError(f"weight={self.weight!r}: expected a number ≥ 0")
        if self.protect is not None and not isinstance(self.protect, Mapping):
            raise ValueError(f'protect= is a {type(self.protect).__name__}: expected prompts by name, {{"qa": data}}')
        if single(self.units):
            check_rounds_how(self.how)
            _check_unprotected(self.protect)

    @property
    def name(self) -> str:
        """What a table calls it."""
        guard = f" protecting {', '.join(self.protect)} × {self.weight:g}" if self.protect else ""
        own = f"{damage_named(self.loss)}{guard}"
        return named(own if self.how == "global" else f"{own} ({self.how})", self.units)

    @remembered()
    def select(self, run: Trajectory, data: Data | None = None) -> Mask:
        """The mask; ``data`` are prompts of the damaged domain, with responses or without."""
        run.check_whole()
        units = units_asked(run, self.units)
        if single(self.units):
            found = by_damage(run, data, self.budget, units=units, rounds=self.rounds, loss=self.loss)
            return signed(found, self, run, units)
        if data is None:
            raise ValueError("D is measured on prompts of the damaged domain: pass data=load_prompts(file, tokenizer)")
        scores = gains = damage(run, data, loss=self.loss, units=units)
        for other in (self.protect or {}).values():
            cost = reversal_cost(run, other, loss="hellinger" if callable(self.loss) else self.loss, units=units)
            scores = Neurons({n: scores[n] - self.weight * cost[n] for n in scores})
        spend = scores if self.how == "global" else Neurons({n: scores[n].clamp(min=0) for n in scores})
        mask = top(scores, allocate(spend, self.budget, how=self.how, costs=costs_of(run, units)))
        told = {**gains.made_by["damage"], "promised": promised(gains, mask)}
        return signed(Neurons(mask, made_by={"damage": told}), self, run, units)


def _check_unprotected(protect: Mapping[str, Data] | None) -> None:
    """Raise ``ValueError`` if domains should be protected: single weights can't do that."""
    if protect:
        raise ValueError(
            'protect= with units="weight": the costs of single weights do not add up, and protecting by them did harm '
            "in the lab (benchmarks/results/protect-weights.md). Leave protect out and look at Δ in a sweep, or "
            'protect with units="mlp"'
        )


@dataclass(frozen=True)
class RandomSelector:
    """The control: β of all neurons, drawn uniformly without replacement; a larger budget contains a smaller one.

    Args:
        budget: β in [0, 1].
        seed: of the draw.
        units: as in ``AMCSelector``; None as in ``DamageSelector``, whose control it then is. With several kinds, units
            are drawn until the budget of parameters is spent. Drawing single weights takes a temporary file of 4 bytes
            per weight (in ``TMPDIR``).

    Raises:
        ValueError: a setting is invalid. OSError: there is no room for the file.

    Source: the paper's random baseline (Table 6); single weights: ours.
    """

    budget: float
    seed: int = 0
    units: Units | None = "mlp"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_units(self.units)

    @property
    def name(self) -> str:
        """What a table calls it."""
        return named("random", self.units)

    def select(self, run: Trajectory, data: Data | None = None) -> Mask:
        """The mask; ``data`` is not used."""
        units = units_asked(run, self.units)
        if single(self.units):
            return signed(at_random(run, self.budget, self.seed, units), self, run, units)
        (later,) = run.weights("later", units=units)
        sizes, costs = later.layout.sizes, later.layout.costs
        order = torch.randperm(sum(sizes.values()), generator=torch.Generator().manual_seed(self.seed))
        scores = torch.empty(len(order))
        scores[order] = torch.arange(len(order), 0, -1, dtype=torch.float32)
        drawn = Neurons(dict(zip(sizes, scores.split(list(sizes.values())), strict=True)))
        counts = allocate(worth(drawn, costs), self.budget, how="global", costs=costs)
        return signed(top(drawn, counts), self, run, later.layout.units)
