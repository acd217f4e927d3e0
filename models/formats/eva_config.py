"""The authors' model json <-> ModelConfig, switch by switch; what cannot be expressed is refused, not dropped.

The authors' json omits what equals a default of their dataclasses (eva_clip/model.py: qkv_bias true, head_width 64,
mlp_ratio 4, layers 12, …), so those defaults are part of the format.
"""

from typing import Any

from models.config import ModelConfig, ModelConfigError, TextConfig, VisionConfig
from models.formats.open_clip_config import ratio

Json = dict[str, Any]

_VISION_DEFAULTS: Json = {
    "layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224,
    "qkv_bias": True, "postnorm": False, "use_rms_norm": False, "rope": False, "pt_hw_seq_len": 16, "intp_freq": False,
    "naiveswiglu": False, "subln": False,
}  # fmt: skip
_TEXT_DEFAULTS: Json = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
_NO_EFFECT = {"eva_model_name", "xattn", "fusedLN"}
"""Names and kernels: the same mathematics."""
_ONLY_AS = {
    "ls_init_value": (None, 0),
    "global_average_pool": (False,),
    "timm_model_name": (None,),
    "timm_model_pretrained": (False, None),
    "hf_model_name": (None,),
    "hf_tokenizer_name": (None,),
}
"""Switches of models that this project does not build, with the values that leave them off."""
_NOT_EVA = (
    "embed_norm", "key_bias", "patch_bias", "class_token", "pool", "projection", "rope_kind", "qk_norm", "layer_scale",
    "registers", "pos_embed", "final_norm",
)  # fmt: skip
_NOT_EVA_TEXT = ("mlp", "mlp_hidden", "causal", "pool", "head_bias", "norm", "bias", "rope", "pos_embed")
"""Parts of other families (models/config.py), all off in theirs."""
_TRAINING_ONLY = {"drop_path_rate", "patch_dropout"}


def model_from_eva(config: Json) -> tuple[ModelConfig, list[str]]:
    """The authors' model json -> (model, remarks on what has no place in a model). Raises ModelConfigError."""
    remarks: list[str] = []
    _refuse_unknown(config, {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"}, "the config")
    if config.get("quick_gelu"):
        raise ModelConfigError("quick_gelu is true: no EVA-CLIP was trained with it and the towers here use exact GELU")
    vision = _settings(config.get("vision_cfg", {}), _VISION_DEFAULTS, "vision_cfg", remarks)
    text = _settings(config.get("text_cfg", {}), _TEXT_DEFAULTS, "text_cfg", remarks)
    if "embed_dim" not in config:
        raise ModelConfigError("the config has no embed_dim: it is not an EVA-CLIP model config")
    model = ModelConfig(embed_dim=config["embed_dim"], vision=_vision(vision), text=_text(text))
    model.check()
    if vision["rope"] and not vision["intp_freq"] and model.vision.grid != vision["pt_hw_seq_len"]:
        raise ModelConfigError(
            f"rope without intp_freq has a table for a grid of {vision['pt_hw_seq_len']}, the image has a grid of "
            f"{model.vision.grid}"
        )
    return model, remarks


def _vision(v: Json) -> VisionConfig:
    return VisionConfig(
        image_size=v["image_size"],
        patch_size=v["patch_size"],
        depth=v["layers"],
        width=v["width"],
        head_width=v["head_width"],
        mlp_hidden=int(v["width"] * v["mlp_ratio"]),
        norm="rms" if v["use_rms_norm"] else "layer",
        post_norm=v["postnorm"],
        qkv_bias=v["qkv_bias"],
        separate_qkv=v["subln"],
        attention_norm=v["subln"],
        mlp="swiglu" if v["naiveswiglu"] else "gelu",
        mlp_norm=v["subln"],
        rope=v["rope"],
        rope_grid=v["pt_hw_seq_len"],
        head_bias=v["qkv_bias"],
    )


def _text(t: Json) -> TextConfig:
    return TextConfig(
        context_length=t["context_length"],
        vocab_size=t["vocab_size"],
        width=t["width"],
        depth=t["layers"],
        heads=t["heads"],
    )


def _settings(given: Json, defaults: Json, section: str, remarks: list[str]) -> Json:
    _refuse_unknown(given, defaults.keys() | _NO_EFFECT | _ONLY_AS.keys() | _TRAINING_ONLY, section)
    for key, allowed in _ONLY_AS.items():
        if key in given and given[key] not in allowed:
            raise ModelConfigError(f"{section}.{key} is {given[key]!r}: this project builds no such model")
    remarks += [
        f"{section}.{key} {given[key]} belongs to training, not to the model: set it in the training config"
        for key in sorted(_TRAINING_ONLY & given.keys())
        if given[key]
    ]
    return {key: given.get(key, default) for key, default in defaults.items()}


def _refuse_unknown(given: Json, known: set[str], where: str) -> None:
    unknown = sorted(given.keys() - known)
    if unknown:
        raise ModelConfigError(f"{where} has switches that this project does not know: {', '.join(unknown)}")


def eva_from_model(model: ModelConfig) -> Json:
    """The inverse of `model_from_eva`. Raises ModelConfigError for a model that the authors' code cannot build."""
    v, t = model.vision, model.text
    sub_ln = v.separate_qkv
    plain, plain_text = VisionConfig(), TextConfig()
    other = [f"vision.{key}={getattr(v, key)}" for key in _NOT_EVA if getattr(v, key) != getattr(plain, key)]
    other += [f"text.{key}={getattr(t, key)}" for key in _NOT_EVA_TEXT if getattr(t, key) != getattr(plain_text, key)]
    if other or v.mlp not in ("gelu", "swiglu"):
        raise ModelConfigError(f"the authors' code builds no such model: {', '.join(other) or f'vision.mlp={v.mlp}'}")
    if (v.attention_norm, v.mlp_norm, v.head_bias) != (sub_ln, sub_ln, v.qkv_bias):
        raise ModelConfigError(
            "the authors' code ties separate_qkv, attention_norm and mlp_norm to subln, and head_bias to qkv_bias; "
            "this model mixes them"
        )
    vision = {
        "image_size": v.image_size, "layers": v.depth, "width": v.width, "head_width": v.head_width,
        "mlp_ratio": ratio(v.mlp_hidden, v.width), "patch_size": v.patch_size, "qkv_bias": v.qkv_bias,
        "postnorm": v.post_norm, "use_rms_norm": v.norm == "rms", "naiveswiglu": v.mlp == "swiglu", "subln": sub_ln,
    }  # fmt: skip
    if v.rope:
        vision |= {"rope": True, "pt_hw_seq_len": v.rope_grid, "intp_freq": True}
    text = {
        "context_length": t.context_length, "vocab_size": t.vocab_size, "width": t.width, "heads": t.heads,
        "layers": t.depth,
    }  # fmt: skip
    return {"embed_dim": model.embed_dim, "vision_cfg": vision, "text_cfg": text}
