"""What a report knows about a run: its curve, its config, and its evaluation where there is one."""

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml

from engine.callbacks.metrics import METRICS_FILE, RUN_FILE, read_metrics
from tools.cli import CommandError

T = TypeVar("T")
EVALUATION_PREFIX = "eval_"
"""Prefix of the results of an evaluation between steps, in the metrics file."""
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One held-out image with the captions that the model finds nearest."""

    caption: str
    """The true caption."""
    image_png: bytes
    """The image as a PNG file."""
    top: list[tuple[str, float]]
    """(caption, cosine) pairs, best first."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Consecutive steps of one name in the metrics file."""

    name: str
    """The phase's name; empty for steps before the job had phases."""
    first: int
    """Index of the first record."""
    stop: int
    """Index after the last record."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder, read."""

    name: str
    """Folder name, or the path as given where two folders share a name."""
    records: list[dict[str, Any]]
    """Lines of metrics.jsonl, at least one."""
    config: dict[str, str] | None
    """Dotted key -> value as text; None without a config.yaml."""
    result: dict[str, Any] | None
    """Flat result.json; None if the run was not evaluated."""
    samples: list[Sample]
    """Held-out images of predictions.json; empty without that file."""
    facts: dict[str, Any]
    """run.json: layout, world_size, parameters of the last start; empty without that file."""
    folder: Path
    """Where it lies."""

    @property
    def objective(self) -> str:
        """contrastive | mim."""
        return (self.config or {}).get("objective", "contrastive")

    def column(self, key: str) -> np.ndarray:
        """float64 [records] of one metric; NaN where a line lacks it, or it is no number or was not finite."""
        values = [record.get(key) for record in self.records]
        return np.array([value if isinstance(value, int | float) else np.nan for value in values], dtype=np.float64)

    def phases(self) -> list[Phase]:
        """Stretches of steps with one `phase`, in order; empty for a run without phases."""
        names = [str(record.get("phase", "")) for record in self.records]
        if not any(names):
            return []
        starts = [i for i, name in enumerate(names) if i == 0 or name != names[i - 1]]
        return [Phase(name=names[a], first=a, stop=b) for a, b in pairwise([*starts, len(names)])]

    def evaluation_keys(self) -> list[str]:
        """Metrics of the evaluation between steps, in the order of their first appearance; not what guessing gives."""
        return list(dict.fromkeys(key for record in self.records for key in record if _is_evaluation(key, record[key])))

    def global_batch_sizes(self) -> np.ndarray:
        """float64 [records]: samples of every step, from the growth of `samples_seen`."""
        seen, steps = self.column("samples_seen"), self.column("step")
        growth = np.diff(seen) / np.diff(steps)
        # What was seen before the first line is unknown: the first step is taken to equal the second.
        first = growth[0] if len(growth) else seen[0] / (steps[0] + 1)
        return np.concatenate([[first], growth])

    def samples_per_s(self) -> np.ndarray:
        """float64 [records]: global batch size over step time."""
        return self.global_batch_sizes() / self.column("step_time_s")


def _is_evaluation(key: str, value: Any) -> bool:
    known = key.startswith(EVALUATION_PREFIX) and not key.endswith(("_s", "chance"))
    return known and isinstance(value, int | float)


def is_share(key: str) -> bool:
    """A result between 0 and 1 that reads as a percentage."""
    return "top" in key or "recall" in key or "accuracy" in key or key.endswith("chance")


def metric_heading(key: str) -> str:
    """zero_shot_top1 -> zero-shot top-1."""
    return (
        key.replace("zero_shot", "zero-shot")
        .replace("top1", "top-1")
        .replace("top5", "top-5")
        .replace("_at_", "@")
        .replace("_", " ")
    )


def load_runs(run_dirs: Sequence[Path]) -> list[Run]:
    """Read the folders.

    Raises:
        FileNotFoundError: a folder has no metrics file.
        ValueError: a file is empty or damaged; the message names it.
    """
    names = [path.resolve().name for path in run_dirs]
    return [
        _load_run(path, name=name if names.count(name) == 1 else str(path))
        for path, name in zip(run_dirs, names, strict=True)
    ]


def _load_run(run_dir: Path, *, name: str) -> Run:
    metrics = run_dir / METRICS_FILE
    if not metrics.is_file():
        raise FileNotFoundError(f"{metrics} does not exist; give the run_dir of a training run")
    records = read_metrics(metrics)
    if not records:
        raise CommandError(f"{metrics} has no finished step yet; the report needs at least one")
    config = _read(run_dir / "config.yaml", yaml.safe_load)
    return Run(
        name=name,
        records=records,
        config=None if config is None else dict(_flatten(config)),
        result=_read(run_dir / "result.json", json.loads),
        samples=_samples(run_dir / "predictions.json"),
        facts=_read(run_dir / RUN_FILE, json.loads) or {},
        folder=run_dir,
    )


def _read(path: Path, parse) -> dict[str, Any] | None:
    """A mapping from a file that may be absent."""
    if not path.is_file():
        return None
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise CommandError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise CommandError(f"{path} must hold a mapping, not a {type(content).__name__}")
    return content


def _samples(path: Path) -> list[Sample]:
    content = _read(path, json.loads)
    if content is None:
        return []
    try:
        return [
            Sample(
                caption=str(entry["caption"]),
                image_png=_png(entry["image_png_base64"]),
                top=[(str(guess["caption"]), float(guess["score"])) for guess in entry["top"]],
            )
            for entry in content["samples"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise CommandError(f"{path} is not a predictions file: {error!r}; run tools.evaluate again") from error


def _png(encoded: str) -> bytes:
    """The image's bytes; they are written into the page, so they have to be a PNG and nothing else."""
    try:
        data = base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise CommandError(f"an image is not base64: {error}") from error
    if not data.startswith(_PNG_SIGNATURE):
        raise CommandError("an image is not a PNG")
    return data


def _flatten(tree: dict[str, Any], prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, default=str, ensure_ascii=False).strip('"')


def config_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(dotted key, value per run) wherever the configs differ, in the order of the first config.

    A key that a run lacks shows as "–". `run_dir` always differs and is left out.
    """
    configs = [run.config or {} for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config if key != "run_dir")
    rows = [(key, [config.get(key, "–") for config in configs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def evenly_spaced(samples: Sequence[T], count: int) -> list[T]:
    """At most `count` samples, spread over the whole list: the first ones of a shard look alike."""
    if len(samples) <= count:
        return list(samples)
    return [samples[index] for index in np.linspace(0, len(samples) - 1, count).astype(int)]
