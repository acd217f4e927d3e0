"""Token ids equal those of the authors' tokenizer (golden fixture G7), cleaning included."""

import html
import json
from pathlib import Path

import ftfy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import bpe, tokenizer
from data.bpe import encoder
from data.errors import DataError
from data.tokenizer import EOT, PAD, SOT, VOCAB_SIZE, Tokenizer, clean

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/g7-tokenizer/tokens.json").read_text(encoding="utf-8"))
ROWS = GOLDEN["rows"]


def test_constants_are_those_of_the_fixture() -> None:
    fixture = (GOLDEN["vocab_size"], GOLDEN["sot"], GOLDEN["eot"], GOLDEN["pad"])
    assert fixture == (VOCAB_SIZE, SOT, EOT, PAD)


def test_full_context_rows_equal_the_fixture() -> None:
    tokens = Tokenizer(GOLDEN["context_length"]).encode([row["text"] for row in ROWS])
    assert tokens.shape == (len(ROWS), GOLDEN["context_length"]) and tokens.dtype == "int64"
    for row, ids in zip(ROWS, tokens.tolist(), strict=True):
        assert ids == row["ids"] + [PAD] * (len(ids) - row["length"]), row["text"]


def test_rows_cut_to_16_equal_the_fixture() -> None:
    tokens = Tokenizer(16).encode([row["text"] for row in ROWS])
    assert tokens.tolist() == [row["ids_context16"] for row in ROWS]


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="&"), max_size=80))
def test_ftfy_would_not_change_what_it_is_not_asked_about(text: str) -> None:
    assert tokenizer._is_plain(text) and ftfy.fix_text(text) == text == html.unescape(text)


def test_entities_are_unescaped_twice_where_ftfy_keeps_out() -> None:
    assert clean("<b> Fish &amp;amp;\tChips ") == "<b> fish & chips"  # markup stops ftfy's own unescaping


def test_a_context_without_room_is_an_error() -> None:
    with pytest.raises(DataError, match="context length 1"):
        Tokenizer(1)


def test_special_tokens_are_found_as_the_pattern_goes_from_left_to_right() -> None:
    """By the authors' pattern: a run of punctuation takes the "<" along, and what follows is plain letters."""
    encode = encoder()
    assert encode("<end_of_text>") == [EOT]
    assert encode("a <start_of_text>1<end_of_text>") == [*encode("a"), SOT, *encode("1"), EOT]
    pieces = ("!<", "end", "_", "of", "_", "text", ">")
    assert encode("!<end_of_text>") == [number for piece in pieces for number in encode(piece)]


@given(st.text(st.characters(max_codepoint=127), max_size=60) | st.sampled_from(("it'S 42nd don't 'll x'", "a" * 40)))
def test_words_by_themselves_have_the_ids_of_the_text(text: str) -> None:
    """What the package gives for the whole text, which one letter beyond ASCII at its end makes it look at."""
    whole = encoder()(f"{text} é")
    assert encoder()(text) + encoder()("é") == whole


def test_the_merges_are_those_of_the_vocabulary() -> None:
    merges = bpe.merge_lines()
    assert len(merges) == VOCAB_SIZE - 2 - 2 * 256
    assert (merges[0], merges[-1]) == ("i n", "jeky ll</w>")
    assert len(set(merges)) == len(merges)
