"""Embeddings to a file, block by block: .npz or .parquet. It has its name only when it is whole and was read back.

What is written is checked twice: every row before it goes out (finite and not zero, unless it is marked as having no
value), and the finished file, column by column, against a digest of the rows that went in.
"""

import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine.checkpoint.format.errors import CheckpointError

_CHUNK_BYTES = 2**24


class Sink(Protocol):
    """Where rows go, in input order."""

    partial: Path
    """The file until it is checked."""

    def write(self, columns: dict[str, np.ndarray]) -> None: ...

    def finish(self) -> None:
        """Complete `partial`."""

    def discard(self) -> None:
        """Remove whatever was begun."""

    def read_back(self, name: str) -> Iterator[bytes]:
        """The bytes of a column of the finished file, as `_bytes_of` gives them."""


def check_ending(path: Path) -> None:
    """Raises CheckpointError for an ending that no sink writes, or parquet without pyarrow."""
    if path.suffix not in (".npz", ".parquet"):
        raise CheckpointError(f"--out {path} must end in .npz or .parquet")
    if path.suffix == ".parquet":
        _import_arrow()


@contextmanager
def open_table(path: Path) -> Iterator["Table"]:
    """A table that is complete and checked at the end of the block, and nowhere to be seen after an error."""
    check_ending(path)
    table = Table(path, NpzSink(path) if path.suffix == ".npz" else ParquetSink(path))
    try:
        yield table
        table.close()
    except BaseException:
        table.discard()
        raise


class Table:
    """Rows of embeddings, numbers and texts, checked on their way and in the file."""

    def __init__(self, path: Path, sink: Sink):
        self._path, self._sink = path, sink
        self._seen: dict[str, Any] = {}
        """name -> digest of the rows that went in."""
        self.rows = 0

    def write(self, columns: dict[str, np.ndarray], valid: dict[str, np.ndarray] | None = None) -> None:
        """Append rows: float arrays [n, D], numbers or strings [n].

        valid: bool [n] by column; the rows that are not stand as NaN. Raises CheckpointError for any other row
        that is not finite or zero.
        """
        for name, values in columns.items():
            if values.dtype.kind == "f" and values.ndim == 2:
                _check_rows(name, values, (valid or {}).get(name), self.rows)
            digest = self._seen.setdefault(name, blake2b())
            for piece in _bytes_of(values):
                digest.update(piece)
        self._sink.write(columns)
        self.rows += max((len(values) for values in columns.values()), default=0)

    def close(self) -> None:
        """Complete the file, read it back, give it its name. Raises CheckpointError if it does not hold the rows."""
        self._sink.finish()
        for name, digest in self._seen.items():
            found = blake2b()
            for piece in self._sink.read_back(name):
                found.update(piece)
            if found.digest() != digest.digest():
                raise CheckpointError(f"{self._path}: column {name} does not read back as written; is the disk sound?")
        os.replace(self._sink.partial, self._path)

    def discard(self) -> None:
        """Leave nothing behind."""
        self._sink.discard()


def _check_rows(name: str, values: np.ndarray, valid: np.ndarray | None, first: int) -> None:
    rows = np.arange(len(values)) if valid is None else np.flatnonzero(valid)
    good = np.isfinite(values[rows]).all(axis=1) & (values[rows] != 0).any(axis=1)
    if not good.all():
        raise CheckpointError(
            f"{int((~good).sum())} rows of {name} are zero or not finite, first row {first + int(rows[~good][0])}: "
            "check the weights of the checkpoint, and train.precision"
        )


def _bytes_of(values: np.ndarray) -> Iterator[bytes]:
    """The same bytes whatever the format: of numbers theirs, of texts UTF-8 with an end mark each."""
    if values.dtype.kind == "U":
        yield from (text.encode() + b"\0" for text in values.tolist())
    else:
        yield np.ascontiguousarray(values).tobytes()


class _RawColumn:
    """One column on its way into an .npz."""

    def __init__(self, path: Path, values: np.ndarray):
        self.path, self.file = path, path.open("wb")
        self.rows, self.shape, self.dtype = 0, values.shape[1:], values.dtype

    def append(self, values: np.ndarray) -> None:
        if values.shape[1:] != self.shape or values.dtype != self.dtype:
            raise CheckpointError(
                f"{self.path}: rows of {values.shape[1:]} {values.dtype} after {self.shape} {self.dtype}"
            )
        self.file.write(np.ascontiguousarray(values).tobytes())
        self.rows += len(values)


class NpzSink:
    """Rows are appended to one raw file a column; `finish` puts them together as an uncompressed .npz."""

    def __init__(self, path: Path):
        self._path, self.partial = path, path.with_name(path.name + ".partial")
        self._columns: dict[str, _RawColumn] = {}
        self._texts: dict[str, list[str]] = {}

    def write(self, columns: dict[str, np.ndarray]) -> None:
        """Append rows."""
        for name, values in columns.items():
            if values.dtype.kind == "U":
                self._texts.setdefault(name, []).extend(values.tolist())
                continue
            if name not in self._columns:
                self._columns[name] = _RawColumn(self._path.with_name(f"{self._path.name}.{name}.partial"), values)
            self._columns[name].append(values)

    def finish(self) -> None:
        """Put the columns together."""
        with zipfile.ZipFile(self.partial, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, column in self._columns.items():
                column.file.close()
                descr = np.lib.format.dtype_to_descr(column.dtype)
                header = {"descr": descr, "fortran_order": False, "shape": (column.rows, *column.shape)}
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_2_0(member, header)
                    with column.path.open("rb") as source:
                        shutil.copyfileobj(source, member, _CHUNK_BYTES)
                column.path.unlink()
            for name, texts in self._texts.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.array(texts, dtype=np.str_), allow_pickle=False)

    def read_back(self, name: str) -> Iterator[bytes]:
        """Numbers a chunk at a time."""
        if name in self._texts:
            with np.load(self.partial, allow_pickle=False) as arrays:
                yield from _bytes_of(arrays[name])
            return
        column = self._columns[name]
        with zipfile.ZipFile(self.partial) as archive, archive.open(f"{name}.npy") as member:
            np.lib.format.read_magic(member)
            shape, _, dtype = np.lib.format.read_array_header_2_0(member)
            if (shape, dtype) != ((column.rows, *column.shape), column.dtype):
                raise CheckpointError(f"{self._path}: column {name} reads back as {shape} {dtype}")
            while chunk := member.read(_CHUNK_BYTES):
                yield chunk

    def discard(self) -> None:
        """Remove the partial files."""
        for column in self._columns.values():
            column.file.close()
            column.path.unlink(missing_ok=True)
        self.partial.unlink(missing_ok=True)


def _import_arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:  # also of one that is not for this NumPy
        why = f"parquet needs pyarrow ({error}): pip install 'eva-megatron[parquet]', or write .npz"
        raise CheckpointError(why) from None
    return pyarrow, pyarrow.parquet


def has_parquet() -> bool:
    """Whether pyarrow is here and can be imported beside this NumPy."""
    try:
        _import_arrow()
    except CheckpointError:
        return False
    return True


class ParquetSink:
    """One row group a block; an embedding is a fixed-size list of float32."""

    def __init__(self, path: Path):
        self._arrow, self._parquet = _import_arrow()
        self.partial = path.with_name(path.name + ".partial")
        self._writer: Any = None

    def write(self, columns: dict[str, np.ndarray]) -> None:
        """Append rows; every block must have the same columns, all of the same length."""
        lengths = {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) != 1:
            raise CheckpointError(f"parquet has rows, but the columns differ in length: {lengths}; write .npz instead")
        table = self._arrow.table({name: self._column(values) for name, values in columns.items()})
        if self._writer is None:
            self._writer = self._parquet.ParquetWriter(self.partial, table.schema)
        self._writer.write_table(table)

    def _column(self, values: np.ndarray) -> Any:
        if values.ndim == 1:
            return self._arrow.array(values.tolist() if values.dtype.kind == "U" else values)
        return self._arrow.FixedSizeListArray.from_arrays(self._arrow.array(values.reshape(-1)), values.shape[1])

    def finish(self) -> None:
        """Write the footer. Raises CheckpointError if there was not one row."""
        if self._writer is None:
            raise CheckpointError(f"{self.partial}: there is no row to write")
        self._writer.close()

    def read_back(self, name: str) -> Iterator[bytes]:
        """A batch of rows at a time."""
        with self._parquet.ParquetFile(self.partial) as file:
            for batch in file.iter_batches(columns=[name]):
                column = batch.column(0)
                if self._arrow.types.is_string(column.type):
                    yield from _bytes_of(np.array(column.to_pylist(), dtype=np.str_))
                else:
                    flat = column.flatten() if self._arrow.types.is_fixed_size_list(column.type) else column
                    yield from _bytes_of(flat.to_numpy(zero_copy_only=False))

    def discard(self) -> None:
        """Remove the partial file."""
        if self._writer is not None:
            self._writer.close()
        self.partial.unlink(missing_ok=True)
