"""The inquiry: every part or the reason why not, halves that share no prompt, a verdict in words, a page of its own."""

from __future__ import annotations

import errno
import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from test_report_browser import CHROMIUM, read
from test_report_page import EVIL, Reader
from torch import nn

from surgery import DamageSelector, Trajectory, analyse, files, likelihood, load_prompts, rollback, write_report
from surgery.live.prompts import halved, padded
from surgery.measure.history import History, Lost
from surgery.measure.statistics import Paired
from surgery.report.inquiry import PARTS, Inquiry
from surgery.report.sections import sections
from surgery.report.study import Study
from surgery.report.verdict import verdict

LAB = Path(__file__).parent.parent / "benchmarks/lab/seed0"
STAGES, DOMAINS = ("base", "code", "math", "qa", "cw"), ("math", "code", "qa")
pytestmark = pytest.mark.skipif(not LAB.is_dir(), reason="the lab's checkpoints are not there")


def lab(**settings):
    return Trajectory.through({name: str(LAB / name) for name in STAGES}, **settings)


def prompts(*domains: str, limit: int = 64):
    return {d: load_prompts(LAB / f"data/{d}.calibration.jsonl", LAB / "cw", limit=limit) for d in domains}


@pytest.fixture(scope="module")
def whole() -> Inquiry:
    return analyse(lab(), prompts(*DOMAINS), budgets=(0.04, 0.16), refresh_steps=5)


def test_every_part_is_there_and_the_lab_s_damage_is_found(whole):
    assert whole.skipped == {}
    assert all(getattr(whole, part) is not None for part in PARTS)
    assert whole.focus is not None
    assert (whole.focus.domain, whole.focus.best, whole.focus.at) == ("math", "math", "qa")
    at_16 = next(row for row in whole.rollback["D"] if row.budget == 0.16)
    assert at_16.recovery > 0.5
    assert at_16.recovery > next(row for row in whole.rollback["random"] if row.budget == 0.16).recovery


def test_the_verdict_names_the_damage_its_place_and_the_repair(whole):
    said = " ".join(verdict(whole))
    for words in ("math was damaged: from math to cw", "stage qa", "of the MLP neurons", "A rollback brings back",
                  "A refresh of 5 steps", "curvature"):  # fmt: skip
        assert words in said


def test_every_column_of_every_table_is_explained(whole):
    names = {*whole.stages, *whole.domains}
    for section in sections(whole):
        for table in section.tables:
            for head in table.head:
                plain = head in section.columns or head in names or not head
                assert plain, f"{section.title}: the column {head!r} of {table.title!r} has no definition"


def test_it_is_saved_as_a_page_and_as_numbers(whole, tmp_path):
    page = write_report(
        whole, tmp_path / "report", command="surgery analyse", data={"math": LAB / "data/math.calibration.jsonl"}
    )
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["index.html", "report.json"]
    text = page.read_text()
    assert all(paragraph.split(" [")[0].split("“")[0] in "".join(Reader(text).words) for paragraph in verdict(whole))
    numbers = json.loads((tmp_path / "report/report.json").read_text())
    assert numbers["focus"]["domain"] == "math"
    assert set(PARTS) <= set(numbers)
    with pytest.raises(ValueError, match="exists: choose another folder"):
        write_report(whole, tmp_path / "report")
    write_report(whole, tmp_path / "report", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report"]


def test_an_old_page_stays_until_the_new_one_is_in_its_place(tmp_path, monkeypatch):
    found, folder = Inquiry(("a", "b"), (), "score", {}, {"checkpoints": {}, "versions": {}}), tmp_path / "report"
    write_report(found, folder)
    (folder / "index.html").write_text("the old page")

    def gone(*_: Any) -> bool:
        raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr(files, "_exchanged", gone)
    with pytest.raises(OSError, match="the disk is gone"):
        write_report(found, folder, overwrite=True)
    monkeypatch.undo()
    assert (folder / "index.html").read_text() == "the old page"
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
    write_report(found, folder, overwrite=True)
    assert "the old page" not in (folder / "index.html").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_a_file_or_a_link_is_never_replaced_by_a_report(tmp_path):
    found = Inquiry(("a", "b"), (), "score", {}, {"checkpoints": {}, "versions": {}})
    (tmp_path / "file").write_text("notes")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in ("file", "link"):
        with pytest.raises(ValueError, match="is a file or a link, and never replaced"):
            write_report(found, tmp_path / name, overwrite=True)
    assert (tmp_path / "file").read_text() == "notes"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 400])
def test_the_real_page_is_read_without_an_error_and_fits(whole, tmp_path, width):
    text = write_report(whole, tmp_path / "report", command="surgery analyse " + "x" * 200).read_text()
    told = read(text, tmp_path, width)
    assert told["errors"] == []
    assert all(told["images"])
    assert all(told["shown"])
    assert told["wide"] <= width
    assert told["aside"] == 0 or width < 1280


def test_names_are_escaped_wherever_they_stand(whole, tmp_path):
    stages = tuple(EVIL if name == "qa" else name for name in whole.stages)
    lost = replace(whole.focus, domain=EVIL, at=EVIL)
    named = replace(whole, stages=stages, focus=lost, skipped={"x": EVIL})
    text = write_report(named, tmp_path / "report", command=EVIL).read_text()
    assert "<script>alert" not in text
    assert len(Reader(text).of("script")) == 1


def test_without_prompts_it_says_what_it_would_need():
    found = analyse(lab())
    assert (found.changes, found.changed, found.directions) != (None, None, None)
    assert set(found.skipped) == set(PARTS) - {"changes", "changed", "directions"}
    assert "--data domain=file" in found.skipped["history"]
    assert "not computed (prompts of a domain or more: data=" in verdict(found)[0]


def test_two_checkpoints_have_no_two_updates_to_compare():
    run = Trajectory.through({name: str(LAB / name) for name in ("math", "qa")})
    found = analyse(run, prompts("math"), budgets=(0.16,), skip=["terms", "refreshed"])
    assert "three checkpoints" in found.skipped["changed"]
    assert "two domains" in found.skipped["gradients"]
    assert found.skipped["terms"] == "left out on request"
    assert found.focus.domain == "math"
    assert {row.selector for row in found.rollback} == {"earlier", "later", "ceiling (all MLP neurons)", "D", "random"}
    assert "What a rollback costs other domains was not tested: there are no prompts of another domain." in verdict(
        found
    )


def test_what_the_same_input_would_give_is_told_in_one_line():
    found = analyse(lab())
    (names,) = found.needs
    assert names.split(", ") == list(found.skipped)
    assert len(found.skipped) == len(PARTS) - 3
    few = analyse(lab(), prompts("math", limit=1), skip=["terms"])
    assert next(iter(few.needs.values())) == "left out on request"
    assert len(few.needs) == 3  # and prompts of two domains, and two prompts of one


def test_a_mask_of_one_s_own_is_measured_and_shown_token_by_token(whole, tmp_path):
    run = Trajectory.through({name: str(LAB / name) for name in ("math", "qa")})
    mask = DamageSelector(0.3, units="weight").select(run, halved(prompts("math")["math"], 0))
    parts = {"changes", "history", "rollback", "tokens"}
    found = analyse(run, prompts("math"), budgets=(0.16,), mask=mask, skip=set(PARTS) - parts)
    (row,) = found.rollback["the given mask"]
    assert row.recovery > 0.5
    assert row.neurons == sum(mask.count().values())
    assert found.tokens.models == ("math", "qa", "the given mask")
    assert "with the given mask" in " ".join(verdict(found))
    assert whole.tokens.models == ("math", "cw", "D, 16 %")
    assert found.tokens.counts[1].fell > found.tokens.counts[2].fell


def test_where_nothing_was_lost_nothing_is_repaired():
    run = Trajectory.through({name: str(LAB / name) for name in ("base", "code")})
    found = analyse(run, prompts("code"))
    assert found.focus is None
    assert "a significant loss" in found.skipped["rollback"]
    assert "No domain showed a significant loss" in verdict(found)[0]


def test_a_live_model_is_whole_at_the_end_and_an_evaluation_of_one_s_own_decides():
    model = Trajectory(later=str(LAB / "qa")).load()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = Trajectory.through({"math": str(LAB / "math"), "qa": model})
    seen = []

    def evaluate(live: nn.Module):
        seen.append(live)
        drift = sum(float((p - before[name]).abs().sum()) for name, p in live.named_parameters())
        return {"math": [drift + x for x in range(8)], "qa": [1.0] * 8}

    found = analyse(run, prompts("math"), evaluate=evaluate, budgets=(0.5,), refresh_steps=2, skip=["terms"])
    assert found.focus.domain == "math"
    assert found.score == "score"
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert len(seen) >= 6


def test_a_domain_that_was_damaged_and_has_no_prompts_is_named():
    scores = {"math": [1.0, 2.0, 1.5, 1.2, 1.7, 1.1, 1.3, 1.6], "law": [1.0] * 8}
    falls = iter([1.0, 0.5])

    def evaluate(_):
        factor = next(falls)
        return {"math": [factor * x for x in scores["math"]], "law": scores["law"]}

    run = Trajectory.through({name: str(LAB / name) for name in ("math", "qa")})
    found = analyse(run, prompts("qa"), evaluate=evaluate)
    assert found.focus.domain == "math"
    assert "--data math=file" in found.skipped["rollback"]


def test_the_halves_share_no_prompt_and_lose_none():
    batches = [
        padded([([at + 3], [at + 4]) for at in range(first, last)], 0) for first, last in ((0, 5), (5, 6), (6, 9))
    ]
    both = [[row.tolist() for batch in halved(batches, which) for row in batch["input_ids"]] for which in (0, 1)]
    every = [row.tolist() for batch in batches for row in batch["input_ids"]]
    assert sorted(both[0] + both[1]) == sorted(every)
    assert not [row for row in both[0] if row in both[1]]


def test_what_is_told_is_told_of_the_prompts_that_chose_nothing(whole):
    """The history and the rollbacks are measured on the second half, and the damage score sees the first."""
    second = {domain: halved(batches, 1) for domain, batches in prompts(*DOMAINS).items()}
    first = halved(prompts("math")["math"], 0)
    run = Trajectory(base=str(LAB / "code"), earlier=str(LAB / "math"), later=str(LAB / "cw"))
    model, evaluate = run.load(), likelihood(second)
    scores = {domain: sum(found) / len(found) for domain, found in evaluate(model).items()}
    assert {domain: one[-1] for domain, one in whole.history.scores.items()} == pytest.approx(scores, rel=1e-5)
    mask = DamageSelector(0.16, units="mlp").select(run, first)
    with rollback(model, to=run.earlier, mask=mask):
        repaired = evaluate(model)["math"]
    row = next(row for row in whole.rollback["D"] if row.budget == 0.16)
    assert row.metrics["math"] == pytest.approx(sum(repaired) / len(repaired), rel=1e-5)


def test_one_prompt_can_not_choose_and_measure():
    found = analyse(lab(), prompts("math", limit=1))
    assert "two prompts or more of math" in found.skipped["history"]
    assert "two prompts or more of math" in verdict(found)[0]  # and not that there are no prompts


def test_prompts_without_responses_are_answered_by_their_own_stage(tmp_path):
    lines = (LAB / "data/math.calibration.jsonl").read_text().splitlines()[:40]
    bare = tmp_path / "math.jsonl"
    bare.write_text("\n".join(json.dumps({"prompt": json.loads(line)["prompt"]}) for line in lines))
    run = Trajectory.through({name: str(LAB / name) for name in ("math", "qa")})
    found = analyse(run, {"math": load_prompts(bare, LAB / "qa")}, skip=set(PARTS) - {"changes", "history"})
    scores = found.history.scores["math"]
    assert scores[0] > scores[1]


def test_what_can_not_be_analysed_is_refused():
    with pytest.raises(ValueError, match="skip='theory': expected some of changes"):
        analyse(lab(), skip=["theory"])
    with pytest.raises(ValueError, match="budget=2: expected a fraction"):  # before hours of evidence
        analyse(lab(), prompts("math"), budgets=[0.1, 2])
    with pytest.raises(ValueError, match="which domain the prompts are of"):
        analyse(lab(), prompts("math")["math"])
    with pytest.raises(ValueError, match=r"data is 'math\.jsonl': read the file first"):
        analyse(lab(), {"math": "math.jsonl"})
    different = Trajectory.through({"a": build("llama"), "b": build("gpt2")})
    with pytest.raises(ValueError):
        analyse(different)


def with_part(error: Exception, monkeypatch: pytest.MonkeyPatch) -> Inquiry:
    """An inquiry of which one part fails like that."""

    def failing(_: Study) -> None:
        raise error

    monkeypatch.setitem(PARTS, "changed", failing)
    return analyse(lab(), skip=set(PARTS) - {"changed"})


@pytest.mark.parametrize(
    "error", [KeyError("w"), IndexError("of 3"), TypeError("None"), FileNotFoundError(2, "no such file")]
)
def test_a_bug_in_a_part_is_not_told_as_a_reason(error, monkeypatch):
    with pytest.raises(type(error)):
        with_part(error, monkeypatch)


@pytest.mark.parametrize(
    "error", [ValueError("of another model"), LookupError("no such task"), OSError(errno.ENOSPC, "no room")]
)
def test_what_is_refused_on_purpose_is_told_and_the_rest_goes_on(error, monkeypatch):
    assert with_part(error, monkeypatch).skipped["changed"] == str(error)


def lost(domain: str, amount: float, p: float = 0.001) -> Lost:
    return Lost(domain, domain, "cw", amount, "qa", amount, Paired(amount, (amount / 2, 2 * amount), p, "sign flip", 9))


def told(*losses: Lost, focus: Lost | None) -> str:
    history = History(("math", "law", "cw"), {one.domain: (0.0, 0.0, 0.0) for one in losses}, losses)
    return " ".join(verdict(Inquiry(("math", "law", "cw"), ("math",), "score", {}, {}, history=history, focus=focus)))


def test_the_verdict_tells_damage_from_noise():
    math, law = lost("math", 0.5), lost("law", 0.25)
    said = told(math, law, focus=math)
    assert "math was damaged" in said
    assert "Also damaged: law" in said
    said = told(math, lost("law", 0.25, p=0.4), focus=math)
    assert "Also damaged" not in said
    assert "No significant loss in law." in said
    said = told(lost("math", 0.01, p=0.4), focus=None)
    assert re.match("No domain showed a significant loss", said)


def test_the_parts_are_the_fields():
    assert set(PARTS) == {field.name for field in fields(Inquiry)} - {
        "stages",
        "domains",
        "score",
        "skipped",
        "made",
        "focus",
    }
