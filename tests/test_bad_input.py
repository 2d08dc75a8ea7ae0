"""Bad input: the message says what was wrong, and inputs and outputs are as before."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import add, hashes, header, some, stage

from surgery import (
    AMCSelector,
    Checkpoint,
    Neurons,
    RandomSelector,
    Trajectory,
    activation,
    allocate,
    conflict,
    magnitude,
    rollback,
    rolled_back,
    save,
)

ONE = "model.safetensors"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "earlier", "later")):
        stage(tmp_path / name, "qwen3", seed, torch.float32, shard="1GB")
    return tmp_path


@pytest.fixture
def mask() -> Neurons:
    return some(families.build("qwen3"))


def refused(place: Path, message: str, action: Callable[[], Any], kind: type[Exception] = ValueError) -> str:
    """What ``action`` says (``message``) as it fails; every file and folder, hidden ones too, is as before."""
    before, tree = hashes(place), sorted(place.rglob("*"))
    with pytest.raises(kind, match=message) as caught:
        action()
    assert sorted(place.rglob("*")) == tree
    assert hashes(place) == before
    return str(caught.value)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / ONE)
    change(tensors)
    save_file(tensors, folder / ONE, {"format": "pt"})


def config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def heal(place: Path, mask: Neurons, **settings: Any) -> Path:
    return save(rolled_back(place / "later", to=place / "earlier", mask=mask), place / "out", **settings)


def run(place: Path) -> Trajectory:
    return Trajectory(base=place / "base", earlier=place / "earlier", later=place / "later")


# --- the three checkpoints against each other


@pytest.mark.parametrize("folder", ["earlier", "later"])
def test_a_missing_tensor(place, mask, folder):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(place / folder, lambda tensors: tensors.pop(name))
    refused(place, f"{folder} has no tensor '{name}', which its config.json calls for", lambda: heal(place, mask))
    refused(place, f"{folder} has no tensor", lambda: magnitude(run(place)))


def test_another_shape(place, mask):
    name = "model.layers.0.mlp.down_proj.weight"
    for folder in ("earlier", "later"):
        rewrite(place / folder, lambda tensors: tensors.update({name: torch.zeros(32, 47)}))
        refused(place, rf"has the shape \(32, 47\) in .*{folder}.* expect.* \(32, 48\)", lambda: heal(place, mask))


def test_another_shape_outside_the_mlps(place, mask):
    name = "model.layers.0.self_attn.k_proj.weight"
    rewrite(place / "earlier", lambda tensors: tensors.update({name: torch.zeros(32, 32)}))
    refused(place, r"'model.layers.0.self_attn.k_proj.weight' has the shape .*different models",
            lambda: heal(place, mask))  # fmt: skip


def test_extra_tensors_are_carried_through(place, mask):
    """What transformers does not know (mtp.*), in one of the two: no error, and the bytes stay."""
    add(place / "later" / ONE, {"mtp.x": ("F32", [1], b"\x00\x00\xc0\x7f")})  # a NaN: outside the MLPs it stays
    add(place / "earlier" / ONE, {"other.y": ("F32", [1], b"1234")})
    out = heal(place, mask)
    assert header(out / ONE) == header(place / "later" / ONE)
    assert (out / ONE).read_bytes()[-4:] == b"\x00\x00\xc0\x7f"
    assert magnitude(run(place)).total == mask.total


@pytest.mark.parametrize(("old", "new"), [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
def test_another_floating_dtype_is_cast(tmp_path, mask, old, new):
    """Values are rounded to the later checkpoint's dtype, which the output keeps."""
    stage(tmp_path / "earlier", "qwen3", 0, old, "1GB")
    stage(tmp_path / "later", "qwen3", 1, new, "1GB")
    out = Checkpoint(heal(tmp_path, mask))
    name, rows = "model.layers.0.mlp.up_proj.weight", mask["model.layers.0.mlp"]
    want = torch.where(
        rows[:, None], Checkpoint(tmp_path / "earlier")[name].to(new), Checkpoint(tmp_path / "later")[name]
    )
    assert out[name].dtype == new
    assert torch.equal(out[name], want)


def test_an_integer_dtype_is_refused(place, mask):
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(place / "later", lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    refused(place, f"'{name}' of .*later is stored as torch.int8: quantised weights", lambda: heal(place, mask))


def test_another_architecture(place, mask):
    shutil.rmtree(place / "earlier")
    stage(place / "earlier", "gpt2", 0)
    refused(place, "are different models", lambda: heal(place, mask))
    refused(place, "are different models", lambda: magnitude(run(place)))
    refused(place, "are different models", lambda: RandomSelector(0.1).select(run(place)))


def test_another_architecture_of_the_same_sizes(place, mask):
    """Ungated neurons of the same names and numbers; a narrower model with as many neurons."""
    shutil.rmtree(place / "earlier")
    stage(place / "earlier", "arcee", 0)
    refused(place, "different models: a neuron of 'model.layers.0.mlp' is made of", lambda: heal(place, mask))
    (place / "earlier").rename(place / "ungated")
    later, ungated = place / "later", place / "ungated"
    refused(place, "different models: a neuron of", lambda: rolled_back(ungated, to=later, mask=mask))
    (place / "ungated").rename(place / "earlier")
    refused(place, "different models", lambda: rollback(families.build("qwen3"), to=place / "earlier", mask=mask))


def test_an_unknown_or_unreadable_config(place, mask):
    config(place / "earlier", model_type="nobody-knows")
    refused(place, "config.json can't be read as a model's configuration", lambda: heal(place, mask))
    (place / "earlier/config.json").write_text("{")
    refused(place, "config.json can't be read", lambda: heal(place, mask))


HOSTILE = {
    "vocab_size": [False, 0, -1, None, "64", 1.5, 10**400],
    "hidden_size": [0, -1, 10**400, [], True],
    "num_attention_heads": [0, -4, 10**7, 2.5, None],
    "num_key_value_heads": [0, "2", 10**400],
    "num_hidden_layers": [10_000, 10**9, 10**4000, 1.5, None, -1, {}],
    "num_labels": [10**7],
    "head_dim": [0, None, -8],
    "hidden_act": ["none", None, 3],
    "model_type": [None, [], {}, 3],
    "dtype": ["none", [], 3.5],
    "id2label": [5],
    "rope_parameters": [[], 3],
    "pad_token_id": [10**6],
    "quantization_config": [5, [1]],
    "text_config": [{"num_hidden_layers": 10**9}],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in HOSTILE.items() for value in values],
    ids=lambda one: str(one)[:20],
)
def test_a_configuration_of_no_model(place, mask, name, value):
    config(place / "later", layer_types=None, **{name: value})
    start = time.process_time()
    said = refused(place, "(later.*config|transformers .*later)", lambda: heal(place, mask))
    assert time.process_time() - start < 10
    assert "\n" not in said
    assert len(said) < 800
    assert any(way in said for way in ("docs/how-to", "its config.json expects", "from before quantisation"))


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"5", b"null", b"[" * 100_000, b'{"a":' * 500 + b"1" + b"}" * 500, b"\xff"]
)
def test_a_configuration_that_is_none(place, mask, raw):
    (place / "later/config.json").write_bytes(raw)
    refused(place, "later/config.json can't be read as a model's configuration", lambda: heal(place, mask))


@pytest.mark.parametrize("rows", [40, 128])
def test_another_or_a_padded_vocabulary_is_a_warning(place, mask, rows):
    """Embeddings are never touched, so the rollback goes on; the user hears of it."""

    def resize(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({n: torch.randn(rows, 32) for n in ("model.embed_tokens.weight", "lm_head.weight")})

    rewrite(place / "earlier", resize)
    config(place / "earlier", vocab_size=rows)
    with pytest.warns(UserWarning, match="another vocabulary, or another padding"):
        out = heal(place, mask)
    assert torch.equal(Checkpoint(out)["lm_head.weight"], Checkpoint(place / "later")["lm_head.weight"])
    with pytest.warns(UserWarning, match=rf"weight' has the shape \({rows}, 32\)"):
        magnitude(run(place))


# --- numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_in_weights(place, mask, value):
    name = "model.layers.1.mlp.up_proj.weight"
    at = int(mask.indices("model.layers.1.mlp")[0])
    rewrite(place / "earlier", lambda tensors: tensors[name][at].fill_(value))
    refused(place, f"{name} of .*earlier holds NaN or infinite numbers in the masked", lambda: heal(place, mask))
    refused(place, f"'{name}' of .*earlier holds 32 NaN or infinite", lambda: magnitude(run(place)))
    refused(place, "NaN or infinite", lambda: conflict(run(place)))
    model = families.build("qwen3", seed=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    refused(place, "NaN or infinite", lambda: rollback(model, to=place / "earlier", mask=mask))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_nan_and_infinity_in_scores():
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="block 'a': 1 of 2 scores are NaN or infinite"):
            Neurons({"a": torch.tensor([1.0, value])})


@pytest.mark.parametrize("budget", [-0.01, 1.01, 2, float("nan"), float("inf"), "0.1", None, torch.tensor(0.1)])
def test_a_budget_outside_0_to_1(budget):
    for make in (AMCSelector, RandomSelector, lambda b: allocate(Neurons({"a": torch.ones(4)}), b)):
        with pytest.raises(ValueError, match=r"expected a .*fraction of the model's neurons in \[0, 1\]"):
            make(budget)


def test_a_mask_for_another_model(place):
    other = Neurons({"model.layers.0.mlp": torch.ones(48, dtype=torch.bool)})
    refused(place, "block 'model.layers.1.mlp' has no neurons here and 48 in", lambda: heal(place, other))
    wide = Neurons({f"model.layers.{i}.mlp": torch.ones(64, dtype=torch.bool) for i in range(2)})
    refused(place, "64 neurons here and 48 in .*different models", lambda: heal(place, wide))


def test_scores_instead_of_a_mask(place, mask):
    scores = Neurons({name: value.float() for name, value in mask.items()})
    refused(place, "mask= holds scores: choose neurons with top", lambda: heal(place, scores))


def test_a_mask_made_for_other_checkpoints_is_a_warning(place):
    mask = RandomSelector(0.1).select(run(place))
    shutil.copy(place / "base" / ONE, place / "earlier" / ONE)
    with pytest.warns(UserWarning, match="applied to .*whose weights are others by now"):
        heal(place, mask)


def test_prompts_longer_than_the_context():
    model = families.build("qwen3")
    with pytest.raises(ValueError, match="a prompt has 65 tokens, and the model's context is 64"):
        activation(model, [{"input_ids": torch.ones(1, 65, dtype=torch.int64)}])
    with pytest.raises(ValueError, match="no token to average over"):
        activation(model, [])


# --- folders and their index


def sharded(folder: Path) -> Path:
    """The same folder as two shards and an index, the second shard outside of what the caller will change."""
    tensors = load_file(folder / ONE)
    names = sorted(tensors)
    (folder / ONE).unlink()
    save_file({n: tensors[n] for n in names[::2]}, folder / "a.safetensors")
    save_file({n: tensors[n] for n in names[1::2]}, folder / "b.safetensors")
    where = {n: "ab"[at % 2] + ".safetensors" for at, n in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def reindex(folder: Path, name: str) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"b.safetensors"', json.dumps(name)))


def test_an_index_that_names_a_missing_shard(place, mask):
    (sharded(place / "earlier") / "b.safetensors").unlink()
    refused(place, "names 'b.safetensors', and there is no such file", lambda: heal(place, mask), LookupError)


@pytest.mark.parametrize("name", ["", ".", "x" * 10_000, "a\0b", "a\nb", "config.json/x"])
def test_an_index_that_names_no_file(place, mask, name):
    reindex(sharded(place / "later"), name)
    said = refused(place, "and there is no such file", lambda: heal(place, mask), LookupError)
    assert "\n" not in said
    assert len(said) < 500


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "sub/../../secret.safetensors", "{place}/secret.safetensors"]
)
def test_an_index_that_leaves_its_folder(place, mask, name):
    shutil.move(sharded(place / "later") / "b.safetensors", place / "secret.safetensors")
    (place / "later/sub").mkdir()
    reindex(place / "later", name.format(place=place))
    refused(place, "names a file outside the folder", lambda: heal(place, mask))


@pytest.mark.parametrize("shards", [True, False])
def test_a_link_that_leaves_its_folder(place, mask, shards):
    file = sharded(place / "later") / "b.safetensors" if shards else place / "later" / ONE
    shutil.move(file, place / "secret.safetensors")
    file.symlink_to("../secret.safetensors")
    refused(place, "is a link to .*secret.safetensors, outside the folder", lambda: heal(place, mask))


@pytest.mark.parametrize(
    "raw", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "\xff"]
)
def test_an_index_that_is_none(place, mask, raw):
    (sharded(place / "later") / "model.safetensors.index.json").write_bytes(raw.encode("latin-1"))
    refused(place, "is not an index of safetensors shards", lambda: heal(place, mask))


def test_an_index_that_lies(place, mask):
    index = sharded(place / "later") / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"weight_map": {', '"weight_map": {"ghost": "a.safetensors", '))
    refused(place, "says that 'ghost' is in a.safetensors, and it is not there", lambda: heal(place, mask))


def test_both_shards_and_a_single_file(place, mask):
    """transformers reads the one, other programs the other: which is stale can't be told."""
    shutil.copy(place / "later" / ONE, place / "copy")
    shutil.move(place / "copy", sharded(place / "later") / ONE)
    refused(place, "holds both model.safetensors and model.safetensors.index.json", lambda: heal(place, mask))


def test_folders_that_are_none(place, mask):
    refused(place, "there is no folder .*nothing", lambda: Checkpoint(place / "nothing"), LookupError)
    refused(place, "is a file: pass the folder that holds it", lambda: Checkpoint(place / "later" / ONE), LookupError)
    (place / "later" / ONE).rename(place / "later/x.safetensors")
    shutil.copy(place / "later/x.safetensors", place / "later/y.safetensors")
    refused(place, "2 safetensors files and no model.safetensors.index.json", lambda: heal(place, mask), LookupError)
    for path in (place / "later").glob("*.safetensors"):
        path.unlink()
    refused(place, "later has no safetensors file", lambda: heal(place, mask), LookupError)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
@pytest.mark.parametrize("folder", ["earlier", "later"])
def test_pickles_are_never_loaded(place, mask, name, folder):
    (place / folder / ONE).unlink()
    (place / folder / name).write_bytes(pickle.dumps(Bomb(place / "exploded")))
    refused(place, f"pickled weights only .{name}.; .*never opened. Convert", lambda: heal(place, mask))
    refused(place, "pickled weights only", lambda: Trajectory(later=place / folder).load())
    assert not (place / "exploded").exists()


def test_a_pickle_as_a_mask(place):
    (place / "mask.pt").write_bytes(pickle.dumps(Bomb(place / "exploded")))
    refused(place, "not a readable safetensors file", lambda: Neurons.load(place / "mask.pt"))


# --- damaged files


def entry(dtype: Any = "F32", shape: Any = (1,), span: Any = (0, 4)) -> bytes:
    return framed({"a": {"dtype": dtype, "shape": shape, "data_offsets": span}}) + b"1234"


def framed(head: Any) -> bytes:
    raw = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(raw)) + raw


TWO = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
DAMAGED = {
    "empty": b"",
    "5 bytes": b"12345",
    "8 zeros": bytes(8),
    "length only": struct.pack("<Q", 100),
    "length 2**63": struct.pack("<Q", 2**63) + b"{}",
    "length 2**64-1": b"\xff" * 8 + b"{}",
    "header cut": entry()[:30],
    "data cut": entry()[:-1],
    "no json": framed(b"nothing"),
    "no utf-8": framed(b'{"\xff": 1}'),
    "half a surrogate pair": framed(b'{"\\ud800": 1}'),
    "a byte order mark": framed(b"\xef\xbb\xbf{}"),
    "something behind the json": framed(b"{}\0"),
    "deep": framed(b"[" * 100_000),
    "a list": framed([1]),
    "a pickle": pickle.dumps({"a": [1] * 100}),
    "beyond": entry("F32", [2], (0, 8)),
    "negative": entry("F32", [1], (-4, 0)),
    "minus zero": framed(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-0, 4]}}') + b"1234",
    "backwards": entry("F32", [1], (4, 0)),
    "negative shape": entry("F32", [-1, -1]),
    "huge shape": entry("F32", [2**62, 2**62]),
    "a shape of a million entries": entry("F32", [2] * 1_000_000),
    "a million axes of one": entry("F32", [1] * 1_000_000),
    "wrong size": entry("F32", [3]),
    "floats": entry("F32", [1], (0.0, 4.0)),
    "a shape of floats": entry("F32", [1.0]),
    "three offsets": entry("F32", [1], (0, 2, 4)),
    "dtype no string": entry(["F32"]),
    "a dtype that nobody knows": entry("Q9"),
    "shape no list": entry("F32", 1),
    "entry no object": framed({"a": 3}),
    "entry a list": framed({"a": ["F32", [1], [0, 4]]}) + b"1234",
    "metadata no object": framed({**TWO, "__metadata__": [1]}) + b"1234",
    "metadata no text": framed({**TWO, "__metadata__": {"format": 1}}) + b"1234",
    "overlapping": framed({**TWO, "b": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}}) + b"1234",
    "the same bytes": framed({**TWO, "b": TWO["a"]}) + b"1234",
    "a hole": framed({**TWO, "b": {"dtype": "U8", "shape": [1], "data_offsets": [5, 6]}}) + b"123456",
    "trailing bytes": entry() + b"5",
    "1.6 million tensors": framed(b"{" + b",".join(
        b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % at for at in range(1_600_000)) + b"}"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_files(tmp_path, what):
    """Among them all that safetensors refuses: what it can't open, no server can load."""
    (tmp_path / ONE).write_bytes(DAMAGED[what])
    start = time.process_time()
    said = refused(tmp_path, f"{ONE} (is damaged|has a header of)", lambda: Checkpoint(tmp_path))
    assert len(said) < 500
    assert time.process_time() - start < 5


def test_a_damaged_shard_of_either_parent(place, mask):
    for folder in ("later", "earlier"):
        whole = (place / folder / ONE).read_bytes()
        (place / folder / ONE).write_bytes(whole[:-100])
        refused(place, f"{folder}/model.safetensors is damaged, truncated", lambda: heal(place, mask))
        (place / folder / ONE).write_bytes(whole)


# --- the output


@pytest.mark.parametrize("out", ["later", "earlier", "later/inside", "earlier/deep/inside", "later/../earlier/x", "."])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_holds_or_lies_in_an_input(place, mask, out, overwrite):
    view = rolled_back(place / "later", to=place / "earlier", mask=mask)
    refused(place, "is, holds or lies in one of the inputs", lambda: save(view, place / out, overwrite=overwrite))
    (place / "link").symlink_to(place / "later")
    refused(place, "is, holds or lies in", lambda: save(view, place / "link", overwrite=overwrite))
    refused(place, "is, holds or lies in", lambda: save(view, place / "link/x", overwrite=overwrite))


def test_an_existing_output(place, mask):
    (place / "out").mkdir()
    refused(place, r"out exists: choose another folder, or pass overwrite=True", lambda: heal(place, mask))
    heal(place, mask, overwrite=True)
    shutil.rmtree(place / "out")
    (place / "out").write_text("a file")
    refused(place, "out is a file or a link, and never replaced", lambda: heal(place, mask, overwrite=True))
    (place / "out").unlink()
    (place / "out").symlink_to(place / "nowhere")
    refused(place, "out is a file or a link", lambda: heal(place, mask, overwrite=True))


def test_what_comes_from_no_folder(place):
    refused(place, "writes what comes from a folder", lambda: save({"a": torch.ones(1)}, place / "out"))


def test_links_that_lead_nowhere_or_round(place, mask):
    (place / "later/gone").symlink_to(place / "nowhere")
    refused(place, "later/gone is neither a file nor a folder", lambda: heal(place, mask))
    (place / "later/gone").unlink()
    (place / "later/sub").mkdir()
    (place / "later/sub/loop").symlink_to(place / "later")
    with pytest.raises(ValueError, match="is a link to a folder that it lies in"):
        heal(place, mask)
    assert sorted(os.listdir(place)) == ["base", "earlier", "later"]


FULL = OSError(errno.ENOSPC, "No space left on device")


def full(*_: Any, **__: Any) -> Any:
    raise FULL


@pytest.mark.parametrize("where", ["copy", "fallback", "papers", "sync", "rename"])
def test_a_full_disk_leaves_nothing(place, mask, monkeypatch, where):
    view = rolled_back(place / "later", to=place / "earlier", mask=mask)

    def unsupported(*_: Any) -> int:
        raise OSError(errno.EXDEV, "other file system")

    if where == "fallback":
        monkeypatch.setattr(os, "copy_file_range", unsupported)
        monkeypatch.setattr(shutil, "copyfileobj", full)
    elif where == "copy":
        monkeypatch.setattr(os, "copy_file_range", full)
    elif where == "papers":
        monkeypatch.setattr(Path, "write_bytes", full)
    elif where == "sync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "rename", full)
    before, tree = {n: hashes(place / n) for n in ("base", "earlier", "later")}, sorted(place.rglob("*"))
    with pytest.raises(OSError, match="No space left"):
        save(view, place / "new/parents/out")
    monkeypatch.undo()
    assert sorted(place.rglob("*")) == tree
    assert {n: hashes(place / n) for n in before} == before


def test_an_unwritable_place(place, mask, monkeypatch):
    real = Path.mkdir

    def mkdir(self: Path, *args: Any, **kwargs: Any) -> None:
        if self.name.endswith(".partial"):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    refused(place, "Permission denied", lambda: heal(place, mask), PermissionError)
    monkeypatch.undo()
    (place / "file").write_text("x")
    view = rolled_back(place / "later", to=place / "earlier", mask=mask)
    refused(place, "Not a directory|File exists", lambda: save(view, place / "file/out"), OSError)


def test_a_file_size_limit_of_the_system(place, mask):
    """A real refusal by the kernel, in a child process: EFBIG while the weights are copied."""
    before, tree = hashes(place), sorted(place.rglob("*"))
    view = rolled_back(place / "later", to=place / "earlier", mask=mask)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            save(view, place / "out")
        except OSError as error:
            os._exit(7 if error.errno == errno.EFBIG else 8)
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert sorted(place.rglob("*")) == tree
    assert hashes(place) == before


def test_a_disk_that_is_really_full(place, mask, tmp_path_factory):
    """A file system of 40 KiB, where mounting one is allowed."""
    mount = tmp_path_factory.mktemp("small")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(mount)], capture_output=True)
    if made.returncode:
        pytest.skip("no right to mount")
    try:
        with pytest.raises(OSError, match="No space left"):
            save(rolled_back(place / "later", to=place / "earlier", mask=mask), mount / "a/out")
        assert os.listdir(mount) == []
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_good_run_among_all_this(place, mask):
    """The fixtures are sound: without the damage nothing is refused."""
    assert Checkpoint(heal(place, mask)).keys() == Checkpoint(place / "later").keys()
