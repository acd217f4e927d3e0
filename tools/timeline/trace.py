"""The same spans for a trace viewer: Chrome's trace event format, which chrome://tracing and Perfetto open.

A replica is a process, a rank a thread. Format: "Trace Event Format", complete (X) and metadata (M) events.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.timeline.spans import COMMUNICATION, COMPUTE, Row, Span, StepTimeline


def save_trace(timeline: StepTimeline, path: Path) -> None:
    """Write the trace as JSON."""
    events = [*_names(timeline), *(_event(row, span) for row in timeline.rows for span in row.spans)]
    path.write_text(json.dumps({"displayTimeUnit": "ms", "traceEvents": events}) + "\n", encoding="utf-8")


def _names(timeline: StepTimeline) -> Iterator[dict[str, Any]]:
    for data in sorted({row.data for row in timeline.rows}):
        yield {"ph": "M", "name": "process_name", "pid": data, "args": {"name": f"replica {data}"}}
    for order, row in enumerate(timeline.rows):
        where = {"ph": "M", "pid": row.data, "tid": row.rank}
        name = " · ".join(filter(None, (f"rank {row.rank}", timeline.place(row))))
        yield where | {"name": "thread_name", "args": {"name": name}}
        yield where | {"name": "thread_sort_index", "args": {"sort_index": order}}


def _event(row: Row, span: Span) -> dict[str, Any]:
    kind = "compute" if span.phase in COMPUTE else "communication" if span.phase in COMMUNICATION else "wait"
    args = {"step": span.step}
    if span.micro_batch is not None and span.chunk is not None:
        args |= {"micro_batch": span.micro_batch, "chunk": span.chunk}
    return {
        "ph": "X",
        "name": span.phase,
        "cat": kind,
        "pid": row.data,
        "tid": row.rank,
        "ts": span.start_s * 1e6,  # microseconds
        "dur": (span.stop_s - span.start_s) * 1e6,
        "args": args,
    }
