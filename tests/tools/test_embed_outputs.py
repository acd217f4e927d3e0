"""Tables of embeddings: what goes in is what the file holds, in both formats, whatever the sizes of the blocks."""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.shards.subset_table import _parquet_columns
from engine.checkpoint.format.errors import CheckpointError
from tools.embed.outputs import NpzSink, has_parquet, open_table

ENDINGS = (".npz", ".parquet")


def rows(count: int, width: int, seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {
        "image_embeddings": draw.standard_normal((count, width), dtype=np.float32),
        "text_embeddings": draw.standard_normal((count, width), dtype=np.float32),
        "image_valid": draw.random(count) < 0.5,
        "label": draw.integers(0, 9, count),
        "keys": np.array([f"schlüssel {number} 🙂"[: 3 + number % 20] for number in range(count)]),
    }


def write(path: Path, columns: dict[str, np.ndarray], borders: list[int]) -> None:
    with open_table(path) as table:
        for first, last in pairwise(borders):
            table.write({name: values[first:last] for name, values in columns.items()})


def read(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".npz":
        return dict(np.load(path, allow_pickle=False))
    table = pytest.importorskip("pyarrow.parquet").read_table(path)
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for name, values in expected.items():
        kept = found[name].astype(np.float32) if values.dtype == np.float32 else found[name]
        assert np.array_equal(kept, values), name


@pytest.mark.parametrize("ending", ENDINGS)
def test_blocks_larger_than_every_buffer(tmp_path: Path, ending: str) -> None:
    """Four blocks of 4 MB: above Python's 8 KiB and 128 KiB buffers and Arrow's pages of 1 MiB."""
    columns = rows(4000, 1024)
    write(tmp_path / f"out{ending}", columns, [0, 1000, 2000, 3000, 4000])
    assert_equal(read(tmp_path / f"out{ending}"), columns)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), count=st.integers(1, 300), width=st.sampled_from([1, 7, 512]))
def test_any_blocks_in_both_formats(tmp_path: Path, data: st.DataObject, count: int, width: int) -> None:
    borders = [0, *sorted(data.draw(st.sets(st.integers(1, count), max_size=5)) - {count}), count]
    columns = rows(count, width, seed=count)
    for ending in ENDINGS:
        write(tmp_path / f"out{ending}", columns, borders)
        assert_equal(read(tmp_path / f"out{ending}"), columns)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_row_without_a_value_is_an_error_unless_it_is_marked(tmp_path: Path, ending: str, value: float) -> None:
    columns = rows(6, 4)
    columns["image_embeddings"][4] = value
    path = tmp_path / f"out{ending}"
    with pytest.raises(CheckpointError, match="1 rows of image_embeddings are zero or not finite, first row 4"):
        write(path, columns, [0, 3, 6])
    assert list(tmp_path.iterdir()) == []
    marked = {"image_embeddings": np.arange(6) != 4}
    with open_table(path) as table:
        table.write(columns, marked)
    assert np.array_equal(
        read(path)["image_embeddings"].astype(np.float32), columns["image_embeddings"], equal_nan=True
    )


def test_a_file_that_does_not_hold_the_rows_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = NpzSink.finish

    def damage(sink: NpzSink) -> None:
        finish(sink)
        content = bytearray(sink.partial.read_bytes())
        at = content.index(sink_bytes)
        content[at : at + 4] = b"\0\0\0\0"
        sink.partial.write_bytes(content)

    columns = {"image_embeddings": rows(600, 64)["image_embeddings"]}
    sink_bytes = columns["image_embeddings"][300].tobytes()
    monkeypatch.setattr(NpzSink, "finish", damage)
    with pytest.raises(Exception, match=r"does not read back as written|Bad CRC"):
        write(tmp_path / "out.npz", columns, [0, 600])
    assert list(tmp_path.iterdir()) == []


def test_a_pyarrow_that_cannot_be_imported_is_told_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the newest one with NumPy 1.26, which it refuses."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert not has_parquet()
    with pytest.raises(CheckpointError, match=r"parquet needs pyarrow \(.*None in sys.modules\): pip install"):
        write(tmp_path / "t.parquet", rows(1, 2), [0, 1])
    with pytest.raises(DataError, match=r"data.subset t.parquet needs pyarrow \(.*None in sys.modules\): pip install"):
        _parquet_columns("t.parquet", "")
