"""Files in the safetensors format, written as a stream and read by ranges.

The format is an 8-byte header length, a JSON header (name -> dtype, shape, byte range) and the raw bytes. It is written
here rather than by the safetensors package because a checkpoint is hashed while it is written and one tensor at a time
exists in memory; and read here because a rank wants ranges of flattened tensors, with plain reads whose memory is what
was asked for, not mapped pages. The files are ordinary safetensors: any reader opens them (a test does).
"""

import contextlib
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from engine.checkpoint.format.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's dtype names that this project reads and writes."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

BLOCK = 16 * 2**20
"""Bytes that are hashed and written, or read and hashed, at a time."""
_BLOCKS_IN_FLIGHT = 4
_LARGEST_HEADER = 100 * 10**6  # the limit of the safetensors package


@dataclass(frozen=True)
class FileRecord:
    """What a manifest knows of a file."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a file before its bytes exist."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor (without a copy where it is contiguous)."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_tensor_file(
    path: Path, specs: Sequence[TensorSpec], tensors: Iterable[Tensor], metadata: dict[str, str] | None = None
) -> FileRecord:
    """Write the tensors of `specs` in that order and sync them to disk; `tensors` may be a generator.

    Raises CheckpointError with the path when the disk refuses (full, read-only, quota), ValueError when a tensor is
    not what its spec says.
    """
    digest, size = hashlib.sha256(), 0
    hashing: deque[Future] = deque()
    try:
        # Hashing and writing leave the interpreter's lock, so that they go on side by side.
        with ThreadPoolExecutor(1) as hasher, open(path, "wb", buffering=0) as file:
            for block in _blocks(specs, tensors, metadata or {}):
                hashing.append(hasher.submit(digest.update, block))
                _write_fully(file.fileno(), block)
                size += len(block)
                while len(hashing) > _BLOCKS_IN_FLIGHT:
                    hashing.popleft().result()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)  # a full disk is not left full
        raise CheckpointError(f"writing {path} failed after {size:,} bytes: {error.strerror or error}") from error
    return FileRecord(size, digest.hexdigest())


def _write_fully(descriptor: int, block: memoryview) -> None:
    while block:
        block = block[os.write(descriptor, block) :]


def _blocks(specs: Sequence[TensorSpec], tensors: Iterable[Tensor], metadata: dict[str, str]) -> Iterable[memoryview]:
    yield memoryview(_header(specs, metadata))
    for spec, tensor in zip(specs, tensors, strict=True):
        if tensor.dtype != spec.dtype or tensor.numel() != torch.Size(spec.shape).numel():
            raise ValueError(f"{spec.key} is {tensor.dtype} {tuple(tensor.shape)}, planned {spec.dtype} {spec.shape}")
        content = bytes_of(tensor)
        for start in range(0, len(content), BLOCK):
            yield content[start : start + BLOCK]


def _header(specs: Sequence[TensorSpec], metadata: dict[str, str]) -> bytes:
    table: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for spec in specs:
        end = position + spec.size_bytes
        table[spec.key] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def hash_file(path: Path, hashed: Callable[[int], object] = lambda size_bytes: None) -> FileRecord:
    """Size and hash of a file, read as a stream. Raises CheckpointError when it cannot be read.

    hashed: called with the bytes since the last call.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)  # the kernel reads ahead while we hash
            while block := file.read(BLOCK):
                digest.update(block)
                size += len(block)
                hashed(len(block))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return FileRecord(size, digest.hexdigest())


class TensorFile:
    """An open safetensors file; reads ranges of flattened tensors. Nothing in it is trusted."""

    def __init__(self, path: Path):
        """Raises CheckpointError unless `path` is a whole, well-formed safetensors file."""
        self.path = path
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115  # lives as long as this object
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened: {error.strerror or error}") from error
        self.specs: dict[str, TensorSpec] = {}
        self._starts: dict[str, int] = {}
        try:
            self._parse(os.fstat(self._file.fileno()).st_size)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._file.close()
            raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error

    def _parse(self, size: int) -> None:
        length = int.from_bytes(self._file.read(8), "little")
        if not 0 < length <= min(size - 8, _LARGEST_HEADER):
            raise ValueError(f"its header claims {length:,} bytes of a file of {size:,}")
        table = json.loads(self._file.read(length))
        table.pop("__metadata__", None)
        for key, entry in table.items():
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{key} is {entry['dtype']}, and {', '.join(DTYPES)} are read: dequantise it first")
            spec = TensorSpec(key, DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"]))
            begin, end = entry["data_offsets"]
            if begin < 0 or end - begin != spec.size_bytes or 8 + length + end > size:
                raise ValueError(f"{key} claims bytes {begin:,} to {end:,} of {size - 8 - length:,}")
            self.specs[key] = spec
            self._starts[key] = 8 + length + begin

    def start_of(self, key: str) -> int:
        """Place of a tensor's first byte in the file."""
        return self._starts[key]

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of the flattened tensor, 1-D on the CPU."""
        spec = self.specs[key]
        stop = torch.Size(spec.shape).numel() if stop is None else stop
        out = torch.empty(stop - start, dtype=spec.dtype)
        self.read_into(out, key, start)
        return out

    def read_into(self, out: Tensor, key: str, start: int) -> None:
        """Fill the contiguous 1-D CPU tensor `out` (of the tensor's dtype) with the elements from `start` on."""
        target = bytes_of(out)
        position = self._starts[key] + start * out.dtype.itemsize
        while target:
            got = os.preadv(self._file.fileno(), [target[:BLOCK]], position)
            if not got:
                raise CheckpointError(f"{self.path} ends within {key}")
            target, position = target[got:], position + got

    def close(self) -> None:
        """Release the file."""
        self._file.close()

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
