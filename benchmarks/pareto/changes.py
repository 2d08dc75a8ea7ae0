"""What ``benchmarks.pareto`` compares: a method, its knob, and the change it makes to the later model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.pareto import baselines
from surgery import Trajectory, rollback
from surgery.live.prompts import Batch
from surgery.masks.mask import Mask
from surgery.reverting.writing import Strength

LIBRARY, VARIANT, BASELINE, CONTROL = "library", "variant", "baseline", "control"
TRAINED, REFERENCE = "trained", "reference"
BUDGETS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)


@dataclass(frozen=True)
class Setting:
    """What a method may look at: the checkpoints, the damaged domain's calibration prompts, the live later model."""

    folder: Path
    metric: str
    run: Trajectory
    data: list[Batch]
    others: Mapping[str, list[Batch]]  # calibration prompts of the other domains
    later: Mapping[str, Tensor]  # a copy: the live model's parameters, before any edit
    earlier: Mapping[str, Tensor]

    @property
    def model(self) -> nn.Module:
        return self.run.load()


@dataclass(frozen=True)
class Reversal:
    """What goes back towards the earlier model, and how far."""

    mask: Mask
    strength: Strength = 1.0


Change = Reversal | Mapping[str, Tensor]


@dataclass(frozen=True)
class Method:
    """One curve: for each value of its knob, ``change`` gives what to revert or the new tensors."""

    name: str
    kind: str
    knob: str
    values: tuple[float, ...]
    change: Callable[[Setting, float, int], Change]
    draws: int = 1


Made = TypeVar("Made")
_prepared: list[tuple[Setting, Callable[[Setting], Any], Any]] = []  # at most one


def prepared(setting: Setting, make: Callable[[Setting], Made]) -> Made:
    """What is dear to make and serves all values of a knob: made once, and freed before anything else is."""
    if not (_prepared and _prepared[0][0] is setting and _prepared[0][1] is make):
        forget()
        _prepared.append((setting, make, make(setting)))
    found: Made = _prepared[0][2]
    return found


def forget() -> None:
    """Free what ``prepared`` holds."""
    _prepared.clear()


@contextmanager
def applied(setting: Setting, change: Change) -> Iterator[None]:
    """The later model with the change while the body runs; whole again after."""
    if isinstance(change, Reversal):
        earlier = setting.run.weights("earlier")[0].tensors
        with rollback(setting.model, to=earlier, mask=change.mask, strength=change.strength):
            yield
    else:
        with baselines.edited(setting.model, change):
            yield


def wide(setting: Setting) -> Trajectory:
    """The same checkpoints with the later model live in float32; the setting's own keeps its dtype."""
    apart = Trajectory(later=setting.run.later)
    return replace(setting.run, later=apart.load(dtype=torch.float32))
