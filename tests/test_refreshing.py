"""The laws of refreshing, over architectures, dtypes and masks; and the mutants that they have to kill."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from families import build, downstream
from test_laws import Tensors, all_neurons, expected, same, snapshot, some_neurons
from test_scores import Batch, batches
from torch import nn

from surgery import Entries, Neurons, rollback
from surgery.layout import find_layout
from surgery.layout.slots import Layout
from surgery.live import distillation
from surgery.masks.edits import Rows
from surgery.masks.entries import shapes_of
from surgery.training import Refresh
from surgery.training import leaves as refresh_copies
from surgery.training.leaves import Leaves

refreshing = import_module("surgery.training.refresh")


SGD = torch.optim.SGD
ATTENTION = [("llama", "kv_group"), ("qwen3", "value_channel"), ("phi3", "kv_group"), ("gpt2", "value_channel")]


def likelihood(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Cross entropy of the batch's labels."""
    found: torch.Tensor = model(**batch, use_cache=False).loss
    return found


def refresh(model: nn.Module, **how: Any) -> Refresh:
    """A refresh with everything defaulted: two batches, two steps of SGD."""
    given: dict[str, Any] = {"steps": 2, "lr": 0.1, "optimizer": SGD}
    return refreshing.refresh(model, how.pop("loss", likelihood), how.pop("data", batches(True)), **(given | how))


def gradients(model: nn.Module, batch: Batch, loss: Any = likelihood) -> Tensors:
    """The gradient of every parameter, the plain way."""
    model.zero_grad(set_to_none=True)
    loss(model, batch).backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def stepped(model: nn.Module, grads: Tensors, lr: float) -> Tensors:
    """θ − lr · g, computed in float32 at least and rounded once."""
    of, found = {p: grads[name] for name, p in model.named_parameters()}, snapshot(model)
    for name, p in model.named_parameters(remove_duplicate=False):  # tied weights have two names
        wide = torch.promote_types(p.dtype, torch.float32)
        found[name] = (p.detach().to(wide) - lr * of[p].to(wide)).to(p.dtype)
    return found


def few(model: nn.Module) -> Neurons:
    """Five neurons of each block."""
    return Neurons({name: torch.arange(n) < 5 for name, n in find_layout(model).sizes.items()})


def only(before: Tensors, now: Tensors, layout: Layout, mask: Neurons) -> None:
    """Nothing differs outside the mask, and something does inside."""
    assert same(now, expected(before, now, layout, mask))
    assert not same(now, before)


# The laws: each is given a model and a mask, and leaves the model as it was.


def law_slices(model: nn.Module, mask: Neurons) -> None:
    """A masked refresh leaves the rest bit-identical, with any optimiser; undo = identity, bit for bit."""
    before, layout = snapshot(model), find_layout(model)
    for optimizer in (SGD, lambda leaves, lr: torch.optim.AdamW(leaves, lr=lr / 10, weight_decay=1.0)):
        done = refresh(model, mask=mask, optimizer=optimizer)
        now = snapshot(model)
        only(before, now, layout, mask)
        view = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        moved = {n: now[n].view(view[t.element_size()]) != t.view(view[t.element_size()]) for n, t in before.items()}
        assert done.changed == sum(int(one.sum()) for one in moved.values())
        assert done.trained == sum(n * layout[name].width for name, n in mask.count().items())
        assert done.units == mask.count()
        done.undo()
        assert same(snapshot(model), before)
        done.undo()
        assert same(snapshot(model), before)


def law_step(model: nn.Module, mask: Neurons) -> None:
    """One SGD step is θ − lr · g; a masked one is the same on the slices."""
    before, layout, (first, _) = snapshot(model), find_layout(model), batches(True)
    want = stepped(model, gradients(model, first), 0.1)
    with refresh(model, steps=1) as done:
        plain = snapshot(model)
        assert done.trained == sum(p.numel() for p in model.parameters())
    for name, tensor in want.items():
        torch.testing.assert_close(plain[name], tensor, rtol=1e-5, atol=1e-7)
    with refresh(model, steps=1, mask=mask):
        masked = snapshot(model)
    want = expected(before, plain, layout, mask)
    for name, tensor in want.items():
        torch.testing.assert_close(masked[name], tensor, rtol=1e-5, atol=1e-7)
    assert same(snapshot(model), before)


def law_two_steps(model: nn.Module, mask: Neurons) -> None:
    """The second step's gradient is taken at the first step's weights, on the second batch, and of it alone."""
    before, layout, lr = snapshot(model), find_layout(model), 0.1
    for batch in batches(True):
        new = expected(snapshot(model), stepped(model, gradients(model, batch), lr), layout, mask)
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                tensor.copy_(new[name])
    want = snapshot(model)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(before[name])
    with refresh(model, mask=mask, lr=lr):
        for name, tensor in snapshot(model).items():
            torch.testing.assert_close(tensor, want[name], rtol=1e-5, atol=1e-7)
    assert same(snapshot(model), before)


def law_alternate(model: nn.Module, mask: Neurons) -> None:
    """A step descends on the weighted sum; the weight 0 is the same as not at all, bit for bit."""
    first, second = batches(True)
    both, lr, weight = [gradients(model, one) for one in (first, second)], 0.1, 0.7
    want = stepped(model, {n: g + weight * both[1][n] for n, g in both[0].items()}, lr)
    want = expected(snapshot(model), want, find_layout(model), mask)
    with refresh(model, data=[first], steps=1, alternate={"qa": (likelihood, [second], weight)}, mask=mask) as done:
        for name, tensor in snapshot(model).items():
            torch.testing.assert_close(tensor, want[name], rtol=1e-5, atol=1e-7)
        assert done.passes == 2
        assert done.steps[1].others == pytest.approx({"qa": likelihood(model, second).item()}, rel=0.2)
    adam: dict[str, Any] = {"optimizer": torch.optim.Adam, "lr": 1e-3, "steps": 3, "mask": mask}
    with refresh(model, **adam):
        without = snapshot(model)
    with refresh(model, **adam, alternate={"qa": (likelihood, [second], 0.0)}) as done:
        assert same(snapshot(model), without)
        assert done.passes == 3


def law_small_steps(model: nn.Module, mask: Neurons) -> None:
    """Steps that are too small for the weights' dtype add up: a hundred steps of 1e-5 are one of 1e-3."""
    model = model.to(torch.bfloat16)
    (name, block), *_ = find_layout(model).items()
    down = model.get_parameter(next(slot.tensor for slot in block.slots if slot.part == "down"))
    before = down.detach().clone()

    def linear(model: nn.Module, batch: Batch) -> torch.Tensor:
        return down.sum(dtype=torch.float32)

    mask = Neurons({other: mask[other] & (other == name) for other in mask})
    with refresh(model, loss=linear, steps=100, lr=1e-5, mask=mask):
        chosen = mask[name].nonzero().flatten()
        want = (before.float() - 1e-3).to(torch.bfloat16)[:, chosen]
        assert down[:, chosen].ne(before[:, chosen]).float().mean() > 0.5
        assert down[:, chosen].eq(want).float().mean() > 0.97  # but for where 100 roundings of a float32 show
    assert down.equal(before)
    model.to(torch.float32)


def law_best(model: nn.Module, mask: Neurons) -> None:
    """With ``validate`` the weights of the best step stay, the first of equals; patience stops; worse is undone."""
    seen: dict[int, Tensors] = {0: snapshot(model)}

    def keep(step: int, model: nn.Module) -> None:
        seen[step] = snapshot(model)

    for scores, patience, best, last in (
        ([0.1, 0.5, 0.3, 0.9, 0.2, 0.9], None, 3, 5),
        ([0.1, 0.5, 0.3, 0.2, 0.9, 0.9], 2, 1, 3),
        ([0.5, 0.5, 0.3, 0.2, 0.4, 0.5], None, 0, 5),
        ([-math.inf, 0.3, math.inf, 0.2, 0.4, 0.5], None, 2, 5),
    ):
        told = iter(scores)
        with refresh(
            model, steps=5, mask=mask, validate=lambda _, told=told: next(told), patience=patience, after_step=keep
        ) as done:
            assert done.kept == best
            assert done.steps[-1].step == last
            assert [one.scores["score"] for one in done.steps] == scores[: last + 1]
            assert same(snapshot(model), seen[best])
            assert (done.changed == 0) == (best == 0)
        assert same(snapshot(model), seen[0])


def law_atomic(model: nn.Module, mask: Neurons) -> None:
    """Whatever is raised, wherever, or a loss or gradient that is NaN: the old bits are put back."""
    before = snapshot(model)

    def failing(error: BaseException | None, at: int) -> Callable[..., Any]:
        calls = iter(range(100))

        def loss(model: nn.Module, batch: Batch | None = None) -> torch.Tensor:
            if next(calls) == at:
                if error is not None:
                    raise error
                return likelihood(model, batches(True)[0]) * math.nan
            return likelihood(model, batches(True)[0])

        return loss

    def raised(step: int, _: nn.Module) -> None:
        if step == 2:
            raise MemoryError

    told, broken = iter([0.1, 0.2, math.nan]), failing(RuntimeError("no"), 1)
    cases: tuple[tuple[type[BaseException], str, dict[str, Any]], ...] = (
        (KeyboardInterrupt, "", {"loss": failing(KeyboardInterrupt(), 2)}),
        (RuntimeError, "no", {"loss": failing(RuntimeError("no"), 1)}),
        (ValueError, "nan in step 3", {"loss": failing(None, 2)}),
        (MemoryError, "", {"after_step": raised}),
        (RuntimeError, "no", {"validate": lambda model: broken(model).item()}),
        (ValueError, "NaN after step 2", {"validate": lambda model: next(told)}),
        (ValueError, "NaN or infinite", {"loss": lambda m, b: likelihood(m, b) * 1e30, "lr": 1e30}),
    )
    for kind, message, how in cases:
        with pytest.raises(kind, match=message or None):
            refresh(model, steps=4, mask=mask, **how)
        assert same(snapshot(model), before)
        assert all(p.requires_grad and p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())


LAWS = (law_slices, law_step, law_two_steps, law_alternate, law_best, law_atomic)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", downstream())
def test_a_masked_refresh_leaves_the_rest_bit_identical(family, dtype):
    model = build(family, dtype)
    law_slices(model, some_neurons(find_layout(model)))


@pytest.mark.parametrize("family", downstream())
def test_one_step_is_the_gradient_s(family):
    model = build(family)
    law_step(model, some_neurons(find_layout(model)))


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral"])
def test_laws(family, law):
    model = build(family)
    law(model, few(model))


def test_small_steps_are_not_lost():
    model = build("llama")
    law_small_steps(model, few(model))


@pytest.mark.parametrize(("family", "units"), ATTENTION)
def test_units_of_attention(family, units):
    model = build(family)
    before, layout = snapshot(model), find_layout(model, units=("mlp", units))
    mask = some_neurons(layout, density=0.4)
    with refresh(model, mask=mask):
        only(before, snapshot(model), layout, mask)
    assert same(snapshot(model), before)


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_single_weights(family):
    model = build(family)
    before, (first, _) = snapshot(model), batches(True)
    shapes = shapes_of(find_layout(model))
    every = {part: torch.arange(2, n * width, 3) for part, (n, width) in shapes.items()}
    mask = Entries(every, shapes=shapes)
    want = stepped(model, gradients(model, first), 0.1)
    with refresh(model, steps=1, mask=mask) as done:
        now = snapshot(model)
        assert done.trained == sum(mask.count().values()) == sum(map(len, every.values()))
    moved = sum(int((now[name] != before[name]).sum()) for name in now)
    assert 0 < moved <= done.trained
    for name, tensor in now.items():
        chosen = tensor != before[name]
        torch.testing.assert_close(tensor[chosen], want[name][chosen], rtol=1e-5, atol=1e-7)
    assert same(snapshot(model), before)


def test_no_step_is_the_identity():
    model = build("llama")
    before = snapshot(model)
    for mask in (None, few(model)):
        done = refresh(model, steps=0, mask=mask)
        assert same(snapshot(model), before)
        assert (done.changed, done.passes, done.kept, len(done.steps)) == (0, 0, 0, 1)


class Point(nn.Module):
    """A model that is three numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor([0.20, -0.10, 0.05]))


def test_the_paper_s_example():
    """δB = (0.20, −0.10, 0.05), curvature 1 on the first two coordinates and α = 0.5: one step halves what is there."""
    model, curved = Point(), torch.tensor([1.0, 1.0, 0.0])
    seen: list[torch.Tensor] = []
    done = refresh(
        model, loss=lambda model, _: (curved * model.at.square()).sum() / 2, data=[None], steps=3, lr=0.5,
        after_step=lambda step, model: seen.append(model.at.detach().clone()),
    )  # fmt: skip
    for t, at in enumerate(seen, 1):
        torch.testing.assert_close(at, torch.tensor([0.20 * 0.5**t, -0.10 * 0.5**t, 0.05]))
    assert float(seen[0][:2].norm()) == pytest.approx(0.112, abs=5e-4)
    assert [one.step for one in done.steps] == [0, 1, 2, 3]
    assert done.steps[1].loss == pytest.approx(0.025)
    assert done.steps[1].gradient == pytest.approx(0.2236, abs=1e-4)


def test_distillation_brings_a_model_back():
    earlier, later = build("qwen3"), build("qwen3")
    torch.manual_seed(3)
    with torch.no_grad():
        for p in later.parameters():
            p.add_(0.02 * torch.randn_like(p))
    data = batches(True)
    loss = distillation(earlier, data)

    def near(model: nn.Module) -> float:
        with torch.no_grad():
            return -float(sum(loss(model, batch) for batch in data))

    far = near(later)
    for mask in (None, all_neurons(find_layout(later))):
        with refresh(later, loss=loss, steps=20, lr=1e-3, optimizer=torch.optim.Adam, mask=mask, validate=near):
            assert near(later) > far / 3
    with refresh(earlier, loss=loss, steps=3) as done:  # the gradient is exactly zero there
        assert done.changed == 0


def test_the_optimiser_s_state_is_of_the_masked_slices_only_and_one_gradient_is_there_at_a_time(monkeypatch):
    model, made, taken = build("llama"), [], []
    mask = few(model)
    inside = sum(n * find_layout(model)[name].width for name, n in mask.count().items())

    def adam(values: list[torch.Tensor], lr: float) -> torch.optim.Optimizer:
        made.append(torch.optim.Adam(values, lr=lr))
        return made[0]

    def take(self, tensor, original=Rows.take):
        taken.append(sum(p.grad is not None for p in model.parameters()))
        return original(self, tensor)

    monkeypatch.setattr(Rows, "take", take)

    def free(step: int, model: nn.Module) -> None:
        assert all(p.grad is None for p in model.parameters())

    with refresh(model, mask=mask, optimizer=adam, after_step=free):
        pass
    assert max(taken) == 1
    held = [value for state in made[0].state.values() for value in state.values() if value.numel() > 1]
    assert sum(value.numel() for value in held) == 2 * inside
    assert sum(p.numel() for group in made[0].param_groups for p in group["params"]) == inside
    assert inside < 0.1 * sum(p.numel() for p in model.parameters())


def test_no_random_number_is_drawn_and_the_mode_is_put_back():
    """GPT-2 has dropout: in training mode a refresh would depend on the seed."""
    model = build("gpt2").train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    model.lm_head.weight.requires_grad_(True).grad = kept = torch.ones_like(model.lm_head.weight)
    state, results = torch.get_rng_state(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        drawn = torch.get_rng_state()
        with refresh(model, validate=lambda model: float(model.training)) as done:
            results.append(snapshot(model))
            assert [one.scores["score"] for one in done.steps] == [0, 0, 0]
        assert torch.get_rng_state().equal(drawn)
    torch.set_rng_state(state)
    assert [module.training for module in model.modules()] == modes
    assert model.lm_head.weight.grad is kept
    with refresh(model):
        assert same(snapshot(model), snapshot(model))
    del results


def test_the_same_refresh_gives_the_same_bits():
    model = build("gpt2").train()
    found = []
    for _ in range(2):
        with refresh(model, optimizer=torch.optim.Adam, lr=1e-3, mask=few(model)):
            found.append(snapshot(model))
    assert same(*found)


def test_batches_come_in_their_order_then_again_and_only_when_they_are_needed():
    model, seen = build("llama"), []
    first, second = batches(True)

    def made() -> Iterator[Batch]:
        for batch in (first, second):
            seen.append("made")
            yield batch

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        seen.append("first" if batch is first else "second")
        return likelihood(model, batch)

    with refresh(model, loss=loss, data=made(), steps=4):
        assert seen == ["made", "first", "made", "second", "first", "second"]


def test_validation_by_name_and_every_so_many_steps():
    model, told = build("llama"), iter([0.1, 0.4, 0.2, 0.3])
    with refresh(
        model, steps=5, every=2, validate=lambda _: {"qa": 0.5, "math": [next(told)] * 3}, metric="math"
    ) as done:
        assert [one.step for one in done.steps if one.scores] == [0, 2, 4, 5]
        assert done.steps[2].scores == pytest.approx({"qa": 0.5, "math": 0.4})
        assert (done.kept, done.metric) == (2, "math")
    with refresh(model, validate=lambda _: {"qa": 0.5, "math": 0.1}) as done:
        assert (done.kept, done.metric) == (0, "qa")
    with pytest.raises(ValueError, match=r"no 'code'; it gave qa"):
        refresh(model, validate=lambda _: {"qa": 0.5}, metric="code")


def test_the_report(tmp_path):
    model = build("llama")
    told = iter([0.1, 0.4, 0.2])
    alternate = {"qa": (likelihood, batches(True), 0.5)}
    with refresh(model, mask=few(model), validate=lambda _: {"math": next(told)}, alternate=alternate) as done:
        text = str(done)
        assert "10 neurons" in text
        assert "2 steps, 4 passes" in text
        assert "step 1 are kept" in text
        assert done.table().head == ("step", "loss", "loss of qa", "gradient", "math", "seconds", "")
        assert [row[-1] for row in done.table().rows] == ["", "kept", ""]
        assert done.seconds == sum(one.seconds for one in done.steps) > 0
        done.save(tmp_path / "refresh.json")
    read = json.loads((tmp_path / "refresh.json").read_text())
    assert read["kind"] == "Refresh"
    assert [one["scores"] for one in read["steps"]] == [{"math": 0.1}, {"math": 0.4}, {"math": 0.2}]
    assert read["kept"] == 1
    assert not any(key.startswith("_") for key in read)
    with refresh(model) as done:
        assert "all parameters" in str(done)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_during_the_way_back_waits_until_it_is_whole(monkeypatch):
    model = build("llama")
    before, original = snapshot(model), Rows.put
    handler, sent = signal.getsignal(signal.SIGINT), []

    def interrupted(model: nn.Module, batch: Batch) -> torch.Tensor:
        if not same(snapshot(model), before):
            os.kill(os.getpid(), signal.SIGINT)
        return likelihood(model, batch)

    def signalled(self, *args):
        original(self, *args)
        if len(sent) < 2:
            sent.append(1)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        refresh(model, mask=few(model), loss=interrupted)
    assert same(snapshot(model), before)
    done = refresh(model, mask=few(model))
    monkeypatch.setattr(Rows, "put", signalled)
    with pytest.raises(KeyboardInterrupt):
        done.undo()
    assert same(snapshot(model), before)
    assert signal.getsignal(signal.SIGINT) is handler


def test_after_a_rollback_both_are_undone_in_the_reverse_order():
    earlier, later = build("llama", seed=1), build("llama", seed=2)
    before, mask = snapshot(later), few(later)
    with rollback(later, to=earlier, mask=mask):
        between = snapshot(later)
        with refresh(later):
            assert not same(snapshot(later), between)
        assert same(snapshot(later), between)
    assert same(snapshot(later), before)


def test_originals_may_be_kept_elsewhere():
    model = build("llama")
    before = snapshot(model)
    refresh(model, mask=few(model), keep_on="cpu", validate=lambda _: 1.0).undo()
    assert same(snapshot(model), before)


def frozen(model: nn.Module) -> None:
    model.requires_grad_(False)


def partly_frozen(model: nn.Module) -> None:
    model.model.layers[1].mlp.up_proj.requires_grad_(False)


def offloaded(model: nn.Module) -> None:
    model.to("meta")


def quantised(model: nn.Module) -> None:
    down = model.model.layers[1].mlp.down_proj
    down.weight = nn.Parameter(down.weight.detach().to(torch.int8), requires_grad=False)


def eighth(model: nn.Module) -> None:
    down = model.model.layers[1].mlp.down_proj
    down.weight = nn.Parameter(down.weight.detach().to(torch.float8_e4m3fn))


def shared(model: nn.Module) -> None:
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight


@pytest.mark.parametrize(
    ("spoil", "masked", "message"),
    [
        (frozen, False, "every parameter is frozen"),
        (frozen, True, "gate_proj.weight is frozen"),
        (partly_frozen, True, r"layers.1.mlp.up_proj.weight is frozen.*requires_grad_\(True\)"),
        (offloaded, False, "meta device"),
        (offloaded, True, "meta device"),
        (quantised, True, "int8.*quantised"),
        (eighth, False, "float8.*quantised"),
        (shared, True, "shares its memory"),
    ],
)
def test_weights_that_cannot_be_trained_are_refused(spoil, masked, message):
    model = build("llama")
    mask = few(model) if masked else None
    spoil(model)
    with pytest.raises(ValueError, match=message):
        refresh(model, mask=mask)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"data": []}, "data holds no batch"),
        ({"data": {"input_ids": torch.ones(1, 2)}}, "data is one batch: put it into a list"),
        ({"data": "math.jsonl"}, r"data is 'math\.jsonl': read the file first"),
        ({"alternate": {"qa": (likelihood, [], 1.0)}}, r"alternate\['qa'\] holds no batch"),
        ({"alternate": {"qa": likelihood}}, r"expected \(loss, batches, weight\)"),
        ({"alternate": {"qa": (likelihood, [None], -1)}}, "weight -1"),
        ({"alternate": {"qa": (likelihood, [None], math.nan)}}, "weight nan"),
        ({"steps": -1}, "steps=-1"),
        ({"steps": 1.5}, "steps=1.5"),
        ({"lr": 0}, "lr=0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"lr": "1e-5"}, "lr='1e-5'"),
        ({"every": 0}, "every=0"),
        ({"patience": 0}, "patience=0"),
        ({"loss": lambda model, batch: likelihood(model, batch).detach()}, "does not depend on what is trained"),
        ({"loss": lambda model, batch: likelihood(model, batch) * math.inf}, "the loss is inf in step 1"),
        ({"mask": Neurons({"model.layers.0.mlp": torch.ones(48)})}, "holds scores"),
        ({"mask": Neurons({"model.layers.0.mlp": torch.ones(7, dtype=torch.bool)})}, "different models"),
    ],
)
def test_bad_input_is_refused(how, message):
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        refresh(model, **how)
    assert same(snapshot(model), before)


def test_an_empty_mask_is_refused():
    model = build("llama")
    with pytest.raises(ValueError, match="selects nothing"):
        refresh(model, mask=~all_neurons(find_layout(model)))


# Mutants: each is a plausible mistake; the law named beside it has to notice.


def neighbours_written(patch: pytest.MonkeyPatch) -> None:
    def shifted(self, tensor, rows, original=Rows.put):
        original(Rows(self.block, self.slot, (self.index + 1) % self.block.neurons), tensor, rows)

    patch.setattr(Rows, "put", shifted)


def neighbours_gradients(patch: pytest.MonkeyPatch) -> None:
    def add(leaves_: list[refresh_copies.Leaf], grad: torch.Tensor) -> None:
        for leaf in leaves_:
            leaf.value.grad += leaf.part.take(grad).roll(1, 0)

    patch.setattr(refresh_copies, "_add", add)


def gradients_pile_up(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Leaves, "clear", lambda self: None)


def everything_is_decayed(patch: pytest.MonkeyPatch) -> None:
    def write(self, original=Leaves.write):
        original(self)
        with torch.no_grad():
            for p in self.model.parameters():
                p.mul_(0.99)

    patch.setattr(Leaves, "write", write)


def no_way_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Leaves, "back", lambda self: None)


def narrow_leaves(patch: pytest.MonkeyPatch) -> None:
    def write(self, original=Leaves.write):
        original(self)
        with torch.no_grad():
            for leaf in self.leaves:
                leaf.value.copy_(leaf.part.take(leaf.parameter.detach()))

    patch.setattr(Leaves, "write", write)


def the_last_is_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(refreshing._Judge, "settle", lambda self, last: self.step)


def the_best_is_not_copied(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Leaves, "copy", lambda self: [leaf.value for leaf in self.leaves])


def smaller_is_better(patch: pytest.MonkeyPatch) -> None:
    def call(self, step, original=refreshing._Judge.__call__):
        validate = self.validate
        self.validate = lambda model: -validate(model)
        found = original(self, step)
        self.validate = validate
        return {name: -value for name, value in found.items()}

    patch.setattr(refreshing._Judge, "__call__", call)


def weights_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    def domains(*args, original=refreshing._domains):
        return [refreshing._Domain(d.name, d.loss, d.batches, 1.0) for d in original(*args)]

    patch.setattr(refreshing, "_domains", domains)


def a_zero_weight_is_a_pass(patch: pytest.MonkeyPatch) -> None:
    def domains(loss, data, alternate, original=refreshing._domains):
        given = {name: (*one[:2], one[2] or 1e-3) for name, one in (alternate or {}).items()}
        return original(loss, data, given)

    patch.setattr(refreshing, "_domains", domains)


def nan_goes_on(patch: pytest.MonkeyPatch) -> None:
    class Blind:
        inf, isfinite, isnan = math.inf, staticmethod(lambda _: True), staticmethod(lambda _: False)

    patch.setattr(refreshing, "math", Blind)


def the_same_batch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(refreshing, "_cycled", lambda data, what: iter([next(iter(data))] * 100))


MUTANTS = [
    (neighbours_written, law_slices),
    (neighbours_gradients, law_step),
    (gradients_pile_up, law_two_steps),
    (the_same_batch, law_two_steps),
    (everything_is_decayed, law_slices),
    (no_way_back, law_slices),
    (no_way_back, law_atomic),
    (narrow_leaves, law_small_steps),
    (the_last_is_kept, law_best),
    (the_best_is_not_copied, law_best),
    (smaller_is_better, law_best),
    (weights_are_forgotten, law_alternate),
    (a_zero_weight_is_a_pass, law_alternate),
    (nan_goes_on, law_atomic),
]


@pytest.mark.parametrize(("mutant", "law"), MUTANTS, ids=lambda one: one.__name__)
def test_mutants_die(mutant, law, monkeypatch):
    """Each law holds, and does not under the mistake that it is there for."""
    law(build("llama", torch.float32), few(build("llama")))
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        law(build("llama", torch.float32), few(build("llama")))
