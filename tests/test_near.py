"""Weights of another checkpoint cross the bus once, where the GPU has room, and nothing is chosen otherwise."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from mutants import dies
from simulated import gpu, on_gpu
from test_lots import deep
from torch import Tensor

from surgery import DamageSelector, Trajectory, damage
from surgery.checkpoints.checkpoint import State
from surgery.live import hooks, near, prompts
from surgery.live.losses import cross_entropy
from surgery.live.prompts import Batch, padded
from surgery.scores import lots, reversal_cost

attribution = import_module("surgery.scores.damage")
PLENTY, COUNT, SEEN = 1 << 40, 4, 512  # bytes; prompts; numbers of a tensor that is followed
UNITS = ("mlp", "kv_group")


@contextmanager
def crossing(room: int) -> Iterator[Counter[int]]:
    """A simulated GPU with so many bytes of room; how often a whole tensor's numbers were sent there, by address."""
    found: Counter[int] = Counter()

    def sent(tensor: Tensor, device: Any, original: Any = near.sent) -> Any:
        if torch.device(device).type == "cuda" and tensor.device.type == "cpu" and tensor.numel() >= SEEN:
            found[tensor.data_ptr()] += 1
        return original(tensor, device)

    with pytest.MonkeyPatch.context() as patch, gpu():
        patch.setattr(prompts, "TOKENS", 6)  # each prompt goes through alone
        patch.setattr(near, "room", lambda _: room)
        patch.setattr(attribution, "room", lambda _: room)
        for module in (near, hooks, lots):
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


def of_weights(run: Trajectory, data: list[Batch]) -> Any:
    return DamageSelector(0.05, units="weight", rounds=3, loss=cross_entropy).select(run, data)


BOTH: dict[str, Callable[[Trajectory, list[Batch]], Any]] = {"units": of_units, "single weights": of_weights}


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

                class Seen(near.Near):
                    def __init__(self, *given: Any, made: list[Any] = made) -> None:
                        super().__init__(*given)
                        made.append(weakref.ref(self))

                patch.setattr(near, "Near", Seen)
                work(run, data)
            gc.collect()
            assert made
            assert all(one() is None for one in made)


def test_the_room_is_given_back():
    law_given_back()


def law_protect() -> None:
    """What protecting puts back is kept beside the model where there is room, else on the CPU, from where it comes."""
    found = []
    for room in (PLENTY, 0):
        with crossing(room) as sent:
            run, data, _ = run_of()
            found.append(reversal_cost(run, data, units=UNITS))
            assert sent.total() == 0 if room else sent.total() >= 10 * COUNT
    assert found[0].equal(found[1])


def test_what_protecting_puts_back_stays_where_there_is_room():
    law_protect()


def off_the_gpu(patch: pytest.MonkeyPatch) -> None:
    real = attribution.rollback
    patch.setattr(attribution, "rollback", lambda *given, **how: real(*given, **{**how, "keep_on": "cpu"}))


def test_nothing_is_copied_where_the_earlier_model_is_there_already():
    with crossing(PLENTY) as sent:
        torch.manual_seed(0)
        run = Trajectory(earlier=deep(2).to("cuda"), later=deep(2).to("cuda"))
        _, data, _ = run_of()
        of_units(run, data)
        assert not sent
        _, earlier = near.with_earlier(run, UNITS)
        assert all(on_gpu(earlier.tensors[slot.tensor]) for b in earlier.layout.blocks for slot in b.slots)


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
        return near.sent(found.detach(), self.homes[name])

    patch.setattr(near.Near, "__getitem__", mutant)


def greedy(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Any, name: str, original: Any = near.Near.__getitem__) -> Any:
        self._taken = dict.fromkeys(self._taken, 0)
        return original(self, name)

    patch.setattr(near.Near, "__getitem__", mutant)


def by_round(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(near, "_kept", Always(None))


def never_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(near, "_kept", Always([]))


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
