"""What is in a checkpoint: where it came from, model, layout, sizes, files and metrics.

Exit status 1: damaged, or different from --diff's.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.checkpoint.format.errors import listed
from engine.checkpoint.format.folders import resolve_checkpoint
from engine.checkpoint.format.manifest import step_record
from engine.checkpoint.format.tensor_file import DTYPE_NAMES
from engine.checkpoint.reader import Checkpoint
from tools.cli import answer, command_parser, hashing, progress, table

_EXAMPLES = (
    "python -m tools.inspect runs/quickstart",
    "python -m tools.inspect runs/a/checkpoints/step_00001000 --diff runs/b",
    "python -m tools.inspect runs/18b --verify",
)


def main(argv: list[str]) -> int:
    """Run the command; the exit status."""
    parser = command_parser("inspect", __doc__, _EXAMPLES)
    parser.add_argument("checkpoint", type=Path, help="checkpoint or run folder")
    parser.add_argument("--tensors", action="store_true", help="list every tensor with its parts")
    parser.add_argument("--verify", action="store_true", help="check every byte against the manifest's hashes")
    parser.add_argument(
        "--diff", type=Path, metavar="OTHER", help="compare the tensors with another checkpoint's, of any layout"
    )
    arguments = parser.parse_args(argv)
    return answer(lambda: _inspect(arguments))


def _inspect(arguments: argparse.Namespace) -> int:
    checkpoint = Checkpoint(resolve_checkpoint(arguments.checkpoint))
    other = Checkpoint(resolve_checkpoint(arguments.diff)) if arguments.diff else None
    _summary(checkpoint)
    if arguments.tensors:
        _tensors(checkpoint)
    sound = _check(checkpoint, arguments.verify)
    same = _diff(checkpoint, other) if other else True
    return 0 if sound and same else 1


# --- contents ----------------------------------------------------------------------------------------------------


def _summary(checkpoint: Checkpoint) -> None:
    manifest = checkpoint.manifest
    print(f"{checkpoint.folder}: {manifest.content}")
    if manifest.position is not None:
        p = manifest.position
        where = f"phase {p.phase}, step {p.step}" if p.phase else f"step {p.step}"
        print(f"  {where}, samples seen {p.samples_seen:,}, bad samples {p.bad_samples}, seed {manifest.seed}")
        if p.skipped_steps or p.rewinds:
            print(f"  skipped steps {p.skipped_steps}, rewinds {p.rewinds}")
    if manifest.source:
        print(f"  from {manifest.source}")
    print("  written at " + ", ".join(f"{axis} {size}" for axis, size in manifest.layout.items()))
    print("  by " + ", ".join(f"{package} {version}" for package, version in manifest.versions.items()))
    if manifest.callbacks:
        print(f"  callbacks with state: {', '.join(manifest.callbacks)}")
    _section("model", [[name, _shown(value)] for name, value in _flat(manifest.config["model"])])
    _section("parameters", _parameters(checkpoint))
    _section("tensors", [["kind", "tensors", "GB", "dtype"], *_kinds(checkpoint)])
    _section("metrics", [[name, f"{value:.6g}"] for name, value in step_record(checkpoint.folder).items()])
    files = [[name, record.size_bytes, record.sha256] for name, record in manifest.files.items()]
    _section(f"{len(files)} files, {manifest.size_bytes() / 1e9:.3f} GB", [["file", "bytes", "sha256"], *files])


def _section(title: str, rows: list[list[Any]]) -> None:
    if rows:
        print(f"\n  {title}\n{table(rows, indent=4)}")


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings with their dotted names; those that are off are left out."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif value not in (None, False, []):
            yield prefix + name, value


def _shown(value: object) -> str:
    return "yes" if value is True else str(value)


def _parameters(checkpoint: Checkpoint) -> list[list[Any]]:
    towers: Counter[str] = Counter()
    for name, shape in checkpoint.manifest.shapes().items():
        towers[name.split(".")[0]] += math.prod(shape)
    rows: list[list[Any]] = [[tower, count] for tower, count in towers.items()]
    return [*rows, ["all", sum(towers.values())]] if len(rows) > 1 else rows


def _kinds(checkpoint: Checkpoint) -> Iterator[list[Any]]:
    """A row for each kind of tensor and dtype: kind, number, GB, dtype."""
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for key, tensor in checkpoint.manifest.tensors.items():
        row = key.split("/")[0], DTYPE_NAMES[tensor.dtype]
        counts[row] += 1
        sizes[row] += math.prod(tensor.shape) * tensor.dtype.itemsize
    for kind, dtype in counts:
        yield [kind, counts[kind, dtype], f"{sizes[kind, dtype] / 1e9:.3f}", dtype]


def _tensors(checkpoint: Checkpoint) -> None:
    rows: list[list[Any]] = [["tensor", "shape", "dtype", "parts", "files"]]
    for key, tensor in checkpoint.manifest.tensors.items():
        files = ", ".join(dict.fromkeys(part.file for part in tensor.parts))
        shape = " x ".join(map(str, tensor.shape))
        rows.append([key, f"[{shape}]", DTYPE_NAMES[tensor.dtype], len(tensor.parts), files])
    _section(f"{len(rows) - 1} tensors", rows)


def _check(checkpoint: Checkpoint, hashes: bool) -> bool:
    with hashing(checkpoint.manifest.size_bytes() if hashes else 0) as hashed:
        problems = checkpoint.problems(hashes=hashes, hashed=hashed)
    what = "sizes and hashes" if hashes else "sizes"
    print(f"\n  damaged:{listed(problems)}" if problems else f"\n  {what} of all files are those of the manifest")
    return not problems


# --- differences -------------------------------------------------------------------------------------------------


def _diff(one: Checkpoint, other: Checkpoint) -> bool:
    """Print what differs, the largest difference first; whether nothing does."""
    left, right = one.manifest.tensors, other.manifest.tensors
    print(f"\ndifference to {other.folder}:")
    for folder, only in ((one.folder, left.keys() - right.keys()), (other.folder, right.keys() - left.keys())):
        if only:
            print(f"  only in {folder}:{listed(sorted(only))}")
    common = [key for key in left if key in right]
    found = []
    with progress("comparing", len(common), "tensors") as done:
        for key in common:
            if (difference := _tensor_difference(one, other, key)) is not None:
                found.append(difference)
            done(1)
    if found:
        rows = [[key, words] for _, key, words in sorted(found, key=lambda each: (-each[0], each[1]))]
        print(table(rows))
    print(f"  {len(common) - len(found)} tensors are equal to the bit")
    return left.keys() == right.keys() and not found


def _tensor_difference(one: Checkpoint, other: Checkpoint, key: str) -> tuple[float, str, str] | None:
    """(size, tensor, the difference in words), None where there is none; other shapes are the largest difference."""
    a, b = one.manifest.tensors[key], other.manifest.tensors[key]
    if a.shape != b.shape:
        return math.inf, key, f"shapes {list(a.shape)} and {list(b.shape)}"
    kind, name = key.split("/", 1)
    left, right = one.read_whole(name, kind), other.read_whole(name, kind)
    if a.dtype == b.dtype and left.equal(right):
        return None
    worst = _largest(left.double() - right.double())
    scale = max(_largest(left.double()), _largest(right.double()))
    dtypes = "" if a.dtype == b.dtype else f" ({DTYPE_NAMES[a.dtype]} and {DTYPE_NAMES[b.dtype]})"
    words = f"max abs {worst:.3e}, relative {worst / scale if scale else 0.0:.3e}{dtypes}"
    return math.inf if math.isnan(worst) else worst, key, words


def _largest(value: Tensor) -> float:
    return float(value.abs().max()) if value.numel() else 0.0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
