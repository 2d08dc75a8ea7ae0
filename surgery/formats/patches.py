"""Patches: the numbers of a tensor that differ between two versions of it, packed and found again."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from surgery.layout.boxes import Lying, at_flat
from surgery.layout.slots import Slot

MANIFEST, NUMBERS = "patch.json", "patch.safetensors"  # the files of a patch's folder
KIND, VERSION = "surgery.patch", 1
_RUN = 1 << 22  # numbers that are compared, hashed or compressed at a time
_LEVEL = 1  # of zlib: higher ones take several times as long for a few percent
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SAME_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Numbers = NDArray[Any]


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bits as integers, in the tensor's shape."""
    return tensor.contiguous().view(_SAME_WIDTH[tensor.element_size()])


def runs(tensor: Tensor) -> Iterator[Numbers]:
    """The bits of a tensor's numbers as unsigned integers, in the order of a file, a run at a time."""
    for run in bits(tensor.detach()).view(-1).split(_RUN):
        yield run.cpu().numpy().view(_UNSIGNED[tensor.element_size()])


def digest(numbers: Numbers) -> str:
    """What identifies numbers in their order: the sha256 of their bytes."""
    return hashlib.sha256(numbers.tobytes()).hexdigest()


@dataclass(frozen=True)
class Change:
    """What differs between two versions of a tensor.

    ``at``: the flat positions of the changed numbers, int64, ascending. ``old`` and ``new``: their bits, as unsigned
    integers. ``before`` and ``after``: the sha256 of all bytes of the tensor.
    """

    at: Numbers
    old: Numbers
    new: Numbers
    before: str
    after: str


def changes(before: Tensor, after: Tensor) -> Change:
    """Compare two versions of a tensor bit by bit (shape and dtype are the same)."""
    hashes, start = (hashlib.sha256(), hashlib.sha256()), 0
    nothing = np.zeros(0, _UNSIGNED[before.element_size()])
    found: list[tuple[Numbers, Numbers, Numbers]] = [(np.zeros(0, np.int64), nothing, nothing)]
    for old, new in zip(runs(before), runs(after), strict=True):
        hashes[0].update(old.data)
        hashes[1].update(new.data)
        at = np.flatnonzero(old != new)
        found.append((at + start, old[at], new[at]))
        start += len(old)
    at, was, becomes = (np.concatenate(some) for some in zip(*found, strict=True))
    return Change(at, was, becomes, hashes[0].hexdigest(), hashes[1].hexdigest())


def patched(tensor: Tensor, at: Numbers, xor: Numbers) -> tuple[str, str]:
    """The sha256 of all bytes of a tensor as it is, and as it would be with the bits at some positions flipped."""
    before, after, start = hashlib.sha256(), hashlib.sha256(), 0
    for run in runs(tensor):
        low, high = np.searchsorted(at, (start, start + len(run)))
        before.update(run.data)
        if low < high:
            run = run.copy()
            run[at[low:high] - start] ^= xor[low:high]
        after.update(run.data)
        start += len(run)
    return before.hexdigest(), after.hexdigest()


def flip(tensor: Lying, at: Numbers, xor: Numbers) -> None:
    """Flip the bits ``xor`` of the numbers at flat positions, in place; once more takes it back."""
    if isinstance(tensor, Tensor):
        tensor = tensor.detach()
    held = tensor.view(_SAME_WIDTH[tensor.dtype.itemsize])
    places = at_flat(tensor, torch.from_numpy(at).to(tensor.device))
    held[places] = held[places] ^ as_bits(xor).to(tensor.device)


def as_bits(numbers: Numbers) -> Tensor:
    """Unsigned integers as a tensor of torch's integers of that width, which has the same bits."""
    signed = numbers if numbers.itemsize == 1 else numbers.view(f"i{numbers.itemsize}")
    return torch.from_numpy(signed)


def pack(at: Numbers, xor: Numbers, size: int) -> bytes:
    """Positions in a tensor of ``size`` numbers and flipped bits, as few bytes.

    The gaps between the positions, then the bits, both as planes (the first byte of all, the second byte of all, ...),
    compressed by zlib.
    """
    gaps = np.diff(at, prepend=0).astype(_gap(size))
    return zlib.compress(_planes(gaps) + _planes(xor), _LEVEL)


def unpack(data: bytes, count: int, size: int, width: int) -> tuple[Numbers, Numbers]:
    """What ``pack`` packed: ``count`` positions in a tensor of ``size`` numbers, and bits of ``width`` bytes each.

    Raises:
        ValueError: it is something else; no more is unpacked than such a tensor could have.
    """
    if count > size:
        raise ValueError(f"it changes {count} numbers of {size}")
    wide = np.dtype(_gap(size)).itemsize
    expected, stream = count * (wide + width), zlib.decompressobj()
    try:
        raw = stream.decompress(data, expected + 1)
    except zlib.error as error:
        raise ValueError(f"its numbers can't be unpacked: {error}") from error
    if len(raw) != expected or not stream.eof or stream.unused_data:
        raise ValueError(f"its numbers are not {count} of {width} bytes")
    at = np.cumsum(_joined(raw[: count * wide], _gap(size)), dtype=np.int64)
    if count and not (at[0] >= 0 and at[-1] < size and bool((at[1:] > at[:-1]).all())):
        raise ValueError(f"its positions are not ascending ones below {size}")
    return at, _joined(raw[count * wide :], _UNSIGNED[width])


def _gap(size: int) -> Any:
    return np.uint32 if size <= 1 << 32 else np.int64


def _planes(numbers: Numbers) -> bytes:
    return numbers.view(np.uint8).reshape(-1, numbers.itemsize).T.tobytes()


def _joined(data: bytes, kind: Any) -> Numbers:
    wide = np.dtype(kind).itemsize
    return np.frombuffer(data, np.uint8).reshape(wide, -1).T.copy().reshape(-1).view(kind)


@dataclass(frozen=True)
class Place:
    """Where the numbers of a part of a block lie in a tensor, in plain numbers.

    The number at position ``start`` + p of the part (neuron · width + offset, as in Entries) is the tensor's number at
    the flat position ``offset`` + Σ index · stride, where the indices are those of p in an array of ``sizes``.
    """

    block: str
    part: str
    start: int
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, block: str, slot: Slot) -> Place:
        """Where a slot's numbers lie."""
        view = slot.view(torch.empty(slot.shape, device="meta"))
        axes = [(size, stride) for size, stride in zip(view.shape, view.stride(), strict=True) if size != 1]
        sizes, strides = zip(*axes, strict=True) if axes else ((), ())
        return cls(block, slot.part, slot.span[0], int(view.storage_offset()), sizes, strides)

    def positions(self, flat: Numbers) -> tuple[Numbers, Numbers]:
        """Which of some flat positions of the tensor belong to it (their indices), and where they are in the part."""
        if not all(self.strides) or len(self.sizes) != len(self.strides):
            raise ValueError(f"{self.sizes} numbers in steps of {self.strides} are no place in a tensor")
        rest, inner = flat - self.offset, (flat >= self.offset)
        steps = [int(np.prod(self.sizes[axis + 1 :], dtype=object)) for axis in range(len(self.sizes))]
        found = np.zeros_like(flat)
        for axis in sorted(range(len(self.sizes)), key=lambda axis: -self.strides[axis]):
            index, rest = rest // self.strides[axis], rest % self.strides[axis]
            inner &= index < self.sizes[axis]
            found += index * steps[axis]
        which = np.flatnonzero(inner & (rest == 0))
        return which, found[which] + self.start
