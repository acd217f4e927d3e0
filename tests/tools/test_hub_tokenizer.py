"""The tokenizer's files of a folder for transformers, whose CLIPTokenizer gave our ids from them (5.24.0)."""

import json
from pathlib import Path

from data.tokenizer import EOT, SOT
from models.config import TextConfig
from tools.convert.hub_tokenizer import hub_tokenizer


def test_clips_vocabulary() -> None:
    files, remarks = hub_tokenizer(TextConfig(context_length=32), {"tokenizer": "clip"})
    ids, merges = json.loads(files["vocab.json"]), files["merges.txt"].decode().splitlines()
    assert sorted(ids.values()) == list(range(49_408)) and len(merges) == 1 + 48_894
    assert (ids["<|startoftext|>"], ids["<|endoftext|>"], ids["a</w>"]) == (SOT, EOT, 320)
    assert all(left + right in ids for left, right in (line.split(" ") for line in merges[1:]))
    assert json.loads(files["tokenizer_config.json"])["model_max_length"] == 32
    assert b"MIT" in files["LICENSE.tokenizer"] and not remarks


def test_a_tokenizer_of_the_jobs_own(tmp_path: Path) -> None:
    own, text = tmp_path / "gemma.json", TextConfig(vocab_size=256_000, pool="last")
    own.write_bytes(b"{}")
    assert hub_tokenizer(text, {"tokenizer": str(own)}) == ({"tokenizer.json": b"{}"}, [])
    own.unlink()
    assert hub_tokenizer(text, {"tokenizer": str(own)})[1] == [
        f"no tokenizer in the folder: data.tokenizer {own} is not here any more"
    ]
    assert "CLIP's has 49,408 ids, the model 256,000" in hub_tokenizer(text, {})[1][0]
