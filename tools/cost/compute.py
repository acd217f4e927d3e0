"""Seconds of compute on one GPU: matrix products at the profile's efficiency, all else at its bandwidth (kernels.py).

A backward has twice the products of its forward (scores that are not kept 2.5 x: they are computed again), and adds the
weight gradients of each micro-batch to the fp32 sums, unless the product does. A replay is spared the products whose
outputs were kept. All of it is projected.
"""

from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache

from models.config import ModelConfig, VisionConfig
from models.tensors.flops import attention_flops, embedding_flops, head_flops
from models.tensors.kept import LEVELS
from tools.cost.activations import FP32, output_levels
from tools.cost.hardware import Hardware
from tools.cost.kernels import Kernels, elementwise_bytes
from tools.cost.layout import BYTES, Layout, Stage, bf16_blocks, kernels_of, text_blocks
from tools.cost.memory import stage_parameters

BACKWARD_PRODUCTS = 2
BACKWARD_ATTENTION = 2.5


@dataclass(frozen=True, kw_only=True)
class PassSeconds:
    """One pass through a block, a stage or a tower."""

    forward: float = 0.0
    spared: float = 0.0
    """Share of the forward that a repeated one does not multiply."""
    backward: float = 0.0

    def plus(self, other: "PassSeconds", times: float = 1) -> "PassSeconds":
        """Both, the other one `times` over."""
        return PassSeconds(
            forward=self.forward + times * other.forward,
            spared=self.spared + times * other.spared,
            backward=self.backward + times * other.backward,
        )


@lru_cache(maxsize=8192)
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
    kernels: Kernels,
    level: str = "none",
) -> PassSeconds:
    """`samples` of `tokens` tokens each through one block, gradient sums not included.

    is_last: of its tower, so that only the pooled token of each sample goes on behind the attention. level: kept
    outputs.
    """
    rows, behind = samples * tokens, samples * (1 if is_last else tokens)
    products = _product_seconds(block, rows, behind, tensor, hardware, element, kernels.fp8)
    scored = samples * attention_flops(tokens, block.width, queries=1 if is_last else tokens) / tensor
    attention = scored / (hardware.peak_flops(element) * hardware.attention_efficiency)
    moved = elementwise_bytes(
        block,
        rows,
        behind,
        element=element,
        tensor=tensor,
        splits_tokens=splits_tokens,
        kernels=kernels,
        scores=behind * tokens * block.heads / tensor,
    )
    multiplied = sum(products.values())
    return PassSeconds(
        forward=multiplied + attention + moved.forward / hardware.memory_bytes_s,
        spared=sum(products[kind] for kind in LEVELS[level]),
        backward=BACKWARD_PRODUCTS * multiplied
        + (BACKWARD_PRODUCTS if kernels.keeps_scores else BACKWARD_ATTENTION) * attention
        + moved.backward / hardware.memory_bytes_s,
    )


def _product_seconds(
    block: VisionConfig, rows: int, behind: int, tensor: int, hardware: Hardware, element: int, fp8: bool
) -> dict[str, float]:
    """Seconds of each kind of product (models/tensors/kept.py)."""
    h, f = block.width, block.mlp_hidden / tensor
    gates = 2 if block.mlp == "swiglu" else 1
    shapes = {"qkv": (rows, 3 * h / tensor, 1), "proj": (behind, h / tensor, 1), "fc1": (behind, f, gates)}
    shapes["fc2"] = behind, f, 1
    return {
        kind: times * 2 * n * side * h / hardware.gemm_flops(n, min(side, h), element, fp8)
        for kind, (n, side, times) in shapes.items()
    }


def stage_seconds(model: ModelConfig, layout: Layout, stage: Stage, hardware: Hardware) -> PassSeconds:
    """One micro-batch through all chunks of a stage, collectives not included."""
    vision, samples = model.vision, layout.micro_batch
    tokens = vision.kept_tokens(layout.patch_dropout)
    total = PassSeconds()
    *levels, _ = output_levels(model, layout, stage)
    bf16 = bf16_blocks(model, layout, stage) if layout.kernels.fp8 else [0] * len(stage.chunks)
    for (level, is_last, fp8), blocks in _blocks_by_kind(stage, levels, bf16).items():
        once = block_seconds(
            vision,
            samples,
            tokens,
            hardware,
            element=layout.element_bytes,
            tensor=layout.tensor,
            splits_tokens=layout.splits_tokens,
            is_last=is_last and vision.reads_one_token,
            kernels=layout.kernels if fp8 else replace(layout.kernels, fp8=False),
            level=level,
        )
        total = total.plus(once, blocks)
    if stage.has_embedding:
        shared = layout.tensor if layout.splits_tokens else 1
        rate = hardware.gemm_flops(samples * tokens, 3 * vision.patch_size**2, layout.element_bytes)
        embedding = samples * embedding_flops(vision, tokens) / shared / rate
        total = total.plus(PassSeconds(forward=embedding, backward=embedding))  # images want no gradient
    if stage.has_head:
        rate = hardware.gemm_flops(samples, model.embed_dim, layout.element_bytes)
        head = samples * head_flops(model, tokens) / rate
        total = total.plus(PassSeconds(forward=head, backward=2 * head))
    sums = _sum_bytes(stage_parameters(model, layout, stage), layout.element_bytes, layout.kernels)
    return total.plus(PassSeconds(backward=sums / hardware.memory_bytes_s))


def _blocks_by_kind(stage: Stage, levels: list[str], bf16: list[int]) -> Counter[tuple[str, bool, bool]]:
    """(level of kept outputs, is the tower's last, has the layout's fp8) -> blocks. bf16: of each chunk."""
    found = Counter[tuple[str, bool, bool]]()
    last = len(stage.chunks) - 1
    for number, (blocks, level, plain) in enumerate(zip(stage.chunks, levels, bf16, strict=True)):
        ends = stage.last_blocks if number == last else 0
        ends_plain = min(ends, plain)
        found[level, True, False] += ends_plain
        found[level, True, True] += ends - ends_plain
        found[level, False, False] += plain - ends_plain
        found[level, False, True] += blocks - ends - (plain - ends_plain)
    return +found


def _sum_bytes(elements: int, element: int, kernels: Kernels) -> float:
    """Read and written to add weight gradients to the fp32 sums, where no product does."""
    return 0.0 if kernels.sums else elements * (element + 2 * FP32)


def text_seconds(
    model: ModelConfig,
    captions: int,
    at_once: int,
    hardware: Hardware,
    element: int,
    level: str = "none",
    *,
    kernels: Kernels,
) -> PassSeconds:
    """`captions` of full length through the caption tower, `at_once` a pass."""
    text = model.text
    inner, last = (
        block_seconds(
            text_blocks(text),
            at_once,
            text.context_length,
            hardware,
            element=element,
            is_last=is_last,
            kernels=kernels,
            level=level,
        )
        for is_last in (False, text.pool != "mean")
    )
    times = captions / at_once  # the last pass may be short
    return PassSeconds().plus(inner, times * (text.depth - 1)).plus(last, times) if text.depth else PassSeconds()


def teachers_seconds(layout: Layout, hardware: Hardware) -> float:
    """Forwards of all teachers over the pairs that a rank owns: a micro-batch a pass, without tensor parallelism."""
    total = 0.0
    for one in layout.teachers:
        at_once = min(layout.own_rows, layout.micro_batch // layout.frames)
        kernels = kernels_of(one.model).of_captions
        captions = text_seconds(one.model, layout.own_rows, at_once, hardware, BYTES[one.precision], kernels=kernels)
        total += frozen_images_seconds(one.model, one.precision, layout, hardware) + captions.forward
    return total


def frozen_images_seconds(model: ModelConfig, precision: str, layout: Layout, hardware: Hardware) -> float:
    """Forward of a whole frozen image tower over the images of the pairs that a rank owns; its products are in fp8, and
    its scores kept, where its own settings say so, whatever the student's are.
    """
    whole, own = Stage(rank=0, chunks=(model.vision.depth,), has_embedding=True, has_head=True), kernels_of(model)
    alone = replace(
        layout,
        tensor=1,
        pipeline=1,
        virtual=1,
        patch_dropout=0.0,
        precision=precision,
        layers=None,
        teachers=(),
        kernels=replace(layout.kernels, fp8=own.fp8, keeps_scores=own.keeps_scores),
    )
    once = stage_seconds(model, alone, whole, hardware)
    return once.forward * layout.own_rows * layout.frames / layout.micro_batch
