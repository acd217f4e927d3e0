"""What is in tar shards: counts, sizes, bad samples by reason, and a picture of some.

Every sample is judged as a training run would: caption, header and full decode. Prints a JSON object with the number
of samples, quantiles of image bytes and caption characters, a histogram of the shorter side in pixels, the bad samples
by reason with examples, and what the tars hold beside samples. --png draws evenly spaced good samples with their
captions. --max-samples looks at evenly spaced samples only.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from data.batch import BadSample
from data.config import DataConfig
from data.loader import PrefetchLoader
from data.reader import SampleReader
from tools.cli import answer, check_file, command_parser, positive
from tools.index_shards import add_shard_arguments

_COMMANDS = (
    "python -m tools.inspect_shards /data/shards --png contact.png",
    "python -m tools.inspect_shards /data/shards --max-samples 10000 --out report.json",
)
_SIDE_BORDERS = (0, 64, 128, 192, 224, 256, 336, 448, 512, 768, 1024, 2048)
_QUANTILES = (0, 1, 25, 50, 75, 99, 100)
_BATCH = 64
_EXAMPLES = 5
_CONTEXT = 77
_TILE, _LINE = 128, 14


@dataclass(frozen=True, kw_only=True)
class SampleFacts:
    """What is reported of one good sample."""

    image_bytes: int
    """Size of the encoded image, clip or frames."""
    caption: str
    """Caption as it stands in the shard, before cleaning."""
    width: int
    """Width of the decoded image, in pixels."""
    height: int
    """The same."""
    thumbnail: np.ndarray | None
    """uint8 [side, side, 3] for the contact sheet; None where it is not shown."""


@dataclass
class Survey:
    """What is known of the samples so far."""

    image_bytes: list[int] = field(default_factory=list)
    caption_characters: list[int] = field(default_factory=list)
    shorter_sides: list[int] = field(default_factory=list)
    bad: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, facts: SampleFacts | BadSample) -> None:
        """Count one sample."""
        if isinstance(facts, BadSample):
            self.bad[facts.reason] += 1
            examples = self.examples.setdefault(facts.reason, [])
            if len(examples) < _EXAMPLES:
                examples.append(f"{facts.key} in {facts.shard}")
            return
        self.image_bytes.append(facts.image_bytes)
        self.caption_characters.append(len(facts.caption))
        self.shorter_sides.append(min(facts.width, facts.height))

    def report(self, total: int) -> dict[str, Any]:
        """The JSON object."""
        looked_at = len(self.image_bytes) + self.bad.total()
        sides, _ = np.histogram(self.shorter_sides, bins=[*_SIDE_BORDERS, np.inf])
        return {
            "samples": total,
            "looked_at": looked_at,
            "bad": self.bad.total(),
            "bad_fraction": round(self.bad.total() / max(1, looked_at), 6),
            "bad_by_reason": dict(self.bad.most_common()),
            "bad_examples": self.examples,
            "image_bytes": _quantiles(self.image_bytes),
            "caption_characters": _quantiles(self.caption_characters),
            "shorter_side_pixels": {f">={low}": int(n) for low, n in zip(_SIDE_BORDERS, sides, strict=True) if n},
        }


def _quantiles(values: Sequence[int]) -> dict[str, int]:
    if not values:
        return {}
    found = np.percentile(values, _QUANTILES)
    return {f"p{quantile}": int(value) for quantile, value in zip(_QUANTILES, found, strict=True)}


def inspect(config: DataConfig, *, max_samples: int | None, pictures: int) -> tuple[dict[str, Any], list[SampleFacts]]:
    """(report, good samples for the contact sheet). Raises DataError for shards that cannot be read at all."""
    reader = SampleReader(config, image_size=_TILE, context_length=_CONTEXT, seed=0, train=False)
    total = reader.total_samples
    count = min(total, max_samples or total)
    positions = np.linspace(0, total - 1, count).astype(np.int64)
    shown = set(positions[np.linspace(0, count - 1, min(pictures, count)).astype(int)].tolist())
    batches = (positions[first : first + _BATCH] for first in range(0, count, _BATCH))
    survey, sheet = Survey(), []

    def look(part: np.ndarray) -> list[SampleFacts | BadSample]:
        return [_facts(reader, position, position in shown) for position in part.tolist()]

    loader: PrefetchLoader[list[SampleFacts | BadSample]] = PrefetchLoader(look, batches, workers=config.workers)
    with loader:
        for batch in loader:
            for facts in batch:
                survey.add(facts)
                if isinstance(facts, SampleFacts) and facts.thumbnail is not None:
                    sheet.append(facts)
    return {**survey.report(total), "odd": reader.sources.odd()}, sheet


def _facts(reader: SampleReader, position: int, shown: bool) -> SampleFacts | BadSample:
    seen = reader.look_at(position)
    if isinstance(seen, BadSample):
        return seen
    sample, pixels = seen
    _, _, width, height = sample.window.box  # the squash transform sees the whole image
    return SampleFacts(
        image_bytes=sum(map(len, sample.pictures)),
        caption=sample.caption,
        width=int(width),
        height=int(height),
        thumbnail=pixels[len(pixels) // 2].permute(1, 2, 0).numpy().copy() if shown else None,
    )


def contact_sheet(samples: Sequence[SampleFacts]) -> Image.Image:
    """The thumbnails in a grid, each with its caption and size below."""
    columns = max(1, min(8, len(samples)))
    rows = max(1, -(-len(samples) // columns))
    sheet = Image.new("RGB", (columns * _TILE, rows * (_TILE + 2 * _LINE)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, sample in enumerate(samples):
        left, top = number % columns * _TILE, number // columns * (_TILE + 2 * _LINE)
        assert sample.thumbnail is not None
        sheet.paste(Image.fromarray(sample.thumbnail).resize((_TILE - 4, _TILE - 4)), (left + 2, top + 2))
        for line, text in enumerate((sample.caption, f"{sample.width} x {sample.height}")):
            draw.text((left + 3, top + _TILE + line * _LINE), _fit(draw, text), fill="black")
    return sheet


def _fit(draw: ImageDraw.ImageDraw, text: str) -> str:
    text = text.encode("ascii", "replace").decode()  # Pillow's built-in font has no more
    while draw.textlength(text) > _TILE - 6:
        text = text[:-1]
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m tools.inspect_shards`; the exit status."""
    parser = command_parser("inspect_shards", __doc__, _COMMANDS)
    add_shard_arguments(parser)
    parser.add_argument("--out", type=Path, help="write the report there too")
    parser.add_argument("--png", type=Path, help="write a contact sheet")
    parser.add_argument("--pictures", type=positive, default=48, help="samples on the contact sheet")
    parser.add_argument("--max-samples", type=positive, help="look at so many evenly spaced samples only")
    parser.add_argument("--frames", type=positive, default=1, help="as data.frames")
    parser.add_argument("--max-pixels", type=positive, default=DataConfig.max_pixels, help="as data.max_pixels")
    options = parser.parse_args(arguments)
    return answer(lambda: _inspect(options))


def _inspect(options: argparse.Namespace) -> int:
    for path in filter(None, (options.out, options.png)):
        check_file(path)
    config = DataConfig(
        shards=options.shards,
        workers=options.workers,
        cache_dir=options.cache_dir,
        cache_gb=options.cache_gb,
        frames=options.frames,
        max_pixels=options.max_pixels,
    )
    report, sheet = inspect(config, max_samples=options.max_samples, pictures=options.pictures if options.png else 0)
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    if options.png:
        contact_sheet(sheet).save(options.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
