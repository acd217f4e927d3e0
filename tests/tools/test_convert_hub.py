"""The modelling file that --to hf writes gives the authors' features; transformers is only stood in for."""

import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine.checkpoint.state_dicts.files import open_state
from tests.golden import ARCHITECTURES, FOLDER, deviation, load_io, pixels
from tools.convert import __main__ as convert


class PretrainedConfig:
    """What the file asks of transformers' class of this name."""

    def __init__(self, **rest: Any):
        vars(self).update(rest)


class PreTrainedModel(nn.Module):
    """The same."""

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        self.config = config

    def post_init(self) -> None:
        """Nothing here."""


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    package, utils = types.ModuleType("transformers"), types.ModuleType("transformers.utils")
    vars(package).update(PretrainedConfig=PretrainedConfig, PreTrainedModel=PreTrainedModel, utils=utils)
    utils.ModelOutput = dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", package)
    monkeypatch.setitem(sys.modules, "transformers.utils", utils)


@pytest.mark.parametrize("fixture", ARCHITECTURES)
def test_the_folder_holds_its_model(
    fixture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transformers: None
) -> None:
    files = ["--config", FOLDER / fixture / "config.json", "--weights", FOLDER / fixture / "weights.safetensors"]
    package = f"hub_{fixture.replace('-', '_')}"
    for arguments in (
        ["--from", "eva", *files, "--out", tmp_path / "ours"],
        ["--to", "hf", "--checkpoint", tmp_path / "ours", "--out", tmp_path / package],
    ):
        assert convert.main([str(argument) for argument in arguments]) == 0
    monkeypatch.syspath_prepend(str(tmp_path))
    config = json.loads((tmp_path / package / "config.json").read_text())
    modules = {}
    for kind, place in config["auto_map"].items():
        module, name = place.split(".")
        modules[kind] = getattr(importlib.import_module(f"{package}.{module}"), name)
    model = modules["AutoModel"](modules["AutoConfig"](**config))
    state = open_state(tmp_path / package)
    model.load_state_dict({name: state.read(name) for name in state.shapes}, strict=True)
    io = load_io(fixture)
    with torch.no_grad():
        assert deviation(model.get_image_features(pixels(fixture)), io["image_features"]) < 1e-5
        assert deviation(model.get_text_features(io["text"]), io["text_features"]) < 1e-5
    processor = json.loads((tmp_path / package / "preprocessor_config.json").read_text())
    assert processor["crop_size"]["height"] == config["vision_config"]["image_size"]
