"""Writes sets: every rank its file and, of its neighbour's, a copy."""

import shutil
import sys
from pathlib import Path

from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.manifest import MANIFEST, Manifest, write_manifest
from engine.checkpoint.format.tables import ShardTable, rank_file
from engine.checkpoint.local import sets
from engine.checkpoint.local.copies import HEAD, copies_axis, partner_of, receive, send
from engine.checkpoint.local.sets import local_folder, make_own, require_one_host, set_name
from engine.checkpoint.save import BackgroundTask, write_rank
from engine.checkpoint.state import Snapshot, SnapshotPart
from engine.config.read import Config
from engine.optim.optimizer import ShardedOptimizer
from engine.parallel.agree import everyone
from engine.parallel.mesh import Axis, Mesh

_ROOM = 2.5
"""A set needs its own bytes and those of a copy; and readers use shared memory, too."""


class LocalSaver:
    """Writes the sets of one run. One on every rank; collective over the mesh."""

    def __init__(self, optimizer: ShardedOptimizer, config: Config, mesh: Mesh):
        """Raises CheckpointError on every rank where tensor ranks are on several hosts or the folder is not ours."""
        self.config, self.mesh = config, mesh
        self.folder = local_folder(config)
        self.hosts: list[str] = everyone(sets.host_of(config), mesh.control)
        require_one_host(self.hosts, mesh)
        problems = [problem for problem in everyone(make_own(self.folder), mesh.control) if problem]
        if problems:
            raise CheckpointError(problems[0])
        rank = mesh.world.rank
        self.is_lead = self.hosts.index(self.hosts[rank]) == rank
        self._partner = partner_of(rank, self.hosts)
        self._sources = [source for source in range(len(self.hosts)) if partner_of(source, self.hosts) == rank]
        self._axis = copies_axis(mesh) if self._partner is not None else None
        self._snapshot = Snapshot(optimizer, mesh)
        self._writing: BackgroundTask | None = None
        self._newest: Path | None = None

    def save(self, head: Manifest) -> None:
        """Start saving the state as it is now. head: the manifest of such a checkpoint, without tensors."""
        self.wait()
        assert head.position is not None
        parts = self._snapshot.take()
        lacking = self._lacks_room(sum(part.values.nbytes for part in parts))
        if lacking:
            self._warn(f"no local checkpoint after step {head.position.step}: {lacking}")
            return
        folder = self.folder / set_name(head.position.step, self.mesh)
        self._newest = folder
        tables = self._snapshot.tables()
        self._writing = BackgroundTask(lambda: self._write(folder, parts, tables, head))

    def wait(self) -> None:
        """Until the set under way is complete; older ones go."""
        if self._writing is None or self._newest is None:
            return
        error, self._writing = self._writing.join(), None
        problems = [problem for problem in everyone(error, self.mesh.control) if problem]
        if problems:
            self._warn(f"{self._newest.name} is no local checkpoint: {problems[0]}")
        elif self.is_lead:
            for folder in self.folder.glob("step_*"):
                if folder != self._newest:
                    shutil.rmtree(folder, ignore_errors=True)

    def forget(self) -> None:
        """Delete them all, because their state may be at fault: no start goes on from them. Collective."""
        self.wait()
        if self.is_lead:
            for folder in self.folder.glob("step_*"):
                shutil.rmtree(folder, ignore_errors=True)
        self._newest = None

    def abandon(self) -> None:
        """At the end of a run, also after an error, when nobody else may answer any more."""
        if self._writing is not None:
            self._writing.join(1.0)

    def _write(self, folder: Path, parts: list[SnapshotPart], tables: list[ShardTable], head: Manifest) -> None:
        """Write in a thread, then exchange copies; a partner hears of a failure, too, and does not wait."""
        error: Exception | None = None
        rank = self.mesh.world.rank
        files: list[str] = []
        try:
            (folder / HEAD).mkdir(parents=True, exist_ok=True)
            report = write_rank(folder, rank, parts, tables)
            if report["not_finite"]:
                raise CheckpointError(f"rank {rank} holds {report['not_finite'][0]}, which is not finite")
            files = [rank_file(rank), f"rank_{rank:05d}.json"]
            if rank == 0:
                write_manifest(folder / HEAD, head)
                files.append(f"{HEAD}/{MANIFEST}")
        except (OSError, CheckpointError) as problem:
            error = problem
        if self._axis is not None:
            self._exchange(folder, files, self._axis)
        if error is not None:
            raise error

    def _exchange(self, folder: Path, files: list[str], axis: Axis) -> None:
        assert self._partner is not None
        sent = list(send(folder, files, self._partner, axis))
        for source in self._sources:
            receive(folder, source, axis)
        for work, _ in sent:
            work.wait()

    def _lacks_room(self, own_bytes: int) -> str:
        """Why no host can take a set now, in words; a folder that somebody has cleared away is made anew."""
        on_host = self.hosts.count(self.hosts[self.mesh.world.rank])
        needed, own = _ROOM * own_bytes * on_host, make_own(self.folder)
        if not own:
            try:
                free = shutil.disk_usage(self.folder).free
            except OSError as error:
                own = f"{self.folder} on {sets.host_name()}: {error.strerror}"
            else:
                has = f"{self.folder} on {sets.host_name()} has {free / 1e9:.2f} GB free and needs {needed / 1e9:.2f}"
                own = has if free < needed else ""
        return next(filter(None, everyone(own, self.mesh.control)), "")

    def _warn(self, line: str) -> None:
        if self.mesh.world.rank == 0:
            print(f"WARNING: {line}; training goes on", file=sys.stderr, flush=True)
