"""Token by token: what each model thinks of the responses, and which tokens' probability moved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.checkpoints.trajectory import Trajectory
from surgery.live.earlier import earlier_model
from surgery.live.heads import positions
from surgery.live.hooks import evaluating
from surgery.live.losses import predicting
from surgery.live.prompts import Batch, response_mask, right_padded
from surgery.masks.mask import Mask
from surgery.reverting.rollback import rollback
from surgery.tables import Table

MOVED = 0.10  # of probability: from here on a token is said to have moved
_SHOWN, _LONGEST, _ASKED = 12, 300, 400  # prompts; tokens of a response; characters of a prompt
_ROWS = 1 << 24  # numbers of logits that are turned into float32 at a time


@dataclass(frozen=True)
class PromptTokens:
    """One prompt, the ``tokens`` of its response, and what each model thinks of them.

    ``chances``: the probability of each token after what comes before it, ``[model][token]``, in [0, 1];
    ``likeliest``: the token that the model finds likeliest there. ``cut``: how many further tokens are left out.
    """

    prompt: str
    tokens: tuple[str, ...]
    chances: tuple[tuple[float, ...], ...]
    likeliest: tuple[tuple[str, ...], ...]
    cut: int = 0


@dataclass(frozen=True)
class Counted:
    """A model over all response ``tokens``: their ``mean`` probability, and how many ``fell`` or ``rose``.

    A token fell where its probability is at least ``MOVED`` lower than in the first model.
    """

    model: str
    tokens: int
    mean: float
    fell: int
    rose: int


@dataclass(frozen=True)
class Tokens:
    """What ``tokens`` found: the earlier model, the later one, and that with a repair, in this order.

    ``prompts``: those whose response lost most log-likelihood from the first model to the second, the largest loss
    first; ``of`` so many; ``counts``: one per model, over the tokens of all prompts.
    """

    models: tuple[str, ...]
    prompts: tuple[PromptTokens, ...]
    of: int
    counts: tuple[Counted, ...]

    def table(self) -> Table:
        """One row per model."""
        head = ("model", "response tokens", "mean probability (%)", "tokens that fell", "tokens that rose")
        first, *others = self.counts
        rows = [(first.model, first.tokens, 100 * first.mean, None, None)]
        rows += [(one.model, one.tokens, 100 * one.mean, one.fell, one.rose) for one in others]  # type: ignore[misc]
        return Table("the responses' tokens, on the measuring half of the prompts", head, tuple(rows))


def tokens(
    run: Trajectory, data: Iterable[Batch], tokenizer: Any, masks: Mapping[str, Mask], shown: int = _SHOWN
) -> Tokens:
    """The probability of every response token in the earlier model, the later one, and that with each mask reverted.

    Args:
        run: a trajectory whose checkpoints have names; its later model is loaded once (``run.load``).
        data: batches with labels on the response's tokens, ``[batch, token]``.
        tokenizer: that of the batches, to write the tokens.
        masks: name → units or weights to revert.
        shown: how many prompts are kept.

    Raises:
        ValueError: a batch has no response token.

    Source: ours.
    """
    batches = [right_padded(batch) for batch in data]
    names = {id(source): name for name, source in run.checkpoints.items()}
    models = (names[id(run.earlier)], names[id(run.later)], *masks)
    with earlier_model(run) as earlier:
        every = [list(_asked(earlier, batches))]
    later = run.load()
    every.append(list(_asked(later, batches)))
    for mask in masks.values():
        with rollback(later, to=run.tensors("earlier"), mask=mask, layout=run.layout):
            every.append(list(_asked(later, batches)))
    chances = [[one for one, _ in found] for found in every]
    falls = [float(before.log().mean() - now.log().mean()) for before, now in zip(*chances[:2], strict=True)]
    order = sorted(range(len(falls)), key=lambda at: -falls[at])[:shown]
    texts = list(_texts(batches, tokenizer))

    def one(at: int) -> PromptTokens:
        prompt, ids = texts[at]
        kept = ids[:_LONGEST]
        return PromptTokens(
            prompt if len(prompt) <= _ASKED else f"… {prompt[-_ASKED:]}",
            tuple(tokenizer.decode([token]) for token in kept),
            tuple(tuple(round(x, 4) for x in found[at][: len(kept)].tolist()) for found in chances),
            tuple(tuple(tokenizer.decode([token]) for token in found[at][1][: len(kept)].tolist()) for found in every),
            len(ids) - len(kept),
        )

    flat = [torch.cat(found) for found in chances]
    counts = tuple(
        Counted(
            name, len(now), float(now.mean()), int((flat[0] - now >= MOVED).sum()), int((now - flat[0] >= MOVED).sum())
        )
        for name, now in zip(models, flat, strict=True)
    )
    return Tokens(models, tuple(map(one, order)), len(falls), counts)


def _asked(model: nn.Module, batches: list[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    """Per prompt the probability of each response token, float64, and the likeliest token there."""
    for batch in batches:
        with evaluating(model), torch.no_grad():
            logits = predicting(model, batch)
        where = positions(batch)
        right = batch["input_ids"][:, 1:][where].to(logits.device)
        step = max(1, _ROWS // logits.shape[1])
        chances = torch.cat(
            [
                logits[at : at + step].float().log_softmax(-1).gather(1, right[at : at + step, None])[:, 0]
                for at in range(0, len(right), step)
            ]
        )
        counts = where.sum(1).tolist()
        yield from zip(chances.double().exp().cpu().split(counts), logits.argmax(-1).cpu().split(counts), strict=True)


def _texts(batches: list[Batch], tokenizer: Any) -> Iterator[tuple[str, list[int]]]:
    """Per prompt its text up to the response, and the response's tokens."""
    for batch in batches:
        counted = positions(batch)
        for at, ids in enumerate(batch["input_ids"]):
            response = ids[1:][counted[at]].tolist()
            first = int(response_mask(batch)[at].int().argmax())
            yield tokenizer.decode(ids[: max(first, 1)].tolist()).strip(), response


def percent(chance: float) -> str:
    """A probability in whole percent; "<1" and ">99" at the ends, for a rounded model is never certain.

    >>> percent(0.123), percent(0.0), percent(0.999)
    ('12', '<1', '>99')
    """
    if chance < 0.005:
        return "<1"
    return ">99" if chance >= 0.995 else str(math.floor(100 * chance + 0.5))
