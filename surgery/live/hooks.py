"""Hooks: what goes into an MLP's consumer, and gradients, tensor by tensor, each freed once it is handed over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from surgery.checkpoints.opening import Weights
from surgery.compat import declared, experts_implementation, gated_by, switches_experts, uncompiled
from surgery.devices import sent
from surgery.layout.boxes import boxes_in
from surgery.layout.sharding import Ranks, is_sharded, local, stored
from surgery.layout.slots import Block, Layout, Slot
from surgery.masks.edits import Rows


@dataclass(frozen=True)
class Routing:
    """Whose activation each row is, in a MoE: the token's index in the flattened batch and the expert's."""

    tokens: Tensor
    experts: Tensor


Hear = Callable[[Tensor, Routing | None], Tensor | None]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While the body runs, the model is in eval mode; at the end each of its modules is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def untracked(ranks: Ranks) -> AbstractContextManager[None]:
    """Without gradients; not in inference mode where FSDP gathers weights, which take gradients later on."""
    return torch.inference_mode() if ranks.mesh is None else torch.no_grad()


@contextmanager
def listening(model: nn.Module, block: Block, hear: Hear) -> Iterator[None]:
    """Call ``hear(h, routing)`` with every input of a block's consumer while the body runs.

    ``h`` is ``[..., neuron]``; ``routing`` is None in a dense MLP. What ``hear`` returns, if not None, goes on in its
    place. Everything is taken off at the end.

    >>> # with listening(model, block, lambda h, routing: print(h.shape)): model(**batch)
    """
    module = model.get_submodule(block.consumer)
    with ExitStack() as stack:
        if not block.experts:
            stack.enter_context(removing(module.register_forward_pre_hook(_replacing(hear))))
        elif switches_experts(module):
            _listen_to_experts(module, hear, stack)
        elif isinstance(getattr(module, "weight", None), Tensor):
            _listen_to_sorted_experts(model.get_submodule(block.consumer.rpartition(".")[0]), module, hear, stack)
        else:
            _listen_to_batched_experts(module, hear, stack)
        yield


@contextmanager
def removing(handle: Any) -> Iterator[None]:
    """While the body runs, a hook is in place; it is taken off at the end."""
    try:
        yield
    finally:
        handle.remove()


def _replacing(hear: Hear) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        other = hear(args[0], None)
        return None if other is None else (other, *args[1:])

    return hook


def _listen_to_experts(module: Any, hear: Hear, stack: ExitStack) -> None:
    """transformers' experts: the gate's output is the consumer's input; the routing is the module's second argument.

    How its rows are ordered depends on the implementation: flat (token by token), sorted by expert, or, in the eager
    loop, one call per expert that was hit.
    """
    order: list[Routing] = []
    looping = ExitStack()  # open while the eager loop runs, which most families write without their gate's own function

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named: Any = kwargs.get("top_k_index", kwargs.get("router_indices"))
        index = args[1] if len(args) > 1 else named
        flat, top_k = index.reshape(-1), index.shape[-1]
        implementation = experts_implementation(module)
        if implementation == "batched_mm":
            order[:] = [Routing(torch.arange(len(flat), device=flat.device) // top_k, flat)]
        elif implementation == "grouped_mm":
            experts, permutation = torch.sort(flat)  # the same call as in the implementation, so the same order
            order[:] = [Routing(permutation // top_k, experts)]
        else:
            places = [(flat.view_as(index) == e).T.nonzero() for e in flat.unique().tolist() if e < module.num_experts]
            hit = [e for e in flat.unique().tolist() if e < module.num_experts]
            order[:] = [Routing(p[:, 1], torch.full_like(p[:, 1], e)) for p, e in zip(places, hit, strict=True)]
            looping.enter_context(_Products(module.down_proj, heard))

    def heard(h: Tensor) -> Tensor:
        if not order:
            raise RuntimeError(f"{type(module).__name__} computed more often than it was routed")
        routing = order.pop(0)
        if len(h) != len(routing.tokens):
            raise RuntimeError(f"{type(module).__name__}: {len(h)} rows for {len(routing.tokens)} routed tokens")
        other = hear(h, routing)
        return h if other is None else other

    def grouped(h: Tensor) -> Tensor:
        return heard(h) if experts_implementation(module) in ("batched_mm", "grouped_mm") else h

    stack.enter_context(removing(module.register_forward_pre_hook(before, with_kwargs=True)))
    after = module.register_forward_hook(lambda _m, _a, _o: looping.close(), always_call=True)
    stack.enter_context(removing(after))
    says = declared(module)
    if says is None or says.gated:
        stack.enter_context(gated_by(module, grouped))
    else:
        stack.enter_context(removing(module.act_fn.register_forward_hook(lambda _m, _a, out: grouped(out))))


def _listen_to_sorted_experts(mlp: Any, consumer: nn.Module, hear: Hear, stack: ExitStack) -> None:
    """Experts as two stacked linear modules (JetMoE): the router's second output says which token each row is."""
    tokens: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        sizes = torch.as_tensor(args[1], device=args[0].device)
        experts = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
        other = hear(args[0], Routing(tokens.pop(), experts))
        return None if other is None else (other, *args[1:])

    stack.enter_context(removing(mlp.router.register_forward_hook(lambda _m, _a, out: tokens.append(out[1]))))
    stack.enter_context(removing(consumer.register_forward_pre_hook(before)))


_PRODUCTS = (torch.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__, nn.functional.linear)


class _Products(TorchFunctionMode):
    """Sees the products with one weight, or with a part of it, and may change their left factor."""

    def __init__(self, weight: Tensor, seen: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.seen = weight, seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and isinstance(args[1], Tensor) and self._is_part(args[1]):
            args = (self.seen(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))

    def _is_part(self, tensor: Tensor) -> bool:
        weight, start = local(self.weight), local(self.weight).data_ptr()
        return start <= local(tensor).data_ptr() < start + weight.numel() * weight.element_size()


def _listen_to_batched_experts(module: Any, hear: Hear, stack: ExitStack) -> None:
    """Experts that all see all tokens, scaled by the router and zero where not routed (Llama 4)."""
    routed: list[Tensor] = []

    def seen(h: Tensor) -> Tensor:
        experts, tokens = routed[-1].nonzero(as_tuple=True)
        other = hear(h[experts, tokens], Routing(tokens, experts))
        return h if other is None else torch.zeros_like(h).index_put((experts, tokens), other)

    mode = _Products(module.down_proj, seen)
    count = module.down_proj.shape[0]

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        routed[:] = [(args[0].view(count, -1, args[0].shape[-1]) != 0).any(-1)]
        mode.__enter__()

    def after(_m: nn.Module, _a: Any, _o: Any) -> None:
        mode.__exit__(None, None, None)

    stack.enter_context(removing(module.register_forward_pre_hook(before)))
    stack.enter_context(removing(module.register_forward_hook(after, always_call=True)))


Take = Callable[[Block, Slot, Tensor, Tensor], None]  # block, slot, the tensor's gradient, the tensor
CHUNK = 1 << 17  # numbers of a gradient that are turned into float32 at a time: what a processor's cache holds
LARGE = 1 << 24  # the same on a GPU, which takes its time to start


@contextmanager
def collecting(model: nn.Module, layout: Layout, take: Take) -> Iterator[None]:
    """While the body runs, the weights of a layout's neurons take gradients, and nothing else does.

    Every backward pass calls ``take`` for each slot of each tensor. One tensor's gradient is in memory at a time.
    """
    slots: dict[str, list[tuple[Block, Slot]]] = {}
    for block in layout.blocks:
        for slot in block.slots:
            slots.setdefault(slot.tensor, []).append((block, slot))
    model = uncompiled(model)
    parameters: dict[str, Any] = dict(stored(model).named_parameters(remove_duplicate=False))
    if offloaded := [name for name in slots if parameters[name].is_meta]:
        raise ValueError(
            f"{offloaded[0]!r} is on the meta device: its weights are offloaded, and take no gradient there. Load the "
            f"model whole"
        )

    def spread(name: str, grad: Any) -> None:
        if is_sharded(grad) and grad.placements != (home := parameters[name].placements):
            grad = grad.redistribute(placements=home)
        for block, slot in slots[name]:
            take(block, slot, grad, parameters[name].detach())

    with collecting_from(model, {name: p for name, p in parameters.items() if name in slots}, spread):
        yield


@contextmanager
def collecting_from(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], take: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """While the body runs, those parameters take gradients, nothing else does, and the model is in eval mode.

    Every backward pass calls ``take(name, gradient)`` once for each that has one, when it is complete (a parameter used
    in several places has one); then the gradient is freed. At the end all is as it was: gradients, flags, modes.
    """
    with evaluating(model), only_these({p: partial(take, name) for name, p in parameters.items()}, model):
        yield


@contextmanager
def only_these(takes: Mapping[nn.Parameter, Callable[[Tensor], None]], model: nn.Module) -> Iterator[None]:
    """While the body runs, those parameters take gradients, and nothing else does; at the end all is as it was.

    A gradient is handed over when it is complete, and then freed: one parameter's is in memory at a time.
    """
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    handles = []

    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        takes[parameter](parameter.grad)  # type: ignore[index]
        parameter.grad = None

    try:
        for p, _, _ in before:
            p.grad = None
            p.requires_grad_(p in takes)
            if p in takes:
                handles.append(p.register_post_accumulate_grad_hook(hook))
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for p, required, grad in before:
            p.requires_grad_(required)
            p.grad = grad


def parts_of(block: Block, slot: Slot, tensor: Tensor, ranks: Ranks) -> list[Rows]:
    """All rows of a live slot; of several processes each has those that it holds and counts (``Rows.held``)."""
    whole = Rows(block, slot, torch.arange(slot.start, slot.stop))
    return list(whole.held(tensor)) if ranks.counts(tensor) else []


def in_runs(part: Rows, *views: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Runs of a part's rows: how many come before, and each view's rows, float32 ``[neuron, width]``.

    The rows come on the device of the first view. ``views`` are shaped as ``rows_in`` gives them.
    """
    inner = views[0].shape[1 : part.axes].numel()  # neurons per entry of the first axis
    chunk = CHUNK if views[0].device.type == "cpu" else LARGE
    step = max(1, chunk // max(1, views[0][:1].numel()))
    for at in range(0, len(views[0]), step):
        rows = [view[at : at + step] for view in views]
        count = len(rows[0]) * inner
        yield at * inner, tuple(sent(one, views[0].device).to(torch.float32).reshape(count, -1) for one in rows)


def rows_in(part: Rows, tensor: Tensor) -> Tensor:
    """A part's rows in a live tensor or its gradient: a view; of a sharded tensor a copy, ``[neuron, number]``."""
    return part.slot.view(tensor) if part.offsets is None else part.take(tensor)


@dataclass(frozen=True)
class Unread:
    """A part's rows in another checkpoint that has them in boxes: each run is read when it is asked for."""

    part: Rows
    source: Weights
    shape: torch.Size
    device = torch.device("cpu")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, some: slice) -> Tensor:
        inner = self.shape[1 : self.part.axes].numel()
        first, last, _ = some.indices(len(self))
        run = replace(self.part, index=self.part.index[first * inner : last * inner])
        return run.read(self.source).reshape(-1, *self.shape[1:])

    def reshape(self, shape: torch.Size) -> Unread:
        return replace(self, shape=shape)


def as_live(source: Weights, live: Weights, part: Rows) -> Any:
    """A part's rows in another checkpoint, shaped as in the live one: a view where the names agree."""
    theirs, slot = source.layout[part.block.name], part.slot
    if part.offsets is not None:
        return part.read(source)
    if any(boxes_in(source.tensors, other.tensor) for other in theirs.of(slot.part)):
        return Unread(part, source, slot.view(live.tensors[slot.tensor]).shape)
    for other in theirs.of(slot.part):
        if other == slot or replace(other, tensor=slot.tensor) == slot:
            return other.view(source.read(other.tensor))
    return part.read(source).reshape(slot.view(live.tensors[slot.tensor]).shape)
