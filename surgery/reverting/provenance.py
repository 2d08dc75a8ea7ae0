"""The files beside a rolled-back checkpoint: the mask, a record of what made it, and a model card."""

from __future__ import annotations

import json
import tempfile
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from surgery.checkpoints.checkpoint import Checkpoint
from surgery.checkpoints.opening import Weights, fingerprint
from surgery.masks.mask import Mask
from surgery.masks.neurons import Neurons
from surgery.reverting.writing import Strength, recorded, spoken
from surgery.tables import as_json, json_text

# The mask lies in a folder of its own: a server that globs *.safetensors must not take it for weights.
MASK, RECORD, CARD = "surgery/mask.safetensors", "surgery.json", "README.md"
STRENGTH = "surgery/strength.safetensors"  # where each neuron has its own


def versions() -> dict[str, str]:
    """The versions of surgery and of what the numbers depend on."""
    found = {}
    for package in ("surgery", "torch", "transformers", "safetensors", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def warn_if_made_for_others(mask: Mask, **used: Weights) -> None:
    """Warn where a mask was selected for other checkpoints than those it is used with."""
    made_for = mask.made_by.get("checkpoints", {})
    for role, weights in used.items():
        before, now = made_for.get(role, {}), fingerprint(weights)
        what = "neurons" if "neurons" in before else "sha256"
        if before.get(what) and now.get(what) and before[what] != now[what]:
            warnings.warn(
                f"the mask was selected for {before['name']!r} as the {role} checkpoint and is applied to "
                f"{now['name']!r}, which has other weights",
                stacklevel=4,
            )


def papers(
    later: Weights, source: Weights, mask: Mask, strength: Strength, edited: int, tensors: int
) -> dict[str, bytes]:
    """File name → content of everything that a saved rollback adds to the later folder."""
    record = {
        "versions": versions(),
        "later": fingerprint(later),
        "to": fingerprint(source),
        "selector": mask.made_by,
        "strength": recorded(strength, mask),
        "units": list(later.layout.units),
        **mask.tally(),
        "parameters": edited,
        "tensors": tensors,
    }
    found = {MASK: _saved(mask), RECORD: json_text(as_json(record), 2).encode() + b"\n"}
    if isinstance(strength, Neurons):
        found[STRENGTH] = _saved(strength)
    return {**found, CARD: _card(record, later, mask).encode(errors="surrogateescape")}


def _saved(what: Mask) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        what.save(Path(folder) / "file")
        return (Path(folder) / "file").read_bytes()


def _card(record: dict[str, Any], later: Weights, mask: Mask) -> str:
    """A model card that names the parents, above the later checkpoint's own card."""
    later_name, earlier_name, reverted = record["later"]["name"], record["to"]["name"], sum(mask.count().values())
    of = later.tensors if isinstance(later.tensors, Checkpoint) else None
    rest = "byte of the weights" if of is None or of.adapter is None else "weight, once the adapter is merged,"
    text = f"""# {later_name}, with {reverted} {mask.noun} of {earlier_name}

This checkpoint is **{later_name}** in which {reverted} of {mask.total} {mask.candidates}
({mask.fraction:.2%}) were set back to their values in **{earlier_name}**
({spoken(record["strength"])}). Nothing was trained. Every other {rest} is {later_name}'s.

- selected by: `{json.dumps(record["selector"].get("selector", record["selector"]))}`
- parameters written: {record["parameters"]} in {record["tensors"]} tensors
- exact {mask.noun}: `{MASK}`; versions and sha256 of both parents: `{RECORD}`
- made with surgery {record["versions"].get("surgery", "")}
"""
    old = None if of is None else (of.home if of.adapter is None else of.folder) / CARD
    own = ""
    if old is not None and old.is_file():  # whatever its encoding: what is no UTF-8 stays as it was
        own = old.read_text(encoding="utf-8", errors="surrogateescape").removeprefix("\ufeff")
    if own.startswith("---\n") and "\n---\n" in own[3:]:  # the card's metadata has to come first
        end = own.index("\n---\n", 3) + 5
        return own[:end] + "\n" + text + "\n---\n\n" + own[end:].lstrip()
    return text + (f"\n---\n\n{own}" if own else "")
