"""A judged training is the same training; a repaired one is ``rollback`` with the mask that was written."""

from __future__ import annotations

import copy
import json
import random
from contextlib import nullcontext
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import REPRESENTATIVES, build
from mutants import dies
from peft import LoraConfig, get_peft_model
from small_lab import SEED0
from test_gradient_callback import bit_identical, model_with_dropout
from torch import nn

from benchmarks.lab.tokenizer import build_tokenizer
from surgery import Checkpoint, DamageSelector, Trajectory, likelihood, load_prompts, rollback, rolled_back
from surgery.live import respond
from surgery.live.prompts import Batch, halved
from surgery.masks import load_mask
from surgery.masks.mask import Mask
from surgery.training import RollbackCallback, moments, stages

transformers = pytest.importorskip("transformers")

CHOICE: dict[str, Any] = dict(selector=DamageSelector(0.1, units="mlp"), budgets=[0.3, 1.0], recovery=0.05)
SINGLE: dict[str, Any] = dict(
    selector=DamageSelector(0.1, units=("mlp", "weight"), rounds=1), budgets=[0.02, 0.3], recovery=0.02
)


def asked(model: nn.Module, seed: int = 5, count: int = 16) -> list[Batch]:
    """Prompts with the model's own answers, of which any training costs it some."""
    ids = torch.randint(3, 64, (count, 5), generator=torch.Generator().manual_seed(seed))
    bare = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    return respond(model, bare, max_new_tokens=4, temperature=0)


def training(
    place: Path, model: nn.Module, callback: RollbackCallback | None = None, steps: int = 4, rate: float = 1e-2,
    rows: Any = None, **settings: Any,
) -> Any:  # fmt: skip
    """A short training on other sequences, saved at every second step."""
    torch.manual_seed(1)
    other = torch.randint(3, 64, (32, 9))
    how = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True, **settings}
    arguments = transformers.TrainingArguments(
        output_dir=str(place), max_steps=steps, per_device_train_batch_size=4, learning_rate=rate, report_to="none",
        disable_tqdm=True, use_cpu=True, seed=3, **how,
    )  # fmt: skip
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in other]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=rows)
    trainer.remove_callback(transformers.PrinterCallback)
    if callback is not None:
        trainer.add_callback(callback)
    trainer.train()
    return trainer


def drawn() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


def judging(earlier: Any, domains: Any = None, **settings: Any) -> RollbackCallback:
    return RollbackCallback(
        domains or {"old": asked(earlier)}, earlier=earlier, say=lambda _: None, **{**CHOICE, **settings}
    )


def noisy(model: nn.Module) -> Any:
    """An evaluation that draws random numbers of every kind."""
    score = likelihood({"old": asked(model)})

    def evaluate(now: nn.Module) -> Any:
        torch.rand(3), random.random(), np.random.rand()
        return score(now)

    return evaluate


FAMILIES = ("llama", "phi3", "gpt2", "qwen2_moe")  # biased, fused, Conv1D, experts


def same_training(
    family: str, settings: dict[str, Any], place: Path, dtype: torch.dtype = torch.float32, **trainer: Any
) -> None:
    bare = training(place / "bare", model_with_dropout(family, dtype), **trainer)
    after_bare = drawn()
    before, how = model_with_dropout(family, dtype), {"when": settings["when"]}
    callback = judging(before, **how, **({"evaluate": noisy(before)} if "noisy" in settings else {}))
    seen = training(place / "seen", model_with_dropout(family, dtype), callback, **trainer)
    assert list(callback.measured) == ([2, 4] if settings["when"] == "save" else [4])
    assert all(stage.hurt == ("old",) for stage in callback.measured.values())
    assert drawn() == after_bare
    assert bit_identical(bare, seen)
    assert [m.training for m in bare.model.modules()] == [m.training for m in seen.model.modules()]
    assert all(p.grad is None and p.requires_grad for p in seen.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{"when": "save"}, {"when": "end"}, {"when": "save", "noisy": True}])
def test_a_judged_training_is_the_same_bit_for_bit(family, settings, tmp_path):
    same_training(family, settings, tmp_path)


@pytest.mark.parametrize(
    ("dtype", "trainer"),
    [
        (torch.bfloat16, {}),
        (torch.float32, {"bf16": True}),
        (torch.float32, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}),
    ],
)
def test_whatever_the_precision(dtype, trainer, tmp_path):
    same_training("qwen3", {"when": "save"}, tmp_path, dtype, **trainer)


def test_the_best_checkpoint_gets_the_verdict_on_the_best_model(tmp_path):
    """At the end it is the one in memory."""
    rows = [{"input_ids": torch.arange(3, 12), "labels": torch.arange(3, 12)}]
    earlier, callback = build("qwen3"), judging(build("qwen3"))
    trainer = training(
        tmp_path, earlier, callback, rows=rows, rate=1.0, load_best_model_at_end=True, metric_for_best_model="loss",
        greater_is_better=True, eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    best = Path(trainer.state.best_model_checkpoint)
    assert [path.parent.name for path in tmp_path.glob("*/surgery")] == [best.name] == ["checkpoint-2"]


@pytest.mark.parametrize("mutant", ["draws", "modes", "repairs"])
def test_a_disturbed_training_is_seen(mutant, tmp_path):
    def planted(patch: pytest.MonkeyPatch) -> None:
        if mutant == "draws":
            patch.setattr(stages, "undisturbed", lambda _: nullcontext())
        elif mutant == "modes":
            patch.setattr(stages, "undisturbed", lambda model: nullcontext(model.eval()))
        else:
            patch.setattr(RollbackCallback, "__init__", partialmethod(RollbackCallback.__init__, repair=True))

    dies(planted, lambda: same_training("gpt2", {"when": "save", "noisy": True}, tmp_path))


class Watching(transformers.TrainerCallback):
    """The trained weights and moments right before and right after the callback, at each save."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]] = []

    def on_save(self, args: Any, state: Any, control: Any, **told: Any) -> None:
        named = dict(told["model"].named_parameters())
        kept = {
            name: {key: value.clone() for key, value in told["optimizer"].state[p].items()} for name, p in named.items()
        }
        self.seen.append(({name: p.detach().clone() for name, p in named.items()}, kept))


def edited(model: nn.Module, mask: Mask) -> dict[str, torch.Tensor]:
    """Which numbers of each tensor a mask reverts, by writing ones there through ``rollback`` itself."""
    blank, ones = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for p, q in zip(blank.parameters(), ones.parameters(), strict=True):
            p.zero_()
            q.fill_(1)
    rollback(blank, to=ones, mask=mask)
    return {name: p.detach().bool() for name, p in blank.named_parameters()}


def repairs_exactly(family: str, choice: dict[str, Any], place: Path) -> None:
    """Weights are those of ``rollback``; moments are zero exactly there, and as they were elsewhere."""
    earlier = build(family)
    callback = judging(earlier, when="save", repair=True, **choice)
    before, after = Watching(), Watching()

    class Both(transformers.TrainerCallback):
        def on_train_begin(self, *args: Any, **told: Any) -> None:
            callback.on_train_begin(*args, **told)

        def on_save(self, *args: Any, **told: Any) -> None:
            for one in (before, callback, after):
                one.on_save(*args, **told)

    trained = training(place, build(family), Both(), steps=2).model
    mask = load_mask(place / "checkpoint-2/surgery/mask.safetensors")
    (weights, kept), (now, left) = before.seen[0], after.seen[0]
    by_hand = build(family)
    by_hand.load_state_dict(weights, strict=False)
    rollback(by_hand, to=earlier, mask=mask)
    assert all(torch.equal(now[name], p) for name, p in by_hand.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in trained.named_parameters())
    there = edited(by_hand, mask)
    assert any(bool(part.any()) for part in there.values())
    for name, part in there.items():
        assert torch.equal(now[name][~part], weights[name][~part])
        for key in ("exp_avg", "exp_avg_sq"):
            assert not left[name][key][part].any(), (name, key)
            assert torch.equal(left[name][key][~part], kept[name][key][~part])
            assert not part.any() or kept[name][key][part].any()
        assert torch.equal(left[name]["step"], kept[name]["step"])


@pytest.mark.parametrize("family", REPRESENTATIVES["mlp"])
@pytest.mark.parametrize("choice", [CHOICE, SINGLE], ids=["neurons", "weights"])
def test_a_repair_is_the_rollback_that_was_written(family, choice, tmp_path):
    repairs_exactly(family, choice, tmp_path)


def forget_all(found: moments.Moments) -> None:
    for _, _, whole in found:
        whole.zero_()


@pytest.mark.parametrize(
    "mutant",
    [
        lambda patch: patch.setattr(stages, "forget", lambda _: None),
        lambda patch: patch.setattr(stages, "forget", lambda found: moments.forget(found[:-1])),
        lambda patch: patch.setattr(stages, "forget", forget_all),
        lambda patch: patch.setattr(moments, "MOMENTS", ("exp_avg",)),
        lambda patch: patch.setattr(stages, "rollback", lambda *_, **__: ""),
    ],
)
def test_a_wrong_repair_is_seen(mutant, tmp_path):
    dies(mutant, lambda: repairs_exactly("phi3", CHOICE, tmp_path))


def test_nothing_changed_is_not_hurt_and_nothing_is_written_but_the_verdict(tmp_path):
    said: list[str] = []
    earlier = build("qwen3")
    callback = RollbackCallback({"old": asked(earlier), "other": asked(earlier, 6)}, earlier=earlier, say=said.append)
    model = training(tmp_path, build("qwen3"), callback, rate=0.0).model
    (found,) = callback.measured.values()
    assert (found.hurt, found.mask, found.repaired) == ((), None, None)
    assert said[0].startswith("step 4: The stage hurt no domain. Not hurt: old, other.\nold: not hurt: old lost 0.0000")
    assert sorted(path.name for path in (tmp_path / "checkpoint-4/surgery").iterdir()) == ["stage.json", "verdict.txt"]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), earlier.parameters(), strict=True))


def test_every_domain_has_its_verdict_and_one_mask_repairs_them(tmp_path):
    """The second repair starts from the first: what the union does is what was measured last."""
    earlier, rows = build("llama"), []
    domains = {"one": asked(earlier), "two": asked(earlier, 6)}
    callback = judging(earlier, domains, repair=True, limit=5.0, log=rows.append)
    model = training(tmp_path, build("llama"), callback).model
    found = callback.measured[4]
    assert found.hurt == ("one", "two")
    later = training(tmp_path / "again", build("llama")).model
    rollback(later, to=earlier, mask=load_mask(tmp_path / "checkpoint-4/surgery/mask.safetensors"))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), later.parameters(), strict=True))
    measure = likelihood({name: halved(batches, 1) for name, batches in domains.items()})
    scores = {name: float(np.mean(items)) for name, items in measure(later).items()}
    assert found.repaired.metrics == pytest.approx(scores, abs=1e-5)
    told = json.loads((tmp_path / "checkpoint-4/surgery/stage.json").read_text())
    assert told["scores"]["repaired"] == found.repaired.metrics
    assert (told["step"], told["hurt"]) == (4, ["one", "two"])
    assert rows == [{"step": 4, **found.logged()}]
    assert rows[0]["hurt/one"] == 1
    assert rows[0]["lost/two"] == pytest.approx(rows[0]["earlier/two"] - rows[0]["later/two"])
    assert rows[0]["lost_low/one"] <= rows[0]["lost/one"] <= rows[0]["lost_high/one"]
    assert rows[0]["repaired/one"] == found.repaired.metrics["one"]
    verdict = (tmp_path / "checkpoint-4/surgery/verdict.txt").read_text()
    assert verdict.startswith("The stage hurt one, two.\none: hurt, can be repaired: one lost ")
    assert "In the model that was trained: rolled back " in verdict
    assert "exp_avg, exp_avg_sq of the optimiser were set to zero there." in verdict


def test_the_earlier_model_is_the_one_that_training_began_with(tmp_path):
    """The folder that the model was loaded from, also for a training that goes on from a checkpoint."""
    kind: Any = type(build("qwen3"))
    build("qwen3").save_pretrained(tmp_path / "math")
    prompts = {"old": asked(build("qwen3"))}
    found = []
    for settings in ({}, {"earlier": tmp_path / "math"}, {"earlier": build("qwen3")}):
        callback = RollbackCallback(prompts, say=lambda _: None, **CHOICE, **settings)
        training(tmp_path / "out", kind.from_pretrained(tmp_path / "math"), callback)
        found.append(callback.measured[4])
    assert found[0].earlier.metrics == found[1].earlier.metrics == found[2].earlier.metrics
    assert found[0].mask.equal(found[1].mask)
    resumed = RollbackCallback(prompts, say=lambda _: None, **CHOICE)
    model = kind.from_pretrained(tmp_path / "math")
    training(tmp_path / "whole", kind.from_pretrained(tmp_path / "math"), save_only_model=False)
    state = transformers.TrainerState(global_step=2)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    resumed.on_train_begin(transformers.TrainingArguments(str(tmp_path), use_cpu=True), state, None, model=model)
    assert resumed.earlier == tmp_path / "math"


def test_a_callback_that_is_used_again_begins_anew(tmp_path):
    """With the second training's own start, and its answers to prompts that have none."""
    kind: Any = type(build("qwen3"))
    ids = asked(build("qwen3"))[0]["input_ids"][:, :5]
    callback = RollbackCallback({"old": [{"input_ids": ids}]}, say=lambda _: None, **CHOICE)
    for seed, name in enumerate(("math", "code")):
        build("qwen3", seed=seed).save_pretrained(tmp_path / name)
        training(tmp_path / "out", kind.from_pretrained(tmp_path / name), callback)
        assert callback.earlier == tmp_path / name
        (answers,) = callback.domains["old"]
        (own,) = respond(build("qwen3", seed=seed), [{"input_ids": ids}])
        assert torch.equal(answers["labels"], own["labels"])


def test_what_the_training_cannot_be_judged_by_is_told_before_it_begins(tmp_path):
    earlier = build("qwen3")
    prompts = {"old": asked(earlier)}
    kind: Any = type(earlier)
    earlier.save_pretrained(tmp_path / "math")
    moved = kind.from_pretrained(tmp_path / "math")
    with torch.no_grad():
        moved.lm_head.weight.add_(1)
    gone = kind.from_pretrained(tmp_path / "math")
    gone.config._name_or_path = gone.name_or_path = str(tmp_path / "gone")
    adapted = get_peft_model(build("qwen3"), LoraConfig(target_modules=["up_proj"]))
    moved_base = copy.deepcopy(earlier)
    with torch.no_grad():
        moved_base.model.layers[0].mlp.gate_proj.weight.add_(1)
    for model, settings, message in (
        (build("qwen3"), {}, "was not loaded from a folder, so nothing is known of its start: pass RollbackCallback"),
        (gone, {}, "was loaded from is gone"),
        (moved, {}, "has other weights than .*math, which it was loaded from"),
        (build("qwen3"), {"earlier": build("llama")}, "different models|has no tensor|lacks"),
        (build("qwen3"), {"earlier": tmp_path / "none"}, "there is no folder"),
        (adapted, {"earlier": moved_base, "repair": True}, "is not the base of the live PeftModel.* raise the rank"),
    ):
        callback = RollbackCallback(prompts, **settings)
        with pytest.raises((ValueError, LookupError), match=message):
            training(tmp_path / "out", model, callback)
    with pytest.raises(ValueError, match="training runs in 2 processes"):
        RollbackCallback(prompts, earlier=earlier).on_train_begin(type("Two", (), {"world_size": 2}), None, None)


def test_an_adapter_in_training_is_judged_and_repaired(tmp_path):
    """Judged, it is the same training; repaired, its own matrices hold what a rollback of the saved adapter holds."""
    family = "qwen2_moe"
    build(family).save_pretrained(tmp_path / "base")
    kind: Any = type(build(family))

    def tuned() -> Any:
        torch.manual_seed(2)
        base = kind.from_pretrained(tmp_path / "base")
        experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        return get_peft_model(base, LoraConfig(lora_alpha=64, target_modules=targets, target_parameters=experts))

    how: dict[str, Any] = dict(rate=0.3, steps=6, save_only_model=False)
    bare = training(tmp_path / "bare", tuned(), **how)
    domains, given = {"old": asked(build(family))}, {**CHOICE, "selector": None, "say": lambda _: None}
    judged = RollbackCallback(domains, **given)
    assert bit_identical(bare, training(tmp_path / "seen", tuned(), judged, **how))
    callback = RollbackCallback(domains, repair=True, **given)
    model = training(tmp_path / "done", tuned(), callback, **how).model
    assert callback.earlier == tmp_path / "base"
    (stage,) = callback.measured.values()
    assert stage.mask is not None
    assert stage.mask.equal(judged.measured[6].mask)
    assert "In the model that was trained: rolled back" in stage.verdict
    place = tmp_path / "done/checkpoint-6"
    view = rolled_back(place, to=tmp_path / "base", mask=load_mask(place / "surgery/mask.safetensors"))
    model.save_pretrained(tmp_path / "out")
    found, expected = Checkpoint(tmp_path / "out"), dict(view)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert any(not torch.equal(Checkpoint(place)[name], value) for name, value in expected.items())


def test_settings_that_cannot_be_meant():
    one = [{name: value[:1] for name, value in batch.items()} for batch in asked(build("qwen3"))]
    for domains, settings, message in (
        ({}, {}, "expected prompts by domain"),
        (asked(build("qwen3")), {}, "expected prompts by domain"),
        ({"old": []}, {}, "the domain 'old' has 0 prompts"),
        ({"old": one}, {}, "the domain 'old' has 1 prompts"),
        ({"old": "math.jsonl"}, {}, "read the file first"),
        ({"old": asked(build("qwen3"))}, {"when": "step"}, "when='step': expected"),
    ):
        with pytest.raises(ValueError, match=message):
            RollbackCallback(domains, **settings)


def test_a_training_that_saved_nothing_says_so(tmp_path):
    with pytest.warns(UserWarning, match="the stage was never measured, because no checkpoint was saved"):
        training(tmp_path, build("qwen3"), judging(build("qwen3"), when="save"), save_strategy="no")


def test_without_a_saved_step_the_verdict_lies_in_the_trainers_folder(tmp_path):
    training(tmp_path, build("qwen3"), judging(build("qwen3")), save_strategy="no")
    assert (tmp_path / "surgery/verdict.txt").is_file()
    training(tmp_path, build("qwen3"), judging(build("qwen3")), save_strategy="no", rate=0.0)
    assert not (tmp_path / "surgery/mask.safetensors").exists()  # that of the first training is gone


class Averaged(torch.optim.SGD):
    """Keeps an average of the weights, as schedule-free optimisers do."""

    def step(self, closure: Any = None) -> Any:
        found = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["z"] = p.detach().clone()
        return found


class OnCopies(torch.optim.SGD):
    """Steps on copies of the weights, as mixed-precision optimisers do, and writes them back."""

    def __init__(self, parameters: Any, lr: float) -> None:
        self.own = list(parameters)
        super().__init__([p.detach().clone().requires_grad_() for p in self.own], lr=lr)

    def step(self, closure: Any = None) -> Any:
        copies = self.param_groups[0]["params"]
        for copied, p in zip(copies, self.own, strict=True):
            copied.grad = p.grad
        found = super().step(closure)
        with torch.no_grad():
            for copied, p in zip(copies, self.own, strict=True):
                p.copy_(copied)
        return found


@pytest.mark.parametrize(
    ("optimiser", "when", "told"),
    [
        (lambda p: torch.optim.SGD(p, lr=1.0), "save", "the optimiser was left as it is"),
        (
            lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.5),
            "save",
            "momentum_buffer of the optimiser were set",
        ),
        (lambda p: torch.optim.RMSprop(p, lr=0.01), "save", "square_avg of the optimiser were set to zero"),
        (
            lambda p: Averaged(p, lr=1.0),
            "save",
            "The model was not changed: the optimiser Averaged keeps 'z'",
        ),
        (lambda p: OnCopies(p, lr=1.0), "save", "The model was not changed: the optimiser OnCopies does not step on"),
        (lambda p: Averaged(p, lr=1.0), "end", "the optimiser was left as it is"),
    ],
)
def test_other_optimisers(optimiser, when, told, tmp_path):
    model = build("qwen3")
    callback = judging(build("qwen3"), when=when, repair=True)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to="none", disable_tqdm=True,
        use_cpu=True, save_steps=2, save_only_model=True,
    )  # fmt: skip
    rows = torch.randint(3, 64, (32, 9), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in rows]
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=data, callbacks=[callback],
        optimizers=(optimiser(model.parameters()), None),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    (found,) = callback.measured.values()
    assert told in found.verdict


def test_grpo_is_judged_without_a_trace_and_repaired(tmp_path):
    """TRL's trainer on the lab's Math: the same weights, moments and running means; repaired, the rollback written."""
    pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from trl import GRPOConfig, GRPOTrainer

    tokenizer, runs = build_tokenizer(), []
    prompts = {"math": load_prompts(SEED0 / "data/math.calibration.jsonl", tokenizer, limit=32)}
    for name, how in (("bare", None), ("seen", {"when": "save"}), ("repaired", {"repair": True})):
        arguments = GRPOConfig(
            output_dir=str(tmp_path / name), seed=1, max_steps=4, learning_rate=3e-3, per_device_train_batch_size=8,
            num_generations=4, max_completion_length=3, use_cpu=True, bf16=False, gradient_checkpointing=False,
            save_steps=2, save_only_model=True, report_to="none", logging_steps=4, disable_tqdm=True,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=Trajectory(later=SEED0 / "math").load(dtype=torch.float32),
            reward_funcs=lambda completions, **_: [float(len(set(said))) for said in completions],
            args=arguments,
            train_dataset=datasets.Dataset.from_list([{"prompt": f"{i}+{i}="} for i in range(10, 30)]),
            processing_class=tokenizer,
            callbacks=[] if how is None else [RollbackCallback(prompts, say=lambda _: None, **{**CHOICE, **how})],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        runs.append(trainer)
    bare, seen, repaired = runs
    assert bit_identical(bare, seen)
    means = [[(e["step"], e["reward"]) for e in run.state.log_history if "reward" in e] for run in runs]
    assert means[0] == means[1] == means[2]
    mask = load_mask(tmp_path / "repaired/checkpoint-4/surgery/mask.safetensors")
    rollback(bare.model, to=SEED0 / "math", mask=mask)
    assert all(torch.equal(p, q) for p, q in zip(bare.model.parameters(), repaired.model.parameters(), strict=True))
