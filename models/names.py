"""Names that people know models by (open_clip, timm, the hub) -> presets of this project."""

from typing import Any

_QUICK_GELU: dict[str, Any] = {"vision": {"mlp": "quick_gelu"}, "text": {"mlp": "quick_gelu"}}
_SAME: dict[str, str] = {
    "eva02-b-16": "b16", "eva02-clip-b-16": "b16", "eva02-base-patch16-clip-224": "b16",
    "eva02-l-14": "l14", "eva02-clip-l-14": "l14", "eva02-large-patch14-clip-224": "l14",
    "eva02-l-14-336": "l14-336", "eva02-clip-l-14-336": "l14-336", "eva02-large-patch14-clip-336": "l14-336",
    "eva02-e-14": "e14", "eva02-enormous-patch14-clip-224": "e14",
    "eva02-e-14-plus": "e14-plus", "eva02-clip-bige-14-plus": "e14-plus",
    "eva-clip-8b": "8b", "eva-clip-8b-448": "8b-448", "eva-clip-8b-plus": "8b-448", "eva-clip-18b": "18b",
    "vit-b-32": "vit-b32", "vit-b-16": "vit-b16", "vit-l-14": "vit-l14", "vit-l-14-336": "vit-l14-336",
    "vit-h-14": "vit-h14", "vit-g-14": "vit-g14", "vit-bigg-14": "vit-bigg14",
    "vit-b-16-siglip2": "siglip2-b16", "siglip2-base-patch16-224": "siglip2-b16",
    "vit-l-16-siglip2-256": "siglip2-l16", "siglip2-large-patch16-256": "siglip2-l16",
    "vit-so400m-14-siglip2": "siglip2-so400m", "siglip2-so400m-patch14-224": "siglip2-so400m",
    "eva01-g-14": "eva01-g14", "eva01-clip-g-14": "eva01-g14", "eva-giant-patch14-clip-224": "eva01-g14",
    "eva-giant-patch14-224": "eva01-g14",
    "eva01-g-14-plus": "eva01-g14-plus", "eva01-clip-g-14-plus": "eva01-g14-plus",
    "pe-core-l-14-336": "pe-core-l14", "pe-core-l14-336": "pe-core-l14", "vit-pe-core-large-patch14-336": "pe-core-l14",
    "pe-core-bigg-14-448": "pe-core-g14", "pe-core-g14-448": "pe-core-g14",
    "vit-pe-core-gigantic-patch14-448": "pe-core-g14",
    "dinov3-vit7b16-pretrain-lvd1689m": "dinov3-7b", "vit-7b-patch16-dinov3": "dinov3-7b",
    "dinov3-vit7b16": "dinov3-7b",
    "internvit-6b-224px": "internvit-6b",
    "vit-gopt-16-siglip2-256": "siglip2-g16", "siglip2-giant-opt-patch16-256": "siglip2-g16",
}  # fmt: skip
_WITH_QUICK_GELU = {
    "clip-vit-base-patch32": "vit-b32", "clip-vit-base-patch16": "vit-b16", "clip-vit-large-patch14": "vit-l14",
    "clip-vit-large-patch14-336": "vit-l14-336",
    **{f"{name}-quickgelu": preset for name, preset in _SAME.items() if preset.startswith("vit-")},
}  # fmt: skip
"""OpenAI's models on the hub, and open_clip's names of models with its activation."""


def preset_of(name: str) -> tuple[str, dict[str, Any]] | None:
    """(preset, changes to it) of a public name; case, `_`, `/` and an owner do not matter. None: not known."""
    plain = name.lower().replace("_", "-")
    for spelled in (plain, plain.replace("/", "-"), plain.rpartition("/")[2]):
        if spelled in _SAME:
            return _SAME[spelled], {}
        if spelled in _WITH_QUICK_GELU:
            return _WITH_QUICK_GELU[spelled], _QUICK_GELU
    return None


def public_names() -> dict[str, list[str]]:
    """Preset -> its public names."""
    out: dict[str, list[str]] = {}
    for name, preset in (_SAME | _WITH_QUICK_GELU).items():
        out.setdefault(preset, []).append(name)
    return out
