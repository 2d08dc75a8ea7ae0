"""Where two checkpoints' configurations differ, so that the same weights are not the same model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from surgery.checkpoints.checkpoint import Checkpoint, State
from surgery.layout.on_disk import configuration

# Every setting counts but these, also one that nobody knows: a forward pass may read it, and a model that is loaded as
# itself is right in any case. These say where a model comes from and in which dtype, what it returns besides logits,
# where generate stops, how a classifier's classes are called, and what training alone does.
_IDLE = re.compile(
    r"_name_or_path|transformers_version|architectures|auto_map|dtype|torch_dtype|unsloth_\w+"
    r"|use_cache|return_dict|output_(hidden_states|attentions|router_logits)|chunk_size_feed_forward"
    r"|(bos|eos|pad)_token_id|id2label|label2id|problem_type"
    r"|initializer_(range|factor)|\w*dropout|\w+_pdrop|layerdrop|router_(aux|z)_loss_coef"
)
_NONE = "not set"


def differences(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, tuple[Any, Any]]:
    """The settings that may reach the forward pass and differ: name → (the one's value, the other's).

    Empty where a side has no configuration: a bare mapping, a module of one's own, a folder without ``config.json``.

    Raises:
        ValueError: a ``config.json`` can't be read.
    """
    live = next((config for side in (one, other) if (config := _live(side)) is not None), None)
    ours, theirs = _settings(one, live), _settings(other, live)
    return {} if ours is None or theirs is None else dict(_differing(ours, theirs))


def _live(side: Mapping[str, Tensor]) -> Any:
    return getattr(side.module, "config", None) if isinstance(side, State) else None


def _settings(side: Mapping[str, Tensor], live: Any) -> Mapping[str, Any] | None:
    """A side's configuration with the defaults of its class; of a model that reads text, if that is what is live."""
    if not isinstance(side, Checkpoint):
        config = _live(side)
        return config.to_dict() if hasattr(config, "to_dict") else None
    if not (side.home / "config.json").exists():
        return None
    config = configuration(side.home, side.shapes)
    if hasattr(live, "to_dict") and config.model_type == live.model_type:
        return dict(type(live).from_pretrained(side.home, local_files_only=True).to_dict())
    text = config.get_text_config()
    return dict((text if type(live) is type(text) else config).to_dict())


def _differing(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], path: str = ""
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for name in dict.fromkeys([*map(str, ours), *map(str, theirs)]):
        one, other = (json.loads(json.dumps(side.get(name, _NONE), default=str)) for side in (ours, theirs))
        if _IDLE.fullmatch(name) or one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _differing(one, other, f"{path}{name}.")
        else:
            yield f"{path}{name}", (one, other)
