"""The schedule simulator against recordings: real steps of two and four ranks, and spans made by hand."""

from collections import defaultdict
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pytest

from engine.config.phases import first_phase
from engine.config.read import Config, resolve
from engine.objectives.contrastive.program import ContrastiveProgram
from engine.parallel.device import prepare
from engine.parallel.mesh import build_mesh
from engine.pipeline.clock import Phases, write_spans
from engine.pipeline.program import UPDATE, Alone, Backward, Forward, Receive, Replay, Send, Together
from engine.trainer import Trainer
from tests.distributed import run_distributed, world
from tests.engine.mim_jobs import Layout, mim_config
from tools.benchmark.synthetic import SyntheticFeed
from tools.simulate.events import simulate
from tools.simulate.recorded import program_of, recorded_durations, stage_rows
from tools.timeline.spans import Row, Span, StepTimeline, read_step


@dataclass(frozen=True)
class Case:
    """A layout of a recorded step."""

    tensor: int
    pipeline: int
    options: tuple[str, ...] = ()
    is_mim: bool = False

    def config(self, run_dir: Path) -> Config:
        """The job: four micro-batches a replica, two at two replicas."""
        if self.is_mim:
            layout_of_mim = Layout(self.tensor, self.pipeline, micro_batch=4, options=self.options)
            return mim_config(layout_of_mim, f"run_dir={run_dir}")
        layout = (f"parallel.tensor={self.tensor}", f"parallel.pipeline={self.pipeline}")
        sizes = ("train.global_batch_size=8", "train.micro_batch_size=2", "train.steps=4", f"run_dir={run_dir}")
        model = ("model=tiny-18b", "model.text.depth=1")
        return resolve({"data": {"shards": ["-"]}}, [*model, *layout, *sizes, *self.options])


CASES = {
    2: [Case(1, 2), Case(1, 2, ("parallel.virtual=2", "train.keep_activations=1")), Case(2, 1)],
    4: [
        Case(1, 4, ("train.keep_activations=-1",)),
        Case(2, 2, ("train.keep_activations=3",)),
        Case(1, 2, ("parallel.virtual=2", "parallel.overlap=false")),
        Case(1, 2, ("parallel.virtual=2", "parallel.shard=weights")),
        Case(1, 4, is_mim=True),
        Case(2, 2, ("parallel.virtual=2",), is_mim=True),
    ],
}


def _record(folder: str, cases: list[Case]) -> None:
    """Steps with spans on the clock that all processes of a host share."""
    for number, case in enumerate(cases):
        config, device = case.config(Path(folder) / str(number)), prepare()
        mesh = build_mesh(case.tensor, case.pipeline, world())
        trainer = Trainer(first_phase(config), mesh, device)
        place = {"tensor": mesh.tensor.rank, "pipeline": mesh.pipeline.rank, "data": mesh.data.rank}
        for step, batch in zip(range(2), SyntheticFeed(config, mesh, device.torch_device), strict=False):
            phases = Phases(record_spans=True)
            trainer.step(batch, phases)
            write_spans(Path(config.run_dir), mesh.world.rank, place, step, 0.0, phases)
        trainer.towers.wait_for_weights()


@pytest.mark.dist
@pytest.mark.parametrize("ranks", CASES)
def test_a_real_step_works_in_the_simulated_order(tmp_path: Path, ranks: int) -> None:
    run_distributed(_record, ranks, folder=str(tmp_path), cases=CASES[ranks])
    for number, case in enumerate(CASES[ranks]):
        for step in range(2):
            timeline = read_step(tmp_path / str(number), step)
            assert timeline.sizes() == {
                "TP": case.tensor,
                "PP": case.pipeline,
                "DP": ranks // case.tensor // case.pipeline,
            }
            _check_order(timeline, case)
            _check_dependencies(timeline)


def _check_order(timeline: StepTimeline, case: Case) -> None:
    simulation = simulate(program_of(timeline), recorded_durations(timeline))
    chunks = int(dict(option.split("=") for option in case.options).get("parallel.virtual", 1))
    assert (simulation.program.stages, simulation.program.chunks) == (case.pipeline, chunks)
    for row in timeline.rows:  # of every tensor rank and replica
        assert _order_of(row) == _order_of(simulation.timeline.rows[row.pipeline])


def _order_of(row: Row) -> list[tuple[str, int | None, int | None]]:
    """What a rank did, in order, its waits included."""
    return [(span.phase, span.micro_batch, span.chunk) for span in row.spans]


def _check_dependencies(timeline: StepTimeline) -> None:
    """In the recorded times nothing runs before what the simulator lets it wait for."""
    program = program_of(timeline)
    sent, received, met = defaultdict(list), defaultdict(list), defaultdict(list)
    for row in stage_rows(timeline):
        before: Span | None = None
        spans = iter(row.spans)
        for action in chain(program.actions(row.pipeline), UPDATE):
            match action:
                case Forward() | Replay() | Backward() | Alone():
                    before = next(spans)
                case Together():
                    before = next(spans)
                    met[action].append(before)
                case Receive(way):
                    before = next(spans)
                    received[way, row.pipeline].append(before.stop_s)
                case Send(way):
                    assert before is not None
                    there = (row.pipeline + (1 if way == "forward" else -1)) % program.stages
                    sent[way, there].append(before.stop_s)
    assert {inbox: len(times) for inbox, times in sent.items()} == {i: len(times) for i, times in received.items()}
    for inbox, times in received.items():
        assert all(there >= left for there, left in zip(times, sent[inbox], strict=True))
    for action, spans_of_all in met.items():
        if action.span == "loss":  # what every rank contributes to before any has it
            assert max(s.start_s for s in spans_of_all) <= min(s.stop_s for s in spans_of_all)


Spans = list[tuple[str, float, float, int | None]]


def _recording(*rows: Spans) -> StepTimeline:
    """Spans (phase, start, stop, micro-batch) of each stage."""
    return StepTimeline(
        step=0,
        rows=[
            Row(rank=stage, tensor=0, pipeline=stage, data=0, spans=[_span(stage, *span) for span in spans])
            for stage, spans in enumerate(rows)
        ],
    )


def _span(rank: int, phase: str, start_s: float, stop_s: float, micro_batch: int | None) -> Span:
    chunk = None if micro_batch is None else 0
    return Span(rank=rank, step=0, phase=phase, start_s=start_s, stop_s=stop_s, micro_batch=micro_batch, chunk=chunk)


def test_a_recorded_collective_takes_what_it_took_the_last_to_come() -> None:
    end: Spans = [("gather_weights", 14, 14, None)]
    last: Spans = [("reduce", 12, 12, None), ("optimizer", 12, 14, None), *end]
    early: Spans = [("reduce", 10, 10, None), ("optimizer", 10, 14, None), *end]  # 2 s of it wait for the norm
    first: Spans = [("encode", 0, 1, 0), ("encode_text", 1, 2, None), ("exchange", 2, 7, None), ("loss", 7, 8, None)]
    first += [("exchange", 8, 9, None), ("backward_text", 9, 9, None), ("wait", 9, 10, None), ("backward", 10, 12, 0)]
    second: Spans = [("encode_text", 0, 1, None), ("wait", 1, 1, None), ("encode", 1, 6, 0), ("exchange", 6, 7, None)]
    second += [("loss", 7, 8, None), ("exchange", 8, 9, None), ("backward", 9, 10, 0), ("backward_text", 10, 10, None)]
    timeline = _recording(first + last, second + early)
    simulation = simulate(program_of(timeline), recorded_durations(timeline))
    assert simulation.program == ContrastiveProgram(stages=2, micro_batches=1, keep=(1, 1))
    assert simulation.step_s == pytest.approx(14)
    assert [[s.start_s for s in row.spans if s.phase == "loss"] for row in simulation.timeline.rows] == [[7], [7]]


def test_a_recording_without_units_is_refused() -> None:
    with pytest.raises(ValueError, match="no encode or forward spans"):
        program_of(_recording([("loss", 0, 1, None)]))
