"""A rollback in a live model of peft whose adapter is not merged: in the adapter's own matrices A and B."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from surgery.checkpoints.checkpoint import Source
from surgery.checkpoints.opening import Weights, open_weights
from surgery.checkpoints.wrapped import plain_on_meta
from surgery.formats.adapters import WEIGHTS, Adapter
from surgery.formats.folders import ADAPTER
from surgery.formats.patches import bits
from surgery.layout.finding import find_layout
from surgery.layout.slots import Block, Layout, Slot
from surgery.masks.edits import Edit, Numbers
from surgery.masks.mask import Mask
from surgery.reverting.adapters import MERGE_LIVE, adapter_files
from surgery.reverting.provenance import warn_if_made_for_others
from surgery.reverting.writing import Strength, check_strength


def _opened(model: nn.Module, to: Source, mask: Mask, layout: Layout | None) -> tuple[Weights, Weights]:
    """A live model's adapter over its own base, and the earlier checkpoint."""
    outer: Any = model
    inner: Any = outer.get_base_model() if hasattr(outer, "get_base_model") else None
    active = [] if inner is None else list(outer.active_adapters)
    plain = plain_on_meta(inner) if hasattr(inner, "config") else None
    if plain is None or len(active) != 1:
        raise ValueError(
            f"the live {type(model).__name__} has no single adapter of peft that could be rolled back: {MERGE_LIVE}"
        )
    base = {
        re.sub(r"\.base_layer(?=\.)|\.original_module(?=\.)", "", name): tensor.detach()
        for name, tensor in [*inner.named_parameters(remove_duplicate=False), *inner.named_buffers()]
        if not re.search(r"\.lora_|\.modules_to_save\.", name)
    }
    with tempfile.TemporaryDirectory() as place:
        outer.save_pretrained(place, selected_adapters=active, save_embedding_layers=False)
        folder = Path(place) if (Path(place) / ADAPTER).exists() else Path(place) / active[0]
        adapter = Adapter(folder, base, lambda: plain)
    found = layout or find_layout(plain, units=mask.units)
    name = f"the live {type(model).__name__}"
    return Weights(adapter, found, name), open_weights(to, None, Weights(base, found, name))


def factor_edits(
    model: nn.Module, to: Source, mask: Mask, strength: Strength, layout: Layout | None
) -> tuple[Layout, list[tuple[Edit, Tensor]]]:
    """Where the units of a live model lie once it is merged, and edits of the adapter's tensors with the new numbers.

    Raises:
        ValueError: the adapters are not of a ``PeftModel``, or several are active at once; the result is no adapter, or
            one of a higher rank (``adapter_files``).
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import load

    later, source = _opened(model, to, mask, layout)
    check_strength(strength, later.layout)
    warn_if_made_for_others(mask, earlier=source)
    made = load(adapter_files(later, source, mask, strength)[WEIGHTS])
    outer: Any = model
    live = get_peft_model_state_dict(outer, adapter_name=outer.active_adapters[0], save_embedding_layers=False)
    names = {one.data_ptr(): name for name, one in model.named_parameters()}
    found: list[tuple[Edit, Tensor]] = []
    for key, value in made.items():
        new, old = value.to(live[key].device, live[key].dtype), live[key]
        index = (bits(new) != bits(old)).flatten().nonzero().flatten().cpu()
        if len(index):
            axes = " ".join("ndefgh"[: old.ndim])
            slot = Slot("factor", names[old.data_ptr()], f"{axes} -> {axes}", tuple(old.shape))
            edit = Numbers(Block(slot.tensor, len(old), (slot,), slot.tensor), slot, index)
            found.append((edit, edit.take(new)))
    return later.layout, found
