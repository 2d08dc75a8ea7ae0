"""What a slot's pattern gives is what einops gives, as a view, however the tensor lies in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from einops import rearrange
from families import FAMILIES, build, fewer
from torch import Tensor

from surgery.checkpoints.checkpoint import State
from surgery.layout import find_layout, patterns

UNITS = ("mlp", "kv_group", "value_channel")


def slots(family: str) -> list[tuple[Any, Tensor]]:
    model = build(family, torch.float32, 1)
    tensors, found = State(model), []
    for kind in UNITS:
        try:
            layout = find_layout(model, units=kind)
        except ValueError:
            continue  # no such units there
        found += [(slot, tensors[slot.tensor].detach()) for block in layout.blocks for slot in block.slots]
    return found


def ways(tensor: Tensor) -> list[Tensor]:
    """The tensor as it is, with its axes the other way round in memory, and with gaps."""
    turned = tensor.permute(*reversed(range(tensor.ndim))).contiguous().permute(*reversed(range(tensor.ndim)))
    gaps = torch.stack([tensor, tensor], -1)[..., 0]
    return [tensor, turned, gaps]


def law(family: str) -> None:
    every = slots(family)
    assert every
    for slot, whole in every:
        for tensor in ways(whole):
            sizes = dict(slot.sizes) | ({} if slot.g is None else {"g": slot.parts})
            first, last = slot.rows or (0, tensor.shape[slot.dimension])
            some = tensor.narrow(slot.dimension, first, last - first)
            expected = rearrange(some, slot._split[0], **sizes)
            found = patterns.arranged(some, slot._split[0], tuple(sizes.items()))
            assert found.shape == expected.shape
            assert torch.equal(found, expected)
            assert found.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("family", fewer(("llama", "phi3", "codegen", "gpt_oss", "qwen3_5_text"), FAMILIES))
def test_the_view_is_that_of_einops(family):
    law(family)


def in_the_order_of_the_names(patch: pytest.MonkeyPatch) -> None:
    def mutant(*given: Any, original: Any = patterns._steps) -> Any:
        split, order = original(*given)
        return split, sorted(order)

    patch.setattr(patterns, "_steps", mutant)


def copied(patch: pytest.MonkeyPatch) -> None:
    def mutant(*given: Any, original: Any = patterns.arranged) -> Any:
        return original(*given).clone()

    patch.setattr(patterns, "arranged", mutant)


@pytest.mark.parametrize(
    ("mutant", "family"),
    [(in_the_order_of_the_names, "gpt2"), (copied, "llama")],
    ids=lambda one: getattr(one, "__name__", one),
)
def test_mutants_die(mutant, family, monkeypatch):
    law(family)
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        law(family)
