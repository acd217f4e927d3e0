"""Clips: which frames are seen, through one window, from video files and frame folders alike."""

from fractions import Fraction
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch

from data.config import DataConfig
from data.errors import DataError, Rejected
from data.pixels import video
from data.pixels.transforms import Window
from data.pixels.video import ClipDecoder, frame_numbers, is_clip
from data.reader import SampleReader
from data.shards.write import write_shard
from tests.data.shard_factory import encode, good_sample, picture

av = pytest.importorskip("av", reason="the extra `video` is not installed")
WIDTH, HEIGHT, FRAMES = 64, 48, 20


def _clip(kind: str = "mp4", frames: int = FRAMES, codec: str = "mpeg4") -> bytes:
    """Frame i is grey of level 10 i."""
    stream = BytesIO()
    with av.open(stream, "w", format=kind) as container:
        track = container.add_stream(codec, rate=Fraction(10))
        track.width, track.height = WIDTH, HEIGHT
        track.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for number in range(frames):
            pixels = np.full((HEIGHT, WIDTH, 3), 10 * number, dtype=np.uint8)
            container.mux(track.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(track.encode())
    return stream.getvalue()


def _levels(encoded: bytes, frames: int) -> list[float]:
    out = torch.empty(frames, 3, 16, 16, dtype=torch.uint8)
    decoder = ClipDecoder(frames=frames, max_pixels=10**6)
    width, height = decoder.size(encoded)
    problem = decoder.decode_into(encoded, Window(box=(0, 0, width, height), size=16), out)
    assert problem is None
    return (out.float().mean(dim=(1, 2, 3)) / 10).tolist()


def test_frames_lie_in_the_middle_of_equal_parts() -> None:
    assert frame_numbers(16, 8).tolist() == [1, 3, 5, 7, 9, 11, 13, 15]
    assert frame_numbers(20, 8).tolist() == [1, 3, 6, 8, 11, 13, 16, 18]
    assert frame_numbers(21, 1).tolist() == [10]  # the centre frame
    assert frame_numbers(3, 8).tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("kind", "codec"),
    [
        ("mp4", "mpeg4"),
        ("mov", "mpeg4"),
        ("webm", "libvpx-vp9"),
        ("matroska", "mpeg4"),
        ("avi", "mpeg4"),
        ("gif", "gif"),
    ],
)
@pytest.mark.parametrize("frames", [8, 16])
def test_every_container_gives_the_uniform_frames(kind: str, codec: str, frames: int) -> None:
    encoded = _clip(kind, codec=codec)
    assert is_clip(encoded, frames=frames)
    assert np.abs(np.array(_levels(encoded, frames)) - frame_numbers(FRAMES, frames)).max() < 0.6


def test_one_frame_is_the_centre_and_a_short_clip_repeats() -> None:
    assert _levels(_clip(), 1)[0] == pytest.approx(10, abs=0.6)
    assert np.allclose(_levels(_clip(frames=2), 4), [0, 0, 1, 1], atol=0.6)


def test_images_are_no_clips() -> None:
    assert not any(is_clip(encode(picture(0), kind), frames=8) for kind in ("PNG", "JPEG", "WEBP"))
    assert not is_clip(b"", frames=8)
    assert not is_clip(_clip("gif", codec="gif"), frames=1)  # its first frame is an image


@pytest.mark.parametrize("damage", ["header", "half", "no format", "too large", "too long"])
def test_a_clip_that_cannot_be_read_is_rejected(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = _clip()
    broken = {"header": encoded[:40], "half": encoded[: len(encoded) // 2], "no format": b"words"}.get(damage, encoded)
    reason = {"too large": "too_many_pixels", "too long": "clip_too_long"}.get(damage, "undecodable_clip")
    monkeypatch.setattr(video, "_MOST_FRAMES", FRAMES - 1 if damage == "too long" else FRAMES)
    decoder = ClipDecoder(frames=4, max_pixels=1000 if damage == "too large" else 10**6)
    with pytest.raises(Rejected, match=f"^{reason}$"):
        decoder.size(broken)
        problem = decoder.decode_into(broken, Window(box=(0, 0, 64, 48), size=8), torch.empty(4, 3, 8, 8).byte())
        raise problem or AssertionError("it was decoded")


# --- through the reader ------------------------------------------------------------------------------------------


def _reader(folder: Path, samples: list[tuple[str, dict[str, bytes]]], *, frames: int) -> SampleReader:
    path = str(folder / "clips.tar")
    write_shard(path, samples)
    config = DataConfig(shards=[path], shuffle=False, frames=frames, crop_scale=[0.2, 0.9])
    return SampleReader(config, image_size=16, context_length=8, seed=0, train=True)


def _folder(numbers: list[int]) -> dict[str, bytes]:
    """Frame n of the folder is picture n, written in the given order."""
    return {f"{number:03d}.png": encode(picture(number)) for number in numbers} | {"txt": b"a clip"}


def test_a_frame_folder_is_read_by_number_through_one_window(tmp_path: Path) -> None:
    reader = _reader(tmp_path, [("clip", _folder([3, 0, 2, 1]))], frames=4)
    batch = reader.read(np.arange(2))
    assert batch.images.shape == (2, 4, 3, 16, 16)
    for position in range(2):
        for number in range(4):
            image = {"png": encode(picture(number)), "txt": b"an image"}
            (tmp_path / f"{number}").mkdir(exist_ok=True)
            alone = _reader(tmp_path / f"{number}", [("image", image)], frames=1).read(np.array([position]))
            assert batch.images[position, number].equal(alone.images[0])


def test_clips_folders_and_images_share_a_batch(tmp_path: Path) -> None:
    mixed = [("file", {"mp4": _clip(), "txt": b"a clip"}), ("folder", _folder(list(range(8)))), good_sample(1)]
    batch = _reader(tmp_path, mixed, frames=8).read(np.arange(3))
    assert batch.keys == ["file", "folder", "good1"] and not batch.bad
    levels = batch.images[0].float().mean(dim=(1, 2, 3)) / 10
    assert np.abs(levels.numpy() - frame_numbers(FRAMES, 8)).max() < 0.6
    assert not batch.images[1, 0].equal(batch.images[1, 1])
    assert all(frame.equal(batch.images[2, 0]) for frame in batch.images[2])  # an image stands still


def test_without_frames_a_clip_counts_as_its_centre_frame(tmp_path: Path) -> None:
    samples = [("clip", {"mp4": _clip(), "txt": b"a clip"}), good_sample(1)]
    batch = _reader(tmp_path, samples, frames=1).read(np.arange(2))
    assert batch.images.shape == (2, 3, 16, 16)
    assert batch.images[0].float().mean() == pytest.approx(100, abs=6)


def test_a_damaged_clip_or_frame_is_replaced(tmp_path: Path) -> None:
    samples = [
        ("clip", {"mp4": _clip()[:-200], "txt": b"words"}),
        ("frames", _folder([0, 1]) | {"001.png": encode(picture(1))[:200]}),
        good_sample(1),
    ]
    batch = _reader(tmp_path, samples, frames=2).read(np.arange(3))
    assert set(batch.keys) <= {"clip", "good1"} and batch.keys[1:] == ["good1", "good1"]
    assert ("frames", "truncated_image") in [(bad.key, bad.reason) for bad in batch.bad]


def test_an_older_pyav_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "__version__", "12.3.0")
    with pytest.raises(DataError, match=r"clips need PyAV 13 or later, not 12\.3\.0: pip install 'av>=13'"):
        video._import_av()
