"""The earlier model is what its own configuration makes of its weights, whatever the later model's says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, downstream
from test_scores import batches
from transformers import AutoModelForCausalLM

from surgery import Checkpoint, Trajectory, sweep
from surgery.checkpoints.checkpoint import State
from surgery.checkpoints.configuration import differences
from surgery.live.earlier import earlier_model
from surgery.measure.evaluators import likelihood
from surgery.measure.history import history
from surgery.scores.damage import answered
from surgery.theory.landscape import Landscape


def saved(model: Any, folder: Path, **changes: Any) -> Path:
    """A model's folder, with some settings of its configuration changed; None takes one out."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in settings.items() if value != "gone"}))
    return folder


@pytest.mark.parametrize("family", downstream())
def test_a_folder_is_configured_as_the_model_that_wrote_it_and_as_the_one_that_reads_it(family, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    for live in (model, read):
        assert differences(State(live), Checkpoint(tmp_path)) == {}
    assert differences(Checkpoint(tmp_path), Checkpoint(tmp_path)) == {}


def logits(model: torch.nn.Module) -> torch.Tensor:
    batch = batches(labels=False)[0]
    with torch.inference_mode():
        found: torch.Tensor = model(**batch, use_cache=False).logits
    return found


LONGER = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
# family, what the later model's configuration says in another way, and how the message calls it
OTHERWISE = [
    ("qwen3", dict(rope_parameters=LONGER), r"rope_parameters\.rope_type \(default there, linear here\)"),
    ("qwen3", dict(rope_parameters=LONGER | {"extra": 2}), r"rope_parameters\.rope_type"),
    ("qwen3", dict(rms_norm_eps=0.1), "rms_norm_eps"),
    ("qwen3", dict(hidden_act="gelu"), r"hidden_act \(silu there, gelu here\)"),
    (
        "qwen3",
        dict(use_sliding_window=True, sliding_window=3, max_window_layers=0, layer_types="gone"),
        r"sliding_window \(None",
    ),
    ("gemma2", dict(final_logit_softcapping=0.1), "final_logit_softcapping"),
    ("gemma2", dict(attn_logit_softcapping=0.1), "attn_logit_softcapping"),
    ("gemma2", dict(query_pre_attn_scalar=4), "query_pre_attn_scalar"),
    ("granite", dict(logits_scaling=3.0), "logits_scaling"),
    ("granite", dict(residual_multiplier=0.5), "residual_multiplier"),
    ("qwen3_moe", dict(num_experts_per_tok=1), "num_experts_per_tok"),
    ("qwen3_moe", dict(norm_topk_prob=True), "norm_topk_prob"),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
    ("llama", dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16), "num_attention_heads"),
]


@pytest.mark.parametrize(("family", "changes", "told"), OTHERWISE, ids=[f"{f} {m}" for f, _, m in OTHERWISE])
@pytest.mark.parametrize("live", [False, True], ids=["folders", "live"])
def test_what_is_measured_is_the_folder_and_its_price_is_told(family, changes, told, live, tmp_path):
    """Whatever the two configurations are: in the later model's the earlier weights are no model that anyone had."""
    earlier = build(family, seed=1)
    earlier.save_pretrained(tmp_path / "earlier")
    folder = saved(build(family, seed=2), tmp_path / "later", **changes)
    later = AutoModelForCausalLM.from_pretrained(folder).eval() if live else folder
    run = Trajectory(earlier=tmp_path / "earlier", later=later)
    before = logits(run.load())
    with pytest.warns(UserWarning, match=rf"(?s){told}.* GB more memory"), earlier_model(run) as model:
        found = logits(model)
    assert torch.equal(found, logits(earlier))
    assert torch.equal(logits(run.load()), before)
    with earlier_model(Trajectory(earlier=earlier.state_dict(), later=later)) as swapped:
        if told == "attn_logit_softcapping" and torch.equal(logits(swapped), found):
            pytest.skip("the attention of this version of transformers does not read it")
        assert not torch.equal(logits(swapped), found)  # the change matters: else the test would pass for nothing


@pytest.mark.parametrize(
    "changes",
    [
        dict(use_cache=False), dict(eos_token_id=5, bos_token_id=6, pad_token_id=7), dict(attention_dropout=0.5),
        dict(transformers_version="4.0.0", _name_or_path="elsewhere", architectures=["Other"]),
        dict(initializer_range=0.5), dict(id2label={"0": "no"}, label2id={"no": 0}), dict(unsloth_version="1"),
        dict(rms_norm_eps="gone"), dict(rope_parameters="gone", rope_theta=10000.0),
    ],
    ids=lambda one: ", ".join(one),
)  # fmt: skip
def test_what_no_forward_pass_reads_costs_no_second_model(changes, tmp_path):
    model = build("qwen3")
    model.save_pretrained(tmp_path / "earlier")
    saved(model, tmp_path / "later", **changes)
    run = Trajectory(earlier=tmp_path / "earlier", later=tmp_path / "later")
    with earlier_model(run) as found:
        assert found is run.load()
        assert torch.equal(logits(found), logits(model))


@pytest.mark.filterwarnings("ignore:.*another configuration")
def test_every_place_that_measures_the_earlier_model_measures_its_folder(tmp_path):
    """The row of a sweep, the predictions of D and the history."""
    build("qwen3", seed=1).save_pretrained(tmp_path / "earlier")
    saved(build("qwen3", seed=2), tmp_path / "later", rope_parameters=LONGER)
    run, data = Trajectory(earlier=tmp_path / "earlier", later=tmp_path / "later"), batches(labels=True)
    own, measured = Trajectory(later=tmp_path / "earlier").load(), likelihood({"math": data})
    scored = measured(own)["math"]
    row = sweep(run, data, selectors=[], budgets=[], evaluate=measured).rows[0]
    assert (row.selector, row.metrics["math"]) == ("earlier", pytest.approx(sum(scored) / len(scored)))
    (asked, *_), far = answered(run, data, "kl")
    assert float(far(own, asked).detach()) == pytest.approx(0, abs=1e-9)
    assert history(run, measured).scores["math"][0] == row.metrics["math"]


def test_theory_follows_one_forward_pass(tmp_path):
    build("qwen3", seed=1).save_pretrained(tmp_path / "earlier")
    saved(build("qwen3", seed=2), tmp_path / "later", rms_norm_eps=0.1)
    run = Trajectory(earlier=tmp_path / "earlier", later=tmp_path / "later")
    with pytest.raises(ValueError, match="in one forward pass, and they have two: another rms_norm_eps"):
        Landscape.around(run, batches(labels=True))


@pytest.mark.parametrize("live", [False, True], ids=["folders", "live"])
@pytest.mark.parametrize(
    ("units", "changes"),
    [
        ("kv_group", dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)),
        ("value_channel", dict(num_attention_heads=8, num_key_value_heads=4, head_dim=4)),
        ("value_channel", dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)),
    ],
)
def test_units_that_mean_something_else_are_refused(units, changes, live, tmp_path):
    """The tensors have the same shapes: only the configurations say that a head's rows are others."""
    earlier = saved(build("llama", seed=1), tmp_path / "earlier", **changes)
    folder = saved(build("llama", seed=2), tmp_path / "later")
    later = AutoModelForCausalLM.from_pretrained(folder).eval() if live else folder
    for run in (Trajectory(earlier=earlier, later=later), Trajectory(base=earlier, earlier=folder, later=later)):
        with pytest.raises(ValueError, match=r"are different models: .*self_attn"):
            run.opened(units=units)
    Trajectory(earlier=earlier, later=later).opened()  # neurons of an MLP are the same ones


@pytest.mark.parametrize("live", [False, True], ids=["folders", "live"])
def test_tensors_that_nothing_reads_are_told(live, tmp_path):
    """A head of its own beside tied embeddings, and a layer too many; not what transformers leaves out."""
    config = build("qwen3").config
    config.tie_word_embeddings = True
    later = AutoModelForCausalLM.from_config(config).eval()
    later.save_pretrained(tmp_path / "later")
    held = {name: tensor.clone() for name, tensor in later.state_dict().items()}
    run = Trajectory(earlier=dict(held), later=later if live else tmp_path / "later")
    with earlier_model(run):  # a head that is the embeddings' is read
        pass
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    with earlier_model(Trajectory(earlier=dict(held), later=run.later)):
        pass
    held["lm_head.weight"] = held["lm_head.weight"] + 1
    held["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)
    run = Trajectory(earlier=held, later=run.later)
    told = r"nothing in .* reads 2 of the tensors that the mapping holds: model\.layers\.7\S+, lm_head\.weight\."
    with pytest.warns(UserWarning, match=told), earlier_model(run):
        pass


def test_a_bare_mapping_of_another_vocabulary_is_not_mixed_with_the_later_model(tmp_path):
    later = build("qwen3")
    held = dict(later.state_dict())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        held[name] = held[name][:50]
    with (
        pytest.warns(UserWarning, match="another vocabulary"),
        pytest.raises(ValueError, match=r"holds 'model\.embed_tokens\.weight' in another shape"),
        earlier_model(Trajectory(earlier=held, later=later)),
    ):
        pass
