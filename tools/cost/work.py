"""FLOPs that one rank executes in a step, by phase, by the convention of models/tensors/flops.py. A backward has two
forwards'.

What an attention kernel computes again in its backward is not counted; the patch projection's backward has the weight
gradient only, since pixels want none. Captions are taken at full length.
"""

from models.config import ModelConfig
from models.tensors.flops import attention_flops, block_flops, embedding_flops, head_flops, last_block_flops
from tools.cost.activations import FP32
from tools.cost.counts import text_executed_flops
from tools.cost.layout import Layout, Stage
from tools.cost.memory import KEPT_LOGITS


def rank_flops(model: ModelConfig, layout: Layout, stage: Stage) -> dict[str, float]:
    """Phase -> FLOPs of a rank of this stage; captions and rows of the rank that has the most."""
    m, kept = layout.micro_batches, layout.keep
    forward = micro_batch_flops(model, layout, stage)
    backward = 2 * forward + _recomputed_flops(model, layout, stage)
    if stage.has_embedding:
        backward -= _embedding_flops(model, layout)
    replays_text = kept < m
    return {
        "encode": m * forward,
        "replay": (m - kept) * forward,
        "backward": m * backward,
        "text": layout.own_rows * text_executed_flops(model) * (4 if replays_text else 3),
        "loss": loss_flops(model, layout),
    }


def micro_batch_flops(model: ModelConfig, layout: Layout, stage: Stage) -> float:
    """Forward of one micro-batch. Without sequence parallelism every tensor rank embeds all tokens."""
    blocks = layout.micro_batch * _block_flops(model, layout, stage) / layout.tensor
    embedding = _embedding_flops(model, layout) if stage.has_embedding else 0
    return (
        blocks + embedding + (layout.micro_batch * head_flops(model, _tokens(model, layout)) if stage.has_head else 0)
    )


def _embedding_flops(model: ModelConfig, layout: Layout) -> float:
    """Rows of prefix tokens are multiplied, too, as zeros."""
    tokens = _tokens(model, layout)
    whole = layout.micro_batch * embedding_flops(model.vision, tokens + model.vision.prefix_tokens)
    return whole / layout.tensor if layout.splits_tokens else whole


def _block_flops(model: ModelConfig, layout: Layout, stage: Stage) -> int:
    """One sample through the blocks of a stage."""
    vision, tokens = model.vision, _tokens(model, layout)
    last = last_block_flops(vision, tokens) if stage.has_head else 0
    return stage.whole_blocks * block_flops(vision, tokens) + last


def _recomputed_flops(model: ModelConfig, layout: Layout, stage: Stage) -> float:
    if layout.recompute == "none":
        return 0
    tokens, width = _tokens(model, layout), model.vision.width
    again = _block_flops(model, layout, stage)
    if layout.recompute == "selective":
        last = (
            attention_flops(tokens, width, queries=1 if model.vision.reads_one_token else tokens)
            if stage.has_head
            else 0
        )
        again = stage.whole_blocks * attention_flops(tokens, width) + last
    return layout.micro_batch * again / layout.tensor


def _tokens(model: ModelConfig, layout: Layout) -> int:
    return model.vision.kept_tokens(layout.patch_dropout)


def loss_flops(model: ModelConfig, layout: Layout) -> float:
    """Strips of own rows x all rows: logits of the sums, logits and gradient of the images' strip, the same of the
    captions' strip; the two strips share the own block. Logits are kept from the first to the second if they are few.
    """
    rows, batch = layout.own_rows, layout.global_batch
    again = 0 if rows * batch * FP32 <= KEPT_LOGITS else rows * batch
    return 2 * model.embed_dim * (2 * rows * batch + again + rows * rows + 2 * rows * (batch - rows))
