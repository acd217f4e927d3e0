"""Layouts that checkpoints of CLIP models come in, as pure functions between them and logical tensors.

The authors' layout (models/formats/eva_names.py) is the pivot: the Hugging Face and open_clip layouts are described by
how they rename, cut or turn the authors' tensors.
"""

from collections.abc import Collection

from models.config import ModelConfig, ModelConfigError, TextConfig, VisionConfig
from models.formats.authors import AUTHORS
from models.formats.base import ANCHOR, Layout
from models.formats.huggingface import HUGGINGFACE, SIGLIP
from models.formats.image_towers import INTERNVIT, dinov3_layout
from models.formats.open_clip import OPEN_CLIP_VIT, OWN_PE, TIMM_PE, TIMM_SIGLIP, open_clip_layout

LAYOUTS = ("eva", "hf", "openclip", "original")
"""The names that tools.convert takes; original: that of the code of those who made the model."""


def layout_of(name: str, model: ModelConfig) -> Layout:
    """The layout called `name` for a model. Raises ModelConfigError where that project has no such model."""
    kind = family(model)
    if kind not in IMAGE_TOWERS and (parts := _own_text_parts(model.text)):
        raise ModelConfigError(f"the {name} layout has no caption tower with {', '.join(parts)}: take --to tower")
    layouts: dict[str, dict[str, Layout]] = {
        "eva": {"openclip": open_clip_layout(model.vision.separate_qkv), "eva": AUTHORS, "original": AUTHORS,
                "hf": HUGGINGFACE},
        "clip": {"openclip": OPEN_CLIP_VIT, "original": OPEN_CLIP_VIT, "hf": HUGGINGFACE},
        "siglip": {"openclip": TIMM_SIGLIP, "hf": SIGLIP},
        "pe": {"openclip": TIMM_PE, "original": OWN_PE},
        "dinov3": {"hf": dinov3_layout(model, original=False), "original": dinov3_layout(model, original=True)},
        "internvit": {"hf": INTERNVIT, "original": INTERNVIT},
    }  # fmt: skip
    if name not in layouts[kind]:
        there = " or ".join(layouts[kind])
        raise ModelConfigError(f"the {name} layout has no place for a {kind} model: take {there}")
    if kind == "pe" and name == "original" and model.vision.head_bias:
        raise ModelConfigError("Perception Encoder's own code has no bias behind its projection: take openclip")
    if kind == "dinov3" and name == "original" and model.vision.qkv_bias:
        raise ModelConfigError("DINOv3's own code masks a bias on k, which is none here: take hf")
    return layouts[kind][name]


IMAGE_TOWERS = ("dinov3", "internvit")
"""Families that are published without a caption tower."""


def _own_text_parts(text: TextConfig) -> list[str]:
    """Parts of a caption tower that no other project's layout names."""
    plain = TextConfig()
    own = {key: getattr(text, key) for key in ("norm", "bias", "rope", "pos_embed")}
    said = [f"text.{key}={value}" for key, value in own.items() if value != getattr(plain, key)]
    return said + (["text.mlp=swiglu"] if text.mlp == "swiglu" else [])


def family(model: ModelConfig) -> str:
    """Whose parts a model is made of: eva | clip (OpenAI, open_clip) | siglip | pe | dinov3 | internvit."""
    vision = model.vision
    if vision.rope_kind != "eva":
        return vision.rope_kind
    if vision.qk_norm or vision.layer_scale is not None:
        return "internvit"
    if vision.pool == "attention":
        return "siglip"
    return "clip" if vision.embed_norm else "eva"


def recognised(names: Collection[str]) -> str | None:
    """The layout whose image tower these names are of, None for none of them."""
    present = set(names)
    dinov3 = ModelConfig(vision=VisionConfig(rope=True, rope_kind="dinov3"))
    layouts: dict[str, tuple[Layout, ...]] = {
        "eva": (AUTHORS,),
        "hf": (HUGGINGFACE, INTERNVIT, dinov3_layout(dinov3, original=False)),
        "openclip": (open_clip_layout(True), OPEN_CLIP_VIT),
        "original": (dinov3_layout(dinov3, original=True),),
    }
    anchors = {name: {anchor for layout in some for anchor in layout.names(ANCHOR)} for name, some in layouts.items()}
    return next((name for name, anchor in anchors.items() if present & anchor), None)
