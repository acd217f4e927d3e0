"""The same global batch at one rank and at layouts of two and four: time against one process, and bytes sent by axis.

One rank has two threads, a rank of two or four has one, so two ranks have the same two cores. Four ranks share them
too: their share says what the layout costs, not what four cores would give. Layouts take turns in rounds, each time in
fresh processes; all train the model of benchmarks/step.py with the same batch, micro-batches and losses. Bytes are
those of the tensors that ranks put into collectives and messages in one step, summed over ranks.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.common import RESULTS, Spread, machine, run_ranks, save_chart, write_json
from tools.cli import command_parser

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_EXAMPLES = (
    "python -m benchmarks.layouts                # about 7 minutes on 2 idle cores",
    "python -m benchmarks.layouts --quick",
)
GOAL, GOAL_LAYOUTS = 0.85, ("PP 2", "DP 2")
LOSSES_AGREE = {"fp32": 1e-4, "bf16": 2e-2}
AXIS_COLOURS = {
    "tensor": "#d55e00",
    "pipeline": "#0072b2",
    "data": "#009e73",
    "replica": "#56b4e9",
    "stage": "#cc79a7",
    "world": "#e69f00",
}


@dataclass(frozen=True)
class Layout:
    """How the ranks are cut."""

    name: str
    ranks: int
    options: tuple[str, ...] = ()


ONE = Layout("1 rank", 1)
LAYOUTS = (
    ONE,
    Layout("PP 2", 2, ("parallel.pipeline=2",)),
    Layout("PP 2, 2 chunks", 2, ("parallel.pipeline=2", "parallel.virtual=2")),
    Layout("DP 2", 2),
    Layout("TP 2", 2, ("parallel.tensor=2",)),
    Layout("PP 4", 4, ("parallel.pipeline=4",)),
    Layout("TP 2 × PP 2", 4, ("parallel.tensor=2", "parallel.pipeline=2")),
    Layout("PP 2 × DP 2", 4, ("parallel.pipeline=2",)),
    Layout("DP 4", 4),
)


def measure(layout: Layout, options: argparse.Namespace) -> dict[str, Any]:
    """A fresh set of ranks; what rank 0 wrote."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        given = [str(output), *layout.options, f"train.precision={options.precision}"]
        given += [f"--batch={options.batch}", f"--steps={options.steps}", *(["--quick"] if options.quick else [])]
        threads = options.cores if layout.ranks == 1 else 1
        run_ranks(layout.ranks, "benchmarks.layouts_rank", *given, threads=threads)
        return json.loads(output.read_text())


def summary(runs: dict[Layout, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Per layout: step time over all rounds, throughput relative to one rank in the same round, bytes by axis."""
    out = []
    for layout, results in runs.items():
        relative = [
            statistics.median(one["step_s"]) / statistics.median(mine["step_s"])
            for one, mine in zip(runs[ONE], results, strict=True)
        ]
        entry = asdict(layout) | {
            "step_s": asdict(Spread.of([s for result in results for s in result["step_s"]])),
            "relative_throughput": asdict(Spread.of(relative)),
            "sent_bytes": results[0]["sent_bytes"],
            "losses": results[0]["losses"],
        }
        if layout.name in GOAL_LAYOUTS:
            entry |= {"goal": GOAL, "met": entry["relative_throughput"]["median"] >= GOAL}
        out.append(entry)
    return out


def check_losses(table: list[dict[str, Any]], precision: str) -> None:
    """Another layout, the same curve: otherwise the times compare nothing."""
    for row in table:
        for mine, one in zip(row["losses"], table[0]["losses"], strict=True):
            if abs(mine - one) > LOSSES_AGREE[precision] * abs(one):
                raise SystemExit(
                    f"layouts: losses of {row['name']} are {row['losses']}, of one rank {table[0]['losses']}"
                )


def show(table: list[dict[str, Any]]) -> None:
    """Print the table."""
    print(f"\n{'layout':<16}{'step s':>8}{'range':>16}{'throughput':>12}   sent by axis, MB a step over all ranks")
    for row in table:
        step, sent = row["step_s"], row["sent_bytes"]
        spread = f"{step['low']:.2f} - {step['high']:.2f}"
        parts = ", ".join(f"{axis} {value / 1e6:.2f}" for axis, value in sent.items())
        goal = f"   (goal {row['goal']}: {'met' if row['met'] else 'missed'})" if "goal" in row else ""
        relative = row["relative_throughput"]["median"]
        print(f"{row['name']:<16}{step['median']:>8.2f}{spread:>16}{relative:>12.2f}   {parts or 'nothing'}{goal}")


def plot(table: list[dict[str, Any]], path: Path) -> None:
    """Relative throughput, and bytes stacked by axis."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 0.42 * len(table) + 1.6), sharey=True)
    for y, row in enumerate(table):
        relative = row["relative_throughput"]
        low, high = relative["median"] - relative["low"], relative["high"] - relative["median"]
        colour = "#0072b2" if row["ranks"] <= 2 else "#9fc6e0"
        left.barh(y, relative["median"], xerr=[[low], [high]], color=colour, height=0.65, ecolor="#444444")
        start = 0.0
        for axis, value in row["sent_bytes"].items():
            right.barh(y, value / 1e6, left=start, color=AXIS_COLOURS[axis], height=0.65)
            start += value / 1e6
    left.axvline(GOAL, color="#444444", linewidth=0.8, linestyle="--")
    left.set(title="throughput relative to one rank", xlabel=f"dashed: goal {GOAL} for {' and '.join(GOAL_LAYOUTS)}")
    left.set_yticks(range(len(table)), [row["name"] for row in table])
    left.invert_yaxis()
    present = [axis for axis in AXIS_COLOURS if any(axis in row["sent_bytes"] for row in table)]
    right.legend([plt.Rectangle((0, 0), 1, 1, color=AXIS_COLOURS[axis]) for axis in present], present, frameon=False)
    right.set(title="sent in one step, over all ranks", xlabel="MB")
    save_chart(figure, path)


def parse_options() -> argparse.Namespace:
    parser = command_parser("layouts", __doc__, _EXAMPLES, room="benchmarks")
    parser.add_argument("--batch", type=int, default=32, help="global batch")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a set of ranks, after one to warm up")
    parser.add_argument("--rounds", type=int, default=2, help="fresh sets of ranks of each layout")
    parser.add_argument("--cores", type=int, default=2, help="threads of the one rank")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of all layouts")
    parser.add_argument("--quick", action="store_true", help="a toy model, to see that everything runs")
    parser.add_argument("--output", type=Path, default=RESULTS / "layouts.json", help="the numbers")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    runs: dict[Layout, list[dict[str, Any]]] = {layout: [] for layout in LAYOUTS}
    for number in range(options.rounds):
        for layout in runs if number % 2 == 0 else reversed(runs):
            runs[layout].append(measure(layout, options))
            print(
                f"round {number + 1}: {layout.name}  {statistics.median(runs[layout][-1]['step_s']):.2f} s", flush=True
            )
    table = summary(runs)
    check_losses(table, options.precision)
    show(table)
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    write_json({"machine": machine(), "options": settings, "table": table, "runs": _raw(runs)}, options.output)
    plot(table, options.output.with_suffix(".png"))


def _raw(runs: dict[Layout, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [
        {"layout": layout.name, "round": i} | run for layout, results in runs.items() for i, run in enumerate(results)
    ]


if __name__ == "__main__":
    main()
