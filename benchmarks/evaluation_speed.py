"""Pictures and prompts a CPU-second of the evaluation, against the bare tower and open_clip under clip_benchmark.

A model of open_clip's ViT-B-16's shape, random weights, pictures of 500 x 375 in a tar as CLIP-benchmark has them;
every process has one thread for products. Comparisons, of medians over rounds:

* on two ranks, pictures from the tar to features on disk against the same tower on the same pixels in memory;
* the same on one process, in both precisions, against open_clip's model under clip_benchmark's loop (its transform,
  PIL, autocast in bf16);
* class embeddings of C classes x 80 prompts against clip_benchmark's classifier.

--peers: a folder or virtual environment's site-packages with open_clip and clip_benchmark (benchmarks/README.md).
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

from benchmarks.common import RESULTS, child_environment, machine, write_json
from data.shards.write import write_shard
from tools.cli import command_parser

_EXAMPLES = (
    "python -m benchmarks.evaluation_speed --peers FOLDER",
    "python -m benchmarks.evaluation_speed --quick",
)
GOALS = {"evaluated / bare, 2 ranks": 0.95, "fp32": 1.5, "bf16": 2.0, "prompts": 1.3}
WIDTH, HEIGHT = 500, 375


def main() -> None:
    """Measure every side and write benchmarks/results/evaluation_speed.json."""
    parser = command_parser("evaluation_speed", __doc__, _EXAMPLES, room="benchmarks")
    parser.add_argument("--peers", default="", help="folder with open_clip and clip_benchmark (benchmarks/README.md)")
    parser.add_argument("--images", type=int, default=24, help="a multiple of 16")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of every side")
    parser.add_argument("--classes", type=int, default=3, help="classes of 80 prompts")
    parser.add_argument("--readers", type=int, default=1, help="threads of a rank that decode")
    parser.add_argument("--quick", action="store_true", help="a toy model, to see that everything runs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_set(Path(folder) / "pictures", arguments.images)
        result = measure(Path(folder), arguments)
    result = {"machine": machine(), "images": arguments.images, "readers_a_rank": arguments.readers, **result}
    write_json(result, RESULTS / "evaluation_speed.json")
    print(json.dumps(result["ratios"], indent=1))


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


def measure(data: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians of every side, and the ratios that the goals are about."""
    rows: dict[str, Any] = {"pictures ours fp32 2 ranks": side(data, arguments, "pictures", "ours", "fp32", ranks=2)}
    for what in ("pictures", "prompts"):
        for precision in ("fp32", "bf16"):
            for name in ("ours", *(["open_clip"] if arguments.peers else [])):
                rows[f"{what} {name} {precision}"] = side(data, arguments, what, name, precision)
    two = rows["pictures ours fp32 2 ranks"]
    ratios = {"evaluated / bare, 2 ranks, CPU": two["bare"]["cpu_s"] / two["evaluated"]["cpu_s"]}
    ratios["evaluated / bare, 2 ranks, wall"] = two["bare"]["wall_s"] / two["evaluated"]["wall_s"]
    for what, task in (("pictures", "evaluated"), ("prompts", "classes")):
        for precision in ("fp32", "bf16") if arguments.peers else ():
            own, peer = (rows[f"{what} {name} {precision}"][task]["cpu_s"] for name in ("ours", "open_clip"))
            ratios[f"{what} a CPU-second against open_clip, {precision}"] = peer / own
    return {"goals": GOALS, "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()}, "seconds": rows}


def side(
    data: Path, arguments: argparse.Namespace, what: str, name: str, precision: str, ranks: int = 1
) -> dict[str, dict[str, float]]:
    """Medians over the rounds of one side."""
    module = ["-m", "benchmarks.evaluation_sides", what, name, str(data), precision, "--ranks", str(ranks)]
    module += ["--rounds", str(arguments.rounds), "--classes", str(arguments.classes)]
    module += ["--readers", str(arguments.readers), *(["--quick"] if arguments.quick else [])]
    launch = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr",
        "127.0.0.1",
        "--nproc-per-node",
        str(ranks),
    ]
    command = [sys.executable, *(launch if ranks > 1 else []), *module]
    environment = child_environment(1, arguments.peers if name == "open_clip" else "")
    finished = subprocess.run(command, env=environment, cwd=RESULTS.parent.parent, stdout=subprocess.PIPE, check=True)
    rounds = json.loads(finished.stdout.decode().strip().splitlines()[-1])
    medians = {
        task: {clock: round(statistics.median(one[task][clock] for one in rounds), 3) for clock in ("wall_s", "cpu_s")}
        for task in rounds[0]
    }
    print(f"{what} {name} {precision} on {ranks}: {medians}", file=sys.stderr, flush=True)
    return medians


if __name__ == "__main__":
    main()
