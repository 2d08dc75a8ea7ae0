"""Token by token: the probabilities are those of a plain forward pass of each model, and the page shows them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mutants import dies
from test_report_page import Reader
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgery import DamageSelector, RandomSelector, Trajectory, load_prompts, rolled_back, save
from surgery.live.prompts import right_padded
from surgery.report import tokens as module
from surgery.report.page import Section, page
from surgery.report.tokens import Tokens, tokens

LAB = Path(__file__).parent.parent / "benchmarks/lab/seed0"
pytestmark = pytest.mark.skipif(not LAB.is_dir(), reason="the lab's checkpoints are not there")
LINES = [json.loads(line) for line in (LAB / "data/math.calibration.jsonl").read_text().splitlines()[:10]]


def run() -> Trajectory:
    return Trajectory.through({name: str(LAB / name) for name in ("code", "math", "qa")})


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(LAB / "qa")


def plain(folder: Path, tokenizer, line: dict[str, str]) -> tuple[list[float], list[str]]:
    """Of one prompt without padding: the probability of each response token, and the model's likeliest token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    asked = tokenizer(line["prompt"])["input_ids"]
    answer = [*tokenizer(line["response"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        chances = model(torch.tensor([asked + answer])).logits[0].float().softmax(-1)
    at = range(len(asked) - 1, len(asked) + len(answer) - 1)
    return [float(chances[t, token]) for t, token in zip(at, answer, strict=True)], [
        tokenizer.decode([int(chances[t].argmax())]) for t in at
    ]


def found(tokenizer, **settings) -> tuple[Tokens, Trajectory, object]:
    steps = run()
    prompts = load_prompts(LAB / "data/math.calibration.jsonl", tokenizer, batch_size=4, limit=len(LINES))
    mask = DamageSelector(0.3).select(steps, prompts)
    return tokens(steps, prompts, tokenizer, {"D": mask}, shown=len(LINES), **settings), steps, mask


def they_are_those_of_a_plain_forward_pass(tokenizer, folder: Path) -> None:
    told, steps, mask = found(tokenizer)
    if not (folder / "repaired").exists():
        save(rolled_back(steps.later, to=steps.earlier, mask=mask), folder / "repaired")
    assert told.models == ("math", "qa", "D")
    folders = (LAB / "math", LAB / "qa", folder / "repaired")
    by_prompt = {line["prompt"]: line for line in LINES}
    assert {one.prompt for one in told.prompts} == set(by_prompt)
    for one in told.prompts:
        line = by_prompt[one.prompt]
        assert "".join(one.tokens).startswith(line["response"])
        for at, place in enumerate(folders):
            chances, likeliest = plain(place, tokenizer, line)
            assert list(one.chances[at]) == pytest.approx(chances, abs=0.02), place  # padded sums of bfloat16
            for ours, theirs, chance in zip(one.likeliest[at], likeliest, chances, strict=True):
                assert ours == theirs or chance < 0.55


def test_probabilities_equal_a_plain_forward_pass(tokenizer, tmp_path):
    they_are_those_of_a_plain_forward_pass(tokenizer, tmp_path)


def test_mutants_die(tokenizer, tmp_path):
    real = module.predicting

    def shifted(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(module, "predicting", lambda model, batch: real(model, batch).roll(1, 0))

    def later_only(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(module, "rollback", lambda model, **_: module.evaluating(model))

    for mutant in (shifted, later_only):
        dies(mutant, lambda: they_are_those_of_a_plain_forward_pass(tokenizer, tmp_path))


def test_the_prompts_that_lost_most_come_first_and_the_counts_are_of_all(tokenizer):
    whole, _, _ = found(tokenizer)
    falls = [_fall(one) for one in whole.prompts]
    assert falls == sorted(falls, reverse=True)
    prompts = load_prompts(LAB / "data/math.calibration.jsonl", tokenizer, batch_size=3, limit=len(LINES))
    few = tokens(run(), prompts, tokenizer, {"random": RandomSelector(0.3).select(run())}, shown=2)
    assert few.prompts[0].prompt == whole.prompts[0].prompt
    assert len(few.prompts) == 2
    assert few.of == len(LINES)
    for at, told in enumerate(whole.counts):
        every = [(one.chances[0][t], one.chances[at][t]) for one in whole.prompts for t in range(len(one.tokens))]
        assert told.tokens == len(every)
        assert told.fell == sum(before - now >= 0.1 for before, now in every)
        assert told.rose == sum(now - before >= 0.1 for before, now in every)
        assert told.mean == pytest.approx(sum(now for _, now in every) / len(every), abs=1e-4)
    assert whole.counts[0].fell == whole.counts[0].rose == 0
    assert whole.counts[1].fell > whole.counts[2].fell  # D brings some back


def _fall(one) -> float:
    before, now = (torch.tensor(chances, dtype=torch.float64).log().mean() for chances in one.chances[:2])
    return float(before - now)


def test_padding_on_the_left_changes_nothing(tokenizer):
    (batch,) = load_prompts(LAB / "data/qa.calibration.jsonl", tokenizer, limit=16)
    left = {name: _left(batch["attention_mask"], value) for name, value in batch.items()}
    assert not torch.equal(left["input_ids"], batch["input_ids"])
    assert torch.equal(right_padded(left)["input_ids"], batch["input_ids"])
    one, other = (tokens(run(), [some], tokenizer, {}, shown=16) for some in (batch, left))
    assert one.models == ("math", "qa")
    assert [p.prompt for p in one.prompts] == [p.prompt for p in other.prompts]
    assert [p.chances for p in one.prompts] == [p.chances for p in other.prompts]


def _left(attended: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.stack([row.roll(int((mask == 0).sum())) for mask, row in zip(attended, value, strict=True)])


def test_the_page_shows_every_token_with_each_model_s_probability(tokenizer):
    told, _, _ = found(tokenizer)
    evil = replace(told.prompts[0], prompt="<script>alert(1)</script>", tokens=("<u>", *told.prompts[0].tokens[1:]))
    text = page("t", [], [Section("s", "", "", tokens=replace(told, prompts=(evil, *told.prompts[1:])))], {}, {})
    reader = Reader(text)
    assert len(reader.of("script")) == 1
    assert "<u>" not in text
    boxes = [one for _, one in reader.tags if one.get("class") == "token"]
    assert len(boxes) == sum(len(one.tokens) for one in told.prompts)
    marked = [one for _, one in reader.tags if one.get("class") in ("fell", "rose")]
    assert len(marked) == sum(
        abs(chance - before) >= 0.1
        for one in told.prompts
        for chances in one.chances
        for chance, before in zip(chances, one.chances[0], strict=True)
    )


def test_percents_never_say_certain_or_never():
    assert [module.percent(x) for x in (0.0, 0.004, 0.0051, 0.5, 0.994, 0.996, 1.0)] == [
        "<1", "<1", "1", "50", "99", ">99", ">99",
    ]  # fmt: skip
