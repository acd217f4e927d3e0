"""The manifest: what a checkpoint holds, where each part of each tensor lies, and the hash of every file.

manifest.json is written last, after every file of the folder is on disk, and carries a hash of its own content: a
folder without a valid manifest is not a checkpoint. Tensors are named `kind/logical name`; kinds are `weight` (the fp32
masters of training, from which lower-precision weights follow by rounding), `moment1`, `moment2` and, where one is
kept, `average` (optim.ema_decay).
"""

import base64
import hashlib
import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.checkpoint.format.disk import MANIFEST, sync_folder, write_synced
from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.flat_slice import FlatSlice
from engine.checkpoint.format.tables import Bucket, ShardTable, TableRow, parse_table, table_entry
from engine.checkpoint.format.tensor_file import DTYPE_NAMES, DTYPES, FileRecord, bytes_of
from models.versions import installed_version, megatron_core_version

FORMAT, FORMAT_OF_ROWS = 3, 2
"""Formats with tables of shards, and with a row for every part where there are none."""
RECORD = "record.json"
"""Beside the manifest: the record of its step with what was measured after the checkpoint had begun."""
WEIGHT, AVERAGE = "weight", "average"
"""Kinds that are weights; the others are the optimizer's (engine/config/sections/optim.py)."""


@dataclass
class Position:
    """How far a run has come; with train.seed it fixes every random number of training (data/order/stateless.py)."""

    step: int
    """Optimizer steps done."""
    samples_seen: int
    """Position in the global sample order; a change of the global batch size keeps it."""
    bad_samples: int = 0
    """Replaced so far, over all ranks."""
    phase: str = ""
    """Name of the phase it belongs to; at a border, of the one that ends there."""
    updates: int | None = None
    """Updates that the moments have seen; None in checkpoints that did not count them: as many as steps."""
    skipped_steps: int = 0
    """Steps without an update, for the sake of health."""
    rewinds: int = 0
    """Times that the weights were taken back to a checkpoint."""
    began: dict[str, int] = field(default_factory=dict)
    """Name of a tensor that was frozen at first -> updates before its moments saw one."""


@dataclass(frozen=True)
class StoredPart:
    """One part of a tensor and the file that holds it, as a 1-D tensor under the tensor's name."""

    file: str
    where: FlatSlice


@dataclass
class StoredTensor:
    """All parts of one tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    listed: list[StoredPart] = field(default_factory=list)
    """Parts that are written down one by one."""
    in_tables: list[tuple[ShardTable, Bucket, TableRow]] = field(default_factory=list)
    """Places whose parts follow from those of ranks."""

    @property
    def parts(self) -> list[StoredPart]:
        """All of them."""
        found = [StoredPart(*part) for table, bucket, row in self.in_tables for part in table.parts(bucket, row)]
        return self.listed + found

    def elements(self) -> int:
        """Elements that the parts have together, without making them."""
        listed = sum(part.where.numel() for part in self.listed)
        return listed + sum(table.elements(bucket, row) for table, bucket, row in self.in_tables)


@dataclass(kw_only=True)
class Manifest:
    """The content of manifest.json."""

    content: str
    """training (everything that resuming needs) | weights (no optimizer state, no position)."""
    config: dict[str, Any]
    """The resolved config of the run; of a converted checkpoint, the defaults with its model."""
    layout: dict[str, int]
    """tensor, pipeline, data of the ranks that wrote it; any other layout reads it."""
    tensors: dict[str, StoredTensor]
    """kind/name -> where it lies."""
    files: dict[str, FileRecord]
    tables: list[ShardTable] = field(default_factory=list)
    """Where the slices of ranks lie; `tensors` has them, too."""
    position: Position | None = None
    seed: int | None = None
    """The key of every random number of training."""
    data: dict[str, Any] = field(default_factory=dict)
    """Fingerprint of the data that the order of samples depends on (data/fingerprint.py); empty if none was taken."""
    callbacks: dict[str, Any] = field(default_factory=dict)
    """Class name -> state_dict of the callbacks that have one."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The record of the step it was written at; retention compares it."""
    source: str = ""
    """Where converted weights came from."""
    versions: dict[str, str] = field(default_factory=lambda: library_versions())

    def add_table(self, table: ShardTable) -> None:
        """Add the fp32 tensors of a table. Raises CheckpointError where tables disagree on a tensor."""
        self.tables.append(table)
        for bucket, row in table.rows():
            for key in (f"{kind}/{row.name}" for kind in table.kinds):
                known = self.tensors.setdefault(key, StoredTensor(torch.float32, row.where.shape))
                if known.shape != row.where.shape:
                    raise CheckpointError(f"ranks disagree on {key}: its shape is {known.shape} or {row.where.shape}")
                known.in_tables.append((table, bucket, row))

    def shapes(self, kind: str = WEIGHT) -> dict[str, tuple[int, ...]]:
        """Logical name -> shape of the tensors of a kind."""
        prefix = f"{kind}/"
        return {k.removeprefix(prefix): t.shape for k, t in self.tensors.items() if k.startswith(prefix)}

    def size_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(record.size_bytes for record in self.files.values())


def library_versions() -> dict[str, str]:
    """Versions of what computed and wrote a checkpoint."""
    # torch by its own word: the metadata of a CUDA build leave out for which CUDA. megatron-core by the files that
    # are imported, often a checkout in front of another one that is installed.
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("eva-megatron", "megatron-core", "numpy"):
        version = megatron_core_version() if package == "megatron-core" else installed_version(package)
        found[package] = version or "not installed as a package"
    return found


# --- to and from JSON ----------------------------------------------------------------------------------------------


def part_row(part: StoredPart) -> list[Any]:
    """[file, dim, offset, length, start, stop]."""
    w = part.where
    return [part.file, w.dim, w.offset, w.length, w.start, w.stop]


def _tensor_entry(tensor: StoredTensor) -> dict[str, Any]:
    """JSON of one tensor without what tables say."""
    return {
        "dtype": DTYPE_NAMES[tensor.dtype],
        "shape": list(tensor.shape),
        "parts": [part_row(part) for part in tensor.listed],
    }


def _parse_tensor(entry: dict[str, Any]) -> StoredTensor:
    shape = tuple(entry["shape"])
    parts = [StoredPart(row[0], FlatSlice(shape, *row[1:])) for row in entry["parts"]]
    return StoredTensor(DTYPES[entry["dtype"]], shape, parts)


def _to_json(manifest: Manifest) -> dict[str, Any]:
    body = {
        name: getattr(manifest, name) for name in ("content", "config", "layout", "seed", "metrics", "source", "data")
    }
    return body | {
        "format": FORMAT if manifest.tables else FORMAT_OF_ROWS,
        **({"tables": [table_entry(table) for table in manifest.tables]} if manifest.tables else {}),
        "position": asdict(manifest.position) if manifest.position else None,
        "callbacks": encode_state(manifest.callbacks),
        "versions": manifest.versions,
        "files": {name: asdict(record) for name, record in manifest.files.items()},
        "tensors": {name: _tensor_entry(tensor) for name, tensor in manifest.tensors.items()},
    }


def _from_json(body: dict[str, Any]) -> Manifest:
    manifest = Manifest(
        content=body["content"],
        config=body["config"],
        layout=body["layout"],
        tensors={name: _parse_tensor(entry) for name, entry in body["tensors"].items()},
        files={name: FileRecord(**record) for name, record in body["files"].items()},
        position=Position(**body["position"]) if body["position"] else None,
        seed=body["seed"],
        data=body.get("data", {}),
        callbacks=decode_state(body["callbacks"]),
        metrics=body["metrics"],
        source=body["source"],
        versions=body["versions"],
    )
    shapes = {key.partition("/")[2]: tensor.shape for key, tensor in manifest.tensors.items()}
    for entry in body.get("tables", []):
        manifest.add_table(parse_table(entry, shapes, len(manifest.files)))
    return manifest


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def encode_state(value: Any) -> Any:
    """Plain containers and tensors (a callback's state) -> JSON; tensors as base64."""
    if isinstance(value, Tensor):
        data = base64.b64encode(bytes_of(value.detach().cpu())).decode()
        return {"__tensor__": data, "dtype": DTYPE_NAMES[value.dtype], "shape": list(value.shape)}
    if isinstance(value, dict):
        return {str(key): encode_state(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode_state(item) for item in value]
    return value


def decode_state(value: Any) -> Any:
    """The inverse of `encode_state` (tuples come back as lists)."""
    if isinstance(value, dict) and "__tensor__" in value:
        raw = np.frombuffer(bytearray(base64.b64decode(value["__tensor__"])), dtype=np.uint8)
        return torch.from_numpy(raw).view(DTYPES[value["dtype"]]).reshape(value["shape"])
    if isinstance(value, dict):
        return {key: decode_state(item) for key, item in value.items()}
    return [decode_state(item) for item in value] if isinstance(value, list) else value


# --- on disk -------------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write and sync manifest.json, then the folder's entries. Raises CheckpointError if tensors are not whole."""
    broken = incomplete(manifest)
    if broken:
        raise CheckpointError(f"{folder}: these tensors would not be whole: {', '.join(broken[:10])}")
    body = _to_json(manifest)
    write_synced(folder / MANIFEST, json.dumps({"sha256": _digest(body), "manifest": body}).encode())
    sync_folder(folder)


def read_manifest(folder: Path) -> Manifest:
    """Parse and check manifest.json. Raises CheckpointError: absent, cut, altered, other format, tensors not whole."""
    path = folder / MANIFEST
    try:
        outer = json.loads(path.read_text())
        body, digest = outer["manifest"], outer["sha256"]
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read or is cut short: {error}") from error
    if _digest(body) != digest:
        raise CheckpointError(f"{path} was altered: its content does not match its own sha256")
    if body.get("format") not in (FORMAT, FORMAT_OF_ROWS):
        reads = f"{FORMAT_OF_ROWS} and {FORMAT}"
        raise CheckpointError(f"{folder} has checkpoint format {body.get('format')}, this version reads {reads}")
    manifest = _from_json(body)
    broken = incomplete(manifest)
    if broken:
        raise CheckpointError(f"{path}: these tensors are not whole: {', '.join(broken[:10])}")
    return manifest


def step_record(folder: Path) -> dict[str, float]:
    """The record of the step after which a checkpoint was written. Raises CheckpointError for a damaged manifest."""
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not measured yet, or written before there was one
        return read_manifest(folder).metrics


def incomplete(manifest: Manifest) -> list[str]:
    """Names of tensors whose parts do not add up to the whole (parts never overlap: each element has one owner)."""
    return [name for name, tensor in manifest.tensors.items() if tensor.elements() != torch.Size(tensor.shape).numel()]
