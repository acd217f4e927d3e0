"""Which kernels a layout runs on, and what those between the products read and write: bytes of GPU memory.

`eager` is PyTorch operator by operator, as counted on fake tensors (tests/tools/planning/test_elementwise.py): an
RMSNorm reads and writes 5 e + 24 bytes a token and channel forward and 10 e + 52 backward, e being the bytes of an
element, most of it in fp32 copies. `compiled` has the RMSNorm of models/blocks/norms.py, one kernel each way with the
bias in front and the residual behind. `fused` are the blocks of models/blocks/fused: norm, bias and residual in one, a
bias with its nonlinearity.
"""

from dataclasses import dataclass

from models.config import VisionConfig
from models.hashing import HashedOnce

FP32 = 4
ELEMENTWISE = ("eager", "compiled", "fused")
ROPE_EAGER = (58, 52)
"""Bytes a channel of q or k, forward and backward: fp32 copies, their halves turned, products and sums (bf16)."""
CAST_BYTES = 6
"""An input of an fp8 product: read for its largest value, read again, written twice (as it is, and transposed)."""


@dataclass(frozen=True, kw_only=True)
class Kernels(HashedOnce):
    """Kernels of the image tower; `of_captions` are the caption tower's."""

    __hash__ = HashedOnce.__hash__

    elementwise: str = "eager"
    """eager | compiled | fused."""
    sums: bool = False
    """Weight gradients are added to their fp32 sums inside the product, as by our linears (models/blocks/outputs.py),
    not by a kernel behind it, as behind Transformer Engine's.
    """
    fp8: bool = False
    """Products of the blocks in fp8."""
    keeps_scores: bool = False
    """Attention is two products with S x S weights between them (model.attention=matmul), not one kernel."""

    @property
    def of_captions(self) -> "Kernels":
        """Those of the caption tower, whose blocks are fused where the image tower's are, and torch's otherwise."""
        return Kernels(elementwise="fused", sums=True) if self.elementwise == "fused" else Kernels()

    def __str__(self) -> str:
        parts = [self.elementwise, "sums in the product" if self.sums else "", "fp8" if self.fp8 else ""]
        parts.append("attention by products" if self.keeps_scores else "")
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True, kw_only=True)
class Moved:
    """Bytes read and written by all that is no product, scores of attention excluded, its own tensors included."""

    forward: float
    backward: float
    """The same backward, sums of weight gradients excluded."""


def elementwise_bytes(
    block: VisionConfig,
    rows: float,
    behind: float,
    *,
    element: int,
    tensor: int = 1,
    splits_tokens: bool = False,
    kernels: Kernels,
    scores: float = 0.0,
) -> Moved:
    """One block over `rows` tokens on one tensor rank; behind: those that go on behind its attention. scores: of all
    samples and heads there, where the kernels keep them.
    """
    share = tensor if splits_tokens else 1
    first = behind if block.post_norm else rows
    stream = [sum(pair) * block.width / share for pair in ((first, behind), (behind, behind))]
    heads, asking = rows * block.width / tensor, behind * block.width / tensor
    hidden = behind * block.mlp_hidden / tensor
    forward, backward = 0.0, 0.0
    for elements, (there, back) in (
        (stream[0], _norm(block, element, kernels)),
        (stream[1], _residual(block, element, kernels)),
        (hidden, _nonlinearity(block, element, kernels)),
        (heads, _qkv(block, element, kernels)),
        (heads + asking, (2 * element, 4 * element)),  # the attention's own
        *_products_of_attention(heads, asking, scores, element, kernels),
        (asking * block.attention_norm, (2 * element, 3 * element)),
        (heads + asking if block.rope else 0, _rope(element, kernels)),
        (heads + asking if block.qk_norm else 0, _eager_rms(element)),
        (stream[1] if block.layer_scale is not None else 0, _layer_scale(element, kernels)),
        (
            asking if block.mlp == "swiglu" and kernels.elementwise != "fused" else 0,
            (0, 3 * element),
        ),  # gate's and up's
    ):
        forward, backward = forward + elements * there, backward + elements * back
    if kernels.fp8:
        inputs = (rows + behind) * block.width / share + asking + hidden
        gradients = 3 * heads + 2 * behind * block.width / share + hidden
        forward, backward = forward + CAST_BYTES * inputs, backward + CAST_BYTES * gradients
    return Moved(forward=forward, backward=backward)


Bytes = tuple[float, float]
"""Bytes of a token and channel, forward and backward."""


def _products_of_attention(
    heads: float, asking: float, scores: float, e: int, kernels: Kernels
) -> list[tuple[float, Bytes]]:
    """What model.attention=matmul moves beside q, k, v and its answer: copies of them by heads, queries scaled; scores
    written by a product, turned into fp32 weights, which are read, and cast, for another product.
    """
    if not kernels.keeps_scores:
        return []
    cast = 2 * (e + FP32) if e < FP32 else 0
    by_heads = (heads, (4 * e, 4 * e)), (asking, (6 * e, 6 * e))
    return [*by_heads, (scores, (2 * e + 2 * FP32 + cast, 4 * e + 3 * FP32 + cast))]


def _norm(block: VisionConfig, e: int, kernels: Kernels) -> Bytes:
    """One of the two norms; behind a branch (post_norm) a kernel of ours has the bias and the residual, too."""
    if kernels.elementwise == "fused":
        return (3 * e, 3 * e) if block.post_norm else (2 * e, 4 * e)
    if block.norm == "layer":
        return 2 * e, 3 * e
    if kernels.elementwise == "eager":
        return _eager_rms(e)
    return (4 * e, 5 * e) if block.post_norm else (2 * e, 5 * e)


def _eager_rms(e: int) -> Bytes:
    return 5 * e + 6 * FP32, 10 * e + 13 * FP32


def _layer_scale(e: int, kernels: Kernels) -> Bytes:
    """The gain of a branch; fused kernels leave the bias in front of it to one of its own."""
    return (4 * e, 6.5 * e) if kernels.elementwise == "fused" else (2 * e, 6 * e)


def _residual(block: VisionConfig, e: int, kernels: Kernels) -> Bytes:
    """Bias and sum behind one branch; backward the sum of the two gradients of the stream, and of the bias."""
    if kernels.elementwise == "fused":  # in front of a norm they are its kernel's
        return (0, 0) if block.post_norm else (2.5 * e, 0.5 * e)
    if block.post_norm and block.norm == "rms" and kernels.elementwise == "compiled":
        return 0, 3 * e + e
    return 2 * e + 3 * e, 3 * e + e


def _nonlinearity(block: VisionConfig, e: int, kernels: Kernels) -> Bytes:
    """Biases and nonlinearity of the MLP's hidden channels, and the norm behind a SwiGLU."""
    gated, fused = block.mlp == "swiglu", kernels.elementwise == "fused"
    normed = (2 * e, 3 * e) if block.mlp_norm and not fused else (0, 0)
    if gated:  # silu, product; backward two products, silu, two sums
        there, back = (3 * e, 5 * e + 2 * e) if fused else (2 * e + 3 * e, 2 * 3 * e + 3 * e + 2 * e)
    else:
        there, back = (2 * e, 3 * e + e) if fused else (2 * e + 2 * e, 3 * e + e)
    return there + normed[0], back + normed[1]


def _qkv(block: VisionConfig, e: int, kernels: Kernels) -> Bytes:
    """Biases of q, k and v, a channel of each; backward their sums, and one gradient from three."""
    biases = 3 * block.qkv_bias
    if kernels.elementwise == "fused":  # products add biases and inputs' gradients
        return 0, biases * e + (-e if block.separate_qkv else 6 * e)
    # Of three linears outputs are put together, gradients made contiguous, and those of the inputs added up.
    apart = (6 * e, 6 * e + 6 * e) if block.separate_qkv else (0, 0)
    added = 0 if block.key_bias and not block.separate_qkv else biases * 2 * e  # a product adds a bias of its own
    return added + apart[0], biases * e + 6 * e + apart[1]


def _rope(e: int, kernels: Kernels) -> Bytes:
    return (2 * e, 2 * e) if kernels.elementwise == "fused" else ROPE_EAGER
