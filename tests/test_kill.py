"""A folder rollback killed at random moments: never an output that loads half-done, inputs untouched.

What a killed run leaves behind is a hidden sibling ``.name.xxxxxxxx.partial``, which the next run that writes the same
output removes. Its shards carry other names until all of them are complete, so that it does not load before it is.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from test_checkpoint import hashes
from transformers import Qwen3Config, Qwen3ForCausalLM

from surgery import Checkpoint, Neurons, rolled_back, save
from surgery.layout import find_layout

KILLS = 50
MASK = "surgery/mask.safetensors"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Two sharded checkpoints of some MB, a mask, and the output that a run which is not killed writes."""
    place = tmp_path_factory.mktemp("kill")
    config = Qwen3Config(
        vocab_size=128, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, head_dim=64,
    )  # fmt: skip
    for seed, name in enumerate(("earlier", "later")):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(place / name, max_shard_size="1500KB")
    assert len(list((place / "later").glob("model-*.safetensors"))) > 3
    mask = Neurons({name: torch.rand(size) < 0.3 for name, size in find_layout(model).sizes.items()})
    save(rolled_back(place / "later", to=place / "earlier", mask=mask), place / "want")
    return place, mask


def forked(action) -> int:
    """The id of a child process that does ``action`` and nothing else: no interpreter to start, nothing to import."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # a fork has none of its parent's worker threads, and would wait for them
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def duration(action, clean) -> float:
    times = []
    for _ in range(3):
        clean()
        start = time.perf_counter()
        assert ended(forked(action)) == 0
        times.append(time.perf_counter() - start)
    return sorted(times)[1]


def loads(folder: Path) -> bool:
    try:
        found = Checkpoint(folder)
        return len([found[name].shape for name in found]) > 0
    except (ValueError, LookupError, OSError):
        return False


def leftovers(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.name.startswith("."))


def same(folder: Path, want: dict[str, bytes]) -> bool:
    """The same files with the same bytes; of a mask the same neurons (safetensors shuffles its metadata)."""
    found = hashes(folder)
    if MASK in want and MASK in found:
        Neurons.load(folder / MASK)
    return {**found, MASK: b""} == {**want, MASK: b""} and (MASK in found) == (MASK in want)


# Forking under torch's idle thread pool is safe here: the child writes files and multiplies nothing.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fifty_kills_never_leave_half_an_output(lab):
    place, mask = lab
    out, want = place / "out", hashes(place / "want")
    inputs = {name: hashes(place / name) for name in ("earlier", "later")}

    def run() -> None:
        save(rolled_back(place / "later", to=place / "earlier", mask=mask), out)

    def clean() -> None:
        shutil.rmtree(out, ignore_errors=True)

    whole, rng = duration(run, clean), random.Random(0)
    tries, killed, partial, seen = 0, 0, 0, set()
    while killed < KILLS:
        tries += 1
        assert tries < 20 * KILLS, "the moments missed the writing"
        clean()
        child = forked(run)
        time.sleep(whole * rng.random() * 1.1)
        os.kill(child, signal.SIGKILL)
        code = ended(child)
        assert code in (0, -signal.SIGKILL)
        if out.exists():
            whole *= 0.95  # too late: the machine is faster than it was when the run was timed
            assert same(out, want)
        else:
            killed += 1
            whole *= 1 if set(leftovers(place)) - seen else 1.02  # too early: nothing had been written
            assert code == -signal.SIGKILL
        for path in set(leftovers(place)) - seen:
            partial += 1
            seen.add(path)
            assert path.name.endswith(".partial")
            assert not loads(path / "new") or same(path / "new", want)
        assert len(leftovers(place)) <= 1, "a run leaves what the one before it left"
    assert partial >= KILLS // 10, "the moments missed the writing"
    assert {name: hashes(place / name) for name in ("earlier", "later")} == inputs
    clean()
    assert ended(forked(run)) == 0, "a run beside the leftovers"
    assert same(out, want)
    assert Neurons.load(out / MASK).equal(mask)
    assert leftovers(place) == []
    clean()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_while_it_overwrites_the_old_output_survives(lab):
    """Ten kills of ``overwrite=True``: the old folder whole, or the new one whole, in its place."""
    place, mask = lab
    out, want = place / "again", hashes(place / "want")
    old = {"model.safetensors": b"old", "config.json": b"{}"}

    def run() -> None:
        save(rolled_back(place / "later", to=place / "earlier", mask=mask), out, overwrite=True)

    def clean() -> None:
        shutil.rmtree(out, ignore_errors=True)
        for path in leftovers(place):
            shutil.rmtree(path)
        out.mkdir()
        for name, data in old.items():
            (out / name).write_bytes(data)

    whole, rng = duration(run, clean), random.Random(1)
    for at in range(10):
        clean()
        child = forked(run)
        time.sleep(whole * (at + rng.random()) / 10)
        os.kill(child, signal.SIGKILL)
        ended(child)
        assert same(out, old) or same(out, want)
    assert ended(forked(run)) == 0
    assert same(out, want)
    assert leftovers(place) == []
    clean()
