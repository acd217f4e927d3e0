"""Features of a locked image tower that were computed once (tools.embed), read by sample in the place of pixels.

Rows lie in FILE.npz in the listed order of the shards that were embedded; FILE.npz.features.json says which shards
these are (by sample count and digest of their members), and which tower has seen them how. A job's shards may be some
of them, in any order, mixture or subset: a row is found by shard and place, never by a key, which may occur twice.
"""

import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError, Rejected

_VERSION = 1
_LOCAL_HEADER = 30
"""Bytes of a zip member's header before its name."""
_EMBEDDINGS, _VALID = "image_embeddings", "image_valid"


@dataclass(frozen=True, kw_only=True)
class FeatureOrigin:
    """What FILE.npz.features.json says."""

    shards: list[str]
    """Names of the shards, in the order of the rows."""
    samples: list[int]
    """Samples of each."""
    digests: list[int]
    """`ShardIndex.digest` of each."""
    tower: int
    """Digest of the image tower's weights (models/tensors/digest.py)."""
    embed_dim: int
    image_size: int
    version: int = _VERSION

    def write(self, features: Path) -> None:
        """Beside the features."""
        _side_file(features).write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, features: Path) -> "FeatureOrigin":
        """Raises DataError where there is none that is understood."""
        path = _side_file(features)
        try:
            found = json.loads(path.read_text())
            origin = cls(**found)
        except FileNotFoundError:
            raise DataError(
                f"data.features {features} has no {path.name} beside it: write both by python -m tools.embed "
                f"--shards … --unreadable nan --out {features.name}"
            ) from None
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{path} cannot be read: {error}") from None
        if origin.version != _VERSION:
            raise DataError(f"{path} is of version {origin.version}, this reads {_VERSION}: embed the shards again")
        return origin


class Features:
    """Rows by (shard, sample) of a job's shards; the file is mapped, and only the rows asked for are touched."""

    def __init__(
        self, path: str, *, shards: Sequence[str], samples: Sequence[int], digests: Sequence[int], image_size: int
    ) -> None:
        """shards, samples, digests: of the job. Raises DataError if the file does not hold a row of every sample, or
        if the rows are not of pictures of this size.
        """
        file = Path(path)
        origin = FeatureOrigin.read(file)
        self._rows, self._valid = (mapped_member(file, name) for name in (_EMBEDDINGS, _VALID))
        self._starts = _starts(file, origin, shards, samples, digests)
        if self._rows is None or self._valid is None or self._rows.shape != (sum(origin.samples), origin.embed_dim):
            shape = None if self._rows is None else list(self._rows.shape)
            raise DataError(
                f"data.features {path} holds {_EMBEDDINGS} {shape}, its .features.json says "
                f"[{sum(origin.samples)}, {origin.embed_dim}]: embed the shards again"
            )
        if origin.image_size != image_size:
            raise DataError(
                f"data.features {path} are of pictures of {origin.image_size} pixels, model.vision.image_size is "
                f"{image_size}: embed the shards at that size, or set it"
            )
        self.width = origin.embed_dim

    def row(self, shard: int, sample: int) -> np.ndarray:
        """float32 [width] of a sample. Raises Rejected for one whose picture could not be read."""
        place = self._starts[shard] + sample
        if not self._valid[place]:
            raise Rejected("no_features")
        return np.array(self._rows[place], dtype=np.float32)


def _starts(
    file: Path, origin: FeatureOrigin, shards: Sequence[str], samples: Sequence[int], digests: Sequence[int]
) -> list[int]:
    """First row of each of the job's shards."""
    borders = np.cumsum([0, *origin.samples]).tolist()
    known = {
        place: first for place, first in zip(zip(origin.samples, origin.digests, strict=True), borders, strict=False)
    }
    missing = [shard for shard, *place in zip(shards, samples, digests, strict=True) if tuple(place) not in known]
    if missing:
        named = {name.rpartition("/")[2] for name in origin.shards}
        changed = sum(shard.rpartition("/")[2] in named for shard in missing)
        raise DataError(
            f"data.features {file} has no rows of {len(missing)} of {len(shards)} shards ({missing[0]}, …; {changed} "
            "of them are there with other samples): embed these shards as they are now"
        )
    return [known[place] for place in zip(samples, digests, strict=True)]


def _side_file(features: Path) -> Path:
    return features.with_name(f"{features.name}.features.json")


def rows_digest(path: Path) -> str:
    """What tells other rows from these: the checksums that the archive holds of them, so that none is read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "".join(f"{archive.getinfo(f'{name}.npy').CRC:08x}" for name in (_EMBEDDINGS, _VALID))
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise DataError(f"{path} cannot be read as an .npz: {error}") from error


def mapped_member(path: Path, name: str) -> Any:
    """An array of an .npz: mapped if stored, read if compressed; None if absent. Raises DataError for no .npz."""
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{name}.npy" not in archive.namelist():
                return None
            info = archive.getinfo(f"{name}.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            return np.load(path, allow_pickle=False)[name]
        return _mapped(path, info)
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise DataError(f"{path} cannot be read as an .npz: {error}") from error


def _mapped(path: Path, info: zipfile.ZipInfo) -> np.ndarray:
    with open(path, "rb") as file:
        file.seek(info.header_offset + _LOCAL_HEADER - 4)
        lengths = file.read(4)
        name, extra = int.from_bytes(lengths[:2], "little"), int.from_bytes(lengths[2:], "little")
        file.seek(name + extra, 1)
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read_header:
            raise ValueError(f"array format {version} is not one of {sorted(read_header)}")
        shape, fortran, dtype = read_header[version](file)
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        if 0 in shape:
            return np.empty(shape, dtype)
        return np.memmap(path, dtype, mode="r", offset=file.tell(), shape=shape, order="F" if fortran else "C")
