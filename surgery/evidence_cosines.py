"""Cosines of two updates, and what pairing every neuron's update with another neuron's would give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Generator, Tensor

from surgery.opening import Weights

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
BINS = 20  # of [-1, 1]
GROUP = 1024  # neurons of a block whose updates are in memory, and are paired with each other, at a time


@dataclass(frozen=True)
class Cosines:
    """The cosines of two updates over some neurons, and what pairing each with another neuron's update would give.

    ``neurons``: how many both stages changed most; 0: all else is None. ``quantiles``: at ``QUANTILES``;
    ``histogram``: counts in ``BINS`` equal bins of [-1, 1]; ``opposed``: the share below 0. ``null``: the 2.5 %, 50 %
    and 97.5 % points of the mean under the null; ``p``: two-sided, of the mean. Both are None of a single neuron.
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
