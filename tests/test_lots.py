"""The best weights by the lowest of their gains on several lots, without a number kept per weight; and what waits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from families import build, config, fewer
from mutants import dies
from simulated import Waits, bare, gpu
from test_attribution import pair
from test_scores import batches
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from surgery import Neurons, Trajectory, activation, damage, strengths
from surgery.devices import by_kernel
from surgery.layout import find_layout
from surgery.live import distillation, prompts, respond
from surgery.live.losses import Loss, cross_entropy, mean_loss, tokens_in
from surgery.live.prompts import Batch, padded
from surgery.masks.entries import shapes_of
from surgery.scores import above, entry_gains, lots, reversal_cost
from surgery.scores.above import Guess
from surgery.scores.lots import Best, best_of_lots
from surgery.scores.weight_places import Places
from surgery.scores.weights import best

inner = import_module("surgery.scores.inner_products")
TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="the kernel needs Triton: pip install triton")
UNITS = ("mlp", "kv_group")
SOME = fewer(("llama", "phi3", "gpt2", "qwen3_moe"), ("llama", "phi3", "gpt2", "qwen3_moe", "gpt_oss", "mixtral"))
NONE = torch.zeros(0, dtype=torch.int64)
TWO = [batches(labels=True)[:1], batches(labels=True)[1:]]


def from_files(run: Trajectory, some: list[list[Batch]], count: int, without: Tensor, loss: Any) -> Tensor:
    """The same from every weight's gain on every lot."""
    lowest = torch.stack([entry_gains(run, lot, loss=loss, units=UNITS).flat for lot in some]).amin(0)
    lowest[without] = 0
    return best(lowest, count)


def searched(run: Trajectory, some: list[list[Batch]], count: int, without: Tensor = NONE, **how: Any) -> Best:
    return best_of_lots(run, some, count, units=UNITS, without=without, **{"loss": cross_entropy, **how})


def tied(family: str) -> tuple[Trajectory, Callable[[nn.Module, Batch], Tensor]]:
    """Two models a few coarse steps apart, and a loss with a gradient of 1 or -1: a few gains, each very often."""
    earlier, later, draw = build(family), build(family), torch.Generator().manual_seed(1)
    signs = {}
    with torch.no_grad():
        for (name, one), other in zip(later.named_parameters(), earlier.parameters(), strict=True):
            one.copy_(torch.randint(-2, 3, one.shape, generator=draw) / 4)
            other.zero_()
            signs[name] = torch.randint(0, 2, one.shape, generator=draw) * 2.0 - 1

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        found: Tensor = sum((p * signs[name]).sum() for name, p in model.named_parameters())  # type: ignore[assignment]
        return found

    return Trajectory(earlier=earlier, later=later), loss


@pytest.fixture(params=[False, pytest.param(True, marks=TRITON)], ids=["operations", "kernel"])
def slow(request: pytest.FixtureRequest) -> Iterator[bool]:
    """The way of the CPU, and that of a GPU in Triton's interpreter, which is slow."""
    with by_kernel(request.param):
        yield request.param


MIXED = [TWO[1], [*TWO[1], *TWO[0]], TWO[0]]  # several passes a lot, and a third lot


def law_exact(
    family: str, dtype: torch.dtype = torch.float32, kinds: Any = (TWO, MIXED, TWO[:1]), counts: Any = (1, 300, 10**6)
) -> None:
    earlier, later = pair(family, dtype)
    run = Trajectory(earlier=earlier, later=later)
    for some in kinds:
        without = from_files(run, some, 20, NONE, cross_entropy)[::2]
        for count in counts:
            wanted, high = from_files(run, some, count, without, cross_entropy), Guess(1e-9, bar=1e9)
            assert searched(run, some, count, without).chosen.equal(wanted)
            assert searched(run, some, count, without, begin=Guess(1e-9)).chosen.equal(wanted)
            assert searched(run, some, count, without, begin=high).chosen.equal(wanted)


@pytest.mark.parametrize(("family", "dtype"), [*((f, torch.float32) for f in SOME), ("llama", torch.bfloat16)], ids=str)
def test_they_are_those_of_all_gains(family, dtype, slow):
    law_exact(family, dtype, **({"kinds": (MIXED,), "counts": (300,)} if slow else {}))


def law_small(counts: Any = (1, 300, 10**6)) -> None:
    """Rooms that are too small, bars that are too high: measured again, and the same in the end."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, size in (
            (lots, "SMALL", 5), (lots, "LEAST", 1e-9), (lots, "SPARE", 0), (lots, "ROOM", 0.5), (above, "SAMPLES", 300),
        ):  # fmt: skip
            patch.setattr(module, name, size)
        law_exact("llama", kinds=(TWO,), counts=counts)


def test_too_small_a_room_and_too_high_a_bar_cost_passes_and_change_nothing(slow):
    law_small(*[(300,)] * slow)


BEGINNINGS = (None, Guess(1e-9), Guess(1.0), Guess(0.0, 1e9), Guess(1e-9, 1e-30))


def law_bounded(counts: Any = (1, 300, 10**6), beginnings: Any = BEGINNINGS) -> None:
    """However many are looked for, and wherever a search begins, there is room for a twentieth at most at once."""
    earlier, later = pair("llama")
    run, sizes, real = Trajectory(earlier=earlier, later=later), list[int](), above.Room.of
    with pytest.MonkeyPatch.context() as patch:
        for name, size in (("SMALL", 5), ("MOST", 1 / 20), ("STEP", 1 / 25)):
            patch.setattr(lots, name, size)
        patch.setattr(above.Room, "of", lambda size, *given: (sizes.append(size), real(size, *given))[1])
        for count in counts:
            wanted = from_files(run, TWO, count, NONE, cross_entropy)
            for begin in beginnings:
                assert searched(run, TWO, count, begin=begin).chosen.equal(wanted)
    (live,) = run.live(units=UNITS)
    assert max(sizes) <= Places(live).here / 20 + 5


def test_there_is_never_room_for_more_than_a_part_of_the_weights(slow):
    law_bounded(*[(300,), BEGINNINGS[3:]] * slow)


def law_uneven(factors: Any = (30, 100)) -> None:
    """The bound holds where an eighth of the weights, measured first or last, has far higher gains than the others."""
    run, sizes, order = Trajectory(None, *pair("llama")), list[int](), dict[str, int]()
    real, room, between = lots._measure, above.Room.of, lots._First.between
    bars: list[float] = []

    def measure(run: Any, live: Any, loss: Any, lot: Any, add: Any) -> None:
        def scaled(block: Any, slot: Any, grad: Tensor, tokens: int) -> None:
            order.setdefault(slot.tensor, grad.numel())
            add(block, slot, grad * (factor if slot.tensor in high else 1), tokens)

        real(run, live, loss, lot, scaled)

    def looked(self: Any, bar: float, held: Any, reach: float) -> Any:
        bars.append(held.bar)
        return between(self, bar, held, reach)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lots, "_measure", measure)
        patch.setattr(lots._First, "between", looked)
        patch.setattr(above.Room, "of", lambda size, *given: (sizes.append(size), room(size, *given))[1])
        high, factor = set[str](), 1
        searched(run, TWO, 1)
        for names, times in itertools.product((list(order), list(order)[::-1]), factors):
            here, high, factor = sum(order.values()), set(), times
            for name in names:
                if sum(order[one] for one in high) + order[name] > here / 8:
                    break
                high.add(name)
            patch.setattr(lots, "MOST", 1.0)
            wanted = searched(run, TWO, 2000, begin=Guess(1.0, 1e-30))
            patch.setattr(lots, "MOST", 1 / 16)
            patch.setattr(lots, "SMALL", 5)
            given = [Guess(0.05, part * wanted.next.bar) for part in (3, 10, 30, 60)]
            for begin in (None, Guess(0.05), Guess(1.0), Guess(0.1, 1e-30), *given):
                sizes.clear()
                bars.clear()
                assert searched(run, TWO, 2000, begin=begin).chosen.equal(wanted.chosen)
                assert max(sizes) <= here / 16 + 5
                assert bars == sorted(bars, reverse=True)


def test_the_bound_holds_where_layers_differ_much():
    law_uneven()


def law_equal() -> None:
    """All that equal the last one stay: of several processes' equal gains the first are not known before they meet."""
    where, lowest = torch.tensor([2, 3, 5, 7, 8, 9]), torch.tensor([1.0, 2.0, 2.0, 0.0, 3.0, 2.0])
    held = lots._Held.nothing().joined(where, lowest, 0.5, 5, 2)
    assert held.where.tolist() == [3, 5, 8, 9]
    assert held.lowest.tolist() == [2.0, 2.0, 3.0, 2.0]
    assert held.joined(where[:1] + 2, lowest[:1], 0.25, 1, 2).where.tolist() == [3, 4, 5, 8, 9]
    assert lots._Held.nothing().joined(where, lowest.clamp(max=0), 0.5, 0, 2).where.tolist() == []


def test_all_that_equal_the_last_of_the_best_are_held():
    law_equal()


def law_shaky() -> None:
    """Where gradients differ from pass to pass, as on a GPU, no weight is taken twice."""
    run, real, calls = Trajectory(None, *pair("llama")), lots._measure, itertools.count()

    def shaky(run: Any, live: Any, loss: Any, lot: Any, add: Any) -> None:
        scale = 0.9 ** (next(calls) % 3)
        real(run, live, loss, lot, lambda block, slot, grad, tokens: add(block, slot, grad * scale, tokens))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lots, "_measure", shaky)
        patch.setattr(lots, "SMALL", 5)
        for begin in (Guess(0.01), Guess(1e-9, 1e9), Guess(1e-9, 1e-5)):
            found = searched(run, TWO, 300, begin=begin).chosen
            assert len(found.unique()) == len(found) == 300


def test_no_weight_is_taken_twice():
    law_shaky()


def law_ties(families: Any = ("gpt2", "qwen3_moe"), counts: Any = (1, 200, 5000)) -> None:
    for family in families:
        run, loss = tied(family)
        for count in counts:
            wanted = from_files(run, TWO, count, NONE, loss)
            assert len(wanted) == count
            for begin in (None, Guess(1e-3), Guess(1.0), Guess(1e-3, 1e-6)):
                assert searched(run, TWO, count, loss=loss, begin=begin).chosen.equal(wanted)


def test_of_equal_gains_the_first_are_taken(slow):
    law_ties(*(("gpt2",), (200,)) * slow)


@pytest.mark.usefixtures("slow")
def test_what_is_not_finite_is_refused():
    earlier, later = build("llama", seed=1), build("llama", seed=2)

    def loss(model: Any, batch: Batch) -> Tensor:
        found: Tensor = cross_entropy(model, batch)
        return found + (model.model.layers[0].mlp.up_proj.weight * torch.tensor([float("inf"), *[0.0] * 31])).sum()

    with pytest.raises(ValueError, match=r"gradient of 'model.layers.0.mlp.up_proj.weight' is NaN or infinite"):
        searched(Trajectory(earlier=earlier, later=later), TWO, 5, loss=loss)


def test_the_next_search_looks_above_a_part_of_the_lowest_gain_that_was_taken():
    run, (one, other) = Trajectory(None, *pair("llama")), TWO
    found = searched(run, [one, other], 10, begin=Guess(1.0))
    first, second = (entry_gains(run, lot, loss=cross_entropy, units=UNITS).flat for lot in (one, other))
    bar = lots.DROP * float(torch.minimum(first, second)[found.chosen].min())
    assert found.next.bar == pytest.approx(bar)
    assert found.next.reach == pytest.approx(int((first >= bar).sum()) / len(first))
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        real = lots._Few.best
        patch.setattr(lots._Few, "best", lambda self, *given: (kept.append(self.where), real(self, *given))[1])
        assert searched(run, [one, other], 10, begin=found.next).chosen.equal(found.chosen)
    assert [len(where) for where in kept] == [int((first > bar).sum())]
    assert searched(run, [one, other], 10, begin=found.next).chosen.equal(found.chosen)


# Prompts that go through a model together.


@pytest.mark.parametrize("divergence", ["kl", "hellinger"])
def test_prompts_that_go_through_together_lose_what_they_lose_apart(divergence):
    earlier, later = pair("llama")
    data = [*batches(labels=True), padded([([3] * 30, [4])], 0)]
    far = distillation(earlier, data, divergence=divergence)
    made = far.joined(data)
    assert len(made) == 1
    assert tokens_in(made) == tokens_in(data)
    assert mean_loss(far, later, made) == pytest.approx(mean_loss(far, later, data), rel=1e-5)
    assert mean_loss(far.by("kl"), later, made) == pytest.approx(mean_loss(far.by("kl"), later, data), rel=1e-5)


def test_as_many_go_together_as_fit(monkeypatch):
    monkeypatch.setattr(prompts, "TOKENS", 20)
    some = [padded([([5] * size, [6])] * rows, 0) for size, rows in ((3, 2), (4, 1), (9, 1), (9, 1), (29, 1))]
    groups = prompts.together(some)
    assert [len(group) for group in groups] == [2, 2, 1]
    assert [batch for group in groups for batch in group] == some
    bare = {name: value for name, value in some[0].items() if name != "labels"}
    assert [len(group) for group in prompts.together([some[0], bare, bare])] == [1, 2]


# What waits for a GPU.


def deep(layers: int) -> nn.Module:
    made = config("llama")
    made.num_hidden_layers = layers
    return AutoModelForCausalLM.from_config(made).eval()  # type: ignore[no-any-return]


@contextmanager
def interpreted() -> Iterator[None]:
    """On a simulated GPU: the kernel runs in Triton's interpreter, which sees the tensors as what they are."""
    real = above._launch

    def launch(*given: Any) -> None:
        with bare():
            real(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(above, "_launch", launch)
        patch.setattr(above, "takes_kernel", lambda *_: True)
        yield


def waits(
    work: Callable[[Trajectory, list[Batch], Loss], object], layers: int, count: int, home: str = "cuda"
) -> Waits:
    """Where the CPU waits for a simulated GPU while it works on a model of some layers and some batches."""
    with gpu() as found:
        earlier, later = deep(layers).to(home), deep(layers).to("cuda")
        data = [padded([([5, 6, 7 + at], [8, 9, 2])], 0) for at in range(count)]
        far = distillation(earlier, data)
        run = Trajectory(earlier=earlier, later=later)
        run.load()
        found.clear()
        work(run, data, far)
        return Waits(found)


WORK: dict[str, Callable[[Trajectory, list[Batch], Loss], object]] = {
    "A": lambda run, data, far: activation(run.load(), data),
    "D": lambda run, data, far: damage(run, data, loss=far),
    "D of single weights": lambda run, data, far: searched(run, [data[:1], data[1:]], 20, loss=far),
    "the loss": lambda run, data, far: mean_loss(far, run.load(), data),
}


@pytest.mark.parametrize("home", ["cuda", "cpu"])
@pytest.mark.parametrize("name", [pytest.param(one, marks=[TRITON] * ("single" in one)) for one in WORK])
def test_nothing_is_waited_for_by_batch_or_by_tensor(name, home, monkeypatch):
    """Also where the earlier model's weights have to be sent."""
    monkeypatch.setattr(prompts, "TOKENS", 6)  # each prompt goes through alone
    with interpreted() if name == "D of single weights" else nullcontext():
        few, batches, layers = (waits(WORK[name], *sizes, home) for sizes in ((1, 2), (1, 4), (2, 2)))
    assert few
    assert len(few) == len(batches) == len(layers), "\n".join(layers)
    assert len(few) <= 16


def law_sent() -> None:
    """Earlier weights that lie on the CPU are sent as they lie in memory, each of them once a pass."""
    found: list[Tensor] = []

    def noted(view: Tensor, device: torch.device, real: Any = above.sent) -> Tensor:
        if view.device.type == "cpu":
            found.append(view)
        return real(view, device)  # type: ignore[no-any-return]

    with interpreted(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(above, "sent", noted)
        waits(lambda run, data, far: searched(run, [data[:1]], 20, loss=far, begin=Guess(1.0, 1e-30)), 1, 1, "cpu")
    assert all(
        view.permute(sorted(range(view.ndim), key=lambda at: -view.stride(at))).is_contiguous() for view in found
    )
    shapes = shapes_of(find_layout(deep(1), units=UNITS))
    assert sum(view.numel() for view in found) == sum(neurons * width for neurons, width in shapes.values())


@TRITON
def test_earlier_weights_are_sent_as_they_lie():
    law_sent()


def half_back(run: Trajectory) -> Neurons:
    sizes = find_layout(run.load()).sizes
    return Neurons({name: torch.arange(size) % 2 == 0 for name, size in sizes.items()})


BY_PASS: dict[str, Callable[[Trajectory, list[Batch], Loss], object]] = {
    "protect": lambda run, data, far: reversal_cost(run, data),
    "strengths": lambda run, data, far: strengths(run, data, half_back(run), passes=2, loss=far),
    "respond": lambda run, data, far: respond(
        run.load(), [{"input_ids": batch["input_ids"]} for batch in data], max_new_tokens=2
    ),
}


@pytest.mark.parametrize("name", BY_PASS)
def test_nothing_is_waited_for_by_batch_where_a_model_is_rolled_back_or_answers(name, monkeypatch):
    monkeypatch.setattr(prompts, "TOKENS", 6)
    few, many = (
        [one for one in waits(BY_PASS[name], 1, count) if name != "protect" or "losses.py" not in one]
        for count in (2, 4)
    )  # protecting makes predictions anew, which go into a file pass by pass
    assert len(few) == len(many), "\n".join(many)


# Mutants.


def bars_are_never_raised(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(above.Sample, "bar", lambda *_: torch.zeros(()))


def the_first_of_equals(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Any, where: Tensor, lowest: Tensor, *given: Any, original: Any = lots._Held.joined) -> Any:
        at = best(lowest, given[-1])
        return original(self, where[at], lowest[at], *given)

    patch.setattr(lots._Held, "joined", mutant)


def seen_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lots, "found_in", lambda held, wanted: (wanted[:0], wanted[:0] > 0))


def forgets_what_it_held(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Any, *given: Any, original: Any = lots._Held.joined) -> Any:
        return original(replace(self, where=self.where[:0], lowest=self.lowest[:0]), *given)

    patch.setattr(lots._Held, "joined", mutant)


def any_bar_will_do(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Any, where: Tensor, lowest: Tensor, bar: float, *given: Any) -> Any:
        return joined(self, where, lowest, 0.0, *given)

    joined = lots._Held.joined

    patch.setattr(lots._Held, "joined", mutant)


def as_in_memory(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(above._Order, "places", lambda self, at: at)


def first_lot_alone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lots._Few, "lower", lambda *_: None)


def taken_again(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Any, count: int, without: Tensor, *given: Any, original: Any = lots._Few.best) -> Any:
        return original(self, count, without[:0], *given)

    patch.setattr(lots._Few, "best", mutant)


def last_pass_alone(patch: pytest.MonkeyPatch) -> None:
    def mutant(run: Any, live: Any, loss: Any, lot: Any, add: Any, original: Any = lots._measure) -> Any:
        return original(run, live, loss, lot[-1:], add)

    patch.setattr(lots, "_measure", mutant)


def by_way_of_the_cpu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(inner, "dot", lambda a, b, dot=inner.dot: dot(a, b).cpu().to("cuda"))


def sent_in_slices(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Any, views: list[Tensor], *given: Any, original: Any = above.Above._look) -> None:
        for at in range(0, views[0].shape[-1], 4):
            original(self, [view[..., at : at + 4] for view in views], *given)

    patch.setattr(above.Above, "_look", mutant)


def asked_by_tensor(patch: pytest.MonkeyPatch) -> None:
    def mutant(room: Any, *given: Any, original: Any = above.keep) -> Any:
        room.counts.tolist()
        return original(room, *given)

    patch.setattr(above, "keep", mutant)


def law_pairs() -> None:
    law_exact("llama", kinds=(TWO,))


def law_mixed() -> None:
    law_exact("llama", kinds=(MIXED,))


def law_waits() -> None:
    with pytest.MonkeyPatch.context() as patch:
        test_nothing_is_waited_for_by_batch_or_by_tensor("D", "cuda", patch)


def law_waits_of_weights() -> None:
    with pytest.MonkeyPatch.context() as patch:
        test_nothing_is_waited_for_by_batch_or_by_tensor("D of single weights", "cuda", patch)


@pytest.mark.parametrize(
    ("mutant", "law"),
    [
        pytest.param(asked_by_tensor, law_waits_of_weights, marks=TRITON),
        pytest.param(sent_in_slices, law_sent, marks=TRITON),
        (bars_are_never_raised, law_bounded), (forgets_what_it_held, law_bounded), (seen_again, law_shaky),
        (the_first_of_equals, law_equal),
        (any_bar_will_do, law_pairs), (as_in_memory, law_pairs), (first_lot_alone, law_pairs),
        (taken_again, law_pairs), (last_pass_alone, law_mixed), (by_way_of_the_cpu, law_waits),
    ],
    ids=lambda one: one.__name__,
)  # fmt: skip
def test_mutants_die(mutant, law):
    dies(mutant, law)
