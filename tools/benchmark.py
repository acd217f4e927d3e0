"""Throughput of a training configuration: step time, samples/s, MFU, phases and memory (docs/benchmarking.md).

torchrun --nproc-per-node N -m tools.benchmark CONFIG.yaml [dotted.key=value …] [--steps 10] [--data real] …
python -m tools.benchmark sweep CONFIG.yaml [dotted.key=value …] --ranks 1,2,4 [--layouts all] [--scaling weak] …
python -m tools.benchmark compare A.json B.json
python -m tools.benchmark table RESULT.json …
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from data.errors import DataError
from engine.checkpoint.errors import CheckpointError
from engine.config import ConfigError
from engine.exit import leave
from engine.health import UnhealthyStep
from models.config import ModelConfigError
from tools.benchmarking.charts import save_result_picture, save_sweep_picture
from tools.benchmarking.options import GEMM_SIDE, Options, benchmark_config
from tools.benchmarking.result import Result, load_result, summary
from tools.benchmarking.sweep import Outcome, Sweep, points_of
from tools.benchmarking.tables import compare, results_table


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"python -m tools.benchmark{command}", description=description)


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted settings above those of the config")
    parser.add_argument("--steps", type=_positive, default=Options.steps, help="timed steps (%(default)s)")
    parser.add_argument("--warmup", type=_positive, default=Options.warmup, help="steps before them (%(default)s)")
    parser.add_argument("--data", choices=("synthetic", "real"), default="synthetic", help="real: the config's shards")
    parser.add_argument("--phase", default="", metavar="NAME", help="of a config with phases; default: the first")
    parser.add_argument("--out", type=Path, default=Options.out, metavar="FOLDER", help="results (%(default)s)")
    parser.add_argument("--gemm-side", type=_positive, default=GEMM_SIDE, help="of the product that measures a peak")


def _options(arguments: argparse.Namespace) -> Options:
    return Options(
        steps=arguments.steps,
        warmup=arguments.warmup,
        data=arguments.data,
        out=arguments.out,
        phase=arguments.phase,
        gemm_side=arguments.gemm_side,
    )


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def _numbers(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _layouts(text: str) -> list[tuple[int, int]] | None:
    """all, or TPxPP,TPxPP,…"""
    if text == "all":
        return None
    pairs = [tuple(map(_positive, part.split("x"))) for part in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text} is not all, or TPxPP like 2x1,1x2")
    return [(pair[0], pair[1]) for pair in pairs]


# --- on every rank -----------------------------------------------------------------------------------------------


def _run(argv: list[str]) -> int:
    parser = _parser("", "Measure one configuration; start it with torchrun for more than one rank.")
    _add_measuring(parser)
    arguments = parser.parse_intermixed_args(argv)
    options = _options(arguments)
    config = benchmark_config(arguments.config, arguments.overrides, options, int(os.environ.get("WORLD_SIZE", "1")))
    # torch and megatron-core take seconds to import: a typing mistake answers before that.
    from engine.launch import job
    from tools.benchmarking.measure import measure

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
    parser = _parser(" sweep", "Measure ranks × layouts × micro-batches on this host, each in fresh processes.")
    _add_measuring(parser)
    parser.add_argument("--ranks", type=_numbers, required=True, metavar="N,N,…")
    parser.add_argument("--layouts", type=_layouts, default=None, metavar="all|TPxPP,…", help="default: all")
    parser.add_argument("--micro-batches", type=_numbers, metavar="M,M,…", help="default: the config's")
    parser.add_argument(
        "--scaling", choices=("strong", "weak"), default="strong", help="global batch fixed, or by ranks"
    )
    parser.add_argument("--threads", type=_positive, help="CPU threads of a rank; default: the cores shared out")
    parser.add_argument("--timeout-s", type=float, default=1800.0, help="of a point (%(default)s)")
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
    return _show_sweep(outcomes, options.out)


def _in_words(outcome: Outcome) -> str:
    return f"{outcome.result.samples_per_s:,.4g} samples/s" if outcome.result else f"failed: {outcome.failure}"


def _show_sweep(outcomes: list[Outcome], out: Path) -> int:
    out.mkdir(parents=True, exist_ok=True)
    path = out / "sweep.json"
    path.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n", encoding="utf-8")
    results = [outcome.result for outcome in outcomes if outcome.result is not None]
    if not results:
        raise ValueError(f"no point of the sweep gave a result; {path} has the reasons")
    print(results_table(results))
    save_sweep_picture(results, out / "sweep.png")
    print(f"{path}\n{out / 'sweep.png'}")
    return 0


def _compare(argv: list[str]) -> int:
    parser = _parser(" compare", "B relative to A.")
    parser.add_argument("a", type=Path, metavar="A.json")
    parser.add_argument("b", type=Path, metavar="B.json")
    parser.add_argument("--anyway", action="store_true", help="also where a sample of one is not one of the other")
    arguments = parser.parse_args(argv)
    print(compare(load_result(arguments.a), load_result(arguments.b), anyway=arguments.anyway))
    return 0


def _table(argv: list[str]) -> int:
    parser = _parser(" table", "Results of separate jobs, of several nodes for example, as the table of a sweep.")
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw them, too")
    arguments = parser.parse_args(argv)
    results = [load_result(path) for path in arguments.results]
    print(results_table(results))
    if arguments.png:
        save_sweep_picture(results, arguments.png)
    return 0


_REFUSED = (ConfigError, ModelConfigError, DataError, CheckpointError, UnhealthyStep, OSError, ValueError)
_COMMANDS: dict[str, Callable[[list[str]], int]] = {"sweep": _sweep, "compare": _compare, "table": _table}


def main(argv: list[str]) -> int:
    """The exit status: 1, after one line on standard error, for what cannot be measured."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 2
    try:
        return _COMMANDS[argv[0]](argv[1:]) if argv[0] in _COMMANDS else _run(argv)
    except _REFUSED as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
