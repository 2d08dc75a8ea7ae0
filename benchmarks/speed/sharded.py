"""What a selection costs with the model in two processes, beside one: ``python -m benchmarks.speed.sharded``.

On a tiny random model of a Qwen3 shape, float32, one thread a process, in the shell; the ratio is what tells.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.hardware import statement
from benchmarks.lab.tokenizer import build_tokenizer

REPEATS = 2


def made(folder: Path) -> None:
    """Two checkpoints of 28 million parameters, and 32 prompts."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = build_tokenizer()
    config = Qwen3Config(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        head_dim=64, vocab_size=len(tokenizer), tie_word_embeddings=True, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    for stage in ("earlier", "later"):
        model.save_pretrained(folder / stage)
        tokenizer.save_pretrained(folder / stage)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
    lines = [f'{{"prompt": "{at}+{at + 1}=", "response": "{2 * at + 1} {"0123456789" * 3}"}}' for at in range(10, 42)]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")


def spent(command: list[str], folder: Path) -> tuple[float, float]:
    """Wall and CPU seconds of a command and its children, the least of a few runs."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    walls, cpus = [], []
    for _ in range(REPEATS):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        walls.append(time.perf_counter() - start)
        cpus.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(walls), min(cpus)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made(folder)
        asked = [str(folder / "earlier"), str(folder / "later"), "--data", str(folder / "data.jsonl"), "--dry-run"]
        one = [sys.executable, "-m"]
        two = [*one, "torch.distributed.run", "--nproc-per-node", "2", "-m"]
        print(f"{statement()}\nQwen3 shape with 28 M parameters, float32, 32 prompts, one thread a process\n")
        print("| surgery select, the shell and all | wall s | CPU s | wall, of one process | CPU, of one process |")
        print("|---|---|---|---|---|")
        base = spent([*one, "surgery", "inspect", str(folder / "later")], folder)
        print(f"| starting, and looking at a checkpoint (inspect) | {base[0]:.1f} | {base[1]:.1f} | | |", flush=True)
        alone = spent([*one, "surgery", "select", *asked], folder)
        print(f"| D of units, one process | {alone[0]:.1f} | {alone[1]:.1f} | 1 | 1 |", flush=True)
        for how in ("fsdp", "tp"):
            wall, cpu = spent([*two, "surgery", "select", *asked, "--shard", how], folder)
            ratios = f"{wall / alone[0]:.2f} | {cpu / alone[1]:.2f}"
            print(f"| D of units, two processes, {how} | {wall:.1f} | {cpu:.1f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
