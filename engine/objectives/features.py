"""Whether data.features, which tools.embed has written, are of the image tower that a job has locked."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from data.errors import DataError
from data.pixels.features import FeatureOrigin
from engine.build import Towers
from engine.parallel.agree import everyone, together
from engine.parallel.mesh import Mesh
from models.tensors.digest import own_digest
from models.tensors.naming import logical_tensors
from models.towers.vision import VisionTower


def tower_digest(chunks: Sequence[VisionTower], mesh: Mesh) -> int:
    """Digest of an image tower's weights, the same at every layout and on every rank. Collective over the replica.

    chunks: this rank's, with whole weights.
    """
    digest = torch.zeros(1, dtype=torch.int64)
    for chunk in chunks:
        table = logical_tensors(chunk, "vision", chunk.layers.start, mesh.tensor.size)
        tensors = ((table[name], parameter) for name, parameter in chunk.named_parameters())
        digest = digest.to(next(chunk.parameters()).device)
        digest += own_digest(tensors, mesh.tensor.rank, mesh.tensor.size)
    dist.all_reduce(digest, group=mesh.replica.group)
    return int(digest)


def check_features(path: str, towers: Towers, mesh: Mesh) -> None:
    """Raise DataError on every rank unless data.features are of this job's image tower. Collective over the mesh."""
    with towers.whole_weights():
        ours = tower_digest(towers.vision, mesh)
    told = None
    with together(mesh.control):
        if mesh.control.rank == 0:
            told = FeatureOrigin.read(Path(path)).tower
    theirs = everyone(told, mesh.control)[0]
    if ours != theirs:
        raise DataError(
            f"data.features {path} are of another image tower than this job's (digest {theirs:x}, here {ours:x}): "
            "embed the shards with the checkpoint that init.vision or the resumed run has"
        )
