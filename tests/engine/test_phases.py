"""Phases in one config: lengths, borders and schedules, and every mistake refused before anything is built."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from data.config import DataConfig, MixtureSwitch, SourceConfig
from data.reader import SampleReader
from engine.config.phases import Phase, plan_job
from engine.config.read import Config, ConfigError, resolve
from tests.data.shard_factory import make_shards

PAPER: list[dict[str, Any]] = [
    {"name": "drop", "samples": 5_400_000_000},
    {"name": "full", "samples": 620_000_000, "train": {"patch_dropout": 0.0}},
    {"name": "video", "samples": 24_000_000, "data": {"shards": "videos.tar", "frames": 8}},
    {
        "name": "336", "samples": 400_000_000, "model": "18b-336", "schedule": "restart", "optimizer": "reset",
        "train": {"global_batch_size": 23040, "patch_dropout": 0.0}, "optim": {"lr_vision": 2e-4},
    },
]  # fmt: skip
"""The 18B's phases (paper, section 3 and Table 13)."""


def job(phases: list[dict[str, Any]], *overrides: str) -> Config:
    tree = {
        "model": "18b",
        "data": {"shards": "images.tar"},
        "train": {"global_batch_size": 108_000, "micro_batch_size": 16},
        "checkpoint": {"every_steps": 500},
        "phases": phases,
    }
    return resolve(tree, list(overrides))


def borders(phase: Phase) -> tuple[int, ...]:
    return phase.first_step, phase.last_step, phase.first_sample, phase.schedule_first_step, phase.schedule_steps


def test_lengths_borders_and_schedules_of_the_paper() -> None:
    plan = plan_job(job(PAPER)).phases
    video_samples = 5_400_000_000 + 5741 * 108_000
    last = video_samples + 223 * 108_000
    assert [borders(phase) for phase in plan] == [
        (0, 50_000, 0, 0, 55_964),
        (50_000, 55_741, 5_400_000_000, 0, 55_964),
        (55_741, 55_964, video_samples, 0, 55_964),
        (55_964, 73_326, last, 55_964, 17_362),
    ]
    assert [phase.reset_optimizer for phase in plan] == [False, False, False, True]
    assert {phase.total_steps for phase in plan} == {73_326}


def test_a_phase_changes_what_it_names_and_nothing_else() -> None:
    config = job(PAPER)
    drop, full, video, last = (phase.config for phase in plan_job(config).phases)
    assert [c.train.patch_dropout for c in (drop, full, video, last)] == [0.5, 0.0, 0.5, 0.0]
    assert (full.data.shards, video.data.shards, video.data.frames) == (["images.tar"], ["videos.tar"], 8)
    assert last.model == dataclasses.replace(
        drop.model, preset="18b-336", vision=dataclasses.replace(drop.model.vision, image_size=336)
    )
    assert (last.optim.lr_vision, last.optim.lr_text) == (2e-4, config.optim.lr_text)
    assert config.train.steps == 73_326


def test_sources_of_a_phase_replace_the_shards_of_the_job() -> None:
    sources = [{"name": "a", "shards": "a.tar"}, {"name": "b", "shards": ["b.tar"], "weight": 2}]
    (phase,) = plan_job(job([{"name": "mixed", "steps": 3, "data": {"sources": sources}}])).phases
    assert not phase.config.data.shards
    assert [source.shards for source in phase.config.data.sources] == [["a.tar"], ["b.tar"]]


def test_the_written_config_is_the_same_job() -> None:
    config = job(PAPER)
    again = resolve(dataclasses.asdict(config), [])
    assert plan_job(again).phases == plan_job(config).phases


def test_a_job_without_phases_is_one() -> None:
    config = resolve({"model": "tiny-18b", "data": {"shards": "-"}}, ["train.steps=7"])
    (phase,) = plan_job(config).phases
    assert phase.config is config and phase.name == "" and borders(phase) == (0, 7, 0, 0, 7)


@pytest.mark.parametrize(
    ("change", "overrides", "named"),
    [
        ({"samples": 0}, [], "steps 0 and samples 0"),
        ({"steps": 4}, [], "give one of them"),
        ({"name": "drop"}, [], "name"),
        ({"name": ""}, [], "name"),
        ({"optimizer": "half"}, [], "keep or reset"),
        ({"schedule": "half"}, [], "continue or restart"),
        ({"train": {"seed": 3}}, [], "train.seed"),
        ({"train": {"steps": 3}}, [], "train.steps"),
        ({"train": {"patch_drop": 3}}, [], "patch_drop"),
        ({"train": {"patch_dropout": 2.0}}, [], "patch_dropout"),
        ({"train": {"logit_scale": None}}, [], "learned scalars"),
        ({"train": {"loss": "sigmoid"}}, [], "learned scalars"),
        ({"model": "8b"}, [], "beyond its resolution"),
        ({"model": {"vision": {"image_size": 225}}}, [], "225"),
        ({"optim": {"warmup_steps": 5}}, [], "continues the schedule"),
        ({"parallel": {"tensor": 2}}, [], "parallel"),
        ({}, ["checkpoint.every_steps=0"], "border"),
        ({}, ["train.steps=9"], "add up to"),
    ],
)
def test_refused(change: dict[str, Any], overrides: list[str], named: str) -> None:
    second = {"name": "second", "samples": 108_000} | change
    with pytest.raises(ConfigError, match=named) as error:
        job([PAPER[0], second], *overrides)
    assert "\n" not in str(error.value)


def test_the_order_begins_at_the_phase_and_crops_follow_the_run(tmp_path) -> None:
    a, b = make_shards(tmp_path, [9, 7])
    config = DataConfig(
        sources=[SourceConfig(name="a", shards=[a]), SourceConfig(name="b", shards=[b])],
        mixture_schedule=[MixtureSwitch(at_samples=10, weights={"a": 1.0})],
        workers=0,
    )
    first = 1000

    def reader(first_position: int) -> SampleReader:
        return SampleReader(config, image_size=16, context_length=8, seed=0, train=True, first_position=first_position)

    of_run, of_phase = reader(0).read(np.arange(30)), reader(first).read(first + np.arange(30))
    assert of_phase.keys == of_run.keys
    assert not of_phase.images.equal(of_run.images)
    assert reader(first).sources.counts(first + 20) == reader(0).sources.counts(20) == {"a": 15, "b": 5}
