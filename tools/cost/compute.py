"""Seconds of compute on one GPU: matrix products at the profile's efficiency, elementwise kernels at its bandwidth.

Kernels are the ones of models/blocks/spec.py, not fused: what an RMSNorm, a bias or a GELU reads and writes is counted
as eager PyTorch does it. A backward has twice the products and bytes of its forward (scores 2.5 x, as flash attention
computes them again), and adds the weight gradients of each micro-batch to the fp32 sums. All of it is projected.
"""

from models.config import ModelConfig, VisionConfig
from models.tensors.flops import attention_flops, embedding_flops, head_flops
from tools.cost.activations import FP32
from tools.cost.counts import text_parameters
from tools.cost.hardware import Hardware
from tools.cost.layout import Layout, Stage, text_blocks
from tools.cost.memory import stage_parameters

BACKWARD_PRODUCTS = 2
BACKWARD_ATTENTION = 2.5
BACKWARD_ELEMENTWISE = 2


def block_seconds(
    block: VisionConfig,
    samples: int,
    tokens: int,
    hardware: Hardware,
    *,
    element: int,
    tensor: int = 1,
    splits_tokens: bool = False,
    is_last: bool = False,
) -> tuple[float, float]:
    """(forward, backward without gradient sums) of `samples` of `tokens` tokens each through one block.

    is_last: of its tower, so that only the pooled token of each sample goes on behind the attention.
    """
    behind = samples * (1 if is_last else tokens)
    products = _product_seconds(block, samples * tokens, behind, tensor, hardware)
    scores = samples * attention_flops(tokens, block.width, queries=1 if is_last else tokens) / tensor
    attention = scores / (hardware.bf16_flops * hardware.attention_efficiency)
    moved = _elementwise_bytes(block, samples * tokens, behind, element, tensor, splits_tokens)
    elementwise = moved / hardware.memory_bytes_s
    return (
        products + attention + elementwise,
        BACKWARD_PRODUCTS * products + BACKWARD_ATTENTION * attention + BACKWARD_ELEMENTWISE * elementwise,
    )


def _product_seconds(block: VisionConfig, rows: int, behind: int, tensor: int, hardware: Hardware) -> float:
    h, f = block.width, block.mlp_hidden / tensor
    gates = 2 if block.mlp == "swiglu" else 1
    weights = [(rows, 3 * h / tensor, h), (behind, h / tensor, h), *[(behind, f, h)] * (gates + 1)]
    return sum(2 * n * a * b / hardware.gemm_flops(n, min(a, b)) for n, a, b in weights)


def _elementwise_bytes(
    block: VisionConfig, tokens: int, behind: int, element: int, tensor: int, splits_tokens: bool
) -> float:
    """Read and written in a forward: norms (RMSNorm in fp32 steps), biases, residuals, activation, attention's own."""
    share = tensor if splits_tokens else 1
    norm = 2 * element if block.norm == "layer" else 7 * FP32 + 4 * element
    first = behind if block.post_norm else tokens
    stream = (first + behind) / share * block.width * norm + 2 * behind / share * block.width * 5 * element
    heads = (2 * (tokens + behind) + (6 * tokens if block.qkv_bias else 0)) * block.width * element
    if block.layer_scale is not None:
        stream += 2 * behind / share * block.width * 3 * element
    if block.qk_norm:
        heads += 2 * tokens * block.width * (7 * FP32 + 4 * element)
    hidden = behind * block.mlp_hidden * (9 if block.mlp == "swiglu" else 4) * element
    return stream + (heads + hidden) / tensor


def stage_seconds(model: ModelConfig, layout: Layout, stage: Stage, hardware: Hardware) -> tuple[float, float]:
    """(forward, backward) of one micro-batch through all chunks of a stage, collectives not included."""
    vision, samples = model.vision, layout.micro_batch
    tokens = vision.kept_tokens(layout.patch_dropout)
    forward = backward = 0.0
    for is_last, blocks in ((False, stage.whole_blocks), (True, int(stage.has_head))):
        once = block_seconds(
            vision,
            samples,
            tokens,
            hardware,
            element=layout.element_bytes,
            tensor=layout.tensor,
            splits_tokens=layout.splits_tokens,
            is_last=is_last and vision.reads_one_token,
        )
        forward, backward = forward + blocks * once[0], backward + blocks * once[1]
    if stage.has_embedding:
        shared = layout.tensor if layout.splits_tokens else 1
        rate = hardware.gemm_flops(samples * tokens, 3 * vision.patch_size**2)
        embedding = samples * embedding_flops(vision, tokens) / shared / rate
        forward, backward = forward + embedding, backward + embedding  # images want no gradient
    if stage.has_head:
        head = samples * head_flops(model, tokens) / hardware.gemm_flops(samples, model.embed_dim)
        forward, backward = forward + head, backward + 2 * head
    sums = stage_parameters(model, layout, stage) * (layout.element_bytes + 2 * FP32) / hardware.memory_bytes_s
    return forward, backward + sums


def text_seconds(
    model: ModelConfig, captions: int, at_once: int, hardware: Hardware, element: int
) -> tuple[float, float]:
    """(forward, backward) of `captions` of full length through the caption tower, `at_once` a pass."""
    text = model.text
    passes = -(-captions // at_once)
    (forward, backward), (last_forward, last_backward) = (
        block_seconds(text_blocks(text), at_once, text.context_length, hardware, element=element, is_last=is_last)
        for is_last in (False, True)
    )
    times = captions / at_once  # the last pass may be short
    inner = text.depth - 1
    sums = passes * text_parameters(model) * (element + 2 * FP32) / hardware.memory_bytes_s
    return times * (inner * forward + last_forward), times * (inner * backward + last_backward) + sums
