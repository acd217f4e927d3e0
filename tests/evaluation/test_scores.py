"""Scores do not depend on order, batch or duplicates, and equal captions never make a right answer wrong."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from data.batch import BadSample
from data.errors import DataError
from data.tokenizer import Tokenizer
from engine.evaluation.inputs import Block
from engine.evaluation.scores import CaptionScores, ClassPrompts, caption_scores
from engine.evaluation.text_files import caption_lines, read_lines
from engine.evaluation.vocabulary import remark_on, tokenizer_of
from models.config import TextConfig

CONTEXT, WIDTH = 12, 24
NAMES = ["a cat", "a dog", "a red car", "two birds", "the sea", "a house", "snow", "bread"]
Sample = tuple[int, tuple[int, ...]]
"""(number of a picture, numbers of its captions)."""


class Towers:
    """Embeddings by content: of a picture's number and of a caption's tokens; the scores see nothing else."""

    def __init__(self, perfect: bool = False):
        """perfect: a picture has the embedding of name number picture % 4."""
        self.perfect = perfect

    def images(self, pixels: Callable[[slice], Tensor], count: int) -> Tensor:
        numbers = [int(row[0, 0, 0]) for row in pixels(slice(0, count))]
        if self.perfect:
            return self.texts(torch.from_numpy(Tokenizer(CONTEXT).encode([NAMES[n % 4] for n in numbers])))
        return torch.stack([_noise(n) for n in numbers])

    def texts(self, tokens: Tensor) -> Tensor:
        return torch.stack([_noise(int((row * torch.arange(1, CONTEXT + 1)).sum())) for row in tokens])


def _noise(seed: int) -> Tensor:
    return normalize(torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)), dim=0)


def blocks(samples: list[Sample], size: int) -> list[Block]:
    whole = []
    for start in range(0, len(samples), size):
        part = samples[start : start + size]
        pixels = torch.stack([torch.full((3, 1, 1), float(number)) for number, _ in part])
        whole.append(
            Block(
                start,
                start + len(part),
                pixels.__getitem__,
                keys=[f"k{number}" for number, _ in part],
                captions=["\n".join(NAMES[n] for n in captions) or None for _, captions in part],
                has_image=torch.ones(len(part), dtype=torch.bool),
                pictures=[str(number).encode() for number, _ in part],
                bad=[
                    BadSample(shard="s", key="k", reason="missing_caption", position=start + row)
                    for row, (_, captions) in enumerate(part)
                    if not captions
                ],
            )
        )
    return whole


def scores_of(samples: list[Sample], size: int = 7, perfect: bool = False) -> dict[str, float]:
    collected = CaptionScores(Towers(perfect), Tokenizer(CONTEXT))  # type: ignore[arg-type]
    for block in blocks(samples, size):
        collected.add(block)
    return collected.scores()


def test_forty_pictures_of_four_names() -> None:
    found = scores_of([(number, (number % 4,)) for number in range(40)], perfect=True)
    assert found["zero_shot_top1"] == found["text_to_image_recall_at_1"] == 1.0
    assert found["chance"] == 0.25 and found["pictures"] == 40 and found["captions"] == 4


def test_photos_listed_twice_score_as_once() -> None:
    samples: list[Sample] = [(number, (number % 8,)) for number in range(20)]
    once, twice = scores_of(samples), scores_of(samples * 2)
    assert {k: v for k, v in once.items() if k != "samples"} == {k: v for k, v in twice.items() if k != "samples"}


SAMPLES = st.lists(
    st.tuples(st.integers(0, 15), st.lists(st.integers(0, 7), max_size=3).map(tuple)), min_size=1, max_size=24
).filter(lambda samples: any(captions for _, captions in samples))


@settings(max_examples=20, deadline=None)
@given(samples=SAMPLES, size=st.integers(1, 9), data=st.data())
def test_order_batch_and_duplicates_change_nothing(samples: list[Sample], size: int, data: st.DataObject) -> None:
    plain = scores_of(samples)
    shuffled = data.draw(st.permutations(samples))
    again = data.draw(st.lists(st.sampled_from(samples), max_size=6))
    counts = ("samples", "left_out")
    assert scores_of(shuffled, size) == plain
    repeated = scores_of([*again, *samples], size)
    assert {k: v for k, v in repeated.items() if k not in counts} == {k: v for k, v in plain.items() if k not in counts}
    assert repeated["samples"] == len(samples) + len(again)
    assert plain["left_out"] == sum(not captions for _, captions in samples)


@settings(max_examples=15, deadline=None)
@given(pictures=st.integers(1, 12), captions=st.integers(1, 8), seed=st.integers(0, 999))
def test_perfect_embeddings_score_one_and_chance_is_what_a_random_order_gives(
    pictures: int, captions: int, seed: int
) -> None:
    owner = torch.randint(0, captions, (pictures,), generator=torch.Generator().manual_seed(seed))
    _, owner = owner.unique(return_inverse=True)
    text = torch.stack([_noise(n) for n in range(int(owner.max()) + 1)])
    found = caption_scores(text[owner], text, torch.stack([torch.arange(pictures), owner], dim=1))
    assert found["zero_shot_top1"] == 1.0 and found["chance"] == 1 / len(text)


def test_a_model_that_sees_nothing_scores_nothing() -> None:
    same = normalize(torch.ones(6, WIDTH), dim=1)
    found = caption_scores(same, same, torch.stack([torch.arange(6)] * 2, dim=1))
    assert found["zero_shot_top1"] == found["zero_shot_top5"] == 0.0


def test_every_line_is_a_caption() -> None:
    assert caption_lines("a cat\r\n\n two birds \n") == ["a cat", "two birds"]
    assert caption_lines("a\u2028b\x0cc") == ["a\u2028b\x0cc"] and caption_lines(None) == []
    found = scores_of([(0, (0, 1)), (1, (2,)), (2, (3, 4, 0))])
    assert found["captions"] == 5 and found["chance"] == 6 / 3 / 5


def test_equal_class_names_are_one_class() -> None:
    prompts = ClassPrompts(["missile", "sunglasses", "Missile", "cat"], ["{}", "a {}"], Tokenizer(CONTEXT))
    assert prompts.tokens.shape == torch.Size([6, CONTEXT])
    assert [prompts.label(name) for name in ("missile", "MISSILE", "sunglasses", "cat")] == [0, 0, 1, 2]


def test_class_files_as_editors_save_them(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufeffcafé\r\ntea \n\n".encode())
    assert read_lines(path, "a name") == ["café", "tea"]
    path.write_bytes("tea\ncaf\xe9\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"classes\.txt is not UTF-8 \(byte 0xe9 in line 2\): save it as UTF-8"):
        read_lines(path, "a name")
    path.write_bytes(b"\n \n")
    with pytest.raises(DataError, match="is empty"):
        read_lines(path, "a name")
    with pytest.raises(DataError, match=r"none\.txt does not exist: a name, one a line"):
        read_lines(tmp_path / "none.txt", "a name")


def test_a_toy_vocabulary_is_folded_and_said() -> None:
    text = TextConfig(context_length=CONTEXT, vocab_size=320, width=8, depth=1, heads=1)
    words = ["a photo of a cat", "a dog"]
    ids, full = tokenizer_of(text).encode(words), Tokenizer(CONTEXT).encode(words)
    assert ids.max() == 319 and (ids.argmax(axis=1) == full.argmax(axis=1)).all() and (ids[:, 0] == 318).all()
    assert "320 token ids" in remark_on(text) and remark_on(TextConfig()) == ""
    assert np.array_equal(tokenizer_of(TextConfig(context_length=CONTEXT)).encode(["a dog"]), full[1:])
