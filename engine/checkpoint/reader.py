"""An open checkpoint: any range of any tensor, whatever layout wrote it; and the check of its files."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint.format.errors import CheckpointError, listed
from engine.checkpoint.format.flat_slice import FlatSlice, RangeReader, copy_overlap
from engine.checkpoint.format.manifest import AVERAGE, WEIGHT, Manifest, read_manifest
from engine.checkpoint.format.matching import Exceptions, matches
from engine.checkpoint.format.tensor_file import TensorFile, hash_file

WHOLE = Exceptions()
"""Nothing is left out."""


class Checkpoint:
    """One checkpoint folder with a valid manifest. Files are opened when first read and stay open."""

    def __init__(self, folder: Path, exceptions: Exceptions = WHOLE):
        """exceptions: what a run that goes on from it leaves out. Raises CheckpointError: not a checkpoint."""
        self.folder, self.exceptions = folder, exceptions
        self.manifest: Manifest = read_manifest(folder)
        _require_plain_names(self.manifest, folder)
        self.is_local = False
        """Whether each host has the files of its own ranks only (engine/checkpoint/local.py)."""
        self._files: dict[str, TensorFile] = {}

    def leaves_fresh(self, name: str) -> bool:
        """Whether a tensor of the model keeps its initial value beside this checkpoint, which fills every other one."""
        return matches(name, self.exceptions.reinit)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Logical name -> shape of every weight."""
        return self.manifest.shapes()

    def key(self, name: str, kind: str) -> str:
        """What a tensor of a kind is stored as: the average of one that was frozen is the weight."""
        own = f"{kind}/{name}"
        return f"{WEIGHT}/{name}" if kind == AVERAGE and own not in self.manifest.tensors else own

    def read(self, name: str, where: FlatSlice, kind: str = WEIGHT) -> Tensor:
        """The elements `where` of a logical tensor: 1-D on the CPU, in the stored dtype."""
        key = self.key(name, kind)
        stored = self.manifest.tensors[key]
        out = torch.empty(where.numel(), dtype=stored.dtype)
        copied = 0
        for part in stored.parts:
            copied += copy_overlap(out, where, part.where, self._range_reader(part.file, key))
        if copied != where.numel():
            raise CheckpointError(f"{self.folder}: {key} has {copied:,} of {where.numel():,} wanted elements")
        return out

    def read_whole(self, name: str, kind: str = WEIGHT) -> Tensor:
        """A logical tensor in its own shape."""
        shape = self.manifest.tensors[self.key(name, kind)].shape
        return self.read(name, FlatSlice.whole(shape), kind).view(shape)

    def kind(self, kind: str) -> "KindOf":
        """The tensors of another kind in the place of the weights. Raises CheckpointError if there are none."""
        if not self.manifest.shapes(kind):
            raise CheckpointError(f"{self.folder} holds no {kind} of the weights (optim.ema_decay keeps one)")
        return KindOf(self, kind)

    def _range_reader(self, file: str, key: str) -> RangeReader:
        """Opens the file only where there is something to read in it."""

        def read_range(out: Tensor, start: int) -> None:
            self._open(file).read_into(out, key, start)

        return read_range

    def _open(self, file: str) -> TensorFile:
        if file not in self._files:
            self._files[file] = TensorFile(self.folder / file)
        return self._files[file]

    def close(self) -> None:
        """Release the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def problems(
        self, rank: int = 0, ranks: int = 1, hashes: bool = True, hashed: Callable[[int], object] = lambda _: None
    ) -> list[str]:
        """What is wrong with this rank's share of the files: missing, of another size, of another hash.

        Ranks take turns from the largest file on, there and back, so that all read about as much. hashed: called with
        the bytes read since the last call.
        """
        found = []
        by_size = sorted(self.manifest.files, key=lambda file: (-self.manifest.files[file].size_bytes, file))
        for number, file in enumerate(by_size):
            turn, place = divmod(number, ranks)
            if rank != (ranks - 1 - place if turn % 2 else place):
                continue
            problem = self._problem(file, hashes, hashed)
            if problem:
                found.append(problem)
        return found

    def _problem(self, file: str, hashes: bool, hashed: Callable[[int], object]) -> str | None:
        path, record = self.folder / file, self.manifest.files[file]
        if not path.is_file():
            return f"{file} is missing"
        size = path.stat().st_size
        if size != record.size_bytes:
            return f"{file} has {size:,} bytes, the manifest says {record.size_bytes:,} (truncated or replaced)"
        if hashes and hash_file(path, hashed).sha256 != record.sha256:
            return f"{file} has another sha256 than the manifest says (its bytes changed after it was written)"
        return None

    def verify(self, hashed: Callable[[int], object] = lambda _: None) -> None:
        """Raise CheckpointError that lists every bad file. hashed: as in `problems`."""
        problems = self.problems(hashed=hashed)
        if problems:
            raise CheckpointError(f"{self.folder} is damaged:{listed(problems)}")


def _require_plain_names(manifest: Manifest, folder: Path) -> None:
    """Nothing that a manifest names lies outside its folder."""
    # Files of ranks in tables are named by numbers.
    parts = (part.file for tensor in manifest.tensors.values() for part in tensor.listed)
    for name in dict.fromkeys([*manifest.files, *parts]):
        if Path(name).name != name or name == "..":
            raise CheckpointError(f"{folder} names the file {name!r}: files of a checkpoint lie in its folder")


class KindOf:
    """One kind of tensors of a checkpoint, as a source of weights."""

    def __init__(self, checkpoint: Checkpoint, kind: str):
        self._checkpoint, self._kind = checkpoint, kind

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Logical name -> shape."""
        manifest = self._checkpoint.manifest
        return {name: manifest.tensors[self._checkpoint.key(name, self._kind)].shape for name in manifest.shapes()}

    def read(self, name: str, where: FlatSlice) -> Tensor:
        """Some elements of a logical tensor, 1-D."""
        return self._checkpoint.read(name, where, self._kind)
