"""A mistake in the config is one clear line, before torch is imported and before any process group exists."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.config.read import ConfigError, check_layout, check_vocabulary, load_config, resolve, to_dict
from engine.train import main

ROOT = Path(__file__).resolve().parents[2]
GOOD = {"model": "tiny-18b", "data": {"shards": ["some.tar"]}}


def refused(*overrides: str, world_size: int | None = None) -> str:
    """The one line with which the config is refused."""
    with pytest.raises(ConfigError) as error:
        config = resolve(GOOD, list(overrides))
        if world_size is not None:
            check_layout(config, world_size)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.stepz=3", "stepz"),
        ("model.vision.depht=3", "model.vision.depht"),
        ("train.steps=many", "train.steps"),
        ("train.steps=1.5", "train.steps"),
        ("train.steps=null", "train.steps"),
        ("train.steps.more=3", "train.steps"),
        ("train=3", "a section with keys of its own"),
        ("train.seed=${elsewhere}", "elsewhere"),
        ("optim.lr_vision=fast", "optim.lr_vision"),
        ("model=18c", "18b"),
        ("data.shards=[]", "shards"),
        ("noequals", "noequals"),
        ("=3", "dotted.key=value"),
        ("parallel.tensor=3", "4 attention heads"),
        ("parallel.tensor=0", "parallel.tensor is 0"),
        ("parallel.pipeline=5", "4 blocks"),
        ("train.precision=fp8", "fp8"),
        ("train.patch_dropout=1.0", "patch_dropout"),
        ("train.logit_scale=-1", "logit_scale"),
        ("optim.name=sgd", "sgd"),
        ("optim.betas=[0.9]", "betas"),
        ("optim.trust_min=20", "trust_min"),
        ("checkpoint.every_steps=-1", "every_steps"),
        ("data.crop_scale=[0.9,0.1]", "crop_scale"),
        ("model.vision.image_size=57", "57"),
        ("model.vision.norm=batch", "batch"),
    ],
)
def test_names_what_is_wrong(override: str, named: str) -> None:
    assert named in refused(override)


@pytest.mark.parametrize(
    ("overrides", "world_size", "named"),
    [
        (["parallel.tensor=2", "parallel.pipeline=2"], 6, "multiple of 4 ranks"),
        (["train.global_batch_size=100", "train.micro_batch_size=8"], 2, "TP 1 x PP 1 x DP 2"),
        (["train.global_batch_size=8", "train.micro_batch_size=8", "train.keep_activations=2"], 1, "1 micro-batches"),
        (["train.micro_batch_size=3", "train.global_batch_size=3", "parallel.tensor=2"], 2, "parallel.sequence=false"),
    ],
)
def test_impossible_layout_prints_its_factors(overrides: list[str], world_size: int, named: str) -> None:
    assert named in refused(*overrides, world_size=world_size)


def test_golden_models_with_three_heads_refuse_two_tensor_ranks() -> None:
    for preset in ("tiny-e14", "tiny-b16"):
        with pytest.raises(ConfigError, match="does not divide the 3 attention heads"):
            resolve(GOOD | {"model": preset}, ["parallel.tensor=2"])


def test_an_mlp_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="MLP width 128"):
        resolve(GOOD | {"model": "tiny-b16"}, ["parallel.tensor=3"])


@pytest.mark.parametrize(
    ("content", "named"),
    [("- a list", "mapping"), ("train: [1", "not valid YAML"), ("train: {steps: 3, stepz: 4}", "stepz")],
)
def test_a_broken_file_is_named(content: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(content)
    assert main([str(file), "data.shards=some.tar"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1
    assert str(file) in printed and named in printed


def test_overrides_win_over_file_over_preset(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: {preset: tiny-18b, embed_dim: 48}\ndata: {shards: '{0..3}.tar'}\ntrain: {steps: 5}\n")
    config = load_config(file, ["train.steps=7", "optim.lr_vision=1e-3"])
    assert config.model.embed_dim == 48
    assert config.model.vision.width == 64  # the preset's
    assert config.train.steps == 7
    assert config.optim.lr_vision == 1e-3
    assert config.data.shards == ["{0..3}.tar"]
    again = resolve(to_dict(config), [])
    assert to_dict(again) == to_dict(config)


def test_brace_pattern_survives_the_command_line() -> None:
    assert resolve(GOOD, ["data.shards=/d/{00000..00031}.tar"]).data.shards == ["/d/{00000..00031}.tar"]
    assert resolve(GOOD, ["data.shards={00000..00031}.tar"]).data.shards == ["{00000..00031}.tar"]


def test_vocabulary_must_be_the_tokenizers() -> None:
    with pytest.raises(ConfigError, match="49408"):
        check_vocabulary(resolve(GOOD, []))


def run_train(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "engine.train", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("arguments", "environment", "named"),
    [
        (["missing.yaml"], {}, "missing.yaml does not exist"),
        (["examples/quickstart/train.yaml", "parallel.tensor=5"], {}, "does not divide"),
        (["examples/quickstart/train.yaml"], {"WORLD_SIZE": "6"}, "multiple of 4 ranks"),
    ],
)
def test_the_command_prints_one_line(arguments: list[str], environment: dict[str, str], named: str) -> None:
    done = run_train(*arguments, **environment)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert named in done.stderr


def test_missing_shards_are_one_line(tmp_path: Path) -> None:
    done = run_train(
        "examples/quickstart/train.yaml",
        "parallel.tensor=1",
        "parallel.pipeline=1",
        f"data.shards={tmp_path}/no/{{00..03}}.tar",
        f"run_dir={tmp_path}/run",
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")]
