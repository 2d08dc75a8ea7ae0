"""Every private or undocumented name of transformers and torch that the package leans on, and nothing else.

No other module touches one. tests/test_compat.py has a canary for each, which says what to do when a new version takes
the name away.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn


def tensor_parallel_plan(model: nn.Module) -> dict[str, str]:
    """A model's ``_tp_plan``: path pattern → "colwise", "rowwise", ...; empty where it has none.

    Needed to tell an MLP's input layer from its output layer where both are square, and to check what was found.
    """
    return {str(k): str(v) for k, v in (getattr(model, "_tp_plan", None) or {}).items()}


def auto_class(config: Any) -> str | None:
    """The first of transformers' auto classes that builds a model of a configuration, by its ``_model_mapping``.

    With a head where there is one. Needed because a vision-language model is no causal LM to transformers, and because
    its own error lists every model that it knows.
    """
    import transformers

    kinds = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForImageTextToText", "AutoModel")
    return next((kind for kind in kinds if type(config) in getattr(transformers, kind)._model_mapping), None)


def model_class(auto: str, config: Any) -> Any:
    """The class of a configuration's model in one of the auto classes, by its ``_model_mapping``.

    Needed because an auto class does not load weights that are handed to it (``state_dict=``).
    """
    import transformers

    found = getattr(transformers, auto)._model_mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


_PARALLEL = "DataParallel, DDP or DeepSpeed"
# how a wrapper shows in tensor names → what it is, and how to get at the model inside
_WRAPPERS = {
    r"^module\.": (_PARALLEL, "model.module"),
    r"^pretrained_model\.": ("trl's value head", "model.pretrained_model"),
    r"^base_model\.model\.|\.base_layer\.": (
        "an adapter of peft",
        "model.merge_and_unload() (or the model itself after model.merge_adapter())",
    ),
    r"(^|\.)_orig_mod\.": ("torch.compile", "model._orig_mod, or what was compiled inside it"),
    r"(^|\.)_fsdp_wrapped_module\.": ("FSDP", "a model that fully_shard shards, or a saved folder"),
    r"(^|\.)_checkpoint_wrapped_module\.": ("activation checkpointing", "the model as it was before"),
}


def wrapper_of(names: Iterable[str]) -> tuple[str, str, str] | None:
    """A tensor name that a wrapper gave, whose it is, and how to get at the model inside; None without a wrapper.

    By the attributes in which torch, trl and peft hold what they wrap. Needed because the names tell both what is
    live and what was saved from it, and because a name inside a wrapper fits no other checkpoint's.
    """
    names = list(names)
    if not re.search("|".join(_WRAPPERS), "\n".join(names), re.MULTILINE):
        return None
    for pattern, (what, way) in _WRAPPERS.items():
        found = [name for name in names if re.search(pattern, name)]
        if found and (what != _PARALLEL or len(found) == len(names)):  # a layer of a model may be called module
            return found[0], what, way
    return None


_plain: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def inside(model: nn.Module) -> list[nn.Module]:
    """A model and all modules in it, each once: ``modules()``, by ``_modules`` and without its nested generators.

    Needed because a rollback on a GPU takes less time than ``modules()`` of a large model.
    """
    found, left = dict[nn.Module, None](), list[nn.Module | None]([model])
    while left:
        one = left.pop()
        if one is not None and one not in found:
            found[one] = None
            left.extend(reversed(one._modules.values()))
    return list(found)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters by name, then all buffers, under each of their names; what is there twice is there twice.

    Needed for the same reason: ``named_parameters`` and ``named_buffers`` with ``remove_duplicate=False``.
    """
    parameters, buffers, left = dict[str, Tensor | None](), dict[str, Tensor | None](), [("", model)]
    while left:
        path, one = left.pop()
        parameters |= {path + name: tensor for name, tensor in one._parameters.items()}
        buffers |= {path + name: tensor for name, tensor in one._buffers.items()}
        left += [(f"{path}{name}.", child) for name, child in reversed(one._modules.items()) if child is not None]
    return {name: tensor for name, tensor in (parameters | buffers).items() if tensor is not None}


def saved_by(model: nn.Module) -> list[Tensor]:
    """The tensors that ``state_dict`` holds, without their names and its hooks: by ``_parameters`` and ``_buffers``.

    Needed for the same reason.
    """
    found: list[Tensor | None] = []
    for one in inside(model):
        found += one._parameters.values()
        found += (held for name, held in one._buffers.items() if name not in one._non_persistent_buffers_set)
    return [held for held in found if held is not None]


def uncompiled(model: nn.Module) -> nn.Module:
    """A model without torch.compile, with the very same tensors and their plain names; any other as it is.

    By ``_orig_mod``, in which torch.compile keeps what it compiled, and ``_compiled_call_impl``, which ``compile`` sets
    in a module. Needed because compiled code calls no hook that it was not compiled with, and compiles again for every
    shape; and because the names of what is compiled fit no other checkpoint's.
    """
    while "_orig_mod" in model._modules:
        model = model._modules["_orig_mod"]  # type: ignore[assignment]
    if not any("_orig_mod" in one._modules or one._compiled_call_impl is not None for one in inside(model)):
        return model
    if model not in _plain:
        _plain[model] = _without(model, {})
    return _plain[model].train(model.training)


def _without(module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """A module that shares its tensors, and what is inside it as well."""
    while "_orig_mod" in module._modules:
        module = module._modules["_orig_mod"]  # type: ignore[assignment]
    if module not in made:
        new = made[module] = object.__new__(type(module))
        hooks = {name: copy.copy(held) for name, held in vars(module).items() if name.endswith("_hooks")}
        vars(new).update({**vars(module), **hooks, "_modules": {}, "_compiled_call_impl": None})
        for name, one in module._modules.items():
            new._modules[name] = None if one is None else _without(one, made)
    return made[module]


def passing_buffers(model: nn.Module) -> set[str]:
    """The names of buffers that no checkpoint holds, from each module's ``_non_persistent_buffers_set``.

    Needed to compare a live model with a folder without telling that the folder lacks them.
    """
    return {
        f"{path}.{name}".removeprefix(".")
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }


def as_saved(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a live model under the names and in the shapes that ``save_pretrained`` gives them on disk.

    transformers' own ``core_model_loading.revert_weight_conversion``. Needed because experts are stacked in memory and
    lie one by one on disk.

    Raises:
        ValueError: this transformers has no such function.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError as error:
        raise _too_old(error) from error
    found: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return found


def is_left_out(model: Any, name: str) -> bool:
    """Whether transformers knowingly leaves a tensor of a checkpoint out: ``_keys_to_ignore_on_load_unexpected``.

    And what old checkpoints hold that is computed now, as ``_adjust_missing_and_unexpected_keys`` knows it. Needed to
    tell which tensors nothing reads, without those that nobody misses.
    """
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    computed = r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"
    return any(re.search(pattern, name) for pattern in (*patterns, *computed))


def _too_old(error: ImportError) -> ValueError:
    return ValueError(
        f"this transformers does not give the names on disk ({error}): use a version from 5.0 on, or describe the "
        f"layout yourself with layout= (docs/how-to/add-an-architecture.md)"
    )


@dataclass(frozen=True)
class Names:
    """Where the tensors of a checkpoint go in memory: ``whole`` are loaded as they are, ``parts`` are converted.

    ``whole``: name in memory → name in the checkpoint. ``parts``: name in memory → those in the checkpoint that it is
    made of, like experts that are stacked, each under a key that does not depend on its prefixes (``spelt``).
    """

    whole: Mapping[str, str]
    parts: Mapping[str, Mapping[str, str]]
    spelt: Callable[[str], str]


def as_loaded(model: Any, names: Iterable[str]) -> Names:
    """How ``from_pretrained`` reads the names of a checkpoint: old and new ones, and those of a model without its head.

    transformers' own ``conversion_mapping.get_model_conversion_mapping`` and ``core_model_loading.rename_source_key``,
    called as ``convert_and_load_state_dict_in_model`` does. Needed because a vision-language model's tensors have other
    names on disk than in memory, which depend on the version that wrote them.

    Raises:
        ValueError: two names of the checkpoint are one tensor in memory, or this transformers has no such functions.
    """
    names, prefix = list(names), getattr(model, "base_model_prefix", None)
    if prefix is None:  # no model of transformers
        return Names({name: name for name in names}, {}, str)
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError as error:
        raise _too_old(error) from error
    changes, held = get_model_conversion_mapping(model), model.state_dict(keep_vars=True)
    renamings = [one for one in changes if isinstance(one, WeightRenaming)]
    converters = [one for one in changes if isinstance(one, WeightConverter)]
    loose = {  # those that transpose a tensor only if its shape asks for it
        pattern
        for one in converters
        for pattern in one.source_patterns
        if any(getattr(operation, "check_dims", False) for operation in one.operations)
    }

    def spelt(name: str) -> str:
        found: str = rename_source_key(name, renamings, [])[0]
        return found.removeprefix(f"{prefix}.")

    whole: dict[str, str] = {}
    parts: dict[str, dict[str, str]] = {}
    for name in names:
        there, pattern = rename_source_key(name, renamings, converters, prefix, held)
        if there not in held and name in held:
            there, pattern = name, None
        homes = [(parts.setdefault(there, {}), spelt(name))] if pattern is not None else []
        homes += [(whole, there)] if pattern is None or pattern in loose else []
        for home, key in homes:
            if (other := home.setdefault(key, name)) != name:
                raise ValueError(f"{other!r} and {name!r} are one tensor to transformers: remove the one that is stale")
    return Names(whole, parts, spelt)


def tied_weights(model: Any) -> dict[str, str]:
    """The tensors that a model's configuration ties, each with the one that it is.

    transformers' own ``get_expanded_tied_weights_keys``. Needed because transformers leaves two tensors apart where the
    files hold different ones, and other programs tie them.
    """
    return dict(model.get_expanded_tied_weights_keys(all_submodels=True))


@dataclass(frozen=True)
class Declared:
    """How an expert module says that its weights lie.

    ``gated``: its first weight holds gate and up. ``transposed``: the hidden axis comes before the neurons'.
    ``concatenated``: gate and up follow each other; else they alternate, neuron by neuron.
    """

    gated: bool
    transposed: bool
    concatenated: bool


def declared(experts: Any) -> Declared | None:
    """``has_gate``, ``is_transposed`` and ``is_concatenated`` of an expert module; None where it does not say so.

    Needed because shapes alone can't tell whether gate and up alternate.
    """
    if not all(hasattr(experts, name) for name in ("has_gate", "is_transposed", "is_concatenated")):
        return None
    return Declared(experts.has_gate, experts.is_transposed, experts.is_concatenated)


def switches_experts(module: Any) -> bool:
    """Whether it is an expert module whose implementation transformers can switch: it then has an ``_apply_gate``.

    Needed to choose how an expert module is listened to.
    """
    return hasattr(module, "_apply_gate")


@contextmanager
def gated_by(experts: Any, through: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While the body runs, ``through(h)`` takes the place of what an expert module's ``_apply_gate`` returns.

    Needed to hear a neuron's activation where experts are computed in one product and no module's input is it.
    """
    gate = experts._apply_gate
    experts._apply_gate = lambda projected: through(gate(projected))  # shadows the class's own until taken off
    try:
        yield
    finally:
        del experts._apply_gate


def experts_implementation(experts: Any) -> str | None:
    """ "eager", "batched_mm" or "grouped_mm": an expert module's ``config._experts_implementation``.

    Needed because the order of the rows of activations depends on it.
    """
    found: str | None = experts.config._experts_implementation
    return found


def can_set_experts_implementation(model: Any) -> bool:
    """Whether ``set_experts_implementation`` works on a model, by its ``_can_set_experts_implementation``.

    Needed to differentiate experts twice, which only the eager implementation allows.
    """
    return bool(getattr(model, "_can_set_experts_implementation", bool)())


def offloaded_weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that accelerate keeps in the CPU's memory between passes, by name: ``_hf_hook.weights_map``.

    The parameters themselves are on the meta device then; a forward pass puts these in their place.
    """
    found: dict[str, Tensor] = {}
    for path, module, hook in _accelerated(model):
        source = getattr(hook, "weights_map", None)
        held: Any = getattr(source, "dataset", None)
        held = getattr(held, "state_dict", held)  # what is on the disk is in neither
        for name, parameter in module.named_parameters(recurse=False) if held else ():
            key = f"{getattr(source, 'prefix', '')}{name}"
            if parameter.is_meta and isinstance(held.get(key), Tensor):
                found[f"{path}.{name}".strip(".")] = held[key]
    return found


def runs_on(model: nn.Module) -> Any:
    """The device that a model takes its inputs on: of offloaded weights, its hook's ``execution_device``."""
    first = next(model.parameters()).device
    if first.type != "meta":
        return first
    each = (hook for _, _, hook in _accelerated(model))
    return next((hook.execution_device for hook in each if getattr(hook, "offload", False)), first)


def _accelerated(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """The modules that accelerate has put hooks on, with each hook."""
    if not any("_hf_hook" in vars(one) for one in inside(model)):
        return
    for path, module in model.named_modules():
        hook = vars(module).get("_hf_hook")
        yield from ((path, module, one) for one in (hook, *getattr(hook, "hooks", ())) if one is not None)


def writes_to(tensor: Tensor) -> int:
    """How often a tensor was written in place: its ``_version``.

    Needed to notice that an evaluation changed the weights, without a copy of them.
    """
    return tensor._version


def saved_tensor(file: Any) -> tuple[Tensor, int]:
    """A tensor that ``torch.save`` wrote into a file, without its numbers, and where they begin in it.

    ``weights_only``: nothing in the file is ever run.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        found = torch.load(file, weights_only=True)
        return found, int(found.untyped_storage()._checkpoint_offset)


def along_first(placement: Any) -> Any:
    """A placement of ``DTensor`` that shards the first dimension as the given one shards its own.

    torch's own ``_StridedShard`` is private. Needed because transformers and FSDP with tensor parallelism make such
    ones, of which only torch can say which indices they hold.
    """
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    if isinstance(placement, _StridedShard):
        return _StridedShard(0, split_factor=placement.split_factor)
    return Shard(0)
