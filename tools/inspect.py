"""What is in a checkpoint: python -m tools.inspect PATH [--tensors] [--verify] [--diff OTHER]

Prints what it holds, where it came from, layout, sizes and files; --tensors lists every tensor with its parts,
--verify checks every byte against the manifest's hashes, --diff compares the tensors of two checkpoints of any layout
(largest absolute difference, and that relative to the largest value). Exit status 1: damaged, or different.
"""

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path

from torch import Tensor

from engine.checkpoint.errors import CheckpointError, listed
from engine.checkpoint.folders import resolve_checkpoint
from engine.checkpoint.reader import Checkpoint
from engine.checkpoint.tensor_file import DTYPE_NAMES


def main(argv: list[str]) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint or run folder")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--verify", action="store_true", help="check the hash of every file")
    parser.add_argument("--diff", type=Path, metavar="OTHER", help="compare with another checkpoint")
    arguments = parser.parse_args(argv)
    try:
        checkpoint = Checkpoint(resolve_checkpoint(arguments.checkpoint))
        _summary(checkpoint)
        if arguments.tensors:
            _tensors(checkpoint)
        sound = _check(checkpoint, arguments.verify)
        same = _diff(checkpoint, Checkpoint(resolve_checkpoint(arguments.diff))) if arguments.diff else True
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0 if sound and same else 1


def _summary(checkpoint: Checkpoint) -> None:
    manifest = checkpoint.manifest
    weights = manifest.shapes()
    elements = {name: _numel(shape) for name, shape in weights.items()}
    print(f"{checkpoint.folder}: {manifest.content}")
    if manifest.position is not None:
        p = manifest.position
        where = f"phase {p.phase}, step {p.step}" if p.phase else f"step {p.step}"
        print(f"  {where}, samples seen {p.samples_seen:,}, bad samples {p.bad_samples}, seed {manifest.seed}")
        if p.skipped_steps or p.rewinds:
            print(f"  skipped steps {p.skipped_steps}, rewinds {p.rewinds}")
    if manifest.source:
        print(f"  from {manifest.source}")
    print(f"  model {json.dumps(manifest.config['model'])}")
    print("  written at " + ", ".join(f"{axis} {size}" for axis, size in manifest.layout.items()))
    print("  by " + ", ".join(f"{package} {version}" for package, version in manifest.versions.items()))
    towers: Counter[str] = Counter()
    for name, count in elements.items():
        towers[name.split(".")[0]] += count
    print("  parameters: " + ", ".join(f"{tower} {count:,}" for tower, count in towers.items()))
    for kind in dict.fromkeys(key.split("/")[0] for key in manifest.tensors):
        print(f"  {kind}: {_kind_line(checkpoint, kind)}")
    print(f"  {len(manifest.files)} files, {manifest.size_bytes() / 1e9:.3f} GB")
    for name, record in manifest.files.items():
        print(f"    {name}  {record.size_bytes:,} bytes  sha256 {record.sha256}")
    if manifest.metrics:
        print(f"  metrics {json.dumps(manifest.metrics)}")
    if manifest.callbacks:
        print(f"  callbacks with state: {', '.join(manifest.callbacks)}")


def _kind_line(checkpoint: Checkpoint, kind: str) -> str:
    tensors = [t for key, t in checkpoint.manifest.tensors.items() if key.startswith(f"{kind}/")]
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[DTYPE_NAMES[tensor.dtype]] += _numel(tensor.shape) * tensor.dtype.itemsize
    return f"{len(tensors)} tensors, " + ", ".join(f"{size / 1e9:.3f} GB {dtype}" for dtype, size in sizes.items())


def _tensors(checkpoint: Checkpoint) -> None:
    for key, tensor in checkpoint.manifest.tensors.items():
        files = ", ".join(dict.fromkeys(part.file for part in tensor.parts))
        print(f"  {key}  {list(tensor.shape)} {DTYPE_NAMES[tensor.dtype]}  {len(tensor.parts)} parts in {files}")


def _check(checkpoint: Checkpoint, hashes: bool) -> bool:
    problems = checkpoint.problems(hashes=hashes)
    what = "sizes and hashes" if hashes else "sizes"
    print(f"  damaged:{listed(problems)}" if problems else f"  {what} of all files are those of the manifest")
    return not problems


def _diff(one: Checkpoint, other: Checkpoint) -> bool:
    """Print what differs; whether nothing does."""
    left, right = one.manifest.tensors, other.manifest.tensors
    print(f"difference to {other.folder}:")
    for folder, only in ((one.folder, left.keys() - right.keys()), (other.folder, right.keys() - left.keys())):
        if only:
            print(f"  only in {folder}:{listed(sorted(only))}")
    same = left.keys() == right.keys()
    equal = 0
    for key in (key for key in left if key in right):
        line = _tensor_difference(one, other, key)
        equal += line is None
        if line is not None:
            print(f"  {key}: {line}")
            same = False
    print(f"  {equal} tensors are equal to the bit")
    return same


def _tensor_difference(one: Checkpoint, other: Checkpoint, key: str) -> str | None:
    a, b = one.manifest.tensors[key], other.manifest.tensors[key]
    if a.shape != b.shape:
        return f"shapes {list(a.shape)} and {list(b.shape)}"
    kind, name = key.split("/", 1)
    left, right = one.read_whole(name, kind), other.read_whole(name, kind)
    if a.dtype == b.dtype and left.equal(right):
        return None
    worst = _largest(left.float() - right.float())
    scale = max(_largest(left.float()), _largest(right.float()))
    dtypes = "" if a.dtype == b.dtype else f" ({DTYPE_NAMES[a.dtype]} and {DTYPE_NAMES[b.dtype]})"
    return f"max abs {worst:.3e}, relative {worst / scale if scale else 0.0:.3e}{dtypes}"


def _largest(value: Tensor) -> float:
    return float(value.abs().max()) if value.numel() else 0.0


def _numel(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
