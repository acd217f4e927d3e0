"""The shard index: what it finds, and when its cache is believed."""

import logging
import os
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.errors import DataError
from data.shards import index_store
from data.shards.index import Place, ShardIndex
from data.shards.index import build_index as build_from_stream
from data.shards.index_store import COUNTS_FILE, IndexStore, Tally, index_name, load_index, write_counts
from data.shards.storage import Storage
from data.shards.write import write_shard
from tests.data.shard_factory import good_sample, make_shards


def build_index(path: str) -> ShardIndex:
    with open(path, "rb") as stream:
        return build_from_stream(stream, path)


def _member(path: str, span: tuple[int, int] | None) -> bytes:
    assert span is not None
    return Path(path).read_bytes()[span[0] : span[0] + span[1]]


def test_spans_point_at_the_members(tmp_path: Path) -> None:
    (path,) = make_shards(tmp_path, [5])
    index = build_index(path)
    assert [index.key(sample) for sample in range(len(index))] == [f"good{number}" for number in range(5)]
    for number in range(5):
        _, members = good_sample(number)
        for place, suffix in ((Place.IMAGE, "png"), (Place.CAPTION, "txt"), (Place.METADATA, "json")):
            assert _member(path, index.span(number, place)) == members[suffix]


def test_members_of_one_key_are_one_sample(tmp_path: Path) -> None:
    path = str(tmp_path / "odd.tar")
    with tarfile.open(path, "w") as tar:
        for name in (
            "a/1.JPG",
            "b/1.jpeg",
            "a/1.txt",
            "a/1.jpg",
            "a/1.cls",
            "c.only.txt",
            "long" * 60 + ".txt",
        ):
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, BytesIO(name.encode()))
    index = build_index(path)
    assert [index.key(sample) for sample in range(len(index))] == ["a/1", "b/1", "c.only", "long" * 60]
    assert _member(path, index.span(0, Place.IMAGE)) == b"a/1.JPG"
    assert index.span(1, Place.CAPTION) is None
    assert index.span(3, Place.IMAGE) is None
    assert index.odd == {"other_suffix": 1, "second_member": 1}


def test_frame_folders_are_ordered_by_number(tmp_path: Path) -> None:
    path = str(tmp_path / "clips.tar")
    clip = {f"{number}.jpg": b"x" * number for number in (10, 9, 2)} | {"txt": b"words", "9.PNG": b"ignored"}
    write_shard(path, [("a", {"mp4": b"clip"}), ("clip", clip), ("b", {"txt": b"words"})])
    index = load_index(path, Storage())
    assert [[size for _, size in index.frame_spans(sample)] for sample in range(3)] == [[], [2, 9, 10], []]
    assert _member(path, index.span(0, Place.IMAGE)) == b"clip" and index.span(1, Place.IMAGE) is None
    again = load_index(path, Storage())
    assert again.frame_spans(1) == index.frame_spans(1)


def test_a_folder_that_cannot_be_written_leaves_the_index_to_the_cache_folder(tmp_path: Path) -> None:
    (path,) = make_shards(tmp_path, [3])
    os.mkdir(index_name(path))
    storage = Storage(cache_dir=str(tmp_path / "cache"))
    load_index(path, storage)
    assert len(list((tmp_path / "cache").rglob("*.index.npz"))) == 1
    os.rename(path, path + ".away")  # whoever opens the shard again finds nothing
    Path(path).touch()
    os.truncate(path, os.path.getsize(path + ".away"))
    status = os.stat(path + ".away")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert len(load_index(path, storage)) == 3


def test_a_shard_that_changes_during_a_run_is_an_error(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [3, 2])
    store = IndexStore(shards, max_loaded=1, storage=Storage())
    assert len(store[1]) == 2
    write_shard(shards[0], [good_sample(0)])
    with pytest.raises(DataError, match=r"00000\.tar holds 1 samples, but 3 when the run started"):
        store[0]
    write_shard(shards[0], [good_sample(number) for number in (7, 8, 9)])
    with pytest.raises(DataError, match=r"00000\.tar holds 3 samples, but not those that it held when the run started"):
        store[0]


def test_counts_of_a_folder_are_those_of_its_unchanged_shards(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [2, 4])
    write_counts(shards, [Tally(20, 7), Tally(40, 8)], Storage())  # other numbers, to see where the counts come from
    assert (tmp_path / COUNTS_FILE).exists()
    os.utime(shards[1])
    store = IndexStore(shards, max_loaded=1, storage=Storage())
    assert store.counts.tolist() == [20, 4]
    assert store.digests.tolist() == [7, build_index(shards[1]).digest]


def test_a_valid_cache_is_used_and_a_stale_one_rebuilt(tmp_path: Path) -> None:
    (path,) = make_shards(tmp_path, [3])
    load_index(path, Storage())
    built = os.stat(index_name(path)).st_mtime_ns
    load_index(path, Storage())
    assert os.stat(index_name(path)).st_mtime_ns == built
    status = os.stat(path)
    write_shard(path, [good_sample(number) for number in (7, 8, 9)])  # same size, other content
    assert os.stat(path).st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert load_index(path, Storage()).key(0) == "good7"
    assert IndexStore([path], max_loaded=1, storage=Storage())[0].key(0) == "good7"


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no zip", b"garbage"])
def test_a_damaged_cache_is_rebuilt(tmp_path: Path, damage: bytes) -> None:
    (path,) = make_shards(tmp_path, [3])
    load_index(path, Storage())
    Path(index_name(path)).write_bytes(damage)
    assert IndexStore([path], max_loaded=1, storage=Storage()).counts.tolist() == [3]
    with np.load(index_name(path)) as cache:
        assert int(cache["count"]) == 3


def test_without_a_writable_place_the_index_lives_in_memory(tmp_path: Path) -> None:
    (path,) = make_shards(tmp_path, [3])
    os.mkdir(index_name(path))
    assert len(load_index(path, Storage())) == 3
    assert sorted(os.listdir(tmp_path)) == ["00000.tar", "00000.tar.index.npz"]


def test_counts_come_without_loading_the_indices(tmp_path: Path) -> None:
    paths = make_shards(tmp_path, [2, 4, 1])
    assert IndexStore(paths, max_loaded=1, storage=Storage()).counts.tolist() == [2, 4, 1]
    again = IndexStore(paths, max_loaded=1, storage=Storage())
    assert again.counts.tolist() == [2, 4, 1]
    assert len(again._loaded) == 0


def test_a_truncated_tar_keeps_what_is_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (path,) = make_shards(tmp_path, [4])
    whole = build_index(path)
    start, size = whole.span(2, Place.IMAGE) or (0, 0)
    os.truncate(path, start + size // 2)
    with caplog.at_level(logging.WARNING, logger="data.index"):
        index = build_index(path)
    assert index.truncated and not whole.truncated
    assert [index.key(sample) for sample in range(len(index))] == ["good0", "good1", "good2"]  # the cut one is counted
    assert "3 samples up to the damage" in caplog.text


@pytest.mark.parametrize("content", [b"", b"<html>404</html>" * 100, b"\x1f\x8b\x08" + bytes(600)])
def test_not_a_tar_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.tar .*(is not an uncompressed tar|is empty)"):
        load_index(str(path), Storage())


def test_a_tar_cut_in_its_first_sample_is_an_error(tmp_path: Path) -> None:
    (path,) = make_shards(tmp_path, [1])
    os.truncate(path, 700)
    with pytest.raises(DataError, match="cut before the end of its first sample"):
        load_index(path, Storage())


def test_one_thread_at_a_time_reads_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = str(tmp_path / "x.tar")
    write_shard(shard, [good_sample(0)])
    load_index(shard, Storage())
    seen, load = [], np.load

    def watched(*arguments: Any, **options: Any) -> Any:
        seen.append(index_store.ONE_THREAD.lock.locked())
        return load(*arguments, **options)

    monkeypatch.setattr(np, "load", watched)
    assert load_index(shard, Storage()).keys[0] and seen == [True]
    lock = index_store.ONE_THREAD.lock
    with lock:
        if (child := os.fork()) == 0:
            os._exit(int(index_store.ONE_THREAD.lock.locked()))
        assert os.waitpid(child, 0)[1] == 0, "a fork keeps waiting for a thread that it does not have"
