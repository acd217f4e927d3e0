"""Weights of frozen towers: whole ones on every rank, outside the gradient buffers and the optimizer."""

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from engine.checkpoint.format.errors import CheckpointError, listed
from engine.checkpoint.initial import Resized, open_source
from engine.checkpoint.load import TensorSource, load_weights
from engine.config.read import Config, InitConfig
from engine.parallel.mesh import Mesh
from models.config import ModelConfig
from models.tensors.naming import logical_tensors

_TOWERS = {"vision": "image", "text": "caption"}


@dataclass(frozen=True, kw_only=True)
class FrozenSource:
    """A CLIP to take towers from: a checkpoint or run folder, or a file in the authors' layout."""

    path: str
    model: ModelConfig
    key: str
    """The setting that names it, for messages."""
    model_key: str
    """The setting that says its model."""

    def load(self, tower: nn.Module, part: str, config: Config, mesh: Mesh) -> list[str]:
        """Fill a whole tower of the model on this rank, which reads all of it; remarks for people. No collective.

        part: vision or text. config: the job's. Raises CheckpointError: the source holds no such tower.
        """
        source = open_source(Path(self.path), replace(config, model=self.model, init=InitConfig()), part)
        table = logical_tensors(tower, part, 0, 1)
        wanted = {tensor.name: tensor.shape for tensor in table.values()}
        self._match(source, wanted, part)
        # As this rank holds it, whatever the tensor axis of the job.
        whole = [(replace(table[name], split_dim=None), parameter) for name, parameter in tower.named_parameters()]
        load_weights(source, set(wanted), whole, mesh)
        remarks = source.remarks if isinstance(source, Resized) else []
        return [f"teacher from {self.path}: loaded {len(wanted)} tensors", *remarks]

    def _match(self, source: TensorSource, wanted: dict[str, tuple[int, ...]], part: str) -> None:
        stored = {name: tuple(shape) for name, shape in source.shapes().items() if name.startswith(f"{part}.")}
        missing = sorted(wanted.keys() - stored.keys())
        extra = sorted(stored.keys() - wanted.keys())
        bent = [
            f"{name}: stored {list(stored[name])}, wanted {list(wanted[name])}"
            for name in sorted(stored.keys() & wanted.keys())
            if stored[name] != wanted[name]
        ]
        if not (missing or extra or bent):
            return
        problems = [("missing", missing), ("extra", extra), ("of another shape", bent)]
        lines = "\n".join(f"  {what}, {len(names)}:{listed(names)}" for what, names in problems if names)
        raise CheckpointError(
            f"{self.key} {self.path} does not hold the {_TOWERS[part]} tower of {self.model_key}; a teacher is a CLIP "
            f"with its projection, not a MIM student:\n{lines}"
        )
