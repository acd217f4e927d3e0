"""Small training jobs for the tests of checkpoints: a model with uneven stages, batches from a seed, no files."""

import os
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from engine.callbacks.checkpoint import CheckpointCallback
from engine.checkpoint.reader import Checkpoint
from engine.config.phases import first_phase
from engine.config.read import Config, resolve
from engine.parallel.device import prepare
from engine.parallel.mesh import Mesh, build_mesh
from engine.record import RunInfo
from engine.trainer import Trainer
from tests.distributed import world
from tests.golden import local_batch

BATCH, CONTEXT, VOCABULARY, SIDE = 16, 8, 64, 28
MODEL = {
    "embed_dim": 16,
    # Five blocks: no number of stages but one and five divides them.
    "vision": {
        "image_size": SIDE, "patch_size": 14, "depth": 5, "width": 32, "head_width": 8, "mlp_hidden": 64,
        "norm": "layer", "qkv_bias": True, "head_bias": True,
    },
    "text": {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 16, "depth": 2, "heads": 2},
}  # fmt: skip


def job_config(run_dir: Path | str, *overrides: str) -> Config:
    """Micro-batches of 4, patch dropout, a learned scale; checkpoints every 2 of 6 steps."""
    tree = {
        "run_dir": str(run_dir),
        "model": MODEL,
        "data": {"shards": ["-"]},
        "train": {
            "steps": 6, "global_batch_size": BATCH, "micro_batch_size": 4, "patch_dropout": 0.5, "logit_scale": None,
        },
        "optim": {"lr_vision": 2e-2, "lr_text": 2e-2, "warmup_steps": 2, "weight_decay": 0.05},
        "checkpoint": {"every_steps": 2},
    }  # fmt: skip
    return resolve(tree, list(overrides))


def world_mesh(config: Config) -> Mesh:
    """All ranks of the test at the config's layout. Collective."""
    return build_mesh(config.parallel.tensor, config.parallel.pipeline, world())


def build(config: Config, mesh: Mesh) -> Trainer:
    """A trainer that has resumed, or started, as its config says."""
    trainer = Trainer(first_phase(config), mesh, prepare())
    trainer.resume()
    return trainer


def run_steps(trainer: Trainer, steps: int) -> list[float]:
    """Losses of the next steps on batches that depend on the position in the run alone."""
    return [_step(trainer) for _ in range(steps)]


def _step(trainer: Trainer) -> float:
    seen = trainer.position.samples_seen
    draw = torch.Generator().manual_seed(1000 + seen)
    batch = trainer.config.train.global_batch_size
    images = torch.randint(0, 256, (batch, 3, SIDE, SIDE), dtype=torch.uint8, generator=draw)
    tokens = torch.randint(1, VOCABULARY - 1, (batch, CONTEXT), generator=draw)
    tokens[:, -1] = VOCABULARY - 1
    return float(trainer.step(local_batch(images, tokens, trainer.mesh, start_position=seen)).loss)


def release(trainer: Trainer) -> None:
    """Give the run folder back, as the end of a run does."""
    assert trainer.lock is not None
    trainer.lock.release()


def save(trainer: Trainer) -> Path:
    """The state as it is now as a checkpoint of the trainer's run; returns its folder. Collective."""
    callback = CheckpointCallback(trainer)
    callback.saver.save(trainer.position, trainer.callback_states(), {"loss": 1.0})
    callback.saver.wait()
    return Path(trainer.config.run_dir) / "checkpoints" / f"step_{trainer.position.step:08d}"


def callback_of(trainer: Trainer, total_steps: int = 6) -> CheckpointCallback:
    """The callback as fit() would have started it."""
    callback = CheckpointCallback(trainer)
    run_dir = Path(trainer.config.run_dir)
    callback.on_start(
        RunInfo(
            run_dir=run_dir,
            config={},
            total_steps=total_steps,
            start_step=0,
            world_size=1,
            layout="",
            parameters=0,
            global_batch_size=BATCH,
        )
    )
    return callback


def drive(trainer: Trainer, callback: CheckpointCallback, steps: int, **metrics: list[float]) -> None:
    """Steps and their records, as fit() gives them to the callback."""
    for i in range(steps):
        if (failure := callback.saver.failure()) is not None:
            raise failure
        (loss,) = run_steps(trainer, 1)
        record = {"step": trainer.position.step - 1, "loss": loss} | {name: v[i] for name, v in metrics.items()}
        callback.secure(record)
        callback.on_step(record)


def differing(one: Path, other: Path) -> list[str]:
    """Tensors of two checkpoints that are not equal to the bit, or only in one of them."""
    a, b = Checkpoint(one), Checkpoint(other)
    names = a.manifest.tensors.keys() ^ b.manifest.tensors.keys()
    for key in a.manifest.tensors.keys() & b.manifest.tensors.keys():
        kind, name = key.split("/", 1)
        if not a.read_whole(name, kind).equal(b.read_whole(name, kind)):
            names |= {key}
    return sorted(names)


@contextmanager
def alone():
    """A process group of this process only, for tests that need no second rank."""
    assert "RANK" not in os.environ
    prepare()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield build_mesh(1, 1, world())
    finally:
        dist.destroy_process_group()
