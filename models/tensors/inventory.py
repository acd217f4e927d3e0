"""Every logical tensor of a model and its shape, from its config alone: no module is built, no memory used.

Conversions compare files with this table. tests/models check it against the parameters of the built towers.
"""

from models.config import ModelConfig, TextConfig, VisionConfig

Shapes = dict[str, tuple[int, ...]]
MIM_TENSORS = ("vision.embed.mask_token", "vision.head.prediction.weight", "vision.head.prediction.bias")
"""Of masked-image-modelling students (models/towers/mim.py), beside the vision tower without its projection."""


def clip_shapes(model: ModelConfig) -> Shapes:
    """A CLIP dual encoder with its logit scale."""
    return vision_shapes(model) | text_shapes(model) | {"logit_scale.log_scale": (1,)}


def vision_shapes(model: ModelConfig, head: bool = True) -> Shapes:
    """The image tower, with or without the projection to the shared space."""
    v = model.vision
    out: Shapes = {
        "vision.embed.weight": (v.width, 3 * v.patch_size**2),
        "vision.embed.bias": (v.width,),
        "vision.embed.cls_token": (v.width,),
        "vision.embed.pos_embed": (1 + v.patches, v.width),
    }
    for i in range(v.depth):
        out |= {f"vision.blocks.{i}.{name}": shape for name, shape in _vision_block(v).items()}
    out |= _norm("vision.head.norm", v.width, bias=v.norm == "layer")
    if head:
        out |= _linear("vision.head.projection", model.embed_dim, v.width, bias=v.head_bias)
    return out


def text_shapes(model: ModelConfig) -> Shapes:
    """The caption tower."""
    t = model.text
    out: Shapes = {
        "text.token_embedding": (t.vocab_size, t.width),
        "text.pos_embed": (t.context_length, t.width),
    }
    for i in range(t.depth):
        out |= {f"text.blocks.{i}.{name}": shape for name, shape in _text_block(t).items()}
    return out | _norm("text.norm", t.width) | {"text.projection.weight": (model.embed_dim, t.width)}


def mim_shapes(model: ModelConfig, target_width: int) -> Shapes:
    """What a MIM student has beside its trunk; target_width: of the teacher's features."""
    width = model.vision.width
    return dict(zip(MIM_TENSORS, ((width,), (target_width, width), (target_width,)), strict=True))


def _vision_block(v: VisionConfig) -> Shapes:
    layer = v.norm == "layer"
    out = _norm("norm1", v.width, bias=layer) | _norm("norm2", v.width, bias=layer)
    if v.separate_qkv:
        out |= {f"attn.{kind}.weight": (v.width, v.width) for kind in "qkv"}
    else:
        out["attn.qkv.weight"] = (3 * v.width, v.width)
    if v.qkv_bias:
        out |= {"attn.bias.q": (v.width,), "attn.bias.v": (v.width,)}
    if v.attention_norm:
        out |= _norm("attn.norm", v.width)
    out |= _linear("attn.proj", v.width, v.width)
    if v.mlp == "gelu":
        return out | _linear("mlp.fc1", v.mlp_hidden, v.width) | _linear("mlp.fc2", v.width, v.mlp_hidden)
    out |= _linear("mlp.gate", v.mlp_hidden, v.width) | _linear("mlp.up", v.mlp_hidden, v.width)
    out |= _linear("mlp.down", v.width, v.mlp_hidden)
    return out | _norm("mlp.norm", v.mlp_hidden) if v.mlp_norm else out


def _text_block(t: TextConfig) -> Shapes:
    out: Shapes = (
        _norm("norm1", t.width) | _linear("attn.qkv", 3 * t.width, t.width) | _linear("attn.proj", t.width, t.width)
    )
    out |= _norm("norm2", t.width)
    return out | _linear("mlp.fc1", 4 * t.width, t.width) | _linear("mlp.fc2", t.width, 4 * t.width)


def _norm(name: str, width: int, bias: bool = True) -> Shapes:
    return {f"{name}.{leaf}": (width,) for leaf in (("weight", "bias") if bias else ("weight",))}


def _linear(name: str, out_width: int, in_width: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out_width, in_width)} | ({f"{name}.bias": (out_width,)} if bias else {})
