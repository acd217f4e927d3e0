"""Files by which transformers finds the tokenizer of a folder: CLIP's, from our merges, or the job's own."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from data.bpe import merge_lines, vocabulary
from data.tokenizer import EOT, SOT, VOCAB_SIZE
from models.config import TextConfig

_START, _END = "<|startoftext|>", "<|endoftext|>"
"""transformers' names of CLIP's two special tokens."""


def hub_tokenizer(text: TextConfig, data: dict[str, Any]) -> tuple[dict[str, bytes], list[str]]:
    """(file -> content, remarks) for a model's captions; data: the `data` section of the job that it comes from."""
    own = Path(data.get("tokenizer", "clip"))
    if own.suffix and text.vocab_size != VOCAB_SIZE:
        name = {".json": "tokenizer.json", ".model": "spiece.model"}[own.suffix]
        if own.is_file():
            return {name: own.read_bytes()}, []
        return {}, [f"no tokenizer in the folder: data.tokenizer {own} is not here any more"]
    if text.vocab_size != VOCAB_SIZE:
        return {}, [f"no tokenizer in the folder: CLIP's has {VOCAB_SIZE:,} ids, the model {text.vocab_size:,}"]
    return _clip(text.context_length), []


def _clip(context_length: int) -> dict[str, bytes]:
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    config = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, "do_lower_case": True, **special,
    }  # fmt: skip
    ids = vocabulary() | {_START: SOT, _END: EOT}
    merges = "\n".join(["#version: 0.2", *merge_lines()])
    return {
        "vocab.json": json.dumps(ids, ensure_ascii=False).encode(),
        "merges.txt": f"{merges}\n".encode(),
        "tokenizer_config.json": json.dumps(config, indent=1).encode(),
        "special_tokens_map.json": json.dumps(special, indent=1).encode(),
        "LICENSE.tokenizer": files("data.vocabulary").joinpath("LICENSE").read_bytes(),
    }
