"""Peak resident memory of a step against kept micro-batches k, micro-batch size and recompute, and what was promised.

Every case is a fresh process on one thread with the model of benchmarks/step.py. A is what one micro-batch keeps: the
step measures it at start (engine/objectives/contrastive/activations.py), and train.activation_budget_gb is divided by
it. A step at k >= 1 should need (k - 1) A more than the same step at k = 0, which replays a single micro-batch at a
time, and at k = all also what the captions keep. The goal: the memory of what is kept, peak(k) - peak(0) + A, is within
10 % of k A, and the captions at k = all. Full recomputation keeps so little that its micro-batches are larger, or the
work space of one block would hide it. Allocations of 64 KiB and more go back to the system when they are freed
(MALLOC_MMAP_THRESHOLD_), so that resident memory is memory in use.
"""

import argparse
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.common import RESULTS, machine, python_module, save_chart, write_json
from tools.cli import command_parser

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_EXAMPLES = (
    "python -m benchmarks.memory                 # about 6 minutes on 2 idle cores",
    "python -m benchmarks.memory --quick",
)
GOAL = 0.10
LARGER = 4
"""Times the micro-batch and the batch, under full recomputation."""
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Case:
    """One configuration."""

    micro_batch: int
    recompute: str
    keep: int = 0
    """-1: all."""
    budget_gb: float | None = None
    """Instead of keep."""
    larger: int = 1
    """Times the global batch."""

    @property
    def name(self) -> str:
        """For the table."""
        kept = f"k = {'all' if self.keep < 0 else self.keep}" if self.budget_gb is None else f"{self.budget_gb:.3g} GB"
        return f"micro-batch {self.micro_batch}, recompute {self.recompute}, {kept}"

    @property
    def series(self) -> tuple[int, str]:
        """Cases that share their k = 0."""
        return self.micro_batch, self.recompute

    def options(self) -> list[str]:
        """As dotted overrides."""
        kept = f"keep_activations={self.keep}" if self.budget_gb is None else f"activation_budget_gb={self.budget_gb}"
        # Captions in parts, or their backward would be the peak where little else is kept.
        sizes = [f"train.{side}micro_batch_size={self.micro_batch}" for side in ("", "text_")]
        return [f"train.{kept}", *sizes, f"train.recompute={self.recompute}"]


def run(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """The case in a process of its own."""
    flags = [*case.options(), f"--batch={case.larger * options.batch}", *(["--quick"] if options.quick else [])]
    process = python_module("benchmarks.memory_case", *flags, threads=1)
    answer = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"memory: {case.name} ended with code {process.returncode}: see its error above")
    return json.loads(answer)


def cases(options: argparse.Namespace) -> list[Case]:
    """Each series begins with its k = 0."""
    micro, batch = options.micro_batch, options.batch
    many = batch // micro
    kept = sorted({1, 2, many // 2, many - 1})
    return [
        *(Case(micro, "none", k) for k in (0, *kept, -1)),
        *(Case(size, "none", k) for size in (micro // 2, 2 * micro) for k in (0, 3)),
        *(Case(micro, "selective", k) for k in (0, many - 1)),
        *(Case(LARGER * micro, "full", k, larger=LARGER) for k in (0, many - 1)),
    ]


def compare(measured: dict[Case, dict[str, Any]]) -> list[dict[str, Any]]:
    """Each case with the memory its kept activations took over what was promised for them."""
    at_zero = {case.series: result for case, result in measured.items() if case.keep == 0 and case.budget_gb is None}
    out = []
    for case, result in measured.items():
        row = {"name": case.name} | asdict(case) | result
        if result["keep"]:
            one, base = result["activation_gb"], at_zero[case.series]["peak_gb"]
            captions = result["captions_gb"] if result["keep"] == result["micro_batches"] else 0
            row["promised_gb"] = result["keep"] * one + captions
            row["kept_gb"] = result["peak_gb"] - base + one
            row["error"] = row["kept_gb"] / row["promised_gb"] - 1
        out.append(row)
    return out


def show(table: list[dict[str, Any]]) -> None:
    """Print the table."""
    print(f"\n{'case':<46}{'k':>4}{'A GB':>8}{'peak GB':>9}{'kept GB':>9}{'promised':>10}{'error':>8}")
    for row in table:
        line = f"{row['name']:<46}{row['keep']:>4}{row['activation_gb']:>8.3f}{row['peak_gb']:>9.3f}"
        if "error" in row:
            line += f"{row['kept_gb']:>9.3f}{row['promised_gb']:>10.3f}{row['error']:>8.1%}"
        print(line)
    worst = max((abs(row["error"]) for row in table if "error" in row), default=0.0)
    print(f"largest error {worst:.1%} (goal {GOAL:.0%}: {'met' if worst <= GOAL else 'missed'})")


def plot(table: list[dict[str, Any]], path: Path) -> None:
    """Peak against k with the promised line; peaks of the other cases as bars."""
    first = (table[0]["micro_batch"], table[0]["recompute"])
    line = sorted(
        (row for row in table if (row["micro_batch"], row["recompute"]) == first), key=lambda row: row["keep"]
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), width_ratios=(1, 1.2))
    peaks, keeps = [row["peak_gb"] for row in line], [row["keep"] for row in line]
    promised = [line[0]["peak_gb"] + max(0, row["keep"] - 1) * row["activation_gb"] for row in line]
    left.plot(keeps, promised, color="#8793a0", label="promised: peak at k = 0, and (k - 1) A")
    left.plot(keeps, peaks, "o", color="#0072b2", label="measured")
    left.set(xlabel="k, micro-batches that keep their activations", ylabel="peak resident memory of a step, GB")
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    for y, row in enumerate(table):
        right.barh(y, row["peak_gb"], color="#9fc6e0" if "error" not in row else "#0072b2", height=0.65)
        if "error" in row:
            right.text(row["peak_gb"], y, f"  {row['error']:+.1%}", va="center", fontsize=8)
    right.set_yticks(range(len(table)), [row["name"] for row in table], fontsize=8)
    right.invert_yaxis()
    right.margins(x=0.15)
    right.set(xlabel="peak of a step, GB; beside it the error of the promise")
    save_chart(figure, path)


def parse_options() -> argparse.Namespace:
    parser = command_parser("memory", __doc__, _EXAMPLES, room="benchmarks")
    parser.add_argument("--batch", type=int, default=32, help="global batch")
    parser.add_argument("--micro-batch", type=int, default=4, help="images of a pass")
    parser.add_argument(
        "--quick", action="store_true", help="a toy model, to see that everything runs; no promise holds"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "memory.json", help="the numbers")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    os.environ.update(ALLOCATOR)
    measured: dict[Case, dict[str, Any]] = {}
    for case in cases(options):
        measured[case] = run(case, options)
        print(f"{case.name}: {measured[case]['peak_gb']:.3f} GB", flush=True)
        if case.keep == -1:  # a budget that holds two and a half micro-batches: two fit
            budget = Case(case.micro_batch, case.recompute, budget_gb=2.5 * measured[case]["activation_gb"])
            measured[budget] = run(budget, options)
    table = compare(measured)
    show(table)
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    write_json({"machine": machine(), "options": settings, "allocator": ALLOCATOR, "table": table}, options.output)
    plot(table, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
