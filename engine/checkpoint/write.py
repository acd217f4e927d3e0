"""Writing a whole checkpoint from one process, one part at a time: conversions and resharding."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint.format.disk import sync_folder
from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.flat_slice import FlatSlice
from engine.checkpoint.format.folders import saving_folder
from engine.checkpoint.format.manifest import Manifest, StoredPart, StoredTensor, write_manifest
from engine.checkpoint.format.tensor_file import TensorSpec, write_tensor_file

FILE_BYTES = 4 * 10**9
"""Files of converted checkpoints are about this large at most (one tensor is never cut)."""


@dataclass(frozen=True)
class PlannedPart:
    """A part before it is read."""

    key: str
    """kind/logical name."""
    dtype: torch.dtype
    where: FlatSlice

    @property
    def size_bytes(self) -> int:
        """Bytes of its values."""
        return self.where.numel() * self.dtype.itemsize


@dataclass
class PlannedFile:
    """A file and what goes into it."""

    name: str
    parts: list[PlannedPart] = field(default_factory=list)

    @property
    def size_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(part.size_bytes for part in self.parts)


def whole_tensors(tensors: list[tuple[str, torch.dtype, tuple[int, ...]]], stem: str = "weights") -> list[PlannedFile]:
    """A plan of whole tensors in files of FILE_BYTES."""
    files = [PlannedFile(f"{stem}_000.safetensors")]
    for key, dtype, shape in tensors:
        part = PlannedPart(key, dtype, FlatSlice.whole(shape))
        if files[-1].parts and files[-1].size_bytes + part.size_bytes > FILE_BYTES:
            files.append(PlannedFile(f"{stem}_{len(files):03d}.safetensors"))
        files[-1].parts.append(part)
    return files


def refuse_existing(out: Path) -> None:
    """Raise CheckpointError if something is in the place of an output folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists: name a folder that does not, or delete it first")


def write_checkpoint(
    out: Path, files: list[PlannedFile], read: Callable[[PlannedPart], Tensor], manifest: Manifest
) -> None:
    """Write `files` to a folder beside `out` and rename it when it is whole. One part is in memory at a time.

    read: PlannedPart -> its values. manifest: everything but tensors and files, which are filled in.
    """
    refuse_existing(out)
    saving = saving_folder(out)
    shutil.rmtree(saving, ignore_errors=True)
    try:
        saving.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{saving} cannot be made: {error.strerror}") from error
    needed, free = sum(file.size_bytes for file in files), shutil.disk_usage(saving).free
    try:
        if free < needed:
            raise CheckpointError(f"{out} needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free")
        for file in files:
            _write_file(saving, file, read, manifest)
        write_manifest(saving, manifest)
        if out.exists():
            out.rmdir()
        os.rename(saving, out)
    except BaseException:
        shutil.rmtree(saving, ignore_errors=True)
        raise
    sync_folder(out.parent)


def _write_file(folder: Path, file: PlannedFile, read: Callable[[PlannedPart], Tensor], manifest: Manifest) -> None:
    specs = [TensorSpec(part.key, part.dtype, (part.where.numel(),)) for part in file.parts]
    manifest.files[file.name] = write_tensor_file(folder / file.name, specs, _values(file, read))
    for part in file.parts:
        tensor = manifest.tensors.setdefault(part.key, StoredTensor(part.dtype, part.where.shape))
        tensor.listed.append(StoredPart(file.name, part.where))


def _values(file: PlannedFile, read: Callable[[PlannedPart], Tensor]) -> Iterator[Tensor]:
    for part in file.parts:
        yield read(part)
