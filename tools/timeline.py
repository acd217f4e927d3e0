"""Draw a recorded step: python -m tools.timeline RUN_DIR [--step N] [--png FILE] [--trace FILE.json].

Reads RUN_DIR/timeline, which a run with log.timeline_steps=[N] writes; makes a Gantt chart (one row a rank, coloured by
phase), a trace for Perfetto or chrome://tracing, and a table of how each rank spent the step.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.timeline_picture import save_picture
from tools.timeline_spans import COMMUNICATION, COMPUTE, StepTimeline, read_step
from tools.timeline_trace import save_trace


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.timeline", description="Draw the phases of a recorded step.")
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
    try:
        timeline = read_step(arguments.run_dir, arguments.step)
        stem = arguments.run_dir / "timeline" / f"step_{timeline.step:06d}"
        png, trace = arguments.png or stem.with_suffix(".png"), arguments.trace or stem.with_suffix(".json")
        save_picture(timeline, arguments.run_dir.resolve().name, png)
        save_trace(timeline, trace)
    except (OSError, ValueError) as error:
        print(f"timeline: {error}", file=sys.stderr)
        return 1
    print(f"step {timeline.step}: {timeline.seconds * 1e3:.1f} ms")
    print(table(timeline))
    print(png)
    print(trace)
    return 0


if __name__ == "__main__":
    sys.exit(main())
