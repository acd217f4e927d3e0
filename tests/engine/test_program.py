"""The programs of both objectives on all stages at once: complete, without deadlock, in bounded memory, in order."""

from collections import deque
from dataclasses import replace
from itertools import pairwise, product
from types import SimpleNamespace

import pytest
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

from engine.config.read import resolve
from engine.objectives.contrastive.program import ContrastiveProgram
from engine.objectives.mim.program import MimProgram
from engine.objectives.registry import OBJECTIVES
from engine.pipeline.forward import ForwardProgram
from engine.pipeline.program import (
    Accumulate,
    Action,
    Alone,
    Await,
    Backward,
    Forward,
    Gather,
    Open,
    Program,
    Receive,
    Reduced,
    Release,
    Replay,
    Send,
    Together,
    Unit,
)

SHAPES = [
    *product((1, 2, 3, 4, 5), (1, 2, 5, 8), (1,)),
    *((stages, stages * groups, chunks) for stages in (1, 2, 3, 4) for groups in (1, 2, 3) for chunks in (2, 3)),
]
"""(stages, micro-batches, chunks)."""
ONE_F_ONE_B = [MimProgram(stages=p, micro_batches=m, chunks=v) for p, m, v in SHAPES]
PARTS = frozenset(range(3))
SHARDED = ContrastiveProgram(
    stages=3, micro_batches=4, chunks=2, keep=1, round_size=4, sharded_weights=PARTS, sharded_gradients=PARTS
)
BARRIER = [
    *(ContrastiveProgram(stages=p, micro_batches=m, chunks=v, keep=m // 2) for p, m, v in SHAPES),
    ContrastiveProgram(stages=3, micro_batches=7, chunks=2, round_size=5, keep=(0, 3, 7)),
    SHARDED,
]
EMBEDDING = [
    ForwardProgram(stages=p, micro_batches=m, chunks=v, round_size=p)
    for p, m, v in product((1, 2, 3), (0, 1, 4, 5), (1, 3))
]
PARTLY_FROZEN = [
    ContrastiveProgram(
        stages=p, micro_batches=m, chunks=v, keep=m // 2, trained_from=lowest, trains_captions=bool(lowest % 2)
    )
    for p, m, v in SHAPES
    for lowest in range(1, p * v + 1)
]
"""The captions have no backward in some of them."""


class _Ring:
    """All stages, each doing its actions as soon as the messages and the others that they need are there."""

    def __init__(self, program: Program):
        self.program, self.stages = program, program.stages
        self.todo = [deque(program.actions(stage)) for stage in range(self.stages)]
        self.done: list[list[Action]] = [[] for _ in range(self.stages)]
        self.boxes: dict[tuple[str, int], deque[Unit]] = {}
        self.met: dict[Together, set[int]] = {}

    def run(self) -> None:
        while any(self.todo):
            moved = [stage for stage in range(self.stages) if self.todo[stage] and self._act(stage)]
            assert moved, f"every stage waits: {[list(left)[:1] for left in self.todo]}"
        assert not any(self.boxes.values()), "messages are left"

    def _act(self, stage: int) -> bool:
        action = self.todo[stage][0]
        if isinstance(action, Together):
            met = self.met.setdefault(action, set())
            met.add(stage)
            if len(met) < self.stages:
                return False
        if isinstance(action, Receive):
            box = self.boxes.get((action.way, stage))
            if not box:
                return False
            assert box.popleft() == self._taker(stage), "messages come in another order than they are wanted"
        if isinstance(action, Send):
            self._send(stage, action)
        self.todo[stage].popleft()
        self.done[stage].append(action)
        return True

    def _taker(self, stage: int) -> Unit:
        """The unit that the message is for: whose forward or backward is next."""
        return next(action.unit for action in self.todo[stage] if isinstance(action, Forward | Backward))

    def _send(self, stage: int, action: Send) -> None:
        """To the unit of the neighbour that lies behind, or in front of, the one that was just worked."""
        unit = next(done.unit for done in reversed(self.done[stage]) if isinstance(done, Forward | Backward))
        step = 1 if action.way == "forward" else -1
        at_end = stage == (self.stages - 1 if step == 1 else 0)
        there = Unit(unit.chunk + step * at_end, unit.micro_batch)
        self.boxes.setdefault((action.way, (stage + step) % self.stages), deque()).append(there)


@pytest.mark.parametrize("programs", [ONE_F_ONE_B, BARRIER, PARTLY_FROZEN], ids=["1f1b", "barrier", "partly frozen"])
def test_every_message_is_there_when_it_is_wanted(programs: list[Program]) -> None:
    for program in programs:
        ring = _Ring(program)
        ring.run()
        for stage, actions in enumerate(ring.done):
            for way in ("forward", "backward"):
                asked = [i for i, action in enumerate(actions) if action == Open(way)]
                receives = [i for i, action in enumerate(actions) if action == Receive(way)]
                assert len(asked) == 1 and all(i > asked[0] for i in receives), (program, stage)


def test_embeddings_keep_nothing_and_end_in_one_exchange() -> None:
    for program in EMBEDDING:
        ring = _Ring(program)
        ring.run()
        units = {Unit(chunk, i) for chunk in range(program.chunks) for i in range(program.micro_batches)}
        for stage, actions in enumerate(ring.done):
            forwards = [action for action in actions if isinstance(action, Forward)]
            assert {action.unit for action in forwards} == units and len(forwards) == len(units)
            assert not any(action.keeps or action.trains for action in forwards) and program.in_flight(stage) == 0
            assert actions[-1] == Together("exchange") and actions.count(Together("exchange")) == 1


@pytest.mark.parametrize(("wrong", "said"), [("stages", "stages 0"), ("chunks", "chunks 0"), ("micro_batches", "-1")])
def test_an_embedding_of_nothing_has_a_stage_and_a_chunk(wrong: str, said: str) -> None:
    sizes = {"stages": 1, "chunks": 1, "micro_batches": 0}
    assert ForwardProgram(**sizes).in_flight(0) == 0
    with pytest.raises(ValueError, match=said):
        ForwardProgram(**sizes | {wrong: sizes[wrong] - 1})


@pytest.mark.parametrize("programs", [ONE_F_ONE_B, BARRIER], ids=["1f1b", "barrier"])
def test_every_unit_goes_forward_once_and_back_once(programs: list[Program]) -> None:
    for program in programs:
        units = {Unit(chunk, i) for chunk in range(program.chunks) for i in range(program.micro_batches)}
        for stage in range(program.stages):
            actions = list(program.actions(stage))
            forwards = [(i, action) for i, action in enumerate(actions) if isinstance(action, Forward)]
            backwards = [(i, action) for i, action in enumerate(actions) if isinstance(action, Backward)]
            replays = [(i, action) for i, action in enumerate(actions) if isinstance(action, Replay)]
            assert {a.unit for _, a in forwards} == {a.unit for _, a in backwards} == units
            assert len(forwards) == len(backwards) == len(units)
            kept = {a.unit for _, a in forwards if a.keeps}
            assert sorted({a.unit for _, a in replays} | kept, key=str) == sorted(units, key=str)
            assert len(replays) + len(kept) == len(units), "what keeps its activations is not replayed"
            at = {a.unit: i for i, a in forwards}
            assert all(at[a.unit] < i for i, a in backwards) and all(at[a.unit] < i for i, a in replays)
            last = {a.unit.chunk: a.is_last for _, a in backwards}
            assert all(last.values()) and sum(a.is_last for _, a in backwards) == program.chunks


def test_nothing_goes_back_through_what_lies_below_the_trained_part() -> None:
    for program in PARTLY_FROZEN:
        for stage in range(program.stages):
            actions = list(program.actions(stage))
            stashed = {a.unit for a in actions if isinstance(a, Forward) and a.trains and not a.keeps}
            back = [a.unit for a in actions if isinstance(a, Backward)]
            assert stashed == {a.unit for a in actions if isinstance(a, Replay)}, "and nothing waits for a replay"
            places = [unit.chunk * program.stages + stage for unit in back]
            above = [c for c in range(program.chunks) if c * program.stages + stage >= program.trained_from]
            assert len(places) == len(above) * program.micro_batches and min(places, default=99) >= program.trained_from
            sent = sum(action == Send("backward") for action in actions)
            assert sent == sum(place > program.trained_from for place in places)
            assert bool(_turns_of("backward_text", actions)) == program.trains_captions


def test_no_stage_goes_back_before_every_stage_has_the_loss() -> None:
    for program in BARRIER:
        for stage in range(program.stages):
            actions = list(program.actions(stage))
            loss = actions.index(Together("loss"))
            assert all(isinstance(a, Forward) <= (i < loss) for i, a in enumerate(actions))
            assert all(isinstance(a, Backward | Replay) <= (i > loss) for i, a in enumerate(actions))
            encode, backward = (_turns_of(span, actions) for span in ("encode_text", "backward_text"))
            assert max(map(actions.index, encode)) < loss < min(map(actions.index, backward))


def _turns_of(span: str, actions: list[Action]) -> list[Alone]:
    return [action for action in actions if isinstance(action, Alone) and action.span == span]


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("stages", [1, 2, 3, 8])
def test_captions_are_done_once_where_a_stage_waits(stages: int, parts: int) -> None:
    program = ContrastiveProgram(stages=stages, micro_batches=8)
    for stage in range(stages):
        actions = list(program.actions(stage))
        for span, waits in (("encode_text", stage), ("backward_text", stages - 1 - stage)):
            turns = _turns_of(span, actions)
            done = [part for turn in turns for part in range(parts)[turn.parts(parts)]]
            assert done == list(range(parts)), "in one order, each once"
            before = [turn for turn in turns if _comes_first(turn, actions)]
            share = sum(len(range(parts)[turn.parts(parts)]) for turn in before) / parts
            assert abs(share - waits / max(1, stages - 1)) <= 0.5 / parts, "half a part off at most"
            assert len(turns) == 1 or 0 < waits < stages - 1


def _comes_first(turn: Alone, actions: list[Action]) -> bool:
    """Ahead of the units of its phase."""
    kind = Forward if turn.span == "encode_text" else Backward
    return actions.index(turn) < next(i for i, action in enumerate(actions) if isinstance(action, kind))


def test_captions_that_come_and_go_have_one_turn() -> None:
    for program in (
        replace(SHARDED, deals_captions=False),
        ContrastiveProgram(stages=4, micro_batches=8, deals_captions=False),
    ):
        for stage in range(program.stages):
            actions = list(program.actions(stage))
            assert [turn.share for turn in _turns_of("encode_text", actions)] == [(0.0, 1.0)]
            assert [turn.share for turn in _turns_of("backward_text", actions)] == [(0.0, 1.0)]


def test_a_stage_holds_the_units_of_the_papers_schedules() -> None:
    """Narayanan et al. 2021, section 2.2: P - stage forwards; interleaved 2 (P - 1 - stage) + (v - 1) P + 1."""
    plain, interleaved = (MimProgram(stages=4, micro_batches=12, chunks=v) for v in (1, 3))
    assert [plain.in_flight(stage) for stage in range(4)] == [4, 3, 2, 1]
    assert [interleaved.in_flight(stage) for stage in range(4)] == [15, 13, 11, 9]
    # With the barrier: what is kept, and the one that is replayed once the kept are gone.
    for keep, held in ((0, 1), (3, 3), (12, 12)):
        assert ContrastiveProgram(stages=2, micro_batches=12, keep=keep).in_flight(1) == held


@pytest.mark.parametrize(("stages", "micro_batches", "chunks"), [shape for shape in SHAPES if shape[0] > 1])
def test_the_order_is_that_of_megatron_core(stages: int, micro_batches: int, chunks: int) -> None:
    table = get_schedule_table(micro_batches, chunks, stages if chunks > 1 else micro_batches)
    for stage in range(stages):
        order = MimProgram(stages=stages, micro_batches=micro_batches, chunks=chunks).turns(stage)
        forwards = [(unit.micro_batch, unit.chunk) for unit, is_forward in order if is_forward]
        backwards = [(unit.micro_batch, chunks - 1 - unit.chunk) for unit, is_forward in order if not is_forward]
        assert forwards == backwards == table
        place = SimpleNamespace(
            pp_group=SimpleNamespace(size=lambda: stages, rank=lambda stage=stage: stage),
            virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        )
        _, _, ahead, _ = get_pp_rank_microbatches(micro_batches, chunks, stages, p2p_communicator=place)
        assert [is_forward for _, is_forward in order].index(False) == min(ahead + 1, len(table))


# --- parts that come and go -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [True, False])
def test_weights_are_here_for_their_turns_and_gradients_are_reduced_once(ahead: bool) -> None:
    program = ContrastiveProgram(**{**vars(SHARDED), "gathers_ahead": ahead})
    for stage in range(program.stages):
        whole: set[int] = set()
        gathering: set[int] = set()
        met: set[int] = set()
        open_gradients: list[int] = []
        most = 0
        for action in program.actions(stage):
            match action:
                case Gather(part):
                    assert part not in gathering, "it is asked for twice"
                    gathering.add(part)
                case Await(part):
                    assert part in gathering or not ahead or not met, "nobody has asked for it"
                    met.add(part)
                    whole.add(part)
                case Release(part):
                    whole.remove(part)
                    gathering.discard(part)
                case Forward(unit) | Replay(unit) | Backward(unit):
                    assert unit.chunk in whole
                case Alone():
                    assert program.captions in whole
                case Accumulate(part):
                    assert part not in open_gradients
                    open_gradients.append(part)
                case Reduced(part):
                    open_gradients.remove(part)
            most = max(most, len((whole | gathering) - {program.captions}))
        assert open_gradients == [program.captions], "those of the captions are whole until the step's end"
        assert most <= 2 and not whole


def test_no_two_reductions_are_under_way() -> None:
    """A reduction starts in the last backward of a chunk: the one of the chunk before has ended."""
    for stage in range(SHARDED.stages):
        actions = list(SHARDED.actions(stage))
        last = [i for i, action in enumerate(actions) if isinstance(action, Backward) and action.is_last]
        for before, after in pairwise(last):
            assert any(isinstance(action, Reduced) for action in actions[before:after])


def test_what_is_not_sharded_neither_comes_nor_goes() -> None:
    for program in (ContrastiveProgram(stages=2, micro_batches=4), MimProgram(stages=2, micro_batches=4)):
        kinds = {type(action) for action in program.actions(0)}
        assert not kinds & {Gather, Await, Release, Accumulate, Reduced}


def test_a_program_of_a_config() -> None:
    config = resolve(
        {"model": "tiny-18b", "data": {"shards": ["-"]}},
        ["parallel.pipeline=2", "parallel.virtual=2", "train.global_batch_size=24", "train.micro_batch_size=2"],
    )
    program = OBJECTIVES["contrastive"].program(config, 3)
    assert program == ContrastiveProgram(stages=2, micro_batches=4, chunks=2)
    for freeze, lowest in (("vision.embed.*", 0), ("vision.embed.*,vision.blocks.0-2.*", 3), ("vision.*", 4)):
        frozen = replace(config, train=replace(config.train, freeze=freeze.split(",")))
        assert OBJECTIVES["contrastive"].program(frozen, 3) == replace(program, trained_from=lowest)
    frozen = replace(config, train=replace(config.train, freeze=["text.*"]))
    assert OBJECTIVES["contrastive"].program(frozen, 3) == replace(program, trains_captions=False)
