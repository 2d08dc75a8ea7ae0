"""The rank files of FSDP, ``model_world_size_W_rank_R.pt`` (verl, SkyRL): every rank's part of every tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.formats.archives import opened
from surgery.formats.stored import RANKS, Piece, Stored
from surgery.tables import briefly

MODEL, OPTIMIZER = "model", "optim"
_NAMED = re.compile(r"(model|optim)_world_size_(\d{1,6})_rank_(\d{1,6})\.pt")


def rank_files(folder: Path, what: str = MODEL) -> list[str]:
    """The model's files (or the optimizer's) by rank; empty where there are none.

    Raises:
        ValueError: there are files of two world sizes.
        LookupError: the file of a rank is missing.
    """
    found: dict[int, dict[int, str]] = {}
    for path in folder.glob(f"{what}_world_size_*_rank_*.pt"):
        if named := _NAMED.fullmatch(path.name):
            found.setdefault(int(named[2]), {})[int(named[3])] = path.name
    if len(found) > 1:
        raise ValueError(
            f"{folder} holds the files of {' and '.join(map(str, sorted(found)))} ranks: remove those of the other run"
        )
    for world, files in found.items():
        if missing := sorted(set(range(world)) - set(files)):
            raise LookupError(
                f"{folder} lacks the files of {len(missing)} of {world} ranks, the first of them "
                f"{what}_world_size_{world}_rank_{missing[0]}.pt: copy the files of every machine into one folder"
            )
        return [files[rank] for rank in range(world)]
    return []


def stored_ranks(folder: Path, files: list[str]) -> Stored:
    """The tensors of rank files, put together from every rank's part.

    Args:
        folder: the checkpoint's folder.
        files: the files' names in it, by rank.

    Raises:
        ValueError: a file is damaged or needs more than tensors, tensors are split otherwise than FSDP does, or the
            parts do not make up whole tensors.
    """
    held: dict[str, dict[str, Tensor]] = {}  # views of the files, whose names and places take long to unpickle

    def read(path: Path, writable: bool) -> dict[str, Tensor]:
        if writable or path.parent != folder:
            return tensors_in(path, writable)
        if path.name not in held:
            held[path.name] = tensors_in(path)
        return held[path.name]

    _check_steps(folder)
    found = _put_together(folder, files, read)
    _check_apart(folder, found)
    return found


def _check_apart(folder: Path, stored: Stored) -> None:
    """Raise ``ValueError`` where a rank's file is another's: the first numbers of the layers' largest tensor tell."""
    layers = [name for name in stored.pieces if re.search(r"\.\d+\.", name)]
    name = max(layers, key=lambda one: torch.Size(stored.shapes[one]).numel(), default=None)
    seen: dict[bytes, Piece] = {}
    for piece in {one.start: one for one in stored.pieces[name]}.values() if name else ():
        first = stored.views(folder / piece.file, piece.file, False)[piece.key].flatten()[:1024]
        held = first.view(torch.uint8).reshape(len(first), first.element_size())
        if bool((held == held[:1]).all()):
            continue
        if (other := seen.setdefault(held.numpy().tobytes(), piece)) is not piece:
            raise ValueError(
                f"{folder / piece.file} holds the same numbers as {other.file}: copy each rank's own file into the "
                f"folder"
            )


def moments(folder: Path) -> Stored | None:
    """The optimizer's state that has a parameter's shape, as tensors ``NAME/exp_avg``; None where there is no file.

    Args:
        folder: the checkpoint's folder.

    Raises:
        ValueError: the optimizer's parameters can't be matched with the model's, or a file is damaged.
    """
    files = rank_files(folder, OPTIMIZER)
    if not files:
        return None
    return _put_together(folder, files, partial(_states, _parameters(folder / rank_files(folder)[0])))


def _put_together(folder: Path, files: list[str], read: Callable[[Path, bool], dict[str, Tensor]]) -> Stored:
    """The tensors that ``read`` finds in the file of each rank, from its path and whether it is to be written."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype | str] = {}
    pieces: dict[str, list[Piece]] = {}
    for rank, file in enumerate(files):
        for name, tensor in read(folder / file, False).items():
            start, local = _part(tensor, rank, f"{name!r} of {folder / file}")
            known = shapes.setdefault(name, tuple(tensor.shape)), dtypes.setdefault(name, local.dtype)
            if known != (tuple(tensor.shape), local.dtype):
                raise ValueError(
                    f"{name!r} has the shape {tuple(tensor.shape)} and dtype {local.dtype} in {folder / file}, and "
                    f"{known[0]} and {known[1]} in {files[0]}: the files are of different runs"
                )
            pieces.setdefault(name, []).append(Piece(file, name, start, tuple(local.shape)))

    def views(path: Path, file: str, writable: bool) -> dict[str, Tensor]:
        return {name: _local(tensor) for name, tensor in read(path, writable).items()}

    found = Stored(RANKS, shapes, dtypes, {name: tuple(one) for name, one in pieces.items()}, views)
    found.check_tiled(folder)
    return found


def _parameters(path: Path) -> dict[str, tuple[int, ...]]:
    """The tensors of a rank file and their shapes in its order; of tied ones, which share their numbers, the first."""
    found: dict[int, tuple[str, tuple[int, ...]]] = {}
    for name, tensor in tensors_in(path).items():
        found.setdefault(_local(tensor).data_ptr(), (name, tuple(tensor.shape)))
    return dict(found.values())


def tensors_in(path: Path, writable: bool = False) -> dict[str, Tensor]:
    """Tensor name → tensor (sharded or whole), views of a rank file."""
    found = opened(path, writable)
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{path} holds no tensors by name, but {type(found).__name__}")
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def _local(tensor: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def _part(tensor: Any, rank: int, what: str) -> tuple[tuple[int, ...], Tensor]:
    """Where a rank's part begins in the whole tensor, and the part."""
    try:
        return _placed(tensor, rank, what)
    except (AttributeError, TypeError, LookupError) as error:  # a damaged pickle leaves out what a tensor has
        raise ValueError(f"{what} is damaged: {briefly(error)}") from error


def _placed(tensor: Any, rank: int, what: str) -> tuple[tuple[int, ...], Tensor]:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    local = _local(tensor)
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim, local
    mesh = tensor.device_mesh.mesh
    here = (mesh == rank).nonzero()
    start, size = [0] * tensor.ndim, list(tensor.shape)
    cut: set[int] = set()
    if len(here) != 1:
        raise ValueError(f"{what} lies on ranks {mesh.flatten().tolist()}, and not on rank {rank}, whose file it is in")
    for place, at, ranks in zip(tensor.placements, here[0].tolist(), mesh.shape, strict=True):
        if isinstance(place, Replicate):
            continue
        if type(place) is not Shard or place.dim in cut:
            raise ValueError(
                f"{what} is split as {tensor.placements}, and only FSDP's rows are read, each axis split once: "
                f"merge the ranks first with the trainer's own tool"
            )
        cut.add(place.dim)
        rows = -(-size[place.dim] // ranks)
        start[place.dim] = min(at * rows, size[place.dim])
        size[place.dim] = min(rows, size[place.dim] - start[place.dim])
    if tuple(local.shape) != tuple(size):
        raise ValueError(f"{what} has the shape {tuple(local.shape)}, and rank {rank} should hold {tuple(size)}")
    return tuple(start), local


def _states(parameters: Mapping[str, tuple[int, ...]], path: Path, writable: bool) -> dict[str, Tensor]:
    """The tensors of an optimizer's file that have their parameter's shape, by ``NAME/KEY``."""
    found = opened(path, writable)
    state = found.get("state") if isinstance(found, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds no optimizer's state")
    names = _named(found, list(parameters), path)
    made: dict[str, Tensor] = {}
    for key, value in state.items():
        for entry, tensor in _sized(value):
            if parameters.get(name := names.get(key, str(key))) != tuple(tensor.shape):
                raise ValueError(
                    f"{path} has a state of shape {tuple(tensor.shape)} for parameter {key!r}, and the model has "
                    f"{parameters.get(name)} for {name!r}: the optimizer counts its parameters otherwise"
                )
            made[f"{name}/{entry}"] = tensor
    return made


def _named(found: dict[str, Any], names: list[str], path: Path) -> dict[Any, str]:
    """Number → name of each parameter, as an optimizer counts them: in the order of the model, in one group."""
    groups = found.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(one, dict) for one in groups):
        return {}
    params = [key for one in groups for key in one.get("params", ())]
    told = [name for one in groups for name in one.get("param_names") or ()]
    if len(told) == len(params):
        return dict(zip(params, told, strict=True))
    if not all(isinstance(key, int) for key in params):
        return {}
    if len(groups) > 1 or len(params) != len(names):
        raise ValueError(
            f"{path} counts {len(params)} parameters in {len(groups)} groups, and the model has {len(names)}: which is "
            f"which can't be told. Roll back without resetting the optimizer, and start it anew"
        )
    return dict(zip(params, names, strict=True))


def _sized(value: Any) -> Iterator[tuple[str, Tensor]]:
    for entry, tensor in value.items() if isinstance(value, dict) else ():
        if isinstance(tensor, Tensor) and tensor.ndim:
            yield str(entry), tensor


def _check_steps(folder: Path) -> None:
    """Raise ``ValueError`` where the optimizer's files say that the ranks are of different steps."""
    steps: dict[float, str] = {}
    for file in rank_files(folder, OPTIMIZER):
        found = opened(folder / file)
        state = found.get("state") if isinstance(found, dict) else None
        for value in state.values() if isinstance(state, dict) else ():
            step = value.get("step") if isinstance(value, dict) else None
            if isinstance(step, int | float) or (isinstance(step, Tensor) and step.numel() == 1):
                steps.setdefault(float(step), file)
                break
    if len(steps) > 1:
        said = ", ".join(f"{file} of {step:g}" for step, file in steps.items())
        raise ValueError(f"{folder} mixes the files of several steps ({said}): copy those of one step into one folder")
