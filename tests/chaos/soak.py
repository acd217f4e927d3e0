"""Thousands of steps with a fault every fifty: no step lost or done twice, and nothing that grows.

    python -m tests.chaos.soak --steps 2000 [--minutes 60] [--folder DIR]

Two data-parallel ranks of a tiny model. Faults in turn, on one rank and on the other: a pause, a checkpoint that is
asked for, a NaN gradient that is skipped, a flipped weight that is repaired or rewound, a flipped moment that is
rewound, and at last the end of a rank, after which the job is started again. Each start reads memory, descriptors,
threads and shared memory of its ranks and their readers every ten steps, the heap trimmed; growth is the slope of a
line through them, the first ones of a start left out. What a rank has in use must be flat; its memory may have holes.
Numbers come to benchmarks/results/soak.json with --write. A soak in a folder of yours that was ended goes on there when
it is called again, faults and samples of all calls counted.
"""

import argparse
import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, machine, write_json
from engine.callbacks.metrics import read_metrics
from tests.chaos import faults
from tests.chaos.faults import Place
from tests.chaos.ranks import TINY, launch
from tests.data.shard_factory import make_shards

FAULT_EVERY, READ_EVERY, WARM_STEPS = 50, 10, 60
FEWEST_SAMPLES = 10
"""Of a start that is warm; a line through fewer says more of when they were taken than of growth."""
FLAT_KB = 2.0
"""What a rank may have more in use a step, in the median of starts and ranks."""
_RECORDED = "100"
"""Collectives that torch's flight recorder keeps; its own 2,000 make a rank grow by some 2.5 MB until they are there,
with gloo, too, which takes 140 of these steps.
"""
IN_USE = "of it in use, kB"
NAMES = (
    "memory of a rank, kB", IN_USE, "Python objects", "memory of its reader, kB", "descriptors", "threads",
    "shared memory, kB",
)  # fmt: skip
TURNS = ("pause", "save asked for", "NaN gradient", "flipped weight", "flipped moment", "kill -9 of a rank")
RESULT = RESULTS / "soak.json"


def _memory_kb(pid: int | str) -> tuple[int, int, int]:
    """Memory of its own, shared memory, threads of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]), int(status["RssShmem"].split()[0]), int(status["Threads"])


class _Mallinfo(ctypes.Structure):
    """struct mallinfo2 of the C library."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "top",
        )
    ]


def _in_use_kb() -> int:
    """What the C library has handed out and not got back: a leak shows here, a heap with holes does not."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    info = mallinfo()
    return (info.uordblks + info.hblkhd) // 1024


def _sample() -> tuple[int, ...]:
    ctypes.CDLL(None).malloc_trim(0)  # captions of changing length leave holes in the heap, which are no leak
    own, shared, threads = _memory_kb("self")
    readers = [_memory_kb(child.pid) for child in multiprocessing.active_children() if child.pid is not None]
    shared_of_all = shared + sum(reader[1] for reader in readers)
    objects = len(gc.get_objects())
    return (
        own,
        _in_use_kb(),
        objects,
        sum(reader[0] for reader in readers),
        len(os.listdir("/proc/self/fd")),
        threads,
        shared_of_all,
    )


def watch_and_disturb(folder: str, disturb: bool, rank: int) -> None:
    """Sample every ten steps; disturb every fifty, if so. Run in every rank before its job."""
    from engine.resilience.watch import Pulse
    from engine.trainer import Trainer

    os.environ["TORCH_FR_BUFFER_SIZE"] = _RECORDED
    trainer: list[Any] = []
    fit, begin = Trainer.fit, Pulse.at
    done: set[int] = set()
    place = Place(rank, 0, "reduce", Path(folder) / "run", Path(folder), Path(folder))
    turns: list[Callable[[Place, Any], None]] = [
        faults.pause, faults.touch("SAVE"), faults.nan_gradient, faults.flipped_weight, faults.flipped_moment,
        faults.to_self(signal.SIGKILL),
    ]  # fmt: skip

    def fitted(own: Trainer, *arguments: Any) -> str:
        trainer.append(own)
        return fit(own, *arguments)

    def at(pulse: Pulse, part: str, unit: Any = None) -> None:
        begin(pulse, part, unit)
        step = trainer[0].position.step if trainer else 0
        if part == "roll call" and step % READ_EVERY == 0:
            with (Path(folder) / f"samples_{rank}_{os.getpid()}").open("a") as file:
                file.write(" ".join(map(str, (step, *_sample()))) + "\n")
        if part in ("backward", "replay") and disturb and step and step % FAULT_EVERY == 0 and step not in done:
            done.add(step)
            turn = step // FAULT_EVERY - 1
            marker = Path(folder) / f"fault_{step}"
            if rank == turn // len(turns) % 2 and not marker.exists():
                marker.write_text(TURNS[turn % len(turns)])
                turns[turn % len(turns)](place, trainer[0])

    Trainer.fit, Pulse.at = fitted, at  # type: ignore[method-assign, assignment]


def _rows(samples: Path) -> list[list[int]]:
    return [list(map(int, line.split())) for line in samples.read_text().splitlines()]


def growth(folder: Path) -> dict[str, list[float]]:
    """What grows by how much a step, of each start that is long enough."""
    slopes: dict[str, list[float]] = {name: [] for name in NAMES}
    for path in sorted(folder.glob("samples_*")):
        rows = np.array(_rows(path))
        rows = rows[rows[:, 0] >= rows[0, 0] + WARM_STEPS] if len(rows) else rows
        if len(rows) >= FEWEST_SAMPLES:
            for column, name in enumerate(NAMES, start=1):
                slopes[name].append(float(np.polyfit(rows[:, 0], rows[:, column], 1)[0]))
    return slopes


def is_flat(slopes: dict[str, list[float]]) -> bool:
    """Whether ranks have no more in use step by step; starts that were too short to tell say nothing."""
    return not slopes[IN_USE] or float(np.median(slopes[IN_USE])) <= FLAT_KB


def main(arguments: list[str]) -> int:
    """Run the soak; 1 if a step is missing or twice there, a start ended for another reason than its fault, or what a
    rank has in use grows.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--undisturbed", action="store_true", help="no faults: only what grows")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--folder", type=Path, help="kept, and gone on in; otherwise one that is removed at the end")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = (given.folder or Path(name)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        found = run(folder, given.steps, 60 * given.minutes, not given.undisturbed)
    for name, value in found.items():
        print(f"{name}: {value}" if not name.startswith("samples") else "")
    if given.write:
        write_json(found, RESULT)
    lost = not found["every step once"] or found["steps"] < given.steps
    return int(lost or bool(found["strange"]) or not found["flat"])


def run(folder: Path, steps: int, limit_s: float, disturb: bool) -> dict[str, Any]:
    """Train in `folder` until all steps are done or the time is over; what is reported."""
    shards = sorted(map(str, folder.glob("*.tar"))) or make_shards(folder, [20, 28])
    began, starts, strange = time.monotonic(), folder / "starts", list[str]()
    own = [f"data.shards=[{','.join(shards)}]", f"train.steps={steps}", f"run_dir={folder / 'run'}", "data.workers=1"]
    own += ["checkpoint.every_steps=20", "health.on_nonfinite=skip", "health.on_divergence=repair"]
    own += ["health.audit_every_steps=1", "health.max_rewinds=1000"]
    prepare = partial(watch_and_disturb, str(folder), disturb)
    while not strange:
        start = launch("examples/quickstart/train.yaml", [*TINY, *own], 2, folder / "log", prepare=prepare)
        with starts.open("a") as file:
            file.write(f"{os.getpid()}\n")  # of the call
        statuses = start.end(max(1.0, limit_s - (time.monotonic() - began)))
        if not any(statuses):
            break
        if -signal.SIGKILL not in statuses or "not over in time" in start.text:
            strange.append(start.text[-2000:])
    metrics = folder / "run" / "metrics.jsonl"
    records = read_metrics(metrics) if metrics.exists() else []  # a start that failed says why in `strange`
    made = [record["step"] for record in records]
    slopes_of = growth(folder)
    faulted = Counter(path.read_text() for path in folder.glob("fault_*"))
    return {
        "machine": machine(),
        "steps": len(made),
        "every step once": made == list(range(len(made))),
        "starts": len(starts.read_text().split()),
        "calls": len(set(starts.read_text().split())),
        "faults": {name: faulted[name] for name in TURNS},
        **{name: records[-1][name] for name in ("skipped_steps", "rewinds", "bad_samples") if records},
        "minutes of the last call": round((time.monotonic() - began) / 60, 1),
        "growth a step: least, median, most of the starts and ranks": {
            name: [round(float(value), 4) for value in (min(slopes), np.median(slopes), max(slopes))]
            for name, slopes in slopes_of.items()
            if slopes
        },
        "flat": is_flat(slopes_of),
        "samples: step, then as above": {path.name: _rows(path) for path in sorted(folder.glob("samples_*"))},
        "strange": strange,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
