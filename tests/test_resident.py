"""Weights of another checkpoint cross the bus once, where the GPU has room, and nothing is chosen otherwise."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from math import prod
from typing import Any

import pytest
import torch
from families import build
from mutants import dies
from simulated import gpu, on_gpu
from test_lots import deep, interpreted
from torch import Tensor
from training_folders import KINDS, as_ranks, model_of

from surgery import DamageSelector, Trajectory, damage, devices
from surgery.checkpoints.checkpoint import State
from surgery.formats.stored import Stored
from surgery.live import hooks, prompts, resident
from surgery.live.losses import cross_entropy
from surgery.live.prompts import Batch, padded
from surgery.scores import above, reversal_cost

attribution = import_module("surgery.scores.damage")
PLENTY, COUNT, SEEN = 1 << 40, 4, 512  # bytes; prompts; numbers of a tensor that is followed
UNITS = ("mlp", "kv_group")


def roomy(patch: pytest.MonkeyPatch, size: int) -> None:
    for module in (resident, attribution):
        patch.setattr(module, "room", lambda _: size)


@contextmanager
def crossing(room: int) -> Iterator[Counter[int]]:
    """A simulated GPU with so many bytes of room; how often a whole tensor's numbers were sent there, by address."""
    found: Counter[int] = Counter()

    def sent(tensor: Tensor, device: Any, original: Any = resident.sent) -> Any:
        if torch.device(device).type == "cuda" and tensor.device.type == "cpu" and tensor.numel() >= SEEN:
            found[tensor.data_ptr()] += 1
        return original(tensor, device)

    with pytest.MonkeyPatch.context() as patch, gpu():
        patch.setattr(prompts, "TOKENS", 6)  # each prompt goes through alone
        roomy(patch, room)
        for module in (resident, hooks, above):
            patch.setattr(module, "sent", sent)
        yield found


def run_of() -> tuple[Trajectory, list[Batch], dict[str, Tensor]]:
    """The earlier weights in the CPU's memory, the later model on the GPU."""
    torch.manual_seed(0)
    earlier, later = dict(State(deep(2))), deep(2).to("cuda")
    data = [padded([([5, 6, 7 + at], [8, 9, 2])], 0) for at in range(COUNT)]
    return Trajectory(earlier=earlier, later=later), data, earlier


def of_units(run: Trajectory, data: list[Batch]) -> Any:
    return damage(run, data, loss=cross_entropy, units=UNITS)


def of_weights(run: Trajectory, data: list[Batch], budget: float = 0.05) -> Any:
    return DamageSelector(budget, units="weight", rounds=3, loss=cross_entropy).select(run, data)


def by_the_kernel(run: Trajectory, data: list[Batch]) -> Any:
    with interpreted():
        return of_weights(run, data, 0.003)


BOTH: dict[str, Callable[[Trajectory, list[Batch]], Any]] = {"units": of_units, "single weights": of_weights}
if find_spec("triton") is not None:
    BOTH["single weights by the kernel"] = by_the_kernel


def law_once(name: str) -> None:
    with crossing(PLENTY) as sent:
        run, data, earlier = run_of()
        found = BOTH[name](run, data)
        times = [sent[one.data_ptr()] for key, one in earlier.items() if ".layers." in key and one.ndim == 2]
    assert set(times) <= {0, 1}, times
    assert sum(times) >= 10  # those of two layers' MLPs, keys and values
    with crossing(0) as sent:
        run, data, earlier = run_of()
        assert BOTH[name](run, data).equal(found)
        assert max(sent[one.data_ptr()] for one in earlier.values()) > 1


@pytest.mark.parametrize("name", BOTH)
def test_where_there_is_room_each_tensor_crosses_once(name):
    """Many passes, or rounds, later; and the choice is the one without room."""
    law_once(name)


def law_half() -> None:
    """What is kept takes at most half of the room; the rest crosses again in each pass."""
    run, _, earlier = run_of_cpu()
    (live,) = run.live(units=UNITS)
    names = {slot.tensor for block in live.layout.blocks for slot in block.slots}
    sizes = {name: earlier[name].nbytes for name in names if earlier[name].numel() >= SEEN}
    room = sum(sizes.values())
    with crossing(room) as sent:
        run, data, earlier = run_of()
        of_units(run, data)
        once = sum(size for key, size in sizes.items() if sent[earlier[key].data_ptr()] == 1)
        often = sum(size for key, size in sizes.items() if sent[earlier[key].data_ptr()] == COUNT)
    assert room / 4 < once <= room / 2
    assert once + often == room


def run_of_cpu() -> tuple[Trajectory, list[Batch], dict[str, Tensor]]:
    earlier = dict(State(deep(2)))
    return Trajectory(earlier=earlier, later=deep(2)), [], earlier


def test_half_of_the_room_is_left():
    law_half()


def law_given_back() -> None:
    """Nothing of it is left when the score is there, though the run still is."""
    for work in BOTH.values():
        with crossing(PLENTY):
            run, data, _ = run_of()
            made: list[weakref.ref[Any]] = []
            with pytest.MonkeyPatch.context() as patch:

                class Seen(resident.Resident):
                    def __init__(self, *given: Any, made: list[Any] = made) -> None:
                        super().__init__(*given)
                        made.append(weakref.ref(self))

                patch.setattr(resident, "Resident", Seen)
                work(run, data)
            gc.collect()
            assert made
            assert all(one() is None for one in made)


def test_the_room_is_given_back():
    law_given_back()


def law_protect() -> None:
    """What protecting puts back is kept beside the model where there is room, else on the CPU, from where it comes."""
    (live,) = run_of_cpu()[0].live(units=UNITS)
    size = sum(4 * prod(slot.shape) for b in live.layout.blocks for slot in b.slots)
    found = []
    for room in (PLENTY, 4 * size, 4 * size - 4, 0):
        with crossing(room) as sent:
            run, data, _ = run_of()
            found.append(reversal_cost(run, data, units=UNITS))
            assert sent.total() == 0 if room >= 4 * size else sent.total() >= 10 * COUNT, room
    assert all(one.equal(found[0]) for one in found[1:])


def test_what_protecting_puts_back_stays_where_there_is_room():
    law_protect()


def off_the_gpu(patch: pytest.MonkeyPatch) -> None:
    real = attribution.rollback
    patch.setattr(attribution, "rollback", lambda *given, **how: real(*given, **{**how, "keep_on": "cpu"}))


def test_nothing_is_copied_where_the_earlier_model_is_there_already():
    with crossing(PLENTY):
        first = deep(2).to("cuda")
        _, earlier = resident.with_earlier(Trajectory(earlier=first, later=deep(2).to("cuda")), UNITS)
        there = {slot.tensor for block in earlier.layout.blocks for slot in block.slots}
        assert all(earlier.tensors[name].data_ptr() == first.get_parameter(name).data_ptr() for name in there)
    with crossing(PLENTY):
        run, _, _ = run_of()
        _, earlier = resident.with_earlier(run, UNITS)
        assert all(on_gpu(earlier.tensors[name]) for name in there)
        assert all(earlier.tensors[name] is earlier.tensors[name] for name in there)


def test_a_live_earlier_model_on_the_cpu_is_kept_once(monkeypatch):
    made = []
    with crossing(PLENTY):
        run, data, _ = run_of()
        other = Trajectory(earlier=deep(2), later=run.later)
        real = resident.Resident.__init__
        monkeypatch.setattr(resident.Resident, "__init__", lambda self, *given: (made.append(1), real(self, *given))[1])
        of_weights(other, data)
    assert sum(made) == 1


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_where_some_experts_of_a_folder_fit_nothing_else_comes_out(family, tmp_path):
    """On disk each expert is a tensor, in memory all are one: some of it comes from the GPU, and some does not."""
    build(family, seed=1).save_pretrained(tmp_path)
    found = []
    for room in (0, 20_000, 60_000, PLENTY):
        with crossing(room):
            data = [padded([([5, 6, 7 + at], [8, 9, 2])], 0) for at in range(COUNT)]
            run = Trajectory(earlier=tmp_path, later=build(family, seed=2).to("cuda"))
            found.append([damage(run, data, loss=cross_entropy), of_weights(run, data)])
    assert all(one.equal(first) for some in found[1:] for one, first in zip(some, found[0], strict=True))


@pytest.mark.parametrize("room", [0, PLENTY])
def test_what_several_ranks_hold_is_put_together_only_to_stay(room, tmp_path, monkeypatch):
    whole = []
    original = Stored.read

    def read(self: Any, name: str, views: Any) -> Any:
        whole.append(len({piece.start for piece in self.pieces[name]}) > 1)
        return original(self, name, views)

    (kind, *_) = KINDS
    model_of(kind, "earlier").save_pretrained(tmp_path / "whole")
    as_ranks(tmp_path / "whole", tmp_path / "ranks", world=3)
    monkeypatch.setattr(Stored, "read", read)
    with crossing(room):
        run = Trajectory(earlier=tmp_path / "ranks", later=model_of(kind, "later").to("cuda"))
        data = [padded([([5, 6, 7 + at], [8, 9, 2])], 0) for at in range(COUNT)]
        del whole[:]
        damage(run, data, loss=cross_entropy)
    assert 0 < sum(whole) <= 20 if room else not sum(whole)


@pytest.mark.parametrize(("free", "reserved", "most", "found"), [(70, 20, 15, 75), (10, 50, 60, 0)])
def test_room_is_what_was_never_taken(free, reserved, most, found, monkeypatch):
    monkeypatch.setattr(devices, "real", lambda _: True)
    asked = {"mem_get_info": (free, 80), "memory_reserved": reserved, "max_memory_allocated": most}
    for name, value in asked.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert devices.room(torch.device("cuda")) == found


class Always:
    """A context variable that always has one value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def get(self) -> Any:
        return self.value

    def set(self, _: Any) -> None:
        pass

    reset = set


def forgetful(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Any, name: str) -> Tensor:
        found: Tensor = self.tensors[name]
        return resident.sent(found.detach(), self.homes[name])

    patch.setattr(resident.Resident, "__getitem__", mutant)


def greedy(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Any, name: str, original: Any = resident.Resident.__getitem__) -> Any:
        self._taken = dict.fromkeys(self._taken, 0)
        return original(self, name)

    patch.setattr(resident.Resident, "__getitem__", mutant)


def by_round(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(resident, "_kept", Always(None))


def never_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(resident, "_kept", Always([]))


@pytest.mark.parametrize(
    ("mutant", "law"),
    [
        (forgetful, lambda: law_once("units")), (by_round, lambda: law_once("single weights")), (greedy, law_half),
        (never_back, law_given_back), (off_the_gpu, law_protect),
    ],
    ids=lambda one: one.__name__,
)  # fmt: skip
def test_mutants_die(mutant, law):
    dies(mutant, law)
