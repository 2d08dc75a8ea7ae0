"""Another checkpoint's weights beside a model on a GPU, as far as there is room, so that they cross the bus once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

import torch
from torch import Tensor

from surgery.checkpoints.checkpoint import Source
from surgery.checkpoints.opening import Weights
from surgery.checkpoints.trajectory import Trajectory
from surgery.devices import room, sent
from surgery.layout.boxes import Boxes, boxes_in
from surgery.layout.sharding import local
from surgery.units import Units

_kept: ContextVar[list[Resident] | None] = ContextVar("kept", default=None)


class Resident(Mapping[str, Tensor]):
    """Tensors that stay on a GPU once they were asked for: of the room there is, half is left for the passes.

    Args:
        source: whose tensors they are, as it was given.
        tensors: the tensors, on the CPU.
        homes: where those go that may be kept.
    """

    def __init__(self, source: Source, tensors: Mapping[str, Tensor], homes: Mapping[str, torch.device]) -> None:
        self.source, self.tensors, self.homes = source, tensors, dict(homes)
        self._here: dict[str, Tensor] = {}
        self._stays: dict[str, bool] = {}
        self._taken = dict.fromkeys(homes.values(), 0)
        self._room = dict[torch.device, int]()  # at first

    def __getitem__(self, name: str) -> Tensor:
        if name in self._here:
            return self._here[name]
        found = self.tensors[name]
        if found.device.type != "cpu" or not self._fits(name, found.nbytes):
            return found
        self._here[name] = sent(found.detach(), self.homes[name])
        return self._here[name]

    def boxes(self, name: str) -> Boxes | None:
        """The boxes of a tensor that several ranks hold, where it does not stay on the GPU."""
        found = boxes_in(self.tensors, name)
        if found is None or self._fits(name, torch.Size(found.shape).numel() * found.dtype.itemsize):
            return None
        return found

    def _fits(self, name: str, size: int) -> bool:
        """Whether a tensor is to stay: what stays takes at most half of the room."""
        if name not in self._stays and (home := self.homes.get(name)) is not None:
            taken = self._taken[home] + size
            free = room(home) + self._taken[home]  # what stays is in the most that was held, or not yet
            first = self._room.setdefault(home, free)
            self._stays[name] = 2 * taken <= min(first, free)
            self._taken[home] += size * self._stays[name]
        return self._stays.get(name, False)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@contextmanager
def staying() -> Iterator[None]:
    """While the body runs, what ``with_earlier`` has brought to a GPU stays there; at the end it is given back."""
    token = _kept.set([])
    try:
        yield
    finally:
        _kept.reset(token)


def with_earlier(run: Trajectory, units: Units) -> tuple[Weights, Weights]:
    """The live later model, opened, and the earlier checkpoint, whose weights stay on the GPU once asked for."""
    live, earlier = run.live("earlier", units=units)
    homes: dict[str, torch.device] = {}
    for name, block in earlier.layout.items() if live.ranks.mesh is None else ():
        home = local(live.tensors[live.layout[name].slots[0].tensor]).device
        if home.type == "cuda":
            homes |= {slot.tensor: home for slot in block.slots}
    if not homes:
        return live, earlier
    kept, source = _kept.get(), run.tensors("earlier")
    found = next((one for one in kept or () if one.source is source and one.homes == homes), None)
    if found is None:
        found = Resident(source, earlier.tensors, homes)
        if kept is not None:
            kept.append(found)
    return live, replace(earlier, tensors=found)
