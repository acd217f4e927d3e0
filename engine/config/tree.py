"""From plain mappings to the typed config: presets, short forms and the merge."""

from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engine.config.checks import ConfigError
from engine.config.schema import Config

PRESETS = Path(__file__).resolve().parents[2] / "models" / "presets"


def merged(layers: list[Any], source: str) -> Config:
    """Later layers win over earlier ones and those over the defaults; ConfigError for what the schema does not have."""
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), *layers))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {_one_line(error)}") from None
    assert isinstance(config, Config)
    return config


def load_preset(name: str) -> dict[str, Any]:
    """Contents of models/presets/NAME.yaml."""
    file = PRESETS / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise ConfigError(f"model {name!r} is not a preset; there are: {known}")
    return yaml.safe_load(file.read_text())


def expand_shorthand(tree: dict[str, Any]) -> dict[str, Any]:
    """`model: NAME` stands for `model: {preset: NAME}` (the teacher's too), a shard string for a list of one (in a
    source, too), all of it also in a phase.
    """
    tree = dict(tree)
    if isinstance(tree.get("model"), str):
        tree["model"] = {"preset": tree["model"]}
    mim = tree.get("mim")
    if isinstance(mim, dict) and isinstance(mim.get("teacher_model"), str):
        tree["mim"] = {**mim, "teacher_model": {"preset": mim["teacher_model"]}}
    data = tree.get("data")
    if isinstance(data, dict):
        tree["data"] = _list_of_one(data)
        if isinstance(data.get("sources"), list):
            tree["data"]["sources"] = [_list_of_one(source) for source in data["sources"]]
    if isinstance(tree.get("evaluate"), dict):
        tree["evaluate"] = _list_of_one(tree["evaluate"])
    if isinstance(tree.get("phases"), list):
        tree["phases"] = [expand_shorthand(p) if isinstance(p, dict) else p for p in tree["phases"]]
    return tree


def _list_of_one(source: Any) -> Any:
    if isinstance(source, dict) and isinstance(source.get("shards"), str):
        return {**source, "shards": [source["shards"]]}
    return source


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), None)
    return lines[0] if key is None or key in lines[0] else f"{key}: {lines[0]}"
