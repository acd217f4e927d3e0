"""What the contrastive losses take of one rank: memory, FLOPs, bytes moved and seconds (on the wire: traffic.py).

Own rows x all rows of logits, in tiles, in two strips (engine/objectives/contrastive/softmax.py): own images with all
captions, and own captions with all images. False negatives are told by identifiers of 64 bits; teachers bring losses of
their own beside the job's (engine/objectives/contrastive/distill).

A GPU adds up three products in bf16 in the place of each in fp32 (engine/objectives/contrastive/tiles.py): of both
factors their bf16 halves are written first.
"""

from dataclasses import dataclass

from models.config import ModelConfig
from tools.cost.hardware import Hardware
from tools.cost.kernels import FP32
from tools.cost.layout import FrozenModel, Layout

GPU_TILE = 8192
KEPT_LOGITS = 64 * 2**20
IDENTIFIER = 8
"""Bytes of an identifier of a pair."""
LEFT_OUT_BYTES = 10
"""Read and written for a logit and kind of identifier: which of a tile are equal, and the tile with -inf there."""
BF16_PRODUCTS = 3
"""Products in bf16 that a GPU adds up for one in fp32."""
_HALVES = 22
"""Read and written for an element of a factor to have it as two numbers in bf16."""
_LOGITS = 3 * FP32
"""Read and written for a logit that is computed: set to 0, then scaled."""
_SUMS = 12 * FP32
"""Largest logits and sums of exponentials, by row and by column."""
_WEIGHTS = 11 * FP32
"""Two softmaxes, added up."""
_SIGMOID = {"images": 11 * FP32, "captions": 4 * FP32}
"""Bias and sigmoid; of the images' strip losses, maxima and the sum of weights, too."""
_DIVERGENCE = 21 * FP32 + _WEIGHTS
"""Beside the student's softmaxes the teacher's, the gap between both, its sum, and the difference of weights."""


def loss_bytes(model: ModelConfig, layout: Layout) -> float:
    """Own rows of both towers, those of the captions twice, and their gradients, one gathered tower (in a ring two
    blocks of one), sums and normalisers of all rows, tiles, identifiers of false negatives and what they leave out.

    Of several widths it is the last, widest one's, beside the rows as units of their own and the gradients so far.
    Of teachers it is the largest of the same losses, beside the gradients so far and what all teachers say.
    """
    rows, width = layout.own_rows, model.embed_dim * FP32
    nested = 4 * rows * width + 2 * rows * FP32 if layout.widths else 0
    own = nested + 3 * rows * width + _one_loss_bytes(width, layout, layout.loss == "softmax")
    said = sum(2 * rows * one.model.embed_dim * FP32 for one in layout.teachers)
    largest = max((_taught_loss_bytes(one, model, layout) for one in layout.teachers), default=0)
    return said + max(own, 5 * rows * width + largest)


def _one_loss_bytes(width: int, layout: Layout, is_softmax: bool) -> float:
    """Gradients of own rows of `width` bytes, a gathered tower, sums, tiles."""
    rows, batch = layout.own_rows, layout.global_batch
    kept = rows * batch * FP32 if is_softmax and keeps_logits(layout) else 0
    sums = (5 if is_softmax else 1) * batch * FP32
    return 2 * rows * width + _gathered_rows(layout) * width + sums + _tile_bytes(layout) + kept + _copies_bytes(layout)


def _gathered_rows(layout: Layout) -> int:
    ranks = min(2, layout.ranks - 1) if layout.loss_variant == "ring" else layout.ranks
    return ranks * layout.own_rows


def _tile_elements(layout: Layout, block: int) -> int:
    """Logits of the largest tile of own rows and a block of others."""
    side = layout.loss_tile or GPU_TILE
    return min(side, layout.own_rows) * min(side, block)


def _tile_bytes(layout: Layout) -> int:
    """Room for the logits of a tile and as much work space."""
    block = layout.own_rows if layout.loss_variant == "ring" else layout.global_batch
    return 2 * _tile_elements(layout, block) * FP32


def _copies_bytes(layout: Layout) -> int:
    """Identifiers of all pairs, gathered and once more by kind, or which logits of a tile they leave out."""
    if not layout.copies:
        return 0
    own, of_all = layout.own_rows, layout.copies * layout.global_batch * IDENTIFIER
    block = own if layout.loss_variant == "ring" else max(own, layout.global_batch - own)
    return of_all + max(of_all, _tile_elements(layout, block))


def _taught_loss_bytes(teacher: FrozenModel, model: ModelConfig, layout: Layout) -> float:
    """The larger of a teacher's losses beside what is there before."""
    rows, width = layout.own_rows, model.embed_dim * FP32
    found: list[float] = [2 * rows * width * teacher.feature]
    if teacher.interactive:  # the captions' half is there when the images' begins
        found.append(2 * rows * width + _one_loss_bytes(width, layout, layout.loss == "softmax"))
    if teacher.relational:
        both = width + teacher.model.embed_dim * FP32
        sums = (2 * 4 + 4) * layout.global_batch * FP32
        sides = 2 * rows * both + _gathered_rows(layout) * both
        found.append(2 * rows * width + sides + sums + 2 * _tile_bytes(layout) + _copies_bytes(layout))
    return max(found)


def keeps_logits(layout: Layout) -> bool:
    """Whether the logits of a softmax are few enough to wait for its second pass."""
    return layout.own_rows * layout.global_batch * FP32 <= KEPT_LOGITS


@dataclass(frozen=True, kw_only=True)
class LossWork:
    """What a rank computes for one loss."""

    flops: float
    """FLOPs of the products, each counted once."""
    moved: float
    """Bytes read and written by all that is no product, on a GPU."""
    width: float
    """The narrowest embedding of a product."""

    def seconds(self, layout: Layout, hardware: Hardware) -> float:
        """Products and passes over tiles, one behind the other."""
        rows = min(layout.own_rows, layout.loss_tile or GPU_TILE)
        multiplied = BF16_PRODUCTS * self.flops / hardware.gemm_flops(rows, self.width)
        return multiplied + self.moved / hardware.memory_bytes_s


def loss_work(width: int, layout: Layout) -> LossWork:
    """The job's own loss, of one width of the embedding.

    Strips of own rows x all rows: logits of the sums, logits and gradient of the images' strip, the same of the
    captions' strip; the two strips share the own block. Logits are kept from the first to the second if they are few,
    and a sigmoid needs no sums.
    """
    rows, batch, is_softmax = layout.own_rows, layout.global_batch, layout.loss == "softmax"
    again = is_softmax and not keeps_logits(layout)
    strips = 2 * rows * batch + rows * rows + 2 * rows * (batch - rows) + again * rows * batch
    images = _LOGITS * (1 + again) + (_SUMS + _WEIGHTS if is_softmax else _SIGMOID["images"])
    captions = _LOGITS + (_WEIGHTS if is_softmax else _SIGMOID["captions"])
    tiles = images * rows * batch + captions * rows * (batch - rows)
    halves = _halves_bytes(layout, width, width, logits=1 + again)
    return LossWork(flops=2 * width * strips, moved=tiles + halves + left_out_bytes(layout), width=width)


def relational_work(teacher: FrozenModel, model: ModelConfig, layout: Layout) -> LossWork:
    """The same strips with the logits of both in both passes, and gradients of the student's embeddings."""
    rows, others = layout.own_rows, layout.global_batch - layout.own_rows
    taught, own = teacher.model.embed_dim, model.embed_dim
    logits = (own + taught) * (2 * layout.global_batch + others)
    of_both = 2 * _LOGITS
    tiles = rows * layout.global_batch * (of_both + 2 * _SUMS) + rows * (layout.global_batch + others) * (
        of_both + _DIVERGENCE
    )
    left_out = 2 * LEFT_OUT_BYTES * layout.copies * rows * (2 * layout.global_batch + others)
    return LossWork(
        flops=2 * rows * (logits + own * (layout.global_batch + rows + others)),
        moved=tiles + _halves_bytes(layout, own + taught, own, logits=2) + left_out,
        width=min(own, taught),
    )


def _halves_bytes(layout: Layout, seen: int, trained: int, *, logits: int) -> float:
    """Factors of the products, tile by tile: rows of both towers that logits are made of, `logits` times in the images'
    strip, each `seen` wide; weights and the rows that they gather, `trained` wide.
    """
    rows, side = layout.own_rows, layout.loss_tile or GPU_TILE
    in_a_block = rows if layout.loss_variant == "ring" else layout.global_batch - rows
    blocks = (layout.global_batch - rows) // in_a_block if in_a_block else 0
    heights = -(-rows // side)
    """Tiles that own rows are cut into."""
    there, own = rows * blocks * -(-in_a_block // side), rows * heights
    """Own rows as factors, over all tiles with other ranks' rows, and of the own block."""
    others = blocks * in_a_block * heights
    """Other ranks' rows as factors."""
    of_logits = seen * (logits * (there + others + 2 * own) + there + others)
    gathered = trained * (2 * others + 2 * own) + rows * (layout.global_batch + blocks * in_a_block + rows)
    return _HALVES * (of_logits + gathered)


def loss_flops(model: ModelConfig, layout: Layout) -> float:
    """FLOPs of the losses of a step, products counted once; the interactive loss of a teacher is two more of the job's
    own.
    """
    crossed = 2 * sum(one.interactive for one in layout.teachers)  # images and captions of the teacher
    widths = (*layout.loss_widths(model), *[model.embed_dim] * crossed)
    related = (relational_work(one, model, layout) for one in layout.teachers if one.relational)
    return sum(loss_work(width, layout).flops for width in widths) + sum(work.flops for work in related)


def left_out_bytes(layout: Layout) -> float:
    """Read and written by a loss to leave false negatives out of its strips."""
    rows, batch = layout.own_rows, layout.global_batch
    strips = rows * batch + rows * (batch - rows)  # own images with all captions, other images with own captions
    again = layout.loss == "softmax" and not keeps_logits(layout)  # the sums' logits are computed once more
    return LEFT_OUT_BYTES * layout.copies * (strips + again * rows * batch)
