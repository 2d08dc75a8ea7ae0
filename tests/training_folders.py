"""Training checkpoints of tiny models, written by real FSDP2 with several gloo processes.

python tests/training_folders.py FOLDER WORLD RANK     what each of the processes runs
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

SIZES = dict(
    vocab_size=65, hidden_size=32, intermediate_size=50, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
KINDS = ("llama", "phi3", "qwen3_moe")  # biased and tied, fused, experts: none of their sizes is even
STAGES = ("earlier", "later")


def model_of(kind: str, stage: str) -> nn.Module:
    """A tiny model in float32: each stage moves every weight of the one before."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, Qwen3MoeConfig

    configs: dict[str, Any] = {
        "llama": lambda: LlamaConfig(**SIZES, mlp_bias=True, attention_bias=True, tie_word_embeddings=True),
        "phi3": lambda: Phi3Config(**SIZES),
        "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=20),
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configs[kind]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
            parameter += 0.01 * (stage == "later") * torch.randn_like(parameter)
    return model


def step(model: nn.Module) -> torch.optim.Optimizer:
    """One step of AdamW that leaves the weights as they are, for its state."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    tokens = torch.arange(24).reshape(2, 12) % 60 + 3
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    return optimizer


def write(folder: Path, world: int, rank: int) -> None:
    """What one process saves: for every kind and stage a plain folder, rank files, and distributed checkpoints."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))
    for kind in KINDS:
        for stage in STAGES:
            model, home = model_of(kind, stage), folder / kind / stage
            if rank == 0:
                model.save_pretrained(home / "plain")
            dist.barrier()
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            optimizer = step(model)
            state = model.state_dict()
            ranks = home / "ranks"
            (ranks / "huggingface").mkdir(parents=True, exist_ok=True)
            ending = f"world_size_{world}_rank_{rank}.pt"
            torch.save(state, ranks / f"model_{ending}")
            torch.save(optimizer.state_dict(), ranks / f"optim_{ending}")
            torch.save(
                {"lr_scheduler": {"last_epoch": 7}, "rng": torch.get_rng_state()}, ranks / f"extra_state_{ending}"
            )
            weights, moments = get_state_dict(model, optimizer)
            dcp.save({"app": {"model": weights, "optim": moments, "step": 7}}, checkpoint_id=home / "dcp")
            dcp.save({"model": weights}, checkpoint_id=home / "accelerate" / "pytorch_model_fsdp_0")
            dcp.save({"optimizer": moments}, checkpoint_id=home / "accelerate" / "optimizer_0")
            tied = {"lm_head.weight"} if kind == "llama" else set()
            writer = HuggingFaceStorageWriter(path=str(home / "cut"), save_distributed=True)
            dcp.save({name: one for name, one in state.items() if name not in tied}, storage_writer=writer)
            dist.barrier()
            if rank == 0:
                for place in (ranks / "huggingface", home / "dcp", home / "accelerate", home / "cut"):
                    model.config.save_pretrained(place)
                told = {"FSDP_version": 2, "world_size": world}
                (ranks / "fsdp_config.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


def as_ranks(plain: Path, place: Path, world: int = 2, copies: int = 1, device: str = "cpu") -> None:
    """The tensors of a plain folder as the rank files of a model and its optimizer, all written by this process.

    Args:
        plain: the folder.
        place: where to write.
        world: the number of ranks.
        copies: how many of them hold the same rows (1: a mesh of FSDP alone).
        device: the kind of device that the mesh is said to be of.
    """
    import torch.distributed as dist
    from safetensors.torch import load_file
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    (place / "huggingface").mkdir(parents=True)
    for path in set(plain.glob("*.json")) - set(plain.glob("*.index.json")):
        (place / "huggingface" / path.name).write_bytes(path.read_bytes())
    whole = {name: tensor for path in sorted(plain.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    parts = world // copies
    for rank in range(world):
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        sizes, names = ((world,), ("fsdp",)) if copies == 1 else ((copies, parts), ("ddp", "fsdp"))
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
        places = [*[Replicate()] * (copies > 1), Shard(0)]

        def sharded(tensor: torch.Tensor, mesh: Any = mesh, at: int = rank % parts, places: Any = places) -> DTensor:
            rows = -(-len(tensor) // parts)
            local, like = tensor[at * rows : (at + 1) * rows].clone(), (tensor.shape, tensor.stride())
            return DTensor.from_local(local, mesh, places, run_check=False, shape=like[0], stride=like[1])

        ending = f"world_size_{world}_rank_{rank}.pt"
        weights = {name: sharded(tensor) for name, tensor in whole.items()}
        moments = {
            number: {"step": torch.tensor(7.0), "exp_avg": sharded(tensor), "exp_avg_sq": sharded(tensor.square())}
            for number, tensor in enumerate(whole.values())
        }
        state = {"state": moments, "param_groups": [{"lr": 1e-4, "params": [*moments]}]}
        mesh._device_type = device  # as a GPU's mesh is written
        torch.save(weights, place / f"model_{ending}")
        torch.save(state, place / f"optim_{ending}")
        dist.destroy_process_group()


def as_distributed(plain: Path, place: Path) -> None:
    """The tensors of a plain folder as a distributed checkpoint of torch, written by this process."""
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import load_file

    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_bytes((plain / "config.json").read_bytes())
    whole = {name: tensor for path in sorted(plain.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process saves alone
        dcp.save({"model": whole}, checkpoint_id=place, no_dist=True)


def written(folder: Path, world: int) -> Path:
    """The folder, filled by as many processes as there are ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__, str(folder), str(world)]
    running = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(world)]
    try:
        assert [one.wait(timeout=300) for one in running] == [0] * world
    finally:
        for one in running:
            one.kill()
    return folder


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
