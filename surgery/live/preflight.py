"""The pre-flight: what can be told of checkpoints and prompts before a model is loaded or measured."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal

from surgery.checkpoints.checkpoint import Checkpoint, tensors_of
from surgery.checkpoints.checks import check_source
from surgery.checkpoints.loading import check_loads
from surgery.checkpoints.trajectory import Trajectory
from surgery.live.earlier import check_alike
from surgery.live.losses import tokens_in
from surgery.live.prompts import load_prompts, opened_tokenizer
from surgery.reverting.contents import contents_of
from surgery.units import Units, kinds_of, noun

Verdict = Literal["ok", "warning", "refused"]


@dataclass(frozen=True)
class Finding:
    """What one check found: ``what`` was looked at, the verdict, and a sentence."""

    what: str
    verdict: Verdict
    said: str


def preflight(run: Trajectory, data: str | Path | None = None, units: Units = "mlp") -> list[Finding]:
    """Look at checkpoints and prompts as ``select``, ``sweep`` and ``repair`` will, without a forward pass.

    Each checkpoint: plain numbers, no adapter, no weight that would be random (not told with a layout of your own).
    Then both together: the same units, the same configuration as far as a forward pass reads it, the same tokens. Then
    what a rolled-back folder would leave out, and the prompts. What compares checkpoints is left out where one of them
    is refused.

    Args:
        run: a trajectory with ``earlier`` and ``later``, and ``base`` where there is one.
        data: a file of prompts (see ``load_prompts``).
        units: the kinds of unit to look for.

    Returns:
        At least one finding for each check, in the order above. Nothing is raised for what is refused.

    Source: ours.
    """
    found = [one for name in run.checkpoints for one in _looked(name, partial(_whole, run, name))]
    if any(one.verdict == "refused" for one in found):
        return found
    pairs: dict[str, Callable[[], str]] = {"units": partial(_units, run, units)}
    if run.earlier is not None:
        pairs |= {"configurations": partial(_configurations, run), "tokens": partial(_tokens, run)}
    if isinstance(run.tensors("later"), Checkpoint):
        pairs["output"] = partial(_output, run)
    if data is not None:
        pairs["prompts"] = partial(_prompts, run, data)
    return found + [one for what, check in pairs.items() for one in _looked(what, check)]


def refuse(findings: list[Finding]) -> None:
    """Raise ``ValueError`` with the first refusal, if there is one."""
    for one in findings:
        if one.verdict == "refused":
            raise ValueError(one.said)


def _looked(what: str, check: Callable[[], str]) -> Iterator[Finding]:
    """What a check says: its warnings, and its refusal or (where it has neither) its own words."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            last = Finding(what, "ok", check())
        except (ValueError, LookupError, OSError) as error:
            last = Finding(what, "refused", str(error))
    said = dict.fromkeys(str(one.message) for one in told if issubclass(one.category, UserWarning))
    yield from (Finding(what, "warning", text) for text in said)
    if last.verdict == "refused" or not said:
        yield last


def _whole(run: Trajectory, name: str) -> str:
    tensors = tensors_of(run.tensors(name))
    if not isinstance(tensors, Checkpoint):
        check_source(tensors, name)
        return f"{len(tensors)} tensors"
    if run.layout is None:
        check_loads(tensors)
    else:  # of a model that transformers may not know
        check_source(tensors, str(tensors.folder))
    numbers = sum(map(prod, tensors.shapes.values()))
    dtypes = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in tensors.dtypes.values()}))
    said = f"{tensors.folder}: {len(tensors)} tensors, {numbers / 1e6:,.1f} M numbers, {dtypes}"
    if tensors.adapter is None or tensors.base is None:
        return said
    return f"{said}; {len(tensors.adapter.touched)} of them changed by this adapter of {tensors.base.folder}"


def _units(run: Trajectory, units: Units) -> str:
    sizes = run.weights(*run.checkpoints, units=units)[-1].layout.sizes
    return f"{sum(sizes.values()):,} {noun(kinds_of(units))} in {len(sizes)} blocks, in every checkpoint the same"


def _configurations(run: Trajectory) -> str:
    check_alike(*run.weights("earlier", "later"))
    return "the same, as far as a forward pass reads them"


def _tokens(run: Trajectory) -> str:
    """Warn where one id is two tokens: prompts are read by the later checkpoint's tokenizer."""
    folders = [one.tokenizer for one in map(run.tensors, ("earlier", "later")) if isinstance(one, Checkpoint)]
    known = [folder for folder in folders if (folder / "tokenizer_config.json").exists()]
    if len(known) < 2:
        return "not compared: not every checkpoint has a tokenizer beside it"
    read = opened_tokenizer(known[1])
    if all(_bytes(known[0] / file) == _bytes(known[1] / file) for file in _files_of(read)):
        return f"both tokenizers have the same {len(read):,}"
    earlier, later = opened_tokenizer(known[0]).get_vocab(), read.get_vocab()
    moved = sorted(token for token in earlier.keys() & later.keys() if earlier[token] != later[token])
    if moved or set(earlier) ^ set(later):
        told = f"{len(moved)} tokens have other ids (like {moved[0]!r}), " if moved else ""
        warnings.warn(
            f"the tokenizers of {known[0]} and {known[1]} differ: {told}{len(set(earlier) - set(later))} are only in "
            f"the first and {len(set(later) - set(earlier))} only in the second. Prompts are read by the second, so "
            f"the earlier model is asked with ids that may mean something else to it",
            stacklevel=2,
        )
    return f"both tokenizers have the same {len(later):,}"


def _files_of(tokenizer: Any) -> set[str]:
    """The names of the files that a tokenizer is read from."""
    every = {"tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"}
    return every | set(tokenizer.vocab_files_names.values())


def _bytes(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _output(run: Trajectory) -> str:
    tensors = run.tensors("later")
    assert isinstance(tensors, Checkpoint)
    contents = contents_of(tensors, tensors.folder)
    for note in contents.notes:
        warnings.warn(f"a rolled-back folder: {note}", stacklevel=2)
    return f"a rolled-back folder takes {contents.size / 1e6:,.1f} MB"


def _prompts(run: Trajectory, data: str | Path) -> str:
    tensors = run.tensors("later")
    if not isinstance(tensors, Checkpoint):
        return "not read: the later model has no folder, and so no tokenizer"
    batches = load_prompts(data, tensors)
    count = sum(len(batch["input_ids"]) for batch in batches)
    if "labels" not in batches[0]:
        return f"{count} prompts without responses: the earlier model answers them"
    return f"{count} prompts with responses of {tokens_in(batches):,} tokens"
