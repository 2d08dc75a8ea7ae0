"""Reading a folder's model into memory, whole: no weight of it is random, and no code of the folder runs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery.checkpoints.checkpoint import Checkpoint
from surgery.checkpoints.checks import check_source
from surgery.compat import as_loaded, model_class, tied_weights
from surgery.formats.shards import INDEX
from surgery.formats.stored import SAFETENSORS
from surgery.layout.on_disk import class_of
from surgery.tables import briefly

Sharding = Literal["fsdp", "tp"]


def loaded(
    source: Checkpoint,
    dtype: torch.dtype | None = None,
    device_map: str | None = None,
    shard: Sharding | None = None,
) -> nn.Module:
    """The model of a folder; a warning names what the folder holds and the model does not read.

    Args:
        source: the folder.
        dtype: torch dtype (default: that of its files).
        device_map: as in ``from_pretrained``.
        shard: "fsdp" or "tp": over all processes that torchrun started, each of which reads its part.

    Raises:
        ValueError: the weights are quantised, or an adapter's; the configuration can't be read, or calls for a weight
            that the files lack, hold in another shape, or hold apart where it ties two.
    """
    check_source(source, str(source.folder))
    config, kind = class_of(source.home, source.shapes)
    names = {Path(file).name for file in source.files}
    if (file := getattr(config, "transformers_weights", None)) not in (None, INDEX, *names):
        raise ValueError(
            f"config.json of {source.folder} names weights of its own, {file!r}: remove transformers_weights from it, "
            f"or the other weights"
        )
    bare = source.stored.kind != SAFETENSORS
    weights = {name: _Unread(source, name, device_map == "meta") for name in source} if bare else None
    placed = _over_processes(shard)
    try:
        found: Any = (model_class(kind.__name__, config) if bare else kind).from_pretrained(
            None if bare else source.home, config=config, state_dict=weights, device_map=device_map,
            dtype=dtype or (_dtype(source) if bare else "auto"), local_files_only=True, trust_remote_code=False,
            use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True,
            **placed,
        )  # fmt: skip
    except (ValueError, ImportError) as error:
        raise ValueError(f"transformers can't load {source.folder}: {briefly(error)}") from error
    model: nn.Module = found[0]
    if bare:
        _settle(model, source.home)
    _check_told(source, found[1])
    _check_tied(source, model)
    return model


@dataclass(frozen=True)
class _Unread:
    """A tensor that is read when transformers asks for it, and then is the model's own."""

    source: Checkpoint
    name: str
    empty: bool  # its numbers are not asked for

    def __getitem__(self, index: Any) -> Tensor:
        dtype = self.source.dtypes[self.name]
        if self.empty and isinstance(dtype, torch.dtype):
            return torch.empty(self.source.shapes[self.name], dtype=dtype, device="meta")[index]
        boxes = self.source.boxes(self.name) if isinstance(index, tuple) else None
        return self.source[self.name][index].clone() if boxes is None else boxes.cut(index)

    def get_shape(self) -> list[int]:
        """As a slice of safetensors has it: a process that holds a part asks for no more than that."""
        return list(self.source.shapes[self.name])


def _dtype(source: Checkpoint) -> torch.dtype:
    """That of a folder's files: its configuration may say what a trainer's rollouts take."""
    found = (one for one in source.dtypes.values() if isinstance(one, torch.dtype) and one.is_floating_point)
    return next(found, torch.get_default_dtype())


def _settle(model: Any, home: Path) -> None:
    """What ``from_pretrained`` takes from a folder beside its weights."""
    from transformers import GenerationConfig

    model.config.name_or_path = model.name_or_path = str(home)
    if (home / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(home, local_files_only=True)


def _over_processes(shard: Sharding | None) -> dict[str, Any]:
    """What ``from_pretrained`` needs to shard a model, which also opens the process group."""
    if shard is None:
        return {}
    if shard not in ("fsdp", "tp"):
        raise ValueError(f'shard={shard!r}: expected "fsdp" or "tp"')
    if "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f'shard="{shard}" needs several processes: start the program with torchrun, like torchrun --nproc-per-node '
            f"2 -m surgery select ... --shard {shard}"
        )
    try:
        from transformers.distributed.configuration_utils import DistributedConfig

        sizes: Any = {f"{shard}_size": int(os.environ["WORLD_SIZE"])}
        return {"distributed_config": DistributedConfig(**sizes)}
    except (ImportError, TypeError) as error:
        raise ValueError(
            f"this transformers can't shard a model as it reads it ({error}): install 5.23 or newer, or shard the "
            f"model yourself and pass it as later"
        ) from error


def check_loads(source: Checkpoint) -> None:
    """What ``loaded`` refuses or warns of, told without reading the weights: the model stays on the meta device."""
    loaded(source, device_map="meta")


def _check_told(source: Checkpoint, told: dict[str, Any]) -> None:
    """What transformers says about names and shapes: a weight that it could not read has random numbers."""
    for name, stored, wanted in sorted(told["mismatched_keys"]):
        raise ValueError(
            f"{name!r} has the shape {tuple(stored)} in {source.folder}, and its config.json calls for {tuple(wanted)}"
        )
    if missing := told["missing_keys"]:
        raise ValueError(
            f"{source.folder} has no {_some(missing)}, and a model loaded from it would hold random numbers there: "
            f'save the whole model again, or write "tie_word_embeddings": true into config.json if only the output '
            f"layer is missing and is the embedding"
        )
    if unread := told["unexpected_keys"]:
        warnings.warn(
            f"{source.folder} holds {_some(unread)}, which its model does not read: they take no part in what is "
            f"measured",
            stacklevel=5,
        )


def _some(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    return f"tensor {first!r}" + (f" and {len(others)} more" if others else "")


def _check_tied(source: Checkpoint, model: Any) -> None:
    """Two tensors of the files that the configuration makes one have to be the same."""
    names = as_loaded(model, source).whole
    for pair in tied_weights(model).items():
        if not names.keys() >= set(pair):
            continue
        found = [names[name] for name in pair]
        one, other = (source[name] for name in found)
        if one.shape != other.shape or not torch.equal(one, other.to(one.dtype)):
            raise ValueError(
                f"config.json of {source.folder} ties {found[0]!r} to {found[1]!r}, and the files hold two different "
                f'tensors: write "tie_word_embeddings": false into it, or remove the one that is stale'
            )


def moved(model: nn.Module, device: Any, dtype: torch.dtype | None) -> nn.Module:
    """The model on a device and in a dtype; as when it is read, buffers that no file holds keep their own dtype."""
    model = model.to(device) if device else model
    if dtype is not None:
        stored = model.state_dict(keep_vars=True).values()
        for tensor in (one for one in stored if one.is_floating_point()):
            tensor.data = tensor.data.to(dtype)
    return model


def check_conversion(model: nn.Module, dtype: torch.dtype, stored: Checkpoint) -> None:
    """Raise ``ValueError`` where converting would not give what reading the files in that dtype gives."""
    now = {p.dtype for p in model.parameters() if p.is_floating_point()}
    held = {one for one in stored.dtypes.values() if isinstance(one, torch.dtype) and one.is_floating_point}
    if now == {dtype}:
        return
    for one in now:
        for other in held:
            if torch.promote_types(one, other) != one and torch.promote_types(dtype, one) != one:
                raise ValueError(
                    f"the model was loaded in {one}, which has rounded the {other} of its files: it can't be converted "
                    f"to {dtype} any more. Make a new Trajectory and load(dtype={dtype}) first"
                )
