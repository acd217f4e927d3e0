"""open_clip's model json of its own ViT, SigLIP and PE <-> ModelConfig; what cannot be expressed is refused.

The json omits what equals a default of open_clip's CLIPVisionCfg and CLIPTextCfg (model.py), so those defaults are part
of the format. Image towers of SigLIP and Perception Encoder are timm models, known by their names (timm's
vision_transformer.py, eva.py).
"""

from dataclasses import replace
from typing import Any

from models.config import ModelConfig, ModelConfigError, TextConfig, VisionConfig

Json = dict[str, Any]

_VISION: Json = {
    "layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224,
    "no_ln_pre": False, "pool_type": "tok", "act_kwargs": None, "norm_kwargs": None,
}  # fmt: skip
_TEXT: Json = {
    "context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0,
    "no_causal_mask": False, "pool_type": "argmax", "proj_bias": False, "act_kwargs": None, "norm_kwargs": None,
}  # fmt: skip
_OFF: Json = {
    "ls_init_value": (None,), "attentional_pool": (False,), "pos_embed_type": ("learnable",),
    "timm_model_name": (None,),
    "final_ln_after_pool": (False,), "output_tokens": (False,), "block_type": (None, "default"), "qk_norm": (False,),
    "scaled_cosine_attn": (False,), "scale_heads": (False,), "scale_attn_inner": (False,), "scale_attn": (False,),
    "scale_fc": (False,), "embed_cls": (False,), "proj_type": ("linear",), "hf_model_name": (None,),
}  # fmt: skip
"""Switches of models that this project does not build, with the values that leave them off."""
_IDLE = {
    "patch_dropout", "attn_pooler_queries", "attn_pooler_heads", "timm_model_pretrained", "timm_pool", "timm_proj",
    "timm_proj_bias", "timm_drop", "timm_drop_path", "pad_id", "eos_id", "hf_tokenizer_name", "tokenizer_mode",
    "tokenizer_kwargs", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type",
}  # fmt: skip
"""Keys that belong to training, to the tokenizer, or to what `_OFF` switches off."""
_TOP = {"embed_dim", "quick_gelu", "custom_text", "init_logit_bias", "init_logit_scale", "vision_cfg", "text_cfg"}
_POOLS = {"tok": "class", "avg": "mean"}
_TEXT_POOLS = {"argmax": "end", "last": "last", "first": "first"}
_SIGLIP_TOWERS: Json = {
    "vit_base_": {"width": 768, "depth": 12, "head_width": 64, "mlp_hidden": 3072},
    "vit_large_": {"width": 1024, "depth": 24, "head_width": 64, "mlp_hidden": 4096},
    "vit_so400m_": {"width": 1152, "depth": 27, "head_width": 72, "mlp_hidden": 4304},
    "vit_giantopt_": {"width": 1536, "depth": 40, "head_width": 96, "mlp_hidden": 6144, "mlp": "gelu_tanh"},
}
"""Begin of a timm model's name -> its tower; sizes of patch and image are in the rest of the name."""
_PE_TOWERS: Json = {
    "vit_pe_core_tiny_": {"width": 192, "depth": 12, "head_width": 64, "mlp_hidden": 768, "rope_grid": 24},
    "vit_pe_core_small_": {"width": 384, "depth": 12, "head_width": 64, "mlp_hidden": 1536, "rope_grid": 24},
    "vit_pe_core_base_": {"width": 768, "depth": 12, "head_width": 64, "mlp_hidden": 3072, "rope_grid": 14},
    "vit_pe_core_large_": {"width": 1024, "depth": 24, "head_width": 64, "mlp_hidden": 4096, "rope_grid": 24},
    "vit_pe_core_gigantic_": {"width": 1536, "depth": 50, "head_width": 96, "mlp_hidden": 8960, "rope_grid": 32,
                              "class_token": False, "pool_mlp_hidden": 6144},
}  # fmt: skip
"""The same of Perception Encoder."""
_PE: Json = {
    "norm": "layer", "norm_eps": 1e-5, "embed_norm": True, "qkv_bias": True, "key_bias": True, "patch_bias": False,
    "rope": True, "rope_kind": "pe", "pool": "attention", "pool_heads": 8, "head_bias": True,
    "pixel_norm": "half",
}  # fmt: skip
"""What all of them share in timm, whose projection has a bias (zero where Meta's weights were read)."""


def is_open_clip(config: Json) -> bool:
    """Whether a model json is of open_clip's own ViT, of SigLIP or PE, rather than of the EVA authors."""
    vision = config.get("vision_cfg", {})
    name = vision.get("timm_model_name")
    eva = {"eva_model_name", "qkv_bias", "postnorm", "use_rms_norm", "rope", "naiveswiglu", "subln"}
    return "_siglip_" in name or name.startswith("vit_pe_") if name else not eva & vision.keys()


def model_from_open_clip(config: Json) -> ModelConfig:
    """open_clip's model json -> model. Raises ModelConfigError."""
    unknown = sorted(config.keys() - _TOP)
    if unknown or "embed_dim" not in config:
        raise ModelConfigError(f"not an open_clip model config: {', '.join(unknown) or 'it has no embed_dim'}")
    gelu = "quick_gelu" if config.get("quick_gelu") else "gelu"
    vision = config.get("vision_cfg", {})
    timm = vision.get("timm_model_name")
    if timm:
        tower = _pe(timm, vision) if timm.startswith("vit_pe_") else _siglip(timm, vision)
    else:
        tower = _vision(_settings(vision, _VISION, "vision_cfg"), gelu)
    text = _text(_settings(config.get("text_cfg", {}), _TEXT, "text_cfg"), gelu)
    model = ModelConfig(embed_dim=config["embed_dim"], vision=tower, text=text)
    model.check()
    return model


def _settings(given: Json, defaults: Json, section: str) -> Json:
    unknown = sorted(given.keys() - defaults.keys() - _OFF.keys() - _IDLE)
    if unknown:
        raise ModelConfigError(f"{section} has switches that this project does not know: {', '.join(unknown)}")
    for key, allowed in _OFF.items():
        if key in given and given[key] not in allowed:
            raise ModelConfigError(f"{section}.{key} is {given[key]!r}: this project builds no such model")
    return {key: given.get(key, default) for key, default in defaults.items()}


def _one_of(value: Any, table: Json, name: str) -> Any:
    if value not in table:
        raise ModelConfigError(f"{name} is {value!r}: this project builds {', '.join(table)}")
    return table[value]


def _activation(gelu: str, kwargs: Json | None, section: str) -> str:
    if not kwargs:
        return gelu
    if kwargs != {"approximate": "tanh"} or gelu != "gelu":
        raise ModelConfigError(
            f"{section}.act_kwargs is {kwargs}: this project builds {{'approximate': 'tanh'}} on GELU"
        )
    return "gelu_tanh"


def _eps(kwargs: Json | None, section: str) -> float:
    if (kwargs or {}).keys() - {"eps"}:
        raise ModelConfigError(f"{section}.norm_kwargs is {kwargs}: this project knows eps")
    return (kwargs or {}).get("eps", 1e-5)


def _vision(v: Json, gelu: str) -> VisionConfig:
    return VisionConfig(
        image_size=v["image_size"],
        patch_size=v["patch_size"],
        depth=v["layers"],
        width=v["width"],
        head_width=v["head_width"],
        mlp_hidden=int(v["width"] * v["mlp_ratio"]),
        norm="layer",
        norm_eps=_eps(v["norm_kwargs"], "vision_cfg"),
        embed_norm=not v["no_ln_pre"],
        qkv_bias=True,
        key_bias=True,
        mlp=_activation(gelu, v["act_kwargs"], "vision_cfg"),
        patch_bias=False,
        pool=_one_of(v["pool_type"], _POOLS, "vision_cfg.pool_type"),
    )


def _siglip(timm: str, given: Json) -> VisionConfig:
    begin = next((begin for begin in _SIGLIP_TOWERS if timm.startswith(begin)), None)
    if begin is None or (given.get("timm_pool"), given.get("timm_proj")) != ("map", "none"):
        raise _no_timm(timm, given)
    patch, _, size = timm.removeprefix(begin).removeprefix("patch").partition("_siglip_")
    return VisionConfig(
        image_size=given.get("image_size", int(size)),
        patch_size=int(patch),
        norm="layer",
        qkv_bias=True,
        key_bias=True,
        class_token=False,
        pool="attention",
        projection=False,
        pixel_norm="half",
        **_SIGLIP_TOWERS[begin],
    )


def _pe(timm: str, given: Json) -> VisionConfig:
    begin = next((begin for begin in _PE_TOWERS if timm.startswith(begin)), None)
    if begin is None or given.get("timm_pool") != "map" or given.get("timm_proj"):
        raise _no_timm(timm, given)
    patch, _, size = timm.removeprefix(begin).removeprefix("patch").partition("_")
    return VisionConfig(
        image_size=given.get("image_size", int(size)), patch_size=int(patch), **(_PE | _PE_TOWERS[begin])
    )


def _no_timm(timm: str, given: Json) -> ModelConfigError:
    return ModelConfigError(
        f"vision_cfg.timm_model_name {timm!r} with timm_pool {given.get('timm_pool')!r} and timm_proj "
        f"{given.get('timm_proj')!r}: of timm's models this project builds SigLIP's (map, none), Perception Encoder "
        "Core's (map, null) and EVA's"
    )


def _text(t: Json, gelu: str) -> TextConfig:
    hidden = int(t["width"] * t["mlp_ratio"])
    return TextConfig(
        context_length=t["context_length"],
        vocab_size=t["vocab_size"],
        width=t["width"],
        depth=t["layers"],
        heads=t["heads"],
        mlp=_activation(gelu, t["act_kwargs"], "text_cfg"),
        mlp_hidden=None if hidden == 4 * t["width"] else hidden,
        norm_eps=_eps(t["norm_kwargs"], "text_cfg"),
        causal=not t["no_causal_mask"],
        pool=_one_of(t["pool_type"], _TEXT_POOLS, "text_cfg.pool_type"),
        head_bias=t["proj_bias"],
    )


def open_clip_from_model(model: ModelConfig) -> Json:
    """The inverse of `model_from_open_clip`. Raises ModelConfigError for a model that open_clip cannot build."""
    v, t = model.vision, model.text
    gelu = "quick_gelu" if "quick_gelu" in (v.mlp, t.mlp) else "gelu"
    out: Json = {"embed_dim": model.embed_dim}
    if gelu == "quick_gelu":
        out["quick_gelu"] = True
    if v.rope_kind == "pe":
        v = replace(v, head_bias=True)  # the file gets a bias of zeros (models/formats/open_clip.py)
        out |= {"custom_text": True, "vision_cfg": _json_of_pe(v)}
    elif v.pool == "attention":
        out |= {"init_logit_bias": -10, "custom_text": True, "vision_cfg": _json_of_siglip(v)}
    else:
        out["vision_cfg"] = _json_of_vision(v, gelu)
    out["text_cfg"] = _json_of_text(t, gelu)
    back = model_from_open_clip(out)
    back = replace(back, vision=replace(back.vision, pixel_norm=v.pixel_norm))  # pixels are of another file
    if back.vision != v or back.text != t:
        other = {
            f"{part}.{key}": value
            for part, ours in (("vision", v), ("text", t))
            for key, value in vars(ours).items()
            if vars(getattr(back, part))[key] != value
        }
        said = ", ".join(f"{key}={value}" for key, value in other.items())
        raise ModelConfigError(f"open_clip builds no such model: model.{said}")
    return out


def _json_of_vision(v: VisionConfig, gelu: str) -> Json:
    out: Json = {
        "image_size": v.image_size, "layers": v.depth, "width": v.width, "head_width": v.head_width,
        "patch_size": v.patch_size,
    }  # fmt: skip
    if v.mlp_hidden != 4 * v.width:
        out["mlp_ratio"] = ratio(v.mlp_hidden, v.width)
    if not v.embed_norm:
        out["no_ln_pre"] = True
    if v.pool == "mean":
        out["pool_type"] = "avg"
    return out | _json_of_kwargs(v.mlp, v.norm_eps, gelu)


def _json_of_siglip(v: VisionConfig) -> Json:
    for begin, tower in _SIGLIP_TOWERS.items():
        if replace(v, **tower) == v and v.mlp == tower.get("mlp", "gelu"):
            name = f"{begin}patch{v.patch_size}_siglip_{v.image_size}"
            sizes: Json = {"image_size": v.image_size, "timm_model_name": name, "timm_model_pretrained": False}
            return sizes | {"timm_pool": "map", "timm_proj": "none"}
    raise ModelConfigError(f"timm has no SigLIP tower of width {v.width}, depth {v.depth} and {v.mlp}")


def _json_of_pe(v: VisionConfig) -> Json:
    for begin, tower in _PE_TOWERS.items():
        if replace(v, **tower) == v:
            size = tower["rope_grid"] * v.patch_size  # at which it was trained
            name = f"{begin}patch{v.patch_size}_{size}"
            sizes: Json = {"image_size": v.image_size, "timm_model_name": name, "timm_model_pretrained": False}
            return sizes | {"timm_pool": "map", "timm_proj": None}
    raise ModelConfigError(f"timm has no Perception Encoder of width {v.width} and depth {v.depth}")


def _json_of_text(t: TextConfig, gelu: str) -> Json:
    out: Json = {
        "context_length": t.context_length, "vocab_size": t.vocab_size, "width": t.width, "heads": t.heads,
        "layers": t.depth,
    }  # fmt: skip
    if t.hidden != 4 * t.width:
        out["mlp_ratio"] = ratio(t.hidden, t.width)
    if not t.causal:
        out["no_causal_mask"] = True
    if t.pool in ("last", "first"):
        out["pool_type"] = t.pool
    if t.head_bias:
        out["proj_bias"] = True
    return out | _json_of_kwargs(t.mlp, t.norm_eps, gelu)


def _json_of_kwargs(mlp: str, eps: float, gelu: str) -> Json:
    out: Json = {"act_kwargs": {"approximate": "tanh"}} if mlp == "gelu_tanh" and gelu == "gelu" else {}
    return out | ({} if eps == 1e-5 else {"norm_kwargs": {"eps": eps}})


def ratio(hidden: int, width: int) -> float:
    """A ratio that gives `hidden` back through int(width * ratio)."""
    exact = hidden / width
    return exact if int(width * exact) == hidden else (hidden + 0.5) / width
