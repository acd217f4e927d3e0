"""Throughput of a training configuration: step time, samples/s, MFU, phases and memory (docs/benchmarking.md).

One configuration is measured on the ranks that torchrun starts, or on one. Further commands, each with its --help:
  python -m tools.benchmark sweep CONFIG.yaml --ranks N,N,…   ranks × layouts × micro-batches on this host
  python -m tools.benchmark compare A.json B.json             two results beside each other
  python -m tools.benchmark table RESULT.json …               many results as one table
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from engine.resilience.exit import leave
from engine.resilience.judge import UnhealthyStep
from tools.benchmark.charts import save_result_picture, save_sweep_picture
from tools.benchmark.options import GEMM_SIDE, Options, benchmark_config
from tools.benchmark.result import Result, load_result, summary
from tools.benchmark.sweep import Outcome, Sweep, points_of
from tools.benchmark.tables import compare, results_table
from tools.cli import CommandError, amount, answer, check_file, check_folder, command_parser, complain, positive

_EXAMPLES = (
    "python -m tools.benchmark examples/quickstart/train.yaml parallel.tensor=1 parallel.pipeline=1",
    "torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node 8 -m tools.benchmark examples/b16.yaml --steps 20",
)
_SWEEP_EXAMPLES = (
    "python -m tools.benchmark sweep examples/quickstart/train.yaml --ranks 1,2,4",
    "python -m tools.benchmark sweep train.yaml --ranks 8 --layouts 1x8,2x4 --micro-batches 32,64",
)
_COMPARE_EXAMPLES = (
    "python -m tools.benchmark compare runs/before/result.json runs/after/result.json",
    "python -m tools.benchmark compare a100/result.json h100/result.json --anyway",
)
_TABLE_EXAMPLES = (
    "python -m tools.benchmark table runs/*/result.json",
    "python -m tools.benchmark table 8/result.json 16/result.json --png scaling.png",
)


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="the YAML of engine.train")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted settings above those of the config")
    parser.add_argument("--steps", type=positive, default=Options.steps, help="timed steps")
    parser.add_argument("--warmup", type=positive, default=Options.warmup, help="steps before them")
    parser.add_argument("--data", choices=("synthetic", "real"), default="synthetic", help="real: the config's shards")
    parser.add_argument("--phase", default="", metavar="NAME", help="of a config with phases; default: the first")
    parser.add_argument("--out", type=Path, default=Options.out, metavar="FOLDER", help="where results go")
    parser.add_argument(
        "--gemm-side", type=positive, default=GEMM_SIDE, metavar="N", help="side of the product that measures a peak"
    )


def _options(arguments: argparse.Namespace) -> Options:
    return Options(
        steps=arguments.steps,
        warmup=arguments.warmup,
        data=arguments.data,
        out=arguments.out,
        phase=arguments.phase,
        gemm_side=arguments.gemm_side,
    )


def _numbers(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def _layouts(text: str) -> list[tuple[int, int]] | None:
    """all, or TPxPP,TPxPP,…"""
    if text == "all":
        return None
    pairs = [tuple(map(positive, part.split("x"))) for part in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text} is not all, or TPxPP like 2x1,1x2")
    return [(pair[0], pair[1]) for pair in pairs]


# --- on every rank -----------------------------------------------------------------------------------------------


def _run(argv: list[str]) -> int:
    parser = command_parser("benchmark", __doc__, _EXAMPLES)
    _add_measuring(parser)
    arguments = parser.parse_intermixed_args(argv)
    options = _options(arguments)
    check_folder(options.out)
    config = benchmark_config(arguments.config, arguments.overrides, options, int(os.environ.get("WORLD_SIZE", "1")))
    # torch and megatron-core take seconds to import: a typing mistake answers before that.
    from engine.parallel.launch import job
    from tools.benchmark.measure import measure

    with job(config.parallel) as (mesh, device):
        result = measure(config, mesh, device, options)
        if mesh.world.rank == 0:
            _keep(result, options.out)
    return 0


def _keep(result: Result, out: Path) -> None:
    print(summary(result))
    result.save(out / "result.json")
    save_result_picture(result, out / "result.png")
    print(f"{out / 'result.json'}\n{out / 'result.png'}\n{out / 'timeline'} (python -m tools.timeline {out})")


# --- started by hand ---------------------------------------------------------------------------------------------


def _sweep(argv: list[str]) -> int:
    parser = command_parser(
        "benchmark sweep",
        "Measure ranks × layouts × micro-batches on this host, each in fresh processes.",
        _SWEEP_EXAMPLES,
    )
    _add_measuring(parser)
    parser.add_argument("--ranks", type=_numbers, required=True, metavar="N,N,…", help="numbers of ranks")
    parser.add_argument("--layouts", type=_layouts, default=None, metavar="all|TPxPP,…", help="default: all")
    parser.add_argument("--micro-batches", type=_numbers, metavar="M,M,…", help="default: the config's")
    parser.add_argument(
        "--scaling", choices=("strong", "weak"), default="strong", help="global batch fixed, or by ranks"
    )
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="CPU threads of a rank; default: the cores shared out"
    )
    parser.add_argument("--timeout-s", type=amount, default=1800.0, metavar="S", help="longest that a point may take")
    arguments = parser.parse_intermixed_args(argv)
    options = _options(arguments)
    sweep = Sweep(
        config=arguments.config,
        overrides=arguments.overrides,
        options=options,
        threads=arguments.threads,
        timeout_s=arguments.timeout_s,
    )
    train = sweep.train()
    check_folder(options.out)
    points = points_of(
        ranks=arguments.ranks,
        layouts=arguments.layouts,
        micro_batches=arguments.micro_batches or [train.micro_batch_size],
        global_batch=train.global_batch_size,
        weak=arguments.scaling == "weak",
    )
    outcomes = []
    for outcome in sweep.run(points):
        outcomes.append(outcome)
        print(f"{len(outcomes)}/{len(points)} {outcome.point}: {_in_words(outcome)}", flush=True)
    return _show_sweep(outcomes, options.out, every_layout=arguments.layouts is None)


def _in_words(outcome: Outcome) -> str:
    return f"{outcome.result.samples_per_s:,.4g} samples/s" if outcome.result else f"failed: {outcome.failure}"


def _show_sweep(outcomes: list[Outcome], out: Path, *, every_layout: bool) -> int:
    """every_layout: a layout that the config does not admit is an answer, not a failure."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "sweep.json"
    path.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n", encoding="utf-8")
    results = [outcome.result for outcome in outcomes if outcome.result is not None]
    if not results:
        raise CommandError(f"no point of the sweep gave a result; {path} has the reasons")
    print(results_table(results))
    save_sweep_picture(results, out / "sweep.png")
    print(f"{path}\n{out / 'sweep.png'}")
    failed = [outcome for outcome in outcomes if outcome.result is None and not (every_layout and outcome.refused)]
    if failed:
        return complain(f"{len(failed)} of {len(outcomes)} points gave no result; {path} has the reasons")
    return 0


def _compare(argv: list[str]) -> int:
    parser = command_parser("benchmark compare", "B relative to A.", _COMPARE_EXAMPLES)
    parser.add_argument("a", type=Path, metavar="A.json", help="a result.json, the base")
    parser.add_argument("b", type=Path, metavar="B.json", help="what is compared with it")
    parser.add_argument("--anyway", action="store_true", help="also where a sample of one is not one of the other")
    arguments = parser.parse_args(argv)
    print(compare(load_result(arguments.a), load_result(arguments.b), anyway=arguments.anyway))
    return 0


def _table(argv: list[str]) -> int:
    parser = command_parser(
        "benchmark table",
        "Results of separate jobs, of several nodes for example, as the table of a sweep.",
        _TABLE_EXAMPLES,
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json", help="result.json of a measurement")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw them, too")
    arguments = parser.parse_args(argv)
    if arguments.png:
        check_file(arguments.png)
    results = [load_result(path) for path in arguments.results]
    print(results_table(results))
    if arguments.png:
        save_sweep_picture(results, arguments.png)
    return 0


_COMMANDS: dict[str, Callable[[list[str]], int]] = {"sweep": _sweep, "compare": _compare, "table": _table}


def main(argv: list[str]) -> int:
    """The exit status: 1, after one line on standard error, for what cannot be measured."""
    command = _COMMANDS.get(argv[0]) if argv else None
    return answer(lambda: command(argv[1:]) if command else _run(argv), UnhealthyStep)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
