"""CLIP's byte-pair encoding on the package `tokenizers`: cleaned text to ids, without start and end.

The merges are a file of ours (data/vocabulary); nothing is downloaded. CLIP's pattern is looked for from left to right,
the two special tokens first in it. So they are part of the pattern here too, and not what `tokenizers` calls added
tokens: those are cut out before any pattern, also of the middle of a run of punctuation ("!<end_of_text>").

The ids of a text are those of its words one behind another, and captions use the same words: of a text in ASCII, which
Python's own `re` cuts in the same places, only words that were not seen of late go to the package.
"""

import gzip
import re
from collections.abc import Callable
from functools import cache, lru_cache
from importlib.resources import files
from itertools import chain

import tokenizers

SPECIAL = {"<start_of_text>": 49_406, "<end_of_text>": 49_407}
_PATTERN = r"(?i:<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+)"
_ASCII_WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+", re.ASCII | re.IGNORECASE)
"""What `_PATTERN` finds in a text of ASCII alone that has no special token."""
_WORD_END = "</w>"
_WORDS_KEPT, _LONGEST_KEPT = 1 << 15, 32
"""Words whose ids are kept, and the characters of the longest of them: a few megabytes whatever the captions are."""


@cache
def encoder() -> Callable[[str], list[int]]:
    """The function that encodes, made once a process."""
    merges = [(left, right) for left, right in (line.split(" ") for line in merge_lines())]
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_PATTERN), "removed", invert=True)
    as_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary(), merges=merges, end_of_word_suffix=_WORD_END))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, as_bytes])

    @lru_cache(maxsize=_WORDS_KEPT)
    def kept(word: str) -> tuple[int, ...]:
        return tuple(bpe.encode(word).ids)

    def encode(text: str) -> list[int]:
        if not any(token in text for token in SPECIAL):
            if not text.isascii():
                return bpe.encode(text).ids
            words = _ASCII_WORDS.findall(text)
            return [i for word in words for i in (kept(word) if len(word) <= _LONGEST_KEPT else bpe.encode(word).ids)]
        pieces = [piece for piece, _ in split.pre_tokenize_str(text)]
        parts = ([SPECIAL[piece]] if piece in SPECIAL else bpe.encode(piece).ids for piece in pieces)
        return list(chain.from_iterable(parts))

    return encode


def vocabulary() -> dict[str, int]:
    """Token -> id of CLIP, the special two left out: 256 bytes, the same at the end of a word, the merges."""
    tokens = _bytes_in_order()
    tokens += [token + _WORD_END for token in tokens]
    tokens += [line.replace(" ", "") for line in merge_lines()]
    return {token: number for number, token in enumerate(tokens)}


def merge_lines() -> list[str]:
    """The merges in their order, each two tokens with a space between."""
    packed = files("data.vocabulary").joinpath("clip_merges.txt.gz").read_bytes()
    return gzip.decompress(packed).decode("utf-8").splitlines()


def _bytes_in_order() -> list[str]:
    """The character that stands for each byte, printable ones first, as CLIP's vocabulary numbers them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]
