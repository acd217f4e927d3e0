"""What a job starts from: its newest good checkpoint, a given one, initial weights from elsewhere, or nothing."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.build import Towers
from engine.checkpoint.border import cross_border
from engine.checkpoint.continuity import accept_settings, changed_settings
from engine.checkpoint.format.errors import CheckpointError, listed
from engine.checkpoint.format.folders import (
    all_checkpoints,
    clear_leftovers,
    goes_back,
    latest_first,
    resolve_checkpoint,
    set_aside,
    set_aside_before,
    step_of,
    strange_pointer,
)
from engine.checkpoint.format.lock import RunLock
from engine.checkpoint.format.manifest import Position, read_manifest, step_record
from engine.checkpoint.format.matching import Exceptions
from engine.checkpoint.initial import initialise_from
from engine.checkpoint.load import resume_training, training_position
from engine.checkpoint.local.sets import newest_local
from engine.checkpoint.reader import Checkpoint
from engine.config.phases import Phase
from engine.config.read import Config, to_dict
from engine.optim.optimizer import ShardedOptimizer
from engine.parallel.agree import everyone, raise_together
from engine.parallel.mesh import Mesh
from engine.resilience.status import step_of_this_start


@dataclass
class Start:
    """Where training begins."""

    position: Position
    callbacks: dict[str, Any] = field(default_factory=dict)
    """Class name -> state of the callbacks of the run that is continued."""
    data: dict[str, Any] = field(default_factory=dict)
    """Fingerprint of the data that the checkpoint has seen; empty if it does not say."""
    record: dict[str, float] = field(default_factory=dict)
    """Record of the last step, as the checkpoint holds it."""
    folder: Path | None = None
    """The checkpoint; None for a fresh run."""
    at_border: bool = False
    """A phase begins: its checkpoint is that of the phase before."""


def lock_run(run_dir: Path, mesh: Mesh) -> RunLock | None:
    """Take the run folder (rank 0). Collective; raises on every rank."""
    lock, error = None, None
    if mesh.world.rank == 0:
        try:
            lock = RunLock(run_dir)
        except (CheckpointError, OSError) as problem:
            error = str(problem)
    raise_together(error, mesh.world)
    return lock


def clear_run(run_dir: Path, mesh: Mesh) -> None:
    """Undo what a killed job left in the run folder, which this one holds. Collective; raises on every rank."""
    error = None
    if mesh.world.rank == 0:
        try:
            for name in clear_leftovers(run_dir):
                _say(f"removed the unfinished checkpoint {name} of a run that was stopped while saving", mesh)
        except OSError as problem:
            error = f"{problem.filename or run_dir} was left by a killed run and cannot be removed ({problem.strerror})"
            error += ": remove it, or name another run_dir"
        except CheckpointError as problem:
            error = str(problem)
    raise_together(error, mesh.world)


def start(
    towers: Towers, optimizer: ShardedOptimizer, phase: Phase, mesh: Mesh, checkpoint: Checkpoint | None
) -> Start:
    """Go on from a checkpoint, or, without one, do what init asks for. Collective over the mesh."""
    if checkpoint is None:
        for line in initialise_from(phase.config, towers, optimizer, mesh):
            _say(line, mesh)
        return Start(Position(step=0, samples_seen=0))
    position = training_position(checkpoint)
    if not 0 < position.step == phase.first_step:  # a phase begins with settings of its own
        changes = changed_settings(checkpoint.manifest.config, to_dict(phase.config))
        said = accept_settings(changes, phase.config.checkpoint.accept, checkpoint.folder)
        if said:
            _say(f"WARNING: {said}", mesh)
    begin = load_state(towers, optimizer, phase, mesh, checkpoint)
    checkpoint.close()
    return begin


def load_state(towers: Towers, optimizer: ShardedOptimizer, phase: Phase, mesh: Mesh, checkpoint: Checkpoint) -> Start:
    """The state that a checkpoint gives this phase: its own, or that of the phase before. Collective over the mesh."""
    position = training_position(checkpoint)
    _check_position(position, phase, checkpoint.folder)
    at_border = 0 < position.step == phase.first_step
    if at_border:
        position, lines = cross_border(
            checkpoint, towers, optimizer, phase.config, mesh, reset_optimizer=phase.reset_optimizer
        )
        did = f"phase {phase.name} goes on"
    else:
        position, chosen = resume_training(checkpoint, towers, optimizer, phase.config, mesh)
        lines, did = chosen.lines(), "resumed"
    optimizer.step_count = position.step - phase.schedule_first_step
    _say(f"{did} from {checkpoint.folder} (step {position.step}): " + "; ".join(lines), mesh)
    manifest = checkpoint.manifest
    return Start(
        position, manifest.callbacks, manifest.data, step_record(checkpoint.folder), checkpoint.folder, at_border
    )


def _check_position(position: Position, phase: Phase, folder: Path) -> None:
    """Steps and samples of the phases before must be those of the checkpoint: the data order begins between them."""
    wanted = phase.first_sample + (position.step - phase.first_step) * phase.config.train.global_batch_size
    if phase.name and position.samples_seen != wanted:
        raise CheckpointError(
            f"{folder} has seen {position.samples_seen:,} samples at step {position.step}, the phases of this config "
            f"say {wanted:,}: what lies behind a run cannot change; restore the lengths and batch sizes of its phases"
        )


def choose(config: Config, mesh: Mesh) -> Checkpoint | None:
    """The checkpoint that checkpoint.resume asks for, checked; None for a fresh run. Collective over the mesh."""
    run_dir, wish = Path(config.run_dir), config.checkpoint.resume
    own = wish != "none" or (is_started_again(mesh) and _has_trained(run_dir))
    if since := everyone(_made_since(run_dir, wish) if own else "", mesh.control)[0]:
        _say(f"WARNING: {run_dir} goes on with what it has made ({since}) since it began with {_begun(wish)}", mesh)
    if wish == "auto" or since:
        shared, gone_back = everyone((all_checkpoints(run_dir)[-1:], goes_back(run_dir)), mesh.control)[0]
        newest = step_of(shared[0]) if shared else 0
        if gone_back:  # sets on the hosts are of the attempt that was given up
            return newest_good(run_dir, config, mesh)
        if local := newest_local(config, mesh, newer_than=newest):
            return local
        good = newest_good(run_dir, config, mesh)
        if good is None or step_of(good.folder) == newest:
            return good
        return newest_local(config, mesh, newer_than=step_of(good.folder)) or good  # the newest was damaged
    if wish != "none":
        exceptions = Exceptions(skip=config.checkpoint.skip, reinit=config.checkpoint.reinit)
        checkpoint = Checkpoint(resolve_checkpoint(Path(wish)), exceptions)
        problems = _problems(checkpoint, config, mesh)
        if problems:
            raise CheckpointError(f"{checkpoint.folder} is damaged:{listed(problems)}")
        return checkpoint
    if all_checkpoints(run_dir):
        raise CheckpointError(
            f"{run_dir} holds checkpoints of an earlier run, which a fresh one would mix with its own: set another "
            "run_dir, delete its checkpoints folder, or set checkpoint.resume=auto to go on with it"
        )
    return None


def _made_since(run_dir: Path, wish: str) -> str:
    """Name of this run's newest checkpoint if the run began with the same wish; empty otherwise.

    Whoever starts a job again (torchrun, SLURM, a loop) has its first command only, which must not begin it anew.
    """
    for folder in latest_first(run_dir) if wish != "auto" else ():
        try:
            began = read_manifest(folder).config["checkpoint"]["resume"]
        except (CheckpointError, KeyError, TypeError):
            continue
        return folder.name if began == wish else ""
    return ""


def is_started_again(mesh: Mesh) -> bool:
    """Whether torchrun or SLURM say that they have started this job again. torchrun on a host counts the failures of
    its own ranks alone, not that it started them again for those of another host. Collective over the mesh.
    """
    return any(everyone(_has_count("TORCHELASTIC_RESTART_COUNT") or _has_count("SLURM_RESTART_COUNT"), mesh.control))


def _has_trained(run_dir: Path) -> bool:
    """Whether what lies in the folder of a job that began with nothing is its own. torchrun starts one again, too, that
    was refused for the checkpoints of another.
    """
    return _has_count("SLURM_RESTART_COUNT") or step_of_this_start(run_dir) is not None


def _has_count(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def _begun(wish: str) -> str:
    return f"checkpoint.resume={wish}" + ("" if wish == "none" else "; to begin there again, name another run_dir")


def newest_good(run_dir: Path, config: Config, mesh: Mesh) -> Checkpoint | None:
    """The first of latest, newest, … that is whole; None where there is no checkpoint. Collective over the mesh."""
    first = mesh.world.rank == 0
    candidates = everyone(latest_first(run_dir) if first else None, mesh.control)[0]
    if first and (strange := strange_pointer(run_dir)):
        _say(f"WARNING: {strange}", mesh)
    if not candidates:
        raise_together(_only_damaged(run_dir) if first else None, mesh.control)
    return first_good(candidates, config, mesh)


def _only_damaged(run_dir: Path) -> str:
    aside = set_aside_before(run_dir)
    return "" if not aside else (
        f"{run_dir} holds nothing but checkpoints that were set aside ({', '.join(str(path) for path in aside)}), and "
        "starting afresh was not asked for: mend one and give it its name back, or set checkpoint.resume=none"
    )  # fmt: skip


def first_good(candidates: Sequence[Path], config: Config, mesh: Mesh) -> Checkpoint | None:
    """The first whose every byte is what was written; damaged ones are set aside, loudly. None: no candidates.

    candidates: the same on every rank. Collective over the mesh; raises CheckpointError if all are damaged.
    """
    bad: list[tuple[Path, list[str]]] = []
    for folder in candidates:
        checkpoint, problems = _try_open(folder, config, mesh)
        if checkpoint is not None and not problems:
            _warn_of(bad, folder, mesh)
            return checkpoint
        bad.append((folder, problems))
    if bad:
        reasons = "\n".join(f"{folder}:{listed(problems)}" for folder, problems in bad)
        raise CheckpointError(
            f"no checkpoint of {config.run_dir} is whole, and starting afresh was not asked for:\n{reasons}"
        )
    return None


def _warn_of(bad: list[tuple[Path, list[str]]], good: Path, mesh: Mesh) -> None:
    if mesh.world.rank != 0:
        return
    for folder, problems in bad:
        _say(f"WARNING: {folder} is damaged and was not used:{listed(problems)}{_set_aside(folder)}", mesh)
    if bad:
        _say(f"WARNING: falling back to the last good checkpoint, {good}", mesh)


def _try_open(folder: Path, config: Config, mesh: Mesh) -> tuple[Checkpoint | None, list[str]]:
    checkpoint, own = None, []
    try:
        checkpoint = Checkpoint(folder)
    except CheckpointError as error:
        own = [str(error)]
    problems = sorted({p for part in everyone(own, mesh.world) for p in part})
    if problems or checkpoint is None:
        return None, problems
    return checkpoint, _problems(checkpoint, config, mesh)


def _problems(checkpoint: Checkpoint, config: Config, mesh: Mesh) -> list[str]:
    """Every file checked by one rank, all ranks at the same time; says how fast."""
    hashes, began = config.checkpoint.verify_hashes, time.perf_counter()
    own = checkpoint.problems(mesh.world.rank, mesh.world.size, hashes=hashes)
    problems = [problem for part in everyone(own, mesh.world) for problem in part]
    if hashes and not problems:
        seconds, gb = time.perf_counter() - began, checkpoint.manifest.size_bytes() / 1e9
        files = len(checkpoint.manifest.files)
        _say(
            f"checked {files} files of {checkpoint.folder.name}, {gb:.3g} GB in {seconds:.2f} s: "
            f"{gb / seconds:.2g} GB/s over {min(files, mesh.world.size)} ranks",
            mesh,
        )
    return problems


def _set_aside(folder: Path) -> str:
    if not folder.exists():
        return ""
    try:
        return f"\n    it is kept as {set_aside(folder)}"
    except OSError as error:
        return f"\n    it could not be renamed: {error.strerror}"


def _say(line: str, mesh: Mesh) -> None:
    if mesh.world.rank == 0:
        print(line, file=sys.stderr, flush=True)
