"""config.json of transformers' CLIPModel and SiglipModel <-> ModelConfig; defaults are those of their classes."""

from dataclasses import replace
from typing import Any

from models.clip import LEARNED_SCALE_INIT
from models.config import ModelConfig, ModelConfigError, TextConfig, VisionConfig

Json = dict[str, Any]

_ACTS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_CLIP: Json = {
    "vision": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    },
    "text": {
        "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
        "max_position_embeddings": 77, "vocab_size": 49408, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    },
}  # fmt: skip
_SIGLIP: Json = {
    "vision": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
    },
    "text": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "max_position_embeddings": 64, "vocab_size": 32000, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
    },
}  # fmt: skip
_TOKENS_OF_CLIP = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}


def model_from_transformers(config: Json, kind: str) -> ModelConfig:
    """config.json -> model; kind: clip (CLIPModel) or siglip (SiglipModel). Raises ModelConfigError."""
    defaults = _CLIP if kind == "clip" else _SIGLIP
    v, t = (defaults[part] | config.get(f"{part}_config", {}) for part in ("vision", "text"))
    for section, part in (("vision_config", v), ("text_config", t)):
        if part["hidden_act"] not in _ACTS:
            raise ModelConfigError(f"{section}.hidden_act is {part['hidden_act']!r}: {', '.join(_ACTS)} are built here")
    if kind == "clip":
        embed_dim, own, own_text = config.get("projection_dim", 512), _CLIP_VISION, {}
    else:
        embed_dim, own, own_text = t.get("projection_size", t["hidden_size"]), _SIGLIP_VISION, _SIGLIP_TEXT
        if v.get("vision_use_head") is False:
            raise ModelConfigError("vision_config.vision_use_head is false: SigLIP's tower has its head here")
    vision = VisionConfig(
        image_size=v["image_size"],
        patch_size=v["patch_size"],
        depth=v["num_hidden_layers"],
        width=v["hidden_size"],
        head_width=v["hidden_size"] // v["num_attention_heads"],
        mlp_hidden=v["intermediate_size"],
        norm="layer",
        norm_eps=v["layer_norm_eps"],
        qkv_bias=True,
        key_bias=True,
        mlp=_ACTS[v["hidden_act"]],
        **own,
    )
    text = TextConfig(
        context_length=t["max_position_embeddings"],
        vocab_size=t["vocab_size"],
        width=t["hidden_size"],
        depth=t["num_hidden_layers"],
        heads=t["num_attention_heads"],
        mlp=_ACTS[t["hidden_act"]],
        mlp_hidden=None if t["intermediate_size"] == 4 * t["hidden_size"] else t["intermediate_size"],
        norm_eps=t["layer_norm_eps"],
        **own_text,
    )
    model = ModelConfig(embed_dim=embed_dim, vision=vision, text=text)
    model.check()
    return model


_CLIP_VISION: Json = {"embed_norm": True, "patch_bias": False}
_SIGLIP_VISION: Json = {"class_token": False, "pool": "attention", "projection": False, "pixel_norm": "half"}
_SIGLIP_TEXT: Json = {"causal": False, "pool": "last", "head_bias": True}


def transformers_from_model(model: ModelConfig, kind: str, log_scale: float | None) -> Json:
    """The inverse of `model_from_transformers`. Raises ModelConfigError for a model that the class cannot build.

    log_scale: what logit_scale is in the file, None where it has none.
    """
    v, t = model.vision, model.text
    names = {ours: theirs for theirs, ours in _ACTS.items()}
    vision: Json = {
        "hidden_size": v.width, "intermediate_size": v.mlp_hidden, "num_hidden_layers": v.depth,
        "num_attention_heads": v.heads, "image_size": v.image_size, "patch_size": v.patch_size, "num_channels": 3,
        "hidden_act": names.get(v.mlp), "layer_norm_eps": v.norm_eps,
    }  # fmt: skip
    text: Json = {
        "hidden_size": t.width, "intermediate_size": t.hidden, "num_hidden_layers": t.depth,
        "num_attention_heads": t.heads, "max_position_embeddings": t.context_length, "vocab_size": t.vocab_size,
        "hidden_act": names.get(t.mlp), "layer_norm_eps": t.norm_eps,
    }  # fmt: skip
    if kind == "clip":
        scale = LEARNED_SCALE_INIT if log_scale is None else log_scale
        vision["projection_dim"] = text["projection_dim"] = model.embed_dim
        text |= _TOKENS_OF_CLIP if t.vocab_size == 49408 else {}
        out: Json = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": model.embed_dim,
                     "logit_scale_init_value": scale}  # fmt: skip
    else:
        text["projection_size"] = model.embed_dim
        out = {"architectures": ["SiglipModel"], "model_type": "siglip"}
    out |= {"vision_config": vision, "text_config": text}
    back = model_from_transformers(out, kind)
    if replace(back.vision, pixel_norm=v.pixel_norm) != v or back.text != t:  # pixels are of another file
        raise ModelConfigError(
            f"transformers' {out['architectures'][0]} builds no such model: use --to openclip or eva"
        )
    return out
