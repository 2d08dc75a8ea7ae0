"""Lines of a prompt file: tokens as the model sees them, whatever the tokenizer and its chat template do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from test_prompts import lines
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from surgery import load_prompts
from surgery.cli import main
from surgery.live import respond
from surgery.live.prompts import response_mask

SPECIAL = ["<pad>", "<eos>", "<unk>", "<bos>", "<end>", "<think>", "</think>"]
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-= ?.!:<>/|_,'[]{}\"\n"
PAD, EOS, UNK, BOS, END = range(5)
CHATML = (
    "{% for m in messages %}<{{ m.role }}>{% if m.name is defined %}{{ m.name }}:{% endif %}{{ m.content }}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASKED = [{"role": "user", "content": "hi"}]


def answered(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [*ASKED, {"role": "assistant", "content": content, **more}]}


def tokenizer(before: str = "", after: str = "", template: str | None = None, **settings: Any) -> Any:
    """One token a character; it puts ``before`` and ``after`` around every text."""
    backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*SPECIAL, *CHARACTERS])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    if before or after:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{before} $A {after}".strip(), special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
        )
    named = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", "bos_token": "<bos>", **settings}
    found = PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=SPECIAL[4:], **named)
    found.chat_template = template
    return found


class Slow(PreTrainedTokenizer):
    """The same in Python alone, as many tokenizers of older models are."""

    def __init__(self, before: str = "", after: str = "", template: str | None = None, **settings: Any) -> None:
        self.table = {token: at for at, token in enumerate([*SPECIAL, *CHARACTERS])}
        self.before, self.after = [BOS] if before else [], [EOS] if after else []
        named = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", "bos_token": "<bos>", **settings}
        super().__init__(extra_special_tokens=SPECIAL[4:], **named)
        self.chat_template = template

    @property
    def vocab_size(self) -> int:
        return len(self.table)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.table)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.table.get(token, UNK)

    def _convert_id_to_token(self, index: int) -> str:
        return [*SPECIAL, *CHARACTERS][index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)

    def build_inputs_with_special_tokens(self, one: list[int], other: Any = None) -> list[int]:
        return [*self.before, *one, *self.after]


KNOWN = tokenizer()
ADDS = [("", ""), ("<bos>", ""), ("", "<eos>"), ("<bos>", "<eos>")]


def said(path: Path, known: Any = KNOWN, *objects: Any) -> tuple[str, str | None]:
    """What the first line's prompt says, and its response (None where nothing is labelled)."""
    batch = load_prompts(lines(path, *objects), known)[0]
    ids, mask = batch["input_ids"][0], batch["attention_mask"][0].bool()
    counted = response_mask(batch)[0]
    assert bool(mask.all()) or len(objects) > 1
    if "labels" not in batch:
        return KNOWN.decode(ids[mask]), None
    assert torch.equal(batch["labels"][0][counted], ids[counted])
    return KNOWN.decode(ids[mask & ~counted]), KNOWN.decode(ids[counted])


@pytest.mark.parametrize("make", [tokenizer, Slow])
@pytest.mark.parametrize("adds", ADDS)
@pytest.mark.parametrize("written", ["", "<bos>"])
@pytest.mark.parametrize("line", [{"prompt": "1+1="}, {"prompt": "1+1=", "response": "2"}, {"text": "1+1="}])
def test_what_begins_a_text_comes_once_and_nothing_special_behind_a_prompt(tmp_path, make, adds, written, line):
    """A rendered prompt holds its BOS already; an EOS at the end of every text belongs behind the response alone."""
    key = next(iter(line))
    given = {**line, key: written + line[key]}
    begin = "<bos>" if written or adds[0] else ""
    want = {"prompt": (f"{begin}1+1=", "2<eos>" if "response" in line else None), "text": ("", f"{begin}1+1={adds[1]}")}
    assert said(tmp_path / "p", make(*adds), given) == want[key]


@pytest.mark.parametrize("adds", ADDS)
def test_a_text_that_ends_already_ends_once(tmp_path, adds):
    begin = adds[0]
    assert said(tmp_path / "p", tokenizer(*adds), {"text": "ab<eos>"}) == ("", f"{begin}ab<eos>")
    for response in ("ab<eos>", "ab<eos>\n", "ab"):
        asked = said(tmp_path / "p", tokenizer(*adds), {"prompt": "1", "response": response})
        assert asked == (f"{begin}1", "ab<eos>")


@pytest.mark.parametrize("adds", ADDS)
def test_a_chat_has_the_special_tokens_of_its_template_alone(tmp_path, adds):
    for bos in ("", "{{ bos_token }}"):
        known = tokenizer(*adds, template=bos + CHATML)
        begin = "<bos>" if bos else ""
        start = f"{begin}<user>hi<end>\n<assistant>"
        assert said(tmp_path / "p", known, {"messages": ASKED}) == (start, None)
        assert said(tmp_path / "p", known, answered("ok")) == (start, "ok<end>")


def test_two_tokens_that_begin_a_prompt_are_told(tmp_path):
    known = tokenizer("<bos>", template="{{ bos_token }}{{ messages[0].content }}")
    for line in ({"prompt": "<bos><bos>a"}, {"messages": [{"role": "user", "content": "<bos>a"}]}):
        with pytest.warns(UserWarning, match=r"line 1: the prompt begins with two tokens that begin a sequence"):
            assert said(tmp_path / "p", known, line) == ("<bos><bos>a", None)


SAME = [
    {"prompt": "1+1=", "response": "2"},
    {"prompt": "1+1=", "completion": "2", "response": None},
    {"prompt": "1+1=", "chosen": "2", "rejected": "3"},
    {"prompt": "1+1=", "response": "2", "answer": "3"},
]


@pytest.mark.parametrize("line", SAME)
def test_the_names_of_a_response(tmp_path, line):
    assert said(tmp_path / "p", KNOWN, line) == ("1+1=", "2<eos>")


PARTS = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
TALKS = [
    answered("ok"),
    answered([{"type": "text", "text": "ok"}]),
    answered("ok", tool_calls=None, name=None),
    answered("ok", reasoning_content=None),
    {"messages": [{"role": "user", "content": PARTS}], "response": "ok"},
    {"prompt": ASKED, "completion": [{"role": "assistant", "content": "ok"}]},
    {"prompt": ASKED, "chosen": [{"role": "assistant", "content": "ok"}], "rejected": []},
    {"messages": [], "prompt": ASKED, "response": "ok"},
]


@pytest.mark.parametrize("line", TALKS)
def test_the_forms_of_a_conversation(tmp_path, line):
    assert said(tmp_path / "p", tokenizer(template=CHATML), line) == ("<user>hi<end>\n<assistant>", "ok<end>")


def test_the_last_of_several_answers_is_the_response(tmp_path):
    talk = [*ASKED, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    start = "<user>hi<end>\n<assistant>a<end>\n<user>b<end>\n<assistant>"
    known = tokenizer(template=CHATML)
    assert said(tmp_path / "p", known, {"messages": talk}) == (start, None)
    assert said(tmp_path / "p", known, {"messages": [*talk, {"role": "assistant", "content": "c"}]}) == (
        start,
        "c<end>",
    )


ENDINGS = {
    "a line break": ("{{ m.content }}<end>\n", "ok<end>"),
    "nothing": ("{{ m.content }}", "ok"),
    "plain text": ("{{ m.content }}|", "ok|"),
    "two": ("{{ m.content }}<end>\n<eos>", "ok<end>"),
    "trimmed": (" {{ m.content | trim }}<eos>", " ok<eos>"),
    "what is in it": ("<think>\n\n</think>\n{{ m.content }}<end>", "<think>\n\n</think>\nok<end>"),
}


@pytest.mark.parametrize("what", ENDINGS)
def test_a_response_ends_where_its_turn_does(tmp_path, what):
    turn, want = ENDINGS[what]
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}{% else %}<a>" + turn + "{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    known = tokenizer(template=template)
    assert said(tmp_path / "p", known, answered("ok")) == ("<u>hi<a>", want)
    odd = said(tmp_path / "p", known, answered(" ok\n"))
    assert "".join(str(odd[1]).split()) == "".join(want.split())


def test_an_end_inside_a_response_does_not_cut_it(tmp_path):
    found = said(tmp_path / "p", tokenizer(template=CHATML), answered("a<end>b<eos>c"))
    assert found[1] == "a<end>b<eos>c<end>"


CUT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
KEPT = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for t in m.tool_calls or [] %}[{{ t.function.name }}]{% endfor %}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = [{"type": "function", "function": {"name": "look", "arguments": {}}}]
OPENED = (  # begins an answer with reasoning, and writes a finished one without
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)
LEFT_OUT = {
    "reasoning in the content": (CUT, answered("<think>why</think>2"), r"leaves a part of '<think>why</think>2' out"),
    "reasoning beside it": (CHATML, answered("2", reasoning_content="why"), "leaves a part of 'why' out"),
    "reasoning of another name": (CHATML, answered("2", thinking="why"), "leaves a part of 'why' out"),
    "a call": (CHATML, answered(None, tool_calls=CALL), "leaves a part of 'look' out"),
    "an opened answer": (OPENED, answered("2"), r"ends the prompt with '<assistant><think>\\n', and begins a finished"),
    "a system message": (
        "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
        {"messages": [{"role": "system", "content": "be kind"}, *ASKED]},
        r"leaves the system message out \('be kind'\)",
    ),
    "parts that are asked for": (
        "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}",
        {"messages": [{"role": "user", "content": PARTS}]},
        r"leaves the user message out \('hi'\)",
    ),
    "a tool": (CHATML, {"messages": ASKED, "tools": CALL}, "leaves the tool 'look' out"),
}


@pytest.mark.parametrize("what", LEFT_OUT)
def test_what_a_template_leaves_out_is_told(tmp_path, what):
    template, line, message = LEFT_OUT[what]
    with pytest.raises(ValueError, match=rf"line 1: the chat template .*{message}"):
        said(tmp_path / "p", tokenizer(template=template), line)


def test_what_a_template_keeps_is_read(tmp_path):
    known = tokenizer(template=KEPT)
    assert said(tmp_path / "p", known, answered("2", reasoning_content="why"))[1] == "<think>why</think>2<end>"
    assert said(tmp_path / "p", known, answered("<think>why</think>2"))[1] == "<think>why</think>2<end>"
    assert said(tmp_path / "p", known, answered(None, tool_calls=CALL))[1] == "[look]<end>"
    before = [
        *ASKED,
        {"role": "assistant", "content": "<think>why</think>2"},
        *ASKED,
    ]  # what templates cut of old turns
    assert said(tmp_path / "p", tokenizer(template=CUT), {"messages": before})[0].count("2<end>") == 1
    tools = "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}" + CHATML
    assert said(tmp_path / "p", tokenizer(template=tools), {"messages": ASKED, "tools": CALL})[0].startswith("[look]<u")


def test_a_template_without_a_generation_prompt_is_told(tmp_path):
    """The model then writes the turn's opening itself, with or without labels; Mistral's has none and is fine."""
    known = tokenizer(template=CHATML.split("{% if add")[0])
    for line, want in (({"messages": ASKED}, None), (answered("ok"), "<assistant>ok<end>")):
        with pytest.warns(
            UserWarning, match=r"line 1: the chat template ignores add_generation_prompt, so '<assistant>'"
        ):
            assert said(tmp_path / "p", known, line) == ("<user>hi<end>\n", want)
    mistral = (
        "{% for m in messages %}{{ '[I]' + m.content + '[/I]' if m.role == 'user' else ' ' + m.content + '<eos>' }}"
    )
    assert said(tmp_path / "p", tokenizer(template=mistral + "{% endfor %}"), answered("ok")) == (
        "[I]hi[/I]",
        " ok<eos>",
    )


def test_a_template_that_closes_what_is_not_answered_is_fine(tmp_path):
    """Without add_generation_prompt it ends the conversation, which is then no beginning of a longer one."""
    closing = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    known = tokenizer(template=closing + "{{ '<assistant>' if add_generation_prompt else '<eos>' }}")
    assert said(tmp_path / "p", known, answered("ok")) == ("<user>hi<assistant>", "ok<eos>")


def test_a_tokenizer_that_marks_the_start_of_a_text_marks_no_response(tmp_path):
    """SentencePiece puts a blank before a text: "▁2" alone is another token than the "2" behind a prompt."""
    vocabulary = {token: at for at, token in enumerate(["<unk>", "</s>", "▁", "1", "2", "=", "▁1", "▁2"])}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "1"), ("▁", "2")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    known = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    (batch,) = load_prompts(lines(tmp_path / "p", {"prompt": "1=", "response": "2"}), known)
    assert known.convert_ids_to_tokens(batch["input_ids"][0].tolist()) == ["▁1", "=", "2", "</s>"]


def test_a_token_across_the_end_of_the_prompt_is_told(tmp_path):
    """The prompt's tokens stay those of the prompt alone, which is what the model is asked with."""
    vocabulary = {token: at for at, token in enumerate(["<unk>", "<eos>", "a", " ", "b", " b"])}
    backend = Tokenizer(models.BPE(vocabulary, [(" ", "b")], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    known = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")
    pair = {"prompt": "a ", "response": "b"}
    path = lines(tmp_path / "p", {"prompt": "a", "response": " b"}, pair, pair)
    with pytest.warns(UserWarning, match=r"p, line 2 and 1 other: the prompt's last token and the response's first"):
        (batch,) = load_prompts(path, known)
    assert [known.convert_ids_to_tokens(row) for row in batch["input_ids"].tolist()] == [
        ["a", " b", "<eos>", "<eos>"],
        ["a", " ", "b", "<eos>"],
        ["a", " ", "b", "<eos>"],
    ]


@pytest.mark.parametrize("line", [{"prompt": "é"}, {"prompt": "a", "response": "日"}, {"text": "a é"}])
def test_text_without_tokens_is_told(tmp_path, line):
    with pytest.warns(UserWarning, match="line 1: the tokenizer has no tokens for a part of the text"):
        said(tmp_path / "p", KNOWN, line)


@pytest.mark.parametrize("key", ["answer", "output", "target"])
def test_a_key_that_may_be_the_response_is_named(tmp_path, key):
    with pytest.warns(UserWarning, match=rf"line 1 and 1 other: no response, and '{key}' is not read: call it"):
        assert said(tmp_path / "p", KNOWN, *[{"prompt": "1+1=", key: "2", "id": 7}] * 2) == ("1+1=", None)


def test_truncation_and_padding_that_a_trainer_left_on_are_off(tmp_path):
    known = tokenizer()
    known.backend_tokenizer.enable_truncation(3)
    known.backend_tokenizer.enable_padding(length=9, pad_id=PAD, pad_token="<pad>")
    known.padding_side = known.truncation_side = "left"
    assert said(tmp_path / "p", known, {"prompt": "1+1=", "response": "2222"}) == ("1+1=", "2222<eos>")


USER = {"role": "user", "content": "a"}
BAD = {
    "empty": ({"prompt": "a", "response": ""}, "the response is empty: drop the line"),
    "blank": ({"prompt": "a", "completion": " \n"}, "the response is empty"),
    "empty message": (answered(""), "the response is empty"),
    "empty parts": (answered([]), "the response is empty"),
    "null": ({"messages": [{"role": "user", "content": None}]}, "the content of the user message is None: expected"),
    "no content": ({"messages": [{"role": "user"}]}, "the content of the user message is None"),
    "a number": ({"messages": [{"role": "user", "content": 3}]}, "the content of the user message is 3"),
    "no number": ({"prompt": "a", "response": float("nan")}, "'response' is nan: expected text or messages"),
    "true": ({"prompt": True}, "'prompt' is True"),
    "an image": (
        {"messages": [{"role": "user", "content": [*PARTS, {"type": "image"}]}]},
        "the user message holds {'type': 'image'}: only parts of text are read",
    ),
    "strings as parts": ({"messages": [{"role": "user", "content": ["a"]}]}, "the user message holds 'a'"),
    "another's role": ({"messages": [USER, {"role": "gpt", "content": "b"}]}, "a message has the role 'gpt'"),
    "messages as text": ({"messages": "a"}, "'messages' is 'a': expected messages"),
    "two responses": ({"prompt": "a", "response": "b", "chosen": "c"}, "more than one response, in 'response' and 'ch"),
    "an answer twice": ({**answered("ok"), "response": "c"}, "more than one response, in 'messages' and 'response'"),
    "text and response": (
        {"text": "a", "response": "b"},
        "all of \"text\" counts, and there is a 'response' beside it",
    ),
    "text as messages": ({"text": ASKED}, '"text" is a list: call it "messages"'),
    "mixed kinds": ({"prompt": "a", "chosen": [USER]}, "\"prompt\" is text and 'chosen' a list of messages"),
    "several messages": ({"prompt": ASKED, "chosen": [USER, USER]}, "'chosen' is not one message of the assistant"),
    "an answer to nothing": (
        {"messages": [{"role": "assistant", "content": "b"}]},
        "the messages hold an answer, and nothing that it answers",
    ),
    "half a pair": ({"messages": [{"role": "user", "content": "\ud83d"}]}, r"'\\ud83d' is half of a surrogate pair"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_line_that_can_not_be_read_gets_a_sentence(tmp_path, what):
    line, message = BAD[what]
    with pytest.raises(ValueError, match=rf"p, line 2:? .*{message.replace('(', '[(]')}"):
        load_prompts(lines(tmp_path / "p", {"prompt": "a", "response": "b"}, line), tokenizer(template=CHATML))


FILES = {
    "an array": ('[{"prompt": "a"}, {"prompt": "b"}]', "p is one JSON array: write one object a line"),
    "an array over lines": ('[\n  {"prompt": "a"}\n]\n', "p is one JSON array: write one object a line"),
    "an object over lines": ('{\n  "prompt": "a"\n}\n', "p is one JSON object: write one object a line"),
    "a number": ("3\n", "p is one JSON value"),
    "twice": ('{"prompt": "a", "prompt": "b"}', "p, line 1 has the key 'prompt' twice"),
    "twice inside": (
        '\n{"messages": [{"role": "user", "content": "a", "role": "x"}]}',
        "p, line 2 has the key 'role' twice",
    ),
}


@pytest.mark.parametrize("what", FILES)
def test_a_file_of_another_form_gets_a_sentence(tmp_path, what):
    raw, message = FILES[what]
    (tmp_path / "p").write_text(raw)
    with pytest.raises(ValueError, match=message):
        load_prompts(tmp_path / "p", tokenizer(template=CHATML))


def saying(token: int) -> Any:
    """A model that says one token whatever it is asked."""
    model = families.build("qwen3")
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()[:, 0] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()[token, 0] = 20.0
    return model


TALKING = tokenizer(template=CHATML)
ASKING = [{"input_ids": torch.tensor([[7, 8]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}]


@pytest.mark.parametrize("where", ["tokenizer", "template", "generation", "a list"])
def test_answers_end_with_every_token_that_ends_a_turn(tmp_path, where):
    """A base model trained on chats says its template's end, which generation_config.json does not know."""
    model = saying(END)
    model.generation_config.eos_token_id = {"generation": END, "a list": [EOS, END]}.get(where, EOS)
    model.save_pretrained(tmp_path / "model")
    known = {"tokenizer": tokenizer(eos_token="<end>"), "template": TALKING}.get(where, KNOWN)
    known.save_pretrained(tmp_path / "model")
    read = type(model).from_pretrained(tmp_path / "model")
    (batch,) = respond(read, ASKING, max_new_tokens=5)
    assert batch["labels"].tolist() == [[-100, -100, END]]
    labelled = load_prompts(lines(tmp_path / "p", {"prompt": "ab", "response": "<end>"}), tmp_path / "model")[0]
    if where in ("tokenizer", "template"):
        assert labelled["labels"][0].tolist()[2:] == [END]


def test_a_model_of_no_folder_asks_no_tokenizer(tmp_path, monkeypatch):
    """Also where the shell stands in a folder that has one."""
    TALKING.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("", "moved", "a/b"):
        model = saying(END)
        model.config._name_or_path = name
        (batch,) = respond(model, ASKING, max_new_tokens=5)
        assert batch["labels"].tolist() == [[-100, -100, *[END] * 5]]


def test_answers_that_ended_elsewhere_are_not_read(tmp_path):
    model, path = saying(END), tmp_path / "answers.jsonl"
    respond(model, ASKING, max_new_tokens=5, path=path)
    model.generation_config.eos_token_id = END
    with pytest.raises(
        ValueError, match=r"answers\.jsonl was made with .*'ends': \[2\].* you asked for .*'ends': \[4\]"
    ):
        respond(model, ASKING, max_new_tokens=5, path=path)


def test_inspect_shows_the_first_line_as_tokens(tmp_path, monkeypatch, capsys):
    TALKING.save_pretrained(tmp_path / "model")

    def inspect(line: Any) -> str:
        lines(tmp_path / "p", line, {"nothing": 1})
        monkeypatch.setattr(sys, "argv", ["surgery", "inspect", str(tmp_path / "model"), "--data", str(tmp_path / "p")])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
        return capsys.readouterr().out

    out = inspect(answered("o k"))
    assert "response (4 tokens): 'o' ' ' 'k' '<end>'\n" in out
    assert "prompt (21 tokens): '<' 'u' 's' 'e' 'r' '>' 'h' 'i' '<end>' '\\n' '<' 'a'" in out
    assert "end an answer with '<eos>' or '<end>'" in out
    assert "prompt, without a response (2 tokens): 'a' 'b'\n" in inspect({"prompt": "ab"})
    assert "prompt" not in inspect({"text": "ab"}).splitlines()[0]
