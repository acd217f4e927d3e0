"""A recorded step (engine/pipeline/clock.py) as input of the simulator: its program, and the time of each work.

Simulating a step with its own durations shows what the simulator leaves out; with other numbers of micro-batches or
kept activations it answers what-if questions about a real machine.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

from engine.objectives.contrastive.program import ContrastiveProgram
from engine.objectives.mim.program import MimProgram
from engine.pipeline.program import Alone, Program, Unit
from tools.cli import CommandError
from tools.simulate.events import Durations
from tools.timeline.spans import COMMUNICATION, WAIT, Row, Span, StepTimeline


def stage_rows(timeline: StepTimeline) -> list[Row]:
    """The first rank of each stage of the first replica, in tower order."""
    return [row for row in timeline.rows if row.data == 0 and row.tensor == 0]


def program_of(timeline: StepTimeline) -> Program:
    """Stages, micro-batches, chunks, rounds, kept micro-batches and turns of captions, read off the spans."""
    rows = stage_rows(timeline)
    forward = [span for span in rows[0].spans if span.phase in ("encode", "forward")]
    if not forward:
        raise CommandError("the recording has no encode or forward spans: it is not of a training step")
    micro_batches = 1 + max(span.micro_batch or 0 for span in forward)
    sizes: dict[str, Any] = {
        "stages": len(rows),
        "micro_batches": micro_batches,
        "chunks": 1 + max(span.chunk or 0 for span in forward),
    }
    if forward[0].phase == "forward":
        return MimProgram(**sizes)
    replayed = [{span.micro_batch for span in row.spans if span.phase == "replay"} for row in rows]
    keep = tuple(micro_batches - len(of_stage) for of_stage in replayed)
    in_a_row = next(i for i, span in enumerate([*forward, None]) if span is None or span.chunk != forward[0].chunk)
    turns = [sum(span.phase == "encode_text" for span in row.spans) for row in rows]
    return ContrastiveProgram(
        **sizes,
        keep=keep,
        round_size=in_a_row if sizes["chunks"] > 1 else None,
        deals_captions=len(rows) < 3 or max(turns) > 1,
    )


def recorded_durations(timeline: StepTimeline) -> Durations:
    """What each piece of work took, for one simulation of `program_of(timeline)`.

    What all stages do together ends for all at about the same time: it takes what it took the stage that came last. The
    optimizer is one of these: it begins with the norm of all gradients, in which early stages wait for the last.
    """
    rows = stage_rows(timeline)
    queues = [_queues(row.spans) for row in rows]
    for phase in (*COMMUNICATION, "loss", "optimizer"):
        for number in range(len(queues[0][phase, None, None])):
            shortest = min(queue[phase, None, None][number] for queue in queues)
            for queue in queues:
                queue[phase, None, None][number] = shortest

    def duration(stage: int, phase: str, unit: Unit | None, turn: Alone | None = None) -> float:
        key = (phase, unit.micro_batch, unit.chunk) if unit else (phase, None, None)
        return queues[stage][key].popleft()

    return duration


Work = tuple[str, int | None, int | None]
"""(phase, micro-batch, chunk)."""


def _queues(spans: Sequence[Span]) -> dict[Work, deque[float]]:
    queues: dict[Work, deque[float]] = defaultdict(deque)
    for span in spans:
        if span.phase != WAIT:
            queues[span.phase, span.micro_batch, span.chunk].append(span.stop_s - span.start_s)
    return queues
