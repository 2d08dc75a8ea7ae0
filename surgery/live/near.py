"""Another checkpoint's weights beside a model on a GPU, as far as there is room, so that they cross the bus once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

import torch
from torch import Tensor

from surgery.checkpoints.opening import Weights
from surgery.checkpoints.trajectory import Trajectory
from surgery.devices import room, sent
from surgery.layout.sharding import local
from surgery.units import Units

_kept: ContextVar[list[Near] | None] = ContextVar("kept", default=None)


class Near(Mapping[str, Tensor]):
    """Tensors that stay on a GPU once they were asked for: of the room there is, half is left for the passes."""

    def __init__(self, tensors: Mapping[str, Tensor], homes: Mapping[str, torch.device]) -> None:
        self.tensors, self.homes = tensors, dict(homes)
        self._here: dict[str, Tensor] = {}
        self._taken = dict.fromkeys(homes.values(), 0)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._here:
            return self._here[name]
        found, home = self.tensors[name], self.homes.get(name)
        if home is None or found.device.type != "cpu":
            return found
        self._taken[home] += found.nbytes
        if 2 * self._taken[home] > room(home):
            self._taken[home] -= found.nbytes
            return found
        self._here[name] = sent(found.detach(), home)
        return self._here[name]

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
    """The live later model, opened, and the earlier checkpoint, whose weights come ``Near`` as they are asked for."""
    live, earlier = run.live("earlier", units=units)
    homes: dict[str, torch.device] = {}
    for name, block in earlier.layout.items() if live.ranks.mesh is None else ():
        home = local(live.tensors[live.layout[name].slots[0].tensor]).device
        if home.type == "cuda":
            homes |= {slot.tensor: home for slot in block.slots}
    if not homes:
        return live, earlier
    kept = _kept.get()
    found = next((one for one in kept or () if one.tensors is earlier.tensors and one.homes == homes), None)
    if found is None:
        found = Near(earlier.tensors, homes)
        if kept is not None:
            kept.append(found)
    return live, replace(earlier, tensors=found)
