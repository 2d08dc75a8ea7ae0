"""What a folder holds: which way of storing a model it is, and where its configuration lies."""

from __future__ import annotations

from pathlib import Path

from surgery.formats import distributed, ranks
from surgery.formats.distributed import METADATA, stored_distributed
from surgery.formats.ranks import MODEL, OPTIMIZER, rank_files, stored_ranks
from surgery.formats.shards import INDEX, SHARDING, header_of, inside, stored_shards, weight_map
from surgery.formats.stored import DISTRIBUTED, RANKS, Stored

ADAPTER = "adapter_config.json"
MERGE = "merge it (peft: merge_and_unload, then save_pretrained) and pass the folder of the result"
NESTED = ("model/huggingface/",)  # verl's Megatron checkpoints: safetensors there
_HOMES = ("", "huggingface/", "model/huggingface/")  # where config.json may lie
_DISTRIBUTED = ("", "pytorch_model_fsdp_0/")  # where .metadata may lie: torch's own, accelerate's
_OPTIMIZERS = (*_DISTRIBUTED, "optimizer_0/")
_SHARDED = ("", "sharded/")  # where distributed safetensors may lie: torch's own, torchtitan's
# what torch's optimizers call their running means; anything else of a parameter's shape may be the weights themselves
MOMENTS = (
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg", "acc_delta",
    "sum",
)  # fmt: skip
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def home_of(folder: Path) -> Path:
    """The folder with the model's ``config.json`` (and its tokenizer): the checkpoint's own, or one inside it."""
    return next((folder / home for home in _HOMES if (folder / home / "config.json").is_file()), folder)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model's own weights."""
    return (folder / ADAPTER).is_file() and not _whole(folder)


def stored_in(folder: Path) -> Stored:
    """How a folder stores a model's tensors.

    Raises:
        LookupError: there are no weights in it, or a file that belongs to them is missing.
        ValueError: pickled weights or an adapter only, a damaged file, or one that points outside the folder.
    """
    if files := _whole(folder):  # first, as transformers and servers do
        return stored_shards(folder, files)
    if files := rank_files(folder, MODEL):
        return stored_ranks(folder, files)
    for place in _DISTRIBUTED:
        if (folder / place / METADATA).is_file():
            return stored_distributed(folder, place)
    for place in NESTED:
        if files := _whole(folder / place):
            return stored_shards(folder, [f"{place}{file}" for file in files])
    for place in _SHARDED:
        if files := _pieces(folder / place):
            return stored_shards(folder, [f"{place}{file}" for file in files])
    raise _nothing(folder)


def moments_in(folder: Path, stored: Stored) -> Stored | None:
    """The optimizer's state that a training checkpoint holds beside its model, as tensors ``NAME/exp_avg``, or None."""
    if stored.kind == RANKS:
        return ranks.moments(folder)
    for place in _OPTIMIZERS if stored.kind == DISTRIBUTED else ():
        if (folder / place / METADATA).is_file() and (found := distributed.moments(folder, place)).shapes:
            return found
    return None


def holds_moments(folder: Path, stored: Stored) -> bool:
    """Whether a training checkpoint holds an optimizer's state."""
    if stored.kind == RANKS:
        return bool(rank_files(folder, OPTIMIZER))
    return moments_in(folder, stored) is not None


def _whole(folder: Path) -> list[str]:
    """The safetensors files of a folder that hold whole tensors, as transformers reads them."""
    index, single = folder / INDEX, folder / "model.safetensors"
    if index.exists():
        shards = [inside(folder, name) for name in dict.fromkeys(weight_map(index).values())]
        if single.exists() and single not in shards:  # transformers would read the one, others read the shards
            raise ValueError(f"{folder} holds both {single.name} and {INDEX}: remove the one that is stale")
        return [str(path.relative_to(folder)) for path in shards]
    if single.exists():
        return [inside(folder, single.name).name]
    found = sorted(set(folder.glob("*.safetensors")) - set(folder.glob("adapter_*")))
    if len(found) == 1 and not _cut(found[0]):
        return [inside(folder, found[0].name).name]
    if found and not all(map(_cut, found)):
        raise LookupError(f"{folder} has {len(found)} safetensors files and no {INDEX} to say which belong")
    return []


def _pieces(folder: Path) -> list[str]:
    """The safetensors files of a folder that hold pieces of tensors."""
    return [inside(folder, path.name).name for path in sorted(folder.glob("*.safetensors")) if _cut(path)]


def _cut(path: Path) -> bool:
    return SHARDING in (header_of(path).get("__metadata__") or {})


def _nothing(folder: Path) -> Exception:
    if adapter := next(folder.glob("adapter_*"), None):
        return ValueError(f"{folder} holds an adapter ({adapter.name}) without its {ADAPTER}: {MERGE}")
    if inner := [path.parent.name for path in sorted(folder.glob(f"*/{MODEL}_world_size_*_rank_0.pt"))]:
        return LookupError(f"{folder} holds the checkpoints {', '.join(dict.fromkeys(inner))}: pass one of them")
    if pickles := [path.name for pattern in _PICKLES for path in folder.glob(pattern)]:
        return ValueError(
            f"{folder} holds pickled weights only ({', '.join(pickles[:3])}); loading a pickle can run code, "
            f"so they are never opened. Convert them once: model.save_pretrained(folder) writes safetensors"
        )
    return LookupError(f"{folder} has no safetensors file: expected a checkpoint's folder, with its config.json")
