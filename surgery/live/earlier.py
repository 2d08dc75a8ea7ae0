"""The earlier model in the later one's place: all weights are swapped temporarily, and restored bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from surgery.checkpoints.checkpoint import Checkpoint, Source, State, edited, in_force, moment_of, returned
from surgery.checkpoints.configuration import differences
from surgery.checkpoints.opening import Weights, open_weights
from surgery.checkpoints.trajectory import Trajectory
from surgery.compat import as_loaded, is_left_out
from surgery.files import uninterrupted
from surgery.layout.sharding import is_sharded, like, local, part_of
from surgery.layout.slots import Block, Slot
from surgery.masks.edits import Rows

_SWAPPED = "the earlier model's weights are in its place"
_inside: WeakKeyDictionary[nn.Module, list[tuple[Source, nn.Module]]] = WeakKeyDictionary()


@contextmanager
def earlier_model(run: Trajectory) -> Iterator[nn.Module]:
    """The earlier model, live, while the body runs, with one model in memory at a time.

    The later model's weights (``run.load``) are swapped in place. Those that ``run.later`` does not hold on disk bit
    for bit are kept in the CPU's memory meanwhile. If a folder's tensor names can't be matched with those in memory, or
    its configuration is another, the earlier model is loaded beside the later one instead. A bare mapping replaces only
    the tensors that it has.

    Raises:
        ValueError: there is no earlier checkpoint, or it is of another model.
        ExceptionGroup: at the end, if tensors could not be restored; it names them, and all others are restored.

    Source: ours.
    """
    if is_bare(run.later):
        if run.earlier is not None and is_bare(run.earlier):
            raise ValueError(
                "earlier and later are bare mappings of tensors, which answer nothing by themselves: pass one of them "
                "as a folder or an nn.Module"
            )
        yield Trajectory(later=run.tensors("earlier")).load()
        return
    model, (live, source) = run.load(), run.live("earlier")  # another model is told before it is asked anything
    if isinstance(later := run.tensors("later"), Checkpoint):
        live = replace(live, name=str(later.folder))  # what was asked for
    if isinstance(earlier := run.tensors("earlier"), nn.Module):
        yield earlier
        return
    outer = _inside.setdefault(model, [])
    if outer and outer[-1][0] is run.earlier and (outer[-1][1] is not model or in_force(model)[-1] == _SWAPPED):
        yield outer[-1][1]  # inside another block for the same checkpoint
        return
    there = AsLive(source, live)
    names, lacking = ([name for name in _names(model) if (name in there) is held] for held in (True, False))
    if isinstance(run.earlier, str | Path | Checkpoint) and not (check_alike(source, live) and _whole(there, lacking)):
        first = next(model.parameters())
        if is_sharded(first):
            raise ValueError(
                f"{source.name} can't take the place of the sharded {live.name}, and whole it would lie in every "
                f"process: load it sharded as well, and pass the model as earlier"
            )
        beside = Trajectory(later=run.tensors("earlier")).load(device=first.device, dtype=first.dtype)
        with _known(outer, run.source("earlier"), beside):
            yield beside
        return
    if other := [name for name in lacking if name in there.names]:
        raise ValueError(
            f"{source.name} holds {other[0]!r} in another shape than {live.name}, and what a bare mapping lacks "
            f"would be the later model's: pass the earlier model as a folder or an nn.Module"
        )
    check_read(there)
    on_disk = isinstance(run.later, str | Path | Checkpoint)
    back = AsLive(open_weights(run.tensors("later"), None, live), live) if on_disk else {}
    with _swapped(names, live, there, back), edited(model, _SWAPPED), _known(outer, run.source("earlier"), model):
        yield model


@contextmanager
def _known(outer: list[tuple[Source, nn.Module]], source: Source, model: nn.Module) -> Iterator[None]:
    """While the body runs, blocks inside it find the model that stands for a checkpoint."""
    outer.append((source, model))
    try:
        yield
    finally:
        outer.pop()


def check_alike(earlier: Weights, later: Weights) -> bool:
    """Whether the later model with a folder's weights in place of its own is the folder's model.

    Compared are the configurations, by all that may reach the forward pass. No model is loaded.

    Warns:
        UserWarning: it is not; the message names what differs, and the price of loading the earlier model as itself.
    """
    other = differences(earlier.tensors, later.tensors)
    if not other:
        return True
    told = [f"{name} ({_short(there)} there, {_short(here)} here)" for name, (there, here) in other.items()]
    more = f" and {len(told) - 3} more" if len(told) > 3 else ""
    _tell_price(earlier, later, f"has another configuration than {later.name}: {', '.join(told[:3])}{more}")
    return False


def _whole(there: AsLive, lacking: list[str]) -> bool:
    """Whether a source holds all tensors of a live model; tells the price where it does not."""
    if lacking:
        _tell_price(there.source, there.live, f"holds no {lacking[0]!r} of the shape that {there.live.name} has")
    return not lacking


def _tell_price(earlier: Weights, later: Weights, why: str) -> None:
    tensors = earlier.tensors
    shapes = tensors.shapes.values() if isinstance(tensors, Checkpoint) else (one.shape for one in tensors.values())
    numbers = sum(torch.Size(shape).numel() for shape in shapes)
    size = numbers * next(one for one in later.tensors.values() if one.is_floating_point()).element_size()
    warnings.warn(
        f"{earlier.name} {why}. So the earlier model is loaded as itself, beside the later one, where it is measured; "
        f"that takes {size / 1e9:.2g} GB more memory, and a rollback gives its weights to the later configuration",
        stacklevel=4,
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def check_read(there: AsLive) -> None:
    """Tell which tensors of a source nothing reads when its weights are put in a live model's place.

    Warns:
        UserWarning: there are some, or a head of its own where the live model's is tied to the embeddings; not those
            that transformers knowingly leaves out.
    """
    model, names = there.module, there.names
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))
    unread = [held for name, held in names.items() if name not in there.live.tensors and not is_left_out(model, name)]
    for name, held in names.items():
        main = first[id(every[name])] if name in every else name
        if (
            main != name
            and main in names
            and not _same_bits(*(there.source.tensors[one] for one in (held, names[main])))
        ):
            unread.append(held)
    if unread:
        warnings.warn(
            f"nothing in {there.live.name} reads {len(unread)} of the tensors that {there.source.name} holds: "
            f"{', '.join(unread[:3])}{', ...' * (len(unread) > 3)}. What is measured there is without them",
            stacklevel=4,
        )


def is_bare(source: Source | None) -> bool:
    """Whether a source has no forward pass: none at all, or a bare mapping of tensors."""
    return source is None or (isinstance(source, Mapping) and not isinstance(source, Checkpoint))


@contextmanager
def _swapped(names: list[str], live: Weights, to: Mapping[str, Tensor], back: Mapping[str, Tensor]) -> Iterator[None]:
    assert isinstance(live.tensors, State)
    model = live.tensors.module
    kept: dict[str, Tensor | None] = {}  # None: what the disk holds is the same, bit for bit
    before = inside = moment_of(model)
    try:
        for name in names:
            tensor = local(live.read(name))
            known = name in back and _same_bits(tensor, local(back[name]))
            kept[name] = None if known else tensor.to("cpu", copy=True)
            with torch.no_grad():
                tensor.copy_(local(to[name]))
        inside = moment_of(model)
        yield
    finally:
        with uninterrupted():
            alone = moment_of(model) is inside  # nobody else has written
            _put_back(kept, live, back)
            if alone:
                returned(model, before)


def _put_back(kept: Mapping[str, Tensor | None], live: Weights, back: Mapping[str, Tensor]) -> None:
    """Every tensor that can be put back; then an ``ExceptionGroup`` that names those that could not."""
    failed: dict[str, Exception] = {}
    assert isinstance(live.tensors, State)
    now = State(live.tensors.module)  # a model that was moved meanwhile has other tensors
    for name, old in kept.items():
        try:
            with torch.no_grad():
                local(now[name]).copy_(local(back[name]) if old is None else old)
        except Exception as error:  # raised below, once the others are back
            failed[name] = error
    if failed:
        raise ExceptionGroup(
            f"{len(failed)} tensors of {live.name} could not be put back, all others were: load the model again before "
            f"you use it ({', '.join(failed)})",
            list(failed.values()),
        )


def _same_bits(tensor: Tensor, other: Tensor) -> bool:
    """Whether copying ``other`` into ``tensor`` would change nothing (−0 and 0 are different bits)."""
    both = [one.contiguous().flatten().view(torch.uint8) for one in (tensor.cpu(), other.to(tensor.dtype))]
    wide = all(one.numel() % 8 == one.storage_offset() % 8 == 0 for one in both)  # eight times as fast as byte by byte
    left, right = (one.view(torch.int64) for one in both) if wide else both
    return torch.equal(left, right)


def _names(model: nn.Module) -> list[str]:
    """Parameters, each once, and the buffers that a checkpoint holds."""
    persistent = model.state_dict().keys()
    buffers = [name for name, _ in model.named_buffers() if name in persistent]
    return [*(name for name, _ in model.named_parameters()), *buffers]


class AsLive(Mapping[str, Tensor]):
    """A source's tensors under the names and in the shapes of a live model's; only those that the source holds so.

    Where the live model is sharded they are sharded as its own, and this process reads its part only.

    Args:
        source: a checkpoint of the live model, with the names that it has in memory or on disk.
        live: the live model, opened.
    """

    def __init__(self, source: Weights, live: Weights) -> None:
        assert isinstance(live.tensors, State)
        self.source, self.live, self.module = source, live, live.tensors.module
        self.names = as_loaded(self.module, source.tensors).whole
        self._parts: dict[str, list[tuple[Block, Slot]]] = {}
        for block in live.layout.blocks:
            for slot in block.slots:
                self._parts.setdefault(slot.tensor, []).append((block, slot))

    def _whole(self, name: str) -> Tensor | None:
        found = self.source.tensors[self.names[name]] if name in self.names else None
        return found if found is not None and found.shape == self.live.tensors[name].shape else None

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._parts or self._whole(name) is not None)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.live.tensors[name]
        if (found := self._whole(name)) is not None:
            return like(tensor, part_of(found, tensor))
        if name not in self._parts:
            raise ValueError(
                f"{self.source.name} holds no {name!r} of the shape that {self.live.name} has: are they one model's?"
            )
        built = like(tensor, torch.empty(local(tensor).shape, dtype=tensor.dtype))
        for block, slot in self._parts[name]:
            for part in Rows(block, slot, torch.arange(slot.start, slot.stop)).held(tensor):
                part.put(built, part.read(self.source).to(built.device, built.dtype))
        return built

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.live.tensors if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)
