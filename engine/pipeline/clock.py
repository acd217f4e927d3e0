"""What a rank did when: phase times of every step, and on request each span for a picture (tools/timeline)."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Clock = Callable[[], float]


@dataclass
class Phases:
    """Seconds of the phases of one step on this rank, and the spans behind them if they are wanted.

    The clock is the CPU's: on a GPU it sees launches, unless it is one that waits for the device (Device.clock_s), as
    it is in steps whose timeline is recorded.
    """

    clock: Clock = time.perf_counter
    record_spans: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    spans: list[dict[str, Any]] = field(default_factory=list)
    begins: Callable[[str, Any], None] | None = None
    """Told of every phase that begins, with its unit (engine/resilience/watch.py)."""

    @contextmanager
    def time(self, name: str, unit: Any = None) -> Iterator[None]:
        """Add the block's time to phase `name`; `unit` (micro_batch, chunk) is kept with its span."""
        if self.begins is not None:
            self.begins(name, unit)
        start = self.clock()
        try:
            yield
        finally:
            stop = self.clock()
            self.seconds[name] = self.seconds.get(name, 0.0) + stop - start
            if self.record_spans:
                span = {"phase": name, "start_s": start, "stop_s": stop}
                if unit is not None:
                    span |= {"micro_batch": unit.micro_batch, "chunk": unit.chunk}
                self.spans.append(span)


def write_spans(run_dir: Path, rank: int, place: dict[str, int], step: int, zero_s: float, phases: Phases) -> None:
    """Append the spans of one step to run_dir/timeline/rank_RRRRR.jsonl.

    zero_s: this rank's clock when all ranks met before the step, so that hosts with different clocks line up.
    """
    folder = run_dir / "timeline"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"rank_{rank:05d}.jsonl", "a", encoding="utf-8") as file:
        for span in phases.spans:
            moved = {"start_s": span["start_s"] - zero_s, "stop_s": span["stop_s"] - zero_s}
            file.write(json.dumps({"rank": rank, **place, "step": step, **span, **moved}) + "\n")
