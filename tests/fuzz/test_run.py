"""The long run counts every input once, outlives what hangs or dies, and goes on; the page is what it stored."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from benchmarks.reliability import __main__ as reliability
from benchmarks.reliability import fuzz as run
from tests.fuzz import attempts
from tests.fuzz.targets import TARGETS, Desk, Target


def trouble(_: Desk, place: Path, out: Path) -> None:
    number = json.loads((place / "n.json").read_text())
    if number == 1:
        raise KeyError("x")
    if number == 2:
        (place / "more").write_text("")
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 4:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        signal.sigwait([signal.SIGUSR1])
    if number == 5:
        signal.pause()
    if number == 6:
        raise AssertionError("other numbers")
    if number == 7:
        raise ValueError("raised here and not by the library")


class Bare(Desk):
    """A desk without models."""

    def __post_init__(self) -> None:
        pass


@pytest.fixture
def kind(monkeypatch: pytest.MonkeyPatch) -> str:
    """One kind alone, whose input is its own number."""
    for name in list(TARGETS):
        monkeypatch.delitem(TARGETS, name)
    write = lambda _, place: (place / "n.json").write_text("0")  # noqa: E731
    monkeypatch.setitem(TARGETS, "numbers", Target(write, trouble, (".json",)))
    monkeypatch.setattr(attempts, "damaged", lambda random, name, raw: str(numbers[random.random()]).encode())
    numbers = {attempts.Random(f"numbers {number}").random(): number for number in range(9)}
    monkeypatch.setattr(attempts.Random, "choice", lambda self, held: held[0])
    monkeypatch.setattr(run, "Desk", Bare)
    monkeypatch.setattr(attempts, "SECONDS", 1)
    monkeypatch.setattr(run, "SECONDS", 1)
    return "numbers"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_each_input_is_counted_once_whatever_it_does(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    run.fuzz(5, file)
    part = json.loads(file.read_text())["kinds"][kind]
    assert part == {"inputs": 5, "accepted": 1, "refused": 0, "crash": 2, "wrong": 0, "outside": 1, "hang": 1}
    whole = run.fuzz(9, file)
    assert whole["kinds"][kind] == {
        "inputs": 9, "accepted": 2, "refused": 0, "crash": 3, "wrong": 1, "outside": 1, "hang": 2
    }  # fmt: skip
    assert [(number, outcome) for _, number, outcome, _ in whole["found"]] == [
        (1, "crash"), (2, "outside"), (3, "crash"), (4, "hang"), (5, "hang"), (6, "wrong"), (7, "crash")
    ]  # fmt: skip


def test_figures_of_other_code_are_not_added(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run.fuzz(1, tmp_path / "found.json")
    monkeypatch.setattr(run, "_code", lambda: "other")
    assert run.fuzz(1, tmp_path / "found.json")["kinds"][kind]["inputs"] == 1


def test_some_kinds_are_run_by_themselves(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rows and what is said of them stay; with other code those kinds are counted anew."""
    file, other = tmp_path / "found.json", dict.fromkeys(("inputs", *attempts.OUTCOMES), 7)
    before = {"about": "then", "code": "old", "kinds": {"other": other}, "found": [["other", 3, "crash", "x"]]}
    file.write_text(json.dumps(before))
    for code, inputs in (("one", 3), ("one", 4), ("two", 2)):
        monkeypatch.setattr(run, "_code", lambda code=code: code)
        run.fuzz(inputs, file, kind)
        found = json.loads(file.read_text())
        assert (found["about"], found["code"], found["kinds"]["other"]) == ("then", "old", other)
        assert found["kinds"][kind]["inputs"] == inputs
        assert found["later"][kind]["code"] == code
        assert [one[0] for one in found["found"]].count("other") == 1


def test_the_page_is_what_the_stored_figures_make() -> None:
    assert reliability.PAGE.read_text(encoding="utf-8") == reliability.page()
    found = json.loads(reliability.FUZZ.read_text(encoding="utf-8"))
    for counts in found["kinds"].values():
        assert counts["inputs"] == sum(counts[outcome] for outcome in attempts.OUTCOMES)
    assert found["found"] == []
