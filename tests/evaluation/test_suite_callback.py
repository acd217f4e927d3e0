"""evaluate.suite: the suite's numbers in the step's record, at the layout of the training, checked at the start."""

import json
from pathlib import Path

import pytest

from data.errors import DataError
from engine.callbacks.suite import SuiteEvaluation
from engine.config.phases import first_phase
from engine.config.read import Config, ConfigError, resolve
from engine.config.schema import ParallelConfig
from engine.parallel.device import prepare
from engine.parallel.launch import job
from engine.parallel.mesh import build_mesh
from engine.record import Callback, Record
from engine.trainer import Trainer
from tests.data.shard_factory import make_shards
from tests.distributed import run_distributed, world
from tests.evaluation import sets
from tools.evaluate.__main__ import main

pytestmark = [pytest.mark.dist, sets.NEEDS_SKLEARN]
SUITE = "sets: [{name: digits, classes: 10, samples: 20}, {name: pairs, kind: retrieval}, {name: gone}]\n"
SUITE += "averages: [{name: Both of them, sets: [digits, pairs]}]\n"


def config_of(folder: str, run: str, *overrides: str) -> Config:
    tree = {
        "run_dir": f"{folder}/{run}",
        "model": "tiny-18b",
        "data": {"shards": f"{folder}/00000.tar", "workers": 0},
        "train": {"steps": 3, "global_batch_size": 8, "micro_batch_size": 2},
        "optim": {"lr_vision": 0.01, "lr_text": 0.01, "warmup_steps": 2},
        "checkpoint": {"every_steps": 3},
        "evaluate": {"every_steps": 2, "suite": f"{folder}/suite.yaml", "data": folder},
    }
    return resolve(tree, ["model.text.depth=2", "model.text.vocab_size=49408", *overrides])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    make_shards(folder, [20])
    sets.digits_set(folder, count=20)
    sets.retrieval_set(folder)
    (folder / "suite.yaml").write_text(SUITE)
    return folder


class _Records(Callback):
    def __init__(self) -> None:
        self.records: list[Record] = []

    def on_step(self, record: Record) -> None:
        kept = {k: v for k, v in record.items() if k.startswith("eval_") and not k.endswith("time_s")}
        self.records.append(kept)


def fit(config: Config) -> list[dict[str, float]]:
    """The evaluation's part of every record. Collective over all ranks."""
    from engine.callbacks.checkpoint import CheckpointCallback

    mesh = build_mesh(config.parallel.tensor, config.parallel.pipeline, world())
    trainer = Trainer(first_phase(config), mesh, prepare())
    recorder = _Records()
    trainer.resume()
    trainer.fit([SuiteEvaluation(trainer), recorder, CheckpointCallback(trainer)])
    return [dict(record) for record in recorder.records]


def fit_pipelined(folder: str) -> list[dict[str, float]]:
    return fit(config_of(folder, "pp2", "parallel.pipeline=2"))


def test_the_same_between_steps_at_two_layouts_and_afterwards(folder: Path) -> None:
    with job(ParallelConfig()):
        records = fit(config_of(str(folder), "alone"))
    assert [sorted(record) for record in records] == [[], *[["eval_both_of_them", "eval_digits", "eval_pairs"]] * 2]
    for of_rank in run_distributed(fit_pipelined, 2, folder=str(folder)):
        assert of_rank == records
    out = folder / "after"
    given = ["--suite", str(folder / "suite.yaml"), "--data", str(folder), "--out", str(out)]
    assert main([str(folder / "alone"), *given]) == 0
    tree = json.loads((out / "results.json").read_text())
    found = {entry["name"]: entry for entry in tree["sets"]}
    assert records[-1]["eval_digits"] == found["digits"]["top1"]
    assert records[-1]["eval_pairs"] == found["pairs"]["mean_recall"]
    stored = json.loads((folder / "alone" / "evaluation" / "step_00000003" / "results.json").read_text())
    assert [entry["score"] for entry in stored["averages"]] == [100 * records[-1]["eval_both_of_them"]]


def test_a_mistake_is_found_at_the_start(folder: Path, tmp_path: Path) -> None:
    sets.digits_set(tmp_path, count=19)
    with job(ParallelConfig()) as (mesh, device):
        config = config_of(str(folder), "mistake", f"evaluate.data={tmp_path}")
        trainer = Trainer(first_phase(config), mesh, device)
        with pytest.raises(DataError, match="19 samples, the suite asks for 20"):
            SuiteEvaluation(trainer).on_start(trainer._run_info(trainer._open_feed()))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate.data="], "go together"),
        (["evaluate.max_samples=3"], "about evaluate.shards, which is empty"),
        (["checkpoint.keep_best=eval_zero_shot_top1", "checkpoint.keep_best_is=max"], "evaluate.shards is empty"),
    ],
)
def test_settings_that_do_not_fit(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of("x", "y", *overrides)
