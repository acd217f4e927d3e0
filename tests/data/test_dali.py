"""DALI gives the samples of Pillow: same windows, pixels within the stated tolerance, same policy, no lost batch."""

import builtins
import sys
import types
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.config import DataConfig
from data.errors import DataError
from data.loader import PrefetchLoader
from data.pixels.decode import make_decoder
from data.pixels.transforms import RandomResizedCrop, Window, eval_transform
from data.reader import SampleBatch, SampleReader
from data.shards.write import write_shard
from tests.data.shard_factory import encode, picture

# Levels of 255: both resize with the same filter, but round and upsample chroma differently on the way.
MOST_LEVELS = 8
MEAN_LEVELS = 0.4


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_dali(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "nvidia" or name.startswith("nvidia.dali"):
            raise ImportError("No module named 'nvidia.dali'")
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_dali)
    with pytest.raises(DataError, match=r"pip install 'eva-megatron\[dali\]'"):
        make_decoder("dali", max_pixels=10**6)


@pytest.mark.parametrize(
    ("version", "refused", "told"), [("2.2.9", True, False), ("2.4.1", False, False), ("2.10.0", False, True)]
)
def test_a_version_outside_the_range_is_one_line(
    version: str, refused: bool, told: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = types.SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "nvidia", types.SimpleNamespace(dali=other))
    monkeypatch.setitem(sys.modules, "nvidia.dali", other)
    line = f"NVIDIA DALI {version} is here, but data.decoder=dali is for 2.3 to 2.4"
    with pytest.raises(DataError, match=line) if refused else nullcontext():
        make_decoder("dali", max_pixels=10**6)
    assert [record.getMessage().startswith(line) for record in caplog.records] == [True] * told


pytest.importorskip("nvidia.dali", reason="the extra `dali` is not installed")


def _photo(number: int, width: int, height: int) -> Image.Image:
    """Smooth with some noise, as photographs are."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = coarse.resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth) + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _jpeg(number: int, width: int = 100, height: int = 75, **options: object) -> bytes:
    return encode(_photo(number, width, height), "JPEG", quality=90, **options)


def _both(jobs: list[tuple[bytes, Window]]) -> tuple[torch.Tensor, torch.Tensor, list[str | None], int]:
    """Pillow's pixels, DALI's, the problems that both report, and DALI's fallbacks."""
    pillow, dali = (make_decoder(name, max_pixels=10**7) for name in ("pillow", "dali"))
    side = jobs[0][1].size
    reference, found = (torch.zeros(len(jobs), 3, side, side, dtype=torch.uint8) for _ in range(2))
    expected = [problem.reason if problem else None for problem in pillow.decode_many(jobs, reference)]
    problems = [problem.reason if problem else None for problem in dali.decode_many(jobs, found)]
    assert problems == expected
    return reference, found, problems, dali.fallbacks  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [24, 64, 120])
@pytest.mark.parametrize("flip", [False, True])
def test_pixels_agree_within_the_stated_tolerance(size: int, flip: bool) -> None:
    crop = RandomResizedCrop(seed=1, size=size, scale=(0.2, 1.0), flip=flip)
    sizes = [(100, 75), (75, 100), (160, 90), (64, 64)] * 5
    jobs = [(_jpeg(n, *wh, progressive=n % 3 == 0), crop.window(n, *wh)) for n, wh in enumerate(sizes)]
    reference, found, _, fallbacks = _both(jobs)
    difference = (reference.int() - found.int()).abs()
    assert difference.max() <= MOST_LEVELS and difference.float().mean() <= MEAN_LEVELS
    assert fallbacks == 0 and found.float().std() > 20


def test_what_dali_would_treat_otherwise_goes_to_pillow() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    window = Window(box=(0, 0, 100, 75), size=32)
    cmyk = encode(_photo(3, 100, 75).convert("CMYK"), "JPEG", quality=95)
    transparent = encode(Image.new("RGBA", (100, 75), (200, 100, 50, 0)))
    jobs = [(content, window) for content in (cmyk, transparent, encode(picture(1, 100, 75), "GIF"))]
    jobs.append((_jpeg(4) + b"tail", window))  # no end marker where it belongs
    jobs.append((_jpeg(5), eval_transform("crop", size=32).window(0, 100, 75)))
    reference, found, _, fallbacks = _both(jobs)
    assert found.equal(reference) and fallbacks == 0
    grey = encode(_photo(7, 100, 75).convert("L"), "JPEG")
    rotated, found, _, _ = _both([(_jpeg(6, exif=exif), window), (grey, window)])
    assert (rotated.int() - found.int()).abs().max() <= MOST_LEVELS


def test_an_image_that_dali_refuses_does_not_lose_its_batch() -> None:
    window = Window(box=(0, 0, 100, 75), size=32)
    bad_table = bytearray(_jpeg(0))
    huffman = bad_table.index(b"\xff\xc4")
    bad_table[huffman + 5 : huffman + 21] = b"\xff" * 16  # whole from start to end marker, and undecodable
    jobs = [(_jpeg(1), window), (bytes(bad_table), window), (b"", window), (_jpeg(2)[:900], window), (_jpeg(3), window)]
    reference, found, problems, fallbacks = _both(jobs)
    good = [0, 4]
    assert problems == [None, "undecodable_image", "empty_image", "truncated_image", None]
    assert (reference[good].int() - found[good].int()).abs().max() <= MOST_LEVELS
    assert fallbacks == 1


def test_more_images_than_one_run_takes() -> None:
    jobs = [(_jpeg(n % 7), Window(box=(0, 0, 100, 75), size=16)) for n in range(150)]
    reference, found, _, _ = _both(jobs)
    assert (reference.int() - found.int()).abs().max() <= MOST_LEVELS


def test_readers_of_both_decoders_replace_alike(tmp_path: Path) -> None:
    samples = [(f"s{n}", {"jpg": _jpeg(n), "txt": b"words"}) for n in range(10)]
    samples[4][1]["jpg"] = _jpeg(4)[:700]
    path = str(tmp_path / "x.tar")
    write_shard(path, samples)
    batches: list[SampleBatch] = []
    for decoder in ("pillow", "dali"):
        config = DataConfig(shards=[path], decoder=decoder)
        reader = SampleReader(config, image_size=24, context_length=8, seed=0, train=True)
        with PrefetchLoader(reader.read, [np.arange(20)], workers=1) as loader:  # DALI in a forked reader
            batches += loader
    reference, found = batches
    assert found.keys == reference.keys and found.bad == reference.bad and len(found.bad) == 2
    assert (found.images.int() - reference.images.int()).abs().max() <= MOST_LEVELS
