"""Positions of the run to decoded, tokenised samples; bad samples are counted and, in training, replaced.

A bad sample at position p is replaced by the next sample of its source, with the crop and flip of p, whoever
reads it: image and caption are judged together, so that ranks which keep only one of them agree. What counts
as bad is listed in data/bad.py. Outside training nothing is replaced: data/each.py gives every sample as it is.

Reading has two halves. `fetch` reads bytes, judges captions and headers and chooses windows; `decode` makes
pixels. Reader processes run both, or only the first where the decoder works on the training process's GPU.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from hashlib import blake2b

import numpy as np
import torch

from data.bad import describe, judge_bad_fraction
from data.batch import BadSample, EncodedBatch, EncodedSample, SampleBatch
from data.captions import CAPTION, METADATA, CaptionChoice
from data.config import DataConfig
from data.errors import DataError, Rejected
from data.pixels.decode import make_decoder
from data.pixels.transforms import RandomResizedCrop, Transform, Window, eval_transform
from data.pixels.video import ClipDecoder, check_available, frame_numbers, is_clip
from data.shards.index import Place, ShardIndex, Span
from data.sources import Listing, Sources
from data.vocabulary.files import make_tokenizer

__all__ = ["BadSample", "SampleBatch", "SampleReader"]

_MAX_MEMBER_BYTES = 1 << 30  # no picture and no clip of ten minutes: a sparse file, or damage
_MAX_CONSECUTIVE_BAD = 100
_NO_CAPTION = "missing_caption"
_NO_WINDOW = Window(box=(0, 0, 0, 0), size=0)
_TEXT_PLACES = {CAPTION: Place.CAPTION, METADATA: Place.METADATA}
_CPU = torch.device("cpu")


class SampleReader:
    """Random access to the samples of a data config by global position.

    train: the shuffled, mixed order of `seed` with random resized crops; otherwise the listed order, seen
    through `evaluation` ("squash" or "crop"). captions: false neither reads nor judges them, and samples need
    none; tokens are zeros. picture_ids: whether batches hold a hash of each sample's encoded pictures.
    global_batch_size: needed for data.mix=one_per_batch. first_position: where in the run the order begins (crops still
    follow the position in the run). device: where DALI decodes. listing: of the config's shards; without it, building
    the reader asks for every shard and reads (or builds) its index. Raises DataError for unusable shards or settings.
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
        captions: bool = True,
        picture_ids: bool = False,
        global_batch_size: int = 1,
        first_position: int = 0,
        device: torch.device = _CPU,
        listing: Listing | None = None,
    ) -> None:
        config.check()
        self._config = config
        self._train = train
        self._image_size = image_size
        self.sources = Sources(
            config,
            seed=seed,
            train=train,
            global_batch_size=global_batch_size,
            first_position=first_position,
            listing=listing,
        )
        self._order = self.sources.order
        low, high = config.crop_scale
        self._transform: Transform = (
            RandomResizedCrop(seed=seed, size=image_size, scale=(low, high), flip=config.flip)
            if train
            else eval_transform(evaluation, size=image_size)
        )
        self._decoder = make_decoder(
            config.decoder, max_pixels=config.max_pixels, device=device, scaled_decode=config.scaled_decode
        )
        self._features = self.sources.features(config.features, image_size) if config.features else None
        self._clips = ClipDecoder(frames=config.frames, max_pixels=config.max_pixels)
        if config.frames > 1:
            check_available()
        self._tokenizer = make_tokenizer(config.tokenizer, config.cleaning, context_length)
        self._captions = captions
        self._picture_ids = picture_ids
        self._choice = CaptionChoice(config.captions, config.sentences, seed=seed, train=train)
        self.reads = 0
        """Samples read by this reader, the bad ones included."""
        self.bad_by_reason: Counter[str] = Counter()
        """Bad samples of this reader."""

    @property
    def total_samples(self) -> int:
        """Samples of one epoch of all sources, bad ones included."""
        return sum(self._order.totals)

    @property
    def feature_width(self) -> int | None:
        """D of data.features; None without."""
        return None if self._features is None else self._features.width

    @property
    def decodes_on_gpu(self) -> bool:
        """`decode` must run in the process that owns the GPU."""
        return self._decoder.device.type != "cpu"

    def read(self, positions: np.ndarray) -> SampleBatch:
        """Samples at the global positions int64 [n] (any order; beyond `total_samples` the next epochs).

        Raises DataError after 100 bad samples in a row and, in evaluation, when the share of bad samples
        exceeds `max_bad_fraction` (in training the engine judges the sum over all readers: the share that
        one of many readers sees is noise).
        """
        return self.decode(self.fetch(positions))

    def fetch(self, positions: np.ndarray) -> EncodedBatch:
        """The same, before decoding: what is bad without looking at pixels is already replaced."""
        positions = np.asarray(positions, dtype=np.int64)
        self._transform.expect(positions)
        bad: list[BadSample] = []
        shards, samples = (ids.tolist() for ids in self._order.locate(positions))
        places = zip(positions.tolist(), shards, samples, strict=True)
        good = [self._fetch_good(position, (shard, sample), bad) for position, shard, sample in places]
        return EncodedBatch(positions=positions, samples=good, bad=bad)

    def decode(self, batch: EncodedBatch) -> SampleBatch:
        """Pixels of the batch, on the decoder's device. What cannot be decoded is replaced and decoded until
        every row is filled.
        """
        samples, bad, frames = list(batch.samples), list(batch.bad), self._config.frames
        device = self._decoder.device
        if self._features is None:
            images = torch.empty((len(samples), *self._image_shape()), dtype=torch.uint8, device=device)
        else:  # judged when they were fetched
            rows = np.array([sample.features for sample in samples], dtype=np.float32)
            images = torch.from_numpy(rows.reshape(-1, 1, self._features.width)).to(device)
        pending = list(range(len(samples))) if self._features is None else []
        while pending:
            problems = self._decode_rows([samples[row] for row in pending], images, pending)
            for row, problem in sorted(problems.items()):
                position, sample = int(batch.positions[row]), samples[row]
                bad.append(self._count_bad(position, sample.place, problem.reason))
                samples[row] = self._next_good(position, sample.passed_over + 1, bad, problem.__cause__)
            pending = sorted(problems)
        if not self._train:
            judge_bad_fraction(self.bad_by_reason, reads=self.reads, limit=self._config.max_bad_fraction)
        tokens = np.array([sample.tokens for sample in samples], dtype=np.int64)
        read = SampleBatch(
            images=images if frames > 1 else images[:, 0],
            tokens=torch.from_numpy(tokens.reshape(-1, self._tokenizer.context_length)),
            captions=[sample.caption for sample in samples],
            keys=[sample.key for sample in samples],
            bad=bad,
            picture_ids=torch.tensor([sample.picture_id for sample in samples]) if self._picture_ids else None,
            caption_fallbacks=sum(sample.fell_back for sample in samples),
            positions=batch.positions,
        )
        return read.summed() if self._train else read

    def look_at(self, position: int) -> tuple[EncodedSample, torch.Tensor] | BadSample:
        """The position's own sample with its pixels, uint8 [frames, 3, image_size, image_size], judged but not
        replaced; for tools that look at shards.
        """
        place = self._place(position)
        images = torch.empty((1, *self._image_shape()), dtype=torch.uint8)
        try:
            sample = self._fetch_one(position, place, 0)
            for problem in self._decode_rows([sample], images, [0]).values():
                raise problem
        except Rejected as rejected:
            return self._count_bad(position, place, rejected.reason)
        return sample, images[0]

    def _image_shape(self) -> tuple[int, ...]:
        return (self._config.frames, 3, self._image_size, self._image_size)

    def _decode_rows(self, samples: list[EncodedSample], images: torch.Tensor, rows: list[int]) -> dict[int, Rejected]:
        """Fills images[rows]; the rows that could not be decoded, with the reason of the first bad frame."""
        clips = [(row, sample) for row, sample in zip(rows, samples, strict=True) if sample.is_clip]
        stills = [(row, sample) for row, sample in zip(rows, samples, strict=True) if not sample.is_clip]
        return self._decode_clips(clips, images) | self._decode_stills(stills, images)

    def _decode_clips(self, clips: list[tuple[int, EncodedSample]], images: torch.Tensor) -> dict[int, Rejected]:
        problems = {}
        for row, sample in clips:
            frames = torch.empty(images.shape[1:], dtype=torch.uint8)
            problem = self._clips.decode_into(sample.pictures[0], sample.window, frames)
            if problem is None:
                images[row] = frames.to(images.device)
            else:
                problems[row] = problem
        return problems

    def _decode_stills(self, stills: list[tuple[int, EncodedSample]], images: torch.Tensor) -> dict[int, Rejected]:
        """Images and frame folders: the encoded frames of all samples go to the decoder in one call."""
        jobs = [(picture, sample.window) for _, sample in stills for picture in sample.pictures]
        owners = [row for row, sample in stills for _ in sample.pictures]
        in_place = len(jobs) == images.shape[0] * images.shape[1]  # the common case: nothing is copied
        shape = (len(jobs), *images.shape[2:])
        pixels = images.view(shape) if in_place else torch.empty(shape, dtype=torch.uint8, device=images.device)
        problems: dict[int, Rejected] = {}
        for row, problem in zip(owners, self._decoder.decode_many(jobs, pixels), strict=True):
            if problem is not None:
                problems.setdefault(row, problem)
        if not in_place:
            first = 0
            for row, sample in stills:
                images[row] = pixels[first : first + len(sample.pictures)]  # a still image stands in every frame
                first += len(sample.pictures)
        return problems

    def _fetch_good(self, position: int, place: tuple[int, int], bad: list[BadSample]) -> EncodedSample:
        """The sample, or the next good one of its source; what is passed over is appended to `bad`."""
        try:
            return self._fetch_one(position, place, 0)
        except Rejected as rejected:
            bad.append(self._count_bad(position, place, rejected.reason))
            return self._next_good(position, 1, bad, rejected.__cause__)

    def _next_good(
        self, position: int, passed_over: int, bad: list[BadSample], cause: BaseException | None
    ) -> EncodedSample:
        following = self._order.following(position, _MAX_CONSECUTIVE_BAD - 1)
        tried = {self._place(position), *following[: passed_over - 1]}
        for number, place in enumerate(following[passed_over - 1 :], start=passed_over):
            if place in tried:  # the source is so small that its next epoch has begun
                continue
            tried.add(place)
            try:
                return self._fetch_one(position, place, number)
            except Rejected as rejected:
                bad.append(self._count_bad(position, place, rejected.reason))
                cause = rejected.__cause__
        whole = len(tried) == self._order.total_of(position)
        what = f"all {len(tried)} samples are bad" if whole else f"{len(tried)} bad samples in a row"
        raise DataError(
            f"{what} from position {position} on ({describe(self.bad_by_reason)}); "
            f"the last: {bad[-1].key} in {bad[-1].shard}{f' ({cause})' if cause else ''}. "
            "Repair the shards or leave them out of data.shards"
        )

    def _place(self, position: int) -> tuple[int, int]:
        """(shard, sample) of the position's own sample."""
        shards, samples = self._order.locate(np.array([position], dtype=np.int64))
        return int(shards[0]), int(samples[0])

    def _fetch_one(self, position: int, place: tuple[int, int], passed_over: int) -> EncodedSample:
        self.reads += 1
        caption = self._read_caption(position, place) if self._captions else ("", self._no_tokens(), False)
        return self._fetch_picture(position, place, caption, passed_over)

    def _fetch_picture(
        self, position: int, place: tuple[int, int], caption: tuple[str, np.ndarray, bool], passed_over: int
    ) -> EncodedSample:
        """caption: the text, its tokens, and whether it stands in for another."""
        shard, sample = place
        if self._features is not None:
            return self._with_features(self._features.row(shard, sample), caption, place, passed_over)
        pictures = self._read_pictures(shard, sample)
        clip = is_clip(pictures[0], frames=self._config.frames)
        width, height = self._clips.size(pictures[0]) if clip else self._common_size(pictures)
        return EncodedSample(
            pictures=pictures,
            is_clip=clip,
            window=self._transform.window(position, width, height),
            tokens=caption[1],
            caption=caption[0],
            fell_back=caption[2],
            key=self.sources.index(shard).key(sample),
            place=place,
            picture_id=_hash(pictures) if self._picture_ids else 0,
            passed_over=passed_over,
        )

    def _with_features(
        self, features: np.ndarray, caption: tuple[str, np.ndarray, bool], place: tuple[int, int], passed_over: int
    ) -> EncodedSample:
        return EncodedSample(
            pictures=[],
            is_clip=False,
            window=_NO_WINDOW,
            features=features,
            tokens=caption[1],
            caption=caption[0],
            fell_back=caption[2],
            key=self.sources.index(place[0]).key(place[1]),
            place=place,
            passed_over=passed_over,
        )

    def _common_size(self, pictures: list[bytes]) -> tuple[int, int]:
        sizes = {self._decoder.size(picture) for picture in pictures}
        if len(sizes) > 1:
            raise Rejected("frame_sizes_differ")
        return sizes.pop()

    def _read_caption(self, position: int, place: tuple[int, int]) -> tuple[str, np.ndarray, bool]:
        """The caption, its tokens, and whether the text that was chosen could not be used. Raises Rejected with what is
        wrong with the chosen one.
        """
        problem: Rejected | None = None
        for name in self._choice.order(position):
            try:
                caption = self._choice.read(name, position, partial(self._text, place))
                tokens = self._tokenizer.encode([caption])[0]
                if self._tokenizer.is_empty(caption, tokens):
                    raise Rejected("empty_caption")
                return caption, tokens, problem is not None
            except Rejected as rejected:
                problem = problem or rejected
        assert problem is not None
        raise _missing("caption", self.sources.index(place[0]), place[1]) if problem.reason == _NO_CAPTION else problem

    def _text(self, place: tuple[int, int], name: str) -> tuple[int, Callable[[], bytes]] | None:
        """Size and reader of a text member of the sample."""
        shard, sample = place
        index = self.sources.index(shard)
        if name in _TEXT_PLACES:
            span = index.span(sample, _TEXT_PLACES[name])
        else:
            span = index.text_spans(sample).get(name.lower())
        return None if span is None else (span[1], partial(self._read_span, shard, index, span))

    def _no_tokens(self) -> np.ndarray:
        return np.zeros(self._tokenizer.context_length, dtype=np.int64)

    def _read_pictures(self, shard: int, sample: int) -> list[bytes]:
        """The image or clip; of a frame folder the frames that are seen."""
        index = self.sources.index(shard)
        span = index.span(sample, Place.IMAGE)
        if span is not None:
            return [self._read_span(shard, index, span)]
        folder = index.frame_spans(sample)
        if not folder:
            raise _missing("image", index, sample)
        wanted = frame_numbers(len(folder), self._config.frames).tolist()
        return [self._read_span(shard, index, folder[number]) for number in wanted]

    def _read_span(self, shard: int, index: ShardIndex, span: Span) -> bytes:
        if span[1] > _MAX_MEMBER_BYTES:
            raise Rejected("member_too_large")
        content = index.read(span, partial(self.sources.files.read, shard))
        if len(content) < span[1]:
            raise Rejected("truncated_shard")
        return content

    def _count_bad(self, position: int, place: tuple[int, int], reason: str) -> BadSample:
        self.bad_by_reason[reason] += 1
        shard, sample = place
        return BadSample(
            shard=self.sources.shards[shard],
            key=self.sources.index(shard).key(sample),
            reason=reason,
            position=position,
        )


def _hash(pictures: list[bytes]) -> int:
    digest = blake2b(digest_size=8)
    for picture in pictures:
        digest.update(picture)
    return int.from_bytes(digest.digest(), "big") >> 1  # a positive int64


def _missing(member: str, index: ShardIndex, sample: int) -> Rejected:
    """What the last sample of a truncated tar lacks lay behind the cut."""
    cut_off = index.truncated and sample == len(index) - 1
    return Rejected("truncated_shard" if cut_off else f"missing_{member}")
