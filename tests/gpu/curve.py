"""Losses of a few training steps on whatever device this process finds, for comparing a GPU with the CPU.

    [torchrun --nproc-per-node N] python -m tests.gpu.curve RESULT.json [dotted.key=value …]

Rank 0 writes them. The steps are those of tests/engine/test_step_options.py.
"""

import json
import sys
from pathlib import Path

from engine.parallel.launch import job
from engine.resilience.exit import leave
from tests.engine import test_step_options as step_options


def main(result: str, options: list[str]) -> int:
    """Run the job; the exit status."""
    config = step_options._config("18b", *options)
    with job(config.parallel) as (mesh, device):
        losses = step_options._curve(config, mesh, device)["losses"]
        if mesh.world.rank == 0:
            Path(result).write_text(json.dumps(losses))
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1], sys.argv[2:]))
