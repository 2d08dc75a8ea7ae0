"""What a source of weights has to be before it is read: each check sees names, shapes and dtypes, and no numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from surgery.checkpoints.checkpoint import Checkpoint, State
from surgery.formats.folders import ADAPTER, MERGE
from surgery.layout.finding import check_unwrapped
from surgery.layout.plain import check_all_stored, quantised
from surgery.layout.slots import Layout


def check_source(tensors: Mapping[str, Tensor], name: str) -> None:
    """Raise ``ValueError`` unless the numbers of a source are a model's, as they are."""
    check_unwrapped(name, tensors)
    check_merged(tensors, name)
    check_plain(tensors, name)


def check_plain(tensors: Mapping[str, Tensor], name: str) -> None:
    """Raise ``ValueError`` where a source is quantised, by its tensors or by its configuration."""
    if isinstance(getattr(tensors, "layout", None), Layout):
        return  # a rolled-back view, whose parents were checked
    if isinstance(tensors, Checkpoint):
        check_all_stored(tensors.dtypes, name)
    else:
        check_all_stored({tensor: value.dtype for tensor, value in tensors.items()}, name)
    settings = _settings(tensors)
    text = settings.get("text_config")
    for one in (settings, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            if one.get(key):
                raise quantised(f"the configuration of {name} has a {key}")


def _settings(tensors: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """What a folder's or a live model's configuration says; empty where there is none, or none that can be read."""
    if isinstance(tensors, State):
        return getattr(getattr(tensors.module, "config", None), "__dict__", {})
    if not isinstance(tensors, Checkpoint):
        return {}
    try:
        found = json.loads((tensors.home / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def check_merged(tensors: Mapping[str, Tensor], name: str) -> None:
    """Raise ``ValueError`` where an adapter lies beside a model's weights: whether it is merged can't be told."""
    if isinstance(tensors, Checkpoint) and tensors.adapter is None and (tensors.folder / ADAPTER).exists():
        raise ValueError(
            f"{name} holds a whole model and the {ADAPTER} of an adapter, which transformers puts on top of it: remove "
            f"the adapter's files if it is merged already, else {MERGE}"
        )
