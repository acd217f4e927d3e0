"""FLOPs and tokens of a sample, as MFU and HFU count them (docs/benchmarking.md)."""

from engine.config.read import Config
from engine.objectives.registry import objective_of
from models.config import ModelConfig
from models.tensors.flops import block_flops, embedding_flops, head_flops
from tools.cost.counts import (
    TRAINING_FORWARDS,
    text_executed_flops,
    text_forward_flops,
    vision_executed_flops,
    vision_forward_flops,
)


def tokens_per_sample(config: Config) -> int:
    """Image tokens that pass through the trained blocks: kept patches and the class token, of every frame."""
    return config.data.frames * _image_tokens(config)


def model_flops(config: Config) -> float:
    """Three forwards of every trained tower and one of a teacher; nothing runs twice."""
    if objective_of(config).distils:
        return TRAINING_FORWARDS * _student_flops(config) + _teacher_flops(config)
    return TRAINING_FORWARDS * (_images_flops(config) + text_forward_flops(config.model))


def executed_flops(config: Config, *, kept_share: float, keeps_text: bool) -> float:
    """What runs: replays of the micro-batches that keep no activations, and layers recomputed in their backward.

    kept_share: k / m. Selective recomputation (core attention) is not counted, nor are rows of a CLIP's last blocks
    that nobody reads: they are not computed (models/blocks/last_block.py).
    """
    layers_again = config.train.recompute == "full"
    if objective_of(config).distils:
        return model_flops(config) + layers_again * _student_flops(config)
    images = config.data.frames * vision_executed_flops(config.model, _image_tokens(config))
    captions = (TRAINING_FORWARDS + (not keeps_text)) * text_executed_flops(config.model)
    return (TRAINING_FORWARDS + 1 - kept_share + layers_again) * images + captions


def _image_tokens(config: Config) -> int:
    return config.model.vision.kept_tokens(config.train.patch_dropout)


def _images_flops(config: Config) -> int:
    """A forward of every frame of a sample."""
    return config.data.frames * vision_forward_flops(config.model, _image_tokens(config))


def _student_flops(config: Config) -> int:
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
