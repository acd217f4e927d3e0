"""What autograd keeps of a forward, derived from models/blocks/spec.py: local kernels.

With T tokens, width H, MLP width F, element size e, a block keeps (t: divided by TP; s: divided by TP where sequence
parallelism splits the tokens):
- qkv projection: its input e T H (s) and its output 3 e T H (t; attention keeps q, k, v as views of it);
- attention: its output e T H (t), which the output projection keeps as its input, and the log-sum-exp 4 T heads (t);
- each of two norms: its input e T H and fp32 numbers a token, one of RMSNorm, two of LayerNorm (s);
- MLP: its input e T H (s), the input of GELU e T F and its output e T F (t); SwiGLU: gate, silu(gate), up, product (t).
Post-norm and pre-norm blocks keep the same amount: a linear keeps the residual stream there, the norm's output here.
- a norm of q and k keeps both as it answers, and a number a token and tensor; rope keeps them turned;
- an attention of two products (model.attention=matmul) keeps copies of q, k, v by heads in the place of all these, and
  the S × S weights of its softmax in fp32 and once more as they are multiplied;
- LayerScale keeps what it scales, twice e T H (s).
In bf16 with GELU that is (16 H + 4 F) T bytes, 36 H T at F = 5 H. Dropout is 0 and keeps nothing.
The last block of a tower keeps that of the qkv projection for all tokens, what is behind it for the pooled ones
(models/blocks/last_block.py); its queries are a copy.
"""

from functools import lru_cache

from models.config import ModelConfig, TextConfig, VisionConfig
from models.tensors.kept import LEVELS, choose_levels, kept_elements
from tools.cost.kernels import FP32, Kernels
from tools.cost.layout import Layout, Stage, text_above, text_blocks

INDEX = 8


@lru_cache(maxsize=4096)
def block_saved_bytes(
    block: VisionConfig,
    tokens: int,
    *,
    element: int,
    tensor: int = 1,
    splits_tokens: bool = False,
    lse: bool = True,
    pooled: int | None = None,
    kernels: Kernels | None = None,
    scores: float = 0.0,
) -> float:
    """One block on one tensor rank; lse: keep the attention's log-sum-exp, or its scores (recompute "selective" drops
    only these).

    pooled: rows of the tokens that go on behind the attention of a tower's last block; None: all. scores: S × S of all
    samples and heads, where the kernels keep them.
    """
    fused = kernels is not None and kernels.elementwise == "fused"
    behind = tokens if pooled is None else pooled
    products = kernels is not None and kernels.keeps_scores
    attention = _attention_bytes(block, tokens, element, tensor, splits_tokens, lse, pooled, fused, products)
    if products and lse:
        attention.append(scores * _score_bytes(element))
    return sum(attention) + sum(_mlp_bytes(block, behind, element, tensor, splits_tokens, fused))


def _score_bytes(element: int) -> int:
    """Bytes of a softmax's weight, in fp32 and, where that is another dtype, as it is multiplied."""
    return FP32 + (element if element < FP32 else 0)


def norm_saved_bytes(block: VisionConfig, tokens: float, element: int) -> float:
    """One norm of `tokens` rows."""
    return tokens * (block.width * element + FP32 * (2 if block.norm == "layer" else 1))


def _attention_bytes(
    block: VisionConfig,
    tokens: int,
    element: int,
    tensor: int,
    splits_tokens: bool,
    lse: bool,
    pooled: int | None,
    fused: bool,
    products: bool,
) -> list[float]:
    asking, row = tokens if pooled is None else pooled, block.width * element
    share = tensor if splits_tokens else 1
    normed = asking if block.post_norm else tokens
    kept = [tokens / share * row, asking * row / tensor]
    kept.append(norm_saved_bytes(block, normed / share, element))
    if products and lse:
        kept.append((asking + 2 * tokens) * row / tensor)
        kept.append(3 * tokens * row / tensor * block.qk_norm)
    else:
        kept += _one_kernel_bytes(block, tokens, row / tensor, pooled, fused)
    if lse and not products:
        kept.append(FP32 * asking * block.heads / tensor)
    if block.qk_norm:
        kept.append(2 * FP32 * tokens)
    if block.layer_scale is not None:
        kept.append(asking / share * row)
    if block.attention_norm:
        kept += _split_norm_bytes(asking * row, asking, tensor)
    return kept


def _one_kernel_bytes(block: VisionConfig, tokens: int, row: float, pooled: int | None, fused: bool) -> list[float]:
    """q, k and v of an attention that keeps them as they come."""
    asking = tokens if pooled is None else pooled
    # Where q and k are tensors of their own, the fused kernel keeps them once, as they are turned; q only once picked.
    apart = fused and block.separate_qkv
    kept = [(2 if apart and block.rope and pooled is not None else 3) * tokens * row]
    turned = block.qk_norm or (block.rope and not apart)
    if turned:
        kept.append(tokens * row)  # k turned or normed
    if turned or pooled is not None:
        kept.append(asking * row)  # q turned, normed or picked
    return kept


def _mlp_bytes(
    block: VisionConfig, tokens: int, element: int, tensor: int, splits_tokens: bool, fused: bool
) -> list[float]:
    hidden = tokens * block.mlp_hidden * element
    rows = tokens / tensor if splits_tokens else tokens
    kept = [rows * block.width * element, norm_saved_bytes(block, rows, element)]
    if fused and block.mlp == "swiglu" and tensor == 1:  # gate, up, and what the kernel makes of them
        kept += [3 * hidden, 2 * FP32 * tokens * block.mlp_norm]
    else:
        # With a sub-LN over ranks, SwiGLU's product is not kept itself: the norm keeps the gathered one.
        gathered = block.mlp_norm and tensor > 1
        kept.append((4 - gathered if block.mlp == "swiglu" else 2) * hidden / tensor)
        if block.mlp_norm:
            kept += _split_norm_bytes(hidden, tokens, tensor)
    if block.layer_scale is not None:
        kept.append(rows * block.width * element)
    return kept


def _split_norm_bytes(whole: float, tokens: int, tensor: int) -> list[float]:
    """A sub-LN norm: its output, two numbers a token, and with TP > 1 the gathered input."""
    return [whole / tensor, 2 * FP32 * tokens, whole if tensor > 1 else 0]


def embedding_saved_bytes(vision: VisionConfig, layout: Layout) -> float:
    """Patch embedding of one micro-batch: the chosen pixels, the places of their positions, its norm."""
    rows = layout.packed_tokens(vision) / (layout.tensor if layout.splits_tokens else 1)
    norm = norm_saved_bytes(vision, rows, layout.element_bytes) if vision.embed_norm else 0
    return rows * (3 * vision.patch_size**2 * layout.element_bytes + INDEX) + norm


def head_saved_bytes(model: ModelConfig, layout: Layout) -> float:
    """Norm of what the head reads, pooling, projection, and the fp32 features that are normalised, one a clip."""
    vision, element, images = model.vision, layout.element_bytes, layout.micro_batch
    rows = images if vision.reads_one_token else layout.packed_tokens(vision)
    kept: float = images * vision.width * element * vision.projection
    if vision.final_norm:
        kept += norm_saved_bytes(vision, rows, element)
    if vision.pool == "attention":  # the tokens, k and v; behind them the probe's path
        kept += 3 * rows * vision.width * element + norm_saved_bytes(vision, images, element)
        kept += images * 2 * (vision.width + vision.pool_hidden) * element
    return kept + images // layout.frames * model.embed_dim * FP32


def micro_batch_saved_bytes(model: ModelConfig, layout: Layout, stage: Stage) -> float:
    """What one micro-batch keeps on this stage; engine/objectives/contrastive/activations.py measures it."""
    vision = model.vision
    tokens = layout.packed_tokens(vision)
    if layout.recompute == "full":
        blocks: float = stage.blocks * layout.message_bytes(vision)
    else:
        lse = layout.recompute == "none"
        blocks = stage.whole_blocks * vision_block_bytes(vision, layout, lse=lse)
        if stage.last_blocks:
            blocks += vision_block_bytes(
                vision, layout, lse=lse, pooled=layout.pooled_rows if vision.reads_one_token else None
            )
        if vision.rope:
            samples = layout.micro_batch if layout.patch_dropout > 0 else 1
            table = tokens // layout.micro_batch * samples * vision.head_width
            blocks += len(stage.chunks) * 2 * table * FP32
    embedding = embedding_saved_bytes(vision, layout) if stage.has_embedding else 0
    return blocks + embedding + (head_saved_bytes(model, layout) if stage.has_head else 0)


def vision_block_bytes(vision: VisionConfig, layout: Layout, lse: bool = True, pooled: int | None = None) -> float:
    return block_saved_bytes(
        vision,
        layout.packed_tokens(vision),
        element=layout.element_bytes,
        tensor=layout.tensor,
        splits_tokens=layout.splits_tokens,
        lse=lse,
        pooled=pooled,
        kernels=layout.kernels,
        scores=_scores(vision, layout, layout.packed_tokens(vision) if pooled is None else layout.micro_batch),
    )


def _scores(vision: VisionConfig, layout: Layout, queries: int) -> float:
    """Elements of S × S of a micro-batch on a tensor rank, of the tokens that ask."""
    if not layout.kernels.keeps_scores:
        return 0.0
    return queries * layout.packed_tokens(vision) / layout.micro_batch * vision.heads / layout.tensor


def text_saved_bytes(model: ModelConfig, captions: int, element: int, kernels: Kernels) -> float:
    """`captions` of full length through the caption tower (padding is cut off: real ones keep less)."""
    text = model.text
    blocks = text_blocks(text)
    tokens = captions * text.context_length
    pooled = None if text.pool == "mean" else captions
    head = norm_saved_bytes(blocks, tokens if pooled is None else captions, element) + captions * (
        text.width * element + model.embed_dim * FP32
    )
    if not text.depth:
        return head
    whole, last = (
        block_saved_bytes(blocks, tokens, element=element, pooled=rows, kernels=kernels) for rows in (None, pooled)
    )
    return (text.depth - 1) * whole + last + tokens * INDEX + head


@lru_cache(maxsize=256)
def output_levels(model: ModelConfig, layout: Layout, stage: Stage) -> list[str]:
    """Level of kept outputs of each chunk, then of the captions (engine/pipeline/outputs.py)."""
    if layout.outputs_budget_gb is None:
        return [layout.keep_outputs] * (len(stage.chunks) + 1)
    parts = [*range(len(stage.chunks)), None]
    # All chunks of one size keep the same; the last one of a tower does not.
    alike = [None if part is None else (stage.chunks[part], part == len(stage.chunks) - 1) for part in parts]
    sizes = {
        kind: {level: kept_output_bytes(model, layout, stage, part, level) for level in LEVELS}
        for kind, part in dict(zip(alike, parts, strict=True)).items()
    }
    return choose_levels(layout.outputs_budget_gb * 1e9, [sizes[kind] for kind in alike])


def kept_output_bytes(model: ModelConfig, layout: Layout, stage: Stage, chunk: int | None, level: str) -> int:
    """All passes of one chunk of a stage at a level; chunk None: the captions."""
    if chunk is None:
        trained = text_above(model, layout)
        if trained is None or layout.keeps_captions:
            return 0
        text, rows = trained.text, layout.own_rows
        pooled = pooled_captions(text, rows)
        elements = kept_elements(text, level, blocks=text.depth, tokens=rows * text.context_length, pooled=pooled)
        return elements * layout.element_bytes
    return layout.passes_kept * pass_output_bytes(model, layout, stage, chunk, level)


def pooled_captions(text: TextConfig, captions: int) -> int | None:
    """Rows that the last of a caption tower's blocks, if there is one, answers with; None: all tokens'."""
    return captions if text.depth and text.pool != "mean" else None


def pass_output_bytes(model: ModelConfig, layout: Layout, stage: Stage, chunk: int, level: str) -> int:
    """One micro-batch through one chunk of a stage."""
    pools = stage.last_blocks and chunk == len(stage.chunks) - 1 and model.vision.reads_one_token
    elements = kept_elements(
        model.vision,
        level,
        blocks=stage.chunks[chunk],
        tokens=layout.packed_tokens(model.vision),
        pooled=layout.pooled_rows if pools else None,
        tensor=layout.tensor,
        sequence=layout.splits_tokens,
    )
    return elements * layout.element_bytes


def outputs_bytes(model: ModelConfig, layout: Layout, stage: Stage) -> tuple[float, float]:
    """(vision, captions) of a rank's kept outputs, wherever they are."""
    if not layout.keeps_outputs:
        return 0, 0
    *levels, of_text = output_levels(model, layout, stage)
    vision = sum(kept_output_bytes(model, layout, stage, chunk, level) for chunk, level in enumerate(levels))
    return vision, kept_output_bytes(model, layout, stage, None, of_text)


def backward_temporary_bytes(
    block: VisionConfig,
    tokens: int,
    *,
    element: int,
    tensor: int,
    splits_tokens: bool,
    kernels: Kernels,
    scores: float = 0.0,
    again: bool = False,
) -> float:
    """Live in the backward of the last block beyond what autograd kept: the highest of three moments.

    In the norm: the gradient of the stream, and of an eager RMSNorm its fp32 copy and two fp32 products. In fc2, when
    the norm's share has been freed: the stream's and the branch's gradient, the gathered one, the gradient of fc2's
    input and of its weight. In the softmax of scores that are kept, when the MLP's share has been freed: gradients of
    weights and of scores in fp32, and those of the stream, of the answer and of v. again: they are computed there.
    """
    rows = tokens / tensor if splits_tokens else tokens
    wide = 3 * FP32 if has_copies(block, kernels) else element
    in_norm = rows * block.width * (element + wide)
    gathered = tokens * block.width * element if splits_tokens else 0
    hidden = tokens * block.mlp_hidden * element / tensor
    in_mlp = 2 * rows * block.width * element + gathered + hidden + block.width * block.mlp_hidden * element / tensor
    in_mlp -= norm_saved_bytes(block, rows, element)
    if not scores:
        return max(in_norm, in_mlp)
    in_softmax = scores * (2 * FP32 - (element if element < FP32 else 0))
    in_softmax += (rows + 2 * tokens / tensor) * block.width * element
    fused = kernels.elementwise == "fused"
    if again:
        in_softmax += scores * _score_bytes(element) + 3 * tokens * block.width * element / tensor
    in_softmax -= sum(_mlp_bytes(block, tokens, element, tensor, splits_tokens, fused))
    return max(in_norm, in_mlp, in_softmax)


def has_copies(block: VisionConfig, kernels: Kernels) -> bool:
    """Whether the norms make fp32 copies of their rows."""
    return block.norm == "rms" and kernels.elementwise == "eager"


def forward_temporary_bytes(
    block: VisionConfig,
    tokens: int,
    *,
    element: int,
    tensor: int,
    splits_tokens: bool,
    kernels: Kernels,
    pooled: int | None = None,
    scores: float = 0.0,
) -> float:
    """Live in a forward with grad through the last block of a chunk, beyond what autograd keeps of the whole chunk.

    In the norm behind the MLP, when all is kept already: two fp32 copies of RMSNorm, or the streams around LayerNorm.
    While keys are turned: five fp32 copies, when what comes behind is not kept yet; of a tower's last block that is
    little (pooled). While scores become weights: both in fp32, and the scores.
    """
    rows = (tokens if pooled is None else pooled) / (tensor if splits_tokens else 1)
    in_norm = rows * block.width * (2 * FP32 + element if has_copies(block, kernels) else 4 * element)
    turns = block.rope and kernels.elementwise != "fused"
    if not turns and not scores:
        return in_norm
    behind, fused = tokens if pooled is None else pooled, kernels.elementwise == "fused"
    later = sum(_mlp_bytes(block, behind, element, tensor, splits_tokens, fused))
    turning = turns * tokens * block.width * (5 * FP32 + 2 * element) / tensor
    return max(in_norm, turning - later - behind * block.width * element / tensor, FP32 * scores - later)


def text_forward_temporary_bytes(model: ModelConfig, captions: int, element: int) -> float:
    """Live in a block of the caption tower without grad: fc1's output before and behind its bias, and the streams."""
    hidden = captions * model.text.context_length * 2 * model.text.hidden * element
    return hidden + text_stream_bytes(model, captions, element)


def text_stream_bytes(model: ModelConfig, captions: int, element: int) -> float:
    """Embedded tokens, residual, norm and branch of a block of the caption tower."""
    return 4 * captions * model.text.context_length * model.text.width * element


def locked_forward_bytes(model: ModelConfig, layout: Layout, stage: Stage) -> float:
    """The most that a forward without graph needs of a stage: fc1's output before and behind its bias, SwiGLU's
    product, and the streams; or the fp32 copies of keys that are turned.

    Where something is trained, a backward needs more.
    """
    vision, element, fused = model.vision, layout.element_bytes, layout.kernels.elementwise == "fused"
    tokens, share = layout.packed_tokens(vision), layout.tensor if layout.splits_tokens else 1
    stream = tokens * vision.width * element / share
    hidden = (3 if vision.mlp == "swiglu" else 2) * tokens * vision.mlp_hidden * element / layout.tensor
    eager = (2 if vision.post_norm else 3) + vision.mlp_norm
    needed = hidden + stream * ((4 if vision.post_norm else 6) if fused else eager)
    if vision.rope and not fused:
        turning = tokens * vision.width * (5 * FP32 + 2 * element) / layout.tensor
        needed = max(needed, turning + 5 * stream)
    # Queries scaled and laid out by heads, keys and values; scores, which become weights in fp32.
    by_heads = 4 * tokens * vision.width * element / layout.tensor
    scores = _scores(vision, layout, tokens)
    needed = max(needed, scores * (element + 2 * FP32) + by_heads + 4 * stream) if scores else needed
    pixels = layout.micro_batch * 3 * vision.image_size**2 * element if stage.has_embedding else 0
    return needed + pixels


def vision_forward_temporary_bytes(model: ModelConfig, layout: Layout, stage: Stage) -> float:
    """`forward_temporary_bytes` of a stage."""
    return forward_temporary_bytes(
        model.vision,
        layout.packed_tokens(model.vision),
        element=layout.element_bytes,
        tensor=layout.tensor,
        splits_tokens=layout.splits_tokens,
        kernels=layout.kernels,
        pooled=layout.pooled_rows if stage.has_head else None,
        scores=_scores(model.vision, layout, layout.packed_tokens(model.vision)) * (layout.recompute == "none"),
    )


def vision_temporary_bytes(model: ModelConfig, layout: Layout, stage: Stage) -> float:
    """The same for a stage; with full recomputation one block's activations come on top, pixels on the first stage."""
    vision = model.vision
    tokens = layout.packed_tokens(vision)
    live = backward_temporary_bytes(
        vision,
        tokens,
        element=layout.element_bytes,
        tensor=layout.tensor,
        splits_tokens=layout.splits_tokens,
        kernels=layout.kernels,
        scores=_scores(vision, layout, tokens),
        again=layout.recompute == "selective",
    )
    if layout.recompute == "full":
        live += vision_block_bytes(vision, layout)
    if stage.has_embedding:  # normalised pixels, cut into patches
        live += layout.micro_batch * 3 * vision.image_size**2 * 2 * layout.element_bytes
    return live
