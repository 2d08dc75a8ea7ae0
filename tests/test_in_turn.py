"""Masks rolled back in turn: the bits of each one alone, nothing written twice, and the model whole at the end."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from families import build, fewer
from mutants import dies
from test_sweeps import BUDGETS, Evaluate, same, snapshot, trio
from torch import nn

from surgery import AMCSelector, Entries, Neurons, RandomSelector, Trajectory, rollback, sweep
from surgery.checkpoints.checkpoint import State
from surgery.layout import find_layout
from surgery.masks.entries import shapes_of
from surgery.masks.mask import Mask
from surgery.reverting import in_turn, writing
from surgery.reverting.in_turn import InTurn

operators = import_module("surgery.reverting.rollback")
SOME = fewer(("llama", "gpt2", "qwen3_moe"), ("llama", "gpt2", "qwen3_moe", "gpt_oss", "phi3", "mixtral"))
KINDS = [("mlp",), ("mlp", "value_channel"), "weights"]


def lots(family: str, kind: Any, seed: int) -> Any:
    """A number in [0, 1) for each unit or weight, by which masks of any size contain each other."""
    draw = torch.Generator().manual_seed(seed)
    if kind == "weights":
        shapes = shapes_of(find_layout(build(family)))
        return {part: torch.rand(a * b, generator=draw) for part, (a, b) in shapes.items()}, shapes
    sizes = find_layout(build(family), units=kind).sizes
    return {name: torch.rand(size, generator=draw) for name, size in sizes.items()}, None


def mask_of(found: Any, fraction: float) -> Mask:
    drawn, shapes = found
    if shapes is None:
        return Neurons({name: one < fraction for name, one in drawn.items()})
    return Entries({part: (one < fraction).nonzero().flatten() for part, one in drawn.items()}, shapes=shapes)


def law_of_bits(family: str, kind: Any) -> None:
    """Whichever masks came before: growing, the same, shrinking, none, and one that only overlaps."""
    one, other = lots(family, kind, 0), lots(family, kind, 1)
    masks = [mask_of(one, part) for part in (0.1, 0.3, 0.3, 0.2, 0.0, 0.5)] + [mask_of(other, 0.2), mask_of(one, 0.6)]
    model, earlier, alone = (build(family, seed=seed) for seed in (2, 1, 2))
    before = snapshot(model)
    with InTurn(model, to=earlier) as turn:
        for mask in masks:
            turn.now(mask)
            with rollback(alone, to=earlier, mask=mask):
                assert same(model, snapshot(alone))
    assert same(model, before)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("family", SOME)
def test_each_mask_has_the_bits_that_it_has_alone(family, kind):
    law_of_bits(family, kind)


def written(patch: pytest.MonkeyPatch) -> list[int]:
    """How many numbers each writing edit of a rollback writes, as they come."""
    found: list[int] = []

    def write(tensor: Any, edit: Any, rows: Any, original: Any = writing.write) -> None:
        found.append(edit.numbers)
        original(tensor, edit, rows)

    patch.setattr(operators, "write", write)
    patch.setattr(writing, "write", write)
    return found


def numbers_of(mask: Mask, model: nn.Module) -> int:
    return sum(edit.numbers for edit in mask.edits(find_layout(model, units=mask.units), "the model"))


def law_of_little() -> None:
    """From a mask to one that contains it, what is new is written; back to it, only that."""
    for kind in KINDS:
        found = lots("llama", kind, 0)
        small, large = mask_of(found, 0.2), mask_of(found, 0.5)
        model, earlier = build("llama", seed=2), build("llama", seed=1)
        less, more = numbers_of(small, model), numbers_of(large, model)
        with pytest.MonkeyPatch.context() as patch, InTurn(model, to=earlier) as turn:
            told, spent = written(patch), []
            for mask in (small, large, large, small):
                turn.now(mask)
                spent.append(sum(told))
                told.clear()
            assert spent == [less, more - less, 0, more - less]


def test_from_one_to_the_next_only_the_difference_is_written():
    law_of_little()


def law_of_sweeps() -> None:
    """A sweep writes the largest mask of a selector once, and puts it back once."""
    models = trio()
    run, before = Trajectory(**models), snapshot(models["later"])
    for selector in (RandomSelector(0.0), AMCSelector(0.0, "M", "M", "global", "weight")):
        with pytest.MonkeyPatch.context() as patch:
            told, most = written(patch), max(BUDGETS)
            sweep(run, None, selectors=[selector], budgets=BUDGETS, evaluate=Evaluate(models["earlier"]))
            everything = sum(edit.numbers for edit in _ceiling(run, selector))
            whole = numbers_of(type(selector)(**{**vars(selector), "budget": most}).select(run), models["later"])
            assert sum(told) == 2 * (everything + whole)
    assert same(models["later"], before)


def _ceiling(run: Trajectory, selector: Any) -> Any:
    (live,) = run.live(units="mlp" if isinstance(selector, RandomSelector) else ("mlp", "kv_group"))
    ones = {name: torch.ones(size, dtype=torch.bool) for name, size in live.layout.sizes.items()}
    return Neurons(ones).edits(live.layout, "the model")


def test_a_sweep_writes_each_number_once():
    law_of_sweeps()


def test_what_fails_leaves_the_mask_before_and_in_the_end_the_model():
    found = lots("llama", ("mlp",), 0)
    small, large = mask_of(found, 0.2), mask_of(found, 0.5)
    model, alone = build("llama", seed=2), build("llama", seed=2)
    earlier, before = dict(State(build("llama", seed=1))), snapshot(model)
    new = (large - small)["model.layers.1.mlp"].nonzero()[0]
    broken = earlier["model.layers.1.mlp.up_proj.weight"].clone()
    broken[new] = float("nan")
    earlier["model.layers.1.mlp.up_proj.weight"] = broken
    with InTurn(model, to=earlier) as turn:
        turn.now(small)
        with pytest.raises(ValueError, match="NaN or infinite"):
            turn.now(large)
        with rollback(alone, to=earlier, mask=small):
            assert same(model, snapshot(alone))
    assert same(model, before)


def test_a_sweep_that_a_log_stops_leaves_the_model_whole():
    models = trio()
    run, before = Trajectory(**models), snapshot(models["later"])

    def log(row: Any) -> None:
        if "random" in str(row):
            raise RuntimeError("no connection")

    with pytest.raises(RuntimeError, match="no connection"):
        sweep(
            run, None, selectors=[RandomSelector(0.0)], budgets=BUDGETS, evaluate=Evaluate(models["earlier"]), log=log
        )
    assert same(models["later"], before)


def never_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(in_turn, "inside", lambda *_: True)


def all_anew(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(in_turn, "inside", lambda *_: False)


def on_top(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Neurons, "__sub__", lambda one, _: one)


def wrong_way(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Neurons, "__sub__", lambda one, other: one & other)


def test_the_laws_kill_mutants():
    dies(never_back, lambda: law_of_bits("llama", ("mlp",)))
    dies(wrong_way, lambda: law_of_bits("llama", ("mlp",)))
    for mutant in (all_anew, on_top):
        dies(mutant, law_of_little)
    dies(all_anew, law_of_sweeps)
