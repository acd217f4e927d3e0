"""Saving: snapshot, background writer on every rank, commit by rank 0.

1. All ranks copy what they own to host memory (the stall), agree that it fits on the disk, and go on training.
2. A thread a rank writes rank_*.safetensors, hashing while it writes, then a small rank_*.json: size, hash, and which
   tables of shards its parts follow from; the first rank of a table writes it down.
3. Rank 0's thread waits for those of all ranks, merges them into the manifest, renames the folder into its place, moves
   `latest` and deletes what is no longer kept.
A state that is not finite is not committed: there would be nothing to go back to. The checkpoint before stays until the
step after a new one was sound (`certify`).

No collective runs in a thread, so the training's own never meet one of them; the ranks meet over the file system, which
they need to share anyway. At most one save is under way: the next one waits for it (stall). A writer that fails stops
its rank at the next step with the reason, and torchrun stops the others.
"""

import copy
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.flat_slice import FlatSlice
from engine.checkpoint.format.folders import (
    Retention,
    prune,
    put_in_place,
    saving_folder,
    set_later_aside,
    step_folder,
)
from engine.checkpoint.format.manifest import (
    MANIFEST,
    RECORD,
    Manifest,
    Position,
    sync_folder,
    write_manifest,
    write_synced,
)
from engine.checkpoint.format.tables import ShardTable, digest_of, parse_table, rank_file, table_entry
from engine.checkpoint.format.tensor_file import FileRecord, TensorSpec, write_tensor_file
from engine.checkpoint.state import Snapshot, SnapshotPart
from engine.config.read import Config, to_dict
from engine.optim.optimizer import ShardedOptimizer
from engine.parallel.agree import everyone, raise_together
from engine.parallel.mesh import Mesh
from engine.resilience.watch import LOOKS_AROUND
from engine.waits import Flag

_POLL_S = 0.02
_WAIT_S = 1.0
"""Between two looks for room (checkpoint.on_full=wait)."""
_MARGIN_BYTES = 64 * 2**20
"""Left free for the manifest, the metrics and whatever else the run writes."""


class CheckpointSaver:
    """Writes the checkpoints of one run. One on every rank."""

    def __init__(self, run_dir: Path, optimizer: ShardedOptimizer, config: Config, mesh: Mesh, retention: Retention):
        self.run_dir, self.config, self.mesh, self.retention = run_dir, config, mesh, retention
        self.saved: list[Path] = []
        """Folders of this saver's checkpoints, oldest first; retention may have deleted them since."""
        self.certified: list[Path] = []
        """Those of them after which a step was sound: what a rewind goes to."""
        self.rejected = ""
        """Why the last save is no checkpoint although nothing failed: its state is not finite. Known after `wait`."""
        self.stop_wish: Callable[[], str] = str
        """Asked while there is no room: why this rank is to stop; empty: it is not."""
        self.given_up = ""
        """Why the last save no longer waited for room: the run is to stop. The same on all ranks."""
        self._sound: Path | None = None
        """A save under way after which a step was sound already."""
        self._snapshot = Snapshot(optimizer, mesh)
        self._writing: BackgroundTask | None = None
        self._committing: BackgroundTask | None = None
        self._completing: BackgroundTask | None = None
        self._cancelled = Flag()

    def save(
        self,
        position: Position,
        callbacks: dict[str, Any],
        metrics: dict[str, float],
        data: dict[str, Any] | None = None,
    ) -> None:
        """Start saving the state as it is now; returns when it is copied. Collective over the mesh.

        data: fingerprint of the run's data.
        """
        self.wait()
        parts = self._snapshot.take()
        final = step_folder(self.run_dir, position.step)
        if not self._make_room(final, sum(part.values.nbytes for part in parts)):
            return
        rank = self.mesh.world.rank
        self.rejected = ""
        tables = self._snapshot.tables()
        self._writing = BackgroundTask(lambda: write_rank(saving_folder(final), rank, parts, tables))
        if rank == 0:
            manifest = self.head(position, callbacks, metrics, data or {})
            self._committing = BackgroundTask(lambda: self._commit(final, manifest))
        self.saved.append(final)

    def certify(self) -> None:
        """The step after the last save was sound: what it replaces may go. Local; for every sound step."""
        commit = self._committing
        if not self.saved or self.saved[-1] in self.certified:
            return
        if commit is not None and not commit.done:
            self._sound = self.saved[-1]  # it is certified as soon as it is there
            return
        self.certified.append(self.saved[-1])
        if self.mesh.world.rank == 0 and self._completing is None:
            self._completing = BackgroundTask(lambda: self._prune(self.certified[-1]))

    def finish(self) -> None:
        """Wait for the last save of a run; nothing comes after it that could certify it. Collective over the mesh."""
        self.wait()
        if self.rejected:
            raise CheckpointError(f"{self.saved[-1].name} was not saved: {self.rejected}")
        if self.mesh.world.rank == 0:
            prune(self.run_dir, self.retention)

    def _prune(self, certified: Path | None) -> None:
        prune(self.run_dir, self.retention, spare=certified)

    def add_metrics(self, metrics: dict[str, float]) -> None:
        """Complete the record of the checkpoint under way, once it is in its place. Local."""
        commit = self._committing
        if commit is not None:
            final = self.saved[-1]
            self._completing = BackgroundTask(lambda: self._complete(commit, final, metrics))

    def _complete(self, commit: "BackgroundTask", final: Path, metrics: dict[str, float]) -> None:
        commit.join()
        if (final / MANIFEST).is_file():
            write_synced(final / RECORD, json.dumps(metrics).encode())
            self._prune(self.certified[-1] if self.certified else None)

    def failure(self) -> CheckpointError | None:
        """What a writer of this rank ran into. Local; for every step, so that all ranks can stop together."""
        for task in (self._writing, self._committing, self._completing):
            if task is not None and task.error is not None and self.config.checkpoint.on_full == "stop":
                self._cancelled.set()
                return task.error
        return None

    def wait(self) -> None:
        """Until the save under way, if any, is a checkpoint. Collective over the mesh."""
        if self._writing is None:
            if self._completing is not None:
                self._completing.join()
            return
        error = self._writing.join()
        failed = [e for e in everyone(error, self.mesh.world) if e]
        if failed:
            self._cancelled.set()  # rank 0 would wait for a file that never comes
        commit = next((p for task in (self._committing, self._completing) if task and (p := task.join())), None)
        self._writing = self._committing = self._completing = None
        if not self._settle(failed[0] if failed else commit) and not self._is_in_place():
            lost = self.saved.pop()  # nobody may count on it
            if self.mesh.world.rank == 0:
                shutil.rmtree(saving_folder(lost), ignore_errors=True)  # it would take room from the next one
        elif self.saved[-1] == self._sound and self._sound not in self.certified:
            self.certified.append(self._sound)
        self.rejected = everyone(self.rejected, self.mesh.world)[0]

    def _is_in_place(self) -> bool:
        """Whether rank 0 has the last save as a checkpoint, as where its record or the pruning behind it failed.
        Collective over the mesh.
        """
        return everyone((self.saved[-1] / MANIFEST).is_file(), self.mesh.control)[0]

    def abandon(self, patience_s: float = 6.0) -> str | None:
        """At the end of a run, also after an error: let the save under way finish if it can, without a collective.

        patience_s: how long rank 0 waits for the files of ranks that may be gone, while none of them grows. Returns
        what went wrong with it in words; nothing if none is under way.
        """
        problem = self._writing.join() if self._writing is not None else None
        if self._committing is not None:
            seen, since_s = _sizes(saving_folder(self.saved[-1])), time.monotonic()
            while not self._committing.done and time.monotonic() - since_s < patience_s:
                self._committing.join(_POLL_S)
                sizes = _sizes(saving_folder(self.saved[-1]))
                if sizes != seen:
                    seen, since_s = sizes, time.monotonic()
            self._cancelled.set()
            problem = problem or self._committing.join()
        if self._completing is not None:
            problem = problem or self._completing.join()
        self._writing = self._committing = self._completing = None
        return problem

    def _settle(self, error: str | None, then: str = "training goes on") -> bool:
        """Whether all ranks are well; where they are not, raise or warn, as checkpoint.on_full says. Collective.

        then: what comes after a warning; empty: it was given before.
        """
        if self.config.checkpoint.on_full == "stop":
            raise_together(error, self.mesh.control)
            return True
        found = next((e for e in everyone(error, self.mesh.control) if e), None)
        if found is not None and then and self.mesh.world.rank == 0:
            print(f"WARNING: {found}; {then}", file=sys.stderr, flush=True)
        self._cancelled.clear()
        return found is None

    def _make_room(self, final: Path, own_bytes: int) -> bool:
        """An empty saving folder on a disk that can hold all ranks' parts; whether there is one. Collective.

        With checkpoint.on_full=wait until there is, or the run is asked to stop: whoever asks ends it sooner or later.
        """
        total, self.given_up = sum(everyone(own_bytes, self.mesh.control)), ""
        waits, told = self.config.checkpoint.on_full == "wait", False
        while True:
            error = None
            if self.mesh.world.rank == 0:
                try:
                    _prepare(saving_folder(final), total)
                except (CheckpointError, OSError) as problem:
                    error = f"cannot save {final}: {problem}"
            stop = next(filter(None, everyone(self.stop_wish(), self.mesh.control)), "") if waits else ""
            then = "training waits for room" if waits else "training goes on"
            if self._settle(error, "" if told else "a stop does not wait for room" if stop else then):
                return True
            if stop or not waits:
                self.given_up = stop
                return False
            told = True
            time.sleep(_WAIT_S)

    def head(
        self, position: Position, callbacks: dict[str, Any], metrics: dict[str, float], data: dict[str, Any]
    ) -> Manifest:
        """The manifest of such a checkpoint, before anything of it is written."""
        mesh = self.mesh
        return Manifest(
            content="training",
            config=to_dict(self.config),
            layout={"tensor": mesh.tensor.size, "pipeline": mesh.pipeline.size, "data": mesh.data.size},
            tensors={},
            files={},
            position=Position(**asdict(position)),
            seed=self.config.train.seed,
            data=data,
            callbacks=copy.deepcopy(callbacks),
            metrics=metrics,
        )

    def _commit(self, final: Path, manifest: Manifest) -> None:
        folder = saving_folder(final)
        rejected: list[str] = []
        reports = [folder / f"rank_{rank:05d}.json" for rank in range(self.mesh.world.size)]
        if not self._wait_for(reports):
            return
        contents = [json.loads(report.read_text()) for report in reports]
        for rank, (report, content) in enumerate(zip(reports, contents, strict=True)):
            if content["not_finite"]:
                rejected.append(f"rank {rank} on {content['host']} holds {', '.join(content['not_finite'][:3])}")
            report.unlink()
        if rejected:
            self.rejected = f"not finite: {'; '.join(rejected[:4])}"
            shutil.rmtree(folder)
            print(f"WARNING: {final.name} was not saved: {self.rejected}", file=sys.stderr, flush=True)
            return
        merge_reports(manifest, contents)
        write_manifest(folder, manifest)
        put_in_place(final)
        for folder in set_later_aside(final, self.run_dir):
            print(f"WARNING: {folder.name}: of an attempt that this run does not continue", file=sys.stderr, flush=True)
        self._prune(self.certified[-1] if self.certified else None)

    def _wait_for(self, files: list[Path]) -> bool:
        """Until all are there; False if the save is given up before."""
        own = threading.current_thread()
        name, own.name = own.name, f"commit {LOOKS_AROUND}"
        try:
            for file in files:
                while not file.is_file():
                    if self._cancelled.wait(_POLL_S):
                        return False
            return True
        finally:
            own.name = name


class BackgroundTask:
    """A thread whose failure waits to be picked up."""

    def __init__(self, work):
        self.error: CheckpointError | None = None
        self._ended = Flag()
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work) -> None:
        try:
            work()
        except CheckpointError as error:
            self.error = error
        except Exception as error:  # nothing a thread raises may be lost
            self.error = CheckpointError(f"the checkpoint writer failed: {type(error).__name__}: {error}")
        finally:
            self._ended.set()

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._ended.is_set()

    def join(self, timeout_s: float | None = None) -> str | None:
        """Wait for the end; the failure in words, if any."""
        if timeout_s is None or self._ended.wait(timeout_s):
            self._thread.join()
        return str(self.error) if self.error else None


def _prepare(folder: Path, total_bytes: int) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        shutil.rmtree(folder)  # of an attempt that failed
    free = shutil.disk_usage(folder.parent).free
    if free < total_bytes + _MARGIN_BYTES:
        raise CheckpointError(
            f"it needs {total_bytes / 1e9:.2f} GB beside {_MARGIN_BYTES / 1e9:.2f} GB kept in reserve, and "
            f"{free / 1e9:.2f} GB are free: free some space, or lower checkpoint.keep_last"
        )
    folder.mkdir()


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of what is being written, by name."""
    try:
        return {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
    except OSError:  # it has its name by now, or the disk is gone
        return {}


def write_rank(folder: Path, rank: int, parts: list[SnapshotPart], tables: list[ShardTable]) -> dict[str, Any]:
    """Write what a rank owns, unless it is not finite, and at last the report that says so; returns the report."""
    not_finite = [part.key for part in parts if not bool(torch.isfinite(part.values).all())]
    report: dict[str, Any] = {"host": socket.gethostname(), "not_finite": not_finite}
    if not not_finite:
        report |= _write_parts(folder / rank_file(rank), parts)
        report["tables"] = [_table_report(rank, table) for table in tables]
        _require_tables(rank, parts, tables)
    hidden = folder / f".rank_{rank:05d}.json"
    write_synced(hidden, json.dumps(report).encode())
    sync_folder(folder)
    # Complete as soon as it has its name: rank 0 looks for that, and may have moved the folder an instant later.
    hidden.rename(folder / f"rank_{rank:05d}.json")
    return report


def _write_parts(file: Path, parts: list[SnapshotPart]) -> dict[str, Any]:
    specs = [TensorSpec(part.key, part.values.dtype, (part.values.numel(),)) for part in parts]
    record = write_tensor_file(file, specs, (part.values for part in parts))
    return {"file": file.name, "record": asdict(record)}


def _table_report(rank: int, table: ShardTable) -> dict[str, Any]:
    """What a rank says of a table: the first has it whole, the others what they would have said."""
    entry = table_entry(table)
    given = {"table": entry, "shapes": table.shapes()} if rank == table.ranks[0] else {}
    return {"digest": digest_of(entry), **given}


def _require_tables(rank: int, parts: list[SnapshotPart], tables: list[ShardTable]) -> None:
    """What was written is what its place in the tables says, or nobody would find it."""
    said: dict[str, FlatSlice] = {}
    for table in tables:
        said |= table.owned(rank)
    wrong = sorted(key for key, _ in said.items() ^ {part.key: part.where for part in parts}.items())
    if wrong:
        raise CheckpointError(f"rank {rank} does not own of {wrong[0]} what its place says")


def merge_reports(manifest: Manifest, reports: list[dict[str, Any]]) -> None:
    """Add files and tensors of all ranks. Raises CheckpointError where ranks disagree on where they lie."""
    told: dict[str, list[int]] = {}
    given: dict[str, ShardTable] = {}
    for rank, report in enumerate(reports):
        manifest.files[report["file"]] = FileRecord(**report["record"])
        for entry in report["tables"]:
            told.setdefault(entry["digest"], []).append(rank)
            if "table" in entry:
                shapes = {name: tuple(shape) for name, shape in entry["shapes"].items()}
                given[entry["digest"]] = parse_table(entry["table"], shapes, len(reports))
    for digest, ranks in told.items():
        table = given.get(digest)
        if table is None or sorted(table.ranks) != ranks:
            raise CheckpointError(f"ranks {ranks[:4]} do not agree with the owners of their slices on what these are")
        manifest.add_table(table)
