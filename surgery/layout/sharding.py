"""Models that several processes hold together (FSDP2, tensor parallel): what of a tensor this process holds.

Every process runs the same program. A sharded parameter is a ``DTensor``: it has the shape of the whole tensor, and its
local part holds the numbers at certain indices of each dimension. ``Slot`` and the edits of a mask read and write that
part only. What every process has to know in the end (scores, counts) is summed over all of them (``Ranks``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from surgery.compat import along_first, inside, saved_by

Found = TypeVar("Found")
_owned: WeakKeyDictionary[Any, dict[Any, tuple[Tensor, ...]]] = WeakKeyDictionary()  # by mesh


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``; asked without importing torch.distributed."""
    home: Any = sys.modules.get("torch.distributed.tensor")
    return home is not None and isinstance(tensor, home.DTensor)


def local(tensor: Any) -> Tensor:
    """What this process holds of a tensor, without a copy: of a plain one, itself."""
    found: Tensor = tensor.detach().to_local() if is_sharded(tensor) else tensor
    return found


def like(tensor: Any, part: Tensor) -> Tensor:
    """Numbers of the shape of a tensor's local part as a tensor that is sharded as it is."""
    if not is_sharded(tensor):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def owned(tensor: Any) -> tuple[Tensor, ...]:
    """The indices of each dimension at which this process holds a sharded tensor's numbers: int64, on the CPU.

    The local part holds ``tensor[i, j, ...]`` for every combination of them, in that order.
    """
    key = tuple(tensor.shape), tuple(tensor.placements)
    known = _owned.setdefault(tensor.device_mesh, {})
    if key not in known:
        known[key] = tuple(_indices(tensor, dim) for dim in range(tensor.ndim))
    return known[key]


def _indices(tensor: Any, dim: int) -> Tensor:
    """A dimension's indices, sharded as the tensor is: torch itself says which of them are here."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = tensor.device_mesh
    placements = [along_first(one) if _dim(one, tensor) == dim else Replicate() for one in tensor.placements]
    whole = torch.arange(tensor.shape[dim], device=mesh.device_type)
    found: Any = distribute_tensor(whole, mesh, placements, src_data_rank=None)
    indices: Tensor = found.to_local().cpu()
    return indices


def _dim(placement: Any, tensor: Tensor) -> int | None:
    """The dimension that a placement shards, None where every process holds the same."""
    found: int | None = getattr(placement, "dim", None)
    return None if found is None else found % tensor.ndim


def places_in(tensor: Any) -> tuple[Tensor, ...]:
    """For each dimension, where in the local part an index of the whole tensor lies; −1 where it is elsewhere."""
    found = [torch.full((size,), -1, dtype=torch.int64) for size in tensor.shape]
    for table, held in zip(found, owned(tensor), strict=True):
        table[held] = torch.arange(len(held))
    return tuple(found)


def part_of(whole: Tensor, tensor: Any) -> Tensor:
    """The part of a whole tensor that this process would hold if it were sharded like ``tensor``.

    Only those numbers of ``whole`` are read.
    """
    if not is_sharded(tensor):
        return whole
    if is_sharded(whole):
        raise ValueError("two sharded models can't be compared number by number: pass the folder of one of them")
    for dim, held in enumerate(owned(tensor)):
        if len(held) < whole.shape[dim]:
            run = len(held) and int(held[-1]) - int(held[0]) + 1 == len(held)
            whole = (
                whole.narrow(dim, int(held[0]), len(held)) if run else whole.index_select(dim, held.to(whole.device))
            )
    return whole


def stored(model: nn.Module) -> nn.Module:
    """The model with every parameter as it is stored: FSDP leaves some gathered after a forward pass.

    What is written into a gathered parameter is lost, and takes no gradient.
    """
    home: Any = sys.modules.get("torch.distributed.fsdp")
    if home is not None:
        for module in inside(model):
            if isinstance(module, home.FSDPModule):
                module.reshard()  # type: ignore[operator]
    return model


def check_one_process(source: object, what: str) -> None:
    """Raise ``ValueError`` where a source is a live model that is sharded: on every process, before any waits."""
    if isinstance(source, nn.Module) and any(map(is_sharded, source.parameters())):
        raise ValueError(
            f"the live {type(source).__name__} is sharded over several processes, and {what} needs whole tensors: pass "
            f"the model's folder, or load the model in one process"
        )


@dataclass(frozen=True)
class Ranks:
    """The processes that hold a model together: those of a device mesh, or this one alone (``mesh`` is None)."""

    mesh: Any = None

    @property
    def first(self) -> bool:
        """Whether this process is the first of them, the one that writes files."""
        return self.mesh is None or not any(self.mesh.get_coordinate())

    def counts(self, tensor: Any, along: int | None = None) -> bool:
        """Whether this process is the one of those with the same numbers of a tensor that counts them.

        With ``along`` of those with the same indices of that dimension. A tensor may be sharded over some of the
        processes only, and the others hold copies; of one that is not sharded each has all.
        """
        if self.mesh is None:
            return True
        if not is_sharded(tensor):
            return self.first
        at = zip(tensor.device_mesh.get_coordinate(), tensor.placements, strict=True)
        apart = (None,) if along is None else {None, *range(tensor.ndim)} - {along}
        mine = all(where == 0 for where, placement in at if _dim(placement, tensor) in apart)
        return mine and bool((tensor.device_mesh.mesh == self.mesh.mesh.flatten()[0]).any())

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over all processes, the same on each: ``numbers`` of one shape on all of them."""
        if self.mesh is None:
            return numbers
        import torch.distributed as dist

        found = numbers.to(self.mesh.device_type, copy=True).contiguous()
        for dim in range(self.mesh.ndim):
            dist.all_reduce(found, group=self.mesh.get_group(dim))
        return found.to(numbers.device)

    def same(self, number: float) -> float:
        """The first process's number, on all of them: two processes may round the same sum in two ways."""
        return float(self.sum(torch.tensor(number if self.first else 0.0, dtype=torch.float64)))

    def sums(self, numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``sum`` of several vectors of one dtype, in one message."""
        if self.mesh is None or not numbers:
            return dict(numbers)
        sizes = [one.numel() for one in numbers.values()]
        flat = self.sum(torch.cat([one.flatten() for one in numbers.values()])).split(sizes)
        return {name: found.reshape(one.shape) for (name, one), found in zip(numbers.items(), flat, strict=True)}

    def from_first(self, make: Callable[[], Found]) -> Found:
        """What ``make`` gives on the first process, which alone calls it; an exception is raised on all of them."""
        if self.mesh is None:
            return make()
        import torch.distributed as dist

        held: list[Any] = [None, None]
        if self.first:
            try:
                held[0] = make()
            except (ValueError, LookupError, OSError) as error:
                held[1] = error
        for dim in range(self.mesh.ndim):
            group = self.mesh.get_group(dim)
            dist.broadcast_object_list(held, src=dist.get_global_rank(group, 0), group=group)
        if held[1] is not None:
            raise held[1]
        found: Found = held[0]
        return found

    def gathered(self, numbers: Tensor) -> Tensor:
        """The vectors of all processes, one after the other, in the same order on each."""
        if self.mesh is None:
            return numbers
        import torch.distributed as dist

        for dim in range(self.mesh.ndim):
            group, count = self.mesh.get_group(dim), self.mesh.size(dim)
            sizes = torch.zeros(count, dtype=torch.int64, device=self.mesh.device_type)
            sizes[self.mesh.get_local_rank(dim)] = len(numbers)
            dist.all_reduce(sizes, group=group)
            padded = numbers.new_zeros(int(sizes.max()), device=self.mesh.device_type)
            padded[: len(numbers)] = numbers
            parts = [torch.empty_like(padded) for _ in range(count)]
            dist.all_gather(parts, padded, group=group)
            numbers = torch.cat([one[:size] for one, size in zip(parts, sizes.tolist(), strict=True)]).cpu()
        return numbers


ALONE = Ranks()


def ranks_of(model: nn.Module) -> Ranks:
    """The processes that hold a model together."""
    return ranks_among(saved_by(stored(model)))


def ranks_among(tensors: Iterable[Any]) -> Ranks:
    """The processes that hold some tensors together; of several meshes the largest counts."""
    meshes = [one.device_mesh for one in tensors if is_sharded(one)]
    return Ranks(max(meshes, key=lambda mesh: (mesh.size(), mesh.ndim), default=None))
