"""Every number of the schema has a least and a most: a size of nothing, or one that nothing holds, is refused."""

import re
import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Union, get_args, get_origin, get_type_hints

import pytest

from engine.config.errors import ConfigError
from engine.config.layout import check_layout
from engine.config.phases import plan_job
from engine.config.read import resolve
from engine.config.schema import Config, MimConfig
from engine.config.text import Argument
from engine.config.typed import kinds_of, typed

ABSURD, NEGATIVE = "2000000000000", "-7"
ANY_NUMBER = {"train.seed", "optim.trust_max", "optim.clip_grad_norm"}
"""Numbers without a most: a seed is any, and a bound may be as good as none."""
MAY_BE_NEGATIVE = {"train.seed", "model.vision.layer_scale"}
JOB = {
    "model": {"preset": "tiny-18b", "text": {"vocab_size": 49408}},
    "data": {"shards": ["-"]},
    "evaluate": {"every_steps": 5, "shards": ["-"]},
}


def numbers(section: type, prefix: str = "") -> Iterator[str]:
    """Dotted keys of the settings that are numbers, or lists of them."""
    for name, kind in ((field.name, get_type_hints(section)[field.name]) for field in fields(section)):
        kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
        if is_dataclass(kind):
            yield from numbers(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif any(
            one in (int, float) or (get_origin(one) is list and get_args(one)[0] in (int, float)) for one in kinds
        ):
            yield prefix + name


NUMBERS = list(numbers(Config))


def refusal(key: str, value: str) -> str:
    """The message that refuses it; empty where it is accepted."""
    config = contrastive() if not key.startswith("mim.") else distilling()
    *sections, name = key.split(".")
    owners = [config]
    for section in sections:
        owners.append(getattr(owners[-1], section))
    changed = typed(Argument(value), kinds_of(type(owners[-1]))[name], key)
    for owner, field_name in zip(reversed(owners), [name, *reversed(sections)], strict=True):
        changed = replace(owner, **{field_name: changed})
    try:
        check_layout(plan_job(changed).phases[0].config, 1)
    except ConfigError as error:
        return str(error)
    return ""


@cache
def contrastive() -> Config:
    """A config that runs, read once: a number is put into it for every question."""
    return resolve(JOB, [])


def distilling() -> Config:
    """A config of the other objective."""
    job = contrastive()
    train, mim = replace(job.train, patch_dropout=0.0), MimConfig(teacher="-", teacher_model=job.model)
    return replace(job, objective="mim", train=train, mim=mim)


def test_the_schema_was_read() -> None:
    assert {"model.text.heads", "train.loss_tile", "data.workers", "mim.max_block", "log.timeline_steps"} <= set(
        NUMBERS
    )
    assert refusal("train.steps", "7") == ""


def test_every_number_has_a_least() -> None:
    said = {key: refusal(key, NEGATIVE) for key in NUMBERS if key not in MAY_BE_NEGATIVE}
    assert [key for key, message in said.items() if not message] == []
    assert {key: text for key, text in said.items() if "\n" in text or key.split(".")[-1] not in text} == {}


def test_every_number_has_a_most() -> None:
    said = {key: refusal(key, ABSURD) for key in NUMBERS if key not in ANY_NUMBER}
    assert [key for key, message in said.items() if not message] == []
    assert {key: text for key, text in said.items() if "\n" in text or key.split(".")[-1] not in text} == {}


@pytest.mark.parametrize(
    "key",
    [
        *(
            f"model.vision.{name}"
            for name in ("image_size", "patch_size", "depth", "width", "head_width", "mlp_hidden")
        ),
        *(f"model.text.{name}" for name in ("context_length", "vocab_size", "width", "depth", "heads", "mlp_hidden")),
        *(f"train.{name}" for name in ("steps", "global_batch_size", "micro_batch_size", "loss_tile", "matryoshka")),
        *(f"parallel.{name}" for name in ("tensor", "pipeline", "virtual", "round_size", "bucket_size", "shard_ranks")),
        *("model.embed_dim", "model.vision.rope_grid", "data.frames", "data.prefetch_batches", "optim.eps"),
    ],
)
def test_a_size_of_nothing_is_refused_with_its_least(key: str) -> None:
    assert re.search(rf"{key} is \[?0(\.0)?\]?: (it must be at least|give rising widths)", refusal(key, "0"))


@pytest.mark.parametrize("length", ["steps", "samples"])
def test_a_phase_is_not_longer_than_counters_reach(length: str) -> None:
    phases = [{"name": "a", length: 10**16}, {"name": "b", "steps": 5}]
    with pytest.raises(ConfigError, match=r"train.steps is \d+: it must be at most 10,000,000,000"):
        resolve({**JOB, "phases": phases, "checkpoint": {"every_steps": 5}}, [])
