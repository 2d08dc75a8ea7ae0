"""Training checkpoints of real FSDP2 with gloo processes: read, rolled back and loaded again by torch itself."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_folders import KINDS, STAGES, as_ranks, model_of, written

from surgery import Checkpoint, Neurons, Patch, RandomSelector, Trajectory, rolled_back, save, save_patch
from surgery.checkpoints.opening import open_weights
from surgery.cli import app
from surgery.formats import ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # torch's own reader says so
FORMS = ("ranks", "dcp", "accelerate", "cut")
LOW_BITS, RESUMED = "low bits", "would push the reverted weights back"


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("training"), request.param)


def halves(kind: str, home: Path) -> Neurons:
    """A mask of half of the neurons, chosen at random on the plain folders."""
    run = Trajectory(earlier=home / kind / "earlier" / "plain", later=home / kind / "later" / "plain")
    return RandomSelector(0.5, units="mlp").select(run)


def healed(kind: str, home: Path, form: str, out: Path, to: str | None = None, **options: Any) -> Path:
    view = rolled_back(home / kind / "later" / form, to=home / kind / "earlier" / (to or form), mask=halves(kind, home))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*{RESUMED}.*")
        return save(view, out, **options)


def in_memory(kind: str, home: Path, folder: Path) -> dict[str, Tensor]:
    """A plain folder as its model's state dict, by transformers itself."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def merged(folder: Path) -> dict[str, Tensor]:
    """The ranks' tensors as the trainers' documentation describes them: rows of each rank, one after the other."""
    files = sorted(folder.glob("model_world_size_*_rank_*.pt"), key=lambda path: int(path.stem.rpartition("_")[2]))
    parts = [torch.load(path, weights_only=True) for path in files]
    return {name: torch.cat([part[name].to_local() for part in parts]) for name in parts[0]}


def loaded(folder: Path, form: str, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """What torch itself reads of a checkpoint."""
    import torch.distributed.checkpoint as dcp

    if form == "ranks":
        return merged(folder)
    empty = {name: torch.empty_like(tensor) for name, tensor in like.items()}
    if form == "cut":
        from torch.distributed.checkpoint import HuggingFaceStorageReader

        dcp.load(empty, storage_reader=HuggingFaceStorageReader(path=str(folder)), no_dist=True)
        return empty
    nested: dict[str, Any] = {"app": {"model": empty}} if form == "dcp" else {"model": empty}
    dcp.load(nested, checkpoint_id=folder / ("pytorch_model_fsdp_0" if form == "accelerate" else ""), no_dist=True)
    return empty


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_read_as_the_model_that_was_saved(home: Path, kind: str, form: str) -> None:
    whole = model_of(kind, "later").state_dict()
    found = Checkpoint(home / kind / "later" / form)
    tied = {"lm_head.weight"} if kind == "llama" and form == "cut" else set()
    assert set(found) == set(whole) - tied
    assert all(torch.equal(found[name], whole[name]) for name in found)
    assert found.shapes == {name: tuple(whole[name].shape) for name in found}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_rollback_equals_that_of_the_plain_folder_as_torch_reads_it(
    home: Path, kind: str, form: str, tmp_path: Path
) -> None:
    expected = in_memory(kind, home, healed(kind, home, "plain", tmp_path / "plain"))
    later = in_memory(kind, home, home / kind / "later" / "plain")
    assert any(not torch.equal(expected[name], later[name]) for name in expected)
    found = loaded(
        healed(kind, home, form, tmp_path / form), form, {} if form == "ranks" else cut(expected, kind, form)
    )
    assert found
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.filterwarnings(f"ignore:.*{RESUMED}", "ignore:left out")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_patch_makes_the_same_files_and_is_taken_back(home: Path, kind: str, form: str, tmp_path: Path) -> None:
    later = home / kind / "later" / form
    view = rolled_back(later, to=home / kind / "earlier" / form, mask=halves(kind, home))
    expected = save(view, tmp_path / "healed")
    patch = Patch(save_patch(view, tmp_path / "patch"))
    out = save(patch.applied(later), tmp_path / "out")
    back = save(patch.applied(out, reverse=True), tmp_path / "back")
    files = Checkpoint(later).files
    for file in files:
        assert (out / file).read_bytes() == (expected / file).read_bytes()
        assert (back / file).read_bytes() == (later / file).read_bytes()
    changed = [file for file in files if (out / file).read_bytes() != (later / file).read_bytes()]
    assert len(changed) >= min(len(files), 3)  # the fourth of four ranks holds none of three experts


def test_a_patch_resets_the_optimizer_where_it_changes_weights(home: Path, tmp_path: Path) -> None:
    later = home / "llama/later/ranks"
    view = rolled_back(later, to=home / "llama/earlier/ranks", mask=halves("llama", home))
    patch = Patch(save_patch(view, tmp_path / "patch"))
    assert patch.numbers == view.parameters
    expected = save(view, tmp_path / "healed", reset_optimizer=True)
    out = save(patch.applied(later), tmp_path / "out", reset_optimizer=True)
    for path in out.glob("*.pt"):
        assert path.read_bytes() == (expected / path.name).read_bytes()


def cut(state: dict[str, Tensor], kind: str, form: str) -> dict[str, Tensor]:
    return {name: one for name, one in state.items() if not (form == "cut" and kind == "llama" and "lm_head" in name)}


def different(one: Path, other: Path) -> dict[str, int]:
    """File → how many bytes differ; every file of the first has to be in the second, of the same size."""
    found = {}
    for path in sorted(one.rglob("*")):
        if path.is_file():
            old, new = path.read_bytes(), (other / path.relative_to(one)).read_bytes()
            assert len(old) == len(new), path
            if count := sum(a != b for a, b in zip(old, new, strict=True)):
                found[str(path.relative_to(one))] = count
    return found


@pytest.mark.parametrize("form", ["ranks", "dcp", "accelerate"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_byte_outside_the_patch_differs(home: Path, kind: str, form: str, tmp_path: Path) -> None:
    later = home / kind / "later" / form
    view = rolled_back(later, to=home / kind / "earlier" / form, mask=halves(kind, home))
    out = healed(kind, home, form, tmp_path / "out")
    changed = different(later, out)
    copies = sum(
        int((view[name] != Checkpoint(later)[name]).sum())
        for name in {n for f in view.stored.files for n in view.touched(f)}
    )
    assert set(changed) <= set(view.stored.files)
    assert copies < sum(changed.values()) <= 4 * copies
    assert {path.name for path in out.iterdir()} - {path.name for path in later.iterdir()} == {
        "surgery", "surgery.json", "README.md",
    }  # fmt: skip


def states(kind: str, folder: Path, form: str) -> dict[str, Tensor]:
    """The optimizer's moments by name, as torch reads them."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import FileSystemReader

    if form == "ranks":
        names = [n for n in merged(folder) if n != "lm_head.weight" or kind != "llama"]
        files = sorted(folder.glob("optim_world_size_*_rank_*.pt"), key=lambda path: int(path.stem.rpartition("_")[2]))
        parts = [torch.load(path, weights_only=True)["state"] for path in files]
        return {
            f"{name}.{key}": torch.cat([part[number][key].to_local() for part in parts])
            for number, name in enumerate(names)
            for key in ("exp_avg", "exp_avg_sq")
        }
    place = folder / ("optimizer_0" if form == "accelerate" else "")
    told = FileSystemReader(place).read_metadata()
    flat = {}
    for name, entry in told.state_dict_metadata.items():
        if name.endswith((".exp_avg", ".exp_avg_sq")):
            flat[name] = torch.empty(entry.size)
    dcp.load(flat, checkpoint_id=place, no_dist=True)
    return {name.split("state.", 1)[1]: tensor for name, tensor in flat.items()}


@pytest.mark.parametrize("form", ["ranks", "dcp", "accelerate"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_optimizer_is_reset_exactly_where_weights_were_reverted(
    home: Path, kind: str, form: str, tmp_path: Path
) -> None:
    later, mask = home / kind / "later" / form, halves(kind, home)
    before = states(kind, later, form)
    after = states(kind, healed(kind, home, form, tmp_path / "out", reset_optimizer=True), form)
    zeros = {name: torch.zeros(tensor.shape) for name, tensor in Checkpoint(later).items()}
    ones = {name: torch.ones_like(tensor) for name, tensor in zeros.items()}
    expected = rolled_back(zeros, to=ones, mask=mask, layout=open_weights(later).layout)
    assert set(before) == set(after)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for name, tensor in before.items():
        reverted = expected[name.rpartition(".")[0]].bool()
        assert torch.equal(after[name], torch.where(reverted, 0.0, tensor)), name


def test_what_a_resumed_run_would_do_is_said(home: Path, tmp_path: Path) -> None:
    view = rolled_back(home / "phi3/later/ranks", to=home / "phi3/earlier/ranks", mask=halves("phi3", home))
    with pytest.warns(UserWarning, match=RESUMED):
        save(view, tmp_path / "out")


def test_lost_low_bits_are_said(home: Path, tmp_path: Path) -> None:
    model_of("phi3", "earlier").bfloat16().save_pretrained(tmp_path / "half")
    view = rolled_back(home / "phi3/later/ranks", to=tmp_path / "half", mask=halves("phi3", home))
    with pytest.warns(UserWarning, match=LOW_BITS):
        save(view, tmp_path / "out", reset_optimizer=True)
    assert not rolled_back(
        home / "phi3/later/ranks", to=home / "phi3/earlier/ranks", mask=halves("phi3", home)
    ).remarks()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_its_live_model_is_that_of_the_plain_folder(home: Path, kind: str, form: str) -> None:
    tokens = torch.arange(12)[None] + 3
    plain, found = (Trajectory(later=home / kind / "later" / one).load()(tokens).logits for one in ("plain", form))
    assert torch.equal(plain, found)


def test_an_edit_of_the_live_model_leaves_what_was_read_alone(home: Path) -> None:
    run = Trajectory(later=home / "phi3/later/ranks")
    folder = run.tensors("later")
    before = {name: tensor.clone() for name, tensor in folder.items()}
    with torch.no_grad():
        for parameter in run.load().parameters():
            parameter.zero_()
    assert all(torch.equal(folder[name], before[name]) for name in before)


@pytest.mark.parametrize(("world", "copies", "device"), [(1, 1, "cpu"), (3, 1, "cuda"), (4, 2, "cuda"), (6, 3, "cpu")])
def test_every_mesh_and_every_copy(tmp_path: Path, world: int, copies: int, device: str) -> None:
    """Ranks that hold the same rows are all written, and a GPU's files are read where there is none."""
    for stage in STAGES:
        model_of("phi3", stage).save_pretrained(tmp_path / stage)
    as_ranks(tmp_path / "later", tmp_path / "ranks", world, copies, device)
    mask = RandomSelector(0.5).select(Trajectory(earlier=tmp_path / "earlier", later=tmp_path / "later"))
    view = rolled_back(tmp_path / "ranks", to=tmp_path / "earlier", mask=mask)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(view, tmp_path / "out")
    expected = rolled_back(tmp_path / "later", to=tmp_path / "earlier", mask=mask)
    for rank in range(world):
        found = ranks.tensors_in(tmp_path / f"out/model_world_size_{world}_rank_{rank}.pt")
        for name, whole in expected.items():
            rows = -(-len(whole) // (world // copies))
            at = rank % (world // copies)
            assert torch.equal(found[name].to_local(), whole[at * rows : (at + 1) * rows]), (rank, name)


@pytest.mark.parametrize("inside", ["sharded", "pytorch_model_fsdp_0"])
def test_where_trainers_nest_them(home: Path, tmp_path: Path, inside: str) -> None:
    """torchtitan's ``sharded/`` and accelerate's folder below a checkpoint's own, with the configuration above."""
    form = "cut" if inside == "sharded" else "dcp"
    for stage in STAGES:
        shutil.copytree(home / "phi3" / stage / form, tmp_path / stage / inside)
        (tmp_path / stage / inside / "config.json").rename(tmp_path / stage / "config.json")
    view = rolled_back(tmp_path / "later", to=tmp_path / "earlier", mask=halves("phi3", home))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = Checkpoint(save(view, tmp_path / "out"))
    expected = Checkpoint(healed("phi3", home, "plain", tmp_path / "plain"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_model_inside_a_megatron_checkpoint(tmp_path: Path) -> None:
    """verl's Megatron checkpoints hold a plain folder, and an optimizer whose masters would undo the rollback."""
    for stage in STAGES:
        model_of("phi3", stage).save_pretrained(tmp_path / stage / "model/huggingface")
        (tmp_path / stage / "optimizer/dist_ckpt").mkdir(parents=True)
        (tmp_path / stage / "optimizer/dist_ckpt/__0_0.distcp").write_bytes(b"masters")
        (tmp_path / stage / "transformer_config.json").write_text("{}")
    run = Trajectory(earlier=tmp_path / "earlier", later=tmp_path / "later")
    view = rolled_back(run.later, to=run.earlier, mask=RandomSelector(0.5).select(run))
    with pytest.warns(UserWarning, match="left out.*optimizer"):
        save(view, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "model", "surgery", "surgery.json", "transformer_config.json",
    ]  # fmt: skip
    found = Checkpoint(tmp_path / "out")
    assert all(torch.equal(found[name], view[name]) for name in view)
    assert run.load()(torch.arange(9)[None]).logits.isfinite().all()


# what is refused, each in a sentence


def copied(home: Path, form: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(home / "phi3" / "later" / form, tmp_path / "copy"))


def test_a_missing_rank(home: Path, tmp_path: Path) -> None:
    folder = copied(home, "ranks", tmp_path)
    next(folder.glob("model_*_rank_1.pt")).unlink()
    with pytest.raises(LookupError, match=r"lacks the files of 1 of \d ranks, the first of them model_.*_rank_1\.pt"):
        Checkpoint(folder)


def test_two_world_sizes(home: Path, tmp_path: Path) -> None:
    folder = copied(home, "ranks", tmp_path)
    shutil.copy(next(folder.glob("model_*_rank_0.pt")), folder / "model_world_size_8_rank_0.pt")
    with pytest.raises(ValueError, match=r"the files of . and 8 ranks"):
        Checkpoint(folder)


def test_ranks_in_each_others_files(home: Path, tmp_path: Path) -> None:
    folder = copied(home, "ranks", tmp_path)
    one, *_, other = sorted(folder.glob("model_*_rank_*.pt"))  # the last rank holds fewer rows
    shutil.copy(one, other)
    with pytest.raises(ValueError, match=r"rank \d should hold|does not hold all of"):
        Checkpoint(folder)


@pytest.mark.parametrize("kind", KINDS)  # of three experts the fourth rank has none
def test_a_file_of_another_rank_with_as_many_rows(tmp_path: Path, kind: str) -> None:
    model_of(kind, "later").save_pretrained(tmp_path / "plain", save_original_format=False)
    as_ranks(tmp_path / "plain", tmp_path / "ranks", world=4)
    assert len(Checkpoint(tmp_path / "ranks"))
    shutil.copy(tmp_path / "ranks/model_world_size_4_rank_0.pt", tmp_path / "ranks/model_world_size_4_rank_1.pt")
    with pytest.raises(ValueError, match=r"rank_1\.pt holds the same numbers as model_world_size_4_rank_0\.pt"):
        Checkpoint(tmp_path / "ranks")


def test_ranks_of_two_steps(home: Path, tmp_path: Path) -> None:
    folder = copied(home, "ranks", tmp_path)
    path = next(folder.glob("optim_*_rank_1.pt"))
    state = torch.load(path, weights_only=True)
    for value in state["state"].values():
        value["step"] += 1
    torch.save(state, path)
    with pytest.raises(ValueError, match="mixes the files of several steps"):
        Checkpoint(folder)


class Code:
    def __reduce__(self) -> Any:
        return (print, ("this code ran",))


@pytest.mark.parametrize("what", ["model_*_rank_0.pt", ".metadata"])
def test_code_is_refused_and_never_run(home: Path, tmp_path: Path, what: str, capfd: Any) -> None:
    import pickle

    folder = copied(home, "ranks" if "rank" in what else "dcp", tmp_path)
    path = next(folder.glob(what))
    if "rank" in what:
        torch.save({**torch.load(path, weights_only=True), "code": Code()}, path)
    else:
        path.write_bytes(pickle.dumps(Code()))
    with pytest.raises(ValueError, match=r"code.*never run"):
        Checkpoint(folder)
    assert "this code ran" not in capfd.readouterr().out


@pytest.mark.parametrize("keep", [0.3, 0.98])
@pytest.mark.parametrize(
    ("form", "what"), [("ranks", "model_*_rank_1.pt"), ("dcp", "__1_0.distcp"), ("dcp", ".metadata")]
)
def test_a_truncated_file(home: Path, tmp_path: Path, form: str, what: str, keep: float) -> None:
    folder = copied(home, form, tmp_path)
    path = next(folder.glob(what))
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"damaged|truncated|needs code|no record"):
        Checkpoint(folder)


def test_metadata_of_absent_files(home: Path, tmp_path: Path) -> None:
    folder = copied(home, "dcp", tmp_path)
    (folder / "__1_0.distcp").unlink()
    with pytest.raises(LookupError, match=r"names '__1_0.distcp', and there is no such file"):
        Checkpoint(folder)


def test_nothing_to_reset(home: Path, tmp_path: Path) -> None:
    folder = copied(home, "ranks", tmp_path)
    for path in folder.glob("optim_*"):
        path.unlink()
    view = rolled_back(folder, to=home / "phi3/earlier/ranks", mask=halves("phi3", home))
    with pytest.raises(ValueError, match="no optimizer's state"):
        save(view, tmp_path / "out", reset_optimizer=True)
    halves("phi3", home).save(tmp_path / "mask")
    words = f"rollback {folder} --to {home}/phi3/earlier/ranks --mask {tmp_path}/mask --reset-optimizer --dry-run"
    with pytest.raises(ValueError, match="no optimizer's state"):
        app(words.split(), standalone_mode=False)
    assert not (tmp_path / "out").exists()


def test_an_optimizer_that_keeps_weights_is_not_reset(home: Path, tmp_path: Path) -> None:
    """The ``z`` of schedule-free optimizers has the shape of a moment, and zeros there would be other weights."""
    folder = copied(home, "ranks", tmp_path)
    for path in folder.glob("optim_*"):
        state = torch.load(path, weights_only=True)
        for value in state["state"].values():
            value["z"] = value["exp_avg"]
        torch.save(state, path)
    view = rolled_back(folder, to=home / "phi3/earlier/ranks", mask=halves("phi3", home))
    with pytest.raises(ValueError, match=r"keeps 'z' of .*, which may be the weights themselves"):
        save(view, tmp_path / "out", reset_optimizer=True)
    assert not (tmp_path / "out").exists()


def test_the_folder_above_names_what_to_pass(home: Path, tmp_path: Path) -> None:
    (tmp_path / "global_step_7").mkdir()
    shutil.copytree(home / "phi3/later/ranks", tmp_path / "global_step_7" / "actor")
    with pytest.raises(LookupError, match="holds the checkpoints actor: pass one of them"):
        Checkpoint(tmp_path / "global_step_7")
