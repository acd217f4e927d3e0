"""Thousands of steps with a fault every fifty: no step lost or done twice, and nothing that grows.

    python -m tests.chaos.soak --steps 2000 [--minutes 60]

Two data-parallel ranks of a tiny model. Faults in turn: a pause, a checkpoint that is asked for, a NaN gradient that is
skipped, a flipped weight that is repaired, and at last the end of a rank, after which the job is started again. Each
start reads its memory, descriptors, threads and the machine's shared memory every ten steps; growth is the slope of
a line through them, the first ones of a start left out.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.callbacks.metrics import read_metrics
from tests.chaos import faults
from tests.chaos.faults import Place
from tests.chaos.ranks import TINY, launch
from tests.data.shard_factory import make_shards

FAULT_EVERY, READ_EVERY, WARM_STEPS = 50, 10, 60
NAMES = ("resident memory, kB", "descriptors", "threads", "/dev/shm, kB")


def _sample() -> tuple[int, ...]:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    shared = os.statvfs("/dev/shm")
    used_kb = (shared.f_blocks - shared.f_bfree) * shared.f_frsize // 1024
    resident_kb = int(status["RssAnon"].split()[0])
    return resident_kb, len(os.listdir("/proc/self/fd")), int(status["Threads"]), used_kb


def watch_and_disturb(folder: str, rank: int) -> None:
    """Sample every ten steps; disturb every fifty. Run in every rank before its job."""
    from engine.resilience.watch import Pulse
    from engine.trainer import Trainer

    trainer: list[Any] = []
    fit, begin = Trainer.fit, Pulse.at
    done: set[int] = set()
    place = Place(rank, 0, "reduce", Path(folder) / "run", Path(folder), Path(folder))
    turns: list[Callable[[Place, Any], None]] = [
        faults.pause, faults.touch("SAVE"), faults.nan_gradient, faults.flipped_weight, faults.to_self(signal.SIGKILL),
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
        if part in ("backward", "replay") and step and step % FAULT_EVERY == 0 and step not in done:
            done.add(step)
            turn = step // FAULT_EVERY
            marker = Path(folder) / f"fault_{step}"
            if rank == turn % 2 and not marker.exists():
                marker.touch()
                turns[turn % len(turns)](place, trainer[0])

    Trainer.fit, Pulse.at = fitted, at  # type: ignore[method-assign]


def growth(folder: Path) -> dict[str, list[float]]:
    """What grows by how much a step, of each start that is long enough."""
    slopes: dict[str, list[float]] = {name: [] for name in NAMES}
    for path in sorted(folder.glob("samples_*")):
        rows = np.array([list(map(int, line.split())) for line in path.read_text().splitlines()])
        rows = rows[rows[:, 0] >= rows[0, 0] + WARM_STEPS] if len(rows) else rows
        if len(rows) >= 5:
            for column, name in enumerate(NAMES, start=1):
                slopes[name].append(float(np.polyfit(rows[:, 0], rows[:, column], 1)[0]))
    return slopes


def main(arguments: list[str]) -> int:
    """Run the soak; 1 if a step is missing or twice there, or a start ended for another reason than its fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=120.0)
    given = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    shards = make_shards(folder, [20, 28])
    deadline, starts, strange = time.monotonic() + 60 * given.minutes, 0, []
    while time.monotonic() < deadline:
        settings = [*TINY, f"data.shards=[{','.join(shards)}]", f"train.steps={given.steps}"]
        settings += [f"run_dir={folder / 'run'}", "data.workers=1", "checkpoint.every_steps=20"]
        settings += ["health.on_nonfinite=skip", "health.on_divergence=repair", "health.audit_every_steps=1"]
        start = launch(
            "examples/quickstart/train.yaml",
            settings,
            2,
            folder / "log",
            prepare=partial(watch_and_disturb, str(folder)),
        )
        starts += 1
        statuses = start.end(max(1.0, deadline - time.monotonic()))
        if not any(statuses):
            break
        if -signal.SIGKILL not in statuses:
            strange.append(start.text[-2000:])
            break
    records = read_metrics(folder / "run" / "metrics.jsonl")
    steps = [record["step"] for record in records]
    whole = steps == list(range(len(steps)))
    last = records[-1]
    told = {name: last[name] for name in ("skipped_steps", "rewinds", "bad_samples")}
    faulted = len(list(folder.glob("fault_*")))
    print(f"{len(steps)} of {given.steps} steps, {starts} starts, {faulted} faults, {told}")
    print("every step once" if whole else "steps are missing or twice there")
    for name, slopes in growth(folder).items():
        if slopes:
            print(f"{name}: {min(slopes):+.3f} to {max(slopes):+.3f} a step, median {np.median(slopes):+.3f}")
    print(*strange, sep="\n")
    shutil.rmtree(folder)
    return int(not whole or bool(strange))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
