"""Filling towers and optimizer from stored tensors, at any layout and precision.

A rank reads exactly the elements it owns (its optimizer shards) into the fp32 masters and moments; weights follow by
rounding, and the all-gather that training does after every step brings them to the other data-parallel ranks. So a job
of any TP x PP x virtual x DP reads each byte once per copy it needs, and what was fp32 stays so to the bit.
"""

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine.build import Towers
from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.flat_slice import FlatSlice
from engine.checkpoint.format.manifest import AVERAGE, WEIGHT, Position
from engine.checkpoint.format.matching import Match, Shapes, match
from engine.checkpoint.reader import Checkpoint
from engine.checkpoint.state import owned_slice
from engine.config.read import Config, to_dict
from engine.config.sections.freeze import frozen_of
from engine.optim.average import restart_average
from engine.optim.optimizer import ShardedOptimizer
from engine.parallel.agree import everyone
from engine.parallel.mesh import Mesh
from models.config import LOCAL_KERNELS, completed
from models.tensors.freezing import frozen_names
from models.tensors.naming import LogicalTensor

_NOT_THE_MODEL = ("preset", *LOCAL_KERNELS)  # how it was written down, and which kernels compute it


class TensorSource(Protocol):
    """Anything that offers logical weights."""

    def shapes(self) -> Shapes: ...

    def read(self, name: str, where: FlatSlice) -> Tensor: ...


def model_shapes(towers: Towers, mesh: Mesh) -> Shapes:
    """Every logical tensor of the whole model: this rank's and those of the other stages. Collective over pipeline."""
    own = {t.name: tuple(t.shape) for part in towers.parts for t in part.logical.values()}
    return {name: shape for stage in everyone(own, mesh.pipeline) for name, shape in stage.items()}


# --- resuming ------------------------------------------------------------------------------------------------------


def resume_training(
    checkpoint: Checkpoint, towers: Towers, optimizer: ShardedOptimizer, config: Config, mesh: Mesh
) -> tuple[Position, Match]:
    """Weights, moments, moving average, step and position of a training checkpoint. Collective over the mesh.

    Raises CheckpointError: weights only, another model or seed, tensors that do not fit (the checkpoint's exceptions
    aside).
    """
    manifest, position = checkpoint.manifest, training_position(checkpoint)
    same_run(checkpoint, config)
    chosen = match(manifest.shapes(), model_shapes(towers, mesh), checkpoint.exceptions, str(checkpoint.folder))
    names = set(chosen.load)
    fill(optimizer, mesh, names, checkpoint.read, (WEIGHT,))
    optimizer.reset_moments()  # a rewind finds those of the steps that it takes back
    optimizer.update_count = updates_of(position)
    position.began, _ = fill_moments(optimizer, mesh, names, checkpoint, config)
    publish(optimizer, towers)
    restart_average(optimizer)
    if optimizer.optim.ema_decay:  # what the checkpoint has no average of begins one with its weights
        fill(optimizer, mesh, set(chosen.load) & manifest.shapes(AVERAGE).keys(), checkpoint.read, (AVERAGE,))
    optimizer.step_count = position.step
    return position, chosen


def fill_moments(
    optimizer: ShardedOptimizer, mesh: Mesh, names: set[str], checkpoint: Checkpoint, config: Config
) -> tuple[dict[str, int], list[str]]:
    """Moments of the tensors `names` that are trained, where others are 0; those that were frozen in the checkpoint
    begin at the updates so far, as in a run whose optimizer gets to know them now. Returns since when they count, where
    not from the start, and which begin.

    Raises CheckpointError where moments are missing of what was trained.
    """
    manifest, folder = checkpoint.manifest, checkpoint.folder
    trained = names - frozen_of(config).names
    were_frozen = frozen_names(manifest.config["train"].get("freeze", []), trained)
    for kind in optimizer.moments:
        lacking = sorted(trained - were_frozen - manifest.shapes(kind).keys())
        if lacking:
            raise CheckpointError(f"{folder} has no {kind} of {len(lacking)} tensors, first {lacking[0]}")
    fill(optimizer, mesh, trained - were_frozen, checkpoint.read, optimizer.moments)
    stored = manifest.position.began if manifest.position is not None else {}
    began = {name: updates for name, updates in stored.items() if name in trained}
    began |= dict.fromkeys(sorted(were_frozen), optimizer.update_count)
    optimizer.began(began)
    return began, sorted(were_frozen)


def training_position(checkpoint: Checkpoint) -> Position:
    """Where the run of a training checkpoint stood. Raises CheckpointError for weights only."""
    manifest = checkpoint.manifest
    if manifest.content != "training" or manifest.position is None:
        raise CheckpointError(
            f"{checkpoint.folder} holds weights only, no optimizer state and no position: start from it with "
            f"init.vision={checkpoint.folder} init.text={checkpoint.folder}"
        )
    return replace(manifest.position)


def updates_of(position: Position) -> int:
    """Updates that the moments of a checkpoint have seen."""
    return position.step if position.updates is None else position.updates


def same_run(checkpoint: Checkpoint, config: Config, *, any_resolution: bool = False) -> None:
    """Raise CheckpointError unless the checkpoint's seed and model are the job's (any_resolution: image size aside)."""
    manifest = checkpoint.manifest
    if manifest.seed != config.train.seed:
        raise CheckpointError(
            f"{checkpoint.folder} was written with train.seed {manifest.seed}, this job has {config.train.seed}: its "
            f"samples and dropped patches would not be those of the run it continues; set train.seed={manifest.seed}"
        )
    other = model_differences(completed(manifest.config["model"]), to_dict(config)["model"])
    if any_resolution:
        other = [line for line in other if not line.startswith("model.vision.image_size:")]
    if other:
        raise CheckpointError(
            f"{checkpoint.folder} holds another model than the config asks for: {'; '.join(other)}. A new stage of "
            f"training starts with init.vision={checkpoint.folder} init.text={checkpoint.folder}"
        )


def model_differences(stored: dict[str, Any], wanted: dict[str, Any], prefix: str = "model") -> list[str]:
    """`model.vision.depth: checkpoint 4, config 6` for every switch that differs."""
    out = []
    for key in sorted(stored.keys() | wanted.keys()):
        a, b, name = stored.get(key), wanted.get(key), f"{prefix}.{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            out += model_differences(a, b, name)
        elif a != b and key not in _NOT_THE_MODEL:
            out.append(f"{name}: checkpoint {a}, config {b}")
    return out


# --- filling -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fill(optimizer: ShardedOptimizer, mesh: Mesh, names: set[str], read, kinds: tuple[str, ...]) -> None:
    """Read this rank's owned elements of the tensors `names`, of the kinds that are kept of them.

    read(name, where, kind) -> 1-D.
    """
    for tower in optimizer.held:
        for s, piece in tower.shards.owned():
            name = tower.shards.tensors[piece.tensor].name
            if name not in names:
                continue
            where = owned_slice(tower.shards, piece, mesh)
            for kind in tower.kinds().keys() & set(kinds):
                tower.kinds()[kind][s][piece.start : piece.stop].copy_(read(name, where, kind))


def load_weights_for_training(
    source: TensorSource, names: set[str], towers: Towers, optimizer: ShardedOptimizer, mesh: Mesh
) -> None:
    """Fill fp32 masters and weights of the tensors `names`; moments stay zero. Collective over the mesh."""
    fill(optimizer, mesh, names, lambda name, where, kind: source.read(name, where), (WEIGHT,))
    publish(optimizer, towers)
    restart_average(optimizer)


@torch.no_grad()
def publish(optimizer: ShardedOptimizer, towers: Towers) -> None:
    """Copy the owned masters, and what is not trained, to every rank's weights. Collective over each part's owners."""
    towers.wait_for_weights()  # a gather under way reads what changes here, and would be taken for the one below
    for tower in optimizer.towers:
        for shard, master in zip(tower.shards.shards, tower.master, strict=True):
            if master is not shard.weight:
                shard.weight.copy_(master)
    towers.gather_weights(wait=True)
    towers.gather_frozen()


@torch.no_grad()
def load_weights(
    source: TensorSource, names: set[str], parameters: list[tuple[LogicalTensor, nn.Parameter]], mesh: Mesh
) -> None:
    """Fill the local slices of modules without an optimizer. No collective."""
    for tensor, parameter in parameters:
        if tensor.name in names:
            where = FlatSlice.of_rank(tensor.shape, tensor.split_dim, mesh.tensor.rank, mesh.tensor.size)
            parameter.copy_(source.read(tensor.name, where).view(parameter.shape))
