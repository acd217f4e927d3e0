"""Rewrite a checkpoint into files that match a layout.

Offline: no GPU, no launch. Streams: one part of one tensor is in memory at a time. The hash of every source file is
checked first. Optional by design, since every layout reads every checkpoint; it makes loading touch few files.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from engine.checkpoint.format.folders import resolve_checkpoint
from engine.checkpoint.reader import Checkpoint
from engine.checkpoint.reshard import TargetLayout, plan_reshard
from engine.checkpoint.write import PlannedFile, PlannedPart, refuse_existing, write_checkpoint
from tools.cli import answer, check_folder, command_parser, hashing, positive, progress

_EXAMPLES = (
    "python -m tools.reshard runs/18b runs/18b-tp8 --tensor 8 --pipeline 4 --dry-run",
    "python -m tools.reshard runs/l14/checkpoints/step_00001000 l14-one-file",
)


def main(argv: list[str]) -> int:
    """Run the command; the exit status."""
    parser = command_parser("reshard", __doc__, _EXAMPLES)
    parser.add_argument("source", type=Path, help="checkpoint or run folder")
    parser.add_argument("target", type=Path, help="folder to make")
    parser.add_argument("--tensor", type=positive, default=1, metavar="T", help="tensor ranks to write for")
    parser.add_argument("--pipeline", type=positive, default=1, metavar="P", help="stages to write for")
    parser.add_argument("--data", type=positive, default=1, metavar="D", help="files that share a rank's elements")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    arguments = parser.parse_args(argv)
    return answer(lambda: _reshard(arguments))


def _reshard(arguments: argparse.Namespace) -> int:
    layout = TargetLayout(tensor=arguments.tensor, pipeline=arguments.pipeline, data=arguments.data)
    source = Checkpoint(resolve_checkpoint(arguments.source))
    files = plan_reshard(source.manifest, layout)
    _print_plan(source, files, arguments.target, layout)
    if arguments.dry_run:
        return 0
    refuse_existing(arguments.target)
    check_folder(arguments.target.parent, sum(file.size_bytes for file in files))
    began = time.perf_counter()
    with hashing(source.manifest.size_bytes()) as hashed:
        source.verify(hashed)
    verified = time.perf_counter()

    def read(part: PlannedPart):
        kind, name = part.key.split("/", 1)
        done(part.size_bytes / 1e6)
        return source.read(name, part.where, kind)

    degrees = {"tensor": layout.tensor, "pipeline": layout.pipeline, "data": layout.data}
    manifest = replace(source.manifest, tensors={}, tables=[], files={}, layout=degrees)
    with progress("rewriting", sum(file.size_bytes for file in files) / 1e6, "MB") as done:
        write_checkpoint(arguments.target, files, read, manifest)
    gb, seconds = source.manifest.size_bytes() / 1e9, time.perf_counter() - verified
    print(f"verified in {verified - began:.1f} s, rewrote {gb:.2f} GB in {seconds:.1f} s ({gb / seconds:.2f} GB/s)")
    return 0


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
