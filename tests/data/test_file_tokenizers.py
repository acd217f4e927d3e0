"""Tokenizers by a file: padding, ends, cutting, cleaning, and what does not fit a model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from data.errors import DataError
from data.tokenizer import Tokenizer
from data.vocabulary.files import canonical, make_tokenizer
from engine.config.layout import check_vocabulary
from engine.config.read import ConfigError, TeacherConfig, resolve
from engine.evaluation.vocabulary import tokenizer_of
from models.config import TextConfig

WORDS = ["<pad>", "<eos>", "<unk>", "a", "red", "fox", "runs"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json as Gemma's is: an end behind each caption, a word for padding."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    made.add_special_tokens(["<pad>", "<eos>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def test_rows_of_a_json(file: Path) -> None:
    tokenizer = make_tokenizer(str(file), "auto", 5)
    rows = tokenizer.encode(["A red, FOX!", "", "a red fox runs a red fox"])
    assert rows.tolist() == [[3, 4, 5, 1, 0], [1, 0, 0, 0, 0], [3, 4, 5, 6, 1]]
    assert rows.dtype == np.int64
    assert (tokenizer.size, tokenizer.pad_id, tokenizer.end_id) == (7, 0, 1)
    assert [tokenizer.is_empty(text, tokenizer.encode([text])[0]) for text in ("", " ?! ", "fox")] == [
        True,
        True,
        False,
    ]
    assert make_tokenizer(str(file), "none", 5).encode(["A red"]).tolist() == [[2, 4, 1, 0, 0]]


def test_clip_is_the_default() -> None:
    tokenizer = make_tokenizer("clip", "auto", 8)
    assert type(tokenizer) is Tokenizer and tokenizer.size == 49_408
    assert [tokenizer.is_empty(text, tokenizer.encode([text])[0]) for text in ("", "fox")] == [True, False]


def test_sentencepiece(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="the package sentencepiece is not installed")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(["a red fox runs", "two boats on a lake", "rain over the hills"] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "sp"), vocab_size=40, hard_vocab_limit=False, minloglevel=2
    )
    tokenizer = make_tokenizer(str(tmp_path / "sp.model"), "auto", 6)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    ids = processor.encode("a red fox")
    assert (
        tokenizer.encode(["A RED fox."])[0].tolist() == (ids[:5] + [processor.eos_id()] + [processor.eos_id()] * 6)[:6]
    )
    assert tokenizer.pad_id == processor.eos_id(), "a model without padding pads with its end, as T5's"


def test_canonical_cleaning() -> None:
    assert canonical("  A  dog's_best &amp;amp; only FRIEND...\n") == "a dogs best only friend"


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        make_tokenizer(str(tmp_path / "no.json"), "auto", 8)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad\.json is no tokenizer\.json"):
        make_tokenizer(str(tmp_path / "bad.json"), "auto", 8)


def job(file: object, **text: Any) -> Any:
    model = {"preset": "tiny-18b", "text": {"vocab_size": 7, "causal": False, "pool": "last"} | text}
    return resolve({"model": model, "data": {"shards": ["-"], "tokenizer": str(file)}}, [])


def test_what_must_fit_the_model(file: Path) -> None:
    check_vocabulary(job(file))
    check_vocabulary(job(file, pool="mean"))
    for text, message in (
        ({"vocab_size": 6}, "has 7 ids, but model.text.vocab_size is 6"),
        ({"causal": True, "pool": "end"}, r"is not the end \(1 of 7\).*set model.text.pool=last or mean"),
        ({"pool": "mean", "pad_id": 3}, "leaves out id 3, but .* pads with 0: set model.text.pad_id=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_vocabulary(job(file, **text))
    own, teacher = job(file), replace(job(file).model, text=replace(job(file).model.text, pool="mean", pad_id=3))
    taught = replace(own, train=replace(own.train, distill=[TeacherConfig(path="-", model=teacher)]))
    with pytest.raises(ConfigError, match=r"set train\.distill\[0\]\.model\.text\.pad_id=0"):
        check_vocabulary(taught)
    with pytest.raises(ConfigError, match="does not exist"):
        check_vocabulary(job(file.with_name("other.json")))
    with pytest.raises(ConfigError, match=r"or name the model's own tokenizer in data\.tokenizer"):
        check_vocabulary(resolve({"model": "siglip2-b16", "data": {"shards": ["-"]}}, []))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer": "gemma"}, "a SentencePiece .model of your own"),
        ({"cleaning": "lower"}, "choose one of auto, clip, canonical, none"),
        ({"cleaning": "canonical"}, "is for a data.tokenizer of your own"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve({"data": {"shards": ["-"]} | settings}, [])


def test_evaluation_has_the_tokenizer_of_the_job(file: Path) -> None:
    config = job(file)
    assert tokenizer_of(config.model.text, config.data).encode(["fox"])[0, :2].tolist() == [5, 1]
    with pytest.raises(DataError, match="256,000 token ids"):
        tokenizer_of(TextConfig(vocab_size=256_000))
