"""Evaluators that are ready to use: the likelihood of responses, and the lm-evaluation-harness."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path, PurePath
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from surgery.files import path_of
from surgery.live.heads import positions
from surgery.live.hooks import evaluating
from surgery.live.losses import likelihoods
from surgery.live.prompts import Batch, batches_of, digest_of, each, opened_tokenizer, passes
from surgery.measure.rows import Evaluate, Score

PREFIX = "lm_eval:"


@dataclass(frozen=True)
class _Likelihood:
    data: dict[str, list[Batch]]

    def __call__(self, model: nn.Module) -> dict[str, Score]:
        with evaluating(model), torch.no_grad():
            return {domain: _each(model, domain, batches) for domain, batches in self.data.items()}


def likelihood(data: Mapping[str, Iterable[Batch]]) -> Evaluate:
    """An ``evaluate`` that needs no generation: the log-likelihood of the responses, prompt by prompt.

    score_i = 1/T_i · Σ_t log p(token t of response i | what comes before it), in nats per token, ≤ 0, larger = better.

    Args:
        data: domain → batches with labels on the response tokens (without labels all attended tokens count).

    Returns:
        A function for ``sweep``, ``repair`` and ``history``: model → {domain: one score per prompt}.

    Raises:
        ValueError: there is no domain, or one without a prompt; when called: a prompt has no response token.

    Source: ours.
    """
    found = {domain: list(batches_of(batches)) for domain, batches in data.items()}
    if empty := [domain for domain, batches in found.items() if not batches]:
        raise ValueError(f"the data of {empty[0]!r} is empty: expected batches of prompts with responses")
    if not found:
        raise ValueError('expected data by domain, like {"math": load_prompts(...)}')
    return _Likelihood(found)


def _each(model: nn.Module, domain: str, batches: list[Batch]) -> list[float]:
    """The score of each prompt, in their own order."""
    groups, order = passes(batches)
    found = [value for batch in each(f"likelihood of {domain}", groups) for value in _per_prompt(model, batch)]
    return [value for _, value in sorted(zip(order, found, strict=True))]


def _per_prompt(model: nn.Module, batch: Batch) -> list[float]:
    where = positions(batch)
    counts = where.sum(1)
    if bool((counts == 0).any()):
        raise ValueError(f"{int((counts == 0).sum())} prompts of a batch have no response token to score")
    found = likelihoods(model, batch).double().cpu()
    sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, where.nonzero()[:, 0].cpu(), found)
    return (sums / counts.cpu()).tolist()


@dataclass(frozen=True)
class _Harness:
    tasks: tuple[str, ...]
    tokenizer: Any
    limit: int | None
    few_shot: int | None
    batch_size: int
    include_path: str | None

    def __call__(self, model: nn.Module) -> dict[str, Score]:
        lm_eval, models = _modules()
        manager = _tasks(self.include_path)
        if unknown := [task for task in self.tasks if task not in manager.all_tasks]:
            raise LookupError(f"lm_eval knows no task {unknown[0]!r}: see `lm_eval ls tasks`, or pass include_path=")
        tokenizer = self.tokenizer or getattr(model, "name_or_path", None)
        if not tokenizer:
            raise ValueError('the model does not know its folder: name the tokenizer, harness("...", tokenizer=...)')
        with evaluating(model):
            own = deepcopy(opened_tokenizer(tokenizer))  # the harness gives it a padding token
            live = models.HFLM(pretrained=model, tokenizer=own, batch_size=self.batch_size)
            found = lm_eval.simple_evaluate(
                model=live, tasks=list(self.tasks), num_fewshot=self.few_shot, limit=self.limit,
                task_manager=manager, bootstrap_iters=0,
            )  # fmt: skip
        return {task: _score(task, found) for task in self.tasks}


def harness(
    tasks: str | Iterable[str],
    *,
    tokenizer: Any = None,
    limit: int | None = None,
    few_shot: int | None = None,
    batch_size: int = 8,
    include_path: str | Path | None = None,
) -> Evaluate:
    """An ``evaluate`` that runs tasks of EleutherAI's lm-evaluation-harness on the live model.

    A task's score is its first metric (with its first filter), larger = better (a metric where smaller is better is
    negated). It is a score per item if the harness gives one number per item. The items of a group (like "mmlu") are
    those of its tasks, end to end.

    Args:
        tasks: names, a list or separated by commas.
        tokenizer: a tokenizer or its folder (default: that of the model's own folder).
        limit: at most this many items of each task.
        few_shot: number of examples in the prompt (default: the task's own).
        batch_size: items per forward pass.
        include_path: a folder with task files of your own.

    Returns:
        A function for ``sweep`` and ``repair``. They also take the text ``"lm_eval:task,task"``, as the shell does; it
        is short for ``harness("task,task")``.

    Raises:
        ValueError: no task is named; when called: the model's tokenizer is not known, or lm_eval is not installed.
        LookupError: when called: there is no such task.

    Source: ours; lm_eval's ``simple_evaluate`` does the work.
    """
    names = tasks.split(",") if isinstance(tasks, str) else list(tasks)
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise ValueError(f'tasks={tasks!r}: expected the names of lm_eval tasks, like "gsm8k,mmlu"')
    where = str(path_of(include_path)) if include_path is not None else None
    return _Harness(tuple(names), tokenizer, limit, few_shot, batch_size, where)


def evaluator(evaluate: Evaluate | str) -> Evaluate:
    """The function, or what ``"lm_eval:task,task"`` names.

    Raises:
        ValueError: another text, or no function.
    """
    if isinstance(evaluate, str) and evaluate.startswith(PREFIX):
        return harness(evaluate.removeprefix(PREFIX))
    if not callable(evaluate):
        raise ValueError(f'evaluate={evaluate!r}: expected a function of the model, or "lm_eval:task,task"')
    return evaluate


def signature(evaluate: Evaluate) -> str:
    """What identifies an evaluation: its name, and a hash of its code and of the plain values that it uses.

    The hash does not cover files, global variables, or the contents of lists and other objects.
    """
    if isinstance(evaluate, _Likelihood):
        return f"likelihood of {', '.join(f'{name} {digest_of(batches)}' for name, batches in evaluate.data.items())}"
    if isinstance(evaluate, _Harness):
        return repr(replace(evaluate, tokenizer=None))
    own: Any = evaluate if hasattr(evaluate, "__qualname__") else type(evaluate)
    digest = hashlib.blake2b(digest_size=16)
    for part in _parts(evaluate, set()):
        digest.update(part)
    return f"{own.__module__}.{own.__qualname__} {digest.hexdigest()}"


def _parts(value: Any, seen: set[int], own: bool = True) -> Iterator[bytes]:
    """The code and the plain values in a function, a method or a partial, or in the object that is called itself."""
    if isinstance(value, str | bytes | int | float | bool | PurePath | None):
        yield repr(value).encode()
        return
    yield type(value).__name__.encode()
    held: tuple[Any, ...] = ()
    if isinstance(value, FunctionType):
        yield from _code(value.__code__)
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]  # but those still empty
        held = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *cells, *vars(value).values())
    elif isinstance(value, MethodType):
        yield from _parts(value.__self__, seen, own)
        held = (value.__func__,)
    elif isinstance(value, partial):
        held = (value.func, *value.args, *(one for pair in value.keywords.items() for one in pair))
    elif isinstance(value, tuple) and not own:
        held = value
    elif own:
        held = (type(value).__call__, *getattr(value, "__dict__", {}).values())
    if id(value) not in seen:
        for one in held:
            yield from _parts(one, seen | {id(value)}, own=False)


def _code(code: CodeType) -> Iterator[bytes]:
    """The instructions and constants of a function, and of those inside it."""
    yield code.co_code
    yield repr(code.co_names).encode()
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield from _code(one)
        else:
            yield repr(sorted(one, key=repr) if isinstance(one, frozenset) else one).encode()


def _modules() -> tuple[Any, Any]:
    try:
        import lm_eval
        from lm_eval.models import huggingface
    except ImportError as error:
        raise ValueError(f'lm_eval tasks need lm_eval: pip install "surgery[eval]" ({error})') from error
    return lm_eval, huggingface


@lru_cache(maxsize=4)
def _tasks(include_path: str | None) -> Any:
    """The index of all tasks: thousands of files, read once."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _score(task: str, found: Mapping[str, Any]) -> Score:
    """One task's or group's first metric: per item where every item has a number, else as a whole."""
    leaves = _leaves(task, found)
    parts = [_items(leaf, found) for leaf in leaves]
    if all(part is not None for part in parts):
        return [x for part in parts if part is not None for x in part]
    if len(leaves) > 1:
        raise ValueError(f"lm_eval's group {task!r} has no scores per item: name its tasks instead ({leaves[:3]}…)")
    key, sign = _first(task, found)
    return sign * float(found["results"][task][key])


def _leaves(task: str, found: Mapping[str, Any]) -> list[str]:
    inside = found.get("group_subtasks", {}).get(task) or []
    return [leaf for one in inside for leaf in _leaves(one, found)] or [task]


def _first(task: str, found: Mapping[str, Any]) -> tuple[str, int]:
    """The key "metric,filter" of a task's first metric, and +1 where larger is better, −1 where smaller is."""
    key = next(key for key in found["results"][task] if "," in key and "_stderr" not in key)
    larger = found.get("higher_is_better", {}).get(task, {}).get(key.partition(",")[0], True)
    return key, -1 if larger is False else 1


def _items(task: str, found: Mapping[str, Any]) -> list[float] | None:
    key, sign = _first(task, found)
    metric, _, chosen = key.partition(",")
    samples = sorted((s for s in found["samples"][task] if s["filter"] == chosen), key=lambda s: s["doc_id"])
    values = [sample.get(metric) for sample in samples]
    if not values or not all(isinstance(value, int | float) for value in values):
        return None  # perplexities come as pairs, corpus metrics as texts
    if abs(sum(values) / len(values) - found["results"][task][key]) > 1e-6:
        return None  # not a mean of the items
    return [sign * float(value) for value in values]
