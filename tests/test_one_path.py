"""One path: a folder is opened once, the later model is loaded once, and an edited model is no later model."""

from __future__ import annotations

import shutil
import signal
from collections import Counter
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import transformers
from families import build, pair
from test_scores import batches

from surgery import (
    AMCSelector,
    Checkpoint,
    DamageSelector,
    Neurons,
    RandomSelector,
    Trajectory,
    analyse,
    conflict,
    damage,
    magnitude,
    repair,
    rollback,
    rolled_back,
    save,
    strengths,
    sweep,
)
from surgery.checkpoints.checkpoint import in_force
from surgery.evidence.gradients import gradients_along
from surgery.live.earlier import AsLive, earlier_model
from surgery.live.losses import cross_entropy
from surgery.measure.evaluators import likelihood
from surgery.measure.history import history
from surgery.report.inquiry import PARTS
from surgery.scores.damage import reversal_cost
from surgery.selectors.rounds import by_damage

LABELLED, UNLABELLED = batches(labels=True), batches(labels=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("stages")
    earlier, later = pair("qwen3")
    for name, model in {"base": build("qwen3", seed=7), "earlier": earlier, "later": later}.items():
        model.save_pretrained(home / name)
    return home


@pytest.fixture
def counted(monkeypatch) -> tuple[Counter, Counter]:
    """How often each folder is opened, and how often a model is loaded from it."""
    opens, loads = Counter(), Counter()
    init, load = Checkpoint.__init__, transformers.AutoModelForCausalLM.from_pretrained

    def opened(self: Checkpoint, folder: str | Path) -> None:
        opens[Path(folder).name] += 1
        init(self, folder)

    def loaded(folder: str | Path, *arguments: object, **named: object) -> torch.nn.Module:
        loads[Path(folder).name] += 1
        return load(folder, *arguments, **named)

    monkeypatch.setattr(Checkpoint, "__init__", opened)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loaded)
    return opens, loads


def run_of(folders: Path) -> Trajectory:
    return Trajectory(*(str(folders / name) for name in ("base", "earlier", "later")))


def score(model: torch.nn.Module) -> dict[str, list[float]]:
    return likelihood({"math": LABELLED})(model)


@pytest.mark.parametrize("data", [LABELLED, UNLABELLED], ids=["with responses", "without"])
@pytest.mark.parametrize(
    "selector",
    [AMCSelector(0.1), DamageSelector(0.1), DamageSelector(0.1, units="weight"), RandomSelector(0.1)],
    ids=lambda one: one.name,
)
def test_a_selection_opens_each_folder_once_and_loads_only_the_later_model(folders, counted, selector, data):
    opens, loads = counted
    selector.select(run_of(folders), data)
    assert set(opens.values()) == {1}
    assert loads == ({} if isinstance(selector, RandomSelector) else {"later": 1})


def test_what_the_readme_does(folders, counted, tmp_path):
    opens, loads = counted
    run = run_of(folders)
    model = run.load()
    mask = DamageSelector(0.1).select(run, UNLABELLED)
    assert opens == {"base": 1, "earlier": 1, "later": 1}
    with rollback(model, to=run.earlier, mask=mask):
        pass
    save(rolled_back(run.later, to=run.earlier, mask=mask), tmp_path / "healed")
    assert loads == {"later": 1}
    assert opens == {"base": 1, "earlier": 3, "later": 2}  # what the user names anew is opened anew


def test_a_sweep_and_a_repair_open_and_load_no_more_than_one_selection(folders, counted):
    opens, loads = counted
    selectors = [AMCSelector(0.1), DamageSelector(0.1), DamageSelector(0.1, loss="kl"), RandomSelector(0.1)]
    sweep(run_of(folders), UNLABELLED, selectors=selectors, budgets=[0.1, 0.2], evaluate=score)
    assert (opens, loads) == ({"base": 1, "earlier": 1, "later": 1}, {"later": 1})
    opens.clear(), loads.clear()
    done = repair(run_of(folders), 6 * UNLABELLED, keep={"qa": LABELLED}, budgets=[0.1, 0.5, 1])
    assert done.outcome != "intact"
    assert (opens, loads) == ({"base": 1, "earlier": 1, "later": 1}, {"later": 1})


def test_the_live_later_model_is_one_object_moved_where_asked(folders):
    run = run_of(folders)
    model = run.load()
    assert run.load() is model
    assert run.load("cpu", torch.float64) is model
    assert next(model.parameters()).dtype == torch.float64
    live = build("qwen3")
    assert Trajectory(later=live).load() is live


def test_a_model_that_is_converted_is_the_model_that_is_read_in_that_dtype(folders):
    """Rotary frequencies stay in float32, as transformers leaves them."""
    run = run_of(folders)
    run.load()
    converted, read = run.load(dtype=torch.bfloat16), run_of(folders).load(dtype=torch.bfloat16)
    assert torch.equal(converted(**LABELLED[0]).logits, read(**LABELLED[0]).logits)


def test_a_dtype_that_has_rounded_is_not_widened_in_silence(folders):
    run = run_of(folders)
    run.load(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"loaded in torch\.bfloat16, which has rounded the torch\.float32"):
        run.load(dtype=torch.float32)
    assert next(run.load(dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16


def test_another_earlier_checkpoint_shares_the_live_model(folders, counted):
    run = Trajectory.through({name: str(folders / name) for name in ("base", "earlier", "later")})
    other = run.back_to("base")
    assert other.load() is run.load()
    assert (other.earlier, other.later) == (run.base, run.later)
    other.weights("earlier", "later"), run.weights("base", "earlier", "later")
    assert set(counted[0].values()) == {1}
    assert counted[1] == {"later": 1}


@pytest.mark.parametrize("edit", ["rollback", "earlier"])
@pytest.mark.parametrize(
    "act",
    [
        lambda run: DamageSelector(0.1).select(run, LABELLED),
        lambda run: DamageSelector(0.1, units="weight").select(run, LABELLED),
        lambda run: AMCSelector(0.1).select(run, LABELLED),
        lambda run: damage(run, LABELLED),
        lambda run: reversal_cost(run, LABELLED),
        lambda run: strengths(run, LABELLED, RandomSelector(0.1).select(run)),
        lambda run: sweep(run, LABELLED, selectors=[], budgets=[], evaluate=score),
        lambda run: repair(run, LABELLED, budgets=[0.1]),
        lambda run: history(run, score),
        lambda run: gradients_along(run, {"math": LABELLED, "qa": LABELLED}),
        lambda run: analyse(run, {"math": LABELLED}, skip=set(PARTS) - {"history"}),
    ],
    ids=[
        "D", "D of weights", "AMC", "damage", "reversal_cost", "strengths", "sweep", "repair", "history", "gradients",
        "analyse",
    ],
)  # fmt: skip
def test_an_edited_live_model_is_refused_beside_its_folder(folders, edit, act):
    run = run_of(folders)
    model, mask = run.load(), RandomSelector(0.5).select(run)
    within = rollback(model, to=run.earlier, mask=mask) if edit == "rollback" else earlier_model(run)
    with within, pytest.raises(ValueError, match="would be a mixture of two models"):
        act(run)
    act(run)  # undone, it is the later model again


@pytest.mark.parametrize("units", ["mlp", "weight"])
def test_a_rollback_of_nothing_leaves_the_run_whole_once_it_is_undone(folders, units):
    run = run_of(folders)
    with rollback(run.load(), to=run.earlier, mask=RandomSelector(0.0, units=units).select(run)):
        pass
    assert in_force(run.load()) == []


def test_a_model_loaded_narrower_than_its_files_does_not_turn_its_rounding_into_damage(tmp_path):
    """Single weights of a layer that never changed were chosen, for what bfloat16 had rounded away of them."""
    earlier = build("qwen3", seed=1)
    later, generator = deepcopy(earlier), torch.Generator().manual_seed(0)
    for weight in later.model.layers[0].mlp.parameters():
        weight.data += 1e-4 * torch.randn(weight.shape, generator=generator)
    for name, model in {"earlier": earlier, "later": later}.items():
        model.save_pretrained(tmp_path / name)

    def run(**how: torch.dtype) -> Trajectory:
        found = Trajectory(earlier=str(tmp_path / "earlier"), later=str(tmp_path / "later"))
        found.load(**how)
        return found

    runs = run(), run(dtype=torch.bfloat16)
    exact, rounded = (damage(one, LABELLED, loss=cross_entropy) for one in runs)
    assert not rounded["model.layers.1.mlp"].any()
    first = torch.stack([exact["model.layers.0.mlp"], rounded["model.layers.0.mlp"]])
    assert torch.corrcoef(first)[0, 1] > 0.8
    chosen = by_damage(run(dtype=torch.bfloat16), LABELLED, 0.1, units=("mlp",), stop=False)
    assert sum(chosen.count().values())
    assert not sum(count for part, count in chosen.count().items() if part.startswith("model.layers.1"))


def test_a_rollback_is_undone_where_the_model_was_converted_since(folders):
    """The old bits went into tensors that were the model's no more, and nothing said so."""
    run = run_of(folders)
    model, mask = run.load(), RandomSelector(0.5).select(run)
    before = {name: tensor.double() for name, tensor in model.state_dict().items()}
    with rollback(model, to=run.earlier, mask=mask):
        run.load(dtype=torch.float64)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_rollback_that_ctrl_c_ends_is_not_in_force(folders):
    """Also where it comes after the last write, and is held back until all is written."""

    class Late(Neurons):
        def count(self) -> dict[str, int]:
            signal.raise_signal(signal.SIGINT)
            return super().count()

    run = run_of(folders)
    model, mask = run.load(), Late(RandomSelector(0.5).select(run))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            rollback(model, to=run.earlier, mask=mask)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert in_force(model) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_earlier_model_beside_the_later_one_is_loaded_once(folders, counted, monkeypatch):
    """Where names can't be told it can't be swapped in; the answers and the predictions are one model's."""
    monkeypatch.setattr(AsLive, "__contains__", lambda *_: False)
    with pytest.warns(UserWarning, match="GB more memory"):
        damage(run_of(folders), UNLABELLED)
    assert counted[1] == {"earlier": 1, "later": 1}


def test_an_edited_model_given_as_later_is_what_it_is(folders):
    """Where memory is all there is nothing is mixed: D of what is left to revert is measured."""
    run = run_of(folders)
    model, mask = run.load(), RandomSelector(0.5).select(run)
    with rollback(model, to=run.earlier, mask=mask):
        found = damage(Trajectory(earlier=run.earlier, later=model), LABELLED)
    assert all(bool((found[name][mask[name]] == 0).all()) for name in mask)
    assert any(bool((found[name][~mask[name]] != 0).any()) for name in mask)


def test_files_that_changed_are_opened_anew_and_never_mixed_with_a_loaded_model(folders, tmp_path):
    for name in ("base", "earlier", "later"):
        shutil.copytree(folders / name, tmp_path / name)
    run = run_of(tmp_path)
    (before,) = run.weights("earlier")
    build("qwen3", seed=5).save_pretrained(tmp_path / "earlier")
    (after,) = run.weights("earlier")
    name = next(iter(before.layout.blocks[0].slots)).tensor
    assert torch.equal(after.tensors[name], Checkpoint(tmp_path / "earlier")[name])
    run.load()
    build("qwen3", seed=6).save_pretrained(tmp_path / "later")
    with pytest.raises(ValueError, match="have changed since its model was loaded"):
        run.load()


@pytest.mark.parametrize("which", ["earlier", "later"])
def test_offloaded_weights_are_refused_by_name_in_every_score(which):
    """As accelerate leaves them: parameters on the meta device."""
    models = dict(zip(("earlier", "later"), pair("qwen3"), strict=True))
    mlp = models[which].model.layers[1].mlp
    mlp.up_proj.weight = torch.nn.Parameter(mlp.up_proj.weight.to("meta"))
    run = Trajectory(base=build("qwen3", seed=7), **models)
    for score in (magnitude, conflict, lambda run: damage(run, LABELLED), AMCSelector(0.1, "M", "M").select):
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.* on the meta device"):
            score(run)


def test_a_model_spread_over_devices_is_the_same_model(folders, monkeypatch):
    """device="auto" is accelerate's device map, here of one device; what does not fit is refused by name."""
    run, load = run_of(folders), transformers.AutoModelForCausalLM.from_pretrained
    found, whole = dict(run.load("auto").named_parameters()), dict(run_of(folders).load().named_parameters())
    assert all(torch.equal(found[name], whole[name]) for name in whole)

    def crowded(*arguments: object, **named: object) -> tuple[torch.nn.Module, object]:
        assert named["device_map"] == "auto"
        model, told = load(*arguments, **named)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to("meta"))
        return model, told

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", crowded)
    with pytest.raises(ValueError, match=r"lm_head\.weight and 0 other tensors do not fit"):
        run_of(folders).load("auto")
