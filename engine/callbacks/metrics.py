"""`run_dir/metrics.jsonl`: the curve of a run, one JSON object a step.

The file is append-only while a run lives, flushed every step, and cut back to the checkpoint's step on
resume, so it always holds one clean curve: every step once, in order, whatever was killed in between. JSON
has no NaN, so a non-finite number is written as null.
"""

import json
import math
import os
import sys
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import yaml

from engine.record import Callback, Record, RunInfo

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.yaml"
"""The resolved settings of the last start that was not refused, for reports and evaluations."""
RUN_FILE = "run.json"
"""Layout and size of the last start of a run, for reports."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics file, in file order; values are numbers or None (was not finite).

    A last line that is not whole (the writer was killed, or is writing now) is left out.

    Raises:
        ValueError: a line before the last is not a JSON object with an integer `step`.
    """
    records, broken = _read(path)
    if broken:
        raise ValueError(f"{path}, line {broken[0]}: not a JSON object with an integer 'step'; remove that line")
    return records


def _read(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """(records, numbers of the lines before the last that are none)."""
    lines = path.read_bytes().splitlines()
    parsed = [_parse(line) for line in lines]
    broken = [number for number, record in enumerate(parsed[:-1], start=1) if record is None]
    return [record for record in parsed if record is not None], broken


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _to_line(record: Record) -> str:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def _keep_whole(path: Path) -> None:
    """Give the curve of an earlier start another name; say so if it has steps."""
    number, kept = 1, path.with_name("metrics.previous.jsonl")
    while kept.exists():
        number += 1
        kept = path.with_name(f"metrics.previous{number}.jsonl")
    made = len(_read(path)[0])
    path.replace(kept)
    if made:
        print(
            f"WARNING: an earlier start made {made:,} steps in {path.parent}, of which no checkpoint is there: "
            f"training begins at 0; its curve is kept as {kept.name}",
            file=sys.stderr,
            flush=True,
        )


class MetricsFile(Callback):
    """Writes the metrics file. World rank 0 only."""

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        """settings: of the whole job, for the run folder's config file; None writes none."""
        self._settings = settings
        self._file: FileIO | None = None
        self._path = Path()
        self._pending = b""
        self._refused = False

    def on_start(self, run: RunInfo) -> None:
        """Open for appending after the steps before `start_step`.

        A fresh run in a folder that already has a curve says so and keeps that curve as `metrics.previous.jsonl`, or
        with a number where that is taken. Nothing of the folder is written before: a start may have been refused
        until here, for data that is not the run's, and the folder is still that of the run.
        """
        try:
            self._open(run)
        except OSError as error:
            why = f"{error.filename or run.run_dir} cannot be written: {error.strerror}"
            raise OSError(error.errno, f"{why}; free some space or set another run_dir") from error

    def _open(self, run: RunInfo) -> None:
        path = run.run_dir / METRICS_FILE
        if path.exists():
            if run.start_step == 0:
                _keep_whole(path)
            else:
                _keep_steps_before(path, run.start_step, _last_record(run))
        self._path, self._file = path, path.open("ab", buffering=0)
        if self._settings is not None:
            text = yaml.safe_dump(dict(self._settings), sort_keys=False)
            (run.run_dir / CONFIG_FILE).write_text(text, encoding="utf-8")
        facts = {name: getattr(run, name) for name in ("layout", "world_size", "parameters", "global_batch_size")}
        (run.run_dir / RUN_FILE).write_text(json.dumps(facts) + "\n", encoding="utf-8")

    def on_step(self, record: Record) -> None:
        """Write the line; a disk that refuses it does not end the training: it is written with a later one."""
        assert self._file is not None, "on_start comes first"
        self._pending += _to_line(record).encode()
        try:
            if os.fstat(self._file.fileno()).st_nlink == 0:
                self._begin_anew(record)
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if not self._refused:
                self._warn(f"{self._path} cannot be written ({error.strerror}): steps are kept until it can")
            self._refused = True
            return
        if self._refused:
            self._warn(f"{self._path} is written again, nothing is missing")
            self._refused = False

    def _begin_anew(self, record: Record) -> None:
        assert self._file is not None
        self._file.close()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("ab", buffering=0)
        self._warn(f"{self._path} was removed while the run was writing it: a new one begins at step {record['step']}")

    @staticmethod
    def _warn(line: str) -> None:
        print(f"WARNING: {line}", file=sys.stderr, flush=True)

    def on_end(self, record: Record) -> None:
        """Close it; what the disk does not take even now is lost, and said."""
        if self._file is None:
            return
        lost = self._pending.count(b"\n")
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
            self._file.close()
        except OSError as error:
            self._warn(f"{self._path} lacks the last {lost:,} steps ({error.strerror})")


def _last_record(run: RunInfo) -> dict[str, Any]:
    """The record of the step before the first one to come: a checkpoint may be there before its step's line."""
    return dict(run.resumed_record) | ({"phase": run.phase} if run.phase else {})


def _keep_steps_before(path: Path, start_step: int, last: dict[str, Any]) -> None:
    records, broken = _read(path)
    if broken:
        print(
            f"WARNING: {path} had {len(broken):,} lines that are no records, the first line {broken[0]}: left out, and "
            "their steps with them",
            file=sys.stderr,
            flush=True,
        )
    kept = [record for record in records if record["step"] < start_step]
    if last.get("step") == start_step - 1 and (not kept or kept[-1]["step"] == start_step - 2):
        kept.append(last)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(_to_line(record) for record in kept)
        file.flush()
        os.fsync(file.fileno())
    # Rename is atomic: whoever is killed here leaves the old file or the new one, never half of one.
    partial.replace(path)
