"""The plan of resharding: which part of which tensor goes into which file of a layout.

Any layout reads any checkpoint; a checkpoint whose files match the layout that reads it is read in few large pieces and
opens few files. One file a (stage, tensor rank) and share of DP for the vision tower, one a share for the text side.
"""

from dataclasses import dataclass

from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.flat_slice import FlatSlice
from engine.checkpoint.format.manifest import Manifest
from engine.checkpoint.write import PlannedFile, PlannedPart
from engine.config.stages import stage_layers
from models.tensors.naming import split_dim


@dataclass(frozen=True, kw_only=True)
class TargetLayout:
    """What the files shall match."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1


def plan_reshard(manifest: Manifest, target: TargetLayout) -> list[PlannedFile]:
    """Every element of the checkpoint once. Raises CheckpointError for a layout that the model does not admit."""
    vision = manifest.config["model"]["vision"]
    _check(vision, target)
    stages = stage_layers(vision["depth"], target.pipeline)
    ranks: dict[str, list[PlannedPart]] = {}
    for key, stored in manifest.tensors.items():
        name = key.split("/", 1)[1]
        if not name.startswith("vision."):
            ranks.setdefault("text", []).append(PlannedPart(key, stored.dtype, FlatSlice.whole(stored.shape)))
            continue
        stage = _stage(name, stages)
        dim = split_dim(name)
        # What tensor parallelism does not cut is stored once, with tensor rank 0.
        for rank in range(target.tensor if dim is not None else 1):
            where = FlatSlice.of_rank(stored.shape, dim, rank, target.tensor)
            file = f"stage_{stage:02d}_tensor_{rank:02d}"
            ranks.setdefault(file, []).append(PlannedPart(key, stored.dtype, where))
    return [file for stem in sorted(ranks) for file in _shares(stem, ranks[stem], target.data)]


def _check(vision: dict, target: TargetLayout) -> None:
    heads = vision["width"] // vision["head_width"]
    for what, size in (("attention heads", heads), ("MLP width", vision["mlp_hidden"])):
        if size % target.tensor:
            raise CheckpointError(f"--tensor {target.tensor} does not divide the {what} {size} of the vision tower")
    if not 1 <= target.pipeline <= vision["depth"]:
        raise CheckpointError(f"--pipeline {target.pipeline} must be 1 to the {vision['depth']} blocks of the tower")
    if target.data < 1:
        raise CheckpointError(f"--data {target.data} must be at least 1")


def _stage(name: str, stages: list[range]) -> int:
    if name.startswith("vision.blocks."):
        block = int(name.split(".")[2])
        return next(i for i, layers in enumerate(stages) if block in layers)
    return len(stages) - 1 if name.startswith("vision.head.") else 0


def _shares(stem: str, parts: list[PlannedPart], shares: int) -> list[PlannedFile]:
    """Cut the parts of one rank into files of equal elements; borders fall inside tensors, as the optimizer's do."""
    if shares == 1:
        return [PlannedFile(f"{stem}.safetensors", parts)]
    files = [PlannedFile(f"{stem}_data_{share:03d}.safetensors") for share in range(shares)]
    for kind in dict.fromkeys(part.key.split("/")[0] for part in parts):
        mine = [part for part in parts if part.key.startswith(f"{kind}/")]
        length = -(-sum(part.where.numel() for part in mine) // shares)
        position = 0
        for part in mine:
            start = part.where.start
            while start < part.where.stop:
                share = position // length
                stop = min(part.where.stop, start + (share + 1) * length - position)
                files[share].parts.append(PlannedPart(part.key, part.dtype, part.where.part(start, stop)))
                position, start = position + stop - start, stop
    return [file for file in files if file.parts]
