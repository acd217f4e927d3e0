"""Checks of what an objective needs and of what has no effect with it (docs/mim.md)."""

from dataclasses import fields
from typing import Any

from data.errors import DataError
from data.pixels.masks import BlockMasks
from engine.config.errors import ConfigError, require
from engine.config.schema import Config, MimConfig
from models.blocks.kernel_checks import check_kernels
from models.config import ModelConfig, ModelConfigError

_NO_CAPTIONS = "the student sees no captions"
_ONE_F_ONE_B = "1F1B keeps the activations of the micro-batches in flight, at most P, and replays none"
_CONTRASTIVE_ONLY = {
    "train": {
        "keep_activations": _ONE_F_ONE_B,
        "activation_budget_gb": _ONE_F_ONE_B,
        "offload_stash": _ONE_F_ONE_B,
        **dict.fromkeys(("text_micro_batch_size", "logit_scale", "loss", "loss_variant", "loss_tile"), _NO_CAPTIONS),
    },
    "optim": dict.fromkeys(("lr_text", "lr_other", "layer_decay_text"), _NO_CAPTIONS),
    "init": dict.fromkeys(("text", "logit_scale"), _NO_CAPTIONS),
    "health": {"loss_factor": "minus a cosine is negative: a factor of its median says nothing, gradient_factor does"},
}
"""Section -> setting -> why it means nothing to objective=mim."""


def check_objective(config: Config) -> None:
    """Raise ConfigError for the first thing that means nothing to the objective or that it lacks."""
    objective = config.objective
    require(objective in ("contrastive", "mim"), f"objective is {objective!r}: choose contrastive or mim")
    if objective == "contrastive":
        changed = _changed(config.mim, [field.name for field in fields(MimConfig)])
        key = changed[0] if changed else ""
        require(not changed, f"mim.{key} has no effect with objective=contrastive: set objective=mim or remove it")
        return
    for section, reasons in _CONTRASTIVE_ONLY.items():
        for key in _changed(getattr(config, section), list(reasons)):
            value = getattr(getattr(config, section), key)
            raise ConfigError(f"{section}.{key}={value} has no effect with objective=mim ({reasons[key]}): remove it")
    dropout = config.train.patch_dropout
    require(dropout == 0, f"train.patch_dropout is {dropout}: objective=mim masks patches and drops none, set it to 0")
    _check_mim(config)


def _changed(section: Any, names: list[str]) -> list[str]:
    """Settings that differ from their defaults."""
    default = type(section)()
    return [name for name in names if getattr(section, name) != getattr(default, name)]


def _check_mim(config: Config) -> None:
    mim, teacher = config.mim, config.mim.teacher_model
    require(
        mim.teacher is not None, "objective=mim needs mim.teacher: a CLIP checkpoint, or a file in the authors' layout"
    )
    assert teacher is not None, "resolve() has read it from the checkpoint"
    precision, scale = mim.teacher_precision, mim.patch_gradient_scale
    require(
        precision in (None, "fp32", "bf16"),
        f"mim.teacher_precision is {precision!r}: choose fp32 or bf16, or null for train.precision",
    )
    require(0 <= scale <= 1, f"mim.patch_gradient_scale is {scale}: it must be in [0, 1]")
    _check_teacher(teacher, precision or config.train.precision)
    # Imported here, because torch comes with it: other configs answer before that.
    from models.towers.mim import check_grids

    try:
        check_grids(config.model.vision, teacher.vision)
        block_masks(config)
    except (ModelConfigError, DataError) as error:
        raise ConfigError(f"mim: {error}") from None


def _check_teacher(teacher: ModelConfig, precision: str) -> None:
    require(
        teacher.fp8 == "none",
        f"mim.teacher_model.fp8 is {teacher.fp8}: the teacher's passes have any number of images, fp8 wants multiples",
    )
    tokens = teacher.vision.kept_tokens(0.0)
    try:
        teacher.check()
        check_kernels(teacher, precision=precision, packed_tokens=tokens, tensor=1, sequence_parallel=False)
    except ModelConfigError as error:
        raise ConfigError(f"mim.teacher_model: {error}") from None


def block_masks(config: Config) -> BlockMasks:
    """The generator of the student's masks. Raises DataError for settings that fit no mask into its grid."""
    mim = config.mim
    return BlockMasks(
        grid=config.model.vision.grid,
        masked=mim.masked_patches,
        min_block=mim.min_block,
        max_block=mim.max_block,
        min_aspect=mim.min_aspect,
    )
