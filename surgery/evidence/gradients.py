"""Do the domains' gradients agree or conflict? Their cosines, in the whole model and in its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from surgery.checkpoints.trajectory import Trajectory
from surgery.evidence.products import Data, Part, Pull, gathered, inner_products, losses_of, pulls, trainable
from surgery.live.losses import Loss
from surgery.tables import Cell, Table, write_json

_DEFINITION = (
    "The cosine of two domains' loss gradients. Above zero a small training step on one domain also helps the other "
    "(synergy), below zero it hurts the other (conflict), and at zero it does neither to first order."
)


@dataclass(frozen=True)
class Gradients:
    """What ``gradients`` found: the cosines of the domains' gradients, in the whole model and in its parts.

    cosine = ⟨g_a, g_b⟩ / (‖g_a‖ ‖g_b‖), in [−1, 1]; None where one of the two is zero.

    ``tokens``, ``losses``: response tokens and mean loss by domain. ``whole``: the model. ``kinds``: all attention, all
    MLPs, and so on. ``layers``: each layer. ``modules``: each attention, each MLP, the norms and the rest of each
    layer. ``conflicts`` and ``synergies``: the modules (attention and MLP) and pairs of domains with the lowest cosines
    below zero, and with the highest above. ``silent``: domain → tensors whose gradient is exactly zero, like those of
    an expert that no token reached. ``products``: tensor → inner products ``[domain, domain]``, from which all else
    follows. ``parameters``: numbers with a gradient; ``frozen``: numbers without one, because they are not trained.

    Source: the paper, Section 4 (gradient conflict) and Assumption 5; the estimate is ours.
    """

    domains: tuple[str, ...]
    tokens: dict[str, int]
    losses: dict[str, float]
    whole: Part
    kinds: tuple[Part, ...]
    layers: tuple[Part, ...]
    modules: tuple[Part, ...]
    conflicts: tuple[Pull, ...]
    synergies: tuple[Pull, ...]
    silent: dict[str, tuple[str, ...]]
    products: dict[str, tuple[tuple[float, ...], ...]]
    parameters: int
    frozen: int

    @property
    def definition(self) -> str:
        """What the numbers are, in words."""
        return _DEFINITION

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Every pair of domains, once."""
        return tuple((a, b) for at, a in enumerate(self.domains) for b in self.domains[at + 1 :])

    def at(self, path: str) -> Part:
        """The part of a module or a parameter, by its path, like ``"model.layers.3.mlp.gate_proj"``.

        Raises:
            LookupError: there is no trained parameter at that path.
        """
        names = [name for name in self.products if name == path or name.startswith(f"{path}.")]
        if not names:
            raise LookupError(f"no trained parameter lies at {path!r}; there is {next(iter(self.products))!r}, ...")
        return Part.of(path, None, "module", self.domains, [self.products[name] for name in names])

    def tables(self) -> tuple[Table, ...]:
        """The domains; cosines of the model and its kinds of module; of every layer; conflicts and synergies."""
        heads = tuple(f"{a}–{b}" for a, b in self.pairs)
        domains = tuple(
            (name, self.tokens[name], self.losses[name], self.whole.norms[name], len(self.silent[name]) or None)
            for name in self.domains
        )
        parts = tuple((part.name, *part.row(self.pairs)) for part in (self.whole, *self.kinds))
        layers = tuple((part.name, *part.row(self.pairs)) for part in self.layers)
        found = tuple(pull.cells() for pull in (*self.conflicts, *reversed(self.synergies)))
        head = ("domain", "response tokens", "loss", "gradient norm", "tensors without gradient")
        return (
            Table("domains", head, domains),
            Table("cosine of the gradients, by part of the model", ("part", *heads), parts),
            Table("cosine of the gradients, by layer", ("layer", *heads), layers),
            Table("strongest conflicts and synergies", ("module", "domains", "cosine"), found),
        )

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.tables()))

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        write_json(self, path)


@dataclass(frozen=True)
class GradientSeries:
    """Gradients at several checkpoints or steps: how conflict and synergy change in training.

    ``stages``: the name of each → its ``Gradients``. ``conflicts`` and ``synergies``: the modules and pairs of domains
    with the lowest mean cosine over the stages below zero, and with the highest above; ``course`` gives their cosine at
    each stage.

    Source: the paper, Section 4 (over training steps); the choice by the mean is ours.
    """

    stages: dict[str, Gradients]
    conflicts: tuple[Pull, ...]
    synergies: tuple[Pull, ...]

    @classmethod
    def over(cls, stages: Mapping[str, Gradients], strongest: int = 6) -> GradientSeries:
        """The series of the ``Gradients`` at some stages (or steps), in order.

        Raises:
            ValueError: there is none, or they are of different domains or models.
        """
        found = list(stages.values())
        if not found:
            raise ValueError("a series needs one stage or more, and there is none")
        for name, one in stages.items():
            if one.domains != found[0].domains or list(one.products) != list(found[0].products):
                raise ValueError(f"{name!r} has other domains or other parameters than the first stage of the series")
        return cls(dict(stages), *pulls([one.modules for one in found], found[0].pairs, strongest))

    @property
    def definition(self) -> str:
        """What the numbers are, in words."""
        return _DEFINITION

    def course(self, pull: Pull) -> tuple[float | None, ...]:
        """A module's cosine for two domains at each stage."""
        parts = (next(part for part in one.modules if part.name == pull.module) for one in self.stages.values())
        return tuple(part.cosines[pull.first][pull.second] for part in parts)

    def tables(self) -> tuple[Table, ...]:
        """The model's cosines at every stage, and those of the strongest conflicts and synergies."""
        one = next(iter(self.stages.values()))
        rows = tuple((f"{a}–{b}", *(g.whole.cosines[a][b] for g in self.stages.values())) for a, b in one.pairs)
        both = (*self.conflicts, *reversed(self.synergies))
        found: tuple[tuple[Cell, ...], ...] = tuple((*pull.cells()[:2], *self.course(pull)) for pull in both)
        return (
            Table("cosine of the gradients, whole model, by stage", ("domains", *self.stages), rows),
            Table("strongest conflicts and synergies, by stage", ("module", "domains", *self.stages), found),
        )

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.tables()))

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        write_json(self, path)


def gradients(
    model: nn.Module, data: Data, loss: Loss | Mapping[str, Loss] | None = None, *, strongest: int = 6
) -> Gradients:
    """The cosines of the gradients of some domains' losses: g_d = ∇L_d(θ), L_d the mean over response tokens.

    Args:
        model: live; the parameters that require gradients are differentiated, in eval mode, a tied one once. Afterwards
            weights, gradients, flags, modes and torch's random state are unchanged.
        data: domain → batches ``{"input_ids", "attention_mask", "labels"}``, ``[batch, token]``. The weight of a batch
            is its number of response tokens.
        loss: ``loss(model, batch)``, the scalar mean over the batch's response tokens, smaller = better; or one for
            each domain. Default: the cross entropy of the responses. On right answers its gradient is the policy
            gradient of reinforcement learning for an answer with advantage 1, −∇ log p(answer), per token. So the
            cosines describe GRPO's steps if the answers that GRPO rewards are like those in the data. A
            ``Distillation`` gives the direction back to an earlier model instead (zero at that model itself).
        strongest: how many conflicts and synergies to report.

    Returns:
        ``Gradients``, exact except for rounding: sums over batches in float32 (float64 for a float64 model), inner
        products in float64. Memory beyond a backward pass: one tensor's gradient. Disk: a temporary file of 4 bytes per
        parameter and domain, in ``TMPDIR``.

    Raises:
        ValueError: fewer than two domains, no batch, no labels or response token; a loss that is no number or does not
            depend on the weights; a gradient that is NaN or infinite; weights that are frozen, quantised (without an
            adapter to train), offloaded or sharded.
        OSError: there is no room for the file.

    Source: the paper, Section 4 (gradient conflict).
    """
    trained = trainable(model)
    grams, tokens, values = inner_products(model, trained, data, losses_of(data, loss))
    silent = {d: tuple(name for name, gram in grams.items() if gram[at][at] == 0) for at, d in enumerate(data)}
    whole, kinds, layers, modules = gathered({n: p.ndim for n, p in trained.items()}, tuple(data), grams)
    pairs = tuple((a, b) for at, a in enumerate(data) for b in list(data)[at + 1 :])
    numbers, every = (sum(p.numel() for p in some) for some in (trained.values(), model.parameters()))
    return Gradients(
        tuple(data), tokens, values, whole, kinds, layers, modules, *pulls([modules], pairs, strongest), silent, grams,
        numbers, every - numbers,
    )  # fmt: skip


def gradients_along(
    run: Trajectory,
    data: Data,
    loss: Loss | Mapping[str, Loss] | None = None,
    *,
    strongest: int = 6,
    device: Any = None,
    dtype: Any = None,
    progress: Callable[[str], None] | None = None,
) -> GradientSeries:
    """``gradients`` at every checkpoint of a trajectory, one model in memory at a time.

    Args:
        run: two checkpoints or more (see ``Trajectory.through``).
        data, loss, strongest: as for ``gradients``; batches are read once and kept.
        device: where the models run; dtype: theirs (default: the checkpoints' own).
        progress: called with a line of text before each checkpoint.

    Raises:
        ValueError: as ``gradients``, or a checkpoint has no forward pass (a bare mapping).

    Source: the paper, Section 4 (over training steps).
    """
    run.check_whole()
    losses, kept = losses_of(data, loss), {domain: list(batches) for domain, batches in data.items()}
    found = {}
    for name, source in run.checkpoints.items():
        if progress is not None:
            progress(f"gradients of {', '.join(kept)} at {name}")
        model = (run if source is run.later else Trajectory(later=run.held(source))).load(device, dtype)
        found[name] = gradients(model, kept, losses, strongest=strongest)
        del model
    return GradientSeries.over(found, strongest)
