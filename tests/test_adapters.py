"""An adapter's folder is the model that peft's merge makes of it: read, scored, rolled back and loaded again."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import adapted
import families
import pytest
import torch
from adapted import DORA, KINDS, Kind
from safetensors.torch import load_file, save_file
from test_scores import batches
from test_vision_language import as_released, as_saved, pair
from torch import Tensor
from training_folders import as_distributed, as_ranks

from benchmarks.lab.tokenizer import build_tokenizer
from surgery import (
    AMCSelector,
    Checkpoint,
    DamageSelector,
    Neurons,
    RandomSelector,
    Trajectory,
    load_prompts,
    magnitude,
    repair,
    rollback,
    rolled_back,
    save,
    sweep,
)
from surgery.checkpoints.checkpoint import tokenizer_of
from surgery.checkpoints.opening import open_weights
from surgery.cli import app
from surgery.formats.factors import Factors
from surgery.live.preflight import preflight
from surgery.reverting.patch import Patch
from surgery.reverting.patch_writing import save_patch

UNITS = ("mlp", "value_channel")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for what is made once a kind."""
    return tmp_path_factory.mktemp("adapters")


def made(shelf: Path, kind: Kind) -> tuple[Path, Path, Path]:
    """The base, an adapter on it, and the merged model of both."""
    place = shelf / str(abs(hash(repr(kind))))
    if not place.exists():
        base = adapted.base(kind, place / "base")
        adapted.merged(base, adapted.adapter(kind, base, place / "adapter"), place / "merged")
    return place / "base", place / "adapter", place / "merged"


@pytest.mark.parametrize("kind", [*KINDS.values(), DORA], ids=[*KINDS, "DoRA"])
def test_an_adapter_is_read_as_the_merged_model(shelf, kind):
    base, folder, merged = made(shelf, kind)
    ours, theirs = Checkpoint(folder), Checkpoint(merged)
    assert ours.keys() == theirs.keys() == Checkpoint(base).keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name
    assert any(not torch.equal(ours[name], tensor) for name, tensor in Checkpoint(base).items())
    model = Trajectory(later=folder).load()
    assert torch.equal(adapted.logits(model), adapted.logits(adapted.loaded(merged)))


def masked(kind: Kind, folder: Path, share: float = 0.3) -> Neurons:
    """Some units of every kind that the family has."""
    weights = open_weights(Checkpoint(folder), units="mlp" if "moe" in kind.family or "gpt" in kind.family else UNITS)
    torch.manual_seed(5)
    return Neurons({name: torch.rand(size) < share for name, size in weights.layout.sizes.items()})


def rolled(later: Path, to: Path, mask: Neurons) -> dict[str, Tensor]:
    return dict(rolled_back(later, to=to, mask=mask))


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """The tensors that differ."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_an_adapter_is_rolled_back_to_its_base(shelf, tmp_path, kind):
    base, folder, merged = made(shelf, kind)
    mask = masked(kind, base)
    expected = rolled(merged, base, mask)
    view = rolled_back(folder, to=base, mask=mask)
    assert same(view, expected) == []
    assert same(expected, Checkpoint(merged)) != []
    out = save(view, tmp_path / "out")
    assert same(Checkpoint(out), expected) == []
    again = adapted.merged(base, out, tmp_path / "again")
    assert same(Checkpoint(again), expected) == []
    runs_alike(base, out, again)


def runs_alike(base: Path, out: Path, merged: Path) -> None:
    """What peft computes with the adapter beside the weights is what the merged model computes, but for rounding."""
    one, other = adapted.logits(adapted.with_peft(base, out)), adapted.logits(adapted.loaded(merged))
    near = 1e-4 if one.dtype == torch.float32 else 0.1
    assert (one - other).abs().max() <= near * other.abs().max()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_an_adapter_is_rolled_back_to_another(shelf, tmp_path, kind):
    base, folder, merged = made(shelf, kind)
    mask = masked(kind, base)
    rank = {} if "rank_pattern" in kind.settings else dict(r=2, lora_alpha=4)  # the same scale
    earlier = adapted.adapter(kind, base, tmp_path / "earlier", seed=2, **rank)
    expected = rolled(merged, adapted.merged(base, earlier, tmp_path / "merged"), mask)
    view = rolled_back(folder, to=earlier, mask=mask)
    assert same(view, expected) == []
    out = save(view, tmp_path / "out")
    assert same(Checkpoint(out), expected) == []
    again = adapted.merged(base, out, tmp_path / "again")
    assert same(Checkpoint(again), expected) == []
    runs_alike(base, out, again)


OTHERS = {
    "another scale": (KINDS["dense"], dict(lora_alpha=5, r=3)),
    "another rank for each layer": (KINDS["dense"], dict(rank_pattern={"layers.0.mlp.up_proj": 7, "down_proj": 2})),
    "more layers": (KINDS["some layers"], dict(layers_to_transform=None)),
    "other modules": (Kind("qwen3", dict(target_modules=["q_proj", "up_proj"])), dict(target_modules=["down_proj"])),
    "experts beside attention": (KINDS["experts, one parameter"], KINDS["experts on disk one by one"].settings),
    "experts transposed": (
        Kind("gpt_oss", dict(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])),
        dict(target_parameters=["experts.down_proj"], lora_alpha=3),
    ),
    "rslora": (KINDS["dense"], dict(use_rslora=True)),
    "under rslora": (Kind("qwen3", dict(target_modules="all-linear", use_rslora=True)), dict(use_rslora=False)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_two_adapters_of_other_settings(shelf, tmp_path, name):
    """Other ranks, modules and scales: what is reverted is the earlier model's, but for the rounding of B1·s1/s2."""
    kind, settings = OTHERS[name]
    base, folder, merged = made(shelf, kind)
    mask = masked(kind, base)
    earlier = adapted.adapter(kind, base, tmp_path / "earlier", seed=2, **settings)
    expected = rolled(merged, adapted.merged(base, earlier, tmp_path / "merged"), mask)
    view = rolled_back(folder, to=earlier, mask=mask)
    assert same(view, expected) == []
    out = save(view, tmp_path / "out")
    again = adapted.merged(base, out, tmp_path / "again")
    assert same(Checkpoint(out), Checkpoint(again)) == []
    for one, tensor in Checkpoint(again).items():
        assert torch.allclose(tensor, expected[one], rtol=0, atol=2e-6), one
    assert same(expected, Checkpoint(merged)) != []
    runs_alike(base, out, again)


@pytest.mark.parametrize("half", [False, True])
def test_part_of_the_way(shelf, tmp_path, half):
    base, folder, merged = made(shelf, KINDS["dense"])
    mask = masked(KINDS["dense"], base)
    torch.manual_seed(0)
    strength: float | Neurons = 0.5 if half else Neurons({name: torch.rand(size) for name, size in mask.sizes.items()})
    earlier = adapted.adapter(KINDS["dense"], base, tmp_path / "earlier", seed=2)
    there = adapted.merged(base, earlier, tmp_path / "merged")
    for to, whole in ((base, base), (earlier, there)):
        expected = dict(rolled_back(merged, to=whole, mask=mask, strength=strength))
        out = save(rolled_back(folder, to=to, mask=mask, strength=strength), tmp_path / f"out-{to.name}")
        for one, tensor in Checkpoint(out).items():
            assert torch.allclose(tensor, expected[one], rtol=0, atol=2e-6), one


def test_an_adapter_on_an_adapter(shelf, tmp_path):
    """A second stage that was trained on the merged first one: its base is the first adapter over its own base."""
    kind = KINDS["in bf16"]
    base, first, merged = made(shelf, kind)
    second = adapted.adapter(kind, merged, tmp_path / "second", seed=3)
    both = adapted.merged(merged, second, tmp_path / "both")
    under = Checkpoint(first, base=base)
    chain = Checkpoint(second, base=under)
    assert same(chain, Checkpoint(both)) == []
    mask = masked(kind, base)
    out = save(rolled_back(chain, to=under, mask=mask), tmp_path / "out")
    assert same(Checkpoint(out, base=under), rolled(both, merged, mask)) == []


# --- DoRA, and what is refused


def test_rows_of_dora_are_exact_and_columns_are_refused(shelf, tmp_path):
    kind = Kind("qwen3", dict(target_modules=["gate_proj", "up_proj"], use_dora=True))
    base, folder, merged = made(shelf, kind)
    mask = masked(kind, base)
    out = save(rolled_back(folder, to=base, mask=mask), tmp_path / "out")
    expected = rolled(merged, base, mask)
    assert (
        same(Checkpoint(out), expected) == same(Checkpoint(adapted.merged(base, out, tmp_path / "m")), expected) == []
    )
    base, folder, merged = made(shelf, DORA)
    view = rolled_back(folder, to=base, mask=mask)
    assert same(view, rolled(merged, base, mask)) == []  # as a mapping it is exact; no adapter holds it
    with pytest.raises(ValueError, match=r"columns of a layer can't be set back under DoRA.*down_proj.*merge"):
        save(view, tmp_path / "refused")
    other = adapted.adapter(KINDS["dense"], base, tmp_path / "other")
    with pytest.raises(ValueError, match="can't be set back under DoRA"):
        save(rolled_back(folder, to=other, mask=mask), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


REFUSED = {
    "pissa": (dict(init_lora_weights="pissa_niter_4"), "began with pissa_niter_4 .* changes the base"),
    "olora": (dict(init_lora_weights="olora"), "began with olora"),
    "corda": (dict(init_lora_weights="corda"), "began with corda"),
    "loftq": (dict(init_lora_weights="loftq"), "began with loftq"),
    "another type": (dict(peft_type="IA3"), "of the type 'IA3', and only LORA"),
    "qalora": (dict(use_qalora=True), "has the setting use_qalora"),
    "a setting of tomorrow": (dict(use_foolora={"a": 1}), "has the setting use_foolora"),
    "replicated layers": (dict(layer_replication=[[0, 2], [1, 2]]), "has the setting layer_replication"),
    "tokens": (dict(trainable_token_indices=[3]), "has the setting trainable_token_indices"),
    "alpha 0": (dict(lora_alpha=0), "lora_alpha in .* is 0"),
    "alpha NaN": (dict(lora_alpha=float("nan")), "lora_alpha nan"),
    "a rank of text": (dict(r="four"), "the rank 'four'"),
    "another rank": (dict(r=5), "has the rank 4, and its configuration says 5"),
    "dora without magnitudes": (dict(use_dora=True), "has no magnitudes"),
    "a broken pattern": (dict(rank_pattern={"(": 3}), "rank_pattern .* no regular expression"),
    "patterns that are none": (dict(alpha_pattern=[1]), "alpha_pattern"),
    "parameters that are none": (dict(target_parameters=3), "target_parameters"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_are_refused(shelf, tmp_path, name):
    _, folder, _ = made(shelf, KINDS["dense"])
    settings, told = REFUSED[name]
    shutil.copytree(folder, tmp_path / "adapter")
    adapted.settings(tmp_path / "adapter", **settings)
    with pytest.raises(ValueError, match=told):
        Checkpoint(tmp_path / "adapter")


def test_adapters_and_masks_that_do_not_fit(shelf, tmp_path):
    base, folder, merged = made(shelf, KINDS["dense"])
    run = Trajectory(earlier=base, later=folder)
    single = AMCSelector(0.1, "M", "M", "global", ("mlp", "weight")).select(run)
    assert same(rolled_back(folder, to=base, mask=single), dict(rolled_back(merged, to=base, mask=single))) == []
    with pytest.raises(ValueError, match=r"mask of single weights can't .* merge it"):
        save(rolled_back(folder, to=base, mask=single), tmp_path / "out")
    mask = masked(KINDS["dense"], base)
    families.build("qwen3", seed=4).save_pretrained(tmp_path / "stranger")
    with pytest.raises(ValueError, match=r"is neither the base of the adapter .* nor another adapter"):
        save(rolled_back(folder, to=tmp_path / "stranger", mask=mask), tmp_path / "out")
    stray = adapted.adapter(KINDS["dense"], tmp_path / "stranger", tmp_path / "stray")
    with pytest.raises(ValueError, match=r"is neither the base of the adapter .* nor another adapter"):
        save(rolled_back(folder, to=stray, mask=mask), tmp_path / "out")
    whole = adapted.adapter(KINDS["saved whole"], base, tmp_path / "whole")
    with pytest.raises(ValueError, match=r"whole holds 'model.layers.\d.mlp.down_proj.weight' whole, and .* low rank"):
        save(rolled_back(folder, to=whole, mask=mask), tmp_path / "out")
    families.build("qwen2").save_pretrained(tmp_path / "qwen2")
    with pytest.raises(ValueError, match="base"):
        Checkpoint(
            adapted.adapter(KINDS["biased"], made(shelf, KINDS["biased"])[0], tmp_path / "b"), tmp_path / "qwen2"
        )
    with pytest.raises(ValueError, match="whole model and no adapter: leave out base="):
        Checkpoint(base, merged)
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_not_here_is_asked_for(shelf, tmp_path):
    base, folder, merged = made(shelf, KINDS["dense"])
    shutil.copytree(folder, tmp_path / "adapter")
    for named, told in ((None, "names no base"), ("/nowhere/base", "'/nowhere/base' as its base, which is not here")):
        adapted.settings(tmp_path / "adapter", base_model_name_or_path=named)
        with pytest.raises(LookupError, match=told):
            Checkpoint(tmp_path / "adapter")
        assert same(Checkpoint(tmp_path / "adapter", base=base), Checkpoint(merged)) == []
        for run in (
            Trajectory(base, tmp_path / "adapter", merged),
            Trajectory(earlier=base, later=tmp_path / "adapter"),
        ):
            assert all(same(one.tensors, Checkpoint(merged)) == [] for one in run.weights("later"))
        view = rolled_back(tmp_path / "adapter", to=base, mask=masked(KINDS["dense"], base))
        assert same(view, Checkpoint(merged)) != []


def test_quantised_bases_and_tied_heads(shelf, tmp_path):
    base, folder, _ = made(shelf, KINDS["dense"])
    shutil.copytree(base, tmp_path / "base")
    config = tmp_path / "base/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "x"}}))
    with pytest.raises(ValueError, match="quantised weights can't be read"):
        open_weights(Checkpoint(folder, base=tmp_path / "base"))
    model = families.build("qwen3")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    kind = Kind("qwen3", dict(target_modules=["up_proj"], modules_to_save=["embed_tokens"]))
    with pytest.raises(ValueError, match="which the base ties to another tensor"):
        Checkpoint(adapted.adapter(kind, tmp_path / "tied", tmp_path / "adapter"))


@pytest.mark.parametrize("damage", ["cut", "stranger", "half", "shape"])
def test_damaged_files(shelf, tmp_path, damage):
    _, folder, _ = made(shelf, KINDS["dense"])
    shutil.copytree(folder, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if "up_proj.lora_A" in key)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    else:
        changed = {
            "stranger": {"base_model.model.x.lora_magic.weight": torch.ones(1)},
            "half": {name: None},
            "shape": {name: torch.ones(4, 31)},
        }[damage]
        save_file({key: one for key, one in {**tensors, **changed}.items() if one is not None}, file)
    with pytest.raises(ValueError, match=r"is damaged|no matrix of LoRA|one of the matrices|is 48 × 31"):
        Checkpoint(tmp_path / "adapter")


@pytest.mark.parametrize("damage", ["two dtypes", "infinite"])
def test_matrices_of_two_dtypes_and_infinite_ones(shelf, tmp_path, damage):
    """Each matrix keeps its dtype; zero times infinity is no zero, so such an adapter holds no rollback."""
    base, folder, _ = made(shelf, KINDS["dense"])
    file = shutil.copytree(folder, tmp_path / "adapter") / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, one in tensors.items():
        if damage == "two dtypes" and "lora_A" in name:
            tensors[name] = one.bfloat16()
        elif damage == "infinite" and "layers.1.mlp.up_proj.lora_A" in name:
            one[0, 0] = float("inf")
    save_file(tensors, file, {"format": "pt"})
    view = rolled_back(tmp_path / "adapter", to=base, mask=masked(KINDS["dense"], base))
    if damage == "infinite":
        with pytest.raises(
            ValueError, match=r"adds to 'model.layers.1.mlp.up_proj.weight' holds NaN or infinite .* zero"
        ):
            save(view, tmp_path / "out")
        return
    out = save(view, tmp_path / "out")
    assert same(Checkpoint(adapted.merged(base, out, tmp_path / "again")), view) == []


def test_a_look_before_loading_multiplies_nothing(shelf, monkeypatch):
    base, folder, _ = made(shelf, KINDS["experts on disk one by one"])
    monkeypatch.setattr(Factors, "delta", lambda *_: pytest.fail("numbers were multiplied"))
    assert {one.verdict for one in preflight(Trajectory(earlier=base, later=folder))} <= {"ok", "warning"}


# --- live models of peft


LIVE = ["dense", "in bf16", "biased", "fused gate and up", "transposed", "saved whole", "experts on disk one by one"]


@pytest.mark.parametrize("name", LIVE)
def test_a_live_model_is_measured_as_it_is_merged_or_not(shelf, name):
    """Without a merge a copy is merged, and the model itself is left alone."""
    base, folder, merged = made(shelf, KINDS[name])
    model = adapted.with_peft(base, folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain, run = Trajectory(earlier=base, later=merged), Trajectory(earlier=base, later=model)
    data = batches(labels=True)
    selectors = DamageSelector(0.1), AMCSelector(0.1, "AM", "AM"), AMCSelector(0.01, "M", "M", "global", "weight")
    expected = [selector.select(plain, data) for selector in selectors]
    assert [selector.select(run, data) for selector in selectors] == expected
    given = dict(selectors=selectors[:1], budgets=[0.1], evaluate=score)
    rows, others = (sweep(one, data, **given).rows for one in (run, plain))
    assert [row.metrics for row in rows] == [row.metrics for row in others]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert run.load() is run.load()
    copied = run.load()
    with torch.no_grad():
        next(one for name, one in model.named_parameters() if "lora_B" in name).add_(1)
    assert run.load() is not copied  # trained on, it is another model
    assert not torch.equal(adapted.logits(run.load()), adapted.logits(copied))
    model = adapted.with_peft(base, folder)
    model.merge_adapter()
    run = Trajectory(earlier=base, later=model)
    assert [selector.select(run, data) for selector in selectors] == expected


@pytest.mark.parametrize("name", LIVE)
def test_a_live_adapter_is_rolled_back_in_its_own_matrices(shelf, tmp_path, name):
    """To its base: what peft computes then is what it computes with the saved rollback; undone bit for bit."""
    base, folder, merged = made(shelf, KINDS[name])
    model, mask = adapted.with_peft(base, folder), masked(KINDS[name], base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    saved = save(rolled_back(folder, to=base, mask=mask), tmp_path / "out")
    sound = adapted.logits(model)
    with rollback(model, to=base, mask=mask) as done:
        assert done.changed > 0
        assert torch.equal(adapted.logits(model), adapted.logits(adapted.with_peft(base, saved)))
        assert not torch.equal(adapted.logits(model), sound)
        after = Trajectory(later=model).load().state_dict()
        assert all(
            torch.equal(after[name], value) for name, value in Trajectory(later=saved).load().state_dict().items()
        )
        model.save_pretrained(tmp_path / "again")
        assert same(Checkpoint(tmp_path / "again"), rolled(merged, base, mask)) == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(adapted.logits(model), sound)


def test_what_a_live_adapter_can_not_take(shelf, tmp_path):
    base, folder, _ = made(shelf, KINDS["dense"])
    model, mask = adapted.with_peft(base, folder), masked(KINDS["dense"], base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = adapted.adapter(KINDS["dense"], base, tmp_path / "other", seed=2)
    with pytest.raises(ValueError, match=r"not the base of .* raise the rank .* fixed in a live model.*merge_adapter"):
        rollback(model, to=other, mask=mask)
    single = AMCSelector(0.1, "M", "M", "global", ("mlp", "weight")).select(Trajectory(earlier=base, later=folder))
    with pytest.raises(ValueError, match="single weights can't be rolled back in the adapter"):
        rollback(model, to=base, mask=single)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.load_adapter(str(other), "other")
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="no single adapter of peft that could be rolled back: call"):
        rollback(model, to=base, mask=mask)
    half = adapted.with_peft(base, folder)
    with rollback(half, to=base, mask=mask, strength=0.5):
        now = Trajectory(later=half).load().state_dict()
        for name, value in rolled_back(folder, to=base, mask=mask, strength=0.5).items():
            assert torch.allclose(now[name], value, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", LIVE)
def test_a_live_model_with_its_adapter_merged_is_rolled_back(shelf, name):
    base, folder, merged = made(shelf, KINDS[name])
    model = adapted.with_peft(base, folder)
    mask = masked(KINDS[name], base)
    model.merge_adapter()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sound = adapted.logits(model)
    with rollback(model, to=base, mask=mask) as done:
        assert done.changed > 0
        expected = Trajectory(later=merged).load()
        with rollback(expected, to=base, mask=mask):
            assert torch.equal(adapted.logits(model), adapted.logits(expected))
            assert not torch.equal(adapted.logits(model), sound)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


HELD = {"bias", "lora_bias", "modules_to_save"}  # settings with which some of the units' numbers are no product
EXACT = [name for name, kind in KINDS.items() if kind.dtype == torch.float32 and not HELD & kind.settings.keys()]


@pytest.mark.parametrize("name", EXACT)
def test_magnitudes_come_from_the_factors_alone(shelf, monkeypatch, name):
    base, folder, merged = made(shelf, KINDS[name])
    units = "mlp" if "moe" in KINDS[name].family or "gpt" in KINDS[name].family else UNITS
    expected = magnitude(Trajectory(earlier=base, later=merged), units=units)
    monkeypatch.setattr(Factors, "delta", lambda *_: pytest.fail("B·A was multiplied out"))
    found = magnitude(Trajectory(earlier=base, later=folder), units=units)
    assert found.sizes == expected.sizes
    for block, value in expected.items():
        assert torch.allclose(found[block], value, rtol=1e-5, atol=1e-6)
    assert any(bool((value > 0).any()) for value in expected.values())


@pytest.mark.parametrize("name", KINDS)
def test_what_is_selected_is_what_would_be_after_merging(shelf, name):
    """In 16 bits, and where another adapter is the earlier one, the merged weights are compared as they are."""
    kind = KINDS[name]
    base, folder, merged = made(shelf, kind)
    ours, theirs = (magnitude(Trajectory(earlier=base, later=one)) for one in (folder, merged))
    near = 1e-5 if kind.dtype == torch.float32 else 0.1
    assert all(torch.allclose(ours[block], value, rtol=near, atol=near / 10) for block, value in theirs.items())
    assert magnitude(Trajectory(earlier=folder, later=base)) == magnitude(Trajectory(earlier=merged, later=base))


# --- the verbs


LAWS = ["dense", "fused gate and up", "experts on disk one by one", "biased"]


def nearness(to: Path) -> Callable[[torch.nn.Module], dict[str, float]]:
    """An evaluation that is the better the nearer the weights of the units are to those of a plain folder."""
    there = adapted.loaded(to).state_dict()

    def score(model: torch.nn.Module) -> dict[str, float]:
        found = {name: one for name, one in model.state_dict().items() if "mlp" in name or "_proj" in name}
        return {"math": -sum(float((one.double() - there[name]).abs().sum()) for name, one in found.items())}

    return score


@pytest.mark.parametrize("other", [False, True], ids=["to its base", "to another"])
@pytest.mark.parametrize("name", LAWS)
def test_an_adapter_is_repaired_as_the_merged_model_is(shelf, tmp_path, name, other):
    kind = KINDS[name]
    base, folder, merged = made(shelf, kind)
    earlier = adapted.adapter(kind, base, tmp_path / "earlier", seed=2) if other else base
    there = adapted.merged(base, earlier, tmp_path / "there") if other else base
    given = dict(evaluate=nearness(there), metric="math", recovery=0.4, budgets=[0.1, 0.3, 0.6, 1.0])
    plain = Trajectory(earlier=there, later=merged)
    expected = repair(plain, batches(labels=True), selector=DamageSelector(0.1), **given)
    done = repair(Trajectory(earlier=earlier, later=folder), batches(labels=True), **given)
    assert done.outcome == expected.outcome == "repaired"
    assert done.mask is not None
    assert expected.mask is not None
    assert type(done.mask) is type(expected.mask)
    assert done.mask.equal(expected.mask)
    assert done.verdict == expected.verdict
    out = done.save(tmp_path / "out")
    again = adapted.merged(base, out, tmp_path / "again")
    assert same(Checkpoint(again), rolled(merged, there, expected.mask)) == []
    assert same(Checkpoint(again), Checkpoint(merged)) != []
    runs_alike(base, out, again)


FORMS = ("rank files", "distributed", "a live model", "tensors by name")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LAWS)
def test_the_base_may_be_in_another_form(shelf, tmp_path, name, form):
    base, folder, merged = made(shelf, KINDS[name])
    mask = masked(KINDS[name], base)
    to: Any = tmp_path / "to"
    if form == "rank files":
        as_ranks(base, to)
    elif form == "distributed":
        as_distributed(base, to)
    else:
        to = adapted.loaded(base) if form == "a live model" else dict(Checkpoint(base))
    out = save(rolled_back(folder, to=to, mask=mask), tmp_path / "out")
    assert same(Checkpoint(adapted.merged(base, out, tmp_path / "again")), rolled(merged, base, mask)) == []
    if form in ("rank files", "distributed"):  # also where the adapter names no base
        adapted.settings(shutil.copytree(folder, tmp_path / "moved"), base_model_name_or_path=None)
        view = rolled_back(tmp_path / "moved", to=to, mask=mask)
        assert same(Checkpoint(save(view, tmp_path / "other"), base=base), rolled(merged, base, mask)) == []


def test_a_base_of_other_numbers_is_no_base(shelf, tmp_path):
    """One number of one reverted unit is enough, wherever it lies; what is not reverted does not matter."""
    base, folder, _ = made(shelf, KINDS["dense"])
    mask = masked(KINDS["dense"], base)
    block = "model.layers.0.mlp"
    at = {value: int((mask[block] == value).nonzero()[0]) for value in (False, True)}
    for taken, row in at.items():
        model = adapted.loaded(base)
        with torch.no_grad():
            model.get_submodule(block).up_proj.weight[row, 3] += 1
        model.save_pretrained(tmp_path / f"moved-{taken}")
        view = rolled_back(folder, to=tmp_path / f"moved-{taken}", mask=mask)
        if taken:
            with pytest.raises(ValueError, match="is neither the base of the adapter"):
                save(view, tmp_path / "out")
        else:
            save(view, tmp_path / "out")
            shutil.rmtree(tmp_path / "out")


def test_a_sweep_measures_what_the_merged_model_is(shelf):
    base, folder, merged = made(shelf, KINDS["in bf16"])

    def rows(later: Path) -> list[tuple[float, dict[str, float]]]:
        run = Trajectory(earlier=base, later=later)
        found = sweep(run, batches(labels=True), selectors=[DamageSelector(0.1)], budgets=[0.1], evaluate=score)
        return [(row.budget, row.metrics) for row in found.rows]

    assert rows(folder) == rows(merged)


def score(model: torch.nn.Module) -> dict[str, float]:
    return {"math": float(adapted.logits(model).float().log_softmax(-1)[0, -1, 7])}


def test_the_shell_takes_adapters(shelf, tmp_path, monkeypatch, capsys):
    base, folder, merged = made(shelf, KINDS["dense"])
    monkeypatch.chdir(tmp_path)
    for one in (folder, adapted.adapter(KINDS["dense"], base, tmp_path / "first", seed=2)):
        shutil.copytree(one, tmp_path / f"{one.name}-moved")
        adapted.settings(tmp_path / f"{one.name}-moved", base_model_name_or_path="/gone")
    for command in (
        f"inspect adapter-moved --base {base}",
        f"select {base} adapter-moved --selector M --budget 0.1 -o base.safetensors",
        f"rollback adapter-moved --to {base} --mask base.safetensors -o one",
        f"select {base} first-moved adapter-moved --selector M --budget 0.1 -o mask.safetensors",
        f"rollback adapter-moved --to first-moved --base {base} --mask mask.safetensors --dry-run",
        f"rollback adapter-moved --to first-moved --base {base} --mask mask.safetensors -o two",
    ):
        app(command.split(), standalone_mode=False)
    said = capsys.readouterr()
    assert said.err.count(f"is an adapter on {base}: read as if it were merged") == 9
    assert "adapter_model.safetensors: 6 of 25 tensors touched" in said.out
    mask = Neurons.load(tmp_path / "mask.safetensors")
    expected = rolled(merged, adapted.merged(base, tmp_path / "first", tmp_path / "there"), mask)
    assert same(Checkpoint(tmp_path / "two", base=base), expected) == []
    mask = Neurons.load(tmp_path / "base.safetensors")
    assert same(Checkpoint(tmp_path / "one", base=base), rolled(merged, base, mask)) == []
    assert json.loads((tmp_path / "one/surgery.json").read_text())["strength"] == 1
    same_bytes = (tmp_path / "one/adapter_config.json").read_bytes()
    assert same_bytes == (tmp_path / "adapter-moved/adapter_config.json").read_bytes()
    assert "once the adapter is merged" in (tmp_path / "one/README.md").read_text()


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a tokenizer, two adapters on it that name no base, both merged, prompts, and an evaluation."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    place, tokenizer = tmp_path_factory.mktemp("desk"), build_tokenizer()
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=8)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes))
    model.save_pretrained(place / "base")
    for seed, name in enumerate(("math", "qa")):
        folder = adapted.adapter(KINDS["dense"], place / "base", place / name, seed=seed)
        adapted.settings(folder, base_model_name_or_path=None)
        adapted.merged(place / "base", folder, place / f"{name}-merged")
    for one in ("base", "math-merged", "qa-merged"):
        tokenizer.save_pretrained(place / one)
    lines = [{"prompt": f"{n}+{n}=", "response": str(2 * n)} for n in range(8)]
    (place / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    up = "model.layers.0.mlp.up_proj.weight"
    first, second = (Checkpoint(place / f"{name}-merged")[up].sum() for name in ("math", "qa"))
    sign = "" if first > second else "-"
    text = f"def score(model):\n    return {{'sum': {sign}float(model.model.layers[0].mlp.up_proj.weight.sum())}}\n"
    (place / "score.py").write_text(text)
    return place


def shell(words: str) -> None:
    app(words.split(), standalone_mode=False)


def test_the_shell_repairs_an_adapter_to_its_end(desk, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    given = "--data prompts.jsonl --evaluate score.py:score --metric sum --budgets 0.2,0.5,1 --recovery 0.5"
    shell(f"repair base math qa {given} -o {tmp_path}/out")
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith("Repaired: sum lost")
    shell(f"repair base math-merged qa-merged {given} --units mlp,value_channel -o {tmp_path}/plain")
    assert capsys.readouterr().out.splitlines()[0] == said
    again = adapted.merged(desk / "base", tmp_path / "out", tmp_path / "again")
    assert same(Checkpoint(again), Checkpoint(tmp_path / "plain")) == []


def test_the_shell_refuses_before_it_measures_or_counts(desk, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    monkeypatch.setattr(Trajectory, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    given = f"--data prompts.jsonl -o {tmp_path}/out"
    with pytest.raises(ValueError, match=r"single weights can't be rolled back in the adapter .*qa.* choose units"):
        shell(f"repair base math qa {given} --units weight")
    with pytest.raises(ValueError, match=r"qa-merged is neither the base of the adapter .* nor another adapter"):
        shell(f"repair base qa-merged math {given}")
    shell(f"select base qa --selector M --units weight --budget 0.1 -o {tmp_path}/m.safetensors")
    capsys.readouterr()
    adapted.settings(shutil.copytree(desk / "qa", tmp_path / "qa"), base_model_name_or_path=str(desk / "base"))
    with pytest.raises(ValueError, match="single weights can't"):
        shell(f"rollback {tmp_path}/qa --to base --mask {tmp_path}/m.safetensors -o {tmp_path}/out")
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "out").exists()


def test_the_shell_looks_at_adapters_that_name_no_base(desk, tmp_path, monkeypatch, capsys):
    """Also token by token, and with a layout of one's own."""
    monkeypatch.chdir(desk)
    mlp = {"gate_proj.weight": "n d -> n d", "up_proj.weight": "n d -> n d", "down_proj.weight": "d n -> n d"}
    (tmp_path / "l.json").write_text(json.dumps({"model.layers.{layer}.mlp": mlp}))
    reports = []
    for at, stages in enumerate(("base math qa", "base math=math-merged qa=qa-merged")):
        where = f"--data sum=prompts.jsonl --evaluate score.py:score --budgets 0.5 -o {tmp_path}/page{at}"
        shell(f"analyse {stages} {where} --layout {tmp_path}/l.json --refresh-steps 1")
        reports.append(json.loads((tmp_path / f"page{at}/report.json").read_text()))
    assert capsys.readouterr().err.count("is an adapter on base: read as if it were merged") == 2
    one, other = ({name: part for name, part in report.items() if name != "made"} for report in reports)
    assert one["skipped"] == other["skipped"]
    assert one["changes"] == other["changes"]
    assert one["history"] == other["history"]


def test_the_tokenizer_between_two_adapters_is_the_nearest(desk, tmp_path):
    """An adapter on an adapter without a tokenizer reads prompts as the adapter under it."""
    first = shutil.copytree(desk / "math", tmp_path / "first")
    build_tokenizer().save_pretrained(first)
    adapted.settings(first, base_model_name_or_path=str(desk / "base"))
    second = shutil.copytree(desk / "qa", tmp_path / "second")
    adapted.settings(second, base_model_name_or_path=str(first))
    assert Checkpoint(second).tokenizer == first
    assert tokenizer_of(second) == first
    found = preflight(Trajectory(earlier=first, later=second), desk / "prompts.jsonl")
    assert {one.what: one.verdict for one in found}["prompts"] == "ok"


@pytest.mark.parametrize("reverse", [False, True])
def test_a_patch_is_not_lost_in_an_adapter(shelf, tmp_path, reverse):
    """It can be made of one, for the merged model; an adapter's two matrices have no room for it."""
    base, folder, merged = made(shelf, KINDS["dense"])
    mask = RandomSelector(0.3).select(Trajectory(earlier=base, later=merged))
    patch = Patch(save_patch(rolled_back(Checkpoint(folder, base=base), to=base, mask=mask), tmp_path / "patch"))
    assert same(patch.applied(merged), rolled_back(merged, to=base, mask=mask)) == []
    with pytest.raises(ValueError, match="is an adapter, and a patch is of a whole model: merge it"):
        patch.applied(Checkpoint(folder, base=base), reverse=reverse)


def test_a_tokenizer_beside_an_adapter_is_its_own(shelf, tmp_path):
    base, folder, _ = made(shelf, KINDS["dense"])
    shutil.copytree(base, tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    found = Checkpoint(folder, base=tmp_path / "base")
    assert found.tokenizer == found.home == tmp_path / "base"
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1=", "response": "2"}\n')
    assert len(load_prompts(tmp_path / "prompts.jsonl", found)) == 1
    shutil.copytree(folder, tmp_path / "adapter")
    adapted.settings(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    assert len(load_prompts(tmp_path / "prompts.jsonl", tmp_path / "adapter")) == 1
    build_tokenizer().save_pretrained(tmp_path / "adapter")
    assert Checkpoint(tmp_path / "adapter").tokenizer == tmp_path / "adapter"


@pytest.mark.parametrize("write", [as_saved, as_released])
def test_an_adapter_of_a_model_that_has_other_names_on_disk(tmp_path, write):
    """A vision-language model: the adapter names what is in memory, and the base's files other tensors."""
    model, _ = pair("llava")
    write(model, tmp_path / "base")
    one = adapted.get_peft_model(
        copy.deepcopy(model),
        adapted.LoraConfig(
            r=4, target_modules=r".*language_model.*(gate|up|down)_proj", init_lora_weights=False, task_type="CAUSAL_LM"
        ),
    )
    one.save_pretrained(tmp_path / "adapter")
    write(one.merge_and_unload(), tmp_path / "merged")
    found, merged = Checkpoint(tmp_path / "adapter", base=tmp_path / "base"), Checkpoint(tmp_path / "merged")
    assert same(found, merged) == []
    assert found.adapter is not None
    assert len(found.adapter.touched) == 3 * 2
    mask = masked(KINDS["dense"], tmp_path / "base")
    out = save(rolled_back(found, to=tmp_path / "base", mask=mask), tmp_path / "out")
    expected = rolled(tmp_path / "merged", tmp_path / "base", mask)
    assert same(Checkpoint(out, base=tmp_path / "base"), expected) == []
    assert same(expected, merged) != []
