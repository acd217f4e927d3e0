"""Which numbers of nodes a config can go on with when some are lost, and what it changes there (parallel.elastic).

The global batch stays, and with it the curve; micro-batch and rounds may change. Nodes that no layout uses stand by.
Start torchrun with a range (--nnodes 40:45 --max-restarts N), and it goes on with those that are left.
"""

import argparse
import sys
from collections.abc import Sequence

from engine.config.errors import ConfigError
from engine.config.read import read_job
from engine.resilience.elastic import Fit, most_ranks
from tools.cli import CommandError, answer, command_parser, positive

_EXAMPLES = (
    "python -m tools.elastic examples/18b/2_clip.yaml --nodes 36:45",
    "python -m tools.elastic examples/quickstart/train.yaml --nodes 1:4 --nodes-of 1 parallel.tensor=1",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 with one line where no number of nodes will do."""
    parser = command_parser("elastic", __doc__, _EXAMPLES)
    parser.add_argument("config", help="config of the job")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over those of the file")
    parser.add_argument("--nodes", type=_range, required=True, metavar="MIN:MAX", help="nodes, as torchrun has them")
    parser.add_argument("--nodes-of", type=positive, default=8, metavar="N", help="ranks of a node")
    arguments = parser.parse_intermixed_args(argv)
    return answer(lambda: _print(arguments))


def _range(text: str) -> range:
    low, _, high = text.partition(":")
    if not (low.isdigit() and (high or low).isdigit() and 1 <= int(low) <= int(high or low)):
        raise argparse.ArgumentTypeError(f"{text!r} is not MIN:MAX, such as 40:45")
    return range(int(low), int(high or low) + 1)


def _print(arguments: argparse.Namespace) -> int:
    job = read_job(arguments.config, arguments.overrides)
    configs = [phase.config for phase in job.phases]
    fits: dict[int, Fit | str] = {}
    for nodes in reversed(arguments.nodes):
        try:
            fits[nodes] = most_ranks(configs, nodes * arguments.nodes_of)
        except ConfigError as error:
            fits[nodes] = str(error)
    if all(isinstance(fit, str) for fit in fits.values()):
        raise CommandError(str(next(iter(fits.values()))))
    print("nodes  ranks  work  stand by  with")
    for nodes, fit in fits.items():
        came = nodes * arguments.nodes_of
        if isinstance(fit, str):
            print(f"{nodes:5} {came:6}     -         -  {fit}")
            continue
        settings = " ".join(f"{key}={value}" for key, value in fit.changed.items()) or "the settings as they are"
        print(f"{nodes:5} {came:6} {fit.ranks:5} {came - fit.ranks:9}  {settings}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
