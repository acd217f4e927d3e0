"""Layouts that EVA-CLIP checkpoints come in, as pure functions between them and logical tensors.

The authors' layout (models/formats/eva_names.py) is the pivot: the Hugging Face and open_clip layouts are described by
how they rename, cut or turn the authors' tensors.
"""

from collections.abc import Collection

from models.config import ModelConfig
from models.formats.authors import AUTHORS
from models.formats.base import Layout
from models.formats.huggingface import HUGGINGFACE
from models.formats.open_clip import open_clip_layout

LAYOUTS = ("eva", "hf", "openclip")
"""The names that tools.convert takes."""


def layout_of(name: str, model: ModelConfig) -> Layout:
    """The layout called `name` for a model."""
    if name == "openclip":
        return open_clip_layout(model.vision.separate_qkv)
    return {"eva": AUTHORS, "hf": HUGGINGFACE}[name]


def recognised(names: Collection[str]) -> str | None:
    """The layout whose image tower these names are of, None for none of them."""
    present = set(names)
    layouts = {"eva": AUTHORS, "hf": HUGGINGFACE, "openclip": open_clip_layout(True)}
    return next((name for name, layout in layouts.items() if present & set(layout.names("visual.cls_token"))), None)
