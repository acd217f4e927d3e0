"""Initial weights from an earlier stage of training or from another project's files (`init.*` in a config).

MIM student -> CLIP vision tower, text tower of another CLIP, logit scale: each by its own path, strictly, with the
exceptions that `init.skip` and `init.reinit` name. Of a student, what only the MIM stage has (mask token, prediction
head) stays behind unasked; the CLIP projection, which it lacks, must be named in `init.reinit`. A position table of
another grid is interpolated (bicubic); a patch kernel of another size only if init.resize_patch asks for it.
"""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.build import Towers
from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.flat_slice import FlatSlice
from engine.checkpoint.format.folders import resolve_checkpoint
from engine.checkpoint.format.matching import Exceptions, Shapes, match
from engine.checkpoint.load import TensorSource, load_weights_for_training, model_differences, model_shapes
from engine.checkpoint.reader import Checkpoint
from engine.checkpoint.state_dicts.files import State, open_state
from engine.config.read import Config, to_dict
from engine.optim.optimizer import ShardedOptimizer
from engine.parallel.mesh import Mesh
from models.config import ModelConfig, completed
from models.formats.authors import AUTHORS
from models.formats.eva_names import LayoutMismatch, is_derived, to_logical
from models.tensors.inventory import MIM_TENSORS
from models.towers.posembed import resize_patch_kernel, resize_pos_embed

POS_EMBED, PATCH_KERNEL = "vision.embed.pos_embed", "vision.embed.weight"
_UNSEEN = {
    "vision": (
        "post_norm",
        "head_width",
        "norm",
        "norm_eps",
        "rope",
        "rope_grid",
        "rope_kind",
        "mlp",
        "pool",
        "pool_heads",
    ),
    "text": ("heads", "norm_eps", "mlp", "causal", "pool", "pad_id", "rope"),
}
"""Switches of a tower that leave no trace in its tensors."""


class Resized:
    """A source seen at the resolution of `model`: position table and, if allowed, patch kernel are interpolated."""

    def __init__(self, source: TensorSource, model: ModelConfig, stored_patch: int | None, resize_patch: bool):
        """stored_patch: patch size of the source, None where it is the model's."""
        self.source, self.model = source, model
        self._shapes = dict(source.shapes())
        self.remarks: list[str] = []
        patch = model.vision.patch_size
        if stored_patch not in (None, patch) and not resize_patch:
            raise CheckpointError(
                f"patch size {stored_patch} of the stored vision tower is not the model's {patch}: set "
                "init.resize_patch=true to interpolate kernel and positions, or model.vision.patch_size="
                f"{stored_patch}"
            )
        self._adapt(POS_EMBED, (model.vision.positions, model.vision.width))
        self._adapt(PATCH_KERNEL, (model.vision.width, 3 * patch**2))

    def _adapt(self, name: str, wanted: tuple[int, ...]) -> None:
        stored = self._shapes.get(name)
        # Another width is another model, not another resolution: left to the match, which lists it.
        along = 1 if name == POS_EMBED else 0
        if stored is not None and stored != wanted and stored[along] == wanted[along]:
            self.remarks.append(f"interpolated {name} from {list(stored)} to {list(wanted)} (bicubic)")
            self._shapes[name] = wanted

    def shapes(self) -> Shapes:
        """Shapes of the tensors after interpolation."""
        return self._shapes

    def read(self, name: str, where: FlatSlice) -> Tensor:
        """Read a slice of a tensor as it is after interpolation."""
        stored = tuple(self.source.shapes()[name])
        if self._shapes[name] == stored:
            return self.source.read(name, where)
        whole = self.source.read(name, FlatSlice.whole(stored)).view(stored)
        return where.extract(self._interpolated(name, whole))

    def _interpolated(self, name: str, whole: Tensor) -> Tensor:
        vision = self.model.vision
        if name == POS_EMBED:
            return resize_pos_embed(whole, vision.grid, vision.positions - vision.patches)
        side = round((whole.shape[1] / 3) ** 0.5)
        return resize_patch_kernel(whole.view(-1, 3, side, side), vision.patch_size).flatten(1)


def initialise_from(config: Config, towers: Towers, optimizer: ShardedOptimizer, mesh: Mesh) -> list[str]:
    """Load what `init` names; returns what was done, for people. Collective over the mesh."""
    init, lines = config.init, []
    wanted = model_shapes(towers, mesh)
    exceptions = _Remaining(Exceptions(skip=init.skip, reinit=init.reinit))
    for part in ("vision", "text", "logit_scale"):
        path = getattr(init, part)
        if path is None:
            continue
        prefix = f"{part}."
        needed = {name: shape for name, shape in wanted.items() if name.startswith(prefix)}
        if not needed:
            raise CheckpointError(f"init.{part} is set, but this job has no {part} to load (train.logit_scale?)")
        source = _Prefixed(open_source(Path(path), config, part), prefix)
        chosen = match(source.shapes(), needed, exceptions.of(source.shapes(), needed), path, keys="init")
        load_weights_for_training(source, set(chosen.load), towers, optimizer, mesh)
        lines.append(f"init.{part} from {path}: " + "; ".join([*chosen.lines(), *source.remarks()]))
    exceptions.refuse_unused()
    return lines


class _Prefixed:
    """The tensors of a source whose names begin with a prefix."""

    def __init__(self, source: TensorSource, prefix: str):
        self.source, self.prefix = source, prefix

    def shapes(self) -> Shapes:
        return {name: shape for name, shape in self.source.shapes().items() if name.startswith(self.prefix)}

    def read(self, name: str, where: FlatSlice) -> Tensor:
        return self.source.read(name, where)

    def remarks(self) -> list[str]:
        return self.source.remarks if isinstance(self.source, Resized) else []


class _Remaining:
    """The patterns of `init`, which may belong to either tower: each must match something in one of them."""

    def __init__(self, exceptions: Exceptions):
        self.exceptions = exceptions
        self._used: set[str] = set()

    def of(self, stored: Shapes, wanted: Shapes) -> Exceptions:
        """Those that match something here, and a MIM student's own tensors where the model has no place for them."""
        skip = [p for p in self.exceptions.skip if any(fnmatchcase(name, p) for name in stored)]
        reinit = [p for p in self.exceptions.reinit if any(fnmatchcase(name, p) for name in wanted)]
        self._used |= set(skip) | set(reinit)
        behind = [name for name in MIM_TENSORS if name in stored and name not in wanted]
        return Exceptions(skip=skip + behind, reinit=reinit)

    def refuse_unused(self) -> None:
        """Raise CheckpointError for patterns that matched in none."""
        idle = sorted((set(self.exceptions.skip) | set(self.exceptions.reinit)) - self._used)
        if idle:
            raise CheckpointError(f"init.skip or init.reinit {idle} matches no tensor of what init loads")


def open_source(path: Path, config: Config, part: str) -> TensorSource:
    """A checkpoint or run folder of ours, or a file in the authors' layout, at the resolution of the job's model."""
    if path.is_dir():
        checkpoint = Checkpoint(resolve_checkpoint(path))
        stored = completed(checkpoint.manifest.config["model"])
        _same_tower(stored, to_dict(config)["model"], part, checkpoint.folder)
        source: TensorSource = checkpoint
        patch = stored["vision"]["patch_size"]
    else:
        source = AuthorsTower(open_state(path), config.model, part, path)
        patch = source.patch_size
    return Resized(source, config.model, patch, config.init.resize_patch) if part == "vision" else source


class AuthorsTower:
    """One tower of a file in the authors' layout, whatever the shapes of the other one; heads as in `model`."""

    def __init__(self, state: State, model: ModelConfig, part: str, path: Path):
        """Raises CheckpointError for a tensor that is not of the layout, or a file without this tower."""
        self.state, self.model = state, model
        self.patch_size: int | None = None
        self._names: dict[str, tuple[str, str]] = {}
        self._shapes: Shapes = {}
        for key in state.shapes:
            name = AUTHORS.normalised(key)
            if not _belongs(name, part):
                continue
            try:
                (ours, value), *_ = to_logical({name: torch.empty(state.shapes[key], device="meta")}, model).items()
            except (LayoutMismatch, RuntimeError) as error:
                raise CheckpointError(
                    f"{path}: {error} ({name} {list(state.shapes[key])}); only the authors' layout is read here, other "
                    "layouts go through python -m tools.convert"
                ) from None
            self._names[ours] = (key, name)
            self._shapes[ours] = tuple(value.shape)
            if name == "visual.patch_embed.proj.weight":
                self.patch_size = state.shapes[key][-1]
        if not self._names:
            raise CheckpointError(f"{path} holds no {part} in the authors' layout")

    def shapes(self) -> Shapes:
        """Logical name -> shape."""
        return self._shapes

    def read(self, name: str, where: FlatSlice) -> Tensor:
        """Some elements of a logical tensor, 1-D."""
        key, theirs = self._names[name]
        return where.extract(to_logical({theirs: self.state.read(key)}, self.model)[name])


def _belongs(name: str, part: str) -> bool:
    if is_derived(name):
        return False
    return name == part if part == "logit_scale" else name.startswith("visual." if part == "vision" else "text.")


def _same_tower(stored: dict[str, Any], wanted: dict[str, Any], part: str, folder: Path) -> None:
    """Compare the switches that names and shapes of tensors do not show; the match compares those."""
    keys = _UNSEEN.get(part, ())
    ours, theirs = ({key: model[part][key] for key in keys} for model in (wanted, stored))
    other = model_differences(theirs, ours, f"model.{part}")
    if other:
        raise CheckpointError(f"the {part} tower of {folder} is another one than the config's: {'; '.join(other)}")
