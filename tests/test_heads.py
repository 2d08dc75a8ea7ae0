"""Only the positions that count go through a head, as one matrix and in chunks, with the numbers of a plain pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, build, fewer, pair
from test_scores import batches
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from surgery import Trajectory, damage, likelihood
from surgery.live import distillation, heads, respond
from surgery.live.losses import cross_entropy, likelihoods, mean_loss, predicting

DATA = batches(labels=True)
SOME = (
    "llama",
    "gemma2",
    "granite",
    "cohere",
    "gpt2",
    "bert",
    "opt",
    "llama4_text",
)  # caps, scales, a head with a bias


def plain(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The logits of the positions that count, from a forward pass like anybody's."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    found: Tensor = model(**inputs, use_cache=False).logits[:, :-1][heads.positions(batch)]
    return found


class Seen(TorchDispatchMode):
    """The operations with a tensor of the vocabulary's size: their names, and the most logits that one of them made."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.names, self.most, self.rows = vocabulary, set[str](), 0, list[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if any(isinstance(one, Tensor) and self.vocabulary in one.shape for one in args):
            self.names.add(name)
        if isinstance(out, Tensor) and out.ndim and out.shape[-1] == self.vocabulary and not func.is_view:
            rows = out.numel() // self.vocabulary
            self.most = max(self.most, rows)
            self.rows += [rows] if name in ("mm", "addmm", "bmm") else []
        return out


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three positions at a time, and two of them in float32."""
    monkeypatch.setattr(heads, "CHUNK", 3 * 64)
    monkeypatch.setattr(heads, "FINE", 2 * 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_those_of_a_plain_pass(family, pieces):
    model = build(family)
    for batch in DATA:
        found = heads.reading(model, batch)
        assert found.hidden.shape == (int(heads.positions(batch).sum()), found.hidden.shape[1])
        assert found.hidden.is_contiguous()
        assert found.vocabulary == 64 > found.hidden.shape[1]  # it is no fallback: hidden states, and not logits
        assert not any("forward" in vars(one) for one in model.modules())
        torch.testing.assert_close(predicting(model, batch), plain(model, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", fewer(SOME, FAMILIES))
@pytest.mark.parametrize("divergence", [None, "kl", "hellinger"])
def test_a_loss_and_all_its_gradients_are_those_of_a_plain_pass(family, divergence, pieces):
    """Those of the head too, whether it is tied to the embeddings or not, and of a bias behind it."""
    earlier, model = pair(family)
    model.double()
    loss = cross_entropy if divergence is None else distillation(earlier.double(), DATA, divergence=divergence)
    for batch in DATA:
        z = plain(model, batch)
        if divergence is None:
            want = F.cross_entropy(z, batch["labels"][:, 1:][heads.positions(batch)])
        else:
            p, q = plain(earlier, batch).detach().log_softmax(-1), z.log_softmax(-1)
            each = ((0.5 * p).exp() - (0.5 * q).exp()).square().sum(-1) / 2
            far = (p.exp() * (p - q)).sum(-1) if divergence == "kl" else (each + 0.01**2).sqrt() - 0.01
            want = far.mean()
        found = loss(model, batch)
        torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-9)
        parameters = [p for p in model.parameters() if p.requires_grad]
        ours = torch.autograd.grad(2 * found, parameters, allow_unused=True)
        theirs = torch.autograd.grad(2 * want, parameters, allow_unused=True)
        for one, other in zip(ours, theirs, strict=True):
            assert (one is None or not one.any()) == (other is None or not other.any())
            if one is not None and other is not None:
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)
        assert any(one is not None and 64 in one.shape and bool(one.any()) for one in ours)  # the head's


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float32])
def test_the_head_s_own_gradient_does_not_depend_on_the_chunks(narrow, monkeypatch):
    """It is added up in float32."""
    model = build("llama").to(narrow)
    weight = model.get_output_embeddings().weight
    found = []
    for chunk in (64, 1 << 23):
        monkeypatch.setattr(heads, "CHUNK", chunk)
        found.append(torch.autograd.grad(cross_entropy(model, DATA[0]), weight)[0])
    scale = float(found[1].abs().max())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=scale * (2**-7 if narrow == torch.bfloat16 else 1e-6))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("ask", ["damage", "cross entropy", "likelihood", "mean loss", "answers"])
def test_the_head_is_applied_to_the_positions_that_count_as_one_matrix(family, ask, pieces):
    """As a batched product it took half of the time of D on a real model; logits of a whole batch took its memory."""
    earlier, model = pair(family)
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        model.requires_grad_(False)  # embeddings too make tensors of the vocabulary's size
    run, rows = Trajectory(earlier=earlier, later=model), sum(int(heads.positions(batch).sum()) for batch in DATA)
    loss = distillation(earlier, DATA)
    asked = {
        "damage": lambda: damage(run, DATA),
        "cross entropy": lambda: [cross_entropy(model, batch) for batch in DATA],
        "likelihood": lambda: likelihood({"math": DATA})(model),
        "mean loss": lambda: mean_loss(loss, model, DATA),
        "answers": lambda: respond(model, batches(labels=False), max_new_tokens=2),
    }
    with Seen(64) as seen:
        asked[ask]()
    assert not {"bmm", "baddbmm", "expand"} & seen.names
    if ask == "answers":
        return
    assert seen.most <= 3
    assert sum(seen.rows) == rows * (2 if ask == "damage" else 1)  # of the earlier model and of the later one


def test_a_batched_product_is_seen():
    """The law above can fail."""
    model = build("llama")
    model.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    with Seen(64) as seen:
        inner = model.model(DATA[0]["input_ids"]).last_hidden_state
        model.lm_head(inner[:, 1:])
    assert "bmm" in seen.names
    assert seen.most > 3


@pytest.mark.parametrize("divergence", ["kl", "hellinger"])
def test_at_the_earlier_model_there_is_no_gradient_at_all(divergence, pieces):
    model = build("qwen3").bfloat16()
    loss = distillation(model, DATA, divergence=divergence)
    for batch in DATA:
        found = loss(model, batch)
        found.backward()
        assert float(found.detach()) == 0
    assert not any(bool(p.grad.any()) for p in model.parameters() if p.grad is not None)


class Bare(nn.Module):
    """A model that does not say which module its head is."""

    def __init__(self, inner: nn.Module, calls: int = 1) -> None:
        super().__init__()
        self.inner, self.calls, self.config = inner, calls, inner.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        return self.inner(input_ids, attention_mask)


class Twice(Bare):
    """A model that asks its head twice."""

    @property
    def base_model(self) -> nn.Module:
        return self.inner.model

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        out = self.inner(input_ids, attention_mask)
        self.inner.lm_head(self.inner.model(input_ids, attention_mask).last_hidden_state)
        return out


@pytest.mark.parametrize("kind", [Bare, Twice])
def test_where_no_head_is_found_the_model_s_own_logits_are_taken(kind, pieces):
    model = build("llama")
    own = kind(model)
    assert torch.equal(heads.reading(own, DATA[0]).hidden, plain(model, DATA[0]))
    ours = torch.autograd.grad(cross_entropy(own, DATA[0]), list(model.parameters()))
    theirs = torch.autograd.grad(cross_entropy(model, DATA[0]), list(model.parameters()))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(likelihoods(own, DATA[0]), likelihoods(model, DATA[0]))


def test_a_forward_that_a_body_was_given_is_put_back(pieces):
    """accelerate wraps each module's own."""
    model = build("llama")
    want, real = plain(model, DATA[0]), model.model.forward
    given = model.model.forward = lambda *args, **kwargs: real(*args, **kwargs)
    torch.testing.assert_close(predicting(model, DATA[0]), want)
    assert vars(model.model)["forward"] is given


def test_an_adapter_s_model_is_read_through(pieces):
    import peft

    model = build("llama")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    found = heads.reading(adapted, DATA[0])
    assert found.hidden.shape[1] < found.vocabulary == 64
    torch.testing.assert_close(found.logits(), plain(adapted, DATA[0]))


def test_a_second_derivative_is_refused():
    """As constants the gradients would have none, in silence."""
    model = build("llama")
    loss = cross_entropy(model, DATA[0])
    with pytest.raises(RuntimeError, match="can't be differentiated twice"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
