"""How prompts are grouped for a pass over a model does not change what is found, and bounds what a pass takes."""

from __future__ import annotations

import random

import pytest
import torch
from families import pair
from test_scores import batches
from torch import Tensor, nn

from surgery import DamageSelector, Trajectory, activation, damage, likelihood
from surgery.live import distillation, prompts
from surgery.live.losses import cross_entropy, mean_loss, tokens_in
from surgery.live.prompts import passes, right_padded
from surgery.scores import entry_gains, reversal_cost

DATA = batches(labels=True)


def ragged(seed: int = 0, left: bool = False) -> list[dict[str, Tensor]]:
    """Batches of 1 to 5 prompts of 3 to 20 tokens, padded with what is no padding token."""
    rng, found = random.Random(seed), []
    for _ in range(6):
        rows = [[rng.randrange(1, 60) for _ in range(rng.randrange(3, 21))] for _ in range(rng.randrange(1, 6))]
        width = max(map(len, rows)) + rng.randrange(3)
        batch = {
            "input_ids": torch.full((len(rows), width), 7),
            "attention_mask": torch.zeros(len(rows), width, dtype=torch.long),
            "labels": torch.full((len(rows), width), -100),
        }
        for at, row in enumerate(rows):
            start = width - len(row) if left else 0
            where = slice(start, start + len(row))
            batch["input_ids"][at, where], batch["attention_mask"][at, where] = torch.tensor(row), 1
            batch["labels"][at, start + 2 : start + len(row)] = torch.tensor(row[2:])
        found.append(batch)
    return found


def plain(batches: list[dict[str, Tensor]]) -> list[tuple[list[int], list[int]]]:
    """Each prompt's tokens and labels."""
    rows = []
    for batch in map(right_padded, batches):
        for at, mask in enumerate(batch["attention_mask"].bool()):
            rows.append((batch["input_ids"][at, mask].tolist(), batch["labels"][at, mask].tolist()))
    return rows


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("tokens", [1, 16, 50, 4096])
def test_the_prompts_are_the_same_ones_and_no_pass_is_larger(left, tokens, monkeypatch):
    monkeypatch.setattr(prompts, "TOKENS", tokens)
    given = ragged(left=left)
    groups, order = passes(given)
    want = plain(given)
    assert plain(groups) == [want[at] for at in order]
    assert sorted(order) == list(range(len(want)))
    for group in groups:
        rows, width = group["input_ids"].shape
        assert rows * width <= tokens or rows == 1
        assert bool(group["attention_mask"][:, -1].any())  # no wider than its longest
    assert len(groups) == 1 or tokens < 4096
    lengths = [len(ids) for ids, _ in plain(groups)]
    assert lengths == sorted(lengths)
    waste = sum(group["attention_mask"].numel() for group in groups) / sum(lengths)
    assert tokens == 4096 or waste < 1.3


def test_batches_that_hold_more_stay_as_they_are():
    more = [{**batch, "names": torch.zeros(len(batch["input_ids"]))} for batch in DATA]
    assert passes(more) == (more, list(range(sum(len(batch["input_ids"]) for batch in more))))
    mixed = [DATA[0], {name: value for name, value in DATA[1].items() if name != "labels"}]
    assert passes(mixed)[0] == mixed
    assert passes([]) == ([], [])


def test_batches_without_a_mask_are_attended_whole():
    whole = [{"input_ids": torch.randint(60, (2, 5))}, {"input_ids": torch.randint(60, (3, 4))}]
    groups, order = passes(whole)
    assert order == [2, 3, 4, 0, 1]
    assert int(groups[0]["attention_mask"].sum()) == 2 * 5 + 3 * 4


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_scores_do_not_depend_on_the_grouping(family, left, monkeypatch):
    earlier, later = pair(family)
    run, data = Trajectory(earlier=earlier, later=later), ragged(left=left)
    asked = {
        "D": lambda: damage(run, data),
        "cost": lambda: reversal_cost(run, data),
        "A": lambda: activation(later, data),
    }
    for what, ask in asked.items():
        found = []
        for tokens in (40, 4096):
            monkeypatch.setattr(prompts, "TOKENS", tokens)
            found.append(ask())
        for name, values in found[0].items():
            scale = float(values.abs().max())
            torch.testing.assert_close(values, found[1][name], rtol=1e-3, atol=1e-4 * scale, msg=f"{what} {name}")


def test_likelihoods_come_in_the_order_of_the_prompts(monkeypatch):
    _, model = pair("llama")
    data = ragged()
    one_by_one = []
    for ids, labels in plain(data):
        batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
        with torch.no_grad():
            one_by_one.append(-float(cross_entropy(model, batch)))
    for tokens in (1, 40, 4096):
        monkeypatch.setattr(prompts, "TOKENS", tokens)
        assert likelihood({"math": data})(model)["math"] == pytest.approx(one_by_one, abs=1e-4)


def test_a_prompt_of_which_no_token_counts_stands_in_no_way(monkeypatch):
    """Beside others it never did; alone in a pass it would have been refused."""
    monkeypatch.setattr(prompts, "TOKENS", 1)
    earlier, later = pair("llama")
    data = ragged()
    data[0]["labels"][0] = -100
    DamageSelector(0.1).select(Trajectory(earlier=earlier, later=later), data)


def test_a_pass_over_many_prompts_takes_no_more_than_one_over_few(monkeypatch):
    """The largest tensor that a layer makes."""
    monkeypatch.setattr(prompts, "TOKENS", 64)
    earlier, later = pair("llama")
    seen: list[int] = []
    for model in (earlier, later):
        model.get_submodule("model.layers.0").register_forward_hook(
            lambda _m, _a, out: seen.append((out[0] if isinstance(out, tuple) else out).shape[:-1].numel())
        )
    large = {name: value[:1].repeat(64, 1) for name, value in DATA[0].items()}
    damage(Trajectory(earlier=earlier, later=later), [large])
    assert max(seen) <= 64


@pytest.mark.parametrize("divergence", ["kl", "hellinger"])
def test_a_batch_that_does_not_fit_is_asked_about_in_parts(divergence, monkeypatch):
    """Its distance is the same, in whatever way it is asked for; at the earlier model, there is none."""
    earlier, later = pair("llama")
    data = ragged()
    whole = distillation(earlier, data, divergence=divergence)
    want = [float(whole(later, batch).detach()) for batch in data]
    monkeypatch.setattr(prompts, "TOKENS", 30)
    parts = list(prompts.fitting(data))
    assert len(parts) > len(data)
    assert plain(parts) == plain(data)
    assert all(part["input_ids"].numel() <= 30 or len(part["input_ids"]) == 1 for part in parts)
    loss = distillation(earlier, data, divergence=divergence)
    assert [float(loss(later, batch).detach()) for batch in data] == pytest.approx(want, rel=1e-4)
    mean = sum(tokens_in([batch]) * value for batch, value in zip(data, want, strict=True)) / tokens_in(data)
    assert mean_loss(loss, later, data) == pytest.approx(mean, rel=1e-4)
    assert mean_loss(loss, earlier, data) == 0
    run = Trajectory(earlier=earlier, later=later)
    for name, values in damage(run, data, loss=divergence).items():
        torch.testing.assert_close(damage(run, data, loss=loss)[name], values, rtol=1e-3, atol=1e-5)
    assert entry_gains(run, data, loss=loss).value == pytest.approx(mean, rel=1e-4)


def test_a_loss_of_ones_own_gets_the_batches_as_they_were_made(monkeypatch):
    monkeypatch.setattr(prompts, "TOKENS", 30)
    earlier, later = pair("llama")
    seen: list[int] = []

    def own(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        seen.append(id(batch))
        return cross_entropy(model, batch)

    data = ragged()
    damage(Trajectory(earlier=earlier, later=later), data, loss=own)
    assert seen == list(map(id, data))
