"""Scores against references computed another way: hooks and token loops for A, float64 rows for M and C."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from families import DENSE, MOE, build, downstream
from torch import nn
from torch.nn import functional as F

from surgery import (
    AMCSelector,
    Neurons,
    Trajectory,
    activation,
    allocate,
    conflict,
    damage,
    likelihood,
    magnitude,
    rollback,
    top,
)
from surgery.checkpoints import trajectory as deltas
from surgery.checkpoints.checkpoint import State
from surgery.layout import Block, find_layout
from surgery.layout.slots import Layout
from surgery.live import respond
from surgery.scores import amc as scores
from surgery.scores import reversal_cost

Batch = dict[str, torch.Tensor]
SORTED, ALL = ("jetmoe",), ("llama4_text",)
IMPLEMENTED = [(f, i) for f in MOE if f not in SORTED + ALL for i in ("eager", "batched_mm", "grouped_mm")]


def batches(labels: bool) -> list[Batch]:
    """Two batches of different length with padding, and with labels on the last tokens only, if asked for."""
    random, made = torch.Generator().manual_seed(5), []
    for rows, length, attended in ((3, 11, (11, 7, 4)), (2, 6, (5, 6))):
        ids = torch.randint(3, 64, (rows, length), generator=random)
        mask = torch.tensor([[int(i < n) for i in range(length)] for n in attended])
        batch = {"input_ids": ids.where(mask.bool(), torch.tensor(0)), "attention_mask": mask}
        if labels:
            response = mask.bool() & (torch.arange(length) >= 3)
            batch["labels"] = ids.where(response, torch.tensor(-100))
        made.append(batch)
    return made


def counted(batch: Batch) -> torch.Tensor:
    """The tokens that count, flattened: the response's, else all attended ones."""
    chosen = batch["labels"].ne(-100) if "labels" in batch else batch["attention_mask"].bool()
    return chosen.flatten()


def routed(family: str, model: nn.Module, block: Block, batch: Batch) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(token, expert, h) of every routed token, each computed by itself from the block's own weights."""
    module: Any = model.get_submodule(block.name)
    seen: dict[str, Any] = {}
    hooks = []
    if family in SORTED:
        hooks = [module.router.register_forward_hook(lambda _m, a, out: seen.update(x=a[0], logits=out[4]))]
    elif family in ALL:
        moe: Any = model.get_submodule(block.name.rpartition(".")[0])
        hooks = [moe.router.register_forward_hook(lambda _m, a, out: seen.update(x=a[0], scores=out[0]))]
    else:
        hooks = [module.register_forward_pre_hook(lambda _m, a, k: seen.update(a=[*a, *k.values()]), with_kwargs=True)]
    with torch.inference_mode():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        for hook in hooks:
            hook.remove()
        if family in SORTED:
            for t, experts in enumerate(seen["logits"].topk(module.router.top_k).indices.tolist()):
                for e in experts:
                    gate, up = F.linear(seen["x"][t], module.input_linear.weight[e]).chunk(2)
                    yield t, e, module.activation(gate) * up
        elif family in ALL:
            for t, e in seen["scores"].nonzero().tolist():
                gate, up = ((seen["x"][t] * seen["scores"][t, e]) @ module.gate_up_proj[e]).chunk(2)
                yield t, e, up * module.act_fn(gate)
        else:
            x, index = seen["a"][:2]
            for t, experts in enumerate(index.reshape(-1, index.shape[-1]).tolist()):
                for e in experts:
                    weight = module.gate_up_proj[e]
                    wide = x.reshape(-1, x.shape[-1])[t] @ (weight if module.is_transposed else weight.T)
                    wide = wide + module.gate_up_proj_bias[e] if module.has_bias else wide
                    yield t, e, type(module)._apply_gate(module, wide[None])[0]


def reference(family: str, model: nn.Module, data: list[Batch]) -> tuple[dict[str, torch.Tensor], dict[str, list[int]]]:
    """A of every block by hooks of our own and by loops over tokens; and the experts that no counted token reached."""
    means, never = {}, {}
    for block in find_layout(model).blocks:
        experts = max(block.experts, 1)
        sums = torch.zeros(experts, block.neurons // experts, dtype=torch.float64)
        counts = torch.zeros(experts, dtype=torch.float64)
        for batch in data:
            tokens = counted(batch)
            if block.experts:
                for t, e, h in routed(family, model, block, batch):
                    if tokens[t]:
                        sums[e] += h.double().abs()
                        counts[e] += 1
                continue
            heard: list[torch.Tensor] = []
            hook = model.get_submodule(block.consumer).register_forward_pre_hook(
                lambda _m, args, heard=heard: heard.append(args[0])
            )
            with torch.inference_mode():
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            hook.remove()
            (h,) = heard
            sums[0] += h.reshape(-1, h.shape[-1])[tokens].double().abs().sum(0)
            counts[0] += tokens.sum()
        means[block.name] = (sums / counts.clamp(min=1)[:, None]).flatten().float()
        never[block.name] = counts.eq(0).nonzero().flatten().tolist()
    return means, never


def check_activation(family: str, model: nn.Module, data: list[Batch]) -> Neurons:
    found = activation(model, data)
    want, never = reference(family, model, data)
    assert list(found) == list(want)
    for block in find_layout(model).blocks:
        torch.testing.assert_close(found[block.name], want[block.name], rtol=2e-4, atol=2e-6)
        per_expert = found.available(block.name).view(max(block.experts, 1), -1)
        assert per_expert.all(1).logical_not().nonzero().flatten().tolist() == never[block.name]
        assert per_expert.any(1).equal(per_expert.all(1))
    return found


@pytest.mark.parametrize("family", downstream(DENSE) + SORTED + ALL)
@pytest.mark.parametrize("labels", [False, True], ids=["attended", "labels"])
def test_activation_is_the_mean_over_the_tokens_that_count(family, labels):
    """Padding and prompts do not count; the mean is over all batches' tokens, not over the batches' means."""
    check_activation(family, build(family), batches(labels))


@pytest.mark.parametrize(("family", "implementation"), IMPLEMENTED)
def test_activation_of_experts_in_every_implementation(family, implementation):
    """The routed tokens one by one, for each way in which transformers multiplies its experts."""
    model = build(family)
    model.set_experts_implementation(implementation)
    assert model.config._experts_implementation == implementation
    check_activation(family, model, batches(labels=True))


def test_a_batch_without_a_mask_counts_every_token():
    """No attention mask and no labels: all tokens, the same as an attention mask of ones."""
    model, ids = build("llama"), batches(False)[1]["input_ids"]
    plain = activation(model, [{"input_ids": ids}])
    assert plain.equal(activation(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]))


@pytest.mark.parametrize("family", [f for f in downstream(MOE) if f not in ALL])
def test_experts_that_were_never_reached_are_named_and_not_chosen(family):
    """One counted token reaches two of four experts; the others have no activation, whatever the padding reached."""
    model = build(family)
    (batch,) = batches(labels=False)[1:]
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, 2] = 7
    found = check_activation(family, model, [{**batch, "labels": labels}])
    stacked = [block for block in find_layout(model).blocks if block.experts]
    expected = []
    for block in stacked:
        idle = (~found.available(block.name)).view(block.experts, -1).all(1).nonzero().flatten().tolist()
        assert len(idle) == 2
        expected += [f"{block.name}[{e}]" for e in idle]
    assert found.made_by["never_routed"] == expected

    others = [build(family, seed=seed) for seed in (1, 2)]
    run = Trajectory(base=others[0], earlier=others[1], later=model)
    data = [{**batch, "labels": labels}]
    for how in ("proportional", "global", "uniform"):
        mask = AMCSelector(0.4, how=how).select(run, data)
        assert sum(mask.count().values()) == round(0.4 * mask.total)
        assert not any(bool((mask[name] & ~found.available(name)).any()) for name in mask)
    with pytest.raises(ValueError, match="never reached"):
        AMCSelector(1.0).select(run, data)


@pytest.mark.parametrize("family", ["llama", "mixtral", "llama4_text", "jetmoe"])
def test_listening_leaves_no_trace(family):
    """After A the model has the hooks, the mode, the weights and the logits that it had before; also after an error."""
    model = build(family).train()
    batch = batches(False)[1]
    marks = [(len(m._forward_pre_hooks), len(m._forward_hooks), sorted(vars(m))) for m in model.modules()]
    before = {name: tensor.clone() for name, tensor in State(model).items()}
    activation(model, [batch])
    fails = model.get_submodule("model.norm").register_forward_hook(lambda *_: {}["no"])
    with pytest.raises(KeyError):
        activation(model, [batch])
    fails.remove()
    assert model.training
    assert marks == [(len(m._forward_pre_hooks), len(m._forward_hooks), sorted(vars(m))) for m in model.modules()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in State(model).items())


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_padding_on_the_left_changes_nothing(family):
    """GPT-2 counts its positions from the left end of the batch: a generation's batches gave other scores."""
    right = batches(labels=False)
    left = []
    for batch in right:
        gaps = (batch["attention_mask"] == 0).sum(1).tolist()
        left.append({k: torch.stack([v.roll(n) for v, n in zip(t, gaps, strict=True)]) for k, t in batch.items()})
        left[-1]["text"] = ["carried along"] * len(gaps)
    model, earlier = build(family), build(family, seed=1)
    for labelled in (False, True):
        if labelled:
            for batch in (*right, *left):
                batch["labels"] = batch["input_ids"].where(batch["attention_mask"].bool(), torch.tensor(-100))
        A, B = activation(model, right), activation(model, left)
        assert all(torch.allclose(A[name], B[name], atol=1e-6) for name in A)
        score = likelihood({"math": right})(model)["math"], likelihood({"math": left})(model)["math"]
        assert score[0] == pytest.approx(score[1], abs=1e-5)
    run = Trajectory(earlier=earlier, later=model)
    A, B = damage(run, right), damage(run, left)
    assert A.made_by["damage"]["tokens"] == B.made_by["damage"]["tokens"]
    assert all(torch.allclose(A[name], B[name], atol=1e-5) for name in A)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("math.jsonl", r"data is 'math\.jsonl': read the file first, load_prompts"),
        (batches(labels=True)[0], "data is one batch: put it into a list"),
        (["1 + 1 ="], "data holds a str: expected batches like"),
        ([{"prompt": "1 + 1 ="}], r"data holds a batch of \['prompt'\]"),
        ([{"input_ids": torch.ones(3, dtype=torch.long)}], r"input_ids of the shape \[3\]"),
        ([{"input_ids": torch.ones(0, 3, dtype=torch.long)}], r"input_ids of the shape \[0, 3\]"),
        ([{"input_ids": torch.full((1, 3), 99_999)}], "hold token 99999 .* 64 of them: .* another model's tokenizer"),
        ([{"input_ids": torch.ones(1, 65, dtype=torch.long)}], "65 tokens, and the model's context is 64|in a context"),
    ],
)
def test_data_that_is_none_is_refused(data, message):
    """A file's name, one batch, texts, another tokenizer's ids: what people pass first ended in a traceback."""
    model, earlier = build("qwen3"), build("qwen3", seed=1)
    run = Trajectory(earlier=earlier, later=model)
    for use in (
        lambda: activation(model, data),
        lambda: damage(run, data),
        lambda: respond(model, data, max_new_tokens=1),
        lambda: reversal_cost(run, data),
        lambda: likelihood({"math": data})(model),
    ):
        with pytest.raises(ValueError, match=message):
            use()


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_block_that_is_not_heard_is_an_error(family):
    """A forward pass that bypasses the modules' hooks (as a compiled one does) must not give zeros."""
    model = build(family)
    block = find_layout(model).blocks[1]
    if block.experts:
        parent: Any = model.get_submodule(block.name.rpartition(".")[0])
        parent.forward = lambda x: torch.zeros_like(x)
    else:
        mlp: Any = model.get_submodule(block.name)
        mlp.forward = lambda x: F.linear(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight)
    with pytest.raises(RuntimeError, match=rf"1 of 2 blocks gave no activations.*{block.name}"):
        activation(model, batches(False))


def test_data_without_tokens_is_an_error():
    """No batch at all, no response token in any, a prompt beyond the context, a model without weights."""
    model = build("llama")
    batch = batches(True)[0]
    for data in ([], [{**batch, "labels": torch.full_like(batch["labels"], -100)}]):
        with pytest.raises(ValueError, match="no token to average over"):
            activation(model, data)
    with pytest.raises(ValueError, match="context is 64"):
        activation(model, [{"input_ids": torch.ones(1, 65, dtype=torch.long)}])
    with pytest.raises(ValueError, match="meta device"):
        activation(model.to("meta"), [batch])


# M and C


def trio(family: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, nn.Module]:
    return {name: build(family, dtype, seed) for seed, name in enumerate(("base", "earlier", "later"))}


def vectors(model: nn.Module, layout: Layout, name: str) -> torch.Tensor:
    """w_n of every neuron of a block, all its slices end to end, in float64."""
    block = layout[name]
    index = torch.arange(block.neurons)
    rows = [block.rows(State(model), part, index).double().reshape(len(index), -1) for part in block.parts]
    return torch.cat(rows, 1)


@pytest.mark.parametrize("family", downstream())
def test_magnitude_and_conflict_are_the_formula(family):
    """‖δB,n‖ and max(0, −cos(δA,n, δB,n)) over whole neurons, in float64."""
    models = trio(family)
    run, layout = Trajectory(**models), find_layout(models["later"])
    M, C = magnitude(run), conflict(run)
    assert list(M) == list(C) == list(layout)
    for name in layout:
        base, earlier, later = (vectors(model, layout, name) for model in models.values())
        a, b = earlier - base, later - earlier
        torch.testing.assert_close(M[name], b.norm(dim=1).float(), rtol=1e-5, atol=0)
        cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
        torch.testing.assert_close(C[name], (-cosine).clamp(min=0).float(), rtol=1e-4, atol=1e-6)
        assert bool((C[name] > 0).any())
        assert float(C[name].max()) <= 1


def test_a_neuron_is_all_of_its_slices():
    """M of one llama neuron, from the modules themselves: gate, up, their biases and down's column."""
    models = trio("llama", torch.float32)
    M = magnitude(Trajectory(**models))
    old, new = (models[name].model.layers[1].mlp for name in ("earlier", "later"))
    for n in (0, 17, 47):
        whole = [
            torch.cat(
                [m.gate_proj.weight[n], m.up_proj.weight[n], m.down_proj.weight[:, n],
                 m.gate_proj.bias[n : n + 1], m.up_proj.bias[n : n + 1]]
            ).detach().double()
            for m in (old, new)
        ]  # fmt: skip
        assert float(M["model.layers.1.mlp"][n]) == pytest.approx(float((whole[1] - whole[0]).norm()), rel=1e-6)


def test_no_update_is_no_conflict():
    """C is 0 where either update is zero, and exactly 1 where the later undoes the earlier one."""
    models = trio("llama", torch.float32)
    with torch.no_grad():
        for model, step in ((models["earlier"], 1.0), (models["later"], -2.0)):
            model.load_state_dict(models["base"].state_dict())
            model.model.layers[0].mlp.up_proj.weight[3] += step
        models["earlier"].model.layers[0].mlp.up_proj.weight[5] += 1  # and later has it not: undone
        models["later"].model.layers[0].mlp.up_proj.weight[6] += 1  # earlier never touched it
    C = conflict(Trajectory(**models))
    assert C["model.layers.0.mlp"].nonzero().flatten().tolist() == [3, 5]
    torch.testing.assert_close(C["model.layers.0.mlp"][[3, 5]], torch.ones(2))
    assert not C["model.layers.1.mlp"].any()


@pytest.mark.parametrize("family", downstream())
def test_scores_do_not_depend_on_where_or_how_much_is_read(family, tmp_path, monkeypatch):
    """Bit for bit the same from folders and live models, in chunks of any size."""
    models = trio(family)
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    live, folder = Trajectory(**models), Trajectory(**{name: str(tmp_path / name) for name in models})
    M, C = magnitude(live), conflict(live)
    for run, chunk in ((folder, deltas.CHUNK), (folder, 700), (live, 1 << 12)):
        monkeypatch.setattr(deltas, "pieces", partial(pieces, chunk=chunk))
        assert magnitude(run).equal(M)
        assert conflict(run).equal(C)


pieces = deltas.pieces


@pytest.mark.parametrize("width", [7, 64, 333, 2560])
def test_a_rows_sum_does_not_depend_on_its_neighbours(width):
    """Inner products of rows at any offset, in any company and any memory order, at the width of a real model."""
    a, b = torch.randn(2, 37, width, generator=torch.Generator().manual_seed(0))
    whole = scores.dot(a, b)
    assert scores.dot(a.T.contiguous().T, b.T.contiguous().T).equal(whole)
    for step in (1, 3, 16):
        parts = [scores.dot(a[i : i + step], b[i : i + step]) for i in range(0, 37, step)]
        assert torch.cat(parts).equal(whole)
        parts = [scores.dot(a[i : i + step].clone(), b[i : i + step].clone()) for i in range(0, 37, step)]
        assert torch.cat(parts).equal(whole)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("width", [1, 7, 64, 333])
def test_a_displacements_product_does_not_depend_on_its_neighbours(width, columns):
    """Rows and columns of memory, each in any company; close to the exact sum."""
    a, b = torch.randn(2, 37, width, generator=torch.Generator().manual_seed(0))

    def held(one: torch.Tensor) -> torch.Tensor:
        return torch.empty(one.T.shape).copy_(one.T).T if columns else one.clone()

    for x, y in ((a, b), (a, a)):
        x, y = held(x), (held(y) if y is not x else None)
        y = x if y is None else y
        whole = scores.products(x, y)
        torch.testing.assert_close(whole, (x.double() * y.double()).sum(1), rtol=1e-5, atol=1e-5)
        for step in (1, 3, 16):
            some = [(x[i : i + step], y[i : i + step]) for i in range(0, 37, step)]
            some = [(held(one), held(other)) if x is not y else (held(one),) * 2 for one, other in some]
            assert torch.cat([scores.products(*pair) for pair in some]).equal(whole)


@pytest.mark.parametrize("family", downstream())
def test_displacements_are_all_differences_once(family, monkeypatch):
    """Whole or not, in chunks of any size: each number of each neuron once, and none is lost between runs."""
    models = trio(family)
    run = Trajectory(**models)
    base, earlier, later = run.weights("base", "earlier", "later")
    for whole, chunk in ((True, deltas.CHUNK), (True, 700), (False, deltas.CHUNK), (False, 700)):
        monkeypatch.setattr(deltas, "pieces", partial(pieces, chunk=chunk))
        monkeypatch.setattr(deltas, "_span", lambda _: 5)
        found: dict[tuple[str, str], dict[int, list[torch.Tensor]]] = {}
        for name, part, start, stop, steps in deltas.displacements(run, "base", "earlier", "later", whole=whole):
            rows = torch.stack([step.clone() for step in steps], 1)
            assert len(rows) == stop - start
            found.setdefault((name, part), {}).setdefault(start, []).append(rows)
        for (name, part), held in found.items():
            every = torch.arange(later.layout[name].neurons)
            first, second, third = (
                one.layout[name].rows(one.tensors, part, every).detach().float().reshape(len(every), -1)
                for one in (base, earlier, later)
            )
            got = torch.cat([torch.cat(held[start], 2) for start in sorted(held)])
            assert torch.equal(got, torch.stack([second - first, third - second], 1))


def test_what_can_not_be_compared_is_refused():
    """C without a base, NaN in a checkpoint, checkpoints of different models, a missing checkpoint."""
    models = trio("llama", torch.float32)
    with pytest.raises(ValueError, match="needs the base checkpoint"):
        conflict(Trajectory(earlier=models["earlier"], later=models["later"]))
    with pytest.raises(ValueError, match="needs the earlier checkpoint"):
        magnitude(Trajectory(later=models["later"]))
    with pytest.raises(ValueError, match="different models"):
        magnitude(Trajectory(earlier=build("gpt2"), later=models["later"]))
    with torch.no_grad():
        models["earlier"].model.layers[1].mlp.up_proj.weight[3, 3] = float("inf")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight.*holds 1 NaN"):
        magnitude(Trajectory(**models))


# What the scores are for


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_planted_damage_is_found_and_healed(family):
    """A few neurons are overwritten against what the earlier stage taught them: M and A×M×C find exactly those."""
    base, earlier, later = (build(family, seed=0) for _ in range(3))
    layout = find_layout(later)
    random = torch.Generator().manual_seed(1)
    planted = Neurons({n: torch.rand(s, generator=random) < 0.06 for n, s in layout.sizes.items()})
    with torch.no_grad():
        for name, tensor in State(earlier).items():
            if tensor.is_floating_point() and "inv_freq" not in name:
                tensor += 0.02 * torch.randn(tensor.shape, generator=random)
        for name, tensor in State(later).items():
            tensor.copy_(State(earlier)[name])
            if tensor.is_floating_point() and "inv_freq" not in name:
                tensor += 0.001 * torch.randn(tensor.shape, generator=random)
        for block in layout.blocks:
            index = planted.indices(block.name)
            for slot in block.slots:
                old, new = (slot.take(State(model)[slot.tensor], index) for model in (base, earlier))
                slot.put(State(later)[slot.tensor], index, new - 8 * (new - old))
    run = Trajectory(base=base, earlier=earlier, later=later)
    data = batches(False)
    M = magnitude(run)
    fraction = planted.fraction
    assert top(M, allocate(M, fraction, how="global")).equal(planted)
    assert AMCSelector(fraction, how="global").select(run, data).equal(planted)
    by_layer = AMCSelector(fraction).select(run, data)
    both = {name: min(n, planted.count()[name]) for name, n in by_layer.count().items()}
    assert (by_layer & planted).count() == both  # in each layer the planted ones come first

    def damage() -> float:
        with torch.inference_mode():
            p, q = (m(input_ids=data[0]["input_ids"]).logits.log_softmax(-1) for m in (earlier, later))
        return float(F.kl_div(q, p, log_target=True, reduction="sum"))

    hurt = damage()
    with rollback(later, to=earlier, mask=planted):
        assert damage() < 0.15 * hurt  # a router amplifies the noise that stays
    assert damage() == hurt
