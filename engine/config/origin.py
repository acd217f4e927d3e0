"""Where the settings of a job come from, for people: a recipe's settings come along when its model does not."""

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any

from engine.config.schema import Config
from engine.config.tree import Given, load_preset
from models.config import LOCAL_KERNELS, ModelConfig


def origin(given: Given) -> list[str]:
    """What the command line says, and what comes from the config file and differs from the defaults."""
    defaults = _defaults()
    said, file = _flat(given.arguments), _flat(given.file)
    inherited = {
        key: value
        for key, value in file.items()
        if key not in said and not key.startswith("model.") and value != defaults.get(key)
    }
    lines = [
        f"the {name} of {given.source} ({_keys(old)}) is replaced by the preset {_at(given.arguments, name)['preset']}"
        for name, old in given.replaced.items()
    ]
    lines += [str(found) for found in given.followed()]
    if said:
        lines.append(f"command line: {_listed(said)}")
    if inherited:
        lines.append(f"inherited from {given.source}: {_listed(inherited)}")
    return lines


@cache
def _defaults() -> Mapping[str, Any]:
    """Dotted key -> its default."""
    return _flat(dataclasses.asdict(Config()))


def model_in_words(model: ModelConfig) -> str:
    """The preset's name with what was changed of it, or the size of a model without one."""
    tree = dataclasses.asdict(model)
    if model.preset is None:
        vision, text = model.vision, model.text
        return f"own model ({vision.depth} x {vision.width} image tower, {text.depth} x {text.width} text tower)"
    plain = _flat({**dataclasses.asdict(ModelConfig(preset=model.preset)), **_deep(load_preset(model.preset))})
    changed = {key: value for key, value in _flat(tree).items() if value != plain.get(key) and key not in LOCAL_KERNELS}
    if not changed:
        return model.preset
    told = ", ".join(f"{key} {value} instead of {plain.get(key)}" for key, value in changed.items())
    return f"{model.preset} with {told}"


def _deep(preset: Mapping[str, Any]) -> dict[str, Any]:
    """The preset's sections over the defaults of theirs."""
    defaults = dataclasses.asdict(ModelConfig())
    return {key: {**defaults[key], **value} if isinstance(value, Mapping) else value for key, value in preset.items()}


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{above}{key}.")
        else:
            flat[f"{above}{key}"] = value
    return flat


def _at(tree: Mapping[str, Any], dotted: str) -> Any:
    for part in dotted.split("."):
        tree = tree[part]
    return tree


def _keys(old: Mapping[str, Any]) -> str:
    return str(old["preset"]) if list(old) == ["preset"] else ", ".join(old)


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={_short(value)}" for key, value in settings.items())


def _short(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        if any(isinstance(entry, Mapping) for entry in value):
            return f"[{', '.join(str(entry.get('name') or '…') for entry in value)}]"
        return f"[{', '.join(map(_short, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
