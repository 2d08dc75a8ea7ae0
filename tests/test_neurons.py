"""Neurons: one number per neuron, its arithmetic, and its file."""

from __future__ import annotations

from operator import and_, or_

import numpy as np
import pytest
import torch
from families import build
from safetensors.torch import save_file

from surgery import Entries, Neurons, rollback, rolled_back, top


def scores(*values: list[float], **extra: object) -> Neurons:
    return Neurons({f"layers.{i}.mlp": torch.tensor(v) for i, v in enumerate(values)}, **extra)  # type: ignore[arg-type]


def test_a_file_gives_back_everything(tmp_path):
    """Values, missing neurons, what made them and the order of the blocks (10 after 2, not sorted by name)."""
    values = {f"layers.{i}.mlp": torch.randn(5) for i in (2, 10, 0)}
    missing = {"layers.10.mlp": torch.tensor([True, False, False, True, False])}
    made_by = {"activation": {"tokens": 7}, "path": "läufe/a"}
    before = Neurons(values, missing=missing, made_by=made_by)
    before.save(tmp_path / "n.safetensors")
    after = Neurons.load(tmp_path / "n.safetensors")
    assert list(after) == list(values)
    assert after.equal(before)
    assert after.made_by == made_by
    assert list(after.missing) == ["layers.10.mlp"]
    assert after.available("layers.10.mlp").tolist() == [False, True, True, False, True]
    assert not after.is_mask


def test_a_mask_gives_back_a_mask(tmp_path):
    """A mask stays a mask in its file, also where two blocks share one tensor."""
    bits = torch.tensor([True, False])
    mask = Neurons({"b": bits, "a": bits})
    mask.save(tmp_path / "m.safetensors")
    found = Neurons.load(tmp_path / "m.safetensors")
    assert found.is_mask
    assert list(found) == ["b", "a"]
    assert found.equal(mask)
    assert found.count() == {"b": 1, "a": 1}


@pytest.mark.parametrize(
    ("where", "kind", "why"),
    [
        ("folder", ValueError, "is no regular file, and never replaced"),
        ("file/mask", OSError, "can't be written, and nothing was changed"),
    ],
)
@pytest.mark.parametrize("held", [Neurons({"a": torch.tensor([True])}), Entries({}, shapes={"a/up": (1, 1)})])
def test_a_place_that_cannot_be_written_is_named(tmp_path, where, kind, why, held):
    """safetensors' own error is no OSError, and the command line showed a traceback."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(kind, match=f"{where} {why}"):
        held.save(tmp_path / where)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_other_files_are_refused(tmp_path):
    """A safetensors file of something else, and a file that is none."""
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    (tmp_path / "y").write_text("no tensors here")
    with pytest.raises(ValueError, match="not one that"):
        Neurons.load(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="not a readable"):
        Neurons.load(tmp_path / "y")


def test_products_multiply_elementwise():
    """``A * M * C`` is literally that; what made the factors is kept, and a neuron missing in one is missing."""
    a = scores([1.0, 2.0], [3.0, 4.0], made_by={"a": 1}, missing={"layers.1.mlp": torch.tensor([True, False])})
    b = scores([5.0, 6.0], [7.0, 8.0], made_by={"b": 2})
    for product in (a * b, b * a):
        assert product["layers.0.mlp"].tolist() == [5.0, 12.0]
        assert product["layers.1.mlp"].tolist() == [0.0, 32.0]
        assert product.available("layers.1.mlp").tolist() == [False, True]
        assert product.made_by == {"a": 1, "b": 2}


def test_relative_divides_by_the_layers_mean():
    """The mean leaves missing neurons out; a layer of zeros stays zero; the factor is the layer's own."""
    found = scores(
        [1.0, 3.0], [0.0, 0.0], [9.0, 2.0, 6.0], missing={"layers.2.mlp": torch.tensor([True, False, False])}
    ).relative()
    assert found["layers.0.mlp"].tolist() == [0.5, 1.5]
    assert found["layers.1.mlp"].tolist() == [0.0, 0.0]
    assert found["layers.2.mlp"].tolist() == [0.0, 0.5, 1.5]


def test_relative_survives_scores_whose_sum_overflows():
    """The mean is taken in float64: a sum beyond float32's range is no infinity."""
    found = scores([3e38, 3e38, 3e38]).relative()
    assert found["layers.0.mlp"].tolist() == [1.0, 1.0, 1.0]


def test_masks_combine():
    """&, | and ~ on masks, the fraction and the indices."""
    a = Neurons({"x": torch.tensor([True, True, False, False])})
    b = Neurons({"x": torch.tensor([True, False, True, False])})
    assert (a & b).indices("x").tolist() == [0]
    assert (a | b).indices("x").tolist() == [0, 1, 2]
    assert (~a).indices("x").tolist() == [2, 3]
    assert a.fraction == 0.5
    assert "2 of 4" in repr(a)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (scores([1.0, 2.0, 3.0], [1.0, 1.0]), "different models"),
        (scores([1.0, 2.0]), "different models"),
        (Neurons({"layers.1.mlp": torch.ones(2), "layers.0.mlp": torch.ones(2)}), "another order"),
        (Neurons({f"layers.{i}.mlp": torch.ones(2).bool() for i in range(2)}), "needs scores"),
    ],
)
def test_neurons_of_another_model_do_not_combine(other, message):
    """Another size, a block less, another order, a mask: all named."""
    with pytest.raises(ValueError, match=message):
        scores([1.0, 2.0], [3.0, 4.0]) * other


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_refused(bad):
    """NaN would be ranked first by a sort: it never gets that far; the block is named and the bad ones counted."""
    with pytest.raises(ValueError, match=r"'layers.1.mlp': 1 of 2 scores"):
        scores([1.0, 2.0], [bad, 0.0])


def test_mixtures_and_matrices_are_refused():
    """A mask and scores in one, and a two-dimensional vector."""
    with pytest.raises(ValueError, match="mixture"):
        Neurons({"a": torch.ones(2), "b": torch.ones(2).bool()})
    with pytest.raises(ValueError, match="shape"):
        Neurons({"a": torch.ones(2, 2)})


def test_masks_and_scores_are_not_confused():
    """Each operation says which of the two it needs."""
    mask = Neurons({"a": torch.tensor([True])})
    for wrong in (lambda: mask.relative(), lambda: mask * mask):
        with pytest.raises(ValueError, match="needs scores"):
            wrong()
    for wrong in (lambda: ~scores([1.0]), lambda: scores([1.0]).count(), lambda: scores([1.0]) & scores([1.0])):
        with pytest.raises(ValueError, match="needs a mask"):
            wrong()


def test_scores_are_float32_whatever_they_came_as():
    """16-bit numbers are widened without loss, and never ranked as such."""
    assert Neurons({"a": torch.ones(2, dtype=torch.bfloat16)})["a"].dtype == torch.float32
    assert Neurons({"a": torch.ones(2, dtype=torch.float64)})["a"].dtype == torch.float32


def test_the_print_names_every_block_and_counts_the_missing():
    """A print is what a user looks at first."""
    text = repr(scores([1.0, 2.0], [3.0, 4.0], missing={"layers.0.mlp": torch.tensor([True, False])}))
    assert "layers.0.mlp" in text
    assert "layers.1.mlp" in text
    assert "1 without a value" in text
    assert repr(Neurons({})) == "Neurons(empty)"


def test_equal_masks_are_equal():
    """``==`` says what ``equal`` says, of masks and of single weights; a Mapping's own raised RuntimeError."""
    bits, one = torch.tensor([True, False, True]), torch.tensor([1])
    mask, other = Neurons({"a": bits}), Neurons({"a": ~bits})
    entries = Entries({"a/up": one}, shapes={"a/up": (3, 3)})
    assert mask == Neurons({"a": bits.clone()}, made_by={"other": 1})
    assert mask != other
    assert other in [mask, other]
    assert entries == Entries({"a/up": one.clone()}, shapes={"a/up": (3, 3)})
    assert entries != Entries({}, shapes={"a/up": (3, 3)})
    assert mask != entries
    assert mask != {"a": bits}
    assert mask != Neurons({"a": bits.float()})  # scores of 1, 0, 1 select nothing


@pytest.mark.parametrize("wrong", [None, "mask.safetensors", {"a": torch.tensor([True])}, 0.02])
def test_what_is_no_mask_is_told_so(wrong):
    """A file's path, say: AttributeError said that it has no 'is_mask'."""
    model = build("qwen3")
    for action in (rollback, rolled_back):
        with pytest.raises(ValueError, match=f"mask= is a {type(wrong).__name__}: expected Neurons or Entries"):
            action(model, to=model, mask=wrong)
    mask, entries = Neurons({"a": torch.tensor([True])}), Entries({}, shapes={"a/up": (1, 1)})
    for one, other in ((mask, entries), (entries, mask), (mask, wrong), (entries, wrong)):
        for combine in (and_, or_):
            message = f"between two {type(one).__name__}, and the other one is a {type(other).__name__}"
            with pytest.raises(ValueError, match=message):
                combine(one, other)


@pytest.mark.parametrize("values", [[True, False], np.array([1.0, 2.0])])
def test_what_is_no_tensor_is_told_so(values):
    with pytest.raises(ValueError, match=rf"block 'a' holds a {type(values).__name__}: expected a tensor"):
        Neurons({"a": values})
    with pytest.raises(ValueError, match=rf"part 'a/up' holds a {type(values).__name__}: expected a tensor"):
        Entries({"a/up": values}, shapes={"a/up": (3, 3)})


def test_a_budget_is_no_count():
    with pytest.raises(ValueError, match=r"counts=0\.02: expected how many of each block, as allocate"):
        top(Neurons({"a": torch.ones(3)}), 0.02)
