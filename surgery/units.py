"""Kinds of unit: MLP neurons, and two ways of cutting attention into pieces that can be set back.

A block's name says which kind it holds: ``model.layers.0.mlp`` has MLP neurons, ``model.layers.0.self_attn[kv_group]``
KV groups. So a mask alone says which units it is over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

Units = str | tuple[str, ...]
ATTENTION = ("kv_group", "value_channel")
KINDS = ("mlp", *ATTENTION)
FINEST = ("mlp", "value_channel")  # what D chooses among where nothing else is said
WEIGHT = "weight"  # in a selector's units= single weights, alone or of the kinds beside it; no kind of unit
_NOUNS = {"mlp": "neurons", "kv_group": "KV groups", "value_channel": "value channels"}


def kinds_of(units: Units) -> tuple[str, ...]:
    """The kinds that ``units`` names, "mlp" first.

    Raises:
        ValueError: there is no such kind, or two of them cut the same attention in different ways, or single weights
            are named, which only selectors know.
    """
    asked = _asked(units)
    if WEIGHT in asked:
        raise ValueError(
            f"units={units!r}: layouts and scores have no single weights, only selectors choose among them: pass it to "
            f"DamageSelector, AMCSelector or RandomSelector"
        )
    if not asked or set(asked) - set(KINDS):
        raise ValueError(
            f'units={units!r}: expected some of {", ".join(KINDS)}, like "mlp" or ("mlp", "kv_group"); selectors also '
            f'take "weight", alone or with them'
        )
    if len(set(asked) - {"mlp"}) > 1:
        raise ValueError(f'units={units!r} overlap: beside "mlp" take one of {", ".join(ATTENTION)}')
    return tuple(kind for kind in KINDS if kind in asked)


def single(units: Units | None) -> bool:
    """Whether a selector's ``units`` are single weights."""
    return WEIGHT in _asked(units)


def owners_of(units: Units | None) -> tuple[str, ...] | None:
    """The kinds beside "weight" in a selector's ``units``; None where there are none."""
    return tuple(kind for kind in _asked(units) if kind != WEIGHT) or None


def _asked(units: Units | None) -> tuple[str, ...]:
    return (units,) if isinstance(units, str) else tuple(units or ())


def kind_of(block: str) -> str:
    """The kind of the units of a block, by its name."""
    found = re.search(r"\[(\w+)\]$", block)
    return found[1] if found and found[1] in ATTENTION else "mlp"


def module_of(block: str) -> str:
    """The path of the module that a block is, its name without the kind."""
    kind = kind_of(block)
    return block if kind == "mlp" else block.removesuffix(f"[{kind}]")


def units_in(blocks: Iterable[str]) -> tuple[str, ...]:
    """The kinds that the blocks of a layout or a mask hold, "mlp" first."""
    held = {kind_of(block) for block in blocks} or {"mlp"}
    return tuple(kind for kind in KINDS if kind in held)


def noun(kinds: Iterable[str]) -> str:
    """What units of those kinds are called together."""
    names = [_NOUNS[kind] for kind in kinds]
    return names[0] if len(names) == 1 else f"units ({' and '.join(names)})"


def noun_of_weights(kinds: Iterable[str]) -> str:
    """What single weights of such units are called."""
    return f"weights of {' and '.join(_NOUNS[kind] for kind in kinds)}"
