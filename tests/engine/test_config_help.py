"""What the settings say of themselves, and what is said to who meant another one."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.config import SourceConfig
from engine.config.help.command import answer
from engine.config.help.fields import as_markdown, sections, settings
from engine.config.help.names import OURS
from engine.config.read import ConfigError, load_config, preset_model, resolve, to_dict
from engine.train import main

ROOT = Path(__file__).resolve().parents[2]
GOOD = {"model": "tiny-18b", "data": {"shards": ["some.tar"]}}
OWN = {
    "embed_dim": 48,
    "vision": {"image_size": 56, "depth": 3, "width": 64, "head_width": 16, "mlp_hidden": 96, "post_norm": True},
    "text": {"width": 32, "depth": 2, "heads": 4},
}


def test_every_setting_has_a_text() -> None:
    assert len(settings()) > 150 and [setting.key for setting in settings().values() if not setting.text] == []
    assert {key.partition(".")[0].removesuffix("[]") for key in settings()} - {"run_dir", "objective"} == {
        name.removesuffix("[]") for name in sections()
    }


def test_the_page_of_settings_is_what_the_dataclasses_say() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == as_markdown(), "run: python -m engine.train --settings > docs/settings.md"


def test_help_lists_sections_presets_and_where_settings_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    for asked in ("--help", "-h"):
        assert main([asked]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith("usage: torchrun") and "docs/settings.md" in shown and "--explain" in shown
        assert all(name in shown for name in ("b16", "18b-336", *sections()))
        assert shown.split("examples:")[1].count("engine.train") == 2
    assert main([]) == 2


def test_a_setting_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--explain", "train.keep_activations"]) == 0
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first == "train.keep_activations (whole number; default 0)" and "not replayed" in second
    assert answer(["--explain", "train.logit_scale"]).startswith("train.logit_scale (number or null; default 100)")
    assert answer(["--explain", "data.sources"]).count("data.sources[]") == len(fields(SourceConfig))
    assert (
        answer(["--explain", "optim"]).count("\noptim.") == len([k for k in settings() if k.startswith("optim.")]) - 1
    )
    for asked in (["--explain", "train.keep_activation"], ["--explain"], ["--steps=3"], ["--explain", "a", "b"]):
        assert main(asked) == 1
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("optim.lr", "here it is optim.lr_vision and optim.lr_text"),
        ("train.lr", "here it is optim.lr_vision and optim.lr_text"),
        ("precision", "did you mean train.precision?"),
        ("parallel.tp", "here it is parallel.tensor"),
        ("tensor-model-parallel-size", "here it is parallel.tensor"),
        ("train.epochs", "here it is train.steps (epochs"),
        ("batch_size", "here it is train.global_batch_size (pairs"),
        ("train.temperature", "here it is train.logit_scale (1 / temperature)"),
        ("train.stepz", "did you mean train.steps?"),
        ("train.lr_vision", "did you mean optim.lr_vision?"),
        ("data.worker", "did you mean data.workers?"),
        ("model.vision.depht", "did you mean model.vision.depth"),
        ("parallel.dp", "(no setting: DP is what is left of the ranks)"),
        ("gpus", "(no setting: the ranks are torchrun's"),
        ("zero_stage", "here it is parallel.shard"),
        ("gradient_accumulation_steps", "here it is train.micro_batch_size"),
        ("resume_from_checkpoint", "here it is checkpoint.resume"),
        ("exp_name", "here it is run_dir"),
        ("max_grad_norm", "here it is optim.clip_grad_norm"),
        ("train.qqqq", "is not a setting; train has steps, "),
    ],
)
def test_a_wrong_key_says_what_was_meant(key: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(GOOD, [f"{key}=1"])
    assert said in str(error.value) and str(error.value).startswith(f"command line: {key} is not a setting")
    tree: Any = 1
    for part in reversed(key.split(".")):
        tree = {part: tree}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "c.yaml")
    assert said in str(error.value) and str(error.value).startswith(f"{tmp_path}/c.yaml: {key} is not a setting")


def test_names_of_others_lead_to_settings_that_there_are() -> None:
    for ours in OURS.values():
        words = [word.partition("=")[0].strip("(),:") for word in ours.split()]
        named = [word for word in words if "." in word or word == "run_dir"]
        assert all(word in settings() for word in named) and (named or ours.startswith("no setting")), ours


def test_a_section_is_no_switch() -> None:
    with pytest.raises(ConfigError, match=r"evaluate is 'false': it takes a section .*every_steps=0 switches it"):
        resolve(GOOD, ["evaluate=false"])
    evaluated = GOOD | {"evaluate": {"every_steps": 5, "shards": ["a"]}}
    off = resolve(evaluated, ["evaluate.every_steps=0"]).evaluate
    assert (off.every_steps, off.shards) == (0, []) and resolve(evaluated, []).evaluate.shards == ["a"]
    with pytest.raises(ConfigError, match=r"evaluate\.shards has no effect without evaluate\.every_steps"):
        resolve(evaluated, ["evaluate.every_steps=0", "evaluate.shards=b"])


def test_a_refused_phase_is_named_with_what_it_has_from_the_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(of_high: dict) -> str:
        train = {"global_batch_size": 32, "micro_batch_size": 8}
        phases = [{"name": "low", "steps": 5}, {"name": "high", "steps": 5, "train": of_high}]
        file = tmp_path / "c.yaml"
        model = {"preset": "tiny-18b", "text": {"vocab_size": 49408}}
        file.write_text(
            yaml.safe_dump(GOOD | {"model": model, "train": train, "phases": phases, "checkpoint": {"every_steps": 5}})
        )
        assert main([str(file)]) != 0
        return capsys.readouterr().err

    assert said({"patch_dropout": 2.0}) == "error: phase 'high': train.patch_dropout is 2.0: it must be in [0, 1)\n"
    layout = said({"global_batch_size": 12})
    assert layout.startswith("error: phase 'high': train.global_batch_size 12 is not a multiple of DP 1")
    assert layout.endswith("(from the job, not set by the phase: train.micro_batch_size)\n")


def test_a_temperature_is_no_scale() -> None:
    with pytest.raises(ConfigError, match=r"logit_scale is 0\.07, which looks like a temperature: .* 14\.29"):
        resolve(GOOD, ["train.logit_scale=0.07"])


def test_a_model_of_ones_own_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(OWN))
    model = preset_model(str(file))
    assert model == resolve({"model": OWN, "data": {"shards": "a"}}, []).model and model.preset is None
    config = resolve(GOOD, [f"model={file}", "model.vision.image_size=28"])
    assert (config.model.vision.depth, config.model.vision.image_size) == (3, 28)
    stored = to_dict(config)
    file.write_text(yaml.safe_dump({"model": {"preset": "tiny-18b", "embed_dim": 64}}))
    assert resolve(stored, []).model == config.model  # the run is whole without the file
    other = preset_model(str(file))
    assert other.embed_dim == 64 and other.vision == preset_model("tiny-18b").vision
    phases = [{"name": "a", "steps": 1, "model": str(file)}]
    with pytest.raises(ConfigError, match=r"gone\.yaml does not exist"):
        resolve(GOOD, ["model=gone.yaml"])
    file.write_text("vision: {depht: 3}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: model\.vision\.depht is not a setting"):
        resolve(GOOD | {"phases": phases}, [f"model={file}"])
