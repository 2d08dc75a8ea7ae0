"""Inner products of gradients, added up to the parts of a model: its modules, layers and kinds of module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from surgery.evidence import Cell
from surgery.tensor_places import KINDS, Place, places_of

Products = tuple[tuple[float, ...], ...]  # [domain, domain]
Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Part:
    """A part of a model, and how the gradients of some domains lie to each other in it.

    ``name``: a module's path, or what it is the sum of. ``layer``: its number, None outside the layers. ``kind``:
    "model", "layer", "module", or what ``places_of`` says. ``norms``: domain → ‖g‖. ``cosines``: domain → domain →
    cosine in [−1, 1], None where a gradient is zero.
    """

    name: str
    layer: int | None
    kind: str
    norms: dict[str, float]
    cosines: dict[str, dict[str, float | None]]

    @classmethod
    def of(cls, name: str, layer: int | None, kind: str, domains: Sequence[str], products: Sequence[Products]) -> Part:
        """The part that some tensors make up: their inner products added."""
        every = range(len(domains))
        total = [[math.fsum(one[a][b] for one in products) for b in every] for a in every]
        norms = {domain: math.sqrt(total[at][at]) for at, domain in enumerate(domains)}
        cosines = {
            a: {b: _cosine(total[i][j], total[i][i] * total[j][j]) for j, b in enumerate(domains)}
            for i, a in enumerate(domains)
        }
        return cls(name, layer, kind, norms, cosines)

    def row(self, pairs: Pairs) -> tuple[Cell, ...]:
        """The cosine of each pair of domains."""
        return tuple(self.cosines[a][b] for a, b in pairs)


@dataclass(frozen=True)
class Pull:
    """Two domains whose gradients agree or clash in one module: its path, layer and kind, and the cosine there."""

    module: str
    layer: int | None
    kind: str
    first: str
    second: str
    cosine: float

    def cells(self) -> tuple[Cell, ...]:
        """Its row in a table."""
        return self.module, f"{self.first}–{self.second}", self.cosine


def gathered(
    dims: Mapping[str, int], domains: Sequence[str], products: Mapping[str, Products]
) -> tuple[Part, tuple[Part, ...], tuple[Part, ...], tuple[Part, ...]]:
    """The whole model, its kinds of module, its layers, and the modules of every layer, each the sum of its tensors."""
    places = places_of(dims)

    def sums(groups: Mapping[tuple[int | None, str], list[str]], label: str | None) -> tuple[Part, ...]:
        return tuple(
            Part.of(label or _name(names, places), *key, domains, [products[name] for name in names])
            for key, names in groups.items()
        )

    kinds: dict[str, list[str]] = {}
    layers: dict[int, list[str]] = {}
    modules: dict[tuple[int | None, str], list[str]] = {}
    for name, place in places.items():
        kinds.setdefault(place.kind, []).append(name)
        if place.number is not None:
            layers.setdefault(place.number, []).append(name)
            modules.setdefault((place.number, place.kind), []).append(name)
    return (
        Part.of("model", None, "model", domains, list(products.values())),
        tuple(part for k in KINDS if k in kinds for part in sums({(None, k): kinds[k]}, k)),
        tuple(part for at in sorted(layers) for part in sums({(at, "layer"): layers[at]}, f"layer {at}")),
        sums(dict(sorted(modules.items(), key=lambda item: (item[0][0], KINDS.index(item[0][1])))), None),
    )


def pulls(stages: Sequence[Sequence[Part]], pairs: Pairs, count: int) -> tuple[tuple[Pull, ...], tuple[Pull, ...]]:
    """The strongest conflicts (the lowest first) and synergies (the highest first) among attention and MLP modules.

    By the mean cosine over the stages; ties in the order of the modules.
    """
    if count < 0:
        raise ValueError(f"strongest={count}: expected 0 or more")
    found = []
    for parts in zip(*stages, strict=True):
        for a, b in pairs if parts[0].kind in ("attention", "mlp") else ():
            values = [value for part in parts if (value := part.cosines[a][b]) is not None]
            if values:
                mean = math.fsum(values) / len(values)
                found.append(Pull(parts[0].name, parts[0].layer, parts[0].kind, a, b, mean))
    found.sort(key=lambda pull: pull.cosine)
    conflicts = [pull for pull in found if pull.cosine < 0][:count]
    synergies = sorted((pull for pull in found if pull.cosine > 0), key=lambda pull: -pull.cosine)[:count]
    return tuple(conflicts), tuple(synergies)


def _cosine(product: float, squares: float) -> float | None:
    return max(-1.0, min(1.0, product / math.sqrt(squares))) if squares > 0 else None


def _name(names: Sequence[str], places: Mapping[str, Place]) -> str:
    """The path of a module, or of the layer with the kind, where several of its modules are of that kind."""
    homes = {places[name].module for name in names}
    first = next(iter(homes))
    return first if len(homes) == 1 else f"{first.rpartition('.')[0]}[{places[names[0]].kind}]"
