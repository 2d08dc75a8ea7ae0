"""The shell under torchrun: each sentence once, whichever process it comes from, and one exit code that tells of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from surgery.cli import entry, main, processes

ROOT = Path(__file__).parent.parent


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path):
    """Type a command as one of two processes of torchrun; gives the exit code and both streams."""
    monkeypatch.setattr(processes, "_PATIENCE", 0.0)
    monkeypatch.setattr(processes, "_ENDING", 0.0)

    def run(rank: int, words: str) -> tuple[int, str, str]:
        file = tmp_path / "attempt_0" / str(rank) / "error.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        told = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
            "LOCAL_WORLD_SIZE": 2,
            "TORCHELASTIC_ERROR_FILE": file,
        }
        for name, value in told.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(sys, "argv", ["surgery", *words.split()])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capfd.readouterr()
        return int(stopped.value.code or 0), said.out, said.err

    return run


@pytest.mark.parametrize("first", [0, 1])
def test_what_one_process_says_the_other_leaves_unsaid(process, first: int) -> None:
    code, _, err = process(first, "inspect nowhere elsewhere")
    assert (code, err.count("error: torchrun starts several processes")) == (1, 1)
    code, out, err = process(1 - first, "inspect nowhere elsewhere")
    assert (code, out, err) == (0, "", "")
    code, _, err = process(1 - first, "select nowhere elsewhere -o mask --selector random --shard both")
    assert (code, err) == (1, "error: --shard both: expected fsdp or tp\n")


def test_torchruns_report_has_the_sentence(process, tmp_path: Path) -> None:
    process(1, "select nowhere elsewhere -o mask --selector random --shard both")
    told = json.loads((tmp_path / "attempt_0/1/error.json").read_text())["message"]
    assert told["extraInfo"]["py_callstack"] == told["message"] == "error: --shard both: expected fsdp or tp"


def test_wrong_usage_is_said_by_the_first_process(process) -> None:
    code, out, err = process(1, "select nowhere elsewhere --shard fsdp --no-such-option")
    assert (code, out, err) == (0, "", "")
    code, _, err = process(0, "select nowhere elsewhere --shard fsdp --no-such-option")
    assert code == 2
    assert "No such option" in err


def test_a_connection_that_ends_after_a_sentence_follows_from_it(process, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(entry, "app", broken)
    with pytest.raises(RuntimeError, match="closed by peer"):
        process(0, "select a b --shard fsdp")


def test_a_broken_connection_is_left_unsaid_where_its_cause_was_said(process, monkeypatch: pytest.MonkeyPatch) -> None:
    process(1, "select nowhere elsewhere -o mask --selector random --shard both")

    def broken() -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(entry, "app", broken)
    assert process(0, "select a b --shard fsdp") == (0, "", "")


def test_torchrun_itself(tmp_path: Path) -> None:
    """One sentence, one failed process in torchrun's report, and an exit code that is not 0."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "surgery"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = ["select", "nowhere", "elsewhere", "--selector", "random", "--shard", "fsdp", "-o", "mask"]
    done = subprocess.run([*command, *words], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    lines = (done.stdout + done.stderr).splitlines()
    assert done.returncode == 1
    assert sum(line.startswith("error: ") for line in lines) == 1, done.stderr
    assert [line for line in lines if line.startswith("  traceback : error: ")], done.stderr
