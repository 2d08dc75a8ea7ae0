"""Prompts: JSON lines of the damaged domain, tokenized into padded batches."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.checkpoints.checkpoint import Checkpoint, tokenizer_of
from surgery.files import path_of
from surgery.live.lines import Tokenizing, read_lines, tokens_of
from surgery.progress import steps
from surgery.tables import briefly

Batch = dict[str, Tensor]
IGNORED = -100  # the label of a token that is no response (the convention of transformers' losses)
TOKENS = 1024  # prompts × the longest of them: what one pass over a model takes at once


def load_prompts(path: str | Path, tokenizer: Any, *, batch_size: int = 16, limit: int | None = None) -> list[Batch]:
    """Read a JSON-lines file of prompts into padded batches.

    A line holds ``"prompt"`` with or without ``"response"`` (or ``"completion"``, or ``"chosen"``), or ``"messages"``
    (the chat template is applied; if the last message is the assistant's, it is the response), or ``"text"`` (all of it
    counts). Either all lines of a file have responses, or none has. Tokens are those that the model sees: what begins a
    sequence comes once, nothing special stands between prompt and response but what the chat template puts there, and a
    response ends with the token that ends a turn.

    Args:
        path: the file.
        tokenizer: a tokenizer, or the folder of one.
        batch_size: prompts per batch.
        limit: read at most this many lines.

    Returns:
        Batches of ``{"input_ids", "attention_mask"[, "labels"]}``, int64 ``[batch, token]``, padded on the right;
        ``labels`` is -100 everywhere except on the response's tokens (and its end-of-sequence token).

    Raises:
        LookupError: no such file.
        ValueError: the file is empty, a line can't be read or is longer than the tokenizer's limit, the chat template
            leaves a part of it out, or the folder holds a model and no tokenizer.

    A warning tells where a text has no tokens, where a key that is not read may hold the response, and where prompt and
    response meet in another way than the model has seen.

    Source: ours.
    """
    path = path_of(path)
    if not path.is_file():
        raise LookupError(f"there is no prompt file {path}")
    for name, number in (("batch_size", batch_size), ("limit", limit)):
        if number is not None and number < 1:
            raise ValueError(f"{name}={number}: expected 1 or more")
    tokenizer = opened_tokenizer(tokenizer)
    known = Tokenizing.of(tokenizer)
    lines = [tokens_of(line, where, known) for where, line in read_lines(path, limit)]
    if not lines:
        raise ValueError(f"{path} is empty: expected one JSON object a line")
    most = tokenizer.model_max_length
    for line in lines:
        length = len(line.prompt) + len(line.response or [])
        if length == 0:
            raise ValueError(f"{line.where}: no token at all")
        if length > most:
            raise ValueError(f"{line.where}: {length} tokens, and the tokenizer's limit is {most}: shorten or drop it")
    bare = [line.where for line in lines if line.response is None]
    if 0 < len(bare) < len(lines):
        raise ValueError(f"{bare[0]} has no response, and other lines have one: make them all alike")
    for remark in dict.fromkeys(remark for line in lines for remark in line.remarks):
        first, *others = (line.where for line in lines if remark in line.remarks)
        more = f" and {len(others)} other{'s' * (len(others) > 1)}" if others else ""
        warnings.warn(f"{first}{more}: {remark}", stacklevel=2)
    pairs = [(line.prompt, line.response) for line in lines]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    return [padded(pairs[start : start + batch_size], pad) for start in range(0, len(pairs), batch_size)]


def opened_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer, read where it is a folder's name; no code of the folder is run.

    A folder that has not changed since gives the same object again: copy it to change it.

    Raises:
        ValueError: it can't be read; the folder has none, of which transformers makes an empty one without a word.
    """
    if not isinstance(tokenizer, str | Path | Checkpoint):
        return tokenizer
    folder = tokenizer_of(tokenizer)
    named = tokenizer if isinstance(tokenizer, str | Path) else folder
    held = sorted((one.name, one.stat()) for one in folder.iterdir() if one.is_file())
    return _read(folder, str(named), tuple((name, one.st_ino, one.st_size, one.st_mtime_ns) for name, one in held))


@lru_cache(maxsize=4)
def _read(folder: Path, tokenizer: str, state: tuple[tuple[str, int, int, int], ...]) -> Any:
    """A folder's tokenizer, read once for as long as its files stay as they are: each file of prompts asks for it."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        found("a")  # some damage is noticed only now
        special = set(found.all_special_ids)
    except Exception as error:  # whatever damaged files make transformers raise
        raise ValueError(
            f"the tokenizer of {tokenizer} can't be read ({briefly(error)}): pass load_prompts a tokenizer that you "
            f"have loaded yourself"
        ) from error
    if len(found) <= len(special):
        raise ValueError(
            f"{tokenizer} has no tokenizer of its own: copy tokenizer.json and tokenizer_config.json there from the "
            f"model that it was trained from, or pass load_prompts another folder or a tokenizer"
        )
    return found


def batches_of(data: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, each seen to be one.

    Raises:
        ValueError: a file's name, one batch by itself, or something else that is no batch.
    """
    check_many(data)
    for batch in data:
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.numel():
            raise ValueError(
                f'data holds {_what(batch)}: expected batches like {{"input_ids": ..., "attention_mask": ...}} of '
                f"tensors [batch, token], as load_prompts(file, tokenizer) makes them"
            )
        yield batch


def on_cpu(batches: Iterable[Batch]) -> list[Batch]:
    """The batches, on the CPU: what is asked about them again and again is no reason to wait for a GPU."""
    return [
        {name: one.cpu() if isinstance(one, Tensor) else one for name, one in batch.items()}
        if batch["input_ids"].device.type != "cpu"
        else batch
        for batch in batches
    ]


def digest_of(batches: Iterable[Batch]) -> str:
    """What identifies batches: a hash of their tokens, masks and labels."""
    digest = hashlib.blake2b(digest_size=16)
    for batch in batches:
        for name in ("input_ids", "attention_mask", "labels"):
            if name in batch:
                digest.update(f"{name}{tuple(batch[name].shape)}".encode())
                digest.update(batch[name].to("cpu", torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()


def each(what: str, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches one by one, with their progress (``surgery.progress``)."""
    return steps(what, batches, lambda batch: float(batch["input_ids"].numel()))


def fitting(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches; one of more than ``TOKENS`` tokens as several, prompt after prompt, each as wide as it was."""
    for batch in batches:
        rows, width = batch["input_ids"].shape
        step = max(1, TOKENS // width)
        for at in range(0, rows, step):
            yield batch if rows <= step else {name: value[at : at + step] for name, value in batch.items()}


def passes(batches: Iterable[Batch]) -> tuple[list[Batch], list[int]]:
    """The prompts of all batches, grouped anew, and the number of each of them among those given.

    What one pass takes in memory depends on the tokens that go through the model at once. So prompts of like length are
    put together, the shortest first, as many as make at most ``TOKENS`` tokens with the padding; a longer prompt comes
    alone. Whatever the batches were, sums over prompts are the same, to rounding. Batches that hold more than tokens,
    masks and labels stay as they are, and so do those of which only some have labels.
    """
    given = list(batches)
    if len({frozenset(batch) - {"attention_mask"} for batch in given}) != 1 or given[0].keys() - _FIELDS.keys():
        return given, list(range(sum(len(batch["input_ids"]) for batch in given)))
    rows = [row for batch in given for row in _rows(right_padded(batch))]
    order = sorted(range(len(rows)), key=lambda at: len(rows[at]["input_ids"]))
    groups: list[list[Batch]] = []
    for at in order:  # each is as long as the one before, or longer
        if not groups or (len(groups[-1]) + 1) * len(rows[at]["input_ids"]) > TOKENS:
            groups.append([])
        groups[-1].append(rows[at])
    return [_stacked(group) for group in groups], order


_FIELDS = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}  # and what they are padded with


def _rows(batch: Batch) -> Iterator[Batch]:
    """Each prompt of a right-padded batch, without its padding."""
    attended = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    whole = {**batch, "attention_mask": attended}
    for at, mask in enumerate(attended.bool()):
        stop = int(mask.nonzero().max()) + 1 if bool(mask.any()) else 1
        yield {name: value[at, :stop] for name, value in whole.items()}


def _stacked(rows: list[Batch]) -> Batch:
    pad = torch.nn.utils.rnn.pad_sequence
    return {name: pad([row[name] for row in rows], True, _FIELDS[name]) for name in rows[0]}


def together(batches: Iterable[Batch]) -> list[list[Batch]]:
    """Batches in groups, in their order, each of which makes at most ``TOKENS`` tokens as one batch."""
    found: list[list[Batch]] = []
    for batch in batches:
        group = [*found[-1], batch] if found else []
        rows, widths = zip(*(one["input_ids"].shape for one in group or [batch]), strict=True)
        alike = len({frozenset(one) for one in group}) == 1
        if alike and sum(rows) * max(widths) <= TOKENS:
            found[-1] = group
        else:
            found.append([batch])
    return found


def joined(batches: list[Batch]) -> Batch:
    """The prompts of some batches, which have the same fields, as one batch."""
    return batches[0] if len(batches) == 1 else _stacked([row for one in batches for row in _rows(right_padded(one))])


def halved(batches: Iterable[Batch], which: int) -> list[Batch]:
    """Every other prompt of all batches, from the first (0) or the second (1) on."""
    found, before = [], 0
    for batch in batches:
        some = {name: value[(which + before) % 2 :: 2] for name, value in batch.items()}
        before += len(batch["input_ids"])
        found += [some] if len(some["input_ids"]) else []
    return found


def dealt(batches: Iterable[Batch], size: int, least: int = 1) -> list[Batch]:
    """All prompts in new batches of at most ``size``, and at least ``least`` batches where there are as many prompts.

    They are dealt like cards, the longest first, so that each batch has long ones and short ones. A batch has at most
    ``TOKENS`` tokens, like those of ``passes``. Prompts with labels stay apart from those without.
    """
    given, found = list(batches), []
    for labelled in (True, False):
        some = (right_padded(batch) for batch in given if ("labels" in batch) is labelled)
        rows = sorted((row for batch in some for row in _rows(batch)), key=lambda row: -len(row["input_ids"]))
        if rows:
            most = max(1, min(size, TOKENS // len(rows[0]["input_ids"])))
            count = max(-(-len(rows) // most), min(least, len(rows)))
            found += [_stacked(rows[at::count]) for at in range(count)]
    return found


def check_many(data: Any) -> None:
    """Raise ``ValueError`` where data are a file's name or one batch by itself."""
    if isinstance(data, str | Path | Mapping):
        file = f"{str(data)!r}: read the file first, load_prompts(file, tokenizer)"
        raise ValueError(f"data is {'one batch: put it into a list' if isinstance(data, Mapping) else file}")


def _what(batch: Any) -> str:
    if not isinstance(batch, Mapping):
        return f"a {type(batch).__name__}"
    ids = batch.get("input_ids")
    return f"input_ids of the shape {list(ids.shape)}" if isinstance(ids, Tensor) else f"a batch of {sorted(batch)}"


def right_padded(batch: Batch) -> Batch:
    """The batch with each row's padding behind its tokens: a position is then the same whatever the padding was.

    Models with learnt positions count them from the left end of the batch, also over padding.
    """
    attended = batch.get("attention_mask")
    if attended is None or bool(attended[:, 0].all()):
        return batch
    start = attended.bool().int().argmax(1, keepdim=True)
    order = (torch.arange(attended.shape[1], device=attended.device) + start) % attended.shape[1]
    return {
        name: value.gather(1, order.to(value.device)) if getattr(value, "shape", None) == attended.shape else value
        for name, value in batch.items()
    }


def check_fits(model: nn.Module, ids: Tensor) -> None:
    """Raise ``ValueError`` where ids ``[batch, token]`` exceed the model's context or are not of its vocabulary."""
    limit = context_of(model)
    if isinstance(limit, int) and 0 < limit < ids.shape[1]:
        raise ValueError(f"a prompt has {ids.shape[1]} tokens, and the model's context is {limit}: shorten or drop it")
    count = vocabulary_of(model)
    if count is not None and not 0 <= int(ids.min()) <= int(ids.max()) < count:
        raise ValueError(
            f"the prompts hold token {int(ids.max())} (the least is {int(ids.min())}), and the model has {count} of "
            f"them: were they made with another model's tokenizer, or for a stage with more tokens?"
        )


def context_of(model: Any) -> int | None:
    """How many tokens a model's context is long; None where it does not say so."""
    config = getattr(model, "config", None)
    found: int | None = getattr(getattr(config, "get_text_config", lambda: config)(), "max_position_embeddings", None)
    return found


def vocabulary_of(model: Any) -> int | None:
    """How many tokens a model has embeddings of; None where it does not say so."""
    table = getattr(model, "get_input_embeddings", lambda: None)()
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def response_mask(batch: Batch) -> Tensor:
    """Which tokens count: the response's where there are labels, else all attended ones; bool ``[batch, token]``."""
    if "labels" in batch:
        return batch["labels"] != IGNORED
    if "attention_mask" in batch:
        return batch["attention_mask"].bool()
    return torch.ones_like(batch["input_ids"], dtype=torch.bool)


def padded(pairs: Sequence[tuple[list[int], list[int] | None]], pad: int) -> Batch:
    """A batch of prompts and their responses (all or none), padded on the right, with labels on the responses."""
    length = max(len(prompt) + len(response or []) for prompt, response in pairs)
    ids = torch.full((len(pairs), length), pad)
    attention, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, (prompt, response) in enumerate(pairs):
        tokens = torch.tensor(prompt + (response or []))
        ids[row, : len(tokens)] = tokens
        attention[row, : len(tokens)] = 1
        labels[row, len(prompt) : len(tokens)] = tokens[len(prompt) :]
    batch = {"input_ids": ids, "attention_mask": attention}
    return {**batch, "labels": labels} if pairs[0][1] is not None else batch
