"""How far the schedule simulator (tools/simulate/events.py) is from recorded steps of the same layout.

Each layout trains the model of benchmarks/step.py with tools.benchmark on fresh ranks, which records the spans of its
last two steps. The simulator gets, twice, what each piece of work took and nothing else:
* own: every unit its own duration. What is missing then is what lies between the spans: messages, Python, memory;
* median: every unit of a stage and phase the median of its kind, as a planner would predict it.
Ranks that share a core stretch each other's work; the recorded durations contain that, so four ranks on two cores test
the order and the waits, not a prediction for four cores.
"""

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import RESULTS, machine, write_json
from benchmarks.step_sides import FULL, QUICK
from engine.pipeline.program import Alone, Unit
from tools.benchmark.launch import launch
from tools.benchmark.options import TRACED_STEPS
from tools.cli import command_parser
from tools.simulate.events import Durations, bubble_bound, simulate
from tools.simulate.recorded import program_of, recorded_durations, stage_rows
from tools.timeline.spans import StepTimeline, read_step

_EXAMPLES = (
    "python -m benchmarks.simulator              # about 6 minutes on 2 idle cores",
    "python -m benchmarks.simulator --quick",
)
STEPS, WARMUP = 2, 2
GLOBAL_BATCH, MICRO_BATCH = 32, 4


@dataclass(frozen=True)
class Layout:
    """How the ranks are cut."""

    name: str
    ranks: int
    options: tuple[str, ...]


LAYOUTS = (
    Layout("PP 2, k 0", 2, ("parallel.pipeline=2",)),
    Layout("PP 2, k 4", 2, ("parallel.pipeline=2", "train.keep_activations=4")),
    Layout("PP 2, v 2, k 0", 2, ("parallel.pipeline=2", "parallel.virtual=2")),
    Layout("PP 2, layers 6 + 2", 2, ("parallel.pipeline=2", "parallel.layers=[6,2]")),
    Layout("PP 4, k 0", 4, ("parallel.pipeline=4",)),
    Layout("TP 2 × PP 2, k 4", 4, ("parallel.tensor=2", "parallel.pipeline=2", "train.keep_activations=4")),
)


def record(layout: Layout, quick: bool) -> list[StepTimeline]:
    """The traced steps of a fresh set of ranks."""
    workload = QUICK if quick else FULL
    train = {"global_batch_size": GLOBAL_BATCH, "micro_batch_size": MICRO_BATCH}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "job.yaml"
        config.write_text(yaml.safe_dump({"model": asdict(workload.model), "train": train}))
        arguments = [str(config), *layout.options, f"--steps={STEPS}", f"--warmup={WARMUP}", f"--out={folder}"]
        failure = launch(arguments, layout.ranks, threads=1, timeout_s=900)
        if failure:
            raise SystemExit(f"simulator: {layout.name}: {failure}")
        return [read_step(Path(folder), STEPS + WARMUP + traced) for traced in range(TRACED_STEPS)]


def median_durations(timeline: StepTimeline) -> Durations:
    """Every piece of work as long as the median of its stage, phase and chunk; collectives as recorded."""
    kinds: dict[tuple[int, str, int], list[float]] = defaultdict(list)
    for row in stage_rows(timeline):
        for span in row.spans:
            if span.chunk is not None:
                kinds[row.pipeline, span.phase, span.chunk].append(span.stop_s - span.start_s)
    own = recorded_durations(timeline)

    def duration(stage: int, phase: str, unit: Unit | None, turn: Alone | None = None) -> float:
        return own(stage, phase, unit) if unit is None else statistics.median(kinds[stage, phase, unit.chunk])

    return duration


def rows_of(layout: Layout, timelines: list[StepTimeline]) -> Iterator[dict[str, Any]]:
    """One line a recorded step."""
    for timeline in timelines:
        program = program_of(timeline)
        own, median = (simulate(program, d) for d in (recorded_durations(timeline), median_durations(timeline)))
        yield {
            "layout": layout.name,
            "recorded_s": timeline.seconds,
            "own_s": own.step_s,
            "median_s": median.step_s,
            "recorded_idle": sum(map(timeline.idle, timeline.rows)) / len(timeline.rows),
            "own_idle": own.idle,
            "bubble_of_equal_units": bubble_bound(program),
        }


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    print(f"\n{'layout':<20}{'recorded s':>11}{'own':>9}{'error':>8}{'median':>9}{'error':>8}")
    for row in rows:
        recorded = row["recorded_s"]
        errors = [f"{row[name]:>9.3f}{row[name] / recorded - 1:>8.1%}" for name in ("own_s", "median_s")]
        print(f"{row['layout']:<20}{recorded:>11.3f}{''.join(errors)}")
    for name in ("own_s", "median_s"):
        worst = max(abs(row[name] / row["recorded_s"] - 1) for row in rows)
        print(f"largest error with {name.removesuffix('_s')} durations: {worst:.1%}")


def main() -> None:
    parser = command_parser("simulator", __doc__, _EXAMPLES, room="benchmarks")
    parser.add_argument("--quick", action="store_true", help="a toy model, to see that everything runs")
    parser.add_argument("--output", type=Path, default=RESULTS / "simulator.json", help="the numbers")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for layout in LAYOUTS:
        if options.quick and "6 + 2" in layout.name:
            continue  # the toy has four blocks
        rows += rows_of(layout, record(layout, options.quick))
        print(
            f"{layout.name}: {rows[-1]['recorded_s']:.3f} s recorded, {rows[-1]['own_s']:.3f} s simulated", flush=True
        )
    show(rows)
    write_json({"machine": machine(), "quick": options.quick, "steps": rows}, options.output)


if __name__ == "__main__":
    main()
