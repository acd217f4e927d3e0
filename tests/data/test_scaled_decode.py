"""data.scaled_decode: training JPEGs by smaller transforms, as near as promised to decoding in full; never else."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.config import DataConfig
from data.each import EachReader
from data.errors import DataError, Rejected
from data.pixels.decode import JpegDecoder, PillowDecoder
from data.pixels.decode.resize import reduced
from data.pixels.transforms import Window, eval_transform
from data.reader import SampleReader
from data.shards.write import write_shard
from tests.data.shard_factory import encode

pytest.importorskip("simplejpeg", reason="simplejpeg is not installed")
MEAN_LEVELS, LEVELS_OF_99_PERCENT = 1.5, 8
"""What data.scaled_decode=1.5 promises (docs/results/decoders.md)."""


@cache
def _photo(number: int, width: int, height: int) -> Image.Image:
    """Colours whose spectrum falls with the frequency as that of photographs, with an edge across."""
    rng = np.random.default_rng(number)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    noise = rng.normal(size=(4, *frequency.shape)) + 1j * rng.normal(size=(4, *frequency.shape))
    planes = np.fft.irfft2(noise / frequency**1.2, (height, width))
    planes /= planes.std(axis=(1, 2), keepdims=True)
    pixels = 128 + 45 * planes[0] + 15 * planes[1:] + 40 * (np.arange(width) > np.arange(height)[:, None])
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


@given(
    st.tuples(*[st.integers(0, 400)] * 2), st.tuples(*[st.integers(1, 3000)] * 2), st.integers(1, 300),
    st.floats(1, 3),
)  # fmt: skip
def test_the_window_stays_large_enough_and_where_it_was(
    corner: tuple[int, int], sides: tuple[int, int], size: int, least: float
) -> None:
    box = (*corner, corner[0] + sides[0], corner[1] + sides[1])
    factor, smaller = reduced(Window(box=box, size=size, flip=True), least=least)
    assert smaller.size == size and smaller.flip
    if factor == 1:
        assert smaller.box == box
        return
    left, top, right, bottom = smaller.box
    assert min(right - left, bottom - top) >= least * size
    for edge, was, inwards in zip(smaller.box, box, (1, 1, -1, -1), strict=True):
        assert 0 <= inwards * (factor * edge - was) < factor
    if factor < 8:  # the largest that does
        assert min(right // 2 - -(-left // 2), bottom // 2 - -(-top // 2)) < least * size


def test_evaluation_is_never_reduced() -> None:
    for name in ("squash", "crop"):
        window = eval_transform(name, size=16).window(0, 4000, 3000)
        assert reduced(window, least=1.0) == (1, window)


@pytest.mark.parametrize("make", [JpegDecoder, PillowDecoder])
def test_within_the_promised_distance_of_decoding_in_full(make: Callable[..., PillowDecoder]) -> None:
    full, scaled = make(max_pixels=10**7), make(max_pixels=10**7, scaled_decode=1.5)
    for number, (subsampling, size, factor) in enumerate([("4:2:0", 64, 2), ("4:4:4", 70, 2), ("4:2:2", 34, 4)]):
        picture = encode(_photo(number, 320, 240).crop((0, 0, 319, 237)), "JPEG", quality=90, subsampling=subsampling)
        window = Window(box=(13, 7, 313, 231), size=size, flip=bool(number))
        found, smaller = reduced(window, least=1.5)
        assert found == factor
        left, top, right, bottom = (factor * edge for edge in smaller.box)
        same = (left, top, right, bottom)
        apart = np.abs(scaled.decode(picture, window).astype(int) - full.decode(picture, replace(window, box=same)))
        assert 0 < apart.mean() <= MEAN_LEVELS and np.percentile(apart, 99) <= LEVELS_OF_99_PERCENT
        large = replace(window, size=75)  # 1.5 times as many pixels are not there: to the bit as in full
        assert np.array_equal(scaled.decode(picture, large), full.decode(picture, large))


def _outcome(decoder: PillowDecoder, encoded: bytes, window: Window) -> str | np.ndarray:
    try:
        return decoder.decode(encoded, window)
    except Rejected as rejected:
        return rejected.reason


def test_both_decoders_give_the_same_reduced_pixels_and_reasons() -> None:
    decoders = [make(max_pixels=10**6, scaled_decode=1.0) for make in (JpegDecoder, PillowDecoder)]
    pictures: list[tuple[str, bytes]] = []
    for number, (width, height) in enumerate([(200, 150), (203, 149), (161, 233)]):
        photo = _photo(number, width, height)
        for options in ({"subsampling": "4:2:0"}, {"subsampling": "4:4:4", "progressive": True}, {"quality": 40}):
            pictures.append((f"{width} {options}", encode(photo, "JPEG", **options)))
        pictures.append((f"{width} grey", encode(photo.convert("L"), "JPEG")))
        pictures.append((f"{width} CMYK", encode(photo.convert("CMYK"), "JPEG")))
        pictures.append((f"{width} cut", pictures[-5][1][:2000]))
        pictures.append((f"{width} PNG", encode(photo)))
    for name, picture in pictures:
        width, height = decoders[0].size(picture)
        for size in (16, 32, 64):
            window = Window(box=(3, 5, width - 2, height - 3), size=size)
            one, other = (_outcome(decoder, picture, window) for decoder in decoders)
            same = one == other if isinstance(one, str) else np.array_equal(one, other)
            assert same, (name, size, reduced(window, least=1.0)[0])
            assert (isinstance(one, str) and one == "truncated_image") == ("cut" in name), name


def _batch(path: str, **settings: Any) -> tuple[Any, Any]:
    config = DataConfig(shards=[path], crop_scale=[0.5, 1.0], flip=True, **settings)
    options: dict[str, Any] = {"image_size": 24, "context_length": 8, "seed": 0}
    read = SampleReader(config, train=True, **options).read(np.arange(12))
    return read, EachReader(config, train=False, **options).read_each(np.arange(6))


def test_a_run_has_the_same_samples_with_other_pixels_and_the_same_evaluation(tmp_path: Path) -> None:
    samples = [(f"s{n}", {"jpg": encode(_photo(n, 160, 120), "JPEG"), "txt": b"words"}) for n in range(6)]
    samples[2][1]["jpg"] = samples[2][1]["jpg"][:700]
    samples[4] = ("s4", {"png": encode(_photo(4, 160, 120)), "txt": b"words"})
    write_shard(path := str(tmp_path / "x.tar"), samples)
    full, each = _batch(path)
    for decoder in ("pillow", "simplejpeg"):
        scaled, scaled_each = _batch(path, scaled_decode=1.5, decoder=decoder)
        assert scaled.keys == full.keys and scaled.bad == full.bad and full.bad and scaled.tokens.equal(full.tokens)
        assert scaled_each.images.equal(each.images)
        changed = {key for key, a, b in zip(full.keys, full.images, scaled.images, strict=True) if not a.equal(b)}
        assert changed == {"s0", "s1", "s3", "s5"}


@pytest.mark.parametrize("value", [0.5, -1.0, float("nan"), 101.0])
def test_a_number_that_is_none_is_one_line(value: float) -> None:
    with pytest.raises(DataError, match=r"^data\.scaled_decode is .* from 1 to 100$"):
        DataConfig(shards=["x.tar"], scaled_decode=value).check()


def test_dali_refuses_it() -> None:
    with pytest.raises(DataError, match=r"data\.decoder=auto, or data\.scaled_decode=0$"):
        DataConfig(shards=["x.tar"], scaled_decode=2.0, decoder="dali").check()
