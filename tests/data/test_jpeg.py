"""simplejpeg gives Pillow's pixels to the bit, or leaves a picture to Pillow: no sample is judged otherwise."""

import builtins
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.config import DataConfig
from data.errors import DataError, Rejected
from data.pixels.decode import JpegDecoder, PillowDecoder, make_decoder
from data.pixels.transforms import Window
from data.reader import SampleReader
from data.shards.write import write_shard
from tests.data.shard_factory import encode
from tests.data.test_decode import KINDS

PILLOW = PillowDecoder(max_pixels=10**7)


def test_a_missing_package_is_one_line_and_auto_goes_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "simplejpeg":
            raise ImportError("No module named 'simplejpeg'")
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"pip install simplejpeg, or set data\.decoder=pillow$"):
        make_decoder("simplejpeg", max_pixels=10**6)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert type(make_decoder("auto", max_pixels=10**6)) is PillowDecoder


simplejpeg = pytest.importorskip("simplejpeg", reason="simplejpeg is not installed")


def _photo(number: int, width: int = 100, height: int = 75) -> Image.Image:
    """Smooth with some noise, as photographs are."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = coarse.resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth) + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _ordinary() -> Iterator[bytes]:
    """Subsamplings, scans, restarts and sizes of whole grey and colour JPEGs, and what cameras write into them."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, (width, height) in enumerate(((100, 75), (75, 101), (1, 1), (7, 9), (33, 17), (160, 90), (501, 377))):
        photo, quality = _photo(number, width, height), (50, 90, 97)[number % 3]
        for subsampling in ("4:4:4", "4:2:2", "4:2:0", "4:1:1"):
            for progressive in (False, True):
                options: dict[str, Any] = {"quality": quality, "subsampling": subsampling, "progressive": progressive}
                yield encode(photo, "JPEG", **options)
                yield encode(photo, "JPEG", restart_marker_blocks=3, exif=exif, icc_profile=b"profile", **options)
        yield simplejpeg.encode_jpeg(np.ascontiguousarray(photo), colorsubsampling="440")
        yield encode(photo.convert("L"), "JPEG", quality=quality) + b"bytes behind the end"


def _outcome(decoder: PillowDecoder, encoded: bytes) -> str | np.ndarray:
    """As readers ask: the size first, then the pixels."""
    try:
        decoder.size(encoded)
        return decoder.pixels(encoded).copy()
    except Rejected as rejected:
        return rejected.reason


def _same(found: str | np.ndarray, expected: str | np.ndarray) -> bool:
    if isinstance(found, str) or isinstance(expected, str):
        return isinstance(found, str) and isinstance(expected, str) and found == expected
    return np.array_equal(found, expected)


def test_pixels_are_those_of_pillow_to_the_bit() -> None:
    decoder = JpegDecoder(max_pixels=10**7)
    pictures = list(_ordinary())
    for number, encoded in enumerate(pictures):
        assert _same(_outcome(decoder, encoded), _outcome(PILLOW, encoded)), number
    assert decoder.from_pillow == 0


def test_what_is_odd_comes_out_as_from_pillow() -> None:
    decoder = JpegDecoder(max_pixels=10_000)
    small = PillowDecoder(max_pixels=10_000)
    whole = encode(_photo(3), "JPEG", quality=90)
    odd = {
        "cmyk": encode(_photo(0).convert("CMYK"), "JPEG"),
        "components in RGB": encode(_photo(0), "JPEG", keep_rgb=True),
        "too many pixels": encode(_photo(0, 101, 100), "JPEG"),
        "cut": whole[: len(whole) // 2],
        "without its end": whole[:-2],
        "ends early within": whole[: len(whole) // 2] + b"\xff\xd9",
        "header alone": whole[:300],
        "start alone": whole[:3],
        "12 bits": whole.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c", 1),
        "lossless": whole.replace(b"\xff\xc0\x00\x11", b"\xff\xc3\x00\x11", 1),
        "arithmetic": whole.replace(b"\xff\xc0\x00\x11", b"\xff\xc9\x00\x11", 1),
        "no height": whole.replace(b"\x08\x00\x4b\x00\x64", b"\x08\x00\x00\x00\x64", 1),
    }
    for name, encoded in odd.items():
        assert encoded != whole, name
        assert _same(_outcome(decoder, encoded), _outcome(small, encoded)), name
    assert decoder.from_pillow >= 7
    for kind, (encoded, _) in KINDS.items():
        assert _same(_outcome(decoder, encoded), _outcome(small, encoded)), kind


@pytest.mark.parametrize("progressive", [False, True])
def test_damaged_bytes_are_judged_as_by_pillow(progressive: bool) -> None:
    decoder, rng = JpegDecoder(max_pixels=10**7), np.random.default_rng(5)
    whole = np.frombuffer(encode(_photo(9, 48, 40), "JPEG", progressive=progressive), dtype=np.uint8)
    reasons = set()
    for number in range(300):
        damaged = whole.copy()
        places = rng.integers(0, len(whole) if number % 2 else 700, 1 + rng.integers(3))  # heads are parsed by both
        damaged[places] = rng.integers(0, 256, len(places))
        expected = _outcome(PILLOW, damaged.tobytes())
        assert _same(_outcome(decoder, damaged.tobytes()), expected)
        reasons.add(expected if isinstance(expected, str) else "pixels")
    assert "pixels" in reasons and len(reasons) > 1 and 0 < decoder.from_pillow < 300


def test_one_buffer_serves_pictures_of_all_sizes() -> None:
    decoder = JpegDecoder(max_pixels=10**7)
    pictures = [encode(_photo(n, *size), "JPEG") for n, size in enumerate([(20, 15), (160, 120), (30, 40), (200, 150)])]
    windows = [Window(box=(1, 2, 19, 14), size=8, flip=flip) for flip in (False, True)]
    jobs = [(picture, window) for picture in pictures for window in windows]
    found = [decoder.decode(*job) for job in jobs]
    assert all(np.array_equal(pixels, PILLOW.decode(*job)) for pixels, job in zip(found, jobs, strict=True))
    assert len(decoder._room(10)) == len(decoder._room(90_000)) == 131_072
    assert len(decoder._room((1 << 26) + 1)) == (1 << 26) + 1 and len(decoder._room(10)) == 131_072


def test_readers_of_both_decoders_give_the_same_batches(tmp_path: Path) -> None:
    samples = [(f"s{n}", {"jpg": encode(_photo(n), "JPEG"), "txt": b"words"}) for n in range(10)]
    samples[4][1]["jpg"] = samples[4][1]["jpg"][:700]
    samples[6][1]["jpg"] = encode(_photo(6).convert("CMYK"), "JPEG")
    path = str(tmp_path / "x.tar")
    write_shard(path, samples)
    batches = []
    for decoder in ("pillow", "simplejpeg", "auto"):
        config = DataConfig(shards=[path], decoder=decoder, crop_scale=[0.2, 1.0], flip=True)
        batches.append(SampleReader(config, image_size=24, context_length=8, seed=0, train=True).read(np.arange(20)))
    reference, *others = batches
    for found in others:
        assert found.keys == reference.keys and found.bad == reference.bad and len(found.bad) == 2
        assert found.images.equal(reference.images)


def test_a_subsampling_without_a_name_goes_to_pillow() -> None:
    """4:4:1, which the library decodes and the package has no word for."""
    head = bytearray(encode(_photo(3, 64, 64), "JPEG", subsampling="4:4:4"))
    head[head.index(b"\xff\xc0") + 11] = 0x14  # luma: one sample across, four down
    decoder = JpegDecoder(max_pixels=10**6)
    assert decoder.size(bytes(head)) == (64, 64) and _same(
        _outcome(decoder, bytes(head)), _outcome(PILLOW, bytes(head))
    )
    assert decoder.from_pillow
