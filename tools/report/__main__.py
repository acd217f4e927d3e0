"""Compare runs on one page.

The page is one self-contained HTML file (charts inline, no script, no outside resource): curves, evaluation,
config differences and held-out images with their nearest captions. It reads `metrics.jsonl` and, where they
exist, `config.yaml`, `result.json` and `predictions.json` of each folder, and works while a run is going on.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.cli import CommandError, answer, check_file, command_parser
from tools.report.curves import PALETTE
from tools.report.page import render
from tools.report.picture import save_picture
from tools.report.runs import load_runs

_EXAMPLES = (
    "python -m tools.report runs/quickstart",
    "python -m tools.report runs/a runs/b --out compared.html --png compared.png",
)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("report", __doc__, _EXAMPLES)
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="folder with a metrics.jsonl")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="the page; default: report.html in the first run")
    parser.add_argument("--png", type=Path, metavar="FILE.png", help="also write one picture")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report; the exit code is 1, after one line on standard error, if it cannot be made."""
    arguments = _arguments(argv)
    return answer(lambda: _report(arguments), ValueError)


def _report(arguments: argparse.Namespace) -> int:
    if len(arguments.run_dirs) > len(PALETTE):
        raise CommandError(f"{len(arguments.run_dirs)} runs; at most {len(PALETTE)} can be told apart on a page")
    runs = load_runs(arguments.run_dirs)
    page = arguments.out or arguments.run_dirs[0] / "report.html"
    for file in (page, arguments.png):
        if file is not None:
            check_file(file)
    page.write_text(render(runs), encoding="utf-8")
    print(page)
    if arguments.png is not None:
        save_picture(runs, arguments.png)
        print(arguments.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
