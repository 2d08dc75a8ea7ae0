"""M of single weights: against its definition, and the laws of what is chosen by it."""

from __future__ import annotations

import subprocess
import sys
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

from surgery import AMCSelector, Trajectory, magnitude, repair, sweep
from surgery.checkpoints import trajectory as deltas
from surgery.checkpoints.checkpoint import State
from surgery.masks.budget import share
from surgery.masks.entries import Entries, shapes_of
from surgery.scores import weights as weight_ranking
from surgery.scores import weights as weight_scores
from surgery.scores.weights import entry_magnitude
from surgery.selectors.settings import units_asked

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
    return Trajectory(base, earlier, later)


def by_magnitude(run: Trajectory, budget: float, how: str = "global") -> Entries:
    mask = AMCSelector(budget, "M", "M", how, "weight").select(run)  # type: ignore[arg-type]
    assert isinstance(mask, Entries)
    return mask


def parts_of(run: Trajectory) -> dict[str, torch.Tensor]:
    """M, part by part."""
    units = units_asked(run, "weight")
    (later,) = run.weights("later", units=units)
    shapes = shapes_of(later.layout)
    return dict(zip(shapes, entry_magnitude(run, units).split([n * d for n, d in shapes.values()]), strict=True))


def defined(run: Trajectory) -> dict[str, torch.Tensor]:
    """Part → M of each weight, in float64, from whole tensors."""
    earlier, later = ({n: t.double() for n, t in State(m).items()} for m in (run.earlier, run.later))  # type: ignore[arg-type]
    found: dict[str, torch.Tensor] = {}
    for name, block in finest(run.later).items():  # type: ignore[arg-type]
        rows = {
            part: [block.rows(one, part, torch.arange(block.neurons)) for one in (earlier, later)]
            for part in block.parts
        }
        changes = {part: (b - a).abs().flatten() for part, (a, b) in rows.items()}
        mean = torch.cat(list(changes.values())).mean()
        found |= {f"{name}/{part}": change / mean for part, change in changes.items()}
    return found


def law_defined(family: str, dtype: torch.dtype = torch.float32) -> None:
    run = trajectory(family, dtype)
    ours, want = parts_of(run), defined(run)
    assert list(ours) == list(want)
    for part, score in ours.items():
        torch.testing.assert_close(score.double(), want[part], rtol=1e-5, atol=1e-9, msg=part)
        assert (score == 0).equal(want[part] == 0), part


@pytest.mark.filterwarnings("ignore:weights of attention are no candidates")  # JetMoE's
@pytest.mark.parametrize("family", downstream())
def test_it_is_what_it_is_defined_to_be(family):
    law_defined(family)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_so_it_is_in_sixteen_bits(family, dtype):
    law_defined(family, dtype)


@pytest.mark.parametrize("family", SEVEN)
def test_it_is_a_neurons_at_a_width_of_one(family):
    """The squares of M add up to a neuron's, up to the layer's mean."""
    run = trajectory(family)
    (later,) = run.weights("later")
    M, found = magnitude(run), parts_of(run)
    for name, block in later.layout.items():
        rows = [found[f"{name}/{part}"].reshape(block.neurons, -1).double() for part in block.parts]
        total = torch.cat(rows, 1).square().sum(1).sqrt()
        torch.testing.assert_close(
            total / total.mean(), M[name].double() / M[name].double().mean(), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("family", SEVEN)
@pytest.mark.parametrize("how", HOWS)
def test_the_highest_are_taken_in_the_right_number(family, how):
    run = trajectory(family)
    model, before = run.later, snapshot(run.later)  # type: ignore[arg-type]
    parts = parts_of(run)
    whole = torch.cat(list(parts.values()))
    masks = [by_magnitude(run, budget, how) for budget in (*BUDGETS, 1.0)]
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
            sums = {n: float(s.double().sum() if how == "proportional" else len(s)) for n, (s, _) in pairs.items()}
            want = share(min(asked, sum(room.values())), sums, room)
            got = {name: int(taken.sum()) for name, (_, taken) in pairs.items()}
            assert all(abs(got[name] - want[name]) <= 1 for name in got)
    if how == "global":
        assert all((small & big).equal(small) for small, big in pairwise(masks))
    law_exact(model, run.earlier, masks[2])  # type: ignore[arg-type]
    assert same(snapshot(model), before)  # type: ignore[arg-type]
    assert masks[2].made_by["selector"]["rank"] == "M"


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe"])
def test_folders_and_live_models_choose_the_same(family, tmp_path):
    for name, model in zip(("base", "earlier", "later"), _three(family, torch.bfloat16), strict=True):
        model.save_pretrained(tmp_path / name)
    folders = Trajectory(*(tmp_path / name for name in ("base", "earlier", "later")))
    live = Trajectory(*(Trajectory(later=tmp_path / name).load() for name in ("base", "earlier", "later")))
    for how in ("global", "proportional"):
        one = by_magnitude(folders, 0.02, how)
        assert one.equal(by_magnitude(live, 0.02, how))
        assert one.made_by["checkpoints"]["earlier"]["sha256"]


def test_what_is_read_in_pieces_is_what_is_read_at_once(monkeypatch):
    run = trajectory("qwen3_moe")
    whole = by_magnitude(run, 0.05, "proportional")
    monkeypatch.setattr(deltas, "pieces", lambda *where, pieces=deltas.pieces: pieces(*where, chunk=300))
    monkeypatch.setattr(weight_ranking, "CHUNK", 13)
    assert by_magnitude(run, 0.05, "proportional").equal(whole)


def test_it_needs_neither_prompts_nor_a_base_and_every_number():
    run = trajectory("llama")
    assert by_magnitude(Trajectory(earlier=run.earlier, later=run.later), 0.1).count()
    broken = build("llama", seed=9)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight' of .* holds 1 NaN"):
        by_magnitude(Trajectory(earlier=run.earlier, later=broken), 0.1)


def test_sweep_and_repair_rank_single_weights_by_magnitude():
    run, data = trajectory("qwen3"), batches(labels=True)
    later, before = run.later, snapshot(run.later)  # type: ignore[arg-type]
    weight = dict(State(run.earlier))["model.layers.0.mlp.up_proj.weight"]  # type: ignore[arg-type]

    def evaluate(model):
        return {"same": float((model.model.layers[0].mlp.up_proj.weight == weight).float().mean()), "other": 0.0}

    kinds = [AMCSelector(0.1, "M", "M", how, "weight") for how in ("global", "proportional")]
    table = sweep(run, data, selectors=kinds, budgets=[0.01, 0.1], evaluate=evaluate)
    assert [row.neurons for row in table["M of single weights"]] == [
        round(budget * entry_magnitude(run, units_asked(run, "weight")).numel()) for budget in (0.01, 0.1)
    ]
    assert [row.selector for row in table][2] == "ceiling (all units (neurons and KV groups))"
    found = repair(run, data, selector=kinds[0], evaluate=evaluate, recovery=0.1, budgets=[0.01, 0.1, 0.5])
    assert found.outcome == "repaired"
    assert "not ordered" not in str(found)
    assert same(snapshot(later), before)


MEMORY = """
import threading, torch
from pathlib import Path
from surgery import AMCSelector, Trajectory
from surgery.layout.finding import spec_layout

def anonymous():
    lines = Path("/proc/self/status").read_text().split("\\n")
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

def two(size):
    shapes = {"blocks.0.a": (size, 4096), "blocks.0.b": (4096, size)}
    earlier, later = ({n: torch.randn(s, dtype=torch.bfloat16) for n, s in shapes.items()} for _ in range(2))
    layout = spec_layout({"blocks.{layer}": {"a": "n d -> n d", "b": "d n -> n d"}}, shapes)
    return Trajectory(earlier=earlier, later=later, layout=layout)

AMCSelector(0.001, "M", "M", units="weight").select(two(16))  # what torch loads late
run = two(4096)  # 134 MB of scores; a boolean per weight would be 34
start, peak, done = anonymous(), [0.0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())
thread = threading.Thread(target=watch); thread.start()
for how in ("global", "proportional"):
    mask = AMCSelector(0.001, "M", "M", how, "weight").select(run)
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
    def mutant(*args, steps=weight_scores._steps):
        for *where, step in steps(*args):
            yield (*where, step.as_subclass(_Signed))

    patch.setattr(weight_scores, "_steps", mutant)


class _Signed(torch.Tensor):
    def abs(self):
        return self


def not_relative(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weight_scores, "_means", lambda *a, means=weight_scores._means: dict.fromkeys(means(*a), 1.0))


def relative_to_the_sum(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        weight_scores, "_means", lambda *a, means=weight_scores._means: {n: 2 * m for n, m in means(*a).items()}
    )


def parts_from_zero(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weight_scores, "starts_of", lambda shapes: dict.fromkeys(shapes, 0))


def neighbours(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        weight_scores, "best", lambda flat, count, best=weight_scores.best: (best(flat, count) + 1) % len(flat)
    )


def layers_alike(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weight_scores, "share", lambda count, claims, room: share(count, dict.fromkeys(claims, 1.0), room))


def one_too_many(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weight_scores, "best", lambda flat, count, best=weight_scores.best: best(flat, count + 1))


def lowest(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        weight_scores, "best", lambda flat, count, best=weight_scores.best: best(1 / flat.clamp(min=1e-9), count)
    )


MUTANTS = (
    no_abs, not_relative, relative_to_the_sum, parts_from_zero, neighbours, layers_alike, one_too_many, lowest,
)  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_die(mutant):
    dies(mutant, _every_law)


def test_without_a_mutant_the_laws_hold():
    _every_law()


def _every_law() -> None:
    law_defined("gpt2")
    test_the_highest_are_taken_in_the_right_number("llama", "global")
    test_the_highest_are_taken_in_the_right_number("llama", "proportional")
