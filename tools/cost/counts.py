"""Parameters and model FLOPs of a CLIP dual encoder, from its configuration.

Model FLOPs count 2 per multiply-add of matrix products and attention scores; norms, activations and softmax are left
out. A training step is 3 forwards: replays are not counted (MFU); with a replay of every micro-batch, 4 run (HFU).
The model is counted as its authors run it, with every row of every block; what runs here is less by what nobody reads
of the last blocks (models/blocks/last_block.py).
"""

from functools import cache

from engine.config.sections.freeze import Frozen
from engine.model_flops import below_flops
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
    if model.text.pool == "mean" or not model.text.depth:
        return text_forward_flops(model)
    unread = (
        2 * (length - 1) * (w * w + mlp_products(model.text) * w * model.text.hidden)
        + attention_flops(length, w)
        - attention_flops(length, w, queries=1)
    )
    return text_forward_flops(model) - unread


def below_executed_flops(model: ModelConfig, frozen: Frozen, tokens: int, frames: int) -> tuple[int, int]:
    """`below_flops` of engine/model_flops.py without what nobody reads of a last block that lies below."""
    images, captions = below_flops(model, frozen, tokens, frames)
    vision, text = model.vision, model.text
    if frozen.locks_vision or frozen.vision_blocks_below(range(vision.depth)) == vision.depth:
        images -= frames * (block_flops(vision, tokens) - last_block_flops(vision, tokens))
    if frozen.locks_text or frozen.text_blocks_below == text.depth:
        captions -= text_forward_flops(model) - text_executed_flops(model)
    return images, captions


def training_flops(model: ModelConfig, patch_dropout: float, frames: int = 1, frozen: Frozen | None = None) -> int:
    """Model FLOPs of one pair in a training step; an MFU is this x samples/s / (GPUs x peak)."""
    tokens = model.vision.kept_tokens(patch_dropout)
    once = frames * vision_forward_flops(model, tokens) + text_forward_flops(model)
    below = sum(below_flops(model, frozen, tokens, frames)) if frozen is not None else 0
    return TRAINING_FORWARDS * once - (TRAINING_FORWARDS - 1) * below


def executed_flops(
    model: ModelConfig, patch_dropout: float, kept_share: float = 0.0, frames: int = 1, frozen: Frozen | None = None
) -> float:
    """FLOPs that really run for one pair; kept_share: k / m of the micro-batches keep activations (no replay)."""
    forwards, tokens = TRAINING_FORWARDS + REPLAY_FORWARDS * (1 - kept_share), model.vision.kept_tokens(patch_dropout)
    once = frames * vision_executed_flops(model, tokens) + text_executed_flops(model)
    below = sum(below_executed_flops(model, frozen, tokens, frames)) if frozen is not None else 0
    return once * forwards - below * (forwards - 1)
