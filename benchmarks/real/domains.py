"""What the real lab trains on and measures: prompts in the model's chat form, one right response each.

math     sums and differences of two or three numbers (reasoning-gym's ``chain_sum``, Apache-2.0)
family   who is whose aunt (reasoning-gym's ``family_relationships``): no stage trains it, all may hurt it
qa       facts on countries (PyPI's ``countryinfo``, MIT) in five wordings: three are trained, one evaluates, and one
         calibrates, on facts that are not evaluated
format   words to be written in a given form (JSON, letter case, how many), checked by a program
text     English prose (the help topics of Python's standard library): perplexity; nothing trains on it
chat     plain questions, answered by the base model itself: how far a model has moved from those answers

Calibration, training and evaluation share no question; of ``qa`` they share facts, since QA is memory, but no wording.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Item = dict[str, str]
DOMAINS = ("math", "qa", "format", "family")  # those with one right response
EVALUATION, CALIBRATION = {"math": 512, "qa": 512, "format": 256, "family": 128}, 128

_ASK = {
    "capital": (
        "What is the capital of {c}?", "Name the capital city of {c}.", "{c}: which city is its capital?",
        "Which city is the capital of {c}?", "Tell me the capital of {c}.",
    ),
    "currency": (
        "What is the currency code of {c}?", "Which currency code is used in {c}?", "{c}: what is its currency code?",
        "Give the currency code of {c}.", "With which currency code does one pay in {c}?",
    ),
    "tld": (
        "What is the internet domain of {c}?", "Which top-level domain belongs to {c}?",
        "{c}: what is its internet domain?", "Give the top-level domain of {c}.",
        "In which internet domain are websites of {c}?",
    ),
    "iso": (
        "What is the three-letter code of {c}?", "Which three-letter country code has {c}?",
        "{c}: what is its three-letter code?", "Give the three-letter country code of {c}.",
        "By which three-letter code is {c} known?",
    ),
    "calling": (
        "What is the calling code of {c}?", "Which number does one dial first to call {c}?",
        "{c}: what is its calling code?", "Give the international calling code of {c}.",
        "By which calling code is {c} reached?",
    ),
}  # fmt: skip

_WORDS = (
    "apple river stone cloud table window garden bread paper clock horse forest candle mirror bridge music silver "
    "winter summer letter market pencil bottle island doctor farmer teacher village castle dragon kitten lemon "
    "pepper copper ocean desert valley meadow rabbit falcon salmon turtle basket hammer needle ribbon saddle tunnel"
)

_CHAT = (
    "How do I boil an egg?", "What is a good way to learn a language?", "Write one sentence about the sea.",
    "Why is the sky blue?", "What should I pack for a week in the mountains?", "Explain what a computer does.",
    "How can I sleep better?", "Write a short poem about autumn.", "What is the difference between a lake and a pond?",
    "Give me an idea for dinner.", "How do birds fly?", "What makes a good friend?",
    "How do I start a small garden?", "Describe a busy street.", "What is photosynthesis?", "How do I write a letter?",
)  # fmt: skip


def chat(question: str) -> str:
    """A question as the model's chat template puts it, without a system message."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def _reasoning(name: str, count: int, seed: int, **settings: Any) -> list[Item]:
    import reasoning_gym

    seen: dict[str, str] = {}
    for item in reasoning_gym.create_dataset(name, seed=seed, size=3 * count, **settings):
        question = item["question"].removeprefix("State the final answer to the following arithmetic problem: ")
        question = f"Calculate {question.removesuffix(' =')}." if name == "chain_sum" else question
        seen.setdefault(question, item["answer"])
    return [{"prompt": chat(q), "response": a} for q, a in list(seen.items())[:count]]


def _facts() -> list[tuple[str, str, str]]:
    """Kind of fact, country, answer."""
    import countryinfo

    found = []
    for file in sorted((Path(countryinfo.__file__).parent / "data").glob("*.json")):
        one = json.loads(file.read_text(encoding="utf-8"))
        name = one.get("name", "")
        if not name or not name.isascii() or len(name) > 24 or one.get("population", 0) < 200_000:
            continue
        values = {
            "capital": one.get("capital"),
            "currency": (one.get("currencies") or [None])[0],
            "tld": (one.get("tld") or [None])[0],
            "iso": one.get("ISO", {}).get("alpha3"),
            "calling": (one.get("callingCodes") or [None])[0],
        }
        found += [(kind, name, str(value)) for kind, value in values.items() if value and str(value).isascii()]
    return found


def _asked(facts: Iterable[tuple[str, str, str]], wordings: Iterable[int]) -> list[Item]:
    return [
        {"prompt": chat(_ASK[kind][w].format(c=country)), "response": answer}
        for w in wordings
        for kind, country, answer in facts
    ]


def _forms(count: int, rng: random.Random) -> list[Item]:
    """Words and how to write them; the checking program is the one that wrote the answer, run on the question."""
    found: dict[str, str] = {}
    known = _WORDS.split()
    while len(found) < count:
        words = rng.sample(known, rng.choice((2, 3, 4)))
        listed, first = ", ".join(words), rng.randint(1, len(words) - 1)
        named = json.dumps({"a": words[0], "b": words[1]})
        question, answer = rng.choice((
            (f"Write in capital letters: {listed}", listed.upper()),
            (f"Write as a JSON list: {listed}", json.dumps(words)),
            (f"Write each word with a capital letter: {listed}", listed.title()),
            (f"Give only the first {first} of these words: {listed}", ", ".join(words[:first])),
            (f"Write the words in reverse order: {listed}", ", ".join(words[::-1])),
            (f"Write as JSON with the keys a and b: {words[0]}, {words[1]}", named),
        ))  # fmt: skip
        found.setdefault(question, answer)
    return [{"prompt": chat(q), "response": a} for q, a in found.items()]


def _prose(count: int, words: int = 40) -> list[Item]:
    from pydoc_data import topics

    whole = [" ".join(text.split()) for _, text in sorted(topics.topics.items()) if len(text.split()) > 2 * words]
    return [{"text": " ".join(text.split(" ")[20 : 20 + words])} for text in whole[:count]]


def right(domain: str, item: Item, answer: str) -> bool:
    """Whether an answer is right: the same text; of ``format``'s JSON the same value, however it is spaced."""
    if domain == "format" and item["response"][0] in "[{":
        try:
            return bool(json.loads(answer) == json.loads(item["response"]))
        except ValueError:
            return False
    return answer.strip() == item["response"]


def read(path: Path) -> list[Item]:
    """The items of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(items: Iterable[Item], path: Path) -> None:
    """Items as a JSON-lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")


def build(folder: Path, seed: int = 0) -> None:
    """Write ``DOMAIN.train``, ``.calibration`` and ``.evaluation`` files; the same for every seed of the training."""
    rng = random.Random(seed)
    small = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
    pools = {
        "math": _reasoning("chain_sum", 6_640, 1_000 + seed, **small),
        "family": _reasoning("family_relationships", 1_256, 2_000 + seed),
        "format": _forms(4_384, rng),
    }
    for domain, items in pools.items():
        measured = EVALUATION[domain]
        write(items[:measured], folder / f"{domain}.evaluation.jsonl")
        write(items[measured : measured + CALIBRATION], folder / f"{domain}.calibration.jsonl")
        write(items[measured + CALIBRATION :], folder / f"{domain}.train.jsonl")
    facts = _facts()
    rng.shuffle(facts)
    measured = EVALUATION["qa"]
    write(_asked(facts[:measured], (3,)), folder / "qa.evaluation.jsonl")
    write(_asked(facts[measured : measured + CALIBRATION], (4,)), folder / "qa.calibration.jsonl")
    write(_asked(facts, (0, 1, 2)), folder / "qa.train.jsonl")
    write(_prose(12), folder / "text.evaluation.jsonl")
    write([{"prompt": chat(question)} for question in _CHAT], folder / "chat.evaluation.jsonl")
