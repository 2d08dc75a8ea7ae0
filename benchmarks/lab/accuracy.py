"""The accuracy of every trained seed, after each stage, on each domain: ``python -m benchmarks.lab.accuracy``.

Writes ``results/accuracy.md`` and ``results/accuracy.json`` beside this file, about the committed checkpoints.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from benchmarks.lab.domains import DOMAINS
from benchmarks.lab.evaluate import Evaluator, Scores, bootstrap_interval

LAB = Path(__file__).parent
ORDERS = {"seed": ("base", "code", "math", "qa", "cw"), "reverse": ("base", "code", "qa", "math")}


def seed_folders(lab: Path = LAB) -> dict[str, Path]:
    """The folder of every seed, by name: ``seed0``, .. and of the other order ``reverse0``, .."""
    found = (folder for kind in ORDERS for folder in sorted(lab.glob(f"{kind}[0-9]*")))
    return {folder.name: folder for folder in found if (folder / "base").is_dir()}


def stages_of(folder: Path) -> tuple[str, ...]:
    """The stages in the order of their training; the fourth did damage to the third."""
    return ORDERS[folder.name.rstrip("0123456789")]


def summary(values: np.ndarray) -> dict[str, float]:
    """A mean over items with its 95 % bootstrap interval."""
    low, high = bootstrap_interval(values)
    return {"mean": round(float(values.mean()), 4), "low": round(low, 4), "high": round(high, 4)}


def stage_scores(folder: Path) -> dict[str, tuple[Scores, Scores]]:
    """Per stage: the exact probabilities and greedy outcomes of each domain's items."""
    evaluate = Evaluator(folder / "data", AutoTokenizer.from_pretrained(folder / "base"))
    result = {}
    for stage in stages_of(folder):
        model = AutoModelForCausalLM.from_pretrained(folder / stage, dtype=torch.bfloat16)
        result[stage] = evaluate.both(model)
    return result


def seed_report(folder: Path) -> dict[str, Any]:
    """Stage by domain summaries of a seed, and what the third GRPO stage did to the second's domain (paired)."""
    scores = stage_scores(folder)
    stages = {
        stage: {domain: {"exact": summary(exact[domain]), "greedy": summary(greedy[domain])} for domain in DOMAINS}
        for stage, (exact, greedy) in scores.items()
    }
    _, _, damaged, third, *_ = stages
    change = scores[third][0][damaged] - scores[damaged][0][damaged]
    return {"stages": stages, "damaged": damaged, "third": third, "change": summary(change)}


def _cell(value: dict[str, float]) -> str:
    return f"{100 * value['mean']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def markdown(report: dict[str, Any]) -> str:
    """The report as tables a person reads."""
    lines = ["# Accuracy of the lab's models", ""]
    lines += ["In percent. Exact: the mean probability of sampling exactly the right answer (no sampling noise)."]
    lines += ["In brackets: 95 % bootstrap interval over the evaluation items.", ""]
    for seed, entry in report["seeds"].items():
        for metric in ("exact", "greedy"):
            lines += [f"## {seed}, {metric}", ""]
            lines += ["| after stage | " + " | ".join(DOMAINS) + " |", "|---|" + "---|" * len(DOMAINS)]
            for stage, row in entry["stages"].items():
                lines.append(f"| {stage} | " + " | ".join(_cell(row[d][metric]) for d in DOMAINS) + " |")
            lines.append("")
        what = f"What the stage {entry['third']} did to {entry['damaged']}"
        lines += [f"{what} (exact, paired over items): {_cell(entry['change'])} points.", ""]
    about = report["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines += [f"{about['hardware']}; {versions}; {about['date']}. Written by `python -m benchmarks.lab.accuracy`."]
    return "\n".join(lines) + "\n"


def about(hardware: str) -> dict[str, Any]:
    """What the numbers were measured with."""
    versions = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl")}
    return {"hardware": hardware, "versions": versions, "date": datetime.date.today().isoformat()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluate every trained seed and write the accuracy table.")
    parser.add_argument("--hardware", default="2-core x86-64 CPU")
    hardware = parser.parse_args().hardware
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    seeds = {name: seed_report(folder) for name, folder in seed_folders().items()}
    report = {"about": about(hardware), "seeds": seeds}
    results = LAB / "results"
    results.mkdir(exist_ok=True)
    (results / "accuracy.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    text = markdown(report)
    (results / "accuracy.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
