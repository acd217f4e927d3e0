"""What one step of a job is on one of its ranks: memory, FLOPs and traffic, without a GPU (docs/dryrun.md).

Runs the engine's own model, schedule, loss and optimizer at full size on tensors without values, in seconds. A job
that would not start, or not fit, ends with one line that says so and exit status 1.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config.read import Config, ConfigError, check_layout, check_vocabulary, read_job
from engine.config.sections.freeze import frozen_of
from engine.config.stages import stage_layers
from engine.objectives.registry import objective_of
from engine.resilience.exit import leave
from tools.cli import amount, answer, check_file, command_parser, complain, ranks
from tools.cost.hardware import load_hardware, profile_names
from tools.dryrun.countable import check_countable

if TYPE_CHECKING:
    from tools.dryrun.rank import RankReport

_EXAMPLES = (
    "python -m tools.dryrun examples/18b/2_clip.yaml --world-size 360 --all-stages --gpu a100-40",
    "python -m tools.dryrun examples/18b/2_3_4_phases.yaml --world-size 360 --phase video --json video.json",
)
_LESS = {
    "contrastive": "share weights (parallel.shard), or lower train.micro_batch_size, train.keep_activations, "
    "train.keep_outputs or train.text_micro_batch_size",
    "mim": "lower train.micro_batch_size or parallel.virtual, or set train.recompute=full",
}
"""Objective -> what else takes less memory."""


def main(arguments: list[str]) -> int:
    """Run the command; its exit status."""
    options = _parser().parse_intermixed_args(arguments)
    return answer(lambda: _dry_run(options))


def _dry_run(options: argparse.Namespace) -> int:
    phase = read_job(options.config, options.overrides).phase(options.phase)
    config = phase.config
    data = check_layout(config, options.world_size)
    check_vocabulary(config)
    check_countable(config)
    ranks = _ranks(config, data, options)
    limit_gb = load_hardware(options.gpu).usable_bytes / 1e9 if options.gpu else options.gpu_memory_gb
    if options.json:
        check_file(options.json)
    parallel = config.parallel
    where = f"{options.config}, phase {phase.name}" if phase.name else options.config
    print(
        f"{where}: TP {parallel.tensor} × PP {parallel.pipeline} × DP {data} = {options.world_size} ranks, "
        f"global batch {config.train.global_batch_size:,}, micro-batch {config.train.micro_batch_size}"
    )
    return _check_memory(_run(config, ranks, options), limit_gb)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("dryrun", __doc__, _EXAMPLES)
    parser.add_argument("config", metavar="CONFIG.yaml", help="the YAML of engine.train")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="as for engine.train")
    parser.add_argument("--world-size", type=ranks, required=True, metavar="N", help="ranks of the job")
    parser.add_argument("--phase", default="", metavar="NAME", help="of a config with phases; default: the first")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--rank", type=int, default=0, metavar="R", help="rank to run; 0 is on the first stage")
    which.add_argument("--all-stages", action="store_true", help="one rank of each stage that differs from the others")
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--gpu-memory-gb", type=amount, metavar="GB", help="refuse a job whose peak is above this")
    limit.add_argument(
        "--gpu",
        metavar="PROFILE",
        help=f"the same with what a GPU leaves to tensors: {', '.join(profile_names())}, or a YAML file",
    )
    parser.add_argument(
        "--every-micro-batch", action="store_true", help="run them all instead of repeating those that are alike"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers, too")
    return parser


def _ranks(config: Config, data: int, options: argparse.Namespace) -> dict[int, list[int]]:
    """Rank to run -> stages that it stands for, where several are wanted."""
    if options.all_stages:
        return {config.parallel.tensor * data * alike[0]: alike for alike in _stages_alike(config, data)}
    if not 0 <= options.rank < options.world_size:
        raise ConfigError(f"--rank {options.rank} is not one of the {options.world_size} ranks of --world-size")
    return {options.rank: []}


def _stages_alike(config: Config, data: int) -> list[list[int]]:
    """Stages in groups that do the same: as many blocks, both or none of the tower's ends, as many samples dealt.

    1F1B holds fewer micro-batches the later the stage: the first of a group has the highest peak.
    """
    parallel, replica = config.parallel, config.parallel.tensor * config.parallel.pipeline
    blocks = stage_layers(config.model.vision.depth, parallel.pipeline * parallel.virtual, parallel.layers)
    rows, longer = divmod(config.train.global_batch_size // data, replica)
    frozen, groups = frozen_of(config), dict[tuple[object, ...], list[int]]()
    first = frozen.first_chunk(blocks)
    for stage in range(parallel.pipeline):
        ends = stage == 0, stage == parallel.pipeline - 1
        chunks = list(enumerate(blocks))[stage :: parallel.pipeline]
        lengths = tuple(
            (len(chunk), number > first, number == first, frozen.vision_blocks_below(chunk)) for number, chunk in chunks
        )
        groups.setdefault((lengths, ends, rows + (stage * parallel.tensor < longer)), []).append(stage)
    return list(groups.values())


def _run(config: Config, ranks: dict[int, list[int]], options: argparse.Namespace) -> "RankReport":
    """Run and show the ranks; the one that needs most memory."""
    # torch and megatron-core take seconds to import: after the checks, so that a mistake answers at once.
    from tools.dryrun.rank import dry_run
    from tools.dryrun.report import to_dict, to_text

    reports = []
    for rank, stages in ranks.items():
        reports.append(dry_run(config, options.world_size, rank, every_micro_batch=options.every_micro_batch))
        if len(stages) > 1:
            but = " (later ones with fewer micro-batches in flight)" if objective_of(config).distils else ""
            print(f"\nstages {stages[0]} to {stages[-1]} ({len(stages)} of them) do the same{but}:", end="")
        print("\n" + to_text(reports[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps([to_dict(report) for report in reports], indent=1) + "\n")
    worst = max(reports, key=lambda report: report.peak.total)
    if len(reports) > 1:
        print(f"\nhighest peak: rank {worst.rank} (stage {worst.stage}), {worst.peak.total / 1e9:.2f} GB")
    return worst


def _check_memory(worst: "RankReport", limit_gb: float | None) -> int:
    peak_gb = worst.peak.total / 1e9
    if limit_gb is None or peak_gb <= limit_gb:
        return 0
    largest = worst.peak.parts.most_common(1)[0][0]
    return complain(
        f"rank {worst.rank} needs {peak_gb:.2f} GB at its peak ({worst.peak_phase}; most of it {largest}), more than "
        f"the {limit_gb:g} GB that it may take: raise parallel.pipeline or parallel.tensor, {_LESS[worst.objective]}"
    )


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
