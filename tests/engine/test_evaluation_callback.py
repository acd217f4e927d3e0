"""Evaluation between steps: the offline numbers, at every layout, in the record and for keep_best."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import DataError
from data.shards.write import write_shard
from data.tokenizer import Tokenizer
from engine.callbacks.checkpoint import CheckpointCallback
from engine.callbacks.evaluation import Evaluation
from engine.callbacks.metrics import MetricsFile, read_metrics
from engine.checkpoint.format.manifest import step_record
from engine.config.phases import first_phase
from engine.config.read import Config, ConfigError, ParallelConfig, resolve
from engine.evaluation.inputs import ShardInput
from engine.evaluation.scores import ClassPrompts
from engine.parallel.device import prepare
from engine.parallel.launch import job
from engine.parallel.mesh import build_mesh
from engine.record import Callback, Record
from engine.trainer import Trainer
from tests.data.http_server import serve
from tests.data.shard_factory import encode, make_shards, picture
from tests.distributed import run_distributed, world
from tools.evaluate.__main__ import main as evaluate

pytestmark = pytest.mark.dist

HELD_OUT = 13


def config_of(folder: str, run: str, *overrides: str) -> Config:
    tree = {
        "run_dir": f"{folder}/{run}",
        "model": "tiny-18b",
        "data": {"shards": f"{folder}/00000.tar", "workers": 0},
        "train": {"steps": 3, "global_batch_size": 8, "micro_batch_size": 2},
        "optim": {"lr_vision": 0.01, "lr_text": 0.01, "warmup_steps": 2, "ema_decay": 0.5},
        "checkpoint": {"every_steps": 2, "keep_best": "eval_zero_shot_top1", "keep_best_is": "max"},
        "evaluate": {"every_steps": 2, "shards": [f"{folder}/00001.tar"]},
    }
    return resolve(tree, ["model.text.depth=2", "model.text.vocab_size=49408", *overrides])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    make_shards(folder, [20, HELD_OUT])
    (folder / "classes.txt").write_text("".join(f"picture number {number}\n" for number in range(20, 33)))
    return folder


class _Records(Callback):
    def __init__(self) -> None:
        self.records: list[Record] = []

    def on_step(self, record: Record) -> None:
        self.records.append({key: value for key, value in record.items() if key.startswith("eval_")})


def fit(config: Config) -> list[Record]:
    """The evaluation's part of every record. Collective over all ranks."""
    mesh = build_mesh(config.parallel.tensor, config.parallel.pipeline, world())
    trainer = Trainer(first_phase(config), mesh, prepare())
    recorder = _Records()
    metrics: list[Callback] = [MetricsFile()] if mesh.world.rank == 0 else []
    trainer.resume()
    trainer.fit([Evaluation(trainer), *metrics, recorder, CheckpointCallback(trainer)])
    return recorder.records


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[Record]:
    with job(ParallelConfig()):
        return fit(config_of(str(folder), "alone"))


def test_every_n_steps_and_after_the_last(folder: Path, alone: list[Record]) -> None:
    assert [bool(record) for record in alone] == [False, True, True]
    scores = alone[-1]
    assert scores["eval_chance"] == 1 / HELD_OUT
    assert scores["eval_zero_shot_top1"] * HELD_OUT == pytest.approx(round(scores["eval_zero_shot_top1"] * HELD_OUT))
    written = read_metrics(folder / "alone" / "metrics.jsonl")
    assert [{k: v for k, v in record.items() if k.startswith("eval_")} for record in written] == alone


def test_a_checkpoint_knows_its_evaluation(folder: Path, alone: list[Record]) -> None:
    record = step_record(folder / "alone" / "checkpoints" / "step_00000003")
    assert record["eval_zero_shot_top1"] == alone[-1]["eval_zero_shot_top1"]


def scores_of(record: Record) -> dict[str, float]:
    return {key.removeprefix("eval_"): value for key, value in record.items() if key != "eval_time_s"}


@pytest.mark.parametrize("ema", [False, True])
def test_the_offline_numbers(folder: Path, alone: list[Record], ema: bool) -> None:
    if ema:
        with job(ParallelConfig()):
            alone = fit(config_of(str(folder), "averaged", "evaluate.ema=true"))
    run, out = folder / ("averaged" if ema else "alone"), folder / "offline.json"
    arguments = [str(run), str(folder / "00001.tar"), "--out", str(out), *(["--ema"] if ema else [])]
    assert evaluate(arguments) == 0
    offline: dict[str, Any] = json.loads(out.read_text())
    assert scores_of(alone[-1]) == {key: offline[key] for key in scores_of(alone[-1])}


LAYOUTS = {
    "tp2": ("parallel.tensor=2",),
    "dp2-sharded": ("parallel.virtual=2", "parallel.shard=weights"),
    "dp2-sharded-average": ("parallel.virtual=2", "parallel.shard=weights", "parallel.shard_ranks=1"),
    "pp2-virtual": ("parallel.pipeline=2", "parallel.virtual=2"),
    "dp2": (),
}
FAST = ("tp2", "dp2-sharded-average", "pp2-virtual")


def fit_layouts(folder: str, names: list[str]) -> list[list[dict[str, float]]]:
    return [[dict(record) for record in fit(config_of(folder, name, *LAYOUTS[name]))] for name in names]


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "others"])
def test_the_same_at_every_layout(slow: bool, folder: Path, alone: list[Record]) -> None:
    names = [name for name in LAYOUTS if (name not in FAST) == slow]
    for outcomes in run_distributed(fit_layouts, 2, folder=str(folder), names=names):
        for name, records in zip(names, outcomes, strict=True):
            assert [scores_of(record) for record in records] == [scores_of(record) for record in alone], name


def test_classes_with_plain_templates_are_the_captions(folder: Path, alone: list[Record]) -> None:
    """The mean of twice the same prompt is the prompt."""
    overrides = (f"evaluate.classes={folder}/classes.txt", "evaluate.templates=['{}','{}']")
    with job(ParallelConfig()):
        named = fit(config_of(str(folder), "classes", *overrides))
    for key in ("zero_shot_top1", "zero_shot_top5", "chance"):
        assert scores_of(named[-1])[key] == scores_of(alone[-1])[key]


def test_held_out_shards_may_lie_elsewhere(folder: Path, tmp_path: Path) -> None:
    """They are fetched into the job's data.cache_dir."""
    pytest.importorskip("aiohttp", reason="the extra `remote` is not installed")
    config = config_of(str(folder), "remote", f"data.cache_dir={tmp_path}")
    with job(ParallelConfig()) as (mesh, device), serve(folder) as server:
        source = ShardInput([f"{server.url}/00001.tar"], config, mesh, torch.float32, device.torch_device)
        assert [key for block in source.blocks(8) for key in block.keys] == [f"good{n}" for n in range(20, 33)]


def test_class_names_must_be_those_of_the_samples() -> None:
    prompts = ClassPrompts(["cat", "dog"], ["{}", "a {}"], Tokenizer(8))
    assert prompts.tokens.shape == torch.Size([4, 8]) and prompts.label("dog") == 1
    with pytest.raises(DataError, match=r"'bird'.* none of the 2 classes"):
        prompts.label("bird")
    with pytest.raises(DataError, match="no class names"):
        ClassPrompts([], ["{}"], Tokenizer(8))


def test_mistakes_in_evaluation_data_are_found_at_the_start(folder: Path, tmp_path: Path) -> None:
    """Before the first step, on every rank, in one line; not at the first evaluation."""
    write_shard(str(tmp_path / "blank.tar"), [(f"b{n}", {"png": encode(picture(n))}) for n in range(3)])
    write_shard(str(tmp_path / "broken.tar"), [(f"b{n}", {"png": b"no picture", "txt": b"words"}) for n in range(3)])
    (tmp_path / "few.txt").write_text("picture number 20\n")
    (tmp_path / "empty.tar").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    cases = {
        f"evaluate.classes={tmp_path}/few.txt": "'picture number 21' of an evaluation sample is none of the 1 classes",
        f"evaluate.classes={tmp_path}/latin.txt": r"latin\.txt is not UTF-8",
        f"evaluate.classes={tmp_path}/none.txt": r"none\.txt does not exist",
        f"evaluate.shards={tmp_path}/gone.tar": r"gone\.tar \(from evaluate\.shards entry '.*'\) does not exist",
        f"evaluate.shards={tmp_path}/empty.tar": r"empty\.tar is empty \(0 bytes\): .*leave it out of evaluate\.shards",
        f"evaluate.shards={tmp_path}/blank.tar": "of 3 samples 0 have a caption",
        f"evaluate.shards={tmp_path}/broken.tar": r"no picture of 3 can be read \(b0: not_an_image\)",
    }
    with job(ParallelConfig()) as (mesh, device):
        for override, message in cases.items():
            trainer = Trainer(first_phase(config_of(str(folder), "mistake", override)), mesh, device)
            with pytest.raises(DataError, match=message):
                Evaluation(trainer).on_start(trainer._run_info(trainer._open_feed()))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("evaluate.shards=[]", "held-out"),
        ("evaluate.every_steps=0", "keep_best is .* evaluate.every_steps 0 does not divide"),
        ("evaluate.every_steps=4", "keep_best"),
        ("checkpoint.keep_best_is=min", "more is better: set checkpoint.keep_best_is=max"),
        ("evaluate.templates=['a photo']", "class name"),
        ("evaluate.templates=['a {}']", "evaluate.classes"),
        ("objective=mim", "captions"),
    ],
)
def test_refused(override: str, named: str) -> None:
    more = (
        ["mim.teacher=x", "mim.teacher_model=tiny-18b", "train.patch_dropout=0"] if override == "objective=mim" else []
    )
    with pytest.raises(ConfigError, match=named):
        config_of("x", "y", override, *more)
    with pytest.raises(ConfigError, match=r"evaluate\.ema"):
        config_of("x", "y", "evaluate.ema=true", "optim.ema_decay=0")
    with pytest.raises(ConfigError, match=r"recall is measured without evaluate\.classes"):
        config_of("x", "y", "checkpoint.keep_best=eval_recall_at_5", "evaluate.classes=c.txt")
