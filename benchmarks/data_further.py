"""Further rows of benchmarks.data: clips, and shards behind HTTP on loopback.

The server is a process of its own, so its CPU time is not counted; it answers from the page cache, without the latency
of a network: what is measured is what a reader computes for a remote picture.
"""

import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from data.reader import SampleReader
from data.shards.listing import ShardFiles
from data.shards.write import write_shard

CLIPS, CLIP_FRAMES, FRAMES_SEEN, CLIP_WIDTH, CLIP_HEIGHT = 12, 32, 8, 320, 240
Reader = Callable[..., SampleReader]
Reading = Callable[[SampleReader, int], int]


def write_clips(folder: Path) -> str:
    """A shard of CLIPS clips (MPEG-4, CLIP_FRAMES frames of CLIP_WIDTH x CLIP_HEIGHT: a texture that drifts)."""
    path = str(folder / "clips.tar")
    write_shard(path, ((f"{n:06d}", {"mp4": _clip(n), "txt": b"a clip"}) for n in range(CLIPS)))
    return path


def _clip(number: int) -> bytes:
    import av

    rng, stream = np.random.default_rng(number), BytesIO()
    scene = rng.integers(0, 256, (CLIP_HEIGHT // 8 + CLIP_FRAMES, CLIP_WIDTH // 8 + CLIP_FRAMES, 3), dtype=np.uint8)
    with av.open(stream, "w", format="mp4") as container:
        track = container.add_stream("mpeg4", rate=Fraction(10))
        track.width, track.height, track.pix_fmt, track.bit_rate = CLIP_WIDTH, CLIP_HEIGHT, "yuv420p", 2_000_000
        for frame in range(CLIP_FRAMES):
            seen = scene[frame : frame + CLIP_HEIGHT // 8, frame : frame + CLIP_WIDTH // 8]
            pixels = np.kron(seen, np.ones((8, 8, 1), dtype=np.uint8))
            container.mux(track.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(track.encode())
    return stream.getvalue()


def video_path(shard: str, make_reader: Reader) -> Callable[[int], int]:
    """Every clip once, FRAMES_SEEN frames of each; returns the frames that were given."""
    reader = make_reader([shard], frames=FRAMES_SEEN)
    return lambda images: reader.read(np.arange(CLIPS)).images.shape[:2].numel()


class _Ranges(SimpleHTTPRequestHandler):
    """Answers `Range: bytes=FIRST-LAST`, which the standard library's handler ignores."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        if asked is None:
            return super().do_GET()
        first, last = (int(edge) for edge in asked.removeprefix("bytes=").split("-"))
        with open(self.translate_path(self.path), "rb") as file:
            size = file.seek(0, 2)
            file.seek(first)
            content = file.read(last + 1 - first)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


def _serve(folder: str, ready: Connection) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Ranges, directory=folder))
    ready.send(server.server_address[1])
    server.serve_forever()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder's URL, for the length of the block."""
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    server = context.Process(target=_serve, args=(str(folder), its), daemon=True)
    server.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        server.terminate()
        server.join()


def whole_path(urls: list[str], cache: Path, make_reader: Reader, read: Reading) -> Callable[[int], int]:
    """The reader as it is, made anew: each pass fetches every shard whole into an empty cache; indices lie beside."""

    def path(images: int) -> int:
        shutil.rmtree(cache, ignore_errors=True)
        return read(make_reader(urls, cache_dir=str(cache)), images)

    return path


class _Ranged(ShardFiles):
    """A request for every read."""

    def __init__(self, urls: Sequence[str]):
        import fsspec

        self._urls, self._web = urls, fsspec.filesystem("http")

    def read(self, shard: int, offset: int, size: int) -> bytes:
        return self._web.cat_file(self._urls[shard], offset, offset + size)


def ranged_path(urls: list[str], cache: Path, make_reader: Reader, read: Reading) -> Callable[[int], int]:
    """What the reader does not do: a ranged request for each picture and each caption, nothing kept."""
    reader = make_reader(urls, cache_dir=str(cache))
    reader.sources.files = _Ranged(reader.sources.shards)
    return lambda images: read(reader, images)
