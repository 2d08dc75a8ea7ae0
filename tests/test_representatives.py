"""Every slot signature of every family occurs among the representatives, on which all that reads slots is tested."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from families import FAMILIES, REPRESENTATIVES, build
from torch import Tensor, nn

from surgery import Checkpoint
from surgery.layout import Block, Layout, find_layout
from surgery.layout.on_disk import folder_layout
from surgery.units import KINDS


class Signature(NamedTuple):
    """What a slot is, but for its names and sizes."""

    place: str  # "live", or "folder": on disk experts may lie in tensors of their own
    unit: str
    part: str
    pattern: str
    g: int | str | None  # which of the parts that share a tensor; "run": several of them
    cut: bool  # whether it is about some rows of the tensor only
    later: bool  # whether its first neuron is not the block's first
    hearing: str  # how ``listening`` hears the block
    heard: str | None  # the pattern from the consumer's channels to the units


def hearing(model: nn.Module, block: Block) -> str:
    """Which of the ways of ``surgery.live.hooks.listening`` hears the block's neurons."""
    consumer: Any = model.get_submodule(block.consumer)
    if not block.experts:
        return "dense"
    if hasattr(consumer, "_apply_gate"):
        return "experts with a gate" if consumer.has_gate else "experts without a gate"
    return "sorted experts" if isinstance(getattr(consumer, "weight", None), Tensor) else "batched experts"


def signatures_of(place: str, model: nn.Module, layout: Layout) -> Iterator[Signature]:
    for block in layout.blocks:
        heard = None if block.heard is None else block.heard.pattern
        for slot in block.slots:
            g = "run" if isinstance(slot.g, tuple) else slot.g
            where = (slot.rows is not None, slot.start > 0)
            yield Signature(place, block.kind, slot.part, slot.pattern, g, *where, hearing(model, block), heard)


Signatures = Callable[[str, str], frozenset[Signature]]


@pytest.fixture(scope="module")
def signatures(tmp_path_factory) -> Signatures:
    """(family, kind of unit) → the signatures of its slots, live and in a folder; none where the kind is refused."""

    @cache
    def saved(family: str) -> tuple[nn.Module, Path]:
        model, folder = build(family), tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        return model, folder

    @cache
    def found(family: str, kind: str) -> frozenset[Signature]:
        model, folder = saved(family)
        try:
            live = find_layout(model, units=kind)
        except ValueError as refused:  # which families are refused, and why: tests/test_units.py
            if "found for certain" not in str(refused):
                raise
            return frozenset()
        stored = folder_layout(folder, Checkpoint(folder).shapes, units=kind)
        return frozenset((*signatures_of("live", model, live), *signatures_of("folder", model, stored)))

    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_slot_signature_occurs_among_the_representatives(family, signatures):
    """What holds for every slot of the representatives holds for every slot of this family."""
    for kind in KINDS:
        covered = frozenset().union(*(signatures(one, kind) for one in REPRESENTATIVES[kind]))
        new = [str(one) for one in signatures(family, kind) - covered]
        assert not new, f"{family} has slots like no representative: add it to REPRESENTATIVES, or explain\n{new}"


@pytest.mark.parametrize("kind", KINDS)
def test_every_representative_is_needed(kind, signatures):
    """Each has a signature that no other has, so the law above fails without it."""
    for one in REPRESENTATIVES[kind]:
        others = frozenset().union(*(signatures(other, kind) for other in REPRESENTATIVES[kind] if other != one))
        assert signatures(one, kind) - others, f"{one} adds no signature of {kind}"
