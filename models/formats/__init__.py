"""Layouts that checkpoints of CLIP models come in, as pure functions between them and logical tensors.

The authors' layout (models/formats/eva_names.py) is the pivot: the Hugging Face and open_clip layouts are described by
how they rename, cut or turn the authors' tensors.
"""

from collections.abc import Collection

from models.config import ModelConfig, ModelConfigError
from models.formats.authors import AUTHORS
from models.formats.base import ANCHOR, Layout
from models.formats.huggingface import HUGGINGFACE, SIGLIP
from models.formats.open_clip import OPEN_CLIP_VIT, TIMM_SIGLIP, open_clip_layout

LAYOUTS = ("eva", "hf", "openclip")
"""The names that tools.convert takes."""


def layout_of(name: str, model: ModelConfig) -> Layout:
    """The layout called `name` for a model. Raises ModelConfigError where that project has no such model."""
    kind = family(model)
    layouts: dict[str, dict[str, Layout]] = {
        "eva": {"eva": AUTHORS},
        "openclip": {
            "eva": open_clip_layout(model.vision.separate_qkv), "clip": OPEN_CLIP_VIT, "siglip": TIMM_SIGLIP,
        },
        "hf": {"eva": HUGGINGFACE, "clip": HUGGINGFACE, "siglip": SIGLIP},
    }  # fmt: skip
    if kind not in layouts[name]:
        raise ModelConfigError(f"the {name} layout has no place for a {kind} model: take openclip or hf")
    return layouts[name][kind]


def family(model: ModelConfig) -> str:
    """Whose parts a model is made of: eva | clip (OpenAI, open_clip) | siglip."""
    if model.vision.pool == "attention":
        return "siglip"
    return "clip" if model.vision.embed_norm else "eva"


def recognised(names: Collection[str]) -> str | None:
    """The layout whose image tower these names are of, None for none of them."""
    present = set(names)
    layouts: dict[str, tuple[Layout, ...]] = {
        "eva": (AUTHORS,),
        "hf": (HUGGINGFACE,),
        "openclip": (open_clip_layout(True), OPEN_CLIP_VIT),
    }
    anchors = {name: {anchor for layout in some for anchor in layout.names(ANCHOR)} for name, some in layouts.items()}
    return next((name for name, anchor in anchors.items() if present & anchor), None)
