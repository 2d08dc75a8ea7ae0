"""RegMean on a tiny model: Gram matrices by hand, and what least squares promises."""

from __future__ import annotations

import pytest
import torch
from mutants import dies
from test_gradient_baselines import setting  # noqa: F401
from torch import Tensor

from benchmarks.pareto.activations import Grams, grams, regmean, regression, solved
from benchmarks.pareto.baselines import differing
from benchmarks.pareto.changes import Setting


def test_grams_are_those_of_the_inputs_and_shared_where_the_input_is(setting: Setting) -> None:  # noqa: F811
    found, model = grams(setting), setting.model
    name = "model.layers.1.mlp.down_proj"
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    (b,), (c,) = setting.others["b"], setting.others["c"]
    c["attention_mask"][:, -1] = 0
    with torch.no_grad():
        for batch in (b, c):
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    rows = torch.cat([seen[0], seen[1].view(3, 7, -1)[:, :-1].flatten(0, 1)])
    again = grams(setting)
    torch.testing.assert_close(again.later[f"{name}.weight"], rows.T @ rows / len(rows))
    assert len(found.reads) == 7 * 2
    assert len(found.later) == 4 * 2
    layer = "model.layers.0.self_attn"
    assert found.reads[f"{layer}.q_proj.weight"] == found.reads[f"{layer}.v_proj.weight"] == f"{layer}.q_proj.weight"
    assert set(found.earlier) == set(found.later)
    assert differing(setting.later, dict(model.named_parameters())) == 0
    assert not torch.equal(again.earlier[f"{name}.weight"], again.later[f"{name}.weight"])


def layer(later: Tensor, earlier: Tensor, ga: Tensor, gb: Tensor) -> tuple[Setting, Grams]:
    one = Setting(None, "", None, [], {}, {"w": later}, {"w": earlier})  # type: ignore[arg-type]
    return one, Grams({"w": ga}, {"w": gb}, {"w": "w"})


def check_least_squares() -> None:
    """The gradient of ‖(W − WA) XA‖² + λ ‖(W − WB) XB‖² is zero at W."""
    generator = torch.Generator().manual_seed(0)
    wa, wb = torch.randn(3, 5, generator=generator), torch.randn(3, 5, generator=generator)
    xa, xb = torch.randn(5, 9, generator=generator), torch.randn(5, 9, generator=generator)
    for weight in (0.1, 1.0, 7.0):
        w = solved(*layer(wb, wa, xa @ xa.T / 9, xb @ xb.T / 9), weight)["w"].requires_grad_()
        loss = ((w - wa) @ xa).square().sum() + weight * ((w - wb) @ xb).square().sum()
        (slope,) = torch.autograd.grad(loss, w)
        assert float(slope.abs().max()) < 1e-3 * float(loss.detach())


def test_it_is_the_least_squares_solution() -> None:
    check_least_squares()


def test_a_filter_that_is_not_transposed_is_noticed() -> None:
    solve = torch.linalg.solve
    dies(
        lambda patch: patch.setattr(torch.linalg, "solve", lambda one, other: solve(one, other).T), check_least_squares
    )


def test_where_the_domains_inputs_are_apart_each_sees_its_own_model() -> None:
    generator = torch.Generator().manual_seed(0)
    wa, wb = torch.randn(3, 6, generator=generator), torch.randn(3, 6, generator=generator)
    xa, xb = torch.zeros(6, 9), torch.zeros(6, 9)
    xa[:3], xb[3:] = torch.randn(3, 9, generator=generator), torch.randn(3, 9, generator=generator)
    w = solved(*layer(wb, wa, xa @ xa.T, xb @ xb.T), 1.0, eps=1e-6)["w"]
    torch.testing.assert_close(w @ xa, wa @ xa, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(w @ xb, wb @ xb, atol=1e-3, rtol=1e-3)


def test_with_equal_inputs_the_weight_is_how_far_it_goes_back() -> None:
    one, same = torch.eye(2), torch.full((1, 2), 3.0)
    for weight, kept in ((0.0, 0.0), (1.0, 0.5), (3.0, 0.75), (1e30, 1.0)):
        found = solved(*layer(same, torch.zeros(1, 2), one, one), weight)["w"]
        assert torch.allclose(found, kept * same)
    g = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    half = solved(*layer(same, torch.zeros(1, 2), g, torch.eye(2)), 1.0, shrunk=0.5)["w"]
    shrunk = torch.tensor([[2.0, 0.5], [0.5, 2.0]])
    torch.testing.assert_close(half, same - same @ shrunk @ (shrunk + torch.eye(2)).inverse())


@pytest.mark.parametrize("method", [regression, regmean])
def test_a_heavy_weight_leaves_the_later_model_and_a_light_one_comes_near_the_earlier(
    setting: Setting,  # noqa: F811
    method: object,
) -> None:
    known = grams(setting)

    def off(new: dict[str, Tensor], aim: dict[str, Tensor], seen: dict[str, Tensor]) -> float:
        """How far the layers' outputs are from those of the aim, on one domain's inputs."""
        change = {name: new[name] - aim[name] for name in known.reads}
        return sum(float((one @ seen[known.reads[name]] * one).sum()) for name, one in change.items())

    light, heavy = method(setting, 1e-6, 0), method(setting, 1e9, 0)  # type: ignore[operator]
    assert set(light) == {name for name, tensor in setting.later.items() if "layers" in name and tensor.ndim == 2}
    assert off(light, setting.earlier, known.earlier) < 0.1 * off(setting.later, setting.earlier, known.earlier)
    assert off(heavy, setting.later, known.later) < 1e-6 * off(setting.earlier, setting.later, known.later)
