"""What the image tower answers for a set on disk, written block by block and taken up again after a kill."""

import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.batch import BadSample
from data.errors import DataError
from engine.evaluation.embedder import Embedder
from engine.evaluation.inputs import Block, SampleInput
from engine.evaluation.progress import Progress
from engine.evaluation.scores import LeftOut, check_embeddings
from engine.evaluation.text_files import write_whole
from engine.parallel.agree import everyone
from models.towers.heads import Read

_DIGEST_BYTES = 16
_DTYPES = {"images": np.float32, "pooled": np.float32, "tokens": np.float16}
"""Normed tokens are many and of order 1: half precision keeps three digits of them."""
_HALF_MAX = 65504.0


class FileRows:
    """Rows [N, …] in a file, of which a part at a time is in memory; ranks that do not see the file may hold it."""

    def __init__(self, path: Path, *shape: int, dtype: type = np.float32):
        self._path, self._shape, self._dtype = path, shape, dtype
        self._row_bytes = math.prod(shape) * np.dtype(dtype).itemsize

    def __len__(self) -> int:
        return self._path.stat().st_size // self._row_bytes

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(len(self))
        count = (stop - start) * math.prod(self._shape)
        found: np.ndarray = np.fromfile(self._path, self._dtype, count, offset=start * self._row_bytes)
        return torch.from_numpy(found.reshape(-1, *self._shape))

    def pick(self, rows: np.ndarray) -> Tensor:
        """Rows int64 [n] in any order."""
        every = np.memmap(self._path, self._dtype, mode="r", shape=(len(self), *self._shape))
        return torch.from_numpy(every[rows])


@dataclass(kw_only=True)
class Features:
    """What the first rank knows of the features of one part of a set."""

    folder: Path
    fingerprint: str
    """Fingerprint of the checkpoint and the samples: features of another are not taken up."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """What is kept of every sample (`images`, `pooled`, `tokens`), and the shape of its row."""
    done: int = 0
    """Samples whose rows are on disk."""
    key_bytes: int = 0
    """Bytes of their keys."""
    bad: list[BadSample] = field(default_factory=list)
    """What could not be read of them."""

    @property
    def left_out(self) -> LeftOut:
        """Pictures that could not be read; their rows are NaN."""
        return LeftOut([bad for bad in self.bad if bad.reason != "missing_caption"])

    def rows(self, name: str = "images") -> FileRows:
        """The embeddings, or what else is kept."""
        return FileRows(self._path(name), *self.shapes[name], dtype=_DTYPES[name])

    def keys(self) -> list[str]:
        """The key of every sample within its tar, or its path."""
        return [json.loads(line) for line in (self.folder / "keys.jsonl").read_text(encoding="utf-8").splitlines()]

    def pictures(self) -> np.ndarray:
        """uint8 [N, 16]: which pictures are the same."""
        return np.fromfile(self.folder / "pictures.u8", np.uint8).reshape(-1, _DIGEST_BYTES)

    @property
    def scored(self) -> Tensor:
        """int64 [n]: the samples that have a row."""
        gone = {bad.position for bad in self.left_out.samples}
        return torch.tensor([row for row in range(self.done) if row not in gone], dtype=torch.int64)

    def discard(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def take_up(self, samples: int) -> str | None:
        """Go on behind what an earlier run has written for the same fingerprint, else begin anew; what is wrong with
        the disk, if there is no room for all of `samples`.
        """
        state = self.folder / "state.json"
        if state.is_file():
            stored = json.loads(state.read_text(encoding="utf-8"))
            if stored["fingerprint"] == self.fingerprint:
                self.done, self.key_bytes = stored["done"], stored["key_bytes"]
                self.bad = [BadSample(**bad) for bad in stored["bad"]]
        self.folder.mkdir(parents=True, exist_ok=True)
        sizes = {self._path(name): size * self.done for name, size in self._row_bytes().items()}
        sizes[self.folder / "pictures.u8"] = _DIGEST_BYTES * self.done
        for path, size_bytes in (sizes | {self.folder / "keys.jsonl": self.key_bytes}).items():
            path.touch()
            os.truncate(path, size_bytes)  # a kill may have left half a block
        wanted, free = sum(self._row_bytes().values()) * (samples - self.done), shutil.disk_usage(self.folder).free
        if wanted < free:
            return None
        what = f"{samples - self.done:,} samples, {' and '.join(self.shapes)}"
        return f"{self.folder} has no room for {wanted / 1e9:,.1f} GB ({what}): {free / 1e9:,.1f} GB are free"

    def append(self, columns: dict[str, np.ndarray], block: Block) -> None:
        """Write the rows of a block; they are there when this returns."""
        keys = "".join(f"{json.dumps(key)}\n" for key in block.keys).encode()
        self.key_bytes += len(keys)
        contents = {self._path(name): rows.astype(_DTYPES[name]).tobytes() for name, rows in columns.items()}
        contents |= {self.folder / "pictures.u8": b"".join(block.pictures), self.folder / "keys.jsonl": keys}
        for path, content in contents.items():
            with path.open("ab") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        self.done, self.bad = block.stop, self.bad + block.bad
        state = {"fingerprint": self.fingerprint, "done": self.done, "key_bytes": self.key_bytes}
        state["bad"] = [asdict(bad) for bad in self.bad]
        write_whole(self.folder / "state.json", json.dumps(state))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.f{8 * np.dtype(_DTYPES[name]).itemsize}"

    def _row_bytes(self) -> dict[str, int]:
        return {name: math.prod(shape) * np.dtype(_DTYPES[name]).itemsize for name, shape in self.shapes.items()}


def embed_part(
    embedder: Embedder, source: SampleInput, size: int, features: Features, name: str, read: Read
) -> Features:
    """Embed what is not on disk yet. Collective over the mesh; files are written and known on the first rank alone.

    Raises DataError on every rank for a disk without room and for features that are not finite.
    """
    world = source.mesh.world
    features.shapes = embedder.widths(read)
    first_rank = world.rank == 0
    problem = features.take_up(len(source)) if first_rank else None
    start, problem = everyone((features.done, problem), world)[0]
    if problem is not None:
        raise DataError(problem)
    progress = Progress(name, len(source), shown=first_rank and start < len(source), done=start)
    for block in source.blocks(size, start):
        assert block.pixels is not None and block.has_image is not None
        found = embedder.encode(block.pixels, block.stop - block.start, read)
        rows = block.has_image.nonzero()[:, 0]
        columns = {}
        for column, values in found.items():
            kept = values.cpu()
            check_embeddings(kept[rows].flatten(1), "image", [block.keys[row] for row in rows])
            largest = float(kept[rows].abs().max()) if len(rows) else 0.0
            if column == "tokens" and largest > _HALF_MAX:
                raise DataError(f"tokens of {name} reach {largest:.3g}, beyond the half precision they are kept in")
            kept[~block.has_image] = torch.nan
            columns[column] = kept.numpy()
        if first_rank:
            features.append(columns, block)
        progress.advance(block.stop)
    if start < len(source):
        rate = (len(source) - start) / progress.seconds
        progress.finish(f"{len(source):,} samples, {rate:,.1f} samples/s")
    return features
