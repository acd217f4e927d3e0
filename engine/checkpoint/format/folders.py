"""The checkpoints of a run on disk: which exist, which is the latest, which may go.

run_dir/checkpoints/
  step_00000100/{manifest.json, rank_*.safetensors}   a checkpoint
  latest                                              the name of the newest one written: a hint, no more
  latest.new                                          the name that it will have when .saving_… is in its place
  .saving_step_00000200/                              being written, or left by a killed run
  .replaced_step_00000100/                            an older one of that step, until its successor is in place
  .deleting_step_00000050/                            no longer kept
  step_00000300.damaged/                              set aside because its files did not match its manifest
  step_00000400.abandoned/                            of an attempt that was given up: the run went on from before it
  step_00000500.suspect/                              no step after it was sound
"""

import math
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoint.format.disk import MANIFEST, sync_folder, write_synced
from engine.checkpoint.format.errors import CheckpointError

_LATEST, _NEXT = "latest", ".new"
_STEP = re.compile(r"step_\d{8,}")
_ASIDE = ("damaged", "suspect", "abandoned")
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
    return sorted(f for f in checkpoints_folder(run_dir).glob("step_*") if f.is_dir() and _STEP.fullmatch(f.name))


def all_checkpoints(run_dir: Path) -> list[Path]:
    """Folders with a manifest, by step, oldest first."""
    return [folder for folder in step_folders(run_dir) if (folder / MANIFEST).is_file()]


def latest_first(run_dir: Path) -> list[Path]:
    """Folders in the order in which resuming tries them: the one that `latest` names (even if it is gone), those before
    it from the newest to the oldest, and at last those after it: an attempt that somebody gave up.
    """
    newest = step_folders(run_dir)[::-1]
    latest = pointed_at(run_dir)
    if latest is None:
        return newest
    before = [folder for folder in newest if step_of(folder) < step_of(latest)]
    return [latest, *before, *(folder for folder in newest if step_of(folder) > step_of(latest))]


def pointed_at(run_dir: Path) -> Path | None:
    """The folder that `latest` names; None where it names none. Nothing but the name of a checkpoint counts."""
    return _named_in(_pointer(checkpoints_folder(run_dir)))


def _pointer(folder: Path) -> Path:
    return folder / _LATEST


def _named_in(pointer: Path) -> Path | None:
    try:
        name = pointer.read_bytes().decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return pointer.parent / name if _STEP.fullmatch(name) else None


def goes_back(run_dir: Path) -> bool:
    """Whether somebody has written the name of an older checkpoint into `latest`."""
    latest, there = pointed_at(run_dir), all_checkpoints(run_dir)
    return latest in there[:-1]


def strange_pointer(run_dir: Path) -> str:
    """What is wrong with `latest`, in words; empty if nothing is."""
    pointer = _pointer(checkpoints_folder(run_dir))
    if not os.path.lexists(pointer) or pointed_at(run_dir) is not None:
        return ""
    return f"{pointer} does not hold the name of a checkpoint (step_ and eight digits): it was not used"


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.removeprefix("step_"))


def set_aside_before(run_dir: Path) -> list[Path]:
    """What has been set aside, by an earlier start or a person: damaged, suspect, or of an attempt given up."""
    aside = [path for why in _ASIDE for path in checkpoints_folder(run_dir).glob(f"step_*.{why}*")]
    return sorted([*aside, *run_dir.glob("checkpoints.damaged*")])


def put_in_place(final: Path) -> None:
    """Rename the finished saving folder to `final`, point `latest` at it, make both durable. Atomic at every moment."""
    saving, replaced = saving_folder(final), final.with_name(_REPLACED + final.name)
    pointer = _pointer(final.parent)
    # Before the renames: whoever is killed behind them has left word that `latest` was to follow.
    write_synced(pointer.with_suffix(_NEXT), final.name.encode())
    if final.exists():
        os.rename(final, replaced)
    os.rename(saving, final)
    sync_folder(final.parent)
    os.replace(pointer.with_suffix(_NEXT), pointer)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def clear_leftovers(run_dir: Path) -> list[str]:
    """Undo what a killed run left half done; returns what was removed. For the holder of the run's lock only."""
    folder, removed = checkpoints_folder(run_dir), []
    _finish_pointing(folder)
    for leftover in sorted(folder.glob(f"{_REPLACED}step_*")):
        final = leftover.with_name(leftover.name.removeprefix(_REPLACED))
        if final.exists():
            shutil.rmtree(leftover)
        else:  # killed between the two renames: the old one is still the good one
            os.rename(leftover, final)
    for leftover in sorted(folder.glob(f"{_DELETING}step_*")):
        shutil.rmtree(leftover, ignore_errors=True)  # on NFS a file that somebody reads cannot go yet
    for leftover in sorted(folder.glob(f"{_SAVING}step_*")):
        shutil.rmtree(leftover)
        removed.append(leftover.name.removeprefix(_SAVING))
    return removed


def _finish_pointing(folder: Path) -> None:
    """Let `latest` follow a checkpoint that was put in its place just before the end of the run. Else it would name an
    older one, as if somebody had gone back to that.
    """
    following = _pointer(folder).with_suffix(_NEXT)
    final = _named_in(following)
    if final is not None and final.is_dir() and not saving_folder(final).exists():
        os.replace(following, _pointer(folder))
    else:
        following.unlink(missing_ok=True)


def set_aside(folder: Path, why: str = "damaged") -> Path:
    """Rename a checkpoint, so that nothing counts it as one and a person can look at it."""
    assert _STEP.fullmatch(folder.name), f"{folder} is no checkpoint"
    number, aside = 1, folder.with_name(f"{folder.name}.{why}")
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.{why}{number}")
    os.rename(folder, aside)
    return aside


def set_later_aside(newest: Path, run_dir: Path) -> list[Path]:
    """Rename the checkpoints after `newest`, which this run has just written: they are of an attempt that was given up,
    and would be counted, and gone back to, as if they were its own. Returns their new names.
    """
    later = [folder for folder in step_folders(run_dir) if step_of(folder) > step_of(newest)]
    return [set_aside(folder, "abandoned") for folder in later]


def prune(run_dir: Path, retention: Retention, spare: Path | None = None) -> list[Path]:
    """Delete what retention does not keep; returns what is gone. A killed deletion leaves no half checkpoint.

    What cannot be deleted (somebody reads it over NFS, or has removed it meanwhile) is no reason to end a run: it is
    said, and tried again with the next checkpoint or at the next start. spare: stays, too.
    """
    folders = all_checkpoints(run_dir)
    keep = set(folders[-retention.last :]) | set(latest_first(run_dir)[:1])
    if spare is not None:
        keep.add(spare)
    if retention.every_steps:
        keep |= {f for f in folders if step_of(f) % retention.every_steps == 0}
    if retention.best:
        keep |= set(_best(folders, retention))
    gone = []
    for folder in (folder for folder in folders if folder not in keep):
        doomed = folder.with_name(_DELETING + folder.name)
        try:
            os.rename(folder, doomed)
            gone.append(folder)
            shutil.rmtree(doomed)
        except OSError as error:
            line = f"WARNING: {folder} is no longer kept and could not be deleted whole: {error.strerror}"
            print(line, file=sys.stderr, flush=True)
    return gone


def _best(folders: list[Path], retention: Retention) -> list[Path]:
    # Needs torch, for which who only looks for a folder need not wait.
    from engine.checkpoint.format.manifest import step_record

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
