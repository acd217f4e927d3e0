"""Pictures and clips of a listed set, decoded as the reader of shards decodes them."""

from collections import Counter
from pathlib import Path

import numpy as np
import torch

from data.batch import BadSample, EachSample
from data.each import EachReader
from data.errors import DataError, Rejected
from data.pixels.decode import make_decoder
from data.pixels.transforms import eval_transform
from data.pixels.video import ClipDecoder, check_available, is_clip
from engine.config.read import Config
from engine.evaluation.inputs import SampleFactory, Samples, as_listed
from engine.evaluation.sets.layouts import Part


class FileSamples:
    """Files of pictures or clips; what cannot be read is a row of zeros with a mark."""

    def __init__(self, paths: list[str], *, image_size: int, transform: str, frames: int, max_pixels: int):
        self._paths, self._size, self._frames = paths, image_size, frames
        self._transform = eval_transform(transform, size=image_size)
        self._decoder = make_decoder("auto", max_pixels=max_pixels, device=torch.device("cpu"))
        self._clips = ClipDecoder(frames=frames, max_pixels=max_pixels)
        if frames > 1:
            check_available()
        self.bad_by_reason: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._paths)

    def read_each(self, positions: np.ndarray) -> EachSample:
        """The files at `positions`, int64 [n]. Raises DataError for a file that has gone."""
        images = torch.zeros((len(positions), self._frames, 3, self._size, self._size), dtype=torch.uint8)
        readable, bad = [], []
        for row, position in enumerate(positions.tolist()):
            problem = self._decode(position, images[row])
            readable.append(problem is None)
            if problem is not None:
                images[row] = 0
                path = Path(self._paths[position])
                self.bad_by_reason[problem.reason] += 1
                bad.append(BadSample(shard=str(path.parent), key=path.name, reason=problem.reason, position=position))
        return EachSample(
            images=images if self._frames > 1 else images[:, 0],
            has_image=torch.tensor(readable, dtype=torch.bool),
            captions=[None] * len(positions),
            keys=[self._paths[position] for position in positions.tolist()],
            bad=bad,
        )

    def _decode(self, position: int, out: torch.Tensor) -> Rejected | None:
        try:
            encoded = Path(self._paths[position]).read_bytes()
        except OSError as error:
            raise DataError(f"{self._paths[position]} cannot be read ({error.strerror})") from error
        try:
            if is_clip(encoded, frames=self._frames):
                window = self._transform.window(position, *self._clips.size(encoded))
                return self._clips.decode_into(encoded, window, out)
            window = self._transform.window(position, *self._decoder.size(encoded))
            problem = self._decoder.decode_many([(encoded, window)], out[:1])[0]
            out[1:] = out[0]
            return problem
        except Rejected as rejected:
            return rejected


def sample_factory(part: Part, config: Config, *, transform: str, frames: int) -> SampleFactory:
    """What opens the samples of a part at the model's resolution."""
    image_size, max_pixels = config.model.vision.image_size, config.data.max_pixels

    def of_shards() -> Samples:
        return EachReader(
            as_listed(config.data, part.shards, frames),
            image_size=image_size,
            context_length=config.model.text.context_length,
            seed=0,
            train=False,
            evaluation=transform,
            captions=False,
        )

    def of_files() -> Samples:
        return FileSamples(part.paths, image_size=image_size, transform=transform, frames=frames, max_pixels=max_pixels)

    return of_shards if part.shards else of_files
