"""Rewrite a checkpoint into files that match a layout.

python -m tools.reshard SRC DST --tensor T --pipeline P [--data D] [--dry-run]

Offline: no GPU, no launch. Streams: one part of one tensor is in memory at a time. The hash of every source file is
checked first. Optional by design, since every layout reads every checkpoint; it makes loading touch few files.
--dry-run prints the plan and writes nothing.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from engine.checkpoint.errors import CheckpointError
from engine.checkpoint.folders import resolve_checkpoint
from engine.checkpoint.reader import Checkpoint
from engine.checkpoint.reshard import TargetLayout, plan_reshard
from engine.checkpoint.write import PlannedFile, PlannedPart, refuse_existing, write_checkpoint


def main(argv: list[str]) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.reshard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="checkpoint or run folder")
    parser.add_argument("target", type=Path, help="folder to make")
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--data", type=int, default=1, help="files that share the elements of one tensor x stage rank")
    parser.add_argument("--dry-run", action="store_true", help="print the plan only")
    arguments = parser.parse_args(argv)
    try:
        _reshard(arguments)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _reshard(arguments: argparse.Namespace) -> None:
    layout = TargetLayout(tensor=arguments.tensor, pipeline=arguments.pipeline, data=arguments.data)
    source = Checkpoint(resolve_checkpoint(arguments.source))
    files = plan_reshard(source.manifest, layout)
    _print_plan(source, files, arguments.target, layout)
    if arguments.dry_run:
        return
    refuse_existing(arguments.target)
    began = time.perf_counter()
    source.verify()
    verified = time.perf_counter()

    def read(part: PlannedPart):
        kind, name = part.key.split("/", 1)
        return source.read(name, part.where, kind)

    degrees = {"tensor": layout.tensor, "pipeline": layout.pipeline, "data": layout.data}
    manifest = replace(source.manifest, tensors={}, files={}, layout=degrees)
    write_checkpoint(arguments.target, files, read, manifest)
    gb, seconds = source.manifest.size_bytes() / 1e9, time.perf_counter() - verified
    print(f"verified in {verified - began:.1f} s, rewrote {gb:.2f} GB in {seconds:.1f} s ({gb / seconds:.2f} GB/s)")


def _print_plan(source: Checkpoint, files: list[PlannedFile], target: Path, layout: TargetLayout) -> None:
    manifest = source.manifest
    was = ", ".join(f"{axis} {size}" for axis, size in manifest.layout.items())
    print(f"{source.folder}: {len(manifest.files)} files, {manifest.size_bytes() / 1e9:.3f} GB, written at {was}")
    print(f"{target}: {len(files)} files for tensor {layout.tensor}, pipeline {layout.pipeline}, data {layout.data}")
    for file in files:
        print(f"  {file.name}  {file.size_bytes / 1e9:.3f} GB  {len(file.parts)} parts")
    largest = max(part.size_bytes for file in files for part in file.parts)
    print(f"largest part {largest / 1e6:.1f} MB: memory stays within a few of these")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
