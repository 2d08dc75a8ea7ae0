"""A short GRPO refresh on the damaged domain with TRL, on all parameters or on a mask's units alone.

``python -m benchmarks.lab.refresh SEED_FOLDER [--budget 0.16] [--steps 20]`` chooses neurons and value channels by
the damage score, refreshes Math after QA on them alone, and shows every domain before and after. Under a mask it is
TRL's own ``GRPOTrainer``: with an optimiser made of the masked slices, and with ``surgery.Masked`` as a callback.

"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, TrainerCallback
from transformers.utils import logging as transformers_logging

from benchmarks.lab.domains import DOMAINS, Item, generate, read_items
from benchmarks.lab.evaluate import evaluator
from benchmarks.lab.train import GRPO, Stage, show, train_stage
from surgery import DamageSelector, Trajectory, load_prompts
from surgery.masks.mask import Mask
from surgery.training import Masked

STEPS = (5, 10, 20)
AfterStep = Callable[[int, nn.Module], object]


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


def grpo(
    model: nn.Module,
    folder: Path,
    domain: str,
    items: list[Item],
    plan: Stage,
    mask: Mask | None = None,
    after_step: AfterStep | None = None,
) -> Masked | None:
    """GRPO steps on a live model, in place; under a mask only its units are trained, and what comes back can undo it.

    ``after_step`` is called with the step (1, 2, ...) and the model.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    masked = None if mask is None else Masked(model, mask)
    optimizer = None if masked is None else torch.optim.AdamW(masked.leaves, lr=plan.learning_rate, weight_decay=0.0)
    callbacks = [one for one in (masked, _After(after_step) if after_step else None) if one is not None]
    with _quiet(), masked or contextlib.nullcontext():
        train_stage(
            model, domain, plan, {"train": items}, tokenizer, 0, _unscored, _silent, callbacks, optimizer  # type: ignore[arg-type]
        )  # fmt: skip
    return masked


def refreshed(later: nn.Module, folder: Path, domain: str, items: list[Item], steps: int) -> dict[str, Tensor]:
    """The parameters after so many GRPO steps from ``later``; the same steps give the same parameters again.

    The rate and group sizes are those of the domain's own stage. Training is in float32; what comes back is rounded to
    the later parameters' dtype, as a saved checkpoint is. ``later`` is left as it was.
    """
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM(later.config)
    model.load_state_dict(later.state_dict())
    grpo(model, folder, domain, items, replace(GRPO[domain], steps=steps))
    dtypes = {name: parameter.dtype for name, parameter in later.named_parameters()}
    return {name: p.detach().to(dtypes[name]) for name, p in model.named_parameters()}


class _After(TrainerCallback):
    """Calls a function after every step."""

    def __init__(self, function: AfterStep) -> None:
        self._function = function

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **told: Any) -> None:
        self._function(state.global_step, model)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TRL warns, and prints its last line."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _unscored(model: Any) -> dict[str, float]:
    """No evaluation inside the training: it would be timed with it."""
    return dict.fromkeys(DOMAINS, float("nan"))


def _silent(text: str) -> None:
    pass


def main() -> None:
    """The example: one seed, one mask, before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seed", type=Path, metavar="SEED_FOLDER")
    parser.add_argument("--budget", type=float, default=0.16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-3)
    asked = parser.parse_args()
    transformers_logging.disable_progress_bar()
    run = Trajectory(earlier=asked.seed / "math", later=asked.seed / "qa")
    model = run.load(dtype=torch.float32)
    data = load_prompts(asked.seed / "data/math.calibration.jsonl", asked.seed / "qa")
    mask = DamageSelector(asked.budget, units=("mlp", "value_channel")).select(run, data)
    evaluate = evaluator(asked.seed / "data", AutoTokenizer.from_pretrained(asked.seed / "qa"))
    print(f"before: {show(evaluate(model))}")
    plan = replace(GRPO["math"], steps=asked.steps, learning_rate=asked.lr)
    grpo(model, asked.seed, "math", training_items(asked.seed, "math"), plan, mask)
    print(f"{asked.steps} steps on {sum(mask.count().values())} units: {show(evaluate(model))}")


if __name__ == "__main__":
    main()
