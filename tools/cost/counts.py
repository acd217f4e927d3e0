"""Parameters and model FLOPs of a CLIP dual encoder, from its configuration.

Model FLOPs count 2 per multiply-add of matrix products and attention scores; norms, activations and softmax are left
out. A training step is 3 forwards: replays are not counted (MFU); with a replay of every micro-batch, 4 run (HFU).
The model is counted as its authors run it, with every row of every block; what runs here is less by what nobody reads
of the last blocks (models/blocks/last_block.py).
"""

from functools import cache

from models.config import ModelConfig, VisionConfig
from models.tensors.flops import (
    TRAINING_FORWARDS,
    attention_flops,
    block_flops,
    last_block_flops,
    mlp_products,
    text_forward_flops,
    vision_forward_flops,
)
from models.tensors.inventory import (
    elements,
    text_block_shapes,
    text_head_shapes,
    text_table_shapes,
    vision_block_shapes,
    vision_embedding_shapes,
    vision_head_shapes,
)

REPLAY_FORWARDS = 1


@cache
def vision_block_parameters(vision: VisionConfig) -> int:
    """Elements of one block of the image tower."""
    return elements(vision_block_shapes(vision))


def vision_parameters(model: ModelConfig) -> int:
    """Elements of the image tower: embedding, blocks, head."""
    ends = elements(vision_embedding_shapes(model.vision)) + elements(vision_head_shapes(model))
    return ends + model.vision.depth * vision_block_parameters(model.vision)


@cache
def text_parameters(model: ModelConfig) -> int:
    """Elements of the caption tower: tables, pre-norm blocks with biases, norm, projection."""
    ends = elements(text_table_shapes(model.text)) + elements(text_head_shapes(model))
    return ends + model.text.depth * elements(text_block_shapes(model.text))


def vision_executed_flops(model: ModelConfig, tokens: int) -> int:
    """The same without what nobody reads."""
    vision = model.vision
    unread = block_flops(vision, tokens) - last_block_flops(vision, tokens)
    return vision_forward_flops(model, tokens) - unread


def text_executed_flops(model: ModelConfig) -> int:
    """The same without what nobody reads: behind the last block's attention, all rows but the end of text."""
    w, length = model.text.width, model.text.context_length
    if model.text.pool == "mean":
        return text_forward_flops(model)
    unread = (
        2 * (length - 1) * (w * w + mlp_products(model.text) * w * model.text.hidden)
        + attention_flops(length, w)
        - attention_flops(length, w, queries=1)
    )
    return text_forward_flops(model) - unread


def training_flops(model: ModelConfig, patch_dropout: float, frames: int = 1) -> int:
    """Model FLOPs of one pair in a training step; an MFU is this x samples/s / (GPUs x peak)."""
    tokens = model.vision.kept_tokens(patch_dropout)
    return TRAINING_FORWARDS * (frames * vision_forward_flops(model, tokens) + text_forward_flops(model))


def executed_flops(model: ModelConfig, patch_dropout: float, kept_share: float = 0.0, frames: int = 1) -> float:
    """FLOPs that really run for one pair; kept_share: k / m of the micro-batches keep activations (no replay)."""
    forwards = TRAINING_FORWARDS + REPLAY_FORWARDS * (1 - kept_share)
    images = frames * vision_executed_flops(model, model.vision.kept_tokens(patch_dropout))
    return (images + text_executed_flops(model)) * forwards
