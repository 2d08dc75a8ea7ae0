"""A watched training is the same training, bit for bit, and which steps are watched is the same each time."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, config
from test_gradient_cosines import domains
from torch import nn

from surgery.evidence import gradients
from surgery.live.losses import cross_entropy
from surgery.live.prompts import Batch
from surgery.training import GradientCosines
from surgery.training import callbacks as gradient_callback

transformers = pytest.importorskip("transformers")


def model_with_dropout(family: str = "qwen3", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Training it draws random numbers, so that a random state that was moved shows."""
    kind, settings = type(build(family)), config(family)
    for name in ("attention_dropout", "resid_pdrop"):
        if hasattr(settings, name):
            setattr(settings, name, 0.2)
    torch.manual_seed(0)
    made: nn.Module = kind(settings).to(dtype)
    return made


def trained(
    place: Path, model: nn.Module, watch: dict[str, Any] | None, **settings: Any
) -> tuple[Any, GradientCosines | None]:
    """Six steps of Trainer, watched or not."""
    torch.manual_seed(1)
    rows = torch.randint(3, 64, (32, 9))
    arguments = transformers.TrainingArguments(
        output_dir=str(place), max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, seed=3, **settings,
    )  # fmt: skip
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in rows]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    trainer.remove_callback(transformers.PrinterCallback)
    callback = None if watch is None else GradientCosines(trainer, domains(), **watch)
    if callback is not None:
        trainer.add_callback(callback)
    trainer.train()
    return trainer, callback


def random_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """A loss that draws random numbers."""
    return cross_entropy(model, batch) * (1 + torch.rand(()))


def optimiser_state(trainer: Any) -> list[torch.Tensor]:
    state = trainer.optimizer.state_dict()["state"]
    return [value for one in state.values() for value in one.values() if isinstance(value, torch.Tensor)]


def bit_identical(bare: Any, watched: Any) -> bool:
    weights = zip(bare.model.state_dict().values(), watched.model.state_dict().values(), strict=True)
    moments = zip(optimiser_state(bare), optimiser_state(watched), strict=True)
    return all(torch.equal(one, other) for pairs in (weights, moments) for one, other in pairs)


@pytest.mark.parametrize(
    ("family", "dtype", "settings"),
    [
        ("qwen3", torch.float32, {}),
        ("gpt2", torch.float32, {"gradient_accumulation_steps": 2}),
        ("qwen3", torch.bfloat16, {}),
        ("qwen3", torch.float32, {"bf16": True}),
        ("qwen3_moe", torch.float32, {"gradient_checkpointing": True}),
    ],
)
def test_a_watched_training_is_the_same_bit_for_bit(family, dtype, settings, tmp_path):
    bare, _ = trained(tmp_path, model_with_dropout(family, dtype), None, **settings)
    model = model_with_dropout(family, dtype)
    watched, callback = trained(tmp_path, model, {"every": 2, "loss": random_loss}, **settings)
    assert callback is not None
    assert list(callback.measured) == [2, 4, 6]
    assert bit_identical(bare, watched)
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (bare, watched)]
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_random_state_that_moves_is_seen(tmp_path, monkeypatch):
    bare, _ = trained(tmp_path, model_with_dropout(), None)
    monkeypatch.setattr(torch.random, "fork_rng", lambda **_: nullcontext())
    watched, _ = trained(tmp_path, model_with_dropout(), {"every": 2, "loss": random_loss})
    assert not bit_identical(bare, watched)


def test_what_is_logged_is_what_gradients_says(tmp_path):
    trainer, callback = trained(tmp_path, model_with_dropout(), {"every": 3})
    assert callback is not None
    entries = [entry for entry in trainer.state.log_history if "gradient_cosine/a-b" in entry]
    assert [entry["step"] for entry in entries] == [3, 6]
    found = gradients(trainer.model, domains())
    assert entries[-1]["gradient_cosine/a-b"] == found.whole.cosines["a"]["b"]
    assert entries[-1]["domain_loss/b"] == found.losses["b"]
    assert entries[-1]["gradient_norm/a"] == found.whole.norms["a"]
    for part in (*found.layers, *found.modules):
        logged = entries[-1].get(f"gradient_cosine/a-b/{part.name}")
        assert logged == (None if part.kind == "norm" else part.cosines["a"]["b"])
    assert list(callback.series.stages) == ["3", "6"]
    assert callback.series.stages["6"].whole == found.whole
    _, brief = trained(tmp_path, model_with_dropout(), {"every": 3, "parts": False})
    assert brief is not None
    told = [name for entry in brief.trainer.state.log_history for name in entry if name.startswith("gradient_cosine")]
    assert set(told) == {"gradient_cosine/a-b"}


def test_the_step_s_number_alone_decides_what_is_measured(monkeypatch, tmp_path):
    trainer, _ = trained(tmp_path, model_with_dropout(), None)
    real = gradients(trainer.model, domains())
    monkeypatch.setattr(gradient_callback, "gradients", lambda *_: real)
    for settings, every in (({}, 100), ({"every": 30}, 30)):
        callback = GradientCosines(trainer, domains(), **settings)
        state, control = transformers.TrainerState(), transformers.TrainerControl()
        callback.on_train_begin(trainer.args, state, control)
        for step in range(1, 1001):
            state.global_step = step
            callback.on_step_end(trainer.args, state, control)
        assert list(callback.measured) == list(range(every, 1001, every))


def test_a_training_that_goes_on_is_measured_where_a_whole_one_is(monkeypatch, tmp_path):
    trainer, _ = trained(tmp_path, model_with_dropout(), None)
    real = gradients(trainer.model, domains())
    monkeypatch.setattr(gradient_callback, "gradients", lambda *_: real)
    callback, state = GradientCosines(trainer, domains(), every=4), transformers.TrainerState()
    callback.on_train_begin(trainer.args, state, transformers.TrainerControl())
    for step in range(7, 14):  # from a checkpoint
        state.global_step = step
        callback.on_step_end(trainer.args, state, transformers.TrainerControl())
    assert list(callback.measured) == [8, 12]


def test_a_long_series_is_thinned(monkeypatch, tmp_path):
    trainer, _ = trained(tmp_path, model_with_dropout(), None)
    real = gradients(trainer.model, domains())
    monkeypatch.setattr(gradient_callback, "gradients", lambda *_: real)
    callback = GradientCosines(trainer, domains(), every=1)
    state = transformers.TrainerState()
    for step in range(1, 300):
        state.global_step = step
        callback.on_step_end(trainer.args, state, transformers.TrainerControl())
    assert len(callback.measured) <= gradient_callback.KEPT
    assert min(callback.measured) == 1
    assert max(callback.measured) == 299


def test_a_training_that_is_too_short_says_so(tmp_path):
    with pytest.warns(UserWarning, match=r"gradients were never measured: .* 6 steps, .* every=100"):
        _, callback = trained(tmp_path, model_with_dropout(), {})
    assert callback is not None
    assert not callback.measured


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every=0: expected a number of steps"),
        ({"every": 2.5}, r"every=2\.5"),
        ({"loss": {"a": cross_entropy}}, "expected one for each"),
    ],
)
def test_settings_out_of_range(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, model_with_dropout(), settings)


def test_several_processes_are_refused(tmp_path):
    trainer, _ = trained(tmp_path, model_with_dropout(), None)

    class Two:
        world_size = 2

    with pytest.raises(ValueError, match="training runs in 2 processes"):
        GradientCosines(trainer, domains()).on_train_begin(
            Two(), transformers.TrainerState(), transformers.TrainerControl()
        )


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed (surgery[lab])")
def test_grpo_is_the_same_and_keeps_its_running_means(tmp_path):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from benchmarks.lab.tokenizer import build_tokenizer

    tokenizer, runs = build_tokenizer(), []
    for watched in (False, True):
        kind, settings = type(build("qwen3")), config("qwen3")
        settings.update(dict(vocab_size=len(tokenizer), eos_token_id=1))
        torch.manual_seed(0)
        arguments = GRPOConfig(
            output_dir=str(tmp_path), seed=1, max_steps=3, learning_rate=1e-2, per_device_train_batch_size=8,
            num_generations=4, max_completion_length=3, use_cpu=True, bf16=False, gradient_checkpointing=False,
            save_strategy="no", report_to="none", logging_steps=3, disable_tqdm=True,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=kind(settings),
            reward_funcs=lambda completions, **_: [float(len(set(said))) for said in completions],
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": f"{i}+{i}="} for i in range(10, 30)]),
            processing_class=tokenizer,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        if watched:
            trainer.add_callback(GradientCosines(trainer, domains(), every=2))
        trainer.train()
        runs.append(trainer)
    bare, seen = runs
    assert bit_identical(bare, seen)
    means = [[(e["step"], e["reward"]) for e in run.state.log_history if "reward" in e] for run in runs]
    assert means[0] == means[1]
    assert len(means[0]) == 1  # of all three steps
    assert [entry["step"] for entry in seen.state.log_history if "gradient_cosine/a-b" in entry] == [2]
