"""How far parameters moved: against the same numbers taken the plain way, all in memory, and against their own sums."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, build
from torch import Tensor, nn

from surgery import Trajectory
from surgery.evidence import Changes, changes
from surgery.evidence.changes import Change
from surgery.evidence.matching import KINDS, Place, places_of
from surgery.layout import find_layout

evidence_histograms = import_module("surgery.evidence.changes")


SOME = ["qwen3", "gpt2", "phi3", "bloom", "bert", "mixtral", "qwen3_moe", "gpt_oss"]
State = dict[str, Tensor]


def sequence(family: str, dtype: torch.dtype = torch.float32, stages: int = 3) -> list[nn.Module]:
    """Checkpoints that differ as training would have it: a part unchanged, small steps and large ones, some zeros."""
    found = [build(family, dtype)]
    torch.manual_seed(4)
    with torch.no_grad():
        for at, parameter in enumerate(found[0].parameters()):
            if at % 3 == 0:
                parameter.masked_fill_(torch.rand(parameter.shape) < 0.05, 0)
        for _ in range(stages - 1):
            model = copy.deepcopy(found[-1])
            for at, parameter in enumerate(model.parameters()):
                moved = torch.rand(parameter.shape) < 0.5
                step = 10.0 ** (-9 * torch.rand(parameter.shape)) * torch.randn(parameter.shape).sign()
                if at % 5:  # every fifth tensor is frozen
                    parameter.add_((moved * step).to(dtype))
            found.append(model)
    return found


def run_of(some: list[Any]) -> Trajectory:
    return Trajectory.through({f"s{at}": one for at, one in enumerate(some)})


def plain(before: list[Tensor], after: list[Tensor], absolute: float = 1e-7, relative: float = 1e-3) -> dict[str, Any]:
    """The definition: everything flat in memory, logarithms and comparisons."""
    old, new = (torch.cat([one.detach().float().flatten() for one in some]).numpy() for some in (before, after))
    delta = np.abs(new - old)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = delta / np.abs(old)
    ratio = np.where(delta == 0, np.float32(0), ratio)
    moved, from_zero = delta != 0, (old == 0) & (delta != 0)
    return {
        "parameters": len(old),
        "unchanged": int((~moved).sum()),
        "from_zero": int(from_zero.sum()),
        "near_absolute": int((delta < np.float32(absolute)).sum()),
        "near_relative": int((ratio < np.float32(relative)).sum()),
        "norm": float(np.linalg.norm((new - old).astype(np.float64))),
        "reference_norm": float(np.linalg.norm(old.astype(np.float64))),
        "absolute": delta[moved],
        "relative": ratio[moved & ~from_zero],
    }


def agree(found: Change, want: dict[str, Any]) -> None:
    for name in ("parameters", "unchanged", "from_zero", "near_absolute", "near_relative"):
        assert getattr(found, name) == want[name], name
    for name in ("norm", "reference_norm"):
        assert getattr(found, name) == pytest.approx(want[name], rel=1e-5), name
    for name in ("absolute", "relative"):
        held, values = getattr(found, name), want[name].astype(np.float64)
        if not held.counts:
            assert not len(values)
            continue
        edges = np.array(held.edges)
        assert list(np.searchsorted(np.sort(values), edges[1:-1])) == list(np.cumsum(held.counts))[:-1], name
        assert sum(held.counts) == len(values)
        assert values.max() < edges[-1]
        assert held.counts[0] > 0
        assert held.counts[-1] > 0


@pytest.mark.parametrize("chunk", [7, 1000, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", SOME[:3])
def test_streamed_is_what_the_definition_says(family, dtype, chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(evidence_histograms, "CHUNK", chunk)
    models = sequence(family, dtype) if chunk != 7 else [small(model) for model in sequence(family, dtype)]
    found = changes(run_of(models))
    held = [tensors(model) for model in models]
    for at, step in enumerate(found.cumulative, 1):
        assert (step.stage, step.reference) == (f"s{at}", "s0")
        agree(step.whole, plain(list(held[0].values()), list(held[at].values())))
    for at, step in enumerate(found.incremental, 1):
        assert (step.stage, step.reference) == (f"s{at}", f"s{at - 1}")
        agree(step.whole, plain(list(held[at - 1].values()), list(held[at].values())))
        for one in step.groups:
            places = places_of({name: tensor.ndim for name, tensor in held[0].items()})
            pick = [name for name in held[0] if (places[name].layer, places[name].kind) == (one.layer, one.kind)]
            agree(one, plain([held[at - 1][name] for name in pick], [held[at][name] for name in pick]))


def tensors(model: Any) -> State:
    return dict(model if isinstance(model, dict) else model.named_parameters())


def small(model: nn.Module) -> State:
    """The tensors of one layer only, for chunks so small that the whole model would take long."""
    return {name: tensor for name, tensor in tensors(model).items() if ".0." in name and tensor.numel() < 2000}


@pytest.mark.parametrize("family", SOME)
def test_groups_add_up_and_every_parameter_is_counted(family):
    models = sequence(family, torch.bfloat16)
    found = changes(run_of(models))
    total = sum(p.numel() for p in models[0].parameters())
    assert not found.left_out
    for step in (*found.cumulative, *found.incremental):
        assert step.whole.parameters == total
        for parts in (step.groups, step.kinds, step.layers):
            for name in ("parameters", "unchanged", "from_zero", "near_absolute", "near_relative"):
                assert sum(getattr(one, name) for one in parts) == getattr(step.whole, name)
            for name in ("norm", "reference_norm"):
                square = math.fsum(getattr(one, name) ** 2 for one in parts)
                assert math.sqrt(square) == pytest.approx(getattr(step.whole, name), rel=1e-12)
            for name in ("absolute", "relative"):
                octaves: dict[int, int] = {}
                for one in parts:
                    held = getattr(one, name)
                    for at, count in enumerate(held.counts, held.start):
                        octaves[at] = octaves.get(at, 0) + count
                whole = getattr(step.whole, name)
                assert [octaves.get(at, 0) for at in range(whole.start, whole.start + len(whole.counts))] == list(
                    whole.counts
                )
        assert [one.layer for one in step.layers] == [*sorted(set(_layers(models[0]))), None]
        for one in (step.whole, *step.groups):
            assert one.unchanged <= min(one.near_absolute, one.near_relative) <= one.parameters
            assert sum(one.absolute.counts) == one.parameters - one.unchanged
            assert sum(one.relative.counts) == one.parameters - one.unchanged - one.from_zero


def _layers(model: nn.Module) -> Iterator[str]:
    for block in find_layout(model).blocks:
        layer = places_of({f"{block.name}.x": 2})[f"{block.name}.x"].layer
        assert layer is not None
        yield layer


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_has_its_kind_of_module(family):
    model = build(family)
    mlp = {slot.tensor for block in find_layout(model).blocks for slot in block.slots}
    try:
        attention = {slot.tensor for block in find_layout(model, units="kv_group").blocks for slot in block.slots}
    except ValueError:  # heads that can't be told apart
        attention = set()
    places = places_of({name: parameter.ndim for name, parameter in model.named_parameters()})
    for name, parameter in model.named_parameters():
        layer, kind = places[name].layer, places[name].kind
        assert kind in KINDS
        assert name not in mlp or kind == "mlp"
        assert name not in attention or kind == "attention"
        assert (kind == "other") == (family == "lfm2" and ".conv." in name), name
        assert parameter.ndim > 1 or kind not in ("embedding", "head") or "bias" in name
        assert (layer is None) == (not any(part.isdigit() for part in name.split(".")))
    expert = "model.layers.3.block_sparse_moe.experts.1.w2.weight"
    assert places_of({expert: 2})[expert] == Place("model.layers.3", "mlp", "model.layers.3.block_sparse_moe")


@pytest.mark.parametrize("family", SOME)
def test_folders_mappings_and_live_models_say_the_same(family, tmp_path):
    models = sequence(family, torch.bfloat16)
    for at, model in enumerate(models):
        model.save_pretrained(tmp_path / f"{at}", max_shard_size="20KB")
    live, folders = changes(run_of(models)), changes(run_of([tmp_path / f"{at}" for at in range(3)]))
    mapped = changes(run_of([tensors(model) for model in models]))
    for one, other in (
        (live.cumulative, folders.cumulative),
        (live.incremental, folders.incremental),
        (live.cumulative, mapped.cumulative),
    ):
        for ours, theirs in zip(one, other, strict=True):
            assert_same(ours.whole, theirs.whole)
            for a, b in zip(ours.groups, theirs.groups, strict=True):
                assert_same(a, b)
    if family not in ("mixtral", "qwen3_moe"):
        mixed = changes(run_of([tmp_path / "0", models[1], tensors(models[2])]))
        assert_same(mixed.cumulative[1].whole, live.cumulative[1].whole)


def assert_same(one: Change, other: Change) -> None:
    """The same counts exactly; norms, whose sums come in another order, to float32's accuracy."""
    for field in dataclasses.fields(Change):
        ours, theirs = getattr(one, field.name), getattr(other, field.name)
        if field.name in ("norm", "reference_norm"):
            assert ours == pytest.approx(theirs, rel=1e-6)
        else:
            assert ours == theirs, field.name


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "phi3", "mixtral", "gpt_oss"])
def test_how_a_model_numbers_its_neurons_does_not_matter(family):
    models = sequence(family)
    before = changes(run_of(models))
    for name, block in find_layout(models[0]).items():
        order = torch.randperm(block.neurons, generator=torch.Generator().manual_seed(1))
        for model in models:
            state = dict(model.named_parameters())
            with torch.no_grad():
                for slot in block.slots:
                    rows = torch.arange(slot.neurons)
                    assert slot.start == 0, name
                    slot.put(state[slot.tensor], rows, slot.take(state[slot.tensor], order))
    after = changes(run_of(models))
    for one, other in zip(before.cumulative + before.incremental, after.cumulative + after.incremental, strict=True):
        for a, b in zip(one.groups, other.groups, strict=True):
            assert_same(a, b)


def test_tied_tensors_count_once(tmp_path):
    from families import config
    from transformers import AutoModelForCausalLM

    tied = config("qwen3")
    tied.tie_word_embeddings = True
    models = [AutoModelForCausalLM.from_config(tied) for _ in range(2)]
    total = sum(p.numel() for p in models[0].parameters())
    for at, model in enumerate(models):
        model.save_pretrained(tmp_path / f"{at}")
    for some in (
        models,
        [tmp_path / "0", tmp_path / "1"],
        [models[0], tmp_path / "1"],
        [m.state_dict() for m in models],
    ):
        found = changes(run_of(some))
        assert found.cumulative[0].whole.parameters == total
        assert not found.left_out
    untied = copy.deepcopy(models[1])
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight + 1)
    found = changes(run_of([models[0], untied]))
    assert found.cumulative[0].whole.parameters == total + untied.lm_head.weight.numel()


@pytest.mark.parametrize("absolute", [1e-7, 2.0**-10, 3e-3, 1.9999999e-3])
def test_thresholds_are_edges(absolute):
    edge = np.float32(absolute)
    steps = torch.tensor(
        [edge, np.nextafter(edge, np.float32(0)), np.nextafter(edge, np.float32(1)), edge / 2, edge * 2]
    )
    found = changes(run_of([{"a": torch.zeros(5)}, {"a": steps}]), absolute=absolute).cumulative[0].whole
    assert found.near_absolute == 2
    assert found.near_relative == 0
    assert found.from_zero == 5
    assert found.absolute.counts == (2, 2, 1)
    assert found.absolute.edges == (edge / 2, edge, edge * 2, edge * 4)
    assert found.relative.counts == ()


def test_zeros_have_no_relative_change():
    old = torch.tensor([0.0, 0.0, -0.0, 1.0, 2.0, 1e-45, -4.0])
    new = torch.tensor([0.0, 1e-9, 0.0, 1.0, 2.5, 1.0, 4.0])
    found = changes(run_of([{"a": old}, {"a": new}])).cumulative[0].whole
    assert (found.unchanged, found.from_zero) == (3, 1)
    assert (found.near_absolute, found.near_relative) == (4, 3)
    assert sum(found.relative.counts) == 3
    assert found.relative.edges[-1] > 1e37  # a quotient beyond float32 is in the top bin
    assert found.norm == pytest.approx(math.sqrt(0.25 + 1 + 64))
    assert found.relative_norm == pytest.approx(found.norm / math.sqrt(1 + 4 + 16))
    power = changes(run_of([{"a": old}, {"a": new}]), relative=2.0**-10).cumulative[0].whole  # a mantissa of zero
    assert (power.unchanged, power.near_relative, sum(power.relative.counts)) == (3, 3, 3)
    tiny = changes(run_of([{"a": torch.zeros(3)}, {"a": torch.full((3,), 1e-30)}])).cumulative[0].whole
    assert (tiny.unchanged, tiny.from_zero, sum(tiny.absolute.counts)) == (0, 3, 3)  # though its square is 0
    for old in (1e-18, 1.1e-18, 1e-45):  # the last ratio is infinite as a float32, and lies in the last octave
        far = changes(run_of([{"a": torch.tensor([old])}, {"a": torch.tensor([1e19])}])).cumulative[0].whole.relative
        assert far.counts == (1,)
        assert far.edges[0] <= min(1e19 / old, 1e38) < far.edges[1]
    nothing = changes(run_of([{"a": torch.zeros(3)}, {"a": torch.zeros(3)}])).cumulative[0].whole
    assert nothing.relative_norm is None
    assert (nothing.near_absolute, nothing.near_relative, nothing.unchanged) == (3, 3, 3)
    assert str(changes(run_of([{"a": torch.zeros(3)}, {"a": torch.zeros(3)}])))


class Counting(Mapping[str, Tensor]):
    """A mapping that counts how often each tensor is asked for."""

    def __init__(self, held: State) -> None:
        self.held, self.asked = held, dict.fromkeys(held, 0)

    def __getitem__(self, name: str) -> Tensor:
        self.asked[name] += 1
        return self.held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


def test_every_number_is_read_once_and_a_chunk_at_a_time(monkeypatch):
    monkeypatch.setattr(evidence_histograms, "CHUNK", 100)
    sizes, real = [], evidence_histograms._chunks

    def watched(some: list[Tensor]) -> Iterator[list[Tensor]]:
        for chunk in real(some):
            sizes.append([one.numel() for one in chunk])
            yield chunk

    monkeypatch.setattr(evidence_histograms, "_chunks", watched)
    wide = torch.randn(30, 40).T  # not contiguous, its rows fit in a chunk
    wider = torch.randn(300, 2).T  # its rows do not
    some = [
        Counting({"a": wide + at, "b": wider * (at + 1), "c": torch.randn(9), "d": torch.tensor(2.0)})
        for at in range(5)
    ]
    assert not some[0].held["a"].is_contiguous()
    found = changes(run_of(some))
    assert max(map(max, sizes)) <= 100
    assert all(len(set(one)) == 1 for one in sizes)
    assert found.cumulative[0].whole.parameters == 1200 + 600 + 9 + 1
    assert all(count <= 3 for one in some for count in one.asked.values())  # its dtype, its shape, and its numbers
    agree(found.cumulative[3].whole, plain(list(some[0].held.values()), list(some[4].held.values())))


def test_a_frozen_tensor_is_not_compared(monkeypatch):
    called = []
    monkeypatch.setattr(evidence_histograms.Meter, "_bins", lambda *_: called.append(1))
    one = build("qwen3")
    found = changes(run_of([one, copy.deepcopy(one)]))
    assert not called
    assert found.cumulative[0].whole.unchanged == found.cumulative[0].whole.parameters


def test_what_is_printed_and_saved(tmp_path):
    found = changes(run_of(sequence("qwen3")))
    whole, kinds, layers = found.tables()
    assert [row[:2] for row in whole.rows] == [("s1", "s0"), ("s2", "s0"), ("s2", "s1")]
    one = found.cumulative[1].whole
    shares = [100 * count / one.parameters for count in (one.near_absolute, one.near_relative, one.unchanged)]
    assert whole.rows[1][2:] == pytest.approx((*shares, one.norm, 100 * one.norm / one.reference_norm))
    assert {row[1] for row in kinds.rows} == {"mlp", "attention", "norm", "embedding", "head"}
    assert [row[0] for row in layers.rows] == ["model.layers.0", "model.layers.1", "outside the layers"]
    found.save(tmp_path / "changes.json")
    told = json.loads((tmp_path / "changes.json").read_text())
    assert told["kind"] == "Changes"
    assert told["cumulative"][0]["whole"]["unchanged"] == found.cumulative[0].whole.unchanged
    assert isinstance(found, Changes)


def test_layers_are_in_their_own_order():
    state = {f"model.layers.{at}.mlp.up.weight": torch.ones(2) for at in (10, 2, 0)} | {"lm_head.weight": torch.ones(2)}
    found = changes(run_of([state, state])).cumulative[0]
    assert [one.layer for one in found.layers] == ["model.layers.0", "model.layers.2", "model.layers.10", None]


def other_width() -> nn.Module:
    from families import config
    from transformers import AutoModelForCausalLM

    wide = config("qwen3")
    wide.intermediate_size = 64
    return AutoModelForCausalLM.from_config(wide)


def other_depth() -> nn.Module:
    from families import config
    from transformers import AutoModelForCausalLM

    deep = config("qwen3")
    deep.num_hidden_layers, deep.layer_types = 3, ["full_attention"] * 3
    return AutoModelForCausalLM.from_config(deep)


def spoilt(value: float) -> nn.Module:
    model = build("qwen3")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3, 2] = value
    return model


@pytest.mark.parametrize(
    ("stages", "settings", "message"),
    [
        (lambda: [build("qwen3")], {}, "two or more checkpoints"),
        (lambda: [build("qwen3"), other_width()], {}, r"has the shape \(48, 32\) in s0, \(64, 32\) in s1"),
        (lambda: [build("qwen3"), other_depth()], {}, "s1 has 'model.layers.2.*s0 has not: they are different models"),
        (lambda: [build("qwen3"), build("gpt2")], {}, "different models"),
        (lambda: [build("qwen3"), spoilt(math.nan)], {}, "model.layers.1.self_attn.q_proj.weight' of 's1' holds 1"),
        (lambda: [spoilt(math.inf), build("qwen3")], {}, "'s0' holds 1"),
        (lambda: [spoilt(-math.inf), spoilt(-math.inf)], {}, "'s0' holds 1"),
        (lambda: [build("qwen3"), build("qwen3")], {"absolute": 0}, "absolute=0: expected a positive threshold"),
        (lambda: [build("qwen3"), build("qwen3")], {"relative": math.nan}, "relative=nan: expected"),
        (lambda: [build("qwen3"), build("qwen3").to("meta")], {}, "meta device"),
        (lambda: [{"a": torch.ones(2)}, {"b": torch.ones(2)}], {}, "different models"),
    ],
)  # fmt: skip
def test_bad_input_is_told(stages, settings, message):
    some = stages()
    run = run_of(some) if len(some) > 1 else Trajectory(later=some[0])
    with pytest.raises(ValueError, match=message):
        changes(run, **settings)


def test_experts_in_memory_and_on_disk_are_refused(tmp_path):
    model = build("mixtral")
    model.save_pretrained(tmp_path / "0")
    with pytest.raises(ValueError, match=r"under another name.*save_pretrained"):
        changes(run_of([tmp_path / "0", model]))


def test_what_can_not_be_compared_is_told():
    state = {"model.layers.0.mlp.up.weight": torch.ones(4, 2), "embed.weight": torch.ones(6, 2), "steps": torch.ones(1)}
    longer = {**state, "embed.weight": torch.ones(8, 2), "mtp.layers.0.up.weight": torch.ones(2)}
    longer["steps"] = torch.ones(1, dtype=torch.int64)
    found = changes(run_of([state, longer]))
    assert found.cumulative[0].whole.parameters == 8
    assert set(found.left_out) == {
        "mtp.layers.0.up.weight: only in s1",
        "embed.weight: 6 rows in s0, 8 in s1",
        "steps: int64 in s1, no real numbers",
    }
    assert "left out: embed.weight" in str(found)


def test_the_lab_moves_as_reported():
    lab = Path(__file__).parent.parent / "benchmarks/lab/seed0"
    if not (lab / "cw" / "model.safetensors").exists():
        pytest.skip("the lab's checkpoints are not there")
    found = changes(Trajectory.through({name: lab / name for name in ("base", "code", "math", "qa", "cw")}))
    near = [100 * step.whole.share(step.whole.near_relative) for step in found.cumulative]
    assert near == pytest.approx([5.0, 4.52, 2.25, 2.15], abs=0.01)
    assert all(step.whole.near_relative == step.whole.unchanged for step in found.cumulative)  # bfloat16
