"""The laws of models that several processes hold together; each process runs all of them (tests/sharded.py)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import sharded
import torch
import torch.distributed as dist
from torch import nn

from surgery import Entries, Neurons, Trajectory, rollback
from surgery.layout.finding import find_layout
from surgery.layout.slots import Block
from surgery.masks.entries import shapes_of

HOWS = ("fsdp", "tp") if True else ()


def numbers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter, whole."""
    from surgery.layout.sharding import is_sharded, stored

    held = stored(model).named_parameters()
    return {n: (p.full_tensor() if is_sharded(p) else p).detach().clone() for n, p in held}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def some_units(model: nn.Module, units: object, seed: int = 0) -> Neurons:
    draw = torch.Generator().manual_seed(seed)
    sizes = find_layout(model, units=units).sizes
    return Neurons({name: torch.rand(size, generator=draw) < 0.3 for name, size in sizes.items()})


def some_weights(model: nn.Module, units: object) -> Entries:
    draw, shapes = torch.Generator().manual_seed(1), shapes_of(find_layout(model, units=units))
    found = {part: (torch.rand(n * w, generator=draw) < 0.1).nonzero().flatten() for part, (n, w) in shapes.items()}
    return Entries(found, shapes=shapes)


def law_rollback(home: Path, family: str, how: str) -> None:
    """Weights bit for bit as in one process, undo the identity, and each process reads only its own rows of ``to``."""
    earlier, later = sharded.folders(home, family)
    model, alone = sharded.sharded(later, how), sharded.one(later)
    before = numbers(alone)
    assert same(numbers(model), before)
    read, asked = [0], {"rows": Block.rows, "entries": Block.entries}

    def counting(name: str, self, *args):
        found = asked[name](self, *args)
        read[0] += found.numel()
        return found

    both = ("mlp", "kv_group")
    for mask in (some_units(alone, "mlp"), some_units(alone, both), some_weights(alone, both), some_units(alone, "value_channel")):
        for strength in (1.0, 0.5):
            reference = rollback(alone, to=earlier, mask=mask, strength=strength)
            read[0] = 0
            for name in asked:
                setattr(Block, name, lambda self, *args, name=name: counting(name, self, *args))
            done = rollback(model, to=earlier, mask=mask, strength=strength)
            for name, real in asked.items():
                setattr(Block, name, real)
            total = torch.tensor(read[0])
            dist.all_reduce(total)
            assert same(numbers(model), numbers(alone)), (mask.units, strength)
            assert (done.neurons, done.parameters, done.tensors, done.changed) == (
                reference.neurons, reference.parameters, reference.tensors, reference.changed,
            )  # fmt: skip
            assert int(total) == sum(done.parameters.values())
            assert read[0] < int(total)
            with torch.no_grad():  # a forward pass leaves parameters gathered
                model(input_ids=torch.arange(4, 10)[None])
            done.undo()
            reference.undo()
            assert same(numbers(model), before) and same(numbers(alone), before)


LAWS: dict[str, Callable[[Path], None]] = {}
for _family in sharded.FAMILIES:
    for _how in ("fsdp", "tp"):
        LAWS[f"rollback {_family} {_how}"] = partial(law_rollback, family=_family, how=_how)
