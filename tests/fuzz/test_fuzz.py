"""A fixed few of the inputs of ``make fuzz``: nothing is wrong in silence, and nothing ends without a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.attempts import FINE, attempt
from tests.fuzz.targets import TARGETS, Desk

FEW = 60


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.filterwarnings("ignore:the mask was selected for", "ignore:the optimizer's state was taken over")
@pytest.mark.parametrize("kind", TARGETS)
def test_a_sound_file_is_accepted(desk: Desk, kind: str, tmp_path: Path) -> None:
    """Else every refusal could be that of the fixture."""
    for name, raw in desk.files(kind).items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(raw)
    (tmp_path / "out/sound").mkdir(parents=True)
    TARGETS[kind].use(desk, tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("kind", TARGETS)
def test_damaged_files_are_refused_in_a_sentence_or_read_right(desk: Desk, kind: str) -> None:
    found = {number: attempt(desk, kind, number) for number in range(FEW)}
    assert {number: one for number, one in found.items() if one[0] not in FINE} == {}
    assert sum(outcome == "refused" for outcome, _ in found.values()) > FEW // 5
