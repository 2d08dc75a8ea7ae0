"""The laws of models that several processes hold together; each process runs all of them (tests/sharded.py)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import adapted
import families
import pytest
import sharded
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from mutants import Mutant
from small_lab import SEED0, copy_seed0
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from surgery import (
    AMCSelector,
    Checkpoint,
    DamageSelector,
    Entries,
    Neurons,
    RandomSelector,
    Trajectory,
    activation,
    analyse,
    conflict,
    damage,
    likelihood,
    magnitude,
    refresh,
    repair,
    rollback,
    rolled_back,
    strengths,
    sweep,
)
from surgery.cli import main
from surgery.cli.options import out
from surgery.evidence import changes, directions, gradients
from surgery.layout import sharding
from surgery.layout.boxes import Boxes
from surgery.layout.finding import find_layout
from surgery.live.losses import cross_entropy
from surgery.masks.edits import Numbers, Rows
from surgery.masks.entries import shapes_of
from surgery.masks.mask import load_mask
from surgery.measure import history, load_sweep, stability, stage_damage
from surgery.reverting.patch import Patch
from surgery.reverting.patch_writing import save_patch
from surgery.scores import entry_gains, lots, reversal_cost
from surgery.scores.damage import earlier_answers
from surgery.theory import Landscape

operators = import_module("surgery.reverting.rollback")
writing = import_module("surgery.reverting.writing")


def numbers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter, whole."""
    from surgery.layout.sharding import is_sharded, stored

    held = stored(model).named_parameters()
    return {n: (together(p) if is_sharded(p) else p).detach().clone() for n, p in held}


def together(p: Any) -> torch.Tensor:
    """All numbers of a sharded parameter; torch 2.11 can't put those together that lie in strides."""
    try:
        whole: torch.Tensor = p.full_tensor()
        return whole
    except ValueError:
        (how,), own = p.placements, p.to_local()
        every = [torch.empty_like(own) for _ in range(p.device_mesh.size())]
        torch.distributed.all_gather(every, own.contiguous(), group=p.device_mesh.get_group())
        cut = [one.chunk(how.split_factor, how.dim) for one in every]
        return torch.cat([part for parts in zip(*cut, strict=True) for part in parts], how.dim)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def some_units(model: nn.Module, units: object, seed: int = 0) -> Neurons:
    draw = torch.Generator().manual_seed(seed)
    sizes = find_layout(model, units=units).sizes
    return Neurons({name: torch.rand(size, generator=draw) < 0.3 for name, size in sizes.items()})


def some_weights(model: nn.Module, units: object) -> Entries:
    draw, shapes = torch.Generator().manual_seed(1), shapes_of(find_layout(model, units=units))
    found = {part: (torch.rand(n * w, generator=draw) < 0.1).nonzero().flatten() for part, (n, w) in shapes.items()}
    return Entries(found, shapes=shapes)


def law_rollback(home: Path, family: str, how: str) -> None:
    """Weights bit for bit as in one process, undo the identity, and each process reads only its own rows of ``to``."""
    earlier, later = sharded.folders(home, family)
    model, alone = sharded.sharded(later, how), sharded.one(later)
    before = numbers(alone)
    assert same(numbers(model), before)
    read, asked = [0], {kind: kind.read for kind in (Rows, Numbers)}

    def counting(self, source):
        found = asked[type(self)](self, source)
        read[0] += found.numel()
        return found

    both = ("mlp", "kv_group")
    for mask in (
        some_units(alone, "mlp"),
        some_units(alone, both),
        some_weights(alone, both),
        some_units(alone, "value_channel"),
    ):
        for strength in (1.0, 0.5):
            reference = rollback(alone, to=earlier, mask=mask, strength=strength)
            read[0] = 0
            with pytest.MonkeyPatch.context() as patch:
                for kind in asked:
                    patch.setattr(kind, "read", counting)
                done = rollback(model, to=earlier, mask=mask, strength=strength)
            total = torch.tensor(read[0])
            dist.all_reduce(total)
            assert same(numbers(model), numbers(alone)), (mask.units, strength)
            assert (done.neurons, done.parameters, done.tensors, done.changed) == (
                reference.neurons, reference.parameters, reference.tensors, reference.changed,
            )  # fmt: skip
            copies = family == "qwen2_moe" and how != "fsdp"  # of its shared expert, which each process reads
            assert (
                int(total) >= sum(done.parameters.values()) if copies else int(total) == sum(done.parameters.values())
            )
            assert read[0] < int(total)
            with torch.no_grad():  # a forward pass leaves parameters gathered
                model(input_ids=torch.arange(4, 10)[None])
            done.undo()
            reference.undo()
            assert same(numbers(model), before)
            assert same(numbers(alone), before)


def prompts(labels: bool = True) -> list[dict[str, torch.Tensor]]:
    draw, found = torch.Generator().manual_seed(5), []
    for _ in range(3):
        ids = torch.randint(3, 60, (8, 10), generator=draw)
        mask = torch.ones_like(ids)
        mask[0, 8:] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        marks = torch.where(mask.bool() & (torch.arange(10) > 4), ids, -100)
        found.append({**batch, "labels": marks} if labels else batch)
    return found


def close(one: Neurons, other: Neurons) -> None:
    assert one.sizes == other.sizes
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-6 * float(other[name].abs().max()))
        assert torch.equal(one.available(name), other.available(name))


def everywhere(mask: Neurons | Entries) -> bool:
    """Whether every process has the same mask."""
    mine = {name: value.tolist() for name, value in mask.items()}
    held: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(held, mine)
    return all(one == mine for one in held)


def runs(home: Path, family: str, how: str) -> tuple[Trajectory, Trajectory]:
    """The same trajectory with a sharded live later model and with one in this process."""
    earlier, later = sharded.folders(home, family)
    return (
        Trajectory(earlier=earlier, later=sharded.sharded(later, how)),
        Trajectory(earlier=earlier, later=sharded.one(later)),
    )


def law_scores(home: Path, family: str, how: str) -> None:
    """A and D are those of one process to 1e-6; the masks that follow are the same, on every process."""
    run, alone = runs(home, family, how)
    before, data = numbers(run.load()), prompts()
    for units in ("mlp", ("mlp", "kv_group"), "value_channel"):
        layouts = [find_layout(one.load(), units=units) for one in (run, alone)]
        close(*(activation(one.load(), data, layout=found) for one, found in zip((run, alone), layouts, strict=True)))
        close(*(damage(one, data, units=units) for one in (run, alone)))
    close(*(reversal_cost(one, data) for one in (run, alone)))
    for selector in (DamageSelector(0.1), DamageSelector(0.1, units="mlp", protect={"other": data[:1]}, weight=0.3)):
        mask = selector.select(run, data)
        assert mask.equal(selector.select(alone, data))
        assert everywhere(mask)
    assert same(numbers(run.load()), before)


def law_amc(home: Path, family: str, how: str) -> None:
    """M, C and what the paper's selector makes of them and A are those of one process, for a live later model."""
    earlier, later = sharded.folders(home, family)
    base = families.build(family, seed=2)
    found = sharded.sharded(later, how), sharded.one(later)
    run, alone = (Trajectory(base=base, earlier=earlier, later=one) for one in found)
    data = prompts()
    for units in ("mlp", ("mlp", "kv_group"), "value_channel"):
        close(magnitude(run, units=units), magnitude(alone, units=units))
        one, other = (conflict(each, units=units) for each in (run, alone))
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6)
    for letters, budget, units in (("AMC", 0.2, "mlp"), ("MC", 0.1, ("mlp", "value_channel")), ("M", 0.3, "mlp")):
        selector = AMCSelector(budget, letters, letters, units=units)
        mask = selector.select(run, data)
        assert mask.equal(selector.select(alone, data))
        assert everywhere(mask)


def law_weights(home: Path, family: str, how: str) -> None:
    """Single weights by D: the same ones in the same order as in one process, on every process."""
    run, alone = runs(home, family, how)
    before, data = numbers(run.load()), prompts()
    gains, reference = (entry_gains(one, data, units=("mlp", "kv_group")) for one in (run, alone))
    for count in (0, 1, 100, 10**7):
        found, wanted = gains.best(count), reference.best(count)
        assert found.equal(wanted) or (
            count > 100 and len(found) == len(wanted) and set(found.tolist()) == set(wanted.tolist())
        )
    for rounds, drop in (2, lots.DROP), (3, 3.0), (4, 1e-6):  # and where a bar is too high, and where it is too low
        selector = DamageSelector(0.003, units="weight", rounds=rounds)
        with pytest.MonkeyPatch.context() as patch:
            for name, size in (
                ("DROP", drop),
                *((("SMALL", 5), ("MOST", 1 / 20), ("STEP", 1 / 25)) if rounds > 2 else ()),
            ):
                patch.setattr(lots, name, size)
            mask = selector.select(run, data)
        assert mask.equal(selector.select(alone, data))
        assert everywhere(mask)
        assert same(numbers(run.load()), before)
    with pytest.MonkeyPatch.context() as patch:  # one process has looked at all it has before the others have
        patch.setattr(lots, "SMALL", 5)
        given = {"loss": cross_entropy, "units": ("mlp", "kv_group"), "without": torch.zeros(0, dtype=torch.int64)}
        mine, its = (lots.best_of_lots(one, [data[:1], data[1:2]], 10**7, **given).chosen for one in (run, alone))
    assert len(mine) == len(its)
    assert set(mine.tolist()) == set(its.tolist())


def law_measured(home: Path, family: str, how: str) -> None:
    """A sweep and a repair give what they give in one process; the first process alone writes, and rows are resumed."""
    run, alone = runs(home, family, how)
    before, data, path = numbers(run.load()), prompts(), home / f"{family} {how}.jsonl"
    asked = {"selectors": [DamageSelector(0.1)], "budgets": [0.05, 0.3], "evaluate": likelihood({"a": data})}
    found, wanted = sweep(run, data, path=path, **asked), sweep(alone, data, **asked)
    for row, other in zip(found, wanted, strict=True):
        assert (row.selector, row.budget, row.neurons) == (other.selector, other.budget, other.neurons)
        assert abs(row.metrics["a"] - other.metrics["a"]) < 1e-5
    dist.barrier()
    written = path.read_text()
    assert len(written.splitlines()) == len(found) + 1
    again = sweep(run, data, path=path, **asked)
    assert [row.metrics for row in again] == [row.metrics for row in found]
    dist.barrier()
    assert path.read_text() == written
    one, other = (
        repair(each, data, keep={"b": data[1:]}, limit=9, budgets=[0.02, 0.5], selector=DamageSelector(0.1))
        for each in (run, alone)
    )
    assert one.outcome == other.outcome
    assert (one.mask is None) == (other.mask is None)
    assert one.mask is None or (one.mask.equal(other.mask) and everywhere(one.mask))
    assert same(numbers(run.load()), before)


def law_answers(home: Path, family: str, how: str) -> None:
    """Prompts without responses are answered by the earlier model in the sharded one's place, as in one process."""
    run, alone = runs(home, family, how)
    before, data = numbers(run.load()), prompts(labels=False)
    found, wanted = (earlier_answers(each, data, home / f"{at} {how}.jsonl") for at, each in enumerate((run, alone)))
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert same(numbers(run.load()), before)


def shell(home: Path, words: str, together: bool) -> None:
    """A command of the shell, in the folder of the lab, by all processes together or by this one alone."""
    told = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": dist.get_world_size()}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home / "lab")
        patch.setattr(sys, "argv", ["surgery", *words.split()])
        patch.setattr(out, "quiet", False)
        for name, value in told.items() if together else ():
            patch.setenv(name, str(value))
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code, stopped.value.code


def law_shell(home: Path, how: str) -> None:
    """sweep and repair in the shell: the rows, the mask and every byte of the weights are those of one process."""
    if dist.get_rank() == 0 and not (home / "lab").exists():
        copy_seed0(home / "lab", evaluation=8, calibration=32)
        (home / "lab/loss.py").write_text(LOSS)
    dist.barrier()
    words = "--data data/math.calibration.jsonl --dtype float32 --batch-size 8"
    asked = {
        "sweep": f"sweep base math qa {words} --selectors D,AMC,random --budgets 0.05,0.2 --evaluate loss.py:loss",
        "repair": f"repair math qa {words} --keep qa=data/qa.calibration.jsonl --recovery 0.3 --limit 1 "
        "--units mlp --budgets 0.02,0.1",
    }
    for command, line in asked.items():
        rows, folder = {"sweep": ("-o", ""), "repair": ("--rows", "-o {}.out")}[command]
        both = f"{command}-{how}", f"{command}-{how}-alone"
        shell(home, f"{line} {rows} {both[0]}.jsonl {folder.format(both[0])} --shard {how}", True)
        if dist.get_rank() == 0:
            shell(home, f"{line} {rows} {both[1]}.jsonl {folder.format(both[1])}", False)
        dist.barrier()
        one, other = (load_sweep(home / "lab" / f"{name}.jsonl") for name in both)
        for row, alone in zip(one, other, strict=True):
            assert (row.selector, row.budget, row.neurons) == (alone.selector, alone.budget, alone.neurons)
            for metric, value in alone.metrics.items():
                assert abs(row.metrics[metric] - value) < 1e-5
    one, other = (home / "lab" / f"{name}.out" for name in both)
    assert load_mask(one / "surgery/mask.safetensors").equal(load_mask(other / "surgery/mask.safetensors"))
    files = sorted(path.name for path in other.iterdir() if path.is_file())
    assert sorted(path.name for path in one.iterdir() if path.is_file()) == files
    for name in set(files) - {"surgery.json", "README.md"}:  # the sums of scores that they tell are added in parts
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


LOSS = """
from surgery import likelihood, load_prompts

loss = likelihood({name: load_prompts(f"data/{name}.evaluation.jsonl", "qa") for name in ("math", "qa")})
"""


def wrong_rows(patch: pytest.MonkeyPatch) -> None:
    """Each process takes another's rows for its own."""

    def mutant(tensor: Any, dim: int, original: Any = sharding._indices) -> torch.Tensor:
        found = original(tensor, dim)
        return (found + len(found)) % tensor.shape[dim] if len(found) < tensor.shape[dim] else found

    patch.setattr(sharding, "_indices", mutant)


def index_copy(patch: pytest.MonkeyPatch) -> None:
    """Rows are written by ``DTensor.index_copy_``, which corrupts without a word."""

    def mutant(tensor: Any, edit: Any, rows: torch.Tensor, original: Any = writing.write) -> None:
        if edit.slot.part != "gate" or not sharding.is_sharded(tensor) or not hasattr(edit, "offsets"):
            return original(tensor, edit, rows)
        ranks, whole = sharding.ranks_among([tensor]), [Replicate()] * tensor.device_mesh.ndim
        index, flat = ranks.gathered(edit.index), ranks.gathered(rows.flatten())
        given = (DTensor.from_local(one, tensor.device_mesh, whole) for one in (index, flat.view(len(index), -1)))
        try:
            with torch.no_grad():
                tensor.index_copy_(0, *given)
        except NotImplementedError:  # torch 2.11 does not do it at all
            original(tensor, edit, torch.zeros_like(rows))

    patch.setattr(operators, "write", mutant)
    patch.setattr(writing, "write", mutant)


def counted_twice(patch: pytest.MonkeyPatch) -> None:
    """Every process counts the numbers of which all have a copy."""
    patch.setattr(sharding.Ranks, "counts", lambda *_: True)


def own_part_alone(patch: pytest.MonkeyPatch) -> None:
    """No process adds what the others found."""
    patch.setattr(sharding.Ranks, "sums", lambda self, found: dict(found))


def law_mutants(home: Path, mutant: Mutant, law: Callable[[Path], None]) -> None:
    """A law notices a mutant, on every process, by an assertion."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "_owned", WeakKeyDictionary())
        mutant(patch)
        with pytest.raises(AssertionError):
            law(home)


def law_patch(home: Path, family: str, how: str) -> None:
    """A patch flips each process's own bits, and back; one for another model is refused before anything is written."""
    earlier, later = sharded.folders(home, family)
    model, alone = sharded.sharded(later, how), sharded.one(later)
    before, place = numbers(alone), home / f"patch, {family}, {how}"
    if dist.get_rank() == 0:
        save_patch(rolled_back(later, to=earlier, mask=some_units(alone, ("mlp", "kv_group"))), place)
    dist.barrier()
    done, wanted = Patch(place).apply(model), Patch(place).apply(alone)
    assert same(numbers(model), numbers(alone))
    assert not same(numbers(model), before)
    assert (done.parameters, done.changed) == (wanted.parameters, wanted.changed)
    with pytest.raises(ValueError, match="applied already"):
        Patch(place).apply(model)
    back = Patch(place).apply(model, reverse=True)
    assert same(numbers(model), before)
    back.undo()
    done.undo()
    assert same(numbers(model), before)
    with pytest.raises(ValueError, match="is not applied"):
        Patch(place).apply(model, reverse=True)
    assert same(numbers(model), before)


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).loss


ALIKE: dict[str, Callable[[Trajectory], Any]] = {  # what a sharded model gives as one process does
    "random": lambda run: RandomSelector(0.1).select(run),
    "random weights": lambda run: RandomSelector(0.01, units="weight").select(run),
    "stability": lambda run: stability(run, prompts(), DamageSelector(0.1, units="mlp"), sizes=(4, 8), draws=2),
    "history": lambda run: history(run, likelihood({"a": prompts()})),
    "stage": lambda run: (
        stage_damage(run, {"a": prompts()}, selector=DamageSelector(0.1, units="mlp"), budgets=[0.1]).verdict
    ),
}
REFUSED: dict[str, Callable[[Trajectory, Neurons], Any]] = {
    "strengths": lambda run, mask: strengths(run, prompts(), mask, passes=2),
    "M of single weights": lambda run, mask: AMCSelector(0.01, "M", "M", units="weight").select(run),
    "refresh": lambda run, mask: refresh(run.load(), loss, prompts(), 1, 1e-3, mask),
    "refresh of all": lambda run, mask: refresh(run.load(), loss, prompts(), 1, 1e-3),
    "rolled_back": lambda run, mask: rolled_back(run.later, to=run.earlier, mask=mask),
    "changes": lambda run, mask: changes(run),
    "directions": lambda run, mask: directions(Trajectory(run.earlier, run.earlier, run.later), permutations=2),
    "gradients": lambda run, mask: gradients(run.load(), {"a": prompts(), "b": prompts()[:1]}),
    "landscape": lambda run, mask: Landscape.around(run, prompts()),
    "landscape there": lambda run, mask: Landscape.around(Trajectory(earlier=run.later, later=run.earlier), prompts()),
    "analyse": lambda run, mask: analyse(run, {"a": prompts()}),
    "back to it": lambda run, mask: rollback(sharded.one(run.earlier), to=run.later, mask=mask),
    "D of it": lambda run, mask: damage(Trajectory(earlier=run.later, later=sharded.one(run.earlier)), prompts()),
}


def law_verbs(home: Path, how: str) -> None:
    """Every other verb gives what it gives in one process, or is refused in one sentence, on every process alike."""
    run, alone = runs(home, "qwen3", how)
    before, sizes = numbers(run.load()), find_layout(alone.load()).sizes
    one_alone = Neurons({name: torch.arange(size) == 0 for name, size in sizes.items()})  # the first process holds it
    for name, verb in ALIKE.items():
        found, wanted = str(verb(run)), str(verb(alone))
        assert found == wanted, name
    both = Trajectory(earlier=sharded.sharded(Path(str(run.earlier)), how), later=run.later)
    found, wanted = (DamageSelector(0.1, units="mlp").select(one, prompts()) for one in (both, alone))
    assert found.equal(wanted), "an earlier model that is sharded alike"
    for name, verb in REFUSED.items():
        with pytest.raises(ValueError, match="is sharded over") as refused:
            verb(run, one_alone)
        assert "one process" in str(refused.value), name
        assert same(numbers(run.load()), before), name


def law_loaded(home: Path, form: str, how: str) -> None:
    """Rank files, a distributed checkpoint and an adapter are read into a sharded model as into one process."""
    earlier, later = sharded.folders(home, "qwen3_moe")
    place, rank, world = home / f"loaded {form}", dist.get_rank(), dist.get_world_size()
    made = place.exists()
    dist.barrier()
    if form == "adapter" and rank == 0 and not made:
        adapted.adapter(adapted.KINDS["experts on disk one by one"], earlier, place, 1)
    elif form != "adapter" and not made:
        model = sharded.sharded(later, "fsdp")
        model.config.save_pretrained(place)
        if form == "ranks":
            torch.save(model.state_dict(), place / f"model_world_size_{world}_rank_{rank}.pt")
        else:
            dcp.save({"model": model.state_dict()}, checkpoint_id=place)
    dist.barrier()
    source = Checkpoint(place, *[earlier] * (form == "adapter"))
    run, alone = (Trajectory(earlier=earlier, later=source) for _ in range(2))
    read, cut = [0], Boxes.cut

    def counted(self, box):
        found = cut(self, box)
        read[0] += found.numel()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(world))
        patch.setattr(Boxes, "cut", counted)
        model = run.load(shard=how)
    wanted = numbers(alone.load())
    assert same(numbers(model), wanted)
    assert form == "adapter" or 0 < read[0] < sum(one.numel() for one in wanted.values())
    mask = DamageSelector(0.1, units="mlp").select(run, prompts())
    assert mask.equal(DamageSelector(0.1, units="mlp").select(alone, prompts()))
    assert everywhere(mask)


KINDS = (("rollback", law_rollback), ("scores", law_scores), ("amc", law_amc), ("weights", law_weights))


def laws(*hows: str) -> dict[str, Callable[[Path], None]]:
    return {
        f"{name}, {family}, {how}": partial(law, family=family, how=how)
        for how in hows
        for family in sharded.FAMILIES
        for name, law in KINDS
    }


LAWS, LAWS_OF_FOUR = laws("fsdp", "tp"), laws("fsdp", "fsdp x tp")
for family in ("qwen3", "phi3"):  # four processes run them with FSDP and tensor parallelism
    del LAWS[f"weights, {family}, tp"]
for one in ("amc, phi3, fsdp", "amc, qwen3, tp"):  # and these
    del LAWS[one]
for family, how in (("qwen3", "fsdp"), ("phi3", "tp"), ("qwen3_moe", "fsdp"), ("qwen3_moe", "tp"), ("qwen2_moe", "tp")):
    LAWS[f"patch, {family}, {how}"] = partial(law_patch, family=family, how=how)
LAWS_OF_FOUR["patch, qwen3, fsdp x tp"] = partial(law_patch, family="qwen3", how="fsdp x tp")
for how in ("fsdp", "tp"):  # biases in attention and MLPs
    LAWS[f"rollback, llama, {how}"] = partial(law_rollback, family="llama", how=how)
    LAWS[f"scores, llama, {how}"] = partial(law_scores, family="llama", how=how)
for name, law in KINDS:  # its shared expert is not sharded: every process has all of it
    LAWS[f"{name}, qwen2_moe, tp"] = partial(law, family="qwen2_moe", how="tp")
    LAWS_OF_FOUR[f"{name}, qwen2_moe, fsdp x tp"] = partial(law, family="qwen2_moe", how="fsdp x tp")
LAWS["weights, gpt_oss, tp"] = partial(law_weights, family="gpt_oss", how="tp")
for name, law in (("measured", law_measured), ("answers", law_answers)):
    LAWS |= {f"{name}, qwen3, {how}": partial(law, family="qwen3", how=how) for how in ("fsdp", "tp")}
LAWS |= {
    f"loaded, {form}, {how}": partial(law_loaded, form=form, how=how)
    for form, how in (("ranks", "fsdp"), ("ranks", "tp"), ("distributed", "fsdp"), ("adapter", "tp"))
}
for how in ("fsdp", "tp") if SEED0.is_dir() else ():
    LAWS[f"shell, lab, {how}"] = partial(law_shell, how=how)
LAWS |= {f"verbs, qwen3, {how}": partial(law_verbs, how=how) for how in ("fsdp", "tp")}
MUTANTS = (
    (wrong_rows, "rollback, qwen3, fsdp"),
    (wrong_rows, "amc, qwen3_moe, fsdp"),
    (index_copy, "rollback, qwen3, fsdp"),
    (counted_twice, "scores, qwen2_moe, tp"),
    (own_part_alone, "amc, qwen3, fsdp"),
)
LAWS |= {f"mutant {one.__name__} of {law}": partial(law_mutants, mutant=one, law=LAWS[law]) for one, law in MUTANTS}
