"""What somebody who gives us a file, or looks at ours, must not be able to do (docs/security.md)."""

import contextlib
import io
import json
import os
import pickle
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from data.errors import DataError
from data.pixels.decode import make_decoder
from data.shards.index_store import load_index
from data.shards.storage import Storage
from data.tokenizer import Tokenizer
from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.flat_slice import FlatSlice
from engine.checkpoint.format.manifest import Manifest, StoredPart, StoredTensor, write_manifest
from engine.checkpoint.format.tensor_file import FileRecord, TensorFile
from engine.checkpoint.reader import Checkpoint
from engine.checkpoint.state_dicts.files import open_state
from engine.config.errors import ConfigError
from engine.config.read import resolve


class _Bomb:
    """A pickle that touches a file when it is built."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.target,))


def test_no_code_of_a_file_runs(tmp_path: Path) -> None:
    for name in ("w.pt", "w.bin", "w.ckpt"):
        (tmp_path / name).write_bytes(pickle.dumps({"weight": _Bomb(tmp_path / "ran")}))
        with pytest.raises(CheckpointError):
            open_state(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../b", ".."])
def test_a_manifest_names_no_file_outside_its_folder(name: str, tmp_path: Path) -> None:
    whole = FlatSlice.whole((2,))
    for files, part in (({name: FileRecord(1, "0")}, "rank_00000.safetensors"), ({}, name)):
        tensors = {"weight/x": StoredTensor(torch.float32, (2,), [StoredPart(part, whole)])}
        write_manifest(tmp_path, Manifest(content="weights", config={}, layout={}, tensors=tensors, files=files))
        with pytest.raises(CheckpointError, match="lie in its folder"):
            Checkpoint(tmp_path)


def test_a_header_that_claims_more_than_there_is_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="claims"):
        TensorFile(path)
    header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="claims bytes"):
        TensorFile(path)


def test_tar_members_never_become_paths(tmp_path: Path) -> None:
    inside = tmp_path / "shards"
    inside.mkdir()
    with tarfile.open(inside / "0.tar", "w") as tar:
        for name in ("../../escaped.txt", "/tmp/escaped.txt", "ok.txt"):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
        link = tarfile.TarInfo("passwd.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with contextlib.suppress(DataError):  # no sample of it can be used: that is an answer, too
        load_index(str(inside / "0.tar"), Storage())
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert [name for name in left if "escaped" in name or "passwd" in name] == []
    assert not Path("/tmp/escaped.txt").exists()


def test_a_small_file_that_claims_a_huge_picture_is_not_decoded(tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = (60_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    with pytest.raises(Exception, match=r"3,?600,?000,?000|pixels"):
        make_decoder("auto", max_pixels=10**8).size(bomb)


def test_an_endless_caption_counts_by_its_beginning() -> None:
    tokenizer, endless = Tokenizer(77), ["a cat " * 100 + filler * 1_000_000 for filler in ("&amp;", "x" * 8, "Ã©")]
    assert (tokenizer.encode(endless) == tokenizer.encode(["a cat " * 100])).all()


@pytest.mark.parametrize("key", ["data.shards", "evaluate.shards"])
def test_a_password_in_a_url_is_refused_and_not_repeated(key: str) -> None:
    tree: dict = {"data": {"shards": ["x"]}, "evaluate": {"every_steps": 1}}
    section = key.split(".")[0]
    tree[section]["shards"] = ["https://user:s3cr3t@store.example/0.tar"]
    with pytest.raises(ConfigError) as refused:
        resolve(tree, [])
    assert "store.example" in str(refused.value) and key in str(refused.value) and "s3cr3t" not in str(refused.value)


def test_arrays_are_read_without_pickle(tmp_path: Path) -> None:
    np.save(tmp_path / "bomb.npy", np.array([_Bomb(tmp_path / "ran")], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        np.load(tmp_path / "bomb.npy", allow_pickle=False)
    sources = [path for room in ("engine", "models", "data", "tools") for path in Path(room).rglob("*.py")]
    loose = [str(path) for path in sources if "allow_pickle=True" in path.read_text()]
    loose += [str(path) for path in sources if "shell=True" in path.read_text() or "yaml.load(" in path.read_text()]
    assert loose == [] and len(sources) > 200 and not (tmp_path / "ran").exists()


def test_a_run_can_be_private(tmp_path: Path) -> None:
    """Files follow the umask of whoever starts the job: nothing is made readable on purpose."""
    before = os.umask(0o077)
    try:
        write_manifest(tmp_path, Manifest(content="weights", config={}, layout={}, tensors={}, files={}))
    finally:
        os.umask(before)
    assert (tmp_path / "manifest.json").stat().st_mode & 0o077 == 0
