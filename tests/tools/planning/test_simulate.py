"""The schedule simulator against closed forms (against real steps: test_recorded.py), and its command."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.colors import to_rgb
from PIL import Image

from engine.config.read import load_config, resolve
from engine.objectives.contrastive.program import ContrastiveProgram
from engine.pipeline.program import Program
from tools.cost.cluster import Cluster
from tools.cost.hardware import load_hardware
from tools.cost.layout import layout_of
from tools.cost.mim import mim_costs
from tools.cost.time import step_time
from tools.simulate.__main__ import main
from tools.simulate.events import CollectiveCosts, StageCosts, bubble_bound, durations_of, simulate
from tools.simulate.stage_costs import simulate_config
from tools.simulate.wires import ShardCosts, Wire
from tools.timeline.picture import COLOURS, IDLE
from tools.timeline.spans import AWAIT_GRADIENTS, AWAIT_WEIGHTS

FORWARD, BACKWARD = 3.0, 7.0


def _uniform(program: Program, *, text_s: float = 0.0, wire: Wire | None = None, **together: float):
    """Every chunk takes as long as any other of its stage; a stage FORWARD and BACKWARD."""
    chunks = program.chunks
    costs = StageCosts(
        forward_s=(FORWARD / chunks,) * chunks,
        backward_s=(BACKWARD / chunks,) * chunks,
        encode_text_s=text_s,
        backward_text_s=text_s,
    )
    return simulate(program, durations_of([costs] * program.stages, CollectiveCosts(**together)), wire)


# --- closed forms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 4), (2, 1), (2, 8), (4, 6), (12, 450)])
def test_bubble_of_equal_stages(stages: int, micro_batches: int) -> None:
    step = _uniform(ContrastiveProgram(stages=stages, micro_batches=micro_batches, keep=micro_batches))
    assert step.encode_s == pytest.approx((micro_batches + stages - 1) * FORWARD)
    assert step.backprop_s == pytest.approx((micro_batches + stages - 1) * BACKWARD)
    bubble = pytest.approx((stages - 1) / (micro_batches + stages - 1))
    assert (step.encode_bubble, step.backprop_bubble) == (bubble, bubble)


@pytest.mark.parametrize(("stages", "micro_batches", "chunks"), [(2, 4, 2), (4, 8, 3), (4, 4, 2), (8, 64, 2)])
def test_bubble_of_virtual_stages(stages: int, micro_batches: int, chunks: int) -> None:
    program = ContrastiveProgram(stages=stages, micro_batches=micro_batches, chunks=chunks, keep=micro_batches)
    step = _uniform(program)
    bubble = pytest.approx((stages - 1) / (chunks * micro_batches + stages - 1))
    assert (step.encode_bubble, step.backprop_bubble) == (bubble, bubble)
    assert bubble_bound(program) == bubble


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 3), (4, 9)])
def test_a_replay_runs_while_the_gradient_travels(stages: int, micro_batches: int) -> None:
    """Only backwards follow each other down the pipeline: the first replay of every stage but the last is hidden."""
    step = _uniform(ContrastiveProgram(stages=stages, micro_batches=micro_batches))
    assert step.backprop_s == pytest.approx(micro_batches * (FORWARD + BACKWARD) + (stages - 1) * BACKWARD)


def test_kept_micro_batches_are_not_replayed() -> None:
    for keep in range(4):
        step = _uniform(ContrastiveProgram(stages=1, micro_batches=3, keep=keep))
        assert step.backprop_s == pytest.approx(3 * BACKWARD + (3 - keep) * FORWARD)


def test_captions_live_in_the_bubble() -> None:
    program = ContrastiveProgram(stages=4, micro_batches=8)
    without = _uniform(program)
    within = _uniform(program, text_s=3 * FORWARD)  # as long as any stage waits ahead and behind together
    assert within.step_s == pytest.approx(without.step_s)
    beyond = _uniform(program, text_s=3 * FORWARD + 1)
    assert beyond.encode_s == pytest.approx(without.encode_s + 1)
    # In one turn they hide as long as the second stage waits, the shortest wait of all.
    one_turn = replace(program, deals_captions=False)
    assert _uniform(one_turn, text_s=FORWARD).step_s == pytest.approx(without.step_s)
    assert _uniform(one_turn, text_s=FORWARD + 1).encode_s == pytest.approx(without.encode_s + 1)


def test_the_slowest_stage_sets_the_pace() -> None:
    seconds = (1.0, 4.0, 2.0)
    costs = [StageCosts(forward_s=(s,), backward_s=(2 * s,)) for s in seconds]
    step = simulate(ContrastiveProgram(stages=3, micro_batches=5, keep=5), durations_of(costs))
    assert step.encode_s == pytest.approx(sum(seconds) + 4 * max(seconds))
    assert step.backprop_s == pytest.approx(2 * step.encode_s)


def test_messages_take_their_time_on_the_way() -> None:
    plain = ContrastiveProgram(stages=3, micro_batches=6, keep=6)
    late = _uniform(plain, wire=Wire(latency_s=0.5))
    assert late.encode_s == pytest.approx(_uniform(plain).encode_s + 2 * 0.5)
    # A link that is slower than the stages sets the pace: one message leaves when the one before has arrived.
    slow = _uniform(replace(plain, stages=2), wire=Wire(transfer_s=5.0))
    assert slow.encode_s == pytest.approx(FORWARD + 6 * 5.0 + FORWARD)
    # A link that is faster only adds the first message's time.
    fast = _uniform(replace(plain, stages=2), wire=Wire(transfer_s=2.0))
    assert fast.encode_s == pytest.approx(7 * FORWARD + 2.0)


def test_collectives_wait_for_the_last_stage() -> None:
    program = ContrastiveProgram(stages=2, micro_batches=4)
    step = _uniform(program, loss_s=1.0, exchange_s=0.5, reduce_s=2.0, optimizer_s=3.0, gather_weights_s=0.25)
    assert step.step_s == pytest.approx(_uniform(program).step_s + 1.0 + 2 * 0.5 + 2.0 + 3.0 + 0.25)
    starts = [[s.start_s for s in row.spans if s.phase == "loss"] for row in step.timeline.rows]
    assert starts[0] == starts[1] == pytest.approx([step.encode_s + 0.5])


SHARDED = ContrastiveProgram(
    stages=1,
    micro_batches=4,
    chunks=3,
    round_size=4,
    sharded_weights=frozenset(range(3)),
    sharded_gradients=frozenset(range(3)),
)
TURN_FORWARD, TURN_BACK = 4 * FORWARD / 3, 4 * (FORWARD + BACKWARD) / 3


@pytest.mark.parametrize(("gather", "reduce"), [(0.5, 1.0), (5.0, 1.0), (5.0, 20.0)])
def test_shards_travel_beside_the_turn_before(gather: float, reduce: float) -> None:
    """Only the first gather of each phase and the last reduction are never hidden; the others take turns on a line."""
    costs = StageCosts(forward_s=(FORWARD / 3,) * 3, backward_s=(BACKWARD / 3,) * 3)
    shards = [ShardCosts(gather_s=(gather,) * 3, reduce_s=(reduce,) * 3)]
    plain, sharded = (simulate(SHARDED, durations_of([costs]), None, line) for line in (None, shards))
    encode = gather + 2 * max(0.0, gather - TURN_FORWARD)
    assert sharded.encode_s - plain.encode_s == pytest.approx(encode)
    least = encode + gather + reduce + 2 * max(0.0, reduce - TURN_BACK)
    assert sharded.step_s - plain.step_s >= least - 1e-9
    assert sharded.sharded_s == pytest.approx((6 * gather + 3 * reduce,))
    waits = {AWAIT_WEIGHTS: 0.0, AWAIT_GRADIENTS: 0.0}
    for span in sharded.timeline.rows[0].spans:
        if span.phase in waits:
            waits[span.phase] += span.stop_s - span.start_s
    assert sharded.step_s - plain.step_s == pytest.approx(sum(waits.values()))
    if reduce < TURN_BACK:
        assert waits == pytest.approx({AWAIT_WEIGHTS: encode + gather, AWAIT_GRADIENTS: reduce})


def test_nothing_travels_ahead_without_overlap() -> None:
    costs = StageCosts(forward_s=(FORWARD / 3,) * 3, backward_s=(BACKWARD / 3,) * 3)
    program = replace(SHARDED, gathers_ahead=False)
    shards = [ShardCosts(gather_s=(0.5,) * 3, reduce_s=(1.0,) * 3, overlap=False)]
    plain, sharded = (simulate(program, durations_of([costs]), None, line) for line in (None, shards))
    assert sharded.step_s - plain.step_s == pytest.approx(6 * 0.5 + 3 * 1.0)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"stages": 0, "micro_batches": 4}, "must be at least 1"),
        ({"stages": 4, "micro_batches": 6, "chunks": 2}, "a multiple of them"),
        ({"stages": 2, "micro_batches": 3, "keep": 4}, "keep 4 is not within 0 and the 3"),
    ],
)
def test_what_the_engine_refuses_is_refused(numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContrastiveProgram(**numbers)


# --- the command -------------------------------------------------------------------------------------------------


def test_from_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png, trace = tmp_path / "step.png", tmp_path / "step.json"
    arguments = ["--stages=3", "--micro-batches=6", "--encode-ms=10", "--keep=2", "--encode-text-ms=5"]
    assert main([*arguments, "--loss-ms=4", f"--png={png}", f"--trace={trace}"]) == 0
    out = capsys.readouterr().out
    assert "3 stages of 1 chunk, 6 micro-batches, 2 kept" in out and "= 25.00%" in out
    assert trace.stat().st_size > 0
    with Image.open(png) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(maxcolors=1 << 20) or ()}
    encode, replay, backward, idle = (0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00), (0xD5, 0x5E, 0x00), (0xF0, 0xF2, 0xF5)
    assert {encode, replay, backward, idle} <= colours


JOB = """
model: 18b
data: {shards: x}
parallel: {tensor: 2, pipeline: 12}
train: {global_batch_size: 3072, micro_batch_size: 16, precision: bf16, keep_activations: 2}
"""


def test_from_a_config_on_the_planners_hardware(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The planner adds up a step by formula; the simulation of its unit times takes as long."""
    config = tmp_path / "job.yaml"
    config.write_text(JOB)
    for options in ([], ["parallel.virtual=2"], ["parallel.tensor=4", "parallel.pipeline=6"]):
        seconds = _step_s(_printed(capsys, [str(config), *options, "--world-size=48", "--gpu=a100-40"]))
        job = load_config(config, options)
        cluster = Cluster(hardware=load_hardware("a100-40"), gpus=48, per_node=8)
        time = step_time(job.model, layout_of(job, 48), cluster)
        assert seconds == pytest.approx(time.total - time.input, rel=0.02)


@pytest.mark.parametrize("nic_gb_s", [25.0, 2.0])
@pytest.mark.parametrize(
    "options",
    [
        ["parallel.virtual=48", "parallel.pipeline=1", "parallel.shard=weights"],
        ["parallel.virtual=12", "parallel.pipeline=4", "parallel.shard=weights"],
        ["parallel.virtual=48", "parallel.pipeline=1", "parallel.shard=weights", "parallel.shard_ranks=8"],
        ["parallel.virtual=12", "parallel.pipeline=4", "parallel.shard=gradients"],
        ["parallel.virtual=12", "parallel.pipeline=2", "parallel.shard=weights", "parallel.overlap=false"],
    ],
    ids=lambda options: "-".join(option.rpartition(".")[2] for option in options),
)
def test_sharded_parts_take_as_long_as_planned(options: list[str], nic_gb_s: float) -> None:
    """Gathers and reductions are events of the step; the planner has a closed form of what they leave."""
    whole = ["parallel.tensor=1", "train.global_batch_size=18432", "train.keep_activations=0"]
    job = resolve(yaml.safe_load(JOB), [*whole, *options])
    hardware = replace(load_hardware("a100-40"), nic_gb_s=nic_gb_s)
    cluster = Cluster(hardware=hardware, gpus=48, per_node=8)
    time, simulation = step_time(job.model, layout_of(job, 48), cluster), simulate_config(job, cluster)
    assert simulation.step_s == pytest.approx(time.total - time.input, rel=0.03)
    waits = [s for row in simulation.timeline.rows for s in row.spans if s.phase in (AWAIT_WEIGHTS, AWAIT_GRADIENTS)]
    assert sum(span.stop_s - span.start_s for span in waits) > 0


PHASES = """
checkpoint: {every_steps: 10}
phases:
- {name: stills, steps: 10}
- {name: clips, steps: 10, data: {frames: 8}, train: {global_batch_size: 384}}
"""


def test_what_copies_to_the_host_exceed_is_waited_for() -> None:
    recipe = Path(__file__).parents[3] / "examples" / "18b" / "2_clip.yaml"
    cluster = Cluster(hardware=load_hardware("a100-40"), gpus=360, per_node=8)
    steps = []
    for outputs in (["train.outputs_budget_gb=60"], ["train.keep_outputs=all", "train.outputs_budget_gb=null"]):
        config = load_config(recipe, outputs)
        time, simulation = step_time(config.model, layout_of(config, 360), cluster), simulate_config(config, cluster)
        assert simulation.step_s == pytest.approx(time.total - time.input, rel=0.02)
        steps.append((time.p2p, simulation.step_s))
    (hidden, recipes), (left, all_kept) = steps
    assert hidden == 0 and left > 5 and all_kept > recipes, "186 GB take 15.5 s, the encode phase 5.8"


def test_a_phase_of_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """384 clips of 8 frames are as many images as 3,072 stills; they have fewer captions."""
    config = tmp_path / "job.yaml"
    config.write_text(JOB + PHASES)
    first, named, clips = (
        _printed(capsys, [str(config), "--world-size=48", "--gpu=a100-40", *phase])
        for phase in ([], ["--phase=stills"], ["--phase=clips"])
    )
    assert first == named and named.startswith("phase stills of stills, clips\n")
    assert "96 micro-batches" in named and "96 micro-batches" in clips
    assert 0.9 < _step_s(clips) / _step_s(named) < 1


def _printed(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def _step_s(printed: str) -> float:
    return float(printed.split("step ", 1)[1].split()[0])


def test_masked_feature_distillation_on_the_planners_hardware(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """1F1B takes (m + (P - 1) / v) (f + b) behind the teacher, whatever the layout."""
    config = tmp_path / "job.yaml"
    config.write_text(JOB)
    for options in ([], ["parallel.virtual=4"], ["parallel.pipeline=1", "parallel.tensor=8"]):
        printed = _printed(capsys, [str(config), *MIM, *options, "--world-size=48", "--gpu=a100-40"])
        job = load_config(config, [*MIM, *options])
        layout, cluster = layout_of(job, 48), Cluster(hardware=load_hardware("a100-40"), gpus=48, per_node=8)
        costs = mim_costs(job, layout, cluster)
        alone = costs.teacher_s + 2 * costs.exchange_s + costs.state_s + costs.optimizer_s
        unit = max(costs.units, key=lambda unit: unit.f + unit.b)
        units = layout.micro_batches + (layout.pipeline - 1) / layout.virtual
        assert _step_s(printed) == pytest.approx(alone + units * (unit.f + unit.b), rel=0.03)
        stages, chunks = layout.pipeline, layout.virtual
        flying = stages if chunks == 1 else 2 * (stages - 1) + (chunks - 1) * stages + 1
        assert f"at most {flying} units in flight" in printed


BUDGET = ("train.keep_activations=0", "train.activation_budget_gb=8")
MIM = ("objective=mim", "mim.teacher=t.pt", "mim.teacher_model=18b", "train.keep_activations=0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--stages is missing"),
        (["--stages=4", "--micro-batches=6", "--encode-ms=1", "--chunks=2"], "a multiple of them"),
        (["missing.yaml", "--world-size=2", "--gpu=h100"], "missing.yaml does not exist"),
        (["missing.yaml"], "needs --world-size"),
        (["@job", "--world-size=50", "--gpu=h100"], "50 ranks cannot be cut into replicas"),
        (["@job", "--world-size=48", "--gpu=z80"], "--gpu z80 is neither a file nor a profile"),
        (["@job", "--world-size=48", "--gpu=h100", "--phase=video"], "phase 'video' is not one of the config's"),
        (["@job", "--world-size=48", "--gpu=h100", *BUDGET], "train.activation_budget_gb=8.0 becomes a number"),
        (["--objective=mim", "--stages=2", "--micro-batches=4", "--encode-ms=1", "--keep=1"], "--keep is no part of"),
        (["--stages=2", "--micro-batches=4", "--encode-ms=1", "--teacher-ms=1"], "--teacher-ms is no part of"),
    ],
)
def test_mistakes_are_one_clear_line(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    assert main([str(tmp_path / "job.yaml") if argument == "@job" else argument for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("micro_batches", [1, 8, 64, 512, 4096])
def test_the_picture_has_the_colours_of_the_step_at_any_number_of_micro_batches(
    micro_batches: int, tmp_path: Path
) -> None:
    """One stage: a fifth encode, a fifth replay, three fifths backward, as shares of the row's pixels."""
    numbers = ["--stages", "1", "--micro-batches", str(micro_batches), "--encode-ms", "1", "--backward-ms", "3"]
    assert main([*numbers, "--png", str(tmp_path / "step.png")]) == 0
    pixels = np.asarray(Image.open(tmp_path / "step.png").convert("RGB"), dtype=float) / 255
    row = pixels[192, 266:1818]  # the time axis, below the numbers in the boxes
    drawn = row[np.abs(row - 1).sum(axis=1) > 0.3]  # without the white edges between boxes
    assert len(drawn) > 0.95 * len(row)
    shares = {"encode": 0.2, "replay": 0.2, "backward": 0.6}
    expected = sum(share * np.array(to_rgb(COLOURS[phase])) for phase, share in shares.items())
    assert np.abs(drawn.mean(axis=0) - expected).max() < 0.03
    assert np.abs(drawn - to_rgb(IDLE)).sum(axis=1).min() > 0.2, "nothing of a busy stage looks idle"
