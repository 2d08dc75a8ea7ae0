"""lm_eval as an evaluator: tasks of local files on the live model, per item, between rollback and undo; offline."""

from __future__ import annotations

import json
import logging
import sys

import pytest
import torch
from families import config
from test_docs import SIZES
from test_sweeps import same, snapshot

from benchmarks.lab.tokenizer import build_tokenizer
from surgery import RandomSelector, Trajectory, harness, repair, sweep
from surgery.cli import main
from surgery.measure.evaluators import _score, evaluator

ITEMS = 24


def test_functions_pass_and_other_things_are_refused():
    def score(model):
        return {}

    assert evaluator(score) is score
    assert evaluator("lm_eval:a, b") == harness(["a", "b"]) == harness("a,b")
    for bad in ("gsm8k", 3, None):
        with pytest.raises(ValueError, match='or "lm_eval:task,task"'):
            evaluator(bad)
    with pytest.raises(ValueError, match="expected the names of lm_eval tasks"):
        harness(" , ")


def test_without_lm_eval_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"surgery\[eval\]"):
        harness("anything")(torch.nn.Linear(1, 1))


def found(values, mean, larger=True, metric="acc"):
    """What lm_eval returns for one task, as far as it is read."""
    samples = [{"doc_id": at, "filter": "none", metric: value} for at, value in enumerate(values)]
    return {
        "results": {"t": {"alias": "t", f"{metric},none": mean, f"{metric}_stderr,none": "N/A"}},
        "samples": {"t": samples[::-1] + [{"doc_id": 0, "filter": "other", metric: 9.0}]},
        "higher_is_better": {"t": {metric: larger}},
    }


def test_items_come_in_their_order_and_fall_back_to_the_mean():
    """By document, of the first filter; negated where smaller is better; as a whole where items are no numbers."""
    assert _score("t", found([1.0, 0.0, 0.5], 0.5)) == [1.0, 0.0, 0.5]
    assert _score("t", found([1.0, 3.0], 2.0, larger=False)) == [-1.0, -3.0]
    assert _score("t", found([(-3.0, 2), (-1.0, 2)], 2.7, larger=False)) == -2.7
    assert _score("t", found([1.0, 3.0], 1.7)) == 1.7  # not a mean over items
    group = found([1.0, 0.0], 0.5)
    group["results"]["g"] = group["results"]["t"]
    group["group_subtasks"] = {"g": ["t", "t"], "t": []}
    assert _score("g", group) == [1.0, 0.0, 1.0, 0.0]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two checkpoints with the lab's tokenizer, and a multiple-choice task in two local files."""
    pytest.importorskip("lm_eval", reason='lm_eval is not installed (pip install "surgery[eval]")')
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("harness")
    shape = config("qwen3")
    shape.update(SIZES)
    for seed, name in enumerate(("earlier", "later")):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(shape).save_pretrained(folder / name)
        build_tokenizer().save_pretrained(folder / name)
    lines = [{"q": f"{i}+{i}=", "choices": [str(2 * i), str(2 * i + 1)], "right": i % 2} for i in range(10, 10 + ITEMS)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = {
        "task": "tiny_sums", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "sums.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{right}}", "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (folder / "tasks").mkdir()
    (folder / "tasks" / "tiny_sums.yaml").write_text(json.dumps(task))  # JSON is YAML
    return folder


@pytest.fixture
def quiet(monkeypatch, place):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(place / "cache"))
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def by_hand(model) -> list[float]:
    """Which of the two answers is the more likely, item by item."""
    tokenizer, right = build_tokenizer(), []
    for i in range(10, 10 + ITEMS):
        scores = []
        for answer in (str(2 * i), str(2 * i + 1)):
            prompt, reply = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (f"{i}+{i}=", answer))
            with torch.no_grad():
                logp = model(torch.tensor([prompt + reply])).logits.log_softmax(-1)[0]
            scores.append(sum(float(logp[len(prompt) + at - 1, token]) for at, token in enumerate(reply)))
        right.append(float((scores[1] > scores[0]) == (i % 2 == 1)))
    return right


@pytest.mark.filterwarnings("default")
def test_a_sweep_on_the_harness(place, quiet):
    """Items are those of a computation by hand, on the earlier, the later and each rolled-back model."""
    run = Trajectory(earlier=place / "earlier", later=place / "later")
    model, evaluate = run.load(), harness("tiny_sums", include_path=place / "tasks")
    before = snapshot(model)
    table = sweep(run, None, selectors=[RandomSelector(0.0)], budgets=[0.5], evaluate=evaluate)
    assert same(model, before)
    assert not model.training
    earlier, later, *_ = table
    assert earlier.items["tiny_sums"] == by_hand(Trajectory(later=place / "earlier").load())
    assert later.items["tiny_sums"] == by_hand(model)
    assert earlier.items != later.items
    assert later.metrics["tiny_sums"] == pytest.approx(sum(by_hand(model)) / ITEMS)
    assert {row.paired["tiny_sums"].test for row in table} == {"McNemar"}


@pytest.mark.filterwarnings("default")
def test_the_harness_from_repair_and_the_shell(place, quiet, monkeypatch, capsys):
    """The same tasks through ``repair``, and ``lm_eval:`` on the command line; an unknown task is named."""
    evaluate = harness("tiny_sums", include_path=place / "tasks", limit=ITEMS // 2)
    right = {name: sum(by_hand(Trajectory(later=place / name).load())[: ITEMS // 2]) for name in ("earlier", "later")}
    worse, better = sorted(right, key=lambda name: right[name])
    assert right[worse] < right[better]
    run = Trajectory(earlier=place / better, later=place / worse)
    model = run.load()
    found = repair(run, None, selector=RandomSelector(0.0), evaluate=evaluate, budgets=[0.5, 1.0])
    assert [sum(row.items["tiny_sums"]) for row in found.sweep.rows[:2]] == [right[better], right[worse]]
    with pytest.raises(LookupError, match="knows no task 'no_such_task'"):  # with a folder whose index is read by now
        harness("no_such_task", include_path=place / "tasks")(model)
    monkeypatch.chdir(place)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    words = "surgery sweep earlier later --evaluate lm_eval:gsm8k --selectors random --budgets 0.5"
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert "lm_eval tasks need lm_eval: pip install" in " ".join(capsys.readouterr().err.split())
