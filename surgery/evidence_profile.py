"""Where in the model a mask or a score lies: per block and per kind of unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from surgery.evidence import Cell, Table, write_json
from surgery.neurons import Neurons
from surgery.units import kind_of, noun, units_in


@dataclass(frozen=True)
class Share:
    """What one block has: ``units`` of them in all, ``amount`` selected (of scores: their sum), and its share of all.

    ``parameters``: of the selected units, None where their cost is not known.
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
    """How a mask's units, or a score's mass, are spread over the blocks and over attention and MLP.

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
