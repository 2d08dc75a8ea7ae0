"""In which direction two stages of training moved the neurons that both changed most, against a permutation null."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import combinations, pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Generator, Tensor

from surgery.checkpoints.opening import Weights
from surgery.checkpoints.trajectory import Trajectory, check_finite, displacements
from surgery.masks import budget
from surgery.masks.neurons import Neurons
from surgery.scores.amc import products
from surgery.tables import Cell, Table, write_json
from surgery.units import Units

evidence_cosines = import_module("surgery.evidence.directions")


QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
BINS = 20  # of [-1, 1]
GROUP = 1024  # neurons of a block whose updates are in memory, and are paired with each other, at a time


@dataclass(frozen=True)
class Cosines:
    """The cosines of two updates over some neurons, and those of updates paired with another neuron's (the null).

    ``neurons``: how many both stages changed most; if 0, all else is None. ``quantiles``: at ``QUANTILES``;
    ``histogram``: counts in ``BINS`` equal bins of [-1, 1]; ``opposed``: the share below 0. ``null``: the 2.5 %, 50 %
    and 97.5 % points of the mean under the null; ``p``: two-sided, of the mean. Both are None for a single neuron.
    """

    block: str | None
    neurons: int
    mean: float | None = None
    quantiles: tuple[float, ...] | None = None
    opposed: float | None = None
    histogram: tuple[int, ...] | None = None
    null: tuple[float, float, float] | None = None
    p: float | None = None


@dataclass
class Found:
    """The cosines of some neurons, and the sum of them under every permutation."""

    cosines: Tensor
    null: Tensor
    paired: int  # neurons that had another one to be paired with

    @classmethod
    def joined(cls, some: Sequence[Found]) -> Found:
        null = torch.stack([one.null for one in some]).sum(0)
        return cls(torch.cat([one.cosines for one in some]), null, sum(one.paired for one in some))

    def told(self, block: str | None) -> Cosines:
        count = len(self.cosines)
        if not count:
            return Cosines(block, 0)
        mean = float(self.cosines.mean())
        band, p = None, None
        if self.paired:
            null = self.null / count
            band = tuple(null.quantile(torch.tensor([0.025, 0.5, 0.975], dtype=null.dtype)).tolist())
            # a hair's breadth of rounding must not decide between "as extreme" and "less"
            below, above = int((null <= mean + 1e-12).sum()), int((null >= mean - 1e-12).sum())
            p = min(1.0, 2 * (1 + min(below, above)) / (1 + len(null)))
        return Cosines(
            block,
            count,
            mean,
            tuple(self.cosines.quantile(torch.tensor(QUANTILES, dtype=self.cosines.dtype)).tolist()),
            float((self.cosines < 0).double().mean()),
            tuple(int(n) for n in torch.histc(self.cosines, BINS, -1, 1).tolist()),
            band,
            p,
        )


def gram_of(opened: Sequence[Weights], block: str, index: Tensor, i: int, j: int) -> Tensor:
    """The cosine of every neuron's update in stage i with every neuron's in stage j: float64 ``[neuron, neuron]``."""
    products = torch.zeros(len(index), len(index), dtype=torch.float64)
    squares = torch.zeros(2, len(index), dtype=torch.float64)
    for part in opened[-1].layout[block].parts if len(index) else ():
        a, b = (_update(opened[at], opened[at + 1], block, part, index) for at in (i, j))
        products += (a @ b.T).double()
        for row, one in enumerate((a, b)):
            squares[row] += torch.linalg.vector_norm(one, dim=1).double().square()
    return products / (squares[0][:, None] * squares[1]).sqrt()


def _update(before: Weights, after: Weights, block: str, part: str, index: Tensor) -> Tensor:
    old, new = (
        one.layout[block].rows(one.tensors, part, index).detach().to("cpu", torch.float32).reshape(len(index), -1)
        for one in (before, after)
    )
    return new - old


def permuted(gram: Tensor, draws: int, generator: Generator) -> Found:
    """The neurons' own cosines, the diagonal, and the sums over random permutations of the columns."""
    gram = gram.clamp(-1, 1)
    order = gram.diagonal().argsort()  # so that what is drawn does not depend on how the model numbers its neurons
    gram = gram[order][:, order]
    cosines, count = gram.diagonal().clone(), len(gram)
    if count < 2:
        return Found(cosines, cosines.sum().expand(draws), 0)
    null = []
    for some in _runs(draws, max(1, (1 << 20) // count)):
        columns = torch.rand(some, count, generator=generator).argsort(1)
        null.append(gram[torch.arange(count), columns].sum(1))
    return Found(cosines, torch.cat(null), count)


def _runs(total: int, size: int) -> Iterator[int]:
    for low, high in pairwise([*range(0, total, size), total]):
        yield high - low


Ranking = Literal["global", "uniform"]


@dataclass(frozen=True)
class Pair:
    """Two stages: the cosines on the neurons that are among the most changed of both, in the whole model and by block.

    ``expected``: how many neurons two independent sets of those sizes, in each layer, would have in common.
    """

    first: str
    second: str
    expected: float
    whole: Cosines
    blocks: tuple[Cosines, ...] = field(repr=False)


@dataclass(frozen=True)
class Directions:
    """Whether two stages moved the same neurons in the same direction: +1 the same, 0 orthogonal, −1 opposite.

    ``changed``: how many neurons each stage's set has; ``pairs``: every two stages in training order.

    Source: the paper, Section 4 and Figure 4; the distribution and the null are ours.
    """

    top: float
    permutations: int
    seed: int
    changed: dict[str, int]
    pairs: tuple[Pair, ...]

    def of(self, one: str, other: str) -> Pair:
        """The pair of those two stages, in either order; ``LookupError`` if there is none."""
        for pair in self.pairs:
            if {pair.first, pair.second} == {one, other}:
                return pair
        raise LookupError(f"no pair {one!r} and {other!r}: there are {', '.join(self.changed)}")

    def tables(self) -> tuple[Table, ...]:
        """One row per pair, then one table per pair with a row per block."""
        head = ("neurons", "mean cosine", "quartiles", "below 0 (%)", "null, 95 %", "p")
        whole = Table(
            f"direction on the top {100 * self.top:g} % changed neurons of both",
            ("pair", "by chance", *head),
            tuple((f"{one.first}–{one.second}", round(one.expected), *_cells(one.whole)) for one in self.pairs),
        )
        return whole, *(
            Table(
                f"{pair.first}–{pair.second}, by block",
                ("block", *head),
                tuple((str(one.block), *_cells(one)) for one in pair.blocks),
            )
            for pair in self.pairs
        )

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.tables()))

    def save(self, path: str | Path) -> None:
        """Write everything as JSON."""
        write_json(self, path)


def _cells(one: Cosines) -> tuple[Cell, ...]:
    if one.mean is None or one.quantiles is None or one.opposed is None:
        return one.neurons, None, "none in common", None, None, None
    spread = f"{one.quantiles[2]:+.2f} … {one.quantiles[4]:+.2f}"
    null = "one neuron" if one.null is None else f"{one.null[0]:+.3f} … {one.null[2]:+.3f}"
    return one.neurons, round(one.mean, 4), spread, 100 * one.opposed, null, one.p


def directions(
    run: Trajectory,
    top: float = 0.10,
    permutations: int = 1000,
    seed: int = 0,
    how: Ranking = "global",
    units: Units = "mlp",
) -> Directions:
    """Cosines of the updates of every two stages, on the neurons that are among the most changed of both.

    cos_n = ⟨δ_i,n, δ_j,n⟩ / (‖δ_i,n‖ ‖δ_j,n‖), δ_n all slices of a neuron end to end, δ_i the checkpoint of stage i
    minus the one before. Most changed: the round(top · N) neurons with the largest ‖δ_n‖, without unchanged ones.
    The null: within a block each neuron's δ_i is paired with another's δ_j, by a random permutation. A mean outside the
    null's band depends on the neurons, not only on a direction that all neurons share. In a block with more than
    ``GROUP`` shared neurons, only neurons of the same run of ``GROUP`` are permuted, which is a null as well.

    Args:
        run: a trajectory of three or more checkpoints; read twice, in float32, a chunk or ``GROUP`` neurons at a time.
        top: the share of neurons that each stage's set has, in (0, 1].
        permutations: how many are drawn; p is at least 2 / (permutations + 1).
        seed: of the draws.
        how: "global": the most changed of the whole model, which may all lie in a few layers (the paper's definition
            according to its summary); "uniform": the same share of every layer.
        units: which kinds of unit (see ``find_layout``).

    Returns:
        A ``Directions``; ``surgery.plots.directional_cosine`` draws it.

    Raises:
        ValueError: fewer than three checkpoints, ``top`` outside (0, 1], fewer than 1 permutation; different models;
            NaN or infinite weights.

    Source: the paper, Section 4, Figure 4 (mean per layer); the distribution and the null are ours.
    """
    names = list(run.checkpoints)
    if len(names) < 3:
        raise ValueError(f"directions compares two updates and needs three checkpoints, got {names}")
    if not (isinstance(top, int | float) and 0 < top <= 1):
        raise ValueError(f"top={top!r}: expected a share of the neurons in (0, 1] (0.1 is 10 %)")
    if not isinstance(permutations, int) or permutations < 1:
        raise ValueError(f"permutations={permutations!r}: expected 1 or more")
    if how not in ("global", "uniform"):
        raise ValueError(f'how={how!r}: expected "global" or "uniform"')
    # by number: "base", "earlier" and "later" are a trajectory's own words, and may be a stage's name as well
    numbers = [str(at) for at in range(len(names))]
    numbered = Trajectory.through(dict(zip(numbers, run.checkpoints.values(), strict=True)), layout=run.layout)
    sets = [_most(scores, top, how) for scores in _magnitudes(numbered, numbers, units)]
    pairs = list(combinations(range(len(sets)), 2))
    opened = numbered.weights(*numbers, units=units)
    found: dict[tuple[int, int], list[Found]] = {pair: [] for pair in pairs}
    # each pair draws by itself, so that a further stage changes nothing about those before it
    generators = {pair: Generator().manual_seed(seed) for pair in pairs}
    for block in opened[-1].layout:
        for pair, one in _block(opened, block, sets, permutations, generators).items():
            found[pair].append(one)
    sizes = [sum(mask.count().values()) for mask in sets]
    return Directions(
        top,
        permutations,
        seed,
        dict(zip(names[1:], sizes, strict=True)),
        tuple(
            Pair(
                names[i + 1],
                names[j + 1],
                sum(sets[i].count()[name] * sets[j].count()[name] / size for name, size in sets[i].sizes.items()),
                Found.joined(found[i, j]).told(None),
                tuple(one.told(block) for block, one in zip(opened[-1].layout, found[i, j], strict=True)),
            )
            for i, j in pairs
        ),
    )


def _magnitudes(run: Trajectory, names: Sequence[str], units: Units) -> list[Neurons]:
    """The norm of every neuron's update in every stage, each checkpoint read once."""
    sizes = run.weights(names[-1], units=units)[0].layout.sizes
    squares = [{name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()} for _ in names[1:]]
    for name, _, start, stop, steps in displacements(run, *names, units=units, whole=False):
        for square, step in zip(squares, steps, strict=True):
            square[name][start:stop] += products(step, step)
    if not all(bool(value.sum().isfinite()) for square in squares for value in square.values()):
        check_finite(run, *names, units=units)
    return [Neurons({name: value.sqrt().float() for name, value in square.items()}) for square in squares]


def _most(scores: Neurons, top: float, how: Ranking) -> Neurons:
    """The mask of the most changed neurons, without those that did not change."""
    if round(top * scores.total) < 1:
        raise ValueError(f"top={top!r} selects none of {scores.total} neurons: expected {1 / scores.total:.2g} or more")
    changed = {name: int((value > 0).sum()) for name, value in scores.items()}
    counts = budget.allocate(scores, top, how) if any(changed.values()) else changed
    return budget.top(scores, {name: min(counts[name], changed[name]) for name in scores})


def _block(
    opened: list[Weights], block: str, sets: list[Neurons], draws: int, generators: Mapping[tuple[int, int], Generator]
) -> dict[tuple[int, int], Found]:
    """What is found of one block, for every pair."""
    found = {}
    for (i, j), generator in generators.items():
        shared = (sets[i][block] & sets[j][block]).nonzero().flatten()
        some = [
            evidence_cosines.permuted(evidence_cosines.gram_of(opened, block, index, i, j), draws, generator)
            for index in shared.split(evidence_cosines.GROUP)
        ]
        found[i, j] = Found.joined(some)
    return found
