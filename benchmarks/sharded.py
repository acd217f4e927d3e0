"""Weights sharded over four data-parallel ranks: the engine against PyTorch's fully_shard with GradCache.

Every side trains the model of benchmarks/step.py on the same pairs with the exact loss over the global batch, in fresh
ranks of one thread each; sides take turns in rounds, and their first losses must agree. `ours` keeps weights and
gradients whole on every rank (parallel.shard=optimizer), `ours_sharded` gathers a chunk's weights for its turn,
`ours_sharded_outputs` also keeps the products' outputs. `fsdp2` is plain PyTorch with a unit a block, which gathers
and reduces at every micro-batch; `_checkpointing` computes every block again in backward, `_accumulate` keeps whole
gradients until the last micro-batch. Memory is the peak of the largest rank above its imports; held is what it has
between steps: weights, gradients, optimizer state.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, Spread, machine, run_ranks, write_json
from benchmarks.sharded_rank import FSDP, OURS
from tools.cli import command_parser

_EXAMPLES = (
    "python -m benchmarks.sharded",
    "python -m benchmarks.sharded --rounds 1 --add   # another round on top of what was measured before",
    "python -m benchmarks.sharded --quick",
)
RANKS = 4
LOSSES_AGREE = 1e-4
RATE_GOAL, PEAK_GOAL, HELD_GOAL, WALL_GOAL = 1.15, 1.0, 0.40, 1.05


def measure(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """A fresh set of ranks; what rank 0 wrote."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        given = [f"--batch={options.batch}", f"--steps={options.steps}", *(["--quick"] if options.quick else [])]
        run_ranks(RANKS, "benchmarks.sharded_rank", side, str(output), *given, threads=1)
        return json.loads(output.read_text())


def summary(runs: list[dict[str, Any]], batch: int) -> list[dict[str, Any]]:
    """Per side, over the timed steps of all rounds: pairs a CPU-second, wall time, memory."""
    table = []
    for side in dict.fromkeys(run["side"] for run in runs):
        mine = [run for run in runs if run["side"] == side]
        timed = [step for run in mine for step in run["steps"][1:]]
        cpu, wall = (Spread.of([step[clock] for step in timed]) for clock in ("cpu_s", "wall_s"))
        memory = {key: max(run[key] for run in mine) for key in ("peak_mb", "held_mb")}
        rate = {"pairs_per_cpu_s": batch / cpu.median}
        table.append({"side": side, "cpu_s": asdict(cpu), "wall_s": asdict(wall)} | rate | memory)
    return table


def goals(runs: list[dict[str, Any]], table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was promised of `ours_sharded`: against every form of fully_shard, and against whole weights."""
    rows = {row["side"]: row for row in table}
    found, mine = [], rows.get("ours_sharded")
    if mine is None:
        return []
    for side in (side for side in FSDP if side in rows):
        found.append(_goal(f"pairs a CPU-second / {side}", _per_round(runs, side, "cpu_s"), RATE_GOAL, at_least=True))
        found.append(_goal(f"peak memory / {side}", mine["peak_mb"] / rows[side]["peak_mb"], PEAK_GOAL, at_least=False))
    if "ours" in rows:
        found.append(_goal("held / ours", mine["held_mb"] / rows["ours"]["held_mb"], HELD_GOAL, at_least=False))
        wall = 1 / _per_round(runs, "ours", "wall_s")
        found.append(_goal("wall time / ours", wall, WALL_GOAL, at_least=False))
    return found


def _per_round(runs: list[dict[str, Any]], other: str, clock: str) -> float:
    """Seconds of another side over those of `ours_sharded`: median over rounds of the medians of a round."""
    of = {
        side: [statistics.median(s[clock] for s in run["steps"][1:]) for run in runs if run["side"] == side]
        for side in ("ours_sharded", other)
    }
    return statistics.median(theirs / mine for mine, theirs in zip(of["ours_sharded"], of[other], strict=True))


def _goal(what: str, ratio: float, goal: float, *, at_least: bool) -> dict[str, Any]:
    return {"what": what, "ratio": ratio, "goal": goal, "met": ratio >= goal if at_least else ratio <= goal}


def check_losses(runs: list[dict[str, Any]]) -> None:
    """The same weights and pairs, the same first loss: otherwise the times compare nothing."""
    first = {run["side"]: run["steps"][0]["loss"] for run in runs}
    reference = next(iter(first.values()))
    if any(abs(loss - reference) > LOSSES_AGREE * abs(reference) for loss in first.values()):
        raise SystemExit(f"sharded: first losses differ between sides of the same model: {first}")


def show(result: dict[str, Any]) -> None:
    """Print the table and the goals."""
    print(f"\n{'side':<24}{'pairs/CPU-s':>12}{'step s':>8}{'peak MB':>9}{'held MB':>9}")
    for row in result["table"]:
        rates = f"{row['pairs_per_cpu_s']:>12.2f}{row['wall_s']['median']:>8.2f}"
        print(f"{row['side']:<24}{rates}{row['peak_mb']:>9.0f}{row['held_mb']:>9.0f}")
    for row in result["goals"]:
        print(f"{row['what']}: {row['ratio']:.2f}, goal {row['goal']}: {'met' if row['met'] else 'missed'}")


def parse_options() -> argparse.Namespace:
    parser = command_parser("sharded", __doc__, _EXAMPLES, room="benchmarks")
    parser.add_argument("--batch", type=int, default=64, help="global batch")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a set of ranks, after one to warm up")
    parser.add_argument("--rounds", type=int, default=2, help="fresh sets of ranks of each side")
    parser.add_argument(
        "--sides", nargs="+", choices=[*OURS, *FSDP], default=[*OURS, *FSDP], help="sides that take turns"
    )
    parser.add_argument("--add", action="store_true", help="keep the rounds of the output and add to them")
    parser.add_argument("--quick", action="store_true", help="a toy model, to see that everything runs")
    parser.add_argument("--output", type=Path, default=RESULTS / "sharded.json", help="the numbers")
    return parser.parse_args()


def _earlier(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs of the rounds that the output holds. Exits where they measured something else."""
    if not options.add:
        return []
    before = json.loads(options.output.read_text())
    now = _settings(options)
    differ = [name for name in ("batch", "steps", "sides", "quick") if before["options"][name] != now[name]]
    if differ:
        raise SystemExit(f"sharded: {options.output} has another {', '.join(differ)}: {before['options']}")
    return before["runs"]


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name not in ("output", "add")}


def main() -> None:
    options = parse_options()
    runs = _earlier(options)
    first = 1 + max((run["round"] for run in runs), default=-1)
    for number in range(first, first + options.rounds):
        for side in options.sides if number % 2 == 0 else reversed(options.sides):
            runs.append(measure(side, options) | {"round": number})
            print(f"round {number + 1}: {side}  {runs[-1]['steps'][-1]['wall_s']:.2f} s", flush=True)
        check_losses(runs)
        table = summary(runs, options.batch)
        settings = _settings(options) | {"rounds": number + 1}
        result = {"machine": machine(), "ranks": RANKS, "options": settings, "goals": goals(runs, table)}
        result |= {"table": table}
        write_json(result | {"runs": runs}, options.output)
    show(result)


if __name__ == "__main__":
    main()
