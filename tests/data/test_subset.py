"""A subset and weights choose samples of shards that stay as they are, by a function of the position alone."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import DataConfig, SourceConfig
from data.errors import DataError
from data.fingerprint import differences, fingerprint
from data.shards import subset_table
from data.shards.storage import Storage
from data.shards.subset_table import identifier_of_uid, identifiers_of_keys, open_subset
from data.shards.write import write_shard
from data.sources import Sources, check_shards
from tests.data.shard_factory import good_sample
from tools.index_shards import index_shards

COUNTS = [5, 1, 7, 4]
TOTAL = sum(COUNTS)


def _uid(number: int) -> str:
    return blake2b(f"uid {number}".encode(), digest_size=16).hexdigest()


def _shards(folder: Path, *, nameless: tuple[int, ...] = ()) -> list[str]:
    """Sample n has the key good{n} and the uid _uid(n)."""
    paths, first = [], 0
    for shard, count in enumerate(COUNTS):
        samples = []
        for number in range(first, first + count):
            key, members = good_sample(number)
            metadata = b"{}" if number in nameless else f'{{"uid": "{_uid(number)}"}}'.encode()
            samples.append((key, {**members, "json": metadata}))
        paths.append(str(folder / f"{shard:05d}.tar"))
        write_shard(paths[-1], samples)
        first += count
    return paths


def _pairs(numbers: list[int]) -> np.ndarray:
    return np.array([identifier_of_uid(_uid(number)) for number in numbers], dtype="u8,u8")


def _sources(config: DataConfig, *, train: bool = True, seed: int = 0) -> Sources:
    return Sources(config, seed=seed, train=train, global_batch_size=4)


def _keys(sources: Sources, positions: range | np.ndarray) -> list[int]:
    shards, samples = sources.order.locate(np.asarray(positions, dtype=np.int64))
    names = [sources.index(shard).key(sample) for shard, sample in zip(shards.tolist(), samples.tolist(), strict=True)]
    return [int(name.removeprefix("good")) for name in names]


def _npy(path: Path, rows: np.ndarray) -> str:
    np.save(path, rows)
    return str(path)


def _parquet(path: Path, **columns: Any) -> str:
    parquet, table = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow").table
    parquet.write_table(table(columns), path)
    return str(path)


WANTED = [0, 3, 6, 7, 12, 16]
FILES: dict[str, Callable[[Path], str]] = {
    "datacomp": lambda folder: _npy(folder / "s.npy", np.sort(_pairs(WANTED))),
    "unsorted and repeated": lambda folder: _npy(folder / "s.npy", _pairs([*WANTED[::-1], 3, 99])),
    "uids": lambda folder: _npy(folder / "s.npy", np.array([_uid(n).upper() for n in WANTED])),
    "keys": lambda folder: _npy(folder / "s.npy", np.array([f"good{n}" for n in WANTED])),
    "bytes": lambda folder: _npy(folder / "s.npy", np.array([f"good{n}".encode() for n in WANTED])),
    "parquet of uids": lambda folder: _parquet(folder / "s.parquet", uid=[_uid(n) for n in WANTED], url=["x"] * 6),
    "parquet of keys": lambda folder: _parquet(folder / "s.parquet", key=[f"good{n}" for n in WANTED]),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_epoch_has_what_the_file_names(kind: str, tmp_path: Path) -> None:
    config = DataConfig(shards=_shards(tmp_path), subset=FILES[kind](tmp_path), shuffle_group_shards=2)
    check_shards(config)
    for sources in (_sources(config), _sources(config)):  # the second reads what the first has kept
        assert sources.order.totals == [len(WANTED)]
        first, second = (_keys(sources, range(start, start + 6)) for start in (0, 6))
        assert sorted(first) == sorted(second) == WANTED
        assert first != second
        assert sources.subsets() == [f"data.shards: 6 of {TOTAL} samples are in {config.subset}"]
    assert _keys(_sources(config, train=False), range(6)) == WANTED
    assert len(list(tmp_path.glob("*.tar.subset-*.npz"))) == len(COUNTS)


def test_the_order_is_a_function_of_the_position(tmp_path: Path) -> None:
    config = DataConfig(shards=_shards(tmp_path), subset=FILES["datacomp"](tmp_path), shuffle_group_shards=2)
    whole = _keys(_sources(config), range(30))
    scrambled = np.random.default_rng(0).permutation(30)
    assert [whole[position] for position in scrambled] == _keys(_sources(config), scrambled)
    assert whole != _keys(_sources(config, seed=1), range(30))


def test_a_table_of_many_rows_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subset_table, "_ROWS_AT_ONCE", 100)  # several pieces
    rows = np.random.default_rng(0).integers(0, 2**64, (1001, 2), dtype=np.uint64)
    rows[::3, 0] = rows[0, 0]  # equal high halves: the low one decides
    order = np.lexsort((rows[:, 1], rows[:, 0]))
    for chosen in (rows, rows[order]):
        pairs = np.ascontiguousarray(chosen).view("u8,u8").reshape(-1)
        table = open_subset(_npy(tmp_path / "many.npy", pairs), "", Storage())
        found = table.find(rows)
        assert (np.asarray(table.identifiers[found]) == rows).all()
        assert (table.find(rows ^ np.uint64(1)) == -1).all()
    assert isinstance(table.identifiers, np.memmap)


def test_weights_are_expected_appearances(tmp_path: Path) -> None:
    weights = {n: w for n, w in enumerate([0.5, 0, 2.25, 1, 1, 3, 0.25, 0.25, 1.5, 0, 0, 0, 0, 1, 1, 0.75, 0.5])}
    file = _parquet(tmp_path / "w.parquet", uid=[_uid(n) for n in weights], weight=[float(w) for w in weights.values()])
    config = DataConfig(shards=_shards(tmp_path), subset=file, subset_weights="weight")
    sources, epochs = _sources(config), 400
    total = round(sum(weights.values()))
    assert sources.order.totals == [total]
    keys = _keys(sources, range(epochs * total))
    seen = Counter(keys)
    assert sum(seen.values()) == epochs * total and not {n for n, w in weights.items() if not w} & set(seen)
    per_shard = [
        sum(weights[n] for n in range(first, first + count)) for first, count in ((0, 5), (5, 1), (6, 7), (13, 4))
    ]
    picks = np.diff(np.round(np.cumsum([0, *per_shard])))
    for number, weight in weights.items():
        shard = 0 if number < 5 else 1 if number < 6 else 2 if number < 13 else 3
        wanted = weight * picks[shard] / per_shard[shard]
        assert abs(seen[number] / epochs - wanted) < 0.1, number
        for epoch in range(20):
            times = keys[epoch * total : (epoch + 1) * total].count(number)
            assert int(wanted) <= times <= int(wanted) + 1
    assert sorted(_keys(_sources(config, train=False), range(12))) == [n for n, w in weights.items() if w]


def test_sources_have_subsets_of_their_own(tmp_path: Path) -> None:
    shards = _shards(tmp_path)
    config = DataConfig(
        sources=[
            SourceConfig(name="a", shards=shards[:2]),
            SourceConfig(name="b", shards=shards[2:], subset=FILES["keys"](tmp_path)),
        ]
    )
    sources = _sources(config)
    assert sources.order.totals == [6, 4]
    assert set(_keys(sources, range(24))) == {0, 1, 2, 3, 4, 5, 6, 7, 12, 16}
    assert _keys(_sources(config, train=False), range(10)) == [0, 1, 2, 3, 4, 5, 6, 7, 12, 16]
    with pytest.raises(DataError, match="give each source a subset of its own"):
        replace(config, subset="x.npy").check()
    with pytest.raises(DataError, match=r"data\.subset, which is empty"):
        DataConfig(shards=shards, subset_weights="w").check()


def test_it_is_found_ahead_of_a_run(tmp_path: Path) -> None:
    config = DataConfig(shards=_shards(tmp_path), subset=FILES["unsorted and repeated"](tmp_path))
    summary = index_shards(config.shards, Storage(), workers=1, subset=config)
    assert summary["subset"] == {"file": config.subset, "samples": 6, "weight": 6, "without_uid": 0}
    assert len(list(tmp_path.glob("*.tar.subset-*.npz"))) == len(COUNTS)


def test_samples_without_a_uid_are_left_out_and_said(tmp_path: Path) -> None:
    config = DataConfig(shards=_shards(tmp_path, nameless=(3, 4)), subset=FILES["datacomp"](tmp_path))
    sources = _sources(config)
    assert sources.order.totals == [5]
    assert "2 samples have no uid and are left out" in sources.subsets()[0]


def test_another_subset_is_other_data(tmp_path: Path) -> None:
    shards = _shards(tmp_path)
    prints = []
    for number, wanted in enumerate(([0, 3, 6], [0, 4, 6], [0, 4])):
        config = DataConfig(shards=shards, subset=_npy(tmp_path / f"{number}.npy", _pairs(wanted)))
        prints.append(fingerprint(config, _sources(config), seed=0, global_batch_size=4))
    assert not differences(prints[0], prints[0], position=4)
    assert "another choice of data.subset" in differences(prints[0], prints[1], position=4)[0]
    assert "other sample counts" in differences(prints[0], prints[2], position=4)[0]


WRONG: dict[str, tuple[Callable[[Path], str], str, str]] = {
    "missing": (lambda folder: str(folder / "s.npy"), "", "does not exist"),
    "ending": (
        lambda folder: str(Path(_npy(folder / "s.npy", _pairs([1]))).rename(folder / "s.txt")),
        "",
        "must end in",
    ),
    "numbers": (lambda folder: _npy(folder / "s.npy", np.arange(3)), "", "holds int64"),
    "objects": (lambda folder: _npy(folder / "s.npy", np.array(["a", None])), "", "cannot be read"),
    "column of a npy": (lambda folder: _npy(folder / "s.npy", _pairs([1])), "w", "has none: use a .parquet"),
    "no column": (lambda folder: _parquet(folder / "s.parquet", url=["x"]), "", "must be called uid or key"),
    "no weights": (lambda folder: _parquet(folder / "s.parquet", key=["x"]), "w", r"data\.subset_weights=w"),
    "short uid": (lambda folder: _parquet(folder / "s.parquet", uid=["12ab"]), "", "row 0: '12ab' is no uid"),
    "negative": (
        lambda folder: _parquet(folder / "s.parquet", key=["good1"], w=[-1.0]),
        "w",
        "row 0: -1.0 is no weight",
    ),
    "nan": (lambda folder: _parquet(folder / "s.parquet", key=["good1"], w=[float("nan")]), "w", "nan is no weight"),
    "two weights": (
        lambda folder: _parquet(folder / "s.parquet", key=["a", "a"], w=[1.0, 2.0]),
        "w",
        "with two weights",
    ),
    "others": (lambda folder: _npy(folder / "s.npy", _pairs([98, 99])), "", "names no sample of the 4 shards"),
    "nothing": (lambda folder: _parquet(folder / "s.parquet", key=["good1"], w=[0.1]), "w", "less than one sample"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_file_that_cannot_be_used_is_one_line(kind: str, tmp_path: Path) -> None:
    make, weights, message = WRONG[kind]
    config = DataConfig(shards=_shards(tmp_path), subset=make(tmp_path), subset_weights=weights)
    with pytest.raises(DataError, match=message) as caught:
        check_shards(config)
        _ = _sources(config).order
    assert "\n" not in str(caught.value)


def test_keys_are_compared_as_bytes() -> None:
    assert (identifiers_of_keys([b"a", b"b"]) == identifiers_of_keys(iter([b"a", b"b"]))).all()
    assert identifier_of_uid("0" * 31) is None and identifier_of_uid(7) is None
