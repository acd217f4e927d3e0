"""Runs parts of the GPU check in this process: `python -m tests.gpu.check --out FOLDER [--cpu] PART…` (check.sh).

FOLDER/PART.json holds status (running, passed, failed), seconds and every number, and is written after each number. The
exit status is 1 if a part failed.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine.config.schema import ParallelConfig
from engine.parallel.launch import job
from engine.resilience.exit import leave
from tests.gpu.check import numbers, profile, rest, speed
from tests.gpu.check.parts import Part

PARTS: dict[str, Callable[[Part], None]] = {
    "golden": numbers.golden,
    "curve-cpu": numbers.curve_cpu,
    "curve": numbers.curve,
    "quickstart-cpu": numbers.quickstart_cpu,
    "quickstart": numbers.quickstart,
    "gemm": speed.gemm,
    "blocks": speed.blocks,
    "fp8": speed.fp8,
    "loss": rest.loss,
    "lamb": rest.lamb,
    "copies": rest.copies,
    "tokenizer": rest.tokenizer,
}
PROFILE = "h200-measured.yaml"


def main(argv: list[str]) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cpu", action="store_true", help="toy sizes")
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "profile"])
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    failed = []
    with job(ParallelConfig()) as (mesh, device):
        for name in arguments.parts:
            torch.manual_seed(0)
            if not _run(name, arguments, mesh, device):
                failed.append(name)
    return 1 if failed else 0


def _run(name: str, arguments: argparse.Namespace, mesh: Any, device: Any) -> bool:
    file = arguments.out / f"{name}.json"
    start = time.perf_counter()

    def save(found: dict[str, Any], status: str = "running", wrong: list[str] | None = None) -> None:
        record = {"part": name, "status": status, "seconds": round(time.perf_counter() - start, 2)}
        whole = file.with_suffix(".partial")  # a part that is killed leaves the file before this one
        whole.write_text(json.dumps(record | {"wrong": wrong or [], "found": found}, indent=1) + "\n")
        whole.replace(file)

    part = Part(mesh=mesh, device=device, toy=arguments.cpu, folder=arguments.out, save=save)
    part.save({})
    try:
        if name == "profile":
            part.found = dict(profile.write(arguments.out, arguments.out / PROFILE))
        else:
            PARTS[name](part)
    except Exception as error:
        part.wrong.append(" ".join(f"{type(error).__name__}: {error}".split())[:600])
    save(part.found, "failed" if part.wrong else "passed", part.wrong)
    print(f"{name:<10} {'failed: ' + '; '.join(part.wrong[:3]) if part.wrong else 'passed'}", flush=True)
    return not part.wrong


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
