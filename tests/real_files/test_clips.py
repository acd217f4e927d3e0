"""Clips and pictures as real tools leave them: cut by stream copy, with covers, with alpha, in the ISO container."""

from fractions import Fraction
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, features

from data.errors import Rejected
from data.pixels.decode import make_decoder
from data.pixels.transforms import Window
from data.pixels.video import ClipDecoder, frame_numbers, is_clip
from tests.data.shard_factory import encode

av = pytest.importorskip("av", reason="the extra `video` is not installed")
WIDTH, HEIGHT, RATE, FRAMES = 64, 48, 10, 40


def _film(codec: str = "libx264", kind: str = "mp4", b_frames: int = 0) -> bytes:
    """Frame i is grey of level 6 i; a key frame every 12."""
    stream = BytesIO()
    with av.open(stream, "w", format=kind) as container:
        track = container.add_stream(codec, rate=RATE)
        track.width, track.height, track.pix_fmt, track.gop_size = WIDTH, HEIGHT, "yuv420p", 12
        track.codec_context.max_b_frames = b_frames
        for number in range(FRAMES):
            pixels = np.full((HEIGHT, WIDTH, 3), 6 * number, dtype=np.uint8)
            container.mux(track.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(track.encode())
    return stream.getvalue()


def _cut(film: bytes, first: int, last: int, kind: str) -> bytes:
    """Frames [first, last) by stream copy: packets from the key frame before, hidden by an edit list."""
    out = BytesIO()
    with av.open(BytesIO(film)) as source, av.open(out, "w", format=kind) as container:
        stream = source.streams.video[0]
        track = container.add_stream_from_template(stream)
        start, end = (round(Fraction(number, RATE) / stream.time_base) for number in (first, last))
        source.seek(start, stream=stream)
        for packet in source.demux(stream):
            if packet.dts is not None and packet.pts < end:
                packet.pts -= start
                packet.dts -= start
                packet.stream = track
                container.mux(packet)
    return out.getvalue()


def _seen(encoded: bytes, frames: int) -> np.ndarray:
    """Mean level of each seen frame, as frame numbers of the film."""
    out = torch.empty(frames, 3, 16, 16, dtype=torch.uint8)
    decoder = ClipDecoder(frames=frames, max_pixels=10**6)
    width, height = decoder.size(encoded)
    problem = decoder.decode_into(encoded, Window(box=(0, 0, width, height), size=16), out)
    assert problem is None, problem
    return (out.float().mean(dim=(1, 2, 3)) / 6).numpy()


def _shown(encoded: bytes) -> np.ndarray:
    """What a player shows, frame by frame."""
    with av.open(BytesIO(encoded)) as container:
        return np.array([frame.to_ndarray(format="rgb24").mean() / 6 for frame in container.decode(video=0)])


@pytest.mark.parametrize("kind", ["mp4", "mov"])
@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize("frames", [1, 8])
def test_a_clip_cut_by_stream_copy_has_the_frames_that_are_shown(kind: str, codec: str, frames: int) -> None:
    clip = _cut(_film(codec, b_frames=2), 17, 29, kind)
    with av.open(BytesIO(clip)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    assert any(packet.is_discard for packet in packets)  # there is an edit list
    shown = _shown(clip)
    assert len(shown) < len(packets)
    assert np.abs(_seen(clip, frames) - shown[frame_numbers(len(shown), frames)]).max() < 0.5


def test_invisible_frames_of_vp8_are_no_frames() -> None:
    film = bytearray(_film("libvpx", "webm"))
    assert len(_shown(bytes(film))) == FRAMES
    assert np.abs(_seen(bytes(film), 8) - frame_numbers(FRAMES, 8)).max() < 1


@pytest.mark.parametrize("kind", ["matroska", "avi"])
def test_a_clip_that_loses_its_end_is_the_clip_before_it(kind: str) -> None:
    film = _film("mpeg4", kind)
    seen = _seen(film[: len(film) * 2 // 3], 4)
    assert (np.diff(seen) > 1).all()  # uniform over what is left, none of them repeated


def test_transparent_frames_lie_on_white() -> None:
    frames = [Image.new("RGBA", (64, 48), (255, 0, 0, 0)) for _ in range(4)]
    for number, frame in enumerate(frames):
        frame.paste((0, 0, 0, 255), (16 * number, 0, 16 * number + 16, 48))
    gif = encode(frames[0], "GIF", save_all=True, append_images=frames[1:], disposal=2)
    out = torch.empty(4, 3, 48, 48, dtype=torch.uint8)
    assert is_clip(gif, frames=4)
    problem = ClipDecoder(frames=4, max_pixels=10**6).decode_into(gif, Window(box=(0, 0, 64, 48), size=48), out)
    assert problem is None
    assert out.float().mean(dim=(1, 2, 3)).tolist() == pytest.approx([255 * 0.75] * 4, abs=2)


@pytest.mark.parametrize("brand", [b"avif", b"avis", b"heic", b"mif1", b"crx "])
def test_pictures_in_the_container_of_clips_are_no_clips(brand: bytes) -> None:
    head = b"\0\0\0\x20ftyp" + brand + bytes(4) + b"mif1avifmiaf" + b"\0\0\0\x08mdat" + bytes(100)
    assert not is_clip(head, frames=1) and not is_clip(head, frames=8)
    with pytest.raises(Rejected, match=r"^(not_an_image|undecodable_image)$"):
        make_decoder("auto", max_pixels=10**6).size(head)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_an_avif_picture_is_a_picture() -> None:
    for options in ({}, {"save_all": True, "append_images": [Image.new("RGB", (64, 48), "blue")]}):
        encoded = encode(Image.new("RGB", (64, 48), (200, 100, 50)), "AVIF", quality=100, **options)
        assert encoded[4:8] == b"ftyp" and not is_clip(encoded, frames=8)


def test_old_quicktime_files_begin_without_a_brand() -> None:
    film = _film("mpeg4", "mov")
    size = int.from_bytes(film[:4], "big")
    assert film[4:8] == b"ftyp"
    assert is_clip(film[size:], frames=1) and film[size + 4 : size + 8] in (b"wide", b"mdat", b"moov")


def test_other_files_are_no_clips() -> None:
    for content in (b"words ftyp", b"RIFF\0\0\0\0WAVEfmt ", b"\0\0\0\x0cjP  \r\n\x87\n", b"MThdAVI AVI "):
        assert not is_clip(content, frames=8)
