"""Layouts: where the neurons lie, checked without believing the code that found them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import DENSE, FAMILIES, build, config, neurons
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from surgery import Checkpoint, magnitude, rollback, rolled_back
from surgery.checkpoints.checkpoint import State
from surgery.checkpoints.trajectory import Trajectory
from surgery.layout import Block, Layout, Slot, find_layout
from surgery.layout.on_disk import folder_layout
from surgery.live import probe
from surgery.masks.neurons import Neurons

IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
LLAMA = {
    "model.layers.{layer}.mlp": {
        "gate_proj.weight": "n d -> n d",
        "gate_proj.bias": "n -> n",
        "up_proj.weight": "n d -> n d",
        "up_proj.bias": "n -> n",
        "down_proj.weight": "d n -> n d",
    }
}
GPT2 = {
    "transformer.h.{layer}.mlp": {
        "c_fc.weight": "d n -> n d",
        "c_fc.bias": "n -> n",
        "c_proj.weight": "n d -> n d",
    }
}
SPECS = {"llama": LLAMA, "gpt2": GPT2}


def orders(block: Block, seed: int) -> torch.Tensor:
    """A new order of a block's neurons; those of an expert stay in the expert."""
    random = torch.Generator().manual_seed(seed)
    inner = block.neurons // max(block.experts, 1)
    return torch.cat([torch.randperm(inner, generator=random) + e * inner for e in range(max(block.experts, 1))])


def permute(model: nn.Module, layout: Layout, down_seed: int = 1) -> None:
    """Reorder the neurons of every block through its slots; a ``down_seed`` other than 1 is a planted error."""
    for block in layout.blocks:
        for slot in block.slots:
            order = orders(block, down_seed if slot.part == "down" else 1)[: slot.neurons]
            tensor = State(model)[slot.tensor]
            with torch.no_grad():
                slot.put(tensor, torch.arange(len(order)), slot.take(tensor, order))


def double(family: str) -> nn.Module:
    """A model in float64; its experts as a plain loop, because the grouped product has no float64."""
    model = build(family, torch.float64)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


def moved(model: nn.Module, before: torch.Tensor) -> float:
    """How far the logits are from what they were, relative to their size."""
    return float((logits(model) - before).abs().max() / before.abs().max())


def interleaved(layout: Layout) -> Layout:
    """The layout with fused gate and up read the wrong way: interleaved for concatenated, and the reverse."""

    def turned(slot: Slot) -> Slot:
        left, right = slot.pattern.split("->")
        left = left.replace("(g n)", "(X)").replace("(n g)", "(g n)").replace("(X)", "(n g)")
        return replace(slot, pattern=f"{left}->{right}")

    return Layout(tuple(replace(b, slots=tuple(map(turned, b.slots))) for b in layout.blocks))


FUSED = ("phi3", "glm", "glm4", "mixtral", "qwen3_moe", "gpt_oss", "llama4_text", "granitemoe", "jetmoe")


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_may_change_places(family):
    """Permuting the neurons of every block leaves float64 logits as they were; another order of down does not."""
    model = double(family)
    layout = find_layout(model)
    assert sum(layout.sizes.values()) == neurons(family, model)
    before = logits(model)
    permute(model, layout)
    assert moved(model, before) <= 1e-12
    permute(model, layout, down_seed=2)
    assert moved(model, before) > 1e-3


@pytest.mark.parametrize("family", FUSED)
def test_a_wrong_pattern_is_seen_by_both_witnesses(family):
    """Gate and up interleaved where they are concatenated: the permutation and the gradient both show it."""
    model = double(family)
    layout = find_layout(model)
    wrong = interleaved(layout)
    assert wrong != layout
    fused = next(b for b in wrong.blocks if any(s.g is not None for s in b.slots))
    assert any("also lies in" in problem for problem in probe(model, wrong, fused))
    before = logits(model)
    permute(model, wrong)
    assert moved(model, before) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss", "bloom"])
def test_a_forgotten_bias_is_seen(family):
    """A layout without the producers' biases does not move whole neurons."""
    model = double(family)
    layout = find_layout(model)
    kept = [replace(b, slots=tuple(s for s in b.slots if not s.part.endswith(".bias"))) for b in layout.blocks]
    assert Layout(tuple(kept)) != layout
    before = logits(model)
    permute(model, Layout(tuple(kept)))
    assert moved(model, before) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_a_second_witness(family):
    """Only neuron i alive: the gradient of the consumer's output lies on exactly neuron i's slices."""
    model = build(family)
    layout = find_layout(model)
    state = {name: (tensor.clone(), model.get_parameter(name).requires_grad) for name, tensor in State(model).items()
             if name in dict(model.named_parameters())}  # fmt: skip
    assert [problem for block in layout.blocks for problem in probe(model, layout, block)] == []
    for name, (tensor, needs) in state.items():
        assert torch.equal(State(model)[name], tensor)
        assert model.get_parameter(name).requires_grad == needs


@pytest.mark.parametrize("family", DENSE)
def test_the_gradient_sees_a_transposed_down(family):
    """Down read along its other axis: every one of its rows gets a gradient."""
    model = build(family)
    layout = find_layout(model)
    block = layout.blocks[0]
    (down,) = block.of("down")
    other = replace(down, pattern="n d -> n d" if down.pattern == "d n -> n d" else "d n -> n d")
    wrong = replace(block, slots=tuple(other if slot is down else slot for slot in block.slots))
    assert any("(down)" in problem for problem in probe(model, layout, wrong))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_holds_the_same_rows(family, tmp_path):
    """What ``save_pretrained`` wrote, read by the folder's layout, is bit for bit what the live layout reads."""
    model = build(family, torch.bfloat16)
    live = find_layout(model)
    model.save_pretrained(tmp_path)
    folder = Checkpoint(tmp_path)
    law_same_rows(live, model, folder_layout(tmp_path, folder.shapes), folder)


def law_same_rows(live: Layout, model: nn.Module, disk: Layout, folder: Checkpoint) -> None:
    """The two layouts name the same blocks, and read the same numbers from the model and from its folder."""
    assert disk.sizes == live.sizes
    assert list(disk) == list(live)
    assert disk.notes == live.notes
    for block in live.blocks:
        assert disk[block.name].parts == block.parts
        index = torch.arange(block.neurons)
        for part in block.parts:
            ours, theirs = block.rows(State(model), part, index), disk[block.name].rows(folder, part, index)
            assert torch.equal(ours.reshape(len(index), -1), theirs.reshape(len(index), -1)), (block.name, part)
            some = slice(min(1, block.neurons - 1), None, 3)
            assert torch.equal(disk[block.name].rows(folder, part, index[some].contiguous()), theirs[some])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_weights_has_the_same_layout(family):
    """On the ``meta`` device no weight exists, and every neuron is found all the same."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config(family))
    assert find_layout(empty) == find_layout(build(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_is_disjoint_and_complete(family):
    """Every number of an MLP's weight matrices belongs to exactly one neuron (marks through the slots' views)."""
    model = build(family)
    layout = find_layout(model)
    marks = {slot.tensor: torch.zeros(slot.shape, dtype=torch.long) for b in layout.blocks for slot in b.slots}
    for block in layout.blocks:
        for slot in block.slots:
            index = torch.arange(slot.neurons)
            slot.put(marks[slot.tensor], index, slot.take(marks[slot.tensor], index) + 1)
    assert all(bool((mark == 1).all()) for mark in marks.values())


@pytest.mark.parametrize("family", SPECS)
def test_your_own_layout_is_the_found_one(family, tmp_path):
    """The same blocks, tensors, patterns and consumers, live and in a folder, and the same scores and rollback."""
    earlier, model = build(family, seed=1), build(family, seed=2)
    found, own = find_layout(model), find_layout(model, SPECS[family])
    assert own.sizes == found.sizes
    for block in found.blocks:
        mine = own[block.name]
        assert mine.consumer == block.consumer
        assert mine.width == block.width
        assert {(s.tensor, s.pattern, s.shape) for s in mine.slots} == {
            (s.tensor, s.pattern, s.shape) for s in block.slots
        }
    model.save_pretrained(tmp_path)
    assert folder_layout(tmp_path, Checkpoint(tmp_path).shapes, SPECS[family]).sizes == found.sizes

    mine, theirs = (magnitude(Trajectory(earlier=earlier, later=model, layout=one)) for one in (own, None))
    for name in mine:  # the parts come in another order, so the sums are rounded differently
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-6, atol=0)
    mask = Neurons({name: torch.arange(n) % 3 == 0 for name, n in found.sizes.items()})
    written = []
    for layout in (own, None):
        with rollback(model, to=earlier, mask=mask, layout=layout) as done:
            assert done.changed
            written.append({name: tensor.clone() for name, tensor in State(model).items()})
    assert all(torch.equal(written[0][name], tensor) for name, tensor in written[1].items())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"model.layers.{layer}.ffn": LLAMA["model.layers.{layer}.mlp"]}, "no tensor is named like"),
        ({"model.layers.{layer}.mlp": {"gate_proj.weight": "n d -> n d", "w3.weight": "n d -> n d"}}, "w3.weight"),
        (
            {"model.layers.{layer}.mlp": {"gate_proj.weight": "n d -> n d", "down_proj.weight": "n d -> n d"}},
            "differ in length",
        ),
    ],
)
def test_a_spec_that_does_not_fit_is_refused(spec, message):
    """A template without tensors, a tensor that is not there, parts of different length."""
    with pytest.raises(ValueError, match=message):
        find_layout(build("llama"), spec)


def test_an_mlp_as_wide_as_the_model_needs_a_plan():
    """hidden = intermediate: shapes say nothing; with a tensor-parallel plan it is found, without one refused."""
    settings = dict(vocab_size=64, num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=32)
    model = LlamaForCausalLM(LlamaConfig(**settings, num_key_value_heads=2)).double().eval()
    layout = find_layout(model)
    assert layout.sizes == {"model.layers.0.mlp": 32, "model.layers.1.mlp": 32}
    assert all("plan" in block.found for block in layout.blocks)
    before = logits(model)
    permute(model, layout)
    assert moved(model, before) <= 1e-12

    bare = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_inner=32, n_positions=32))
    bare._tp_plan = {}
    with pytest.raises(ValueError, match=r"32 × 32.*layout="):
        find_layout(bare)


def test_your_own_layout_serves_both_checkpoints_of_a_rollback_and_of_a_copy():
    """Where nothing else can tell the neurons of ``to`` either: the verb and the participle write the same bits."""
    sizes, models = dict(vocab_size=64, num_hidden_layers=2, hidden_size=32, intermediate_size=32), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval())
    layout = find_layout(models[0])
    for model in models:
        model._tp_plan = {}
    earlier, later = models
    mask = Neurons({name: torch.arange(n) % 3 == 0 for name, n in layout.sizes.items()})
    copied = {**rolled_back(later, to=earlier, mask=mask, layout=layout)}
    with rollback(later, to=earlier, mask=mask, layout=layout) as done:
        assert done.changed
        assert all(torch.equal(copied[name], tensor) for name, tensor in State(later).items())


def test_what_is_no_known_structure_is_refused():
    """A plain module without an MLP, one without a width to read, and one in which a layer has none."""

    class Odd(nn.Module):
        def __init__(self, *layers: nn.Module) -> None:
            super().__init__()
            self.embed, self.layers = nn.Embedding(64, 32), nn.ModuleList(layers)

    def mlp() -> nn.ModuleDict:
        return nn.ModuleDict({"up": nn.Linear(32, 48), "down": nn.Linear(48, 32)})

    with pytest.raises(ValueError, match=r"no MLP was recognised in Odd.*layout="):
        find_layout(Odd(nn.Conv1d(32, 32, 3), nn.Conv1d(32, 32, 3)))
    with pytest.raises(ValueError, match=r"in 1 of 2 layers of layers: \['1'\]"):
        find_layout(Odd(mlp(), nn.Conv1d(32, 32, 3)))
    with pytest.raises(ValueError, match="neither a config nor an embedding"):
        find_layout(nn.Sequential(nn.Linear(3, 3)))
    assert find_layout(Odd(mlp(), mlp())).sizes == {"layers.0": 48, "layers.1": 48}


def test_two_candidates_for_one_mlp_are_refused():
    """Two ways back to the hidden size in one module: it is not guessed which one is the MLP."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            names = {"a": nn.Linear(32, 48), "b": nn.Linear(48, 32), "c": nn.Linear(32, 56), "d": nn.Linear(56, 32)}
            self.embed, self.layers = nn.Embedding(64, 32), nn.ModuleList([nn.ModuleDict(names)])

    with pytest.raises(ValueError, match="several linear layers"):
        find_layout(Two())


def test_a_plan_that_contradicts_the_shapes_is_refused():
    """A tensor-parallel plan that shards down along its outputs means that it is not what it was taken for."""
    model = build("llama")
    model._tp_plan = {"model.layers.*.mlp.down_proj": "colwise"}
    with pytest.raises(ValueError, match="tensor-parallel plan"):
        find_layout(model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(dtype):
    """int8 and float8 weights can't be reverted exactly; the message says what to do instead."""
    model = build("llama")
    down = model.model.layers[1].mlp.down_proj
    down.weight = nn.Parameter(down.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj\.weight.*quantise the result again"):
        find_layout(model)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_a_folder_that_is_not_what_its_config_says_is_refused(family, tmp_path):
    """A tensor that is not there, or has another shape, is named."""
    model = build(family)
    model.save_pretrained(tmp_path)
    shapes = Checkpoint(tmp_path).shapes
    layout = folder_layout(tmp_path, shapes)
    name = layout.blocks[-1].of("down")[-1].tensor
    with pytest.raises(ValueError, match="no tensor"):
        folder_layout(tmp_path, {key: shape for key, shape in shapes.items() if key != name})
    with pytest.raises(ValueError, match="has the shape"):
        folder_layout(tmp_path, {**shapes, name: (shapes[name][0] + 1, *shapes[name][1:])})


def test_a_config_that_is_none_is_refused(tmp_path):
    """An unknown model type and a broken file, by name, with the way out."""
    for text in ('{"model_type": "no_such_model"}', "{"):
        Path(tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"(?s)config\.json can't be read.*layout="):
            folder_layout(tmp_path, {})
