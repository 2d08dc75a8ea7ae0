"""A live model as a patch would leave it, also one that several processes hold together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from surgery.checkpoints.opening import Weights
from surgery.formats.patches import Numbers, as_bits, bits
from surgery.layout.sharding import is_sharded, like, local
from surgery.layout.slots import Block, Slot
from surgery.masks.entries import Entries, shapes_of


class Flipped(Mapping[str, Tensor]):
    """A live model as it is once a patch is applied, a tensor at a time; nothing is written into it."""

    def __init__(self, live: Weights, found: dict[str, list[tuple[Numbers, Numbers]]]) -> None:
        self.live, self.flips = live, dict[str, list[tuple[Slot, Tensor, Tensor]]]()
        positions: dict[str, Tensor] = {}
        for block in live.layout.blocks:
            for part in block.parts:
                if f"{block.name}/{part}" not in found:
                    continue
                at, xor = (np.concatenate(one) for one in zip(*found[f"{block.name}/{part}"], strict=True))
                order = at.argsort()
                places, flips = torch.from_numpy(at[order]), as_bits(xor[order])
                positions[f"{block.name}/{part}"] = places
                for slot in block.of(part):
                    low, high = torch.searchsorted(places, torch.tensor(slot.span)).tolist()
                    if low < high:
                        one = slot, places[low:high] - slot.span[0], flips[low:high]
                        self.flips.setdefault(slot.tensor, []).append(one)
        self.mask = Entries(positions, shapes=shapes_of(live.layout))
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.live.tensors[name]
        if name not in self.flips:
            return tensor
        if self._last is None or self._last[0] != name:
            made = local(tensor).detach().clone()
            held = like(tensor, bits(made))
            for slot, places, flips in self.flips[name]:
                here = _here(slot, held, places)
                flipped = slot.take_entries(held, places[here]) ^ flips[here].to(made.device)
                slot.put_entries(held, places[here], flipped)
            self._last = name, like(tensor, made)
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.live.tensors)

    def __len__(self) -> int:
        return len(self.live.tensors)


def bits_at(live: Weights, block: Block, part: str, positions: Tensor) -> Tensor:
    """The bits of single numbers of a live part, on the CPU: the same on all processes that hold the model."""
    ranks = live.ranks
    if ranks.mesh is None:
        return bits(block.entries(live.tensors, part, positions)).cpu()
    found, kind = torch.zeros(len(positions), dtype=torch.int64), torch.int64
    for slot in block.of(part):
        tensor = live.tensors[slot.tensor]
        low, high = torch.searchsorted(positions, torch.tensor(slot.span)).tolist()
        places = positions[low:high] - slot.span[0]
        here = _here(slot, tensor, places) & ranks.counts(tensor)
        held = bits(slot.take_entries(tensor, places[here])).cpu()
        found[low:high][here], kind = held.long(), held.dtype
    return ranks.sum(found).to(kind)


def _here(slot: Slot, tensor: Tensor, places: Tensor) -> Tensor:
    """Which numbers this process holds."""
    return slot.here(tensor, places) if is_sharded(tensor) else torch.ones(len(places), dtype=torch.bool)
