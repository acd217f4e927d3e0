"""The order of work of 1F1B on all stages at once: complete, without deadlock, in bounded memory, messages in order."""

from collections import deque
from itertools import product
from types import SimpleNamespace

import pytest
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

from engine.pipeline.links import Unit
from engine.pipeline.one_f_one_b import Turn, turns

SHAPES = [
    *product((1, 2, 3, 4, 5), (1, 2, 5, 8), (1,)),
    *((stages, stages * groups, chunks) for stages in (2, 3, 4) for groups in (1, 2, 3) for chunks in (2, 3)),
]
"""(stages, micro-batches, chunks)."""


class _Ring:
    """All stages, working their turns as soon as the messages that they need are there."""

    def __init__(self, stages: int, micro_batches: int, chunks: int):
        self.stages, self.chunks = stages, chunks
        self.todo = [deque(turns(micro_batches, stages=stages, stage=s, chunks=chunks)) for s in range(stages)]
        self.inputs: list[deque[Unit]] = [deque() for _ in range(stages)]
        self.gradients: list[deque[Unit]] = [deque() for _ in range(stages)]

    def run(self) -> None:
        while any(self.todo):
            moved = [stage for stage in range(self.stages) if self.todo[stage] and self._work(stage)]
            assert moved, f"every stage waits: {[list(left)[:1] for left in self.todo]}"

    def _work(self, stage: int) -> bool:
        turn = self.todo[stage][0]
        unit, forward = turn.unit, turn.is_forward
        at_edge = self._starts(stage, unit) if forward else self._ends(stage, unit)
        box = self.inputs[stage] if forward else self.gradients[stage]
        if not at_edge:
            if not box:
                return False
            assert box.popleft() == unit, "messages come in another order than they are wanted"
        self.todo[stage].popleft()
        self._send(stage, unit, forward)
        return True

    def _send(self, stage: int, unit: Unit, forward: bool) -> None:
        if forward and not self._ends(stage, unit):
            last = stage == self.stages - 1
            self.inputs[(stage + 1) % self.stages].append(Unit(unit.chunk + last, unit.micro_batch))
        if not forward and not self._starts(stage, unit):
            first = stage == 0
            self.gradients[(stage - 1) % self.stages].append(Unit(unit.chunk - first, unit.micro_batch))

    def _starts(self, stage: int, unit: Unit) -> bool:
        return stage == 0 and unit.chunk == 0

    def _ends(self, stage: int, unit: Unit) -> bool:
        return stage == self.stages - 1 and unit.chunk == self.chunks - 1


@pytest.mark.parametrize(("stages", "micro_batches", "chunks"), SHAPES)
def test_every_message_is_there_when_it_is_wanted(stages: int, micro_batches: int, chunks: int) -> None:
    ring = _Ring(stages, micro_batches, chunks)
    ring.run()
    assert not any(ring.inputs) and not any(ring.gradients)


@pytest.mark.parametrize(("stages", "micro_batches", "chunks"), SHAPES)
def test_every_unit_goes_forward_once_and_then_back_once(stages: int, micro_batches: int, chunks: int) -> None:
    for stage in range(stages):
        order = turns(micro_batches, stages=stages, stage=stage, chunks=chunks)
        units = {Unit(chunk, i) for chunk in range(chunks) for i in range(micro_batches)}
        assert {turn.unit for turn in order} == units and len(order) == 2 * len(units) == len(set(order))
        assert all(order.index(Turn(unit, True)) < order.index(Turn(unit, False)) for unit in units)


@pytest.mark.parametrize("micro_batches", [4, 9])
def test_a_stage_holds_no_more_micro_batches_than_stages_follow(micro_batches: int) -> None:
    for stage in range(4):
        held = most = 0
        for turn in turns(micro_batches, stages=4, stage=stage, chunks=1):
            held += 1 if turn.is_forward else -1
            most = max(most, held)
        assert most == 4 - stage


@pytest.mark.parametrize(("stages", "micro_batches", "chunks"), [shape for shape in SHAPES if shape[0] > 1])
def test_the_order_is_that_of_megatron_core(stages: int, micro_batches: int, chunks: int) -> None:
    table = get_schedule_table(micro_batches, chunks, stages if chunks > 1 else micro_batches)
    for stage in range(stages):
        order = turns(micro_batches, stages=stages, stage=stage, chunks=chunks)
        forwards = [(turn.unit.micro_batch, turn.unit.chunk) for turn in order if turn.is_forward]
        backwards = [(turn.unit.micro_batch, chunks - 1 - turn.unit.chunk) for turn in order if not turn.is_forward]
        assert forwards == backwards == table
        place = SimpleNamespace(
            pp_group=SimpleNamespace(size=lambda: stages, rank=lambda stage=stage: stage),
            virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        )
        _, _, ahead, _ = get_pp_rank_microbatches(micro_batches, chunks, stages, p2p_communicator=place)
        assert [turn.is_forward for turn in order].index(False) == min(ahead + 1, len(table))


def test_the_last_backward_of_a_chunk_is_the_last_micro_batch() -> None:
    """Where the reduction of gradients starts."""
    order = turns(8, stages=4, stage=1, chunks=2)
    for chunk in (0, 1):
        backwards = [turn.unit.micro_batch for turn in order if not turn.is_forward and turn.unit.chunk == chunk]
        assert backwards == list(range(8))
