"""What people do with singular values: DG-Hard and SAR, each on one decomposition for all values of its knob.

A matrix is looked at with its longer side first (``tall``): then its right singular vectors are the short side's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import numpy as np
import torch
from torch import Tensor

from benchmarks.pareto.baselines import Tensors, layer_weights, wide

Spectrum = tuple[
    Tensor, Tensor
]  # singular values [short], the highest first; right vectors of the tall one [short, short]


def spectra(later: Tensors, earlier: Tensors, smallest: int = 1024) -> dict[str, Spectrum]:
    """The spectrum of δB of every matrix of at least ``smallest`` entries."""
    names = [name for name, tensor in later.items() if tensor.ndim == 2 and tensor.numel() >= smallest]
    return {name: spectrum(tall(change(later[name], earlier[name]))) for name in names}


def thresholded(
    later: Tensors, earlier: Tensors, factor: float, known: Mapping[str, Spectrum] | None = None
) -> dict[str, Tensor]:
    """DG-Hard: of each matrix's δB only the singular values above factor · ω(β) · σ̂ stay; the others are set to zero.

    β = the matrix's short side over its long one, ω(β) as in ``omega``, σ̂ = median singular value / ``median_edge(β)``.
    Matrices of fewer than 1024 entries and everything that is no matrix stay as they are. ``known``: ``spectra``, which
    are made where they are not given.

    Source: github.com/BrickleRex/dghard (Spectral Unforgetting, arXiv 2605.20296), whose factor is 1, with θA in its
    base's role; Gavish & Donoho, The optimal hard threshold for singular values is 4/√3 (arXiv 1305.5870). The sweep
    over the factor and copying bits where nothing or everything stays are ours.
    """
    found = {}
    for name, (values, vectors) in (spectra(later, earlier) if known is None else known).items():
        before, delta = earlier[name], change(later[name], earlier[name])
        rank = int((values > factor * threshold(values, delta.shape)).sum())
        if rank == 0:
            found[name] = before.to(later[name].dtype)
        elif rank == int((values > 0).sum()):
            found[name] = later[name]
        else:
            kept = like(truncated(tall(delta), vectors, rank), delta)
            found[name] = (before.to(delta.dtype) + kept).to(later[name].dtype)
    return found


Bases = dict[
    str, tuple[Spectrum, Tensor, Tensor]
]  # of δB, and the tall θA's singular vectors: [long, short], [short, short]


def bases(later: Tensors, earlier: Tensors) -> Bases:
    """What ``core`` needs of the layers' matrices: the spectrum of δB and the singular vectors of θA."""
    found: Bases = {}
    for name in layer_weights(later):
        if later[name].ndim == 2:
            left, _, right = torch.linalg.svd(tall(earlier[name].to(wide(earlier[name]))), full_matrices=False)
            found[name] = spectrum(tall(change(later[name], earlier[name]))), left, right
    return found


def core(
    later: Tensors, earlier: Tensors, share: float, known: Bases | None = None, whole: bool = False
) -> dict[str, Tensor]:
    """SAR: of each matrix's δB only U Uᵀ δB,k V Vᵀ stays, δB,k its k highest singular values, k = ⌊share · short side⌋.

    U and V are θA's singular vectors: the first k, or with ``whole`` all of them, which restrict nothing but the long
    side. k is at least 1 where share is above 0. Whatever is no matrix of a layer is θA's, as the tool writes it.

    Source: Zhang et al., Spectral Rewiring (arXiv 2607.03065, Algorithm 1: both ranks k), with θA in its base's role;
    github.com/zzlsms/RL-Rewiring, whose default is ``whole`` and a share of 0.01. Copying bits where the projection is
    the identity (a square matrix, all of both) is ours.
    """
    found = {name: tensor.to(later[name].dtype) for name, tensor in earlier.items()}
    for name, ((_, vectors), left, right) in (bases(later, earlier) if known is None else known).items():
        delta, short = change(later[name], earlier[name]), len(vectors)
        rank = max(1, int(share * short)) if share > 0 else 0
        if rank == short and delta.shape[0] == delta.shape[1]:
            found[name] = later[name]
        elif rank:
            kept, taken = truncated(tall(delta), vectors, rank), short if whole else rank
            inside = left[:, :taken] @ (left[:, :taken].T @ kept @ right[:taken].T) @ right[:taken]
            found[name] = (earlier[name].to(delta.dtype) + like(inside, delta)).to(later[name].dtype)
    return found


def change(later: Tensor, earlier: Tensor) -> Tensor:
    """δB of one tensor, in float32 or wider."""
    return later.to(wide(later)) - earlier.to(wide(later))


def tall(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose, so that it is no wider than high."""
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def like(high: Tensor, matrix: Tensor) -> Tensor:
    """What was made of ``tall(matrix)``, the way round that the matrix is."""
    return high if matrix.shape[0] >= matrix.shape[1] else high.T


def spectrum(high: Tensor) -> Spectrum:
    """Singular values and right vectors of a tall matrix, by those of its small triangular factor."""
    _, values, vectors = torch.linalg.svd(torch.linalg.qr(high, mode="r").R)
    return values, vectors


def truncated(high: Tensor, vectors: Tensor, rank: int) -> Tensor:
    """A tall matrix with its ``rank`` highest singular values alone."""
    return (high @ vectors[:rank].T) @ vectors[:rank]


def threshold(values: Tensor, shape: torch.Size) -> float:
    """Gavish and Donoho's cut for a matrix of signal and white noise of unknown level: ω(β) · median / μ(β)."""
    beta = min(shape) / max(shape)
    return omega(beta) * float(values.median()) / median_edge(beta)


def omega(beta: float) -> float:
    """ω(β) = √(2(β+1) + 8β / (β + 1 + √(β² + 14β + 1))); 4/√3 for a square matrix."""
    return math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta * beta + 14 * beta + 1)))


@cache
def median_edge(beta: float, points: int = 200_000) -> float:
    """μ(β): the median singular value of white noise of level 1/√(long side), β in (0, 1] (Marchenko–Pastur).

    With λ = 1 + β − 2√β cos φ the eigenvalues' density is proportional to sin²φ / λ in φ, without its singularity.
    """
    angle = (np.arange(points) + 0.5) * math.pi / points
    value = 1 + beta - 2 * math.sqrt(beta) * np.cos(angle)
    mass = np.cumsum(np.sin(angle) ** 2 / value)
    return math.sqrt(float(value[np.searchsorted(mass, mass[-1] / 2)]))
