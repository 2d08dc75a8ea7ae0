"""Prompts: every format that a line may have, what counts as response, padding, limits, and odd text files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import build
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from surgery import load_prompts
from surgery.live.prompts import response_mask

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 <>|:+=\n\u2028\u2029\x85\x0b\x0c\x1c\ufeff"
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(template: str | None = TEMPLATE, **settings: Any) -> PreTrainedTokenizerFast:
    """One token a character; id 0 pads, 1 ends."""
    vocabulary = {token: at for at, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    settings = {"pad_token": "<pad>", "eos_token": "<eos>", "model_max_length": 40, **settings}
    found = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **settings)
    found.chat_template = template
    return found


TOKENIZER = tokenizer()


def text(ids: torch.Tensor) -> str:
    return "".join(TOKENIZER.convert_ids_to_tokens(ids.tolist()))


def lines(path: Path, *objects: Any) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in objects))
    return path


def read(batch: dict[str, torch.Tensor], row: int = 0) -> tuple[str, str]:
    """What a row's attended tokens say, and its response."""
    ids = batch["input_ids"][row]
    return text(ids[batch["attention_mask"][row].bool()]), text(ids[response_mask(batch)[row]])


def test_prompts_alone_count_whole(tmp_path):
    (batch,) = load_prompts(lines(tmp_path / "p", {"prompt": "abc"}, {"prompt": "a"}), TOKENIZER)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["input_ids"][1].tolist()[1:] == [0, 0]
    assert read(batch) == ("abc", "abc")
    assert read(batch, 1) == ("a", "a")


def test_a_response_and_its_end_count_alone(tmp_path):
    path = lines(tmp_path / "p", {"prompt": "1+1=", "response": "2"}, {"prompt": "a", "response": "bcd", "id": 7})
    (batch,) = load_prompts(path, TOKENIZER)
    assert read(batch) == ("1+1=2<eos>", "2<eos>")
    assert read(batch, 1) == ("abcd<eos>", "bcd<eos>")
    assert batch["labels"].tolist()[0] == [-100] * 4 + batch["input_ids"][0, 4:].tolist()
    assert batch["labels"].shape == batch["input_ids"].shape == batch["attention_mask"].shape
    assert bool((batch["labels"][batch["attention_mask"] == 0] == -100).all())


def test_messages_go_through_the_chat_template(tmp_path):
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    path = lines(tmp_path / "p", {"messages": asked})
    assert read(load_prompts(path, TOKENIZER)[0])[0] == "<system>s|<user>hi|<assistant>"
    path = lines(tmp_path / "p", {"messages": [*asked, {"role": "assistant", "content": "ok"}]})
    assert read(load_prompts(path, TOKENIZER)[0]) == ("<system>s|<user>hi|<assistant>ok|", "ok|")


def test_text_counts_whole(tmp_path):
    assert read(load_prompts(lines(tmp_path / "p", {"text": "a b"}), TOKENIZER)[0]) == ("a b", "a b")


def test_null_is_no_response(tmp_path):
    (batch,) = load_prompts(lines(tmp_path / "p", {"prompt": "a", "response": None}), TOKENIZER)
    assert "labels" not in batch


def test_an_empty_prompt_with_a_response_is_fine(tmp_path):
    assert read(load_prompts(lines(tmp_path / "p", {"prompt": "", "response": "a"}), TOKENIZER)[0])[1] == "a<eos>"


def test_batches_and_limit(tmp_path):
    path = lines(tmp_path / "p", *({"prompt": "a" * n} for n in range(1, 8)))
    batches = load_prompts(path, TOKENIZER, batch_size=3)
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3, 1]
    assert [batch["input_ids"].shape[1] for batch in batches] == [3, 6, 7]
    assert sum(len(batch["input_ids"]) for batch in load_prompts(path, TOKENIZER, limit=2)) == 2
    for name in ("batch_size", "limit"):
        with pytest.raises(ValueError, match=f"{name}=0: expected 1 or more"):
            load_prompts(path, TOKENIZER, **{name: 0})


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_unicode_line_separators_inside_a_string_split_no_line(tmp_path, separator):
    """JSON allows them raw in strings (the ASCII ones among them escaped); only a newline ends a line."""
    path = tmp_path / "p"
    raw = json.dumps({"prompt": f"a{separator}b"}, ensure_ascii=separator < " ")
    path.write_text(f"{raw}\n{raw}\n", encoding="utf-8")
    (batch,) = load_prompts(path, TOKENIZER)
    assert batch["input_ids"].shape == (2, 3)


@pytest.mark.parametrize("odd", ["crlf", "bom", "blank", "no newline"])
def test_odd_text_files(tmp_path, odd):
    first, second = '{"prompt": "ab"}', '{"prompt": "c"}'
    raw = {
        "crlf": f"{first}\r\n{second}\r\n",
        "bom": f"\ufeff{first}\n{second}\n",
        "blank": f"\n  \n{first}\n\n\t\n{second}\n\n",
        "no newline": f"{first}\n{second}",
    }[odd]
    (tmp_path / "p").write_bytes(raw.encode())
    (batch,) = load_prompts(tmp_path / "p", TOKENIZER)
    assert [read(batch, row)[0] for row in range(2)] == ["ab", "c"]


def test_a_tokenizer_without_padding_or_end(tmp_path):
    path = lines(tmp_path / "p", {"prompt": "ab", "response": "c"}, {"prompt": "a", "response": "b"})
    (batch,) = load_prompts(path, tokenizer(pad_token=None))
    assert batch["input_ids"][1, -1] == 1  # the end pads, and does not count
    assert batch["attention_mask"][1].tolist() == [1, 1, 1, 0]
    (batch,) = load_prompts(path, tokenizer(pad_token=None, eos_token=None))
    assert batch["input_ids"].shape == (2, 3)
    assert read(batch)[1] == "c"


def test_the_folder_of_a_tokenizer(tmp_path):
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    path = lines(tmp_path / "p", {"prompt": "ab"})
    for where in (tmp_path / "tokenizer", str(tmp_path / "tokenizer")):
        assert torch.equal(load_prompts(path, where)[0]["input_ids"], load_prompts(path, TOKENIZER)[0]["input_ids"])


def test_a_tokenizer_is_read_once_for_as_long_as_its_files_stay_as_they_are(tmp_path, monkeypatch):
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    path, read_from = lines(tmp_path / "p", {"prompt": "ab"}), []
    original = transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda *a, **how: read_from.append(a) or original(*a, **how)
    )
    first, again = (load_prompts(path, tmp_path / "tokenizer")[0]["input_ids"] for _ in range(2))
    assert torch.equal(first, again)
    assert len(read_from) == 1
    tokenizer(model_max_length=41).save_pretrained(tmp_path / "tokenizer")
    load_prompts(path, tmp_path / "tokenizer")
    assert len(read_from) == 2


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path, family):
    """transformers makes an empty tokenizer of such a folder: every prompt was a prompt of no tokens."""
    build(family).config.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model has no tokenizer of its own: copy tokenizer\.json"):
        load_prompts(lines(tmp_path / "p", {"prompt": "ab", "response": "c"}), tmp_path / "model")


BAD = {
    "empty": ("", "is empty: expected one JSON object a line"),
    "blank": ("\n \n", "is empty"),
    "not json": ('{"prompt": "a"}\n{"prompt": \n', "line 2 is not JSON"),
    "nested": ("[" * 100_000, "line 1 is not JSON"),
    "a list": ('["a"]\n["b"]\n', "line 1: expected one JSON object a line"),
    "no key": ('{"question": "a"}\n', r'line 1: expected "prompt", .*found \[\'question\'\]'),
    "a number": ('{"prompt": 3}\n', "line 1: 'prompt' is 3: expected text or messages"),
    "no messages": ('{"messages": []}\n', 'expected "prompt"'),
    "bad messages": ('{"messages": ["hi"]}\n', 'line 1: expected "messages" like'),
    "no role": ('{"messages": [{"content": "x"}]}\n', 'expected "messages" like'),
    "response no string": ('{"prompt": "a", "response": 4}\n', "line 1: 'response' is 4: expected text"),
    "half a pair": ('{"prompt": "a \\ud83d"}\n', r"line 1: '\\ud83d' is half of a surrogate pair"),
    "mixed": ('\n{"prompt": "a", "response": "b"}\n\n{"prompt": "a"}\n', "line 4 has no response, and other lines"),
    "nothing": ('{"prompt": ""}\n', "line 1: no token at all"),
    "long": (json.dumps({"prompt": "a" * 39, "response": "bc"}), "line 1: 42 tokens, and the tokenizer's limit is 40"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_lines_are_named(tmp_path, what):
    raw, message = BAD[what]
    (tmp_path / "p").write_text(raw)
    with pytest.raises(ValueError, match=message):
        load_prompts(tmp_path / "p", TOKENIZER)
    assert (tmp_path / "p").read_text() == raw


def test_no_file_and_no_text(tmp_path):
    with pytest.raises(LookupError, match="there is no prompt file"):
        load_prompts(tmp_path / "p", TOKENIZER)
    (tmp_path / "p").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match="p is not UTF-8 text"):
        load_prompts(tmp_path / "p", TOKENIZER)


def test_chat_templates_that_are_missing_or_refuse(tmp_path):
    turn = {"role": "user", "content": "a"}
    path = lines(tmp_path / "p", {"messages": [turn, {"role": "assistant", "content": "b"}]})
    with pytest.raises(ValueError, match='need a chat template, and the tokenizer has none: write text as "prompt"'):
        load_prompts(path, tokenizer(None))
    with pytest.raises(ValueError, match="line 1: the chat template refuses these messages: roles must alternate"):
        load_prompts(path, tokenizer("{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(ValueError, match="line 1: the chat template rewrites earlier turns"):
        load_prompts(path, tokenizer("{{ messages | length }}{{ messages[0].content }}{{ messages[-1].content }}"))
