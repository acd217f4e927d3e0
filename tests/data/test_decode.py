"""Every kind of image becomes RGB by the stated policy; every kind of rubbish is rejected with its reason."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from data.errors import DataError, Rejected
from data.pixels.decode import Decoder, make_decoder, pillow
from data.pixels.transforms import Window
from tests.data.shard_factory import encode, picture

DECODER: Decoder = make_decoder("auto", max_pixels=10**8)
SIDE = 16


def _decode(encoded: bytes, *, flip: bool = False) -> np.ndarray:
    width, height = DECODER.size(encoded)
    return DECODER.decode(encoded, Window(box=(0, 0, width, height), size=SIDE, flip=flip))


def _flat(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (SIDE, SIDE), colour)  # type: ignore[arg-type]


def _palette() -> Image.Image:
    image = _flat("P", 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return image


def _wide(value: int) -> Image.Image:
    return Image.fromarray(np.full((SIDE, SIDE), value, dtype=np.uint16))


def _promising(width: int, height: int) -> bytes:
    """A PNG whose head promises so many pixels, which nobody has to draw."""
    file = bytearray(encode(_flat("1", 0), "PNG"))
    head = b"IHDR" + struct.pack(">II", width, height) + file[24:29]
    file[12:33] = head + struct.pack(">I", zlib.crc32(head))
    return bytes(file)


def _png(depth: int, kind: int, pixel: bytes, transparent: bytes) -> bytes:
    """A PNG of one colour with a transparent colour, as Pillow cannot write it."""
    rows = zlib.compress((b"\0" + pixel * SIDE) * SIDE)
    header = struct.pack(">IIBBBBB", SIDE, SIDE, depth, kind, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"tRNS", transparent), (b"IDAT", rows), (b"IEND", b""))
    body = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


WIDE_GREY, WIDE_RGB = struct.pack(">H", 0x4D12), struct.pack(">HHH", 0xC812, 0x6434, 0x3256)
FRAMES = [_flat("RGB", (200, 100, 50)), _flat("RGB", (0, 0, 255))]
KINDS = {
    "rgb": (encode(_flat("RGB", (200, 100, 50))), (200, 100, 50)),
    "grey": (encode(_flat("L", 77)), (77, 77, 77)),
    "one bit": (encode(_flat("1", 1)), (255, 255, 255)),
    "palette": (encode(_palette()), (200, 100, 50)),
    "palette with a transparent entry": (encode(_palette(), transparency=1), (255, 255, 255)),
    "transparent": (encode(_flat("RGBA", (200, 100, 50, 0))), (255, 255, 255)),
    "half transparent": (encode(_flat("RGBA", (0, 0, 0, 128))), (127, 127, 127)),
    "grey with alpha": (encode(_flat("LA", (10, 255))), (10, 10, 10)),
    "transparent colour": (encode(_flat("RGB", (1, 2, 3)), transparency=(1, 2, 3)), (255, 255, 255)),
    "16 bit": (encode(_wide(0x4D12)), (0x4D, 0x4D, 0x4D)),
    "16 bit, transparent": (_png(16, 0, WIDE_GREY, WIDE_GREY), (255, 255, 255)),
    "16 bit, another is transparent": (_png(16, 0, WIDE_GREY, b"\x4d\x13"), (0x4D, 0x4D, 0x4D)),
    "16 bit RGB, transparent": (_png(16, 2, WIDE_RGB, WIDE_RGB), (255, 255, 255)),
    "16 bit RGB, another is transparent": (_png(16, 2, WIDE_RGB, WIDE_GREY * 3), (200, 100, 50)),
    "several pictures in one JPEG": (
        encode(FRAMES[0], "MPO", save_all=True, append_images=FRAMES[1:], quality=95),
        (200, 100, 50),
    ),
    "cmyk": (encode(_flat("CMYK", (0, 255, 255, 0)), "JPEG", quality=95), (255, 0, 0)),
    "webp": (encode(FRAMES[0], "WEBP", lossless=True), (200, 100, 50)),
    "animated gif": (encode(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), (200, 100, 50)),
    "animated webp": (
        encode(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:], lossless=True),
        (200, 100, 50),
    ),
}

if features.check("avif"):
    KINDS |= {
        "avif": (encode(FRAMES[0], "AVIF", quality=100), (200, 100, 50)),
        "transparent avif": (encode(_flat("RGBA", (200, 100, 50, 0)), "AVIF", quality=100), (255, 255, 255)),
        "animated avif": (
            encode(FRAMES[0], "AVIF", save_all=True, append_images=FRAMES[1:], quality=100),
            (200, 100, 50),
        ),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_mode_becomes_rgb(kind: str) -> None:
    encoded, colour = KINDS[kind]
    pixels = _decode(encoded)
    assert pixels.dtype == np.uint8 and pixels.shape == (3, SIDE, SIDE)
    assert np.abs(pixels.reshape(3, -1).T.astype(int) - colour).max() <= 2


def test_a_flip_mirrors_left_and_right() -> None:
    encoded = encode(picture(0))
    assert np.array_equal(_decode(encoded, flip=True), _decode(encoded)[:, :, ::-1])


def test_exif_rotation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded = encode(picture(0, 40, 30), "JPEG", exif=exif)
    assert DECODER.size(encoded) == (40, 30)


def test_the_bound_of_the_config_holds_above_that_of_pillow() -> None:
    large = _promising(20_000, 9_000)
    assert make_decoder("auto", max_pixels=180_000_000).size(large) == (20_000, 9_000)
    with pytest.raises(Rejected, match="too_many_pixels"):
        make_decoder("auto", max_pixels=179_999_999).size(large)
    assert Image.MAX_IMAGE_PIXELS == 89_478_485  # of everybody else in the process


def test_threads_that_parse_at_the_same_time_leave_pillow_its_bound() -> None:
    """The first one to end must not take the limit back from the other, nor the other keep it away."""
    first, second = pillow._counted_failures(), pillow._counted_failures()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert Image.MAX_IMAGE_PIXELS is None
    second.__exit__(None, None, None)
    assert Image.MAX_IMAGE_PIXELS == 89_478_485


JPEG = encode(picture(3, 200, 200), "JPEG")
BROKEN_PNG = bytearray(encode(picture(3)))
BROKEN_PNG[60] ^= 0xFF


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"", "empty_image"),
        (b"<!DOCTYPE html><html>404</html>", "not_an_image"),
        (b"\0" * 1000, "not_an_image"),
        (JPEG[: len(JPEG) // 2], "truncated_image"),
        (JPEG[:2], "not_an_image"),
        (bytes(BROKEN_PNG), "undecodable_image"),
        (_promising(12_000, 9_000), "too_many_pixels"),
        (_promising(30_000, 9_000), "too_many_pixels"),
        (encode(picture(0), "BMP"), "not_an_image"),
    ],
)
def test_rubbish_is_rejected_with_its_reason(encoded: bytes, reason: str) -> None:
    with pytest.raises(Rejected, match=f"^{reason}$"):
        _decode(encoded)


@pytest.mark.parametrize("crop_first", [True, False])
def test_a_mistake_of_the_caller_does_not_pass_for_a_bad_image(crop_first: bool) -> None:
    with pytest.raises(ValueError, match=r"[Bb]ox"):
        DECODER.decode(encode(picture(0)), Window(box=(0, 0, 500, 500), size=SIDE, crop_first=crop_first))


def test_an_unknown_decoder_is_an_error() -> None:
    with pytest.raises(DataError, match=r"data\.decoder='gpu' is unknown"):
        make_decoder("gpu", max_pixels=1)
