"""Gradient cosines against two full gradients held in memory, and the laws of inner products."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, config, downstream
from test_scores import Batch, batches
from torch import nn
from torch.nn import functional as F

from surgery import Trajectory
from surgery.evidence import Gradients, GradientSeries, gradients, gradients_along
from surgery.evidence import products as gradient_products
from surgery.evidence.matching import places_of
from surgery.layout import find_layout
from surgery.live import distillation
from surgery.live.losses import cross_entropy

gradient_cosines = import_module("surgery.evidence.gradients")


NAMES = ("a", "b", "c")


def domains(*names: str) -> dict[str, list[Batch]]:
    """Domains of two batches of different length each, with labels; other tokens in each domain."""
    found = {}
    for at, name in enumerate(names or NAMES[:2]):
        found[name] = batches(labels=True)
        for batch in found[name]:
            moved = 3 + (batch["input_ids"] * (2 * at + 1) + 7 * at) % 61
            batch["input_ids"] = moved.where(batch["attention_mask"].bool(), torch.tensor(0))
            batch["labels"] = batch["input_ids"].where(batch["labels"] != -100, torch.tensor(-100))
    return found


def plain(model: nn.Module, data: list[Batch]) -> dict[str, torch.Tensor]:
    """The whole gradient of the mean over all response tokens, in memory, written token by token."""
    model.zero_grad(set_to_none=True)
    total, count = torch.zeros(()), 0
    for batch in data:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        logits = model(**inputs, use_cache=False).logits
        for row, at in (batch["labels"][:, 1:] != -100).nonzero().tolist():
            total = total + F.cross_entropy(logits[row, at].float(), batch["labels"][row, at + 1])
            count += 1
    (total / count).backward()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def products(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> dict[str, float]:
    """⟨first, second⟩ per tensor."""
    return {name: float((first[name].double() * second[name].double()).sum()) for name in first}


def close(found: float | None, wanted: float, tolerance: float = 2e-4) -> bool:
    return found is not None and abs(found - wanted) <= tolerance


def same_numbers(found: Gradients, other: Gradients, tolerance: float = 1e-4) -> None:
    for mine, its in zip((found.whole, *found.modules), (other.whole, *other.modules), strict=True):
        assert mine.name == its.name
        for a in found.domains:
            assert mine.norms[a] == pytest.approx(its.norms[a], rel=tolerance, abs=1e-9)
            assert all(close(mine.cosines[a][b], its.cosines[a][b] or 0, tolerance) for b in found.domains)


@pytest.mark.parametrize("family", downstream())
def test_it_is_what_two_full_gradients_in_memory_give(family):
    model, data = build(family), domains()
    found = gradients(model, data)
    first, second = (plain(model, one) for one in data.values())
    (aa, ab), (bb, _) = (products(first, first), products(first, second)), (products(second, second), None)
    norms = math.sqrt(sum(aa.values())), math.sqrt(sum(bb.values()))
    assert [found.whole.norms[d] for d in "ab"] == pytest.approx(norms, rel=1e-3)
    assert close(found.whole.cosines["a"]["b"], sum(ab.values()) / norms[0] / norms[1])
    assert set(found.products) == set(ab)
    for name, gram in found.products.items():
        scale = math.sqrt(aa[name] * bb[name])
        assert gram[0][1] == gram[1][0] == pytest.approx(ab[name], abs=2e-3 * scale + 1e-9)
    assert found.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", downstream())
def test_parts_add_up_and_every_neuron_is_in_an_mlp(family):
    model = build(family)
    found = gradients(model, domains())
    assert sum(part.norms["a"] ** 2 for part in found.kinds) == pytest.approx(found.whole.norms["a"] ** 2)
    assert [layer.layer for layer in found.layers] == [0, 1]
    for layer in found.layers:
        inside = [part for part in found.modules if part.layer == layer.layer]
        for a, b in (("a", "a"), ("a", "b"), ("b", "b")):
            total = sum((p.cosines[a][b] or 0) * p.norms[a] * p.norms[b] for p in inside)
            assert total == pytest.approx((layer.cosines[a][b] or 0) * layer.norms[a] * layer.norms[b], abs=1e-12)
        assert {"attention", "mlp"} <= {part.kind for part in inside} or family == "lfm2"
    places = places_of({name: p.ndim for name, p in model.named_parameters()})
    in_mlp = {slot.tensor for block in find_layout(model).blocks for slot in block.slots}
    assert {places[name].kind for name in in_mlp} == {"mlp"}
    assert {place.kind for place in places.values() if place.layer is None} <= {"embedding", "head", "norm", "other"}
    assert "embedding" in {place.kind for place in places.values()}


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gpt_oss"])
def test_a_domain_agrees_with_itself_and_opposes_its_negative(family):
    data = domains("a")["a"]
    both = {"plus": cross_entropy, "minus": lambda model, batch: -cross_entropy(model, batch)}
    found = gradients(build(family), {"plus": data, "minus": data}, both)
    for part in (found.whole, *found.kinds, *found.layers, *found.modules):
        assert part.cosines["plus"]["plus"] == 1
        assert part.cosines["plus"]["minus"] == -1
    assert found.losses["minus"] == -found.losses["plus"]
    assert not found.synergies
    assert {pull.cosine for pull in found.conflicts} == {-1}


def split_law() -> None:
    """However a domain is cut into batches, its gradient is the mean over its response tokens."""
    model, data = build("qwen3"), domains()
    one_by_one = {d: [{k: v[row : row + 1] for k, v in b.items()} for b in bs for row in range(len(b["input_ids"]))]
                  for d, bs in data.items()}  # fmt: skip
    same_numbers(gradients(model, data), gradients(model, one_by_one))
    found = gradients(model, data)
    assert found.tokens["a"] == sum(int((b["labels"][:, 1:] != -100).sum()) for b in data["a"])


def plain_law() -> None:
    """Tied embeddings: one tensor, one gradient, counted once; and signs stay."""
    settings = config("qwen3")
    settings.tie_word_embeddings = True
    torch.manual_seed(0)
    model = type(build("qwen3"))(settings).eval()
    data = domains(*NAMES)
    found = gradients(model, data)
    grads = [plain(model, one) for one in data.values()]
    names = list(found.products)
    assert sorted(names) == sorted(dict(model.named_parameters()))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.kinds[-1].kind == "embedding"
    for i, a in enumerate(NAMES):
        for j, b in enumerate(NAMES):
            wanted = sum(products(grads[i], grads[j]).values())
            got = (found.whole.cosines[a][b] or 0) * found.whole.norms[a] * found.whole.norms[b]
            assert got == pytest.approx(wanted, rel=1e-3, abs=1e-6)
            assert sum(gram[i][j] for gram in found.products.values()) == pytest.approx(got, rel=1e-9)


LAWS = {"splits": split_law, "plain": plain_law}


@pytest.mark.parametrize("law", LAWS)
def test_law(law):
    LAWS[law]()


def _absolute(rows: list[torch.Tensor], tokens: list[int]) -> torch.Tensor:
    chunk = torch.stack([row.double().abs() for row in rows])
    return chunk @ chunk.T / torch.tensor(tokens).double()[:, None] / torch.tensor(tokens).double()


def _shared() -> Any:
    made: list[torch.Tensor] = []

    def zeros(count: int, dtype: torch.dtype) -> torch.Tensor:
        made.append(torch.zeros(count, dtype=dtype))
        return made[0]

    return zeros


def _twice(model: nn.Module) -> dict[str, nn.Parameter]:
    """A tied parameter under both of its names, as a second tensor of its own."""
    return dict(model.named_parameters(remove_duplicate=False))


MUTANTS = {
    "every batch weighs the same": (gradient_products, "positions", lambda _: torch.ones(1)),
    "absolute values are summed": (gradient_products, "_products", _absolute),
    "a domain's sum is the next one's start": (gradient_products, "zeros_on_disk", _shared()),
    "a tied parameter is counted twice": (gradient_cosines, "trainable", _twice),
    "only the first chunk is summed": (
        gradient_products,
        "range",
        lambda *given: [0] if len(given) == 3 else range(*given),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_die(mutant, monkeypatch):
    module, name, wrong = MUTANTS[mutant]
    monkeypatch.setattr(module, name, wrong, raising=False)
    monkeypatch.setattr(gradient_products, "CHUNK", 100)
    died = 0
    for law in LAWS.values():
        try:
            law()
        except AssertionError:
            died += 1
    assert died


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "qwen3_moe", "gpt_oss"])
def test_a_permutation_of_neurons_changes_no_statistic(family):
    model, data = build(family), domains()
    before = gradients(model, data)
    for block in find_layout(model).blocks:
        size = block.neurons // max(block.experts, 1)
        order = torch.cat([e * size + torch.randperm(size) for e in range(max(block.experts, 1))])
        for slot in block.slots:
            tensor = model.get_parameter(slot.tensor).detach()
            slot.put(tensor, torch.arange(block.neurons), slot.take(tensor, order))
    same_numbers(gradients(model, data), before, 2e-4)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "qwen3_moe"])
def test_narrow_weights_give_nearly_the_same(family):
    model, data = build(family), domains()
    wide, narrow = gradients(model, data), gradients(model.to(torch.bfloat16), data)
    assert close(narrow.whole.cosines["a"]["b"], wide.whole.cosines["a"]["b"] or 0, 0.03)
    assert narrow.whole.norms["a"] == pytest.approx(wide.whole.norms["a"], rel=0.03)


def test_long_tensors_are_read_in_pieces(monkeypatch):
    model, data = build("qwen3"), domains()
    whole = gradients(model, data)
    monkeypatch.setattr(gradient_products, "CHUNK", 100)
    same_numbers(gradients(model, data), whole, 1e-6)


class Odd(nn.Module):
    """A branch that one domain does not take, dropout, and a submodule that is in eval mode while the rest trains."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"attn": nn.Linear(4, 4), "mlp": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}) for _ in range(2)
        )
        self.drop, self.branch = nn.Dropout(0.5), nn.Linear(4, 4)
        self.layers[0].eval()


def odd_loss(model: Any, batch: Batch) -> torch.Tensor:
    x = torch.rand(4) + batch["input_ids"].float().mean()
    for layer in model.layers:
        x = layer["norm"](x + layer["attn"](x) + model.drop(layer["mlp"](x)))
    return ((model.branch(x) if int(batch["input_ids"][0, 0]) else x) ** 3).sum()


def ones(first: int) -> list[Batch]:
    return [{"input_ids": torch.full((1, 3), first), "attention_mask": torch.ones(1, 3)}]


def test_tensors_without_gradient_are_zero_and_told():
    found = gradients(Odd(), {"a": ones(0), "b": ones(1)}, odd_loss)
    assert found.silent == {"a": ("branch.weight", "branch.bias"), "b": ()}
    assert found.at("branch").norms["a"] == 0
    assert found.at("branch").cosines["a"] == {"a": None, "b": None}
    assert found.at("branch").cosines["b"]["b"] == 1
    assert "tensors without gradient" in str(found)
    silent = gradients(build("qwen3_moe"), domains()).silent
    assert set(silent) == {"a", "b"}


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = Odd()
    model.branch.weight.grad = torch.ones(4, 4)
    model.branch.bias.requires_grad_(False)
    kept, before = model.branch.weight.grad, copy.deepcopy(model.state_dict())
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        if fails and int(batch["input_ids"][0, 0]):
            raise RuntimeError("no")
        return odd_loss(model, batch)

    data = {"a": torch.utils.data.DataLoader(ones(0) * 3, batch_size=None, shuffle=True), "b": ones(1)}
    if fails:
        with pytest.raises(RuntimeError, match="no"):
            gradients(model, data, loss)
    else:
        found = gradients(model, data, loss)
        assert (found.parameters, found.frozen) == (sum(p.numel() for p in model.parameters()) - 4, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["branch.weight"]
    assert model.branch.weight.grad is kept
    assert torch.equal(kept, torch.ones(4, 4))
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["branch.bias"]
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())


def test_only_one_tensors_gradient_exists_at_a_time(monkeypatch):
    model, most, real = build("qwen3"), [], torch.Tensor.add_

    def watched(self: torch.Tensor, *arguments: Any, **settings: Any) -> torch.Tensor:
        most.append(sum(p.grad is not None for p in model.parameters()))
        return real(self, *arguments, **settings)

    monkeypatch.setattr(torch.Tensor, "add_", watched)
    gradients(model, domains())
    assert max(most) == 1


MEMORY = """
import threading, torch
from pathlib import Path
from surgery.evidence import gradients

def anonymous():
    lines = Path("/proc/self/status").read_text().split("\\n")
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

class Deep(torch.nn.Module):
    def __init__(self, size, count):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(size, size) for _ in range(count))

def loss(model, batch):
    x = torch.ones(2, len(model.layers[0].bias))
    for layer in model.layers:
        x = layer(x)
    return x.square().mean()

data = {name: [{"input_ids": torch.ones(1, 2)}] for name in ("a", "b", "c")}
gradients(Deep(64, 2), data, loss)  # what torch loads late
model = Deep(1024, 32)  # 128 MB
start, peak, done = anonymous(), [0.0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())
thread = threading.Thread(target=watch); thread.start()
gradients(model, data, loss)
done.set(); thread.join()
print(peak[0] - start)
"""


def test_anonymous_memory_is_a_tensor_and_not_a_gradient():
    """A gradient of 128 MB, three domains: what is held beyond the page cache is a few tensors (4 MB) and chunks."""
    found = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert float(found.stdout) < 48, f"{found.stdout} MB"


def test_the_way_back_has_no_direction_at_the_earlier_model():
    model, data = build("qwen3"), domains()
    loss = distillation(model, [batch for each in data.values() for batch in each])
    found = gradients(model, data, {"a": loss, "b": cross_entropy})
    assert found.whole.cosines["a"]["b"] is None or found.whole.norms["a"] < 1e-5 * found.whole.norms["b"]


def test_json_and_tables_say_the_same(tmp_path):
    found = gradients(build("qwen3"), domains(*NAMES), strongest=2)
    found.save(tmp_path / "found.json")
    read = json.loads((tmp_path / "found.json").read_text())
    assert read["kind"] == "Gradients"
    assert read["whole"]["cosines"]["a"]["c"] == found.whole.cosines["a"]["c"]
    assert found.pairs == (("a", "b"), ("a", "c"), ("b", "c"))
    assert len(found.conflicts) <= 2
    values = sorted(
        c for part in found.modules if part.kind in ("attention", "mlp") for a, b in found.pairs
        if (c := part.cosines[a][b]) is not None
    )  # fmt: skip
    assert [pull.cosine for pull in found.conflicts] == [c for c in values if c < 0][:2]
    assert [pull.cosine for pull in found.synergies] == [c for c in reversed(values) if c > 0][:2]
    assert found.tables()[1].rows[0] == ("model", *(found.whole.cosines[a][b] for a, b in found.pairs))


def test_a_path_is_the_sum_of_what_lies_below():
    found = gradients(build("qwen3"), domains())
    mlp = next(part for part in found.modules if part.name == "model.layers.1.mlp")
    assert found.at("model.layers.1.mlp").cosines == mlp.cosines
    three = [found.at(f"model.layers.1.mlp.{name}_proj").norms["a"] ** 2 for name in ("gate", "up", "down")]
    assert sum(three) == pytest.approx(mlp.norms["a"] ** 2)
    with pytest.raises(LookupError, match=r"no trained parameter lies at 'model\.layers\.9'"):
        found.at("model.layers.9")


def test_along_a_trajectory(tmp_path):
    stages: dict[str, Any] = {"base": build("qwen3", seed=0), "math": build("qwen3", seed=1)}
    stages["math"].save_pretrained(tmp_path / "math")
    run, told = Trajectory.through({"base": stages["base"], "math": tmp_path / "math"}), []
    series = gradients_along(run, {d: iter(bs) for d, bs in domains().items()}, progress=told.append)
    assert told == ["gradients of a, b at base", "gradients of a, b at math"]
    for name, model in stages.items():
        same_numbers(series.stages[name], gradients(model, domains()), 1e-5)
    pull = (*series.conflicts, *series.synergies)[0]
    course = [next(p for p in g.modules if p.name == pull.module).cosines[pull.first][pull.second]
              for g in series.stages.values()]  # fmt: skip
    assert list(series.course(pull)) == course
    assert pull.cosine == pytest.approx(sum(c or 0 for c in course) / 2)
    series.save(tmp_path / "series.json")
    assert list(json.loads((tmp_path / "series.json").read_text())["stages"]) == ["base", "math"]
    assert "math" in str(series)


def test_what_a_series_needs():
    one, other = gradients(build("qwen3"), domains()), gradients(build("gpt2"), domains())
    with pytest.raises(ValueError, match="one stage or more"):
        GradientSeries.over({})
    with pytest.raises(ValueError, match="'b' has other domains or other parameters"):
        GradientSeries.over({"a": one, "b": other})


def with_labels(value: int) -> dict[str, list[Batch]]:
    data = domains()
    data["b"][1]["labels"][:] = value
    return data


def nan_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return cross_entropy(model, batch) * (float("nan") if len(batch["input_ids"]) == 2 else 1)


def steep_loss(model: Any, batch: Batch) -> torch.Tensor:
    return cross_entropy(model, batch) + (model.model.norm.weight * 0).sum().sqrt()


@pytest.mark.parametrize(
    ("data", "loss", "message"),
    [
        ({"a": domains()["a"]}, None, "two domains or more"),
        (domains()["a"], None, "two domains or more"),
        ({**domains(), "b": []}, None, "the data of 'b' is empty"),
        (with_labels(-100), None, "batch 1 of 'b' has no response token"),
        ({**domains(), "b": batches(labels=False)}, None, "prompts without responses"),
        (domains(), {"a": cross_entropy}, r"losses for \['a'\] and data for \['a', 'b'\]"),
        (domains(), lambda m, b: torch.ones(()), "the loss of 'a' is that no trained weight has a part in"),
        (domains(), lambda m, b: cross_entropy(m, b) * torch.ones(2), r"of the shape \(2,\): expected a scalar"),
        (domains(), nan_loss, "the loss of 'a' is nan on batch 1"),
        (domains(), steep_loss, "the gradient of 'model.norm.weight' is NaN or infinite on the batches of 'a'"),
    ],
)
def test_bad_data_and_losses(data, loss, message):
    with pytest.raises(ValueError, match=message):
        gradients(build("qwen3"), data, loss)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: m.requires_grad_(False), "every parameter is frozen"),
        (lambda m: m.lm_head.to("meta"), "'lm_head.weight' is offloaded"),
        (lambda m: setattr(m.lm_head, "weight", nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)),
         r"quantised \('lm_head.weight' is torch.int8\)"),
        (lambda m: setattr(m, "is_quantized", True), "the model is quantised"),
    ],
)  # fmt: skip
def test_models_that_can_not_be_differentiated(spoil, message):
    model: Any = build("qwen3")
    spoil(model)
    with pytest.raises(ValueError, match=message):
        gradients(model, domains())


def test_frozen_weights_are_left_out_and_told():
    model = build("qwen3")
    for name, p in model.named_parameters():
        p.requires_grad_("mlp" in name)
    found = gradients(model, domains())
    assert all("mlp" in name for name in found.products)
    assert found.parameters + found.frozen == sum(p.numel() for p in model.parameters())


def test_strongest_is_a_count():
    with pytest.raises(ValueError, match="strongest=-1"):
        gradients(build("qwen3"), domains(), strongest=-1)
