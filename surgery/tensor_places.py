"""Where in a model each tensor belongs, by its name and number of dimensions: its layer, its module, and their kind."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

KINDS = ("attention", "mlp", "norm", "other", "embedding", "head")
_LAYER = re.compile(r"((?:.*?\.)?(\d+))\.(.+)")  # the first number of a name is the layer's; an expert's comes later
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|ffwd|feed_?forward|fc|dense|moe|expert|intermediate|output", re.IGNORECASE)
_HEAD = re.compile(r"head|embed_out|cls", re.IGNORECASE)
_EMBEDDING = re.compile(r"emb|wte|wpe|project_(in|out)", re.IGNORECASE)


@dataclass(frozen=True)
class Place:
    """The path of a tensor's layer ("model.layers.0", None outside), its kind, and the path of its module."""

    layer: str | None
    kind: str
    module: str

    @property
    def number(self) -> int | None:
        """The layer's number."""
        return None if self.layer is None else int(self.layer.rpartition(".")[2])

    @property
    def order(self) -> tuple[bool, str, int, int]:
        """What places are sorted by: layers by their number, then what lies outside of them; kinds as in ``KINDS``."""
        stack = (self.layer or "").rpartition(".")[0]
        return self.layer is None, stack, self.number or 0, KINDS.index(self.kind)


def places_of(dims: Mapping[str, int]) -> dict[str, Place]:
    """The place of every tensor of a model, from their names and numbers of dimensions alone.

    Kinds: "attention"; "mlp" (experts and their router, too); "norm": modules that hold vectors only; "embedding" and
    "head" outside the layers; "other". A norm inside attention (q_norm) is part of the attention. A layer's module is
    its child.

    >>> found = places_of({"model.layers.12.mlp.down_proj.weight": 2, "model.norm.weight": 1})
    >>> [(place.layer, place.kind) for place in found.values()]
    [('model.layers.12', 'mlp'), (None, 'norm')]
    """
    split = {name: _LAYER.fullmatch(name) for name in dims}
    homes = {
        name: f"{found[1]}.{found[3].split('.')[0]}" if found else name.rpartition(".")[0] or name
        for name, found in split.items()
    }
    wide = {home for name, home in homes.items() if dims[name] > 1}
    places = {}
    for name, home in homes.items():
        found, child = split[name], home.rpartition(".")[2]
        if home not in wide:
            kind = "norm"
        elif found:
            kind = "attention" if _ATTENTION.search(child) else "mlp" if _MLP.search(child) else "other"
        else:
            kind = "head" if _HEAD.search(home) else "embedding" if _EMBEDDING.search(home) else "other"
        places[name] = Place(found[1] if found else None, kind, home)
    return places
