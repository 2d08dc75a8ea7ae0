"""Where the CPU seconds of ``repair`` go: ``python -m benchmarks.real.profile [--lab FOLDER] [--against CHECKOUT]``.

The command as it is typed, on Math by QA, seed 0: a process of its own, from its start to the written folder.
Every 2 ms of CPU time a signal charges what was spent since the last one to the stack that it finds, so nothing is
wrapped and nothing slowed down. ``--against`` measures another checkout of this project as well, in turn with this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.hardware import statement
from benchmarks.real.command import command
from benchmarks.real.comparison import PAIRS
from benchmarks.real.stages import place
from benchmarks.seeds import write

# What is found first from the outside in counts: the label, and the functions that mean it.
STAGES = {
    "the command itself": (),
    "checks before anything is loaded": ("options.py:checked",),
    "prompts": ("prompts.py:load_prompts",),
    "loading the later model": ("trajectory.py:load",),
    "choosing": ("sweep.py:mask",),
    "evaluation: the later, the earlier, and tried models": ("sweep.py:_evaluate",),
    "swapping the earlier model in and out": ("earlier.py:earlier_model", "earlier.py:_swapped"),
    "rollback and undo": ("rollback.py:rollback", "rollback.py:undo"),
    "writing": ("repair.py:save",),
}
RUNS = {"units": ["--units", "mlp"], "single weights": []}
KINDS = ("passes and losses", "imports", "the rest")
PASSES = {
    "module.py:_wrapped_call_impl", "graph.py:_engine_run_backward", "losses.py:likelihoods", "losses.py:summed",
    "losses.py:distillation",
}  # fmt: skip
IMPORT = "<frozen importlib._bootstrap>:_find_and_load"
CHILD = """
import json, os, runpy, signal, sys, time
last, out, found = 0.0, sys.argv.pop(1), {}

def sample(_, frame):
    global last
    now, stack = time.process_time(), []
    while frame is not None:
        code = frame.f_code
        stack.append(os.path.basename(code.co_filename) + ":" + code.co_name)
        frame = frame.f_back
    key = ";".join(reversed(stack))
    found[key] = found.get(key, 0.0) + now - last
    last = time.process_time()

signal.signal(signal.SIGPROF, sample)
signal.setitimer(signal.ITIMER_PROF, 0.002, 0.002)
code = 0
try:
    runpy.run_module("surgery", run_name="__main__", alter_sys=True)
except SystemExit as end:
    code = end.code or 0
signal.setitimer(signal.ITIMER_PROF, 0, 0)
sample(0, None)
json.dump(found, open(out, "w"))
sys.exit(code)
"""


def sample(checkout: Path, words: list[str], file: Path) -> None:
    """Write the CPU seconds of one command of a checkout, by stack from the outside in."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", CHILD, str(file.resolve()), *words], cwd=checkout, env=environment, check=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def loading(folder: str) -> float:
    """CPU seconds of a process that only loads a folder's model, by transformers alone."""
    what = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({folder!r})"
    before = os.times()
    subprocess.run([sys.executable, "-c", what], check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def sorted_out(stacks: dict[str, float]) -> dict[str, dict[str, float]]:
    """CPU seconds by stage and kind."""
    found = {stage: dict.fromkeys(KINDS, 0.0) for stage in STAGES}
    marks = {mark: stage for stage, some in STAGES.items() for mark in some}
    for stack, seconds in stacks.items():
        frames = stack.split(";")
        stage = next((marks[frame] for frame in frames if frame in marks), "the command itself")
        kind = "passes and losses" if not PASSES.isdisjoint(frames) else "imports" if IMPORT in frames else "the rest"
        found[stage][kind] += seconds
    return found


def table(rows: dict[str, dict[str, dict[str, float]]]) -> str:
    """A table of some checkouts' seconds side by side: by stage, then the sums."""
    lines = ["| CPU s | " + " | ".join(f"{who}: {kind}" for who in rows for kind in KINDS) + " |"]
    lines.append("|---" * (1 + len(rows) * len(KINDS)) + "|")
    for stage in STAGES:
        lines.append(
            f"| {stage} | " + " | ".join(f"{x:.2f}" for one in rows.values() for x in one[stage].values()) + " |"
        )
    sums = [sum(one[stage][kind] for stage in STAGES) for one in rows.values() for kind in KINDS]
    return "\n".join([*lines, "| **sum** | " + " | ".join(f"**{x:.2f}**" for x in sums) + " |"])


def main() -> None:
    """Profile ``repair`` by units and by single weights, and write the page."""
    parser = command(__doc__)
    parser.add_argument("--against", type=Path, help="another checkout of this project, measured as well: before")
    parser.add_argument("--only", choices=RUNS, help="one of both runs")
    parser.add_argument("--stacks", type=Path, help="a folder for the stacks; what is there is not measured again")
    asked = parser.parse_args()
    lab, pair = asked.lab.resolve(), PAIRS[0]
    folders = [str(place(lab, stage, 0)) for stage in (pair.base, pair.earlier, pair.later)]
    words = ["repair", *folders, "--data", str(lab / "data" / f"{pair.metric}.calibration.jsonl")]
    checkouts = {**({"before": asked.against.resolve()} if asked.against else {}), "now": Path.cwd()}
    told = [
        f"A process that imports transformers and loads the later model, and does nothing else, takes "
        f"{min(loading(folders[-1]) for _ in range(3)):.1f} CPU seconds.\n"
    ]
    with tempfile.TemporaryDirectory() as empty:
        for what, more in RUNS.items():
            if asked.only not in (None, what):
                continue
            rows = {}
            for who, checkout in checkouts.items():
                file = (asked.stacks or Path(empty)) / f"{who}-{what.replace(' ', '-')}.json"
                if not file.exists():
                    sample(checkout, [*words, *more, "-o", f"{empty}/{who}-{what}"], file)
                rows[who] = sorted_out(json.loads(file.read_text()))
            told.append(f"## By {what}\n\n{table(rows)}\n")
            print(told[-1], flush=True)
    text = (
        "# Where the seconds of `repair` go on SmolLM2-135M\n\nMath by QA, seed 0: `python -m surgery repair BASE "
        "EARLIER LATER --data FILE -o FOLDER` (and `--units mlp`), from its start to the written "
        f"folder. `python -m benchmarks.real.profile --against CHECKOUT`. {statement()}\n\n" + "\n".join(told)
    )
    write(asked.out, "real-profile", text)


if __name__ == "__main__":
    main()
