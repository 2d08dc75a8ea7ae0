"""What reads files that others wrote, one target a kind of file; what is accepted has to be right."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.lab.tokenizer import build_tokenizer
from surgery import (
    Checkpoint,
    Entries,
    Neurons,
    Patch,
    RandomSelector,
    Trajectory,
    allocate,
    load_prompts,
    rolled_back,
    save,
    save_patch,
    sweep,
    top,
)
from surgery.cli.options import layout_of
from surgery.layout import find_layout
from surgery.live import distillation, respond
from surgery.masks.entries import shapes_of
from surgery.masks.mask import load_mask
from surgery.measure import load_sweep
from tests.training_folders import as_distributed, as_ranks

Files = dict[str, bytes]
PROMPTS = [{"prompt": "1+1=", "response": "2"}, {"prompt": "12*3=", "response": "36"}, {"prompt": "a", "response": "b"}]
ANSWERS = dict(max_new_tokens=4, seed=1)


def score(model: Any) -> dict[str, Any]:
    """An evaluation that costs nothing: two metrics, one with items."""
    mean = float(next(model.parameters()).detach().double().mean())
    return {"math": [mean, 1.0, 0.0], "qa": mean}


@dataclass
class Desk:
    """A folder with two stages of a tiny model, and all files that the targets read, sound."""

    root: Path
    made: dict[str, Files] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        tokenizer = build_tokenizer()
        sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=8)
        config = Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=1, max_position_embeddings=64, **sizes)
        for seed, name in enumerate(("earlier", "later")):
            torch.manual_seed(seed)
            Qwen3ForCausalLM(config).save_pretrained(self.root / name)
            tokenizer.save_pretrained(self.root / name)
        self.tokenizer = tokenizer
        self.model = Trajectory(later=self.earlier).load()
        self.layout = find_layout(self.model)
        self.run = Trajectory(earlier=self.earlier, later=self.later)
        self.run.load()

    @property
    def earlier(self) -> Path:
        return self.root / "earlier"

    @property
    def later(self) -> Path:
        return self.root / "later"

    @cached_property
    def mask(self) -> Neurons:
        draw = torch.Generator().manual_seed(0)
        flags = {name: torch.rand(size, generator=draw) for name, size in self.layout.sizes.items()}
        missing = {name: value > 0.8 for name, value in flags.items()}
        return RandomSelector(0.2).select(self.run) & Neurons(
            {name: value < 2 for name, value in flags.items()}, missing=missing
        )

    def files(self, kind: str) -> Files:
        """The sound files of a kind."""
        if kind not in self.made:
            place = self.root / "sound" / kind
            place.mkdir(parents=True)
            TARGETS[kind].make(self, place)
            paths = [path for path in sorted(place.rglob("*")) if path.is_file()]
            self.made[kind] = {str(path.relative_to(place)): path.read_bytes() for path in paths}
        return self.made[kind]


@dataclass(frozen=True)
class Target:
    """``make`` writes sound files into a folder, and those that end with ``which`` are damaged.

    ``use`` reads them. It gets the folder, and another one that it may write into; where ``resumes``, both are one.
    """

    make: Callable[[Desk, Path], Any]
    use: Callable[[Desk, Path, Path], Any]
    which: tuple[str, ...]
    resumes: bool = False


def copied(desk: Desk, place: Path) -> None:
    for path in desk.later.iterdir():
        (place / path.name).write_bytes(path.read_bytes())


def sharded(desk: Desk, place: Path) -> None:
    copied(desk, place)
    tensors = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    names = sorted(tensors)
    for at, file in enumerate("ab"):
        save_file({name: tensors[name] for name in names[at::2]}, place / f"{file}.safetensors")
    where = {name: "ab"[at % 2] + ".safetensors" for at, name in enumerate(names)}
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys(), "other tensors"
    for name, tensor in expected.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), f"{name}: another kind"
        assert bits(found[name]) == bits(tensor), f"{name}: other numbers"


def healed(desk: Desk, later: Path, mask: Any, out: Path, **settings: Any) -> dict[str, Tensor]:
    """The tensors of the later folder with the mask reverted, from the files that the library wrote."""
    save(rolled_back(later, to=desk.earlier, mask=mask, **settings), out / "healed")
    found = {}
    for path in (out / "healed").glob("*.safetensors"):
        found |= load_file(path)
    return found


def reverted(desk: Desk, chosen: dict[str, Tensor]) -> dict[str, Tensor]:
    """What ``healed`` has to give: each part, "BLOCK/PART" → bool [neuron, width], set back; computed without it."""
    earlier, found = load_file(desk.earlier / "model.safetensors"), load_file(desk.later / "model.safetensors")
    for part, flags in chosen.items():
        block, _, name = part.rpartition("/")
        tensor = f"{block}.{name}_proj.weight"
        flags = flags.T if name == "down" else flags
        found[tensor][flags] = earlier[tensor][flags]
    return found


def headers(desk: Desk, place: Path, out: Path) -> None:
    expected: dict[str, Tensor] = {}
    problem = None
    try:
        for file in place.glob("*.safetensors"):
            with safe_open(file, "pt") as held:
                expected |= {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    except Exception as error:
        problem = error
    found = dict(Checkpoint(place))
    assert problem is None, f"safetensors refuses what was opened: {problem}"
    same(found, expected)
    after = healed(desk, place, desk.mask, out)
    untouched = {name for name in expected if "mlp" not in name}
    same({n: t for n, t in after.items() if n in untouched}, {n: t for n, t in expected.items() if n in untouched})


def masks(desk: Desk, place: Path, out: Path) -> None:
    mask, held = load_mask(place / "m.safetensors"), load_file(place / "m.safetensors")
    found = healed(desk, desk.later, mask, out)
    chosen = {}
    for part, (_, width) in shapes_of(desk.layout).items():
        block = part.rpartition("/")[0]
        flags = held[block] & ~held.get(f"missing:{block}", torch.zeros_like(held[block]))
        assert flags.dtype == torch.bool
        assert flags.shape == (24,)
        chosen[part] = flags[:, None].expand(-1, width)
    same(found, reverted(desk, chosen))
    again(mask, out)


def entries(desk: Desk, place: Path, out: Path) -> None:
    mask, held = load_mask(place / "m.safetensors"), load_file(place / "m.safetensors")
    found = healed(desk, desk.later, mask, out)
    chosen = {}
    for part, shape in shapes_of(desk.layout).items():
        flags = torch.zeros(shape, dtype=torch.bool).flatten()
        flags[held.get(part, torch.zeros(0, dtype=torch.int64))] = True
        chosen[part] = flags.view(shape)
    same(found, reverted(desk, chosen))
    again(mask, out)


def again(mask: Any, out: Path) -> None:
    """What was read is written and read again."""
    assert repr(mask)
    mask.save(out / "again.safetensors")
    assert type(mask).load(out / "again.safetensors") == mask


def scores(desk: Desk, place: Path, out: Path) -> None:
    found = Neurons.load(place / "s.safetensors")
    again(found, out)
    assert top(found, allocate(found.relative(), 0.1)).is_mask
    healed(desk, desk.later, desk.mask, out, strength=found)


def write_prompts(desk: Desk, place: Path) -> None:
    (place / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in PROMPTS))


def prompts(desk: Desk, place: Path, out: Path) -> None:
    for batch in load_prompts(place / "p.jsonl", desk.tokenizer):
        assert all(value.shape == batch["input_ids"].shape and value.dtype == torch.int64 for value in batch.values())
        assert 0 <= int(batch["input_ids"].min()) <= int(batch["input_ids"].max()) < len(desk.tokenizer)


def batches(desk: Desk, labels: bool) -> list[dict[str, Tensor]]:
    """The prompts, from memory."""
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return [{**plain, "labels": torch.tensor([[-100, 4, 5], [-100, -100, 8]])} if labels else plain]


def write_sweep(desk: Desk, place: Path) -> None:
    resumed(desk, place, place)


def resumed(desk: Desk, place: Path, out: Path) -> None:
    selectors = [RandomSelector(0.1), RandomSelector(0.1, seed=1)]
    found = sweep(desk.run, None, selectors=selectors, budgets=[0.1, 0.5], evaluate=score, path=place / "s.jsonl")
    assert len(found) == 7
    assert str(found)


def sweeps(desk: Desk, place: Path, out: Path) -> None:
    found = load_sweep(place / "s.jsonl")
    assert str(found)
    lines = [json.loads(line) for line in (place / "s.jsonl").read_text(errors="replace").splitlines() if line.strip()]
    told = {(line["selector"], line["budget"]): (line["neurons"], line["metrics"]) for line in lines[1:]}
    read = {(row.selector, row.budget): (row.neurons, row.metrics) for row in found}
    assert {key: row for key, row in read.items() if key[0] not in ("earlier", "later")} == {
        key: row for key, row in told.items() if key[0] not in ("earlier", "later")
    }


def answers(desk: Desk, place: Path, out: Path) -> None:
    found = respond(desk.model, batches(desk, labels=False), path=place / "a.jsonl", **ANSWERS)
    lines = [json.loads(line) for line in (place / "a.jsonl").read_text().splitlines()]
    replies = [row[mask].tolist() for b in found for row, mask in zip(b["labels"], b["labels"] != -100, strict=True)]
    assert replies == [line["response_ids"] for line in lines[1:]]


def predictions(desk: Desk, place: Path, out: Path) -> None:
    loss = distillation(desk.model, batches(desk, labels=True), place)
    assert loss(desk.model, batches(desk, labels=True)[0]).ndim == 0


def configurations(desk: Desk, place: Path, out: Path) -> None:
    same(healed(desk, place, desk.mask, out), healed(desk, desk.later, desk.mask, out / "sound"))


def tokenizers(desk: Desk, place: Path, out: Path) -> None:
    for batch in load_prompts(place / "p.jsonl", place):
        assert int(batch["input_ids"].min()) >= 0


def write_patch(desk: Desk, place: Path) -> None:
    save_patch(rolled_back(desk.later, to=desk.earlier, mask=desk.mask), place / "patch")


def patches(desk: Desk, place: Path, out: Path) -> None:
    """What is accepted makes the rolled-back checkpoint, in the folder and in the live model."""
    expected, model = dict(rolled_back(desk.later, to=desk.earlier, mask=desk.mask)), desk.run.load()
    patch, before = Patch(place / "patch"), {name: one.clone() for name, one in model.state_dict().items()}
    assert repr(patch)
    found = dict(patch.applied(desk.later))
    assert patch.papers(False, None)
    same(found, expected)
    with patch.apply(model):
        now = {name: one.clone() for name, one in model.state_dict().items()}
    same({name: now[name] for name in expected}, expected)
    same(dict(model.state_dict()), before)


def write_layout(desk: Desk, place: Path) -> None:
    mlp = {"gate_proj.weight": "n d -> n d", "up_proj.weight": "n d -> n d", "down_proj.weight": "d n -> n d"}
    (place / "l.json").write_text(json.dumps({"model.layers.{layer}.mlp": mlp}))


def layouts(desk: Desk, place: Path, out: Path) -> None:
    layout = layout_of(place / "l.json", str(desk.later))
    for block in layout.blocks if layout else ():
        assert all(slot.width and slot.neurons == block.neurons for slot in block.slots)


def write_entries(desk: Desk, place: Path) -> None:
    shapes = shapes_of(desk.layout)
    some = {part: torch.arange(3, neurons * width, 7) for part, (neurons, width) in list(shapes.items())[:4]}
    Entries(some, shapes=shapes, made_by=desk.mask.made_by).save(place / "m.safetensors")


def write_scores(desk: Desk, place: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    values = {name: torch.rand(size, generator=draw) * 2 for name, size in desk.layout.sizes.items()}
    Neurons(values, missing=desk.mask.missing, made_by=desk.mask.made_by).save(place / "s.safetensors")


def write_tokenizer(desk: Desk, place: Path) -> None:
    desk.tokenizer.save_pretrained(place)
    write_prompts(desk, place)


def write_ranks(desk: Desk, place: Path) -> None:
    as_ranks(desk.later, place)


def rank_files(desk: Desk, place: Path, out: Path) -> None:
    found = dict(Checkpoint(place))
    logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)
    parts = [torch.load(place / f"model_world_size_2_rank_{rank}.pt", weights_only=True) for rank in range(2)]
    same(found, {name: torch.cat([part[name].to_local() for part in parts]) for name in parts[0]})
    save(rolled_back(place, to=desk.earlier, mask=desk.mask), out / "healed")
    after = dict(Checkpoint(out / "healed"))
    same({n: t for n, t in after.items() if "mlp" not in n}, {n: t for n, t in found.items() if "mlp" not in n})


def distributed(desk: Desk, place: Path, out: Path) -> None:
    import torch.distributed.checkpoint as dcp

    found = dict(Checkpoint(place))
    read = {name: torch.empty_like(tensor) for name, tensor in found.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dcp.load({"model": read}, checkpoint_id=place, no_dist=True)
        except BaseException:  # torch checks what we have no need of
            read = found
    same(found, read)
    save(rolled_back(place, to=desk.earlier, mask=desk.mask), out / "healed")
    after = dict(Checkpoint(out / "healed"))
    same({n: t for n, t in after.items() if "mlp" not in n}, {n: t for n, t in found.items() if "mlp" not in n})


def write_adapter(desk: Desk, place: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    settings = LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"], init_lora_weights=False,
        rank_pattern={"layers.1.mlp.up_proj": 2}, alpha_pattern={"down_proj": 4}, task_type="CAUSAL_LM",
    )  # fmt: skip
    get_peft_model(copy.deepcopy(desk.model), settings).save_pretrained(place)
    (place / "README.md").unlink()


def by_peft(desk: Desk, place: Path) -> dict[str, Tensor] | None:
    """What peft's merge makes of an adapter; None where peft refuses it or does not read all of it."""
    from peft import PeftModel, get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = PeftModel.from_pretrained(copy.deepcopy(desk.model), place)
            read = get_peft_model_state_dict(model).keys()
            if read != load_file(place / "adapter_model.safetensors").keys():
                return None
            return dict(model.merge_and_unload().state_dict())
        except Exception:  # whatever damage makes it raise
            return None


def adapters(desk: Desk, place: Path, out: Path) -> None:
    found = dict(Checkpoint(place, base=desk.earlier))
    expected = by_peft(desk, place)
    same(found, found if expected is None else expected)
    save(rolled_back(place, to=desk.earlier, mask=desk.mask), out / "healed")
    base = load_file(desk.earlier / "model.safetensors")
    for block, flags in desk.mask.items():
        for part in ("gate", "up", "down"):
            rows, there = (one[f"{block}.{part}_proj.weight"] for one in (found, base))
            (rows.T if part == "down" else rows)[flags] = (there.T if part == "down" else there)[flags]
    same(dict(Checkpoint(out / "healed", base=desk.earlier)), found)
    again = by_peft(desk, out / "healed")
    same(found, found if again is None else again)


TARGETS = {
    "headers": Target(copied, headers, (".safetensors",)),
    "indices": Target(sharded, headers, (".index.json",)),
    "masks of neurons": Target(lambda desk, place: desk.mask.save(place / "m.safetensors"), masks, (".safetensors",)),
    "masks of single weights": Target(write_entries, entries, (".safetensors",)),
    "scores": Target(write_scores, scores, (".safetensors",)),
    "prompts": Target(write_prompts, prompts, (".jsonl",)),
    "sweeps": Target(write_sweep, sweeps, (".jsonl",)),
    "resumed sweeps": Target(write_sweep, resumed, (".jsonl",), resumes=True),
    "answers": Target(lambda desk, place: answers(desk, place, place), answers, (".jsonl",), resumes=True),
    "predictions": Target(lambda desk, place: predictions(desk, place, place), predictions, (".safetensors",), True),
    "configurations": Target(copied, configurations, ("/config.json",)),
    "tokenizers": Target(write_tokenizer, tokenizers, ("tokenizer.json", "tokenizer_config.json")),
    "rank files": Target(write_ranks, rank_files, (".pt",)),
    "distributed checkpoints": Target(
        lambda desk, place: as_distributed(desk.later, place), distributed, (".metadata", ".distcp")
    ),
    "patches": Target(write_patch, patches, (".json", ".safetensors")),
    "adapters": Target(write_adapter, adapters, ("adapter_model.safetensors",)),
    "adapter configurations": Target(write_adapter, adapters, (".json",)),
    "layouts": Target(write_layout, layouts, (".json",)),
}
