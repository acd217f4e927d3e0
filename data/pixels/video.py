"""Clips as samples: uniformly sampled frames of a video file or of a frame folder in the tar.

F frames of a clip of N are those in the middle of F equal parts: frame floor((i + 1/2) N / F), so that F = 1
gives the middle frame (paper, section 7: one centre frame, or 8 or 16 uniform ones). A clip shorter than F
repeats frames, a still image counts as a clip of one. All frames of a clip are seen through one window. N counts the
frames that are shown: what an edit list cuts away (clips cut by stream copy begin with the frames since the last key
frame) and the invisible frames of VP8 are none. Transparent pixels lie on white. Like EXIF rotation, a rotation or an
aspect of pixels in the container is not applied.

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
from PIL import Image

from data.errors import DataError, Rejected
from data.pixels.decode.pillow import to_rgb
from data.pixels.decode.resize import cut
from data.pixels.transforms import Window

_OLDEST_AV = 13  # streams.best
_MOST_FRAMES = 36_000  # ten minutes at 60 a second: longer files are not clips, and hold up a reader
# Brands of the ISO container (ISO/IEC 14496-12) that are still images or sequences of them: AVIF, HEIF, Canon's raw.
_STILL_BRANDS = frozenset(
    {b"avif", b"avis", b"mif1", b"mif2", b"msf1", b"miaf", b"crx"}
    | {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
)
_VP8_SHOWN = 0x10  # RFC 6386, section 9.1: bit 4 of a frame's first byte
_QUICKTIME_ATOMS = (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")  # .mov files from before ftyp


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
    """The demuxer of a clip. Clips are untrusted, and some demuxers open what a file names: only these run."""
    if encoded[4:8] == b"ftyp":
        return None if encoded[8:12].rstrip() in _STILL_BRANDS else "mp4"
    if encoded[4:8] in _QUICKTIME_ATOMS:
        return "mp4"
    if encoded[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if encoded[:4] == b"RIFF" and encoded[8:12] == b"AVI ":
        return "avi"
    return "gif" if encoded[:4] == b"GIF8" else None


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
            count = self._count(encoded)
            wanted, pixels, shown = self._look(encoded, window, count)
            if shown < count:  # damage near the end: the frames before it are the clip
                wanted, pixels, shown = self._look(encoded, window, shown)
            for row, number in zip(out, wanted, strict=True):
                row.copy_(torch.from_numpy(pixels[number]))
        except Rejected as rejected:
            return rejected
        return None

    def _look(self, encoded: bytes, window: Window, count: int) -> tuple[list[int], dict[int, np.ndarray], int]:
        """Wanted frames of a clip of `count`: which they are, pixels of those that there are, and `count`, or how many
        frames there are if the clip ends before the last wanted one. Raises Rejected for a clip without a frame.
        """
        if not count:
            raise Rejected("undecodable_clip")
        wanted = frame_numbers(count, self._frames).tolist()
        pixels, number = {}, -1
        for number, frame in self._read(encoded, set(wanted)):
            if frame is not None:
                pixels[number] = cut(frame, window)
        return wanted, pixels, count if wanted[-1] in pixels else number + 1

    def _count(self, encoded: bytes) -> int:
        """Frames that are shown: packets, for the header's count may be missing or wrong; where an edit list hides
        some, only decoding tells how many are left.
        """
        shown = hidden = 0
        with self._opened(encoded) as (container, stream):
            is_vp8 = stream.codec_context.name == "vp8"
            for packet in container.demux(stream):
                if packet.size > 0:
                    hidden += packet.is_discard
                    shown += not is_vp8 or bool(bytes(packet)[0] & _VP8_SHOWN)
        if shown > _MOST_FRAMES:
            raise Rejected("clip_too_long")
        if not hidden:
            return shown
        with self._opened(encoded) as (container, stream):
            return sum(1 for _ in container.decode(stream))

    def _read(self, encoded: bytes, wanted: set[int]) -> Iterator[tuple[int, np.ndarray | None]]:
        """(number, uint8 [height, width, 3]) of every frame up to the last wanted one; None for those in between."""
        with self._opened(encoded) as (container, stream):
            last, size = max(wanted), (stream.codec_context.width, stream.codec_context.height)
            for number, frame in enumerate(container.decode(stream)):
                if number in wanted and (frame.width, frame.height) != size:  # the window was chosen for this size
                    raise Rejected("frame_sizes_differ")
                yield number, _pixels(frame) if number in wanted else None
                if number >= last:
                    return

    @contextmanager
    def _opened(self, encoded: bytes) -> Iterator[tuple[Any, Any]]:
        """The container and its first video stream; what PyAV cannot parse becomes Rejected."""
        av = _import_av()
        try:
            with av.open(BytesIO(encoded), "r", format=_demuxer(encoded)) as container:
                stream = container.streams.best("video")  # not a cover picture beside the film
                if stream is None or stream.metadata.get("alpha_mode") == "1":  # whose alpha FFmpeg's own decoder drops
                    raise Rejected("undecodable_clip")
                stream.thread_type = "NONE"  # readers are processes: one core each
                yield container, stream
        except (av.FFmpegError, EOFError) as error:
            raise Rejected("undecodable_clip") from error


def _pixels(frame: Any) -> np.ndarray:
    """uint8 [height, width, 3]; transparent pixels on white."""
    if frame.format.name != "pal8" and not any(component.is_alpha for component in frame.format.components):
        return frame.to_ndarray(format="rgb24")
    return np.asarray(to_rgb(Image.fromarray(frame.to_ndarray(format="rgba"))))


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise DataError(
            f"clips need PyAV ({error}): pip install 'eva-megatron[video]', or leave the video shards out"
        ) from error
    if int(av.__version__.split(".")[0]) < _OLDEST_AV:
        raise DataError(f"clips need PyAV {_OLDEST_AV} or later, not {av.__version__}: pip install 'av>={_OLDEST_AV}'")
    logging.getLogger("libav").setLevel(logging.ERROR)  # what it cannot decode is counted, not printed
    return av
