"""Simulate a step: when each stage computes and waits, how long the step takes, its bubble, its picture.

Durations come from the options, or from a config on the planner's hardware.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engine.config.read import read_job
from engine.objectives.contrastive.program import ContrastiveProgram
from engine.objectives.mim.program import MimProgram
from engine.objectives.registry import OBJECTIVES
from engine.pipeline.program import Program
from tools.cli import CommandError, amount, answer, check_file, command_parser, positive, ranks, whole
from tools.cost.cluster import Cluster
from tools.cost.hardware import load_hardware, profile_names
from tools.plan.given import left_out
from tools.simulate.events import CollectiveCosts, Simulation, StageCosts, bubble_bound, durations_of, simulate
from tools.simulate.stage_costs import simulate_config
from tools.simulate.wires import Wire
from tools.timeline.__main__ import table
from tools.timeline.picture import save_picture
from tools.timeline.spans import AWAIT_GRADIENTS, AWAIT_WEIGHTS, StepTimeline
from tools.timeline.trace import save_trace

_EXAMPLES = (
    "python -m tools.simulate examples/18b/2_clip.yaml --world-size 360 --gpu a100-40 --png step.png",
    "python -m tools.simulate --stages 12 --micro-batches 450 --encode-ms 20 --chunks 2 --keep 30",
    "python -m tools.simulate --objective mim --stages 12 --micro-batches 36 --encode-ms 20 --teacher-ms 90",
)
_COLLECTIVES = ("exchange", "loss", "reduce", "optimizer", "gather_weights")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("simulate", __doc__, _EXAMPLES)
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG.yaml", help="a training config")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="its overrides")
    of_config = parser.add_argument_group("from a config")
    of_config.add_argument("--world-size", type=ranks, default=0, metavar="N", help="ranks of the job, needed")
    of_config.add_argument("--gpu", default="", metavar="PROFILE", help=f"{', '.join(profile_names())}, or a YAML file")
    of_config.add_argument("--nodes-of", type=ranks, default=8, metavar="N", help="GPUs of a node (%(default)s)")
    of_config.add_argument("--phase", default="", metavar="NAME", help="of a config with phases; default: the first")
    numbers = parser.add_argument_group("from numbers")
    numbers.add_argument("--objective", choices=list(OBJECTIVES), default="contrastive", help="default: contrastive")
    numbers.add_argument("--stages", type=ranks, metavar="P", help="pipeline stages, needed")
    numbers.add_argument("--micro-batches", type=positive, metavar="M", help="of a replica and step, needed")
    numbers.add_argument("--chunks", type=positive, default=1, metavar="V", help="virtual stages a rank holds")
    numbers.add_argument("--keep", type=whole, default=0, metavar="K", help="micro-batches that are not replayed")
    numbers.add_argument("--encode-ms", type=amount, metavar="MS", help="forward through all chunks of a stage, needed")
    numbers.add_argument("--replay-ms", type=amount, metavar="MS", help="default: as encode")
    numbers.add_argument("--backward-ms", type=amount, metavar="MS", help="default: twice encode")
    numbers.add_argument("--encode-text-ms", type=amount, default=0.0, metavar="MS", help="all captions of a rank")
    numbers.add_argument("--backward-text-ms", type=amount, default=0.0, metavar="MS", help="the same, their backward")
    numbers.add_argument("--teacher-ms", type=amount, default=0.0, metavar="MS", help="a rank's teaching (mim)")
    numbers.add_argument(
        "--message-mb", type=amount, default=0.0, metavar="MB", help="activations between stages, 10^6 bytes"
    )
    numbers.add_argument(
        "--bandwidth-gb-s", type=float, default=math.inf, metavar="GB", help="between stages; default: no limit"
    )
    numbers.add_argument("--latency-us", type=amount, default=0.0, metavar="US", help="of a message")
    for phase in _COLLECTIVES:
        numbers.add_argument(
            f"--{phase.replace('_', '-')}-ms", type=amount, default=0.0, metavar="MS", help="once a step, not hidden"
        )
    both = parser.add_argument_group("both")
    both.add_argument("--png", type=Path, metavar="FILE", help="draw the timeline")
    both.add_argument("--trace", type=Path, metavar="FILE.json", help="write it for Perfetto")
    both.add_argument("--title", default="simulated step", help="of the picture")
    return parser.parse_intermixed_args(argv)


def _from_numbers(arguments: argparse.Namespace) -> Simulation:
    missing = [name for name in ("stages", "micro_batches", "encode_ms") if getattr(arguments, name) is None]
    if missing:
        raise CommandError(f"give a CONFIG.yaml, or numbers: --{missing[0].replace('_', '-')} is missing")
    program = _program(arguments)
    wire = Wire(latency_s=arguments.latency_us / 1e6, transfer_s=arguments.message_mb / 1e3 / arguments.bandwidth_gb_s)
    encode_ms, replay_ms = arguments.encode_ms, arguments.replay_ms
    backward_ms = 2 * encode_ms if arguments.backward_ms is None else arguments.backward_ms
    costs = StageCosts(
        forward_s=_chunks(encode_ms, program),
        replay_s=None if replay_ms is None else _chunks(replay_ms, program),
        backward_s=_chunks(backward_ms, program),
        encode_text_s=arguments.encode_text_ms / 1e3,
        backward_text_s=arguments.backward_text_ms / 1e3,
        teacher_s=arguments.teacher_ms / 1e3,
    )
    together = {f"{phase}_s": getattr(arguments, f"{phase}_ms") / 1e3 for phase in _COLLECTIVES}
    return simulate(program, durations_of([costs] * program.stages, CollectiveCosts(**together)), wire)


def _program(arguments: argparse.Namespace) -> Program:
    sizes = {"stages": arguments.stages, "micro_batches": arguments.micro_batches, "chunks": arguments.chunks}
    if not OBJECTIVES[arguments.objective].distils:
        _refuse(arguments, ("teacher_ms",))
        return ContrastiveProgram(**sizes, keep=arguments.keep)
    _refuse(arguments, ("keep", "replay_ms", "encode_text_ms", "backward_text_ms", "loss_ms"))
    return MimProgram(**sizes)


def _refuse(arguments: argparse.Namespace, names: Sequence[str]) -> None:
    for name in names:
        if getattr(arguments, name):
            raise CommandError(f"--{name.replace('_', '-')} is no part of a step of --objective {arguments.objective}")


def _chunks(stage_ms: float, program: Program) -> tuple[float, ...]:
    return (stage_ms / 1e3 / program.chunks,) * program.chunks


def _from_config(arguments: argparse.Namespace) -> Simulation:
    if arguments.world_size < 1 or not arguments.gpu:
        raise CommandError("a config needs --world-size and --gpu")
    job = read_job(arguments.config, arguments.overrides)
    phase = job.phase(arguments.phase)
    if phase.name:
        print(f"phase {phase.name} of {', '.join(each.name for each in job.phases)}")
    hardware = load_hardware(arguments.gpu)
    cluster = Cluster(hardware=hardware, gpus=arguments.world_size, per_node=arguments.nodes_of)
    for line in left_out(phase.config):
        print(line, file=sys.stderr)
    return simulate_config(phase.config, cluster)


def report(simulation: Simulation) -> str:
    """The step in words and numbers."""
    program = simulation.program
    backprop = f"{simulation.backprop_s:10.4f} s   bubble {simulation.backprop_bubble:.2%}"
    if isinstance(program, ContrastiveProgram):
        keep = program.keep
        held = f"{keep if isinstance(keep, int) else f'{min(keep)} to {max(keep)}'} kept"
        encode = f"encode   {simulation.encode_s:10.4f} s   bubble {simulation.encode_bubble:.2%}"
        parts, without = [encode, f"backprop {backprop}"], "captions"
    else:
        held = f"at most {program.in_flight(0)} units in flight"
        parts, without = [f"1F1B     {backprop}"], "teacher"
    return "\n".join(
        [
            f"{program.stages} stages of {program.chunks} chunk{'s' if program.chunks > 1 else ''}, "
            f"{program.micro_batches} micro-batches, {held}",
            f"step     {simulation.step_s:10.4f} s   idle {simulation.idle:.2%}",
            *parts,
            *_sharded(simulation),
            f"(P - 1) / (v m + P - 1) = {bubble_bound(program):.2%}, "
            f"the bubble of a phase of equal units without {without}",
            table(simulation.timeline),
        ]
    )


def _sharded(simulation: Simulation) -> list[str]:
    """What the transfers of sharded parts take on a stage, and how much of it that stage waits for; the worst stage."""
    if not simulation.sharded_s:
        return []
    waited = [
        sum(span.stop_s - span.start_s for span in row.spans if span.phase in (AWAIT_WEIGHTS, AWAIT_GRADIENTS))
        for row in simulation.timeline.rows
    ]
    moved, worst = max(simulation.sharded_s), max(waited)
    return [f"shards   {moved:10.4f} s   gathered and reduced beside the work of a stage, {worst:.4f} s not hidden"]


def drawable(timeline: StepTimeline) -> StepTimeline:
    """Timeline without what took no time."""
    rows = [replace(row, spans=[s for s in row.spans if s.stop_s > s.start_s]) for row in timeline.rows]
    return replace(timeline, rows=rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the simulated step; the exit code is 1, after one line on standard error, if that cannot be done."""
    arguments = _arguments(argv)
    return answer(lambda: _simulate(arguments), ValueError)


def _simulate(arguments: argparse.Namespace) -> int:
    files = [file for file in (arguments.png, arguments.trace) if file is not None]
    for file in files:
        check_file(file)
    simulation = _from_config(arguments) if arguments.config else _from_numbers(arguments)
    timeline = drawable(simulation.timeline)
    if arguments.png:
        save_picture(timeline, arguments.title, arguments.png)
    if arguments.trace:
        save_trace(timeline, arguments.trace)
    print(report(simulation))
    for file in files:
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
