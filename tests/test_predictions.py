"""A folder of predictions says whose they are, and several writers may fill it at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import pair
from safetensors.torch import save_file
from test_scores import batches

from surgery.live import distillation
from surgery.live import losses as predictions

DATA = batches(labels=True)


def test_another_model_s_folder_is_refused(tmp_path):
    earlier, later = pair("qwen3")
    distillation(earlier, DATA, tmp_path)
    with pytest.raises(ValueError, match=r"holds the predictions of another model .* own folder"):
        distillation(later, DATA, tmp_path)
    with pytest.raises(ValueError, match="holds the predictions of another model"):  # whatever it was asked about
        distillation(later, DATA[:1], tmp_path)
    earlier.double()  # in another dtype it is the same model
    distillation(earlier, DATA, tmp_path)


def test_a_folder_that_does_not_say_whose_predictions_it_holds_is_refused(tmp_path):
    earlier, _ = pair("qwen3")
    save_file({"logits": torch.zeros(3, 64)}, tmp_path / "old.safetensors")
    with pytest.raises(ValueError, match="does not say which model's predictions it holds"):
        distillation(earlier, DATA, tmp_path)


def test_what_another_model_added_later_is_not_read(tmp_path):
    earlier, later = pair("qwen3")
    loss = distillation(earlier, DATA[:1], tmp_path)
    distillation(later, DATA[1:], tmp_path / "other")
    for path in (tmp_path / "other").iterdir():
        path.rename(tmp_path / path.name)
    with pytest.raises(ValueError, match="another model"):
        loss(later, DATA[1])


def test_two_writers_fill_one_folder(tmp_path, monkeypatch):
    together, real = threading.Barrier(2, timeout=20), predictions._write

    def save(*arguments: object, **named: object) -> None:
        together.wait()
        real(*arguments, **named)
        together.wait()  # neither gives its file the final name before both have written

    monkeypatch.setattr(predictions, "_write", save)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(distillation, pair("qwen3")[0], DATA, tmp_path) for _ in range(2)]
    failed = [one.exception() for one in both]
    assert failed == [None, None]
    monkeypatch.undo()
    earlier, later = pair("qwen3")
    kept, fresh = distillation(earlier, DATA, tmp_path), distillation(earlier, DATA)
    assert all(torch.equal(kept(later, batch), fresh(later, batch)) for batch in DATA)
    assert len(list(tmp_path.iterdir())) == len(DATA)


@pytest.mark.parametrize(
    "change",
    [
        lambda held: {"other": held},
        lambda held: {"logits": held, "other": held.clone()},
        lambda held: {"logits": held.to(torch.int32)},
        lambda held: {"logits": held.to(torch.float8_e4m3fn)},
        lambda held: {"logits": held[:1].clone()},
        lambda held: {"logits": held[0].clone()},
        lambda held: {"logits": held[None].clone()},
    ],
)
def test_what_a_file_of_predictions_holds_is_checked(tmp_path, change):
    """One row alone was compared with every position."""
    earlier, later = pair("qwen3")
    loss = distillation(earlier, DATA[:1], tmp_path)
    held = loss.of(DATA[0])
    save_file(change(held), loss.path(DATA[0]), {"model": loss.model})
    with pytest.raises(ValueError, match=r"\.safetensors (is damaged: it holds no logits|holds logits of the shape)"):
        loss(later, DATA[0])
