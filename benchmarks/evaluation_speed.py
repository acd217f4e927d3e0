"""Pictures and prompts a CPU-second of the evaluation, against the bare tower and open_clip under clip_benchmark.

A model of open_clip's ViT-B-16's shape, random weights, pictures of 500 x 375 in a tar as CLIP-benchmark has them;
every process has one thread for products, and sides take turns within a round. Medians over rounds of

* on two ranks, pictures from the tar to features on disk against the same tower on the same pixels in memory;
* the same on one process, against open_clip's model under clip_benchmark's loop (its transform, PIL, autocast in bf16):
  whole, the towers alone, and decoding alone;
* class embeddings of C classes x 80 prompts against clip_benchmark's classifier;
* the rate of a matrix product, which bounds all of it.

--peers: a folder or virtual environment's site-packages with open_clip and clip_benchmark (benchmarks/README.md).
--parts: one process in fp32, in bf16, two ranks in fp32; a part that is not asked for keeps what an earlier run has
written of it.
"""

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.common import RESULTS, machine, python_module, run_ranks, write_json
from benchmarks.evaluation_sides import GEMM
from data.shards.write import write_shard
from tools.cli import command_parser

_EXAMPLES = (
    "python -m benchmarks.evaluation_speed --peers FOLDER",
    "python -m benchmarks.evaluation_speed --parts bf16 --images 16 --micro-batch 4 --peers FOLDER",
    "python -m benchmarks.evaluation_speed --quick",
)
GOALS = {
    "evaluated / bare, 2 ranks": 0.95,
    "evaluated against open_clip, fp32": 1.5,
    "evaluated against open_clip, bf16": 2.0,
    "class embeddings against open_clip": 1.3,
}
PARTS = ("fp32", "bf16", "two_ranks")
TASKS = ("evaluated", "bare", "read", "classes", "gemm")
WIDTH, HEIGHT = 500, 375
PATH = RESULTS / "evaluation_speed.json"
_CLOCKS = ("cpu_s", "wall_s")
Rounds = list[dict[str, dict[str, float]]]


def main() -> None:
    """Measure every side and write benchmarks/results/evaluation_speed.json."""
    parser = command_parser("evaluation_speed", __doc__, _EXAMPLES, room="benchmarks")
    parser.add_argument("--peers", default="", help="folder with open_clip and clip_benchmark (benchmarks/README.md)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured")
    parser.add_argument("--images", type=int, default=64, help="a multiple of 8 x micro-batch")
    parser.add_argument("--micro-batch", type=int, default=8, help="pictures of one pass")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of every side")
    parser.add_argument("--classes", type=int, default=2, help="classes of 80 prompts")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="of the sides on one process")
    parser.add_argument("--readers", type=int, default=1, help="threads of a rank that decode")
    parser.add_argument("--quick", action="store_true", help="a toy model, to see that everything runs")
    arguments = parser.parse_args()
    result = json.loads(PATH.read_text()) if PATH.is_file() else {}
    result["goals"] = GOALS
    with tempfile.TemporaryDirectory() as folder:
        write_set(Path(folder) / "pictures", arguments.images)
        for part in arguments.parts:
            result[part] = measure(Path(folder), part, arguments)
            print(json.dumps(result[part]["ratios"], indent=1))
    if not arguments.quick:
        write_json(result, PATH)


def write_set(folder: Path, count: int) -> None:
    """Pictures with large and small structures, so that JPEG has as much to do as with photographs."""
    (folder / "test").mkdir(parents=True)
    (folder / "classnames.txt").write_text("a\nb\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}.\n")
    draw, samples = np.random.default_rng(0), []
    for number in range(count):
        coarse = draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        large = np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.int16)
        pixels = np.clip(large + draw.integers(-12, 13, large.shape), 0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=90)
        samples.append((f"{number:05d}", {"jpg": stream.getvalue(), "cls": b"0"}))
    write_shard(str(folder / "test" / "0.tar"), samples)


def measure(data: Path, part: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians of every side of a part, and the ratios that the goals are about."""
    is_two = part == "two_ranks"
    rounds = {"ours": two_ranks(data, arguments)} if is_two else by_turns(data, part, arguments)
    seconds = {name: _medians(of_side) for name, of_side in rounds.items()}
    ratios = {}
    if is_two:
        own = seconds["ours"]
        ratios = {f"evaluated / bare, {clock}": own["bare"][clock] / own["evaluated"][clock] for clock in _CLOCKS}
    if "open_clip" in seconds:
        own, peer = seconds["ours"], seconds["open_clip"]
        ratios = {f"{task} a CPU-second against open_clip": peer[task]["cpu_s"] / own[task]["cpu_s"] for task in own}
    return {
        "machine": machine(),
        "images": arguments.images,
        "prompts": 80 * arguments.classes,
        "micro_batch": arguments.micro_batch,
        "readers_a_rank": arguments.readers,
        "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "gemm_gflops": {name: _gflops(of_side["gemm"]) for name, of_side in seconds.items() if "gemm" in of_side},
        "median_seconds": seconds,
        "rounds": rounds,
    }


def _gflops(seconds: dict[str, float]) -> float:
    rows, inputs, outputs = GEMM
    return round(2 * rows * inputs * outputs / seconds["cpu_s"] / 1e9, 1)


def _medians(rounds: Rounds) -> dict[str, dict[str, float]]:
    return {
        task: {clock: round(statistics.median(one[task][clock] for one in rounds), 4) for clock in _CLOCKS}
        for task in rounds[0]
    }


def by_turns(data: Path, precision: str, arguments: argparse.Namespace) -> dict[str, Rounds]:
    """Rounds of every side on one process; odd rounds go the other way."""
    sides = {"ours": "", **({"open_clip": arguments.peers} if arguments.peers else {})}
    started = {
        side: python_module("benchmarks.evaluation_sides", *_options(side, data, precision, arguments), **where)
        for side, where in ((side, {"threads": 1, "extra_path": path}) for side, path in sides.items())
    }
    rounds: dict[str, Rounds] = {side: [] for side in started}
    for process in started.values():
        _answer(process)
    for number in range(arguments.rounds):
        of_round: dict[str, dict[str, dict[str, float]]] = {side: {} for side in started}
        for task in arguments.tasks:
            for side in started if number % 2 == 0 else reversed(started):
                of_round[side][task] = _answer(started[side], task)
        for side, answers in of_round.items():
            rounds[side].append(answers)
            told = ", ".join(f"{task} {answer['cpu_s']:.2f}" for task, answer in answers.items())
            print(f"{precision} {side}, CPU seconds: {told}", file=sys.stderr, flush=True)
    for process in started.values():
        process.communicate()
    return rounds


def _answer(process: subprocess.Popen[str], task: str = "") -> dict[str, float]:
    assert process.stdin is not None and process.stdout is not None
    if task:
        process.stdin.write(f"{task}\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"evaluation_speed: a side ended with code {process.wait()}: see its error above")
    return json.loads(line)


def two_ranks(data: Path, arguments: argparse.Namespace) -> Rounds:
    """Rounds of ours on two ranks, its tasks by turns."""
    given = (*_options("ours", data, "fp32", arguments), "--rounds", str(arguments.rounds))
    said = run_ranks(2, "benchmarks.evaluation_sides", *given, threads=1)
    return json.loads(said.strip().splitlines()[-1])


def _options(side: str, data: Path, precision: str, arguments: argparse.Namespace) -> tuple[str, ...]:
    numbers = {"readers": arguments.readers, "micro-batch": arguments.micro_batch, "classes": arguments.classes}
    given = [word for name, number in numbers.items() for word in (f"--{name}", str(number))]
    return (side, str(data), precision, *given, *(["--quick"] if arguments.quick else []))


if __name__ == "__main__":
    main()
