"""Sweeps: every score once, every row right, the model whole at the end, and nothing measured twice."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from families import build
from torch import nn

from benchmarks import draw
from surgery import (
    AMCSelector,
    DamageSelector,
    Neurons,
    RandomSelector,
    Trajectory,
    allocate,
    harness,
    likelihood,
    magnitude,
    sweep,
    top,
)
from surgery.checkpoints.checkpoint import State
from surgery.layout import find_layout
from surgery.live.prompts import passes as grouped
from surgery.measure.files import load_sweep
from surgery.measure.sweep import Bench
from surgery.scores import amc as scores
from surgery.scores import memory

BUDGETS = [0.1, 0.25]
SELECTORS = [AMCSelector(0.0), AMCSelector(0.0, rank="M", allocate="M"), RandomSelector(0.0), RandomSelector(0.0, 1)]


def trio() -> dict[str, nn.Module]:
    return {name: build("llama", seed=seed) for seed, name in enumerate(("base", "earlier", "later"))}


def data() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(2)]


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in State(model).items()}


def same(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in State(model).items())


class Evaluate:
    """Reads off the weights how many neurons are earlier's: math gains with it, qa loses; stops at call ``fail``."""

    def __init__(self, earlier: nn.Module, fail: int | None = None) -> None:
        self.earlier, self.fail, self.called = earlier, [fail], []  # no setting: what tells it from another is its code

    @property
    def calls(self) -> int:
        return len(self.called)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        self.called.append(model)
        if self.calls in self.fail:
            raise RuntimeError("out of power")
        pairs = zip(self.earlier.model.layers, model.model.layers, strict=True)
        hits = [(a.mlp.up_proj.weight == b.mlp.up_proj.weight).all(1) for a, b in pairs]
        part = float(torch.cat(hits).float().mean())
        return {"qa": 0.9 - 0.5 * part, "math": 0.2 + 0.6 * part, "code": 0.5}


@pytest.fixture
def models() -> dict[str, nn.Module]:
    return trio()


def test_references_ceiling_and_recovery(models):
    """recovery = (score − later) / (earlier − later); Δ = score − later elsewhere; budgets are those of the masks."""
    run = Trajectory(**models)
    found = sweep(run, data(), selectors=SELECTORS, budgets=BUDGETS, evaluate=Evaluate(models["earlier"]))
    assert found.metric == "math"  # the one that fell; nobody had to say so
    earlier, later, ceiling, *rows = found.rows
    assert (earlier.selector, later.selector) == ("earlier", "later")
    assert earlier.metrics["math"] == pytest.approx(0.8)
    assert later.metrics == {"qa": 0.9, "math": 0.2, "code": 0.5}
    assert (earlier.recovery, later.recovery) == (None, None)  # they are what recovery is measured by
    assert (earlier.neurons, later.neurons) == (0, 0)
    assert ceiling.neurons == 96
    assert ceiling.recovery == pytest.approx(1.0)
    assert ceiling.delta == {"qa": pytest.approx(-0.5), "code": 0.0}
    assert [(row.selector, row.budget) for row in rows] == [
        (name, budget) for name in ("A×M×C", "M", "random", "random, seed 1") for budget in BUDGETS
    ]
    for row in rows:
        assert row.neurons == round(row.budget * 96)
        assert row.recovery == pytest.approx(row.neurons / 96)
        assert row.delta["qa"] == pytest.approx(-0.5 * row.neurons / 96)
        assert row.seconds >= 0
    assert [row.budget for row in found["M"]] == BUDGETS


def test_it_prints_a_table(models):
    """One line per row; recovery in percent, changes with their sign, the other domains named."""
    run = Trajectory(**models)
    found = sweep(
        run, None, selectors=[RandomSelector(0.0)], budgets=[0.25],
        evaluate=Evaluate(models["earlier"]),
    )  # fmt: skip
    head, *lines = str(found).splitlines()
    assert len(lines) == len(found) == 4
    assert [word for word in ("selector", "budget", "math", "recovery", "Δ qa", "Δ code") if word not in head] == []
    assert lines[2].startswith("ceiling")
    assert "100.0 %" in lines[2]
    assert [cell for cell in ("25 %", " 24 ", "25.0 %", "-0.1250", "0.3500") if cell not in lines[3]] == []


def test_each_score_is_computed_once(models, monkeypatch):
    """Whatever the number of budgets and selectors: one pass over the data, one over the weights for M, one for C."""
    reads, passes = [], []
    displacements = scores.displacements

    def reading(run, *names, **how):
        reads.append(names)
        return displacements(run, *names, **how)

    monkeypatch.setattr(scores, "displacements", reading)
    models["later"].get_input_embeddings().register_forward_pre_hook(lambda *_: passes.append(1))
    letters = [("AMC", "AMC"), ("A", "AMC"), ("MC", "MC"), ("A", "A"), ("AM", "AM")]
    selectors = [AMCSelector(0.0, rank=rank, allocate=budgets) for rank, budgets in letters]
    run, evaluate = Trajectory(**models), Evaluate(models["earlier"])
    once = iter(data())  # an iterator: it can only be read once
    found = sweep(run, once, selectors=selectors, budgets=[*BUDGETS, 0.5], evaluate=evaluate)
    assert sorted(reads) == [("base", "earlier", "later"), ("earlier", "later")]
    assert len(passes) == len(grouped(data())[0])
    assert evaluate.calls == 3 + 5 * 3
    for name, letter in (("A×M×C", letters[0]), ("rank A, budgets A×M×C", letters[1])):  # and they are the right ones
        fresh = AMCSelector(0.25, rank=letter[0], allocate=letter[1]).select(run, data())
        assert found[name][1].neurons == sum(fresh.count().values())
    assert not memory._asked.get()


@dataclass(frozen=True)
class Remembering:
    """A selector that keeps what M it was given."""

    budget: float
    seen: tuple[list[Neurons], ...] = ()

    def select(self, run, data=None):
        M = magnitude(run)
        self.seen[0].append(M)
        return top(M, allocate(M, self.budget, how="global"))


def test_scores_are_of_the_later_model_also_between_rollbacks(models):
    """M at the second budget is M of the later model, not of a model that was just rolled back."""
    run, seen = Trajectory(**models), []
    fresh = magnitude(run)
    selectors = [Remembering(0.0, (seen,))]
    sweep(run, None, selectors=selectors, budgets=BUDGETS, evaluate=Evaluate(models["earlier"]))
    assert len(seen) == len(BUDGETS)
    assert all(one.equal(fresh) for one in seen)


def test_the_model_is_whole_at_the_end_and_after_an_error(models):
    """Bit for bit, whichever evaluation fails."""
    run, before = Trajectory(**models), snapshot(models["later"])
    arguments = dict(selectors=SELECTORS[1:3], budgets=BUDGETS)
    sweep(run, None, **arguments, evaluate=Evaluate(models["earlier"]))
    assert same(models["later"], before)
    for fail in range(1, 8):
        with pytest.raises(RuntimeError, match="out of power"):
            sweep(run, None, **arguments, evaluate=Evaluate(models["earlier"], fail))
        assert same(models["later"], before)


def test_a_sweep_goes_on_where_it_stopped(models, tmp_path):
    """Rows in the file are not measured again, new budgets are, and the result is that of one uninterrupted sweep."""
    run, file = Trajectory(**models), tmp_path / "sweep.jsonl"
    arguments = dict(selectors=SELECTORS[1:3], path=file)
    with pytest.raises(RuntimeError):
        sweep(run, None, **arguments, budgets=BUDGETS, evaluate=Evaluate(models["earlier"], fail=5))
    assert len(file.read_text().splitlines()) == 1 + 4
    said, evaluate = [], Evaluate(models["earlier"])
    whole = sweep(run, None, **arguments, budgets=BUDGETS, evaluate=evaluate, progress=said.append)
    assert evaluate.calls == len([text for text in said if "choosing" not in text]) == 3
    written = file.read_text()
    again = sweep(run, None, **arguments, budgets=BUDGETS, evaluate=Evaluate(models["earlier"], 1))
    assert again == whole
    assert file.read_text() == written
    fresh = sweep(run, None, selectors=SELECTORS[1:3], budgets=BUDGETS, evaluate=Evaluate(models["earlier"]))
    assert [replace(row, seconds=0.0) for row in whole] == [replace(row, seconds=0.0) for row in fresh]
    more = Evaluate(models["earlier"])
    sweep(run, None, **arguments, budgets=[*BUDGETS, 0.5], evaluate=more)
    assert more.calls == 2


def test_a_stored_sweep_is_read_and_drawn(models, tmp_path, monkeypatch):
    """What a file holds is the sweep that was returned; the script of the demo draws it."""
    run, file = Trajectory(**models), tmp_path / "sweep.jsonl"
    found = sweep(run, None, selectors=SELECTORS[1:3], budgets=BUDGETS, evaluate=Evaluate(models["earlier"]), path=file)
    assert load_sweep(file) == found
    assert load_sweep(file, "code").metric == "code"
    monkeypatch.setattr(sys, "argv", f"draw {file} {tmp_path}/picture.png --metric math".split())
    draw.main()
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:2]))
    with pytest.raises(ValueError, match="no rows of the earlier and later models yet"):
        load_sweep(file)
    with pytest.raises(LookupError, match="no sweep file"):
        load_sweep(tmp_path / "none")


def test_a_file_of_other_checkpoints_is_refused(models, tmp_path):
    """The file says which checkpoints its rows are of; other weights under the same names are others."""
    for name in ("earlier", "later"):
        models[name].save_pretrained(tmp_path / name)
    run = Trajectory(earlier=str(tmp_path / "earlier"), later=str(tmp_path / "later"))
    arguments = dict(selectors=SELECTORS[2:3], budgets=[0.1], path=tmp_path / "sweep.jsonl")
    sweep(run, None, **arguments, evaluate=Evaluate(models["earlier"]))
    head = json.loads((tmp_path / "sweep.jsonl").read_text().splitlines()[0])
    assert head["checkpoints"]["earlier"]["name"] == "earlier"
    models["base"].save_pretrained(tmp_path / "earlier")
    with pytest.raises(ValueError, match="other checkpoints"):
        sweep(run, None, **arguments, evaluate=Evaluate(models["earlier"], fail=1))


def test_a_file_of_other_prompts_is_refused(models, tmp_path):
    """The masks of A and D depend on them: rows by other prompts were given out as these."""
    run, other = Trajectory(**models), [{**batch, "input_ids": batch["input_ids"].flip(1)} for batch in data()]
    arguments = dict(selectors=SELECTORS[:1], budgets=[0.1], path=tmp_path / "sweep.jsonl")
    first = sweep(run, data(), **arguments, evaluate=Evaluate(models["earlier"]))
    written = (tmp_path / "sweep.jsonl").read_bytes()
    for prompts in (other, data()[:1], None):
        with pytest.raises(ValueError, match=r"sweep\.jsonl holds rows of other prompts: choose another file"):
            sweep(run, prompts, **arguments, evaluate=Evaluate(models["earlier"], fail=1))
    assert (tmp_path / "sweep.jsonl").read_bytes() == written
    assert sweep(run, iter(data()), **arguments, evaluate=Evaluate(models["earlier"], fail=1)) == first


def test_a_file_of_another_base_is_refused(models, tmp_path):
    """C depends on it."""
    arguments = dict(selectors=[AMCSelector(0.0, "C", "C")], budgets=[0.1], path=tmp_path / "sweep.jsonl")
    sweep(Trajectory(**models), None, **arguments, evaluate=Evaluate(models["earlier"]))
    other = Trajectory(**{**models, "base": build("llama", seed=9)})
    with pytest.raises(ValueError, match="other checkpoints"):
        sweep(other, None, **arguments, evaluate=Evaluate(models["earlier"], fail=1))


def sum_of_logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).logits.sum()


def mean_of_logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).logits.mean()


@pytest.mark.parametrize(
    ("one", "other", "setting"),
    [
        (lambda: DamageSelector(0.0, loss=sum_of_logits), lambda: DamageSelector(0.0, loss=mean_of_logits), "loss"),
        (lambda: DamageSelector(0.0, protect={"qa": data()}), lambda: DamageSelector(0.0, protect={"qa": data()[:1]}),
         "protect"),
        (lambda: Named(0.0, 1), lambda: Named(0.0, 2), "choice"),
    ],
    ids=["loss", "protect", "own"],
)  # fmt: skip
def test_a_file_of_another_selector_of_that_name_is_refused(models, tmp_path, one, other, setting):
    """Its rows were given out as those of this one; the same selector, made anew, goes on."""
    run, file = Trajectory(**models), tmp_path / "sweep.jsonl"
    arguments = dict(budgets=[0.1], path=file)
    first = sweep(run, data(), selectors=[one()], **arguments, evaluate=Evaluate(models["earlier"]))
    assert sweep(run, data(), selectors=[one()], **arguments, evaluate=Evaluate(models["earlier"], fail=1)) == first
    with pytest.raises(ValueError, match=f"holds rows of .* with another {setting}: choose another file"):
        sweep(run, data(), selectors=[other()], **arguments, evaluate=Evaluate(models["earlier"], fail=1))


@dataclass
class Scaled:
    """An evaluation with a setting."""

    by: float
    norm: bool = False

    def __call__(self, model: nn.Module) -> dict[str, float]:
        return self.score(model)

    def score(self, model: nn.Module) -> dict[str, float]:
        return {"math": self.by * float(model.lm_head.weight.sum())}


def scaled(model: nn.Module, by: float) -> dict[str, float]:
    return Scaled(by)(model)


def closed_over(by: float):
    return lambda model: scaled(model, by)


def recursive(by: float):
    def score(model: nn.Module, times: int = 1) -> dict[str, float]:
        return score(model, times - 1) if times else {"math": by}

    return score


def wrapped(inner):
    return lambda model: inner(model)


def ten(model: nn.Module) -> dict[str, float]:
    return {"math": 10.0}


def twenty(model: nn.Module) -> dict[str, float]:
    return {"math": 20.0}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: ten, lambda: twenty),
        (lambda: recursive(1.0), lambda: recursive(2.0)),
        (lambda: Scaled(1.0), lambda: Scaled(2.0)),
        (lambda: Scaled(1.0).score, lambda: Scaled(2.0).score),
        (lambda: partial(scaled, by=(1.0,)), lambda: partial(scaled, by=(2.0,))),
        (lambda: partial(scaled, by=Path("a.jsonl")), lambda: partial(scaled, by=Path("b.jsonl"))),
        (lambda: partial(scaled, by=1.0), lambda: partial(scaled, by=2.0)),
        (lambda: partial(ten), lambda: partial(twenty)),
        (lambda: closed_over(1.0), lambda: closed_over(2.0)),
        (lambda: wrapped(ten), lambda: wrapped(twenty)),
        (lambda: likelihood({"math": data()}), lambda: likelihood({"math": data()[:1]})),
        (lambda: likelihood({"math": data()}), lambda: likelihood({"qa": data()})),
        (lambda: harness("gsm8k"), lambda: harness("gsm8k", limit=10)),
    ],
    ids=[
        "function", "recursive", "object", "method", "tuple", "path", "partial",
        "function of partial", "closure", "wrapper", "prompts",
        "domain", "harness",
    ],
)  # fmt: skip
def test_a_file_of_another_evaluation_is_refused(models, tmp_path, one, other):
    """Its rows were given out as scores of this one; the same evaluation, made anew, goes on."""
    run, file = Trajectory(**models), tmp_path / "sweep.jsonl"
    Bench(run, None, one(), file)
    Bench(run, None, one(), file)
    written = file.read_bytes()
    with pytest.raises(ValueError, match=r"sweep\.jsonl holds rows of another evaluation: choose another file"):
        Bench(run, None, other(), file)
    assert file.read_bytes() == written


OTHER_PROCESS = """
import fcntl, sys, time
with open(sys.argv[1], "a+") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("locked", flush=True)
    time.sleep(0.3)
    file.write(sys.stdin.read())
"""


def test_two_processes_share_a_file(models, tmp_path):
    """The second waits while the first writes what the rows are of: two of those lines made a file that none read."""
    run, file, evaluate = Trajectory(**models), tmp_path / "sweep.jsonl", Evaluate(models["earlier"])
    arguments = dict(selectors=SELECTORS[2:3], budgets=[0.1])
    whole = sweep(run, None, **arguments, evaluate=Evaluate(models["earlier"]), path=tmp_path / "first.jsonl")
    text = (tmp_path / "first.jsonl").read_text()
    words = [sys.executable, "-c", OTHER_PROCESS, str(file)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdin.write(text)
        other.stdin.close()
        assert other.stdout.readline() == "locked\n"
        assert sweep(run, None, **arguments, evaluate=evaluate, path=file) == whole
    assert evaluate.calls == 0
    assert file.read_text() == text


@pytest.mark.parametrize("cut", [1, 2, 20, 1000])
def test_a_last_line_that_was_cut_is_measured_again(models, tmp_path, cut):
    """As a kill or a full disk in the middle of writing leaves it."""
    run, file = Trajectory(**models), tmp_path / "sweep.jsonl"
    arguments = dict(selectors=SELECTORS[2:3], budgets=[0.1], path=file)
    first = sweep(run, None, **arguments, evaluate=Evaluate(models["earlier"]))
    whole = file.read_bytes()
    start = whole.rfind(b"\n", 0, -1) + 1
    file.write_bytes(whole[: max(len(whole) - cut, start + 1)])
    again = sweep(run, None, **arguments, evaluate=Evaluate(models["earlier"]))
    assert [replace(row, seconds=0) for row in again.rows] == [replace(row, seconds=0) for row in first.rows]
    assert len(file.read_text().splitlines()) == len(whole.splitlines())
    assert load_sweep(file) == again
    head = whole[: whole.find(b"\n")]
    file.write_bytes(head[: len(head) // 2])
    sweep(run, None, **arguments, evaluate=Evaluate(models["earlier"]))
    assert file.read_bytes().startswith(head + b"\n")


def test_a_line_that_another_process_left_unfinished_is_not_gone_on_with(models, tmp_path):
    """It was killed while this one measured."""
    run, file = Trajectory(**models), tmp_path / "sweep.jsonl"
    bench = Bench(run, None, Evaluate(models["earlier"]), file)
    bench.later()
    with open(file, "a") as other:
        other.write('{"selector": "earl')
    bench.earlier()
    assert [json.loads(line)["selector"] for line in file.read_text().splitlines()[1:]] == ["later", "earlier"]


def test_a_row_that_two_processes_measured_is_read_once(models, tmp_path):
    run, file = Trajectory(**models), tmp_path / "sweep.jsonl"
    arguments = dict(selectors=SELECTORS[2:3], budgets=[0.1], path=file)
    first = sweep(run, None, **arguments, evaluate=Evaluate(models["earlier"]))
    rows = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*rows, *rows[2:]]))
    assert load_sweep(file) == first


def test_a_file_of_something_else_is_refused_by_name(models, tmp_path):
    """And nothing in it is changed, whether or not its last line ends."""
    run, file = Trajectory(**models), tmp_path / "sweep.jsonl"
    arguments = dict(selectors=SELECTORS[2:3], budgets=[0.1], path=file)
    sweep(run, None, **arguments, evaluate=Evaluate(models["earlier"]))
    whole = file.read_bytes()
    for held in (b"hello", b"hello\n", b"[1, 2]\n", b"a\n{b", b"{b", b"\xff\xfe\x00", whole + b'{"items": null}\n'):
        file.write_bytes(held)
        with pytest.raises(ValueError, match=r"sweep\.jsonl is not a sweep's file"):
            sweep(run, None, **arguments, evaluate=Evaluate(models["earlier"]))
        assert file.read_bytes() == held


@pytest.mark.parametrize("change", [lambda text: text[:-1], lambda text: text.replace("\n", "\n\n"), lambda _: "\n"])
def test_a_file_goes_on_after_an_editor_was_at_it(models, tmp_path, change):
    """Its last line break gone, or empty lines: the next row came behind the last one, and neither could be read."""
    run, file = Trajectory(**models), tmp_path / "sweep.jsonl"
    arguments = dict(selectors=SELECTORS[2:3], path=file)
    sweep(run, None, **arguments, budgets=[0.1], evaluate=Evaluate(models["earlier"]))
    file.write_text(change(file.read_text()))
    more = sweep(run, None, **arguments, budgets=BUDGETS, evaluate=Evaluate(models["earlier"]))
    again = sweep(run, None, **arguments, budgets=BUDGETS, evaluate=Evaluate(models["earlier"], 1))
    assert again == more


def test_nothing_lost_is_no_recovery(models):
    """Where the metric did not fall there is nothing to recover: no division by zero, an empty cell."""
    run = Trajectory(**models)
    found = sweep(
        run, None, selectors=SELECTORS[2:3], budgets=[0.1], metric="code",
        evaluate=Evaluate(models["earlier"]),
    )  # fmt: skip
    assert [row.recovery for row in found] == [None] * 4
    assert found.metric == "code"
    assert str(found).splitlines()[5:] == [
        "",
        "no recovery: code did not fall from earlier (0.5000) to later (0.5000). Is another metric the damaged one, "
        "or are the checkpoints in the wrong order?",
    ]


def test_a_selector_without_a_budget_and_an_unknown_metric_are_refused(models):
    """By name, with what there is."""

    class Mute:
        def select(self, run, data=None):
            raise AssertionError("never asked")

    run, before = Trajectory(**models), snapshot(models["later"])
    with pytest.raises(ValueError, match="no field 'budget'"):
        sweep(run, None, selectors=[Mute()], budgets=[0.1], evaluate=Evaluate(models["earlier"]))
    with pytest.raises(ValueError, match=r"the metric 'maths' is none.*math"):
        sweep(
            run, None, selectors=SELECTORS[2:3], budgets=[0.1], metric="maths",
            evaluate=Evaluate(models["earlier"]),
        )  # fmt: skip
    assert same(models["later"], before)


@dataclass(frozen=True)
class First:
    """The first neurons of one layer: a user's own selector with a setting of its own."""

    budget: float
    layer: int

    def select(self, run, data=None):
        sizes = find_layout(run.load()).sizes
        taken = {name: round(self.budget * sum(sizes.values())) * (at == self.layer) for at, name in enumerate(sizes)}
        return Neurons({name: torch.arange(size) < taken[name] for name, size in sizes.items()})


def test_two_selectors_of_one_class_are_two_rows(models):
    """Selectors that differ in a setting are measured each: one must not be given the other's row."""
    run, seen = Trajectory(**models), []

    def evaluate(model):
        pairs = zip(models["earlier"].model.layers, model.model.layers, strict=True)
        hits = [int((a.mlp.up_proj.weight == b.mlp.up_proj.weight).all(1).sum()) for a, b in pairs]
        seen.append(hits)
        return {"math": sum(hits), "layer": hits[1]}

    found = sweep(run, None, selectors=[First(0.0, 0), First(0.0, 1)], budgets=[0.1], evaluate=evaluate)
    assert [row.metrics["layer"] for row in found][-2:] == [0.0, 10.0]
    assert len({row.selector for row in found}) == 5


def test_an_evaluation_that_changes_the_weights_is_an_error(models):
    """Else every later row would be of another model."""
    run = Trajectory(**models)

    def evaluate(model):
        with torch.no_grad():
            model.lm_head.weight += 1
        return {"math": 0.0}

    with pytest.raises(ValueError, match="changed the weights"):
        sweep(run, None, selectors=SELECTORS[2:3], budgets=[0.1], evaluate=evaluate)


def test_every_budget_is_checked_before_anything_is_evaluated(models):
    """A budget out of range is said at once, not after hours of evaluations of the others."""
    evaluate = Evaluate(models["earlier"])
    with pytest.raises(ValueError, match=r"budget=1\.5: expected a fraction"):
        sweep(Trajectory(**models), None, selectors=SELECTORS[2:], budgets=[0.1, 1.5], evaluate=evaluate)
    assert evaluate.calls == 0


@dataclass(frozen=True)
class Named:
    """A selector whose name says nothing of its seed."""

    budget: float
    choice: object
    name: str = "mine"

    def select(self, run, data=None):
        return RandomSelector(self.budget, id(self.choice) % 1000).select(run)


def test_two_selectors_of_one_name_are_refused(models):
    """Two losses, say: the second one's rows would be the first one's, without a word."""
    arguments = dict(budgets=[0.1], evaluate=Evaluate(models["earlier"]))
    one, other = Named(0.0, object()), Named(0.0, object())
    with pytest.raises(ValueError, match="both called 'mine'"):
        sweep(Trajectory(**models), None, selectors=[one, other], **arguments)
    losses = [DamageSelector(0.0, loss=lambda model, batch: model(**batch).loss, units="mlp") for _ in range(2)]
    with pytest.raises(ValueError, match=r"both called 'D \(own loss\)'"):
        sweep(Trajectory(**models), data(), selectors=losses, **arguments)
    assert len(sweep(Trajectory(**models), None, selectors=[one, one], **arguments)) == 5


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (0.5, r"evaluate returned '0\.5': expected scores by name"),
        ({}, r"evaluate returned '\{\}'"),
        ({"math": "good"}, "evaluate's 'math': expected a number"),
        ({"math": None}, "evaluate's 'math' is nan"),
        ({"math": float("nan")}, "evaluate's 'math' is nan: expected a finite number"),
        ({"math": torch.tensor(float("-inf"))}, "evaluate's 'math' is -inf"),
    ],
)
def test_what_is_no_score_is_refused(models, score, message):
    """NaN gave a table of NaN and a recovery left blank; the others a traceback."""
    with pytest.raises(ValueError, match=message):
        sweep(Trajectory(**models), None, selectors=[], budgets=[], evaluate=lambda _: score)


def test_selectors_and_budgets_may_be_generators(models):
    """They are gone through more than once: no row at all was the result."""
    one, each = iter(SELECTORS[2:]), iter(BUDGETS)
    evaluate = Evaluate(models["earlier"])
    assert len(sweep(Trajectory(**models), None, selectors=one, budgets=each, evaluate=evaluate)) == 7


def test_every_model_has_the_same_metrics(models, tmp_path):
    """One that is missing or new is refused where it is measured, and is not written down as a row."""
    calls, file = [], tmp_path / "new" / "rows.jsonl"

    def evaluate(model):
        calls.append(1)
        return {"math": 0.5, **({} if len(calls) == 3 else {"qa": 0.5})}

    arguments = dict(selectors=[], budgets=[], path=file)
    with pytest.raises(
        ValueError, match=r"'ceiling \(all MLP neurons\)' has the metrics \['math'\], and 'later' \['math', "
    ):
        sweep(Trajectory(**models), None, **arguments, evaluate=evaluate)
    assert len(file.read_text().splitlines()) == 3  # the head, later and earlier
    assert len(sweep(Trajectory(**models), None, **arguments, evaluate=evaluate)) == 3


def test_a_line_that_is_no_row_is_refused_by_name(models, tmp_path):
    run, file = Trajectory(**models), tmp_path / "sweep.jsonl"
    arguments = dict(selectors=[], budgets=[], evaluate=Evaluate(models["earlier"]), path=file)
    sweep(run, None, **arguments)
    file.write_text(file.read_text() + '{"prompt": "1+1="}\n')
    with pytest.raises(ValueError, match=r"sweep\.jsonl is not a sweep's file.*: line 5: \"selector\" is missing"):
        sweep(run, None, **arguments)


def test_a_budget_that_buys_nothing_keeps_its_budget_in_the_table(models):
    arguments = dict(selectors=SELECTORS[2:3], budgets=[0.0, 0.001], evaluate=Evaluate(models["earlier"]))
    *_, none, few = str(sweep(Trajectory(**models), None, **arguments)).splitlines()
    assert (none.split()[1:4], few.split()[1:4]) == (["0", "%", "0"], ["0.1", "%", "0"])


LINE = {"selector": "x", "budget": 0.1, "neurons": 3, "metrics": {"math": 0.5}, "seconds": 1.5}
HEAD = {"checkpoints": {}, "prompts": None, "evaluate": "e"}


def sweep_file(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in (HEAD, *lines)))
    return path


def test_rows_that_others_wrote_are_read(tmp_path):
    """Without the damage of the next test nothing is refused."""
    rows = [{**LINE, "selector": name} for name in ("earlier", "later", "x")]
    rows[2] |= {"items": {"math": [0, 1, 0.5]}, "settings": {"how": "global"}, "unknown": None}
    found = load_sweep(sweep_file(tmp_path / "sweep.jsonl", *rows))
    assert [(row.selector, row.budget, row.metrics) for row in found] == [
        (name, 0.1, {"math": 0.5}) for name in ("earlier", "later", "x")
    ]
    assert str(found)


WRONG = {
    "selector": [None, 3, [], "\ud800"],
    "budget": [None, "0.1", True, -0.1, 1.5, float("nan"), 10**400],
    "neurons": [None, 2.7, True, -1, "3", 10**400],
    "metrics": [None, [], {}, {"math": None}, {"math": "1"}, {"math": True}, {"math": float("inf")}, {"math": 10**400}],
    "seconds": [None, "1", []],
    "items": [None, [], {"math": None}, {"math": []}, {"math": [None]}, {"math": 3}, {"other": [1]}, {"math": [[1]]}],
    "settings": [None, [], {"how": None}, "how"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_row_of_another_kind_is_refused_by_its_line(tmp_path, name, value):
    path = sweep_file(tmp_path / "sweep.jsonl", *({**LINE, "selector": one} for one in ("earlier", "later")))
    sweep_file(path, *path.read_text().splitlines()[1:], {**LINE, name: value})
    with pytest.raises(ValueError, match=r"sweep\.jsonl is not a sweep's file, or .*: line 4[: ]"):
        load_sweep(path)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a":' * 500 + "1" + "}" * 500, "3", "null", "[1, 2]", "{"])
@pytest.mark.parametrize("at", [1, 4])
def test_a_line_that_is_no_object(tmp_path, line, at):
    lines = [json.dumps(HEAD), *(json.dumps({**LINE, "selector": one}) for one in ("earlier", "later", "x"))]
    lines[at - 1] = line
    (tmp_path / "sweep.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"sweep\.jsonl is not a sweep's file, or .*: line {at}[: ]"):
        load_sweep(tmp_path / "sweep.jsonl")


def test_rows_of_other_metrics_are_told(tmp_path):
    """Read with the metric that fell most, they were an error of a missing key."""
    rows = [{**LINE, "selector": "earlier"}, {**LINE, "selector": "later", "metrics": {"qa": 0.5}}]
    for lines in (rows, rows[::-1], [rows[0], {**rows[0], "selector": "later"}, {**rows[1], "selector": "x"}]):
        with pytest.raises(ValueError, match=r"has the metrics \['\w+'\], and 'later'"):
            load_sweep(sweep_file(tmp_path / "sweep.jsonl", *lines))
