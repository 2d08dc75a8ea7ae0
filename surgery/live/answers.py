"""Answers to prompts that come without: the earlier model writes them."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.checkpoints.checkpoint import folder_of
from surgery.checkpoints.opening import sampled
from surgery.compat import runs_on, uncompiled
from surgery.devices import fetched
from surgery.files import Exists, path_of, whole_file
from surgery.layout.sharding import ranks_of
from surgery.live.heads import contiguous
from surgery.live.hooks import evaluating, untracked
from surgery.live.lines import end_tokens
from surgery.live.prompts import Batch, batches_of, check_fits, context_of, opened_tokenizer, padded, vocabulary_of
from surgery.progress import steps
from surgery.tables import json_of

_ALONE = threading.Lock()  # generate draws from torch's own random numbers, of which a process has one sequence


@dataclass(frozen=True)
class _Settings:
    max_new_tokens: int
    temperature: float
    seed: int
    tokens: int | None
    ends: list[int]

    def written(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def respond(
    model: nn.Module,
    prompts: Iterable[Batch],
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    path: str | Path | None = None,
    tokens: int | None = None,
) -> list[Batch]:
    """Let a model answer prompts, so that scores that need responses work without labels.

    Args:
        model: the earlier model, live (``earlier_model(run)``), with a ``generate`` method.
        prompts: batches of ``{"input_ids", "attention_mask"}``, ``[batch, token]``; batches with labels are passed on.
        max_new_tokens: an answer is cut after this many tokens, and at the end of the model's context. It ends before
            with any token that the generation settings, or the tokenizer beside the model's files or its chat template,
            end a turn with.
        temperature: of the sampling from the model's whole distribution; 0 is greedy. The model's own generation
            settings (a repetition penalty, beams) are not used.
        seed: of the sampling; torch's own random state does not change.
        path: a JSON-lines file of token ids that caches the answers: it is read if it exists, else written.
        tokens: ids from this one on are never drawn, because another model that reads the answers lacks them.

    Returns:
        The batches, padded on the right, with ``labels`` on the answers (end-of-sequence token included).

    Raises:
        ValueError: the file answers other prompts, has another model's answers or was made with other settings, a
            prompt leaves no room, or a setting is out of range.

    Source: ours.
    """
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens!r}: expected how many tokens, 1 or more")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature!r}: expected a number ≥ 0 (0 is greedy)")
    batches, model = list(batches_of(prompts)), uncompiled(model)
    asked = [_rows(batch) for batch in batches if "labels" not in batch]
    settings = _Settings(max_new_tokens, temperature, seed, tokens, _ends(model) if asked else [])
    file = path_of(path) if path is not None else None
    if file is None:
        answers = _generate(model, asked, settings)
    else:
        head = {**settings.written(), "model": sampled(model.parameters())}
        ranks = ranks_of(model)
        if not ranks.from_first(file.exists):
            new = _generate(model, asked, settings)
            with suppress(Exists):  # another process was faster: its answers count
                ranks.from_first(lambda: _write(file, head, asked, new))
        answers = ranks.from_first(lambda: _read(file, head, asked))
    made = iter(zip(asked, answers, strict=True))
    pad = _special(model, "pad_token_id") or [0]
    return [batch if "labels" in batch else _joined(*next(made), pad[0]) for batch in batches]


def _joined(prompts: list[list[int]], answers: list[list[int]], pad: int) -> Batch:
    return padded(list(zip(prompts, answers, strict=True)), pad)


def _rows(batch: Batch) -> list[list[int]]:
    attended = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    return [row[mask].tolist() for row, mask in zip(batch["input_ids"], attended, strict=True)]


def _special(model: Any, name: str) -> list[int]:
    """A special token's ids as the model's generation settings, or else its configuration, give them."""
    for home in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        found = getattr(home, name, None)
        if found is not None:
            return list(found) if isinstance(found, list | tuple) else [int(found)]
    return []


def _ends(model: Any) -> list[int]:
    """Every token that ends an answer: one that was trained on chats may end them with none of generate's own."""
    folder = _folder(model)
    files = ("tokenizer_config.json", "tokenizer.json")
    kept = folder is not None and any((folder / name).is_file() for name in files)
    return sorted({*_special(model, "eos_token_id"), *(end_tokens(opened_tokenizer(folder)) if kept else ())})


def _folder(model: Any) -> Path | None:
    """The folder that a model was read from, where it is still there."""
    name = getattr(model, "name_or_path", None)
    try:
        return folder_of(name) if name else None
    except LookupError:
        return None


def _generate(model: Any, asked: list[list[list[int]]], settings: _Settings) -> list[list[list[int]]]:
    if not hasattr(model, "generate"):
        raise ValueError(
            f"{type(model).__name__} can't answer prompts (no generate): pass a causal LM, or batches with labels"
        )
    device = runs_on(model)
    ends = settings.ends
    pad = (_special(model, "pad_token_id") or [0])[0]  # masked, and cut off behind the end
    limit, own = context_of(model), vocabulary_of(model) or 0
    sampled = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
    how: dict[str, Any] = sampled if settings.temperature > 0 else {"do_sample": False}
    if settings.tokens is not None and settings.tokens < own:
        how["suppress_tokens"] = [*range(settings.tokens, own)]
    answers: dict[str, Tensor] = {}
    forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    ranks = ranks_of(model)
    how |= {"synced_gpus": True} if ranks.mesh is not None else {}  # all go on until the last answer has ended
    with _ALONE, forked, untracked(ranks), evaluating(model), _own_settings(model), contiguous(model):
        torch.manual_seed(settings.seed)
        for rows in steps("the earlier model's answers", asked, len):
            length = max(map(len, rows))
            room = settings.max_new_tokens if limit is None else min(settings.max_new_tokens, limit - length)
            if room < 1:
                raise ValueError(f"a prompt has {length} tokens, which leaves no room in a context of {limit}")
            ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=device)
            mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
            check_fits(model, ids)
            out: Tensor = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=room, pad_token_id=pad,
                eos_token_id=ends or None, use_cache=True, **how,
            )  # fmt: skip
            answers[str(len(answers))] = out[:, length:]
    read = [[_until(row, ends) for row in one.tolist()] for one in fetched(answers).values()]
    return ranks.from_first(lambda: read)


@contextmanager
def _own_settings(model: Any) -> Iterator[None]:
    """While the body runs, the model's generation settings are the plain ones: generate adds what a call leaves open.

    A repetition penalty or a minimum probability would make the answers those of another distribution.
    """
    from transformers import GenerationConfig

    kept = model.generation_config
    try:
        model.generation_config = GenerationConfig()
        yield
    finally:
        model.generation_config = kept


def _until(row: list[int], ends: list[int]) -> list[int]:
    """A generated row up to its end-of-sequence token, which is part of the answer."""
    for at, token in enumerate(row):
        if token in ends:
            return row[: at + 1]
    return row


_ANSWER = {"prompt_ids": [int], "response_ids": [int]}


def _read(path: Path, head: dict[str, Any], asked: list[list[list[int]]]) -> list[list[list[int]]]:
    try:
        first, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
        found = json_of(first, "line 1", {str: object})
        read = [json_of(line, f"line {at}", _ANSWER) for at, line in enumerate(lines, 2)]
    except ValueError as error:
        raise ValueError(f"{path} is not a file that respond() wrote: {error}") from error
    pairs = [(line["prompt_ids"], line["response_ids"]) for line in read]
    settings = {name: value for name, value in head.items() if name != "model"}
    if (made := {name: found.get(name) for name in settings}) != settings:
        raise ValueError(f"{path} was made with {str(made)[:200]}, and you asked for {settings}: choose another file")
    if found.get("model") != head["model"]:
        raise ValueError(f"{path} has the answers of another model: choose another file")
    if [prompt for prompt, _ in pairs] != [row for rows in asked for row in rows]:
        raise ValueError(f"{path} answers other prompts than these: choose another file")
    if wrong := [at for at, (_, reply) in enumerate(pairs, 2) if not 0 < len(reply) <= head["max_new_tokens"]]:
        raise ValueError(f"{path} is damaged: line {wrong[0]} has no answer, or too long a one. Remove the file")
    answers = iter(pairs)
    return [[next(answers)[1] for _ in rows] for rows in asked]


def _write(path: Path, head: dict[str, Any], asked: list[list[list[int]]], answers: list[list[list[int]]]) -> None:
    lines: list[Any] = [head]
    for rows, replies in zip(asked, answers, strict=True):
        lines += [{"prompt_ids": p, "response_ids": r} for p, r in zip(rows, replies, strict=True)]
    with whole_file(path, overwrite=False) as new:
        new.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
