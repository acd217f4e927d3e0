"""`run_dir/history.jsonl`: every start of a run, what was lost before it, rewinds, slow ranks, and how it ended.

The metrics file holds one clean curve, each step once; what it cost to get there is here: work that was done again, and
the time in which no step was made. Read by the run report (tools/report).
"""

import json
import os
import socket
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.callbacks.metrics import METRICS_FILE, read_metrics
from engine.record import Callback, Record, RunInfo

HISTORY_FILE = "history.jsonl"
_DRAWN = uuid.uuid4().hex[:8]
"""Tells starts apart that have one host name and one process id, as every start of a container may."""
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
        reached, lost_s, alive = _given_up(run.run_dir / METRICS_FILE, run.start_step, of_this_run=bool(events))
        facts = {"step": run.start_step, "ranks": run.world_size, "layout": run.layout, "phase": run.phase}
        lost = {"reached": reached, "lost_s": lost_s, "alive": alive} if not same else {}
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
                file.write(json.dumps({"time": time.time(), **event}) + "\n")
        except OSError as error:  # the run does not end for it
            if not self._refused:
                print(f"WARNING: {self._path} cannot be written ({error.strerror})", file=sys.stderr, flush=True)
            self._refused = True


def _given_up(metrics: Path, start_step: int, *, of_this_run: bool) -> tuple[int, float, float]:
    """(steps that the start before had done, seconds of those that are done again, time of its last line).

    of_this_run: otherwise a curve that a fresh start finds is not counted.
    """
    try:
        records, alive = read_metrics(metrics), metrics.stat().st_mtime
    except (OSError, ValueError):
        return start_step, 0.0, 0.0
    again = [record for record in records if record["step"] >= start_step] if start_step or of_this_run else []
    reached = again[-1]["step"] + 1 if again else start_step
    return reached, sum(record.get("step_time_s") or 0.0 for record in again), alive


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
    last = max(events[-1]["time"], _modified(run_dir / METRICS_FILE))
    ends = [max(start.get("alive") or 0.0, _end_before(events, start)) for start in starts[1:]]
    return Toll(
        starts=len(starts),
        steps_again=sum(start.get("reached", start["step"]) - start["step"] for start in starts),
        lost_s=sum(start.get("lost_s", 0.0) for start in starts),
        rewinds=sum(event["event"] == REWIND for event in events),
        slow_ranks=tuple(dict.fromkeys(event["rank"] for event in events if event["event"] == SLOW)),
        down_s=sum(max(0.0, start["time"] - end) for start, end in zip(starts[1:], ends, strict=True)),
        wall_s=last - starts[0]["time"],
        steps_s=sum(record.get("step_time_s") or 0.0 for record in records),
    )


def _end_before(events: list[dict[str, Any]], start: dict[str, Any]) -> float:
    before = events[: events.index(start)]
    return before[-1]["time"] if before else start["time"]


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
