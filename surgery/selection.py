"""Selectors: from a trajectory and some prompts to a mask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

import torch

from surgery.attribution import damage, reversal_cost
from surgery.budget import Allocation, allocate, top
from surgery.neurons import Neurons
from surgery.papers import fingerprint, versions
from surgery.predictions import Loss
from surgery.prompts import Batch
from surgery.scores import activation, conflict, magnitude
from surgery.trajectory import Trajectory

Data = Iterable[Batch]


@runtime_checkable
class Selector(Protocol):
    """Anything with ``select``: a trajectory and prompts in, a mask out.

    A selector of your own is complete in eight lines; with a field ``budget`` a sweep can run it at many budgets::

        @dataclass(frozen=True)
        class Largest:
            budget: float

            def select(self, run, data=None):
                M = magnitude(run)
                return top(M, allocate(M, self.budget, how="global"))
    """

    def select(self, run: Trajectory, data: Data | None = None) -> Neurons:
        """The mask of the neurons to revert: bool ``[neuron]`` per block. Stores nothing."""
        ...


@dataclass(frozen=True)
class AMCSelector:
    """The paper's selector: rank by a product of activation, magnitude and conflict, spend the budget by another.

    Args:
        budget: β, the fraction of all MLP neurons, in [0, 1].
        rank: which of the letters A, M, C make the ranking score, as a product ("AMC", "MC", "A", ...).
        allocate: the same for the score that splits the budget over layers.
        how: "proportional", "global" or "uniform" (see ``surgery.allocate``).

    ``select`` raises ValueError where C is asked for without a base checkpoint, or A without data.

    Source: the paper, Appendix D.4. In products A and M are relative to their layer's mean (ours).
    """

    budget: float
    rank: str = "AMC"
    allocate: str = "AMC"
    how: Allocation = "proportional"

    def __post_init__(self) -> None:
        _check_budget(self.budget)
        for name, letters in (("rank", self.rank), ("allocate", self.allocate)):
            if not letters or set(letters) - set("AMC") or len(set(letters)) != len(letters):
                raise ValueError(f'{name}={letters!r}: expected some of the letters A, M and C, each once, like "AMC"')
        _check_how(self.how)

    @property
    def name(self) -> str:
        """What a table calls it."""
        rank, budgets = "×".join(self.rank), "×".join(self.allocate)
        own = rank if self.rank == self.allocate else f"rank {rank}, budgets {budgets}"
        return own if self.how == "proportional" else f"{own} ({self.how})"

    def select(self, run: Trajectory, data: Data | None = None) -> Neurons:
        """The mask; ``data`` may be left out where neither score contains A."""
        letters = set(self.rank + self.allocate)
        if "A" in letters and data is None:
            raise ValueError("A is measured on prompts of the damaged domain: pass data=load_prompts(file, tokenizer)")
        if "C" in letters and run.base is None:
            raise ValueError(
                'C needs the base checkpoint: pass Trajectory(base=...), or choose letters without C ("AM")'
            )
        found = {}
        if "M" in letters:
            found["M"] = magnitude(run)
        if "C" in letters:
            found["C"] = conflict(run)
        if "A" in letters and data is not None:
            found["A"] = activation(run.load(), data, layout=None if run.layout is None else run.layout)
        counts = allocate(_product(found, self.allocate), self.budget, how=self.how)
        return _signed(top(_product(found, self.rank), counts), self, run)


def _product(found: dict[str, Neurons], letters: str) -> Neurons:
    """One letter is its raw score; in a product A and M are first divided by their layer's mean."""
    if len(letters) == 1:
        return found[letters]
    factors = [found[letter] if letter == "C" else found[letter].relative() for letter in "AMC" if letter in letters]
    product = factors[0]
    for factor in factors[1:]:
        product = product * factor
    return product


@dataclass(frozen=True)
class DamageSelector:
    """Rank by D, the damage score: what going back would gain on the damaged domain, to first order.

    Args:
        budget: β, the fraction of all MLP neurons, in [0, 1].
        how: "global" (the best of the whole model), "proportional" or "uniform" (see ``surgery.allocate``). Negative
            scores, neurons that the damaged domain is better off with, count as zero where a share is computed.
        protect: prompts of domains that should keep what they won, by name: D is reduced by ``weight`` times what
            reverting would cost them (``reversal_cost``).
        weight: how much a nat lost there counts beside a nat won here.
        loss: another loss than the divergence from the earlier model (see ``damage``).

    Source: ours, from Proposition 1.
    """

    budget: float
    how: Allocation = "global"
    protect: Mapping[str, Data] | None = field(default=None, repr=False, compare=False)
    weight: float = 1.0
    loss: Loss | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_budget(self.budget)
        _check_how(self.how)
        if not self.weight >= 0:
            raise ValueError(f"weight={self.weight!r}: expected a number ≥ 0")

    @property
    def name(self) -> str:
        """What a table calls it."""
        guard = f", protecting {' and '.join(self.protect)} × {self.weight:g}" if self.protect else ""
        own = f"D{guard}" if self.loss is None else f"D (own loss){guard}"
        return own if self.how == "global" else f"{own} ({self.how})"

    def select(self, run: Trajectory, data: Data | None = None) -> Neurons:
        """The mask; ``data`` are prompts of the damaged domain, with responses or without."""
        if data is None:
            raise ValueError("D is measured on prompts of the damaged domain: pass data=load_prompts(file, tokenizer)")
        scores = damage(run, data, loss=self.loss)
        for other in (self.protect or {}).values():
            cost = reversal_cost(run, other)
            scores = Neurons({n: scores[n] - self.weight * cost[n] for n in scores}, made_by=scores.made_by)
        spend = scores if self.how == "global" else Neurons({n: scores[n].clamp(min=0) for n in scores})
        return _signed(top(scores, allocate(spend, self.budget, how=self.how)), self, run)


@dataclass(frozen=True)
class RandomSelector:
    """The control: β of all neurons, drawn uniformly without replacement; a bigger budget contains the smaller.

    Args:
        budget: β in [0, 1].
        seed: of the draw.

    Source: the paper's random baseline (Table 6).
    """

    budget: float
    seed: int = 0

    def __post_init__(self) -> None:
        _check_budget(self.budget)

    @property
    def name(self) -> str:
        """What a table calls it."""
        return "random"

    def select(self, run: Trajectory, data: Data | None = None) -> Neurons:
        """The mask; ``data`` is not used."""
        (later,) = run.weights("later")
        sizes = later.layout.sizes
        order = torch.randperm(sum(sizes.values()), generator=torch.Generator().manual_seed(self.seed))
        scores = torch.empty(len(order))
        scores[order] = torch.arange(len(order), 0, -1, dtype=torch.float32)
        drawn = Neurons(dict(zip(sizes, scores.split(list(sizes.values())), strict=True)))
        return _signed(top(drawn, allocate(drawn, self.budget, how="global")), self, run)


def _check_budget(budget: Any) -> None:
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 <= budget <= 1:
        raise ValueError(f"budget={budget!r}: expected a fraction of the model's neurons in [0, 1] (0.02 is 2 %)")


def _check_how(how: Any) -> None:
    if how not in ("proportional", "global", "uniform"):
        raise ValueError(f'how={how!r}: expected "proportional", "global" or "uniform"')


def _signed(mask: Neurons, selector: Any, run: Trajectory) -> Neurons:
    """The mask with a record of what made it."""
    settings = {f.name: getattr(selector, f.name) for f in fields(selector)}
    told: dict[str, Any] = {name: value for name, value in settings.items() if isinstance(value, str | int | float)}
    if getattr(selector, "protect", None):
        told["protect"] = sorted(selector.protect)
    names = [name for name in ("base", "earlier", "later") if getattr(run, name) is not None]
    made_by = {
        **mask.made_by,
        "selector": {"class": type(selector).__name__, **told},
        "checkpoints": {name: fingerprint(weights) for name, weights in zip(names, run.weights(*names), strict=True)},
        "versions": versions(),
    }
    return Neurons(mask, made_by=made_by)
