"""Adapters of peft (LoRA): a lazy mapping over the base checkpoint, and what the adapter's two files hold."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.compat import as_loaded, as_saved, tied_weights
from surgery.formats.factors import Factors
from surgery.formats.folders import ADAPTER, MERGE
from surgery.formats.stored import ADAPTED, Piece, Stored
from surgery.tables import briefly, read_json

WEIGHTS = "adapter_model.safetensors"
PREFIX, INNER = "base_model.model.", ".base_layer"
Model = Callable[[], nn.Module | None]

# settings that a forward pass of the merged model does not see, and those that are read here
_IDLE = re.compile(
    r"peft_type|unsloth_\w+|auto_mapping|peft_version|base_model_name_or_path|base_model_class|parent_library|revision|task_type"
    r"|inference_mode|r|target_modules|exclude_modules|lora_alpha|lora_dropout|fan_in_fan_out|bias|use_rslora"
    r"|modules_to_save|init_lora_weights|layers_to_transform|layers_pattern|rank_pattern|alpha_pattern|megatron_core"
    r"|eva_config|corda_config|lora_ga_config|use_dora|qalora_group_size|lora_bias|target_parameters|runtime_config"
)
_RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")  # they take what A and B begin with out of the base
_FACTOR = re.compile(r"(?P<stem>.+)\.lora_(?P<what>A\.weight|B\.weight|B\.bias|embedding_A|embedding_B|magnitude\w+)")


class Adapter(Mapping[str, Tensor]):
    """A base checkpoint under an adapter: tensor name → what peft's merge would make of it, computed when asked for.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: the checkpoint that the adapter was trained on, under its own names.
        model: gives the base's model (live or on the meta device), whose names the adapter has; None where there is
            none. It is only called where the base's own names do not tell.

    Raises:
        LookupError: one of the two files is missing.
        ValueError: the adapter is no LoRA, changes the base itself, has settings that this reader does not know, or
            does not fit the base.

    Source: ours (the format is peft's).
    """

    def __init__(self, folder: Path, base: Mapping[str, Tensor], model: Model = lambda: None) -> None:
        self.folder, self.base, self._made = folder, base, model
        self.config = settings_of(folder)
        self.held = _Held(folder)
        self.factors: dict[str, Factors] = {}  # by the parameter's name in memory
        self.keyed: dict[str, dict[str, str]] = {}  # parameter → what ("A.weight", ...) → the key in the file
        self.replaced: dict[str, str] = {}  # parameter → the key of the tensor that takes its place
        self.biases: dict[str, tuple[str, float]] = {}  # parameter → the key of what is added, and its scale
        self._read_keys()
        self._owner = {name: one for one in self.changed for name in self.names(one)}
        self._last: tuple[str, dict[str, Tensor]] = "", {}

    def __getitem__(self, name: str) -> Tensor:
        before = self.base[name]
        if name not in self._owner:
            return before
        parameter = self._owner[name]
        found: Tensor
        if parameter in self.replaced:
            before = self._pieces(parameter, self.held[self.replaced[parameter]])[name].to(before.device, before.dtype)
        if parameter in self.factors:
            factors = self.factors[parameter]
            of, last = self._last
            if of != parameter:  # all experts of a layer are one product; several threads may ask
                last = self._pieces(parameter, factors.delta(before.dtype, before.device))
                self._last = parameter, last
            found = factors.merged(before, last[name])
            return found
        if parameter in self.biases:
            key, scale = self.biases[parameter]
            wide = torch.promote_types(before.dtype, torch.float32)
            return before.clone().add_(self.held[key].to(before.device, wide) * scale)
        return before

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)

    def __contains__(self, name: object) -> bool:
        return name in self.base

    def stored(self, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype | str]) -> Stored:
        """The base's tensors, of these shapes and dtypes, as if all of them lay in the adapter's file."""
        pieces = {name: (Piece(WEIGHTS, name, (0,) * len(shape), shape),) for name, shape in shapes.items()}
        return Stored(ADAPTED, shapes, dtypes, pieces, lambda path, file, writable: self, (ADAPTER,))

    @property
    def changed(self) -> set[str]:
        """The parameters that it changes, by their names in memory."""
        return {*self.factors, *self.replaced, *self.biases}

    @property
    def touched(self) -> list[str]:
        """The tensors that it changes, by their names in the base."""
        return [name for name in self.base if name in self._owner]

    @cached_property
    def model(self) -> nn.Module | None:
        """The base's model, whose numbers are not needed."""
        return self._made()

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the base's parameters by their names in memory, in the model's order; empty without a model."""
        named = self.model.named_parameters(remove_duplicate=False) if self.model is not None else ()
        return {name: tuple(parameter.shape) for name, parameter in named}

    def of(self, module: str) -> list[str]:
        """A module's own parameters, in its order."""
        return [name for name in self.shapes or self.base if name.rpartition(".")[0] == module]

    def alpha(self, key: str) -> Any:
        """``lora_alpha`` of a module, or of a parameter that is targeted by name."""
        return _matched(self.config.get("alpha_pattern"), key, self.config.get("lora_alpha", 8))

    def names(self, parameter: str) -> list[str]:
        """The tensors of the base that make up a parameter."""
        if parameter in self.base:
            return [parameter]
        if parameter in self._names.whole:
            return [self._names.whole[parameter]]
        return list(self._names.parts.get(parameter, {}).values())

    @cached_property
    def _names(self) -> Any:
        model = self.model
        return as_loaded(model if model is not None else nn.Module(), self.base)

    def _pieces(self, parameter: str, whole: Tensor) -> dict[str, Tensor]:
        """A tensor of a parameter's shape, cut as the base's files cut the parameter."""
        names = self.names(parameter)
        if len(names) == 1 and (parameter in self.base or parameter in self._names.whole):
            return {names[0]: whole}
        parts = self._names.parts[parameter]
        return {parts[self._names.spelt(name)]: one for name, one in as_saved(self.model, {parameter: whole}).items()}

    def _read_keys(self) -> None:
        stems: dict[str, dict[str, str]] = {}
        for key in self.held:
            if not key.startswith(PREFIX):
                raise self._refused(f"its tensor {key!r} is not named as peft names it")
            if match := _FACTOR.fullmatch(key.removeprefix(PREFIX)):
                stems.setdefault(match["stem"], {})[match["what"]] = key
            elif re.search(r"\.lora_|\.token_adapter\.", key):
                raise self._refused(f"it holds {key!r}, which is no matrix of LoRA")
            else:
                self._replace(key)
        for stem, keys in stems.items():
            self._add(stem, keys)
        self._check_tied()

    def _replace(self, key: str) -> None:
        parameter = key.removeprefix(PREFIX).replace(INNER, "")
        held, there = self.held.shapes[key], self._shape(parameter)
        if held != there:
            raise self._refused(f"{key!r} has the shape {held}, and the base's has {there}")
        self.replaced[parameter] = key

    def _add(self, stem: str, keys: Mapping[str, str]) -> None:
        module, depth = stem.replace(INNER, ""), stem.count(INNER)
        embedding = "embedding_A" in keys
        first, second = (
            keys.get("embedding_A" if embedding else "A.weight"),
            keys.get("embedding_B" if embedding else "B.weight"),
        )
        if first is None or second is None:
            raise self._refused(f"{stem!r} has one of the matrices A and B, and not both")
        targets = (
            [one for one in self.of(module) if targeted(one, self.config)]
            if self.config.get("target_parameters")
            else []
        )
        if depth >= max(len(targets), 1):
            raise self._refused(f"{stem!r} does not say which parameter it changes")
        parameter = targets[len(targets) - 1 - depth] if targets else f"{module}.weight"
        shape, a, b = self._shape(parameter), self.held.shapes[first], self.held.shapes[second]
        experts, key = shape[0] if len(shape) == 3 else 1, parameter if targets else module
        rank, scale = self._scaled(key)
        if (a[0], b[-1]) != (experts * rank, experts * rank):
            raise self._refused(f"{stem!r} has the rank {a[0] / experts:g}, and its configuration says {rank}")
        transposed = self._transposed(parameter, shape, b[0], a[1], embedding)
        magnitude = next((self.held[name] for what, name in keys.items() if what.startswith("magnitude")), None)
        if magnitude is None and self.config.get("use_dora"):
            raise self._refused(f"{stem!r} has no magnitudes, and its configuration says use_dora")
        self.keyed[parameter] = dict(keys)
        self.factors[parameter] = Factors(
            parameter, self.held[first], self.held[second], shape, scale, transposed, bool(targets) or embedding,
            None if magnitude is None else magnitude.flatten(),
        )  # fmt: skip
        if "B.bias" in keys:
            if not self.names(f"{module}.bias"):
                raise self._refused(f"it adds a bias to {module!r}, which has none (lora_bias)")
            self.biases[f"{module}.bias"] = keys["B.bias"], scale

    def _scaled(self, key: str) -> tuple[int, float]:
        rank = _matched(self.config.get("rank_pattern"), key, self.config.get("r", 8))
        alpha = self.alpha(key)
        if not (isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float) and math.isfinite(alpha)):
            raise self._refused(f"it has the rank {rank!r:.80} and lora_alpha {alpha!r:.80} at {key!r}")
        if alpha == 0:
            raise ValueError(
                f"lora_alpha in {ADAPTER} of {self.folder} is 0, so the adapter would change nothing: write the value "
                f"that it was trained with"
            )
        return rank, alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _shape(self, parameter: str) -> tuple[int, ...]:
        if parameter in self.base:
            shapes = getattr(self.base, "shapes", None)
            return tuple(shapes[parameter]) if shapes is not None else tuple(self.base[parameter].shape)
        if parameter not in self.shapes or not self.names(parameter):
            raise self._refused(f"it changes {parameter!r}, and the base has no such tensor")
        return self.shapes[parameter]

    def _transposed(self, parameter: str, shape: tuple[int, ...], out: int, into: int, embedding: bool) -> bool:
        """Whether a parameter has the inputs first: by the shapes, and by the module where they are square."""
        if (shape[-1], shape[-2]) == (out, into) != (shape[-2], shape[-1]) or embedding:
            return True
        if (shape[-2], shape[-1]) != (out, into):
            raise self._refused(f"B·A of {parameter!r} is {out} × {into}, and the base's tensor has the shape {shape}")
        if out != into:
            return False
        if self.model is None:
            return bool(self.config.get("fan_in_fan_out"))
        module = self.model.get_submodule(parameter.rpartition(".")[0])
        return bool(getattr(module, "is_transposed", False)) or type(module).__name__ == "Conv1D"

    def _check_tied(self) -> None:
        """Refuse a change of one of two tensors that the base ties: peft leaves the other as it was."""
        outside = [one for one in self.changed if not re.search(r"\.\d+\.", one)]
        if outside and self.model is not None and hasattr(self.model, "config"):
            tied = tied_weights(self.model)
            for one in outside:
                if one in tied or one in tied.values():
                    raise self._refused(f"it changes {one!r}, which the base ties to another tensor")

    def _refused(self, why: str) -> ValueError:
        return ValueError(f"the adapter {self.folder} can't be read over its base: {why}; {MERGE}")


class _Held(Mapping[str, Tensor]):
    """The tensors of an adapter's file, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        if not (folder / WEIGHTS).is_file():
            pickled = ": a pickle can run code and is never opened" if (folder / "adapter_model.bin").exists() else ""
            raise LookupError(
                f"{folder} holds an adapter without {WEIGHTS}{pickled}. Load it with peft and save it again "
                f"(save_pretrained)"
            )
        try:
            self._file: Any = safe_open(folder / WEIGHTS, "pt")
            keys = list(self._file.keys())
            self.shapes = {key: tuple(self._file.get_slice(key).get_shape()) for key in keys}
        except SafetensorError as error:
            raise ValueError(f"{folder / WEIGHTS} is damaged or no safetensors file: {briefly(error)}") from error

    def __getitem__(self, key: str) -> Tensor:
        found: Tensor = self._file.get_tensor(key)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def targeted(parameter: str, config: Mapping[str, Any]) -> bool:
    """Whether a configuration targets a parameter by its name (``target_parameters``), and not its module."""
    return any(f".{parameter}".endswith(f".{one}") for one in config.get("target_parameters") or ())


def base_of(folder: Path) -> str | None:
    """The folder or hub id that an adapter's configuration names as its base."""
    found = read_json(folder / ADAPTER, {}).get("base_model_name_or_path")
    return found if isinstance(found, str) and found else None


def settings_of(folder: Path) -> dict[str, Any]:
    """What ``adapter_config.json`` says.

    Raises:
        ValueError: it can't be read, is no LoRA's, or has settings under which B·A over the base is not the model.
    """
    found: dict[str, Any] = read_json(folder / ADAPTER, {})
    for name, of in (("rank_pattern", dict), ("alpha_pattern", dict), ("target_parameters", list)):
        if not isinstance(found.get(name) or of(), of):
            raise ValueError(
                f"{name} in {ADAPTER} of {folder} is a {type(found[name]).__name__}, expected a {of.__name__}"
            )
    for pattern in (*(found.get("rank_pattern") or ()), *(found.get("alpha_pattern") or ())):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"rank_pattern or alpha_pattern in {ADAPTER} of {folder} holds {pattern[:80]!r}, which is no regular "
                f"expression: {error}"
            ) from error
    if (kind := found.get("peft_type")) != "LORA":
        raise ValueError(f"{folder} holds an adapter of the type {kind!r:.80}, and only LORA is read: {MERGE}")
    begun = str(found.get("init_lora_weights")).lower()[:80]
    if begun.startswith(_RESIDUAL):
        raise ValueError(
            f"the adapter {folder} began with {begun} (init_lora_weights), which changes the base's own weights, so "
            f"the base under it is not its folder: {MERGE}"
        )
    for key, value in found.items():
        if value and not _IDLE.fullmatch(key):
            raise ValueError(
                f"the adapter {folder} has the setting {key[:80]}, with which its model is another than base + scale · "
                f"B·A: {MERGE}"
            )
    return found


def _matched(patterns: Any, key: str, default: Any) -> Any:
    """The value of the first pattern that matches, as peft matches them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", key):
            return value
    return default
