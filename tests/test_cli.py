"""The command line: the same results as the library, exit codes, and nothing written when it should not be."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import families
import pytest
import torch
from safetensors.torch import save_file
from test_docs import build_tokenizer, three_stages
from transformers import GenerationMixin

from surgery import (
    AMCSelector,
    Checkpoint,
    DamageSelector,
    Entries,
    Neurons,
    RandomSelector,
    Trajectory,
    load_prompts,
    repair,
    rollback,
    rolled_back,
    strengths,
)
from surgery.cli import main
from surgery.layout import find_layout
from surgery.masks.mask import load_mask


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints of one tiny model: base, earlier, later."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("base", "earlier", "later")):
        families.build("qwen3", torch.bfloat16, seed).save_pretrained(folder / name)
    return folder


@pytest.fixture
def surgery(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runs: Path):
    """Type a command in the folder of runs; gives the exit code, the output and the error stream."""

    def run(command: str) -> tuple[int, str, str]:
        monkeypatch.chdir(runs)
        monkeypatch.setattr(sys, "argv", ["surgery", *command.split()])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        return int(stopped.value.code or 0), said.out, said.err

    return run


@pytest.mark.parametrize(("units", "told"), [("mlp,value_channel", True), ("mlp", False)])
def test_select_says_what_a_budget_of_several_kinds_counts(surgery, units: str, told: bool) -> None:
    _, out, _ = surgery(f"select base earlier later --selector random --units {units} --budget 0.1 --dry-run")
    assert ("the budget of 0.1 is a share of the parameters of all these units, not of their number" in out) is told


def test_select_writes_the_selectors_mask(surgery, runs: Path, tmp_path: Path) -> None:
    code, out, _ = surgery(f"select base earlier later --selector MC --budget 0.1 -o {tmp_path}/mask.safetensors")
    mask = Neurons.load(tmp_path / "mask.safetensors")
    run = Trajectory(runs / "base", runs / "earlier", runs / "later")
    assert code == 0
    assert mask.equal(AMCSelector(0.1, "MC", "MC").select(run))
    assert mask.made_by["selector"]["rank"] == "MC"
    assert f"{sum(mask.count().values())} of {mask.total}" in out


def test_rollback_writes_the_rolled_back_folder(surgery, runs: Path, tmp_path: Path) -> None:
    mask = RandomSelector(0.2).select(Trajectory(earlier=runs / "earlier", later=runs / "later"))
    mask.save(tmp_path / "mask.safetensors")
    words = f"rollback later --to earlier --mask {tmp_path}/mask.safetensors -o {tmp_path}/healed"
    code, out, _ = surgery(f"{words} --dry-run")
    assert code == 0
    assert "nothing was written" in out
    assert not (tmp_path / "healed").exists()
    assert surgery(words)[0] == 0
    size = sum(path.stat().st_size for path in (tmp_path / "healed").rglob("*") if path.is_file())
    assert f"have {size:,} bytes" in out
    healed, view = Checkpoint(tmp_path / "healed"), rolled_back(runs / "later", to=runs / "earlier", mask=mask)
    assert list(healed) == list(view)
    assert all(torch.equal(healed[name], view[name]) for name in view)
    code, _, error = surgery(words)
    assert code == 1
    assert "exists" in error
    assert surgery(f"{words} --overwrite")[0] == 0


def test_a_dry_run_tells_what_is_left_out(surgery, runs: Path, tmp_path: Path) -> None:
    RandomSelector(0.2).select(Trajectory(earlier=runs / "earlier", later=runs / "later")).save(tmp_path / "mask")
    shutil.copytree(runs / "later", tmp_path / "later")
    for name in ("optimizer.pt", "consolidated.safetensors", "values.npz"):
        (tmp_path / "later" / name).write_bytes(b"12345")
    words = f"rollback {tmp_path}/later --to earlier --mask {tmp_path}/mask"
    code, out, _ = surgery(f"{words} --dry-run")
    assert code == 0
    assert (
        "left out, since they hold other weights, a training run's state or another model's results: consolidated"
        in out
    )
    assert "rolled back: values.npz\n" in out


def test_a_home_directory_is_one_in_every_option(surgery, runs: Path, tmp_path: Path, monkeypatch) -> None:
    """A shell does not know one behind a "="."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("earlier", "later"):
        (tmp_path / name).symlink_to(runs / name)
    (tmp_path / "score.py").write_text("def score(model):\n    return {'sum': 1.0}\n")
    here = sorted(runs.iterdir())
    assert surgery("select ~/earlier ~/later --selector M --budget 0.1 --output=~/m")[0] == 0
    assert surgery("rollback ~/later --to=~/earlier --mask=~/m --output=~/healed")[0] == 0
    assert surgery("sweep ~/earlier ~/later --selectors M --evaluate=~/score.py:score --output=~/rows.jsonl")[0] == 0
    assert surgery("inspect ~/m")[0] == surgery("inspect ~/healed")[0] == 0
    assert f"there is no prompt file {tmp_path}/x" in surgery("select ~/earlier ~/later --data=~/x -o ~/n")[2]
    assert f"there is no prompt file {tmp_path}/x" in surgery("analyse a=~/earlier b=~/later --data=c=~/x -o ~/p")[2]
    assert sorted(runs.iterdir()) == here
    assert {"m", "healed", "rows.jsonl"} <= {path.name for path in tmp_path.iterdir()}


def test_an_output_that_comes_while_it_is_chosen_is_not_replaced(surgery, runs: Path, tmp_path: Path, monkeypatch):
    """Two jobs wrote one mask file: both said so, and the first one's was gone."""
    real = Neurons.save

    def save(self: Neurons, path: Path) -> None:
        (tmp_path / "m").write_text("another job's")
        real(self, path)

    monkeypatch.setattr(Neurons, "save", save)
    code, _, error = surgery(f"select earlier later --selector M --budget 0.1 -o {tmp_path}/m")
    assert (code, (tmp_path / "m").read_text()) == (1, "another job's")
    assert "m exists: choose another file, or pass overwrite=True (--overwrite)" in error
    assert surgery(f"select earlier later --selector M --budget 0.1 -o {tmp_path}/m --overwrite")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("command", ["rollback later --to earlier --mask m", "analyse earlier later",
                                     "repair earlier later --data p"])  # fmt: skip
def test_a_folder_of_something_else_is_refused_before_anything_is_read(surgery, tmp_path: Path, command: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("years of work")
    (tmp_path / "m").touch()
    code, _, error = surgery(f"{command.replace('--mask m', f'--mask {tmp_path}/m')} -o {tmp_path}/out --overwrite")
    assert code == 1
    assert "out is never replaced, since it holds no" in error
    assert (tmp_path / "out/thesis.tex").read_text() == "years of work"


def test_a_patch_is_written_applied_and_taken_back(surgery, runs: Path, tmp_path: Path) -> None:
    """The same shard as by the rollback, and then the later folder's again."""
    surgery(f"select earlier later --selector M --budget 0.1 -o {tmp_path}/mask.safetensors")
    surgery(f"rollback later --to earlier --mask {tmp_path}/mask.safetensors -o {tmp_path}/healed")
    code, out, _ = surgery(f"patch later --to earlier --mask {tmp_path}/mask.safetensors -o {tmp_path}/patch")
    size = sum(path.stat().st_size for path in (tmp_path / "patch").iterdir())
    assert code == 0
    assert f"wrote {tmp_path}/patch: {size:,} bytes" in out
    code, out, _ = surgery(f"rollback later --patch {tmp_path}/patch --dry-run")
    assert code == 0
    assert "numbers in 6 tensors patched" in out
    assert surgery(f"rollback later --patch {tmp_path}/patch -o {tmp_path}/out")[0] == 0
    assert surgery(f"rollback {tmp_path}/out --patch {tmp_path}/patch --reverse -o {tmp_path}/back")[0] == 0
    shards = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("healed", "out", "back")}
    assert shards["out"] == shards["healed"] != shards["back"] == (runs / "later/model.safetensors").read_bytes()
    code, _, error = surgery(f"rollback {tmp_path}/out --patch {tmp_path}/patch -o {tmp_path}/again")
    assert code == 1
    assert "is applied already" in error
    assert not (tmp_path / "again").exists()
    command = f"patch later --to earlier --mask {tmp_path}/mask.safetensors -o {tmp_path}/delta --format slime"
    assert surgery(f"{command} --encoding overwrite --base-version 7 --reverse")[0] == 0
    told = json.loads((tmp_path / "delta/weight_v000008/model.safetensors.index.json").read_text())["metadata"]
    assert (told["base_version"], told["delta_encoding"]) == ("000007", "overwrite")


@pytest.mark.filterwarnings("always:the mask was selected")
def test_rollback_warns_where_the_mask_was_made_for_others(surgery, runs: Path, tmp_path: Path) -> None:
    mask = RandomSelector(0.2).select(Trajectory(earlier=runs / "earlier", later=runs / "later"))
    mask.save(tmp_path / "mask.safetensors")
    _, _, error = surgery(f"rollback later --to base --mask {tmp_path}/mask.safetensors --dry-run")
    assert "was selected for 'earlier'" in error
    _, _, error = surgery(f"rollback later --to earlier --mask {tmp_path}/mask.safetensors --dry-run")
    assert "warning" not in error
    other = shutil.copytree(runs / "base", tmp_path / "other/earlier")  # another of the same name
    _, _, error = surgery(f"rollback later --to {other} --mask {tmp_path}/mask.safetensors --dry-run")
    assert (
        f"was selected for '{runs.name}/earlier' as the earlier checkpoint and is applied to 'other/earlier'" in error
    )
    shutil.copytree(runs / "earlier", tmp_path / "x")
    mask = RandomSelector(0.2).select(Trajectory(earlier=tmp_path / "x", later=runs / "later"))
    mask.save(tmp_path / "again.safetensors")
    shutil.copytree(runs / "base", tmp_path / "x", dirs_exist_ok=True)  # written anew
    _, _, error = surgery(f"rollback later --to {tmp_path}/x --mask {tmp_path}/again.safetensors --dry-run")
    assert "x', whose weights are others by now" in error


def test_ctrl_c_is_told(surgery, tmp_path: Path) -> None:
    """typer ends with the code and no word: nobody knew what had become of the checkpoints."""
    (tmp_path / "stop.py").write_text("def score(model):\n    raise KeyboardInterrupt\n")
    code, out, error = surgery(f"sweep earlier later --evaluate {tmp_path}/stop.py:score --selectors random")
    assert (code, out) == (130, "")
    assert "interrupted: inputs are unchanged, and no output is left half-written" in error


def test_sweep_prints_a_table_and_resumes(surgery, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "scoring.py").write_text(
        "from pathlib import Path\n"
        "def score(model):\n"
        f"    if Path('{tmp_path}/stop').exists():\n        raise RuntimeError\n"
        "    weight = model.model.layers[0].mlp.up_proj.weight\n"
        "    return {'sum': float(weight.float().sum()), 'other': 1.0}\n"
    )
    words = f"sweep base earlier later --evaluate {tmp_path}/scoring.py:score --selectors M,random --budgets 0.1,0.5"
    code, out, _ = surgery(f"{words} --metric sum -o {tmp_path}/sweep.jsonl")
    assert code == 0
    assert "recovery" in out
    assert len((tmp_path / "sweep.jsonl").read_text().splitlines()) == 1 + 4 + 4  # a ceiling for each kind of unit
    (tmp_path / "stop").touch()
    again = surgery(f"{words} --metric sum -o {tmp_path}/sweep.jsonl")
    assert again[:2] == (0, out)
    (tmp_path / "scoring.py").write_text("def score(model):\n    return {'sum': 0.0, 'other': 1.0}\n")
    code, _, error = surgery(f"{words} --metric sum -o {tmp_path}/sweep.jsonl")
    assert code == 1
    assert "sweep.jsonl holds rows of another evaluation: choose another file" in error


def test_rows_reach_a_log(surgery, runs: Path, tmp_path: Path) -> None:
    """Of a sweep and of a repair; a log that is not there is told before anything is loaded."""
    (tmp_path / "mine.py").write_text(
        "import json\n"
        "def score(model):\n"
        "    return {'sum': float(model.model.layers[0].mlp.up_proj.weight.float().sum())}\n"
        f"def log(row):\n    with open('{tmp_path}/rows', 'a') as file:\n        file.write(json.dumps(row) + '\\n')\n"
    )
    words = f"earlier later --evaluate {tmp_path}/mine.py:score --data {tmp_path}/none.jsonl"
    sweep = f"sweep {words.partition(' --data')[0]} --selectors random --budgets 0.5 --log"
    code, _, error = surgery(f"{sweep} {tmp_path}/mine.py:log")
    assert code == 0, error
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [row["selector"] for row in rows[:2]] == ["earlier", "later"]
    assert rows[-1]["budget"] == 0.5
    assert "score/sum" in rows[-1]
    for command in (f"{sweep} ", f"repair {words} --log "):
        code, _, error = surgery(f"{command}{tmp_path}/mine.py:lag")
        assert (code, "has no attribute 'lag'" in error and "--log" in error) == (1, True)
        assert "error: --log 'wandb': expected \"module:function\"" in surgery(f"{command}wandb")[2]


def test_a_score_may_lie_in_a_file_of_any_name(surgery, tmp_path: Path) -> None:
    """Also of a module that is loaded already, and with a module of its own beside it."""
    (tmp_path / "json.py").write_text(
        "from dataclasses import dataclass\nimport beside_json\n\n@dataclass\nclass Score:\n    x: 'float' = 2.5\n\n"
        "def score(model):\n    return {'sum': Score().x + beside_json.more}\n"
    )
    (tmp_path / "beside_json.py").write_text("more = 4.75\n")
    words = "sweep base earlier later --selectors M --budgets 0.1 --evaluate"
    code, out, err = surgery(f"{words} {tmp_path}/json.py:score")
    assert not code, err
    assert "7.25" in out
    assert "No such file" in surgery(f"{words} {tmp_path}/nowhere.py:score")[2]


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """Three stages with a tokenizer, prompts of two domains, and a score: how much of one matrix is the earlier one."""
    three_stages(tmp_path, "qwen3")
    for name, prompts in (("sums", [f"{n}+{n}=" for n in range(11, 31)]), ("qa", ["7", "9"])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in prompts))
    (tmp_path / "lab_score.py").write_text(
        "from surgery import Trajectory\n"
        f"w = Trajectory(later='{tmp_path}/math').load().model.layers[0].mlp.up_proj.weight\n"
        "def score(model):\n"
        "    same = (model.model.layers[0].mlp.up_proj.weight == w).all(1).float()\n"
        "    return {'sum': same, 'other': 1 - float(same.mean())}\n"
    )
    return tmp_path


def test_repair_tells_the_verdict_then_the_table_then_what_it_wrote(surgery, lab: Path) -> None:
    """What the library finds, by the likelihood of answers to half of the prompts; without -o nothing is written."""
    run = Trajectory(earlier=lab / "math", later=lab / "qa")
    sums, qa = (load_prompts(lab / f"{name}.jsonl", lab / "qa") for name in ("sums", "qa"))
    kept = dict(keep={"qa": qa}, limit=100.0, recovery=0.5, budgets=[0.1, 0.5, 1.0], metric="sums")
    done = repair(run, sums, **kept)  # type: ignore[arg-type]
    assert done.outcome == "repaired"
    words = f"repair {lab}/math {lab}/qa --data {lab}/sums.jsonl --keep qa={lab}/qa.jsonl --limit 100 --recovery 0.5"
    words += f" --budgets 0.1,0.5,1 --rows {lab}/rows.jsonl"
    before = sorted(lab.iterdir())
    code, out, err = surgery(words)
    assert not code, err
    assert out.startswith(f"{done.verdict}\n\nselector")
    assert len(out.split("selector", 1)[1].splitlines()) > len(done.sweep)
    assert out.endswith("\nnothing was written: pass -o FOLDER to write the repaired checkpoint\n")
    assert sorted(lab.iterdir()) == sorted([*before, lab / "rows.jsonl"])
    code, again, err = surgery(f"{words} -o {lab}/healed")
    assert not code, err
    assert again == out.replace("nothing was written: pass -o FOLDER to write the repaired checkpoint",
                                f"wrote {lab}/healed")  # fmt: skip
    want, healed = rolled_back(lab / "qa", to=lab / "math", mask=done.mask), Checkpoint(lab / "healed")
    assert all(torch.equal(healed[name], want[name]) for name in want)
    assert Trajectory(later=lab / "healed").load() is not None
    assert (
        f"{lab}/healed exists: choose another folder, or pass overwrite=True (--overwrite)"
        in surgery(f"{words} -o {lab}/healed")[2]
    )
    code, told, err = surgery(f"{words} -o {lab}/qa/healed")
    assert (code, told) == (1, again.removesuffix(f"\nwrote {lab}/healed\n"))  # what took hours is told all the same
    assert "lies in one of the inputs: choose another folder" in err
    assert surgery(f"{words} -o {lab}/healed --overwrite")[:2] == (0, again)


def test_repair_by_an_evaluation_of_ones_own(surgery, lab: Path) -> None:
    """All prompts choose, it measures, and --keep names its metrics; 3 where the limits leave no repair."""
    words = f"repair {lab}/base {lab}/math {lab}/qa --data {lab}/sums.jsonl --evaluate {lab}/lab_score.py:score"
    words += f" --selector M --units mlp --how uniform --budgets 0.25,0.5,0.75 --recovery 0.5 -o {lab}/healed"
    code, out, err = surgery(f"{words} --metric sum --keep other --limit 0.3")
    assert code == 3, err
    assert out.startswith("Not repaired: sum lost 1.0000 [1.0000, 1.0000] ")
    assert "No budget brings back 50 % of what can be won back (50 % of the loss) while other loses at most 0.3" in out
    assert "the best within the limits, budget 0.25, brings back 25.0 %" in out
    assert "wrote" not in out
    assert not (lab / "healed").exists()
    code, out, err = surgery(f"{words} --keep other --limit 0.6")  # the metric that fell most
    assert not code, err
    assert out.startswith("Repaired: sum lost 1.0000 [1.0000, 1.0000] ")
    assert "brings back 50.0 %" in out.splitlines()[0]
    assert "other changes by -0.5000" in out.splitlines()[0]
    assert "M (uniform)" in out
    assert out.endswith(f"wrote {lab}/healed\n")
    mask = AMCSelector(0.5, "M", "M", "uniform").select(Trajectory(lab / "base", lab / "math", lab / "qa"))
    want, healed = rolled_back(lab / "qa", to=lab / "math", mask=mask), Checkpoint(lab / "healed")
    assert all(torch.equal(healed[name], want[name]) for name in want)


def test_repair_of_what_lost_nothing(surgery, lab: Path) -> None:
    """The exit code is 0, and no folder is written: there is nothing to repair."""
    words = f"repair {lab}/math {lab}/math --data {lab}/sums.jsonl -o {lab}/healed"
    code, out, err = surgery(words)
    assert not code, err
    assert out.startswith("No significant loss: sums lost 0.0000 nats per response token")
    assert "Nothing was changed." in out.splitlines()[0]
    assert "earlier and later score exactly alike" in out
    assert "Are they the same checkpoint?" in out
    assert "0 comparisons" not in out
    assert "wrote" not in out
    assert not (lab / "healed").exists()


def test_what_repair_refuses_in_the_shells_words(surgery, lab: Path) -> None:
    words = f"repair {lab}/math {lab}/qa --data {lab}/sums.jsonl"
    score = f"--evaluate {lab}/lab_score.py:score"
    for more, message in (
        (f"--keep {lab}/qa.jsonl", "expected a domain and its file"),
        (f"{score} --keep some", "'some' is none of the other metrics, which are ['other']"),
        (f"{score} --keep some={lab}/qa.jsonl", "so name its metric alone: --keep some"),
        ("--recovery 2", "expected a share in (0, 1]"),
        ("--limit -1", "limit=-1.0 of 'any kept metric': expected how much it may lose"),
        ("--device nonsense", "--device nonsense: torch "),
        ("--device cuda:77", "leave --device out for the CPU"),
        ("--budgets 0,1", "expected fractions in (0, 1]"),
        ("--budgets few", "--budgets: 'few' is not a number"),
        ("--selector AM", "single weights are ranked by D or by M alone"),
        (f"{score} --metric none", "the metric 'none' is none of those that evaluate returns"),
    ):
        code, out, err = surgery(f"{words} {more}")
        assert (code, out) == (1, ""), (more, out, err)
        assert message in err, err
    code, _, err = surgery(f"repair {lab}/math {lab}/qa")
    assert code == 2
    assert "Missing option '--data'" in err


def test_how_a_sweeps_selectors_spend_their_budget(surgery, tmp_path: Path) -> None:
    (tmp_path / "how_score.py").write_text(
        "def score(model):\n    return {'sum': float(model.model.layers[0].mlp.up_proj.weight.float().sum())}\n"
    )
    words = f"sweep base earlier later --evaluate {tmp_path}/how_score.py:score --selectors M,random --budgets 0.1"
    assert "M (" not in surgery(words)[1]
    assert "M (uniform)" in surgery(f"{words} --how uniform")[1]
    assert 'expected "proportional"' in surgery(f"{words} --how most")[2]


def test_protected_domains_from_the_shell(surgery, tmp_path: Path) -> None:
    """The mask of DamageSelector(protect=, weight=), in select and sweep; refused where D is not."""
    three_stages(tmp_path, "qwen3")
    for name, line in (
        ("data", '{"prompt": "12+13=", "response": "25"}'),
        ("other", '{"prompt": "7", "response": "8"}'),
    ):
        (tmp_path / f"{name}.jsonl").write_text(f"{line}\n" * 3)
    runs, guard = f"{tmp_path}/math {tmp_path}/qa --data {tmp_path}/data.jsonl", f"--protect qa={tmp_path}/other.jsonl"
    words = f"{guard} --protect-weight 2.5 --selector D:kl"
    code, _, err = surgery(f"select {runs} {words} --budget 0.1 -o {tmp_path}/m")
    assert not code, err
    data, qa = (load_prompts(tmp_path / f"{name}.jsonl", tmp_path / "qa") for name in ("data", "other"))
    run = Trajectory(earlier=tmp_path / "math", later=tmp_path / "qa")
    chosen = DamageSelector(0.1, loss="kl", protect={"qa": qa}, weight=2.5)
    found, want = load_mask(tmp_path / "m"), chosen.select(run, data)
    assert found.equal(want)
    assert not found.equal(replace(chosen, protect=None).select(run, data))
    assert found.made_by["selector"] == want.made_by["selector"]
    (tmp_path / "guard_score.py").write_text(
        "from surgery import Trajectory\n"
        "def score(model):\n"
        f"    w = Trajectory(later='{tmp_path}/math').load().model.layers[0].mlp.up_proj.weight\n"
        "    return {'sum': (model.model.layers[0].mlp.up_proj.weight == w).float().mean().item()}\n"
    )
    score = f"--evaluate {tmp_path}/guard_score.py:score --budgets 0.5"
    table = surgery(f"sweep {runs} {score} {guard} --selectors D,random")[1]
    assert "D protecting qa × 0.3" in table
    table = surgery(f"sweep {runs} {score} {guard} --protect-weight 2.5 --selectors D:kl")[1]
    assert "D (KL) protecting qa × 2.5" in table
    for more, message in (
        (f"{guard} --selector M", "--protect: only D can spare a domain, and the selector is M: take D"),
        ("--protect other.jsonl --selector D", "--protect 'other.jsonl': expected a domain and its file"),
        (f"{guard} --selector D --units weight", "the costs of single weights do not add up"),
        (f"{guard} --selector D --protect-weight -1", "--protect-weight -1.0: expected a number ≥ 0"),
    ):
        code, _, err = surgery(f"select {runs} {more} --dry-run")
        assert code == 1
        assert message in err
        assert "protect=" not in err


def test_answers_are_written_once_and_read_by_later_commands(
    surgery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks and rows are those without a file, also of a selector that is swept beside D; the output says which."""
    three_stages(tmp_path, "qwen3")
    (tmp_path / "data.jsonl").write_text("".join(f'{{"prompt": "{n}+1="}}\n' for n in (2, 30, 400)))
    (tmp_path / "answers_score.py").write_text(
        "from surgery import Trajectory\n"
        "def score(model):\n"
        f"    w = Trajectory(later='{tmp_path}/math').load().model.layers[0].mlp.up_proj.weight\n"
        "    return {'sum': (model.model.layers[0].mlp.up_proj.weight == w).float().mean().item()}\n"
    )
    generated: list[object] = []
    generate = GenerationMixin.generate
    monkeypatch.setattr(GenerationMixin, "generate", lambda *a, **k: generated.append(a) or generate(*a, **k))
    file = tmp_path / "answers" / "math.jsonl"
    runs, kept = f"{tmp_path}/math {tmp_path}/qa --data {tmp_path}/data.jsonl", f"--answers {file}"
    score = f"--evaluate {tmp_path}/answers_score.py:score --budgets 0.3"
    wrote, read = f"wrote the earlier model's answers: {file}", f"read the earlier model's answers: {file}"
    assert wrote not in surgery(f"select {runs} --selector D --dry-run {kept}")[1]
    assert not file.exists()  # a dry run writes nothing
    for name, command in (
        ("select", f"select {runs} --selector D --budget 0.3 -o {tmp_path}/m{{}}"),
        ("sweep", f"sweep {runs} {score} --selectors D:kl,A,D -o {tmp_path}/rows{{}}"),
        ("repair", f"repair {runs} {score} --units mlp --recovery 0.01 --rows {tmp_path}/repaired{{}}"),
        ("strengths", f"strengths {runs} --mask {tmp_path}/m -o {tmp_path}/s{{}} --passes 2"),
    ):
        assert not surgery(command.format(""))[0]
        if name != "strengths":  # in float32 the answers could be others
            file.unlink(missing_ok=True)
            code, out, err = surgery(f"{command.format(2)} {kept}")
            assert not code, err
            assert wrote in out
        before = len(generated)
        code, out, err = surgery(f"{command.format(3)} {kept}")
        assert not code, err
        assert read in out
        assert len(generated) == before
    for number in (2, 3):
        found, want = load_mask(tmp_path / f"m{number}"), load_mask(tmp_path / "m")
        assert found.equal(want)
        assert found.made_by == want.made_by
        for kind in ("rows", "repaired"):
            assert _rows(tmp_path / f"{kind}{number}") == _rows(tmp_path / kind)
    for kind in ("rows", "repaired"):
        plain, first, again = (_head(tmp_path / f"{kind}{number}") for number in ("", 2, 3))
        assert first == again
        assert {**first, "prompts": None} == {**plain, "prompts": None}  # a file knows whether prompts were answered
    (tmp_path / "labelled.jsonl").write_text('{"prompt": "2+1=", "response": "3"}\n')
    other = runs.replace("data.jsonl", "labelled.jsonl")
    for command, message in (
        (f"select {other} --selector D", "have responses: leave --answers out"),
        (f"select {runs} --selector M", "--answers: only D needs them, and the selector is M: take D"),
        (f"select {runs.replace('data.jsonl', 'x.jsonl')} --selector D", "there is no prompt file"),
    ):
        code, _, err = surgery(f"{command} --dry-run {kept}")
        assert code == 1
        assert message in err


def _rows(path: Path) -> list[dict[str, object]]:
    """What was measured; with --answers a selector by letters comes with the prompts alone, which its settings tell."""
    return [{**json.loads(line), "seconds": 0, "settings": None} for line in path.read_text().splitlines()[1:]]


def _head(path: Path) -> dict[str, object]:
    return dict(json.loads(path.read_text().splitlines()[0]))


def test_inspect_shows_slots_and_probes(surgery, tmp_path: Path) -> None:
    code, out, _ = surgery("inspect later --probe")
    assert code == 0
    assert "d n -> n d" in out
    assert "exactly the neuron's slices" in out


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("select base earlier later", 1, "name the file for the mask"),
        ("select base earlier later --selector AMC --dry-run", 1, "--selector AMC: A is measured on prompts of the da"),
        ("select base earlier later --selector AMC --dry-run", 1, "pass --data FILE"),
        ("select earlier later --dry-run", 1, "--selector D: D is measured on prompts"),
        ("select earlier later --selector D:kl --dry-run", 1, "pass --data FILE"),
        ("select earlier later --selector AMC --dry-run", 1, "give three, BASE EARLIER LATER, or a selector without C"),
        ("select earlier later --selector MC --dry-run", 1, "C needs the base checkpoint, and you gave two"),
        ("sweep earlier later --evaluate x.py:f --selectors M,AM", 1, "--selector AM: A is measured on prompts"),
        ("repair earlier later --data x --selector MC --units mlp", 1, "--selector MC: C needs the base checkpoint"),
        ("repair later --data x", 1, "expected [BASE] EARLIER LATER, got 1 checkpoints"),
        ("select earlier later --data x --selector D:foo --dry-run", 1, "--selector D:foo: expected D, D:kl, random"),
        ("select earlier later --data x --selector D:hellinger --dry-run", 1, "expected D, D:kl, random"),
        ("select earlier later --data x --selector D --units weight --how uniform --dry-run", 1, "leave --how out"),
        (
            "strengths earlier later --mask earlier/config.json --data x -o y --loss foo",
            1,
            "--loss foo: expected kl or hellinger",
        ),
        ("select base earlier later --selector A/M/C --dry-run", 1, "--selector A/M/C: expected D, D:kl, random"),
        ("select base earlier later --selector XY --dry-run", 1, "or some of the letters A, M and C"),
        ("select base earlier later --selector MC --budget 2 --dry-run", 1, "in [0, 1]"),
        ("select base earlier nowhere --selector MC --dry-run", 1, "there is no folder nowhere"),
        ("select base --selector MC --dry-run", 1, "expected [BASE] EARLIER LATER"),
        ("rollback later --to earlier --mask nothing -o x", 1, "there is no mask file"),
        ("rollback later -o x", 1, "name the earlier checkpoint with --to and a mask with --mask, or a patch"),
        ("rollback later --reverse --dry-run", 1, "--reverse takes a patch back: name it with --patch"),
        ("rollback later --patch nothing -o x", 1, "there is no patch in nothing"),
        ("rollback later --patch p --to earlier -o x", 1, "--patch holds all that is written: leave out --to"),
        ("patch later --to earlier --mask nothing -o x", 1, "there is no mask file"),
        ("patch later --to earlier", 2, "Missing option"),
        ("inspect later --nonsense", 2, "No such option"),
        ("inspect later --units weight", 1, "--units weight: single weights lie in units: inspect those, --units mlp"),
        ("inspect later --units mlp,weight", 1, "--units mlp,weight: single weights lie in units"),
        ("inspect later --units foo", 1, "--units foo: expected mlp, kv_group, value_channel, or two"),
        (
            "select earlier later --selector M --units foo,weight --dry-run",
            1,
            "--units foo,weight: expected mlp, kv_gr",
        ),
        ("sweep base earlier later --evaluate json:nothing --selectors M --budgets 0.1", 1, "has no attribute"),
        ("sweep base earlier later --evaluate json:dumps --selectors M --budgets few", 1, "is not a number"),
    ],
)
def test_errors_say_what_to_do(surgery, command: str, code: int, message: str) -> None:
    found = surgery(command)
    assert found[0] == code
    said = " ".join(found[2].split())
    assert message in said
    assert not [word for word in ("data=", "base=", "units=", "loss(", "Selector(") if word in said]  # not Python


def test_a_layout_of_ones_own(surgery, runs: Path, tmp_path: Path) -> None:
    save_file({"blocks.0.a": torch.randn(6, 4), "blocks.0.b": torch.randn(4, 6)}, runs / "x.safetensors")
    (runs / "odd").mkdir(exist_ok=True)
    (runs / "x.safetensors").rename(runs / "odd" / "model.safetensors")
    spec = {"blocks.{layer}": {"a": "n d -> n d", "b": "d n -> n d"}}
    (tmp_path / "layout.json").write_text(json.dumps(spec))
    assert surgery("inspect odd")[0] == 1
    code, out, _ = surgery(f"inspect odd --layout {tmp_path}/layout.json")
    assert code == 0
    assert "6 neurons in 1 blocks" in out


def test_select_says_where_d_promises_more_than_there_is(surgery, tmp_path: Path) -> None:
    """A small step of the neurons alone, so that all their D is about twice the loss."""
    three_stages(tmp_path, "qwen3")
    (tmp_path / "data.jsonl").write_text('{"prompt": "12+13=", "response": "25"}\n' * 3)
    run = Trajectory(earlier=tmp_path / "math", later=tmp_path / "qa")
    model = Trajectory(later=run.earlier).load()
    everything = Neurons({name: torch.ones(n, dtype=torch.bool) for name, n in find_layout(model).sizes.items()})
    with rollback(model, to=tmp_path / "qa", mask=everything, strength=0.3):
        model.save_pretrained(tmp_path / "near")  # type: ignore[operator]
    build_tokenizer().save_pretrained(tmp_path / "near")
    words = (
        f"select {tmp_path}/math {tmp_path}/near --data {tmp_path}/data.jsonl -o {tmp_path}/m --overwrite --selector"
    )
    for selector, budget, said in (("D", 0.01, False), ("D", 1, True), ("D:kl", 1, True), ("M", 1, False)):
        code, out, err = surgery(f"{words} {selector} --budget {budget}")
        assert not code, err
        assert ("which is all that can be won back" in out) is said
        if said:
            told = Neurons.load(tmp_path / "m").made_by["damage"]
            assert told["promised"] > told["loss"]
            unit = " nats" if selector == "D:kl" else ""
            assert f"their D adds up to {told['promised']:.3g}{unit}, more than the loss of {told['loss']:.3g}" in out


def test_single_weights_from_the_shell(surgery, tmp_path: Path) -> None:
    three_stages(tmp_path, "qwen3")  # with a tokenizer
    (tmp_path / "data.jsonl").write_text('{"prompt": "12+13=", "response": "25"}\n' * 3)
    words = f"select {tmp_path}/math {tmp_path}/qa --data {tmp_path}/data.jsonl --selector D --units weight"
    code, out, err = surgery(f"{words} --budget 0.01 -o {tmp_path}/m")
    assert not code, err
    mask = load_mask(tmp_path / "m")
    assert isinstance(mask, Entries)
    allowed, taken = round(0.01 * mask.total), sum(mask.count().values())
    assert 0 < taken <= allowed
    assert f"{allowed} weights allowed, {taken} taken" in out
    assert out.count("(kept)") == 1
    assert f"mask of {taken} of {mask.total} weights" in surgery(f"inspect {tmp_path}/m")[1]
    code, out, _ = surgery(f"rollback {tmp_path}/qa --to {tmp_path}/math --mask {tmp_path}/m -o {tmp_path}/healed")
    assert code == 0
    assert f"{taken} of {mask.total} weights" in out
    want = rolled_back(tmp_path / "qa", to=tmp_path / "math", mask=mask)
    healed = Checkpoint(tmp_path / "healed")
    assert all(torch.equal(healed[name], want[name]) for name in want)
    assert "D takes the best single weights of the whole model" in surgery(f"{words} --how uniform -o {tmp_path}/x")[2]
    assert not (tmp_path / "x").exists()


def test_single_weights_by_magnitude_from_the_shell(surgery, tmp_path: Path) -> None:
    three_stages(tmp_path, "qwen3")
    (tmp_path / "data.jsonl").write_text('{"prompt": "12+13=", "response": "25"}\n' * 3)
    (tmp_path / "letters_score.py").write_text(
        "from surgery import Trajectory\n"
        "def score(model):\n"
        f"    w = Trajectory(later='{tmp_path}/math').load().model.layers[0].mlp.up_proj.weight\n"
        "    return {'sum': (model.model.layers[0].mlp.up_proj.weight == w).float().mean().item(), 'other': 0.0}\n"
    )
    runs = f"{tmp_path}/base {tmp_path}/math {tmp_path}/qa --data {tmp_path}/data.jsonl --units weight"
    run, data = Trajectory(*(tmp_path / name for name in ("base", "math", "qa"))), tmp_path / "data.jsonl"
    for how in ("", " --how proportional"):
        code, out, err = surgery(f"select {runs} --selector M --budget 0.01 -o {tmp_path}/m --overwrite{how}")
        assert not code, err
        chosen = AMCSelector(0.01, "M", "M", how.rpartition(" ")[2] or "global", "weight")
        want = chosen.select(run, load_prompts(data, tmp_path / "qa"))
        assert load_mask(tmp_path / "m").equal(want)
        allowed = round(0.01 * want.total)
        assert f"{allowed} weights allowed, {allowed} taken" in out
    score = f"--evaluate {tmp_path}/letters_score.py:score --metric sum --budgets 0.01,0.1"
    table = surgery(f"sweep {runs} {score} --selectors M,D")[1]
    assert "M of single weights" in table
    assert "D of single weights" in table
    code, out, err = surgery(f"repair {runs} {score} --selector M --recovery 0.01")
    assert not code, err
    assert "M of single weights" in out
    for text, chosen in (
        ("random", RandomSelector(0.01, 3, "weight")),
        ("M/M", AMCSelector(0.01, "M", "M", "global", "weight")),
    ):
        words = f"select {runs} --selector {text} --seed 3 --budget 0.01 -o {tmp_path}/m --overwrite"
        assert "weights allowed" in surgery(words)[1]
        assert load_mask(tmp_path / "m").equal(chosen.select(run, load_prompts(data, tmp_path / "qa")))
    table = surgery(f"sweep {runs} {score} --selectors random,D")[1]
    assert "random of single weights" in table
    assert "ceiling (all units (neurons and KV groups))" in table
    theirs, own = runs.replace("--units weight", "--units weight,mlp"), ("weight", "mlp")
    for text, chosen in (
        ("random", RandomSelector(0.01, 3, own)),
        ("D", DamageSelector(0.01, units=own)),
    ):
        words = f"select {theirs} --selector {text} --seed 3 --budget 0.01 -o {tmp_path}/m --overwrite"
        assert "weights allowed" in surgery(words)[1]
        assert load_mask(tmp_path / "m").equal(chosen.select(run, load_prompts(data, tmp_path / "qa")))
    for text in ("AMC", "M/AMC", "C"):
        assert "take --selector D or M" in surgery(f"select {runs} --selector {text} --dry-run")[2]
    table = surgery(f"sweep {theirs} {score} --selectors M")[1]
    assert "M of single weights of neurons" in table
    assert "ceiling (all MLP neurons)" in table


def test_strengths_from_the_shell(surgery, tmp_path: Path) -> None:
    three_stages(tmp_path, "qwen3")
    (tmp_path / "data.jsonl").write_text('{"prompt": "12+13=", "response": "25"}\n' * 3)
    run = Trajectory(earlier=tmp_path / "math", later=tmp_path / "qa")
    mask = RandomSelector(0.1).select(run)
    mask.save(tmp_path / "m")
    words = f"strengths {tmp_path}/math {tmp_path}/qa --mask {tmp_path}/m --data {tmp_path}/data.jsonl -o {tmp_path}/s"
    code, out, err = surgery(f"{words} --passes 4")
    assert not code, err
    run.load(dtype=torch.float32)
    found = strengths(run, load_prompts(tmp_path / "data.jsonl", tmp_path / "qa"), mask, passes=4)
    assert Neurons.load(tmp_path / "s").equal(found)
    assert f"{found.made_by['strengths']['least']:.5g} with these strengths" in out
    assert "exists: choose another file" in surgery(words)[2]
    for strength, value in ((tmp_path / "s", found), ("1.5", 1.5)):
        healing = f"rollback {tmp_path}/qa --to {tmp_path}/math --mask {tmp_path}/m -o {tmp_path}/healed --overwrite"
        code, out, err = surgery(f"{healing} --strength {strength}")
        assert not code, err
        assert "strength" in out
        want, healed = (
            rolled_back(run.later, to=run.earlier, mask=mask, strength=value),
            Checkpoint(tmp_path / "healed"),
        )
        assert all(torch.equal(healed[name], want[name]) for name in want)
    assert "expected a number, or a file" in surgery(f"{healing} --strength much")[2]
    assert "expected a number in [0, 3]" in surgery(f"{healing} --strength 4")[2]
