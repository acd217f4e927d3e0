"""The checkpoints of a run on disk: which exist, which is the latest, which may go.

run_dir/checkpoints/
  step_00000100/{manifest.json, rank_*.safetensors}   a checkpoint
  latest                                              the name of the newest one written
  .saving_step_00000200/                              being written, or left by a killed run
  .replaced_step_00000100/                            an older one of that step, until its successor is in place
  .deleting_step_00000050/                            no longer kept
  step_00000300.damaged/                              set aside because its files did not match its manifest
"""

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.manifest import MANIFEST, step_record, sync_folder, write_synced

_LATEST = "latest"
_SAVING, _REPLACED, _DELETING = ".saving_", ".replaced_", ".deleting_"


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints stay when a new one is in place; the latest always does."""

    last: int
    """The newest n."""
    every_steps: int = 0
    """Those whose step is a multiple; 0: none for this reason."""
    best: str = ""
    """Name of a metric of the step record; the best by it stays. Empty: none for this reason."""
    best_is: str = "min"
    """min | max."""


def checkpoints_folder(run_dir: Path) -> Path:
    """Where the checkpoints of a run lie."""
    return run_dir / "checkpoints"


def step_folder(run_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps."""
    return checkpoints_folder(run_dir) / f"step_{step:08d}"


def saving_folder(final: Path) -> Path:
    """Where the files of `final` are written before it exists."""
    return final.with_name(_SAVING + final.name)


def step_folders(run_dir: Path) -> list[Path]:
    """Everything that stands in the place of a checkpoint, whole or not, by step, oldest first."""
    return sorted(f for f in checkpoints_folder(run_dir).glob("step_*") if f.is_dir() and not f.suffix)


def all_checkpoints(run_dir: Path) -> list[Path]:
    """Folders with a manifest, by step, oldest first."""
    return [folder for folder in step_folders(run_dir) if (folder / MANIFEST).is_file()]


def latest_first(run_dir: Path) -> list[Path]:
    """Folders in the order in which resuming tries them: the one that `latest` names (even if it is gone), the newest,
    and so on to the oldest.
    """
    newest = step_folders(run_dir)[::-1]
    pointer = checkpoints_folder(run_dir) / _LATEST
    if not pointer.is_file():
        return newest
    latest = checkpoints_folder(run_dir) / pointer.read_text().strip()
    return [latest, *(folder for folder in newest if folder != latest)]


def put_in_place(final: Path) -> None:
    """Rename the finished saving folder to `final`, point `latest` at it, make both durable. Atomic at every moment."""
    saving, replaced = saving_folder(final), final.with_name(_REPLACED + final.name)
    if final.exists():
        os.rename(final, replaced)
    os.rename(saving, final)
    sync_folder(final.parent)
    pointer = final.parent / _LATEST
    write_synced(pointer.with_suffix(".new"), final.name.encode())
    os.replace(pointer.with_suffix(".new"), pointer)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def clear_leftovers(run_dir: Path) -> list[str]:
    """Undo what a killed run left half done; returns what was removed. For the holder of the run's lock only."""
    folder, removed = checkpoints_folder(run_dir), []
    for leftover in sorted(folder.glob(f"{_REPLACED}step_*")):
        final = leftover.with_name(leftover.name.removeprefix(_REPLACED))
        if final.exists():
            shutil.rmtree(leftover)
        else:  # killed between the two renames: the old one is still the good one
            os.rename(leftover, final)
    for leftover in sorted(folder.glob(f"{_DELETING}step_*")):
        shutil.rmtree(leftover)
    for leftover in sorted(folder.glob(f"{_SAVING}step_*")):
        shutil.rmtree(leftover)
        removed.append(leftover.name.removeprefix(_SAVING))
    return removed


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that nothing counts it as one and a person can look at it."""
    number, aside = 1, folder.with_name(f"{folder.name}.damaged")
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.damaged{number}")
    os.rename(folder, aside)
    return aside


def prune(run_dir: Path, retention: Retention) -> list[Path]:
    """Delete what retention does not keep; returns the deleted folders. A killed deletion leaves no half checkpoint."""
    folders = all_checkpoints(run_dir)
    keep = set(folders[-retention.last :]) | set(latest_first(run_dir)[:1])
    if retention.every_steps:
        keep |= {f for f in folders if int(f.name.removeprefix("step_")) % retention.every_steps == 0}
    if retention.best:
        keep |= set(_best(folders, retention))
    gone = [folder for folder in folders if folder not in keep]
    for folder in gone:
        doomed = folder.with_name(_DELETING + folder.name)
        os.rename(folder, doomed)
        shutil.rmtree(doomed)
    return gone


def _best(folders: list[Path], retention: Retention) -> list[Path]:
    values: dict[Path, float] = {}
    for folder in folders:
        try:
            value = step_record(folder)[retention.best]
        except (CheckpointError, KeyError):
            continue  # written before the metric was asked for, or damaged: not a candidate
        if math.isfinite(value):  # a step that health skipped has none, and NaN would be the least of all
            values[folder] = value
    if not values:
        return []
    choose = min if retention.best_is == "min" else max
    return [choose(values, key=values.__getitem__)]


def resolve_checkpoint(path: Path) -> Path:
    """A checkpoint folder, or the latest of a run folder. Raises CheckpointError for anything else."""
    if (path / MANIFEST).is_file():
        return path
    found = [folder for folder in latest_first(path) if (folder / MANIFEST).is_file()]
    if not found:
        raise CheckpointError(
            f"{path} is neither a checkpoint (no {MANIFEST}) nor a run folder with one (checkpoint.every_steps > 0?)"
        )
    return found[0]
