"""config.json of a Hugging Face EVA-CLIP repository <-> ModelConfig.

Their class has defaults that are not known here, so sizes must be in the file, and every switch that shows in the
tensors is read off the tensors. What remains (post_layernorm, use_rope, epsilons) is false or the authors' value where
the file is silent, and a remark says so.
"""

from collections.abc import Set
from typing import Any

from models.clip import LEARNED_SCALE_INIT
from models.config import ModelConfig, ModelConfigError, TextConfig, VisionConfig
from models.formats.eva_config import eva_from_model

Json = dict[str, Any]

_VISION_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
)  # fmt: skip
_TEXT_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads")
AUTO_MAP = {"AutoConfig": "configuration_eva_clip.EvaClipConfig", "AutoModel": "modeling_eva_clip.EvaClipModel"}
"""Where transformers finds the classes of a folder, with trust_remote_code."""
_SILENT = {"post_layernorm": False, "use_rope": False, "layer_norm_eps": 1e-6}
_BLOCK = "vision_model.encoder.layers.0."


def model_from_hf(config: Json, names: Set[str]) -> tuple[ModelConfig, list[str]]:
    """(model, remarks) from config.json and the names of the tensors beside it. Raises ModelConfigError."""
    v, t = config.get("vision_config", {}), config.get("text_config", {})
    _require_sizes(config, v, t)
    for section, part in (("vision_config", v), ("text_config", t)):
        if part.get("hidden_act", "gelu") != "gelu":
            raise ModelConfigError(f"{section}.hidden_act is {part['hidden_act']!r}: the towers here use exact GELU")
    if t.get("intermediate_size", 4 * t["hidden_size"]) != 4 * t["hidden_size"]:
        raise ModelConfigError(f"text_config.intermediate_size {t['intermediate_size']} is not 4 x {t['hidden_size']}")
    remarks = [f"vision_config.{key} is not in config.json: taken as {_SILENT[key]}" for key in _SILENT if key not in v]
    text = TextConfig(
        context_length=t.get("max_position_embeddings", 77),
        vocab_size=t.get("vocab_size", 49408),
        width=t["hidden_size"],
        depth=t["num_hidden_layers"],
        heads=t["num_attention_heads"],
        norm_eps=t.get("layer_norm_eps", 1e-5),
    )
    model = ModelConfig(embed_dim=config["projection_dim"], vision=_vision(v, names), text=text)
    model.check()
    return model, remarks


def _vision(v: Json, names: Set[str]) -> VisionConfig:
    sub_ln = f"{_BLOCK}self_attn.inner_attn_ln.weight" in names
    switches = _SILENT | v
    return VisionConfig(
        image_size=v["image_size"],
        patch_size=v["patch_size"],
        depth=v["num_hidden_layers"],
        width=v["hidden_size"],
        head_width=v["hidden_size"] // v["num_attention_heads"],
        mlp_hidden=v["intermediate_size"],
        norm="layer" if f"{_BLOCK}layer_norm1.bias" in names else "rms",
        norm_eps=switches["layer_norm_eps"],
        post_norm=bool(switches["post_layernorm"]),
        qkv_bias=f"{_BLOCK}self_attn.q_proj.bias" in names,
        separate_qkv=sub_ln,
        attention_norm=sub_ln,
        mlp="swiglu" if f"{_BLOCK}mlp.fc3.weight" in names else "gelu",
        mlp_norm=f"{_BLOCK}mlp.ffn_ln.weight" in names,
        rope=bool(switches["use_rope"]),
        rope_grid=v.get("pretrained_seq_len", 16),
        head_bias="visual_projection.bias" in names,
    )


def _require_sizes(config: Json, v: Json, t: Json) -> None:
    missing = [f"vision_config.{key}" for key in _VISION_SIZES if key not in v]
    missing += [f"text_config.{key}" for key in _TEXT_SIZES if key not in t]
    missing += [] if "projection_dim" in config else ["projection_dim"]
    if missing:
        raise ModelConfigError(f"config.json lacks {', '.join(missing)}: give the model with --config or --model")


def hf_from_model(model: ModelConfig, log_scale: float | None) -> Json:
    """config.json of the Hugging Face layout; log_scale: what logit_scale is in the file, None where it has none."""
    eva_from_model(model)  # raises for parts that their class has not
    v, t = model.vision, model.text
    vision = {
        "hidden_size": v.width, "intermediate_size": v.mlp_hidden, "num_hidden_layers": v.depth,
        "num_attention_heads": v.heads, "image_size": v.image_size, "patch_size": v.patch_size, "num_channels": 3,
        "hidden_act": "gelu", "layer_norm_eps": v.norm_eps, "q_bias": v.qkv_bias, "k_bias": False,
        "v_bias": v.qkv_bias, "post_layernorm": v.post_norm, "use_rms_norm": v.norm == "rms",
        "use_sub_ln": v.attention_norm, "use_swiglu_mlp": v.mlp == "swiglu", "use_rope": v.rope,
        "pretrained_seq_len": v.rope_grid, "rope_theta": 10000,
    }  # fmt: skip
    text = {
        "hidden_size": t.width, "intermediate_size": 4 * t.width, "num_hidden_layers": t.depth,
        "num_attention_heads": t.heads, "max_position_embeddings": t.context_length, "vocab_size": t.vocab_size,
        "hidden_act": "gelu", "layer_norm_eps": t.norm_eps, "q_bias": True, "k_bias": True, "v_bias": True,
    }  # fmt: skip
    scale = LEARNED_SCALE_INIT if log_scale is None else log_scale
    return {
        "architectures": ["EvaClipModel"], "auto_map": AUTO_MAP, "model_type": "clip",
        "projection_dim": model.embed_dim, "logit_scale_init_value": scale, "vision_config": vision,
        "text_config": text,
    }  # fmt: skip
