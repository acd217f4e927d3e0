"""The shard tools on real shards: what they write is what a run starts from, what they count is what it would meet."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.config import DataConfig
from data.reader import SampleReader
from data.shards.index_store import COUNTS_FILE, IndexStore, index_name
from data.shards.storage import Storage
from data.shards.write import write_shard
from tests.data.http_server import serve
from tests.data.shard_factory import encode, good_sample, make_shards, picture
from tools import index_shards, inspect_shards


def _run(tool: Any, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any], str]:
    status = tool.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, json.loads(captured.out or "{}"), captured.err


def test_a_run_starts_from_the_counts_without_opening_an_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = make_shards(tmp_path, [3, 5, 2])
    status, summary, _ = _run(index_shards, capsys, tmp_path, "--workers", 2)
    assert status == 0
    nothing: dict[str, Any] = {"odd": {}, "without_samples": [], "truncated": [], "unusable": [], "not_written": []}
    assert summary == {"shards": 3, "samples": 10, "fewest": 2, "most": 5, "counts_written": True, **nothing}
    for shard in shards:
        Path(index_name(shard)).write_bytes(b"not looked at")
    assert IndexStore(shards, max_loaded=1, storage=Storage()).counts.tolist() == [3, 5, 2]
    write_shard(shards[1], [good_sample(number) for number in range(4)])  # a changed shard is counted anew
    assert IndexStore(shards, max_loaded=1, storage=Storage()).counts.tolist() == [3, 4, 2]


def test_what_cannot_be_used_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = make_shards(tmp_path, [3, 3])
    os.truncate(shards[1], os.path.getsize(shards[1]) // 2)
    (tmp_path / "x.tar").write_bytes(b"<html>" * 200)
    status, summary, _ = _run(index_shards, capsys, tmp_path, "--workers", 1)
    assert status == 1
    assert summary["truncated"] == [shards[1]] and summary["shards"] == 3
    assert len(summary["unusable"]) == 1 and "x.tar is not an uncompressed tar" in summary["unusable"][0]
    status, _, error = _run(index_shards, capsys, tmp_path / "none.tar")
    assert status == 1 and "does not exist" in error


def test_an_index_that_cannot_be_written_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = make_shards(tmp_path, [3, 3])
    os.mkdir(index_name(shards[1]))
    status, summary, error = _run(index_shards, capsys, tmp_path, "--workers", 1)
    assert status == 1 and summary["not_written"] == [shards[1]]
    assert "error: 1 of 2 indices could not be written: make the shards' folder writable" in error
    os.rmdir(index_name(shards[1]))
    os.unlink(tmp_path / COUNTS_FILE)
    os.mkdir(tmp_path / COUNTS_FILE)
    status, summary, error = _run(index_shards, capsys, tmp_path, "--workers", 1)
    assert status == 1 and not summary["counts_written"] and "error: shards.counts.npz could not be written" in error
    status, _, error = _run(index_shards, capsys, tmp_path, "--workers", 1, "--cache-dir", tmp_path / "cache")
    assert status == 0 and not error


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into every folder")
def test_a_read_only_folder_is_found_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_shards(tmp_path, [3])
    tmp_path.chmod(0o500)
    status, summary, error = _run(index_shards, capsys, tmp_path, "--workers", 1)
    tmp_path.chmod(0o700)
    assert status == 1 and not summary and f"no index can be written in {tmp_path}" in error
    assert sorted(os.listdir(tmp_path)) == ["00000.tar"]


def test_remote_shards_are_indexed_into_the_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("aiohttp", reason="the extra `remote` is not installed")
    (tmp_path / "www").mkdir()
    make_shards(tmp_path / "www", [3, 4])
    with serve(tmp_path / "www") as server:
        arguments = [f"{server.url}/", "--cache-dir", tmp_path / "cache", "--workers", 1]
        status, summary, _ = _run(index_shards, capsys, *arguments)
        assert (status, summary["samples"]) == (0, 7)
        config = DataConfig(shards=[f"{server.url}/"], cache_dir=str(tmp_path / "cache"))
        before = dict(server.gets)
        reader = SampleReader(config, image_size=8, context_length=8, seed=0, train=True)
        assert reader.total_samples == 7
        assert {path for path in server.gets if server.gets[path] > before.get(path, 0)} == {"/"}  # the listing alone


def _zoo(folder: Path) -> str:
    path = str(folder / "zoo.tar")
    good = [
        (f"good{number}", {"png": encode(picture(number, 40 + 100 * number, 300)), "txt": b"a word"})
        for number in range(6)
    ]
    bad = [("mute", {"png": b"x"}), ("torn", {"jpg": encode(picture(1), "JPEG")[:500], "txt": b"words"})]
    write_shard(path, [*good[:3], *bad, *good[3:]])
    return path


def test_bad_samples_are_counted_by_a_full_decode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, png = tmp_path / "report.json", tmp_path / "contact.png"
    arguments = [_zoo(tmp_path), "--workers", 1, "--out", out, "--png", png, "--pictures", 8]
    status, report, _ = _run(inspect_shards, capsys, *arguments)
    assert status == 0 and json.loads(out.read_text()) == report
    assert (report["samples"], report["looked_at"], report["bad"]) == (8, 8, 2)
    assert report["bad_by_reason"] == {"missing_caption": 1, "truncated_image": 1}
    assert report["bad_examples"]["truncated_image"] == [f"torn in {tmp_path}/zoo.tar"]
    assert report["caption_characters"]["p50"] == 6
    assert report["shorter_side_pixels"] == {">=0": 1, ">=128": 1, ">=224": 1, ">=256": 3}
    sheet = np.asarray(Image.open(png))
    assert sheet.shape == (128 + 28, 6 * 128, 3)  # the six good ones
    tiles = [sheet[:128, 128 * number : 128 * number + 128] for number in range(6)]
    assert all(tile.std() > 30 for tile in tiles) and sheet[128:].min() < 40


def test_a_few_samples_stand_for_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report, _ = _run(
        inspect_shards, capsys, *make_shards(tmp_path, [10, 10]), "--max-samples", 4, "--workers", 0
    )
    assert (status, report["samples"], report["looked_at"]) == (0, 20, 4)
