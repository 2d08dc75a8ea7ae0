"""Units of attention: where they lie, checked without believing the code that found them; and budgets over kinds."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from typing import Any

import pytest
import torch
from families import FAMILIES, build, downstream
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_laws import all_neurons, data, expected, hashes, same, snapshot, some_neurons
from test_layout import double, law_same_rows, logits, moved
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.bloom import modeling_bloom
from transformers.models.falcon import modeling_falcon
from transformers.models.mpt import modeling_mpt

from surgery import (
    AMCSelector,
    Checkpoint,
    Neurons,
    RandomSelector,
    Trajectory,
    activation,
    allocate,
    conflict,
    magnitude,
    rolled_back,
    save,
    sweep,
    top,
)
from surgery.checkpoints.checkpoint import State
from surgery.checkpoints.opening import open_weights
from surgery.checkpoints.trajectory import reading
from surgery.layout import Layout, Slot, find_layout
from surgery.layout.on_disk import folder_layout
from surgery.live import probe
from surgery.scores import amc as score_products
from surgery.units import ATTENTION, kinds_of

operators = import_module("surgery.reverting.rollback")


REFUSED = ("deepseek_v2", "deepseek_v3", "glm_moe_dsa", "jetmoe")
WHOLE_NORM = ("olmo2", "olmoe", "minimax_m2")  # no head stands alone, value channels do
COVERED = [(f, u) for f in FAMILIES for u in ATTENTION if f not in REFUSED]
COVERED = [(f, u) for f, u in COVERED if f not in WHOLE_NORM or u == "value_channel"]
DOWNSTREAM = [(f, u) for f, u in COVERED if f in downstream(kind=u)]
MHA = ("gpt2", "gpt_neo", "gptj", "codegen", "gpt_neox", "bloom", "opt", "mpt", "bert")
GROUPS = {**dict.fromkeys(MHA, 4), "gpt_bigcode": 1, "falcon": 1}  # the others have 2, for 4 query heads of 8
HYBRID = ("qwen3_5_text", "lfm2", "qwen3_next")
DTYPES = (torch.float32, torch.bfloat16)

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, max_position_embeddings=64)
FALCON = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, ffn_hidden_size=48, bias=True)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon, new decoder": (
        "falcon",
        dict(**FALCON, num_attention_heads=8, num_kv_heads=2, new_decoder_architecture=True),
    ),
    "falcon, many heads": ("falcon", dict(**FALCON, num_attention_heads=4, multi_query=False)),
    "falcon, alibi": ("falcon", dict(**FALCON, num_attention_heads=4, multi_query=False, alibi=True)),
    "gpt_bigcode, many heads": (
        "gpt_bigcode",
        dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_inner=48, n_positions=64, multi_query=False),
    ),
    "codegen, 8 heads": (
        "codegen",
        dict(vocab_size=64, n_embd=64, n_layer=2, n_head=8, n_inner=48, n_positions=64, rotary_dim=4),
    ),
    "cohere, norms of each head": (
        "cohere",
        dict(**SMALL, num_attention_heads=4, num_key_value_heads=2, use_qk_norm=True),
    ),
    "llama, one KV head": ("llama", dict(**SMALL, num_attention_heads=4, num_key_value_heads=1, attention_bias=True)),
    "llama, wide heads": (
        "llama",
        {**SMALL, **dict(hidden_size=36, num_attention_heads=6, num_key_value_heads=2, head_dim=10)},
    ),
    "phi, norm": ("phi", dict(**SMALL, num_attention_heads=4, num_key_value_heads=2, qk_layernorm=True)),
    "glm4_moe, norm": (
        "glm4_moe",
        dict(
            **SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=8, use_qk_norm=True, n_routed_experts=4,
            n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1, num_experts_per_tok=2,
            moe_intermediate_size=24,
        ),
    ),
}  # fmt: skip

VARIANT_GROUPS = dict(zip(VARIANTS, (2, 4, 4, 4, 8, 2, 1, 2, 2, 2), strict=True))


def variant(name: str, seed: int = 0) -> nn.Module:
    """A model in float64 whose every parameter is random."""
    family, extra = VARIANTS[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **extra)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model


def model_of(name: str) -> nn.Module:
    return variant(name) if name in VARIANTS else double(name)


ALIBI = (
    (modeling_bloom, "build_alibi_tensor"),
    (modeling_bloom, "_get_alibi_slopes"),
    (modeling_falcon, "build_alibi_tensor"),
    (modeling_mpt, "build_mpt_alibi_tensor"),
)


def shape_of(name: str, model: Any) -> tuple[int, int, int]:
    """KV groups, query heads a group, and head width, from the configuration."""
    c = model.config
    if name in VARIANTS:
        groups, width = VARIANT_GROUPS[name], getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        return groups, c.num_attention_heads // groups, width
    groups = GROUPS.get(name, 2)
    return groups, 4 // groups, 8


def units_in_order(name: str, model: nn.Module, unit: str, seed: int) -> torch.Tensor:
    """A new order of a block's units that is a symmetry: groups freely; channels inside their group."""
    groups, _, width = shape_of(name, model)
    random = torch.Generator().manual_seed(seed)
    size, times = {"kv_group": (groups, 1), "value_channel": (width, groups)}[unit]
    orders = [torch.randperm(size, generator=random) for _ in range(times)]
    orders = [order.roll(1) if torch.equal(order, torch.arange(size)) else order for order in orders]
    return torch.cat([order + k * size for k, order in enumerate(orders)])


def permute(model: nn.Module, layout: Layout, order: torch.Tensor) -> None:
    for block in layout.blocks:
        for slot in block.slots:
            tensor = State(model)[slot.tensor]
            with torch.no_grad():
                slot.put(tensor, torch.arange(len(order)), slot.take(tensor, order))


@pytest.mark.parametrize(("name", "unit"), [*COVERED, *((v, u) for v in VARIANTS for u in ATTENTION)])
def test_units_may_change_places(name, unit, monkeypatch):
    """Whole groups, value channels of a group: another order leaves float64 logits as they were."""
    for module, function in ALIBI:  # it tells heads apart by their place, so it is taken out here
        if not hasattr(module, function):  # not in every transformers
            continue
        original = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *a, original=original, **k: 0 * original(*a, **k))
    model = model_of(name)
    layout = find_layout(model, units=unit)
    groups, _, width = shape_of(name, model)
    layers = 1 if name in HYBRID else 2
    count = {"kv_group": groups, "value_channel": groups * width}[unit]
    assert list(layout.sizes.values()) == [count] * layers
    assert layout.units == (unit,)
    assert bool(layout.notes) == (name in HYBRID)
    before = logits(model)
    permute(model, layout, units_in_order(name, model, unit, 1))
    assert moved(model, before) <= 1e-12
    half = Layout(tuple(replace(b, slots=b.of("o")) for b in layout.blocks))  # a planted error: o alone
    if {"kv_group": groups, "value_channel": width}[unit] > 1:
        permute(model, half, units_in_order(name, model, unit, 1))
        assert moved(model, before) > 1e-4


@pytest.mark.parametrize(("name", "unit"), [*COVERED, *((v, u) for v in VARIANTS for u in ATTENTION)])
def test_the_gradient_is_a_second_witness(name, unit):
    """Only unit i alive in the input of o: the gradient lies on exactly unit i's slices."""
    model = model_of(name)
    layout = find_layout(model, units=unit)
    before = snapshot(model)
    assert [p for block in layout.blocks for p in probe(model, layout, block, neurons=5)] == []
    assert same(snapshot(model), before)


def swapped(layout: Layout, part: str, old: str, new: str) -> Layout:
    def other(slot: Slot) -> Slot:
        left, right = slot.pattern.split("->")
        return replace(slot, pattern=f"{left.replace(old, new)}->{right}") if slot.part == part else slot

    return Layout(tuple(replace(b, slots=tuple(map(other, b.slots))) for b in layout.blocks))


MISTAKES = [
    ("llama", "kv_group", "q", "(k r d)", "(r k d)"),  # every r-th head, not r in a row
    ("llama", "kv_group", "o", "(k r d)", "(r k d)"),
    ("llama", "kv_group", "q", "(k r d)", "(d k r)"),  # channels for heads
    ("llama", "kv_group", "k", "(k d)", "(d k)"),
    ("llama", "value_channel", "o", "(k r d)", "(k d r)"),
    ("llama", "value_channel", "v", "(k d)", "(d k)"),
    ("qwen3_next", "kv_group", "q", "(k r g d)", "(g k r d)"),
    ("qwen3_next", "value_channel", "gate", "(k r g d)", "(k r d g)"),
    ("phi3", "kv_group", "q", "(k r d)", "(r k d)"),
    ("gpt_neox", "kv_group", "q", "(k g d)", "(g k d)"),
    ("codegen", "kv_group", "k", "(p g k d)", "(g p k d)"),
    ("gpt2", "kv_group", "v", "(k d)", "(d k)"),
    ("falcon, new decoder", "kv_group", "q", "(k g d)", "(g k d)"),
]


@pytest.mark.parametrize(("name", "unit", "part", "old", "new"), MISTAKES)
def test_a_wrong_pattern_is_seen_by_both_witnesses(name, unit, part, old, new):
    """Heads for channels, the wrong repeat of groups, q and gate mixed up: the logits and the gradient show it."""
    model = model_of(name)
    right = find_layout(model, units=unit)
    wrong = swapped(right, part, old, new)
    assert wrong != right
    assert any(part in problem for problem in probe(model, wrong, wrong.blocks[-1], neurons=64))
    before = logits(model)
    permute(model, wrong, units_in_order(name, model, unit, 2))
    assert moved(model, before) > 1e-4


@pytest.mark.parametrize(
    ("family", "unit", "part"),
    [
        ("llama", "kv_group", "q.bias"), ("llama", "kv_group", "v.bias"), ("gpt_oss", "kv_group", "sinks"),
        ("qwen3_next", "value_channel", "gate"), ("gpt2", "kv_group", "k"),
        ("cohere, norms of each head", "kv_group", "q_norm"), ("cohere, norms of each head", "kv_group", "k_norm"),
    ],
)  # fmt: skip
def test_a_forgotten_part_is_seen(family, unit, part):
    """A layout without a bias, a sink, a gate or a head's own norm does not move whole units."""
    model = model_of(family)
    layout = find_layout(model, units=unit)
    assert all(block.of(part) for block in layout.blocks)
    bare = Layout(tuple(replace(b, slots=tuple(s for s in b.slots if s.part != part)) for b in layout.blocks))
    before = logits(model)
    permute(model, bare, units_in_order(family, model, unit, 2))
    assert moved(model, before) > 1e-5


@pytest.mark.parametrize("family", [*REFUSED, *WHOLE_NORM])
def test_what_can_not_be_told_is_refused(family):
    """Latent attention, attention experts, a norm over all heads: the reason and the way out."""
    model = build(family)
    for unit in ("kv_group", ("mlp", "kv_group")):
        with pytest.raises(ValueError, match=r'(?s)found for certain.*units="'):
            find_layout(model, units=unit)
    if family in REFUSED:
        with pytest.raises(ValueError, match="value channels were found"):
            find_layout(model, units="value_channel")


def test_an_attention_with_more_to_it_is_refused():
    """A parameter or a module of unknown purpose, other head counts, norms in a tensor a head, cross-attention."""
    settings = dict(**SMALL, num_attention_heads=4, num_key_value_heads=2, qk_layernorm=True)
    norms = AutoModelForCausalLM.from_config(AutoConfig.for_model("stablelm", **settings))
    with pytest.raises(ValueError, match="norms in tensors of their own"):
        find_layout(norms, units="kv_group")
    assert find_layout(norms, units="value_channel").sizes
    for name, thing in (("mystery", nn.Parameter(torch.zeros(3))), ("lambda_q", nn.Linear(32, 4))):
        model = build("llama")
        for layer in model.model.layers:
            setattr(layer.self_attn, name, thing)
        with pytest.raises(ValueError, match=f"also has '{name}'"):
            find_layout(model, units="value_channel")
    model = build("llama")
    model.config.num_attention_heads = 8
    with pytest.raises(ValueError, match="4 heads by its shapes and 8 by the configuration"):
        find_layout(model, units="kv_group")
    crossed = AutoConfig.for_model("gpt2", vocab_size=64, n_embd=32, n_layer=2, n_head=4, add_cross_attention=True)
    layout = find_layout(AutoModelForCausalLM.from_config(crossed), units="kv_group")
    assert list(layout) == [f"transformer.h.{i}.attn[kv_group]" for i in range(2)]
    assert "not covered: transformer.h.0.crossattention and 1 more: it attends to another" in layout.notes[0]
    shared = dict(vocab_size=64, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48)
    seen = find_layout(AutoModelForCausalLM.from_config(AutoConfig.for_model("trocr", **shared)), units="kv_group")
    assert list(seen) == [f"model.decoder.layers.{i}.self_attn[kv_group]" for i in range(2)]
    assert "encoder_attn and 1 more: it attends to another" in seen.notes[0]


def test_an_attention_of_your_own_needs_a_kv_head_for_every_query_head():
    """Outside transformers nothing says which query heads share a KV head; without sharing there is nothing to know."""

    class Attention(nn.Module):
        def __init__(self, groups: int) -> None:
            super().__init__()
            self.head_dim = 8
            self.q_proj, self.o_proj = nn.Linear(32, 32), nn.Linear(32, 32)
            self.k_proj, self.v_proj = nn.Linear(32, 8 * groups), nn.Linear(32, 8 * groups)

    class Own(nn.Module):
        def __init__(self, groups: int) -> None:
            super().__init__()
            self.embed = nn.Embedding(64, 32)
            self.layers = nn.ModuleList(nn.ModuleDict({"attn": Attention(groups)}) for _ in range(2))

    assert find_layout(Own(4), units="kv_group").sizes == {f"layers.{i}.attn[kv_group]": 4 for i in range(2)}
    with pytest.raises(ValueError, match="only known for attention of transformers"):
        find_layout(Own(2), units="kv_group")


def test_a_partly_covered_model_says_so():
    """Layers of linear attention are named in the notes, live, in a folder, and in what made a mask."""
    earlier, later = build("qwen3_next", seed=1), build("qwen3_next", seed=2)
    layout = find_layout(later, units=("mlp", "kv_group"))
    assert "not covered: model.layers.0.linear_attn: Qwen3NextGatedDeltaNet" in layout.notes[0]
    mask = RandomSelector(0.5, units="kv_group").select(Trajectory(earlier=earlier, later=later))
    assert mask.made_by["not_covered"] == list(layout.notes)
    assert "not_covered" not in RandomSelector(0.5).select(Trajectory(earlier=earlier, later=later)).made_by


@pytest.mark.parametrize(
    ("units", "message"),
    [("heads", "expected some of"), ((), "expected some of"), (("kv_group", "value_channel"), "overlap")],
)
def test_unknown_and_overlapping_units_are_refused(units, message):
    for make in (
        lambda: AMCSelector(0.1, units=units or ("x",)),
        lambda: Trajectory().kinds(units),
        lambda: kinds_of(units),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_one_order_of_kinds():
    """However they are asked for: the blocks come in the model's order, attention before the MLP of a layer."""
    model = build("llama")
    one, other = (find_layout(model, units=u) for u in (("mlp", "kv_group"), ("kv_group", "mlp")))
    assert one == other
    assert one.units == ("mlp", "kv_group")
    assert list(one) == [f"model.layers.{i}.{n}" for i in range(2) for n in ("self_attn[kv_group]", "mlp")]
    assert one.costs == {name: block.width for name, block in one.items()}
    assert find_layout(model).costs is None


# Rolling back


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("family", "unit"), DOWNSTREAM)
def test_rollback_laws(family, unit, dtype):
    """Undo is the identity; twice is once; the masked slices are earlier's, all else later's; the counts fit."""
    earlier, later = build(family, dtype, 1), build(family, dtype, 2)
    before, old = snapshot(later), dict(State(earlier))
    units = ("mlp", unit) if unit == "kv_group" else unit
    layout = find_layout(later, units=units)
    mask = some_neurons(layout, density=0.5)
    want = expected(before, old, layout, mask)
    with operators.rollback(later, to=earlier, mask=mask) as done:
        assert same(snapshot(later), want)
        differ = sum(int((before[n] != want[n]).sum()) for n in before)
        widths = {name: block.width for name, block in layout.items()}
        assert done.neurons == mask.count()
        assert done.parameters == {name: n * widths[name] for name, n in mask.count().items()}
        assert done.changed >= differ
        if dtype == torch.float32:  # no two random numbers are equal: what was written is what differs
            assert sum(done.parameters.values()) == differ == done.changed
        again = operators.rollback(later, to=earlier, mask=mask)
        assert again.changed == 0
        again.undo()
        assert same(snapshot(later), want)
    assert same(snapshot(later), before)
    assert same(dict(rolled_back(State(later), to=State(earlier), mask=mask)), want)
    with operators.rollback(later, to=earlier, mask=~all_neurons(layout)) as none:
        assert none.changed == 0
        assert same(snapshot(later), before)


PROJECTIONS = re.compile(
    r"(q_proj|k_proj|v_proj|qkv_proj|query_key_value|attn\.c_attn|Wqkv|self\.query|self\.key|self\.value)\.(weight|bias)$"
    r"|(self_attn\.(o_proj|out_proj|dense)|attn\.c_proj|attn\.out_proj|attention\.(out_proj|dense|output\.dense)"
    r"|self_attention\.dense)\.weight$|sinks$"
)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((f, torch.bfloat16) for f, u in COVERED if u == "kv_group"),
        *((f, torch.float32) for f, u in DOWNSTREAM if u == "kv_group"),
    ],
    ids=str,
)
def test_every_kv_group_is_the_earlier_attention(family, dtype):
    """Budget 1: exactly the projections (told by their names) are earlier's, whole tensors; with the MLP, those too."""
    earlier, later = build(family, dtype, 1), build(family, dtype, 2)
    before, old = snapshot(later), dict(State(earlier))
    named = {name for name in before if PROJECTIONS.search(name) and ".linear_attn." not in name}
    if family == "lfm2":
        named = {name for name in named if "self_attn" in name}
    for units in ("kv_group", ("mlp", "kv_group")):
        layout = find_layout(later, units=units)
        mlp = {s.tensor for b in layout.blocks if b.kind == "mlp" for s in b.slots}
        mask = RandomSelector(1.0, units=units).select(Trajectory(earlier=earlier, later=later))
        assert mask.fraction == 1
        with operators.rollback(later, to=earlier, mask=mask):
            now = snapshot(later)
        chosen = named | mlp
        assert same({n: now[n] for n in chosen}, {n: old[n] for n in chosen})
        assert same(
            {n: t for n, t in now.items() if n not in chosen}, {n: t for n, t in before.items() if n not in chosen}
        )
        assert same(snapshot(later), before)


@pytest.mark.parametrize("family", sorted({f for f, _ in COVERED}))
def test_a_folder_holds_the_same_rows(family, tmp_path):
    """What ``save_pretrained`` wrote, read by the folder's layout, is bit for bit what the live layout reads."""
    model = build(family, torch.bfloat16)
    model.save_pretrained(tmp_path)
    folder = Checkpoint(tmp_path)
    for unit in (u for f, u in COVERED if f == family):
        law_same_rows(find_layout(model, units=unit), model, folder_layout(tmp_path, folder.shapes, units=unit), folder)


@pytest.mark.parametrize(("family", "unit"), DOWNSTREAM)
def test_live_and_folder_agree(family, unit, tmp_path):
    """One mask from both and one result of both, bit for bit; no other file of the output differs."""
    models = {name: build(family, torch.bfloat16, seed) for seed, name in enumerate(("base", "earlier", "later"))}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name, max_shard_size="24KB")
    units = ("mlp", unit) if unit == "value_channel" else unit
    folder = Trajectory(**{name: str(tmp_path / name) for name in models})
    models["later"] = folder.load()
    live = Trajectory(**models)
    disk = folder_layout(tmp_path / "later", Checkpoint(tmp_path / "later").shapes, units=units)
    assert disk.sizes == find_layout(models["later"], units=units).sizes
    assert disk.notes == find_layout(models["later"], units=units).notes
    mask = AMCSelector(0.5, units=units).select(live, data())
    assert sum(mask.count().values())
    assert AMCSelector(0.5, units=units).select(folder, data()).equal(mask)
    view = rolled_back(folder.later, to=folder.earlier, mask=mask)
    out = save(view, tmp_path / "out")
    record = json.loads((out / "surgery.json").read_text())
    assert record["parameters"] == sum(n * disk[name].width for name, n in mask.count().items())
    kept = {n: value for n, value in hashes(tmp_path / "later").items() if not n.startswith("model-")}
    assert kept.items() <= hashes(out).items()
    with operators.rollback(models["later"], to=folder.earlier, mask=mask) as done:
        assert done.changed
        models["later"].save_pretrained(tmp_path / "live", max_shard_size="24KB")
    ours, theirs = dict(Checkpoint(out)), dict(Checkpoint(tmp_path / "live"))
    assert same(ours, {name: tensor.to(ours[name].dtype) for name, tensor in theirs.items()})
    assert same(ours, dict(view))
    assert not same(ours, dict(Checkpoint(tmp_path / "later")))


def test_a_view_over_one_kind_is_a_source_for_another():
    """KV groups out of a view in which neurons were rolled back: its tensors, not its mask's layout."""
    base, earlier, later = (build("llama", seed=seed) for seed in range(3))
    first = some_neurons(find_layout(later))
    view = rolled_back(State(later), to=State(earlier), mask=first, layout=find_layout(later))
    whole = all_neurons(find_layout(base, units="kv_group"))
    done = operators.rollback(base, to=view, mask=whole)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(State(base)[name], State(later)[name])
    done.undo()


def test_a_layout_and_other_units_contradict_each_other():
    model = build("llama")
    groups = find_layout(model, units="kv_group")
    assert Trajectory(later=model, layout=groups).weights("later")[0].layout is groups
    with pytest.raises(ValueError, match="pass only one of both"):
        Trajectory(later=model, layout=groups).weights("later", units="value_channel")


# Scores


@pytest.mark.parametrize(
    ("name", "unit"), [*DOWNSTREAM, ("falcon, new decoder", "kv_group"), ("codegen, 8 heads", "value_channel")]
)
def test_activation_is_the_mean_over_the_units_channels(name, unit):
    """The input of o, heard by a hook of the test's own, folded by the configuration's head counts."""
    model = variant(name).float() if name in VARIANTS else build(name)
    layout = find_layout(model, units=unit)
    found = activation(model, data(), units=unit)
    assert found.sizes == layout.sizes
    groups, heads, width = shape_of(name, model)
    kept: dict[str, list[torch.Tensor]] = {block.name: [] for block in layout.blocks}
    handles = [
        model.get_submodule(b.consumer).register_forward_pre_hook(lambda _, a, n=b.name: kept[n].append(a[0].detach()))
        for b in layout.blocks
    ]
    with torch.inference_mode():
        for batch in data():
            model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    attended = data()[0]["attention_mask"].bool().flatten()
    for block in layout.blocks:
        h = kept[block.name][0].reshape(-1, groups, heads, width)[attended].abs().double().mean(0)
        over = {"kv_group": h.mean((1, 2)), "value_channel": h.mean(1).flatten()}
        torch.testing.assert_close(found[block.name].double(), over[unit], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("family", "unit"),
    [
        ("llama", "kv_group"), ("llama", "value_channel"), ("gpt2", "kv_group"), ("gpt_oss", "kv_group"),
        ("qwen3_next", "value_channel"), ("phi3", "kv_group"), ("codegen", "value_channel"),
        ("falcon", "value_channel"), ("gpt_neox", "kv_group"),
    ],
)  # fmt: skip
def test_magnitude_and_conflict_are_of_what_a_rollback_changes(family, unit):
    """M is the length of the change that reverting the unit alone makes; C the cosine with the earlier update there."""
    base, earlier, later = (build(family, seed=seed) for seed in range(3))
    run = Trajectory(base=base, earlier=earlier, later=later)
    M, C = magnitude(run, units=unit), conflict(run, units=unit)
    before, start, old = snapshot(later), dict(State(base)), dict(State(earlier))
    for name, size in M.sizes.items():
        for i in range(0, size, max(size // 4, 1)):
            alone = Neurons({n: torch.arange(s) == (i if n == name else -1) for n, s in M.sizes.items()})
            with operators.rollback(later, to=earlier, mask=alone):
                now = snapshot(later)
            where = {n: now[n] != before[n] for n in now}
            b = torch.cat([(before[n] - now[n])[where[n]].double() for n in now])
            a = torch.cat([(old[n] - start[n])[where[n]].double() for n in now])
            assert float(M[name][i]) == pytest.approx(float(b.norm()), rel=1e-5)
            assert float(C[name][i]) == pytest.approx(max(0.0, -float(a @ b / a.norm() / b.norm())), abs=1e-5)


@pytest.mark.parametrize(
    ("name", "unit"), [("codegen, 8 heads", u) for u in ATTENTION] + [("falcon, new decoder", u) for u in ATTENTION]
)
def test_any_run_of_units_is_read_where_it_lies(name, unit):
    """Chunks that start and stop anywhere, also across the axes that units are counted along."""
    weights = open_weights(variant(name), units=unit)
    block = weights.layout.blocks[0]
    for slot in block.slots:
        for start, stop in ((0, block.neurons), (1, block.neurons), (block.neurons // 2, block.neurons // 2 + 1)):
            found = reading(weights, block.name, slot.part)(start, stop)
            rows = slot.take(weights.tensors[slot.tensor], torch.arange(start, stop))
            assert torch.equal(found.float(), rows.detach().float().reshape(stop - start, -1))


# Budgets over several kinds

BLOCKS = st.lists(
    st.tuples(st.lists(st.one_of(st.integers(0, 3).map(float), st.floats(0, 1e3, width=32)), min_size=1, max_size=9),
              st.integers(1, 40)),
    min_size=1, max_size=6,
)  # fmt: skip


def priced(blocks: list[tuple[list[float], int]]) -> tuple[Neurons, dict[str, int], int]:
    scores = Neurons({f"b{i}": torch.tensor(v, dtype=torch.float32) for i, (v, _) in enumerate(blocks)})
    costs = {f"b{i}": cost for i, (_, cost) in enumerate(blocks)}
    return scores, costs, sum(len(v) * cost for v, cost in blocks)


@settings(deadline=None, max_examples=200)
@given(
    BLOCKS, st.floats(0, 1) | st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from(["proportional", "global", "uniform"])
)
def test_a_joint_budget_is_never_exceeded(blocks, budget, how):
    """At most ⌊β·P⌋ parameters; all of them at 1; what is over buys nothing more that was next."""
    scores, costs, total = priced(blocks)
    k = int(budget * total)
    if how != "uniform" and 0 < k < total and not any(v.any() for v in scores.values()):
        return
    counts = allocate(scores, budget, how=how, costs=costs)
    spent = sum(n * costs[name] for name, n in counts.items())
    assert spent <= budget * total * (1 + 1e-12)
    assert all(0 <= n <= scores.sizes[name] for name, n in counts.items())
    if budget == 1:
        assert counts == scores.sizes
    if how != "global":  # nothing that still fits is left
        assert all(n == scores.sizes[name] or costs[name] > budget * total - spent - 1e-6 for name, n in counts.items())


@settings(deadline=None, max_examples=200)
@given(BLOCKS, st.floats(0, 1))
def test_a_joint_global_budget_is_the_best_worth_up_to_the_first_that_does_not_fit(blocks, budget):
    """By a plain sort in Python of score per parameter; ties: the lower block, then the lower index."""
    scores, costs, total = priced(blocks)
    assume(any(value.any() for value in scores.values()))
    ranked = sorted(
        (-float(v) / costs[n], at, i) for at, (n, vs) in enumerate(scores.items()) for i, v in enumerate(vs)
    )
    want, left = dict.fromkeys(scores, 0), math.floor(budget * total)
    for _, at, _ in ranked:
        if costs[f"b{at}"] > left:
            break
        want[f"b{at}"] += 1
        left -= costs[f"b{at}"]
    assert allocate(scores, budget, how="global", costs=costs) == want


@settings(deadline=None, max_examples=150)
@given(BLOCKS, st.floats(0, 1), st.floats(0, 1))
def test_a_bigger_joint_budget_contains_the_smaller(blocks, one, other):
    scores, costs, _ = priced(blocks)
    assume(any(value.any() for value in scores.values()))
    small, big = (top(scores, allocate(scores, b, how="global", costs=costs)) for b in sorted((one, other)))
    assert (small & big).equal(small)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=5), st.integers(0, 400))
def test_a_joint_proportional_share_is_of_parameters(blocks, k):
    """Where nothing is full, a block's parameters are within one unit of its share, and whole shares are exact."""
    scores, costs, total = priced([([float(s)] + [0.0] * 499, c) for s, c in blocks])
    counts = allocate(scores, k / total, costs=costs)
    ones = sum(s for s, _ in blocks)
    k = int(k / total * total + 1e-9)
    for at, (s, cost) in enumerate(blocks):
        assert counts[f"b{at}"] * cost >= (k - 1) * s / ones - cost
    spent = sum(n * costs[name] for name, n in counts.items())
    assert k - spent < min(costs.values()) + 1


def test_costs_of_one_price_are_no_costs():
    """With equal prices the global order is the one without prices."""
    scores = Neurons({"a": torch.tensor([3.0, 1.0, 2.0]), "b": torch.tensor([5.0, 0.5])})
    for fraction in (0.0, 0.2, 0.4, 0.8, 1.0):
        assert allocate(scores, fraction, "global", costs={"a": 7, "b": 7}) == allocate(scores, fraction, "global")


def test_what_is_over_goes_where_the_largest_part_is_missing():
    """A unit of c is too dear: what it leaves is shared by the others one by one, those without a score last."""
    scores = Neurons({"b": torch.ones(100), "c": torch.tensor([200.0]), "d": torch.ones(100)})
    assert allocate(scores, 160 / 400, costs={"b": 1, "c": 200, "d": 1}) == {"b": 80, "c": 0, "d": 80}
    scores = Neurons({"a": torch.zeros(60), "b": torch.full((200,), 0.5), "c": torch.tensor([100.0])})
    assert allocate(scores, 150.5 / 420, costs={"a": 1, "b": 1, "c": 160}) == {"a": 0, "b": 150, "c": 0}


def test_costs_have_to_fit():
    scores = Neurons({"a": torch.tensor([1.0, 1.0])}, missing={"a": torch.tensor([True, False])})
    with pytest.raises(ValueError, match="costs are for the blocks"):
        allocate(scores, 0.5, costs={"b": 1})
    with pytest.raises(ValueError, match="units of 3 of 6 have a score"):
        allocate(scores, 1.0, costs={"a": 3})
    assert allocate(scores, 0.5, costs={"a": 3}) == {"a": 1}


@pytest.mark.parametrize(
    ("family", "unit"),
    [*(("llama", unit) for unit in ATTENTION), *((f, "value_channel") for f in ("gpt2", "mixtral", "qwen3_next"))],
)
def test_a_joint_selector_spends_parameters_on_both_kinds(family, unit):
    """Never more than β of them, nearly all of them, at random and by score; bigger contains smaller where global."""
    base, earlier, later = (build(family, seed=seed) for seed in range(3))
    run = Trajectory(base=base, earlier=earlier, later=later)
    layout = find_layout(later, units=("mlp", unit))
    costs = {name: block.width for name, block in layout.items()}
    total = sum(costs[name] * n for name, n in layout.sizes.items())
    for selector in (
        AMCSelector(0.0, "MC", "MC", units=("mlp", unit)),
        AMCSelector(0.0, "M", "M", how="global", units=("mlp", unit)),
        AMCSelector(0.0, "M", "MC", how="uniform", units=("mlp", unit)),
        RandomSelector(0.0, units=("mlp", unit)),
    ):
        masks = [replace(selector, budget=b).select(run) for b in (0.0, 0.1, 0.3, 0.6, 1.0)]
        for mask, budget in zip(masks, (0.0, 0.1, 0.3, 0.6, 1.0), strict=True):
            spent = sum(n * costs[name] for name, n in mask.count().items())
            assert budget * total - max(costs.values()) <= spent <= budget * total
            with operators.rollback(later, to=earlier, mask=mask) as done:
                assert sum(done.parameters.values()) == spent
        kinds = {name.endswith("]") for name, n in masks[3].count().items() if n}
        assert kinds == {True, False}
        if getattr(selector, "how", "global") == "global":
            assert all((a & b).equal(a) for a, b in pairwise(masks))


def test_a_joint_share_of_parameters_follows_the_scores():
    """Equal densities in both kinds: each kind gets its share of the parameters, whatever its units weigh."""
    earlier, later = build("llama", seed=1), build("llama", seed=2)
    run = Trajectory(earlier=earlier, later=later)
    layout = find_layout(later, units=("mlp", "kv_group"))
    parameters = {name: b.width * b.neurons for name, b in layout.items()}
    mask = AMCSelector(0.5, "M", "M", units=("mlp", "kv_group")).select(run)
    for name, n in mask.count().items():
        assert abs(n * layout[name].width - 0.5 * parameters[name]) <= layout[name].width


def test_a_kind_whose_cosines_are_small_still_gets_its_share():
    """C of long vectors is small by geometry: in a joint budget it is relative to its kind, so each gets β of its own.

    Inside a kind the layers stay different, which is what C is there for.
    """
    base, earlier, later = (build("qwen3", seed=0) for _ in range(3))
    torch.manual_seed(0)
    for name, parameter in later.named_parameters():  # a random walk: the two updates are independent
        with torch.no_grad():
            earlier.get_parameter(name).add_(torch.randn_like(parameter) * 0.1)
            parameter.copy_(earlier.get_parameter(name) + torch.randn_like(parameter) * 0.1)
    run, units = Trajectory(base=base, earlier=earlier, later=later), ("mlp", "kv_group")
    layout, C = find_layout(later, units=units), conflict(run, units=units)
    mean = {kind: torch.cat([C[n] for n, b in layout.items() if b.kind == kind]).mean() for kind in layout.units}
    assert mean["kv_group"] < 0.7 * mean["mlp"]
    mask = AMCSelector(0.5, "C", "C", units=units).select(run)
    density = score_products.product({"C": C}, "C", True)
    for kind in layout.units:
        blocks = [b for b in layout.blocks if b.kind == kind]
        assert float(torch.cat([density[b.name] for b in blocks]).mean()) == pytest.approx(1, rel=1e-5)
        for b in blocks:
            torch.testing.assert_close(density[b.name] * mean[kind], C[b.name])
        spent = sum(mask.count()[b.name] * b.width for b in blocks)
        assert abs(spent - 0.5 * sum(b.width * b.neurons for b in blocks)) <= 2 * max(layout.costs.values())
    alone = conflict(run)
    assert AMCSelector(0.2, "C", "C").select(run).equal(top(alone, allocate(alone, 0.2)))


# The sweep and the command line


def test_a_sweep_over_kinds_has_a_ceiling_for_each():
    """Rows of selectors over different units in one table, each beside what reverting all of its kind does."""
    models = {name: build("llama", seed=seed) for seed, name in enumerate(("base", "earlier", "later"))}
    model, before = models["later"], snapshot(models["later"])
    old = dict(State(models["earlier"]))

    def evaluate(one: nn.Module) -> dict[str, float]:
        state = dict(State(one))
        return {"math": sum(float((state[n] == old[n]).double().mean()) for n in state)}

    selectors = [AMCSelector(0.0, "MC", "MC", units=u) for u in ("mlp", "kv_group", ("mlp", "kv_group"))]
    table = sweep(Trajectory(**models), None, selectors=selectors, budgets=[0.5], evaluate=evaluate)
    names = ["ceiling (all MLP neurons)", "ceiling (all KV groups)", "ceiling (all units (neurons and KV groups))"]
    assert [row.selector for row in table][2:5] == names
    assert [row.neurons for row in table][2:5] == [96, 4, 100]
    rows = {row.selector: row for row in table}
    assert set(rows) >= {"M×C", "M×C of KV groups", "M×C of units (neurons and KV groups)"}
    assert rows["M×C of KV groups"].neurons == 2
    assert rows[names[2]].recovery == pytest.approx(rows[names[0]].recovery + rows[names[1]].recovery)
    assert same(snapshot(model), before)
    empty = sweep(Trajectory(**models), None, selectors=[], budgets=[], evaluate=evaluate)
    assert [row.selector for row in empty][2:] == names[:1]


def test_a_sweeps_file_tells_kinds_apart(tmp_path):
    """Rows over other units have other names, so that none is taken for another."""
    models = {name: build("llama", seed=seed) for seed, name in enumerate(("base", "earlier", "later"))}
    rest = dict(budgets=[0.5], evaluate=lambda _: {"math": 1.0}, path=tmp_path / "rows")
    for units in ("kv_group", "mlp", ("mlp", "kv_group"), "kv_group"):
        selector = RandomSelector(0.5, units=units)
        *_, row = sweep(Trajectory(**models), None, selectors=[selector], **rest)
        assert row.neurons == sum(selector.select(Trajectory(**models)).count().values())
    assert len((tmp_path / "rows").read_text().splitlines()) == 1 + 2 + 3 + 3  # the head, references, ceilings, rows


def test_a_mask_file_says_which_units_it_holds(tmp_path):
    """Saved and loaded, a mask alone opens the right layout; its print and the rollback's name the units."""
    earlier, later = build("llama", seed=1), build("llama", seed=2)
    run = Trajectory(earlier=earlier, later=later)
    RandomSelector(0.4, units=("mlp", "kv_group")).select(run).save(tmp_path / "mask")
    mask = Neurons.load(tmp_path / "mask")
    assert "units (neurons and KV groups)" in repr(mask)
    with operators.rollback(later, to=earlier, mask=mask) as done:
        assert done.neurons == mask.count()
        assert "units (neurons and KV groups)" in str(done)


@pytest.mark.parametrize("units", ["weight", ("weight",), ("mlp", "weight")])
def test_a_model_is_not_laid_out_by_single_weights(units):
    model = build("llama")
    for refused in (lambda: Trajectory(later=model).kinds(units), lambda: find_layout(model, units=units)):
        with pytest.raises(
            ValueError,
            match=re.escape(f"units={units!r}: layouts and scores have no single weights") + ".*: pass it to Dam",
        ):
            refused()
