"""The simulated GPU refuses what a GPU refuses, allows what it allows, and computes what the CPU computes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from simulated import gpu
from torch import Tensor, nn

Two = Callable[[Tensor, Tensor], object]


def pair() -> tuple[Tensor, Tensor]:
    return torch.arange(1.0, 4.0, device="cuda"), torch.arange(1.0, 4.0)


REFUSED: dict[str, Two] = {
    "sum": lambda there, here: there + here,
    "in place": lambda there, here: here.add_(there),
    "product": lambda there, here: there @ here,
    "einsum": lambda there, here: torch.einsum("i,i", there, here),
    "cat": lambda there, here: torch.cat([there, here]),
    "equal": lambda there, here: torch.equal(there, here),
    "index_select": lambda there, here: there.index_select(0, here.long() - 1),
    "index of another": lambda there, here: here[there.long() - 1],
    "out": lambda there, here: torch.neg(there, out=here),
    "generator": lambda there, here: torch.randn(3, generator=torch.Generator(), device="cuda"),
    "uniform_": lambda there, here: there.uniform_(generator=torch.Generator()),
    "numpy": lambda there, here: there.numpy(),
    "asarray": lambda there, here: np.asarray(there),
    "a model": lambda there, here: nn.Linear(3, 2).to("cuda")(here),
}


@pytest.mark.parametrize("name", REFUSED)
def test_two_devices_are_not_mixed(name):
    with gpu():
        there, here = pair()
        with pytest.raises((RuntimeError, TypeError), match=r"cuda"):
            REFUSED[name](there, here)


ALLOWED: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "a number of the other": ("cuda", lambda there, here: there + here.sum()),
    "an index of the other": ("cuda", lambda there, here: there[here.long() - 1]),
    "copy_": ("cpu", lambda there, here: here.copy_(there)),
    "cpu": ("cpu", lambda there, here: there.cpu() + here),
    "to a tensor's": ("cuda", lambda there, here: here.to(there) + there),
    "to a device": ("cuda", lambda there, here: here.to("cuda", torch.float64) * there),
    "like": ("cuda", lambda there, here: torch.zeros_like(there) + there.new_ones(3)),
    "like elsewhere": ("cpu", lambda there, here: torch.zeros_like(there, device="cpu") + here),
    "as_tensor": ("cuda", lambda there, here: torch.as_tensor(here, device="cuda")),
    "deepcopy": ("cuda", lambda there, here: copy.deepcopy(there)),
    "a view": ("cuda", lambda there, here: there[1:].view(2, 1)),
    "within torch": (
        "cuda",
        lambda there, here: nn.functional.scaled_dot_product_attention(*3 * [there.view(1, 1, 3, 1)], is_causal=True),
    ),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_a_gpu_allows(name):
    wanted, work = ALLOWED[name]
    with gpu():
        there, here = pair()
        found = work(there, here)
        assert (found.device.type, found.is_cuda) == (wanted, wanted == "cuda")
    with gpu():
        assert pair()[1].device.type == "cpu"


def test_moving_copies_and_never_changes_what_is_held():
    with gpu():
        there, here = pair()
        moved = here.to("cuda")
        moved.add_(1)
        assert here.tolist() == [1.0, 2.0, 3.0]
        assert (here.device.type, moved.device.type) == ("cpu", "cuda")
        assert there.to("cuda") is there


def test_backward_passes_and_their_hooks_are_on_it():
    seen = []
    with gpu():
        layer = nn.Linear(3, 2).to("cuda")
        layer.weight.register_post_accumulate_grad_hook(lambda p: seen.append((p.grad.device, p.grad.cpu().device)))
        layer(pair()[0]).sum().backward()
        assert [(one.type, other.type) for one, other in seen] == [("cuda", "cpu")]
        assert layer.bias.grad.device.type == "cuda"
