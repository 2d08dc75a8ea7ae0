"""The history of domains over checkpoints: likelihoods by hand, losses and their stages, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from families import build
from torch import nn

from surgery import Trajectory, likelihood
from surgery.live.prompts import padded
from surgery.measure import History, history

PAIRS = [([5, 6, 7], [8, 9, 2]), ([3, 4], [10, 2]), ([11, 12, 13, 14], [15, 2])]


def by_hand(model: nn.Module, prompt: list[int], response: list[int]) -> float:
    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        logp = model(input_ids=ids).logits.double().log_softmax(-1)[0]
    places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    return sum(float(logp[at, ids[0, at + 1]]) for at in places) / len(response)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_likelihood_is_the_mean_of_each_response_whatever_it_is_padded_with(family):
    model = build(family)
    expected = [by_hand(model, *pair) for pair in PAIRS]
    for batches in ([padded(PAIRS, 0)], [padded([pair], 0) for pair in PAIRS]):
        assert likelihood({"math": batches})(model)["math"] == pytest.approx(expected, rel=1e-4)


def test_likelihood_counts_no_prompt_token_and_leaves_the_model_as_it_was():
    model, batch = build("llama").train(), padded(PAIRS, 0)
    likelihood({"math": [batch]})(model)
    assert model.training
    unlabelled = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert likelihood({"math": [unlabelled]})(model) != likelihood({"math": [batch]})(model)


def test_likelihood_refuses_what_it_can_not_score():
    with pytest.raises(ValueError, match="data of 'math' is empty"):
        likelihood({"math": []})
    with pytest.raises(ValueError, match="by domain"):
        likelihood({})
    batch = padded(PAIRS, 0)
    batch["labels"][1] = -100
    with pytest.raises(ValueError, match="1 prompts of a batch have no response token"):
        likelihood({"math": [batch]})(build("llama"))


class Staged(nn.Module):
    """A model whose scores are written on it."""

    def __init__(self, **scores: list[float]) -> None:
        super().__init__()
        self.scores = scores


def told(**stages: dict[str, list[float]]) -> History:
    models = {name: Staged(**scores) for name, scores in stages.items()}
    return history(Trajectory.through(models), lambda model: model.scores)


ITEMS = [0.9, 0.8, 0.95, 0.85, 0.9, 0.7]


def test_a_loss_counts_from_the_domains_own_stage_and_names_the_costliest_step():
    found = told(
        base={"math": [0.99] * 6, "qa": [0.1] * 6},
        math={"math": ITEMS, "qa": [0.2] * 6},
        qa={"math": [x - 0.3 for x in ITEMS], "qa": [0.9] * 6},
        cw={"math": [x - 0.4 for x in ITEMS], "qa": [0.9] * 6},
    )
    math, qa = found.lost
    assert (math.domain, math.best, math.last, math.at) == ("math", "math", "cw", "qa")
    assert math.amount == pytest.approx(0.4)
    assert math.step == pytest.approx(0.3)
    assert math.certain
    assert (qa.domain, qa.best) == ("qa", "qa")
    assert qa.amount == pytest.approx(0)
    assert not qa.certain
    assert found.scores["math"] == pytest.approx([0.99, 0.85, 0.55, 0.45])


def test_without_a_stage_of_its_name_a_domain_counts_from_its_best():
    found = told(a={"law": [0.2] * 6}, b={"law": [0.8] * 6}, c={"law": [0.5] * 6})
    assert (found.lost[0].best, found.lost[0].at) == ("b", "c")
    assert found.lost[0].amount == pytest.approx(0.3)


def test_a_gain_is_no_certain_loss():
    found = told(a={"law": [0.2] * 6}, b={"law": [0.8] * 6})
    assert found.lost[0].amount < 0
    assert not found.lost[0].certain


def test_it_prints_and_is_saved(tmp_path):
    found = told(a={"law": [0.2] * 6}, b={"law": [0.1] * 6})
    assert "what was lost" in str(found)
    found.save(tmp_path / "history.json")
    saved = json.loads((tmp_path / "history.json").read_text())
    assert saved["kind"] == "History"
    assert saved["scores"]["law"] == pytest.approx([0.2, 0.1])


def test_one_checkpoint_has_no_history():
    with pytest.raises(ValueError, match="two or more"):
        history(Trajectory(later=Staged(x=[1.0])), lambda model: model.scores)
