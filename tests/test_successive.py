"""Masks rolled back in turn: the bits of each one alone, nothing written twice, and the model whole at the end."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
import torch
from families import build, fewer
from interrupts import at_every_line
from mutants import dies
from test_sweeps import BUDGETS, Evaluate, same, snapshot, trio
from torch import nn

from surgery import AMCSelector, Entries, Neurons, RandomSelector, Trajectory, rollback, sweep
from surgery.checkpoints.checkpoint import State, in_force
from surgery.devices import by_kernel
from surgery.layout import find_layout
from surgery.masks.entries import shapes_of
from surgery.masks.mask import Mask
from surgery.reverting import successive, writing
from surgery.reverting.successive import Successive

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


def law_of_bits(family: str, kind: Any, kernel: bool = False) -> None:
    """Whichever masks came before: growing, the same, shrinking, none, and one that only overlaps."""
    one, other = lots(family, kind, 0), lots(family, kind, 1)
    masks = [mask_of(one, part) for part in (0.1, 0.3, 0.3, 0.2, 0.0, 0.5)] + [mask_of(other, 0.2), mask_of(one, 0.6)]
    home = "cuda" if kernel and torch.cuda.is_available() else "cpu"
    model, earlier, alone = (build(family, seed=seed).to(home) for seed in (2, 1, 2))
    before = snapshot(model)
    with Successive(model, to=earlier) as turn:
        for mask in masks:
            with by_kernel(kernel):
                turn.now(mask)
            with by_kernel(False), rollback(alone, to=earlier, mask=mask):
                assert same(model, snapshot(alone))
    assert same(model, before)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("family", SOME)
def test_each_mask_has_the_bits_that_it_has_alone(family, kind):
    law_of_bits(family, kind)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_by_the_kernel_too(kind):
    pytest.importorskip("triton", reason="the kernel needs Triton: pip install triton")
    law_of_bits("llama", kind, kernel=True)


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
        with pytest.MonkeyPatch.context() as patch, Successive(model, to=earlier) as turn:
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
    with Successive(model, to=earlier) as turn:
        turn.now(small)
        with pytest.raises(ValueError, match="NaN or infinite"):
            turn.now(large)
        with rollback(alone, to=earlier, mask=small):
            assert same(model, snapshot(alone))
    assert same(model, before)


def law_interrupted() -> None:
    """Ctrl-C at each write of a sweep, also of those that undo: it goes on to nothing else, and the model is whole."""
    models = trio()
    run, before = Trajectory(**models), snapshot(models["later"])

    def swept() -> None:
        sweep(run, None, selectors=[RandomSelector(0.0)], budgets=[0.1, 0.4], evaluate=Evaluate(models["earlier"]))

    with pytest.MonkeyPatch.context() as patch:
        told = written(patch)
        swept()
    for at in range(len(told)):
        with pytest.MonkeyPatch.context() as patch:
            seen: list[int] = []

            def write(tensor: Any, edit: Any, rows: Any, seen: list[int] = seen, at: int = at) -> None:
                seen.append(1)
                if len(seen) == at + 1:
                    os.kill(os.getpid(), signal.SIGINT)
                edit.put(tensor, rows)

            patch.setattr(operators, "write", write)
            patch.setattr(writing, "write", write)
            with pytest.raises(KeyboardInterrupt), torch.no_grad():
                swept()
            assert same(models["later"], before), at
            assert not in_force(models["later"])


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_at_each_write_of_a_sweep_leaves_the_model_whole():
    law_interrupted()


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_at_each_line_of_an_undo_leaves_nothing_half_done():
    model, earlier, mask = build("llama", seed=2), build("llama", seed=1), mask_of(lots("llama", ("mlp",), 0), 0.3)
    before, made = snapshot(model), list[Any]()

    def call() -> None:
        made.append(rollback(model, to=earlier, mask=mask))
        made[-1].undo()

    def check(_: int) -> None:
        made[-1].undo()  # where it came before the first line of the block, it is still to be done
        assert same(model, before)
        assert not in_force(model)

    at_every_line(operators.Rollback.undo, call, check)


def test_neurons_that_are_missing_elsewhere_stay_in_the_difference():
    flags = torch.tensor([True, True, False, False])
    small = Neurons({"b": flags}, missing={"b": torch.tensor([False, False, False, True])})
    large = Neurons({"b": torch.ones(4, dtype=torch.bool)})
    assert (large - small)["b"].tolist() == [False, False, True, True]
    assert (small - large)["b"].tolist() == [False] * 4


@dataclass
class Own:
    """A mask of a user's own class: edits, and what they are counted by."""

    inner: Neurons

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def test_masks_of_other_classes_are_undone_and_written_whole():
    found = lots("llama", ("mlp",), 0)
    model, earlier, alone = build("llama", seed=2), build("llama", seed=1), build("llama", seed=2)
    before = snapshot(model)
    with Successive(model, to=earlier) as turn:
        for mask in (mask_of(found, 0.2), Own(mask_of(found, 0.4)), Own(mask_of(found, 0.6)), mask_of(found, 0.7)):  # type: ignore[arg-type]
            turn.now(mask)  # type: ignore[arg-type]
            with rollback(alone, to=earlier, mask=mask):  # type: ignore[arg-type]
                assert same(model, snapshot(alone))
    assert same(model, before)


@dataclass(frozen=True)
class Failing:
    """A selector that can't choose half of the neurons."""

    budget: float
    name = "failing"

    def select(self, run: Trajectory, data: Any = None) -> Any:
        if self.budget == 0.5:
            raise RuntimeError("too many")
        return RandomSelector(self.budget).select(run) if self.budget < 0.5 else None


def test_a_choice_that_fails_costs_no_row_before_it(tmp_path):
    models = trio()
    run, file = Trajectory(**models), tmp_path / "rows.jsonl"
    arguments = dict(selectors=[Failing(0.0)], evaluate=Evaluate(models["earlier"]), path=file)
    with pytest.raises(RuntimeError, match="too many"):
        sweep(run, None, budgets=[0.1, 0.2, 0.5, 0.3], **arguments)
    assert [json.loads(line)["budget"] for line in file.read_text().splitlines()[4:]] == [0.1, 0.2]
    with pytest.raises(ValueError, match="mask= is a NoneType: expected Neurons or Entries"):
        sweep(run, None, budgets=[0.6], **arguments)


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
    patch.setattr(successive, "inside", lambda *_: True)


def all_anew(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(successive, "inside", lambda *_: False)


def on_top(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Neurons, "__sub__", lambda one, _: one)


def wrong_way(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Neurons, "__sub__", lambda one, other: one & other)


def stopped_half_way(patch: pytest.MonkeyPatch) -> None:
    """Each undo is held together, and all of them are not."""

    def mutant(self: Successive, *_: Any) -> None:
        while self._done:
            self._done[-1][1].undo()
            self._done.pop()

    patch.setattr(Successive, "__exit__", mutant)


@pytest.mark.usefixtures("interruptible")
def test_the_laws_kill_mutants():
    dies(stopped_half_way, law_interrupted)
    dies(never_back, lambda: law_of_bits("llama", ("mlp",)))
    dies(wrong_way, lambda: law_of_bits("llama", ("mlp",)))
    for mutant in (all_anew, on_top):
        dies(mutant, law_of_little)
    dies(all_anew, law_of_sweeps)
