"""Patches: where a rollback is shipped it does what the rollback does, is taken back bit for bit, or is refused."""

from __future__ import annotations

import copy
import json
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from patch_readers import read_slime, read_surgery, read_vllm, tensors_in
from safetensors.torch import load_file, save_file
from test_bad_input import refused
from test_checkpoint import hashes, stage
from torch import Tensor, nn

from surgery import Checkpoint, Entries, Neurons, Patch, rollback, rolled_back, save, save_patch
from surgery.formats import patches
from surgery.formats.patches import Place, changes, pack, unpack
from surgery.layout import find_layout
from surgery.masks.entries import shapes_of
from surgery.reverting.rollback import RolledBack

FAMILIES = families.downstream()
MANIFEST, NUMBERS = "patch.json", "patch.safetensors"
Tensors = dict[str, Tensor]
# What a patch is applied to may be a rollback's output, whose mask is left behind.
pytestmark = pytest.mark.filterwarnings("ignore:left out, since they hold other weights.*surgery$")


def neurons(model: nn.Module, share: float = 0.2, units: Any = "mlp") -> Neurons:
    torch.manual_seed(0)
    return Neurons({name: torch.rand(size) < share for name, size in find_layout(model, units=units).sizes.items()})


def weights(model: nn.Module, share: float = 0.05) -> Entries:
    torch.manual_seed(0)
    shapes = shapes_of(find_layout(model))
    return Entries(
        {part: (torch.rand(n * w) < share).nonzero().flatten() for part, (n, w) in shapes.items()}, shapes=shapes
    )


def pair(place: Path, family: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Path]:
    return tuple(stage(place / name, family, seed, dtype) for seed, name in enumerate(("earlier", "later")))  # type: ignore[return-value]


def view_of(
    place: Path, family: str, mask: Any = None, dtype: torch.dtype = torch.bfloat16, **settings: Any
) -> RolledBack:
    earlier, later = pair(place, family, dtype)
    return rolled_back(later, to=earlier, mask=mask or neurons(families.build(family)), **settings)


def same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(patches_bits(found[name]), patches_bits(tensor)), name


def patches_bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def shards(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in hashes(folder).items() if name.endswith(".safetensors") and "/" not in name}


# The laws: each takes a view, and a folder to work in.


def law_applied(view: RolledBack, place: Path) -> None:
    """A patch makes of the later folder what the rollback makes of it, and needs nothing else."""
    expected = shards(save(view, place / "healed"))
    patch = save_patch(view, place / "patch")
    alone = shutil.copytree(view.folder, place / "alone/later")
    out = save(Patch(patch).applied(alone), place / "out")
    assert shards(out) == expected
    same(dict(Patch(patch).applied(alone)), tensors_in(place / "healed"))


def law_taken_back(view: RolledBack, place: Path) -> None:
    """Applied and taken back is the identity, bit for bit."""
    patch, healed = Patch(save_patch(view, place / "patch")), save(view, place / "healed")
    assert shards(save(patch.applied(healed, reverse=True), place / "out")) == shards(view.folder)


def law_opposite(view: RolledBack, place: Path) -> None:
    """The patch that leads back is one of its own."""
    healed = save(view, place / "healed")
    back = save_patch(view, place / "patch", reverse=True)
    same(dict(Patch(back).applied(healed)), tensors_in(view.folder))


def law_surgery(view: RolledBack, place: Path) -> None:
    expected, base = dict(view), tensors_in(view.folder)
    patch = save_patch(view, place / "patch")
    same(read_surgery(patch, base), expected)
    same(read_surgery(patch, read_surgery(patch, base)), base)  # twice is the identity


def law_vllm(view: RolledBack, place: Path) -> None:
    expected, base = dict(view), tensors_in(view.folder)
    same(read_vllm(save_patch(view, place / "to", format="vllm"), base), expected)
    same(read_vllm(save_patch(view, place / "back", format="vllm", reverse=True), expected), base)


def law_slime(view: RolledBack, place: Path) -> None:
    expected, base = dict(view), tensors_in(view.folder)
    for encoding in ("xor", "overwrite"):
        delta = save_patch(view, place / encoding, format="slime", encoding=encoding)
        same(read_slime(delta, base), expected)
        back = save_patch(
            view, place / f"{encoding} back", format="slime", encoding=encoding, base_version=1, reverse=True
        )
        same(read_slime(back, expected, "000001"), base)


def law_changed_only(view: RolledBack, place: Path) -> None:
    """What is listed is what changes: every tensor, and every number."""
    expected, base = dict(view), tensors_in(view.folder)
    counts = {name: int((expected[name] != base[name]).sum()) for name in base}
    told = json.loads((save_patch(view, place / "patch") / MANIFEST).read_text())
    assert {name: one["numbers"] for name, one in told["tensors"].items()} == {n: c for n, c in counts.items() if c}
    assert Patch(place / "patch").numbers == sum(counts.values()) > 0
    index = next(save_patch(view, place / "slime", format="slime").glob("*/*.json"))
    assert json.loads(index.read_text())["weight_map"].keys() == told["tensors"].keys()


LAWS = [law_applied, law_taken_back, law_opposite, law_surgery, law_vllm, law_slime, law_changed_only]


@pytest.mark.parametrize("law", [law_applied, law_taken_back, law_vllm, law_slime], ids=lambda law: law.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_laws(family: str, law: Callable[[RolledBack, Path], None], tmp_path: Path) -> None:
    law(view_of(tmp_path, family), tmp_path)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("what", ["float32", "weights", "half way", "value channels"])
def test_laws_of_other_masks(what: str, law: Callable[[RolledBack, Path], None], tmp_path: Path) -> None:
    model = families.build("llama")
    mask = {"weights": weights(model), "value channels": neurons(model, units=("mlp", "value_channel"))}.get(what)
    dtype = torch.float32 if what == "float32" else torch.bfloat16
    law(view_of(tmp_path, "llama", mask, dtype, strength=0.5 if what == "half way" else 1.0), tmp_path)


def state(model: nn.Module) -> Tensors:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def law_live(view: RolledBack, place: Path, model: nn.Module) -> None:
    """On a live model: what a rollback does, undone and taken back bit for bit."""
    patch, before = Patch(save_patch(view, place / "patch")), state(model)
    with rollback(model, to=view.source.tensors, mask=view.mask):
        expected = state(model)
    same(state(model), before)
    with patch.apply(model) as done:
        same(state(model), expected)
    same(state(model), before)
    assert done.changed == sum(done.parameters.values()) == patch.numbers
    patch.apply(model)
    patch.apply(model, reverse=True)
    same(state(model), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_live_model_becomes_what_a_rollback_makes_of_it(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    view = view_of(tmp_path, family)
    law_live(view, tmp_path, AutoModelForCausalLM.from_pretrained(view.folder, dtype="auto"))


@pytest.mark.parametrize("what", ["weights", "value channels"])
def test_a_live_model_and_other_masks(what: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = families.build("llama")
    mask = weights(model) if what == "weights" else neurons(model, units=("mlp", "value_channel"))
    view = view_of(tmp_path, "llama", mask)
    law_live(view, tmp_path, AutoModelForCausalLM.from_pretrained(view.folder, dtype="auto"))


@pytest.mark.parametrize("family", FAMILIES)
def test_places_are_where_the_slots_numbers_lie(family: str) -> None:
    for name, block in find_layout(families.build(family)).items():
        for slot in block.slots:
            flat = torch.arange(torch.Size(slot.shape).numel())
            which, positions = Place.of(name, slot).positions(flat.numpy())
            order = positions.argsort()
            assert which[order].tolist() == slot.view(flat.view(slot.shape)).flatten().tolist()
            assert positions[order].tolist() == list(range(*slot.span))


# Mutants: each law fails by an assertion under the mistake that it is there for.


def one_aside(patch: pytest.MonkeyPatch) -> None:
    """Positions are counted from the first one."""

    def mutant(*args: Any, original: Any = patches.changes) -> Any:
        found = original(*args)
        return type(found)(found.at - found.at[0], found.old, found.new, found.before, found.after)

    patch.setattr("surgery.reverting.patch_writing.changes", mutant)


def new_for_old(patch: pytest.MonkeyPatch) -> None:
    """The values written are those that are there already."""

    def mutant(*args: Any, original: Any = patches.changes) -> Any:
        found = original(*args)
        return type(found)(found.at, found.old, found.old, found.before, found.after)

    patch.setattr("surgery.reverting.patch_writing.changes", mutant)


def one_run_only(patch: pytest.MonkeyPatch) -> None:
    """The runs of a tensor are each counted from its beginning."""
    patch.setattr(patches, "_RUN", 64)
    patch.setattr(np, "flatnonzero", lambda found: np.nonzero(found)[0][:1])


MUTANTS = [(one_aside, law_vllm), (one_aside, law_surgery), (new_for_old, law_vllm), (new_for_old, law_surgery),
           (one_run_only, law_surgery), (one_run_only, law_changed_only)]  # fmt: skip


@pytest.mark.parametrize(("mutant", "law"), MUTANTS, ids=lambda one: one.__name__)
def test_mutants_die(mutant: Any, law: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = view_of(tmp_path, "llama")
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        law(view, tmp_path)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_runs_are_joined(
    law: Callable[[RolledBack, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The laws of tensors that are longer than a run."""
    monkeypatch.setattr(patches, "_RUN", 100)
    law(view_of(tmp_path, "phi3"), tmp_path)


def test_an_empty_mask_makes_a_patch_that_changes_nothing(tmp_path: Path) -> None:
    none = neurons(families.build("llama"), share=-1.0)
    view = view_of(tmp_path, "llama", none)
    patch = Patch(save_patch(view, tmp_path / "patch"))
    assert (patch.numbers, patch.tensors) == (0, [])
    assert shards(save(patch.applied(view.folder), tmp_path / "out")) == shards(view.folder)
    same(read_slime(save_patch(view, tmp_path / "slime", format="slime"), dict(view)), dict(view))
    with patch.apply(families.build("llama", torch.bfloat16)) as done:
        assert done.changed == 0


def test_a_patch_is_small(tmp_path: Path) -> None:
    """Of 2 % of the neurons it has less than 2 % of the model's bytes and what names the tensors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=256, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16()
    model.save_pretrained(tmp_path / "earlier")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.01 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "later")
    mask = neurons(model, share=0.02)
    view = rolled_back(tmp_path / "later", to=tmp_path / "earlier", mask=mask)
    whole = (tmp_path / "later/model.safetensors").stat().st_size
    for format in ("surgery", "slime"):
        patch = save_patch(view, tmp_path / format, format=format)
        size = sum(path.stat().st_size for path in patch.rglob("*.safetensors"))
        assert size < 2 * view.parameters < 0.02 * whole


# What is refused.


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A later folder and its patch."""
    view = view_of(tmp_path, "llama")
    save_patch(view, tmp_path / "patch")
    save(view, tmp_path / "healed")
    return tmp_path


def apply(desk: Path, later: str = "later", **settings: Any) -> Callable[[], Any]:
    return lambda: save(Patch(desk / "patch").applied(desk / later, **settings), desk / "out")


def changed(desk: Path, folder: str, name: str, at: int) -> None:
    for path in (desk / folder).glob("model*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name].view(-1)[at] += 1
            save_file(tensors, path, {"format": "pt"})


NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("at", [0, 777, 32 * 48 - 1])
def test_another_base(desk: Path, at: int) -> None:
    """One number of a tensor that it changes is enough, whether the patch changes that number or not."""
    changed(desk, "later", NAME, at)
    changed(desk, "healed", NAME, at)
    refused(desk, f"made for another checkpoint, 'later': '{NAME}' of .* holds other numbers", apply(desk))
    refused(desk, "made for another checkpoint", apply(desk, "healed", reverse=True))


def test_applied_already_and_not_applied(desk: Path) -> None:
    refused(desk, r"applied already to .*healed, and would be taken back by reverse=True", apply(desk, "healed"))
    refused(desk, r"is not applied to .*later, so it can't be taken back", apply(desk, reverse=True))


def test_another_model(desk: Path) -> None:
    stage(desk / "other", "phi3", 0)
    refused(desk, r"has no tensor '.*': .* was made for another model", apply(desk, "other"))
    config = families.config("llama")
    config.intermediate_size = 40
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(desk / "smaller")
    refused(desk, r"is BF16 \(40, 32\), and .* changes one that is BF16 \(48, 32\)", apply(desk, "smaller"))
    stage(desk / "wide", "llama", 1, torch.float32)
    refused(desk, r"is F32 .* changes one that is BF16", apply(desk, "wide"))


def test_a_live_model_that_is_another(desk: Path) -> None:
    patch = Patch(desk / "patch")

    def unchanged(model: nn.Module, message: str, **settings: Any) -> None:
        before = state(model)
        with pytest.raises(ValueError, match=message):
            patch.apply(model, **settings)
        same(state(model), before)

    later = families.build("llama", torch.bfloat16, seed=1)
    unchanged(later, "is not applied to", reverse=True)
    at = int(np.flatnonzero((dict(Checkpoint(desk / "later"))[NAME] != Checkpoint(desk / "healed")[NAME]).flatten())[0])
    other = copy.deepcopy(later)
    other.get_parameter(NAME).data.view(-1)[at] += 1
    unchanged(other, "made for another checkpoint")
    unchanged(later.float(), "is torch.float32, and .* changes BF16: load the model in its checkpoint's dtype")
    unchanged(families.build("gpt2", torch.bfloat16), "made for another model")
    applied = families.build("llama", torch.bfloat16, seed=1)
    patch.apply(applied)
    unchanged(applied, "applied already")


def told(desk: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = desk / "patch" / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "is of version 2, and this surgery reads 1: update it"),
        (lambda m: m.update(kind="other"), "is no patch of surgery's"),
        (lambda m: m.update(format="vllm"), "in the format 'vllm', which is applied by the server"),
        (lambda m: m.pop("tensors"), '"tensors" is missing'),
        (lambda m: m["tensors"].pop(NAME), "name different tensors"),
        (lambda m: m["tensors"][NAME].update(numbers=1 << 60), "changes 1152921504606846976 numbers of 1536"),
        (lambda m: m["tensors"][NAME].update(numbers=3), "its numbers are not 3 of 2 bytes"),
        (lambda m: m["tensors"][NAME].update(numbers=-1), "expected a natural number"),
        (lambda m: m["tensors"][NAME].update(dtype="F4"), "is BF16"),
        (lambda m: m["tensors"][NAME]["after"].update(tensor="0"), "is damaged: .* would become something else"),
        (lambda m: m["tensors"][NAME]["before"].update(tensor="0"), "made for another checkpoint"),
    ],
)
def test_a_manifest_that_says_something_else(desk: Path, change: Any, message: str) -> None:
    told(desk, change)
    refused(desk, message, apply(desk))


@pytest.mark.parametrize("strides", [[0, 1], [1 << 62, 1], [1]])
def test_places_that_are_none(desk: Path, strides: list[int]) -> None:
    told(desk, lambda m: m["tensors"][NAME]["places"][0].update(strides=strides))
    model = families.build("llama", torch.bfloat16, seed=1)
    before = state(model)
    with pytest.raises(ValueError, match=r"no place in a tensor|does not say where|another model|another checkpoint"):
        Patch(desk / "patch").apply(model)
    same(state(model), before)


def test_a_half_written_patch(desk: Path) -> None:
    numbers = desk / "patch" / NUMBERS
    data = numbers.read_bytes()
    for keep in (0, 5, len(data) // 2, len(data) - 1):
        numbers.write_bytes(data[:keep])
        refused(desk, "damaged|truncated", apply(desk))
    numbers.unlink()
    refused(desk, "is incomplete: there is no patch.safetensors", apply(desk), LookupError)
    (desk / "patch" / MANIFEST).unlink()
    refused(desk, "there is no patch in", apply(desk), LookupError)


def test_damaged_numbers(desk: Path) -> None:
    """A byte of the numbers that is another one is noticed before anything is written, unless nothing reads it."""
    numbers = desk / "patch" / NUMBERS
    data = numbers.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    expected, taken = dict(Checkpoint(desk / "healed")), 0
    for at in range(8 + length, len(data), 97):
        numbers.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        message = ""
        try:
            same(dict(Patch(desk / "patch").applied(desk / "later")), expected)
            taken += 1
        except ValueError as error:
            message = str(error)
        assert not message or "is damaged" in message
    assert taken <= 3  # the bits that fill a stream's last byte


def test_what_is_unpacked_is_bounded() -> None:
    """A zip bomb ends where the tensor ends, and a count that no tensor has is refused at once."""
    bomb = zlib.compress(bytes(1 << 24))
    for count, size in ((1000, 1000), (1 << 61, 1000)):
        with pytest.raises(ValueError, match="numbers"):
            unpack(bomb, count, size, 2)


@pytest.mark.parametrize("at", [[3, 3], [5, 2], [1, 10]])
def test_positions_that_are_none(at: list[int]) -> None:
    data = pack(np.array(at), np.ones(2, np.uint16), 10)
    with pytest.raises(ValueError, match="ascending ones below 10"):
        unpack(data, 2, 10, 2)


def test_changes_of_the_sign_of_zero_and_of_nan_are_changes() -> None:
    before, after = torch.tensor([0.0, torch.nan, 1.0]), torch.tensor([-0.0, torch.nan, 1.0])
    assert changes(before, after).at.tolist() == [0]


def test_where_a_patch_is_written(desk: Path) -> None:
    view = rolled_back(desk / "later", to=desk / "earlier", mask=neurons(families.build("llama")))
    refused(desk, "exists", lambda: save_patch(view, desk / "patch"))
    refused(desk, "never replaced", lambda: save_patch(view, desk / "healed", overwrite=True))
    refused(desk, "lies in one of the inputs", lambda: save_patch(view, desk / "later/patch"))
    refused(
        desk, "format='gguf': expected surgery, slime or vllm", lambda: save_patch(view, desk / "new", format="gguf")
    )
    refused(desk, "encoding='sum': expected xor or overwrite", lambda: save_patch(view, desk / "new", encoding="sum"))
    refused(desk, "base_version=-1", lambda: save_patch(view, desk / "new", base_version=-1))
    save_patch(view, desk / "patch", format="slime", overwrite=True)
    refused(desk, r"there is no patch in .*; weight_v000001 is a delta that", apply(desk), LookupError)


def test_an_input_that_changes_meanwhile(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = rolled_back(desk / "later", to=desk / "earlier", mask=neurons(families.build("llama")))
    monkeypatch.setattr(Checkpoint, "is_current", property(lambda self: False))
    refused(desk, "was changed while a patch of it was being made", lambda: save_patch(view, desk / "new"))


@pytest.mark.parametrize("package", ["zstandard", "xxhash"])
def test_a_missing_package(desk: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    view = rolled_back(desk / "later", to=desk / "earlier", mask=neurons(families.build("llama")))
    refused(desk, rf'{package}: pip install "surgery\[patch\]"', lambda: save_patch(view, desk / "new", format="slime"))
    assert Patch(save_patch(view, desk / "new")).numbers


def test_the_papers_say_what_was_done(desk: Path) -> None:
    out = apply(desk)()
    record = json.loads((out / "surgery.json").read_text())
    assert (record["patch"]["later"]["name"], record["patch"]["to"]["name"], record["reverse"]) == (
        "later",
        "earlier",
        False,
    )
    assert "with a patch to earlier applied" in (out / "README.md").read_text()
    back = save(Patch(desk / "patch").applied(out, reverse=True), desk / "back")
    assert "taken back" in (back / "README.md").read_text()
    healed = save(Patch(desk / "patch").applied(desk / "healed", reverse=True), desk / "again")
    assert not (healed / "surgery").exists()


MEMORY = """
import sys, threading
from pathlib import Path
from surgery import Neurons, Patch, rolled_back, save, save_patch

def anonymous():
    lines = Path("/proc/self/status").read_text().split("\\n")
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

folder = Path(sys.argv[1])
view = rolled_back(folder / "later", to=folder / "earlier", mask=Neurons.load(folder / "mask"))
start, peak, done = anonymous(), [0.0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())
thread = threading.Thread(target=watch); thread.start()
for format in ("surgery", "vllm", "slime"):
    save_patch(view, folder / format, format=format)
save(Patch(folder / "surgery").applied(folder / "later"), folder / "out")
done.set(); thread.join()
print(peak[0] - start)
"""


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """Of twelve tensors of 12 MB each."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=512, intermediate_size=12288, num_hidden_layers=4, num_attention_heads=4, vocab_size=64)
    with torch.device("meta"):
        meta = LlamaForCausalLM(LlamaConfig(**sizes))
    for name, value in (("earlier", 1.0), ("later", 2.0)):
        (tmp_path / name).mkdir()
        meta.config.save_pretrained(tmp_path / name)
        tensors = {n: torch.full(t.shape, value, dtype=torch.bfloat16) for n, t in meta.state_dict().items()}
        save_file(tensors, tmp_path / name / "model.safetensors")
    layout = find_layout(meta)
    Neurons({name: torch.arange(n) % 50 == 0 for name, n in layout.sizes.items()}).save(tmp_path / "mask")
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert float(found.stdout) < 80, f"{found.stdout} MB"
    assert Checkpoint(tmp_path / "out")["model.layers.1.mlp.down_proj.weight"][0, :2].tolist() == [1.0, 2.0]
