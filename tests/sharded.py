"""What each process of tests/test_sharded.py runs: laws of models that several processes hold together.

``python tests/sharded.py RANK WORLD FOLDER``: every law by itself, and what came of each as JSON in the folder.
"""

from __future__ import annotations

import copy
import json
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path

import families
import torch
import torch.distributed as dist
from torch import nn

FAMILIES = ("qwen3", "phi3", "qwen3_moe")
LIMIT = 60  # seconds that a process waits for the others


def folders(home: Path, family: str) -> tuple[Path, Path]:
    """The folders of an earlier and a later model; made once, by the first process."""
    found = home / family / "earlier", home / family / "later"
    if not found[1].exists() and dist.get_rank() == 0:
        for model, folder in zip(families.pair(family, step=0.05), found, strict=True):
            model.save_pretrained(folder)
    dist.barrier()
    return found


@cache
def whole(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def one(folder: Path) -> nn.Module:
    """The model in one process, the caller's own."""
    return copy.deepcopy(whole(folder))


def sharded(folder: Path, how: str) -> nn.Module:
    """The same model, held by all processes."""
    world = dist.get_world_size()
    if how == "fsdp":
        from torch.distributed.fsdp import fully_shard

        model = one(folder)
        for layer in model.model.layers:
            fully_shard(layer)
        return fully_shard(model)
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    sizes = {"tp": {"tp_size": world}, "fsdp x tp": {"fsdp_size": world // 2, "tp_size": 2}}[how]
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**sizes)).eval()


def run(rank: int, world: int, home: Path, laws: dict[str, Callable[[Path], None]]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    store = f"file://{home}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=LIMIT))
    found = {}
    for name, law in laws.items():
        try:
            law(home)
            found[name] = ""
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        (home / f"{rank}.json").write_text(json.dumps(found))
        if "Timed out" in found[name]:
            break
    dist.destroy_process_group()


if __name__ == "__main__":
    from sharded_laws import LAWS, LAWS_OF_FOUR

    laws = {"2": LAWS, "4": LAWS_OF_FOUR}[sys.argv[2]]
    asked = {name: law for name, law in laws.items() if not sys.argv[4:] or sys.argv[4] in name}
    run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), asked)
