"""Where in a model a tensor belongs, by its name alone: its layer, and whether it is MLP, attention or other."""

from __future__ import annotations

import re

KINDS = ("mlp", "attention", "norm", "embedding/head", "other")
# the first that fits anywhere in the name wins; a norm may sit in an attention, an attention may have experts
_SIGNS = (
    ("norm", r"norm|(^|[._])ln([._]|$)"),
    ("attention", r"attn|attention"),
    ("embedding/head", r"embed|(^|\.)(wte|wpe|lm_head|score|cls|predictions|project_in|project_out)\."),
    ("mlp", r"mlp|ffn|feed_forward|moe|expert|router|(^|\.)(fc\d|fc_in|fc_out|intermediate\.dense|output\.dense)\."),
)


def place_of(tensor: str) -> tuple[str | None, str]:
    """The layer that a tensor lies in ("model.layers.0", None outside) and its kind, one of ``KINDS``.

    >>> place_of("model.layers.12.mlp.down_proj.weight"), place_of("lm_head.weight")
    (('model.layers.12', 'mlp'), (None, 'embedding/head'))
    """
    found = re.match(r"(.*?(^|\.)\d+)\.", tensor)
    kind = next((kind for kind, sign in _SIGNS if re.search(sign, tensor, re.IGNORECASE)), "other")
    return (found[1] if found else None), kind


def layer_order(place: tuple[str | None, str]) -> tuple[bool, str, int, int]:
    """What places are sorted by: layers by their number, then what lies outside of them; kinds as in ``KINDS``."""
    layer, kind = place
    stack, _, number = (layer or "").rpartition(".")
    return layer is None, stack, int(number or 0), KINDS.index(kind)
