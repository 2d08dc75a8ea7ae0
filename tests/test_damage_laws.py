"""What D promises in numbers: how precise it is in bf16, what it adds up to, how much memory it takes; with mutants."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import pair
from mutants import dies
from test_attribution import vectors
from test_scores import batches

from surgery import Trajectory, attribution, damage, distillation, find_layout
from surgery.predictions import Divergence, positions, summed

JOINT = ("mlp", "kv_group")
PRECISE = [("qwen3", "mlp"), ("gpt2", JOINT), ("qwen3", JOINT), ("mixtral", "mlp"), ("gpt_oss", JOINT)]


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference, in parts of what was expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# In bf16.


@pytest.mark.parametrize("loss", ["kl", "hellinger"])
@pytest.mark.parametrize(("family", "units"), PRECISE)
def test_d_in_bf16_is_that_of_the_same_weights_in_float32(family: str, units: Any, loss: Divergence):
    """But for what the passes through the model round: up to 5 % of a block's norm here, in nine families."""
    earlier, later = pair(family, torch.bfloat16)
    narrow = damage(Trajectory(earlier=earlier, later=later, units=units), batches(labels=True), loss=loss)
    wide = Trajectory(earlier=copy.deepcopy(earlier).float(), later=copy.deepcopy(later).float(), units=units)
    for name, expected in damage(wide, batches(labels=True), loss=loss).items():
        assert apart(narrow[name], expected) < 0.08, name


@pytest.mark.parametrize(("family", "units"), PRECISE)
def test_what_is_made_of_bf16_gradients_is_float32(family: str, units: Any):
    """Against the same gradients, bit for bit, whose products and sums are float64 throughout."""
    law_reduced_wide(family, units)


def test_a_hundred_times_the_same_prompts_say_the_same():
    law_summed_wide()


def law_reduced_wide(family: str = "qwen3", units: Any = "mlp") -> None:
    earlier, later = pair(family, torch.bfloat16)
    data = batches(labels=True)
    loss, layout = distillation(earlier, data), find_layout(later, units=units)
    theirs, ours = dict(earlier.named_parameters()), dict(later.named_parameters())
    expected = {block.name: torch.zeros(block.neurons, dtype=torch.float64) for block in layout.blocks}
    for batch in data:
        later.zero_grad()
        summed(loss, later, batch).backward()
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in ours.items()}
        for block in layout.blocks:
            change = vectors(ours, block) - vectors(theirs, block)
            expected[block.name] += (vectors(grads, block) * change).sum(1).detach()
    later.zero_grad(set_to_none=True)
    tokens = sum(int(positions(batch).sum()) for batch in data)
    for name, value in damage(Trajectory(earlier=earlier, later=later, units=units), data).items():
        assert apart(value, expected[name] / tokens) < 1e-5, name


def law_summed_wide() -> None:
    earlier, later = pair("gpt2", torch.bfloat16)
    run, data = Trajectory(earlier=earlier, later=later), batches(labels=True)[1:]
    often = damage(run, data * 100)
    for name, once in damage(run, data).items():
        assert apart(often[name], once) < 1e-5, name


def products_in_bf16(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attribution, "dot", lambda g, step: (g * step).bfloat16().sum(1).double())


def changes_in_bf16(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attribution, "dot", lambda g, step: (g * step.bfloat16()).sum(1).double())


def rows_in_bf16(patch: pytest.MonkeyPatch) -> None:
    """A row's sum, rounded."""
    patch.setattr(attribution, "dot", lambda g, step: (g * step).sum(1).bfloat16().double())


def batches_in_bf16(patch: pytest.MonkeyPatch) -> None:
    def narrow(self: Any, original: Any = attribution._Total.__post_init__) -> None:
        original(self)
        self.sums = {name: value.bfloat16() for name, value in self.sums.items()}

    patch.setattr(attribution._Total, "__post_init__", narrow)


@pytest.mark.parametrize("mutant", [products_in_bf16, changes_in_bf16, rows_in_bf16, batches_in_bf16])
def test_a_narrow_reduction_dies(mutant: Any):
    dies(mutant, law_reduced_wide, AssertionError)


def test_batches_that_are_added_up_in_bf16_die():
    dies(batches_in_bf16, law_summed_wide, AssertionError)
