"""FLOPs of a sample as MFU and HFU count them, and of one rank's step by span; convention of models/tensors/flops.py.

A backward has two forwards'. What an attention kernel computes again in its backward is not counted; the patch
projection's backward has the weight gradient only, since pixels want none, and so have q, k and v of a post-norm block
above frozen ones. Captions are taken at full length.
"""

from collections import Counter
from dataclasses import replace

from engine.config.read import Config
from engine.config.sections.freeze import frozen_of
from engine.model_flops import image_tokens, model_flops, student_flops, taught_flops
from engine.objectives.contrastive.program import ContrastiveProgram
from engine.objectives.registry import objective_of
from engine.pipeline.program import Backward, Forward, Program, Replay
from models.config import ModelConfig
from models.tensors.flops import (
    TRAINING_FORWARDS,
    attention_flops,
    block_flops,
    embedding_flops,
    head_flops,
    last_block_flops,
    qkv_flops,
)
from models.tensors.kept import spared_flops
from tools.cost.activations import output_levels, pooled_captions
from tools.cost.counts import below_executed_flops, text_executed_flops, vision_executed_flops
from tools.cost.layout import Layout, Stage, text_above
from tools.cost.loss import loss_flops

# --- of a sample (docs/benchmarking.md) -------------------------------------------------------------------------------


def tokens_per_sample(config: Config) -> int:
    """Image tokens that pass through the trained blocks: kept patches and the class token, of every frame."""
    return config.data.frames * image_tokens(config)


def executed_flops(config: Config, *, kept_share: float, keeps_text: bool) -> float:
    """What runs: replays of the micro-batches that keep no activations, and layers recomputed in their backward.

    kept_share: k / m. Selective recomputation (core attention) is not counted, nor are rows of a CLIP's last blocks
    that nobody reads: they are not computed (models/blocks/last_block.py).
    """
    layers_again = config.train.recompute == "full"
    if objective_of(config).distils:
        return model_flops(config) + layers_again * student_flops(config)
    model, tokens, frames = config.model, image_tokens(config), config.data.frames
    images = 0 if config.data.features else frames * vision_executed_flops(model, tokens)
    captions = text_executed_flops(model)
    below_images, below_captions = below_executed_flops(model, frozen_of(config), tokens, frames)
    return (
        images
        + captions
        + (TRAINING_FORWARDS - kept_share + layers_again) * (images - min(images, below_images))
        + (TRAINING_FORWARDS - keeps_text) * (captions - below_captions)
        + taught_flops(config)
    )


# --- of a rank --------------------------------------------------------------------------------------------------------


def rank_flops(model: ModelConfig, layout: Layout, stage: Stage) -> dict[str, float]:
    """Span -> FLOPs of a rank of this stage; captions and rows of the rank that has the most."""
    program = ContrastiveProgram(
        stages=layout.pipeline,
        micro_batches=layout.micro_batches,
        chunks=layout.virtual,
        keep=layout.keep,
        reads_features=layout.features,
    )
    passes = passes_of(program, stage.rank)
    above = stage.above
    forward, again = micro_batch_flops(model, layout, stage), micro_batch_flops(model, layout, above)
    backward = 2 * again + _recomputed_flops(model, layout, above)
    if above.has_embedding:
        backward -= _embedding_flops(model, layout)
    if above.reads_no_gradient:
        rows = layout.micro_batch * _tokens(model, layout)
        backward -= rows * qkv_flops(model.vision) / layout.tensor
    return {
        "encode": passes["encode"] * forward,
        "replay": passes["replay"] * (again - spared_in_pass(model, layout, above)),
        "backward": passes["backward"] * backward,
        "text": _text_flops(model, layout, above),
        "teacher": sum(_frozen_flops(one.model, model, layout) for one in layout.teachers),
        "loss": loss_flops(model, layout),
    }


def _text_flops(model: ModelConfig, layout: Layout, above: Stage) -> float:
    """Captions forward, and those blocks that are trained replayed and backward."""
    once, trained = layout.own_rows * text_executed_flops(model), text_above(model, layout)
    if trained is None:
        return once
    again = layout.own_rows * text_executed_flops(trained)
    if layout.keeps_captions:
        return once + 2 * again
    text, rows = trained.text, layout.own_rows
    *_, level = output_levels(model, layout, above)
    tokens, pooled = rows * text.context_length, pooled_captions(text, rows)
    return once + 3 * again - spared_flops(text, level, blocks=text.depth, tokens=tokens, pooled=pooled)


def spared_in_pass(model: ModelConfig, layout: Layout, stage: Stage) -> float:
    """FLOPs of one micro-batch that a repeated pass through a stage does not multiply: their outputs were kept."""
    if not layout.keeps_outputs:
        return 0.0
    *levels, _ = output_levels(model, layout, stage)
    total = 0.0
    for number, (blocks, level) in enumerate(zip(stage.chunks, levels, strict=True)):
        pools = stage.last_blocks and number == len(stage.chunks) - 1 and model.vision.reads_one_token
        total += spared_flops(
            model.vision,
            level,
            blocks=blocks,
            tokens=layout.packed_tokens(model.vision),
            pooled=layout.pooled_rows if pools else None,
            tensor=layout.tensor,
        )
    return total


def _frozen_flops(teacher: ModelConfig, model: ModelConfig, layout: Layout) -> float:
    """Forwards of a whole teacher over the pairs that a rank owns."""
    whole = Stage(rank=0, chunks=(teacher.vision.depth,), has_embedding=True, has_head=True)
    alone = replace(layout, tensor=1, pipeline=1, virtual=1, patch_dropout=0.0, layers=None, teachers=())
    images = micro_batch_flops(teacher, alone, whole) * layout.own_rows * layout.frames / layout.micro_batch
    text = replace(teacher.text, context_length=model.text.context_length)
    return images + layout.own_rows * text_executed_flops(replace(teacher, text=text))


def passes_of(program: Program, stage: int) -> Counter[str]:
    """Span -> micro-batches that go through all chunks of a stage in it."""
    units: Counter[str] = Counter()
    for action in program.actions(stage):
        match action:
            case Forward(_, span):
                units[span] += 1
            case Replay():
                units["replay"] += 1
            case Backward():
                units["backward"] += 1
    return Counter({span: count // program.chunks for span, count in units.items()})


def micro_batch_flops(model: ModelConfig, layout: Layout, stage: Stage) -> float:
    """Forward of one micro-batch. Without sequence parallelism every tensor rank embeds all tokens."""
    if layout.features:
        return 0.0
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
    last = last_block_flops(vision, tokens) if stage.last_blocks else 0
    return stage.whole_blocks * block_flops(vision, tokens) + last


def _recomputed_flops(model: ModelConfig, layout: Layout, stage: Stage) -> float:
    if layout.recompute == "none" or layout.features:
        return 0
    tokens, width = _tokens(model, layout), model.vision.width
    again = _block_flops(model, layout, stage)
    if layout.recompute == "selective":
        last = (
            attention_flops(tokens, width, queries=1 if model.vision.reads_one_token else tokens)
            if stage.last_blocks
            else 0
        )
        again = stage.whole_blocks * attention_flops(tokens, width) + last
    spared = spared_in_pass(model, layout, stage) if layout.recompute == "full" else 0
    return layout.micro_batch * again / layout.tensor - spared


def _tokens(model: ModelConfig, layout: Layout) -> int:
    return model.vision.kept_tokens(layout.patch_dropout)
