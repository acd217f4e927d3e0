"""Shards as real writers make them: GNU tar in all its formats, Python, webdataset, img2dataset, cat.

Every case is read by the training reader itself, and says which keys come out, which are bad and why, and what else of
the tar is counted.
"""

import logging
import os
import shutil
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.errors import DataError
from data.reader import SampleReader
from data.shards.index import ShardIndex
from data.shards.index_store import load_index
from data.shards.storage import Storage
from tests.data.shard_factory import encode, picture

needs_gnu_tar = pytest.mark.skipif(
    shutil.which("tar") is None or b"GNU tar" not in subprocess.run(["tar", "--version"], capture_output=True).stdout,
    reason="GNU tar is not there",
)
NAMES = ["a", "img_7 v2.0 (clean)", "photo.v2", "22.05", "ünï", "n" * 120, "deep/" * 30 + "file"]


def _write_samples(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.png").write_bytes(encode(picture(number)))
        (folder / f"{name}.txt").write_text(f"picture number {number}")


def _tar(*arguments: str | Path, cwd: Path) -> None:
    subprocess.run(["tar", *map(str, arguments)], cwd=cwd, check=True, capture_output=True)


def _index(path: Path) -> ShardIndex:
    return load_index(str(path), Storage())


def _read(*paths: Path) -> tuple[dict[str, str], Counter[str]]:
    """(caption by key of all good samples, bad samples by reason) of one pass over the shards."""
    config = DataConfig(shards=[str(path) for path in paths], workers=0)
    reader = SampleReader(config, image_size=32, context_length=16, seed=0, train=False)
    captions, bad = {}, Counter[str]()
    for position in range(reader.total_samples):
        seen = reader.look_at(position)
        if isinstance(seen, tuple):
            captions[seen[0].key] = seen[0].caption
        else:
            bad[seen.reason] += 1
    return captions, bad


def _expected(names: list[str], folder: str = "") -> dict[str, str]:
    return {f"{folder}{name}": f"picture number {number}" for number, name in enumerate(names)}


@needs_gnu_tar
@pytest.mark.parametrize("form", ["gnu", "oldgnu", "pax", "posix", "ustar"])
def test_gnu_tar_in_every_format(tmp_path: Path, form: str) -> None:
    names = NAMES if form != "ustar" else [name for name in NAMES if len(name) < 95]
    (tmp_path / "in").mkdir()
    _write_samples(tmp_path / "in", names)
    shard = tmp_path / "x.tar"
    _tar(f"--format={form}", "-cf", shard, "-C", "in", ".", cwd=tmp_path)
    captions, bad = _read(shard)
    assert captions == _expected(names, "./") and not bad
    assert set(_index(shard).odd) == {"directory"}


@needs_gnu_tar
@pytest.mark.parametrize(
    "form", ["--format=gnu", *(f"--format=posix --sparse-version={v}" for v in ("0.0", "0.1", "1.0"))]
)
def test_sparse_members_are_read_with_their_zeros(tmp_path: Path, form: str) -> None:
    _write_samples(tmp_path, ["before", "holes", "behind"])
    with open(tmp_path / "holes.png", "r+b") as file:
        file.truncate(200_000)  # zeros behind a picture do not hurt it
        for at in range(65_536, 200_000, 40_960):  # more stretches than a header holds
            file.seek(at)
            file.write(b"x" * 4096)
    content = (tmp_path / "holes.png").read_bytes()
    (tmp_path / "hole.png").write_bytes(b"")
    os.truncate(tmp_path / "hole.png", 100_000)
    (tmp_path / "hole.txt").write_text("nothing but a hole")
    shard = tmp_path / "x.tar"
    files = [f"{name}.{suffix}" for name in ("before", "holes", "hole", "behind") for suffix in ("png", "txt")]
    _tar(*form.split(), "--sparse", "--hole-detection=raw", "-cf", shard, *files, cwd=tmp_path)
    assert os.path.getsize(shard) < 120_000  # it is sparse
    index, tar = _index(shard), shard.read_bytes()
    span = index.span(1, 0)  # type: ignore[arg-type]
    assert span is not None and index.read(span, lambda offset, size: tar[offset : offset + size]) == content
    captions, bad = _read(shard)
    assert captions == _expected(["before", "holes", "behind"]) and bad == {"not_an_image": 1}


def test_a_sparse_member_of_a_terabyte_is_a_bad_sample(tmp_path: Path) -> None:
    shard = tmp_path / "x.tar"
    with tarfile.open(shard, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, headers in (
            ("good.png", {}),
            ("bomb.png", {"GNU.sparse.map": "0,10", "GNU.sparse.size": str(1 << 40)}),
        ):
            for suffix in (".png", ".txt"):
                content = encode(picture(0)) if suffix == ".png" else b"words"
                member = tarfile.TarInfo(name.replace(".png", suffix))
                member.size = len(content)
                if suffix == ".png":
                    member.pax_headers = headers
                tar.addfile(member, BytesIO(content))
    captions, bad = _read(shard)
    assert list(captions) == ["good"] and bad == {"member_too_large": 1}


@needs_gnu_tar
def test_appended_tars(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _write_samples(tmp_path, NAMES[:4])
    for number, name in enumerate(NAMES[:4]):
        _tar("-cf", f"{number}.tar", f"{name}.png", f"{name}.txt", cwd=tmp_path)
    shutil.copy(tmp_path / "0.tar", tmp_path / "joined.tar")
    _tar("-A", "-f", "joined.tar", "1.tar", cwd=tmp_path)
    parts = [(tmp_path / name).read_bytes() for name in ("joined.tar", "2.tar", "3.tar")]
    (tmp_path / "joined.tar").write_bytes(b"".join(parts))  # cat: with end marks in between
    captions, bad = _read(tmp_path / "joined.tar")
    assert captions == _expected(NAMES[:4]) and not bad
    assert _index(tmp_path / "joined.tar").odd == {"behind_end_mark": 4}
    assert "4 behind_end_mark" in caplog.text


@needs_gnu_tar
def test_links_and_members_that_are_no_files(tmp_path: Path) -> None:
    _write_samples(tmp_path, ["a", "folder/b"])
    os.link(tmp_path / "a.png", tmp_path / "hard.png")
    os.link(tmp_path / "a.txt", tmp_path / "hard.txt")
    os.symlink("../a.png", tmp_path / "folder" / "soft.png")
    os.symlink("b.txt", tmp_path / "folder" / "soft.txt")
    os.symlink("soft.png", tmp_path / "folder" / "chain.png")
    os.symlink("/outside.txt", tmp_path / "folder" / "chain.txt")
    os.symlink("loop.png", tmp_path / "loop.png")
    os.mkfifo(tmp_path / "pipe.jpg")
    names = ["a.png", "a.txt", "hard.png", "hard.txt", "folder", "loop.png", "pipe.jpg"]
    _tar("--label=volume", "-cf", "x.tar", *names, cwd=tmp_path)
    captions, bad = _read(tmp_path / "x.tar")
    assert captions == {
        "a": "picture number 0",
        "hard": "picture number 0",
        "folder/b": "picture number 1",
        "folder/soft": "picture number 1",
    }
    assert bad == {"missing_caption": 1}
    assert _index(tmp_path / "x.tar").odd == {"directory": 1, "dangling_link": 2, "other_type": 2}


@needs_gnu_tar
def test_an_updated_member_is_counted(tmp_path: Path) -> None:
    _write_samples(tmp_path, ["a"])
    _tar("-cf", "x.tar", "a.png", "a.txt", cwd=tmp_path)
    (tmp_path / "a.txt").write_text("another caption")
    _tar("-rf", "x.tar", "a.txt", cwd=tmp_path)
    assert _read(tmp_path / "x.tar")[0] == {"a": "picture number 0"}
    assert _index(tmp_path / "x.tar").odd == {"second_member": 1}


@needs_gnu_tar
def test_absolute_and_climbing_names(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    _write_samples(tmp_path, ["in/a", "b"])
    _tar("-P", "-cf", "x.tar", tmp_path / "in/a.png", tmp_path / "in/a.txt", cwd=tmp_path)
    _tar("-P", "-rf", "../x.tar", "../b.png", "../b.txt", cwd=tmp_path / "in")
    assert _read(tmp_path / "x.tar")[0] == {f"{tmp_path}/in/a": "picture number 0", "../b": "picture number 1"}


@needs_gnu_tar
def test_a_large_blocking_factor_and_a_lost_tail(tmp_path: Path) -> None:
    _write_samples(tmp_path, NAMES[:4])
    files = [f"{name}.{suffix}" for name in NAMES[:4] for suffix in ("png", "txt")]
    _tar("-cf", "x.tar", *files, cwd=tmp_path)
    whole = (tmp_path / "x.tar").read_bytes()
    third = whole.index(b"photo.v2.png")
    for name, content in (
        ("tail", whole[:third] + bytes(40_960)),
        ("hole", whole[:third] + bytes(512) + whole[third + 512 :]),
    ):
        (tmp_path / f"{name}.tar").write_bytes(content)
    index = _index(tmp_path / "tail.tar")
    assert len(index) == 2 and index.odd == {"zero_tail_bytes": 40_960}
    captions, bad = _read(tmp_path / "hole.tar")  # one header is zeros: the picture is lost, its bytes are counted
    assert set(captions) == {"a", NAMES[1], "22.05"} and bad == {"missing_image": 1}
    assert _index(tmp_path / "hole.tar").odd["skipped_bytes"] > 1000
    _tar("-b", "200", "-cf", "y.tar", *files, cwd=tmp_path)
    assert len(_read(tmp_path / "y.tar")[0]) == 4 and set(_index(tmp_path / "y.tar").odd) == {"zero_tail_bytes"}


@needs_gnu_tar
@pytest.mark.parametrize(("flag", "kind"), [("-z", "gzip"), ("-j", "bzip2"), ("-J", "xz")])
def test_a_compressed_tar_is_refused_with_its_kind(tmp_path: Path, flag: str, kind: str) -> None:
    if shutil.which(kind) is None:
        pytest.skip(f"{kind} is not there")
    _write_samples(tmp_path, ["a"])
    _tar(flag, "-cf", "x.tar", "a.png", "a.txt", cwd=tmp_path)
    with pytest.raises(DataError, match=f"it is {kind}-compressed: unpack it"):
        _index(tmp_path / "x.tar")


def _stream_writer(path: Path, names: list[str]) -> None:
    """As webdataset's and img2dataset's writers do it: a stream, owner and mode of their own."""
    with tarfile.open(path, "w|") as tar:
        for number, name in enumerate(names):
            json = f'{{"caption": "picture number {number}", "status": "success", "key": "{name}"}}'
            members = {
                "jpg": encode(picture(number), "JPEG"),
                "json": json.encode(),
                "txt": f"picture number {number}".encode(),
            }
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size, member.mode, member.uname, member.gname = len(content), 0o444, "bigdata", "bigdata"
                tar.addfile(member, BytesIO(content))


def test_img2dataset_with_a_shard_whose_urls_all_failed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"{number:09d}" for number in range(3)]
    for shard, keys in (("00000", names), ("00001", []), ("00002", [f"{n:09d}" for n in range(20_000, 20_002)])):
        _stream_writer(tmp_path / f"{shard}.tar", keys)
        (tmp_path / f"{shard}_stats.json").write_text("{}")
        (tmp_path / f"{shard}.parquet").write_bytes(b"PAR1")
    empty = tmp_path / "00001.tar"
    assert empty.read_bytes() == bytes(10_240)
    with caplog.at_level(logging.WARNING):
        captions, bad = _read(tmp_path)
    assert len(captions) == 5 and not bad
    assert f"{empty} holds no sample" in caplog.text
    config = DataConfig(shards=[str(tmp_path)], workers=0)
    training = SampleReader(config, image_size=32, context_length=16, seed=0, train=True)
    assert sorted(training.read(np.arange(5)).keys) == sorted(captions)
    with pytest.raises(DataError, match="the 1 shards hold no sample"):
        _read(empty)


def test_the_writer_of_webdataset(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        for number, name in enumerate(NAMES):
            writer.write({"__key__": name, "png": encode(picture(number)), "txt": f"picture number {number}"})
    assert _read(tmp_path / "x.tar") == (_expected(NAMES), Counter())


@pytest.fixture
def long_key(tmp_path: Path) -> Iterator[Path]:
    shard = tmp_path / "x.tar"
    with tarfile.open(shard, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("k" * 60_000, *(f"{number:06d}" for number in range(2000))):
            tar.addfile(tarfile.TarInfo(f"{name}.jpg"))
    yield shard


def test_one_long_key_costs_its_own_bytes(long_key: Path) -> None:
    index = _index(long_key)
    assert index.key(0) == "k" * 60_000 and index.key(2000) == "001999"
    assert os.path.getsize(f"{long_key}.index.npz") < 400_000
