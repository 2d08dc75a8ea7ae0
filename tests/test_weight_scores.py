"""A, M and C of single weights: against their definitions, and the laws of what is chosen by them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from families import build, downstream
from mutants import dies
from test_entries import SEVEN, finest, law_exact
from test_laws import same, snapshot
from test_scores import batches
from torch import nn

from surgery import (
    EntrySelector,
    Neurons,
    Trajectory,
    activation,
    conflict,
    deltas,
    find_layout,
    magnitude,
    recommend,
    sweep,
    weight_ranking,
    weight_scores,
)
from surgery.budget import share
from surgery.checkpoint import State
from surgery.slots import Layout
from surgery.weight_scores import Traits, entry_traits

LETTERS = ("A", "M", "C", "AM", "MC", "AC", "AMC")
BUDGETS = (0.0, 0.001, 0.02, 0.2)
HOWS = ("global", "proportional", "uniform")


@cache
def _three(family: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, nn.Module]:
    models = tuple(build(family, dtype, seed) for seed in (1, 2, 3))
    with torch.no_grad():  # weights that the earlier, the later or no training touched
        for base, earlier, later in zip(*(model.parameters() for model in models), strict=True):
            earlier.flatten()[::3] = base.flatten()[::3]
            later.flatten()[::5] = earlier.flatten()[::5]
    return models  # type: ignore[return-value]


def trajectory(family: str, dtype: torch.dtype = torch.float32) -> Trajectory:
    base, earlier, later = _three(family, dtype)
    run = Trajectory(base, earlier, later)
    return EntrySelector(0.1).over(run)


def in_parts(found: Traits) -> dict[str, torch.Tensor]:
    sizes = [n * d for n, d in found.shapes.values()]
    return dict(zip(found.shapes, found.flat.split(sizes), strict=True))


def defined(run: Trajectory, rank: str) -> dict[str, torch.Tensor]:
    """Part → the score of each weight, in float64, from whole tensors."""
    base, earlier, later = ({n: t.double() for n, t in State(m).items()} for m in (run.base, run.earlier, run.later))  # type: ignore[arg-type]
    layout = finest(run.later)  # type: ignore[arg-type]
    level = len(rank) > 1 or len(layout.units) > 1
    A = activation(run.later, batches(labels=True), layout=layout)  # type: ignore[arg-type]
    found: dict[str, torch.Tensor] = {}
    for name, block in layout.items():
        sizes: dict[str, list[torch.Tensor]] = {}
        for part in block.parts:
            rows = [block.rows(one, part, torch.arange(block.neurons)) for one in (base, earlier, later)]
            flat = [one.reshape(block.neurons, -1) for one in rows]
            sizes[part] = [flat[1] - flat[0], flat[2] - flat[1]]
        mean = torch.cat([b.abs().flatten() for _, b in sizes.values()]).mean()
        own = A[name].double() / (A[name][A.available(name)].double().mean() if level else 1)
        for part, (a, b) in sizes.items():
            letters = {
                "A": own[:, None].expand(b.shape),
                "M": b.abs() / (mean if level else 1),
                "C": ((a > 0) & (b < 0) | (a < 0) & (b > 0)).double(),
            }
            found[f"{name}/{part}"] = torch.stack([letters[letter] for letter in rank]).prod(0).flatten()
    return found


def law_defined(family: str, rank: str, dtype: torch.dtype = torch.float32) -> None:
    run = trajectory(family, dtype)
    ours, want = in_parts(entry_traits(run, batches(labels=True), rank)), defined(run, rank)
    assert list(ours) == list(want)
    for part, score in ours.items():
        torch.testing.assert_close(score.double(), want[part], rtol=1e-5, atol=1e-9, msg=part)
        assert (score == 0).equal(want[part] == 0), part


@pytest.mark.parametrize("family", downstream())
def test_a_product_is_that_of_the_definitions(family):
    law_defined(family, "AMC")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", LETTERS)
@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_letters_are_what_they_are_defined_to_be(family, rank, dtype):
    law_defined(family, rank, dtype)


@pytest.mark.parametrize("family", SEVEN)
def test_they_are_a_neurons_scores_at_a_width_of_one(family):
    """The squares of M add up to a neuron's; C agrees in sign with a neuron that is one weight."""
    run = trajectory(family)
    (later,) = run.weights("later")
    M, found = magnitude(run), in_parts(entry_traits(run, None, "M"))
    scale = weight_scores._means(run) if len(later.layout.units) > 1 else {}
    for name, block in later.layout.items():
        rows = [found[f"{name}/{part}"].reshape(block.neurons, -1).double() for part in block.parts]
        total = torch.cat(rows, 1).square().sum(1).sqrt() * scale.get(name, 1.0)
        torch.testing.assert_close(total.float(), M[name], rtol=1e-4, atol=1e-6)


def test_conflict_of_a_neuron_that_is_one_weight():
    layout = find_layout(build("llama"))
    block = layout.blocks[0]
    (slot,) = block.of("up.bias")
    one = Layout((replace(block, slots=(slot,)),))
    base, earlier, later = _three("llama", torch.float32)
    run = Trajectory(base, earlier, later, layout=one)
    want = conflict(run)[block.name]
    ours = entry_traits(run, None, "C").flat
    torch.testing.assert_close(ours, want)
    assert set(ours.tolist()) == {0, 1}
    assert 0 < float(ours.mean()) < 1


@pytest.mark.parametrize("family", SEVEN)
@pytest.mark.parametrize("how", HOWS)
def test_the_highest_are_taken_in_the_right_number(family, how):
    run, data = trajectory(family), batches(labels=True)
    model, before = run.later, snapshot(run.later)  # type: ignore[arg-type]
    found = entry_traits(run, data, "AMC")
    parts = in_parts(found)
    whole = torch.cat(list(parts.values()))
    masks = [EntrySelector(budget, "AMC", how).select(run, data) for budget in (*BUDGETS, 1.0)]
    for mask, budget in zip(masks, (*BUDGETS, 1.0), strict=True):
        asked = round(budget * len(whole))
        assert sum(mask.count().values()) == min(asked, int((whole > 0).sum()))
        assert mask.made_by["entries"]["allowed"] == asked
        assert ("positive" in mask.made_by["entries"]) == (budget == 1.0)
        blocks: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for part, scores in parts.items():
            taken = torch.zeros(len(scores), dtype=torch.bool).index_fill(0, mask[part], True)
            blocks.setdefault(part.rpartition("/")[0], []).append((scores, taken))
        pairs = {name: tuple(map(torch.cat, zip(*each, strict=True))) for name, each in blocks.items()}
        whole_model = tuple(map(torch.cat, zip(*pairs.values(), strict=True)))
        for scores, taken in [whole_model] if how == "global" else list(pairs.values()):
            assert not bool((scores[taken] <= 0).any())
            if bool(taken.any()) and not bool(taken.all()):
                assert float(scores[taken].min()) >= float(scores[~taken].max())
        if how != "global":
            room = {name: int((scores > 0).sum()) for name, (scores, _) in pairs.items()}
            by_sum = how == "proportional"
            sums = {n: float(s.double().sum()) if by_sum else float(len(s)) for n, (s, _) in pairs.items()}
            want = share(min(asked, sum(room.values())), sums, room)
            got = {name: int(taken.sum()) for name, (_, taken) in pairs.items()}
            assert all(abs(got[name] - want[name]) <= 1 for name in got)
    if how == "global":
        assert all((small & big).equal(small) for small, big in pairwise(masks))
    law_exact(model, run.earlier, masks[2])  # type: ignore[arg-type]
    assert same(snapshot(model), before)  # type: ignore[arg-type]
    assert masks[2].made_by["selector"]["rank"] == "AMC"


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe"])
def test_folders_and_live_models_choose_the_same(family, tmp_path):
    for name, model in zip(("base", "earlier", "later"), _three(family, torch.bfloat16), strict=True):
        model.save_pretrained(tmp_path / name)
    folders = Trajectory(*(tmp_path / name for name in ("base", "earlier", "later")))
    live = Trajectory(*(Trajectory(later=tmp_path / name).load() for name in ("base", "earlier", "later")))
    data = batches(labels=True)
    for rank, how in (("AMC", "global"), ("MC", "proportional"), ("C", "global")):
        one = EntrySelector(0.02, rank, how).select(folders, data)
        assert one.equal(EntrySelector(0.02, rank, how).select(live, data))
        assert one.made_by["checkpoints"]["base"]["sha256"]


def test_what_is_read_in_pieces_is_what_is_read_at_once(monkeypatch):
    run, data = trajectory("qwen3_moe"), batches(labels=True)
    whole = EntrySelector(0.05, "AMC", "proportional").select(run, data)
    monkeypatch.setattr(deltas, "pieces", lambda *where, pieces=deltas.pieces: pieces(*where, chunk=300))
    monkeypatch.setattr(weight_ranking, "CHUNK", 13)
    assert EntrySelector(0.05, "AMC", "proportional").select(run, data).equal(whole)


def test_experts_that_no_token_reached_are_told_and_never_taken():
    run = trajectory("qwen3_moe")
    data = [{"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones(1, 1, dtype=torch.int64)}]
    mask = EntrySelector(1.0, "A").select(run, data)
    never = mask.made_by["never_routed"]
    assert never
    (later,) = run.weights("later")
    for name in never:
        block, _, expert = name.removesuffix("]").rpartition("[")
        size = later.layout[block].neurons // later.layout[block].experts
        for part, (_, width) in mask.shapes.items():
            if part.startswith(f"{block}/"):
                assert int(expert) not in (mask[part] // width // size).unique().tolist()


def test_what_they_need():
    run, data = trajectory("llama"), batches(labels=True)
    with pytest.raises(ValueError, match="A is measured on prompts"):
        EntrySelector(0.1, "AM").select(run)
    with pytest.raises(ValueError, match="C needs the base checkpoint"):
        EntrySelector(0.1, "MC").select(Trajectory(earlier=run.earlier, later=run.later))
    assert EntrySelector(0.1, "M").select(Trajectory(earlier=run.earlier, later=run.later)).count()
    for settings, message in (
        ({"rank": "AX"}, "expected some of the letters A, M and C"),
        ({"rank": "DM"}, "expected some of the letters A, M and C"),
        ({"rank": ""}, "expected some of the letters"),
        ({"rank": "MM"}, "each once"),
        ({"how": "proportional"}, "D takes the best single weights of the whole model"),
        ({"rank": "M", "how": "best"}, 'expected "proportional", "global" or "uniform"'),
    ):
        with pytest.raises(ValueError, match=message):
            EntrySelector(0.1, **settings)
    broken = build("llama", seed=9)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    for rank in ("M", "C", "MC"):
        with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight' of .* holds 1 NaN"):
            EntrySelector(0.1, rank).select(Trajectory(run.base, run.earlier, broken), data)


def test_names_tell_them_apart():
    kinds = (EntrySelector(0.1, "AMC"), EntrySelector(0.1, "AMC", "proportional"), EntrySelector(0.1, "M", units="mlp"))
    assert [one.name for one in kinds] == [
        "A×M×C of single weights",
        "A×M×C of single weights (proportional)",
        "M of single weights of neurons",
    ]


def test_sweep_and_recommend_rank_single_weights_by_letters():
    run, data = trajectory("qwen3"), batches(labels=True)
    later, before = run.later, snapshot(run.later)  # type: ignore[arg-type]
    weight = dict(State(run.earlier))["model.layers.0.mlp.up_proj.weight"]  # type: ignore[arg-type]

    def evaluate(model):
        return {"same": float((model.model.layers[0].mlp.up_proj.weight == weight).float().mean()), "other": 0.0}

    kinds = [EntrySelector(0.1, "M"), EntrySelector(0.1, "AMC", "proportional")]
    table = sweep(later, run, data, selectors=kinds, budgets=[0.01, 0.1], evaluate=evaluate)
    assert [row.neurons for row in table["M of single weights"]] == [
        round(budget * entry_traits(run, None, "M").flat.numel()) for budget in (0.01, 0.1)
    ]
    assert [row.selector for row in table][2] == "ceiling (all units (neurons and KV groups))"
    found = recommend(later, run, data, selector=kinds[0], evaluate=evaluate, recovery=0.1, budgets=[0.01, 0.1, 0.5])
    assert found.nested
    assert found.budget is not None
    assert same(snapshot(later), before)


MEMORY = """
import threading, torch
from pathlib import Path
from surgery import EntrySelector, Trajectory
from surgery.layout import spec_layout

def anonymous():
    lines = Path("/proc/self/status").read_text().split("\\n")
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

def three(size):
    shapes = {"blocks.0.a": (size, 4096), "blocks.0.b": (4096, size)}
    made = [{name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()} for _ in range(3)]
    return Trajectory(*made, layout=spec_layout({"blocks.{layer}": {"a": "n d -> n d", "b": "d n -> n d"}}, shapes))

EntrySelector(0.001, "MC", "proportional").select(three(16))  # what torch loads late
run = three(4096)  # 134 MB of scores; a boolean per weight would be 34
start, peak, done = anonymous(), [0.0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())
thread = threading.Thread(target=watch); thread.start()
for how in ("global", "proportional"):
    mask = EntrySelector(0.001, "MC", how).select(run)
done.set(); thread.join()
assert sum(mask.count().values()) == round(0.001 * 2 * 4096 * 4096)
print(peak[0] - start)
"""


def test_anonymous_memory_is_bounded_by_a_chunk():
    found = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert float(found.stdout) < 28, f"{found.stdout} MB"


# Mutants.


def no_abs(patch: pytest.MonkeyPatch) -> None:
    def mutant(run, conflict, original=weight_scores._steps):
        for *where, steps in original(run, conflict):
            yield (*where, [*steps[:-1], _Signed(steps[-1])])

    patch.setattr(weight_scores, "_steps", mutant)


class _Signed(torch.Tensor):
    @staticmethod
    def __new__(cls, tensor):
        return tensor.as_subclass(cls)

    def abs(self):
        return self


def not_relative(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weight_scores, "_means", lambda run: {})


def relative_to_the_sum(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        weight_scores,
        "_means",
        lambda run, original=weight_scores._means: {n: 2.0 * m for n, m in original(run).items()},
    )


def other_sign(patch: pytest.MonkeyPatch) -> None:
    """Agreement instead of conflict."""

    def mutant(run, conflict, original=weight_scores._steps):
        for *where, steps in original(run, conflict):
            yield (*where, [-steps[0], *steps[1:]] if conflict else steps)

    patch.setattr(weight_scores, "_steps", mutant)


def of_another_neuron(patch: pytest.MonkeyPatch) -> None:
    def mutant(*args, original=weight_scores.activation, **settings):
        found = original(*args, **settings)
        return Neurons({name: value.roll(1) for name, value in found.items()}, missing=found.missing)

    patch.setattr(weight_scores, "activation", mutant)


def parts_from_zero(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weight_scores, "starts_of", lambda shapes: dict.fromkeys(shapes, 0))


def neighbours(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weight_scores, "best", lambda flat, count: (weight_ranking.best(flat, count) + 1) % len(flat))


def blocks_alike(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weight_scores, "positive", lambda flat: (weight_ranking.positive(flat)[0], 1.0))


def one_too_many(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weight_scores, "best", lambda flat, count: weight_ranking.best(flat, count + 1))


def lowest(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weight_scores, "best", lambda flat, count: weight_ranking.best(1 / flat.clamp(min=1e-9), count))


MUTANTS = (
    no_abs, not_relative, relative_to_the_sum, other_sign, of_another_neuron, parts_from_zero, neighbours,
    blocks_alike, one_too_many, lowest,
)  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_die(mutant):
    dies(mutant, _every_law)


def test_without_a_mutant_the_laws_hold():
    _every_law()


def _every_law() -> None:
    law_defined("gpt2", "AMC")
    test_the_highest_are_taken_in_the_right_number("llama", "global")
    test_the_highest_are_taken_in_the_right_number("llama", "proportional")
