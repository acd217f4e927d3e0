"""Forward FLOPs of the pieces of a CLIP dual encoder: 2 per multiply-add of matrix products and attention scores.

Norms, activations and softmax are left out, as usual. No torch: planning and layer placement are arithmetic.
"""

from models.config import ModelConfig, TextConfig, VisionConfig

TRAINING_FORWARDS = 3
"""Forwards that a training step costs: its backward is two."""


def block_flops(vision: VisionConfig, tokens: int) -> int:
    """One sample of `tokens` tokens through one block of the image tower."""
    return _block_flops(vision, tokens, asking=tokens)


def last_block_flops(vision: VisionConfig, tokens: int) -> int:
    """The tower's last block, which works for the token that the head reads once it has keys and values
    (last_block.py), or for all where the head reads them.
    """
    return _block_flops(vision, tokens, asking=1 if vision.reads_one_token else tokens)


def _block_flops(vision: VisionConfig, tokens: int, asking: int) -> int:
    """asking: the tokens that go on behind q, k and v."""
    h = vision.width
    products = 3 if vision.mlp == "swiglu" else 2
    behind = h * h + products * h * vision.mlp_hidden
    return tokens * qkv_flops(vision) + 2 * asking * behind + attention_flops(tokens, h, queries=asking)


def qkv_flops(vision: VisionConfig) -> int:
    """q, k and v of one token."""
    return 2 * 3 * vision.width**2


def embedding_flops(vision: VisionConfig, tokens: int) -> int:
    """Patch projection of one sample; dropped patches are never projected, prefix tokens have none."""
    return 2 * (tokens - vision.prefix_tokens) * 3 * vision.patch_size**2 * vision.width


def head_flops(model: ModelConfig, tokens: int) -> int:
    """Pooling and projection of one sample of `tokens` tokens; class token and mean cost nothing to pool."""
    v = model.vision
    projection = 2 * v.width * model.embed_dim if v.projection else 0
    return projection + (attention_pool_flops(v, tokens) if v.pool == "attention" else 0)


def attention_pool_flops(vision: VisionConfig, tokens: int) -> int:
    """A probe's attention to all tokens of a sample and the MLP behind it; q is the same for all samples."""
    h = vision.width
    return 2 * (tokens * 2 * h * h + h * h + 2 * h * vision.pool_hidden) + attention_flops(tokens, h, queries=1)


def attention_flops(tokens: int, width: int, queries: int | None = None) -> int:
    """Scores and weighted sum over all heads; queries: how many of the tokens ask, by default all."""
    return 4 * (tokens if queries is None else queries) * tokens * width


def vision_forward_flops(model: ModelConfig, tokens: int) -> int:
    """One image of `tokens` kept tokens (prefix tokens included) through the image tower."""
    vision = model.vision
    return vision.depth * block_flops(vision, tokens) + embedding_flops(vision, tokens) + head_flops(model, tokens)


def mlp_products(tower: VisionConfig | TextConfig) -> int:
    """Matrix products of width x hidden in an MLP."""
    return 3 if tower.mlp == "swiglu" else 2


def text_forward_flops(model: ModelConfig) -> int:
    """One caption of full context length through the caption tower (the causal half is not deducted)."""
    text: TextConfig = model.text
    w, length = text.width, text.context_length
    products = 4 * w * w + mlp_products(text) * w * text.hidden
    return text.depth * (2 * length * products + attention_flops(length, w)) + 2 * w * model.embed_dim
