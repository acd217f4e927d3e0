"""Remote shards: the same samples as local ones, through a bounded cache, over a network that fails."""

import fcntl
import logging
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.errors import DataError
from data.loader import PrefetchLoader
from data.reader import SampleReader
from data.shards.index_store import load_index
from data.shards.listing import expand_shards
from data.shards.remote import Absent, Remote, ShardCache, is_remote
from data.shards.storage import Storage
from tests.data.http_server import Server, serve
from tests.data.shard_factory import make_shards

pytest.importorskip("aiohttp", reason="the extra `remote` is not installed")
COUNTS = [5, 4, 6]


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    (tmp_path / "www").mkdir()
    return make_shards(tmp_path / "www", COUNTS)


@pytest.fixture
def server(tmp_path: Path, shards: list[str]) -> Iterator[Server]:
    with serve(tmp_path / "www") as server:
        yield server


def _remote(*, retries: int = 2, timeout_s: float = 30.0) -> Remote:
    return Remote(timeout_s=timeout_s, retries=retries, first_wait_s=0.0)


def _config(shards: list[str], cache: Path, **settings: object) -> DataConfig:
    return DataConfig(shards=shards, cache_dir=str(cache), **settings)  # type: ignore[arg-type]


def _reader(config: DataConfig) -> SampleReader:
    return SampleReader(config, image_size=16, context_length=8, seed=0, train=True)


@pytest.mark.parametrize(
    ("path", "remote"), [("s3://b/x.tar", True), ("https://x", True), ("/a/b.tar", False), ("c:/x.tar", False)]
)
def test_what_is_remote(path: str, remote: bool) -> None:
    assert is_remote(path) == remote


@pytest.mark.parametrize("entry", ["{00000..00002}.tar", "*.tar", "", "0000[0-2].tar"])
def test_every_form_of_an_entry(server: Server, entry: str) -> None:
    assert expand_shards(f"{server.url}/{entry}", Storage()) == [f"{server.url}/0000{n}.tar" for n in range(3)]


def test_remote_shards_give_the_batches_of_local_ones(server: Server, shards: list[str], tmp_path: Path) -> None:
    local = _reader(DataConfig(shards=shards)).read(np.arange(30))
    config = _config([f"{server.url}/"], tmp_path / "cache")
    remote = _reader(config).read(np.arange(30))
    assert remote.keys == local.keys and remote.images.equal(local.images)
    with PrefetchLoader(_reader(config).read, [np.arange(15), np.arange(15, 30)], workers=2) as loader:
        forked = [key for batch in loader for key in batch.keys]
    assert forked == local.keys
    assert [server.gets[f"/{Path(shard).name}"] for shard in shards] == [1, 1, 1]  # once for all readers and runs


def test_an_index_beside_the_remote_shard_saves_reading_the_tar(
    server: Server, shards: list[str], tmp_path: Path
) -> None:
    for shard in shards:
        load_index(shard, Storage())
    reader = _reader(_config([f"{server.url}/"], tmp_path / "cache"))
    assert reader.total_samples == sum(COUNTS)
    assert not any(path.endswith(".tar") for path in server.gets)


def test_a_body_that_breaks_off_is_fetched_again(
    server: Server, shards: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.drops["/00000.tar"] = 2
    target = tmp_path / "copy"
    with caplog.at_level(logging.WARNING, logger="data.remote"):
        _remote().fetch(f"{server.url}/00000.tar", target)
    assert target.read_bytes() == Path(shards[0]).read_bytes()
    assert "attempt 2 failed" in caplog.text
    assert not list(tmp_path.glob("*.part"))


def test_a_body_shorter_than_the_file_is_fetched_again(server: Server, shards: list[str], tmp_path: Path) -> None:
    server.shorts["/00000.tar"] = 1
    _remote().fetch(f"{server.url}/00000.tar", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == Path(shards[0]).read_bytes()


def test_a_body_that_always_breaks_off_ends_the_run(server: Server, tmp_path: Path) -> None:
    server.drops["/00000.tar"] = 99
    with pytest.raises(DataError, match=r"00000\.tar could not be read in 3 attempts .*data\.remote_retries"):
        _remote().fetch(f"{server.url}/00000.tar", tmp_path / "copy")
    assert server.gets["/00000.tar"] == 3
    assert not list(tmp_path.glob("copy*"))


class _Clock:
    """Time that passes only in waits."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    def __call__(self) -> float:
        return sum(self.waits)


def test_a_store_that_is_away_is_asked_until_patience_ends(server: Server, tmp_path: Path) -> None:
    clock = _Clock()
    remote = Remote(timeout_s=30, retries=2, patience_s=300, sleep=clock.waits.append, clock=clock)
    server.refusals["/00000.tar"] = [(500, {})] * 1000
    with pytest.raises(DataError, match=r"00000\.tar could not be read in \d+ attempts .*data\.remote_patience_s"):
        remote.fetch(f"{server.url}/00000.tar", tmp_path / "copy")
    assert 300 <= clock() < 360 and server.gets["/00000.tar"] == len(clock.waits) + 1 > 3
    ceilings = [min(0.5 * 2**attempt, 60) for attempt in range(len(clock.waits))]
    assert all(ceiling / 2 <= wait <= ceiling for wait, ceiling in zip(clock.waits, ceilings, strict=True))
    assert len({wait / ceiling for wait, ceiling in zip(clock.waits, ceilings, strict=True)}) > 1  # at random
    server.refusals["/00000.tar"] = [(503, {})] * 8
    clock.waits.clear()
    remote.fetch(f"{server.url}/00000.tar", tmp_path / "copy")
    assert len(clock.waits) == 8


def test_a_busy_store_says_how_long_to_wait(server: Server, tmp_path: Path) -> None:
    clock = _Clock()
    remote = Remote(timeout_s=30, retries=2, patience_s=300, sleep=clock.waits.append, clock=clock)
    past, future = "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 21 Oct 2215 07:28:00 GMT"
    asked = ["7", "100000", past, future, "soon"]
    server.refusals["/00000.tar"] = [(429, {"Retry-After": value}) for value in asked]
    remote.fetch(f"{server.url}/00000.tar", tmp_path / "copy")
    assert clock.waits[0] == 7 and clock.waits[1] == 60 and clock.waits[3] == 60
    assert clock.waits[2] <= 2 and clock.waits[4] <= 8


def test_a_date_to_wait_for_is_of_the_clock_of_who_gives_it(server: Server, tmp_path: Path) -> None:
    clock = _Clock()
    remote = Remote(timeout_s=30, retries=2, sleep=clock.waits.append, clock=clock)
    of_store = {"Date": "Wed, 21 Oct 2015 07:28:00 GMT", "Retry-After": "Wed, 21 Oct 2015 07:28:21 GMT"}
    server.refusals["/00000.tar"] = [(429, of_store)]
    remote.fetch(f"{server.url}/00000.tar", tmp_path / "copy")
    assert clock.waits == [21]


def test_patience_must_end_before_the_readers_are_taken_for_lost(server: Server, tmp_path: Path) -> None:
    config = _config([f"{server.url}/00000.tar"], tmp_path / "cache", stall_timeout_s=60)
    with pytest.raises(DataError, match=r"data\.remote_patience_s=600 is not below data\.stall_timeout_s=60"):
        _reader(config)


def test_a_server_that_does_not_answer_is_given_up_and_asked_again(server: Server, tmp_path: Path) -> None:
    server.hangs["/00001.tar"] = 1
    _remote(timeout_s=0.5, retries=99).fetch(f"{server.url}/00001.tar", tmp_path / "copy")
    assert server.gets["/00001.tar"] >= 2


def test_what_does_not_exist_is_not_asked_for_twice(server: Server, tmp_path: Path) -> None:
    with pytest.raises(Absent):
        _remote().fetch(f"{server.url}/none.tar", tmp_path / "copy")
    assert server.gets["/none.tar"] == 1
    with pytest.raises(DataError, match=r"none\.tar.*correct data\.shards"):
        _reader(_config([f"{server.url}/none.tar"], tmp_path / "cache"))


def test_a_remote_shard_needs_a_cache(server: Server) -> None:
    with pytest.raises(DataError, match=r"set data\.cache_dir"):
        _reader(DataConfig(shards=[f"{server.url}/00000.tar"]))


def test_an_unknown_protocol_names_the_extra(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"eva-megatron\[remote\]"):
        _remote().fetch("nowhere://x.tar", tmp_path / "copy")


def _read_all(descriptor: int) -> bytes:
    with open(descriptor, "rb") as stream:
        return stream.read()


def test_the_least_recently_used_copy_goes_first(server: Server, shards: list[str], tmp_path: Path) -> None:
    room = sum(os.path.getsize(shard) for shard in shards[:2])
    cache = ShardCache(tmp_path / "cache", max_bytes=max(room, os.path.getsize(shards[2]) * 2), remote=_remote())
    urls = [f"{server.url}/{Path(shard).name}" for shard in shards]
    held = cache.open(urls[0])
    os.close(cache.open(urls[1]))
    os.utime(held, ns=(1, 1))  # long ago
    os.close(cache.open(urls[2]))
    kept = sorted(file.name.rpartition("-")[2] for file in (tmp_path / "cache").glob("*.tar"))
    assert kept == ["00001.tar", "00002.tar"]
    assert _read_all(held) == Path(shards[0]).read_bytes()  # whoever has it open may go on
    assert _read_all(cache.open(urls[0])) == Path(shards[0]).read_bytes()
    assert server.gets["/00000.tar"] == 2


def test_what_was_used_last_stays_though_the_clock_was_set_back(
    server: Server, shards: list[str], tmp_path: Path
) -> None:
    room = max(sum(os.path.getsize(shard) for shard in pair) for pair in (shards[:2], shards[1:3]))
    cache = ShardCache(tmp_path / "cache", max_bytes=room, remote=_remote())
    urls = [f"{server.url}/{Path(shard).name}" for shard in shards]
    os.close(cache.open(urls[0]))
    for file in (tmp_path / "cache" / "used.lock", *(tmp_path / "cache").glob("*.tar")):
        os.utime(file, (4e9, 4e9))
    os.close(cache.open(urls[1]))
    os.close(cache.open(urls[2]))
    kept = sorted(file.name.rpartition("-")[2] for file in (tmp_path / "cache").glob("*.tar"))
    assert kept == ["00001.tar", "00002.tar"]


def test_a_part_that_is_being_fetched_stays_though_the_clock_was_set_forward(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    parts = [folder / f"{start}{22 * '0'}-a.tar.whole.part" for start in ("aa", "bb")]
    for part in parts:
        part.touch()
        os.utime(part, (1, 1))
    with open(folder / "aa.lock", "wb") as fetching:
        fcntl.flock(fetching, fcntl.LOCK_EX)
        os.close(ShardCache(folder, max_bytes=10**9, remote=_remote()).open(f"{server.url}/00000.tar"))
        assert [part.exists() for part in parts] == [True, False]


def test_a_shard_beyond_the_bound_is_an_error(server: Server, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", max_bytes=1000, remote=_remote())
    with pytest.raises(DataError, match=r"more than data\.cache_gb=1e-06"):
        cache.open(f"{server.url}/00000.tar")


def _open_all(folder: str, urls: list[str], results: "multiprocessing.Queue[list[int]]") -> None:
    cache = ShardCache(Path(folder), max_bytes=10**9, remote=_remote())
    results.put([len(_read_all(cache.open(url))) for url in urls])


def test_processes_share_a_cache_and_fetch_each_shard_once(server: Server, shards: list[str], tmp_path: Path) -> None:
    urls = [f"{server.url}/{Path(shard).name}" for shard in shards]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    readers = [context.Process(target=_open_all, args=(str(tmp_path / "cache"), urls, results)) for _ in range(4)]
    for reader in readers:
        reader.start()
    sizes = [results.get(timeout=300) for _ in readers]
    for reader in readers:
        reader.join()
    assert sizes == [[os.path.getsize(shard) for shard in shards]] * 4
    assert [server.gets[f"/{Path(shard).name}"] for shard in shards] == [1, 1, 1]
