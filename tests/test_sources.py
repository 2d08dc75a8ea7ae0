"""What a source of weights has to be: plain numbers, a whole model, no adapter, and no code of its own."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_bad_input import config, refused, rewrite
from test_checkpoint import some
from torch import Tensor, nn

from surgery import Checkpoint, Neurons, Trajectory, load_prompts, magnitude, rollback, rolled_back
from surgery.checkpoints.checkpoint import State
from surgery.checkpoints.checks import check_source
from surgery.checkpoints.loading import check_loads
from surgery.cli import main
from surgery.evidence import changes
from surgery.layout.on_disk import configuration

ONE, WEIGHTS = "model.safetensors", "adapter_model.safetensors"
UP = "model.layers.0.mlp.up_proj.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Three stages of one tiny model."""
    for seed, name in enumerate(("base", "earlier", "later")):
        families.build("qwen3", torch.float32, seed).save_pretrained(tmp_path / name)
    return tmp_path


@pytest.fixture
def mask() -> Neurons:
    return some(families.build("qwen3"))


# --- plain numbers


def block_fp8(tensors: dict[str, Tensor], name: str) -> None:
    scale = tensors[name].abs().max() / 448
    tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)


def scaled_int8(tensors: dict[str, Tensor], name: str) -> None:
    scale = tensors[name].abs().amax(1, keepdim=True) / 127
    tensors[name] = (tensors[name] / scale).round().to(torch.int8)
    tensors[f"{name}_scale"] = scale


def scaled_in_bf16(tensors: dict[str, Tensor], name: str) -> None:
    """Codes in a wide dtype: only the scales beside them tell."""
    scaled_int8(tensors, name)
    tensors[name] = tensors[name].to(torch.bfloat16)


def bnb_int8(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name.replace("weight", "SCB")] = tensors[name].abs().amax(1)
    tensors[name] = tensors[name].to(torch.int8)


def bnb_4bit(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = torch.zeros(tensors[name].numel() // 2, 1, dtype=torch.uint8)
    tensors |= {f"{name}.absmax": torch.ones(24), f"{name}.quant_map": torch.ones(16)}
    tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.zeros(8, dtype=torch.uint8)


def gptq(tensors: dict[str, Tensor], name: str) -> None:
    bare = name.removesuffix("weight")
    rows, columns = tensors.pop(name).shape
    tensors[f"{bare}qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
    tensors[f"{bare}qzeros"] = torch.zeros(1, rows // 8, dtype=torch.int32)
    tensors[f"{bare}scales"] = torch.ones(1, rows, dtype=torch.float16)


def compressed(tensors: dict[str, Tensor], name: str) -> None:
    rows, columns = tensors.pop(name).shape
    tensors[f"{name}_packed"] = torch.zeros(rows, columns // 8, dtype=torch.int32)
    tensors |= {f"{name}_scale": torch.ones(rows, 1), f"{name}_shape": torch.tensor([rows, columns])}


def mxfp4(tensors: dict[str, Tensor], name: str) -> None:
    bare = name.removesuffix(".weight")
    rows, columns = tensors.pop(name).shape
    tensors[f"{bare}_blocks"] = torch.zeros(rows, columns // 32, 16, dtype=torch.uint8)
    tensors[f"{bare}_scales"] = torch.zeros(rows, columns // 32, dtype=torch.uint8)


def plain_fp8(tensors: dict[str, Tensor], name: str) -> None:
    """No scales anywhere: nothing says whether the numbers are what they seem."""
    tensors[name] = tensors[name].to(torch.float8_e5m2)


FORMATS = (block_fp8, scaled_int8, scaled_in_bf16, bnb_int8, bnb_4bit, gptq, compressed, mxfp4, plain_fp8)


def each_role(place: Path, mask: Neurons, broken: Path) -> dict[str, Callable[[], Any]]:
    """Every way in which a source comes to be read."""
    live, earlier, later = families.build("qwen3", seed=2), place / "earlier", place / "later"
    loose: dict[str, Tensor] = load_file(broken / ONE)
    return {
        "base": lambda: Trajectory(base=broken, earlier=earlier, later=later).weights("base"),
        "earlier": lambda: magnitude(Trajectory(earlier=broken, later=later)),
        "later": lambda: magnitude(Trajectory(earlier=earlier, later=broken)),
        "stage": lambda: Trajectory.through({"a": earlier, "b": broken, "c": later}).opened(),
        "evidence": lambda: changes(Trajectory(earlier=broken, later=later)),
        "to": lambda: rolled_back(later, to=broken, mask=mask),
        "rolled back": lambda: rolled_back(broken, to=earlier, mask=mask),
        "live": lambda: rollback(live, to=broken, mask=mask),
        "loaded": lambda: Trajectory(later=broken).load(),
        "before loading": lambda: check_loads(Checkpoint(broken)),
        "mapping": lambda: magnitude(Trajectory(earlier=loose, later=later)),
        "live, mapping": lambda: rollback(live, to=loose, mask=mask),
    }


def refused_everywhere(place: Path, mask: Neurons, broken: Path, message: str, *but: str) -> None:
    for role, read in each_role(place, mask, broken).items():
        if role not in but:
            print(role)  # which one, where this fails
            refused(place, message, read)


@pytest.mark.parametrize("name", [UP, Q])
@pytest.mark.parametrize("quantise", FORMATS)
def test_quantised_numbers_are_refused_wherever_they_come_from(place, mask, quantise, name, monkeypatch):
    """Whole layers or one tensor, in the MLPs or beside them; nothing is read to see it, and nothing is written."""
    rewrite(place / "base", lambda tensors: quantise(tensors, name))
    monkeypatch.setattr(Checkpoint, "_mapped", lambda *_: pytest.fail("numbers were read"))
    refused_everywhere(place, mask, place / "base", rf"'{name.removesuffix('weight')[:-1]}.*quantised weights can't be")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("method", ["fp8", "bitsandbytes", "gptq", "awq", "compressed-tensors", "mxfp4"])
def test_a_configuration_that_says_quantised_is_believed(place, mask, method, nested):
    said = {"quantization_config": {"quant_method": method}}
    config(place / "base", **({"text_config": said} if nested else said))
    message = "configuration of .*(base|earlier) has a quantization_config: quantised"
    refused_everywhere(place, mask, place / "base", message, "mapping", "live, mapping")
    live = families.build("qwen3")
    live.config.quantization_config = said["quantization_config"]
    refused(place, "the live Qwen3ForCausalLM has a quant", lambda: rollback(live, to=place / "later", mask=mask))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", [UP, Q, "lm_head.weight"])
def test_a_live_model_with_quantised_layers_is_refused(place, mask, dtype, name):
    live: Any = families.build("qwen3")
    owner = live.get_submodule(name.removesuffix(".weight"))
    owner.weight = nn.Parameter(owner.weight.detach().to(dtype), requires_grad=False)
    for read in (
        lambda: rollback(live, to=place / "earlier", mask=mask),
        lambda: rolled_back(place / "later", to=live, mask=mask),
        lambda: magnitude(Trajectory(earlier=live, later=place / "later")),
    ):
        refused(place, f"'{name}' of the live Qwen3ForCausalLM is stored as {dtype}: quantised", read)


def test_stacked_experts_in_fp8_are_refused(tmp_path):
    """Their names do not end in "weight"."""
    for seed, name in enumerate(("earlier", "later")):
        families.build("gpt_oss", seed=seed).save_pretrained(tmp_path / name)
    mask = some(families.build("gpt_oss"))
    name = "model.layers.1.mlp.experts.down_proj"
    rewrite(tmp_path / "earlier", lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    for to in (tmp_path / "earlier", load_file(tmp_path / "earlier" / ONE)):
        refused(tmp_path, f"'{name}' of .* is stored as torch.float8_e4m3fn: quantised",
                lambda to=to: rolled_back(tmp_path / "later", to=to, mask=mask))  # fmt: skip


@pytest.mark.parametrize("family", families.FAMILIES)
def test_no_plain_family_is_taken_for_a_quantised_one(family):
    check_source(State(families.build(family)), family)


def test_integers_that_are_no_weights_are_fine(place, mask):
    """Masks and positions that old checkpoints hold, routing tables, counters, a scale of its own."""
    extra = {
        "model.layers.0.self_attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        "model.layers.0.self_attn.masked_bias": torch.tensor(-1e9),
        "model.layers.0.mlp.gate.tid2eid": torch.zeros(64, 2, dtype=torch.int64),
        "model.embeddings.position_ids": torch.arange(8)[None],
        "model.norm.num_batches_tracked": torch.tensor(3),
        "logit_scale": torch.tensor(2.0),
        "model.layers.0.layer_scale": torch.ones(32),
    }
    for name in ("earlier", "later"):
        rewrite(place / name, lambda tensors: tensors.update(extra))
        check_source(Checkpoint(place / name), name)
    assert rolled_back(place / "later", to=place / "earlier", mask=mask)[UP].isfinite().all()


# --- adapters


def adapter(folder: Path, weights: str = WEIGHTS, **settings: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, **settings}))
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    save_file({name.format("A"): torch.zeros(4, 32), name.format("B"): torch.zeros(48, 4)}, folder / weights)


@pytest.mark.parametrize(
    ("weights", "configured"), [("adapter_model.bin", True), ("adapter_model.bin", False), (WEIGHTS, False)]
)
def test_half_of_an_adapter_is_called_one(place, mask, weights, configured):
    shutil.rmtree(place / "base")
    adapter(place / "base", weights, base_model_name_or_path=str(place / "earlier"))
    if not configured:
        (place / "base/adapter_config.json").unlink()
    shutil.copy(place / "base" / weights, place / "copy.safetensors")
    (place / "base" / ONE).symlink_to(place / "copy.safetensors")  # only for the roles that pass a mapping
    roles = each_role(place, mask, place / "base")
    (place / "base" / ONE).unlink()
    for role, read in roles.items():
        message = (
            "is wrapped by an adapter of peft" if "mapping" in role else "holds an adapter .*without.* (merge|Load)"
        )
        refused(place, message, read, (ValueError, LookupError))


def test_an_adapter_beside_a_model_is_refused(place, mask):
    """transformers puts it on top of the weights, which it was merged into or not: nobody can tell."""
    adapter(place / "base")
    refused_everywhere(
        place, mask, place / "base", "a whole model and .*adapter_config.json", "mapping", "live, mapping"
    )


@pytest.mark.parametrize("own", [("lora_A.default.weight", "lora_B.default.weight"), ("ia3_l.default",)])
def test_a_model_saved_with_its_adapter_unmerged_is_refused(place, mask, own):
    def wrap(tensors: dict[str, Tensor]) -> None:
        bare = Q.removesuffix("weight")
        tensors[f"{bare}base_layer.weight"] = tensors.pop(Q)
        tensors.update({f"{bare}{name}": torch.zeros(1) for name in own})

    rewrite(place / "base", wrap)
    refused_everywhere(place, mask, place / "base", "is wrapped by an adapter of peft.*self_attn.q_proj")


@pytest.mark.parametrize("command", [
    "inspect base", "inspect earlier base", "select earlier base --selector M --dry-run",
    "select base later --selector M --dry-run",
    "rollback later --to base --mask mask.safetensors --dry-run",
    "rollback base --to earlier --mask mask.safetensors --dry-run",
    "sweep earlier base --evaluate nothing:here --selectors M",
])  # fmt: skip
def test_the_shell_calls_an_adapter_an_adapter(place, mask, command, monkeypatch, capsys):
    shutil.rmtree(place / "base")
    adapter(place / "base")
    mask.save(place / "mask.safetensors")
    (place / "nothing.py").write_text("def here(model): return 1.0\n")
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setattr(sys, "argv", ["surgery", *command.split()])
    with pytest.raises(SystemExit) as stopped:
        main()
    error = capsys.readouterr().err
    if command == "inspect base":
        assert stopped.value.code == 1
        assert "error: base holds an adapter that names no base" in error
    else:
        assert "base is an adapter on" in error
    assert "different models" not in error


# --- a whole model


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("name", [
    "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", Q, "model.layers.1.self_attn.k_norm.weight",
])  # fmt: skip
def test_a_model_with_a_random_weight_is_refused(place, name, meta):
    rewrite(place / "later", lambda tensors: tensors.pop(name))
    refused(place, f"later has no tensor '{name}', and .*random", load(place / "later", meta))
    rewrite(place / "later", lambda tensors: tensors.pop("model.layers.0.input_layernorm.weight"))
    refused(place, "later has no tensor '.*' and 1 more, and", load(place / "later", meta))


def load(folder: Path, meta: bool) -> Callable[[], Any]:
    """Load a folder's model, or see beforehand whether that would be refused."""
    return lambda: check_loads(Checkpoint(folder)) if meta else Trajectory(later=folder).load()


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "qwen2_moe", "gpt_oss"])
def test_whole_models_load_and_nothing_is_said(tmp_path, family, meta):
    families.build(family).save_pretrained(tmp_path)
    load(tmp_path, meta)()


@pytest.mark.parametrize("meta", [False, True])
def test_a_missing_expert_is_refused(tmp_path, meta):
    families.build("qwen2_moe").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("model.layers.0.mlp.experts.1.down_proj.weight"))
    refused(tmp_path, r"experts.down_proj' has the shape \(3, 32, 24\) in", load(tmp_path, meta))


@pytest.mark.parametrize("meta", [False, True])
def test_another_shape_than_configured_is_refused(place, meta):
    config(place / "later", intermediate_size=56)
    refused(
        place, r"proj.weight' has the shape .* in .*later, and its config.json calls for", load(place / "later", meta)
    )


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("names", [("mtp.x",), ("mtp.x", "a.y")])
def test_what_the_model_does_not_read_is_told(place, meta, names):
    rewrite(place / "later", lambda tensors: tensors.update({name: torch.ones(2) for name in names}))
    with pytest.warns(UserWarning, match=f"later holds tensor '{min(names)}'.*, which its model does not read"):
        load(place / "later", meta)()


@pytest.mark.parametrize("meta", [False, True])
def test_an_output_layer_that_is_tied_and_stored_has_to_be_the_embedding(place, meta):
    """transformers takes the stored one, and servers that tie take the embedding."""
    config(place / "later", tie_word_embeddings=True)
    refused(place, "ties 'lm_head.weight' to 'model.embed_tokens.weight', and .* two diff", load(place / "later", meta))
    same = load_file(place / "later" / ONE)["model.embed_tokens.weight"].clone()
    rewrite(place / "later", lambda tensors: tensors.update({"lm_head.weight": same}))
    load(place / "later", meta)()
    rewrite(place / "later", lambda tensors: tensors.pop("lm_head.weight"))
    load(place / "later", meta)()


@pytest.mark.parametrize("meta", [False, True])
def test_only_the_weights_that_are_read_are_loaded(place, meta):
    """transformers looks for other names: it would load a pickle, or another file that the configuration names."""
    config(place / "later", transformers_weights=ONE)
    load(place / "later", meta)()
    config(place / "later", transformers_weights="old.safetensors")
    shutil.copy(place / "earlier" / ONE, place / "later/old.safetensors")
    refused(place, "later names weights of its own, 'old.safetensors'", load(place / "later", meta))
    config(place / "later", transformers_weights=None)
    (place / "later" / ONE).unlink()  # one file is left, and read by whatever name it has
    torch.save(load_file(place / "base" / ONE), place / "later/pytorch_model.bin")
    assert Checkpoint(place / "later").keys() == Checkpoint(place / "earlier").keys()
    refused(place, "no file named model.safetensors", load(place / "later", meta), OSError)


def test_nothing_is_read_to_see_that_a_folder_loads(place, monkeypatch):
    monkeypatch.setattr(Checkpoint, "_mapped", lambda *_: pytest.fail("numbers were read"))
    check_loads(Checkpoint(place / "later"))


def test_what_else_transformers_raises_is_a_sentence(place):
    config(place / "later", attn_implementation="flash_attention_2")
    message = "transformers can't load .*later: ImportError: .{0,240}$"
    refused(place, message, lambda: Trajectory(later=place / "later").load())


# --- code


@pytest.fixture
def mined(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose configuration, model, tokenizer and generation have code of their own, and a user who says yes."""
    folder = place / "later"
    for name in ("configuration_my", "modeling_my", "tokenization_my", "custom_generate/generate"):
        path = folder / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"from pathlib import Path\nPath({str(place / 'ran')!r}).touch()\n")
    code = {"AutoConfig": "configuration_my.C", "AutoModel": "modeling_my.M", "AutoModelForCausalLM": "modeling_my.M"}
    config(folder, auto_map=code)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_my.T", None]}})
    )
    (place / "prompts.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    monkeypatch.setenv("HF_MODULES_CACHE", str(place / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: (place / "asked").touch() or "y")
    return folder


@pytest.mark.parametrize("kind", ["my_own", "qwen3"])
def test_code_of_a_checkpoint_neither_runs_nor_is_offered(place, mask, mined, kind):
    config(mined, model_type=kind)
    told = []
    for read in (*each_role(place, mask, mined).values(), lambda: load_prompts(place / "prompts.jsonl", mined)):
        try:
            read()
        except Exception as error:  # what the code of the folder raises, too
            told.append(str(error))
        assert not (place / "ran").exists()
        assert not (place / "asked").exists()
    assert max(map(len, told)) < 800
    own = [text for text in told if "own code" in text]
    assert all("is never run" in text for text in own)
    assert bool(own) is (kind == "my_own")


def configured(folder):
    return configuration(folder, Checkpoint(folder).shapes)


def test_an_unknown_model_type_is_one_sentence(place):
    config(place / "later", model_type="nobody_knows")
    for read in (
        lambda: configured(place / "later"),
        lambda: magnitude(Trajectory(earlier=place / "later", later=place / "later")),
    ):
        refused(place, "transformers [0-9.]+ knows no model type 'nobody_knows'. Describe it .{0,200}$", read)


def test_the_folders_name_does_not_say_what_a_model_is(place):
    """transformers takes the first type that the path holds: here that of another model."""
    (place / "later").rename(place / "bert")
    path = place / "bert/config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "model_type"}))
    refused(place, "it names no model_type", lambda: configured(place / "bert"))


@pytest.mark.parametrize("setting", [
    {"attn_implementation": "nobody/kernel"}, {"_attn_implementation": "kernels-community/flash-attn2"},
    {"attn_implementation": {"": "sdpa", "text_config": "nobody/kernel"}}, {"experts_implementation": "nobody/kernel"},
    {"text_config": {"_attn_implementation": "paged|nobody/kernel@v1:it"}},
])  # fmt: skip
def test_code_on_the_hub_is_not_fetched_for_a_configuration(place, setting):
    config(place / "later", **setting)
    refused(place, "it asks for '.*/.*', code on the hub, which is never run", lambda: configured(place / "later"))
    config(place / "earlier", _attn_implementation="sdpa", experts_implementation="eager")
    assert configured(place / "earlier").model_type == "qwen3"
