"""Shard lists: every form of an entry, and one clear error for every mistake."""

from pathlib import Path

import pytest

from data.errors import DataError
from data.shards.listing import ShardFiles, expand_braces, expand_shards
from data.shards.storage import Storage


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("00000.tar", "00001.tar", "00002.tar", "notes.txt"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


@pytest.mark.parametrize("entry", ["{00000..00002}.tar", "0000{0,1,2}.tar", "*.tar", ""])
def test_every_form_names_the_shards_in_order(folder: Path, entry: str) -> None:
    assert expand_shards(f"{folder}/{entry}", Storage()) == [f"{folder}/0000{number}.tar" for number in range(3)]


def test_the_listed_order_is_kept(folder: Path) -> None:
    entries = [f"{folder}/00002.tar", f"{folder}/0000{{0..1}}.tar"]
    assert [Path(path).name for path in expand_shards(entries, Storage())] == ["00002.tar", "00000.tar", "00001.tar"]


def test_braces_multiply() -> None:
    assert expand_braces("{a,b}/{9..10}") == ["a/9", "a/10", "b/9", "b/10"]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([], "data.shards is empty"),
        (["{tmp}/{00001..00003}.tar"], "00003.tar .* does not exist"),
        (["{tmp}/x*.tar"], "matches no .tar file"),
        (["{tmp}/none.tar"], "does not exist"),
        (["{tmp}/{3..1}.tar"], "counts down"),
    ],
)
def test_a_wrong_entry_is_named(folder: Path, entries: list[str], words: str) -> None:
    with pytest.raises(DataError, match=words):
        expand_shards([entry.replace("{tmp}", str(folder)) for entry in entries], Storage())


def test_reading_with_few_open_files(folder: Path) -> None:
    files = ShardFiles(expand_shards(str(folder), Storage()), max_open=1, storage=Storage())
    assert [files.read(shard, 3, 20) for shard in (0, 1, 2, 0)] == [
        b"00.tar",
        b"01.tar",
        b"02.tar",
        b"00.tar",
    ]


def test_a_folder_with_brackets_in_its_name_is_that_folder(folder: Path) -> None:
    for name in ("[v2]", "a*b", "[!x]?"):
        (folder / name / "[0]").mkdir(parents=True)
        inner = folder / name / "[0]" / "7.tar"
        inner.write_bytes(b"")
        for entry in ("", "/*.tar", "/[0-9].tar", "/{7..7}.tar", "/7.tar", "/**/*.tar"):
            assert expand_shards(f"{folder}/{name}/[0]{entry}", Storage()) == [str(inner)]
        assert expand_shards(f"{folder}/{name}/*/*.tar", Storage()) == [str(inner)]
    assert expand_shards(f"{folder}/0000[0-1].tar", Storage()) == [f"{folder}/0000{number}.tar" for number in range(2)]
