"""The trained reference: a short GRPO refresh on the damaged domain, from the later checkpoint, with the lab's code.

Two kinds of prompts: the 128 calibration prompts that the selectors are given (what the same data buys by training),
and the domain's training prompts (what a refresh with everything at hand gives).
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.lab.domains import DOMAINS, Item, generate, read_items
from benchmarks.lab.train import GRPO, train_stage

STEPS = (5, 10, 20)


def training_items(folder: Path, domain: str) -> list[Item]:
    """The prompts that a seed folder's domain was trained on, generated again from the seed in the folder's name.

    Raises:
        LookupError: the name holds no seed, or the seed does not give the folder's own evaluation items (they were made
            by another version of the lab): then training prompts and evaluation prompts might overlap.
    """
    number = re.search(r"\d+$", folder.resolve().name)
    if number is None:
        raise LookupError(f"{folder.resolve().name!r} does not end in the number of a seed")
    splits = generate(domain, int(number[0]))
    if splits["evaluation"] != read_items(folder / "data" / f"{domain}.evaluation.jsonl"):
        raise LookupError(f"seed {number[0]} does not generate the evaluation items of {folder.resolve().name}/data")
    return splits["train"]


def refreshed(later: torch.nn.Module, folder: Path, domain: str, items: list[Item], steps: int) -> dict[str, Tensor]:
    """The parameters after so many GRPO steps from ``later``; the same steps give the same parameters again.

    The rate and group sizes are those of the domain's own stage. Training is in float32; what comes back is rounded to
    the later parameters' dtype, as a saved checkpoint is. ``later`` is left as it was.
    """
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM(later.config)
    model.load_state_dict(later.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # TRL warns, and prints its last line
        warnings.simplefilter("ignore")
        plan = replace(GRPO[domain], steps=steps)
        train_stage(model, domain, plan, {"train": items}, tokenizer, 0, _unscored, _silent)  # type: ignore[arg-type]
    dtypes = {name: parameter.dtype for name, parameter in later.named_parameters()}
    return {name: p.detach().to(dtypes[name]) for name, p in model.named_parameters()}


def _unscored(model: Any) -> dict[str, float]:
    """No evaluation inside the training: it would be timed with it."""
    return dict.fromkeys(DOMAINS, float("nan"))


def _silent(text: str) -> None:
    pass
