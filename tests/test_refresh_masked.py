"""A real Trainer under a mask: what is outside stays bit for bit, and the Trainer is still the Trainer."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from test_laws import expected, same, snapshot, some_neurons
from test_scores import Batch
from torch import nn

from surgery import Neurons
from surgery.layout import find_layout
from surgery.training import Masked
from surgery.training import callbacks as refresh_masked
from surgery.training.leaves import Leaves

LAB = Path(__file__).parent.parent / "benchmarks/lab/seed0"


def rows(count: int = 8) -> list[Batch]:
    ids = torch.randint(3, 64, (count, 10), generator=torch.Generator().manual_seed(4))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


def trained(model: nn.Module, folder: Path, optimizer: Any = None, callbacks: Any = (), **settings: Any) -> None:
    """Four steps of the plain Trainer."""
    from transformers import Trainer, TrainingArguments

    given: dict[str, Any] = {"weight_decay": 0.1, "max_grad_norm": 1.0, "max_steps": 4, "learning_rate": 1e-2}
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, seed=0,
        per_device_train_batch_size=2, lr_scheduler_type="constant", logging_strategy="no", **(given | settings),
    )  # fmt: skip
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        trainer = Trainer(
            model, arguments, train_dataset=rows(), callbacks=list(callbacks), optimizers=(optimizer, None)
        )  # type: ignore[arg-type]
        trainer.train()


def adamw(masked: Masked, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW(masked.leaves, lr=lr, weight_decay=0.1)


def law_outside(model: nn.Module, mask: Neurons, folder: Path) -> None:
    """Outside the mask every bit is what it was, whatever the optimiser decays; undo is the identity."""
    before, layout = snapshot(model), find_layout(model)
    masked = Masked(model, mask)
    with masked:
        trained(model, folder, adamw(masked), [masked])
    now = snapshot(model)
    assert same(now, expected(before, now, layout, mask))
    assert not same(now, before)
    assert all(p.requires_grad and not p._post_accumulate_grad_hooks for p in model.parameters())
    masked.undo()
    assert same(snapshot(model), before)


def law_trainer(model: nn.Module, mask: Neurons, folder: Path) -> None:
    """On all neurons of whole tensors it is the Trainer itself with the rest frozen: decay, clipping, accumulation."""
    before, layout = snapshot(model), find_layout(model)
    everything = Neurons({name: torch.ones(n, dtype=torch.bool) for name, n in layout.sizes.items()})
    settings = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    masked = Masked(model, everything)
    with masked:
        trained(model, folder, adamw(masked), [masked], **settings)
    now = snapshot(model)
    masked.undo()
    mine = {slot.tensor for block in layout.blocks for slot in block.slots}
    for name, p in model.named_parameters():
        p.requires_grad_(name in mine)
    plain = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    trained(model, folder, plain, **settings)
    for name, tensor in snapshot(model).items():
        torch.testing.assert_close(now[name], tensor, rtol=1e-4, atol=1e-5)
    assert not same(snapshot(model), before)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(before[name])
            p.requires_grad_(True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["qwen3", "phi3", "gpt2", "mixtral"])
def test_what_is_outside_stays(family, dtype, tmp_path):
    model = build(family, dtype)
    law_outside(model, some_neurons(find_layout(model)), tmp_path)


def test_units_of_attention(tmp_path):
    model = build("qwen3")
    before, layout = snapshot(model), find_layout(model, units=("mlp", "kv_group"))
    masked = Masked(model, some_neurons(layout, density=0.5))
    with masked:
        trained(model, tmp_path, adamw(masked), [masked])
    now = snapshot(model)
    assert same(now, expected(before, now, layout, some_neurons(layout, density=0.5)))
    assert not same(now, before)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_mask_of_everything_is_the_trainer_itself(family, tmp_path):
    model = build(family)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    law_trainer(model, some_neurons(find_layout(model)), tmp_path)


def test_the_optimiser_s_state_is_of_the_mask_s_size(tmp_path):
    model = build("llama")
    mask = some_neurons(find_layout(model), density=0.05)
    masked = Masked(model, mask)
    optimizer = adamw(masked)
    with masked:
        trained(model, tmp_path, optimizer, [masked])
    inside = sum(n * find_layout(model)[name].width for name, n in mask.count().items())
    held = [v for state in optimizer.state.values() for v in state.values() if v.numel() > 1]
    assert sum(value.numel() for value in held) == 2 * inside


def test_an_error_on_the_way_puts_the_old_bits_back(tmp_path):
    from transformers import TrainerCallback

    class Fails(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **told: Any) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    model = build("llama")
    before = snapshot(model)
    masked = Masked(model, some_neurons(find_layout(model)))
    with pytest.raises(KeyboardInterrupt):
        with masked:
            trained(model, tmp_path, adamw(masked), [masked, Fails()])
    assert same(snapshot(model), before)
    assert all(p.requires_grad and not p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_nan_puts_the_old_bits_back(tmp_path):
    model = build("llama")
    masked = Masked(model, some_neurons(find_layout(model)))
    before = snapshot(model)
    with pytest.raises(ValueError, match="NaN or infinite"):
        with masked:
            trained(model, tmp_path, adamw(masked, lr=float("inf")), [masked])
    assert same(snapshot(model), before)


def test_a_wrong_use_is_refused(tmp_path):
    model, other = build("llama"), build("llama")
    mask = some_neurons(find_layout(model))
    masked = Masked(model, mask)
    with pytest.raises(ValueError, match="train inside the block"):
        trained(model, tmp_path, adamw(masked), [masked])
    with pytest.raises(ValueError, match=r"not made of the masked slices.*AdamW\(masked.leaves"):
        with masked:
            trained(model, tmp_path, None, [masked])
    with pytest.raises(ValueError, match="another model"):
        with masked:
            trained(other, tmp_path, adamw(masked), [masked])


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed (surgery[lab])")
@pytest.mark.skipif(not (LAB / "qa").is_dir(), reason="seed 0 has not been trained here")
def test_grpo_under_a_mask():
    """TRL's trainer on the lab's later model: outside the mask nothing moves."""
    from benchmarks.lab.domains import read_items
    from benchmarks.lab.refresh import grpo
    from benchmarks.lab.train import GRPO
    from surgery import Trajectory

    model = Trajectory(later=LAB / "qa").load()
    before, layout = snapshot(model), find_layout(model)
    mask = some_neurons(layout, density=0.1)
    items = read_items(LAB / "data" / "math.calibration.jsonl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = grpo(model, LAB, "math", items, replace(GRPO["math"], steps=2), mask)
    now = snapshot(model)
    assert same(now, expected(before, now, layout, mask))
    assert not same(now, before)
    done.undo()
    assert same(snapshot(model), before)


# Mutants


def no_clipping(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(refresh_masked.Masked, "on_pre_optimizer_step", lambda *_, **__: None)


def gradients_pile_up(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Leaves, "clear", lambda self: None)


def never_written(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Leaves, "write", lambda self: None)


def whole_tensors(patch: pytest.MonkeyPatch) -> None:
    def write(self, original=Leaves.write):
        original(self)
        with torch.no_grad():
            for leaf in self.leaves:
                leaf.parameter.mul_(0.999)

    patch.setattr(Leaves, "write", write)


@pytest.mark.parametrize(
    ("mutant", "law"),
    [
        (no_clipping, law_trainer),
        (gradients_pile_up, law_trainer),
        (never_written, law_outside),
        (whole_tensors, law_outside),
    ],
    ids=lambda one: one.__name__,
)  # fmt: skip
def test_mutants_die(mutant, law, monkeypatch, tmp_path):
    law(build("llama"), some_neurons(find_layout(build("llama"))), tmp_path)
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        law(build("llama"), some_neurons(find_layout(build("llama"))), tmp_path)
