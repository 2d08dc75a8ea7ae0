"""A trajectory: the checkpoints of one model in training order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import nn

from surgery.checkpoint import Checkpoint, Source
from surgery.opening import Weights, open_weights
from surgery.slots import Layout
from surgery.units import Units, kinds_of, noun


@dataclass(frozen=True)
class Trajectory:
    """Three checkpoints of one model in training order.

    Args:
        base: before the earlier domain was trained; only C needs it.
        earlier: after the earlier domain: what a rollback goes back to.
        later: after the later domain: what is rolled back.
        layout: where the neurons lie, if surgery can't find them by itself; it wins over ``units``.
        model: the later model, if it is live already; ``load`` returns it instead of reading the folder again.
        units: what scores and masks of this trajectory are over: "mlp" (default), "kv_group",
            "value_channel", or a tuple of "mlp" and one of the others (see ``find_layout``).
        stages: every checkpoint in training order by name, where there are more than three (see ``through``).

    Each checkpoint is a folder, a hub id in the local cache, an ``nn.Module`` or a mapping of tensors.

    Source: the paper, Section 5 (θ0, θA, θB).
    """

    base: Source | None = None
    earlier: Source | None = None
    later: Source | None = None
    layout: Layout | None = field(default=None, repr=False)
    model: nn.Module | None = field(default=None, repr=False)
    units: Units = "mlp"
    stages: Mapping[str, Source] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        kinds = kinds_of(self.units)
        if self.layout is not None and kinds not in (("mlp",), self.layout.units):
            raise ValueError(
                f"units={self.units!r}, and the layout given has {noun(self.layout.units)}: pass one of both"
            )

    @classmethod
    def through(
        cls, stages: Mapping[str, Source], *, earlier: str | None = None, later: str | None = None, **settings: Any
    ) -> Trajectory:
        """A trajectory of any number of checkpoints, by name in training order.

        Args:
            stages: name → checkpoint, like {"base": ..., "code": ..., "math": ..., "qa": ..., "cw": ...}. A stage's
                update is its checkpoint less the one before.
            earlier: which of them a rollback goes back to (default: the one before ``later``).
            later: which of them is rolled back (default: the last).
            settings: ``layout``, ``model`` and ``units``, as in ``Trajectory``.

        Raises:
            ValueError: fewer than two stages, a name that is not among them, or ``later`` not after ``earlier``.

        >>> Trajectory.through({"base": "runs/base", "math": "runs/math", "qa": "runs/qa"})
        Trajectory(base='runs/base', earlier='runs/math', later='runs/qa', units='mlp')
        """
        names = list(stages)
        if len(names) < 2:
            raise ValueError(f"a trajectory has two or more checkpoints, got {names}")
        if unknown := {earlier, later} - {None, *names}:
            raise ValueError(f"no stage is called {unknown.pop()!r}: expected one of {', '.join(names)}")
        last = names.index(later) if later is not None else len(names) - 1
        first = names.index(earlier) if earlier is not None else last - 1
        if not 0 <= first < last:
            raise ValueError(f"{later or names[last]!r} has to come after {earlier or 'another'!r} in {names}")
        base = stages[names[first - 1]] if first else None
        return cls(base, stages[names[first]], stages[names[last]], stages=dict(stages), **settings)

    @property
    def checkpoints(self) -> dict[str, Source]:
        """Every checkpoint by name, in training order: the stages, or what there is of base, earlier and later."""
        if self.stages is not None:
            return dict(self.stages)
        given = {"base": self.base, "earlier": self.earlier, "later": self.later}
        return {name: source for name, source in given.items() if source is not None}

    def steps(self) -> dict[str, Trajectory]:
        """Each stage as a trajectory of its own, by the name of the checkpoint it led to: earlier is the one before."""
        found = self.checkpoints
        bases = [None, *found.values()]
        return {
            after: Trajectory(base, found[before], found[after], layout=self.layout, units=self.units)
            for base, (before, after) in zip(bases, pairwise(found), strict=False)
        }

    def opened(self) -> dict[str, Weights]:
        """Every checkpoint by name, in training order, opened and found to be of one model."""
        names, sources = list(self.checkpoints), list(self.checkpoints.values())
        last = open_weights(sources[-1], self.layout, units=self.units)
        return dict(zip(names, [*(open_weights(one, self.layout, last) for one in sources[:-1]), last], strict=True))

    def weights(self, *names: str) -> list[Weights]:
        """The checkpoints of those names, opened: "base", "earlier" and "later" are roles, all others stages."""
        later = open_weights(self.source("later"), self.layout, units=self.units)
        return [later if n == "later" else open_weights(self.source(n), self.layout, later) for n in names]

    def source(self, name: str) -> Source:
        """The checkpoint of that name, as it was given; ValueError where it was not."""
        if name not in ("base", "earlier", "later"):
            return self._stage(name)
        source: Source | None = getattr(self, name)
        if source is None:
            raise ValueError(f"this needs the {name} checkpoint: pass Trajectory({name}=...)")
        return source

    def _stage(self, name: str) -> Source:
        if name not in (self.stages or {}):
            raise ValueError(f"no stage is called {name!r}: expected one of {', '.join(self.checkpoints)}")
        assert self.stages is not None
        return self.stages[name]

    def load(self, device: Any = None, dtype: Any = None) -> nn.Module:
        """The later model, live; read from a folder it is in eval mode.

        A model that is live already is returned as it is, or moved and converted in place where that is asked for.

        Args:
            device: where to put it (default: where it is, or the CPU).
            dtype: torch dtype (default: the checkpoint's own).
        """
        found = self.model if self.model is not None else self.later
        if isinstance(found, nn.Module):
            return found.to(device=device, dtype=dtype).eval() if (device or dtype) else found
        if not isinstance(found, Checkpoint) and isinstance(found, Mapping):
            raise ValueError("a bare mapping of tensors has no forward pass: pass a folder or an nn.Module as later")
        if found is None:
            raise ValueError("there is no later checkpoint to load: pass Trajectory(later=...)")
        from transformers import AutoModelForCausalLM

        folder = found.folder if isinstance(found, Checkpoint) else Checkpoint(found).folder
        model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", local_files_only=True)
        return (model.to(device) if device else model).eval()
