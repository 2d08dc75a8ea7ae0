"""The earlier model in the later one's place: the same outputs, and every bit back afterwards."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from families import FAMILIES, build
from test_attribution import pair
from test_scores import batches
from transformers import AutoModelForCausalLM

from surgery import Trajectory
from surgery.live.earlier import AsLive, earlier_model


def logits(model: torch.nn.Module) -> torch.Tensor:
    batch = batches(labels=False)[0]
    with torch.inference_mode():
        found: torch.Tensor = model(**batch, use_cache=False).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_in_and_out(family, tmp_path):
    earlier, later = pair(family, torch.bfloat16)
    earlier.save_pretrained(tmp_path / "earlier")
    later.save_pretrained(tmp_path / "later")
    run = Trajectory(earlier=tmp_path / "earlier", later=tmp_path / "later")
    later = run.load()
    before = {name: tensor.clone() for name, tensor in later.state_dict().items()}
    with earlier_model(run) as model:
        assert model is later
        assert torch.equal(logits(model), logits(Trajectory(later=tmp_path / "earlier").load()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in later.state_dict().items())


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("on_disk", [True, False])
def test_put_back_after_an_error_and_when_it_is_not_what_the_folder_holds(family, on_disk, tmp_path):
    earlier, later = pair(family, torch.bfloat16)
    earlier.save_pretrained(tmp_path / "earlier")
    later.save_pretrained(tmp_path / "later")
    run = Trajectory(earlier=tmp_path / "earlier", later=tmp_path / "later" if on_disk else later)
    later = run.load()
    with torch.no_grad():
        for parameter in list(later.parameters())[::2]:  # trained on since it was loaded
            parameter.add_(0.01)
            parameter.flatten()[0] = -0.0
    before = {name: tensor.clone() for name, tensor in later.state_dict().items()}

    def stopped() -> None:
        with earlier_model(run) as model:
            assert model is later
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    for name, tensor in later.state_dict().items():
        assert torch.equal(tensor.view(torch.int16), before[name].view(torch.int16))


def test_what_can_not_be_put_back_is_named_and_the_rest_is_put_back(tmp_path, monkeypatch):
    earlier, later = pair("qwen3")
    earlier.save_pretrained(tmp_path / "earlier")
    later.save_pretrained(tmp_path / "later")
    run = Trajectory(earlier=tmp_path / "earlier", later=tmp_path / "later")
    later = run.load()
    before = {name: tensor.clone() for name, tensor in later.state_dict().items()}
    names, real = list(before), AsLive.__getitem__
    spoiled = [names[0], names[4]]

    def unreadable(self: AsLive, name: str) -> torch.Tensor:
        if name in spoiled:
            raise OSError(f"{self.source.name} is gone")
        return real(self, name)

    def gone() -> None:
        with earlier_model(run):
            monkeypatch.setattr(AsLive, "__getitem__", unreadable)
            raise KeyError("stop")

    with pytest.raises(ExceptionGroup, match=r"2 tensors of .* could not be put back") as told:
        gone()
    assert all(name in str(told.value) for name in spoiled)
    assert len(told.value.exceptions) == 2
    assert isinstance(told.value.__context__, KeyError)  # what the body raised is still to be seen
    for name, tensor in later.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in spoiled)


def test_what_the_disk_holds_is_not_kept_in_memory(tmp_path, monkeypatch):
    earlier, later = pair("qwen3", torch.bfloat16)
    earlier.save_pretrained(tmp_path / "earlier")
    later.save_pretrained(tmp_path / "later")
    run = Trajectory(earlier=tmp_path / "earlier", later=tmp_path / "later")
    later, kept, real = run.load(), [], torch.Tensor.to

    def counted(self: torch.Tensor, *arguments: object, **named: object) -> torch.Tensor:
        if named.get("copy"):
            kept.append(self)
        return real(self, *arguments, **named)

    monkeypatch.setattr(torch.Tensor, "to", counted)
    with earlier_model(run):
        assert not kept
    with torch.no_grad():
        next(later.parameters()).add_(1)
    with earlier_model(run):
        assert len(kept) == 1


def test_loaded_beside_it_where_names_can_not_be_told(tmp_path, monkeypatch):
    earlier, later = pair("qwen3")
    earlier.save_pretrained(tmp_path / "earlier")
    monkeypatch.setattr(AsLive, "__contains__", lambda *_: False)
    run = Trajectory(earlier=tmp_path / "earlier", later=later)
    with pytest.warns(UserWarning, match="GB more memory"), earlier_model(run) as model:
        found = model
    assert found is not later
    assert torch.equal(logits(found), logits(earlier))


@pytest.mark.parametrize(
    ("setting", "other"),
    [("rope_parameters", {"rope_type": "default", "rope_theta": 50.0}), ("tie_word_embeddings", True)],
)
def test_what_is_measured_is_the_folder_whatever_its_config_says(setting, other, tmp_path):
    """With the later model's rotary base, or its tied embeddings, the earlier weights are no model that anyone had."""
    earlier = build("qwen3", seed=1)
    config = deepcopy(earlier.config)
    setattr(config, setting, other)
    later = AutoModelForCausalLM.from_config(config).eval()
    earlier.save_pretrained(tmp_path / "earlier")
    later.save_pretrained(tmp_path / "later")
    run = Trajectory(earlier=tmp_path / "earlier", later=tmp_path / "later")
    with pytest.warns(UserWarning, match=setting), earlier_model(run) as model:
        assert torch.equal(logits(model), logits(earlier))


def test_a_block_inside_another_is_of_its_own_checkpoint(tmp_path):
    models = {name: build("qwen3", seed=seed) for seed, name in enumerate(("base", "earlier", "later"))}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    run = Trajectory.through({name: tmp_path / name for name in models})
    with earlier_model(run):
        with earlier_model(run.back_to("base")) as model:
            assert torch.equal(logits(model), logits(models["base"]))
        with earlier_model(run) as model:
            assert torch.equal(logits(model), logits(models["earlier"]))
    assert torch.equal(logits(run.load()), logits(models["later"]))


def test_a_model_that_is_converted_meanwhile_is_put_back(tmp_path):
    """The old bits went into tensors that were the model's no more."""
    earlier, later = pair("qwen3")
    later.save_pretrained(tmp_path)
    run = Trajectory(earlier=earlier.state_dict(), later=tmp_path)
    with earlier_model(run):
        run.load(dtype=torch.float64)
    for name, tensor in run.load().state_dict().items():
        assert torch.equal(tensor, later.state_dict()[name].double())


def test_another_model_and_a_bare_mapping_are_told_before_they_are_asked(tmp_path):
    earlier, later = build("gpt2"), build("qwen3")
    later.save_pretrained(tmp_path)
    for one in (later, str(tmp_path)):
        with pytest.raises(ValueError, match="different models"), earlier_model(Trajectory(earlier=earlier, later=one)):
            pass
    bare = dict(later.state_dict())
    with (
        pytest.raises(ValueError, match="earlier and later are bare mappings of tensors, which answer nothing"),
        earlier_model(Trajectory(earlier=bare, later=bare)),
    ):
        pass
