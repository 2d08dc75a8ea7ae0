"""The lab: its data, its tokenizer, its exact metric, and the committed checkpoints of seed 0."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from benchmarks.lab import domains
from benchmarks.lab.accuracy import seed_folders
from benchmarks.lab.evaluate import Batch, Evaluator, bootstrap_interval, evaluator, score_batch
from benchmarks.lab.tokenizer import CHARACTERS, build_tokenizer

LAB = Path(domains.__file__).parent
SEED0 = LAB / "seed0"
needs_checkpoints = pytest.mark.skipif(not (SEED0 / "cw").is_dir(), reason="seed 0 has not been trained here")


@pytest.fixture(autouse=True)
def one_thread():
    """The models are so small that more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("domain", domains.DOMAINS)
def test_data_is_a_function_of_the_seed(domain):
    assert domains.generate(domain, 3) == domains.generate(domain, 3)
    assert domains.generate(domain, 3) != domains.generate(domain, 4)


@pytest.mark.parametrize("domain", domains.DOMAINS)
def test_no_prompt_is_in_two_splits(domain):
    splits = domains.generate(domain, 0)
    if domain == "qa":  # facts must be memorised: what is evaluated is trained
        trained = splits.pop("train")
        assert all(item in trained for items in splits.values() for item in items)
    prompts = [item["prompt"] for items in splits.values() for item in items]
    assert len(set(prompts)) == len(prompts)
    assert len(splits["calibration"]) == domains.CALIBRATION
    assert len(splits["evaluation"]) == domains.EVALUATION


@pytest.mark.parametrize("domain", domains.DOMAINS)
def test_items_are_short_and_in_the_alphabet(domain):
    for items in domains.generate(domain, 0).values():
        for item in items:
            assert set(item["prompt"] + item["response"]) <= set(CHARACTERS)
            assert 0 < len(item["prompt"]) <= 16
            assert 0 < len(item["response"]) <= 5


def test_math_answers_are_right():
    for item in domains.generate("math", 0)["evaluation"]:
        a, sign, b = re.fullmatch(r"(\d\d)([+-])(\d\d)=", item["prompt"]).groups()
        assert int(item["response"]) == (int(a) + (int(b) if sign == "+" else -int(b))) % 100


def test_code_answers_are_what_python_returns():
    for item in domains.generate("code", 0)["evaluation"]:
        assert eval(item["prompt"].removesuffix("=")) == item["response"]


def test_qa_asks_for_the_same_fact_in_every_way():
    splits = domains.generate("qa", 0)
    towns: dict[str, set[str]] = {}
    for items in splits.values():
        for item in items:
            number = re.search(r"\d\d[+-]\d\d", item["prompt"]).group()
            towns.setdefault(number, set()).add(item["response"])
    assert len(towns) == 128
    assert all(len(answers) == 1 for answers in towns.values())


def test_cw_answers_continue_the_pattern_under_the_constraint():
    for item in domains.generate("cw", 0)["evaluation"]:
        case, count, shown = re.fullmatch(r"([Ul])(\d):(\w+)>", item["prompt"]).groups()
        answer = item["response"]
        assert len(answer) == int(count)
        assert answer == (answer.upper() if case == "U" else answer.lower())
        text = shown + answer.lower()
        period = 2 if shown[0] == shown[2] else 3
        assert all(text[i] == text[i - period] for i in range(period, len(text)))


def test_tokenizer_round_trip_through_auto_tokenizer(tmp_path):
    build_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.pad_token_id is not None
    assert tokenizer.eos_token_id is not None
    assert tokenizer.padding_side == "left"
    for text in (CHARACTERS, "'abc'[::-1]=", "12+3=  x ,.", "it's  a"):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


def _tiny(tokenizer) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            initializer_range=0.5,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).eval()


def _next(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1)


def test_exact_probability_equals_brute_force():
    tokenizer = build_tokenizer()
    model = _tiny(tokenizer)
    items = [{"prompt": "12+34=", "response": "46"}, {"prompt": "max('ab')=", "response": "b"}]
    exact, greedy = score_batch(model, Batch(items, tokenizer))
    for item, probability, right in zip(items, exact, greedy, strict=True):
        ids = tokenizer(item["prompt"])["input_ids"]
        expected, most_likely = 1.0, True
        for token in [*tokenizer(item["response"])["input_ids"], tokenizer.eos_token_id]:
            distribution = _next(model, ids)
            expected *= float(distribution[token])
            most_likely &= int(distribution.argmax()) == token
            ids = [*ids, token]
        assert probability == pytest.approx(expected, rel=1e-4)
        assert bool(right) == most_likely


def test_exact_probabilities_of_all_short_answers_add_up():
    """Every answer of one token, and every longer one: together they are all that can be sampled."""
    tokenizer = build_tokenizer()
    model = _tiny(tokenizer)
    prompt = "a>"
    items = [{"prompt": prompt, "response": c} for c in CHARACTERS]
    exact, _ = score_batch(model, Batch(items, tokenizer))
    ids = tokenizer(prompt)["input_ids"]
    first = _next(model, ids)
    longer = sum(
        float(first[t]) * (1 - float(_next(model, [*ids, t])[tokenizer.eos_token_id]))
        for t in itertools.chain.from_iterable(tokenizer(c)["input_ids"] for c in CHARACTERS)
    )
    special = float(first[tokenizer.all_special_ids].sum())
    assert exact.sum() + longer + special == pytest.approx(1, abs=1e-4)


def test_bootstrap_interval_holds_the_mean():
    values = torch.rand(200, generator=torch.Generator().manual_seed(0)).numpy()
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high
    assert bootstrap_interval(values) == (low, high)


SEEDS = [f"{order}{seed}" for order in ("seed", "reverse") for seed in range(3)]


@needs_checkpoints
@pytest.mark.parametrize("name", SEEDS)
def test_committed_data_is_what_the_seed_gives(name):
    for domain in domains.DOMAINS:
        splits = domains.generate(domain, int(name[-1]))
        for split in ("calibration", "evaluation"):
            assert domains.read_items(LAB / name / "data" / f"{domain}.{split}.jsonl") == splits[split]


@needs_checkpoints
def test_every_seed_of_the_tables_is_here():
    assert list(seed_folders()) == SEEDS
    assert list(json.loads((LAB / "results" / "accuracy.json").read_text())["seeds"]) == SEEDS
    assert seed_folders()["seed0"] == SEED0


@needs_checkpoints
@pytest.mark.parametrize("name", SEEDS)
def test_committed_table_is_reproduced_and_the_third_stage_hurts_the_second(name):
    entry = json.loads((LAB / "results" / "accuracy.json").read_text())["seeds"][name]
    folder = LAB / name
    scores = evaluator(folder / "data", AutoTokenizer.from_pretrained(folder / "base"))
    assert isinstance(scores, Evaluator)
    found = {}
    for stage, row in entry["stages"].items():
        found[stage] = scores(AutoModelForCausalLM.from_pretrained(folder / stage, dtype=torch.bfloat16))
        for domain in domains.DOMAINS:
            assert found[stage][domain] == pytest.approx(row[domain]["exact"]["mean"], abs=0.001)
    stages = ["base", "code", "qa", "math"] if name.startswith("reverse") else ["base", "code", "math", "qa", "cw"]
    assert list(found) == stages
    damaged, third = stages[2:4]
    assert (entry["damaged"], entry["third"]) == (damaged, third)
    assert found[third][damaged] < found[damaged][damaged] - 0.02


@needs_checkpoints
def test_a_bf16_model_is_scored_in_float32_and_stays_as_it_was():
    model = AutoModelForCausalLM.from_pretrained(SEED0 / "qa", dtype=torch.bfloat16)
    scores = evaluator(SEED0 / "data", AutoTokenizer.from_pretrained(SEED0 / "qa"))
    found = scores(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert found == scores(model.float())
