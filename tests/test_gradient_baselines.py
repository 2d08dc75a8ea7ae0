"""CRANE on a tiny model: the gate by autograd, which weights go back, and the merge by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import build
from mutants import dies
from torch import Tensor, nn

from benchmarks.pareto import gradients
from benchmarks.pareto.baselines import differing
from benchmarks.pareto.changes import Setting, applied, forget
from benchmarks.pareto.gradients import crane, gate, gated
from surgery import Trajectory
from surgery.live.losses import cross_entropy
from surgery.live.prompts import Batch
from surgery.scores.weights import Gains, entry_gains


def batch(seed: int) -> Batch:
    ids = torch.randint(0, 64, (3, 7), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.fixture
def setting() -> Setting:
    model, other = build("llama", seed=0), build("llama", seed=1)
    earlier = {name: p.detach() for name, p in model.named_parameters()}
    for name, p in other.named_parameters():
        earlier[name] = earlier[name] + 0.1 * p.detach()
    later = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = Trajectory(earlier=earlier, later=model)
    return Setting(Path(), "a", run, [batch(0)], {"b": [batch(1)], "c": [batch(2)]}, later, earlier)


def by_autograd(setting: Setting) -> dict[str, Tensor]:
    """The gate of every tensor that units lie in."""
    model: nn.Module = setting.model
    improvements = []
    for batches in (setting.data, [*setting.others["b"], *setting.others["c"]]):
        model.zero_grad()
        for one in batches:  # all have as many tokens
            (cross_entropy(model, one) / len(batches)).backward()
        delta = {name: setting.earlier[name] - setting.later[name] for name in setting.later}
        improvements.append({name: -p.grad * delta[name] for name, p in model.named_parameters()})
    model.zero_grad()
    a, b = improvements
    (live,) = setting.run.live(units=gradients.UNITS)
    names = {slot.tensor for block in live.layout.blocks for slot in block.slots}
    return {name: torch.minimum(a[name], b[name]).clamp(min=0) for name in a if name in names}


def check_gate(setting: Setting) -> None:
    expected = torch.cat([one.flatten() for one in by_autograd(setting).values()]).sort().values
    found = gate(setting).flat.sort().values
    assert torch.allclose(found, expected, atol=1e-7)
    assert 0.05 < float((found > 0).float().mean()) < 0.5


def now(setting: Setting, change: gradients.Change) -> dict[str, Tensor]:
    with applied(setting, change):
        return {name: p.detach().clone() for name, p in setting.model.named_parameters()}


def test_the_gate_is_the_lesser_of_both_improvements(setting: Setting) -> None:
    check_gate(setting)


def test_a_gate_that_asks_one_domain_alone_is_noticed(setting: Setting) -> None:
    def planted(run: Trajectory, data: object, **given: object) -> Gains:
        return entry_gains(run, setting.data, **given)

    dies(lambda patch: patch.setattr(gradients, "entry_gains", planted), lambda: check_gate(setting))


def test_the_best_gated_weights_go_back_bit_for_bit_and_no_other(setting: Setting) -> None:
    expected = by_autograd(setting)
    total = sum(one.numel() for one in expected.values())
    assert differing(setting.later, now(setting, gated(setting, 0.0, 0))) == 0
    found = now(setting, gated(setting, 0.01, 0))
    assert differing(setting.later, found) == round(0.01 * total)
    taken = {name: found[name] != setting.later[name] for name in found}
    assert all(torch.equal(found[name][taken[name]], setting.earlier[name][taken[name]]) for name in found)
    assert not any(bool(taken[name].any()) for name in found if name not in expected)
    least = min(float(expected[name][taken[name]].min()) for name in expected if bool(taken[name].any()))
    assert least >= max(float(expected[name][~taken[name]].max()) for name in expected) - 1e-7
    whole = now(setting, gated(setting, 1.0, 0))  # none without a positive gate
    assert differing(setting.later, whole) == sum(int((one > 0).sum()) for one in expected.values())


def test_cranes_merge_by_hand(setting: Setting) -> None:
    expected, found = by_autograd(setting), now(setting, crane(setting, 0.3, 0))
    for layer in {name.split(".")[2] for name in expected}:
        names = {kind: [name for name in expected if f"layers.{layer}.{kind}" in name] for kind in ("mlp", "self_attn")}
        raw = {
            kind: sum(expected[name].sum() for name in of)
            / sum(setting.later[name].square().sum() for name in of).sqrt()
            for kind, of in names.items()
        }
        for kind, of in names.items():
            for name in of:
                delta = setting.earlier[name] - setting.later[name]
                large = delta.abs() > delta.abs().median()
                moved = 0.3 * raw[kind] / raw["mlp"] * 2 * large * delta
                torch.testing.assert_close(found[name], setting.later[name] + moved, atol=2e-6, rtol=1e-4)
    assert differing(setting.later, {n: found[n] for n in found if n not in expected}) == 0
    assert differing(setting.later, now(setting, crane(setting, 0.0, 0))) == 0


def test_the_gate_is_made_once_for_all_values_and_anew_for_another_setting(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget()
    asked: list[Setting] = []
    monkeypatch.setattr(gradients, "gate", lambda one, make=gate: (asked.append(one), make(one))[1])
    for value in (0.01, 0.02):
        gated(setting, value, 0)
    crane(setting, 0.1, 0)
    assert asked == [setting]
    forget()
    gated(setting, 0.01, 0)
    assert len(asked) == 2
