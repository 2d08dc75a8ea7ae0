"""Single weights chosen: by D, as far as going on still helps; by the paper's A, M and C; or at random."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from surgery.budget import Allocation
from surgery.entries import Entries, shapes_of
from surgery.hooks import evaluating
from surgery.operators import rollback
from surgery.predictions import Divergence, Loss, positions
from surgery.scores import remember
from surgery.scratch import zeros_on_disk
from surgery.selector_settings import Data, damage_named, letters_named, named, over
from surgery.trajectory import Trajectory
from surgery.units import WEIGHT, Units, owners_of
from surgery.weight_damage import Gains, entry_gains
from surgery.weight_ranking import CHUNK, best, entries_of
from surgery.weight_scores import Traits, entry_traits

_FINEST: Units = ("mlp", "kv_group")
ROUNDS, _HALVINGS = 16, 6
_LOTS = (0x00800000, 0x7F800000)  # the bits of every positive normal float32, from the least to infinity
Point = tuple[int, float]  # how many weights are reverted, and the loss then


def over_weights(run: Trajectory, units: Units | None = None) -> Trajectory:
    """The trajectory over the units whose weights are candidates (None or "weight" alone: see ``EntrySelector``)."""
    owners = owners_of(units)
    if owners is not None or run.layout is not None:
        return over(run, owners)
    finest = over(run, _FINEST)
    try:
        finest.weights("later")
    except ValueError:
        return over(run, "mlp")
    return finest


def check_rounds_how(how: Allocation) -> None:
    """Raise ``ValueError`` unless D of single weights can be spent so."""
    if how != "global":
        raise ValueError(
            f'how="{how}": D takes the best single weights of the whole model, in rounds; leave how out, or rank by '
            f'letters: AMCSelector(budget, how="{how}", units="weight")'
        )


def name_by_damage(loss: Loss | Divergence) -> str:
    """What D of single weights is called in a table."""
    return named(damage_named(loss), WEIGHT)


def name_by_letters(rank: str, allocate: str, how: Allocation) -> str:
    """What letters of single weights are called in a table."""
    own = named(letters_named(rank, allocate), WEIGHT)
    return own if how == "global" else f"{own} ({how})"


def by_damage(
    run: Trajectory,
    data: Data | None,
    budget: float,
    *,
    stop: bool = True,
    rounds: int = ROUNDS,
    loss: Loss | Divergence = "kl",
) -> Entries:
    """The best by D of all weights of the run's units (see ``EntrySelector``)."""
    if data is None:
        raise ValueError("D is measured on prompts of the damaged domain: pass data=load_prompts(file, tokenizer)")
    path = _path(run, data, loss=loss, rounds=rounds)
    allowed = round(budget * len(path.gains.flat))
    order = path.best(allowed)
    curve = [point for point in path.curve if point[0] <= len(order)]
    told: dict[str, Any] = {"tokens": path.gains.tokens, "allowed": allowed, "rounds": len(path.curve)}
    if len(order) < allowed:
        told["positive"] = len(order)
    if stop:
        curve += _tried(run, path.gains, order, curve[-1][0])
        order = order[: min(curve, key=lambda point: (point[1], point[0]))[0]]
    told["curve"] = [list(point) for point in curve]
    mask = path.gains.entries(order)
    return Entries(mask, shapes=mask.shapes, made_by={"entries": told})


def by_letters(run: Trajectory, data: Data | None, budget: float, rank: str, allocate: str, how: Allocation) -> Entries:
    """The best by letters of all weights of the run's units, of each layer as many as other letters give it."""

    def scores(letters: str) -> Traits:
        return entry_traits(run, data if "A" in letters else None, letters)

    traits = scores(rank)
    spend = traits if allocate == rank else scores(allocate)
    allowed = round(budget * len(traits.flat))
    mask = traits.entries(traits.best(allowed, how, spend))
    taken = sum(mask.count().values())
    told = {"allowed": allowed, **({"positive": taken} if taken < allowed else {})}
    return Entries(mask, shapes=mask.shapes, made_by={"entries": told, **spend.told, **traits.told})


def at_random(run: Trajectory, budget: float, seed: int) -> Entries:
    """Some of all weights of the run's units, drawn uniformly without replacement; a bigger budget has the smaller."""
    (later,) = run.weights("later")
    shapes = shapes_of(later.layout)
    lots = _lots(sum(neurons * width for neurons, width in shapes.values()), seed)
    allowed = round(budget * len(lots))
    mask = entries_of(best(lots, allowed), shapes)
    return Entries(mask, shapes=shapes, made_by={"entries": {"allowed": allowed}})


def _lots(count: int, seed: int) -> Tensor:
    """A positive number for each weight, each of 31 bits and drawn by itself: their order is the order of drawing."""
    lots, generator = zeros_on_disk(count), torch.Generator().manual_seed(seed)
    for start in range(0, count, CHUNK):
        lots[start : start + CHUNK].view(torch.int32).random_(*_LOTS, generator=generator)
    return lots


@dataclass(frozen=True)
class _Path:
    """The order in which weights are taken: those of all rounds but the last, then the best of the last one's gains."""

    taken: Tensor
    curve: list[Point]  # at the start of each round
    gains: Gains  # of the last round

    def best(self, count: int) -> Tensor:
        if count <= len(self.taken):
            return self.taken[:count]
        return torch.cat([self.taken, self.gains.best(count - len(self.taken))])


@remember
def _path(run: Trajectory, data: Data, *, loss: Loss | Divergence, rounds: int) -> _Path:
    gains = entry_gains(run, data, loss=loss)
    run = replace(run, model=gains.model)
    taken, curve = torch.zeros(0, dtype=torch.int64), [(0, gains.value)]
    for _ in range(rounds - 1):
        best = gains.best(max(1, gains.worth(gains.value)))
        if not len(best) or gains.value <= 0:
            break
        taken = torch.cat([taken, best])
        with rollback(gains.model, to=run.source("earlier"), mask=gains.entries(taken), layout=run.layout):
            gains = entry_gains(run, gains.batches, loss=gains.loss)
        gains.flat[taken] = 0  # where the earlier model is stored wider, what is left is rounding
        curve.append((len(taken), gains.value))
    return _Path(taken, curve, gains)


def _tried(run: Trajectory, gains: Gains, order: Tensor, start: int) -> list[Point]:
    """The loss with more and more reverted, from ``start`` to all of them."""
    found = []
    for count in sorted({start + round((len(order) - start) / 2**at) for at in range(_HALVINGS + 1)} - {start}):
        with rollback(gains.model, to=run.source("earlier"), mask=gains.entries(order[:count]), layout=run.layout):
            found.append((count, _mean(gains)))
    return found


def _mean(gains: Gains) -> float:
    """The loss of the model as it is now, per token."""
    with evaluating(gains.model), torch.no_grad():
        total = sum(float(gains.loss(gains.model, batch)) * int(positions(batch).sum()) for batch in gains.batches)
    return total / gains.tokens
