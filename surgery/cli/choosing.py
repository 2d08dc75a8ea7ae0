"""Selectors in the shell: how their texts are read, and checks whose messages name the shell's options."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.cli.options import asked, files_of, prompts_of
from surgery.units import single

if TYPE_CHECKING:
    from surgery.checkpoints.trajectory import Trajectory
    from surgery.live.prompts import Batch
    from surgery.masks.mask import Mask
    from surgery.selectors.selectors import Selector

    Guard = tuple[dict[str, list[Batch]], float]  # prompts of the domains to protect, and the weight of their loss


def is_damage(text: str) -> bool:
    """Whether a selector's text is D, of whatever loss."""
    return text.partition(":")[0] == "D"


def check_selectors(
    texts: list[str],
    checkpoints: list[str],
    data: Path | None,
    how: str | None,
    units: str | None,
    protect: list[str] | None,
    answers: Path | None,
) -> None:
    """Refuse what the selectors can't do or lack before anything is read, in the shell's words instead of Python's."""
    texts = [text.strip() for text in texts]
    if not any(map(is_damage, texts)):
        for option, given, what in (("protect", protect, "can spare a domain"), ("answers", answers, "needs them")):
            if given:
                raise ValueError(f"--{option}: only D {what}, and the selector is {', '.join(texts)}: take D")
    if protect and single(asked(units)):
        raise ValueError(
            "--protect: the costs of single weights do not add up, and protecting by them did harm in the lab "
            "(benchmarks/results/protect-weights.md): leave --protect out and look at Δ in a sweep, or take --units mlp"
        )
    for text in texts:
        _check_text(text)
        if is_damage(text) and how not in (None, "global") and single(asked(units)):
            raise ValueError(
                f"--how {how}: D takes the best single weights of the whole model, in rounds: leave --how out, or take "
                f"--selector M"
            )
        if single(asked(units)) and not is_damage(text) and text not in ("M", "M/M", "random"):
            raise ValueError(f"--selector {text}: single weights are ranked by D or by M alone: take --selector D or M")
        if "C" in text and len(checkpoints) == 2:
            raise ValueError(
                f"--selector {text}: C needs the base checkpoint, and you gave two: give three, BASE EARLIER LATER, "
                f"or a selector without C, like --selector AM"
            )
        if data is None and set(text) & set("AD"):
            raise ValueError(
                f"--selector {text}: {'D' if is_damage(text) else 'A'} is measured on prompts of the damaged domain: "
                f'pass --data FILE, JSON lines like {{"prompt": "2+2="}}'
            )


def _check_text(text: str) -> None:
    from surgery.selectors.settings import check_letters

    if text in ("random", "D", "D:kl"):
        return
    try:
        for letters in text.split("/", 1):
            check_letters("--selector", letters)
    except ValueError as error:
        raise ValueError(
            f"--selector {text}: expected D, D:kl, random, or some of the letters A, M and C, each once, like "
            f"AMC or A/AMC"
        ) from error


def protected(protect: list[str] | None, weight: float, run: Trajectory, batch_size: int) -> Guard:
    """The prompts of each protected domain, and how much its loss counts."""

    if not 0 <= weight < math.inf:
        raise ValueError(f"--protect-weight {weight}: expected a number ≥ 0")
    return prompts_of(files_of(protect or [], "--protect"), run, batch_size), weight


def answered(run: Trajectory, prompts: Any, file: Path | None, write: bool = True) -> tuple[Any, str]:
    """The prompts with the earlier model's answers, where ``file`` caches them, and a line that says what was done."""
    from surgery.scores.damage import earlier_answers

    if file is None:
        return prompts, ""
    if all("labels" in batch for batch in prompts):
        raise ValueError(f"--answers {file}: the lines of --data have responses: leave --answers out")
    if not file.exists() and not write:
        return prompts, ""
    done = "read" if file.exists() else "wrote"
    return earlier_answers(run, prompts, file), f"{done} the earlier model's answers: {file}"


def unanswered(selectors: list[Any], prompts: list[Batch] | None) -> list[Any]:
    """The selectors; those by letters get the prompts without answers, since A of answers would be another score."""
    from surgery.selectors.selectors import AMCSelector

    return [_OnPrompts(one.budget, one, prompts) if isinstance(one, AMCSelector) else one for one in selectors]


@dataclass(frozen=True)
class _OnPrompts:
    """A selector on prompts of its own, whatever a sweep gives the others."""

    budget: float
    own: Any
    prompts: list[Batch] | None

    @property
    def name(self) -> str:
        return str(self.own.name)

    @property
    def units(self) -> Any:
        return self.own.units

    def select(self, run: Trajectory, data: Any = None) -> Mask:
        return replace(self.own, budget=self.budget).select(run, self.prompts)  # type: ignore[no-any-return]


def selector_of(
    text: str, budget: float, how: Any, seed: int, units: str | None, guard: Guard, rounds: int | None = None
) -> Selector:
    from surgery.selectors.selectors import AMCSelector, DamageSelector, RandomSelector

    text, kinds = text.strip(), asked(units)
    own: Any = kinds if len(kinds) > 1 else kinds[0] if kinds else None  # as it is typed in Python: a mask records it
    if text == "random":
        return RandomSelector(budget, seed, own)
    if is_damage(text):
        loss: Any = text.partition(":")[2] or "hellinger"
        protect, weight = guard
        of_weights: dict[str, Any] = {} if rounds is None else {"rounds": rounds}
        return DamageSelector(budget, how or "global", protect or None, weight, loss, own, **of_weights)
    rank, _, spend = text.partition("/")
    return AMCSelector(budget, rank, spend or rank, how or ("global" if single(own) else "proportional"), own or "mlp")
