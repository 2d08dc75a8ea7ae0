"""Two stages whose vocabularies are of two sizes, padded or extended: what both have is compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import pair
from test_scores import batches
from torch import nn

from surgery import AMCSelector, DamageSelector, Trajectory, rollback, sweep
from surgery.live.answers import respond
from surgery.live.earlier import earlier_model
from surgery.live.losses import distillation
from surgery.measure.evaluators import likelihood
from surgery.scores.damage import damage, earlier_answers

SIZES = [(64, 80), (80, 64)]  # of the earlier and the later model; the prompts' tokens are below 64


def resized(model: Any, count: int) -> Any:
    """A model of more tokens; the new ones are as likely as the old."""
    if count != model.config.vocab_size:
        model.resize_token_embeddings(count)
        with torch.no_grad():
            for table in (model.get_input_embeddings(), model.get_output_embeddings()):
                table.weight[64:] = torch.randn(count - 64, 32)
    return model


def stages(folder: Path, earlier: int, later: int) -> Trajectory:
    for name, model, count in zip(("earlier", "later"), pair("qwen3"), (earlier, later), strict=True):
        resized(model, count).save_pretrained(folder / name)
    return Trajectory(earlier=folder / "earlier", later=folder / "later")


@pytest.mark.parametrize("divergence", ["kl", "hellinger"])
@pytest.mark.parametrize(("earlier", "later"), SIZES)
def test_predictions_are_compared_over_the_tokens_that_both_have(divergence, earlier, later):
    """Value and gradient are those of the two models cut to them."""
    first, second = pair("qwen3")
    whole = {"earlier": resized(first, earlier), "later": resized(second, later)}
    data = batches(labels=True)

    def measured(one: nn.Module, other: nn.Module) -> tuple[float, torch.Tensor]:
        other.zero_grad()
        value = distillation(one, data, divergence=divergence)(other, data[0])
        value.backward()
        return float(value.detach()), other.model.layers[0].mlp.up_proj.weight.grad.clone()

    value, slope = measured(**{"one": whole["earlier"], "other": whole["later"]})
    for model in whole.values():
        model.resize_token_embeddings(64)
    cut, other = measured(whole["earlier"], whole["later"])
    assert value == pytest.approx(cut, rel=1e-5)
    assert torch.allclose(slope, other, rtol=1e-4, atol=1e-7)
    assert value > 1e-3


@pytest.mark.parametrize("labels", [True, False], ids=["with responses", "without"])
@pytest.mark.parametrize(("earlier", "later"), SIZES)
@pytest.mark.filterwarnings("ignore:.*(another vocabulary|another configuration)")
def test_every_score_of_two_stages_works(earlier, later, labels, tmp_path):
    run, data = stages(tmp_path, earlier, later), batches(labels=labels)[:1]
    for selector in (DamageSelector(0.1, units="mlp"), AMCSelector(0.1, "AM", "AM")):
        assert sum(selector.select(run, data).count().values())
    measured = likelihood({"math": batches(labels=True)[:1]})
    row = sweep(run, data, selectors=[], budgets=[], evaluate=measured).rows[0]
    own = measured(Trajectory(later=run.earlier).load())["math"]
    assert row.metrics["math"] == pytest.approx(sum(own) / len(own))


@pytest.mark.filterwarnings("ignore:.*(another vocabulary|another configuration)")
def test_the_earlier_model_answers_in_tokens_that_the_later_one_has(tmp_path):
    run, data = stages(tmp_path, 80, 64), batches(labels=False)
    answers = earlier_answers(run, data)
    assert max(int(batch["input_ids"].max()) for batch in answers) < 64
    with earlier_model(run) as earlier:
        free, held = respond(earlier, data), respond(earlier, data, path=tmp_path / "a.jsonl", tokens=64)
    assert max(int(batch["input_ids"].max()) for batch in free) >= 64
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(held, answers, strict=True))
    with earlier_model(run) as earlier, pytest.raises(ValueError, match="was made with"):
        respond(earlier, data, path=tmp_path / "a.jsonl", tokens=60)


@pytest.mark.filterwarnings("ignore:.*(another vocabulary|another configuration)")
def test_prompts_of_tokens_that_the_earlier_model_lacks_are_refused(tmp_path):
    run, data = stages(tmp_path, 64, 80), batches(labels=True)
    data[0]["input_ids"][0, 0] = 70
    with pytest.raises(ValueError, match=r"hold token 70 .* and the model has 64 of them: .* a stage with more tokens"):
        damage(run, data)


def test_both_sizes_and_the_price_are_told(tmp_path):
    run = stages(tmp_path, 80, 64)
    with (
        pytest.warns(UserWarning, match="another vocabulary, or another padding of it"),
        pytest.warns(UserWarning, match=r"vocab_size \(80 there, 64 here\)"),
        earlier_model(run),
    ):
        pass
    with pytest.warns(UserWarning, match="another vocabulary"):
        rollback(run.load(), to=run.earlier, mask=AMCSelector(0.1, "M", "M").select(run)).undo()
