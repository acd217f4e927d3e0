"""Model FLOPs of a sample, the numerator of every MFU of this project (docs/benchmarking.md)."""

from collections.abc import Iterable
from dataclasses import replace

from engine.config.read import Config
from engine.config.sections.freeze import Frozen, frozen_of
from engine.objectives.registry import objective_of
from models.config import ModelConfig
from models.tensors.flops import (
    TRAINING_FORWARDS,
    block_flops,
    embedding_flops,
    head_flops,
    text_forward_flops,
    vision_forward_flops,
)


def model_flops(config: Config) -> float:
    """Three forwards of what is trained, one of what lies below it and of every teacher; nothing runs twice."""
    if objective_of(config).distils:
        return TRAINING_FORWARDS * student_flops(config) + _teacher_flops(config)
    images, captions = _images_flops(config), text_forward_flops(config.model)
    below_images, below_captions = below_flops(
        config.model, frozen_of(config), image_tokens(config), config.data.frames
    )
    trained = images - min(images, below_images) + captions - below_captions  # images that are read as features are 0
    return images + captions + (TRAINING_FORWARDS - 1) * trained + taught_flops(config)


def below_flops(model: ModelConfig, frozen: Frozen, tokens: int, frames: int) -> tuple[int, int]:
    """(Every frame of a sample, its caption) through what lies below everything that is trained and has no backward."""
    images, captions = vision_forward_flops(model, tokens), text_forward_flops(model)
    if not frozen.locks_vision:
        blocks = frozen.vision_blocks_below(range(model.vision.depth))
        images = blocks * block_flops(model.vision, tokens) + (embedding_flops(model.vision, tokens) if blocks else 0)
    if not frozen.locks_text:
        above = replace(model.text, depth=model.text.depth - frozen.text_blocks_below)
        captions -= text_forward_flops(replace(model, text=above))
    return frames * images, captions


def taught_flops(config: Config) -> int:
    """What the teachers of train.distill compute for a sample."""
    models = [teacher.model for teacher in config.train.distill if teacher.model is not None]
    return teachers_flops(models, frames=config.data.frames, context=config.model.text.context_length)


def teachers_flops(models: Iterable[ModelConfig], *, frames: int, context: int) -> int:
    """A forward of both towers of every teacher, which see whole pictures and the student's `context` tokens."""
    return sum(
        frames * vision_forward_flops(model, model.vision.tokens)
        + text_forward_flops(replace(model, text=replace(model.text, context_length=context)))
        for model in models
    )


def image_tokens(config: Config) -> int:
    """Image tokens of a frame that pass through the trained blocks."""
    return config.model.vision.kept_tokens(config.train.patch_dropout)


def _images_flops(config: Config) -> int:
    """A forward of every frame of a sample; none where its embedding is read."""
    return 0 if config.data.features else config.data.frames * vision_forward_flops(config.model, image_tokens(config))


def student_flops(config: Config) -> int:
    """All tokens pass through the blocks; masked patches are not projected, and predicted at the end."""
    vision, masked = config.model.vision, config.mim.masked_patches
    blocks = vision.depth * block_flops(vision, vision.tokens)
    targets = 2 * masked * vision.width * _teacher(config).embed_dim
    return blocks + embedding_flops(vision, vision.tokens - masked) + targets


def _teacher_flops(config: Config) -> int:
    teacher = _teacher(config)
    vision = teacher.vision
    projections = config.mim.masked_patches * (2 * vision.width * teacher.embed_dim if vision.projection else 0)
    return vision_forward_flops(teacher, vision.tokens) - head_flops(teacher, vision.tokens) + projections


def _teacher(config: Config) -> ModelConfig:
    assert config.mim.teacher_model is not None, "objective=mim without a teacher passes no config check"
    return config.mim.teacher_model
