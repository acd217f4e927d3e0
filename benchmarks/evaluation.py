"""Memory of scoring against the number of pictures and captions, from features on disk.

Each case runs in a process of its own: N pictures against 1,000 classes, and N pictures against N captions both ways
(`engine/evaluation/ranking.py`), N being 1,000 and what is asked for. What is told is the peak above what the process
had when its features lay on disk. Without tiles the second case would need N x N scores: 40 GB at 100,000 in fp32.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import RESULTS, machine, python_module, reset_peak, resident_bytes, write_json
from engine.evaluation.ranking import both_ranks
from engine.evaluation.suite.features import FileRows
from engine.evaluation.suite.metrics import ranks_and_predictions
from tools.cli import command_parser

_EXAMPLES = (
    "python -m benchmarks.evaluation",
    "python -m benchmarks.evaluation --pictures 10000 --pairs 10000 --output few.json",
)
FEW, CLASSES = 1_000, 1_000


def main() -> None:
    """Measure every case and write the numbers."""
    parser = command_parser("evaluation", __doc__, _EXAMPLES, room="benchmarks")
    parser.add_argument("--pictures", type=int, default=100_000, help="against the classes")
    parser.add_argument("--pairs", type=int, default=100_000, help="pictures and captions against each other")
    parser.add_argument("--width", type=int, default=8, help="of the features")
    parser.add_argument("--case", nargs=2, metavar=("WHAT", "N"), help="one case in this process")
    parser.add_argument("--output", type=Path, default=RESULTS / "evaluation.json", help="the numbers")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case[0], int(arguments.case[1]), arguments.width)))
        return
    rows = []
    for what, many in {"classification": arguments.pictures, "retrieval": arguments.pairs}.items():
        for count in (FEW, many):
            options = ("--width", str(arguments.width), "--case", what, str(count))
            output, _ = python_module("benchmarks.evaluation", *options, threads=1).communicate()
            rows.append(json.loads(output.splitlines()[-1]))
            print(rows[-1], file=sys.stderr)
    write_json({"machine": machine(), "width": arguments.width, "cases": rows}, arguments.output)


def measure(what: str, count: int, width: int) -> dict[str, float | str]:
    """Peak MB and seconds of one case."""
    with tempfile.TemporaryDirectory() as folder:
        images, texts = (_features(Path(folder) / name, count, width, seed) for seed, name in enumerate(("i", "t")))
        classes = torch.from_numpy(np.random.default_rng(2).standard_normal((CLASSES, width), dtype=np.float32))
        own = torch.arange(count)
        warm = torch.stack([own[:600], own[:600]], dim=1)
        both_ranks(images[slice(0, 600)], texts[slice(0, 600)], warm)
        before, began, used = reset_peak(), time.perf_counter(), time.process_time()
        if what == "classification":
            ranks_and_predictions(images, own, classes, own % CLASSES)
        else:
            pairs = torch.stack([own, own], dim=1)
            both_ranks(images, texts, pairs)
        peak = resident_bytes("VmHWM") - before
        seconds, cpu = round(time.perf_counter() - began, 2), round(time.process_time() - used, 2)
        return {"what": what, "n": count, "peak_mb": round(peak / 1e6, 1), "seconds": seconds, "cpu_s": cpu}


def _features(path: Path, count: int, width: int, seed: int) -> FileRows:
    draw = np.random.default_rng(seed)
    with path.open("wb") as file:
        for first in range(0, count, 10_000):
            rows = draw.standard_normal((min(10_000, count - first), width), dtype=np.float32)
            file.write((rows / np.linalg.norm(rows, axis=1, keepdims=True)).tobytes())
    return FileRows(path, width)


if __name__ == "__main__":
    main()
