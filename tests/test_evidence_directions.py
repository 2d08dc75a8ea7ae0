"""Directions against cosines taken the plain way, with all updates in memory, and against their own promises."""

from __future__ import annotations

import copy
import json
import math
from importlib import import_module
from itertools import permutations as orders
from typing import Any

import pytest
import torch
from families import build
from test_evidence_changes import run_of, spoilt
from torch import Tensor, nn

from surgery import Trajectory
from surgery.evidence import Directions, directions
from surgery.evidence.directions import Cosines
from surgery.layout import find_layout

evidence_cosines = import_module("surgery.evidence.directions")
evidence_directions = import_module("surgery.evidence.directions")


SOME = ["qwen3", "gpt2", "phi3", "bloom", "mixtral", "qwen3_moe", "gpt_oss"]
LAYER = "model.layers.0.mlp"


def stages(family: str, dtype: torch.dtype = torch.float32, count: int = 4, size: float = 0.05) -> list[nn.Module]:
    """Checkpoints whose updates are random, of another size in every row."""
    found = [build(family, dtype)]
    torch.manual_seed(7)
    with torch.no_grad():
        for _ in range(count - 1):
            model = copy.deepcopy(found[-1])
            for parameter in model.parameters():
                rows = torch.rand(parameter.shape[:1] + (1,) * (parameter.ndim - 1))
                parameter.add_((size * rows * torch.randn(parameter.shape)).to(dtype))
            found.append(model)
    return found


def vectors(model: nn.Module, block: Any) -> Tensor:
    """``[neuron, all numbers of the neuron]`` in float64."""
    state, every = dict(model.named_parameters()), torch.arange(block.neurons)
    parts = [block.rows(state, part, every).detach().reshape(block.neurons, -1) for part in block.parts]
    return torch.cat(parts, 1).double()


def plain(models: list[nn.Module], i: int, j: int, top: float) -> dict[str, Tensor]:
    """The definition: per block the cosines of the shared neurons, with every update in memory."""
    layout = find_layout(models[0])
    deltas = [
        {name: vectors(models[at + 1], block) - vectors(models[at], block) for name, block in layout.items()}
        for at in (i, j)
    ]
    chosen = []
    for delta in deltas:
        norms = torch.cat([one.norm(dim=1) for one in delta.values()]).float()
        keep = torch.zeros(len(norms), dtype=torch.bool)
        keep[norms.sort(descending=True, stable=True).indices[: round(top * len(norms))]] = True
        chosen.append(dict(zip(layout, (keep & (norms > 0)).split(list(layout.sizes.values())), strict=True)))
    found = {}
    for name in layout:
        both = chosen[0][name] & chosen[1][name]
        a, b = (delta[name][both] for delta in deltas)
        found[name] = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    return found


@pytest.mark.parametrize("group", [3, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", SOME)
def test_streamed_is_what_the_definition_says(family, dtype, group, monkeypatch):
    if group:
        monkeypatch.setattr(evidence_cosines, "GROUP", group)
    models, top = stages(family, dtype), 0.4
    found = directions(run_of(models), top=top, permutations=20)
    assert [(pair.first, pair.second) for pair in found.pairs] == [("s1", "s2"), ("s1", "s3"), ("s2", "s3")]
    for pair, (i, j) in zip(found.pairs, [(0, 1), (0, 2), (1, 2)], strict=True):
        want = plain(models, i, j, top)
        assert [one.block for one in pair.blocks] == list(want)
        for one in pair.blocks:
            same(one, want[one.block])
        same(pair.whole, torch.cat(list(want.values())))
        assert pair.whole.neurons == sum(one.neurons for one in pair.blocks)


def same(found: Cosines, want: Tensor) -> None:
    assert found.neurons == len(want)
    if not len(want):
        assert (found.mean, found.quantiles, found.histogram, found.null, found.p) == (None,) * 5
        return
    assert found.mean == pytest.approx(float(want.mean()), abs=1e-5)
    assert found.quantiles == pytest.approx(
        want.quantile(torch.tensor(evidence_cosines.QUANTILES).double()).tolist(), abs=1e-5
    )
    assert found.opposed == pytest.approx(float((want < 0).double().mean()))
    assert found.histogram is not None
    assert sum(found.histogram) == len(want)
    edges = torch.linspace(-1, 1, evidence_cosines.BINS + 1).double()
    if not bool(((want[:, None] - edges).abs() < 1e-5).any()):
        assert list(found.histogram) == torch.histogram(want, edges).hist.int().tolist()


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "mixtral"])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_update_along_itself_is_one_and_against_itself_minus_one(family, sign):
    base, first, _ = (model.double() for model in stages(family, count=3))
    second = copy.deepcopy(first)
    with torch.no_grad():
        for p, a, b in zip(second.parameters(), first.parameters(), base.parameters(), strict=True):
            p.add_(sign * (a - b))
    found = directions(run_of([base, first, second]), top=0.3)
    for one in (found.pairs[0].whole, *found.pairs[0].blocks):
        if one.neurons:
            assert one.mean == pytest.approx(sign, abs=1e-5)
            assert one.quantiles == pytest.approx([sign] * len(evidence_cosines.QUANTILES), abs=1e-5)
            assert one.opposed == (sign < 0)
            assert sum(one.histogram or ()) == (one.histogram or ())[-1 if sign > 0 else 0] == one.neurons
    assert found.pairs[0].whole.neurons == found.changed["s1"] == found.changed["s2"]
    assert found.pairs[0].whole.p == pytest.approx(2 / 1001)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gpt_oss", "mixtral"])
def test_folders_and_live_models_say_the_same(family, tmp_path):
    models = stages(family, torch.bfloat16)
    for at, model in enumerate(models):
        model.save_pretrained(tmp_path / f"{at}")
    live = directions(run_of(models), top=0.3)
    folders = directions(run_of([tmp_path / f"{at}" for at in range(4)]), top=0.3)
    mixed = directions(run_of([tmp_path / "0", models[1], tmp_path / "2", models[3]]), top=0.3)
    for other in (folders, mixed):
        for one, two in zip(live.pairs, other.pairs, strict=True):
            alike(one.whole, two.whole, exact=True)


def alike(one: Cosines, other: Cosines, exact: bool = False) -> None:
    assert one.neurons == other.neurons
    if exact:
        assert one == other
    elif one.mean is not None and other.mean is not None:
        assert one.mean == pytest.approx(other.mean, abs=1e-6)
        assert one.quantiles == pytest.approx(other.quantiles, abs=1e-6)
        assert one.null == pytest.approx(other.null, abs=1e-6)
        assert one.p == pytest.approx(other.p, abs=2e-3)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "phi3", "mixtral", "gpt_oss"])
def test_how_a_model_numbers_its_neurons_does_not_matter(family):
    models = stages(family)
    before = directions(run_of(models), top=0.4, permutations=200)
    for block in find_layout(models[0]).blocks:
        order = torch.randperm(block.neurons, generator=torch.Generator().manual_seed(1))
        for model in models:
            state = dict(model.named_parameters())
            with torch.no_grad():
                for slot in block.slots:
                    slot.put(state[slot.tensor], torch.arange(slot.neurons), slot.take(state[slot.tensor], order))
    after = directions(run_of(models), top=0.4, permutations=200)
    for one, other in zip(before.pairs, after.pairs, strict=True):
        for a, b in zip((one.whole, *one.blocks), (other.whole, *other.blocks), strict=True):
            alike(a, b)


def test_the_null_is_the_mean_over_all_pairings():
    gram = torch.rand(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    every = sorted(float(gram[torch.arange(5), torch.tensor(order)].sum()) for order in orders(range(5)))
    found = evidence_cosines.permuted(gram, 6000, torch.Generator().manual_seed(1))
    assert sorted(set(found.null.tolist())) == pytest.approx(every, abs=1e-12)
    assert torch.equal(found.cosines, gram.diagonal().sort().values)
    counts = torch.tensor([int((found.null - one).abs().lt(1e-12).sum()) for one in every])
    assert 20 < int(counts.min()) <= int(counts.max()) < 90  # 50 of each, as draws go


def test_unrelated_updates_are_within_the_null_and_the_p_value_is_fair():
    values = []
    for seed in range(200):
        random = torch.Generator().manual_seed(seed)
        a, b = (torch.randn(12, 6, generator=random, dtype=torch.float64) for _ in range(2))
        gram = (a @ b.T) / (a.norm(dim=1)[:, None] * b.norm(dim=1))
        values.append(evidence_cosines.permuted(gram, 199, random).told("x").p)
    held = torch.tensor(values)
    assert 0.01 < float((held <= 0.1).double().mean()) < 0.18
    assert 0.35 < float((held <= 0.5).double().mean()) < 0.65


def test_a_direction_that_all_neurons_share_is_in_the_null():
    """Where every neuron of both stages moves the same way, the mean cosine is high and says nothing of the neuron."""
    one = (
        torch.randn(6, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).expand(6, 20).T.contiguous()
    )
    noise = torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.3
    a, b = one + noise[0], one + noise[1]
    found = evidence_cosines.permuted(
        (a @ b.T) / (a.norm(dim=1)[:, None] * b.norm(dim=1)), 999, torch.Generator()
    ).told("x")
    assert found.mean is not None
    assert found.null is not None
    assert found.mean > 0.7
    assert found.null[0] < found.mean < found.null[2]
    assert found.p is not None
    assert found.p > 0.05


def test_only_shared_rows_are_read_and_a_group_at_a_time(monkeypatch):
    monkeypatch.setattr(evidence_cosines, "GROUP", 5)
    read, real = [], evidence_cosines._update

    def watched(before: Any, after: Any, block: str, part: str, index: Tensor) -> Tensor:
        read.append((block, part, tuple(index.tolist())))
        return real(before, after, block, part, index)

    monkeypatch.setattr(evidence_cosines, "_update", watched)
    models = stages("qwen3", count=3)
    found = directions(run_of(models), top=0.4, permutations=3)
    assert max(len(index) for *_, index in read) <= 5
    for one in found.pairs[0].blocks:
        gates = {i for block, part, index in read if (block, part) == (one.block, "gate") for i in index}
        assert len(gates) == one.neurons


def test_a_stage_of_few_changes_and_an_empty_intersection_are_told():
    models = [build("qwen3") for _ in range(3)]
    with torch.no_grad():
        models[1].model.layers[0].mlp.gate_proj.weight[3] += 1
        models[2].load_state_dict(models[1].state_dict())
        models[2].model.layers[0].mlp.gate_proj.weight[7] += 1
        models.append(copy.deepcopy(models[2]))
        models[3].model.layers[0].mlp.up_proj.weight[7] += 1
        models.append(copy.deepcopy(models[3]))
    found = directions(run_of(models))
    assert found.changed == {"s1": 1, "s2": 1, "s3": 1, "s4": 0}
    assert found.of("s2", "s1").whole == Cosines(None, 0)
    one = found.of("s2", "s3").blocks[0]
    assert (one.neurons, one.mean, one.null, one.p) == (1, 0.0, None, None)
    assert found.of("s2", "s3").expected == pytest.approx(1 / 48)
    assert "none in common" in str(found)
    assert "one neuron" in str(found)
    assert "nan" not in str(found)
    with pytest.raises(LookupError, match="no pair 's1' and 's9'"):
        found.of("s1", "s9")


def test_the_most_changed_of_the_model_or_of_every_layer():
    models = stages("qwen3", count=3)
    with torch.no_grad():  # nearly all of the first layer's movement is taken back
        for before, after in ((models[0], models[1]), (models[1], models[2])):
            for a, b in zip(before.model.layers[0].parameters(), after.model.layers[0].parameters(), strict=True):
                b.copy_(a + 0.01 * (b - a))
    run = run_of(models)
    assert directions(run, top=0.3).pairs[0].blocks[0].neurons == 0
    uniform = directions(run, top=0.3, how="uniform")
    assert uniform.pairs[0].blocks[0].neurons > 0
    assert uniform.changed == {"s1": 29, "s2": 29}


def test_stages_may_be_called_like_a_trajectorys_own():
    models = stages("qwen3")
    names = ("base", "earlier", "qa", "later")
    named = directions(Trajectory.through(dict(zip(names, models, strict=True))), top=0.3)
    other = directions(run_of(models), top=0.3)
    assert list(named.changed) == ["earlier", "qa", "later"]
    assert [pair.whole for pair in named.pairs] == [pair.whole for pair in other.pairs]
    three = directions(Trajectory(models[0], models[1], models[2]), top=0.3)
    assert three.pairs[0].whole == other.pairs[0].whole


def test_attention_units_have_directions():
    models = stages("qwen3", count=3)
    run = Trajectory.through({f"s{at}": one for at, one in enumerate(models)})
    found = directions(run, top=0.5, units=("mlp", "kv_group"))
    assert any((one.block or "").endswith("[kv_group]") for one in found.pairs[0].blocks)


def test_the_seed_decides_the_null_and_nothing_else():
    run = run_of(stages("qwen3", count=3))
    one, same_, other = (directions(run, top=0.4, permutations=50, seed=seed) for seed in (0, 0, 1))
    assert one == same_
    assert one.pairs[0].whole.mean == other.pairs[0].whole.mean
    assert one.pairs[0].whole.null != other.pairs[0].whole.null


@pytest.mark.parametrize(
    ("models", "settings", "message"),
    [
        (lambda: [build("qwen3")] * 2, {}, "needs three checkpoints"),
        (lambda: [build("qwen3")] * 3, {"top": 0}, r"top=0: expected a share of the neurons in \(0, 1\]"),
        (lambda: [build("qwen3")] * 3, {"top": 1.5}, "top=1.5"),
        (lambda: [build("qwen3")] * 3, {"top": 0.001}, "top=0.001 selects none of 96 neurons"),
        (lambda: [build("qwen3")] * 3, {"permutations": 0}, "permutations=0: expected 1 or more"),
        (lambda: [build("qwen3")] * 3, {"how": "proportional"}, 'expected "global" or "uniform"'),
        (lambda: [build("qwen3"), build("gpt2"), build("qwen3")], {}, "different models"),
        (lambda: [build("qwen3"), broken(), build("qwen3")], {}, "holds 1 NaN or infinite"),
        (lambda: [{"a": torch.ones(2)}] * 3, {}, "pass layout="),
    ],
)  # fmt: skip
def test_bad_input_is_told(models, settings, message):
    with pytest.raises(ValueError, match=message):
        directions(run_of(models()), **settings)


def broken() -> nn.Module:
    model = spoilt(0.0)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = math.nan
    return model


def test_what_is_printed_and_saved(tmp_path):
    found = directions(run_of(stages("qwen3")), top=0.4)
    tables = found.tables()
    assert len(tables) == 1 + 3
    assert [row[0] for row in tables[0].rows] == ["s1–s2", "s1–s3", "s2–s3"]
    found.save(tmp_path / "directions.json")
    told = json.loads((tmp_path / "directions.json").read_text())
    assert told["kind"] == "Directions"
    assert told["pairs"][0]["whole"]["mean"] == found.pairs[0].whole.mean
    assert isinstance(found, Directions)


@pytest.mark.parametrize("mutant", ["later", "whole", "unscaled"])
def test_mutants_die(mutant, monkeypatch):
    if mutant == "later":  # what a stage changed is taken from the first checkpoint
        real = evidence_cosines.gram_of
        monkeypatch.setattr(evidence_cosines, "gram_of", lambda o, b, n, i, j: real([o[0], *o[1:]], b, n, 0, j))
    elif mutant == "whole":  # the largest updates of either stage
        most = evidence_directions._most
        monkeypatch.setattr(evidence_directions, "_most", lambda s, top, how: most(s, min(1, 2 * top), how))
    else:
        real_gram = evidence_cosines.gram_of
        monkeypatch.setattr(evidence_cosines, "gram_of", lambda *a: real_gram(*a).tanh())
    with pytest.raises(AssertionError):
        test_streamed_is_what_the_definition_says("qwen3", torch.float32, None, monkeypatch)
