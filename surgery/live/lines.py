"""Lines of a prompt file as the tokens that the model sees: what it is asked, and what it answers."""

from __future__ import annotations

import json
import reprlib
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ASKED = ("messages", "prompt", "text")
_ANSWERS = ("response", "completion", "chosen")
_REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of a message
_ROLES = ("assistant", "user", "system", "developer", "tool", "function", "ipython")
_CLIPPED = reprlib.Repr()
_CLIPPED.maxstring = _CLIPPED.maxother = 60


@dataclass(frozen=True)
class Line:
    """A line's tokens: its prompt's and its response's (None where it has none), and what a user should know of it."""

    where: str
    prompt: list[int]
    response: list[int] | None
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Tokenizing:
    """A tokenizer and its habits.

    ``before``, ``after``: what it puts around every text. ``ends``: what ends an answer. ``unopened``: what its chat
    template writes before an answer, where that does not end the prompt.
    """

    tokenizer: Any
    before: list[int]
    after: list[int]
    ends: frozenset[int]
    unopened: str

    @classmethod
    def of(cls, tokenizer: Any) -> Tokenizing:
        plain, whole = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
        places = range(len(whole) - len(plain) + 1)
        at = next((at for at in places if whole[at : at + len(plain)] == plain), 0)
        opening, closing = _around_an_answer(tokenizer)
        ends = frozenset({tokenizer.eos_token_id, _first_special(tokenizer, closing)} - {None})
        return cls(tokenizer, whole[:at], whole[at + len(plain) :], ends, opening)

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def begun(self, ids: list[int]) -> list[int]:
        """What begins as every text does, once: a text that was rendered by a template does already."""
        return ids if ids[: len(self.before)] == self.before else self.before + ids

    def ended(self, ids: list[int]) -> list[int]:
        """A response up to the token that ends it, which is added where it has none."""
        last = max((at for at, token in enumerate(ids) if token in self.ends), default=None)
        if last is not None and not self.tokenizer.decode(ids[last + 1 :]).strip():
            return ids[: last + 1]
        return ids if self.tokenizer.eos_token_id is None else [*ids, self.tokenizer.eos_token_id]


def end_tokens(tokenizer: Any) -> frozenset[int]:
    """The ids that end an answer: the tokenizer's end of sequence, and what its chat template ends a turn with."""
    return Tokenizing.of(tokenizer).ends


def _around_an_answer(tokenizer: Any) -> tuple[str, str]:
    """What the chat template writes before an answer that ends no prompt, and what behind one."""
    asked, said = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Therefore."}
    if not tokenizer.chat_template:
        return "", ""
    try:
        bare, start, whole = (
            tokenizer.apply_chat_template(messages, add_generation_prompt=add, tokenize=False)
            for messages, add in (([asked], False), ([asked], True), ([asked, said], False))
        )
    except Exception:  # a template can raise anything; it says so again when it is used
        return "", ""
    opening, _, closing = whole.removeprefix(bare).rpartition("Therefore.")
    return opening.strip() if bare == start and whole.startswith(bare) else "", closing


def _first_special(tokenizer: Any, text: str) -> int | None:
    special = {at for at, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    return next((at for at in tokenizer(text, add_special_tokens=False)["input_ids"] if at in special), None)


def read_lines(path: Path, limit: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON-lines file, and where each stands.

    Raises:
        ValueError: a line is no JSON object, or has a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    found = 0
    for number, raw in enumerate(text.split("\n"), 1):  # splitlines() would cut at U+2028, legal in JSON
        if not raw.strip():
            continue
        where = f"{path}, line {number}"
        try:
            line = json.loads(raw, object_pairs_hook=_once)
        except LookupError as error:
            raise ValueError(f"{where} has the key {error.args[0]!r} twice: leave one") from error
        except (ValueError, RecursionError) as error:
            _check_no_document(path, text)
            raise ValueError(f"{where} is not JSON: {error}") from error
        if not isinstance(line, dict):
            _check_no_document(path, text)
            raise ValueError(f"{where}: expected one JSON object a line, like {{'prompt': ..., 'response': ...}}")
        yield where, line
        found += 1
        if found == limit:
            return


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise LookupError(key)
        found[key] = value
    return found


def _check_no_document(path: Path, text: str) -> None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return
    kind = "array" if isinstance(found, list) else "object" if isinstance(found, dict) else "value"
    raise ValueError(f"{path} is one JSON {kind}: write one object a line instead, as jq -c '.[]' does with an array")


def tokens_of(line: Mapping[str, Any], where: str, known: Tokenizing) -> Line:
    """A line as tokens.

    Raises:
        ValueError: it has no text, two responses, or one that the chat template does not repeat whole.
    """
    key, asked, answer = _read(line, where)
    remarks = [] if answer is not None or key == "text" else _unread(line)
    if isinstance(asked, list):
        prompt, response, count = _rendered(asked, answer, line.get("tools"), where, known)
        remarks += [_UNOPENED.format(known.unopened)] if known.unopened else []
    else:
        prompt, response, count = asked, answer, None
    _check_characters(prompt + (response or ""), where)
    start = known.ids(prompt)
    bos = known.tokenizer.bos_token_id
    remarks += [_TWICE] if bos is not None and start[:2] == [bos, bos] else []
    if key == "text":
        whole = known.begun(start)
        whole = whole if whole[len(whole) - len(known.after) :] == known.after else whole + known.after
        return Line(where, [], whole, tuple(_lossy(known, prompt, start)))
    end, split = _behind(known, start, prompt, response) if response is not None else (None, False)
    remarks += [_SPLIT] if split else []
    remarks += _lossy(known, prompt + (response or ""), start + (end or []))
    if count is None:
        start, end = known.begun(start), None if end is None else known.ended(end)
    elif end is not None:
        stops = [at for at, token in enumerate(end, 1) if token in known.ends][count : count + 1]
        end = end[: stops[0]] if stops else end
    return Line(where, start, end, tuple(remarks))


_TWICE = "the prompt begins with two tokens that begin a sequence (BOS): leave one out of the text"
_UNOPENED = (
    "the chat template ignores add_generation_prompt, so {!r} does not end the prompt, and the model has to write it "
    "as part of its response"
)
_SPLIT = (
    "the prompt's last token and the response's first would be others if both were one text: the end of the prompt (a "
    "space?) may belong to the response"
)


def _read(line: Mapping[str, Any], where: str) -> tuple[str, Any, Any]:
    """Which key holds the prompt, the prompt (text or messages), and the response (text or a message; None: none)."""
    key = next((key for key in _ASKED if line.get(key) not in (None, [])), None)
    if key is None:
        raise ValueError(f'{where}: expected "prompt", "messages" or "text", found {sorted(line)}')
    given = [other for other in _ANSWERS if line.get(other) is not None]
    asked = _text_or_messages(line, key, where)
    answers: list[Any] = [_text_or_messages(line, other, where) for other in given]
    if key == "text" and not isinstance(asked, str):
        raise ValueError(f'{where}: "text" is a list: call it "messages"')
    if isinstance(asked, list) and asked[-1]["role"] == "assistant":
        given, answers, asked = [key, *given], [asked[-1:], *answers], asked[:-1]
        if not asked:
            raise ValueError(f"{where}: the messages hold an answer, and nothing that it answers")
    if len(answers) > 1:
        raise ValueError(f"{where} has more than one response, in {' and '.join(map(repr, given))}: leave one")
    if not answers:
        return key, asked, None
    if key == "text":
        raise ValueError(f'{where}: all of "text" counts, and there is a {given[0]!r} beside it: call it "prompt"')
    answer = answers[0]
    if isinstance(answer, list):
        if isinstance(asked, str):
            raise ValueError(f'{where}: "prompt" is text and {given[0]!r} a list of messages: make them alike')
        if [message["role"] for message in answer] != ["assistant"]:
            raise ValueError(f"{where}: {given[0]!r} is not one message of the assistant")
        answer = answer[0]
    elif isinstance(asked, list):
        answer = {"role": "assistant", "content": answer}
    said = [answer] if isinstance(answer, str) else [answer["content"], *_besides(answer)]
    if not any(text.strip() for text in said):
        raise ValueError(f"{where}: the response is empty: drop the line, or the key to let the earlier model answer")
    return key, asked, answer


def _unread(line: Mapping[str, Any]) -> list[str]:
    """What might be the response of a line that has none."""
    others = sorted(
        key for key in line.keys() - {*_ASKED, *_ANSWERS, "tools"} if isinstance(line[key], str | list) and line[key]
    )
    if not others:
        return []
    return [
        f'no response, and {", ".join(map(repr, others))} is not read: call it "response" if the model should say it'
    ]


def _text_or_messages(line: Mapping[str, Any], key: str, where: str) -> str | list[dict[str, Any]]:
    value = line[key]
    if isinstance(value, str) and key != "messages":
        return value
    if not isinstance(value, list) or not value:
        kinds = "messages" if key == "messages" else "text or messages"
        raise ValueError(f"{where}: {key!r} is {_CLIPPED.repr(value)}: expected {kinds}")
    return [_message(message, where) for message in value]


def _message(message: Any, where: str) -> dict[str, Any]:
    """A message whose content is text, without what is null."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f'{where}: expected "messages" like [{{"role": "user", "content": ...}}]')
    role, content = message["role"], message.get("content")
    if role not in _ROLES:
        raise ValueError(f"{where}: a message has the role {role!r}: expected one of {', '.join(_ROLES)}")
    if isinstance(content, list):
        if other := [part for part in content if not isinstance(part, dict) or not isinstance(part.get("text"), str)]:
            raise ValueError(
                f"{where}: the {role} message holds {_CLIPPED.repr(other[0])}: only parts of text are read"
            )
        content = "".join(part["text"] for part in content)
    if content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"{where}: the content of the {role} message is {_CLIPPED.repr(content)}: expected text")
    return {**{key: value for key, value in message.items() if value is not None}, "content": content}


def _besides(message: Mapping[str, Any]) -> list[str]:
    """What an answer says outside its content: reasoning, and the names of the tools that it calls."""
    return [*(str(message[key]) for key in _REASONING if key in message), *_named(message.get("tool_calls"))]


def _named(tools: Any) -> list[str]:
    inner = [tool.get("function", tool) for tool in tools or [] if isinstance(tool, dict)]
    return [str(one["name"]) for one in inner if isinstance(one, dict) and "name" in one]


def _check_characters(text: str, where: str) -> None:
    """Refuse half of a surrogate pair, which JSON can hold: tokenizers speak of the type of their input."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"{where}: {half!a} is half of a surrogate pair and no character: remove it") from error


def _rendered(
    asked: list[dict[str, Any]], answer: dict[str, Any] | None, tools: Any, where: str, known: Tokenizing
) -> tuple[str, str | None, int]:
    """A conversation as text: the prompt, the response, and how many tokens that end a turn the answer itself holds."""
    if not known.tokenizer.chat_template:
        raise ValueError(
            f'{where}: "messages" need a chat template, and the tokenizer has none: write text as "prompt"'
        )

    def render(messages: list[dict[str, Any]], opened: bool = False) -> str:
        try:
            text: str = known.tokenizer.apply_chat_template(
                messages, tools=tools or None, add_generation_prompt=opened, tokenize=False
            )
        except Exception as error:  # a template can raise anything, and most check the order of roles
            raise ValueError(f"{where}: the chat template refuses these messages: {error}") from error
        return text

    start = render(asked, True)
    for message in asked:
        if message["role"] in ("user", "system", "developer") and not _holds(start, message["content"]):
            said = _CLIPPED.repr(message["content"])
            raise ValueError(f"{where}: the chat template leaves the {message['role']} message out ({said})")
    if missing := [name for name in _named(tools) if not _holds(start, name)]:
        raise ValueError(f"{where}: the chat template leaves the tool {missing[0]!r} out")
    if answer is None:
        return start, None, 0
    whole, bare = render([*asked, answer]), render(asked)
    before = next((text for text in (bare, start) if whole.startswith(text)), None)
    if before is None or not (whole.startswith(start) or start.startswith(before)):
        raise ValueError(f"{where}: the chat template rewrites earlier turns, so the response's start is not known")
    said = whole[len(before) :]
    if missing := [text for text in (answer["content"], *_besides(answer)) if not _holds(said, text)]:
        raise ValueError(
            f"{where}: the chat template makes {_CLIPPED.repr(said)} of the response and leaves a part of "
            f'{_CLIPPED.repr(missing[0])} out: write "prompt" and "response" as rendered text'
        )
    if not whole.startswith(start):
        raise ValueError(
            f"{where}: the chat template ends the prompt with {_CLIPPED.repr(start[len(before) :])}, and begins a "
            f'finished answer without it: write "prompt" and "response" as rendered text'
        )
    held = sum(token in known.ends for text in (answer["content"], *_besides(answer)) for token in known.ids(text))
    return start, whole[len(start) :], held


def _holds(text: str, part: str, plain: Callable[[str], str] = str) -> bool:
    """Whether a text has another in it, whatever white space either has."""
    return "".join(plain(part).split()) in "".join(plain(text).split())


def _behind(known: Tokenizing, start: list[int], prompt: str, response: str) -> tuple[list[int], bool]:
    """A response's tokens behind its prompt's, and whether one text would have been split elsewhere."""
    whole = known.ids(prompt + response)
    if whole[: len(start)] == start:
        return whole[len(start) :], False
    return known.ids(response), True


def _lossy(known: Tokenizing, text: str, ids: list[int]) -> list[str]:
    """Whether the tokens say something else than the text, apart from case, white space and Unicode's spellings."""
    made = known.tokenizer.decode(ids)
    if _holds(made, text, lambda one: unicodedata.normalize("NFKC", one).casefold()):
        return []
    return ["the tokenizer has no tokens for a part of the text: is it this model's?"]
