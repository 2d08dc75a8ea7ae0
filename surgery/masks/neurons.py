"""Neurons: one number per neuron, the only data type that scores and masks have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.layout.slots import Layout
from surgery.masks.edits import Rows
from surgery.masks.files import MADE_BY, read_vectors, write_vectors
from surgery.units import noun, units_in

_MISSING = "missing:"  # prefix of the tensors that mark neurons without a value, in a saved file


class Neurons(Mapping[str, Tensor]):
    """One number per neuron: a mapping from block name to a vector; float32 = scores, bool = a mask.

    Blocks are named by module path, in the model's layer order. If the "neurons" are units of attention, the name ends
    with their kind, like ``model.layers.0.self_attn[kv_group]``. Scores of the same model multiply elementwise; masks
    combine with ``&``, ``|`` and ``~``.

    Args:
        values: block name → ``[neuron]`` tensor. All bool, or all of one real dtype (kept as float32).
        missing: block name → bool ``[neuron]``: neurons without a value (for example, experts that no token reached
            have no activation). Their entries are 0, count in no mean and are never selected.
        made_by: what made it (plain JSON values); saved with the file.

    Raises:
        ValueError: a vector is no tensor or not one-dimensional, the dtypes differ, a score is NaN or infinite, or
            ``missing`` is not of these blocks.

    Source: ours.

    >>> scores = Neurons({"layers.0.mlp": torch.tensor([1.0, 3.0]), "layers.1.mlp": torch.tensor([2.0, 0.0])})
    >>> (scores * scores)["layers.0.mlp"]
    tensor([1., 9.])
    >>> scores.relative()["layers.1.mlp"]
    tensor([2., 0.])
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        *,
        missing: Mapping[str, Tensor] | None = None,
        made_by: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value in values.items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"block {name!r} holds a {type(value).__name__}: expected a tensor, torch.as_tensor(...)"
                )
        kinds = {value.dtype == torch.bool for value in values.values()}
        if len(kinds) > 1:
            raise ValueError("a Neurons is either a mask (all vectors bool) or scores (all real), not a mixture")
        self.is_mask = kinds == {True}
        self._values = {name: _vector(name, value, self.is_mask) for name, value in values.items()}
        for name, flags in (missing or {}).items():
            if name not in values or flags.dtype != torch.bool or flags.shape != values[name].shape:
                raise ValueError(
                    f"missing= of {name!r} is {flags.dtype} of the shape {tuple(flags.shape)}: expected a bool for "
                    f"each neuron of a block"
                )
        self.missing = {name: flags.cpu() for name, flags in (missing or {}).items() if bool(flags.any())}
        for name, flags in self.missing.items():
            self._values[name] = self._values[name].masked_fill(flags, 0)
        self.made_by = dict(made_by or {})

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def sizes(self) -> dict[str, int]:
        """Neurons per block."""
        return {name: value.numel() for name, value in self.items()}

    @property
    def total(self) -> int:
        """How many neurons the model has."""
        return sum(self.sizes.values())

    @property
    def units(self) -> tuple[str, ...]:
        """The kinds of unit that it is over, "mlp" first."""
        return units_in(self)

    @property
    def noun(self) -> str:
        """What its units are called."""
        return noun(self.units)

    @property
    def candidates(self) -> str:
        """What a mask selects from, in words."""
        return "MLP neurons" if self.units == ("mlp",) else self.noun

    def available(self, name: str) -> Tensor:
        """Which neurons of a block have a value: bool ``[neuron]``."""
        return ~self.missing.get(name, torch.zeros(self[name].numel(), dtype=torch.bool))

    def relative(self) -> Neurons:
        """Each score divided by the mean of its block, so that layers of different scale can be compared.

        A block whose scores are all zero stays zero. Source: ours (the factors of a product have to be comparable).
        """
        self._need(mask=False, verb="relative()")

        def divide(name: str, value: Tensor) -> Tensor:
            mean = value[self.available(name)].double().mean() if bool(self.available(name).any()) else value.sum()
            return (value.double() / mean).float() if mean != 0 else value

        return self._map(divide)

    def count(self) -> dict[str, int]:
        """How many neurons of each block a mask selects."""
        self._need(mask=True, verb="count()")
        return {name: int(value.sum()) for name, value in self.items()}

    @property
    def fraction(self) -> float:
        """The fraction of all neurons that a mask selects, in [0, 1]."""
        return sum(self.count().values()) / max(self.total, 1)

    def indices(self, name: str) -> Tensor:
        """The selected neurons of a block: int64, ascending."""
        self._need(mask=True, verb="indices()")
        return self[name].nonzero().flatten()

    def tally(self) -> dict[str, Any]:
        """How many neurons a mask selects of how many, and where, for the record of a saved folder."""
        return {"neurons": {"reverted": sum(self.count().values()), "of": self.total, "per_block": self.count()}}

    def edits(self, layout: Layout, whose: str) -> Iterator[Rows]:
        """What a mask changes, slot by slot in layer order.

        Raises:
            ValueError: it holds scores, or is of another model than ``whose`` layout.
        """
        if not self.is_mask:
            raise ValueError("mask= holds scores: choose neurons with top(scores, allocate(scores, budget))")
        self.require(layout.sizes, whose)
        for name, block in layout.items():
            index = self.indices(name)
            for slot in block.slots if len(index) else ():
                low, high = torch.searchsorted(index, torch.tensor([slot.start, slot.stop])).tolist()
                if low < high:
                    yield Rows(block, slot, index[low:high])

    def strengths(self, each: Neurons) -> Tensor:
        """The strength of every neuron that a mask selects: float32 ``[selected]``."""
        return torch.cat([torch.zeros(0), *(each[name][value] for name, value in self.items())])

    def signed(self, made_by: Mapping[str, Any]) -> Neurons:
        """The same with entries added to ``made_by``."""
        return Neurons(self, missing=self.missing, made_by={**self.made_by, **made_by})

    def __mul__(self, other: Neurons) -> Neurons:
        return self._combine(other, torch.mul, mask=False)

    def __and__(self, other: Neurons) -> Neurons:
        return self._combine(other, torch.logical_and, mask=True)

    def __or__(self, other: Neurons) -> Neurons:
        return self._combine(other, torch.logical_or, mask=True)

    def __sub__(self, other: Neurons) -> Neurons:
        both = self & other  # a neuron that is missing in the other one is not in it, and stays
        return Neurons({name: value & ~both[name] for name, value in self.items()}, missing=self.missing)

    def __invert__(self) -> Neurons:
        self._need(mask=True, verb="~")
        return self._map(lambda _, value: ~value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Neurons) and self.equal(other)  # a Mapping's own asks a tensor whether it is true

    def equal(self, other: Neurons) -> bool:
        """Whether both hold the same blocks in the same order with the same numbers, bit for bit."""
        if self.is_mask != other.is_mask:
            return False
        return list(self) == list(other) and all(torch.equal(value, other[name]) for name, value in self.items())

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; its metadata says what made it and in which order the blocks come."""
        tensors = {**self._values, **{_MISSING + name: flags for name, flags in self.missing.items()}}
        write_vectors(path, "Neurons", tensors, made_by=self.made_by, blocks=list(self))

    @classmethod
    def load(cls, path: str | Path) -> Neurons:
        """Read what ``save`` wrote.

        Raises:
            LookupError: there is no such file. ValueError: it is not a file of neurons, or damaged.
        """
        held, told = read_vectors(path, "Neurons", ("BOOL", "F32"), made_by=MADE_BY, blocks=[str])
        blocks, marks = told["blocks"], [name for name in held if name.startswith(_MISSING)]
        if sorted(blocks) != sorted(held.keys() - marks):
            raise ValueError(f"{path} is damaged: it does not hold the blocks that its metadata names, each once")
        missing = {name.removeprefix(_MISSING): held[name] for name in marks}
        try:
            return cls({name: held[name] for name in blocks}, missing=missing, made_by=told["made_by"])
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    def __repr__(self) -> str:
        if not self:
            return "Neurons(empty)"
        width, what = max(map(len, self)), self.noun
        if self.is_mask:
            head = f"Neurons: mask of {sum(self.count().values())} of {self.total} {what} ({self.fraction:.2%})"
            lines = [f"  {name:<{width}}  {n:>6} of {self.sizes[name]}" for name, n in self.count().items()]
        else:
            head = f"Neurons: scores of {self.total} {what} in {len(self)} blocks"
            lines = [
                f"  {name:<{width}}  mean {value.mean():.4g}  max {value.max():.4g}" for name, value in self.items()
            ]
        if self.missing:
            head += f"; {sum(int(flags.sum()) for flags in self.missing.values())} without a value"
        return "\n".join([head, *lines])

    def _map(self, function: Callable[[str, Tensor], Tensor]) -> Neurons:
        values = {name: function(name, value) for name, value in self.items()}
        return Neurons(values, missing=self.missing, made_by=self.made_by)

    def _combine(self, other: Neurons, function: Callable[[Tensor, Tensor], Tensor], mask: bool) -> Neurons:
        if not isinstance(other, Neurons):
            raise ValueError(f"this operation is between two Neurons, and the other one is a {type(other).__name__}")
        for operand in (self, other):
            operand._need(mask=mask, verb="this operation")
        self.require(other.sizes, "the other Neurons")
        values = {name: function(value, other[name]) for name, value in self.items()}
        missing = {name: ~(self.available(name) & other.available(name)) for name in {*self.missing, *other.missing}}
        return Neurons(values, missing=missing, made_by={**self.made_by, **other.made_by})

    def require(self, sizes: Mapping[str, int], whose: str) -> None:
        """Raise ``ValueError`` unless the blocks are named, ordered and sized like ``sizes``."""
        if list(self.sizes.items()) == list(sizes.items()):
            return
        for name in dict.fromkeys([*self.sizes, *sizes]):
            ours, theirs = self.sizes.get(name), sizes.get(name)
            if ours != theirs:
                raise ValueError(
                    f"block {name!r} has {ours or 'no'} neurons here and {theirs or 'none'} in {whose}: they are for "
                    f"different models. Make the scores or the mask again from the checkpoints it is used with"
                )
        raise ValueError(f"the blocks come in another order than in {whose}")

    def _need(self, mask: bool, verb: str) -> None:
        if self and self.is_mask != mask:
            have, want = ("a mask", "scores") if self.is_mask else ("scores", "a mask")
            raise ValueError(f"{verb} needs {want}, and this Neurons holds {have}")


def _vector(name: str, value: Tensor, mask: bool) -> Tensor:
    if value.ndim != 1:
        raise ValueError(f"block {name!r}: expected one number per neuron, got a tensor of shape {tuple(value.shape)}")
    value = value.detach().cpu()
    if mask:
        return value
    value = value.float()
    if not bool(value.isfinite().all()):
        bad = int((~value.isfinite()).sum())
        raise ValueError(f"block {name!r}: {bad} of {value.numel()} scores are NaN or infinite")
    return value
