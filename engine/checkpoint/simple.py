"""Checkpoints that resume at the same layout, to the bit: one safetensors file a rank, one json with the position.

run_dir/checkpoints/step_00000100/{rank_00000.safetensors, …, meta.json}. meta.json is written last, by rank 0, after
all ranks have written: a folder without it is not a checkpoint. Each rank writes the weights it holds and the
optimizer state it owns, under logical names.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.build import Towers
from engine.config import Config, to_dict
from engine.mesh import Mesh
from engine.optim.lamb import ShardedOptimizer

FORMAT = 1


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message says which and why."""


@dataclass
class Position:
    """How far a run has come; with train.seed it fixes every random number of training (data/stateless.py)."""

    step: int
    samples_seen: int
    """Position in the global sample order."""
    bad_samples: int = 0
    """Replaced so far, over all ranks."""


def _step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.safetensors"


def _layout(mesh: Mesh) -> dict[str, int]:
    return {"tensor": mesh.tensor.size, "pipeline": mesh.pipeline.size, "data": mesh.data.size}


def _state(towers: Towers, optimizer: ShardedOptimizer) -> dict[str, Tensor]:
    """Everything this rank needs to go on: its slices of the weights, its shards of master weights and moments."""
    state = {f"weight/{tensor.name}": parameter.data for tensor, parameter in towers.logical_parameters()}
    for t, tower in enumerate(optimizer.towers):
        for kind in ("master", "first", "second"):
            for s, value in enumerate(getattr(tower, kind)):
                state[f"optimizer/{t}/{kind}/{s}"] = value
    return state


def save_checkpoint(
    run_dir: Path, towers: Towers, optimizer: ShardedOptimizer, position: Position, config: Config, mesh: Mesh
) -> Path:
    """Write the checkpoint of `position`. Collective over the mesh."""
    folder = _step_folder(run_dir, position.step)
    folder.mkdir(parents=True, exist_ok=True)
    # Clones: weights, and in fp32 their masters, are views into one flat buffer, which safetensors refuses to share.
    state = {name: value.detach().cpu().clone() for name, value in _state(towers, optimizer).items()}
    target = _rank_file(folder, mesh.world.rank)
    _replace(target, lambda temporary: save_file(state, temporary))
    dist.barrier(group=mesh.world.group)
    if mesh.world.rank == 0:
        meta = {
            "format": FORMAT,
            "layout": _layout(mesh),
            "position": asdict(position),
            "seed": config.train.seed,
            "config": to_dict(config),
        }
        _replace(folder / "meta.json", lambda temporary: Path(temporary).write_text(json.dumps(meta, indent=1)))
    dist.barrier(group=mesh.world.group)
    return folder


def _replace(target: Path, write) -> None:
    temporary = target.with_name(target.name + ".tmp")
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)


def all_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(meta.parent for meta in (run_dir / "checkpoints").glob("step_*/meta.json"))


def delete_old(run_dir: Path, keep_last: int) -> None:
    """Remove all but the newest; the meta file goes first, so that no half-deleted folder counts as a checkpoint."""
    for folder in all_checkpoints(run_dir)[:-keep_last]:
        (folder / "meta.json").unlink()
        shutil.rmtree(folder)


def latest_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """What checkpoint.resume means: `auto` the newest of the run, if any; `none`; or a folder."""
    if resume == "none":
        return None
    if resume == "auto":
        found = all_checkpoints(run_dir)
        return found[-1] if found else None
    if not (Path(resume) / "meta.json").is_file():
        raise CheckpointError(f"checkpoint.resume {resume} is not a checkpoint folder (it has no meta.json)")
    return Path(resume)


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a checkpoint folder."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder}/meta.json cannot be read: {error}") from None
    if meta.get("format") != FORMAT:
        raise CheckpointError(f"{folder} has checkpoint format {meta.get('format')}, this version reads {FORMAT}")
    return meta


def load_checkpoint(
    folder: Path, towers: Towers, optimizer: ShardedOptimizer | None, config: Config, mesh: Mesh
) -> Position:
    """Fill weights and optimizer state in place; optimizer None loads weights only. Same layout required."""
    meta = read_meta(folder)
    if meta["layout"] != _layout(mesh):
        raise CheckpointError(f"{folder} was written at layout {meta['layout']}, this job runs at {_layout(mesh)}")
    if meta["config"]["model"] != to_dict(config)["model"]:
        raise CheckpointError(f"{folder} holds another model than the config asks for")
    wanted = (
        _state(towers, optimizer)
        if optimizer
        else {f"weight/{tensor.name}": parameter.data for tensor, parameter in towers.logical_parameters()}
    )
    with safe_open(_rank_file(folder, mesh.world.rank), framework="pt") as file:
        missing = sorted(set(wanted) - set(file.keys()))
        if missing:
            raise CheckpointError(f"{folder} lacks {len(missing)} tensors of this job, first {missing[0]}")
        with torch.no_grad():
            for name, value in wanted.items():
                value.copy_(file.get_tensor(name))
    position = Position(**meta["position"])
    if optimizer:
        optimizer.step_count = position.step
    return position
