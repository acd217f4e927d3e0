"""Forward FLOPs of the pieces of a CLIP dual encoder: 2 per multiply-add of matrix products and attention scores.

Norms, activations and softmax are left out, as usual. No torch: planning and layer placement are arithmetic.
"""

from models.config import ModelConfig, VisionConfig


def block_flops(vision: VisionConfig, tokens: int) -> int:
    """One sample of `tokens` tokens through one block of the image tower."""
    return _block_flops(vision, tokens, asking=tokens)


def last_block_flops(vision: VisionConfig, tokens: int) -> int:
    """The tower's last block, which works for the pooled token alone once it has keys and values (last_block.py)."""
    return _block_flops(vision, tokens, asking=1)


def _block_flops(vision: VisionConfig, tokens: int, asking: int) -> int:
    """asking: the tokens that go on behind q, k and v."""
    h = vision.width
    products = 3 if vision.mlp == "swiglu" else 2
    behind = h * h + products * h * vision.mlp_hidden
    return 2 * (tokens * 3 * h * h + asking * behind) + attention_flops(tokens, h, queries=asking)


def embedding_flops(vision: VisionConfig, tokens: int) -> int:
    """Patch projection of one sample; dropped patches are never projected, prefix tokens have none."""
    return 2 * (tokens - vision.prefix_tokens) * 3 * vision.patch_size**2 * vision.width


def head_flops(model: ModelConfig) -> int:
    """Projection of the class token of one sample; pooling picks a row and costs nothing."""
    return 2 * model.vision.width * model.embed_dim


def attention_flops(tokens: int, width: int, queries: int | None = None) -> int:
    """Scores and weighted sum over all heads; queries: how many of the tokens ask, by default all."""
    return 4 * (tokens if queries is None else queries) * tokens * width
