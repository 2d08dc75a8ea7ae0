"""DG-Hard and SAR: what they keep of a change, and that one decomposition serves all values of the knob."""

from __future__ import annotations

import math

import pytest
import torch
from mutants import dies
from test_baselines import DTYPES, weights

from benchmarks.pareto import spectral
from benchmarks.pareto.baselines import differing
from benchmarks.pareto.spectral import (
    bases,
    core,
    median_edge,
    omega,
    spectra,
    spectrum,
    thresholded,
    truncated,
)


@pytest.mark.parametrize("rank", range(1, 6))
def test_a_truncated_matrix_has_that_rank_and_is_the_best_of_it(rank: int) -> None:
    delta = torch.randn(30, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    values = torch.linalg.svdvals(delta)
    found, vectors = spectrum(delta)
    torch.testing.assert_close(found, values)
    kept = truncated(delta, vectors, rank)
    assert int(torch.linalg.matrix_rank(kept)) == rank
    assert float((delta - kept).norm() ** 2) == pytest.approx(float((values[rank:] ** 2).sum()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_thresholding_recovers_a_low_rank_change_under_noise(dtype: torch.dtype) -> None:
    """A change of rank 3 and white noise: the threshold of factor 1 keeps 3 directions, and the rest is noise's."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 3, generator=generator).double())[0] for n in (120, 80))
    signal = 20 * left @ right.T
    noise = torch.randn(120, 80, generator=generator).double() * 0.05
    earlier = {"w": torch.zeros(120, 80, dtype=dtype)}
    later = {"w": (signal + noise).to(dtype)}
    found = thresholded(later, earlier, 1.0)["w"].double()
    values = torch.linalg.svdvals(found)
    assert float(values[3]) < (1e-5 if dtype in (torch.float64, torch.float32) else 0.1) < float(values[2])
    assert float((found - signal).norm()) < 0.5 * float((later["w"].double() - signal).norm())


def test_thresholding_leaves_small_matrices_and_vectors_alone() -> None:
    later, earlier = weights(torch.bfloat16)
    assert set(thresholded(later, earlier, 1.0)) == {name for name in later if later[name].ndim == 2}
    assert set(spectra(later, earlier, smallest=1400)) == {n for n in later if later[n].numel() >= 1400}


def test_the_threshold_is_gavish_and_donohos() -> None:
    assert omega(1.0) == pytest.approx(4 / math.sqrt(3))
    assert omega(1.0) / median_edge(1.0) == pytest.approx(2.858, abs=2e-3)  # their table of ω(β)/μ(β)
    assert omega(0.5) / median_edge(0.5) == pytest.approx(2.1711, abs=5e-3)
    noise = torch.randn(400, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / math.sqrt(1000)
    assert float(torch.linalg.svdvals(noise).median()) == pytest.approx(median_edge(0.4), rel=5e-3)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_thresholding_either_way_round_is_the_decomposition_cut_at_the_threshold(
    shape: tuple[int, int], factor: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    earlier = {"w": torch.randn(shape, generator=generator).double()}
    later = {"w": earlier["w"] + torch.randn(shape, generator=generator).double()}
    u, s, v = torch.linalg.svd(later["w"] - earlier["w"], full_matrices=False)
    cut = factor * omega(40 / 60) * float(s.median()) / median_edge(40 / 60)
    torch.testing.assert_close(thresholded(later, earlier, factor)["w"], earlier["w"] + (u * s * (s > cut)) @ v)


def test_what_is_prepared_serves_every_value_of_the_knob() -> None:
    later, earlier = weights(torch.bfloat16)
    known, prepared = spectra(later, earlier), bases(later, earlier)
    for value in (0.0, 0.3, 1.0, 2.0):
        again = thresholded(later, earlier, value, known)
        assert differing(thresholded(later, earlier, value), again) == 0
    for value in (0.0, 0.05, 0.5, 1.0):
        assert differing(core(later, earlier, value), core(later, earlier, value, prepared)) == 0


def sar(later: torch.Tensor, earlier: torch.Tensor, rank: int, whole: bool) -> torch.Tensor:
    """The tool's own way: three products of thin factors."""
    ud, sd, vd = torch.linalg.svd(later - earlier, full_matrices=False)
    ub, _, vb = torch.linalg.svd(earlier, full_matrices=False)
    taken = len(vb) if whole else rank
    ub, vb = ub[:, :taken], vb[:taken]
    rewiring = (ub.T @ ud[:, :rank]) @ torch.diag(sd[:rank]) @ (vd[:rank] @ vb.T)
    return earlier + ub @ rewiring @ vb


def check_sar() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((30, 20), (20, 30), (20, 20)):
        earlier = {"layers.0.w": torch.randn(shape, generator=generator).double(), "norm": torch.zeros(3)}
        later = {"layers.0.w": earlier["layers.0.w"] + torch.randn(shape, generator=generator), "norm": torch.ones(3)}
        for share, rank in ((0.01, 1), (0.2, 4), (0.99, 19), (1.0, 20)):
            for whole in (False, True):
                found = core(later, earlier, share, whole=whole)
                expected = sar(later["layers.0.w"], earlier["layers.0.w"], rank, whole)
                assert torch.allclose(found["layers.0.w"], expected, atol=1e-10)
                assert torch.equal(found["norm"], earlier["norm"])


def test_sar_keeps_what_the_tool_keeps() -> None:
    check_sar()


def test_sar_of_all_of_a_square_matrix_is_the_later_one_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    earlier = {"layers.0.w": torch.randn(20, 20, generator=generator)}
    later = {"layers.0.w": torch.randn(20, 20, generator=generator)}
    for whole in (False, True):
        assert differing(later, core(later, earlier, 1.0, whole=whole)) == 0
        assert differing(later, core(later, earlier, 0.9, whole=whole)) > 0


def test_a_change_inside_the_top_space_stays_and_one_outside_it_goes() -> None:
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(n)))[0] for n in (8, 6))
    values = torch.zeros(8, 6)
    values.diagonal().copy_(torch.tensor([9.0, 8.0, 3.0, 2.0, 1.0, 0.5]))
    earlier = {"layers.0.w": left @ values @ right.T}
    inside, outside = left[:, :1] @ right[:, 1:2].T, left[:, 7:] @ right[:, 5:].T
    third = 2 / 6
    kept = core({"layers.0.w": earlier["layers.0.w"] + inside}, earlier, third)["layers.0.w"]
    torch.testing.assert_close(kept, earlier["layers.0.w"] + inside, atol=1e-5, rtol=0)
    gone = core({"layers.0.w": earlier["layers.0.w"] + outside}, earlier, third)["layers.0.w"]
    torch.testing.assert_close(gone, earlier["layers.0.w"], atol=1e-5, rtol=0)


def test_a_projection_on_the_wrong_space_is_noticed() -> None:
    right = spectral.truncated
    dies(
        lambda patch: patch.setattr(spectral, "truncated", lambda high, vectors, rank: right(high, vectors, rank + 1)),
        check_sar,
    )
