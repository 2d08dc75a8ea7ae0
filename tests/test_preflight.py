"""The pre-flight: it tells before anything is loaded what the work itself would refuse or warn of."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from mutants import dies
from safetensors.torch import load_file
from small_lab import SEED0
from test_bad_input import ONE, config, rewrite
from test_checkpoint import hashes

from surgery import DamageSelector, Trajectory, load_prompts
from surgery.cli import main
from surgery.live import preflight as room
from surgery.live.preflight import preflight, refuse

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Three stages with a tokenizer each, and prompts."""
    for name, seed in (("base", "base"), ("earlier", "code"), ("later", "math")):
        shutil.copytree(SEED0 / seed, tmp_path / name)
    (tmp_path / "math.jsonl").write_text('{"prompt": "1+1=", "response": "2"}\n' * 4)
    return tmp_path


def run(place: Path) -> Trajectory:
    return Trajectory(*(place / name for name in ("base", "earlier", "later")))


def scaled(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({f"{UP}_scale_inv": torch.ones(1, 1)}))


def without_a_norm(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"))


def with_an_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def of_an_unknown_kind(folder: Path) -> None:
    config(folder, model_type="nobody_knows")


def with_one_more(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.extra.weight": torch.ones(3, 3)}))


def of_another_rope(folder: Path) -> None:
    config(folder, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0})


def with_another_token(folder: Path) -> None:
    text = json.loads((folder / "tokenizer.json").read_text())
    names = sorted(text["model"]["vocab"], key=text["model"]["vocab"].get)
    text["model"]["vocab"] |= {names[-1]: len(names) - 2, names[-2]: len(names) - 1}
    (folder / "tokenizer.json").write_text(json.dumps(text))


def with_a_second_copy(folder: Path) -> None:
    shutil.copy(folder / ONE, folder / "consolidated.safetensors")


REFUSED = (scaled, without_a_norm, with_an_adapter, of_an_unknown_kind)
TOLD: dict[Callable[[Path], None], tuple[str, str]] = {
    with_one_more: ("earlier", "model.extra.weight"),
    of_another_rope: ("configurations", "rope"),
    with_another_token: ("tokens", "2 tokens have other ids"),
}


def law_sound_folders_are_ok(place: Path) -> None:
    found = preflight(run(place), place / "math.jsonl")
    assert [one.what for one in found] == [
        "base", "earlier", "later", "units", "configurations", "tokens", "output", "prompts",
    ]  # fmt: skip
    assert {one.verdict for one in found} == {"ok"}, found
    assert found[-1].said == "4 prompts with responses of 8 tokens"
    refuse(found)


def test_sound_folders_are_ok(place: Path) -> None:
    law_sound_folders_are_ok(place)


@pytest.mark.parametrize("name", ["base", "earlier", "later"])
@pytest.mark.parametrize("broken", REFUSED)
def test_what_cannot_be_read_is_refused_before_anything_is_loaded(
    place: Path, broken: Callable[[Path], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(place / name)
    monkeypatch.setattr(Trajectory, "load", lambda *_: pytest.fail("a model was loaded"))
    found = preflight(run(place), place / "math.jsonl")
    assert [one.what for one in found if one.verdict == "refused"] == [name]
    assert len(found) == 3  # nothing is compared with what can't be read
    with pytest.raises(ValueError, match=f".*{name}"):
        refuse(found)


@pytest.mark.parametrize("broken", REFUSED)
@pytest.mark.parametrize("name", ["earlier", "later"])
def test_what_it_refuses_the_work_refuses_in_the_same_words(
    place: Path, broken: Callable[[Path], None], name: str
) -> None:
    broken(place / name)
    (told,) = (one for one in preflight(run(place)) if one.verdict == "refused")

    def work() -> None:
        Trajectory(later=place / name).load()
        DamageSelector(0.1).select(run(place), load_prompts(place / "math.jsonl", place / "later"))

    with pytest.raises((ValueError, LookupError)) as caught:
        work()
    assert str(caught.value) == told.said


@pytest.mark.parametrize("other", TOLD)
def test_what_is_doubtful_is_told(place: Path, other: Callable[[Path], None]) -> None:
    other(place / "earlier")
    what, words = TOLD[other]
    found = preflight(run(place), place / "math.jsonl")
    told = [one for one in found if one.verdict != "ok"]
    assert [(one.what, one.verdict) for one in told] == [(what, "warning")]
    assert words in told[0].said
    refuse(found)


def test_what_an_output_leaves_out_is_told(place: Path) -> None:
    with_a_second_copy(place / "later")
    (told,) = (one for one in preflight(run(place)) if one.verdict != "ok")
    assert (told.what, told.verdict) == ("output", "warning")
    assert "consolidated.safetensors" in told.said


@pytest.mark.parametrize(
    ("lines", "words"),
    [("[]", "one JSON array"), ('{"prompt": "1", "response": ""}', "response is empty"), ("", "is empty")],
)
def test_prompts_that_cannot_be_read_are_refused(place: Path, lines: str, words: str) -> None:
    (place / "math.jsonl").write_text(lines)
    last = preflight(run(place), place / "math.jsonl")[-1]
    assert (last.what, last.verdict) == ("prompts", "refused")
    assert words in last.said


def test_other_units_are_refused(place: Path) -> None:
    model = families.build("qwen3", torch.float32)
    shutil.rmtree(place / "earlier")
    model.save_pretrained(place / "earlier")
    (told,) = (one for one in preflight(run(place)) if one.verdict == "refused" and one.what == "units")
    assert "different models" in told.said


def test_live_models_and_mappings_are_looked_at_too(place: Path) -> None:
    live = run(place).load()
    found = preflight(Trajectory(earlier=load_file(place / "earlier" / ONE), later=live), place / "math.jsonl")
    assert {one.verdict for one in found} == {"ok"}, found
    broken = {**load_file(place / "earlier" / ONE), f"{UP}_scale_inv": torch.ones(1, 1)}
    assert preflight(Trajectory(earlier=broken, later=live))[0].verdict == "refused"


# The shell.


def said(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["surgery", *map(str, words)])
        try:
            main()
        except SystemExit as end:
            printed = capsys.readouterr()
            return int(end.code or 0), printed.out, printed.err
    raise AssertionError("the command has no exit code")


def test_the_shell_prints_a_line_for_each_check(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = [place / name for name in ("base", "earlier", "later")]
    code, out, _ = said(capsys, "inspect", *stages, "--data", place / "math.jsonl")
    lines = out.splitlines()
    assert code == 0
    assert [line.split()[0] for line in lines[:8]] == ["ok"] * 8
    assert any(line.startswith("response (2 tokens): '2'") for line in lines)
    scaled(place / "earlier")
    code, out, _ = said(capsys, "inspect", *stages, "--data", place / "math.jsonl")
    assert code == 1
    assert [line.split()[0] for line in out.splitlines()] == ["ok", "refused", "ok"]


@pytest.mark.parametrize("command", ["select", "sweep", "repair"])
def test_every_command_that_chooses_begins_with_it(
    place: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base is read by none of them where only D is asked for; it is refused all the same, before a model loads."""
    scaled(place / "base")
    monkeypatch.setattr(Trajectory, "load", lambda *_: pytest.fail("a model was loaded"))
    more: dict[str, list[Any]] = {
        "select": ["--selector", "D", "--budget", "0.1", "-o", place / "mask.safetensors"],
        "sweep": ["--selectors", "D", "--budgets", "0.1", "--evaluate", "nothing:at_all"],
        "repair": [],
    }
    stages = [place / name for name in ("base", "earlier", "later")]
    code, _, err = said(capsys, command, *stages, "--data", place / "math.jsonl", *more[command])
    assert code == 1
    assert f"{UP}_scale_inv" in err.splitlines()[-1]


def test_a_warning_is_printed_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of_another_rope(place / "earlier")
    words = ["--selector", "D", "--budget", "0.1", "--dry-run", "--data", place / "math.jsonl"]
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # and not an error, as in the other tests
        code, _, err = said(capsys, "select", place / "earlier", place / "later", *words)
    assert code == 0
    assert err.count("has another configuration") == 1


def never_refused(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(room, "check_loads", lambda _: None)


def test_a_check_that_says_nothing_is_noticed(place: Path) -> None:
    def law() -> None:
        without_a_norm(place / "earlier")
        assert any(one.verdict == "refused" for one in preflight(run(place)))

    dies(never_refused, law)


def test_nothing_is_written(place: Path) -> None:
    before = hashes(place)
    preflight(run(place), place / "math.jsonl")
    assert hashes(place) == before


def test_tokenizers_of_the_same_files_are_not_read_to_be_compared(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a large vocabulary takes longer than all other checks together."""
    read: list[str] = []
    original = room.opened_tokenizer
    monkeypatch.setattr(room, "opened_tokenizer", lambda one: read.append(one.name) or original(one))
    told = {one.what: one for one in preflight(run(place))}
    assert (told["tokens"].verdict, read) == ("ok", ["later"])
    with_another_token(place / "earlier")
    told = {one.what: one for one in preflight(run(place))}
    assert (told["tokens"].verdict, read) == ("warning", ["later", "later", "earlier"])
