"""Models that several processes hold together: equal to one process, on FSDP2, tensor parallel, and both.

The processes start once and run every law (tests/sharded_laws.py); a test looks at what came of one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from sharded_laws import LAWS, LAWS_OF_FOUR

HERE = Path(__file__).parent


def outcomes(folder: Path, world: int) -> dict[str, list[str]]:
    """What came of each law in each process."""
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, str(HERE / "sharded.py")]
    with ExitStack() as stack:
        started = []
        for rank in range(world):
            log = stack.enter_context(open(folder / f"log{rank}", "w"))
            one = subprocess.Popen([*command, str(rank), str(world), str(folder)], env=env, stdout=log, stderr=log)
            stack.callback(one.wait)
            stack.callback(one.kill)
            started.append(one)
        for one in started:
            one.wait(timeout=600)
    told = "\n".join((folder / f"log{rank}").read_text()[-3000:] for rank in range(world))
    assert [one.returncode for one in started] == [0] * world, told
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
    return {law: [one[law] for one in found] for law in found[0]}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return outcomes(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return outcomes(tmp_path_factory.mktemp("four"), 4)


@pytest.mark.parametrize("law", LAWS)
def test_two_processes(law: str, two: dict[str, list[str]]) -> None:
    assert two[law] == ["", ""], "\n".join(two[law])


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS_OF_FOUR)
def test_four_processes(law: str, four: dict[str, list[str]]) -> None:
    assert four[law] == [""] * 4, "\n".join(four[law])
