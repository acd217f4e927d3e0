"""Entry point of torchrun: `torchrun --nproc-per-node N -m engine.train CONFIG.yaml [dotted.key=value …]`.

A mistake in the config, the layout, the shards or a checkpoint ends with one line that says what to do.
"""

import logging
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import yaml

from data.errors import DataError
from engine.config import Config, ConfigError, check_layout, check_vocabulary, load_config, to_dict

# megatron-core tells every rank that Transformer Engine and Apex are absent; model.backend says what is used.
warnings.filterwarnings("ignore", module="megatron.*")
warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*")
# all_gather_single and reduce_scatter_single do not exist in every torch of our range.
warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*deprecated.*")


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
    import torch.distributed as dist

    from engine.callbacks.checkpoint import CheckpointCallback
    from engine.checkpoint.simple import CheckpointError
    from engine.device import prepare
    from engine.mesh import LayoutError, build_mesh
    from engine.trainer import NonFiniteLoss, Trainer

    logging.getLogger("megatron").setLevel(logging.ERROR)
    device = prepare()
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "0")
    dist.init_process_group(device.backend, timeout=timedelta(minutes=30))
    try:
        world = dist.distributed_c10d._get_default_group()
        mesh = build_mesh(config.parallel.tensor, config.parallel.pipeline, world)
        trainer = Trainer(config, mesh, device)
        trainer.resume()
        if mesh.world.rank == 0:
            _write_config(config)
        trainer.fit([*_logging_callbacks(config, mesh.world.rank), CheckpointCallback(trainer)])
        dist.barrier(group=mesh.world.group)
    except (LayoutError, DataError, CheckpointError, NonFiniteLoss) as error:
        return _fail(error)
    finally:
        dist.destroy_process_group()
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
    status = main(sys.argv[1:])
    if status:
        # The other ranks may be waiting in a collective for this one: leave without their consent.
        sys.stdout.flush()
        os._exit(status)
