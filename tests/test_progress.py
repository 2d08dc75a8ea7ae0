"""Whatever takes long says how far it is and how long it will take, to whoever asked, and is quiet otherwise."""

from __future__ import annotations

import io
import re
import time

import pytest
from families import pair
from rich.console import Console
from test_scores import batches

from surgery import DamageSelector, Trajectory, activation, likelihood, progress, refresh, repair, save, sweep
from surgery.cli import options
from surgery.evidence import gradients
from surgery.live import distillation, respond
from surgery.live.losses import cross_entropy
from surgery.progress import reporting, spoken, steps
from surgery.reverting.rollback import rolled_back

DATA = batches(labels=True)


def test_the_estimate_is_the_time_so_far_over_what_is_done(monkeypatch):
    clock, told = iter(range(0, 1000, 30)), []
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with reporting(told.append):
        assert list(steps("letters", ["a", "bbb", "cc"], len)) == ["a", "bbb", "cc"]
    # 30 s for one of six letters, 60 s for four
    assert told == ["letters: 0 of 3", "letters: 1 of 3, 2 min left", "letters: 2 of 3, 30 s left"]


def test_what_is_inside_is_told_with_what_is_around_it():
    told: list[str] = []
    with reporting(told.append):
        for _ in steps("rows", range(2)):
            for _ in steps("batches", range(2)):
                break
        list(steps("files", "a"))
    plain = [re.sub(r", [^·]* left", "", text) for text in told]
    assert plain == ["rows: 0 of 2", "rows: 0 of 2 · batches: 0 of 2", "rows: 1 of 2", "rows: 1 of 2 · batches: 0 of 2",
                     "files: 0 of 1"]  # fmt: skip


def test_nobody_is_told_unless_asked(capfd):
    earlier, later = pair("llama")
    assert list(steps("letters", iter("ab"))) == ["a", "b"]
    DamageSelector(0.1).select(Trajectory(earlier=earlier, later=later), DATA)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (150, "2 min"), (7200, "2.0 h")])
def test_durations_are_as_exact_as_an_estimate(seconds, text):
    assert spoken(seconds) == text


def heard(work) -> list[str]:
    told: list[str] = []
    with reporting(told.append):
        work()
    return told


def test_every_pass_over_prompts_or_weights_is_told(tmp_path):
    earlier, later = pair("llama")
    earlier.save_pretrained(tmp_path / "earlier")
    later.save_pretrained(tmp_path / "later")
    run = Trajectory(earlier=earlier, later=later)
    mask = DamageSelector(0.1).select(run, DATA)
    two = [{name: value[:1] for name, value in DATA[0].items()} for _ in range(4)]
    works = {
        "gradients": lambda: DamageSelector(0.1).select(Trajectory(earlier=earlier, later=later), DATA),
        "gradients of what it costs": lambda: DamageSelector(0.1, protect={"qa": DATA}).select(run, DATA[:1]),
        "the earlier model's predictions": lambda: distillation(earlier, DATA),
        "the earlier model's answers": lambda: respond(later, batches(labels=False), max_new_tokens=2),
        "activations": lambda: activation(later, DATA),
        "likelihood of math": lambda: likelihood({"math": DATA})(later),
        "gradients of math": lambda: gradients(later, {"math": DATA, "qa": DATA}),
        "the loss": lambda: DamageSelector(0.1, units="weight").select(Trajectory(earlier=earlier, later=later), DATA),
        "steps of the refresh": lambda: refresh(later, cross_entropy, DATA, 2, 1e-6),
        "rows": lambda: sweep(run, DATA, selectors=[DamageSelector(0.1)], budgets=[0.1], evaluate=lambda _: {"a": 1.0}),
        "likelihood of the damaged domain": lambda: repair(run, two, budgets=[0.5]),
        "files": lambda: save(rolled_back(tmp_path / "later", to=tmp_path / "earlier", mask=mask), tmp_path / "out"),
    }
    for what, work in works.items():
        assert any(f"{what}: 0 of " in text for text in heard(work)), what


@pytest.mark.parametrize("terminal", [False, True])
def test_the_shell_tells_it_on_the_error_stream(monkeypatch, terminal):
    """Off a terminal as a plain line after the first second, and then now and then."""
    shown = io.StringIO()
    monkeypatch.setattr(options, "err", Console(file=shown, force_terminal=terminal, width=200))
    for name, seconds in (("_OFTEN", 0.02), ("_FIRST", 0.05), ("_SELDOM", 0.1)):
        monkeypatch.setattr(options, name, seconds)
    with options.working("reading") as say:
        time.sleep(0.2)
        say("D, 2 %")
        for _ in steps("gradients [of 3]", range(2)):
            time.sleep(0.3)
    text = shown.getvalue()
    assert "reading (0 s)" in text
    assert re.search(r"D, 2 %: gradients \[of 3\]: 1 of 2, \d s left \(\d s\)", text)
    if not terminal:
        lines = text.splitlines()
        assert lines[0] == "reading (0 s)"
        assert 3 <= len(lines) <= 9
        assert "\x1b" not in text


def test_a_short_command_off_a_terminal_says_nothing(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(options, "err", Console(file=shown, width=200))
    with options.working("reading"):
        pass
    assert shown.getvalue() == ""
