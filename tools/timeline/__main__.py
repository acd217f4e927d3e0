"""Draw a recorded step, one row a rank, and print how each rank spent it.

Reads RUN_DIR/timeline, which a run with log.timeline_steps=[N] writes; makes a Gantt chart (one row a rank, coloured by
phase), a trace for Perfetto or chrome://tracing, and a table of how each rank spent the step.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.cli import answer, check_file, command_parser
from tools.timeline.picture import save_picture
from tools.timeline.spans import COMMUNICATION, COMPUTE, StepTimeline, read_step
from tools.timeline.trace import save_trace

_EXAMPLES = (
    "python -m tools.timeline runs/quickstart",
    "python -m tools.timeline runs/18b --step 100 --png step.png --trace step.json",
)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("timeline", __doc__, _EXAMPLES)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a run with log.timeline_steps set")
    parser.add_argument("--step", type=int, metavar="N", help="recorded step (0-based); default: the last one")
    parser.add_argument("--png", type=Path, metavar="FILE", help="default: RUN_DIR/timeline/step_N.png")
    parser.add_argument("--trace", type=Path, metavar="FILE.json", help="default: RUN_DIR/timeline/step_N.json")
    return parser.parse_args(argv)


def table(timeline: StepTimeline) -> str:
    """Shares of the step by rank; loss counts as compute although it communicates too."""
    lines = [f"{'rank':>4}  {'place':<20} {'compute':>8} {'communication':>14} {'idle':>6}"]
    for row in timeline.rows:
        shares = [row.share(phases, timeline.seconds) for phases in (COMPUTE, COMMUNICATION)]
        lines.append(
            f"{row.rank:>4}  {timeline.place(row) or 'alone':<20} {shares[0]:>8.1%} {shares[1]:>14.1%} "
            f"{timeline.idle(row):>6.1%}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Write picture and trace; the exit code is 1, after one line on standard error, if that cannot be done."""
    arguments = _arguments(argv)
    return answer(lambda: _draw(arguments))


def _draw(arguments: argparse.Namespace) -> int:
    timeline = read_step(arguments.run_dir, arguments.step)
    stem = arguments.run_dir / "timeline" / f"step_{timeline.step:06d}"
    png, trace = arguments.png or stem.with_suffix(".png"), arguments.trace or stem.with_suffix(".json")
    for file in (png, trace):
        check_file(file)
    save_picture(timeline, arguments.run_dir.resolve().name, png)
    save_trace(timeline, trace)
    print(f"step {timeline.step}: {timeline.seconds * 1e3:.1f} ms")
    print(table(timeline))
    print(png)
    print(trace)
    return 0


if __name__ == "__main__":
    sys.exit(main())
