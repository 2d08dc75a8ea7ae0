"""Rolling back a mixture of experts, beside a dense model of as many bytes: one tensor an expert, or one a layer.

    python -m benchmarks.speed.experts

Each expert has the size that those of an 80 B model with 48 × 512 experts have; a second pair has 48 × 512 small ones.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3MoeConfig

from benchmarks.hardware import statement
from surgery import RandomSelector, Trajectory, rolled_back, save
from surgery.masks.neurons import Neurons

RESULTS = Path(__file__).parents[1] / "results" / "experts-speed.md"
ROUNDS = 3
# layers, experts, hidden size, neurons of an expert
SHAPES = {
    "1 layer × 512 experts of 6.3 MB": (1, 512, 2048, 512),
    "48 layers × 512 experts of 25 kB": (48, 512, 128, 32),
}


def write(folder: Path, layers: int, experts: int, hidden: int, width: int, seed: int, sparse: bool) -> None:
    """A checkpoint of random numbers, a file a layer: experts by name, or one MLP as wide as all of them."""
    sizes = dict(
        vocab_size=64, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32,
    )  # fmt: skip
    config: Any = Qwen3Config(**sizes, intermediate_size=experts * width)
    if sparse:
        config = Qwen3MoeConfig(**sizes, intermediate_size=64, moe_intermediate_size=width, num_experts=experts)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    draw = torch.Generator().manual_seed(seed)
    where: dict[str, str] = {}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        parts = [f"{at}mlp.experts.{one}." for one in range(experts)] if sparse else [f"{at}mlp."]
        wide = width if sparse else experts * width
        shapes = {
            f"{part}{name}_proj.weight": (hidden, wide) if name == "down" else (wide, hidden)
            for part in parts
            for name in ("gate", "up", "down")
        }
        shapes |= {
            f"{at}self_attn.{name}_proj.weight": (rows, hidden) for name, rows in (("q", 128), ("k", 64), ("v", 64))
        }
        shapes |= {f"{at}self_attn.o_proj.weight": (hidden, 128)}
        shapes |= {f"{at}self_attn.{name}_norm.weight": (32,) for name in "qk"}
        shapes |= {f"{at}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        shapes |= {f"{at}mlp.gate.weight": (experts, hidden)} if sparse else {}
        if layer == 0:
            shapes |= {"model.embed_tokens.weight": (64, hidden), "lm_head.weight": (64, hidden)}
            shapes |= {"model.norm.weight": (hidden,)}
        tensors = {name: torch.randn(shape, generator=draw).bfloat16() for name, shape in shapes.items()}
        save_file(tensors, folder / f"model-{layer}.safetensors", metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, f"model-{layer}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def apart(work: Any, *given: Any) -> Any:
    """What a function gives in a fork of this process: it has the imports, and nothing that was opened before."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=lambda: there.send(work(*given)))
    child.start()
    found = here.recv()
    child.join()
    return found


def choose(earlier: Path, later: Path, out: Path) -> None:
    RandomSelector(0.02).select(Trajectory(earlier=earlier, later=later)).save(out)


def heal(earlier: Path, later: Path, mask: Path, out: Path) -> float:
    """CPU seconds of a rollback from folder to folder, the layouts found anew."""
    before = sum(os.times()[:2])
    save(rolled_back(later, to=earlier, mask=Neurons.load(mask)), out)
    found = sum(os.times()[:2]) - before
    shutil.rmtree(out)
    return found


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for what, shape in SHAPES.items():
        found: dict[bool, float] = {}
        with tempfile.TemporaryDirectory() as name:
            home = Path(name)
            for sparse in (True, False):
                place = home / str(sparse)
                write(place / "earlier", *shape, 0, sparse)
                write(place / "later", *shape, 1, sparse)
                apart(choose, place / "earlier", place / "later", place / "mask.safetensors")
            for _ in range(ROUNDS):
                for sparse in (True, False):
                    place = home / str(sparse)
                    given = (place / "earlier", place / "later", place / "mask.safetensors", place / "out")
                    found[sparse] = min(found.get(sparse, 1e9), apart(heal, *given))
            size = sum(path.stat().st_size for path in (home / "True/later").iterdir()) / 1e9
        count = shape[0] * shape[1] * 3
        rows.append(
            f"| {what} | {size:.2f} | {count:,} | {found[True]:.2f} | {found[False]:.2f} | "
            f"{found[True] / found[False]:.2f} | {1e3 * (found[True] - found[False]) / count:.3f} |"
        )
    text = f"""# Rolling back a mixture of experts

Made by `python -m benchmarks.speed.experts`. {statement()}

2 % of the neurons at random, from folder to folder in bfloat16, finding the neurons included; CPU seconds, the fastest
of {ROUNDS} rounds.

| experts | GB | their tensors | CPU s | of a dense model of as many bytes | ratio | more, in ms a tensor |
|---|---:|---:|---:|---:|---:|---:|
""" + "\n".join(rows)
    RESULTS.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    from transformers import Qwen3ForCausalLM, Qwen3MoeForCausalLM  # noqa: F401  (read here, not in what is measured)

    main()
