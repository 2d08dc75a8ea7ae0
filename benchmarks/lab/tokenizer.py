"""A character-level tokenizer that plain ``AutoTokenizer.from_pretrained(folder)`` loads.

One token a character: what a model says is decoded exactly, and a right answer is exactly one token sequence.
"""

from __future__ import annotations

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
CHARACTERS = string.ascii_letters + string.digits + " +-=*:>?'()[].,"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of every model of the lab; padding is on the left, as generation needs it."""
    vocabulary = {token: i for i, token in enumerate((PAD, EOS, UNK, *CHARACTERS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )
