"""A trajectory of any number of checkpoints: its stages by name, and each step as a trajectory of its own."""

from __future__ import annotations

import pytest
import torch
from families import build

from surgery import Trajectory, conflict, magnitude

NAMES = ("base", "code", "math", "qa")


def test_each_step_is_the_trajectory_of_its_own_checkpoints():
    models = {name: build("llama", seed=seed) for seed, name in enumerate(NAMES)}
    steps = Trajectory.through(models).steps()
    assert list(steps) == ["code", "math", "qa"]
    assert steps["code"].base is None
    by_hand = Trajectory(base=models["code"], earlier=models["math"], later=models["qa"])
    assert magnitude(steps["qa"]).equal(magnitude(by_hand))
    assert conflict(steps["qa"]).equal(conflict(by_hand))
    assert not magnitude(steps["math"]).equal(magnitude(by_hand))


def test_earlier_and_later_are_chosen_by_name():
    run = Trajectory.through(dict(zip(NAMES, "wxyz", strict=True)), earlier="code", later="qa")
    assert (run.base, run.earlier, run.later) == ("w", "x", "z")
    assert (run.source("math"), run.source("later")) == ("y", "z")
    last = Trajectory.through(dict(zip(NAMES, "wxyz", strict=True)))
    assert (last.base, last.earlier, last.later) == ("x", "y", "z")


def test_three_given_checkpoints_are_stages_too():
    run = Trajectory(earlier="a", later="b")
    assert run.checkpoints == {"earlier": "a", "later": "b"}
    assert list(run.steps()) == ["later"]


def test_weights_are_opened_by_stage():
    models = {name: build("qwen3", seed=seed) for seed, name in enumerate(NAMES)}
    (math,) = Trajectory.through(models).weights("math")
    name = next(iter(math.tensors))
    assert torch.equal(math.tensors[name], models["math"].state_dict()[name])


def test_every_checkpoint_is_opened_by_its_own_name_whatever_role_the_name_has():
    models = {name: build("qwen3", seed=seed) for seed, name in enumerate(NAMES)}
    run = Trajectory.through(models)
    for name, weights in run.opened().items():
        tensor = next(iter(weights.tensors))
        assert torch.equal(weights.tensors[tensor], models[name].state_dict()[tensor])
    tensor = next(iter(models["base"].state_dict()))
    assert torch.equal(run.weights("base")[0].tensors[tensor], models["code"].state_dict()[tensor])  # the role


@pytest.mark.parametrize(
    ("chosen", "said"),
    [({"earlier": "qa"}, "come after"), ({"later": "law"}, "no stage is called 'law'"), ({"later": "base"}, "after")],
)
def test_stages_out_of_order_are_refused(chosen, said):
    with pytest.raises(ValueError, match=said):
        Trajectory.through(dict.fromkeys(NAMES, "x"), **chosen)


def test_one_checkpoint_is_no_trajectory():
    with pytest.raises(ValueError, match="two or more"):
        Trajectory.through({"base": "x"})
    with pytest.raises(ValueError, match="no stage is called 'law'"):
        Trajectory.through(dict.fromkeys(NAMES, "x")).source("law")
