"""Bad samples are counted by reason and replaced in order; too many of them end the run."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.bad import REASONS
from data.batch import sum_of_bits
from data.config import DataConfig
from data.errors import DataError
from data.reader import SampleReader
from data.shards.index import Place, build_index
from data.shards.write import write_shard
from tests.data.shard_factory import encode, good_sample, make_shards, picture

IMAGE = encode(picture(5))
JPEG = encode(picture(5, 100, 100), "JPEG")
BOMB = encode(Image.new("1", (300, 200)))  # 60,000 pixels, more than the limit of these tests
MAX_PIXELS = 50_000
BAD: dict[str, dict[str, bytes]] = {
    "missing_image": {"txt": b"words"},
    "missing_caption": {"png": IMAGE},
    "empty_image": {"jpg": b"", "txt": b"words"},
    "not_an_image": {"jpg": b"<html>not found</html>", "txt": b"words"},
    "truncated_image": {"jpg": JPEG[: len(JPEG) // 2], "txt": b"words"},
    "undecodable_image": {"png": IMAGE[:60] + b"\xff" + IMAGE[61:], "txt": b"words"},
    "too_many_pixels": {"png": BOMB, "txt": b"words"},
    "empty_caption": {"png": IMAGE, "txt": b" &nbsp; \n"},
    "caption_too_long": {"png": IMAGE, "txt": b"word " * 200_000},
    "caption_not_utf8": {"png": IMAGE, "txt": b"caf\xe9 table"},
    "frame_sizes_differ": {"000.png": IMAGE, "001.png": encode(picture(6, 20, 20)), "txt": b"words"},
}


def _reader(shards: list[str], *, train: bool = True, **config: object) -> SampleReader:
    settings = DataConfig(shards=shards, max_pixels=MAX_PIXELS, **config)  # type: ignore[arg-type]
    return SampleReader(settings, image_size=24, context_length=12, seed=0, train=train)


def _shard(folder: Path, samples: list[tuple[str, dict[str, bytes]]]) -> list[str]:
    path = str(folder / "shard.tar")
    write_shard(path, samples)
    return [path]


def test_a_batch_holds_the_samples_of_its_positions(tmp_path: Path) -> None:
    reader = _reader(make_shards(tmp_path, [3, 4]), shuffle=False)
    batch = reader.read(np.array([5, 0, 6, 7]))
    assert reader.total_samples == 7
    assert batch.keys == ["good5", "good0", "good6", "good0"]
    assert batch.captions[0] == "picture number 5"
    assert batch.images.shape == (4, 3, 24, 24) and batch.images.dtype.is_floating_point is False
    assert batch.tokens.shape == (4, 12)
    assert not batch.images[1].equal(batch.images[3])  # same sample, next epoch: another window


def test_reading_does_not_depend_on_the_batch_split(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [3, 4, 5])
    whole = _reader(shards).read(np.arange(24))
    reader = _reader(shards)
    for part in np.array_split(np.arange(24)[::-1], 5):
        batch = reader.read(part)
        assert batch.keys == [whole.keys[position] for position in part]
        assert batch.images.equal(whole.images[part.copy()])


def test_evaluation_reads_in_listed_order_without_augmentation(tmp_path: Path) -> None:
    reader = _reader(make_shards(tmp_path, [3, 4]), train=False)
    batch = reader.read(np.arange(14))
    assert batch.keys[:7] == [f"good{number}" for number in range(7)]
    assert batch.images[:7].equal(batch.images[7:])


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_sample_is_counted_and_replaced_by_the_next(tmp_path: Path, reason: str) -> None:
    good, frames = good_sample(1), 2 if reason == "frame_sizes_differ" else 1
    shard = _shard(tmp_path, [("bad", BAD[reason]), good, good_sample(2)])
    reader = _reader(shard, shuffle=False, frames=frames)
    batch = reader.read(np.array([0, 1, 2]))
    assert batch.keys == ["good1", "good1", "good2"]
    (bad,) = batch.bad
    assert (bad.shard, bad.key, bad.reason, bad.position) == (shard[0], "bad", reason, 0)
    assert reader.bad_by_reason == {reason: 1} and reader.reads == 4
    (tmp_path / "plain").mkdir()
    unharmed = _reader(_shard(tmp_path / "plain", [good]), shuffle=False, frames=frames).read(np.array([0]))
    assert batch.images[0].equal(unharmed.images[0])  # the window of position 0, not of 1
    assert not batch.images[0].equal(batch.images[1])


def test_every_reason_of_an_image_or_caption_is_built_here() -> None:
    # below, in tests/real_files, test_video.py and tests/engine/test_features.py
    elsewhere = {"truncated_shard", "member_too_large", "undecodable_clip", "clip_too_long", "no_features"}
    assert set(BAD) | elsewhere == set(REASONS)


def test_a_run_of_bad_samples_is_passed_over_together(tmp_path: Path) -> None:
    samples = [(reason, members) for reason, members in BAD.items() if reason != "frame_sizes_differ"]
    reader = _reader(_shard(tmp_path, [*samples, good_sample(1)]), shuffle=False)
    batch = reader.read(np.array([0]))
    assert batch.keys == ["good1"]
    assert [bad.reason for bad in batch.bad] == [reason for reason, _ in samples]
    assert {bad.position for bad in batch.bad} == {0}


def test_the_sample_at_the_cut_of_a_truncated_tar_is_counted(tmp_path: Path) -> None:
    (shard,) = _shard(tmp_path, [good_sample(number) for number in range(4)])
    with open(shard, "rb") as stream:
        offset, size = build_index(stream, shard).span(2, Place.IMAGE) or (0, 0)
    os.truncate(shard, offset + size // 2)
    batch = _reader([shard], shuffle=False).read(np.arange(3))
    assert batch.keys == ["good0", "good1", "good0"]
    assert [(bad.key, bad.reason) for bad in batch.bad] == [("good2", "truncated_shard")]


def test_a_caption_cut_by_the_end_of_the_tar_is_a_truncated_shard(tmp_path: Path) -> None:
    words = {"txt": b"words " * 500, "png": IMAGE}
    (shard,) = _shard(tmp_path, [good_sample(0), ("cut", words)])
    with open(shard, "rb") as stream:
        offset, size = build_index(stream, shard).span(1, Place.CAPTION) or (0, 0)
    os.truncate(shard, offset + size // 2)
    batch = _reader([shard], shuffle=False).read(np.arange(2))
    assert [(bad.key, bad.reason) for bad in batch.bad] == [("cut", "truncated_shard")]


def test_a_shard_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [2, 2])
    reader = _reader(shards, shuffle=False)
    reader.read(np.arange(4))
    os.truncate(shards[0], 600)
    batch = reader.read(np.array([1]))
    assert batch.keys == ["good2"] and batch.bad[0].reason == "truncated_shard"


def test_nothing_but_bad_samples_ends_the_run(tmp_path: Path) -> None:
    many = [(f"bad{number}", BAD["empty_image"]) for number in range(120)]
    with pytest.raises(DataError, match=r"100 bad samples in a row from position 3 on \(empty_image 100\)"):
        _reader(_shard(tmp_path, many)).read(np.array([3]))
    with pytest.raises(DataError, match=r"all 2 samples are bad from position 3 on \(empty_image 2\)"):
        _reader(_shard(tmp_path, many[:2])).read(np.array([3]))


def test_the_one_good_sample_of_a_small_shard_is_found(tmp_path: Path) -> None:
    shards = _shard(tmp_path, [("bad", BAD["empty_image"]), ("html", BAD["not_an_image"]), good_sample(0)])
    batch = _reader(shards).read(np.arange(30))
    assert set(batch.keys) == {"good0"} and {sample.key for sample in batch.bad} == {"bad", "html"}


def test_too_large_a_share_of_bad_samples_ends_the_run(tmp_path: Path) -> None:
    samples = [good_sample(number) for number in range(9)]
    shards = _shard(tmp_path, [*samples, ("bad", BAD["empty_caption"])])
    _reader(shards, train=False, max_bad_fraction=0.2).read(np.arange(1100))
    _reader(shards, max_bad_fraction=0.05).read(np.arange(1100))  # in training the engine judges all readers together
    reader = _reader(shards, train=False, max_bad_fraction=0.05)
    reader.read(np.arange(800))  # too early to judge
    with pytest.raises(DataError, match=r"of 1\d\d\d samples were bad \(empty_caption 1\d\d\), more than .*=0.05"):
        reader.read(np.arange(800, 1100))


@pytest.mark.parametrize(
    ("config", "words"),
    [(DataConfig(decoder="magic"), "data.decoder"), (DataConfig(crop_scale=[0.9]), "must be two areas")],
)
def test_wrong_settings_are_refused_at_the_start(tmp_path: Path, config: DataConfig, words: str) -> None:
    config = replace(config, shards=make_shards(tmp_path, [1]))
    with pytest.raises(DataError, match=words):
        SampleReader(config, image_size=24, context_length=12, seed=0, train=True)


def test_the_sum_of_bits_is_that_of_the_values_wherever_they_lie() -> None:
    for values in (torch.arange(23, dtype=torch.uint8), torch.randn(21), torch.arange(-5, 5), torch.zeros(0)):
        raw = values.numpy().tobytes()
        words = (int.from_bytes(raw[at : at + 8], "little") for at in range(0, len(raw), 8))
        elsewhere = torch.cat([torch.ones(1, dtype=values.dtype), values])[1:]
        assert sum_of_bits(values) == sum_of_bits(elsewhere) == sum(words) % (1 << 64)
