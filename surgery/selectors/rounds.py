"""Choosing single weights: by D in rounds, while the loss falls; by M; or at random."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgery.checkpoints.trajectory import Trajectory
from surgery.layout.attention import NoAttention
from surgery.layout.slots import Layout
from surgery.live.losses import Divergence, Loss, mean_loss
from surgery.masks.budget import Allocation
from surgery.masks.entries import Entries, shapes_of
from surgery.reverting.rollback import rollback
from surgery.scores.memory import remember
from surgery.scores.weights import CHUNK, Gains, best, chosen, entries_of, entry_gains, entry_magnitude, zeros_on_disk
from surgery.selectors.settings import Data
from surgery.units import WEIGHT, Units, kinds_of, owners_of

_FINEST: Units = ("mlp", "kv_group")
ROUNDS, _HALVINGS = 16, 6
_LOTS = (0x00800000, 0x7F800000)  # the bits of every positive normal float32, from the least to infinity
Point = tuple[int, float]  # how many weights are reverted, and the loss then


def candidates(run: Trajectory, units: Units = WEIGHT) -> tuple[str, ...]:
    """The kinds of unit whose weights are candidates: those beside "weight" in ``units``.

    "weight" alone means MLPs and KV groups, or the units of the trajectory's own layout. If a model's KV groups are not
    found for certain, it means the MLPs, with a warning that says why.
    """
    owners = owners_of(units)
    if owners is not None or run.layout is not None:
        return run.kinds(owners or "mlp")
    try:
        run.weights("later", units=_FINEST)
    except NoAttention as reason:
        warnings.warn(
            f"weights of attention are no candidates, and the budget counts those of the MLPs alone: {reason}. Pass "
            f'units=("mlp", "weight") to choose that yourself',
            stacklevel=4,
        )
        return ("mlp",)
    return kinds_of(_FINEST)


def check_rounds_how(how: Allocation) -> None:
    """Raise ``ValueError`` unless D of single weights can be spent so."""
    if how != "global":
        raise ValueError(
            f'how="{how}": D takes the best single weights of the whole model, in rounds; leave how out, or rank by '
            f'M: AMCSelector(budget, rank="M", allocate="M", how="{how}", units="weight")'
        )


def check_magnitude(rank: str, allocate: str) -> None:
    """Raise ``ValueError`` unless letters are those that rank single weights."""
    if (rank, allocate) != ("M", "M"):
        raise ValueError(
            f"rank={rank!r}, allocate={allocate!r}: single weights are ranked by M alone: "
            f'AMCSelector(budget, rank="M", allocate="M", units="weight"). A and C of single weights choose worse '
            f"(benchmarks/results/single-weights.md)"
        )


def by_damage(
    run: Trajectory,
    data: Data | None,
    budget: float,
    *,
    units: Units,
    stop: bool = True,
    rounds: int = ROUNDS,
    loss: Loss | Divergence = "hellinger",
) -> Entries:
    """The best by D of all weights of some units: D_w = g_w · δB,w, the first-order gain of reverting w alone.

    Gains of single weights do not add up, because each is measured with all others in place. So they are taken in
    rounds. A round takes the best weights until their gains add up to the remaining loss, which is more than they can
    win back; then D is measured again with all taken weights reverted. The last round takes the rest of the budget. The
    rounds do not depend on the budget: a larger budget contains a smaller one (without ``stop``). A weight whose gain
    is not positive is never taken, so there may be fewer than the budget allows.

    Beyond some number of weights, more of them do harm. With ``stop`` the loss is measured after each round, and with
    1/64, 1/32, ... 1/2 and all of the last round reverted. The number with the smallest loss is kept; none if that is
    the later model itself. This takes one forward and backward pass per round and 7 more forward passes, on the same
    prompts; the curve is in ``made_by["entries"]``.

    Args:
        run: a trajectory with ``earlier`` and ``later``.
        data: prompts of the damaged domain.
        budget: β, the fraction of the candidate weights, in [0, 1]; with ``stop`` the most that may be taken.
        units: the kinds of unit whose weights are candidates (``candidates``).
        stop: keep only as many as lower the loss.
        rounds: how often D is measured, at least 1.
        loss: "hellinger", "kl" or your own loss (see ``damage``), ≥ 0; 0 means that nothing is lost.

    Raises:
        ValueError: ``rounds`` is less than 1, no data, and as ``damage``. OSError: no room for the file of gains.

    Source: ours, from Proposition 1.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds={rounds!r}: expected how often D is measured, 1 or more")
    if data is None:
        raise ValueError("D is measured on prompts of the damaged domain: pass data=load_prompts(file, tokenizer)")
    path = _path(run, data, loss=loss, rounds=rounds, units=units)
    allowed = round(budget * len(path.gains.flat))
    order = path.best(allowed)
    curve = [point for point in path.curve if point[0] <= len(order)]
    told: dict[str, Any] = {"tokens": path.gains.tokens, "allowed": allowed, "rounds": len(path.curve)}
    if len(order) < allowed:
        told["positive"] = len(order)
    if stop:
        curve += _tried(run, path, order, curve[-1][0])
        order = order[: min(curve, key=lambda point: (point[1], point[0]))[0]]
    told["curve"] = [list(point) for point in curve]
    return path.gains.entries(order).signed({"entries": told})


def by_magnitude(run: Trajectory, budget: float, how: Allocation, units: Units) -> Entries:
    """The most changed of all weights of some units, of the whole model or of each layer its share."""
    flat, (later,) = entry_magnitude(run, units), run.weights("later", units=units)
    shapes = shapes_of(later.layout)
    allowed = round(budget * len(flat))
    mask = entries_of(chosen(flat, shapes, allowed, how), shapes)
    taken = sum(mask.count().values())
    return mask.signed({"entries": {"allowed": allowed, **({"positive": taken} if taken < allowed else {})}})


def at_random(run: Trajectory, budget: float, seed: int, units: Units) -> Entries:
    """Weights of those units, drawn uniformly without replacement; a larger budget contains a smaller one."""
    (later,) = run.weights("later", units=units)
    shapes = shapes_of(later.layout)
    lots = _lots(sum(neurons * width for neurons, width in shapes.values()), seed)
    allowed = round(budget * len(lots))
    return entries_of(best(lots, allowed), shapes).signed({"entries": {"allowed": allowed}})


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
    layout: Layout  # of the live model, found once
    seen: dict[int, float]  # how many weights were reverted → the loss then; the first of one order, so no other set

    def best(self, count: int) -> Tensor:
        if count <= len(self.taken):
            return self.taken[:count]
        return torch.cat([self.taken, self.gains.best(count - len(self.taken))])


@remember
def _path(run: Trajectory, data: Data, *, loss: Loss | Divergence, rounds: int, units: Units) -> _Path:
    gains, (live,) = entry_gains(run, data, loss=loss, units=units), run.live(units=units)
    taken, curve = torch.zeros(0, dtype=torch.int64), [(0, gains.value)]
    for _ in range(rounds - 1):
        best = gains.best(max(1, gains.worth(gains.value)))
        if not len(best) or gains.value <= 0:
            break
        taken = torch.cat([taken, best])
        with rollback(gains.model, to=run.tensors("earlier"), mask=gains.entries(taken), layout=live.layout):
            gains = entry_gains(run, gains.batches, loss=gains.loss, units=units)
        gains.flat[taken] = 0  # where the earlier model is stored wider, what is left is rounding
        curve.append((len(taken), gains.value))
    return _Path(taken, curve, gains, live.layout, {})


def _tried(run: Trajectory, path: _Path, order: Tensor, start: int) -> list[Point]:
    """The loss with more and more reverted, from ``start`` to all of them."""
    gains, found = path.gains, []
    for count in sorted({start + round((len(order) - start) / 2**at) for at in range(_HALVINGS + 1)} - {start}):
        if count not in path.seen:
            mask = gains.entries(order[:count])
            with rollback(gains.model, to=run.tensors("earlier"), mask=mask, layout=path.layout):
                path.seen[count] = mean_loss(gains.loss, gains.model, gains.batches)
        found.append((count, path.seen[count]))
    return found
