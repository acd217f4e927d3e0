"""Look a machine over before training on it: versions and their ranges, devices, the kernels that would be chosen and
why, shared memory, open files, names and ports; then what every rank multiplies, copies and writes, a sum over every
group of the layout, and the clocks: whoever stands out is named.

Run it first on a new cluster, with the launcher of the job, and paste what it prints into a bug report. The exit status
is 1 if anything is wrong.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

from engine.config.read import Config, load_config
from engine.resilience.exit import leave
from models.config import ModelConfig
from tools.cli import answer, check_file, command_parser, complain
from tools.doctor.rows import OK, WRONG, Row, failure

_EXAMPLES = (
    "python -m tools.doctor",
    "torchrun --standalone --nproc-per-node 8 -m tools.doctor --config examples/18b/2_clip.yaml --folder runs/18b-clip",
)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("doctor", __doc__, _EXAMPLES)
    parser.add_argument(
        "--config", type=Path, metavar="FILE.yaml", help="the job whose kernels and groups are looked at"
    )
    parser.add_argument("--folder", type=Path, metavar="DIR", help="measure the disk of this folder, a run_dir")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="the report as JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on this rank; the exit status."""
    arguments = _arguments(argv)
    return answer(lambda: _examine(arguments))


def _examine(arguments: argparse.Namespace) -> int:
    if arguments.out:
        check_file(arguments.out)
    config = load_config(str(arguments.config), []) if arguments.config else None
    rows = _rows(config, arguments.folder)
    wrong = [row for row in rows if row.verdict == WRONG]
    if os.environ.get("RANK", "0") != "0":
        return 1 if wrong else 0
    for row in rows:
        print(_line(row))
    if arguments.out:
        arguments.out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if wrong:
        return complain(f"{len(wrong)} of {len(rows)} are wrong: {', '.join(row.what for row in wrong)}")
    print(f"nothing is wrong among {len(rows)} things looked at")
    return 0


def _rows(config: Config | None, folder: Path | None) -> list[Row]:
    """A check that raises, or cannot be imported, is a row as well: what comes after it is still of use."""
    rows: list[Row] = []
    parts: list[tuple[str, Callable[[], list[Row]]]] = [
        ("machine", lambda: _module("machine").machine_rows()),
        ("libraries", lambda: _module("libraries").library_rows()),
        ("devices", lambda: _module("machine").device_rows()),
        ("limits", lambda: _module("machine").limit_rows()),
        ("kernels", lambda: _module("kernels").kernel_rows(config.model if config else ModelConfig(backend="auto"))),
        ("the job", lambda: _module("kernels").job_rows(config) if config else []),
        ("ranks", lambda: _on_every_rank(config, folder)),
    ]
    for name, part in parts:
        try:
            rows += part()
        except Exception as error:  # whatever a library does on a machine that nobody has seen
            rows.append(failure(name, error))
    return rows


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"tools.doctor.{name}")


def _on_every_rank(config: Config | None, folder: Path | None) -> list[Row]:
    from engine.config.schema import ParallelConfig
    from engine.parallel.launch import job
    from tools.doctor.ranks import rank_rows

    replica = config.parallel.tensor * config.parallel.pipeline if config else 1
    fits = config is not None and int(os.environ.get("WORLD_SIZE", "1")) % replica == 0
    parallel = config.parallel if config and fits else ParallelConfig()
    with job(replace(parallel, timeout_minutes=2)) as (mesh, device):
        return rank_rows(mesh, device, folder)


def _line(row: Row) -> str:
    mark = "" if row.verdict == OK else f"  [{row.verdict}]"
    return f"{row.what:<28} {row.found}{mark}" + (f" {row.advice}" if row.advice else "")


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
