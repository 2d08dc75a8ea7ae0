"""Every private or undocumented name of transformers and torch that the package leans on, and nothing else.

No other module touches one. tests/test_compat.py has a canary for each, which says what to do when a new version takes
the name away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


def tensor_parallel_plan(model: nn.Module) -> dict[str, str]:
    """A model's ``_tp_plan``: path pattern → "colwise", "rowwise", ...; empty where it has none.

    Needed to tell an MLP's input layer from its output layer where both are square, and to check what was found.
    """
    return {str(k): str(v) for k, v in (getattr(model, "_tp_plan", None) or {}).items()}


def is_compiled(model: nn.Module) -> bool:
    """Whether it is what ``torch.compile`` returned, which holds the real model as ``_orig_mod``.

    Needed to refuse it in a sentence: its tensors have other names.
    """
    return hasattr(model, "_orig_mod")


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
        raise ValueError(
            f"this transformers does not give the names on disk ({error}): use a version from 5.0 on, or describe the "
            f"layout yourself with layout= (docs/how-to/add-an-architecture.md)"
        ) from error
    found: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return found


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


def writes_to(tensor: Tensor) -> int:
    """How often a tensor was written in place: its ``_version``.

    Needed to notice that an evaluation changed the weights, without a copy of them.
    """
    return tensor._version
