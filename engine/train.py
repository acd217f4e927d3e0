"""Entry point of torchrun: `torchrun --nproc-per-node N -m engine.train CONFIG.yaml [dotted.key=value …]`.

A mistake in the config, the layout, the shards or a checkpoint ends with one line that says what to do.
"""

import os
import sys
from pathlib import Path

import yaml

from data.errors import DataError
from engine.config import Config, ConfigError, check_layout, check_vocabulary, load_config, to_dict
from engine.exit import leave


def main(arguments: list[str]) -> int:
    """Run a training job on this rank; the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 2
    try:
        config = load_config(arguments[0], arguments[1:])
        check_layout(config, int(os.environ.get("WORLD_SIZE", "1")))
        check_vocabulary(config)
    except (ConfigError, DataError) as error:
        return _fail(error)
    return _train(config)


def _train(config: Config) -> int:
    # Importing torch and megatron-core takes seconds: after the checks, so that a typing mistake answers at once.
    from engine.callbacks.checkpoint import CheckpointCallback
    from engine.checkpoint.errors import CheckpointError
    from engine.launch import job
    from engine.mesh import LayoutError
    from engine.trainer import NonFiniteLoss, Trainer

    try:
        with job(config.parallel) as (mesh, device):
            trainer = Trainer(config, mesh, device)
            trainer.resume()
            if mesh.world.rank == 0:
                _write_config(config)
            trainer.fit([*_logging_callbacks(config, mesh.world.rank), CheckpointCallback(trainer)])
    except (LayoutError, DataError, CheckpointError, NonFiniteLoss) as error:
        return _fail(error)
    return 0


def _logging_callbacks(config: Config, rank: int) -> list:
    if rank != 0:
        return []
    from engine.callbacks.console import ConsoleProgress
    from engine.callbacks.metrics import MetricsFile
    from engine.callbacks.tensorboard import TensorBoard

    callbacks = [MetricsFile(), ConsoleProgress(log_every_steps=config.log.every_steps)]
    return [*callbacks, TensorBoard()] if config.log.tensorboard else callbacks


def _write_config(config: Config) -> None:
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))


def _fail(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
