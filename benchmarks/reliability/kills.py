"""Random SIGKILLs over the commands that write, and a disk, a folder or another job that stands in their way.

    python -m benchmarks.reliability.kills [KILLS [COMMAND ...]]

Every command runs on tiny checkpoints in a process that is killed at a random moment. What is there then is looked at,
and the command is run again to its end: it has to give what it gives when nobody kills it, and to leave nothing else.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from benchmarks.hardware import statement
from benchmarks.lab.tokenizer import build_tokenizer
from surgery import AMCSelector, Checkpoint, Patch, Trajectory, rolled_back, save_patch
from surgery.cli import main as shell
from tests.training_folders import as_ranks

RESULTS = Path(__file__).parents[1] / "results" / "reliability-kills.json"
MASK, VOLATILE = "surgery/mask.safetensors", "seconds"
SCORE = """
def score(model):
    return {"sum": float(model.model.layers[0].mlp.up_proj.weight.float().sum()) * SIGN, "other": 1.0}
"""
COUNTS = (
    "kills",
    "of these while it wrote",
    "wrong output that loads",
    "input touched",
    "old output lost",
    "left behind",
    "next run failed",
)


INPUTS = (
    "earlier", "later", "ranks", "adapter", "other", "patch", "mask.safetensors", "others.safetensors",
    "prompts.jsonl", "score.py",
)  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A command, what it writes, and whether something is there before it."""

    words: str
    output: str
    replaces: bool = False


COMMANDS = {
    "rollback": Command("rollback later --to earlier --mask mask.safetensors -o OUT", "healed"),
    "rollback --overwrite": Command(
        "rollback later --to earlier --mask mask.safetensors -o OUT --overwrite", "healed", replaces=True
    ),
    "rollback of rank files": Command(
        "rollback ranks --to earlier --mask mask.safetensors -o OUT --reset-optimizer", "healed"
    ),
    "rollback of an adapter": Command("rollback adapter --to earlier --mask mask.safetensors -o OUT", "healed"),
    "rollback of an adapter to another": Command(
        "rollback adapter --to other --mask others.safetensors -o OUT --overwrite", "healed", replaces=True
    ),
    "patch": Command("patch later --to earlier --mask mask.safetensors -o OUT", "parcel"),
    "rollback --patch": Command("rollback later --patch patch -o OUT", "healed"),
    "repair": Command(
        "repair earlier later --data prompts.jsonl --evaluate score.py:score --metric sum --selector M --units mlp "
        "--budgets 0.2,0.5,1 --recovery 0.5 --rows repair.jsonl -o OUT",
        "healed",
    ),
    "sweep": Command(
        "sweep earlier later --evaluate score.py:score --metric sum --selectors M,random --budgets 0.1,0.5 -o OUT",
        "rows.jsonl",
    ),
    "select": Command("select earlier later --selector M --units weight --budget 0.3 -o OUT", "chosen.safetensors"),
}


def make(place: Path) -> None:
    """Two checkpoints of some MB in several shards, prompts, an evaluation and a mask."""
    config = Qwen3Config(
        vocab_size=96, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    sums = []
    for seed, name in enumerate(("earlier", "later")):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(place / name, max_shard_size="800KB")
        build_tokenizer().save_pretrained(place / name)
        sums.append(float(model.model.layers[0].mlp.up_proj.weight.float().sum()))
    (place / "score.py").write_text(SCORE.replace("SIGN", "1" if sums[0] > sums[1] else "-1"))
    lines = [{"prompt": f"{n}+{n}=", "response": str(2 * n)} for n in range(8)]
    (place / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    as_ranks(place / "later", place / "ranks")
    for seed, name in enumerate(("adapter", "other")):
        _adapter(place / "earlier", place / name, seed)
    mask = AMCSelector(0.3, "M", "M").select(Trajectory(earlier=place / "earlier", later=place / "later"))
    mask.save(place / "mask.safetensors")
    two = AMCSelector(0.3, "M", "M").select(Trajectory(earlier=place / "other", later=place / "adapter"))
    two.save(place / "others.safetensors")
    save_patch(rolled_back(place / "later", to=place / "earlier", mask=mask), place / "patch")


def _adapter(base: Path, folder: Path, seed: int) -> None:
    """An adapter of some hundred kB."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    settings = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), settings).save_pretrained(folder)


def started(words: str, place: Path, limits: Callable[[], None] = lambda: None) -> int:
    """The id of a child process in which the command runs; nothing has to be imported there. Its words go to a file."""
    child = os.fork()
    if child == 0:
        code = 9
        try:
            os.chdir(place)
            said = os.open(place / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            torch.set_num_threads(1)  # a fork has none of its parent's worker threads, and would wait for them
            sys.argv = ["surgery", *words.split()]
            limits()
            shell()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def held(path: Path) -> dict[str, Any]:
    """Every file of a folder, or the file, with what it holds; what differs between two equal runs is left out."""
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    return {str(file.relative_to(path)): _content(file) for file in files}


def _content(file: Path) -> Any:
    if file.suffix == ".jsonl":
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        return [{name: value for name, value in row.items() if name != VOLATILE} for row in rows]
    if file.suffix == ".safetensors" and (file.parent.name == "surgery" or not file.name.startswith("model")):
        raw = file.read_bytes()  # safetensors shuffles the metadata of a mask
        end = 8 + int.from_bytes(raw[:8], "little")
        return json.loads(raw[8:end]), raw[end:]
    return file.read_bytes()


def loads(path: Path) -> bool:
    if path.is_file():
        return True
    try:
        if (path / "patch.json").exists():
            return Patch(path).numbers > 0
        found = Checkpoint(path)
        return len([found[name].shape for name in found]) > 0
    except (ValueError, LookupError, OSError):
        return False


def kill(name: str, command: Command, place: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill a command at random moments; how often each of ``COUNTS`` happened, and how often a rest was there."""
    out, rng = place / command.output, random.Random(seed)
    words = command.words.replace("OUT", command.output)
    inputs = {one: held(place / one) for one in INPUTS}
    at_home = {path.name for path in place.iterdir()} | {"said", command.output, "repair.jsonl"}

    def clean() -> None:
        shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
        (place / "repair.jsonl").unlink(missing_ok=True)
        if command.replaces:
            shutil.copytree(place / ("other" if "adapter" in words else "earlier"), out)

    def others() -> set[str]:
        return {path.name for path in place.iterdir()} - at_home

    clean()
    start = time.monotonic()
    assert ended(started(words, place)) == 0, (place / "said").read_text()
    whole, want = time.monotonic() - start, held(out)
    clean()
    old = held(out) if command.replaces else {}
    found = dict.fromkeys(COUNTS, 0)
    while found["kills"] < kills:
        clean()
        child = started(words, place)
        # half of the moments anywhere, half where the output is being written or a moment after that
        if rng.random() < 0.5 or out.suffix == ".jsonl":  # rows come all the time
            time.sleep(whole * rng.random())
        else:
            deadline = time.monotonic() + 2 * whole
            while not others() and time.monotonic() < deadline and os.waitpid(child, os.WNOHANG) == (0, 0):
                time.sleep(0.0005)
            time.sleep(0.1 * rng.random() ** 3)
        try:
            os.kill(child, signal.SIGKILL)
            if ended(child) == 0:
                continue
        except (ProcessLookupError, ChildProcessError):
            continue
        found["kills"] += 1
        found["of these while it wrote"] += bool(others())
        if out.suffix != ".jsonl":  # rows are a file that grows: a part of them is right
            found["wrong output that loads"] += out.exists() and held(out) not in (want, old) and loads(out)
        found["old output lost"] += command.replaces and (not out.exists() or held(out) not in (want, old))
        if out.exists() and out.suffix != ".jsonl" and not command.replaces:
            shutil.rmtree(out) if out.is_dir() else out.unlink()
        again = ended(started(words, place))
        found["next run failed"] += again != 0 or held(out) != want
        found["left behind"] += bool(others())
        found["input touched"] += {one: held(place / one) for one in inputs} != inputs
        for path in others():
            shutil.rmtree(place / path)
    clean()
    print(f"{name}: {found}", flush=True)
    return found


def troubles(place: Path) -> dict[str, dict[str, bool]]:
    """What stands in the way of ``rollback``: whether it ends with a sentence (or well), with nothing lost or left."""
    words, found = COMMANDS["rollback"].words, {}
    before = {one: held(place / one) for one in ("earlier", "later")}

    def told(what: str, child: int, target: Path, old: dict[str, Any] | None = None, fails: bool = True) -> None:
        code, said = ended(child), (place / "said").read_text()
        sentence = code == 1 and said.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in said
        rest = [path for path in target.parent.iterdir() if path.name.startswith(f".{target.name}.")]
        kept = (held(target) if target.exists() else None) == old if fails else loads(target)
        whole = {one: held(place / one) for one in before} == before and not rest and kept
        found[what] = {"ends as it should": sentence if fails else code == 0, "nothing lost": whole}

    def few(limit: int) -> Callable[[], None]:
        def set_limit() -> None:
            import resource

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        return set_limit

    out = place / "out"
    told("a file may have 200 kB", started(words.replace("OUT", "out"), place, few(200_000)), out)
    shutil.copytree(place / "earlier", out)
    told("the same, --overwrite", started(words.replace("OUT", "out --overwrite"), place, few(200_000)), out, held(out))
    told("the output exists", started(words.replace("OUT", "out"), place), out, held(out))
    for name in ("earlier", "later"):
        told(f"the output is {name}", started(words.replace("OUT", f"{name} --overwrite"), place), place / name,
             before[name])  # fmt: skip
    shutil.rmtree(out)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as other:
        told(
            "another file system",
            started(words.replace("OUT", f"{other}/out"), place),
            Path(other) / "out",
            None,
            False,
        )
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", other]
        if subprocess.run(mount, capture_output=True, check=False).returncode == 0:
            told("a full disk", started(words.replace("OUT", f"{other}/out"), place), Path(other) / "out")
            subprocess.run(["mount", "-o", "remount,ro", other], check=True)
            told("a read-only disk", started(words.replace("OUT", f"{other}/out"), place), Path(other) / "out")
            subprocess.run(["umount", other], check=True)
    for extra, both in (("", False), (" --overwrite", True)):
        codes, texts = _together(words.replace("OUT", f"out{extra}"), place)
        right = codes == [0, 0] if both else codes == [0, 1] and "exists: choose another folder" in "".join(texts)
        rest = [path for path in place.iterdir() if path.name.startswith(".out.")]
        found[f"two jobs on one output{extra}"] = {"ends as it should": right, "nothing lost": loads(out) and not rest}
        shutil.rmtree(out)
    return found


def _together(words: str, place: Path) -> tuple[list[int], list[str]]:
    """The exit codes of two jobs at once, the lower first, and what they said."""
    places = [place / f"job{at}" for at in (0, 1)]
    for one in places:
        one.mkdir()
        for name in ("earlier", "later", "mask.safetensors"):
            (one / name).symlink_to(place / name)
    children = [started(words.replace("-o out", "-o ../out"), one) for one in places]
    codes = sorted(ended(child) for child in children)
    texts = [(one / "said").read_text() for one in places]
    for one in places:
        shutil.rmtree(one)
    return codes, texts


def main(kills: int = 1000, *names: str) -> None:
    """Of all commands; or of some, whose rows then take the place of those that are stored."""
    each = -(-kills // len(names or COMMANDS))
    stored = json.loads(RESULTS.read_text(encoding="utf-8")) if names else {"kills": {}}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        make(place)
        for seed, (what, one) in enumerate(COMMANDS.items()):
            if what in (names or COMMANDS):
                stored["kills"][what] = kill(what, one, place, each, seed)
        if names:
            stored.setdefault("later", {})[", ".join(names)] = statement()
        else:
            stored = {"about": statement(), "kills": stored["kills"], "troubles": troubles(place)}
    stored["kills"] = {what: stored["kills"][what] for what in COMMANDS if what in stored["kills"]}
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:])
