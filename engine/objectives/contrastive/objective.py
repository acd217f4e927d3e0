"""Contrastive training of an image and a caption tower, as an objective (docs/contrastive_step.md)."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from engine.config.errors import changed_settings, require
from engine.config.schema import Config, MimConfig
from engine.config.sections.freeze import check_freeze, frozen_of
from engine.objectives.contrastive.program import ContrastiveProgram, contrastive_program

if TYPE_CHECKING:
    import torch

    from engine.build import Towers
    from engine.objectives.contrastive.step import ContrastiveStep
    from engine.optim.optimizer import ShardedOptimizer
    from engine.parallel.mesh import Mesh
    from models.tensors.init import Rule
    from models.towers.vision import VisionTower


class Contrastive:
    """Pairs of images and captions; a loss that is exact over the global batch."""

    name = "contrastive"
    reads_captions = True
    distils = False
    defaults: Mapping[str, Mapping[str, Any]] = {}

    def check(self, config: Config) -> None:
        """Raise ConfigError for settings of masked-feature distillation, and for what cannot be frozen."""
        changed = changed_settings(config.mim, [field.name for field in fields(MimConfig)])
        key = changed[0] if changed else ""
        require(not changed, f"mim.{key} has no effect with objective=contrastive: set objective=mim or remove it")
        check_freeze(config)
        _check_features(config)

    def unmeasured(self, config: Config) -> dict[str, str]:
        """Numbers of the step record that other settings would bring -> why this job does not measure them."""
        missing = {"masked_patches": "objective=contrastive masks none"}
        if config.train.logit_scale is not None:
            missing["logit_scale"] = f"train.logit_scale={config.train.logit_scale} is fixed"
        if config.evaluate.classes:
            directions = ("", "image_to_text_", "text_to_image_")
            names = (f"eval_{direction}recall_at_{k}" for direction in directions for k in (1, 5))
            missing |= dict.fromkeys(names, "recall is measured without evaluate.classes")
        if config.evaluate.suite and not config.evaluate.shards:
            held_out = ("zero_shot_top1", "zero_shot_top5", "recall_at_1", "recall_at_5")
            missing |= dict.fromkeys((f"eval_{name}" for name in held_out), "evaluate.shards is empty")
        return missing

    def vision_tower(self, config: Config) -> "Callable[..., VisionTower]":
        """The image tower of a CLIP."""
        from models.towers.vision import VisionTower

        return VisionTower

    def initial_values(self) -> "Rule":
        """The authors' rule for both towers."""
        from models.tensors.init import clip_rule

        return clip_rule

    def program(self, config: Config, data: int) -> ContrastiveProgram:
        """Encode, loss, backprop; train.activation_budget_gb counts as train.keep_activations."""
        return contrastive_program(config, data, config.train.keep_activations)

    def step(
        self,
        config: Config,
        mesh: "Mesh",
        device: "torch.device",
        towers: "Towers",
        optimizer: "ShardedOptimizer",
    ) -> "ContrastiveStep":
        """Encode, loss, backprop, update."""
        from engine.objectives.contrastive.step import ContrastiveStep

        return ContrastiveStep(config, mesh, device, towers, optimizer)


def _check_features(config: Config) -> None:
    """Raise ConfigError where embeddings that were computed once are not what the job would compute."""
    data, train = config.data, config.train
    if not data.features:
        return
    require(
        frozen_of(config).locks_vision,
        "data.features are of a locked image tower: freeze it (train.freeze=[vision.*])",
    )
    require(
        data.crop_scale == [1.0, 1.0] and not data.flip,
        f"data.features hold one view of each picture: augmentation is off with them, set data.crop_scale=[1,1] (it is "
        f"{data.crop_scale}) and data.flip=false",
    )
    require(
        train.patch_dropout == 0,
        f"train.patch_dropout is {train.patch_dropout}: data.features are of whole pictures, set it to 0",
    )
    require(data.frames == 1, f"data.frames {data.frames}: data.features are of still pictures")
    require(not train.distill, "train.distill teaches from pixels, which are not read with data.features: remove one")
    require(
        train.mask_false_negatives in ("none", "captions"),
        f"train.mask_false_negatives={train.mask_false_negatives} tells pictures by their files, which are not read "
        "with data.features: captions or none",
    )
