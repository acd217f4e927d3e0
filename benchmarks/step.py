"""One training step in one process: the engine, the same model in plain PyTorch, and open_clip's nearest model.

The model is EVA-CLIP-18B's shape scaled down (benchmarks/step_sides.py), one thread. Every side lives in a fresh
process and they take turns within a round: the table holds medians over rounds and their range. `ours` keeps all
activations, `ours_stash` none (k = 0, two micro-batches), `ours_stash_fc2` and `ours_stash_all` none but outputs of
products (train.keep_outputs); `_unwatched` have health.audit_every_steps=0; `plain_checkpoint` computes every block
again in backward; `ours_lamb` has the paper's optimizer where all others run AdamW; `ours_compiled` and its kin have
model.norm_kernel=compiled and `ours_fused` model.block_kernels=fused, both of which torch.compile writes, as it does
all of `plain_compiled`: the first steps of a side, when it compiles, are not timed. With `_before` behind the name a
side of ours is that of another checkout (--before), where it has one of that name. `plain` and its kin multiply bf16
as autocast has it; with `_wide` behind the name bf16 products are computed in fp32 and rounded once, as the engine
does on a CPU without bf16. Before anything is timed, the first losses of ours and plain must agree. A share of the
peak is useful operations (3 forwards) over a large matrix product's rate.
"""

import argparse
import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.common import RESULTS, ROOT, Spread, machine, python_module, save_chart, write_json
from benchmarks.step_sides import GEMM_REPEATS, GEMM_SIDE, SIDES, Workload, workload_of
from tools.cli import command_parser

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_EXAMPLES = (
    "python -m benchmarks.step                   # about 9 minutes on 2 idle cores",
    "python -m benchmarks.step --peers FOLDER    # with open_clip installed there (benchmarks/README.md)",
    "python -m benchmarks.step --sides ours_fused plain_compiled plain --precisions fp32 --batch 8 --captions full",
    "python -m benchmarks.step --profile ours --precisions bf16",
    "git worktree add ../before COMMIT && python -m benchmarks.step --before ../before --sides ours ours_fused plain",
)
GOALS = (
    ("ours", "plain", "fp32", 1.05),
    ("ours", "plain", "bf16", 1.3),
    ("ours", "plain_wide", "bf16", 1.3),
    ("ours_fused", "plain_compiled", "fp32", 1.05),
    ("ours_fused", "plain_compiled", "bf16", 1.25),
    ("ours_fused", "plain_compiled_wide", "bf16", 1.25),
    ("ours_stash", "plain_checkpoint", "fp32", 1.0),
    ("ours_stash", "plain_checkpoint", "bf16", 1.0),
    ("ours_stash", "plain_checkpoint_wide", "bf16", 1.0),
    ("ours_stash_fc2", "ours_stash", "fp32", 1.05),
    ("ours_stash_fc2", "ours_stash", "bf16", 1.05),
    ("ours_stash_all", "ours_stash", "fp32", 1.2),
    ("ours_stash_all", "ours_stash", "bf16", 1.2),
    *(
        (side, before, precision, goal)
        for precision in ("fp32", "bf16")
        for side, before, goal in (
            ("ours_unwatched", "ours_before", 1.0),
            ("ours_stash_unwatched", "ours_stash_before", 1.0),
            ("ours_stash_fc2", "ours_stash_before", 1.05),
            ("ours_stash_fc2_compiled", "ours_stash_before", 1.05),
            ("ours_stash_all", "ours_stash_before", 1.2),
            ("ours_stash_all_compiled", "ours_stash_before", 1.2),
        )
    ),
)
SAME_MODEL = (
    "ours",
    "ours_fused",
    "ours_compiled",
    "plain",
    "plain_compiled",
    "ours_stash",
    "ours_stash_fc2",
    "ours_stash_all",
    "ours_stash_fc2_compiled",
    "ours_stash_all_compiled",
    "ours_unwatched",
    "ours_stash_unwatched",
    "plain_checkpoint",
    "plain_wide",
    "plain_compiled_wide",
    "plain_checkpoint_wide",
)
WIDE = "_wide"
"""Ends the name of a side that means something in bf16 only."""
BEFORE = "_before"
"""Ends the name of a side of the build that --before names."""
LOSSES_AGREE = {"fp32": 1e-4, "bf16": 3e-2}
SHORT_CAPTIONS = ("ours", "plain")
WARM_UP_ROUNDS = 1

COLOURS = {"ours": "#0072b2", "plain": "#e69f00", "open_clip": "#009e73"}


class SideFailed(RuntimeError):
    """A side ended without an answer."""


class Worker:
    """A side's process."""

    def __init__(self, side: str, precision: str, options: argparse.Namespace):
        self.side, self.precision = side, precision
        size = ["--batch", str(options.batch)] if options.batch else []
        arguments = [side.removesuffix(BEFORE), precision, *(["--quick"] if options.quick else []), *size]
        peers = options.peers if side == "open_clip" else ""
        root = options.before.resolve() if side.endswith(BEFORE) else ROOT
        self.process = python_module("benchmarks.step_sides", *arguments, threads=1, extra_path=peers, root=root)

    def step(self, captions: str) -> dict[str, float]:
        """One training step."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"captions": captions}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise SideFailed(f"{self.side} {self.precision} ended: see its error above") from None
        answer = self.process.stdout.readline()
        if not answer:
            raise SideFailed(f"{self.side} {self.precision} ended with code {self.process.wait()}: see its error above")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


def _is_side_of(checkout: Path, side: str) -> bool:
    """Whether another build has a side of this name."""
    return f'"{side}"' in (checkout / "benchmarks" / "step_sides.py").read_text(encoding="utf-8")


@contextmanager
def workers(precision: str, options: argparse.Namespace) -> Iterator[list[Worker]]:
    """All sides of a precision, and the matrix product."""
    with ExitStack() as stack:
        sides = [side for side in options.sides if precision == "bf16" or not side.endswith(WIDE)]
        if options.before is not None:
            sides += [side + BEFORE for side in sides if side.startswith("ours") and _is_side_of(options.before, side)]
        started = [Worker(side, precision, options) for side in (*sides, "gemm")]
        for worker in started:
            stack.callback(worker.close)
        yield started


def measure(precision: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every answer of every side, with its round and captions; the first rounds warm up and check the losses."""
    rows = []
    with workers(precision, options) as started:
        for number in range(WARM_UP_ROUNDS + options.rounds):
            # Odd rounds go the other way, so that no side always follows the same neighbour.
            for worker in started if number % 2 == 0 else reversed(started):
                for captions in options.captions if worker.side in SHORT_CAPTIONS else ("full",):
                    place = {"side": worker.side, "precision": precision, "round": number, "captions": captions}
                    rows.append(place | worker.step(captions))
            if number == 0:
                check_losses(rows, precision)
    return rows


def check_losses(rows: list[dict[str, Any]], precision: str) -> None:
    """First losses, at the same weights on the same batch, must agree where the model is the same."""
    first = {row["side"]: row["loss"] for row in reversed(rows) if row["side"].removesuffix(BEFORE) in SAME_MODEL}
    reference = next(iter(first.values()), 0.0)
    for loss in first.values():
        if abs(loss - reference) > LOSSES_AGREE[precision] * abs(reference):
            raise SystemExit(f"step: {precision} losses differ between sides of the same model: {first}")
    print(f"{precision}: first losses {first}")


def summary(rows: list[dict[str, Any]], workload: Workload) -> list[dict[str, Any]]:
    """Per side, precision and captions: times, rates, peak memory, share of the measured peak."""
    timed = [row for row in rows if row["round"] >= WARM_UP_ROUNDS]
    peaks = {
        precision: 2
        * GEMM_SIDE**3
        * GEMM_REPEATS
        / Spread.of([row["cpu_s"] for row in timed if _is(row, "gemm", precision)]).low
        for precision in {row["precision"] for row in rows}
    }
    out = []
    keys = {(r["side"], r["precision"], r["captions"]) for r in timed}
    for side, precision, captions in sorted(keys, key=_place):
        mine = [row for row in timed if _is(row, side, precision) and row["captions"] == captions]
        cpu, wall = (Spread.of([row[clock] for row in mine]) for clock in ("cpu_s", "wall_s"))
        entry = {
            "side": side,
            "precision": precision,
            "captions": captions,
            "cpu_s": asdict(cpu),
            "wall_s": asdict(wall),
        }
        if side == "gemm":
            out.append(entry | {"gflops": peaks[precision] / 1e9})
            continue
        out.append(
            entry
            | {
                "images_per_cpu_s": workload.batch / cpu.median,
                "images_per_s": workload.batch / wall.median,
                "peak_gb": max(row["peak_gb"] for row in mine),
                "share_of_gemm_peak": workload.flops() / cpu.median / peaks[precision],
            }
        )
    return out


def _place(key: tuple[str, str, str]) -> tuple[bool, int, str, str]:
    """Where a row of the table stands: (side, precision, captions)."""
    side, precision, captions = key
    return precision == "bf16", [*SIDES].index(side.removesuffix(BEFORE)), side, captions


def _is(row: dict[str, Any], side: str, precision: str) -> bool:
    return row["side"] == side and row["precision"] == precision


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """CPU-seconds of a step over those of the side in front, full captions, against what was promised.

    Median and range over the rounds of the two steps of a round: the machine's speed drifts from minute to minute.
    """
    out = []
    since = sorted({(row["side"], row["precision"]) for row in rows if row["side"].endswith(BEFORE)})
    never_slower = [(side.removesuffix(BEFORE), side, precision, 1.0) for side, precision in since]
    for ours, plain, precision, goal in (*GOALS, *never_slower):
        mine, theirs = ({row["round"]: row["cpu_s"] for row in _timed(rows, side, precision)} for side in (ours, plain))
        if mine and theirs:
            ratio = Spread.of([theirs[number] / mine[number] for number in mine])
            entry = {"ours": ours, "plain": plain, "precision": precision, "ratio": ratio.median, "goal": goal}
            out.append(entry | {"low": ratio.low, "high": ratio.high, "met": ratio.median >= goal})
    return out


def _timed(rows: list[dict[str, Any]], side: str, precision: str) -> list[dict[str, Any]]:
    return [
        row
        for row in rows
        if _is(row, side, precision) and row["captions"] == "full" and row["round"] >= WARM_UP_ROUNDS
    ]


def show(result: dict[str, Any]) -> None:
    """Print the table and the goals."""
    columns = f"{'images/CPU-s':>13}{'images/s':>10}{'range':>16}{'peak GB':>9}{'of GEMM':>9}"
    width = 2 + max(len(row["side"]) for row in result["table"])
    print(f"\n{'side':<{width + 6}}{'captions':<10}{columns}")
    for row in result["table"]:
        name = f"{row['side']:<{width}}{row['precision']:<6}{row['captions']:<10}"
        if row["side"] == "gemm":
            print(f"{name}{row['gflops']:>13.0f} GFLOP/s")
            continue
        batch, cpu = result["batch"], row["cpu_s"]
        spread = f"{batch / cpu['high']:.2f} - {batch / cpu['low']:.2f}"
        print(
            f"{name}{row['images_per_cpu_s']:>13.2f}{row['images_per_s']:>10.2f}{spread:>16}{row['peak_gb']:>9.2f}"
            f"{row['share_of_gemm_peak']:>9.0%}"
        )
    for row in result["goals"]:
        verdict = "met" if row["met"] else "missed"
        of_rounds = f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f} over rounds)"
        print(f"{row['precision']} {row['ours']} / {row['plain']}: {of_rounds}, goal {row['goal']}: {verdict}")
    for side, reason in result["skipped"].items():
        print(f"{side} skipped: {reason}")


def plot(result: dict[str, Any], path: Path) -> None:
    """Rates as bars with their range, one panel a precision."""
    precisions = list(dict.fromkeys(row["precision"] for row in result["table"]))
    figure, axes = plt.subplots(1, len(precisions), figsize=(5.5 * len(precisions), 3.8), squeeze=False)
    for axis, precision in zip(axes[0], precisions, strict=True):
        rows = [
            row
            for row in result["table"]
            if row["precision"] == precision and row["captions"] == "full" and row["side"] != "gemm"
        ]
        for y, row in enumerate(reversed(rows)):
            rate, family = row["images_per_cpu_s"], row["side"].split("_")[0]
            low, high = (result["batch"] / row["cpu_s"][end] for end in ("high", "low"))
            colour = COLOURS.get(family, COLOURS["open_clip"])
            axis.barh(y, rate, xerr=[[rate - low], [high - rate]], color=colour, height=0.65, ecolor="#444444")
            axis.text(high, y, f"  {rate:.2f}   {row['peak_gb']:.2f} GB", va="center", fontsize=8)
        axis.set_yticks(range(len(rows)), [row["side"].replace("_", " ") for row in reversed(rows)])
        axis.set(title=precision, xlabel="images per CPU-second (peak memory beside the bar)")
        axis.margins(x=0.28)
        axis.set_xlim(left=0)
    figure.suptitle("One training step, one thread: the same model and batch")
    save_chart(figure, path)


def parse_options() -> argparse.Namespace:
    parser = command_parser("step", __doc__, _EXAMPLES, room="benchmarks")
    sides = [side for side in SIDES if side != "gemm"]
    parser.add_argument("--rounds", type=int, default=9, help="measured steps of each side")
    parser.add_argument("--sides", nargs="+", choices=sides, default=sides, help="sides that take turns")
    parser.add_argument(
        "--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="each measured by itself"
    )
    parser.add_argument("--peers", default="", help="folder with open_clip, put on that side's path only")
    parser.add_argument("--before", type=Path, help="checkout of another build, whose sides of ours take turns, too")
    parser.add_argument("--batch", type=int, help="pairs of a step, another number than usual")
    parser.add_argument(
        "--captions",
        nargs="+",
        choices=("full", "short"),
        default=["full", "short"],
        help="of the whole context, or as long as people write them",
    )
    parser.add_argument("--quick", action="store_true", help="a toy model, to see that everything runs")
    parser.add_argument("--profile", choices=sides, help="print where this side's time goes, measure nothing")
    parser.add_argument("--output", type=Path, default=RESULTS / "step.json", help="the numbers")
    return parser.parse_args()


def _without_absent_peers(options: argparse.Namespace) -> dict[str, str]:
    """Drop open_clip if it cannot be imported; the reasons by side."""
    if "open_clip" not in options.sides:
        return {}
    probe = Worker("open_clip", "fp32", argparse.Namespace(quick=True, batch=None, before=None, peers=options.peers))
    try:
        probe.step("full")
        return {}
    except SideFailed:
        options.sides = [side for side in options.sides if side != "open_clip"]
        return {
            "open_clip": "cannot be imported: give the folder it is installed in with --peers (benchmarks/README.md)"
        }
    finally:
        probe.close()


def main() -> None:
    options = parse_options()
    if options.profile:
        for precision in options.precisions:
            flags = ["--profile", *(["--quick"] if options.quick else [])]
            flags += ["--batch", str(options.batch)] if options.batch else []
            process = python_module("benchmarks.step_sides", options.profile, precision, *flags, threads=1)
            print(process.communicate()[0])
        return
    skipped = _without_absent_peers(options)
    before = machine()
    rows = [row for precision in options.precisions for row in measure(precision, options)]
    workload = workload_of(options.quick, options.batch)
    table = summary(rows, workload)
    result = {
        "machine": before | {"load_1min_after": machine()["load_1min"]},
        "threads": 1,
        "batch": workload.batch,
        "model": asdict(workload.model),
        "gflop_per_step": workload.flops() / 1e9,
        "goals": goals(rows),
        "skipped": skipped,
        "table": table,
        "steps": rows,
    }
    show(result)
    write_json(result, options.output)
    plot(result, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
