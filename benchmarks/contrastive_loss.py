"""Memory and time of the contrastive loss, forward and backward, against batch size, width and ranks.

Forms, all float32 with the same inputs and scale 100 (benchmarks/contrastive_forms.py):
* full_matrix: every rank gathers with gradient and holds the B × B logits under autograd;
* local_loss: gather with gradient, two strips of b × B logits under autograd, as open_clip's recipes run it;
* gather, ring: engine.objectives.contrastive.softmax.contrastive_loss.
Every run is a fresh set of processes, and forms alternate within a repeat; the table holds medians.
`computed` is what a formula promises for the memory. The goal case runs first; what does not fit the memory
or time limits is listed as skipped, with the reason.
"""

import argparse
import itertools
import math
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.common import CHILD_ENVIRONMENT, RESULTS, machine, save_chart, write_json
from benchmarks.contrastive_forms import FORMS, Case, Measurement, computed_bytes, measure
from tools.cli import command_parser

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_EXAMPLES = (
    "python -m benchmarks.contrastive_loss       # everything, under 15 minutes on 2 cores",
    "python -m benchmarks.contrastive_loss --batches 65536 --ranks 4 --widths 512 --max-seconds 300 --budget-s 2000",
)
GOAL_BATCH, GOAL_RANKS = 32768, 4
GOAL_MEMORY_SHARE, GOAL_TIME_SHARE = 1 / 20, 0.8
LINE_STYLES = {1: ":", 2: "--", 4: "-"}


class Bench:
    """Runs the cases under the limits and keeps what came out."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.deadline = time.monotonic() + options.budget_s
        self.measured: dict[Case, list[Measurement]] = {}
        self.skipped: dict[Case, str] = {}

    def run(self) -> None:
        """The goal first, then every group of forms from small batches to large ones."""
        options = self.options
        axes = (options.batches, options.widths, options.ranks)
        groups = list(itertools.product(*(sorted(axis) for axis in axes)))
        goal = (GOAL_BATCH, min(options.widths), GOAL_RANKS)
        for batch, width, ranks in [*(g for g in groups if g == goal), *(g for g in groups if g != goal)]:
            cases = [Case(form=form, ranks=ranks, width=width, batch=batch) for form in FORMS]
            if ranks == 1:
                cases = [case for case in cases if case.form != "ring"]  # a ring of one is "gather"
            for repeat in range(options.repeats):
                for case in cases:
                    self._one(case, repeat, forced=(batch, width, ranks) == goal)

    def _one(self, case: Case, repeat: int, forced: bool) -> None:
        reason = self._why_not(case, repeat, forced)
        if reason:
            if repeat == 0:
                self.skipped[case] = reason
                print(f"{_name(case)}  skipped: {reason}", flush=True)
            return
        threads = max(1, (os.cpu_count() or 1) // case.ranks)
        result = measure(case, threads)
        self.measured.setdefault(case, []).append(result)
        print(
            f"{_name(case)}  {result.time_s:8.3f} s  {result.memory_bytes / 2**20:8.1f} MiB extra "
            f"(computed {computed_bytes(case) / 2**20:.1f})  loss {result.loss:.6f}",
            flush=True,
        )

    def _why_not(self, case: Case, repeat: int, forced: bool) -> str:
        """The reason to leave a run out, or an empty string."""
        if repeat and case not in self.measured:
            return "no first run"
        needed_gb = case.ranks * computed_bytes(case) / 1e9
        if needed_gb > self.options.max_gb:
            return f"{needed_gb:.1f} GB over all ranks, the limit is {self.options.max_gb:g}"
        expected_s = self._expected_s(case)
        if repeat and not forced and expected_s > self.options.repeat_below_s:
            return "long runs are not repeated"
        if expected_s > self.options.max_seconds and not forced:
            return f"about {expected_s:.0f} s expected, the limit is {self.options.max_seconds:g}"
        if time.monotonic() + expected_s > self.deadline:
            return f"about {expected_s:.0f} s expected, past the budget of {self.options.budget_s:g} s"
        return ""

    def _expected_s(self, case: Case) -> float:
        """From the same form's largest measured work, which grows with B² · D (times W where all ranks do all)."""

        def work(other: Case) -> float:
            copies = other.ranks if other.form == "full_matrix" else 1
            return other.batch**2 * other.width * copies

        known = [other for other in self.measured if other.form == case.form]
        if not known:
            return 0.0
        nearest = min(known, key=lambda other: abs(math.log(work(other) / work(case))))
        seconds = statistics.median(result.time_s for result in self.measured[nearest])
        return seconds * work(case) / work(nearest)

    def summary(self) -> list[dict[str, Any]]:
        """Medians per case."""
        return [
            asdict(case)
            | {
                "time_s": statistics.median(result.time_s for result in results),
                "memory_bytes": int(statistics.median(result.memory_bytes for result in results)),
                "computed_bytes": computed_bytes(case),
                "loss": results[0].loss,
            }
            for case, results in self.measured.items()
        ]


def _name(case: Case) -> str:
    return f"B {case.batch:6d}  D {case.width:4d}  ranks {case.ranks}  {case.form:11s}"


def growth(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Exponents p of time ~ B^p and memory ~ B^p, least squares in log-log over B of at least 4096."""
    keys = sorted({(row["form"], row["ranks"], row["width"]) for row in rows})
    for form, ranks, width in keys:
        line = [r for r in rows if (r["form"], r["ranks"], r["width"]) == (form, ranks, width)]
        line = [row for row in line if row["batch"] >= 4096]
        if len(line) < 2:
            continue
        x = [math.log(row["batch"]) for row in line]
        slopes = {
            f"{name}_exponent": statistics.linear_regression(x, [math.log(row[field]) for row in line]).slope
            for name, field in (("time", "time_s"), ("memory", "memory_bytes"))
        }
        yield {"form": form, "ranks": ranks, "width": width, "batches": [r["batch"] for r in line]} | slopes


def shares(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Ours over the local-loss form, where both were measured."""
    by_case = {(r["form"], r["ranks"], r["width"], r["batch"]): r for r in rows}
    for (form, ranks, width, batch), row in by_case.items():
        peer = by_case.get(("local_loss", ranks, width, batch))
        if form in ("gather", "ring") and peer:
            yield {
                "form": form,
                "ranks": ranks,
                "width": width,
                "batch": batch,
                "time_share": row["time_s"] / peer["time_s"],
                "memory_share": row["memory_bytes"] / peer["memory_bytes"],
            }


def report(bench: Bench) -> dict[str, Any]:
    """Everything that is written to the JSON file."""
    rows = bench.summary()
    return {
        "machine": machine(),
        "options": {name: value for name, value in vars(bench.options).items() if name != "output"},
        "medians": rows,
        "runs": [asdict(case) | asdict(result) for case, results in bench.measured.items() for result in results],
        "growth": list(growth(rows)),
        "shares_of_local_loss": list(shares(rows)),
        "skipped": [asdict(case) | {"reason": reason} for case, reason in bench.skipped.items()],
    }


def show(result: dict[str, Any]) -> None:
    """Print growth, shares and the goal."""
    print("\ngrowth over B >= 4096")
    for row in result["growth"]:
        print(
            f"  D {row['width']:4d}  ranks {row['ranks']}  {row['form']:11s}  time ~ B^{row['time_exponent']:.2f}"
            f"  memory ~ B^{row['memory_exponent']:.2f}"
        )
    print("\nours over local_loss")
    for row in result["shares_of_local_loss"]:
        goal = ""
        if row["batch"] == GOAL_BATCH and row["ranks"] == GOAL_RANKS:
            met = row["memory_share"] <= GOAL_MEMORY_SHARE and row["time_share"] <= GOAL_TIME_SHARE
            goal = f"  goal 1/{1 / GOAL_MEMORY_SHARE:.0f} and {GOAL_TIME_SHARE}: {'met' if met else 'missed'}"
        print(
            f"  B {row['batch']:6d}  D {row['width']:4d}  ranks {row['ranks']}  {row['form']:6s}"
            f"  memory 1/{1 / row['memory_share']:.1f}  time {row['time_share']:.2f}{goal}"
        )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Memory and time against batch, one column a width, one colour a form, one line style a number of ranks."""
    widths = sorted({row["width"] for row in rows})
    figure, axes = plt.subplots(2, len(widths), figsize=(5.5 * len(widths), 8), squeeze=False, sharex=True)
    quantities = (("memory_bytes", 2**20, "extra peak memory a rank, MiB"), ("time_s", 1.0, "time, s"))
    for (row_axes, (field, unit, label)), (column, width) in itertools.product(
        zip(axes, quantities, strict=True), enumerate(widths)
    ):
        axis = row_axes[column]
        for colour, form in enumerate(FORMS):
            for ranks, style in LINE_STYLES.items():
                line = [
                    (r["batch"], r[field] / unit)
                    for r in sorted(rows, key=lambda r: r["batch"])
                    if (r["form"], r["ranks"], r["width"]) == (form, ranks, width)
                ]
                if line:
                    name = f"{form}, {ranks} ranks" if ranks > 1 else f"{form}, 1 rank"
                    axis.plot(*zip(*line, strict=True), style, marker=".", color=f"C{colour}", label=name)
        axis.set(xscale="log", yscale="log", ylabel=label, title=f"D = {width}")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("global batch B")
    axes[0][0].legend(fontsize=7)
    figure.suptitle("Contrastive loss, forward and backward, float32 on the CPU")
    save_chart(figure, path)


def parse_options() -> argparse.Namespace:
    parser = command_parser("contrastive_loss", __doc__, _EXAMPLES, room="benchmarks")
    batches = [2**k for k in range(10, 17)]
    parser.add_argument("--batches", type=int, nargs="+", default=batches, help="global batches B")
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1536], help="embedding widths D")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[1, 2, 4], choices=sorted(LINE_STYLES), help="ranks of a case"
    )
    parser.add_argument("--repeats", type=int, default=3, help="process sets per case")
    parser.add_argument("--repeat-below-s", type=float, default=2.0, help="longer runs are not repeated")
    parser.add_argument("--max-seconds", type=float, default=60.0, help="skip runs expected to last longer")
    parser.add_argument("--max-gb", type=float, default=20.0, help="skip cases that need more over all ranks")
    parser.add_argument("--budget-s", type=float, default=840.0, help="start nothing that would end later")
    parser.add_argument("--output", type=Path, default=RESULTS / "contrastive_loss.json", help="the numbers")
    return parser.parse_args()


def main() -> None:
    # Waiting ranks must leave their core to the others; read by the processes that the fork server starts.
    os.environ.update(CHILD_ENVIRONMENT)
    bench = Bench(parse_options())
    bench.run()
    result = report(bench)
    show(result)
    output: Path = bench.options.output
    write_json(result, output)
    plot(result["medians"], output.with_suffix(".png"))


if __name__ == "__main__":
    main()
