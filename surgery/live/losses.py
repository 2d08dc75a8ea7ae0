"""The earlier model's predictions, kept on disk, and the loss that measures how far a model has moved from them."""

from __future__ import annotations

import inspect
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from surgery.checkpoints.checkpoint import header_of, mapped
from surgery.checkpoints.opening import sampled
from surgery.live.hooks import evaluating
from surgery.live.prompts import Batch, batches_of, check_fits, digest_of, response_mask, right_padded

Loss = Callable[[nn.Module, Batch], Tensor]
Divergence = Literal["kl", "hellinger"]
_ROWS = 1 << 24  # numbers of logits that are turned into float32 at a time


class Distillation:
    """The distance of a model's predictions from the earlier model's: ``loss(model, batch)``, a mean over positions.

    "kl": KL(p_earlier ‖ p_model), in nats. It grows with the square of the change, so its gradient is mostly that of
    the few answers that changed most.

    "hellinger": H = √(½ Σ (√p_earlier − √p_model)²), from 0 to 1. It grows linearly with the change, so every changed
    answer counts alike, and it bounds what a score can lose: no event's probability differs by more than √2 · H.
    Changes as small as rounding noise count less, by their square: √(H² + ε²) − ε with ε = 0.01.

    The positions are those that predict response tokens (without labels, all attended tokens). The earlier model is not
    needed any more: its logits there are cached in files, in their own dtype, and each file records which model made
    them. Made by ``distillation``.

    Raises:
        LookupError: called with a batch that the earlier model was not asked about.
        ValueError: the file for that batch holds another model's predictions.

    Source: ours, from the paper's Assumption 2: the gradient of this loss is exactly zero at the earlier checkpoint.
    """

    def __init__(self, folder: Path, model: str, temporary: bool = False, divergence: Divergence = "kl") -> None:
        self.folder, self.model, self.divergence = folder, model, divergence
        if temporary:  # it lives as long as what reads from it
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = predicting(model, batch)
        total = _Divergence.apply(logits, self.of(batch).to(logits.device), _SUMS[self.divergence])  # type: ignore[no-untyped-call]
        return total / max(len(logits), 1)  # type: ignore[no-any-return]

    def of(self, batch: Batch) -> Tensor:
        """The earlier model's logits for a batch: ``[predicting position, token of the vocabulary]``."""
        path = self.path(batch)
        if not path.exists():
            raise LookupError("the earlier model was not asked about this batch: pass it to distillation() as well")
        return mapped(path, _checked(path, self.model), writable=False)["logits"]

    def path(self, batch: Batch) -> Path:
        """The file that holds the earlier model's logits for a batch."""
        return self.folder / f"{digest_of([batch])}.safetensors"


def distillation(
    earlier: nn.Module,
    data: Iterable[Batch],
    folder: str | Path | None = None,
    *,
    divergence: Divergence = "kl",
) -> Distillation:
    """Run the earlier model on every batch, and return the loss that compares another model with its predictions.

    Args:
        earlier: the earlier model, live; run in eval mode, unchanged afterwards.
        data: batches of ``{"input_ids", "attention_mask"[, "labels"]}``, ``[batch, token]``.
        folder: where the logits are cached for later runs (default: a temporary folder). Cached batches are not
            computed again. Every earlier model needs its own folder; several processes may fill one folder at once.
        divergence: "kl" or "hellinger" (see ``Distillation``).

    Returns:
        A ``Distillation``. Disk: positions × vocabulary × the size of one logit.

    Raises:
        ValueError: no position predicts a response token, the model gives no logits, another divergence, or the folder
            holds predictions of another model.
        OSError: the disk is full.

    Source: ours.
    """
    if divergence not in _SUMS:
        raise ValueError(f'divergence={divergence!r}: expected "kl" or "hellinger"')
    place = Path(folder if folder is not None else tempfile.mkdtemp(prefix="surgery-"))
    place.mkdir(parents=True, exist_ok=True)
    found = Distillation(place, sampled(earlier.parameters()), folder is None, divergence)
    for path in place.glob("*.safetensors"):
        _checked(path, found.model)
    with evaluating(earlier), torch.no_grad():
        for batch in batches_of(data):
            if not found.path(batch).exists():
                _keep(found.path(batch), predicting(earlier, batch), found.model)
    return found


def _keep(path: Path, logits: Tensor, model: str) -> None:
    """Write logits and whose they are; the file takes its final name once it is whole, whoever else writes it too."""
    partial = path.with_name(f"{path.stem}.{uuid.uuid4().hex[:8]}.partial")
    try:
        save_file({"logits": logits.contiguous().cpu()}, partial, {"model": model})
        partial.replace(path)
    except SafetensorError as error:  # no OSError, though what it tells of is one
        raise OSError(
            f"{path.parent} has no room for what the earlier model predicts ({error}): logits take positions × "
            f"vocabulary numbers; give TMPDIR (or folder=) another disk, or pass fewer prompts"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _checked(path: Path, model: str) -> dict[str, Any]:
    """The header of a file of predictions, refused unless they are the model's (``ValueError``)."""
    header = header_of(path)
    made_by = header.get("__metadata__", {}).get("model")
    if made_by is None:
        raise ValueError(
            f"{path} does not say which model's predictions it holds: pass another folder to distillation(), or remove "
            f"this one and run the earlier model again"
        )
    if made_by != model:
        raise ValueError(
            f"{path} holds the predictions of another model than this earlier one: give every earlier model its own "
            f"folder, distillation(earlier, data, folder)"
        )
    return header


def positions(batch: Batch) -> Tensor:
    """Which positions predict a token that counts: bool ``[batch, token − 1]``, position t predicts token t + 1."""
    where = response_mask(batch)[:, 1:]
    return where & batch["attention_mask"][:, :-1].bool() if "attention_mask" in batch else where  # not from padding


def tokens_in(batches: Iterable[Batch]) -> int:
    """How many tokens count in some batches: those that a position predicts."""
    return sum(int(positions(batch).sum()) for batch in batches)


def predicting(model: nn.Module, batch: Batch) -> Tensor:
    """The logits that predict the tokens that count: ``[position, token of the vocabulary]``, row by row of the batch.

    Raises:
        ValueError: there is no such position, the batch does not fit the model, or it has no language-modelling head.
    """
    batch = right_padded(batch)
    where = positions(batch)
    if not bool(where.any()):
        raise ValueError("the batch has no response token to predict: its labels are all -100, or it is one token long")
    check_fits(model, batch["input_ids"])
    device = next(model.parameters()).device
    first = int(where.any(0).nonzero()[0])
    inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask") if key in batch}
    last = where.shape[1] + 1 - first
    only: dict[str, Any] = {"logits_to_keep": last} if _keeps(type(model)) else {}
    logits = getattr(model(**inputs, use_cache=False, **only), "logits", None)
    if logits is None or logits.ndim != 3:
        raise ValueError(
            f"{type(model).__name__} gives no logits over a vocabulary: load it with its language-modelling head, or "
            f"pass a loss of your own, loss(model, batch)"
        )
    rows: Tensor = logits[:, -last:-1][where[:, first:].to(logits.device)]
    return rows


def summed(loss: Loss, model: nn.Module, batch: Batch) -> Tensor:
    """A loss times the batch's predicting positions, so that batches add up.

    Raises:
        ValueError: it is no scalar tensor, or does not depend on the weights.
    """
    found = loss(model, batch)
    if not isinstance(found, Tensor) or found.numel() != 1 or not found.requires_grad:
        what = f"of shape {list(found.shape)}" if isinstance(found, Tensor) else f"but {type(found).__name__}"
        raise ValueError(
            f"loss(model, batch) gave no scalar that depends on the weights ({what}): expected the mean over the "
            f"batch's response tokens, with its gradient (a model computes no loss of its own without labels)"
        )
    return found.reshape(()) * tokens_in([batch])


def mean_loss(loss: Loss, model: nn.Module, batches: Iterable[Batch]) -> float:
    """The loss of a model per token that counts, without gradients; the model is in eval mode meanwhile."""
    total, tokens = 0.0, 0
    with evaluating(model), torch.no_grad():
        for batch in batches:
            count = tokens_in([batch])
            total, tokens = total + float(loss(model, batch)) * count, tokens + count
    return total / tokens


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """−log p(response token | what comes before it), the mean over the batch's response tokens, in nats: a ``Loss``.

    Raises:
        ValueError: the batch has no labels, or no response token.
    """
    if "labels" not in batch:
        raise ValueError(
            "these batches are prompts without responses (labels): let a model answer them (respond), or pass loss="
        )
    logits = predicting(model, batch)
    targets = batch["labels"][:, 1:][positions(batch)].to(logits.device)
    return torch.nn.functional.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


def _keeps(kind: type[nn.Module]) -> bool:
    return "logits_to_keep" in inspect.signature(kind.forward).parameters


def check_loss(loss: Any) -> None:
    """Raise ``ValueError`` unless a loss is a function or the name of a divergence."""
    if not callable(loss) and loss not in _SUMS:
        raise ValueError(f'loss={loss!r}: expected "kl", "hellinger" or a function of your own, loss(model, batch)')


def _kl(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Σ over rows of KL(p ‖ q), from logarithms, and its gradient by q's logits."""
    value = (p.exp() * (p - q)).nan_to_num(nan=0.0).sum()  # 0 · (−∞ − −∞) where both give no probability
    return value, q.exp() - p.exp()


def _hellinger(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Σ over rows of √(H² + ε²) − ε, from logarithms, and its gradient by q's logits."""
    root = (q / 2).exp()
    apart = (p / 2).exp() - root
    square = apart.square().sum(-1, keepdim=True) / 2
    distance = (square + _NOISE**2).sqrt()
    return (distance - _NOISE).sum(), -root * (apart + root * square) / (4 * distance)


_NOISE = 0.01  # ε: rounding logits between 16 and 32 to bfloat16 moves H by about as much
_SUMS = {"kl": _kl, "hellinger": _hellinger}


class _Divergence(torch.autograd.Function):
    """A sum over rows of how far softmax(logits) is from softmax(target), and its gradient, a few rows at a time.

    Once differentiable: the gradient is kept as numbers. Twice: ``surgery.theory.landscape.divergence``.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, summed: Any) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=logits.device)
        grad = torch.empty_like(logits)
        step = max(1, _ROWS // logits.shape[1])
        for at in range(0, len(logits), step):
            rows = slice(at, at + step)
            value, slopes = summed(target[rows].to(wide).log_softmax(-1), logits[rows].to(wide).log_softmax(-1))
            total += value
            grad[rows] = slopes.to(grad.dtype)
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        if torch.is_grad_enabled():  # create_graph=True: as a constant the gradient would have no derivative, silently
            raise RuntimeError(
                "this loss keeps its gradient as numbers, so it can't be differentiated twice: use "
                "surgery.theory.landscape.divergence, as Landscape does"
            )
        (grad,) = ctx.saved_tensors
        return (grad * outer).to(grad.dtype), None, None
