"""The list of samples that a run is restricted to: a sorted table of 128-bit identifiers, with a weight each.

Three kinds of files are read as people ship them:

* `.npy` of the structure (u8, u8): the halves of a sample's `uid`, as DataComp publishes its subsets (its
  webdataset-resharder, README). A sorted one is used where it lies, mapped into memory: a billion of them cost no
  memory, only the disk's 16 GB.
* `.npy` of strings: uids of 32 hexadecimal digits, or else keys of the samples.
* `.parquet` with a column `uid` (32 hexadecimal digits) or `key`, and any column of weights.

What is not a sorted table is made one: 16 bytes an identifier (20 with weights), kept beside the file or in
`data.cache_dir`. Keys enter as their 128-bit hash.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.shards.storage import Storage

UID, KEY = "uid", "key"
_UID = re.compile(r"[0-9a-fA-F]{32}")
_PAIR = np.dtype([("high", "<u8"), ("low", "<u8")])
_ROWS_AT_ONCE = 1 << 20
_MOST_APPEARANCES = 1_000_000

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SubsetTable:
    """Identifiers in rising order, and what they identify."""

    path: str
    """File that the user named."""
    by: str
    """uid (the field of that name in a sample's metadata) | key."""
    identifiers: np.ndarray
    """uint64 [n, 2]: high and low half, rising, none twice; mapped from a file where it can be."""
    weights: np.ndarray | None
    """float32 [n]: expected appearances of each in an epoch; None is one each."""

    def find(self, wanted: np.ndarray) -> np.ndarray:
        """wanted: uint64 [k, 2] -> int64 [k], the row of each; -1 where it is not in the table."""
        first = np.zeros(len(wanted), dtype=np.int64)
        last = np.full(len(wanted), len(self.identifiers), dtype=np.int64)
        while (open_ := first < last).any():
            middle = (first + last) // 2
            found = self.identifiers[np.where(open_, middle, 0)]
            below = open_ & _less(found, wanted)
            first = np.where(below, middle + 1, first)
            last = np.where(open_ & ~below, middle, last)
        inside = first < len(self.identifiers)
        rows = np.where(inside, first, 0)
        hit = inside & (self.identifiers[rows] == wanted).all(axis=1) if len(self.identifiers) else inside
        return np.where(hit, rows, -1)


def identifier_of_uid(uid: object) -> tuple[int, int] | None:
    """The halves of a uid of 32 hexadecimal digits; None for anything else."""
    if not isinstance(uid, str) or not _UID.fullmatch(uid):
        return None
    return int(uid[:16], 16), int(uid[16:], 16)


def identifiers_of_keys(keys: Iterable[bytes]) -> np.ndarray:
    """uint64 [k, 2]: hashes of sample keys."""
    hashes = b"".join(blake2b(key, digest_size=16).digest() for key in keys)
    return np.frombuffer(hashes, dtype="<u8").reshape(-1, 2)


def check_subset(path: str, weights: str) -> None:
    """Raise DataError for a subset that is not there or is no file of the three kinds; reads its head only."""
    if not Path(path).is_file():
        raise DataError(f"data.subset {path} does not exist: name a .npy of uids or keys, or a .parquet")
    if path.endswith(".npy"):
        if weights:
            raise DataError(f"data.subset_weights={weights} names a column, but {path} has none: use a .parquet")
        _open_npy(path)
    elif path.endswith(".parquet"):
        _parquet_columns(path, weights)
    else:
        raise DataError(f"data.subset {path} must end in .npy or .parquet")


def subset_digest(path: str, weights: str) -> str:
    """Name of this state of the file, and of the column, among files that depend on it. Raises DataError."""
    try:
        status = Path(path).stat()
    except OSError as error:
        raise DataError(f"data.subset {path} cannot be read ({error.strerror})") from error
    return blake2b(f"{status.st_size} {status.st_mtime_ns} {weights}".encode(), digest_size=6).hexdigest()


def open_subset(path: str, weights: str, storage: Storage) -> SubsetTable:
    """The table of a subset file; `weights` names a column of a .parquet, or is empty. Raises DataError."""
    check_subset(path, weights)
    digest = subset_digest(path, weights)
    if path.endswith(".npy"):
        rows = _open_npy(path)
        by = UID if rows.dtype.names or _all_uids(rows[:1]) else KEY
        if rows.dtype.names:
            pairs = rows.view("<u8").reshape(-1, 2)
            if _is_rising(pairs):
                return SubsetTable(path=path, by=by, identifiers=pairs, weights=None)
    else:
        by = _parquet_columns(path, weights)
    kept = _read_sorted(path, digest, storage, weights)
    if kept is None:
        kept = _sort_and_keep(path, digest, by, weights, storage)
    return SubsetTable(path=path, by=by, identifiers=kept[0], weights=kept[1])


def _less(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a[:, 0] < b[:, 0]) | ((a[:, 0] == b[:, 0]) & (a[:, 1] < b[:, 1]))


def _is_rising(pairs: np.ndarray) -> bool:
    """Whether every row is above the one before it; looks at the table in pieces."""
    for start in range(0, len(pairs) - 1, _ROWS_AT_ONCE):
        piece = pairs[start : start + _ROWS_AT_ONCE + 1]
        if not _less(piece[:-1], piece[1:]).all():
            return False
    return True


def _open_npy(path: str) -> np.ndarray:
    """The rows, mapped. Raises DataError for other contents."""
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"data.subset {path} cannot be read ({error}): save uids as dtype 'u8,u8' or strings"
        ) from error
    halves = [rows.dtype[name] for name in rows.dtype.names] if rows.dtype.names else []
    pairs = len(halves) == 2 and all(half == np.dtype("u8") for half in halves) and rows.dtype.itemsize == 16
    if rows.ndim != 1 or not (pairs or rows.dtype.kind in "US"):
        raise DataError(
            f"data.subset {path} holds {rows.dtype} {list(rows.shape)}: one row of dtype 'u8,u8' (uids) or of strings "
            "(uids of 32 hexadecimal digits, or keys) is read"
        )
    return rows


def _all_uids(strings: np.ndarray) -> bool:
    return all(_UID.fullmatch(_text(string)) for string in strings)


def _text(string: str | bytes) -> str:
    return string.decode(errors="replace") if isinstance(string, bytes) else str(string)


def _parquet_columns(path: str, weights: str) -> str:
    """Which column identifies samples. Raises DataError for a file without one, or without the weights."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:  # also of one that is not for this NumPy
        raise DataError(f"data.subset {path} needs pyarrow ({error}): pip install 'eva-megatron[parquet]'") from None
    try:
        names = pyarrow.parquet.read_schema(path).names
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"data.subset {path} cannot be read ({error})") from error
    by = next((name for name in (UID, KEY) if name in names), None)
    if by is None:
        raise DataError(f"data.subset {path} has the columns {names}: one must be called {UID} or {KEY}")
    if weights and weights not in names:
        raise DataError(f"data.subset_weights={weights}: {path} has the columns {names}")
    return by


def _sort_and_keep(
    path: str, digest: str, by: str, weights: str, storage: Storage
) -> tuple[np.ndarray, np.ndarray | None]:
    """The file's rows as a sorted table, which is kept for others who open it."""
    pieces = list(_parquet_pieces(path, by, weights) if path.endswith(".parquet") else _npy_pieces(path, by))
    pairs = np.concatenate([np.empty((0, 2), dtype=np.uint64), *(ids for ids, _ in pieces)])
    of_rows = np.concatenate([values for _, values in pieces if values is not None]) if weights and pieces else None
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    pairs = pairs[order]
    again = np.zeros(len(pairs), dtype=bool)
    again[1:] = (pairs[1:] == pairs[:-1]).all(axis=1)
    if of_rows is not None:
        of_rows = of_rows[order]
        clash = np.flatnonzero(again[1:] & (of_rows[1:] != of_rows[:-1]))
        if len(clash):
            pair = of_rows[clash[0] : clash[0] + 2].tolist()
            raise DataError(
                f"data.subset {path}: {len(clash)} samples stand there twice with two weights, one with {pair}"
            )
        of_rows = of_rows[~again]
    if again.any():
        _log.warning("data.subset %s: %d rows repeat others and count once", path, int(again.sum()))
    pairs = pairs[~again]
    if storage.write(_name(path, digest, "ids"), lambda stream: np.save(stream, pairs)) is None:
        _log.warning("the sorted data.subset %s is kept in memory only: set data.cache_dir to keep it", path)
    if of_rows is not None:
        storage.write(_name(path, digest, "weights"), lambda stream: np.save(stream, of_rows))
    return pairs, of_rows


def _read_sorted(path: str, digest: str, storage: Storage, weights: str) -> tuple[np.ndarray, np.ndarray | None] | None:
    """What `_sort_and_keep` kept, mapped."""
    ids, of_rows = (_map(_name(path, digest, what), storage) for what in ("ids", "weights"))
    if ids is None or (weights and (of_rows is None or len(of_rows) != len(ids))):
        return None
    return ids, of_rows if weights else None


def _map(name: str, storage: Storage) -> np.ndarray | None:
    for file in storage.side_files(name):
        try:
            return np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            continue
    return None


def _name(path: str, digest: str, what: str) -> str:
    return f"{path}.{digest}.{what}.npy"


def _npy_pieces(path: str, by: str) -> Iterator[tuple[np.ndarray, None]]:
    rows = _open_npy(path)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        piece = rows[start : start + _ROWS_AT_ONCE]
        if rows.dtype.names:
            yield np.ascontiguousarray(piece).view("<u8").reshape(-1, 2), None
        else:
            yield _identifiers(map(_text, piece), by, path, start), None


def _parquet_pieces(path: str, by: str, weights: str) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    import pyarrow.parquet

    start, columns = 0, [by, weights] if weights else [by]
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
            names = batch.column(by).to_pylist()
            values = _weights(batch.column(weights).to_pylist(), path, weights, start) if weights else None
            yield _identifiers(names, by, path, start), values
            start += len(names)


def _weights(values: Sequence[object], path: str, column: str, start: int) -> np.ndarray:
    """float32 [n]. Raises DataError for what is no weight."""
    for row, value in enumerate(values):
        if not isinstance(value, int | float) or not 0 <= value <= _MOST_APPEARANCES:
            raise DataError(
                f"data.subset {path}, column {column}, row {start + row}: {value!r} is no weight; 0 to "
                f"{_MOST_APPEARANCES:,} expected appearances in an epoch are"
            )
    return np.array(values, dtype=np.float32)


def _identifiers(names: Iterable[object], by: str, path: str, start: int) -> np.ndarray:
    """uint64 [n, 2]. Raises DataError for a row that is no uid, or no key."""
    if by == KEY:
        keys = list(names)
        for row, key in enumerate(keys):
            if not isinstance(key, str) or not key:
                raise DataError(f"data.subset {path}, row {start + row}: {key!r} is no key of a sample")
        return identifiers_of_keys(str(key).encode(errors="surrogateescape") for key in keys)
    rows = []
    for row, name in enumerate(names):
        halves = identifier_of_uid(name)
        if halves is None:
            raise DataError(f"data.subset {path}, row {start + row}: {name!r} is no uid of 32 hexadecimal digits")
        rows.append(halves)
    return np.array(rows, dtype=np.uint64).reshape(-1, 2)
