"""From hidden states to logits: only the positions that count go through a model's head, a chunk of them at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from surgery.compat import runs_on, uncompiled
from surgery.devices import sent
from surgery.layout.sharding import ranks_of
from surgery.live.hooks import removing
from surgery.live.prompts import Batch, check_fits, response_mask, right_padded

CHUNK = 1 << 23  # numbers of logits that exist at a time
FINE = 1 << 20  # and of those in float32, of which a measure needs several copies: what a processor's cache holds
Measure = Callable[[slice, Tensor], tuple[Tensor, Tensor]]  # rows and their logits → Σ over rows, its gradient by them


def positions(batch: Batch) -> Tensor:
    """Which positions predict a token that counts: bool ``[batch, token − 1]``, position t predicts token t + 1."""
    where = response_mask(batch)[:, 1:]
    return where & batch["attention_mask"][:, :-1].bool() if "attention_mask" in batch else where  # not from padding


@dataclass(frozen=True)
class Reading:
    """What predicts the tokens that count, row by row of a batch: hidden states, and the head that reads them.

    ``hidden`` is ``[position, hidden]``, one contiguous matrix, with its graph; ``head`` turns rows of it into logits
    ``[row, token of the vocabulary]``, with all that the model does to them (a scale, a cap). ``weights``: what takes
    gradients behind ``hidden``. The logits of all positions never exist at once, unless ``logits`` is asked for.
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]
    weights: tuple[Tensor, ...]
    vocabulary: int

    def rows(self) -> Iterator[slice]:
        """The positions in chunks, the same ones for every model of that vocabulary."""
        step = max(1, CHUNK // self.vocabulary)
        for at in range(0, len(self.hidden), step):
            yield slice(at, at + step)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """The positions in chunks, each with its logits."""
        for rows in self.rows():
            yield rows, self.head(self.hidden[rows])

    def logits(self) -> Tensor:
        """All logits: ``[position, token of the vocabulary]``."""
        return torch.cat([logits for _, logits in self.chunks()])

    def total(self, measure: Measure) -> Tensor:
        """Σ over positions of what a function says of their logits, a scalar that can be differentiated once."""
        if torch.is_grad_enabled() and (self.hidden.requires_grad or self.weights):
            return _Total.apply(self, measure, self.hidden, *self.weights)  # type: ignore[no-untyped-call, no-any-return]
        return torch.stack([_measured(measure, rows, logits)[0] for rows, logits in self.chunks()]).sum()


def _measured(measure: Measure, rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
    """What a function says of a chunk's logits, a few rows at a time; the gradient has the logits' dtype."""
    most = FINE if logits.device.type == "cpu" else CHUNK  # a GPU takes its time to start
    values, slopes, step = [], torch.empty_like(logits), max(1, most // logits.shape[1])
    for at in range(0, len(logits), step):
        some = logits[at : at + step]
        value, slopes[at : at + step] = measure(slice(rows.start + at, rows.start + at + len(some)), some)
        values.append(value)
    return torch.stack(values).sum(), slopes


class _Total(torch.autograd.Function):
    """``Reading.total``. The gradient is formed with the value, chunk by chunk, and kept as numbers.

    Once differentiable. Twice: ``predicting`` gives the logits of a batch with their graph.
    """

    @staticmethod
    def forward(ctx: Any, of: Reading, measure: Measure, hidden: Tensor, *weights: Tensor) -> Tensor:
        total, slopes = [], torch.empty_like(hidden)
        sums = [torch.zeros_like(one, dtype=torch.promote_types(one.dtype, torch.float32)) for one in weights]
        for rows in of.rows():
            with torch.enable_grad():
                some = hidden[rows].detach().requires_grad_()
                logits = of.head(some)
            value, slope = _measured(measure, rows, logits.detach())
            total.append(value)
            found = torch.autograd.grad(logits, (some, *weights), slope, allow_unused=True)
            slopes[rows] = found[0]
            for known, grad in zip(sums, found[1:], strict=True):
                if grad is not None:
                    known += grad
        ctx.save_for_backward(slopes, *sums)
        ctx.dtypes = [one.dtype for one in (hidden, *weights)]
        return torch.stack(total).sum()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():  # create_graph=True: as a constant the gradient would have no derivative, silently
            raise RuntimeError(
                "this loss keeps its gradient as numbers, so it can't be differentiated twice: write it with the "
                "logits of surgery.live.losses.predicting, as surgery.theory.landscape.Landscape does"
            )
        found = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, None, *((grad * outer).to(dtype) for grad, dtype in found)


def reading(model: nn.Module, batch: Batch) -> Reading:
    """Run a model on a batch up to its head; the head is run when it is asked for, on the positions that count.

    Cut to those positions, hidden states are no contiguous matrix any more, and torch multiplies such a one by a weight
    without gradient sequence by sequence, each time with a copy of the weight: 35 times slower at 49 k tokens. So they
    are gathered before the head, in a hook of its module (``get_output_embeddings``). Where a model has no such module,
    or computes something else with it, the logits of its own forward pass are gathered.

    Raises:
        ValueError: there is no such position, the batch does not fit the model, or it has no language-modelling head.
    """
    batch, model = right_padded(batch), uncompiled(model)
    where = positions(batch)
    if not bool(where.any()):
        raise ValueError("the batch has no response token to predict: its labels are all -100, or it is one token long")
    check_fits(model, batch["input_ids"])
    device = runs_on(model)
    first = int(where.any(0).nonzero()[0])
    last = where.shape[1] + 1 - first
    inputs: dict[str, Any] = {k: sent(batch[k], device) for k in ("input_ids", "attention_mask") if k in batch}
    rows, columns = where[:, first:].nonzero(as_tuple=True)
    inputs |= {"use_cache": False, **({"logits_to_keep": last} if _keeps(type(model)) else {})}

    def gathered(found: Tensor) -> Tensor:
        return found[:, -last:-1][sent(rows, found.device), sent(columns, found.device)]

    head = _head(model)
    if head is not None and ranks_of(model).mesh is not None:  # FSDP's own graph allows no second pass inside the first
        return _at_once(model, head, gathered, inputs)
    if head is not None and (bodies := _bodies(model, head)):
        seen: list[Tensor] = []
        made: dict[nn.Module, list[Any]] = {}

        def before(hidden: Tensor) -> Tensor:
            seen.append(gathered(hidden))
            return seen[-1][None, :0]

        with ExitStack() as stack:
            stack.enter_context(_replaced(head, before))
            for one in bodies:
                hook = one.register_forward_hook(lambda body, _, out: made.setdefault(body, []).append(out))
                stack.enter_context(removing(hook))
            logits = _logits(model, inputs)
        body = next((one for one in bodies if len(made.get(one, ())) == 1), None)
        if body is not None and len(seen) == 1 and logits.shape[:2] == (1, 0):
            again = partial(_again, model, head, body, made[body][0], inputs)
            return Reading(seen[0], again, _outside(model, head, body), logits.shape[2])
    made_whole = gathered(_logits(model, inputs))
    return Reading(made_whole, lambda some: some, (), made_whole.shape[1])


def _at_once(
    model: nn.Module, head: nn.Module, gathered: Callable[[Tensor], Tensor], inputs: dict[str, Any]
) -> Reading:
    """The logits of the positions that count, all of them, from one forward pass in which the head reads no others."""
    seen: list[Tensor] = []

    def before(hidden: Tensor) -> Tensor:
        seen.append(gathered(hidden))
        return seen[-1][None]

    with _replaced(head, before):
        logits = _logits(model, inputs)
    rows = logits[0] if len(seen) == 1 and logits.shape[:2] == (1, len(seen[0])) else gathered(logits)
    return Reading(rows, lambda some: some, (), rows.shape[1])


def _logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    logits = getattr(model(**inputs), "logits", None)
    if logits is None or logits.ndim != 3:
        raise ValueError(
            f"{type(model).__name__} gives no logits over a vocabulary: load it with its language-modelling head, or "
            f"pass a loss of your own, loss(model, batch)"
        )
    found: Tensor = logits
    return found


def _again(
    model: nn.Module, head: nn.Module, body: nn.Module, made: Any, inputs: dict[str, Any], rows: Tensor
) -> Tensor:
    """The logits of some rows of hidden states, by the model's own forward pass with its body's result given."""
    held = vars(body)
    own = held.get("forward")  # accelerate's device maps put one there
    try:
        held["forward"] = lambda *_, **__: made
        with _replaced(head, lambda _: rows[None]):
            return _logits(model, inputs)[0]
    finally:
        del held["forward"]
        held.update({} if own is None else {"forward": own})


def _head(model: Any) -> nn.Module | None:
    """The module that makes logits, None where the model does not say which it is."""
    try:
        found = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def _bodies(model: nn.Module, head: nn.Module) -> list[nn.Module]:
    """What may be the part of a model before its head, from the outside in: nine tenths of what is not the head's own.

    Which of them its forward pass calls differs: OPT asks its decoder, and not the module around it.
    """
    own = {id(p) for p in head.parameters()}

    def size(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if id(p) not in own)

    found, inner, least = [], model, 0.9 * size(model)
    while (best := max(inner.children(), key=size, default=None)) is not None and size(best) >= least > 0:
        found += [] if any(one is head for one in best.modules()) else [best]
        inner = best
    return found


def _outside(model: nn.Module, head: nn.Module, body: nn.Module) -> tuple[Tensor, ...]:
    """What takes gradients in the head and around it; a head that is tied to the embeddings is both."""
    inside = {id(p) for p in body.parameters()} - {id(p) for p in head.parameters()}
    return tuple(p for p in model.parameters() if p.requires_grad and id(p) not in inside)


@contextmanager
def _replaced(head: nn.Module, other: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While the body runs, the head reads ``other(hidden)`` in place of hidden states ``[batch, token, hidden]``."""

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (other(args[0]), *args[1:]) if args and isinstance(args[0], Tensor) and args[0].ndim == 3 else None

    with removing(head.register_forward_pre_hook(before)):
        yield


@contextmanager
def contiguous(model: nn.Module) -> Iterator[None]:
    """While the body runs, the head reads contiguous hidden states: a slice of them would be multiplied row by row."""
    head = _head(model)
    with nullcontext() if head is None else _replaced(head, Tensor.contiguous):
        yield


def _keeps(kind: type[nn.Module]) -> bool:
    return "logits_to_keep" in inspect.signature(kind.forward).parameters
