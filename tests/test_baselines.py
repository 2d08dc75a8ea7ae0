"""The baselines' laws: what strength 0 and full strength give, what is touched, and that every edit is undone."""

from __future__ import annotations

import importlib.util
import math
import warnings
from pathlib import Path

import pytest
import torch
from families import build
from torch import Tensor

from benchmarks.pareto import baselines
from benchmarks.pareto.baselines import (
    differing,
    dropped,
    edited,
    entries_restored,
    highest,
    interpolated,
    layer_of,
    layer_scaled,
    layer_weights,
    layers_by_displacement,
    layers_restored,
    random_scores,
    relative_change,
    trimmed,
)
from benchmarks.pareto.spectral import core, thresholded

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SEED0 = Path(baselines.__file__).parents[1] / "lab" / "seed0"
Pair = tuple[dict[str, Tensor], dict[str, Tensor]]


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def both(request) -> Pair:
    """A later and an earlier model's parameters; a tenth of the entries agree, and some are minus zero."""
    return weights(request.param)


def weights(dtype: torch.dtype) -> Pair:
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed_tokens.weight": (40, 32), "norm.weight": (32,)}
    for layer in range(3):
        shapes |= {
            f"layers.{layer}.mlp.up_proj.weight": (48, 32),
            f"layers.{layer}.mlp.down_proj.weight": (32, 48),
            f"layers.{layer}.input_layernorm.weight": (32,),
        }
    earlier = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    later = {}
    for name, tensor in earlier.items():
        moved = (tensor.double() + 0.1 * torch.randn(tensor.shape, generator=generator).double()).to(dtype)
        still = torch.rand(tensor.shape, generator=generator) < 0.1
        later[name] = torch.where(still, tensor, moved)
        # minus zero in both, in the earlier model only, in the later one only: arithmetic would lose the sign
        earlier[name].view(-1)[:4] = torch.tensor([-0.0, -0.0, -0.0, 1.0])
        later[name].view(-1)[:4] = torch.tensor([-0.0, 1.0, -1.0, -0.0])
    return later, earlier


def whole(new: dict[str, Tensor], later: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model after an edit: new tensors where there are any."""
    assert all(tensor.dtype == later[name].dtype for name, tensor in new.items())
    return {**later, **new}


def size(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


WEAKEST = {
    "WiSE-FT": lambda later, earlier: interpolated(later, earlier, 0),
    "entries": lambda later, earlier: entries_restored(later, earlier, relative_change(later, earlier), 0),
    "random entries": lambda later, earlier: entries_restored(later, earlier, random_scores(later, 0), 0),
    "layers": lambda later, earlier: layers_restored(later, earlier, []),
    "TIES": lambda later, earlier: trimmed(later, earlier, 1),
    "DARE": lambda later, earlier: dropped(later, earlier, 0, 0),
    "spectral": lambda later, earlier: thresholded(later, earlier, 0),
    "LiNeS": lambda later, earlier: layer_scaled(later, earlier, 1),
}
STRONGEST = {
    "WiSE-FT": lambda later, earlier: interpolated(later, earlier, 1),
    "entries": lambda later, earlier: entries_restored(later, earlier, relative_change(later, earlier), 1),
    "random entries": lambda later, earlier: entries_restored(later, earlier, random_scores(later, 0), 1),
    "layers": lambda later, earlier: layers_restored(later, earlier, [0, 1, 2]),
    "TIES": lambda later, earlier: trimmed(later, earlier, 0),
    "DARE": lambda later, earlier: dropped(later, earlier, 1, 0),
    "spectral": lambda later, earlier: thresholded(later, earlier, 1e6),
    "SAR": lambda later, earlier: core(later, earlier, 0),
    "LiNeS": lambda later, earlier: layer_scaled(later, earlier, 0),
}
COVERED = {
    "WiSE-FT": lambda name, tensor: True,
    "entries": lambda name, tensor: "layers" in name and "norm" not in name,
    "random entries": lambda name, tensor: "layers" in name and "norm" not in name,
    "layers": lambda name, tensor: "layers" in name,
    "TIES": lambda name, tensor: True,
    "DARE": lambda name, tensor: True,
    "spectral": lambda name, tensor: tensor.ndim == 2,
    "SAR": lambda name, tensor: True,
    "LiNeS": lambda name, tensor: "layers.0" in name or "layers" not in name,
}


@pytest.mark.parametrize("method", WEAKEST)
def test_without_strength_every_bit_is_the_later_models(both: Pair, method: str) -> None:
    later, earlier = both
    assert differing(later, whole(WEAKEST[method](later, earlier), later)) == 0


@pytest.mark.parametrize("method", STRONGEST)
def test_at_full_strength_every_covered_bit_is_the_earlier_models_and_no_other(both: Pair, method: str) -> None:
    later, earlier = both
    now = whole(STRONGEST[method](later, earlier), later)
    for name, tensor in now.items():
        if method == "LiNeS" and "layers.1" in name:
            continue  # half way
        expected = earlier if COVERED[method](name, tensor) else later
        assert differing({name: tensor}, {name: expected[name]}) == 0
    assert differing(later, now) > 0


@pytest.mark.parametrize("method", STRONGEST)
def test_neither_input_is_written_to(both: Pair, method: str) -> None:
    later, earlier = both
    kept = [{name: tensor.clone() for name, tensor in one.items()} for one in both]
    WEAKEST.get(method, STRONGEST[method])(later, earlier)
    STRONGEST[method](later, earlier)
    assert differing(kept[0], later) == 0
    assert differing(kept[1], earlier) == 0


@pytest.mark.parametrize("alpha", [0.05, 0.5, 0.95])
def test_interpolation_is_the_blend_computed_in_float32_and_moves_no_entry_that_agrees(
    both: Pair, alpha: float
) -> None:
    later, earlier = both
    for name, tensor in interpolated(later, earlier, alpha).items():
        before, after = earlier[name].double(), later[name].double()
        step = torch.finfo(tensor.dtype).eps if tensor.dtype != torch.float64 else torch.finfo(torch.float32).eps
        expected = after + alpha * (before - after)
        torch.testing.assert_close(tensor.double(), expected, rtol=2 * step, atol=1e-6)
        same = before == after
        assert differing({name: tensor[same]}, {name: later[name][same]}) == 0


def test_lines_scales_each_layer_by_its_depth_and_all_else_as_the_first() -> None:
    earlier = {f"layers.{layer}.w": torch.zeros(1) for layer in range(5)} | {"embed": torch.zeros(1)}
    later = {name: torch.ones(1) for name in earlier}
    found = {name: round(float(tensor), 6) for name, tensor in layer_scaled(later, earlier, 0.2).items()}
    assert found == {f"layers.{layer}.w": round(0.2 + 0.2 * layer, 6) for layer in range(5)} | {"embed": 0.2}
    assert float(layer_scaled({"layers.0.w": torch.ones(1)}, earlier, 0.3)["layers.0.w"]) == pytest.approx(0.3)


@pytest.mark.parametrize("count", [0, 1, 5, 999, 1000])
def test_the_highest_are_those_of_a_stable_sort(count: int) -> None:
    numbers = torch.randint(0, 9, (1000,), generator=torch.Generator().manual_seed(0)).float()
    expected = torch.zeros(1000, dtype=torch.bool)
    expected[numbers.sort(descending=True, stable=True).indices[:count]] = True
    assert torch.equal(highest(numbers, count), expected)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("drawn", [False, True])
def test_entries_are_the_best_scored_ones_exactly_that_many_and_nested(
    both: Pair, fraction: float, drawn: bool
) -> None:
    later, earlier = both
    scores = random_scores(later, 3) if drawn else relative_change(later, earlier)
    assert set(scores) == set(layer_weights(later))
    flat = torch.cat([score.flatten() for score in scores.values()])
    # an earlier model that differs everywhere, so that what was taken can be seen
    marked = {name: later[name] + 1 + later[name].abs() for name in later}
    taken = [
        torch.cat([(new[name] != later[name]).flatten() for name in scores])
        for new in (entries_restored(later, marked, scores, share) for share in (fraction, fraction + 0.1))
    ]
    assert int(taken[0].sum()) == round(fraction * len(flat))
    assert bool(flat[taken[0]].min() >= flat[~taken[0]].max())
    assert not bool((taken[0] & ~taken[1]).any())
    touched = differing(later, whole(entries_restored(later, earlier, scores, fraction), later))
    assert touched <= round(fraction * len(flat))


def test_relative_change_is_the_tools_formula_and_tells_small_changes_apart() -> None:
    later = {"layers.0.w": torch.tensor([1.0, 3.0, 0.5]), "embed": torch.ones(2), "layers.0.norm": torch.ones(2)}
    earlier = {"layers.0.w": torch.tensor([2.0, 2.0, 0.0]), "embed": torch.zeros(2), "layers.0.norm": torch.zeros(2)}
    found = relative_change(later, earlier)
    assert list(found) == ["layers.0.w"]
    torch.testing.assert_close(found["layers.0.w"], torch.tensor([0.5, 0.5, 0.5 / 1e-8]))
    # two shares that are one number in bf16: a ranking made there could not tell them apart
    before = {"layers.0.w": torch.tensor([3.984375, 3.96875], dtype=torch.bfloat16)}
    after = {"layers.0.w": torch.tensor([2.984375, 2.96875], dtype=torch.bfloat16)}
    in_bf16 = (after["layers.0.w"] - before["layers.0.w"]).abs() / before["layers.0.w"]
    assert in_bf16.unique().numel() == 1
    assert relative_change(after, before)["layers.0.w"].unique().numel() == 2


def test_names_without_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="layers"):
        layer_weights(["transformer.h.0.mlp.c_fc.weight"])
    assert layer_of("model.layers.12.mlp.up_proj.weight") == 12
    assert layer_of("model.embed_tokens.weight") is None


def test_random_scores_differ_by_seed_and_only_by_seed() -> None:
    later, _ = weights(torch.float32)
    one, again, other = random_scores(later, 1), random_scores(later, 1), random_scores(later, 2)
    assert differing(one, again) == 0
    assert differing(one, other) > 0.9 * size(one)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.9])
def test_trimming_keeps_exactly_the_density_of_each_tensor_the_largest_changes(both: Pair, density: float) -> None:
    later, earlier = both
    for name, tensor in trimmed(later, earlier, density).items():
        change = (later[name].double() - earlier[name].double()).abs()
        kept = tensor == later[name]  # entries that agree look kept whether or not they are
        dropped_ = ~kept
        assert torch.equal(tensor[dropped_], earlier[name][dropped_])
        k = round(density * tensor.numel())
        moved = int((change > 0).sum())
        assert int((kept & (change > 0)).sum()) == min(k, moved)
        if bool(dropped_.any()) and k:
            assert bool(change[dropped_].max() <= change[kept & (change > 0)].min())


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_dare_drops_that_share_and_rescales_the_rest(both: Pair, probability: float) -> None:
    later, earlier = both
    share, lost = [], []
    for name, tensor in dropped(later, earlier, probability, 5).items():
        change = later[name].double() - earlier[name].double()
        back = (tensor == earlier[name]) & (change != 0)
        rest = (change != 0) & ~back
        eps = torch.finfo(tensor.dtype).eps if tensor.dtype != torch.float64 else torch.finfo(torch.float32).eps
        expected = earlier[name].double() + change / (1 - probability)
        torch.testing.assert_close(tensor.double()[rest], expected[rest], rtol=2 * eps, atol=1e-5)
        share.append(int(back.sum()))
        lost.append(int((change != 0).sum()))
    assert sum(share) / sum(lost) == pytest.approx(probability, abs=4 * math.sqrt(0.25 / sum(lost)))


def test_dare_drops_more_with_a_higher_probability_and_by_its_seed() -> None:
    later, earlier = weights(torch.float32)
    back = {
        key: torch.cat([(dropped(later, earlier, *key)[name] == earlier[name]).flatten() for name in later])
        for key in ((0.3, 0), (0.6, 0), (0.3, 1))
    }
    assert not bool((back[0.3, 0] & ~back[0.6, 0]).any())
    assert not torch.equal(back[0.3, 0], back[0.3, 1])


def test_layers_are_ordered_by_all_that_changed_in_them() -> None:
    later, earlier = weights(torch.bfloat16)
    for layer, factor in ((0, 1.0), (1, 3.0), (2, 2.0)):
        for name in later:
            if layer_of(name) == layer:
                change = (later[name].float() - earlier[name].float()) * factor
                later[name] = (earlier[name].float() + change).bfloat16()
    assert layers_by_displacement(later, earlier) == [1, 2, 0]
    new = layers_restored(later, earlier, [1])
    assert set(new) == {name for name in later if "layers.1." in name}
    assert layers_by_displacement(earlier, earlier) == [0, 1, 2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("raises", [False, True])
def test_an_edit_is_counted_and_put_back_bit_for_bit(dtype: torch.dtype, raises: bool) -> None:
    model = build("llama", seed=0).to(dtype)
    other = dict(build("llama", seed=1).to(dtype).named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    new = trimmed(before, {name: tensor.detach() for name, tensor in other.items()}, 0.7)

    def run() -> None:
        with edited(model, new) as count:
            assert differing(dict(model.named_parameters()), new) == 0
            assert count == differing(before, new) > 0
            if raises:
                raise RuntimeError("in the body")

    if raises:
        with pytest.raises(RuntimeError, match="in the body"):
            run()
    else:
        run()
    assert differing(before, dict(model.named_parameters())) == 0


@pytest.mark.parametrize("wrong", ["name", "shape", "dtype"])
def test_an_edit_of_another_model_is_refused_before_anything_is_written(wrong: str) -> None:
    model = build("llama", seed=0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first, last = next(iter(before)), list(before)[-1]
    bad = {"name": {"nowhere": torch.zeros(1)}, "shape": {last: torch.zeros(1)}, "dtype": {last: before[last].half()}}
    with pytest.raises(ValueError, match="the model has"), edited(model, {first: before[first] + 1, **bad[wrong]}):
        raise AssertionError("the body must not run")
    assert differing(before, dict(model.named_parameters())) == 0


def test_differing_counts_bits_not_values() -> None:
    assert differing({"a": torch.tensor([0.0, 1.0, 2.0])}, {"a": torch.tensor([-0.0, 1.0, 3.0])}) == 2
    nan = torch.tensor([float("nan")])
    assert differing({"a": nan}, {"a": nan.clone()}) == 0


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed (surgery[lab])")
@pytest.mark.skipif(not (SEED0 / "qa").is_dir(), reason="seed 0 has not been trained here")
def test_a_refresh_changes_a_copy_and_is_repeatable() -> None:
    from benchmarks.lab.domains import read_items
    from benchmarks.lab.refresh import refreshed
    from surgery import Trajectory

    later = Trajectory(later=SEED0 / "qa").load()
    before = {name: parameter.detach().clone() for name, parameter in later.named_parameters()}
    items = read_items(SEED0 / "data" / "math.calibration.jsonl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's own
        new, again = (refreshed(later, SEED0, "math", items, 1) for _ in range(2))
    assert differing(before, dict(later.named_parameters())) == 0
    assert {tensor.dtype for tensor in new.values()} == {torch.bfloat16}
    assert set(new) == set(before)
    assert differing(new, again) == 0
    assert differing(before, new) > 0
