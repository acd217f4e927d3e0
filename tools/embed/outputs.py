"""Embeddings to a file, block by block: .npz or .parquet. The file has its name only when it is whole."""

import os
import shutil
import zipfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine.checkpoint.format.errors import CheckpointError


class Sink(Protocol):
    """Where embeddings go, in input order."""

    def write(self, columns: dict[str, np.ndarray]) -> None: ...

    def close(self) -> None: ...


def open_sink(path: Path) -> Sink:
    """By the ending of `path`. Raises CheckpointError for another ending, or parquet without pyarrow."""
    if path.suffix not in (".npz", ".parquet"):
        raise CheckpointError(f"--out {path} must end in .npz or .parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    return NpzSink(path) if path.suffix == ".npz" else ParquetSink(path)


class NpzSink:
    """Rows are appended to one raw file a column; `close` puts them together as an uncompressed .npz."""

    def __init__(self, path: Path):
        self._path = path
        self._columns: dict[str, list] = {}
        """name -> [raw file, rows, shape of a row, dtype]."""
        self._texts: dict[str, list[str]] = {}

    def write(self, columns: dict[str, np.ndarray]) -> None:
        """Append rows: float arrays [n, D] or strings [n]."""
        for name, values in columns.items():
            if values.dtype.kind == "U":
                self._texts.setdefault(name, []).extend(values.tolist())
                continue
            values = np.ascontiguousarray(values)
            column = self._columns.setdefault(name, [self._raw(name).open("wb"), 0, values.shape[1:], values.dtype])
            column[0].write(values.tobytes())
            column[1] += len(values)

    def close(self) -> None:
        """Put the file in its place."""
        partial = self._path.with_name(self._path.name + ".partial")
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, (raw, rows, shape, dtype) in self._columns.items():
                raw.close()
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows, *shape)}
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_2_0(member, header)
                    with self._raw(name).open("rb") as source:
                        shutil.copyfileobj(source, member, 2**24)
                self._raw(name).unlink()
            for name, texts in self._texts.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.array(texts), allow_pickle=False)
        os.replace(partial, self._path)

    def _raw(self, name: str) -> Path:
        return self._path.with_name(f"{self._path.name}.{name}.partial")


class ParquetSink:
    """One row group a block; an embedding is a fixed-size list of float32."""

    def __init__(self, path: Path):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise CheckpointError("parquet needs pyarrow: pip install 'eva-megatron[parquet]', or write .npz") from None
        self._arrow, self._parquet = pyarrow, pyarrow.parquet
        self._path, self._partial = path, path.with_name(path.name + ".partial")
        self._writer: Any = None

    def write(self, columns: dict[str, np.ndarray]) -> None:
        """Append rows; every block must have the same columns, all of the same length."""
        lengths = {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) != 1:
            raise CheckpointError(f"parquet has rows, but the columns differ in length: {lengths}; write .npz instead")
        table = self._arrow.table({name: self._column(values) for name, values in columns.items()})
        if self._writer is None:
            self._writer = self._parquet.ParquetWriter(self._partial, table.schema)
        self._writer.write_table(table)

    def _column(self, values: np.ndarray):
        if values.ndim == 1:
            return self._arrow.array(values.tolist())
        return self._arrow.FixedSizeListArray.from_arrays(self._arrow.array(values.reshape(-1)), values.shape[1])

    def close(self) -> None:
        """Put the file in its place."""
        if self._writer is not None:
            self._writer.close()
            os.replace(self._partial, self._path)
