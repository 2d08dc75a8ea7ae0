"""The model inside one of peft, as a plain model: one that shares its weights, or a merged copy."""

from __future__ import annotations

import copy
import re
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from surgery.compat import inside, uncompiled

_made: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def plain_of(module: nn.Module) -> nn.Module:
    """A plain model with the very tensors of one that torch.compile wraps, or of peft with merged adapters.

    What is written into the one is written into the other. Any other module is returned as it is; one whose adapters
    are not merged, too: no tensor of it holds what it computes with.
    """
    module = uncompiled(module)
    layers = _layers(module)
    if not layers or not all(one.merged for one in layers):
        return module
    if module not in _made:
        outer: Any = module
        inner = outer.get_base_model() if hasattr(outer, "get_base_model") else outer
        made = _shared(inner) if hasattr(inner, "config") else None
        if made is None:
            return module
        _made[module] = made
    return _made[module].train(module.training)


def is_unmerged(module: nn.Module) -> bool:
    """Whether it is a model of peft that computes with adapters beside its weights."""
    layers = _layers(module)
    return bool(layers) and not any(one.merged or one.disable_adapters for one in layers)


def merged_copy(module: nn.Module) -> nn.Module:
    """A plain model of its own: one of peft with its active adapters merged as peft merges them, bit for bit."""
    made: Any = copy.deepcopy(module).eval()
    for one in _layers(made):
        one.merge()
    return plain_of(made)


def _layers(module: nn.Module) -> list[Any]:
    """Those to which adapters were added."""
    return [one for one in inside(module) if "base_layer" in one._modules and hasattr(one, "merged")]


def plain_on_meta(inner: Any) -> Any:
    """A model of the class and configuration of the one inside a model of peft, without numbers."""
    with torch.device("meta"):
        return type(inner)(copy.deepcopy(inner.config))


def _shared(inner: Any) -> nn.Module | None:
    """The model of the same class and configuration with the same tensors; None where one has no counterpart."""
    held: dict[str, Tensor] = {}
    named = [*inner.named_parameters(remove_duplicate=False), *inner.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if re.search(r"\.lora_|\.original_module\.", name):
            continue
        plain = re.sub(r"\.base_layer(?=\.)|\.modules_to_save\.[^.]+", "", name)
        if plain in held:  # of several adapters
            return None
        held[plain] = tensor
    made = plain_on_meta(inner)
    wanted = [*made.named_parameters(remove_duplicate=False), *made.named_buffers(remove_duplicate=False)]
    for name, tensor in wanted:
        if name not in held or held[name].shape != tensor.shape:
            return None
        path, _, leaf = name.rpartition(".")
        setattr(made.get_submodule(path), leaf, held[name])
    made.generation_config = getattr(inner, "generation_config", None)
    made.name_or_path = getattr(inner, "name_or_path", "")
    return made  # type: ignore[no-any-return]
