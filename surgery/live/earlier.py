"""The earlier model in the later one's place: all weights are swapped temporarily, and restored bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from surgery.checkpoints.checkpoint import Checkpoint, Source, State, edited, in_force, moment_of, returned
from surgery.checkpoints.opening import Weights, open_weights
from surgery.checkpoints.trajectory import Trajectory
from surgery.layout.on_disk import name_on_disk
from surgery.layout.slots import Block, Slot
from surgery.reverting.writing import uninterrupted

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
    if run.later is None or _bare(run.later):
        if _bare(run.earlier):
            raise ValueError(
                "earlier and later are bare mappings of tensors, which answer nothing by themselves: pass one of them "
                "as a folder or an nn.Module"
            )
        yield Trajectory(later=run.source("earlier")).load()
        return
    model, (live, source) = run.load(), run.live("earlier")  # another model is told before it is asked anything
    if isinstance(run.earlier, nn.Module):
        yield run.earlier
        return
    outer = _inside.setdefault(model, [])
    if outer and outer[-1][0] is run.earlier and (outer[-1][1] is not model or in_force(model)[-1] == _SWAPPED):
        yield outer[-1][1]  # inside another block for the same checkpoint
        return
    names = [name for name in _names(model) if _found(source, live, name) is not None]
    folder = isinstance(run.earlier, str | Path | Checkpoint)
    if folder and (len(names) < len(_names(model)) or _configured_otherwise(model, source)):
        first = next(model.parameters())
        beside = Trajectory(later=run.earlier).load(device=first.device, dtype=first.dtype)
        with _known(outer, run.source("earlier"), beside):
            yield beside
        return
    on_disk = isinstance(run.later, str | Path | Checkpoint)
    back = open_weights(run.tensors("later"), None, live) if on_disk else None
    with _swapped(names, live, source, back), edited(model, _SWAPPED), _known(outer, run.source("earlier"), model):
        yield model


@contextmanager
def _known(outer: list[tuple[Source, nn.Module]], source: Source, model: nn.Module) -> Iterator[None]:
    """While the body runs, blocks inside it find the model that stands for a checkpoint."""
    outer.append((source, model))
    try:
        yield
    finally:
        outer.pop()


def _configured_otherwise(model: Any, source: Weights) -> bool:
    """Whether a folder's configuration gives the same weights another forward pass than the live model's."""
    folder: Path | None = getattr(source.tensors, "folder", None)
    if folder is None or not (folder / "config.json").exists() or not hasattr(model, "config"):
        return False
    theirs = type(model.config).from_pretrained(folder, local_files_only=True)
    return _differ(model.config.to_dict(), theirs.to_dict())


def _differ(ours: Any, theirs: Any) -> bool:
    """Whether a setting that both know has two values, without those that no forward pass depends on."""
    if not (isinstance(ours, Mapping) and isinstance(theirs, Mapping)):
        return bool(ours != theirs)
    from transformers import PreTrainedConfig

    idle = {*PreTrainedConfig().to_dict(), "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}
    return any(_differ(ours[name], theirs[name]) for name in ours.keys() & theirs.keys() - idle)


def _bare(source: Source | None) -> bool:
    return isinstance(source, Mapping) and not isinstance(source, Checkpoint)


@contextmanager
def _swapped(names: list[str], live: Weights, to: Weights, back: Weights | None) -> Iterator[None]:
    assert isinstance(live.tensors, State)
    model = live.tensors.module
    kept: dict[str, Tensor | None] = {}  # None: what the disk holds is the same, bit for bit
    before = inside = moment_of(model)
    try:
        for name in names:
            tensor = live.read(name)
            there = live_tensor(back, live, name) if back is not None and _found(back, live, name) is not None else None
            kept[name] = None if there is not None and _same_bits(tensor, there) else tensor.to("cpu", copy=True)
            with torch.no_grad():
                tensor.copy_(live_tensor(to, live, name))
        inside = moment_of(model)
        yield
    finally:
        with uninterrupted():
            alone = moment_of(model) is inside  # nobody else has written
            _put_back(kept, live, back)
            if alone:
                returned(model, before)


def _put_back(kept: Mapping[str, Tensor | None], live: Weights, back: Weights | None) -> None:
    """Every tensor that can be put back; then an ``ExceptionGroup`` that names those that could not."""
    failed: dict[str, Exception] = {}
    assert isinstance(live.tensors, State)
    now = State(live.tensors.module)  # a model that was moved meanwhile has other tensors
    for name, old in kept.items():
        try:
            before = old
            if before is None and back is not None:
                before = live_tensor(back, live, name)
            assert before is not None
            with torch.no_grad():
                now[name].copy_(before)
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
    left, right = tensor.cpu().contiguous(), other.to(tensor.dtype).contiguous()
    return torch.equal(left.flatten().view(torch.uint8), right.flatten().view(torch.uint8))


def _names(model: nn.Module) -> list[str]:
    """Parameters, each once, and the buffers that a checkpoint holds."""
    persistent = model.state_dict().keys()
    buffers = [name for name, _ in model.named_buffers() if name in persistent]
    return [*(name for name, _ in model.named_parameters()), *buffers]


def _found(source: Weights, live: Weights, name: str) -> str | list[tuple[Block, Slot]] | None:
    """How another source holds a live tensor: under which name, or as the rows of which slots; None if it does not."""
    model: Any = live.tensors.module if isinstance(live.tensors, State) else None
    prefix, shape = f"{getattr(model, 'base_model_prefix', '')}.", live.tensors[name].shape
    for other in (name, name.removeprefix(prefix), prefix + name):
        if other in source.tensors and source.tensors[other].shape == shape:
            return other
    if any(slot.tensor == name for block in live.layout.blocks for slot in block.slots):
        return [(block, slot) for block in live.layout.blocks for slot in block.slots if slot.tensor == name]
    other = name_on_disk(model, name) if hasattr(model, "config") else name
    return other if other in source.tensors and source.tensors[other].shape == shape else None


def live_tensor(source: Weights, live: Weights, name: str) -> Tensor:
    """A live tensor as another source holds it, in the live one's shape; ValueError where it does not hold it."""
    found = _found(source, live, name)
    if found is None:
        raise ValueError(f"{source.name} holds no {name!r} of the shape that {live.name} has: are they one model's?")
    if isinstance(found, str):
        return source.tensors[found]
    built = torch.empty(live.tensors[name].shape, dtype=live.tensors[name].dtype)
    for block, slot in found:
        index = torch.arange(slot.start, slot.stop)
        rows = source.layout[block.name].rows(source.tensors, slot.part, index)
        slot.put(built, index - slot.start, rows.to("cpu", built.dtype))
    return built
