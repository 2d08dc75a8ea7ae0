"""Answers of the earlier model: sampled with a seed, cut where they end, written once and read again."""

from __future__ import annotations

import errno
import gc
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from families import build
from test_scores import batches

from surgery import Trajectory, activation, damage, likelihood
from surgery.live import answers, distillation, respond
from surgery.live import losses as predictions

FEW = 6


def rows(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """Prompt and response of each row of a labelled batch."""
    found = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        attended, response = mask.bool(), labels != -100
        found.append((ids[attended & ~response].tolist(), ids[response].tolist()))
    return found


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "llama", "mixtral"])
def test_greedy_answers_are_the_models_own(family):
    model, asked = build(family), batches(labels=False)
    for batch, given in zip(asked, respond(model, asked, max_new_tokens=FEW, temperature=0), strict=True):
        for (prompt, response), ids, mask in zip(rows(given), batch["input_ids"], batch["attention_mask"], strict=True):
            assert prompt == ids[mask.bool()].tolist()
            said: list[int] = []
            while len(said) < FEW and 2 not in said:
                with torch.inference_mode():
                    said.append(int(model(input_ids=torch.tensor([prompt + said])).logits[0, -1].argmax()))
            assert response == said


def test_sampling_has_a_seed_and_leaves_torchs_own_alone():
    model, asked = build("qwen3"), batches(labels=False)
    torch.manual_seed(7)
    want = torch.rand(1)
    torch.manual_seed(7)
    first = respond(model, asked, max_new_tokens=FEW, seed=1)
    assert torch.equal(torch.rand(1), want)
    assert [rows(b) for b in first] == [rows(b) for b in respond(model, asked, max_new_tokens=FEW, seed=1)]
    assert [rows(b) for b in first] != [rows(b) for b in respond(model, asked, max_new_tokens=FEW, seed=2)]


def test_two_writers_of_one_file_both_end_well(tmp_path, monkeypatch):
    """The other one writes its whole file while the first has written its own, and not yet renamed it."""
    model, asked, path, write = build("qwen3"), batches(labels=False), tmp_path / "answers.jsonl", Path.write_text
    others = []

    def interrupted(self: Path, text: str, **how: str) -> int:
        size = write(self, text, **how)
        if not others:
            others.append(None)
            others.append(respond(model, asked, max_new_tokens=FEW, path=path))
        return size

    monkeypatch.setattr(Path, "write_text", interrupted)
    mine = respond(model, asked, max_new_tokens=FEW, path=path)
    again = respond(model, asked, max_new_tokens=FEW, path=path)
    assert [rows(batch) for batch in mine] == [rows(batch) for batch in others[1]] == [rows(batch) for batch in again]
    assert [one.name for one in tmp_path.iterdir()] == ["answers.jsonl"]


def test_the_answers_of_the_first_of_two_jobs_count(tmp_path, monkeypatch):
    """Of the same prompts both jobs have them; of other prompts the second is refused, and the first one's stay."""
    model, asked, generate = build("qwen3"), batches(labels=False), answers._generate
    for at, prompts in enumerate((asked, asked[:1])):
        path = tmp_path / f"{at}.jsonl"

        def beaten(*args, path=path, prompts=prompts):
            monkeypatch.setattr(answers, "_generate", generate)
            respond(model, prompts, max_new_tokens=FEW, path=path)
            return [[[1] for _ in rows] for rows in generate(*args)]

        monkeypatch.setattr(answers, "_generate", beaten)
        if prompts is asked:
            mine = respond(model, asked, max_new_tokens=FEW, path=path)
            theirs = respond(model, asked, max_new_tokens=FEW, path=path)
            assert [rows(batch) for batch in mine] == [rows(batch) for batch in theirs]
        else:
            with pytest.raises(ValueError, match="answers other prompts than these: choose another file"):
                respond(model, asked, max_new_tokens=FEW, path=path)
            respond(model, prompts, max_new_tokens=FEW, path=path)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["0.jsonl", "1.jsonl"]


def test_threads_get_the_answers_that_each_gets_alone():
    """One sequence of random numbers is the whole process's: they drew from each other's, and D was another."""
    asked, models = batches(labels=False), [build("qwen3") for _ in range(3)]
    alone = [rows(batch) for batch in respond(models[0], asked, max_new_tokens=FEW)]
    with ThreadPoolExecutor(len(models)) as threads:
        found = list(threads.map(lambda model: respond(model, asked, max_new_tokens=FEW), models))
    assert [[rows(batch) for batch in one] for one in found] == [alone] * len(models)


def test_samples_come_from_the_whole_distribution():
    """The first token's frequencies beside the model's probabilities, whatever its generation settings say."""
    model = build("qwen3")
    model.generation_config.top_k, model.generation_config.temperature = 1, 0.1
    model.generation_config.repetition_penalty, model.generation_config.min_p = 3.0, 0.9
    settings = model.generation_config
    prompt = {"input_ids": torch.tensor([[5, 9, 11]] * 4000), "attention_mask": torch.ones(4000, 3, dtype=torch.long)}
    (given,) = respond(model, [prompt], max_new_tokens=1)
    with torch.inference_mode():
        p = model(input_ids=torch.tensor([[5, 9, 11]])).logits[0, -1].softmax(-1)
    seen = torch.bincount(given["input_ids"][:, 3], minlength=64) / 4000
    assert float((seen - p).abs().sum()) < 0.12
    assert model.generation_config is settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: expected how many tokens"),
        ({"temperature": -1.0}, "temperature=-1.0: expected a number ≥ 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    """A temperature below 0 was greedy without a word."""
    with pytest.raises(ValueError, match=message):
        respond(build("qwen3"), batches(labels=False), **settings)


def test_a_model_without_a_head_is_told():
    with pytest.raises(ValueError, match=r"Qwen3Model can't answer prompts"):
        respond(build("qwen3").model, batches(labels=False))


def test_every_module_is_in_the_mode_that_it_was_in():
    """A part that its owner holds in eval mode while the rest trains stays so: for answers, scores and evaluations."""
    model, earlier = build("qwen3").train(), build("qwen3", seed=1)
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    asked, run = batches(labels=True), Trajectory(earlier=earlier, later=model)
    respond(model, batches(labels=False), max_new_tokens=2)
    assert [module.training for module in model.modules()] == modes
    activation(model, asked)
    assert [module.training for module in model.modules()] == modes
    distillation(model, asked)
    likelihood({"math": asked})(model)
    damage(run, asked)
    assert [module.training for module in model.modules()] == modes


def test_answered_batches_pass_through():
    model, answered = build("qwen3"), batches(labels=True)
    assert all(a is b for a, b in zip(respond(model, answered), answered, strict=True))


def test_answers_are_written_once_and_read_again(tmp_path, monkeypatch):
    model, asked, path = build("qwen3"), batches(labels=False), tmp_path / "answers" / "math.jsonl"
    first = respond(model, asked, max_new_tokens=FEW, path=path)
    monkeypatch.setattr(model, "generate", None)
    again = respond(model, asked, max_new_tokens=FEW, path=path)
    assert [rows(batch) for batch in first] == [rows(batch) for batch in again]
    assert [p.name for p in path.parent.iterdir()] == ["math.jsonl"]
    with pytest.raises(ValueError, match="made with"):
        respond(model, asked, max_new_tokens=FEW, seed=3, path=path)
    with pytest.raises(ValueError, match="other prompts"):
        respond(model, asked[:1], max_new_tokens=FEW, path=path)
    path.write_text(json.dumps({"prompt": "1+1="}) + "\n{")
    with pytest.raises(ValueError, match="not a file that respond"):
        respond(model, asked, max_new_tokens=FEW, path=path)


def test_a_file_has_the_answers_of_one_model(tmp_path):
    """Of another one it is refused; the same one in another dtype is the same, and what a file lacks is no match."""
    model, asked, path = build("qwen3"), batches(labels=False), tmp_path / "answers.jsonl"
    first = respond(model.bfloat16(), asked, max_new_tokens=FEW, path=path)
    again = respond(model.float(), asked, max_new_tokens=FEW, path=path)
    assert [rows(batch) for batch in first] == [rows(batch) for batch in again]
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.1)
    with pytest.raises(ValueError, match="another model"):
        respond(model, asked, max_new_tokens=FEW, path=path)
    head, *lines = path.read_text().splitlines()
    kept = {name: value for name, value in json.loads(head).items() if name != "model"}
    path.write_text("\n".join([json.dumps(kept), *lines]) + "\n")
    with pytest.raises(ValueError, match="another model"):
        respond(build("qwen3"), asked, max_new_tokens=FEW, path=path)


def test_a_full_disk_says_what_fills_it(monkeypatch, tmp_path):
    """The command line showed a traceback, and nothing said what takes the room."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(predictions, "_write", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(OSError, match=r"has no room for what the earlier model predicts .*No space left.* TMPDIR"):
        distillation(build("qwen3"), batches(labels=True))
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_that_fills_the_context_is_refused():
    full = {"input_ids": torch.ones(1, 64, dtype=torch.long), "attention_mask": torch.ones(1, 64, dtype=torch.long)}
    with pytest.raises(ValueError, match="leaves no room in a context of 64"):
        respond(build("qwen3"), [full])


def answers_file(path, change):
    """The model, its prompts, and a file of answers to them of which one line is another."""
    model, asked = build("qwen3"), batches(labels=False)
    respond(model, asked, max_new_tokens=FEW, path=path)
    head, first, *lines = path.read_text().splitlines()
    path.write_text("\n".join([head, change(first), *lines]))
    return model, asked


IDS = [None, {}, 3, "12", [1.0], [2.5], [True], ["1"], [None], [[1]], [-1], [10**400], [float("nan")]]
LINES = ["", "3", "null", "[]", "{", "[" * 100_000, '{"a":' * 500 + "1" + "}" * 500]


@pytest.mark.parametrize("name", ["prompt_ids", "response_ids"])
@pytest.mark.parametrize("ids", IDS)
def test_ids_in_a_file_are_natural_numbers(tmp_path, name, ids):
    """2.5 became the token 2."""
    changed = answers_file(tmp_path / "a.jsonl", lambda line: json.dumps({**json.loads(line), name: ids}))
    with pytest.raises(ValueError, match=rf'a\.jsonl is not a file that respond\(\) wrote: line 2: "{name}"'):
        respond(*changed, max_new_tokens=FEW, path=tmp_path / "a.jsonl")


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_a_file_is_an_object(tmp_path, line):
    changed = answers_file(tmp_path / "a.jsonl", lambda _: line)
    with pytest.raises(ValueError, match=r"a\.jsonl is not a file that respond\(\) wrote: line 2"):
        respond(*changed, max_new_tokens=FEW, path=tmp_path / "a.jsonl")


@pytest.mark.parametrize("ids", [[], [5] * (FEW + 1)])
def test_an_answer_is_as_long_as_the_settings_allow(tmp_path, ids):
    changed = answers_file(tmp_path / "a.jsonl", lambda line: json.dumps({**json.loads(line), "response_ids": ids}))
    with pytest.raises(ValueError, match=r"a\.jsonl is damaged: line 2 has no answer, or too long a one"):
        respond(*changed, max_new_tokens=FEW, path=tmp_path / "a.jsonl")


@pytest.mark.parametrize("raw", [b"", b"\n", b"\xff\xfe", b"[]\n", b"3\n", b'{"a": 1}\n'])
def test_a_file_of_something_else(tmp_path, raw):
    (tmp_path / "a.jsonl").write_bytes(raw)
    with pytest.raises(ValueError, match=r"a\.jsonl (is not a file that respond|was made with)"):
        respond(build("qwen3"), batches(labels=False), max_new_tokens=FEW, path=tmp_path / "a.jsonl")
