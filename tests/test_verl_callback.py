"""verl's checkpoint callback: made and called as verl does it, on the folders that verl writes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, pair
from test_rollback_callback import CHOICE, asked
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training_folders import step

from surgery import Checkpoint, rolled_back
from surgery.formats.stored import RANKS
from surgery.masks import load_mask
from surgery.training import VerlRollbackCallback

PLACES = ("actor/huggingface", "actor/model/huggingface", "actor")


class Config(dict[str, Any]):
    """A stand-in for verl's DictConfig: keys as attributes, too."""

    __getattr__ = dict.__getitem__


class StandIn:
    """verl's v1 trainer as far as a callback sees it: made with ``config=``, called by keywords after the save."""

    def __init__(self, kind: type, config: Any) -> None:
        self.callback = kind(config=config)

    def save(self, step: int, folder: Path, async_save: bool = False) -> None:
        self.callback.on_save(
            trainer=self, global_step=step, checkpoint_dir=str(folder), async_save=async_save, added_later=1
        )


def config(earlier: Path) -> Any:
    return Config(actor_rollout_ref=Config(model=Config(path=str(earlier))))


def watched(prompts: Any, said: list[str], **settings: Any) -> type:
    """The subclass that a user names in ``trainer.checkpoint_callback_class``."""

    class Watched(VerlRollbackCallback):
        def __init__(self, config: Any) -> None:
            super().__init__(prompts, config=config, say=said.append, **CHOICE, **settings)

    return Watched


def rank_files(model: Any, folder: Path) -> None:
    """What verl's FSDP saves, by FSDP2 itself with one process: float32 shards and AdamW's state, no plain weights."""
    (folder / "huggingface").mkdir(parents=True)
    model.config.save_pretrained(folder / "huggingface")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("fsdp",))
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh)
        optimizer = step(model)
        torch.save(model.state_dict(), folder / "model_world_size_1_rank_0.pt")
        torch.save(optimizer.state_dict(), folder / "optim_world_size_1_rank_0.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture
def stage(tmp_path: Path) -> tuple[Path, Path, Any]:
    """The folder of the model before, verl's folder of a step, and prompts that the stage hurt."""
    earlier, later = pair("qwen3", step=0.2)
    earlier.save_pretrained(tmp_path / "math")
    folder = tmp_path / "global_step_7"
    for place in PLACES:
        (folder / place).mkdir(parents=True, exist_ok=True)
    later.config.save_pretrained(folder / PLACES[0])  # as verl does without hf_model: no weights
    return tmp_path / "math", folder, {"old": asked(earlier)}


@pytest.mark.parametrize("place", PLACES[:2])
def test_a_saved_checkpoint_is_judged_and_repaired_beside_it(place, stage):
    earlier, folder, prompts = stage
    pair("qwen3", step=0.2)[1].save_pretrained(folder / place)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    said: list[str] = []
    trainer = StandIn(watched(prompts, said, repair=True, strict=True), config(earlier))
    trainer.save(7, folder)
    assert said[0].startswith("step 7: The stage hurt old.\nold: hurt, can be repaired: old lost ")
    assert all(path.read_bytes() == held for path, held in before.items())
    mask = load_mask(folder / "surgery/mask.safetensors")
    healed, by_hand = Checkpoint(folder / "surgery/repaired"), rolled_back(folder / place, to=earlier, mask=mask)
    assert all(torch.equal(healed[name], tensor) for name, tensor in by_hand.items())
    assert not all(torch.equal(healed[name], tensor) for name, tensor in Checkpoint(folder / place).items())


@pytest.mark.parametrize("family", ["phi3", "qwen3"])
def test_rank_files_are_judged_and_repaired_for_a_run_that_is_resumed(family, tmp_path):
    earlier, later = pair(family, step=0.2)
    earlier.save_pretrained(tmp_path / "math")
    folder, said = tmp_path / "global_step_7", []
    rank_files(later, folder / "actor")
    watching = watched({"old": asked(earlier)}, said, repair=True, strict=True)
    StandIn(watching, config(tmp_path / "math")).save(7, folder)
    assert said[0].startswith("step 7: The stage hurt old.\nold: hurt, can be repaired: ")
    mask = load_mask(folder / "surgery/mask.safetensors")
    before, healed = Checkpoint(folder / "actor"), Checkpoint(folder / "surgery/repaired")
    by_hand = rolled_back(before, to=tmp_path / "math", mask=mask)
    assert healed.stored.kind == RANKS
    assert all(torch.equal(healed[name], tensor) for name, tensor in by_hand.items())
    old, new = (optimizer_of(one.folder) for one in (before, healed))
    assert old.keys() == new.keys()
    for name, state in old.items():
        put = by_hand[name] != before[name]
        for moment in ("exp_avg", "exp_avg_sq"):
            assert not new[name][moment][put].any()
            assert torch.equal(new[name][moment][~put], state[moment][~put])
    assert any(bool((by_hand[name] != before[name]).any()) for name in old)


def optimizer_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The optimizer's state by the parameter's name, whole, as torch reads it."""
    found = torch.load(folder / "optim_world_size_1_rank_0.pt", weights_only=True)
    names = torch.load(folder / "model_world_size_1_rank_0.pt", weights_only=True)
    return {
        name: {moment: whole(value) for moment, value in found["state"][at].items()}
        for at, name in enumerate(names)
        if at in found["state"]
    }


def whole(value: Any) -> torch.Tensor:
    return value.to_local() if hasattr(value, "to_local") else value


def test_without_repair_only_the_verdict_and_the_mask_are_written(stage):
    earlier, folder, prompts = stage
    pair("qwen3", step=0.2)[1].save_pretrained(folder / PLACES[0])
    rows: list[Any] = []
    callback = watched(prompts, [], strict=True, log=rows.append)(config(earlier))
    callback.on_save(None, 7, str(folder))
    written = sorted(path.name for path in (folder / "surgery").iterdir())
    assert written == ["mask.safetensors", "stage.json", "verdict.txt"]
    assert rows[0]["step"] == 7
    assert rows[0]["hurt/old"] == 1


def test_a_stage_that_changed_nothing_hurt_nothing(stage):
    earlier, folder, prompts = stage
    build("qwen3").save_pretrained(folder / PLACES[1])
    said: list[str] = []
    StandIn(watched(prompts, said, repair=True, strict=True), config(earlier)).save(7, folder)
    assert said[0].startswith("step 7: The stage hurt no domain. Not hurt: old.")
    assert not (folder / "surgery/repaired").exists()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("why", ["asynchronous", "no weights", "another model"])
def test_a_failure_does_not_end_the_training_unless_asked(why, strict, stage, caplog):
    earlier, folder, prompts = stage
    if why == "another model":
        build("llama").save_pretrained(folder / PLACES[0])
    message = {
        "asynchronous": "it is saved asynchronously, and its files may still be incomplete",
        "no weights": "has no safetensors file",
        "another model": "are different models",
    }[why]
    trainer = StandIn(watched(prompts, [], strict=strict), config(earlier))
    if strict:
        with pytest.raises((ValueError, LookupError), match=message):
            trainer.save(7, folder, async_save=why == "asynchronous")
        return
    with caplog.at_level(logging.ERROR):
        trainer.save(7, folder, async_save=why == "asynchronous")
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"surgery did not measure {folder}: ")
    assert message in caplog.messages[0]
    assert not (folder / "surgery").exists()


def test_what_the_earlier_model_is_has_to_be_known(stage):
    for given in (None, {}, {"actor_rollout_ref": {}}, {"actor_rollout_ref": {"model": None}}):
        with pytest.raises(ValueError, match="the model that training began with is not known: pass earlier="):
            VerlRollbackCallback(stage[2], config=given)
    with pytest.raises(ValueError, match="the domain 'old' has 0 prompts"):
        VerlRollbackCallback({"old": []}, earlier=stage[0])
