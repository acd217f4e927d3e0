"""`run_dir/history.jsonl`: every start of a run, what was lost before it, rewinds, slow ranks, and how it ended.

The metrics file holds one clean curve, each step once; what it cost to get there is here: work that was done again, and
the time in which no step was made. Read by the run report (tools/report).

Times of an event are two: `time`, which people read, of a clock that may be set while the job runs and need not agree
with another machine's; and `since_boot_s` of the machine's boot `boot`, which nobody sets. Durations are of the second
kind wherever both ends have one machine, and of the seconds that the records themselves have counted.
"""

import json
import os
import socket
import sys
import time
import uuid
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from engine.callbacks.metrics import METRICS_FILE, read_metrics
from engine.checkpoint.format.machine import boot_of_machine
from engine.record import Callback, Record, RunInfo

HISTORY_FILE = "history.jsonl"
_DRAWN = uuid.uuid4().hex[:8]
"""Tells starts apart that have one host name and one process id, as every start of a container may."""
_SECONDS = ("step_time_s", "checkpoint_stall_s", "eval_time_s", "eval_suite_time_s")
"""What a record counts of the time since the one before."""
START, PHASE, END, REWIND, SLOW = "start", "phase", "end", "rewind", "slow rank"


class History(Callback):
    """Writes the history. World rank 0 only; asked before MetricsFile, which cuts the curve back to the checkpoint."""

    def __init__(self) -> None:
        self._path = Path()
        self._rewinds, self._slow = 0, -1
        self._step = 0
        self._refused = False

    def on_start(self, run: RunInfo) -> None:
        """Say how far the start before had come: a killed one could not."""
        self._path, self._step = run.run_dir / HISTORY_FILE, run.start_step
        self._rewinds = int(run.resumed_record.get("rewinds", 0))
        process = f"{socket.gethostname()} {os.getpid()} {_DRAWN}"
        events = read_history(run.run_dir)
        last: dict[str, Any] = next((event for event in reversed(events) if event["event"] == START), {})
        same = last.get("process") == process
        reached, lost_s, ran_s = _given_up(run.run_dir / METRICS_FILE, run.start_step, last.get("step"))
        facts = {"step": run.start_step, "ranks": run.world_size, "layout": run.layout, "phase": run.phase}
        lost = {"reached": reached, "lost_s": lost_s, "ran_s": ran_s} if not same else {}
        self._append({"event": PHASE if same else START, **facts, **lost, "process": process})

    def on_step(self, record: Record) -> None:
        """Note what happens seldom."""
        self._step = int(record["step"]) + 1
        if record.get("rewinds", 0) > self._rewinds:
            self._rewinds = int(record["rewinds"])
            self._append({"event": REWIND, "step": self._step})
        slow = int(record.get("slowest_rank", -1))
        if slow not in (-1, self._slow):
            over = record.get("slowest_over_median")
            self._append({"event": SLOW, "step": self._step, "rank": slow, "over_median": over})
        self._slow = slow

    def on_end(self, record: Record) -> None:
        """A start that ends by itself."""
        self._append({"event": END, "step": self._step})

    def _append(self, event: dict[str, Any]) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": time.time(), **_since_boot(), **event}) + "\n")
        except OSError as error:  # the run does not end for it
            if not self._refused:
                print(f"WARNING: {self._path} cannot be written ({error.strerror})", file=sys.stderr, flush=True)
            self._refused = True


def _since_boot() -> dict[str, Any]:
    """Seconds that nobody sets, time in which the machine slept included, and what they count from."""
    return {"since_boot_s": time.clock_gettime(time.CLOCK_BOOTTIME), "boot": boot_of_machine()}


def _given_up(metrics: Path, start_step: int, last_began: int | None) -> tuple[int, float, float]:
    """(steps that the start before had done, seconds of those that are done again, seconds that it was at work).

    last_began: the step at which that start began; None without one: a curve that a fresh start finds is not counted.
    """
    try:
        records = read_metrics(metrics)
    except (OSError, ValueError):
        return start_step, 0.0, 0.0
    of_this_run = last_began is not None
    again = [record for record in records if record["step"] >= start_step] if start_step or of_this_run else []
    reached = again[-1]["step"] + 1 if again else start_step
    lost_s = sum(record.get("step_time_s") or 0.0 for record in again)
    return reached, lost_s, _at_work_s(records, last_began) if last_began is not None else 0.0


def _at_work_s(records: list[dict[str, Any]], first_step: int) -> float:
    """Seconds that the records from a step on have counted: steps, waits for checkpoints, evaluations."""
    counted = (record.get(name) or 0.0 for record in records if record["step"] >= first_step for name in _SECONDS)
    return sum(counted)


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """Events in order; lines that are not whole are left out. Empty without the file."""
    try:
        lines = (run_dir / HISTORY_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event and isinstance(event.get("time"), int | float):
            events.append(event)
    return events


@dataclass(frozen=True, kw_only=True)
class Toll:
    """What a run cost beyond its steps."""

    starts: int
    """Times that the job was started."""
    steps_again: int
    """Steps that were done more than once, over all starts."""
    lost_s: float
    """Seconds of those."""
    rewinds: int
    """Times that the weights of a checkpoint were taken back."""
    slow_ranks: tuple[int, ...]
    """Ranks that were named as slow, in order."""
    down_s: float
    """Seconds between the last sign of life of a start and the next start."""
    wall_s: float
    """Seconds from the first start to the last sign of life."""
    steps_s: float
    """Seconds of the steps of the curve, each once."""

    @property
    def goodput(self) -> float:
        """Share of all the time in which steps were made that counted."""
        return self.steps_s / self.wall_s if self.wall_s > 0 else float("nan")


def toll(run_dir: Path, records: list[dict[str, Any]]) -> Toll | None:
    """What the history and the curve of a run come to; None without a history. records: of the metrics file."""
    events = read_history(run_dir)
    starts = [event for event in events if event["event"] == START]
    if not starts:
        return None
    ends = [events[events.index(then) - 1] for then in starts[1:]] + events[-1:]
    worked_s = [_alive_s(start, then) for start, then in pairwise(starts)] + [_at_work_s(records, starts[-1]["step"])]
    up_s = [max(_between_s(*span), s) for *span, s in zip(starts, ends, worked_s, strict=True)]
    down_s = [max(0.0, _between_s(*span) - up) for span, up in zip(pairwise(starts), up_s, strict=False)]
    return Toll(
        starts=len(starts),
        steps_again=sum(start.get("reached", start["step"]) - start["step"] for start in starts),
        lost_s=sum(start.get("lost_s", 0.0) for start in starts),
        rewinds=sum(event["event"] == REWIND for event in events),
        slow_ranks=tuple(dict.fromkeys(event["rank"] for event in events if event["event"] == SLOW)),
        down_s=sum(down_s),
        wall_s=sum(up_s) + sum(down_s),
        steps_s=sum(record.get("step_time_s") or 0.0 for record in records),
    )


def _between_s(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Seconds from one event to a later one; of two machines, or two boots, by the clock that people read."""
    boots = {event.get("boot") if "since_boot_s" in event else None for event in (one, other)}
    if len(boots) == 1 and boots != {None}:
        return float(other["since_boot_s"] - one["since_boot_s"])
    return max(0.0, other["time"] - one["time"])


def _alive_s(start: dict[str, Any], then: dict[str, Any]) -> float:
    """Seconds for which a start gave signs of life, as the start after it found out."""
    if "ran_s" in then:
        return float(then["ran_s"])
    return max(0.0, (then.get("alive") or 0.0) - start["time"])  # written by an earlier version
