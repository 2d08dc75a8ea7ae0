"""The real lab's own machinery, on tiny models: what it trains on, what it measures, and what its page says."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import build

from benchmarks.pareto.changes import BASELINE, CONTROL, LIBRARY, REFERENCE
from benchmarks.pareto.points import SCALE, points
from benchmarks.real import domains, methods
from benchmarks.real.comparison import MAIN, PAIRS, Row
from benchmarks.real.evaluate import Items
from benchmarks.real.report import markdown, picture
from benchmarks.real.stages import SHARED, STAGES, loss_of, place

SPLITS = ("train", "calibration", "evaluation")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("reasoning_gym")
    pytest.importorskip("countryinfo")
    folder = tmp_path_factory.mktemp("data")
    domains.build(folder)
    return folder


@pytest.mark.parametrize("domain", domains.DOMAINS)
def test_no_question_is_in_two_splits(data: Path, domain: str) -> None:
    asked = [{item["prompt"] for item in domains.read(data / f"{domain}.{split}.jsonl")} for split in SPLITS]
    assert all(asked)
    assert not asked[0] & asked[1] | asked[0] & asked[2] | asked[1] & asked[2]
    assert len(asked[2]) == domains.EVALUATION[domain]
    assert len(asked[1]) == domains.CALIBRATION


def test_qa_calibrates_on_facts_that_are_not_evaluated(data: Path) -> None:
    def facts(split: str) -> set[str]:
        """Answers with the country that they are of: the last words of the question."""
        return {
            item["response"] + " " + item["prompt"].split("<|im_end|>")[0].rstrip("?.").split(" of ")[-1]
            for item in domains.read(data / f"qa.{split}.jsonl")
            if " of " in item["prompt"]
        }

    assert len(facts("calibration") & facts("evaluation")) < 5  # two facts of a country may have one answer


def test_the_same_seed_gives_the_same_data(data: Path, tmp_path: Path) -> None:
    domains.build(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in data.iterdir()}


def test_every_form_is_right_by_its_own_program_and_wrong_by_another() -> None:
    items = domains._forms(60, random.Random(0))
    assert all(domains.right("format", item, item["response"]) for item in items)
    assert not any(domains.right("format", item, item["response"] + "x") for item in items)
    listed = next(item for item in items if item["response"].startswith("["))
    assert domains.right("format", listed, listed["response"].replace(", ", ","))
    assert not domains.right("math", listed, listed["response"].replace(", ", ","))


def rows_of(count: int) -> list[tuple[list[int], list[int]]]:
    drawn = random.Random(0)
    return [
        (
            [drawn.randrange(5, 60) for _ in range(drawn.randint(2, 7))],
            [drawn.randrange(5, 60) for _ in range(at % 3 + 1)],
        )
        for at in range(count)
    ]


def test_scores_are_those_of_each_item_alone() -> None:
    """Sorted into batches and padded, and back in the items' own order."""
    model, rows = build("llama").eval(), rows_of(11)
    found = Items(rows, 0, 4).scores(model)
    for at, (given, said) in enumerate(rows):
        ids = torch.tensor([given + said])
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0].log_softmax(-1)
        at_each = torch.arange(len(given) - 1, ids.shape[1] - 1)
        right = logp[at_each, ids[0, len(given) :]]
        assert found["logp"][at] == pytest.approx(float(right.sum()), abs=1e-4)
        assert found["mean"][at] == pytest.approx(float(right.mean()), abs=1e-4)
        assert found["greedy"][at] == float(logp[at_each].argmax(-1).equal(ids[0, len(given) :]))


def test_a_model_is_no_distance_from_itself() -> None:
    model, items = build("llama").eval(), Items(rows_of(6), 0, 4)
    with torch.no_grad():
        own = []
        for ids, mask in items.batches:
            logits = model(input_ids=ids[:, :-1]).logits[mask]
            own.append(logits.log_softmax(-1))
        other = [torch.randn_like(one).log_softmax(-1) for one in own]
    assert np.abs(items.scores(model, own)["kl"]).max() < 1e-5
    assert items.scores(model, other)["kl"].min() > 0.1


def test_the_loss_is_the_mean_over_items_of_their_cross_entropy() -> None:
    model, rows = build("llama").eval(), rows_of(5)
    logp = Items(rows, 0, 8).scores(model)["logp"]
    with torch.no_grad():
        assert float(loss_of(model, rows, 0)) == pytest.approx(-logp.mean(), rel=2e-2)  # the loss is in bf16


def test_every_stage_starts_from_one_that_is_made_before() -> None:
    made = ["base"]
    for name, stage in STAGES.items():
        assert stage.start in made
        made.append(name)
    for pair in PAIRS:
        assert {pair.base, pair.earlier, pair.later} <= set(made)
        assert STAGES[pair.later].start == pair.earlier
        assert STAGES[pair.later].domains == (pair.kept,)
        assert not pair.also or STAGES[pair.base].domains == (pair.also,)
    lab = Path("lab")
    assert len({place(lab, name, seed) for name in made for seed in (0, 1)}) == 2 * len(made) - len(SHARED)


def test_the_other_seeds_have_some_of_the_first_ones_values() -> None:
    for some in (methods.EVERY, methods.FEW):
        assert all(set(values) <= set(methods.FIRST[name]) for name, values in some.items())
        assert list(some)[:2] == ["later", "earlier"]


# The page.


def run_of(seed: int, pair: Any) -> dict[str, Any]:
    drawn = np.random.default_rng(seed)
    later = drawn.uniform(0.2, 0.5, 100)

    def row(method: str, kind: str, value: float, share: float) -> dict[str, Any]:
        items = np.rint(SCALE * (later + 0.1 * share)).astype(int)
        metrics = {pair.metric: float(items.mean()) / SCALE, f"{pair.metric}, greedy": 0.3 + 0.1 * share, "text": -3.0}
        metrics |= {pair.kept: 0.3, f"{pair.kept}, greedy": 0.3, "chat": -0.1} | ({pair.also: 0.2} if pair.also else {})
        greedy = [1] * round(30 + 10 * share) + [0] * round(70 - 10 * share)
        delta = {pair.kept: (-0.02 * share, -0.03, 0.0)} | ({pair.also: (0.01, 0.0, 0.02)} if pair.also else {})
        made = Row(method, kind, "β", value, 0, 500, 100_000, metrics, delta, 3.0, items.tolist(), greedy)
        return json.loads(json.dumps(asdict(made)))  # type: ignore[no-any-return]

    rows = [
        row("later", REFERENCE, 0.0, 0.0),
        row("earlier", REFERENCE, 1.0, 1.0),
        row("D of single weights", LIBRARY, 0.001, 0.8),
        row("WiSE-FT", BASELINE, 0.4, 0.3),
        row("random neurons", CONTROL, 0.04, 0.1),
    ]
    return {"seed": f"seed{seed}", "pair": asdict(pair), "checkpoints": {}, "measured": ["one thread"], "rows": rows}


def test_the_page_says_what_the_rows_say() -> None:
    runs = {pair.name: [run_of(seed, pair) for seed in (0, 1)] for pair in PAIRS}
    found = {name: points(group) for name, group in runs.items()}
    text = markdown(runs, found)
    lines = [line for line in text.splitlines() if line.startswith("| D of single weights")]
    assert lines
    assert lines[0].count("80 %") >= 2  # by probability and by exact match
    assert "-1.60" in lines[0]
    bounded = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| loss")}
    assert bounded["loss at most 1 points"].endswith("| **baseline** |")  # D loses 1.6 of the kept skill here
    assert bounded["loss at most 2 points"].endswith("| library |")
    figure = picture(runs, found)
    assert [ax.get_title() for ax in figure.axes] == [pair.name for pair in MAIN]
