"""One tree of what was given: presets, the config file, the command line, in this order."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from engine.config.errors import ConfigError
from engine.config.heads import Followed, follow
from engine.config.schema import Config
from engine.config.text import nested, read_file, split_override
from engine.config.typed import merged, typed
from engine.objectives.registry import OBJECTIVES
from models.config import ModelConfig, ModelConfigError
from models.names import preset_of

PRESETS = Path(__file__).resolve().parents[2] / "models" / "presets"
_OPEN_CLIP = "open_clip:"
"""What an open_clip model config is named by, in the place of a preset or in `model.vision.from`."""
_MODELS = (("model",), ("mim", "teacher_model"))
"""Where a config names models."""
EVALUATE_OFF = "evaluate=off"
"""The one override that takes the whole section of a config file away."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a config was made from: trees of typed values with the keys that somebody wrote."""

    source: str
    """Where the first tree comes from, for messages: the file's path."""
    file: Mapping[str, Any]
    """The config file, without the models that the command line replaced."""
    arguments: Mapping[str, Any]
    """The command line."""
    replaced: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Model (`model`, `mim.teacher_model`) -> what the file said of it, where the command line's preset replaced it."""

    def tree(self) -> dict[str, Any]:
        """Everything given, above the presets and the objective's defaults: what differs from the dataclasses."""
        given = merged(self.file, self.arguments)
        objective = OBJECTIVES.get(str(given.get("objective")))
        layers: list[Mapping[str, Any]] = [objective.defaults] if objective is not None else []
        whole = merged(*layers, given)
        for path in _MODELS:
            model = _at(given, path)
            if model is not None:
                whole = merged(_without(whole, path), nested(path, whole_model(model)))
        for found in self.followed():
            whole = merged(whole, nested((*found.model.split("."), "vision", "head_width"), found.head_width))
        return whole

    def followed(self) -> list[Followed]:
        """Head widths that follow a width of the command line."""
        found = []
        for path in _MODELS:
            asked = _at(self.arguments, (*path, "vision"))
            if not isinstance(asked, Mapping):
                continue
            preset = _at(self.arguments, (*path, "preset"))
            before = whole_model(merged(_at(self.file, path) or {}, {} if preset is None else {"preset": preset}))
            found.append(follow(".".join(path), before.get("vision", {}), asked))
        return [one for one in found if one is not None]


def given_settings(tree: Mapping[str, Any], overrides: Sequence[str], source: str) -> Given:
    """Both sides typed. Raises ConfigError that says on which side a mistake is."""
    if EVALUATE_OFF in overrides:
        tree, overrides = _without(tree, ("evaluate",)), [o for o in overrides if o != EVALUATE_OFF]
    file = _typed(tree, source)
    arguments: dict[str, Any] = {}
    for override in overrides:
        arguments = merged(arguments, _typed(nested(*split_override(override)), "command line"))
    replaced = {}
    for path in _MODELS:
        if _at(arguments, (*path, "preset")) is not None and (old := _at(file, path)):
            replaced[".".join(path)] = old
            file = _without(file, path)
    if _at(arguments, ("evaluate", "every_steps")) == 0 and "evaluate" in file:
        file = _without(file, ("evaluate",))  # one override switches evaluation off: what was said of it is idle
    return Given(source=source, file=file, arguments=arguments, replaced=replaced)


def refuse_repeats(overrides: Sequence[str]) -> None:
    """Raise ConfigError for a key that a command line gives twice: one of the two values would be lost."""
    seen: dict[str, list[str]] = {}
    for override in overrides:
        parts, value = split_override(override)
        key = ".".join(parts)
        seen.setdefault(f"{key}.preset" if key in ("model", "mim.teacher_model") else key, []).append(value)
    for key, values in seen.items():
        if len(values) > 1:
            raise ConfigError(f"command line: {key.removesuffix('.preset')} is given {_times(len(values), values)}")
        above = next((other for other in seen if key.startswith(f"{other}.")), None)
        if above is not None:
            raise ConfigError(f"command line: {key} is given beside {above}={seen[above][0]}: give one of them")


def whole_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """The model with what its preset says below the keys that are given.

    One from a file of one's own has no preset any more: it is whole without the file, which may move or change.
    """
    preset = model.get("preset")
    if preset is None:
        return dict(model)
    whole = merged(load_preset(preset), model)
    return whole | {"preset": None} if _is_file(preset) or preset.startswith(_OPEN_CLIP) else whole


def _is_file(preset: str) -> bool:
    return preset.endswith((".yaml", ".yml", ".json"))


def _open_clip(name: str) -> dict[str, Any]:
    """The model of an open_clip model config: its json, or a folder or file of the hub's with `model_cfg` inside."""
    # Imported here, because torch comes with it: other configs answer before that.
    from models.formats.open_clip_config import is_open_clip, model_from_open_clip

    path = Path(name.removeprefix(_OPEN_CLIP))
    path = path / "open_clip_config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text())
        config = config.get("model_cfg", config)
        timm = config.get("vision_cfg", {}).get("timm_model_name")
        if is_open_clip(config):
            return asdict(model_from_open_clip(config))
        if timm is None or preset_of(timm) is None:
            raise ModelConfigError(f"vision_cfg is of {timm or 'the EVA authors'}: convert it, or name its preset")
        text = asdict(model_from_open_clip(config | {"vision_cfg": {}}))
        return text | {"vision": load_preset(timm)["vision"]}
    except (OSError, ValueError, AttributeError, TypeError, KeyError, ModelConfigError) as error:
        raise ConfigError(f"{path} is no open_clip model config: {error}") from None


def _with_towers(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tree with `model.vision.from` and `model.text.from` replaced by what their files say, below other keys."""
    for path in _MODELS:
        for part in ("vision", "text"):
            place = (*path, part)
            tower = _at(tree, place)
            if isinstance(tower, Mapping) and "from" in tower:
                name = str(tower["from"])
                if not name.startswith(_OPEN_CLIP):
                    raise ConfigError(f"{'.'.join(place)}.from is {name!r}: it takes open_clip:FILE.json")
                own = {key: value for key, value in tower.items() if key != "from"}
                tree = merged(_without(tree, place), nested(place, merged(_open_clip(name)[part], own)))
    return tree


def load_preset(name: str) -> dict[str, Any]:
    """What models/presets/NAME.yaml says, typed; name may also be a public one (models/names.py), or FILE.yaml: a
    model of one's own, by itself or as the `model` of a config.
    """
    if name.startswith(_OPEN_CLIP) or name.endswith(".json"):
        return typed({key: value for key, value in _open_clip(name).items() if key != "preset"}, ModelConfig, name)
    if _is_file(name):
        tree = read_file(Path(name))
        return whole_model(typed(tree.get("model", tree), ModelConfig, f"{name}: model"))
    known = _presets()
    public = preset_of(name) if name not in known else None
    stem, changes = public or (name, {})
    if stem not in known:
        raise ConfigError(
            f"model {name!r} is not a preset; there are: {', '.join(known)}, and open_clip's, timm's and the hub's "
            "names of them; or a FILE.yaml of your own, or open_clip:FILE.json"
        )
    return merged(_preset(stem), changes)


@cache
def _presets() -> list[str]:
    """Names of the files in models/presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


@cache
def _preset(stem: str) -> dict[str, Any]:
    """What such a file says, typed; read once, because every config asks for its model three times."""
    return typed(read_file(PRESETS / f"{stem}.yaml"), ModelConfig, "model")


def _typed(tree: Mapping[str, Any], source: str) -> dict[str, Any]:
    try:
        return typed(_with_towers(tree), Config, "")
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _at(tree: Any, path: Sequence[str]) -> Any:
    for part in path:
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def _without(tree: Mapping[str, Any], path: Sequence[str]) -> dict[str, Any]:
    first, *rest = path
    inner = {first: _without(tree[first], rest)} if rest else {}
    return {key: value for key, value in tree.items() if key != first} | inner


def _times(number: int, values: Sequence[str]) -> str:
    several = "twice" if number == 2 else f"{number} times"
    pattern = _expanded(values)
    if pattern is not None:
        return (
            f"{several}, {values[0]} to {values[-1]}: the shell has expanded an unquoted pattern, and only the last "
            f"value would count; quote it: '{pattern}'"
        )
    return f"{several} ({', '.join(values[:3])}{', …' if number > 3 else ''}): only the last would count, give one"


def _expanded(values: Sequence[str]) -> str | None:
    """The brace pattern that the shell made these values of; None for others."""
    first, last = values[0], values[-1]
    if len(set(values)) < len(values):
        return None
    start = _common(values)
    end = _common([value[start:][::-1] for value in values])
    middles = [value[start : len(value) - end] for value in values]
    while start and all(middle.isdigit() or not middle for middle in middles) and first[start - 1].isdigit():
        start -= 1  # the digits that all numbers begin with belong to them
        middles = [value[start : len(value) - end] for value in values]
    while end and first[len(first) - end].isdigit():
        end -= 1
        middles = [value[start : len(value) - end] for value in values]
    if not all(middle.isdigit() for middle in middles):
        return f"{first[:start]}{{{','.join(middles)}}}{first[len(first) - end :]}" if start + end else None
    return f"{first[:start]}{{{middles[0]}..{middles[-1]}}}{last[len(last) - end :]}"


def _common(values: Sequence[str]) -> int:
    """Characters that all values begin with."""
    shortest = min(map(len, values))
    return next((at for at in range(shortest) if len({value[at] for value in values}) > 1), shortest)
