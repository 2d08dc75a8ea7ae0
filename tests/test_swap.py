"""The earlier model in the later one's place: the same outputs, and every bit back afterwards."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, build
from test_attribution import pair
from test_scores import batches

from surgery import Trajectory
from surgery.checkpoints.opening import Weights
from surgery.live import earlier as swap
from surgery.live.earlier import earlier_model


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
    names, real = list(before), swap.live_tensor
    spoiled = [names[0], names[4]]

    def unreadable(source: Weights, live: Weights, name: str) -> torch.Tensor:
        if name in spoiled:
            raise OSError(f"{source.name} is gone")
        return real(source, live, name)

    def gone() -> None:
        with earlier_model(run):
            monkeypatch.setattr(swap, "live_tensor", unreadable)
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
    monkeypatch.setattr(swap, "_found", lambda *_: None)
    with earlier_model(Trajectory(earlier=tmp_path / "earlier", later=later)) as model:
        assert model is not later
        assert torch.equal(logits(model), logits(earlier))


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
