"""Models that read images, too: their language model's neurons, under every name that transformers reads."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from test_scores import batches

from surgery import Checkpoint, DamageSelector, RandomSelector, Trajectory, rollback, rolled_back, save
from surgery.layout import find_layout
from surgery.layout.on_disk import folder_layout
from surgery.live.earlier import earlier_model

_TEXT = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    tie_word_embeddings=False,
)  # fmt: skip
_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
_QWEN = dict(**_TEXT, rope_parameters=_ROPE)
_QWEN3 = dict(**_QWEN, head_dim=8)
_EXPERTS = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=1, mlp_only_layers=[]
)
_TOWER = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32, patch_size=14)
_TOWER3 = dict(**_TOWER, deepstack_visual_indexes=[0], num_position_embeddings=16)
_CLIP = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
)
_TOKENS = dict(image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63)
# the towers are as wide as the language models, so that their neurons look alike
CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen2_vl": lambda: transformers.Qwen2VLConfig(
        text_config=_QWEN, vision_config=dict(_TOWER, embed_dim=32, mlp_ratio=2), **_TOKENS
    ),
    "qwen2_5_vl": lambda: transformers.Qwen2_5_VLConfig(
        text_config=_QWEN, vision_config=dict(_TOWER, fullatt_block_indexes=[1]), **_TOKENS
    ),
    "qwen3_vl": lambda: transformers.Qwen3VLConfig(text_config=_QWEN3, vision_config=_TOWER3, **_TOKENS),
    "qwen3_vl_moe": lambda: transformers.Qwen3VLMoeConfig(
        text_config=dict(_QWEN3, **_EXPERTS), vision_config=_TOWER3, **_TOKENS
    ),
    "gemma3": lambda: transformers.Gemma3Config(
        text_config=dict(_TEXT, head_dim=8, sliding_window=16), vision_config=_CLIP, mm_tokens_per_image=1,
        image_token_index=60, boi_token_index=61, eoi_token_index=62,
    ),
    "llava": lambda: transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**_TEXT), vision_config=transformers.CLIPVisionConfig(**_CLIP),
        image_token_index=60,
    ),
    "mistral3": lambda: transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**_TEXT, head_dim=8),
        vision_config=transformers.PixtralVisionConfig(**_CLIP), image_token_index=60,
    ),
}  # fmt: skip


@cache
def _built(family: str) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForImageTextToText.from_config(CONFIGS[family]()).eval()


def pair(family: str) -> tuple[Any, Any]:
    """An earlier model and a later one that differs in every weight."""
    earlier, later = (deepcopy(_built(family)) for _ in range(2))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in later.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return earlier, later


def in_memory(model: Any, folder: Path) -> None:
    """Written with the names that the tensors have in memory."""
    model.save_pretrained(folder)
    tied = {"lm_head.weight"} if model.config.get_text_config().tie_word_embeddings else set()
    held = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in tied}
    save_file(held, folder / "model.safetensors", {"format": "pt"})


def as_released(model: Any, folder: Path) -> None:
    """Written with the names of the first releases: before 2025 no tensor was below ``model.language_model``."""
    in_memory(model, folder)
    family = model.config.model_type
    held = {}
    for name, tensor in Checkpoint(folder).items():
        if family.startswith("qwen3"):
            other = name
        elif family.startswith("qwen"):
            other = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        elif name.startswith("model.language_model."):
            other = name.replace("model.language_model.", "language_model.model.")
        else:
            other = f"language_model.{name}" if name.startswith("lm_head") else name.removeprefix("model.")
        experts = other.endswith(("experts.gate_up_proj", "experts.down_proj"))  # one tensor of the layer, transposed
        held[other] = (tensor.mT if experts else tensor).contiguous().clone()
    save_file(held, folder / "model.safetensors", {"format": "pt"})


def as_saved(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


# the first release of a Qwen3-VL has the names of today
NAMINGS = [
    pytest.param(family, write, id=f"{family} {write.__name__}")
    for family in CONFIGS
    for write in (as_saved, in_memory, as_released)
    if not (write is as_released and family == "qwen3_vl")
]


def logits(model: Any) -> torch.Tensor:
    batch = batches(labels=False)[0]
    with torch.inference_mode():
        found: torch.Tensor = model(**batch, use_cache=False).logits
    return found


@pytest.mark.parametrize("units", ["mlp", "kv_group"])
@pytest.mark.parametrize(("family", "write"), NAMINGS)
def test_the_folder_holds_the_live_models_units(family, write, units, tmp_path):
    model, _ = pair(family)
    write(model, tmp_path)
    held = Checkpoint(tmp_path)
    live, stored = find_layout(model, units=units), folder_layout(tmp_path, held.shapes, units=units)
    assert stored.sizes == live.sizes
    assert all(name.startswith("model.language_model.layers.") for name in live)
    assert "not covered: all but model.language_model, which reads text" in stored.notes[0]
    tensors = model.state_dict()
    for name, block in live.items():
        for part in block.parts:
            index = torch.arange(block.neurons)
            assert torch.equal(stored[name].rows(held, part, index), block.rows(tensors, part, index))


@pytest.mark.parametrize(("family", "write"), NAMINGS)
def test_stages_of_other_names_are_rolled_back_and_measured_as_one_model(family, write, tmp_path):
    earlier, later = pair(family)
    write(earlier, tmp_path / "earlier")
    as_saved(later, tmp_path / "later")
    run = Trajectory(earlier=tmp_path / "earlier", later=tmp_path / "later")
    model = run.load()
    with earlier_model(run) as swapped:
        assert swapped is model
        assert torch.equal(logits(swapped), logits(earlier))
    assert torch.equal(logits(model), logits(later))
    mask = RandomSelector(0.3).select(run)
    save(rolled_back(run.later, to=run.earlier, mask=mask), tmp_path / "healed")
    with rollback(model, to=run.earlier, mask=mask):
        live = logits(model)
    assert torch.equal(logits(Trajectory(later=tmp_path / "healed").load()), live)
    assert not torch.equal(live, logits(later))


@pytest.mark.parametrize("family", CONFIGS)
def test_d_of_a_model_that_reads_images_is_measured_on_text(family, tmp_path):
    for name, model in zip(("earlier", "later"), pair(family), strict=True):
        model.save_pretrained(tmp_path / name)
    run = Trajectory(earlier=tmp_path / "earlier", later=tmp_path / "later")
    mask = DamageSelector(0.1).select(run, batches(labels=True))
    assert sum(mask.count().values())
    assert all(part.startswith("model.language_model.layers.") for part in mask)


def test_a_tower_is_described_with_a_layout():
    spec = {
        "model.visual.blocks.{layer}.mlp": {
            "gate_proj.weight": "n d -> n d", "up_proj.weight": "n d -> n d", "down_proj.weight": "d n -> n d",
        }
    }  # fmt: skip
    assert set(find_layout(pair("qwen2_5_vl")[0], spec).sizes.values()) == {48}


def test_two_names_of_one_tensor_are_refused(tmp_path):
    """transformers would read whichever comes last."""
    as_saved(pair("llava")[0], tmp_path)
    held = {name: tensor.clone() for name, tensor in Checkpoint(tmp_path).items()}
    held["model.language_model.norm.weight"] = held["language_model.model.norm.weight"] + 1
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"language_model\.model\.norm\.weight' and 'model.* are one tensor"):
        folder_layout(tmp_path, Checkpoint(tmp_path).shapes)
