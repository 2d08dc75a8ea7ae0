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
            one, other = before["name"], now["name"]
            if one == other:
                one, other = _apart(before.get("path", one), path_in(weights) or other)
            there = "which has other weights" if one != other else "whose weights are others by now"
            warnings.warn(
                f"the mask was selected for {one!r} as the {role} checkpoint and is applied to {other!r}, {there}",
                stacklevel=4,
            )


def path_in(weights: Weights) -> str | None:
    """The end of a folder's path: longer than its name, to tell two of one name apart."""
    return "/".join(weights.tensors.folder.resolve().parts[-6:]) if isinstance(weights.tensors, Checkpoint) else None


def _apart(one: str, other: str) -> tuple[str, str]:
    """The shortest ends of two paths that differ."""
    both = one.split("/"), other.split("/")
    ends = (tuple("/".join(parts[-count:]) for parts in both) for count in range(1, max(map(len, both))))
    return next(((first, second) for first, second in ends if first != second), (one, other))


def record_of(
    later: Weights, source: Weights, mask: Mask, strength: Strength, edited: int, tensors: int
) -> dict[str, Any]:
    """What made a rolled-back checkpoint, as JSON."""
    found: dict[str, Any] = as_json(
        {
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
    )
    return found


def papers(record: dict[str, Any], later: Weights, mask: Mask, strength: Strength) -> dict[str, bytes]:
    """File name → content of everything that a saved rollback adds to the later folder."""
    found = {MASK: _saved(mask), RECORD: _json(record)}
    if isinstance(strength, Neurons):
        found[STRENGTH] = _saved(strength)
    return {**found, CARD: _card(record, later, mask).encode(errors="surrogateescape")}


def papers_of_patch(record: dict[str, Any], numbers: int, reverse: bool, home: Path | None) -> dict[str, bytes]:
    """The same where a patch was applied, or taken back: what made the patch, and no mask."""
    later, earlier = record["later"]["name"], record["to"]["name"]
    done = "taken back" if reverse else "applied"
    text = f"""# {later}, with a patch to {earlier} {done}

A patch of {numbers} weights was {done} here: it sets weights of **{later}** back to their values in **{earlier}**.
Nothing was trained. Every other byte of the weights is as it was.

- what made the patch, with sha256 of both parents: `{RECORD}`
- made with surgery {versions().get("surgery", "")}
"""
    told = {"versions": versions(), "patch": record, "reverse": reverse}
    return {RECORD: _json(as_json(told)), CARD: _above(text, home).encode(errors="surrogateescape")}


def _json(record: dict[str, Any]) -> bytes:
    return json_text(record, 2).encode() + b"\n"


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
    return _above(text, None if of is None else of.home if of.adapter is None else of.folder)


def _above(text: str, home: Path | None) -> str:
    """A text above a folder's own model card."""
    own = ""
    if home is not None and (home / CARD).is_file():  # whatever its encoding: what is no UTF-8 stays as it was
        own = (home / CARD).read_text(encoding="utf-8", errors="surrogateescape").removeprefix("\ufeff")
    if own.startswith("---\n") and "\n---\n" in own[3:]:  # the card's metadata has to come first
        end = own.index("\n---\n", 3) + 5
        return own[:end] + "\n" + text + "\n---\n\n" + own[end:].lstrip()
    return text + (f"\n---\n\n{own}" if own else "")
