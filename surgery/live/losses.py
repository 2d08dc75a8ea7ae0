"""The earlier model's predictions, kept on disk, and the loss that measures how far a model has moved from them."""

from __future__ import annotations

import errno
import json
import shutil
import struct
import tempfile
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery.checkpoints.opening import sampled
from surgery.devices import sent
from surgery.files import path_of, whole_file
from surgery.formats.shards import DTYPES, header_of, mapped
from surgery.layout.sharding import ranks_of
from surgery.live.heads import Reading, positions, reading
from surgery.live.hooks import evaluating
from surgery.live.prompts import Batch, batches_of, digest_of, each, fitting, joined, together

Loss = Callable[[nn.Module, Batch], Tensor]
Divergence = Literal["kl", "hellinger"]


class Distillation:
    """The distance of a model's predictions from the earlier model's: ``loss(model, batch)``, a mean over positions.

    "kl": KL(p_earlier ‖ p_model), in nats. It grows with the square of the change, so its gradient is mostly that of
    the few answers that changed most.

    "hellinger": H = √(½ Σ (√p_earlier − √p_model)²), from 0 to 1. It grows linearly with the change, so every changed
    answer counts alike, and it bounds what a score can lose: no event's probability differs by more than √2 · H.
    Changes as small as rounding noise count less, by their square: √(H² + ε²) − ε with ε = 0.01.

    Where one of the two vocabularies is larger (padded, extended), p is over the tokens that both have.

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
        self._files: Distillation | None = None
        self._made_of: dict[str, list[Batch]] = {}
        if temporary:  # it lives as long as what reads from it
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    def by(self, divergence: Divergence) -> Distillation:
        """The distance from the same predictions, measured in another way."""
        found = Distillation(self.folder, self.model, divergence=divergence)
        found._files, found._made_of = self, self._made_of  # a temporary folder stays for as long as one of the two
        return found

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        target, far, found = self.of(batch), _SUMS[self.divergence], reading(model, batch)
        if target.ndim != 2 or len(target) != len(found.hidden):
            raise ValueError(
                f"{self.path(batch)} holds logits of the shape {list(target.shape)}, and the batch has "
                f"{len(found.hidden)} positions: remove the file"
            )

        def measure(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
            both = min(target.shape[1], logits.shape[1])
            theirs = sent(target[rows, :both], logits.device)
            value, slopes = far(_logarithms(theirs), _logarithms(logits[:, :both]))
            return value, nn.functional.pad(slopes, (0, logits.shape[1] - both))

        return found.total(measure) / len(found.hidden)

    def of(self, batch: Batch) -> Tensor:
        """The earlier model's logits for a batch: ``[predicting position, token of the vocabulary]``."""
        path = self.path(batch)
        if not path.exists():
            parts = self._made_of.get(digest_of([batch])) or list(fitting([batch]))
            if len(parts) > 1:
                return torch.cat([self.of(part) for part in parts])
            raise LookupError("the earlier model was not asked about this batch: pass it to distillation() as well")
        return mapped(path, _checked(path, self.model), writable=False)["logits"]

    def joined(self, batches: Iterable[Batch]) -> list[Batch]:
        """The prompts of batches that the earlier model was asked about, in as few passes; the loss knows those, too.

        A model reads all of its weights in every pass, however few tokens go through it.
        """
        found = []
        for parts in together(batches):
            found.append(joined(parts))
            if len(parts) > 1:
                self._made_of[digest_of(found[-1:])] = parts
        return found

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
    place = path_of(folder if folder is not None else tempfile.mkdtemp(prefix="surgery-"))
    place.mkdir(parents=True, exist_ok=True)
    found = Distillation(place, sampled(earlier.parameters()), folder is None, divergence)
    for path in place.glob("*.safetensors"):
        _checked(path, found.model)
    ranks = ranks_of(earlier)  # of a sharded model every process has its own files, or all share a folder
    with evaluating(earlier), torch.no_grad():
        for batch in each("the earlier model's predictions", fitting(batches_of(data))):
            if ranks.sum(torch.tensor(not found.path(batch).exists(), dtype=torch.int32)):
                _keep(found.path(batch), reading(earlier, batch), found.model)
    return found


def _keep(path: Path, found: Reading, model: str) -> None:
    """Write logits and whose they are; the file takes its final name once it is whole, whoever else writes it too."""
    try:
        with whole_file(path) as new:
            _write(new, found, model)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            f"{path.parent} has no room for what the earlier model predicts ({error}): logits take positions × "
            f"vocabulary numbers; give TMPDIR (or folder=) another disk, or pass fewer prompts"
        ) from error


def _write(path: Path, found: Reading, model: str) -> None:
    """One tensor "logits" as a safetensors file, chunk by chunk, since all of it may not fit in memory."""
    with open(path, "wb") as file:
        for rows, logits in found.chunks():
            if not rows.start:
                shape = len(found.hidden), found.vocabulary
                kind = next(name for name, dtype in DTYPES.items() if dtype == logits.dtype)
                end = shape[0] * shape[1] * logits.element_size()
                entry = {"dtype": kind, "shape": shape, "data_offsets": [0, end]}
                header = json.dumps({"__metadata__": {"model": model}, "logits": entry}).encode()
                header += b" " * (-len(header) % 8)
                file.write(struct.pack("<Q", len(header)) + header)
            file.write(logits.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())


def _checked(path: Path, model: str) -> dict[str, Any]:
    """The header of a file of predictions, refused unless they are the model's (``ValueError``)."""
    header = header_of(path)
    made_by = (header.get("__metadata__") or {}).get("model")
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
    if header.keys() != {"__metadata__", "logits"} or header["logits"]["dtype"] not in ("F64", "F32", "F16", "BF16"):
        raise ValueError(f"{path} is damaged: it holds no logits. Remove it, and run the earlier model again")
    return header


def tokens_in(batches: Iterable[Batch]) -> int:
    """How many tokens count in some batches: those that a position predicts."""
    return sum(int(positions(batch).sum()) for batch in batches)


def predicting(model: nn.Module, batch: Batch) -> Tensor:
    """The logits that predict the tokens that count: ``[position, token of the vocabulary]``, row by row of the batch.

    All of them at once, with their graph: for losses that are differentiated twice, and for small vocabularies.

    Raises:
        ValueError: there is no such position, the batch does not fit the model, or it has no language-modelling head.
    """
    return reading(model, batch).logits()


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
    total: Any = 0.0
    tokens = 0
    with evaluating(model), torch.no_grad():
        for batch in each("the loss", fitting(batches) if isinstance(loss, Distillation) else batches):
            count = tokens_in([batch])
            total, tokens = total + loss(model, batch).double() * count, tokens + count
    return ranks_of(model).same(float(total) / tokens)


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """−log p(response token | what comes before it), the mean over the batch's response tokens, in nats: a ``Loss``.

    Raises:
        ValueError: the batch has no labels, or no response token.
    """
    targets = targets_of(batch)

    def measure(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        slopes, right = _logarithms(logits), sent(targets[rows, None], logits.device)
        value = -slopes.gather(1, right).sum()
        return value, slopes.exp_().scatter_add_(1, right, torch.full_like(right, -1, dtype=slopes.dtype))

    found = reading(model, batch)
    return found.total(measure) / len(found.hidden)


def likelihoods(model: nn.Module, batch: Batch) -> Tensor:
    """log p(token | what comes before it) of each token that counts, row by row of the batch: ``[position]``."""
    tokens, found = batch["input_ids"][:, 1:][positions(batch)], reading(model, batch)
    parts = [_logarithms(logits).gather(1, sent(tokens[rows, None], logits.device)) for rows, logits in found.chunks()]
    return torch.cat(parts)[:, 0]


def targets_of(batch: Batch) -> Tensor:
    """The response tokens, row by row, in the order of the positions that predict them; ``ValueError`` without any."""
    if "labels" not in batch:
        raise ValueError(
            "these batches are prompts without responses (labels): let a model answer them (respond), or pass loss="
        )
    return batch["labels"][:, 1:][positions(batch)]


def _logarithms(logits: Tensor) -> Tensor:
    """log softmax, in float32 or wider."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


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
