"""D, damage: which neurons the lost skill is lost through, by the gradient of what was lost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from surgery.neurons import Neurons
from surgery.predictions import Loss, distillation, positions
from surgery.prompts import Batch
from surgery.scores import dot, remember
from surgery.slots import Block, Slot
from surgery.swap import earlier_model
from surgery.trajectory import Trajectory, Weights, open_weights

_CHUNK = 1 << 22  # numbers of a gradient that are turned into float32 at a time


@remember
def damage(run: Trajectory, data: Iterable[Batch], *, loss: Loss | None = None) -> Neurons:
    """D, damage: the first-order gain of reverting a neuron, D_n = ⟨∇L(θB), δB,n⟩ with L = KL(p_earlier ‖ p_later).

    Positive where going back lowers the loss. The sum over some neurons estimates what reverting them together gains
    (in nats per response token for the default loss), as long as the step is small.

    Args:
        run: a trajectory with ``earlier`` and ``later``.
        data: batches of the damaged domain, ``[batch, token]``, with labels on the response tokens. No label has to
            be right: the earlier model's own answers serve (``respond``).
        loss: another ``loss(model, batch)``, a scalar mean over the batch's response tokens, smaller = better
            (default: ``distillation`` from the earlier checkpoint).

    Returns:
        Scores of either sign, in the loss's unit. Gradients have the weights' dtype; products and sums are float32,
        sums over batches float64. One tensor's gradient is in memory at a time.

    Raises:
        ValueError: no batch, no response token, no gradient (frozen, quantised or offloaded weights), or the
            checkpoints are of different models.

    Source: ours, from Proposition 1: damage is local, and to leading order additive over coordinates.
    """
    batches = list(data)
    if not batches:
        raise ValueError("D is measured on prompts of the damaged domain, and data is empty")
    if loss is None:
        with earlier_model(run) as earlier:
            loss = distillation(earlier, batches)
    model = run.load()
    live = open_weights(model, run.layout)
    source = open_weights(run._source("earlier"), run.layout if run.layout and run.layout.fits({}) else None, live)
    total, tokens, value = _Total(live, source), 0, 0.0
    with total.collecting(model):
        for batch in batches:
            count = int(positions(batch).sum())
            one = loss(model, batch)
            (one * count).backward()
            tokens, value = tokens + count, value + float(one.detach()) * count
    made_by = {"damage": {"tokens": tokens, "loss": value / tokens}}
    return Neurons({name: (sums / tokens).float() for name, sums in total.sums.items()}, made_by=made_by)


@dataclass
class _Total:
    """Σ over backward passes of ⟨∇, θ − θ_earlier⟩ per neuron; every gradient is reduced and freed as it comes."""

    live: Weights
    source: Weights
    sums: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.sums = {b.name: torch.zeros(b.neurons, dtype=torch.float64) for b in self.live.layout.blocks}

    @contextmanager
    def collecting(self, model: nn.Module) -> Iterator[None]:
        """While the body runs, the weights of the neurons take gradients, and nothing else does."""
        slots: dict[str, list[tuple[Block, Slot]]] = {}
        for block in self.live.layout.blocks:
            for slot in block.slots:
                slots.setdefault(slot.tensor, []).append((block, slot))
        parameters = dict(model.named_parameters(remove_duplicate=False))
        before = {name: (p.requires_grad, p.grad) for name, p in parameters.items()}
        training, handles = model.training, []
        try:
            model.eval()
            for name, p in parameters.items():
                p.grad = None
                p.requires_grad_(name in slots)
                if name in slots:
                    handles.append(p.register_post_accumulate_grad_hook(_reducer(self, slots[name])))
            with torch.enable_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()
            for name, p in parameters.items():
                p.requires_grad_(before[name][0])
                p.grad = before[name][1]
            model.train(training)

    def add(self, block: Block, slot: Slot, grad: Tensor, now: Tensor) -> None:
        """Reduce one slot of one tensor's gradient."""
        gradient, weight = slot.view(grad), slot.view(now)
        earlier = self._earlier(block, slot)
        inner = gradient.shape[1] if slot.stacked else 1  # neurons per entry of the first axis
        step = max(1, _CHUNK // max(1, gradient[:1].numel()))
        for at in range(0, len(gradient), step):
            rows = slice(at, at + step)
            count = len(gradient[rows]) * inner
            g = gradient[rows].float().reshape(count, -1)
            d = (weight[rows].float() - earlier[rows].to(now.device, torch.float32)).reshape(count, -1)
            first = slot.start + at * inner
            self.sums[block.name][first : first + count] += dot(g, d).cpu()

    def _earlier(self, block: Block, slot: Slot) -> Tensor:
        """The slot's rows in the earlier checkpoint, shaped as in the live one: a view where the names agree."""
        theirs = self.source.layout[block.name]
        for other in theirs.of(slot.part):
            if (other.start, other.shape, other.pattern) == (slot.start, slot.shape, slot.pattern):
                return other.view(self.source.tensors[other.tensor])
        rows = theirs.rows(self.source.tensors, slot.part, torch.arange(slot.start, slot.stop))
        shape: Mapping[bool, tuple[int, ...]] = {True: (slot.shape[0], -1, *rows.shape[1:]), False: tuple(rows.shape)}
        return rows.reshape(shape[slot.stacked])


def _reducer(total: _Total, slots: list[tuple[Block, Slot]]) -> object:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        for block, slot in slots:
            total.add(block, slot, parameter.grad, parameter.detach())
        parameter.grad = None

    return hook
