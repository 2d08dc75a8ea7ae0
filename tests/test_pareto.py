"""The benchmark of everything: front, points and intervals on rows whose answer is known, and resuming."""

from __future__ import annotations

import argparse
import gzip
import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_lab import SEED0, copy_seed0

from benchmarks.lab.domains import DOMAINS
from benchmarks.lab.evaluate import Evaluator
from benchmarks.pareto import comparison as pareto
from benchmarks.pareto.baselines import differing
from benchmarks.pareto.changes import BASELINE, BUDGETS, CONTROL, LIBRARY, REFERENCE, TRAINED, VARIANT, Method, applied
from benchmarks.pareto.comparison import Pair, Row, Store, asked_for, identity, measure, measure_pair, pairs, setting_of
from benchmarks.pareto.front import against_loss, against_size, front
from benchmarks.pareto.methods import methods
from benchmarks.pareto.points import OTHER, OURS, SCALE, UNDECIDED, Point, best, contests, points, verdict
from benchmarks.pareto.report import markdown
from surgery import rolled_back
from surgery.measure.rows import CEILING, EARLIER, LATER
from surgery.reverting.writing import applied as used

needs_checkpoints = pytest.mark.skipif(not (SEED0 / "qa").is_dir(), reason="seed 0 has not been trained here")
ITEMS = 200
PAIR = pairs()[0]


@pytest.fixture(scope="session")
def seed0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few prompts, and still enough to say that Math was damaged."""
    return copy_seed0(tmp_path_factory.mktemp("small") / "seed0", evaluation=32, calibration=16)


def row(method: str, kind: str, value: float, probabilities: np.ndarray, **others: Any) -> dict[str, Any]:
    """One stored row whose damaged metric has these per-item probabilities."""
    items = np.rint(probabilities * SCALE).astype(int)
    settings = {"draw": 0, "touched": 10, "delta": {"qa": [0.01, 0.0, 0.02], "cw": [-0.02, -0.03, -0.01]}, **others}
    made = Row(
        method, kind, "β" if kind == LIBRARY else "α", value, entries=1000, seconds=1.0,
        metrics={"math": float(items.mean()) / SCALE, "qa": 0.5, "cw": 0.5}, items=items.tolist(), **settings,
    )  # fmt: skip
    return json.loads(json.dumps(asdict(made)))


def run_of(seed: str, lost: float, gains: dict[str, float], noise: float = 0.05) -> dict[str, Any]:
    """A seed that lost so much, and methods that give back that share of it; each item differs from the next."""
    rng = np.random.default_rng(abs(hash(seed)) % 1000 if not seed[-1].isdigit() else int(seed[-1]))
    later = rng.uniform(0.3, 0.6, ITEMS)
    loss = lost + noise * rng.standard_normal(ITEMS)
    rows = [
        row(LATER, REFERENCE, 0.0, later, touched=0, delta={"qa": [0.0] * 3, "cw": [0.0] * 3}),
        row(EARLIER, REFERENCE, 1.0, later + loss),
    ]
    for name, share in gains.items():
        gained = share * lost + noise * rng.standard_normal(ITEMS)
        rows.append(row(name, LIBRARY if name.startswith("A") else BASELINE, 0.02, later + gained))
    pair = asdict(PAIR)
    return {"seed": seed, "pair": pair, "checkpoints": {}, "measured": ["somewhere"], "rows": rows}


def named(found: list[Point], method: str) -> Point:
    return next(point for point in found if point.method == method)


def test_the_front_is_what_no_other_point_beats() -> None:
    rng = random.Random(0)
    base = points([run_of("seed1", 0.2, {"A": 0.5})])[0]
    for _ in range(50):
        cloud = [replace(base, touched=rng.choice(range(6)) / 5, recovery=rng.choice(range(6)) / 5) for _ in range(12)]
        kept = front(cloud, lambda point: point.touched)

        def beats(a: Point, b: Point) -> bool:
            return a.touched <= b.touched and a.recovery >= b.recovery and (a.touched, a.recovery) != (
                b.touched, b.recovery,
            )  # fmt: skip

        unbeaten = {(p.touched, p.recovery) for p in cloud if not any(beats(other, p) for other in cloud)}
        assert {(p.touched, p.recovery) for p in kept} == unbeaten
        assert [p.touched for p in kept] == sorted(p.touched for p in kept)


def test_recovery_is_the_share_of_the_loss_and_averages_over_seeds() -> None:
    runs = [run_of("seed1", 0.2, {"A": 0.5}, noise=0.0), run_of("seed2", 0.1, {"A": 0.7}, noise=0.0)]
    found = points(runs)
    one = named(found, "A")
    assert one.recovery == pytest.approx(0.6, abs=2e-3)
    assert one.sd == pytest.approx(0.1, abs=2e-3)
    assert one.seeds == ("seed1", "seed2")
    assert (one.low, one.high) == (pytest.approx(0.6, abs=2e-3), pytest.approx(0.6, abs=2e-3))
    assert named(found, LATER).recovery == 0
    assert named(found, EARLIER).recovery == 1
    assert (one.touched, one.worst, one.seconds) == (0.01, pytest.approx(-0.02), 1.0)


def test_draws_are_averaged_before_anything_else() -> None:
    run = run_of("seed1", 0.2, {"A": 0.0}, noise=0.0)
    later = np.array(run["rows"][0]["items"]) / SCALE
    run["rows"] += [row("random", CONTROL, 0.5, later + 0.2 * share, draw=at) for at, share in enumerate((0.2, 0.6))]
    found = [point for point in points([run]) if point.method == "random"]
    assert len(found) == 1
    one = found[0]
    assert [one.recovery, one.low, one.high] == pytest.approx([0.4] * 3, abs=1e-3)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    held = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        run = run_of("seed0", 0.2, {}, noise=0.0)
        later = np.array(run["rows"][0]["items"]) / SCALE
        run["rows"][1] = row(EARLIER, REFERENCE, 1.0, later + 0.2 + 0.1 * rng.standard_normal(ITEMS))
        run["rows"].append(row("A", LIBRARY, 0.02, later + 0.1 + 0.1 * rng.standard_normal(ITEMS)))
        one = named(points([run]), "A")
        assert one.low < one.recovery < one.high
        held += one.low <= 0.5 <= one.high
    assert 50 <= held < 60


def test_a_seed_that_lost_nothing_beyond_doubt_is_left_out() -> None:
    damaged, whole = run_of("seed1", 0.2, {"A": 0.5}), run_of("seed2", 0.001, {"A": 0.5}, noise=0.1)
    assert named(points([damaged, whole]), "A").seeds == ("seed1",)
    assert points([whole]) == []
    text = markdown({PAIR.name: [whole]}, {PAIR.name: []})
    assert "nothing to recover" in text
    assert "left out" in text


def test_a_baseline_that_wins_is_named_and_so_is_one_that_loses() -> None:
    wins = points([run_of("seed1", 0.2, {"A": 0.3, "WiSE-FT": 0.9})])
    loses = points([run_of("seed1", 0.2, {"A": 0.9, "WiSE-FT": 0.3})])
    equal = points([run_of("seed1", 0.2, {"A": 0.5, "WiSE-FT": 0.5}, noise=0.2)])
    for found, winner in ((wins, OTHER), (loses, OURS), (equal, UNDECIDED)):
        library, other = named(found, "A"), named(found, "WiSE-FT")
        text, who = verdict(library, other)
        assert who == winner
        assert text.startswith(f"{100 * (other.recovery - library.recovery):+.1f}")
    assert verdict(None, wins[-1])[1] == OTHER
    assert verdict(wins[-1], None)[1] == OURS
    assert verdict(named(wins, "A"), replace(named(wins, "WiSE-FT"), seeds=("seed9",)))[1] == UNDECIDED
    assert "**baseline**" in markdown(
        {PAIR.name: [run_of("seed1", 0.2, {"A": 0.3, "WiSE-FT": 0.9})]}, {PAIR.name: wins}
    )


def test_changes_elsewhere_are_told_by_domain_and_independent_seeds_narrow_their_interval() -> None:
    runs = [run_of(f"seed{seed}", 0.2, {"A": 0.5}) for seed in range(4)]
    for at, run in enumerate(runs):
        (changed,) = [one for one in run["rows"] if one["method"] == "A"]
        changed["delta"] = {"qa": (0.01 * at, 0.01 * at - 0.02, 0.01 * at + 0.04), "cw": (0.0, -0.001, 0.001)}
    deltas = named(points(runs), "A").deltas
    assert deltas["qa"] == pytest.approx((0.015, 0.015 - 0.01, 0.015 + 0.02))
    assert named(points(runs[:1]), "A").deltas["qa"] == pytest.approx((0.0, -0.02, 0.04))
    text = markdown({PAIR.name: runs}, {PAIR.name: points(runs)})
    assert "| Δ qa | Δ cw |" in text
    assert "| +1.50 [0.50, 3.50] | +0.00 [-0.05, 0.05] |" in text


def test_what_was_asked_of_d_is_bold_where_it_is_missed() -> None:
    """Twice A×M×C at 1, 2, 4 %; 90 % of the ceiling by 16 %; no domain down by more than 0.2 points."""
    runs = [run_of("seed0", 0.2, {}, noise=0.0)]
    later = np.array(runs[0]["rows"][0]["items"]) / SCALE
    for method, recovered in (("A×M×C", 0.1), ("D (KL)", 0.25), ("D", 0.15)):
        for budget in BUDGETS:
            one = row(method, LIBRARY, budget, later + 0.2 * recovered)
            one["delta"] = {"qa": (-0.001 if method == "D (KL)" else -0.004, -0.01, 0.01)}
            runs[0]["rows"].append(one)
    runs[0]["rows"].append(row(CEILING, LIBRARY, 1.0, later + 0.2 * 0.27))
    text = markdown({PAIR.name: runs}, {PAIR.name: points(runs)})
    assert "| D (KL) | 2.5, 2.5, 2.5 | 93 % | -0.10 (qa) |" in text
    assert "| D | **1.5**, **1.5**, **1.5** | **56 %** | **-0.40** (qa) |" in text


def test_a_variant_of_d_is_told_beside_d_and_takes_no_part_in_contests() -> None:
    run = run_of("seed0", 0.2, {})
    later = np.array(run["rows"][0]["items"]) / SCALE
    shares = {
        "A×M×C": (LIBRARY, 0.1),
        "D (KL)": (LIBRARY, 0.3),
        "D (KL), 2 rounds": (VARIANT, 0.4),
        "D (KL) (proportional)": (LIBRARY, 0.35),
    }
    noise = {name: 0.05 * np.random.default_rng(3).standard_normal(ITEMS) for name in shares}
    for name, (kind, share) in shares.items():
        run["rows"] += [row(name, kind, budget, later + 0.2 * share + noise[name]) for budget in BUDGETS]
    run["rows"].append(row(CEILING, LIBRARY, 1.0, later + 0.2 * 0.35))
    for one in run["rows"]:
        one["knob"] = "β" if one["kind"] in (LIBRARY, VARIANT) else "α"
    found = points([run])
    text = markdown({PAIR.name: [run]}, {PAIR.name: found})
    told = text.split("### Variants of D")[1].split("<details>")[0]
    (line,) = [line for line in told.splitlines() if line.startswith("| D (KL), 2 rounds")]
    assert line.count("| +10.") == len(BUDGETS)  # the same noise: the difference is 0.1 of the loss on every item
    assert "[9." in line or "[10." in line
    assert "proportional" not in told
    assert "*D (KL), 2 rounds, β" in text.split("### The front")[1].split("###")[0]
    assert "2 rounds" not in text.split("### Who wins")[1].split("### The front")[0]
    assert "2 rounds" not in text.split("### Neurons and units")[1].split("### Variants")[0]
    assert "None was measured" in markdown({PAIR.name: [run]}, {PAIR.name: [p for p in found if p.kind != VARIANT]})


def test_contests_respect_their_bounds_and_hold_every_kind() -> None:
    base = points([run_of("seed1", 0.2, {"A": 0.5})])[-1]
    cloud = [
        replace(base, kind=kind, touched=share, worst=-share, recovery=share)
        for kind in (LIBRARY, BASELINE, CONTROL, TRAINED)
        for share in (0.005, 0.05, 0.5)
    ]
    found = list(contests(cloud))
    tightest = found[0]
    assert (tightest.library, tightest.other, tightest.trained) == (None, None, None)
    for one in found:
        limit = 1.0 if one.bound == "no bound" else float(one.bound.split()[2]) / 100
        for point in (one.library, one.other, one.trained):
            expected = max((share for share in (0.005, 0.05, 0.5) if share <= limit), default=None)
            assert (point.recovery if point else None) == expected
    assert best(cloud, (TRAINED,)).kind == TRAINED


def test_both_pictures_are_drawn_from_two_pairs(tmp_path: Path) -> None:
    group = points([run_of("seed1", 0.2, {"A×M×C": 0.3, "WiSE-FT": 0.9, "DARE": -3.0})])
    for at, draw in enumerate((against_loss, against_size)):
        figure = draw({"one": group, "two": group, "empty": []})
        assert len(figure.axes) == 2
        assert "DARE" in figure.axes[0].texts[0].get_text()
        figure.savefig(tmp_path / f"{at}.png")
        assert (tmp_path / f"{at}.png").stat().st_size > 10_000


def test_the_third_stage_damages_the_two_before_it_in_any_order() -> None:
    assert pairs() == (
        Pair("Math by QA (Code → Math → QA)", "code", "math", "qa", "math"),
        Pair("Code by QA (Code → Math → QA)", "base", "math", "qa", "code"),
    )
    assert pairs(("math", "cw", "code", "qa")) == (
        Pair("CW by Code (Math → CW → Code)", "math", "cw", "code", "cw"),
        Pair("Math by Code (Math → CW → Code)", "base", "cw", "code", "math"),
    )


def test_a_folder_may_say_its_order() -> None:
    assert asked_for("runs/seed1") == (Path("runs/seed1"), ("code", "math", "qa"))
    assert asked_for("runs/seed1:qa,cw,math") == (Path("runs/seed1"), ("qa", "cw", "math"))
    with pytest.raises(argparse.ArgumentTypeError, match="three stages"):
        asked_for("runs/seed1:qa,math")


def test_the_store_gives_rows_back_only_for_the_same_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "pareto.json.gz"
    store = Store(path)
    store.run("seed0", PAIR, {"later": {"sha256": "one"}})["rows"].append({"method": "ü", "value": 0.02})
    store.run("seed1", PAIR, {"later": {"sha256": "two"}})
    store.write()
    again = Store(path)
    assert again.run("seed0", PAIR, {"later": {"sha256": "one"}})["rows"] == [{"method": "ü", "value": 0.02}]
    sampled = {"later": {"sha256": "one", "neurons": "what newer fingerprints hold"}}
    assert again.run("seed0", PAIR, sampled)["rows"] == [{"method": "ü", "value": 0.02}]
    assert len(again.runs) == 2
    assert again.run("seed0", PAIR, {"later": {"sha256": "other"}})["rows"] == []
    assert len(again.runs) == 2
    assert Store(path, fresh=True).runs == []


@needs_checkpoints
def test_identity_tells_checkpoints_and_prompts_apart(tmp_path: Path) -> None:
    folder = tmp_path / "seed0"
    folder.mkdir()
    for name in ("code", "math", "qa", "base"):
        (folder / name).symlink_to(SEED0 / name)
    (folder / "data").mkdir()
    for file in (SEED0 / "data").iterdir():
        (folder / "data" / file.name).write_bytes(file.read_bytes())
    first = identity(folder, PAIR)
    assert first == identity(SEED0, PAIR)
    assert first != identity(folder, pairs()[1])
    with (folder / "data" / "qa.evaluation.jsonl").open("a") as file:
        file.write("\n")
    assert first != identity(folder, PAIR)


@needs_checkpoints
def test_measuring_leaves_the_model_whole_and_resumes(
    seed0: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every untrained method at one value; then again from the file, where only what is missing is measured."""
    torch.set_num_threads(1)
    asked: list[str] = []

    def few(setting: Any) -> list[Method]:
        return [replace(m, values=m.values[-1:], draws=1) for m in methods(setting) if m.kind != TRAINED]

    def counted(setting: Any, method: Method, *others: Any) -> Row:
        asked.append(method.name)
        found = measure(setting, method, *others)
        now = {name: parameter.detach() for name, parameter in setting.model.named_parameters()}
        assert differing(setting.later, now) == 0
        return found

    monkeypatch.setattr(pareto, "methods", few)
    monkeypatch.setattr(pareto, "measure", counted)
    path = tmp_path / "pareto.json.gz"
    run = measure_pair(seed0, PAIR, Store(path))
    rows = {one["method"]: one for one in run["rows"]}
    assert len(asked) == len(rows) == len(run["rows"])
    assert rows[LATER]["touched"] == 0
    assert rows["WiSE-FT"]["metrics"] == rows[EARLIER]["metrics"]
    assert rows[CEILING]["touched"] < rows[EARLIER]["touched"] <= rows[EARLIER]["entries"]
    assert set(rows[EARLIER]["delta"]) == set(DOMAINS) - {"math"}
    kept = json.loads(gzip.decompress(path.read_bytes()))
    kept["runs"][0]["rows"] = [one for one in kept["runs"][0]["rows"] if one["method"] != "TIES trim"]
    path.write_bytes(gzip.compress(json.dumps(kept).encode()))
    asked.clear()
    again = measure_pair(seed0, PAIR, Store(path))
    assert asked == ["TIES trim"]
    assert [one["method"] for one in again["rows"]] == [one["method"] for one in run["rows"]]
    found = points([again])
    assert "most-changed entries" in markdown({PAIR.name: [again]}, {PAIR.name: found})


@needs_checkpoints
def test_where_nothing_was_lost_only_the_references_are_measured(seed0: Path, tmp_path: Path) -> None:
    unharmed = replace(PAIR, earlier="qa")
    run = measure_pair(seed0, unharmed, Store(tmp_path / "pareto.json.gz"))
    assert [one["method"] for one in run["rows"]] == [LATER, EARLIER]
    assert points([run]) == []


@needs_checkpoints
def test_strengths_keep_ds_masks_and_leave_the_live_model_in_its_own_dtype(seed0: Path) -> None:
    """What is measured has the bits of the folder that ``rolled_back`` would give."""
    setting = setting_of(seed0, PAIR)
    curves = {one.name: one for one in methods(setting)}
    for name in ("D (KL)", "D", "D of units (neurons and value channels)"):
        plain, further = (curves[each].change(setting, 0.02, 0) for each in (name, f"{name}, strengths ≤ 2"))
        assert plain.strength == 1
        assert plain.mask.equal(further.mask)
        assert 1 < used(further.strength, further.mask).max() <= 2
        now = {each: parameter.detach() for each, parameter in setting.model.named_parameters()}
        assert differing(setting.later, now) == 0
        saved = rolled_back(setting.run.later, to=setting.run.earlier, mask=further.mask, strength=further.strength)
        with applied(setting, further):
            assert differing(setting.later, now) > 0
            assert differing(dict(saved), now) == 0
        assert differing(setting.later, now) == 0


@needs_checkpoints
def test_the_earlier_models_row_is_the_earlier_checkpoint(seed0: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    setting = setting_of(seed0, PAIR)
    evaluate = Evaluator(seed0 / "data", AutoTokenizer.from_pretrained(seed0 / "qa"))
    (earlier,) = [one for one in methods(setting) if one.name == EARLIER]
    with applied(setting, earlier.change(setting, 1.0, 0)):
        found = evaluate(setting.model)
    assert found == evaluate(AutoModelForCausalLM.from_pretrained(seed0 / "math", dtype="auto"))
