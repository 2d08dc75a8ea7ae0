"""What a saved folder takes over of the one that it comes from: everything but other weights and a run's state."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from surgery.checkpoints.checkpoint import Checkpoint
from surgery.files import path_of
from surgery.formats.stored import Stored
from surgery.layout.boxes import Lying

_WEIGHTS = (  # a second copy of the weights, or another model's
    "consolidated*", "original", "pytorch_model*", "tf_model*", "flax_model*", "*.gguf", "*.ggml", "*.onnx",
    "*.onnx_data", "onnx", "openvino", "gguf", "*.h5", "*.msgpack", "checkpoint-*", ".git", ".cache", ".*.partial",
    # what was measured of the later model
    ".eval_results",
    # an adapter that was merged long ago
    "adapter_config.json", "adapter_model*",
)  # fmt: skip
_STATE = (  # of a training run: transformers, FSDP, DeepSpeed
    "optimizer*", "scheduler.*", "scaler.*", "rng_state*", "random_states*", "training_args.bin", "*_world_size_*",
    "*.distcp", ".metadata", "global_step*", "mp_rank_*", "*_states.pt", "latest", "zero_to_fp32.py",
)  # fmt: skip
_TENSORS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".pkl")


@runtime_checkable
class Edited(Protocol):
    """What ``save`` needs of a rolled-back view: its edits, and what is to be said and written beside them."""

    parents: list[Checkpoint]

    def touched(self, file: str) -> list[str]: ...
    def edit(self, name: str, tensor: Lying) -> None: ...
    def reset(self, name: str, tensor: Lying) -> None: ...
    def remarks(self) -> list[str]: ...
    def papers(self) -> dict[str, bytes]: ...


@dataclass(frozen=True)
class Contents:
    """What ``save`` writes: ``files`` and ``folders`` of the source by their names in it, and what it adds.

    ``left_out``: files and folders that hold other weights, a training run's state or another model's results.
    ``doubtful``: what is taken over and may hold weights too. ``remarks``: what is to be known about what is written.
    ``size``: bytes.
    """

    files: dict[str, Path]
    folders: list[str]
    added: dict[str, bytes]
    left_out: list[str]
    doubtful: list[str]
    remarks: list[str]

    @property
    def size(self) -> int:
        copied = (path.stat().st_size for name, path in self.files.items() if name not in self.added)
        return sum(copied) + sum(map(len, self.added.values()))

    @property
    def notes(self) -> list[str]:
        """What was left out and what is doubtful, in words."""
        told = {
            "left out, since they hold other weights, a training run's state or another model's results": self.left_out,
            "taken over as they are, though they may hold weights that were not rolled back": self.doubtful,
        }
        return self.remarks + [f"{what}: {', '.join(names)}" for what, names in told.items() if names]


def output_of(folder: str | Path, parents: Iterable[Checkpoint]) -> Path:
    """The path of a folder to write; ``ValueError`` where it is an input, or one lies in the other."""
    target = Path(os.path.abspath(path_of(folder)))
    for parent in parents:
        here, there = target.resolve(), parent.folder.resolve()
        if here.is_relative_to(there) or there.is_relative_to(here):
            raise ValueError(f"the output {target} is, holds or lies in one of the inputs: choose another folder")
    return target


def contents_of(tensors: Mapping[str, Tensor], source: Path) -> Contents:
    """What ``save`` would write of a checkpoint in the folder ``source``, symbolic links followed.

    Raises:
        ValueError: a link leads nowhere, or to a folder that it lies in.
    """
    stored: Stored | None = getattr(tensors, "stored", None)
    weights = set(stored.files) | set(stored.beside) if stored else set()
    training = stored is not None and stored.training
    found = Contents({}, [], {}, [], [], [])
    if isinstance(tensors, Edited):
        found = Contents({}, [], tensors.papers(), [], [], tensors.remarks())

    def walk(folder: Path, inside: str, above: tuple[Path, ...]) -> None:
        if folder.resolve() in above:
            raise ValueError(f"{folder} is a link to a folder that it lies in: remove the link")
        for path in sorted(folder.iterdir()):
            name = f"{inside}{path.name}"
            own = any(file == name or file.startswith(f"{name}/") for file in weights)
            if not own and _other(path.name, not inside, training, bool(found.added)):
                found.left_out.append(name)
            elif path.is_dir():
                found.folders.append(name)
                walk(path, f"{name}/", (*above, folder.resolve()))
            elif path.is_file():
                found.files[name] = path
                if not own and path.suffix in _TENSORS and not (training and _any(path.name, _STATE)):
                    found.doubtful.append(name)
            else:
                raise ValueError(
                    f"{path} is neither a file nor a folder (a dangling link?): remove it or copy it yourself"
                )

    walk(source, "", ())
    return found


def _other(name: str, top: bool, training: bool, papers: bool) -> bool:
    """Whether a file or folder is left out: by its name, as a stray shard, or as the record of another rollback."""
    stray = (top or training) and name.endswith(".safetensors")
    return stray or (top and papers and name == "surgery") or _any(name, _WEIGHTS + (() if training else _STATE))


def _any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
