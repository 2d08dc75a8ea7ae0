"""What a saved folder takes over: no second copy of the weights without a word, and nothing that changed meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors.torch import save_file
from test_checkpoint import hashes, some, stage

from surgery import Checkpoint, Trajectory, load_prompts, rolled_back, save
from surgery.layout.slots import Block, Slot
from surgery.masks.mask import load_mask
from surgery.masks.neurons import Neurons
from surgery.measure.files import load_sweep
from surgery.reverting import folder as saving
from surgery.reverting.contents import contents_of

OTHERS = [
    "consolidated.safetensors", "consolidated.00.pth", "consolidated.safetensors.index.json", "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "pytorch_model_fsdp_0/__0_0.distcp",
    "model-q4_k_m.gguf", "gguf/model.gguf", "original/consolidated.00.pth", "tf_model.h5", "flax_model.msgpack",
    "onnx/model.onnx", "model-00009-of-00009.safetensors", "mask.safetensors", "checkpoint-500/model.safetensors",
    "adapter_model.safetensors", "adapter_model.bin", "optimizer.pt", "optimizer_0/x.distcp",
    "scheduler.pt", "rng_state.pth", "rng_state_3.pth", "training_args.bin",
    "global_step120/mp_rank_00_model_states.pt",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt", "model_world_size_8_rank_0.pt", ".git/lfs/objects/ab",
    ".cache/huggingface/download/x.metadata", ".mask.safetensors.01234567.partial/new",
    ".eval_results/gsm8k.yaml",
]  # fmt: skip
KEPT = ["tokenizer.json", "generation_config.json", "trainer_state.json", "1_Pooling/config.json", "notes/original.txt"]
DOUBTFUL = ["2_Dense/model.safetensors", "voices.pt", "deep/er/weights.bin", "values.npz"]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return stage(tmp_path / "later", "qwen3", 1), stage(tmp_path / "earlier", "qwen3", 0)


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"other weights")


@pytest.mark.parametrize("name", OTHERS)
def test_other_weights_and_the_state_of_a_run_are_left_out_and_named(pair, tmp_path: Path, name: str) -> None:
    later, earlier = pair
    want = set(hashes(later))
    put(later, name, *KEPT)
    before, view = hashes(later), rolled_back(later, to=earlier, mask=some(families.build("qwen3")))
    with pytest.warns(UserWarning, match=f"left out, .*: {name.split('/')[0]}$"):
        save(view, tmp_path / "out")
    assert set(hashes(tmp_path / "out")) == want | set(KEPT) | {"surgery.json", "README.md", "surgery/mask.safetensors"}
    assert hashes(later) == before
    with pytest.warns(UserWarning, match="left out"):
        save(Checkpoint(later), tmp_path / "copy")
    assert set(hashes(tmp_path / "copy")) == want | set(KEPT)


@pytest.mark.parametrize("name", DOUBTFUL)
def test_what_may_hold_weights_is_kept_and_named(pair, tmp_path: Path, name: str) -> None:
    later, earlier = pair
    put(later, name)
    with pytest.warns(UserWarning, match=f"may hold weights that were not rolled back: {name}$"):
        save(rolled_back(later, to=earlier, mask=some(families.build("qwen3"))), tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == b"other weights"


def test_the_checkpoints_own_shards_are_carried_whatever_their_names(pair, tmp_path: Path) -> None:
    later, earlier = pair
    tensors = {name: Checkpoint(later)[name].clone() for name in Checkpoint(later)}
    for path in later.glob("model*"):
        path.unlink()
    (later / "original").mkdir()
    save_file(tensors, later / "original/consolidated.safetensors", {"format": "pt"})
    index = {"weight_map": dict.fromkeys(tensors, "original/consolidated.safetensors")}
    (later / "model.safetensors.index.json").write_text(json.dumps(index))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = save(rolled_back(later, to=earlier, mask=some(families.build("qwen3"))), tmp_path / "out")
    assert set(Checkpoint(out)) == set(tensors)


def test_the_record_of_a_former_rollback_gives_way(pair, tmp_path: Path) -> None:
    """Its strengths would have been taken for those of this one."""
    later, earlier = pair
    mask = some(families.build("qwen3"))
    each = Neurons({name: torch.full((value.numel(),), 0.5) for name, value in mask.items()})
    save(rolled_back(later, to=earlier, mask=mask, strength=each), tmp_path / "once")
    with pytest.warns(UserWarning, match="left out, .*: surgery$"):
        out = save(rolled_back(tmp_path / "once", to=earlier, mask=mask), tmp_path / "twice")
    assert sorted(os.listdir(out / "surgery")) == ["mask.safetensors"]


@pytest.mark.parametrize("extra", [[], OTHERS, DOUBTFUL])
def test_the_size_is_what_is_written(pair, tmp_path: Path, extra: list[str]) -> None:
    later, earlier = pair
    put(later, *extra, "README.md", *KEPT)
    view = rolled_back(later, to=earlier, mask=some(families.build("qwen3")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(view, tmp_path / "out")
    assert contents_of(view, later).size == sum(map(len, hashes(tmp_path / "out").values()))


@pytest.mark.parametrize("name", ["later/model", "later/config.json", "later/tokenizer.json", "earlier/model"])
@pytest.mark.parametrize("how", ["rewritten", "replaced", "touched"])
@pytest.mark.parametrize("at", [0, 3, -1])
def test_what_changes_while_it_is_copied_is_refused(pair, tmp_path: Path, monkeypatch: Any, name, how, at) -> None:
    later, earlier = pair
    put(later, "tokenizer.json")
    path = next(path for path in sorted(tmp_path.rglob("*")) if str(path.relative_to(tmp_path)).startswith(name))
    view = rolled_back(later, to=earlier, mask=some(families.build("qwen3")))
    clone, copied, count = saving._clone, [], len(hashes(later))

    def change() -> None:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        if how == "replaced":
            (tmp_path / "new").write_bytes(data)
            shutil.copystat(path, tmp_path / "new")
            (tmp_path / "new").rename(path)
        elif how == "rewritten":
            path.write_bytes(data)
        else:
            os.utime(path)

    def cloned(*args: Path) -> None:
        if len(copied) == at % count:
            change()
        copied.append(args)
        clone(*args)

    monkeypatch.setattr(saving, "_clone", cloned)
    with pytest.raises(ValueError, match="was changed while it was being rolled back, and nothing was written"):
        save(view, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out.*"))


def test_weights_that_are_links_to_elsewhere_are_refused_with_the_way_out(pair, tmp_path: Path) -> None:
    later, _ = pair
    shard = next(later.glob("model-*.safetensors"))
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="outside the folder: put the file itself there, or pass the folder that it"):
        Checkpoint(later)


HOME = {
    "a checkpoint": lambda: Checkpoint("~/later").folder.is_absolute(),
    "a trajectory": lambda: Trajectory(earlier="~/earlier", later="~/later").tensors("later").folder.is_absolute(),
    "save": lambda: save(Checkpoint("~/later"), "~/out").is_absolute(),
    "prompts": lambda: load_prompts("~/none.jsonl", "~/later"),
    "a mask": lambda: Neurons({"a": torch.ones(2) > 0}).save("~/out") or load_mask("~/out").total == 2,
    "scores": lambda: Neurons({"a": torch.ones(2)}).save("~/out") or Neurons.load("~/out").total == 2,
    "rows": lambda: load_sweep("~/none.jsonl"),
}


@pytest.mark.parametrize("what", HOME)
def test_a_path_may_begin_with_the_home_directory(pair, tmp_path: Path, monkeypatch: Any, what: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    if what in ("prompts", "rows"):
        with pytest.raises(LookupError, match=f"{tmp_path}/none.jsonl"):
            HOME[what]()
    else:
        assert HOME[what]()
    assert os.listdir(tmp_path / "work") == []


@pytest.mark.parametrize("experts", [4, 16])
def test_every_edit_looks_at_its_own_slots_only(experts: int) -> None:
    """A layer has three slots an expert: all of them for each edit were 10¹⁰ in a large model."""
    neurons, looked = 3, []

    class Watched(Slot):
        def take(self, *arguments: Any) -> torch.Tensor:
            looked.append(self.start)
            return super().take(*arguments)

        @property
        def stop(self) -> int:
            looked.append(self.start)
            return super().stop

    slots = [
        Watched(part, f"{expert}.{part}", "n d -> n d", (neurons, 2), start=expert * neurons)
        for expert in range(experts)
        for part in ("gate", "up")
    ]
    block = Block("mlp", experts * neurons, tuple(slots), "down", experts)
    tensors = {slot.tensor: torch.arange(6).reshape(3, 2) + 100 * slot.start for slot in slots}
    whole = torch.cat([tensors[f"{expert}.gate"] for expert in range(experts)])
    for at in range(len(whole)):
        looked.clear()
        assert torch.equal(block.rows(tensors, "gate", torch.tensor([at])), whole[[at]])
        assert torch.equal(block.entries(tensors, "gate", torch.tensor([2 * at + 1])), whole.flatten()[[2 * at + 1]])
        assert set(looked) == {at // neurons * neurons}
    index = torch.tensor([0, 2, 3, 4, 8, len(whole) - 1])
    assert torch.equal(block.rows(tensors, "up", index), whole[index])
    assert torch.equal(block.entries(tensors, "up", 2 * index), whole.flatten()[2 * index])


@pytest.mark.parametrize("name", ["later", "earlier"])
def test_what_changes_while_it_is_edited_is_refused(pair, tmp_path: Path, name: str) -> None:
    later, earlier = pair
    view = rolled_back(later, to=earlier, mask=some(families.build("qwen3")))
    edit = view.edit

    def edited(*args: Any) -> None:
        os.utime(sorted((tmp_path / name).glob("model-*"))[0])
        edit(*args)

    view.edit = edited  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=f"{name}.* was changed while it was being rolled back, and nothing"):
        save(view, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["earlier", "later"]
