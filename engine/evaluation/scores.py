"""Zero-shot scores of a model on shards, at any layout: what tools.evaluate and the evaluation between steps share.

Every sample counts that has a readable picture and at least one caption, one a line; the others are reported. Pictures
with the same pixels and captions with the same tokens are the same to the model: they are embedded and counted once,
and whatever belongs to one of them is right for all.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from data.batch import BadSample
from data.errors import DataError
from data.tokenizer import Tokenizer, clean
from engine.evaluation.embedder import Embedder
from engine.evaluation.inputs import Block, ShardInput
from engine.evaluation.ranking import best_ranks, share_within
from engine.evaluation.retrieval import recall
from engine.evaluation.text_files import caption_lines
from engine.evaluation.zero_shot import class_weights

_SHOWN_KEYS = 3


@dataclass
class LeftOut:
    """Samples that were not scored."""

    samples: list[BadSample] = field(default_factory=list)
    """One entry a sample and reason."""
    kept: bool = False
    """They are rows without a value, not left out."""

    @property
    def count(self) -> int:
        """Samples, each counted once."""
        return len({sample.position for sample in self.samples})

    def describe(self, total: int) -> str:
        """For people: how many, why, and the first of them."""
        reasons = ", ".join(f"{reason} {n}" for reason, n in Counter(s.reason for s in self.samples).most_common())
        named = ", ".join(f"{sample.key} in {sample.shard}" for sample in self.samples[:_SHOWN_KEYS])
        more = ", …" if len(self.samples) > _SHOWN_KEYS else ""
        fate = "kept as NaN" if self.kept else "left out"
        return f"{self.count:,} of {total:,} samples were {fate} ({reasons}): {named}{more}"

    def write(self, path: Path, total: int) -> None:
        """One JSON object a sample and reason, and a warning; no file where nothing was left out."""
        if not self.samples:
            path.unlink(missing_ok=True)
            return
        lines = [{"key": s.key, "shard": s.shard, "reason": s.reason, "position": s.position} for s in self.samples]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        print(f"WARNING: {self.describe(total)}; all in {path}", file=sys.stderr, flush=True)


class Distinct:
    """Embeddings of the different things among many, in the order of their first appearance."""

    def __init__(self) -> None:
        self._number: dict[bytes, int] = {}
        self._parts: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._number)

    def new(self, identities: Sequence[bytes]) -> list[int]:
        """Which of `identities` were not here yet, once each; `add` wants their embeddings next."""
        fresh: dict[bytes, int] = {}
        for at, identity in enumerate(identities):
            if identity not in self._number:
                fresh.setdefault(identity, at)
        self._number |= {identity: len(self._number) + n for n, identity in enumerate(fresh)}
        return list(fresh.values())

    def add(self, embeddings: Tensor) -> None:
        """fp32 [n, D] of what `new` has just named."""
        self._parts.append(embeddings)

    def number(self, identity: bytes) -> int:
        """Row of a caption in `embeddings`."""
        return self._number[identity]

    def knows(self, identity: bytes) -> bool:
        """Whether it has appeared."""
        return identity in self._number

    @property
    def embeddings(self) -> Tensor:
        """fp32 [N, D]."""
        return torch.cat(self._parts)


def check_embeddings(embeddings: Tensor, what: str, names: Sequence[str]) -> Tensor:
    """The embeddings [n, D], if every one is finite and not zero; DataError names the first that is not."""
    good = torch.isfinite(embeddings).all(dim=1) & (embeddings != 0).any(dim=1)
    if not bool(good.all()):
        first = int((~good).nonzero()[0])
        raise DataError(
            f"{int((~good).sum())} of {len(embeddings)} {what} embeddings are zero or not finite, the first of "
            f"{names[first]!r}: check the weights of the checkpoint, and train.precision"
        )
    return embeddings


def worded(block: Block, row: int) -> list[str]:
    """The captions of a sample, one a line, that have a word in them."""
    return [line for line in caption_lines(block.captions[row]) if clean(line)]


class CaptionScores:
    """Collects embedded blocks; every different caption is a candidate for every different picture."""

    def __init__(self, embedder: Embedder, tokenizer: Tokenizer):
        self._embedder, self._tokenizer = embedder, tokenizer
        self.images, self.texts = Distinct(), Distinct()
        self.captions: list[str] = []
        """The different captions, in the order of their embeddings."""
        self._pairs: set[tuple[int, int]] = set()
        self.left_out = LeftOut()
        self.samples = 0
        """Samples seen, those left out included."""

    def add(self, block: Block) -> None:
        """Embed what is new in a block. Collective over the mesh."""
        assert block.pixels is not None and block.has_image is not None
        self.samples += block.stop - block.start
        self.left_out.samples += block.bad
        lines = {row: lines for row in range(len(block.keys)) if block.has_image[row] and (lines := worded(block, row))}
        image = self._embedder.images(block.pixels, block.stop - block.start).cpu()
        rows = list(lines)
        fresh = [rows[at] for at in self.images.new([block.pictures[row] for row in rows])]
        self.images.add(check_embeddings(image[fresh], "image", [block.keys[row] for row in fresh]))
        for row, texts in zip(rows, self._embed_new(list(lines.values())), strict=True):
            self._pairs |= {(self.images.number(block.pictures[row]), text) for text in texts}

    def _embed_new(self, lines: list[list[str]]) -> list[list[int]]:
        """The numbers of the captions, grouped as they came; those not met before are embedded."""
        flat = [line for of_row in lines for line in of_row]
        tokens = torch.from_numpy(self._tokenizer.encode(flat))
        identities = [row.numpy().tobytes() for row in tokens]
        fresh = self.texts.new(identities)
        new_lines = [flat[at] for at in fresh]
        if fresh:
            self.texts.add(check_embeddings(self._embedder.texts(tokens[fresh]).cpu(), "text", new_lines))
        self.captions += new_lines
        numbers = iter([self.texts.number(identity) for identity in identities])
        return [[next(numbers) for _ in of_row] for of_row in lines]

    @property
    def pairs(self) -> Tensor:
        """int64 [P, 2]: (picture, caption) that belong together."""
        return torch.tensor(sorted(self._pairs), dtype=torch.int64).view(-1, 2)

    def scores(self) -> dict[str, float]:
        """Shares (0..1) and counts. Raises DataError if no sample could be scored."""
        if not self._pairs:
            raise DataError(f"no sample has both a picture and a caption: {self.left_out.describe(self.samples)}")
        scored = caption_scores(self.images.embeddings, self.texts.embeddings, self.pairs)
        counts = {"pictures": len(self.images), "captions": len(self.texts)}
        return scored | counts | {"samples": self.samples, "left_out": self.left_out.count}


def caption_scores(image: Tensor, text: Tensor, pairs: Tensor) -> dict[str, float]:
    """Every caption is a candidate for every image.

    Args: fp32 [N, D] and [M, D], L2-normalised, of different pictures and captions; pairs int64 [P, 2] (image, caption)
    that belong together. `chance` is what a random order of the captions gives as zero_shot_top1.
    """
    ks = tuple(k for k in (1, 5) if k <= min(len(image), len(text)))
    both = recall(image, text, pairs, ks=ks)
    top = {f"zero_shot_top{k}": both[f"image_to_text_recall_at_{k}"] for k in ks}
    if len(text) >= 5 and 5 not in ks:
        top["zero_shot_top5"] = share_within(best_ranks(image, text, pairs), 5)
    means = {
        f"recall_at_{k}": (both[f"image_to_text_recall_at_{k}"] + both[f"text_to_image_recall_at_{k}"]) / 2 for k in ks
    }
    return top | {"chance": len(pairs) / len(image) / len(text)} | means | both


def score_captions(embedder: Embedder, source: ShardInput, size: int, tokenizer: Tokenizer) -> CaptionScores:
    """All samples of the input. Collective over the mesh; every rank gets the same."""
    collected = CaptionScores(embedder, tokenizer)
    for block in source.blocks(size):
        collected.add(block)
    return collected


class ClassPrompts:
    """The prompts of every class, and the class of a sample: its caption. Equal names are one class."""

    def __init__(self, names: Sequence[str], templates: Sequence[str], tokenizer: Tokenizer):
        """templates: {} stands for the name. Raises DataError for no name."""
        if not names:
            raise DataError("there are no class names: give one a line")
        self._labels: dict[str, int] = {}
        for name in names:
            self._labels.setdefault(clean(name), len(self._labels))
        prompts = [template.replace("{}", name) for name in self._labels for template in templates]
        self.tokens = torch.from_numpy(tokenizer.encode(prompts))
        """int64 [different classes x templates, context], the prompts of class 0 first."""
        self.templates = len(templates)

    def label(self, caption: str) -> int:
        """Raises DataError for a caption that is no class."""
        if clean(caption) not in self._labels:
            raise DataError(
                f"the caption {caption!r} of an evaluation sample is none of the {len(self._labels)} classes"
            )
        return self._labels[clean(caption)]


def score_classes(embedder: Embedder, source: ShardInput, size: int, prompts: ClassPrompts) -> dict[str, float]:
    """Zero-shot classification of all samples. Collective over the mesh; every rank gets the scores."""
    classes = class_weights(embedder.texts(prompts.tokens).cpu(), prompts.templates)
    images, right, left_out = [], [], LeftOut()
    scored = 0
    for block in source.blocks(size):
        assert block.pixels is not None and block.has_image is not None
        left_out.samples += block.bad
        image = embedder.images(block.pixels, block.stop - block.start).cpu()
        rows = [row for row in range(len(block.keys)) if block.has_image[row] and worded(block, row)]
        images.append(check_embeddings(image[rows], "image", [block.keys[row] for row in rows]))
        for row in rows:
            right += [(scored, label) for label in {prompts.label(c) for c in worded(block, row)}]
            scored += 1
    if not scored:
        raise DataError(f"no sample could be scored: {left_out.describe(len(source))}")
    pairs = torch.tensor(right, dtype=torch.int64)
    ranks = best_ranks(torch.cat(images), classes, pairs)
    top = {f"zero_shot_top{k}": share_within(ranks, k) for k in (1, 5) if k <= len(classes)}
    chance = len(right) / scored / len(classes)
    return top | {"chance": chance, "samples": len(source), "left_out": left_out.count}
