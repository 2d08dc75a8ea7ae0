"""What a layout that was found has to stand up to: the model's own plan, its dtypes, and that no layer is left out."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

from surgery.slots import Layout

WAY_OUT = "Describe it yourself with layout= (docs/how-to/add-an-architecture.md)"


def style(plan: Mapping[str, str], path: str) -> str:
    """How the plan shards a module, like "colwise"; "" where it says nothing."""
    generic = re.sub(r"\.\d+(?=\.|$)", ".*", path)
    return next((style for key, style in plan.items() if generic == key or generic.endswith(f".{key}")), "")


def check_plan(model: nn.Module, layout: Layout, plan: Mapping[str, str]) -> None:
    """The sharded axis of the tensor-parallel plan has to be the neuron axis (linear layers only)."""
    for block in layout.blocks if plan else ():
        for slot in block.slots:
            path = slot.tensor.rpartition(".")[0]
            if block.experts or not isinstance(model.get_submodule(path), nn.Linear):
                continue
            wrong = "colwise" if slot.part in ("down", "o") else "rowwise"
            if style(plan, path).startswith(wrong):
                whose = "an MLP" if block.kind == "mlp" else "an attention"
                raise ValueError(
                    f"{path} was taken for the {slot.part} of {whose}, but the model's tensor-parallel plan shards it "
                    f"{style(plan, path)!r}, across another axis. {WAY_OUT}"
                )


def check_dtypes(model: nn.Module, layout: Layout) -> None:
    """No slot may be quantised."""
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for slot in (slot for block in layout.blocks for slot in block.slots):
        if held[slot.tensor].dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(
                f"{slot.tensor} is stored as {held[slot.tensor].dtype}: quantised weights can't be reverted exactly. "
                f"Roll the unquantised checkpoint back and quantise it again"
            )


def check_complete(model: nn.Module, layout: Layout) -> None:
    """There is a block, and one in every layer of a stack that has any."""
    if not layout.blocks:
        raise ValueError(f"no MLP was recognised in {type(model).__name__}. {WAY_OUT}")
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or re.search(r"\.\d+\.", f".{path}."):
            continue
        bare = [n for n, _ in module.named_children() if not _holds(layout, f"{path}.{n}")]
        if 0 < len(bare) < len(module):
            raise ValueError(
                f"no MLP was recognised in {len(bare)} of {len(module)} layers of {path}: {bare[:5]}. {WAY_OUT}"
            )


def _holds(layout: Layout, path: str) -> bool:
    return any(name == path or name.startswith(f"{path}.") for name in layout)
