"""config.json of DINOv3ViTModel and of InternViT's folders <-> ModelConfig; defaults are those of their classes.

Such a folder has no caption tower: the model's is the default one, and its features are the tower's own class token,
so that a folder can be embedded as it is. A job that trains it names its own projection and captions.
"""

from typing import Any

from models.config import ModelConfig, ModelConfigError, VisionConfig

Json = dict[str, Any]

_DINOV3: Json = {
    "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6, "patch_size": 16,
    "image_size": 224, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "rope_theta": 100.0, "query_bias": True,
    "key_bias": False, "value_bias": True, "proj_bias": True, "mlp_bias": True, "layerscale_value": 1.0,
    "use_gated_mlp": False, "num_register_tokens": 0,
}  # fmt: skip
_INTERNVIT: Json = {
    "hidden_size": 3200, "intermediate_size": 12800, "num_hidden_layers": 48, "num_attention_heads": 25,
    "patch_size": 14, "image_size": 224, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": False,
    "qk_normalization": True, "norm_type": "rms_norm", "initializer_factor": 0.1,
}  # fmt: skip
_DEFAULTS = {"dinov3_vit": _DINOV3, "intern_vit_6b": _INTERNVIT}
_ONLY: dict[str, Json] = {
    "dinov3_vit": {"key_bias": False, "proj_bias": True, "mlp_bias": True, "rope_theta": 100.0},
    "intern_vit_6b": {"hidden_act": "gelu", "qkv_bias": False, "qk_normalization": True, "norm_type": "rms_norm"},
}
"""Switches of models that are not built here, with the values that are."""


def is_image_tower(config: Json) -> bool:
    """Whether a config.json is of such a folder."""
    return config.get("model_type") in _DEFAULTS


def model_from_image_tower(config: Json) -> ModelConfig:
    """config.json -> model. Raises ModelConfigError for a switch that is not built, by its name."""
    kind = config["model_type"]
    c = _DEFAULTS[kind] | {key: config[key] for key in _DEFAULTS[kind] if key in config}
    for key, value in _ONLY[kind].items():
        if c[key] != value:
            raise ModelConfigError(f"config.json: {key} is {c[key]!r}: of {kind} models those with {value!r} are built")
    sizes: Json = {
        "image_size": c["image_size"], "patch_size": c["patch_size"], "depth": c["num_hidden_layers"],
        "width": c["hidden_size"], "head_width": c["hidden_size"] // c["num_attention_heads"],
        "mlp_hidden": c["intermediate_size"], "norm_eps": c["layer_norm_eps"], "projection": False,
    }  # fmt: skip
    vision = VisionConfig(**sizes, **(_of_dinov3(c) if kind == "dinov3_vit" else _of_internvit(c)))
    model = ModelConfig(embed_dim=vision.width, vision=vision)
    model.check()
    return model


def _of_dinov3(c: Json) -> Json:
    if c["query_bias"] != c["value_bias"]:
        raise ModelConfigError("config.json: query_bias and value_bias differ: the towers here have both or none")
    if c["hidden_act"] != ("silu" if c["use_gated_mlp"] else "gelu"):
        raise ModelConfigError(
            f"config.json: hidden_act is {c['hidden_act']!r} with use_gated_mlp {c['use_gated_mlp']}: silu gates and "
            "gelu does not, here"
        )
    return {
        "norm": "layer", "qkv_bias": c["query_bias"], "mlp": "swiglu" if c["use_gated_mlp"] else "gelu", "rope": True,
        "rope_kind": "dinov3", "layer_scale": c["layerscale_value"], "registers": c["num_register_tokens"],
        "pos_embed": False, "pixel_norm": "imagenet",
    }  # fmt: skip


def _of_internvit(c: Json) -> Json:
    return {
        "norm": "rms", "qk_norm": True, "layer_scale": c["initializer_factor"], "final_norm": False,
        "pixel_norm": "imagenet",
    }  # fmt: skip


def image_tower_from_model(model: ModelConfig, kind: str) -> Json:
    """The inverse; kind: dinov3 | internvit. Raises ModelConfigError for a tower that its class cannot build."""
    v = model.vision
    out: Json = {
        "model_type": "dinov3_vit", "architectures": ["DINOv3ViTModel"], "query_bias": v.qkv_bias,
        "value_bias": v.qkv_bias, "layerscale_value": v.layer_scale, "use_gated_mlp": v.mlp == "swiglu",
        "hidden_act": "silu" if v.mlp == "swiglu" else "gelu", "num_register_tokens": v.registers,
    }  # fmt: skip
    if kind == "internvit":
        out = {
            "model_type": "intern_vit_6b", "architectures": ["InternVisionModel"], "initializer_factor": v.layer_scale,
            "auto_map": {"AutoConfig": "configuration_intern_vit.InternVisionConfig",
                         "AutoModel": "modeling_intern_vit.InternVisionModel"},
        }  # fmt: skip
    out |= {
        "hidden_size": v.width, "intermediate_size": v.mlp_hidden, "num_hidden_layers": v.depth,
        "num_attention_heads": v.heads, "image_size": v.image_size, "patch_size": v.patch_size, "num_channels": 3,
        "layer_norm_eps": v.norm_eps,
    }  # fmt: skip
    out = _DEFAULTS[out["model_type"]] | out
    back = model_from_image_tower(out).vision
    own = ("projection", "head_bias", "pool", "pixel_norm")  # of the head, which stays behind, and of another file
    other = {key: value for key, value in vars(v).items() if key not in own and value != getattr(back, key)}
    if other:
        said = ", ".join(f"model.vision.{key}={value}" for key, value in other.items())
        raise ModelConfigError(f"{out['architectures'][0]} builds no such tower: {said}")
    return out
