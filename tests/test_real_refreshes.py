"""What is trained instead of a rollback: on tiny models, that it learns, repeats, and leaves the live model alone."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import build
from mutants import dies
from test_gradient_baselines import setting  # noqa: F401
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.pareto.baselines import differing
from benchmarks.pareto.changes import Setting, applied
from benchmarks.real import refreshes
from benchmarks.real.refreshes import advantage, answers, distilled, reinforced, steps_for
from benchmarks.real.stages import Stage
from surgery.live import distillation, earlier_model
from surgery.live.losses import mean_loss

PAD, END = 0, 1
ITEMS = [{"prompt": f"{2 + at} {9 + at} 5", "response": str(20 + at % 2)} for at in range(16)]


class Words:
    """Numbers are tokens."""

    pad_token_id, eos_token_id = PAD, END

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def batch_decode(self, rows: Iterable[list[int]], skip_special_tokens: bool) -> list[str]:
        return [" ".join(str(one) for one in row if not (skip_special_tokens and one in (PAD, END))) for row in rows]


def tiny() -> nn.Module:
    """A model that says 20, 21 or 22 and stops."""
    model = build("llama", seed=0)
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    rows = torch.tensor([[*Words()(item["prompt"])["input_ids"], said, END] for item in ITEMS for said in (20, 21, 22)])
    for _ in range(30):
        logits = model(input_ids=rows[:, :-1]).logits[:, 2:]
        nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 3:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def probability(model: nn.Module) -> float:
    ids = torch.tensor([Words()(item["prompt"])["input_ids"] for item in ITEMS])
    with torch.no_grad():
        found = model(input_ids=ids).logits[:, -1].softmax(-1)
    return float(torch.stack([row[int(item["response"])] for row, item in zip(found, ITEMS, strict=True)]).mean())


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def check_it_learns() -> None:
    model = tiny()
    before, start = bits(model), probability(model)
    new = reinforced(model, Words(), "math", ITEMS, 6, rate=3e-3)
    assert differing(before, bits(model)) == 0
    model.load_state_dict(new, strict=False)
    assert probability(model) > start + 0.1


def test_grpo_learns_and_leaves_the_live_model_alone() -> None:
    check_it_learns()


def test_an_advantage_of_the_wrong_sign_is_noticed() -> None:
    dies(lambda patch: patch.setattr(refreshes, "advantage", lambda rewards: -advantage(rewards)), check_it_learns)


def test_grpo_is_repeatable_and_by_its_seed() -> None:
    model = tiny()
    one, again, other = (reinforced(model, Words(), "math", ITEMS, 2, rate=1e-3, seed=seed) for seed in (0, 0, 1))
    assert differing(one, again) == 0
    assert differing(one, other) > 0


def test_where_no_answer_is_better_than_another_nothing_is_learned() -> None:
    model = tiny()
    never = [{**item, "response": "40 40 40"} for item in ITEMS]
    assert differing(bits(model), reinforced(model, Words(), "math", never, 1)) == 0


def test_advantages_are_within_a_prompt() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    found = advantage(rewards)
    torch.testing.assert_close(found[0], torch.tensor([1.5, -0.5, -0.5, -0.5]), atol=1e-3, rtol=0)
    assert not bool(found[1:3].any())
    torch.testing.assert_close(found[3], torch.tensor([1, 1, -1, -1]) * 3**0.5 / 2, atol=1e-3, rtol=0)


def test_answers_end_with_their_end_and_do_not_depend_on_the_padding() -> None:
    model = tiny()
    torch.manual_seed(0)
    found = answers(model, Words(), ["2 9 5", "30 31 32 33 3 10 5"])
    assert [given for given, _ in found] == [[2, 9, 5]] * 4 + [[30, 31, 32, 33, 3, 10, 5]] * 4
    assert all(row[-1] == END or len(row) == refreshes.TOKENS for _, row in found)
    assert all(END not in row[:-1] for _, row in found)


def test_a_distilled_model_comes_near_the_earlier_one(setting: Setting) -> None:  # noqa: F811
    with earlier_model(setting.run) as earlier:
        loss = distillation(earlier, setting.data)
    before = mean_loss(loss, setting.model, setting.data)
    new = distilled(setting, 8, rate=1e-3)
    assert differing(setting.later, bits(setting.model)) == 0
    assert differing(new, distilled(setting, 8, rate=1e-3)) == 0
    with applied(setting, new):
        assert mean_loss(loss, setting.model, setting.data) < 0.7 * before


@pytest.mark.parametrize(("seconds", "step", "expected"), [(50.0, 5.0, (10, 40, 160)), (1.0, 8.0, (1, 1, 2))])
def test_prices_are_multiples_of_the_rollbacks(seconds: float, step: float, expected: tuple[int, ...]) -> None:
    assert steps_for(seconds, step) == expected


def test_what_is_trained_is_a_method_of_the_comparison(
    setting: Setting,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(refreshes, "read", lambda file: ITEMS)
    monkeypatch.setattr(refreshes.AutoTokenizer, "from_pretrained", lambda folder: Words())
    setting = replace(setting, metric="math", folder=tmp_path)
    with torch.no_grad():
        other = copy.deepcopy(setting.model)
        next(other.parameters()).add_(1)
    other.save_pretrained(tmp_path / "joint")
    by_kl, by_grpo, joint = refreshes.refreshes()
    for method in (by_kl, by_grpo):
        with applied(setting, method.change(setting, 1.0, 0)):
            assert set(bits(setting.model)) == set(setting.later)
    with applied(setting, joint.change(setting, 0.0, 0)):
        assert differing(bits(other), bits(setting.model)) == 0
    assert differing(setting.later, bits(setting.model)) == 0


def test_a_stage_trained_by_grpo_is_a_folder_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny().save_pretrained(tmp_path / "start")
    words = Words()
    words.save_pretrained = lambda folder: None  # type: ignore[attr-defined]
    monkeypatch.setattr(refreshes, "read", lambda file: ITEMS)
    monkeypatch.setattr(refreshes.AutoTokenizer, "from_pretrained", lambda folder: words)
    stage = Stage("start", ("math",), 6, 3e-3, reward=True)
    said: list[str] = []
    refreshes.reinforce(stage, tmp_path / "start", tmp_path / "out", tmp_path, 0, said.append)
    old, new = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("start", "out"))
    assert probability(new) > probability(old) + 0.1
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["out", "start"]
