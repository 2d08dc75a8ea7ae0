"""Gains between two bars: the kernel keeps what torch's operations keep, counts what does not fit, notes what is wild.

Off a GPU Triton's interpreter runs it on the CPU. And what a search takes in memory, counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from families import REPRESENTATIVES, config
from mutants import dies
from test_exchange import DEVICE
from test_inner_products import DTYPES, drawn, parts
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.speed.allocations import most, uncounted
from surgery import Trajectory
from surgery.devices import by_kernel
from surgery.live import hooks
from surgery.live.hooks import only_these
from surgery.live.losses import cross_entropy, summed
from surgery.live.prompts import Batch, padded
from surgery.scores import above, lots
from surgery.scores.above import Guess, Room, keep
from surgery.scores.lots import best_of_lots
from surgery.scores.weights import between

pytest.importorskip("triton", reason="the kernel needs Triton: pip install triton")
tiles, kernels = import_module("surgery.scores.tiles"), import_module("surgery.scores.kernel")
KINDS = [(family, kind) for kind, families in REPRESENTATIVES.items() for family in families]
START, SCALE = 1 << 33, 1 / 7


def law(axes: int, *views: Tensor, room: int | None = None) -> None:
    """What is kept is what of the products of float32 numbers lies between the bars, at its place row by row."""
    g, now, then = (view.float() for view in views)
    steps = (now - then).flatten()
    gains = steps * SCALE * g.flatten()
    high = gains.sort().values[-1 - gains.numel() // 50]  # it is kept itself
    bars = torch.stack([gains.quantile(0.7).clamp(min=0) if gains.numel() > 3 else torch.zeros_like(high), high])
    at = ((gains > bars[0]) & (gains <= bars[1])).nonzero().flatten()
    size = len(at) if room is None else min(room, len(at))
    held = Room.of(size, 3, gains.device)
    keep(held, views, axes, bars, START, SCALE, 1)
    assert held.counts.tolist() == [len(at), 0, 0, 0]
    order = held.where.argsort()
    where = held.where[order] - START
    assert set(where.tolist()) <= set(at.tolist())
    assert len(where.unique()) == size
    assert torch.equal(held.gains[order], gains[where])
    assert torch.equal(held.steps[order], steps[where])


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_every_slot_of_every_family(family, kind):
    for part, views in parts(family, kind):
        law(part.axes, *views)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_every_dtype(dtype):
    for part, (g, now, then) in parts("llama", "mlp", dtype)[:3]:
        law(part.axes, g, now, then)
        law(part.axes, g, now, then.to(torch.float32))


def law_shapes() -> None:
    """Whole in tiles and not, as columns, with holes, in any order of axes, and too many for the room."""
    for rows, width in ((1, 1), (1, 700), (7, 130), (16, 128), (300, 3)):
        law(1, *drawn(rows, width))
        law(1, *(one.T for one in drawn(width, rows)))
        law(1, *(one[::2, 1:] for one in drawn(2 * rows, width + 1)))
        g, now, then = drawn(rows, width)
        law(1, g, now.T.contiguous().T, then)  # each lies as it does
    law(2, *(one.transpose(1, 2) for one in drawn(2, 33, 20)))
    law(1, *(one.permute(2, 0, 1) for one in drawn(5, 7, 6)))
    law(2, *(one.permute(3, 1, 0, 2, 4) for one in drawn(2, 3, 4, 5, 2)))  # more axes than a kernel walks
    law(1, *drawn(40, 130), room=100)


def test_whatever_their_shapes_and_strides():
    law_shapes()


def law_grid() -> None:
    """A grid of one axis, which has room for 2³¹ programs: the others have room for 65,535."""
    seen: list[Any] = []

    class Launched:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            seen.append(grid)
            return lambda *given, **fixed: None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "above", Launched())
        for heads, size, hidden in ((8, 128, 8192), (16, 128, 16384), (71, 64, 4544)):  # of one group
            q = torch.empty(8, heads, size, hidden, device="meta")
            o = torch.empty(hidden, 8, heads, size, device="meta").permute(1, 2, 3, 0)
            for view in (q, o):
                keep(Room.of(1, 1, view.device), [view] * 3, 1, torch.empty(2, device="meta"), 0, 1.0, 0)
    assert len(seen) == 6
    assert all(len(grid) == 1 and 2**31 > grid[0] >= 8 * 8 * 128 * 8192 // (16 * 128) // 8 for grid in seen)


def test_its_grid_has_room_for_large_models():
    law_grid()


def law_axes() -> None:
    """Numbers in three axes, of which two follow each other in memory, are two: queries and outputs of a group."""
    for views in (drawn(3, 4, 8, 33), [one.permute(1, 2, 3, 0) for one in drawn(20, 3, 4, 8)]):
        found = tiles.Tiles.of(views, 1)
        assert found is not None
        assert found.sides == (tiles.ACROSS, tiles.ALONG)  # along a neuron's numbers, which follow each other
        law(1, *views)


def test_axes_that_follow_each_other_are_one():
    law_axes()


def law_wild() -> None:
    for wild in ("nan", "inf", "-inf"):
        views, room = drawn(20, 130), Room.of(10, 3, torch.device(DEVICE))
        views[0][13, 129] = float(wild)
        keep(room, views, 1, torch.tensor([1e9, float("inf")], device=DEVICE), START, SCALE, 2)
        high = wild != "nan" and (wild == "inf") == bool(
            views[1][13, 129] > views[2][13, 129]
        )  # gradient · (now − then)
        assert room.counts.tolist() == [int(high), 0, 0, 1]


def test_what_is_not_finite_is_noted_for_its_tensor():
    law_wild()


def test_it_is_tried_whatever_torch_makes_by_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        above._try(torch.device(DEVICE))
    finally:
        torch.set_default_dtype(torch.float32)


def test_where_triton_can_not_run_it_is_said(monkeypatch):
    device, tried = torch.device(DEVICE), above._works.__wrapped__
    assert tried(device)
    monkeypatch.setattr(above, "keep", lambda *_: None)
    with pytest.warns(UserWarning, match="compared by slower operations, and waited for: it does not keep"):
        assert not tried(device)


# Memory.


def sized(seed: int) -> nn.Module:
    made = config("llama")
    made.hidden_size, made.intermediate_size, made.num_hidden_layers = 256, 512, 3
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(made).to(torch.bfloat16).eval()  # type: ignore[no-any-return]


@contextmanager
def as_on_a_gpu(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel's way, its work done by others, since its interpreter holds on to what it was given.

    Not counted: what no model makes larger, a sample of 65,536 gains and histograms of as many bins.
    """

    def quietly(function: Callable[..., Any]) -> Callable[..., Any]:
        def work(*given: Any) -> Any:
            with uncounted():
                return function(*given)

        return work

    def instead(room: Room, views: Any, axes: int, bars: Tensor, start: int, scale: float, tensor: int) -> None:
        g, now, then = (view.float().flatten() for view in views)
        gains = (now - then) * scale * g
        at = between(gains, bars)
        have, more = int(room.counts[0]), min(len(at), len(room.where) - int(room.counts[0]))
        room.counts[0] += len(at)
        if more > 0:
            room.where[have : have + more] = at[:more] + start
            room.gains[have : have + more], room.steps[have : have + more] = gains[at[:more]], (now - then)[at[:more]]

    patch.setattr(above, "keep", quietly(instead))
    patch.setattr(lots, "best_of_all", quietly(lots.best_of_all))
    patch.setattr(lots, "best", quietly(lots.best))
    patch.setattr(lots, "SMALL", 0)
    patch.setattr(above.Sample, "add", quietly(above.Sample.add))
    patch.setattr(above.Sample, "bar", quietly(above.Sample.bar))
    patch.setattr(hooks, "CHUNK", 1 << 10)  # as small beside this model as it is beside a real one
    with by_kernel(True):
        yield


def beyond_the_passes(count: int, begin: Guess, prompts: list[Batch], again: bool = False) -> float:
    """Bytes a candidate that a search takes beyond what its passes take, which drop each gradient as it comes.

    ``again``: the search that follows.
    """
    earlier, later = sized(1), sized(2)
    run = Trajectory(earlier=earlier, later=later)
    (live,) = run.live()
    held = {slot.tensor for block in live.layout.blocks for slot in block.slots}
    drop: dict[nn.Parameter, Callable[[Tensor], None]] = {
        one: lambda _: None for name, one in later.named_parameters() if name in held
    }

    def bare() -> None:
        with only_these(drop, later):
            for batch in prompts:
                summed(cross_entropy, later, batch).backward()

    def search() -> Guess:
        return best_of_lots(
            run, [prompts[:1], prompts[1:]], count, loss=cross_entropy, units=("mlp",),
            without=torch.arange(len(prompts)), begin=begin,
        ).next  # fmt: skip

    bare()
    begin = search() if again else begin
    numbers = sum(one.numel() for one in drop)
    return (most(search) - most(bare)) / numbers


def test_what_is_freed_counts_no_more():
    def work() -> None:
        kept = torch.zeros(1000)
        for _ in range(5):
            (kept + 1).view(10, 100).sum()

    assert 8000 <= most(work) <= 8100


def law_memory() -> None:
    with pytest.MonkeyPatch.context() as patch, as_on_a_gpu(patch):
        few, many = ([padded([([5, 6, 7], [8, 9, 2])], 0)] * count for count in (2, 6))
        small = beyond_the_passes(2, Guess(1e-4), few)
        assert small <= 0.2  # of which the index of 256 numbers a neuron takes 0.03
        for again in (False, True):  # the room lies where the last layer's activations were
            assert beyond_the_passes(2, Guess(1e-4), [padded([(list(range(30)),) * 2] * 4, 0)] * 2, again) <= 0.12
        assert beyond_the_passes(2, Guess(1e-4), many) <= small + 0.01  # several passes keep no sums
        for begin in (Guess(0.03), Guess(0.2), Guess(1.0), Guess(1e-4, 1e-30), Guess(0.2, 1e-30), Guess(1e-4, 1e9)):
            assert beyond_the_passes(10_000, begin, few) <= 2  # nearly a hundredth of the weights
        assert beyond_the_passes(60_000, Guess(0.05), few) <= 5.4  # looked for twice, and what the 60,000 take


def test_a_search_takes_little_where_little_is_looked_for_and_never_two_bytes_a_weight():
    law_memory()


# Mutants.


def the_room_is_taken_before(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Any, *given: Any, original: Any = above.Above.__init__) -> None:
        original(self, *given)
        assert len(self.room.counts)

    patch.setattr(above.Above, "__init__", mutant)


def a_second_axis(patch: pytest.MonkeyPatch) -> None:
    def mutant(room: Any, views: Any, found: Any, *given: Any) -> None:
        (count, width), (high, lanes) = found.shape, found.sides
        kernels.above[(-(-count // high), -(-width // lanes))]()

    patch.setattr(above, "_launch", mutant)


def as_if_not_turned(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tiles.Tiles, "places", lambda self: (self.numbers[0][1], 1))


def a_failed_search_stays(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Any, *given: Any, original: Any = lots._Few.best, kept: list[Any] = []) -> Any:  # noqa: B006
        found = original(self, *given)
        kept[:] = [self]
        return found

    patch.setattr(lots._Few, "best", mutant)


def in_the_other_order(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Any, original: Any = tiles.Tiles.given.func) -> Any:
        count, inside, width, across, *ways = original(self)
        return (count, inside, count, across, *ways) if width > 1 else (count, inside, width, across, *ways)

    patch.setattr(tiles.Tiles, "given", property(mutant))


def beyond_the_room(patch: pytest.MonkeyPatch) -> None:
    def mutant(room: Any, *given: Any, original: Any = above.keep) -> Any:
        large = Room.of(10_000, len(room.counts) - 1, room.where.device)
        original(large, *given)
        size = len(room.where)
        room.where[:], room.gains[:], room.steps[:] = large.where[:size], large.gains[:size], large.steps[:size]
        room.counts[:] = large.counts.clamp(max=size)

    patch.setattr(import_module(__name__), "keep", mutant)


def of_another_tensor(patch: pytest.MonkeyPatch) -> None:
    def mutant(*given: Any, original: Any = above.keep) -> Any:
        return original(*given[:-1], 0)

    patch.setattr(import_module(__name__), "keep", mutant)


def sums_are_kept(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Any, block: Any, slot: Any, grad: Tensor, tokens: int, original: Any = above.Above.add) -> Any:
        self.sums = [*getattr(self, "sums", []), grad.clone()]
        return original(self, block, slot, grad, tokens)

    patch.setattr(above.Above, "add", mutant)


def the_room_stays(patch: pytest.MonkeyPatch) -> None:
    def mutant(places: Any, room: Any, *given: Any, original: Any = lots._Few.of) -> Any:
        before = replace(room)
        found = original(places, room, *given)
        found.room = before
        return found

    patch.setattr(lots._Few, "of", mutant)


@pytest.mark.parametrize(
    ("mutant", "law"),
    [
        (in_the_other_order, law_shapes), (beyond_the_room, law_shapes), (of_another_tensor, law_wild),
        (a_second_axis, law_grid), (as_if_not_turned, law_axes), (a_failed_search_stays, law_memory),
        (the_room_is_taken_before, law_memory), (sums_are_kept, law_memory), (the_room_stays, law_memory),
    ],
    ids=lambda one: one.__name__,
)  # fmt: skip
def test_mutants_die(mutant, law):
    dies(mutant, law)
