"""Positions of the run to decoded, tokenised samples; bad samples are counted and replaced, never silent.

A bad sample at position p is replaced by the sample at p+1, p+2, ... with the crop and flip of p, whoever
reads it: image and caption are judged together, so that ranks which keep only one of them agree. What counts
as bad: missing_image, missing_caption, empty_image (zero bytes), not_an_image (an HTML page named .jpg),
truncated_image, undecodable_image, too_many_pixels, empty_caption (nothing left after cleaning) and
truncated_shard (the file became shorter than its index). Repaired rather than bad: invalid UTF-8 in a caption
(replacement characters), captions beyond 16 KiB (cut: no context length reaches that far).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from data.config import DataConfig
from data.decode import make_decoder
from data.errors import DataError, Rejected
from data.index import IndexStore, Place
from data.order import SampleOrder
from data.shards import ShardFiles, expand_shards
from data.tokenizer import EOT, Tokenizer
from data.transforms import RandomResizedCrop, Transform, eval_transform

_MAX_CAPTION_BYTES = 16 * 1024
_MAX_CONSECUTIVE_BAD = 100
_READS_BEFORE_JUDGING = 1_000


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """A sample that was read, rejected and replaced."""

    shard: str
    """Path of its tar file."""
    key: str
    """Its key within the tar."""
    reason: str
    """One of the reasons in the module text."""
    position: int
    """The global position that asked for it (the same for all that one replacement passed over)."""


@dataclass(frozen=True, kw_only=True)
class SampleBatch:
    """n samples in the order of their positions."""

    images: torch.Tensor
    """uint8 [n, 3, image_size, image_size], RGB."""
    tokens: torch.Tensor
    """int64 [n, context_length]."""
    captions: list[str]
    """The captions before cleaning."""
    keys: list[str]
    """Sample keys within their tars."""
    bad: list[BadSample]
    """What was replaced on the way to these n."""


@dataclass(frozen=True, kw_only=True)
class _Sample:
    pixels: np.ndarray
    tokens: np.ndarray
    caption: str
    key: str


class SampleReader:
    """Random access to the samples of `config.shards` by global position.

    train: the shuffled order of `seed` with random resized crops; otherwise the listed order, seen through
    `evaluation` ("squash" or "crop"). Building it reads (or builds) the index of every shard.
    Raises DataError for unusable shards or settings.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        image_size: int,
        context_length: int,
        seed: int,
        train: bool,
        evaluation: str = "squash",
    ) -> None:
        self._config = config
        self._image_size = image_size
        self._paths = expand_shards(config.shards)
        in_use = 2 * config.shuffle_group_shards  # a batch may straddle two groups
        self._files = ShardFiles(self._paths, max_open=in_use)
        self._indices = IndexStore(self._paths, max_loaded=in_use)
        self._order = SampleOrder(
            self._indices.counts,
            seed=seed,
            shuffle=config.shuffle and train,
            group_shards=config.shuffle_group_shards,
        )
        self._transform: Transform = (
            RandomResizedCrop(seed=seed, size=image_size, scale=_scale(config), flip=config.flip)
            if train
            else eval_transform(evaluation, size=image_size)
        )
        self._decoder = make_decoder(config.decoder)
        self._tokenizer = Tokenizer(context_length)
        self.reads = 0
        """Samples read by this reader, the bad ones included."""
        self.bad_by_reason: Counter[str] = Counter()
        """Bad samples of this reader."""

    @property
    def total_samples(self) -> int:
        """Samples of one epoch, bad ones included."""
        return self._order.total

    def read(self, positions: np.ndarray) -> SampleBatch:
        """Samples at the global positions int64 [n] (any order; beyond `total_samples` the next epochs).

        Raises DataError after 100 bad samples in a row, or when the share of bad samples exceeds
        `max_bad_fraction` (judged from this reader's 1,000th read on).
        """
        positions = np.asarray(positions, dtype=np.int64)
        bad: list[BadSample] = []
        samples = [
            self._read_good(position, shard, sample, bad)
            for position, shard, sample in zip(positions.tolist(), *self._locate(positions), strict=True)
        ]
        self._judge_bad_fraction()
        return self._collate(samples, bad)

    def _locate(self, positions: np.ndarray) -> tuple[list[int], list[int]]:
        shards, samples = self._order.locate(positions)
        return shards.tolist(), samples.tolist()

    def _candidates(self, position: int, shard: int, sample: int) -> Iterator[tuple[int, int]]:
        yield shard, sample
        following = np.arange(position + 1, position + _MAX_CONSECUTIVE_BAD)
        yield from zip(*self._locate(following), strict=True)

    def _read_good(self, position: int, shard: int, sample: int, bad: list[BadSample]) -> _Sample:
        """The sample, or the next good one in the order; what is passed over is appended to `bad`."""
        cause: BaseException | None = None
        for candidate in self._candidates(position, shard, sample):
            self.reads += 1
            try:
                return self._read_one(position, *candidate)
            except Rejected as rejected:
                bad.append(self._count_bad(position, *candidate, rejected.reason))
                cause = rejected.__cause__
        raise DataError(
            f"{_MAX_CONSECUTIVE_BAD} bad samples in a row from position {position} on ({self._reasons()}); "
            f"the last: {bad[-1].key} in {bad[-1].shard}{f' ({cause})' if cause else ''}. "
            "Repair the shards or leave them out of data.shards"
        )

    def _read_one(self, position: int, shard: int, sample: int) -> _Sample:
        caption, tokens = self._read_caption(shard, sample)
        encoded = self._read_member(shard, sample, Place.IMAGE)
        window = self._transform.window(position, *self._decoder.size(encoded))
        pixels = self._decoder.decode(encoded, window)
        return _Sample(pixels=pixels, tokens=tokens, caption=caption, key=self._indices[shard].key(sample))

    def _read_caption(self, shard: int, sample: int) -> tuple[str, np.ndarray]:
        encoded = self._read_member(shard, sample, Place.CAPTION, at_most=_MAX_CAPTION_BYTES)
        caption = encoded.decode(errors="replace").strip()
        tokens = self._tokenizer.encode([caption])[0]
        if tokens[1] == EOT:  # nothing between start and end
            raise Rejected("empty_caption")
        return caption, tokens

    def _read_member(self, shard: int, sample: int, place: Place, at_most: int | None = None) -> bytes:
        span = self._indices[shard].span(sample, place)
        if span is None:
            raise Rejected(f"missing_{place.name.lower()}")
        offset, size = span
        size = size if at_most is None else min(size, at_most)
        content = self._files.read(shard, offset, size)
        if len(content) < size:
            raise Rejected("truncated_shard")
        return content

    def _collate(self, samples: list[_Sample], bad: list[BadSample]) -> SampleBatch:
        images = torch.empty((len(samples), 3, self._image_size, self._image_size), dtype=torch.uint8)
        tokens = torch.empty((len(samples), self._tokenizer.context_length), dtype=torch.int64)
        for image_row, token_row, sample in zip(images.numpy(), tokens.numpy(), samples, strict=True):
            image_row[:] = sample.pixels
            token_row[:] = sample.tokens
        return SampleBatch(
            images=images,
            tokens=tokens,
            captions=[sample.caption for sample in samples],
            keys=[sample.key for sample in samples],
            bad=bad,
        )

    def _count_bad(self, position: int, shard: int, sample: int, reason: str) -> BadSample:
        self.bad_by_reason[reason] += 1
        key = self._indices[shard].key(sample)
        return BadSample(shard=self._paths[shard], key=key, reason=reason, position=position)

    def _judge_bad_fraction(self) -> None:
        bad = self.bad_by_reason.total()
        if self.reads >= _READS_BEFORE_JUDGING and bad > self._config.max_bad_fraction * self.reads:
            raise DataError(
                f"{bad} of {self.reads} samples were bad ({self._reasons()}), more than "
                f"data.max_bad_fraction={self._config.max_bad_fraction}: repair the shards or raise the limit"
            )

    def _reasons(self) -> str:
        return ", ".join(f"{reason} {count}" for reason, count in self.bad_by_reason.most_common())


def _scale(config: DataConfig) -> tuple[float, float]:
    if len(config.crop_scale) != 2:
        raise DataError(f"data.crop_scale is {config.crop_scale}: it needs two numbers, low and high")
    return config.crop_scale[0], config.crop_scale[1]
