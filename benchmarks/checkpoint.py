"""Checkpoints against the disk: save and load GB/s, the stall of background saves, resharding in little memory.

- save: one rank's whole state (fp32 weights and two moments), hashed, synced, committed; beside it the same bytes in
  one plain sequential write with one fsync, by turns. load: verify every hash and fill weights and optimizer; beside it
  one plain sequential read. The page cache is dropped before every read (as far as a program can ask for it).
- stall: what training waits for background saves, as a share of step time, saving every 10 steps.
- reshard: GB/s, and the peak memory of the process beyond what importing takes (that of a --dry-run).
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.common import RESULTS, Spread, child_environment, machine, write_json
from engine.callbacks.checkpoint import CheckpointCallback
from engine.checkpoint.load import resume_training
from engine.checkpoint.reader import Checkpoint
from engine.config.phases import first_phase
from engine.config.read import resolve
from engine.feed import LocalBatch
from engine.parallel.device import prepare
from engine.parallel.mesh import Mesh, build_mesh
from engine.trainer import Trainer
from tools.cli import command_parser

_EXAMPLES = (
    "python -m benchmarks.checkpoint             # about 5 minutes on 2 idle cores, 12 GB of disk",
    "python -m benchmarks.checkpoint --quick     # that everything runs",
)
BLOCK = 16 * 2**20
SAVE_EVERY, STALL_STEPS = 10, 41
WIDTHS = {"full": (1024, 16), "quick": (256, 4)}
"""Width and depth of the vision tower: 2.5 GB and 40 MB of state."""


@contextmanager
def alone() -> Iterator[Mesh]:
    """One rank."""
    device = prepare()
    dist.init_process_group(device.backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield build_mesh(1, 1, dist.distributed_c10d._get_default_group())
    finally:
        dist.destroy_process_group()


def trainer_of(folder: Path, size: str, mesh: Mesh, *overrides: str, image_size: int = 28) -> Trainer:
    """A job with a small text tower and small pictures: state, not arithmetic, is what is measured."""
    width, depth = WIDTHS[size]
    vision = {"image_size": image_size, "patch_size": 14, "depth": depth, "width": width, "head_width": 64}
    tree = {
        "run_dir": str(folder),
        "model": {
            "embed_dim": 64,
            "vision": vision | {"mlp_hidden": 4 * width},
            "text": {"context_length": 16, "vocab_size": 512, "width": 64, "depth": 2, "heads": 2},
        },
        "data": {"shards": ["-"]},
        "train": {"steps": 1000, "global_batch_size": 32, "micro_batch_size": 32},
        "checkpoint": {"every_steps": SAVE_EVERY, "keep_last": 1},
    }
    return Trainer(first_phase(resolve(tree, list(overrides))), mesh, prepare())


def step(trainer: Trainer) -> None:
    """One optimizer step on noise."""
    train, vision = trainer.config.train, trainer.config.model.vision
    rows = train.global_batch_size
    images = torch.randint(0, 256, (rows, 3, vision.image_size, vision.image_size), dtype=torch.uint8)
    tokens = torch.randint(1, 512, (rows, 16))
    trainer.step(LocalBatch(np.arange(rows), images, tokens))


# --- save and load ---------------------------------------------------------------------------------------------------


def plain_write(path: Path, content: torch.Tensor) -> float:
    """Seconds of a sequential write with one fsync."""
    data = content.view(torch.uint8).numpy().data
    began = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for start in range(0, len(data), BLOCK):
            file.write(data[start : start + BLOCK])
        os.fsync(file.fileno())
    return time.perf_counter() - began


def plain_read(path: Path) -> float:
    """Seconds of a sequential read into one buffer."""
    buffer = bytearray(BLOCK)
    began = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - began


def forget(folder: Path) -> None:
    """Ask the kernel to drop the files from its page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def save_and_load(folder: Path, size: str, rounds: int) -> tuple[dict[str, Any], Path]:
    """Four speeds in GB/s, and the last checkpoint."""
    seconds: dict[str, list[float]] = {"save": [], "plain write": [], "load": [], "plain read": []}
    with alone() as mesh:
        trainer = trainer_of(folder / "run", size, mesh)
        step(trainer)
        saver = CheckpointCallback(trainer).saver
        elements = sum(p.numel() for _, p in trainer.towers.logical_parameters())
        content = torch.zeros(3 * elements)
        plain = folder / "plain"
        for _ in range(rounds):
            trainer.position.step += 1
            began = time.perf_counter()
            saver.save(trainer.position, {}, {})
            saver.wait()
            seconds["save"].append(time.perf_counter() - began)
            seconds["plain write"].append(plain_write(plain, content))
            forget(folder)
            newest = sorted((folder / "run" / "checkpoints").glob("step_*"))[-1]
            began = time.perf_counter()
            checkpoint = Checkpoint(newest)
            checkpoint.verify()
            resume_training(checkpoint, trainer.towers, trainer.optimizer, trainer.config, mesh)
            seconds["load"].append(time.perf_counter() - began)
            forget(folder)
            seconds["plain read"].append(plain_read(plain))
        plain.unlink()
    gb = 12 * elements / 1e9
    speeds = {name: asdict(Spread.of([gb / s for s in values])) for name, values in seconds.items()}
    return {"state_gb": round(gb, 3), "gb_per_s": speeds}, newest


# --- stall -----------------------------------------------------------------------------------------------------------


def stall(folder: Path, size: str) -> dict[str, Any]:
    """Share of the time of training that waits for background saves; the same run with async_save=false beside it."""
    out: dict[str, Any] = {"save_every_steps": SAVE_EVERY, "steps": STALL_STEPS}
    with alone() as mesh:
        for name in ("background", "waiting"):
            trainer = trainer_of(folder / name, size, mesh, f"checkpoint.async_save={name == 'background'}")
            callback = CheckpointCallback(trainer)
            step(trainer)  # the first one allocates
            trainer.position.step = 0
            began = time.perf_counter()
            for done in range(STALL_STEPS):
                step(trainer)
                record = {"step": done, "loss": 0.0}
                callback.secure(record)
                callback.on_step(record)
            seconds = time.perf_counter() - began
            callback.saver.wait()
            out[name] = {"stall_share": trainer.checkpoint_stall_s / seconds, "step_s": seconds / STALL_STEPS}
    return out


# --- reshard ---------------------------------------------------------------------------------------------------------


def reshard(source: Path, target: Path) -> dict[str, Any]:
    """Speed and memory of tools.reshard to TP 4 x PP 4."""
    arguments = [str(source), str(target), "--tensor", "4", "--pipeline", "4"]
    baseline, _ = _measured([*arguments, "--dry-run"])
    peak, said = _measured(arguments)
    checkpoint = Checkpoint(target)
    tensors = checkpoint.manifest.tensors.values()
    largest = max(part.where.numel() * tensor.dtype.itemsize for tensor in tensors for part in tensor.parts)
    return {
        "gb": round(checkpoint.manifest.size_bytes() / 1e9, 3),
        "peak_mb": round(peak / 1e6),
        "peak_mb_of_a_dry_run": round(baseline / 1e6),
        "largest_part_mb": round(largest / 1e6, 1),
        "said": said,
    }


_CHILD = """
import sys
from benchmarks.common import resident_bytes
from tools.reshard import main
status = main(sys.argv[1:])
print(resident_bytes("VmHWM"))
sys.exit(status)
"""


def _measured(arguments: list[str]) -> tuple[int, str]:
    """(peak resident bytes, the command's last line) of a reshard in a process of its own."""
    command = [sys.executable, "-c", _CHILD, *arguments]
    run = subprocess.run(
        command, env=child_environment(1), capture_output=True, text=True, check=True, cwd=RESULTS.parent.parent
    )
    *said, peak = run.stdout.strip().splitlines()
    return int(peak), said[-1]


def main() -> None:
    """Run everything and write benchmarks/results/checkpoint.json."""
    parser = command_parser("checkpoint", __doc__, _EXAMPLES, room="benchmarks")
    parser.add_argument("--quick", action="store_true", help="small, to see that everything runs; writes no result")
    parser.add_argument("--folder", type=Path, help="of the disk to measure; default: a temporary one")
    parser.add_argument("--rounds", type=int, default=3, help="saves and loads measured")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size = "quick" if arguments.quick else "full"
    result: dict[str, Any] = {"machine": machine()}
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=arguments.folder))
    try:
        result["save_and_load"], newest = save_and_load(folder, size, arguments.rounds)
        print(result["save_and_load"], flush=True)
        result["reshard"] = reshard(newest, folder / "resharded")
        print(result["reshard"], flush=True)
        shutil.rmtree(folder / "resharded")
        shutil.rmtree(folder / "run")
        result["stall"] = stall(folder, size)
        print(result["stall"], flush=True)
    finally:
        shutil.rmtree(folder)
    result["machine"]["load_1min_after"] = round(os.getloadavg()[0], 1)
    if not arguments.quick:
        write_json(result, RESULTS / "checkpoint.json")


if __name__ == "__main__":
    main()
