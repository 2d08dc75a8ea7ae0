"""The GPU's one command: what fails is said, what is done is not done again, what is missing is named."""

from __future__ import annotations

import json
import os
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import exact, floor, scores
from benchmarks.gpu.shapes import QWEN3_4B
from surgery import Neurons


@pytest.fixture
def part(monkeypatch):
    made = SimpleNamespace(NAME="A part", held=True, runs=[], error=None)

    def run(device, rehearse):
        made.runs.append((device, rehearse))
        yield {"checks": {"it holds": True}}
        if made.error:
            raise made.error
        yield {"checks": {"it holds": made.held}}

    made.run = run
    made.table = lambda found: f"| {len(found['checks'])} |"
    monkeypatch.setitem(sys.modules, "benchmarks.gpu.rollback", made)
    return made


@pytest.mark.parametrize("held", [True, False])
def test_a_check_that_does_not_hold_is_told_and_fails(part, held, tmp_path, capsys):
    part.held = held
    assert gpu.measured("rollback", tmp_path, True) is held
    text = gpu.page(gpu.held(tmp_path, True))
    assert ("did not hold**: it holds" in text) is not held
    assert ("1 checks held" in text) is held
    assert text.count("| 1 |") == 1
    assert "## A part" in capsys.readouterr().out
    assert part.runs == [(torch.device("cpu"), True)]


def test_the_page_names_what_is_missing_and_says_that_it_is_a_rehearsal(part, tmp_path):
    gpu.measured("rollback", tmp_path, True)
    text = gpu.page(gpu.held(tmp_path, True))
    assert "a rehearsal" in text
    for name in set(gpu.PARTS) - {"rollback"}:
        assert gpu.NAMES[name] in text.split("Not measured:")[1]
    assert gpu.NAMES["rollback"] not in text.split("Not measured:")[1]


@pytest.mark.parametrize("held", [True, False])
def test_what_is_done_is_not_done_again_where_its_checks_held(part, tmp_path, monkeypatch, capsys, held):
    asked, part.held = [], held
    monkeypatch.setattr(gpu, "PARTS", ("rollback", "exact"))
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path), "--rehearse"])
    monkeypatch.setattr(gpu, "within", lambda _, command, __: asked.append(command[-2]) or 0)
    gpu.measured("rollback", tmp_path, True)
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    assert stopped.value.code == 0
    assert asked == (["exact"] if held else ["rollback", "exact"])
    assert ("measured already" in capsys.readouterr().out) is held


def test_what_a_part_found_before_it_failed_is_kept_and_it_is_done_again(part, tmp_path, capsys):
    part.error = MemoryError("no room")
    assert not gpu.measured("rollback", tmp_path, True)
    assert "no room" in capsys.readouterr().err
    kept = gpu.held(tmp_path, True)["rollback"]["found"]["checks"]
    assert kept == {"it holds": True, "it came to its end (MemoryError: no room)": False}
    assert "did not hold**: it came to its end (MemoryError" in gpu.page(gpu.held(tmp_path, True))
    part.error = None
    assert gpu.measured("rollback", tmp_path, True)
    assert gpu.held(tmp_path, True)["rollback"]["found"]["checks"] == {"it holds": True}


def test_what_a_part_found_before_it_was_stopped_is_kept(part, tmp_path):
    steps = part.run(None, True)
    gpu.keep("rollback", tmp_path, True, 0, next(steps), gpu.END)
    assert gpu.held(tmp_path, True)["rollback"]["found"]["checks"] == {"it holds": True, gpu.END: False}


@pytest.mark.parametrize("seconds", [0.5, 60])
def test_a_part_that_takes_too_long_is_stopped_with_all_that_it_started(seconds, tmp_path):
    """What it started would go on using the GPU."""
    wait, grandchild = tmp_path / "wait", "import time, sys; time.sleep(2); open(sys.argv[1], 'w').close()"
    started = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}, {str(wait)!r}])"
    code = gpu.within(seconds, [sys.executable, "-c", started], dict(os.environ))
    if seconds > 2:
        assert code == 0
        assert wait.exists()
    else:
        assert code is None
        time.sleep(3)
        assert not wait.exists()


def test_what_a_rehearsal_found_is_not_what_a_gpu_found(part, tmp_path):
    gpu.measured("rollback", tmp_path, True)
    assert set(gpu.held(tmp_path, True)) == {"rollback"}
    assert gpu.held(tmp_path, False) == {}


@pytest.mark.parametrize("code", [None, 1])
def test_a_part_that_fails_or_takes_too_long_fails_the_run_and_not_the_others(tmp_path, monkeypatch, code):
    asked = []
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path), "--rehearse"])
    monkeypatch.setattr(gpu, "within", lambda _, command, __: asked.append(command[-2]) or code)
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    assert stopped.value.code == 1
    assert asked == list(gpu.PARTS)
    assert (tmp_path / "gpu.md").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_type(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="--rehearse"):
        gpu.main()
    assert not json.dumps([str(one) for one in tmp_path.iterdir()]).count(".json")


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("share", [0.002, 0.02, 0.3])
def test_the_sectors_that_are_expected_are_those_of_random_neurons(share, size):
    neurons, hidden, layers = (QWEN3_4B[one] for one in ("intermediate_size", "hidden_size", "num_hidden_layers"))
    torch.manual_seed(0)
    chosen = torch.rand(2000, neurons) < share
    touched = chosen.reshape(2000, -1, size // 2).any(-1).sum(1).double().mean()  # in one row of down
    assert floor.sectors(QWEN3_4B, share, size) == pytest.approx(float(touched) * size * hidden * layers, rel=0.01)


@pytest.mark.parametrize("mutant", [False, True])
def test_what_is_chosen_on_the_device_is_checked(mutant, monkeypatch):
    if mutant:
        monkeypatch.setattr(scores.lots._Few, "lower", lambda *_: None)
    found = scores.same_choice(torch.device("cpu"))
    assert len(found) == 5
    assert all(found.values()) is not mutant


def repaired(outcome, *chosen):
    mask = Neurons({"a": torch.isin(torch.arange(300), torch.tensor(chosen))}) if chosen else None
    return SimpleNamespace(outcome=outcome, mask=mask)


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (repaired("repaired", *range(100)), True),
        (repaired("repaired", *range(120)), True),  # it stopped a round later
        (repaired("repaired", *range(1, 101)), True),  # one of a hundred
        (repaired("repaired", *range(5, 105)), False),
        (repaired("repaired", *range(250)), False),
        (repaired("partly", *range(100)), False),
        (repaired("repaired"), False),
        (repaired("nothing lost"), False),
    ],
)
def test_a_repair_on_the_device_is_the_cpu_s_but_for_rounding(other, same):
    one = repaired("repaired", *range(100))
    assert exact.alike(one, other) is same
    assert exact.alike(other, one) is same
    assert exact.alike(repaired("nothing lost"), repaired("nothing lost"))
