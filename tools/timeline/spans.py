"""The spans that a run recorded (engine/pipeline/clock.py), read back and checked: one recording of one step."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from tools.cli import CommandError

COMPUTE = ("encode", "encode_text", "teacher", "forward", "replay", "backward", "backward_text", "loss", "optimizer")
COMMUNICATION = ("deal", "exchange", "reduce", "gather_weights")
WAIT = "wait"
"""For a message of another stage."""
AWAIT_WEIGHTS, AWAIT_GRADIENTS = "await_weights", "await_gradients"
"""For shards that are gathered or reduced beside the work; simulated steps have them."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """One phase of one rank, from start to stop."""

    rank: int
    step: int
    phase: str
    start_s: float
    """Since all ranks met before the step."""
    stop_s: float
    micro_batch: int | None = None
    chunk: int | None = None

    @property
    def label(self) -> str:
        """3 for micro-batch 3; 3b where it runs through the rank's second chunk of layers."""
        if self.micro_batch is None:
            return ""
        return f"{self.micro_batch}{chr(ord('a') + self.chunk) if self.chunk else ''}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A rank of the step."""

    rank: int
    tensor: int
    pipeline: int
    data: int
    spans: Sequence[Span]

    def share(self, phases: Sequence[str], total_s: float) -> float:
        """Part of the step that this rank spent in these phases (they do not nest)."""
        return sum(span.stop_s - span.start_s for span in self.spans if span.phase in phases) / total_s


@dataclass(frozen=True, kw_only=True)
class StepTimeline:
    """One step of all ranks."""

    step: int | None
    """None: simulated, not recorded (tools/simulate/events.py)."""
    rows: Sequence[Row]
    """Replica by replica, stage by stage."""

    @property
    def start_s(self) -> float:
        """First start on any rank."""
        return min(span.start_s for row in self.rows for span in row.spans)

    @property
    def stop_s(self) -> float:
        """Last stop on any rank."""
        return max(span.stop_s for row in self.rows for span in row.spans)

    @property
    def seconds(self) -> float:
        """Duration of the step."""
        return self.stop_s - self.start_s

    def idle(self, row: Row) -> float:
        """Share of the step in which the rank neither computed nor took part in a collective."""
        return max(0.0, 1 - row.share((*COMPUTE, *COMMUNICATION), self.seconds))

    def sizes(self) -> dict[str, int]:
        """TP, PP and DP."""
        names = {"TP": "tensor", "PP": "pipeline", "DP": "data"}
        return {name: 1 + max(getattr(row, axis) for row in self.rows) for name, axis in names.items()}

    def place(self, row: Row) -> str:
        """PP 1 · TP 0: the coordinates on axes with more than one rank."""
        at = {"DP": row.data, "PP": row.pipeline, "TP": row.tensor}
        return " · ".join(f"{name} {at[name]}" for name in at if self.sizes()[name] > 1)


def read_step(run_dir: Path, step: int | None = None) -> StepTimeline:
    """The recording of `step` (None: the last step that every rank recorded). Raises ValueError in one clear line."""
    files = sorted((run_dir / "timeline").glob("rank_*.jsonl"))
    if not files:
        raise CommandError(f"{run_dir}/timeline has no rank_*.jsonl: train with log.timeline_steps=[STEP] first")
    recordings = {file: dict(_recordings(file)) for file in files}
    complete = set.intersection(*(set(steps) for steps in recordings.values()))
    if step is None:
        if not complete:
            raise CommandError(f"no step in {run_dir}/timeline is recorded by all {len(files)} ranks; did the run end?")
        step = max(complete)
    missing = [file.stem for file, steps in recordings.items() if step not in steps]
    if missing:
        raise CommandError(
            f"step {step} is not recorded by {', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}; "
            f"recorded by all ranks: {sorted(complete) or 'none'}"
        )
    rows = [steps[step] for steps in recordings.values()]
    return StepTimeline(step=step, rows=sorted(rows, key=attrgetter("data", "pipeline", "tensor")))


def _recordings(file: Path) -> Iterator[tuple[int, Row]]:
    """(step, row) of a rank's file; of a step recorded twice (a resumed run appends) both, the later one last."""
    lines = (_parse(file, i, text) for i, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1))
    for step, group in groupby(lines, key=lambda line: line[1].step):
        place, spans = _last_recording(list(group))
        yield step, Row(**place, spans=spans)


def _last_recording(lines: list[tuple[dict[str, int], Span]]) -> tuple[dict[str, int], list[Span]]:
    # Within a recording spans are written in the order in which they end.
    begins = max((i for i in range(1, len(lines)) if lines[i][1].stop_s < lines[i - 1][1].stop_s), default=0)
    return lines[begins][0], [span for _, span in lines[begins:]]


def _parse(file: Path, number: int, text: str) -> tuple[dict[str, int], Span]:
    try:
        entry: dict[str, Any] = json.loads(text)
        place = {name: int(entry[name]) for name in ("rank", "tensor", "pipeline", "data")}
        span = Span(
            rank=place["rank"],
            step=int(entry["step"]),
            phase=str(entry["phase"]),
            start_s=float(entry["start_s"]),
            stop_s=float(entry["stop_s"]),
            micro_batch=entry.get("micro_batch"),
            chunk=entry.get("chunk"),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CommandError(
            f"{file}, line {number}: not a span of a timeline ({type(error).__name__}: {error})"
        ) from None
    if span.stop_s < span.start_s:
        raise CommandError(f"{file}, line {number}: the span ends at {span.stop_s} before it starts at {span.start_s}")
    return place, span
