"""Several captions a picture: the choice follows from the position, and what stands in is counted."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.captions import CaptionChoice
from data.config import DataConfig
from data.errors import DataError
from data.reader import SampleReader
from data.shards.write import write_shard
from engine.config.read import load_config
from tests.data.shard_factory import encode, picture

SAMPLES = 20


def _members(number: int, **more: bytes) -> dict[str, bytes]:
    metadata = {"recaption": f"recaption {number}", "nested": {"alt": [f"alt {number} {n}" for n in range(3)]}}
    return {
        "png": encode(picture(number)),
        "txt": f"caption {number}\n\nsecond line {number}\n".encode(),
        "json": json.dumps(metadata).encode(),
        "syn.txt": f"Synthetic {number}. It has three! Sentences.".encode(),
    } | {name.replace("_", "."): content for name, content in more.items()}


def _reader(folder: Path, samples: list[tuple[str, dict[str, bytes]]] | None = None, **settings: Any) -> SampleReader:
    path = str(folder / "x.tar")
    write_shard(path, samples or [(f"s{number}", _members(number)) for number in range(SAMPLES)])
    config = DataConfig(shards=[path], workers=0, **settings)
    return SampleReader(config, image_size=8, context_length=16, seed=3, train=True)


def _kinds(captions: list[str]) -> Counter[str]:
    return Counter(caption.split()[0] for caption in captions)


def test_weights_hold_and_the_choice_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    reader = _reader(tmp_path, captions={"txt.lines": 0.5, "json.recaption": 0.3, "json.nested.alt": 0.2})
    whole = reader.read(np.arange(1000))
    kinds = _kinds(whole.captions)
    assert kinds["caption"] + kinds["second"] == pytest.approx(500, abs=50)
    assert kinds["caption"] == pytest.approx(kinds["second"], abs=70)
    assert kinds["recaption"] == pytest.approx(300, abs=50) and kinds["alt"] == pytest.approx(200, abs=45)
    alternatives = {caption.split()[2] for caption in whole.captions if caption.startswith("alt")}
    assert alternatives == {"0", "1", "2"} and whole.caption_fallbacks == 0
    parts = [reader.read(np.arange(first, first + 50)) for first in range(950, -1, -50)][::-1]
    assert [caption for part in parts for caption in part.captions] == whole.captions
    assert whole.captions[:SAMPLES] != whole.captions[SAMPLES : 2 * SAMPLES]


def test_without_the_option_the_caption_is_the_whole_member(tmp_path: Path) -> None:
    assert set(_reader(tmp_path).read(np.arange(SAMPLES)).captions) == {
        f"caption {number}\n\nsecond line {number}" for number in range(SAMPLES)
    }


@pytest.mark.parametrize(
    ("sentences", "expected"),
    [
        ("all", {"Synthetic 0. It has three! Sentences."}),
        ("first 1", {"Synthetic 0."}),
        ("first 2", {"Synthetic 0. It has three!"}),
        ("first 9", {"Synthetic 0. It has three! Sentences."}),
        ("random", {"Synthetic 0.", "It has three!", "Sentences."}),
    ],
)
def test_sentences(tmp_path: Path, sentences: str, expected: set[str]) -> None:
    reader = _reader(tmp_path, [("s0", _members(0))], captions={"syn.txt": 1.0}, sentences=sentences)
    assert set(reader.read(np.arange(40)).captions) == expected


def test_what_stands_in_for_a_missing_text_is_counted(tmp_path: Path) -> None:
    broken = [
        b"{",
        b"[]",
        b'{"recaption": 3}',
        b'{"recaption": ""}',
        b"\xff",
        b'{"recaption": "' + b"x" * 20_000 + b'"}',
    ]
    samples = [(f"s{number}", _members(number, json=content)) for number, content in enumerate(broken)]
    reader = _reader(tmp_path, samples, captions={"json.recaption": 1.0, "none.txt": 0, "syn.txt": 0})
    batch = reader.read(np.arange(len(broken)))
    assert _kinds(batch.captions) == {"Synthetic": len(broken)}
    assert batch.caption_fallbacks == len(broken) and not batch.bad


def test_a_sample_without_any_of_the_texts_is_bad(tmp_path: Path) -> None:
    empty = _members(1, json=b"{}")
    samples = [("none", empty), *((f"s{number}", _members(number)) for number in range(5))]
    batch = _reader(tmp_path, samples, captions={"json.recaption": 1.0}).read(np.arange(6))
    assert {(sample.key, sample.reason) for sample in batch.bad} == {("none", "missing_caption")}
    assert batch.caption_fallbacks == 0


def test_outside_training_nothing_is_drawn(tmp_path: Path) -> None:
    choice = CaptionChoice({"json.a": 0.1, "txt": 0.9}, "all", seed=0, train=False)
    assert {tuple(choice.order(position)) for position in range(50)} == {("json.a", "txt")}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"captions": {"caption": 1.0}}, r"data\.captions names 'caption': use txt, json\.FIELD"),
        ({"captions": {"txt": -1.0}}, "none may be negative"),
        ({"captions": {"txt": 0.0}}, "one must be above 0"),
        ({"sentences": "two"}, "choose all, random or first N"),
        ({"sentences": "first 0"}, "choose all, random or first N"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        DataConfig(shards=["x"], **settings).check()


def test_the_option_in_a_config(tmp_path: Path) -> None:
    (tmp_path / "x.tar").touch()
    text = "{txt: 0.5, json.recaption: 0.4, syn.txt.lines: 0.1}"
    overrides = [f"data.shards={tmp_path}/x.tar", f"data.captions={text}", "data.sentences=first 2"]
    config = load_config("examples/quickstart/train.yaml", overrides)
    assert config.data.captions == {"txt": 0.5, "json.recaption": 0.4, "syn.txt.lines": 0.1}
    assert config.data.sentences == "first 2"
