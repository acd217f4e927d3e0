"""Clips as samples: uniformly sampled frames of a video file or of a frame folder in the tar.

F frames of a clip of N are those in the middle of F equal parts: frame floor((i + 1/2) N / F), so that F = 1
gives the middle frame (paper, section 7: one centre frame, or 8 or 16 uniform ones). A clip shorter than F
repeats frames, a still image counts as a clip of one. All frames of a clip are seen through one window. Like
EXIF rotation, a rotation in the container is not applied.

A video file is decoded from front to back: web clips have few key frames, and seeking to the nearest one
would give other frames from decoder to decoder. PyAV is the extra `video`; nothing else imports it.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
import torch

from data.errors import DataError, Rejected
from data.pixels.decode.resize import cut
from data.pixels.transforms import Window

_MOST_FRAMES = 36_000  # ten minutes at 60 a second: longer files are not clips, and hold up a reader
# (offset, bytes there, demuxer). Clips are untrusted, and some demuxers open what a file names: only these run.
_FORMATS = (
    (4, b"ftyp", "mp4"),
    (0, b"\x1a\x45\xdf\xa3", "matroska"),
    (8, b"AVI ", "avi"),
    (0, b"GIF8", "gif"),
)


def frame_numbers(count: int, wanted: int) -> np.ndarray:
    """int64 [wanted]: which of `count` frames are seen (see the module text)."""
    return (2 * np.arange(wanted, dtype=np.int64) + 1) * count // (2 * wanted)


def is_clip(encoded: bytes, *, frames: int) -> bool:
    """Whether the bytes are a video file, by their first bytes (mp4 and mov, webm and mkv, avi). A GIF is one
    where several frames are wanted, else an image (its first frame).
    """
    demuxer = _demuxer(encoded)
    return frames > 1 if demuxer == "gif" else demuxer is not None


def _demuxer(encoded: bytes) -> str | None:
    return next((name for at, magic, name in _FORMATS if encoded[at : at + len(magic)] == magic), None)


def check_available() -> None:
    """Raises DataError without PyAV."""
    _import_av()


class ClipDecoder:
    """Frames of video files through PyAV."""

    def __init__(self, *, frames: int, max_pixels: int) -> None:
        self._frames = frames
        self._max_pixels = max_pixels

    def size(self, encoded: bytes) -> tuple[int, int]:
        """(width, height) in pixels from the header alone. Raises Rejected."""
        with self._opened(encoded) as (_, stream):
            width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > self._max_pixels:
            raise Rejected("too_many_pixels")
        if width < 1 or height < 1:
            raise Rejected("undecodable_clip")
        return width, height

    def decode_into(self, encoded: bytes, window: Window, out: torch.Tensor) -> Rejected | None:
        """Fills out, uint8 [frames, 3, size, size]; why not, if it cannot be done."""
        try:
            wanted = frame_numbers(self._count(encoded), self._frames)
            frames = self._read(encoded, set(wanted.tolist()))
            pixels = {number: cut(frame, window) for number, frame in frames}
            last = max(pixels, default=None)  # damage near the end may cost the last frames
            if last is None:
                return Rejected("undecodable_clip")
            for row, number in zip(out, wanted.tolist(), strict=True):
                row.copy_(torch.from_numpy(pixels.get(number, pixels[last])))
        except Rejected as rejected:
            return rejected
        return None

    def _count(self, encoded: bytes) -> int:
        """Frames of the file: its packets, for the header's count may be missing or wrong."""
        with self._opened(encoded) as (container, stream):
            count = sum(packet.size > 0 for packet in container.demux(stream))
        if count > _MOST_FRAMES:
            raise Rejected("clip_too_long")
        return count

    def _read(self, encoded: bytes, wanted: set[int]) -> Iterator[tuple[int, np.ndarray]]:
        """(number, uint8 [height, width, 3]) of the wanted frames."""
        with self._opened(encoded) as (container, stream):
            last, size = max(wanted), (stream.codec_context.width, stream.codec_context.height)
            for number, frame in enumerate(container.decode(stream)):
                if number in wanted:
                    if (frame.width, frame.height) != size:  # the window was chosen for this size
                        raise Rejected("frame_sizes_differ")
                    yield number, frame.to_ndarray(format="rgb24")
                if number >= last:
                    return

    @contextmanager
    def _opened(self, encoded: bytes) -> Iterator[tuple[Any, Any]]:
        """The container and its first video stream; what PyAV cannot parse becomes Rejected."""
        av = _import_av()
        try:
            with av.open(BytesIO(encoded), "r", format=_demuxer(encoded)) as container:
                if not container.streams.video:
                    raise Rejected("undecodable_clip")
                stream = container.streams.video[0]
                stream.thread_type = "NONE"  # readers are processes: one core each
                yield container, stream
        except (av.FFmpegError, EOFError) as error:
            raise Rejected("undecodable_clip") from error


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise DataError(
            f"clips need PyAV ({error}): pip install 'eva-megatron[video]', or leave the video shards out"
        ) from error
    logging.getLogger("libav").setLevel(logging.ERROR)  # what it cannot decode is counted, not printed
    return av
