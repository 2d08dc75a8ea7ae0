"""A tiny model of every family that surgery supports: random weights, no download."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from typing import Any

import torch
from torch import nn

_H, _I, _LAYERS, _VOCAB = 32, 48, 2, 64
_COMMON = dict(
    vocab_size=_VOCAB,
    hidden_size=_H,
    intermediate_size=_I,
    num_hidden_layers=_LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
_GPT2 = dict(vocab_size=_VOCAB, n_embd=_H, n_layer=_LAYERS, n_head=4, n_inner=_I, n_positions=64)
_EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
_LATENT = dict(
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4,
    n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1, num_key_value_heads=4,
)  # fmt: skip

# family → what its config takes beyond _COMMON ("only" = instead of it)
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": dict(attention_bias=True, mlp_bias=True),
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "olmo2": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "cohere": {},
    "granite": {},
    "smollm3": {},
    "exaone4": {},
    "ernie4_5": {},
    "stablelm": {},
    "hunyuan_v1_dense": {},
    "qwen3_5_text": dict(
        linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
        layer_types=["linear_attention", "full_attention"],
    ),
    "lfm2": dict(layer_types=["conv", "full_attention"], intermediate_size=72, block_multiple_of=16),
    "phi3": {},
    "glm": {},
    "glm4": {},
    "nemotron": {},
    "apertus": {},
    "arcee": {},
    "gpt2": dict(only=_GPT2),
    "gpt_neo": dict(
        only=dict(
            vocab_size=_VOCAB, hidden_size=_H, num_layers=2, num_heads=4, intermediate_size=_I,
            max_position_embeddings=64, attention_types=[[["global", "local"], 1]],
        )
    ),
    "gpt_bigcode": dict(only=_GPT2),
    "starcoder2": {},
    "gptj": dict(only={**_GPT2, "rotary_dim": 4}),
    "codegen": dict(only={**_GPT2, "rotary_dim": 4}),
    "gpt_neox": {},
    "bloom": dict(only=dict(vocab_size=_VOCAB, hidden_size=_H, n_layer=_LAYERS, n_head=4)),
    "falcon": dict(
        only=dict(
            vocab_size=_VOCAB, hidden_size=_H, num_hidden_layers=_LAYERS, num_attention_heads=4, ffn_hidden_size=_I,
            bias=True,
        )
    ),
    "opt": dict(
        only=dict(
            vocab_size=_VOCAB, hidden_size=_H, num_hidden_layers=_LAYERS, num_attention_heads=4, ffn_dim=_I,
            max_position_embeddings=64, word_embed_proj_dim=16, do_layer_norm_before=False,
        )
    ),
    "phi": {},
    "mpt": dict(only=dict(vocab_size=_VOCAB, d_model=_H, n_layers=_LAYERS, n_heads=4, max_seq_len=64)),
    "bert": dict(is_decoder=True),
    "mixtral": _EXPERTS,
    "phimoe": _EXPERTS,
    "minimax_m2": dict(**_EXPERTS, rotary_dim=4),
    "qwen2_moe": dict(**_EXPERTS, shared_expert_intermediate_size=40, mlp_only_layers=[1]),
    "qwen3_moe": dict(**_EXPERTS, mlp_only_layers=[1]),
    "qwen3_next": dict(
        **_EXPERTS, shared_expert_intermediate_size=40, linear_key_head_dim=8, linear_value_head_dim=8,
        linear_num_key_heads=2, linear_num_value_heads=4, layer_types=["linear_attention", "full_attention"],
    ),
    "olmoe": _EXPERTS,
    "deepseek_v2": dict(**_EXPERTS, **_LATENT),
    "deepseek_v3": dict(**_EXPERTS, **_LATENT),
    "glm4_moe": dict(
        **_EXPERTS, n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1
    ),
    "glm_moe_dsa": dict(**_EXPERTS, **_LATENT, index_n_heads=2, index_head_dim=16, index_topk=8),
    "gpt_oss": _EXPERTS,
    "llama4_text": dict(**_EXPERTS, intermediate_size_mlp=40, interleave_moe_layer_step=2, attention_chunk_size=32),
    "granitemoe": _EXPERTS,
    "jetmoe": dict(**_EXPERTS, kv_channels=8, num_key_value_heads=2),
}  # fmt: skip
MOE = tuple(_CONFIGS)[list(_CONFIGS).index("mixtral") :]
DENSE = tuple(name for name in _CONFIGS if name not in MOE)
FAMILIES = DENSE + MOE

# kind of unit → families in which every sort of slot occurs that any family has (tests/test_representatives.py)
REPRESENTATIVES = {
    "mlp": ("llama", "phi3", "gpt2", "qwen2_moe", "gpt_oss", "llama4_text", "granitemoe", "jetmoe"),
    **dict.fromkeys(
        ("kv_group", "value_channel"),
        ("qwen3_5_text", "gpt2", "gpt_bigcode", "codegen", "gpt_neox", "opt", "mpt", "gpt_oss"),
    ),
}
_all_families = False


def on_all_families() -> None:
    """Let ``downstream`` and ``fewer`` name every family (pytest's option ``--all-families``)."""
    global _all_families
    _all_families = True


def downstream(families: tuple[str, ...] = FAMILIES, kind: str = "mlp") -> tuple[str, ...]:
    """The families on which to test what reads a model through its slots only: the representatives among these."""
    return fewer(tuple(name for name in families if name in REPRESENTATIVES[kind]), families)


def fewer(some: tuple[str, ...], families: tuple[str, ...]) -> tuple[str, ...]:
    """``some`` of the families on which a test could run: for what hands over to what is tested on more of them."""
    return families if _all_families else some


def config(family: str) -> Any:
    """The tiny configuration of a family."""
    from transformers import AutoConfig

    extra = dict(_CONFIGS[family])
    if family in ("nemotron", "apertus", "gpt_neox", "phi", "stablelm", "bert"):
        extra["head_dim"] = None
    settings = extra.pop("only", None) or {**_COMMON, **extra}
    return AutoConfig.for_model(family, **{name: value for name, value in settings.items() if value is not None})


@cache
def _built(family: str, seed: int) -> nn.Module:
    """The model that ``build`` copies: made once, and never handed out, so nobody edits it."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config(family))
    with torch.no_grad():  # biases and norms differ from their defaults, so that a misplaced one shows
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A model of a family in eval mode, the caller's own; the same seed gives the same weights."""
    return copy.deepcopy(_built(family, seed)).to(dtype)


def pair(family: str, dtype: torch.dtype = torch.float32, step: float = 0.02) -> tuple[nn.Module, nn.Module]:
    """An earlier model and a later one that differs in every weight."""
    earlier = build(family, dtype)
    later = copy.deepcopy(earlier)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in later.parameters():
            parameter.add_(step * torch.randn(parameter.shape).to(dtype))
    return earlier, later


def neurons(family: str, model: Any) -> int:
    """How many neurons the model has, from its configuration: an independent count."""
    c = model.config
    dense = getattr(c, "intermediate_size", None) or _I
    dense = {"bloom": 4 * _H, "mpt": 4 * _H, "opt": _I, "falcon": _I, "lfm2": 48}.get(family, dense)
    if family in DENSE:
        return _LAYERS * dense
    inner = (
        c.intermediate_size
        if family in ("mixtral", "phimoe", "minimax_m2", "gpt_oss", "llama4_text", "granitemoe", "jetmoe", "olmoe")
        else 24
    )
    experts = 4 * inner
    if family in ("qwen3_moe", "qwen2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "glm_moe_dsa"):
        shared = {"qwen2_moe": 40, "qwen3_moe": 0}.get(family, 24)
        return experts + shared + dense
    if family == "qwen3_next":
        return _LAYERS * (experts + 40)
    if family == "llama4_text":
        return 40 + experts + dense
    return _LAYERS * experts
