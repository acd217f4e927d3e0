"""Small tar shards for the tests of the data room."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from data.shards.write import write_shard


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """An image file in memory."""
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def picture(number: int, width: int = 40, height: int = 30) -> Image.Image:
    """Noise that differs from number to number."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def good_sample(number: int) -> tuple[str, dict[str, bytes]]:
    """A whole sample with key good{number}."""
    return f"good{number}", {
        "png": encode(picture(number)),
        "txt": f"picture number {number}".encode(),
        "json": b"{}",
    }


def make_shards(folder: Path, counts: list[int]) -> list[str]:
    """One shard of good samples per count; numbers run through all shards."""
    paths, first = [], 0
    for shard, count in enumerate(counts):
        paths.append(str(folder / f"{shard:05d}.tar"))
        write_shard(paths[-1], [good_sample(number) for number in range(first, first + count)])
        first += count
    return paths
