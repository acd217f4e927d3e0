"""Every logical tensor of a model and its shape, from its config alone: no module is built, no memory used.

Conversions compare files with this table and the planner sums over it. tests/models check it against the parameters of
the built towers.
"""

import math

from models.config import ModelConfig, TextConfig, VisionConfig

Shapes = dict[str, tuple[int, ...]]
MIM_TENSORS = ("vision.embed.mask_token", "vision.head.prediction.weight", "vision.head.prediction.bias")
"""Tensors of masked-image-modelling students (models/towers/mim.py), beside the tower without its projection."""

# Dimension that tensor parallelism splits, by the end of the logical name; all others are whole on every rank.
_SPLIT_DIM = {
    "attn.qkv.weight": 0,
    "attn.qkv.bias": 0,
    "attn.q.weight": 0,
    "attn.k.weight": 0,
    "attn.v.weight": 0,
    "attn.bias.q": 0,
    "attn.bias.v": 0,
    "attn.proj.weight": 1,
    "mlp.fc1.weight": 0,
    "mlp.fc1.bias": 0,
    "mlp.gate.weight": 0,
    "mlp.gate.bias": 0,
    "mlp.up.weight": 0,
    "mlp.up.bias": 0,
    "mlp.fc2.weight": 1,
    "mlp.down.weight": 1,
    "attn.q_norm.weight": 0,
    "attn.k_norm.weight": 0,
}


def elements(shapes: Shapes) -> int:
    """Elements of some tensors."""
    return sum(math.prod(shape) for shape in shapes.values())


def split_dim(name: str) -> int | None:
    """Dimension of the logical tensor `name` that the tensor axis cuts; the text tower is never cut."""
    return block_split_dim(name.split(".", 3)[3]) if name.startswith("vision.blocks.") else None


def block_split_dim(name: str) -> int | None:
    """The same by the name within a block of the image tower."""
    return _SPLIT_DIM.get(name)


def clip_shapes(model: ModelConfig) -> Shapes:
    """A CLIP dual encoder with its logit scale."""
    return vision_shapes(model) | text_shapes(model) | {"logit_scale.log_scale": (1,)}


def vision_shapes(model: ModelConfig, head: bool = True) -> Shapes:
    """The image tower, with or without the projection to the shared space."""
    v = model.vision
    block = vision_block_shapes(v)
    out = vision_embedding_shapes(v)
    for i in range(v.depth):
        out |= {f"vision.blocks.{i}.{name}": shape for name, shape in block.items()}
    return out | vision_head_shapes(model, projection=head)


def vision_embedding_shapes(v: VisionConfig) -> Shapes:
    """What stands in front of the image tower's blocks."""
    out = _linear("vision.embed", v.width, 3 * v.patch_size**2, bias=v.patch_bias)
    if v.class_token:
        out["vision.embed.cls_token"] = (v.width,)
    if v.registers:
        out["vision.embed.registers"] = (v.registers, v.width)
    if v.pos_embed:
        out["vision.embed.pos_embed"] = (v.positions, v.width)
    return out | _norm("vision.embed.norm", v.width, bias=v.norm == "layer") if v.embed_norm else out


def vision_head_shapes(model: ModelConfig, projection: bool = True) -> Shapes:
    """What stands behind the image tower's blocks; projection: with what leads to the shared space, else the norm."""
    v = model.vision
    out: Shapes = _norm("vision.head.norm", v.width, bias=v.norm == "layer") if v.final_norm else {}
    if not projection:
        return out
    if v.pool == "attention":
        out |= _attention_pool(v)
    if v.projection:
        out |= _linear("vision.head.projection", model.embed_dim, v.width, bias=v.head_bias)
    return out


def _attention_pool(v: VisionConfig) -> Shapes:
    out: Shapes = {"probe": (v.width,)}
    out |= _linear("qkv", 3 * v.width, v.width) | _linear("proj", v.width, v.width)
    out |= _norm("norm", v.width)
    out |= _linear("fc1", v.pool_hidden, v.width) | _linear("fc2", v.width, v.pool_hidden)
    return {f"vision.head.pool.{name}": shape for name, shape in out.items()}


def text_shapes(model: ModelConfig) -> Shapes:
    """The caption tower."""
    t = model.text
    block, out = text_block_shapes(t), text_table_shapes(t)
    for i in range(t.depth):
        out |= {f"text.blocks.{i}.{name}": shape for name, shape in block.items()}
    return out | text_head_shapes(model)


def text_table_shapes(t: TextConfig) -> Shapes:
    """What stands in front of the caption tower's blocks."""
    positions: Shapes = {"text.pos_embed": (t.context_length, t.width)} if t.pos_embed else {}
    return {"text.token_embedding": (t.vocab_size, t.width)} | positions


def text_head_shapes(model: ModelConfig) -> Shapes:
    """What stands behind the caption tower's blocks."""
    t = model.text
    norm = _norm("text.norm", t.width, bias=t.norm == "layer")
    return norm | _linear("text.projection", model.embed_dim, t.width, bias=t.head_bias)


def mim_shapes(model: ModelConfig, target_width: int) -> Shapes:
    """What a MIM student has beside its trunk; target_width: of the teacher's features."""
    width = model.vision.width
    return dict(zip(MIM_TENSORS, ((width,), (target_width, width), (target_width,)), strict=True))


def vision_block_shapes(v: VisionConfig) -> Shapes:
    """One block of the image tower, names without `vision.blocks.i.`."""
    layer = v.norm == "layer"
    out = _norm("norm1", v.width, bias=layer) | _norm("norm2", v.width, bias=layer)
    if v.separate_qkv:
        out |= {f"attn.{kind}.weight": (v.width, v.width) for kind in "qkv"}
    else:
        out["attn.qkv.weight"] = (3 * v.width, v.width)
    if v.key_bias:
        out["attn.qkv.bias"] = (3 * v.width,)
    elif v.qkv_bias:
        out |= {"attn.bias.q": (v.width,), "attn.bias.v": (v.width,)}
    if v.attention_norm:
        out |= _norm("attn.norm", v.width)
    if v.qk_norm:
        out |= _norm("attn.q_norm", v.width, bias=False) | _norm("attn.k_norm", v.width, bias=False)
    if v.layer_scale is not None:
        out |= {"scale1.gain": (v.width,), "scale2.gain": (v.width,)}
    out |= _linear("attn.proj", v.width, v.width)
    if v.mlp != "swiglu":
        return out | _linear("mlp.fc1", v.mlp_hidden, v.width) | _linear("mlp.fc2", v.width, v.mlp_hidden)
    out |= _linear("mlp.gate", v.mlp_hidden, v.width) | _linear("mlp.up", v.mlp_hidden, v.width)
    out |= _linear("mlp.down", v.width, v.mlp_hidden)
    return out | _norm("mlp.norm", v.mlp_hidden) if v.mlp_norm else out


def text_block_shapes(t: TextConfig) -> Shapes:
    """One block of the caption tower, names without `text.blocks.i.`."""
    layer = t.norm == "layer"
    out = _norm("norm1", t.width, bias=layer) | _norm("norm2", t.width, bias=layer)
    gated = t.mlp == "swiglu"
    linears = {
        "attn.qkv": (3 * t.width, t.width),
        "attn.proj": (t.width, t.width),
        **{f"mlp.{name}": (t.hidden, t.width) for name in (("gate", "up") if gated else ("fc1",))},
        "mlp.down" if gated else "mlp.fc2": (t.width, t.hidden),
    }
    for name, shape in linears.items():
        out |= _linear(name, *shape, bias=t.bias)
    return out


def _norm(name: str, width: int, bias: bool = True) -> Shapes:
    return {f"{name}.{leaf}": (width,) for leaf in (("weight", "bias") if bias else ("weight",))}


def _linear(name: str, out_width: int, in_width: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out_width, in_width)} | ({f"{name}.bias": (out_width,)} if bias else {})
