"""Samples as they are, for evaluation and feature extraction: nothing is replaced, what cannot be read is listed."""

from collections import Counter

import numpy as np
import torch

from data.batch import BadSample, EachSample, EncodedSample
from data.errors import Rejected
from data.reader import SampleReader
from data.shards.index import Place


class EachReader(SampleReader):
    """A reader of the listed order whose rows are the samples asked for, whether they are good or not."""

    def __len__(self) -> int:
        return self.total_samples

    def read_each(self, positions: np.ndarray) -> EachSample:
        """The samples at the global positions int64 [n], each as it is: nothing is replaced.

        Picture and caption are judged apart, and what cannot be read of either is listed in `bad`; no share of bad
        samples is an error here.
        """
        positions = np.asarray(positions, dtype=np.int64)
        images = torch.zeros((len(positions), *self._image_shape()), dtype=torch.uint8, device=self._decoder.device)
        shards, samples = (ids.tolist() for ids in self._order.locate(positions))
        places = list(zip(shards, samples, strict=True))
        captions: list[str | None] = []
        bad: list[BadSample] = []
        encoded: dict[int, EncodedSample] = {}
        for row, (position, place) in enumerate(zip(positions.tolist(), places, strict=True)):
            self.reads += 1
            captions.append(self._try_caption(position, place, bad) if self._captions else None)
            try:
                encoded[row] = self._fetch_picture(position, place, ("", self._no_tokens(), False), 0)
            except Rejected as rejected:
                bad.append(self._count_bad(position, place, rejected.reason))
        problems = self._decode_rows(list(encoded.values()), images, list(encoded))
        for row, problem in sorted(problems.items()):
            images[row] = 0
            bad.append(self._count_bad(int(positions[row]), places[row], problem.reason))
        readable = [row in encoded and row not in problems for row in range(len(positions))]
        return EachSample(
            images=images if self._config.frames > 1 else images[:, 0],
            has_image=torch.tensor(readable, dtype=torch.bool),
            captions=captions,
            keys=[self.sources.index(shard).key(sample) for shard, sample in places],
            bad=bad,
        )

    def read_captions(self, positions: np.ndarray) -> tuple[list[str | None], list[BadSample]]:
        """The captions alone of `read_each`, and what is bad of them; no picture is touched."""
        bad: list[BadSample] = []
        shards, samples = (ids.tolist() for ids in self._order.locate(np.asarray(positions, dtype=np.int64)))
        places = zip(positions.tolist(), shards, samples, strict=True)
        return [self._try_caption(position, (shard, sample), bad) for position, shard, sample in places], bad

    def shard_of(self, position: int) -> str:
        """The path or URL of the position's shard."""
        return self.sources.shards[int(self._order.locate(np.array([position], dtype=np.int64))[0][0])]

    def members(self) -> dict[Place, int]:
        """How many samples of all shards have an image (clip or frames), a caption, metadata."""
        found: Counter[Place] = Counter()
        for shard in range(len(self.sources.shards)):
            present = self.sources.index(shard).present()
            found.update({place: int(present[:, place].sum()) for place in Place})
        return found

    def _try_caption(self, position: int, place: tuple[int, int], bad: list[BadSample]) -> str | None:
        try:
            return self._read_caption(position, place)[0]
        except Rejected as rejected:
            bad.append(self._count_bad(position, place, rejected.reason))
            return None
