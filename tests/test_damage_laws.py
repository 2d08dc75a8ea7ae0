"""What D promises in numbers: its precision in bf16, what it adds up to, how much memory it takes; with mutants."""

from __future__ import annotations

import copy
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from families import pair
from mutants import dies
from test_attribution import hellinger, kl, vectors
from test_scores import Batch, batches
from torch import nn

from benchmarks.pareto.variants import integrated
from surgery import DamageSelector, Neurons, RandomSelector, Trajectory, damage, rollback
from surgery.layout import find_layout
from surgery.live import distillation
from surgery.live.heads import positions
from surgery.live.losses import Divergence, predicting, summed

attribution = import_module("surgery.scores.damage")
inner = import_module("surgery.scores.inner_products")


JOINT = ("mlp", "kv_group")
PRECISE = [("qwen3", "mlp"), ("gpt2", JOINT), ("qwen3", JOINT), ("mixtral", "mlp"), ("gpt_oss", JOINT)]


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference, in parts of what was expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# In bf16.


@pytest.mark.parametrize("loss", ["kl", "hellinger"])
@pytest.mark.parametrize(("family", "units"), PRECISE)
def test_d_in_bf16_is_that_of_the_same_weights_in_float32(family: str, units: Any, loss: Divergence):
    """But for what the passes through the model round: up to 5 % of a block's norm here, in nine families."""
    earlier, later = pair(family, torch.bfloat16)
    narrow = damage(Trajectory(earlier=earlier, later=later), batches(labels=True), units=units, loss=loss)
    wide = Trajectory(earlier=copy.deepcopy(earlier).float(), later=copy.deepcopy(later).float())
    for name, expected in damage(wide, batches(labels=True), loss=loss, units=units).items():
        assert apart(narrow[name], expected) < 0.08, name


@pytest.mark.parametrize(("family", "units"), PRECISE)
def test_what_is_made_of_bf16_gradients_is_float32(family: str, units: Any):
    """Against the same gradients, bit for bit, whose products and sums are float64 throughout."""
    law_reduced_wide(family, units)


def test_a_hundred_times_the_same_prompts_say_the_same():
    law_summed_wide()


def law_reduced_wide(family: str = "qwen3", units: Any = "mlp") -> None:
    earlier, later = pair(family, torch.bfloat16)
    data = batches(labels=True)
    loss, layout = distillation(earlier, data), find_layout(later, units=units)
    theirs, ours = dict(earlier.named_parameters()), dict(later.named_parameters())
    expected = {block.name: torch.zeros(block.neurons, dtype=torch.float64) for block in layout.blocks}
    for batch in data:
        later.zero_grad()
        summed(loss, later, batch).backward()
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in ours.items()}
        for block in layout.blocks:
            change = vectors(ours, block) - vectors(theirs, block)
            expected[block.name] += (vectors(grads, block) * change).sum(1).detach()
    later.zero_grad(set_to_none=True)
    tokens = sum(int(positions(batch).sum()) for batch in data)
    for name, value in damage(Trajectory(earlier=earlier, later=later), data, loss=loss, units=units).items():
        assert apart(value, expected[name] / tokens) < 1e-5, name


def law_summed_wide() -> None:
    earlier, later = pair("gpt2", torch.bfloat16)
    run, data = Trajectory(earlier=earlier, later=later), batches(labels=True)[1:]
    far = distillation(earlier, data, divergence="hellinger")  # which leaves batches as they are
    often = damage(run, data * 100, loss=far)
    for name, once in damage(run, data, loss=far).items():
        assert apart(often[name], once) < 1e-5, name


def products_in_bf16(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(inner, "dot", lambda g, step: (g * step).bfloat16().sum(1).double())


def changes_in_bf16(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(inner, "dot", lambda g, step: (g * step.bfloat16()).sum(1).double())


def rows_in_bf16(patch: pytest.MonkeyPatch) -> None:
    """A row's sum, rounded."""
    patch.setattr(inner, "dot", lambda g, step: (g * step).sum(1).bfloat16().double())


def batches_in_bf16(patch: pytest.MonkeyPatch) -> None:
    def narrow(self: Any, original: Any = attribution._Total.__post_init__) -> None:
        original(self)
        self.sums = {name: value.bfloat16() for name, value in self.sums.items()}

    patch.setattr(attribution._Total, "__post_init__", narrow)


@pytest.mark.parametrize("mutant", [products_in_bf16, changes_in_bf16, rows_in_bf16, batches_in_bf16])
def test_a_narrow_reduction_dies(mutant: Any):
    dies(mutant, law_reduced_wide)


def test_batches_that_are_added_up_in_bf16_die():
    dies(batches_in_bf16, law_summed_wide)


# Along the way.


def everything(model: nn.Module, units: Any) -> Neurons:
    return Neurons({name: torch.ones(n, dtype=torch.bool) for name, n in find_layout(model, units=units).sizes.items()})


def lost(earlier: nn.Module, model: nn.Module, loss: str) -> float:
    """The loss by its definition, in float64."""
    definition = {"kl": kl, "hellinger": hellinger}[loss]
    with torch.no_grad():
        pairs = [(predicting(model, one).double(), predicting(earlier, one).double()) for one in batches(labels=True)]
    return float(sum(definition(*pair) for pair in pairs)) / sum(len(logits) for logits, _ in pairs)


def unrouted(family: str) -> tuple[nn.Module, nn.Module]:
    """A pair in which every token goes to all experts: the one kind of router that can't jump, whatever is reverted."""
    earlier, later = pair(family, step=0.05)
    for model in (earlier, later):
        for module in model.modules():
            if hasattr(module, "top_k"):
                module.top_k = 4
    return earlier, later


def law_complete(family: str = "qwen3", units: Any = "mlp", loss: Divergence = "kl", routed: bool = True) -> None:
    """Σ D along the way is what reverting all gains, to a thousandth of what was lost; the slope alone is not."""
    earlier, later = pair(family, step=0.05) if routed else unrouted(family)
    run, data = Trajectory(earlier=earlier, later=later), batches(labels=True)
    before = {name: tensor.clone() for name, tensor in later.state_dict().items()}
    found = integrated(run, data, 12, loss, units)
    slope = damage(run, data, loss=loss, units=units).made_by["damage"]["sum"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in later.state_dict().items())
    whole = gain = lost(earlier, later, loss)
    with rollback(later, to=earlier, mask=everything(later, units)):
        gain -= lost(earlier, later, loss)
    assert abs(sum(float(value.double().sum()) for value in found.values()) - gain) < 1e-3 * whole
    assert abs(slope - gain) > 4e-3 * whole


@pytest.mark.parametrize("loss", ["kl", "hellinger"])
@pytest.mark.parametrize("units", ["mlp", "kv_group", JOINT])
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "phi3", "bloom"])
def test_along_the_way_the_scores_add_up_to_the_whole_damage(family: str, units: Any, loss: Divergence):
    law_complete(family, units, loss)


@pytest.mark.parametrize("loss", ["kl", "hellinger"])
@pytest.mark.parametrize(
    ("family", "units", "routed"),
    [("qwen3_moe", "mlp", True), ("mixtral", "mlp", False), ("mixtral", JOINT, False), ("gpt_oss", JOINT, False)],
)
def test_so_do_those_of_experts_where_the_router_does_not_jump(family: str, units: Any, routed: bool, loss: Divergence):
    """The router of this Qwen3 is in the first layer, and the MLPs come after all that it reads."""
    law_complete(family, units, loss, routed)


# In memory.


MEMORY = """
import sys, tempfile, threading, torch
from pathlib import Path
from importlib import import_module
from transformers import AutoModelForCausalLM, Qwen3Config
from surgery import Trajectory, damage

attribution = import_module("surgery.scores.damage")


def anonymous():
    lines = Path("/proc/self/status").read_text().split("\\n")
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

def run(folder, hidden, layers):
    sizes = dict(hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, vocab_size=512)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=hidden // 4)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3Config(**sizes, **heads))
    for name in ("earlier", "later"):
        model.save_pretrained(f"{folder}/{hidden}/{name}")
        for p in model.parameters():
            p.data += 0.001
    run = Trajectory(**{name: f"{folder}/{hidden}/{name}" for name in ("earlier", "later")})
    live = run.load()
    for p in live.parameters():
        p.data = p.data.clone()  # in memory of its own, not the file's
    return run, sum(p.numel() * p.element_size() for p in live.parameters()) / 2**20

kept, add = [], attribution._Total.add
if sys.argv[1] == "mutant":
    def keeping(self, block, slot, grad, now):
        kept.append(grad)
        add(self, block, slot, grad, now)
    attribution._Total.add = keeping
ids = torch.arange(3, 7)[None]
data = [{"input_ids": ids + shift, "attention_mask": torch.ones_like(ids), "labels": ids + shift} for shift in (0, 9)]
with tempfile.TemporaryDirectory() as folder:
    damage(run(folder, 32, 1)[0], data)  # what torch loads late
    large, size = run(folder, 384, 12)
    start, peak, done = anonymous(), [0.0], threading.Event()
    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())
    thread = threading.Thread(target=watch); thread.start()
    found = damage(large, data)
    done.set(); thread.join()
    assert found.made_by["damage"]["loss"] > 0
    print(peak[0] - start, size)
"""


def law_one_model_in_memory(how: str = "as it is") -> None:
    """Beside the model a fifth of it: a gradient and what reduces it, activations, and no second model."""
    found = subprocess.run(
        [sys.executable, "-c", MEMORY, how], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    more, model = map(float, found.stdout.split()[-2:])
    assert more < model / 5, f"{more:.0f} MB beside a model of {model:.0f} MB"


def test_damage_holds_one_model_in_memory():
    law_one_model_in_memory()


def test_gradients_that_are_kept_are_noticed():
    dies(lambda _: None, lambda: law_one_model_in_memory("mutant"))


# What it promises.


@pytest.mark.parametrize(("power", "times"), [(2, 2.0), (1, 1.0)])
def test_all_of_d_is_twice_a_square_and_once_a_distance(power: int, times: float):
    """Of a loss that is nothing at the earlier model and grows so on the way to the later one."""
    earlier, later = pair("qwen3")
    there = dict(earlier.named_parameters())
    held = {slot.tensor for block in find_layout(later).blocks for slot in block.slots}

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        squares = sum((p - there[name].detach()).square().sum() for name, p in model.named_parameters() if name in held)
        return squares ** (power / 2)

    run, data = Trajectory(earlier=earlier, later=later), batches(labels=True)
    told = DamageSelector(1.0, loss=loss).select(run, data).made_by["damage"]
    assert told["promised"] == pytest.approx(times * told["loss"], rel=1e-4)


@pytest.mark.parametrize("units", ["mlp", JOINT])
def test_a_mask_says_what_its_units_d_adds_up_to(units: Any):
    """With a guard too: what is taken off D for other domains is no gain that was lost."""
    earlier, later = pair("qwen3")
    run, data = Trajectory(earlier=earlier, later=later), batches(labels=True)
    scores = damage(run, data, units=units)
    others = [{key: value.flip(1) for key, value in batch.items()} for batch in data]
    for protect in (None, {"other": others}):
        mask = DamageSelector(0.2, protect=protect, units=units).select(run, data)
        told = mask.made_by["damage"]
        assert told["promised"] == pytest.approx(sum(float(scores[name][mask[name]].sum()) for name in mask), rel=1e-5)
        assert {**told, "promised": 0} == {**scores.made_by["damage"], "promised": 0}
        assert told["promised"] > 0


@pytest.mark.parametrize(
    ("loss", "promised", "said"),
    [
        ("kl", 0.3, "their D adds up to 0.3 nats, more than the loss of 0.2"),
        ("hellinger", 0.3, "their D adds up to 0.3, more than the loss of 0.2"),
        ("kl", 0.2, None),
        ("hellinger", -0.1, None),
        (None, 0.3, None),  # one's own may be negative
    ],
)
def test_more_than_there_is_to_win_back_is_told(loss: str | None, promised: float, said: str | None):
    made_by = {"damage": {"loss": 0.2, "promised": promised}, "selector": {"loss": loss} if loss else {}}
    found = attribution.overpromised(made_by)
    assert found is None if said is None else str(found).startswith(said)


def test_nothing_is_told_of_other_masks():
    earlier, later = pair("qwen3")
    run, data = Trajectory(earlier=earlier, later=later), batches(labels=True)
    by_hand = damage(run, data)
    weights = DamageSelector(0.1, units="weight").select(run, data)
    for made_by in (by_hand.made_by, RandomSelector(0.1).select(run).made_by, weights.made_by, {}):
        assert attribution.overpromised(made_by) is None
