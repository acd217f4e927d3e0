"""Masked-feature distillation as an objective: a student predicts a teacher's features (docs/mim.md)."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from data.errors import DataError
from data.pixels.masks import BlockMasks
from engine.config.errors import ConfigError, changed_settings, require, require_within
from engine.config.schema import Config
from engine.objectives.mim.program import MimProgram, mim_program
from models.config import ModelConfig, ModelConfigError
from models.kernel_checks import check_kernels
from models.sizes import Limits

if TYPE_CHECKING:
    import torch

    from engine.build import Towers
    from engine.objectives.mim.step import MimStep
    from engine.optim.optimizer import ShardedOptimizer
    from engine.parallel.mesh import Mesh
    from models.tensors.init import Rule
    from models.towers.vision import VisionTower

_NO_CAPTIONS = "the student sees no captions"
_ONE_F_ONE_B = "1F1B keeps the activations of the micro-batches in flight, at most P, and replays none"
_CONTRASTIVE_ONLY = {
    "parallel": dict.fromkeys(
        ("shard", "shard_ranks", "round_size"), "1F1B turns to every chunk for each micro-batch, not once in a step"
    ),
    "train": {
        "keep_activations": _ONE_F_ONE_B,
        "activation_budget_gb": _ONE_F_ONE_B,
        "offload_stash": _ONE_F_ONE_B,
        "outputs_budget_gb": _ONE_F_ONE_B,
        "offload_outputs": _ONE_F_ONE_B,
        "freeze": "this stage makes the whole student: freeze it in the contrastive stage that follows",
        **dict.fromkeys(
            (
                "text_micro_batch_size",
                "logit_scale",
                "loss",
                "loss_variant",
                "loss_tile",
                "mask_false_negatives",
                "matryoshka",
                "distill",
            ),
            _NO_CAPTIONS,
        ),
    },
    "optim": dict.fromkeys(("lr_text", "lr_other", "layer_decay_text"), _NO_CAPTIONS),
    "init": dict.fromkeys(("text", "logit_scale"), _NO_CAPTIONS),
    "health": {"loss_factor": "minus a cosine is negative: a factor of its median says nothing, gradient_factor does"},
}
"""Section -> setting -> why it means nothing to objective=mim."""


class Mim:
    """Masked patches of a student against the features of a frozen CLIP; no captions."""

    name = "mim"
    reads_captions = False
    distils = True
    defaults: Mapping[str, Mapping[str, Any]] = {"train": {"patch_dropout": 0.0}}

    def check(self, config: Config) -> None:
        """Raise ConfigError for the first thing that means nothing to a student or that it lacks."""
        for section, reasons in _CONTRASTIVE_ONLY.items():
            for key in changed_settings(getattr(config, section), list(reasons)):
                value, why = getattr(getattr(config, section), key), reasons[key]
                raise ConfigError(f"{section}.{key}={value} has no effect with objective=mim ({why}): remove it")
        dropout = config.train.patch_dropout
        require(
            dropout == 0, f"train.patch_dropout is {dropout}: objective=mim masks patches and drops none, set it to 0"
        )
        require(
            config.parallel.virtual == 1 or config.parallel.pipeline > 1,
            f"parallel.virtual {config.parallel.virtual} with objective=mim needs parallel.pipeline > 1: one stage has "
            "no bubble to shorten",
        )
        kept, recompute = config.train.keep_outputs, config.train.recompute
        require(
            kept == "none" or recompute == "full",
            f"train.keep_outputs={kept} with objective=mim needs train.recompute=full, not {recompute}: 1F1B repeats "
            "no product otherwise",
        )
        require(not config.data.features, "data.features needs objective=contrastive: a student sees pixels")
        frames = config.data.frames
        require(frames == 1, f"data.frames {frames} needs objective=contrastive")
        _check_mim(config)

    def unmeasured(self, config: Config) -> dict[str, str]:
        """Numbers of the step record that other settings would bring -> why this job does not measure them."""
        return dict.fromkeys(("i2t_top1", "t2i_top1", "logit_scale"), "objective=mim sees no captions")

    def vision_tower(self, config: Config) -> "Callable[..., VisionTower]":
        """The student's tower: its head is as wide as the teacher's projection."""
        from models.towers.mim import StudentTower

        mim = config.mim
        assert mim.teacher_model is not None, "the config was not resolved"
        target_dim = mim.teacher_model.embed_dim
        return partial(StudentTower, target_dim=target_dim, patch_gradient_scale=mim.patch_gradient_scale)

    def initial_values(self) -> "Rule":
        """EVA-01's rule for the student."""
        from models.tensors.init import student_rule

        return student_rule

    def program(self, config: Config, data: int) -> MimProgram:
        """The teacher, then 1F1B."""
        return mim_program(config, data)

    def step(
        self,
        config: Config,
        mesh: "Mesh",
        device: "torch.device",
        towers: "Towers",
        optimizer: "ShardedOptimizer",
    ) -> "MimStep":
        """Teacher, 1F1B over the student, update. Raises CheckpointError if mim.teacher does not hold its tower."""
        from engine.objectives.mim.step import MimStep

        return MimStep(config, mesh, device, towers, optimizer)


_LIMITS: Limits = {
    "masked_patches": (1, 1 << 28),
    "min_block": (1, 1 << 28),
    "max_block": (1, 1 << 28),
    "min_aspect": (1e-6, 1),
    "patch_gradient_scale": (0, 1),
}


def _check_mim(config: Config) -> None:
    mim, teacher = config.mim, config.mim.teacher_model
    require(
        mim.teacher is not None, "objective=mim needs mim.teacher: a CLIP checkpoint, or a file in the authors' layout"
    )
    assert teacher is not None, "resolve() has read it from the checkpoint"
    precision = mim.teacher_precision
    require(
        precision in (None, "fp32", "bf16"),
        f"mim.teacher_precision is {precision!r}: choose fp32 or bf16, or null for train.precision",
    )
    require_within("mim", mim, _LIMITS)
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
