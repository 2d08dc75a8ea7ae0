"""Named vectors in one safetensors file, whose metadata says of which kind they are and what made them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.files import path_of, whole_file
from surgery.tables import briefly, json_of


def write_vectors(path: str | Path, kind: str, tensors: Mapping[str, Tensor], **told: Any) -> None:
    """Write tensors and, as JSON in the metadata, what is told of them; ``kind`` is the class that reads them again.

    Raises:
        OSError: there is no room, or it can't be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    metadata = {**{key: json.dumps(value) for key, value in told.items()}, "format": f"surgery.{kind}"}
    # Blocks of one model often have equal vectors; safetensors refuses tensors that share memory.
    with whole_file(path) as new:
        try:
            save_file({name: value.clone() for name, value in tensors.items()}, new, metadata)
        except SafetensorError as error:  # no OSError, though what it tells of is one
            raise OSError(f"{path} can't be written: {briefly(error)}") from error


# What made a mask, as far as anything is read from it again: which checkpoints it was selected for.
MADE_BY = {"checkpoints?": {str: {"name": str, "path?": str, "sha256?": {str: str}}}}


def read_vectors(
    path: str | Path, kind: str, dtypes: tuple[str, ...], **told: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The vectors of a file, all of one of the ``dtypes``, and what is ``told`` of them: name → kind (``json_of``).

    Raises:
        LookupError: there is no such file. ValueError: it can't be read, or holds something else.
    """
    from safetensors import safe_open

    path, found = path_of(path), kind_of_file(path)
    if found != kind:
        why = f"but not one that {kind}.save wrote"
        raise ValueError(
            f"{path} is a safetensors file, {why}"
            + (f": use {found}.load" if found else "; surgery select writes masks")
        )
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        for name, held in slices.items():
            if held.get_dtype() not in dtypes or len(held.get_shape()) != 1:
                axes = f"{len(held.get_shape())} axes"
                raise ValueError(
                    f"{path}: {name!r} is stored as {held.get_dtype()} in {axes}, expected {' or '.join(dtypes)} in one"
                )
        texts = file.metadata()
        if lacking := [name for name in told if name not in texts]:
            raise ValueError(f"{path} is damaged: its metadata has no {lacking[0]!r}")
        known = {name: json_of(texts[name], f"{path}, {name!r} of its metadata", one) for name, one in told.items()}
        tensors = {name: file.get_tensor(name) for name in slices}
    for name, value in tensors.items():
        if value.dtype == torch.bool and not bool((value.view(torch.uint8) <= 1).all()):
            raise ValueError(f"{path} is damaged: {name!r} holds bytes that are neither true nor false")
    return tensors, known


def kind_of_file(path: str | Path) -> str | None:
    """The class that wrote a file, like "Neurons"; None where it is another's file.

    Raises:
        LookupError: there is no such file. ValueError: it is no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    path = path_of(path)
    if not path.is_file():
        raise LookupError(f"there is no file {path}")
    try:
        with safe_open(path, framework="np") as file:
            told = (file.metadata() or {}).get("format", "")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {briefly(error)}") from error
    return {"surgery.Neurons": "Neurons", "surgery.Entries": "Entries"}.get(told)
