"""Checkpoints on disk: what is read is what is there, and what is written differs only where it should."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery import Checkpoint, Neurons, files, rollback, rolled_back, save
from surgery.layout import find_layout

TYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def hashes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too, with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data starts, and the header: read here without the library under test."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return 8 + length, json.loads(raw[8 : 8 + length])


def write(path: Path, tensors: dict[str, tuple[str, list[int], bytes]], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file from raw bytes: any dtype, any order, an odd ``__metadata__``."""
    head: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, (dtype, shape, raw) in tensors.items():
        head[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(raw)]}
        at += len(raw)
    text = json.dumps(head, ensure_ascii=False).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(raw for _, _, raw in tensors.values()))


def add(path: Path, extra: dict[str, tuple[str, list[int], bytes]], metadata: dict[str, str] | None = None) -> None:
    """Put more tensors into a safetensors file, behind those that it has."""
    start, head = header(path)
    data = path.read_bytes()[start:]
    old = {n: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for n, e in head.items() if n != "__metadata__"}
    write(path, {**old, **extra}, metadata or head.get("__metadata__"))


def stage(folder: Path, family: str, seed: int, dtype: torch.dtype = torch.bfloat16, shard: str = "12KB") -> Path:
    families.build(family, dtype, seed).save_pretrained(folder, max_shard_size=shard)
    return folder


def some(model: torch.nn.Module, share: float = 0.2, seed: int = 0) -> Neurons:
    torch.manual_seed(seed)
    return Neurons({name: torch.rand(size) < share for name, size in find_layout(model).sizes.items()})


def expected_llama(later: Path, earlier: Path, mask: Neurons) -> dict[str, bytes]:
    """The shards of a rolled-back Llama or Qwen, worked out with numpy: rows of gate and up, columns of down."""
    source = {}
    for path in earlier.glob("model*.safetensors"):
        start, head = header(path)
        source.update({name: (path, start, entry) for name, entry in head.items() if name != "__metadata__"})
    found = {}
    for path in later.glob("model*.safetensors"):
        start, head = header(path)
        raw = bytearray(path.read_bytes())
        for name, entry in head.items():
            block = next((b for b in mask if name.startswith(f"{b}.")), None)
            if name == "__metadata__" or block is None or name.endswith("down_proj.bias"):
                continue
            origin, origin_start, origin_entry = source[name]
            assert origin_entry["shape"] == entry["shape"]
            kind, shape = TYPES[entry["dtype"]], entry["shape"]
            ours = np.frombuffer(raw, kind, int(np.prod(shape)), start + entry["data_offsets"][0]).reshape(shape)
            offset = origin_start + origin_entry["data_offsets"][0]
            theirs = np.frombuffer(origin.read_bytes(), kind, int(np.prod(shape)), offset).reshape(shape)
            chosen = mask[block].numpy()
            if "down_proj" in name:
                ours[:, chosen] = theirs[:, chosen]
            else:
                ours[chosen] = theirs[chosen]
        found[path.name] = bytes(raw)
    return found


CARD = "---\nlicense: mit\ntags: [a]\n---\n\n# Mine\n\nOld text, ümlaut.\n"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A sharded later folder full of things that nobody here knows, and an earlier one in other shards."""
    later, earlier = stage(tmp_path / "later", "llama", 1), stage(tmp_path / "earlier", "llama", 0, shard="30KB")
    shards = sorted(later.glob("model-*.safetensors"))
    assert len(shards) > 3
    extra = {
        "mtp.layers.0.weight": ("BF16", [3, 5], os.urandom(30)),
        "mtp.empty": ("F32", [0, 7], b""),
        "mtp.scalar": ("F64", [], struct.pack("<d", 2.5)),
        "mtp.steps": ("I64", [2], struct.pack("<qq", -1, 2**40)),
        "mtp.fp8": ("F8_E4M3", [3], b"\x01\x7f\x90"),
        "mtp.fp4": ("F4", [2, 4], os.urandom(4)),
    }
    add(shards[0], extra, {"format": "pt", "ключ": "odd \u2028 \n value", "zz": "{}"})
    index = json.loads((later / "model.safetensors.index.json").read_text())
    index["weight_map"].update(dict.fromkeys(extra, shards[0].name))
    (later / "model.safetensors.index.json").write_text(json.dumps(index, indent=3) + "\n\n")
    (later / "tokenizer.json").write_text('{"odd":   1}\r\n')
    (later / "tokenizer.model").write_bytes(os.urandom(999))
    (later / "README.md").write_text(CARD)
    (later / ".hidden").write_bytes(b"h")
    (later / "empty.bin.txt").write_bytes(b"")
    (later / "more/deep").mkdir(parents=True)
    (later / "more/deep/params.json").write_text("{}")
    (later / "nothing").mkdir()
    (later / f"{shards[0].name}.partial").write_bytes(b"stale, from a crashed download")
    (later / "run.sh").write_text("#!/bin/sh\n")
    (later / "run.sh").chmod(0o755)
    return later, earlier


def test_only_the_reverted_slices_differ(pair, tmp_path):
    """Shards against numpy's own edit of the bytes; every other file, header and index as it was."""
    later, earlier = pair
    before = hashes(later), hashes(earlier)
    mask = some(families.build("llama"))
    assert save(rolled_back(later, to=earlier, mask=mask), tmp_path / "deep/er/out") == tmp_path / "deep/er/out"
    assert (hashes(later), hashes(earlier)) == before
    found, shards = hashes(tmp_path / "deep/er/out"), expected_llama(later, earlier, mask)
    papers = {"surgery/mask.safetensors", "surgery.json", "README.md"}
    assert set(found) == set(before[0]) | papers
    for name in set(before[0]) - papers:
        assert found[name] == shards.get(name, before[0][name]), name
    assert sum(found[name] != before[0][name] for name in shards) >= 3
    assert (tmp_path / "deep/er/out/nothing").is_dir()
    assert os.access(tmp_path / "deep/er/out/run.sh", os.X_OK)
    assert os.listdir(tmp_path / "deep/er") == ["out"]


def test_an_empty_mask_writes_the_later_folder_and_all_neurons_the_earlier_mlps(pair, tmp_path):
    later, earlier = pair
    mask = some(families.build("llama"))
    save(rolled_back(later, to=earlier, mask=mask & ~mask), tmp_path / "none")
    save(Checkpoint(later), tmp_path / "copy")
    assert hashes(tmp_path / "copy") == hashes(later)
    for file in Checkpoint(later).files:
        assert (tmp_path / "none" / file).read_bytes() == (later / file).read_bytes()
    save(rolled_back(later, to=earlier, mask=mask | ~mask), tmp_path / "all")
    whole, old, new = Checkpoint(tmp_path / "all"), Checkpoint(earlier), Checkpoint(later)
    for name in old:
        reverted = ".mlp." in name and not name.endswith("down_proj.bias")
        assert torch.equal(whole[name], (old if reverted else new)[name]), name


def test_papers_beside_the_weights(pair, tmp_path):
    """The mask as it was, what made it, and a card that names both parents under the old card's front matter."""
    later, earlier = pair
    made_by = {"selector": {"class": "Mine", "budget": 0.2}}
    mask = Neurons(some(families.build("llama")), made_by=made_by)
    out = save(rolled_back(later, to=earlier, mask=mask, strength=0.5), tmp_path / "out")
    kept = Neurons.load(out / "surgery/mask.safetensors")
    assert kept.equal(mask)
    assert kept.made_by == made_by
    record = json.loads((out / "surgery.json").read_text())
    assert record["selector"] == made_by
    assert record["strength"] == 0.5
    assert record["neurons"] == {
        "reverted": sum(mask.count().values()), "of": mask.total, "per_block": mask.count()
    }  # fmt: skip
    assert record["parameters"] == sum(mask.count().values()) * (3 * 32 + 2)
    assert {"torch", "transformers", "safetensors"} <= set(record["versions"])
    assert set(record["later"]["sha256"]) == set(Checkpoint(later).files)
    assert set(record["to"]["sha256"]) == set(Checkpoint(earlier).files)
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\ntags: [a]\n---\n")
    assert "**later**" in card
    assert "**earlier**" in card
    assert card.endswith("# Mine\n\nOld text, ümlaut.\n")


@pytest.mark.parametrize(
    ("old", "start", "end"),
    [
        (None, b"# later", b""),
        (b"plain \xff\xfe card", b"# later", b"plain \xff\xfe card"),
        (b"\xef\xbb\xbf---\nlicense: mit\n---\nx\n", b"---\nlicense: mit\n---\n\n# later", b"\nx\n"),
        (b"---\n---\nx\n", b"---\n---\n\n# later", b"\nx\n"),
        (b"---\nno end", b"# later", b"---\nno end"),
    ],
)
def test_cards_of_all_kinds(tmp_path, old, start, end):
    later, earlier = stage(tmp_path / "later", "qwen3", 1), stage(tmp_path / "earlier", "qwen3", 0)
    if old is not None:
        (later / "README.md").write_bytes(old)
    out = save(rolled_back(later, to=earlier, mask=some(families.build("qwen3"))), tmp_path / "out")
    card = (out / "README.md").read_bytes()
    assert card.startswith(start)
    assert card.endswith(end)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "phi3", "mixtral", "gpt_oss", "deepseek_v3"])
def test_view_folder_and_live_model_agree(tmp_path, family, dtype):
    """The lazy view, the saved folder, transformers' own loading of it and a live rollback: the same bits."""
    from transformers import AutoModelForCausalLM

    later, earlier = stage(tmp_path / "later", family, 1, dtype), stage(tmp_path / "earlier", family, 0, dtype)
    mask = some(families.build(family))
    view = rolled_back(later, to=earlier, mask=mask)
    out = save(view, tmp_path / "out")
    saved = Checkpoint(out)
    assert list(view) == list(saved)
    assert all(torch.equal(view[name], saved[name]) for name in view)
    model = AutoModelForCausalLM.from_pretrained(later, dtype="auto")
    rollback(model, to=earlier, mask=mask)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_one_file_and_an_odd_name(tmp_path):
    """A single shard, also under a name of its own, and shards in a subfolder."""
    later, earlier = stage(tmp_path / "later", "qwen3", 1, shard="1GB"), stage(tmp_path / "earlier", "qwen3", 0)
    mask = some(families.build("qwen3"))
    want = expected_llama(later, earlier, mask)["model.safetensors"]
    out = save(rolled_back(later, to=earlier, mask=mask), tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == want
    (later / "model.safetensors").rename(later / "weights.safetensors")
    out = save(rolled_back(later, to=earlier, mask=mask), tmp_path / "odd")
    assert (out / "weights.safetensors").read_bytes() == want
    (later / "sub").mkdir()
    (later / "weights.safetensors").rename(later / "sub/weights.safetensors")
    names = dict.fromkeys(load_file(later / "sub/weights.safetensors"), "sub/weights.safetensors")
    (later / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    out = save(rolled_back(later, to=earlier, mask=mask), tmp_path / "nested")
    assert (out / "sub/weights.safetensors").read_bytes() == want
    assert not list(out.rglob("*.partial"))


def test_a_hub_cache_is_read_and_written_as_regular_files(tmp_path):
    """snapshots/<commit>/file → ../../blobs/<hash>, the blobs read-only; a linked subfolder too."""
    flat, earlier = stage(tmp_path / "flat", "qwen3", 1), stage(tmp_path / "earlier", "qwen3", 0)
    (flat / "README.md").write_text(CARD)
    snapshot, blobs = tmp_path / "hub/models--a--b/snapshots/abc", tmp_path / "hub/models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for at, path in enumerate(sorted(flat.iterdir())):
        shutil.copy(path, blobs / f"{at:040d}")
        (blobs / f"{at:040d}").chmod(0o444)
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{at:040d}")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/notes.txt").write_text("kept")
    (snapshot / "linked").symlink_to(tmp_path / "elsewhere")
    mask = some(families.build("qwen3"))
    before = hashes(blobs)
    out = save(rolled_back(snapshot, to=earlier, mask=mask), tmp_path / "out")
    other = save(rolled_back(flat, to=earlier, mask=mask), tmp_path / "other")
    assert hashes(blobs) == before
    assert not [path for path in out.rglob("*") if path.is_symlink()]
    assert (out / "linked/notes.txt").read_text() == "kept"
    shutil.rmtree(out / "linked")
    for name in hashes(flat).keys() - {"README.md"}:  # it names the folder
        assert (out / name).read_bytes() == (other / name).read_bytes(), name
    assert all(path.stat().st_mode & 0o200 for path in out.iterdir())


def test_overwrite_keeps_the_old_folder_until_the_new_one_is_complete(tmp_path, monkeypatch):
    later, earlier = stage(tmp_path / "later", "qwen3", 1), stage(tmp_path / "earlier", "qwen3", 0)
    mask = some(families.build("qwen3"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"old")
    seen, real = [], files._exchanged

    def exchanged(one: Path, other: Path) -> bool:
        seen.append((hashes(other), hashes(one)))
        return real(one, other)

    monkeypatch.setattr(files, "_exchanged", exchanged)
    save(rolled_back(later, to=earlier, mask=mask), out, overwrite=True)
    assert seen == [({"model.safetensors": b"old"}, hashes(out))]
    assert sorted(os.listdir(tmp_path)) == ["earlier", "later", "out"]
    want = expected_llama(later, earlier, mask)
    assert {name: data for name, data in hashes(out).items() if name in want} == want
    assert not (set(hashes(out)) - set(hashes(later)) - {"surgery.json", "README.md", "surgery/mask.safetensors"})


def test_tensors_of_every_kind_are_read(tmp_path):
    """Empty ones, scalars, integers, fp8, unaligned ones; a dtype unknown to torch is an error only when asked for."""
    write(
        tmp_path / "model.safetensors",
        {
            "odd": ("U8", [3], b"\x01\x02\x03"),
            "unaligned": ("F32", [2], struct.pack("<ff", 1.5, -2.0)),
            "empty": ("BF16", [4, 0], b""),
            "scalar": ("F64", [], struct.pack("<d", 2.5)),
            "flags": ("BOOL", [2], b"\x00\x01"),
            "steps": ("I64", [1, 1], struct.pack("<q", -5)),
            "fp8": ("F8_E4M3", [2], b"\x38\xb8"),
            "wide": ("U64", [1], struct.pack("<Q", 2**63)),
            "fp4": ("F4", [2, 2], b"\x12\x34"),
        },
        {"a.b": "c"},
    )
    found = Checkpoint(tmp_path)
    assert found["odd"].tolist() == [1, 2, 3]
    assert found["unaligned"].tolist() == [1.5, -2.0]
    assert found["empty"].shape == (4, 0)
    assert found["empty"].dtype == torch.bfloat16
    assert found["scalar"].item() == 2.5
    assert found["scalar"].shape == ()
    assert found["flags"].tolist() == [False, True]
    assert found["steps"].tolist() == [[-5]]
    assert found["fp8"].float().tolist() == [1.0, -1.0]
    assert found["wide"].item() == 2**63
    with pytest.raises(ValueError, match="F4, which can be copied but not read"):
        found["fp4"]
    assert found.shapes["fp4"] == (2, 2)
    assert "__metadata__" not in found
    with pytest.raises(KeyError, match="no tensor 'nothing'"):
        found["nothing"]


def test_reading_is_what_safetensors_reads(tmp_path):
    folder = stage(tmp_path / "a", "gpt2", 0)
    found = Checkpoint(folder)
    want = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    assert set(found) == set(want)
    assert all(torch.equal(found[name], tensor) for name, tensor in want.items())
    assert "tensors in" in repr(found)


def test_a_view_never_writes_its_parents(tmp_path):
    """Writing into what a Checkpoint or a view hands out reaches no file."""
    later, earlier = stage(tmp_path / "later", "qwen3", 1), stage(tmp_path / "earlier", "qwen3", 0)
    before = hashes(later), hashes(earlier)
    view = rolled_back(later, to=earlier, mask=some(families.build("qwen3")))
    for mapping in (view, Checkpoint(later)):
        for name in mapping:
            mapping[name].zero_()
    assert (hashes(later), hashes(earlier)) == before


def test_a_file_changed_since_it_was_opened_is_not_mangled(tmp_path):
    later, earlier = stage(tmp_path / "later", "qwen3", 1), stage(tmp_path / "earlier", "qwen3", 0)
    view = rolled_back(later, to=earlier, mask=some(families.build("qwen3")))
    for path in later.glob("model-*.safetensors"):
        add(path, {"one.more": ("U8", [1], b"1")})
    with pytest.raises(ValueError, match="was changed while"):
        save(view, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["earlier", "later"]


MEMORY = """
import sys, threading
from pathlib import Path
from surgery import Neurons, rolled_back, save

def anonymous():
    lines = Path("/proc/self/status").read_text().split("\\n")
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

folder = Path(sys.argv[1])
rolled_back(folder / "later", to=folder / "earlier", mask=Neurons.load(folder / "mask.safetensors"))  # imports
start, peak, done = anonymous(), [0.0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())
thread = threading.Thread(target=watch); thread.start()
mask = Neurons.load(folder / "mask.safetensors")
save(rolled_back(folder / "later", to=folder / "earlier", mask=mask), folder / "out")
done.set(); thread.join()
print(peak[0] - start)
"""


def test_anonymous_memory_stays_far_below_the_weights(tmp_path):
    """A 250 MB pair: what a rollback holds beyond the page cache is a small part of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=1024, intermediate_size=12288, num_hidden_layers=3, num_attention_heads=8
    )
    with torch.device("meta"):
        meta = LlamaForCausalLM(config)
    layout = find_layout(meta)
    for name, value in (("earlier", 1.0), ("later", 2.0)):
        (tmp_path / name).mkdir()
        config.save_pretrained(tmp_path / name)
        tensors = {n: torch.full(t.shape, value, dtype=torch.bfloat16) for n, t in meta.state_dict().items()}
        save_file(tensors, tmp_path / name / "model.safetensors")
        size = (tmp_path / name / "model.safetensors").stat().st_size
    mask = Neurons({name: torch.arange(n) % 50 == 0 for name, n in layout.sizes.items()})
    mask.save(tmp_path / "mask.safetensors")
    del tensors
    found = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert size > 240e6
    assert float(found.stdout) < 60, f"{found.stdout} MB for {size} bytes"
    out = Checkpoint(tmp_path / "out")
    assert out["model.layers.1.mlp.down_proj.weight"][0, :51].tolist() == [1.0] + [2.0] * 49 + [1.0]
    for name in ("earlier", "later", "out"):
        shutil.rmtree(tmp_path / name)
