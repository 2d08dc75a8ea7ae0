"""Named vectors in one safetensors file, whose metadata says of which kind they are and what made them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


def write_vectors(path: str | Path, kind: str, tensors: Mapping[str, Tensor], **told: Any) -> None:
    """Write tensors and, as JSON in the metadata, what is told of them; ``kind`` is the class that reads them again.

    Raises:
        OSError: there is no such folder, no room in it, or it can't be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    metadata = {**{key: json.dumps(value) for key, value in told.items()}, "format": f"surgery.{kind}"}
    # Blocks of one model often have equal vectors; safetensors refuses tensors that share memory.
    try:
        save_file({name: value.clone() for name, value in tensors.items()}, path, metadata)
    except SafetensorError as error:  # no OSError, though what it tells of is one
        raise OSError(f"{path} can't be written: {error}") from error


def read_vectors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file and what is told of them.

    Raises:
        ValueError: the file can't be read, or holds something else.
    """
    from safetensors import SafetensorError, safe_open

    found = kind_of_file(path)
    if found != kind:
        why = f"but not one that {kind}.save wrote"
        raise ValueError(
            f"{path} is a safetensors file, {why}"
            + (f": use {found}.load" if found else "; surgery select writes masks")
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            told = {key: json.loads(text) for key, text in file.metadata().items() if key != "format"}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    return tensors, told


def kind_of_file(path: str | Path) -> str | None:
    """The class that wrote a file, like "Neurons"; None where it is another's file.

    Raises:
        ValueError: it is no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            told = (file.metadata() or {}).get("format", "")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    return told.removeprefix("surgery.") if told.startswith("surgery.") else None
