"""Sets on the hosts: where they lie, which are complete, and the newest one as a checkpoint to go on from."""

import contextlib
import hashlib
import json
import os
import socket
import stat
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from engine.checkpoint.continuity import changed_settings
from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.machine import machine_of
from engine.checkpoint.format.manifest import MANIFEST, RECORD, read_manifest, write_manifest, write_synced
from engine.checkpoint.format.tables import rank_file
from engine.checkpoint.format.tensor_file import FileRecord, hash_file
from engine.checkpoint.local.copies import HEAD, bring
from engine.checkpoint.reader import Checkpoint
from engine.checkpoint.save import merge_reports
from engine.config.read import Config, to_dict
from engine.parallel.agree import everyone
from engine.parallel.mesh import Mesh

_CUTS = ("parallel.virtual", "parallel.layers", "parallel.overlap", "parallel.bucket_size")
_CUTS_OF_A_PHASE = ("train.freeze", "train.precision")
"""Settings beside TP, PP and DP that decide which elements a rank owns."""


def host_name() -> str:
    """What people call this host."""
    return socket.gethostname()


def host_of(config: Config) -> str:
    """What tells hosts apart: ranks with an equal one see each other's sets."""
    return f"{host_name()} {machine_of(Path(config.checkpoint.local_dir))}"


def local_folder(config: Config) -> Path:
    """Where this host keeps the sets of a run."""
    run = hashlib.sha256(os.path.realpath(config.run_dir).encode()).hexdigest()[:16]
    return Path(config.checkpoint.local_dir) / f"eva-megatron-{os.getuid()}" / run


def newest_local(config: Config, mesh: Mesh, *, newer_than: int) -> Checkpoint | None:
    """The newest complete set of this layout after more steps than that, with every host's part in its place.

    Collective over the mesh. Sets with files that do not match their hashes are passed over, loudly.
    """
    if not config.checkpoint.local_every_steps:
        return None
    began = time.perf_counter()
    folder, hosts = local_folder(config), everyone(host_of(config), mesh.control)
    leads = [hosts.index(host) for host in hosts]
    rank = mesh.world.rank
    own = held_sets(folder, mesh) if leads[rank] == rank else {}
    held: list[dict[int, list[str]]] = everyone(own, mesh.control)
    for step in sorted({step for table in held for step in table if step > newer_than}, reverse=True):
        holders = {lead: set(table[step]) for lead, table in enumerate(held) if step in table}
        if not _is_complete(holders, len(hosts)):
            continue
        place = folder / set_name(step, mesh)
        brought = bring(place, holders, leads, mesh)
        if useless := _useless(place, config, leads, mesh):
            _say(f"WARNING: {place.name} on the hosts was not used: {useless}", mesh)
            continue
        problems = [problem for problem in everyone(_problem(place, rank), mesh.control) if problem]
        if problems:
            _say(f"WARNING: {place.name} on the hosts is damaged and was not used: {problems[0]}", mesh)
            continue
        checkpoint = _assemble(place, leads, mesh)
        seconds = time.perf_counter() - began
        came = f"{brought} files came from other hosts, {seconds:.1f} s"
        _say(f"{place} is newer than what {config.run_dir} holds: {came}", mesh)
        return checkpoint
    _tell_of_other_layouts(folder, mesh, newer_than)
    return None


def _useless(place: Path, config: Config, leads: list[int], mesh: Mesh) -> str:
    """Why no start can use the set: a manifest that cannot be read, or settings by which ranks own other elements than
    they did, which lie on hosts that they do not see. Collective.
    """
    found, rank = "", mesh.world.rank
    if rank == leads[rank]:
        try:
            was = read_manifest(place / HEAD).config
        except CheckpointError as error:
            found = f"{error} ({host_name()})"
        else:
            is_whole = all((place / rank_file(other)).is_file() for other in range(len(leads)))
            cuts = _CUTS if config.phases else (*_CUTS, *_CUTS_OF_A_PHASE)
            changes = [] if is_whole else changed_settings(was, to_dict(config), cuts)
            if changes:
                found = (
                    f"it is cut otherwise, {'; '.join(map(str, changes))}, and {host_name()} has not all of its files; "
                    "start with the settings that were until the next checkpoint to keep its steps"
                )
    return next(filter(None, everyone(found, mesh.control)), "")


def _tell_of_other_layouts(folder: Path, mesh: Mesh, newer_than: int) -> None:
    """Steps that this start gives up, and its first set deletes, because another layout wrote them."""
    own = set_name(0, mesh).partition(".")[2]
    names = {place.name for place in folder.glob("step_*.t*p*d*") if any(place.glob("rank_*.json"))}
    newer = {name for part in everyone(names, mesh.control) for name in part if _step_of(name) > newer_than}
    others = sorted(name for name in newer if name.partition(".")[2] != own)
    if others:
        step, _, layout = others[-1].partition(".")
        _say(
            f"WARNING: the hosts hold {step} of layout {layout}, which a start at {own} cannot read: it goes on from "
            f"step {newer_than}, and its first set takes that one's place; start at {layout} until "
            "the next checkpoint to keep those steps",
            mesh,
        )


def set_name(step: int, mesh: Mesh) -> str:
    """Name of the set after so many steps at this layout."""
    return f"step_{step:08d}.t{mesh.tensor.size}p{mesh.pipeline.size}d{mesh.data.size}"


def held_sets(folder: Path, mesh: Mesh) -> dict[int, list[str]]:
    """Step -> what this host has of its set: rank_00003, …, head."""
    layout = set_name(0, mesh).partition(".")[2]
    held = {}
    for place in folder.glob(f"step_*.{layout}"):
        names = [report.stem for report in place.glob("rank_*.json") if report.with_suffix(".safetensors").is_file()]
        if (step := _step_of(place.name)) >= 0:
            held[step] = names + ([HEAD] if (place / HEAD / MANIFEST).is_file() else [])
    return held


def _step_of(name: str) -> int:
    """The step in a set's name; -1 where there is none."""
    with contextlib.suppress(ValueError):
        return int(name.partition(".")[0].removeprefix("step_"))
    return -1


def _is_complete(holders: dict[int, set[str]], ranks: int) -> bool:
    found = set().union(*holders.values())
    return {HEAD, *(f"rank_{rank:05d}" for rank in range(ranks))} <= found


def _problem(place: Path, rank: int) -> str:
    """What is wrong with this rank's file."""
    try:
        report = _report(place, rank)
        if "tables" not in report:
            return f"rank {rank} on {host_name()}: it is of another version of this program"
        record = FileRecord(**report["record"])
        found = hash_file(place / rank_file(rank))
    except (OSError, ValueError, KeyError, TypeError, CheckpointError) as error:
        return f"rank {rank} on {host_name()}: {error}"
    return "" if found == record else f"rank {rank} on {host_name()}: its bytes changed after they were written"


def _report(place: Path, rank: int) -> dict[str, Any]:
    return json.loads((place / f"rank_{rank:05d}.json").read_text(encoding="utf-8"))


def _assemble(place: Path, leads: list[int], mesh: Mesh) -> Checkpoint:
    """The set as a checkpoint: every host gets the whole manifest and has the files that its own ranks read."""
    rank = mesh.world.rank
    reports = everyone(_report(place, rank), mesh.control)
    if rank == leads[rank]:
        manifest = read_manifest(place / HEAD)
        merge_reports(manifest, reports)
        write_manifest(place, manifest)
        write_synced(place / RECORD, json.dumps(manifest.metrics).encode())
    everyone(None, mesh.control)
    checkpoint = Checkpoint(place)
    checkpoint.is_local = True
    return checkpoint


def make_own(folder: Path) -> str:
    """Make a folder that nobody else can write; what is wrong with it, in words."""
    top = folder.parent
    try:
        top.mkdir(mode=0o700, exist_ok=True)
        status = top.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
            return f"checkpoint.local_dir: {top} on {host_name()} is not a folder that only this user can write"
        folder.mkdir(exist_ok=True)
    except OSError as error:
        return f"checkpoint.local_dir: {top} on {host_name()} cannot be made: {error.strerror}"
    return ""


def require_one_host(hosts: Sequence[str], mesh: Mesh) -> None:
    """One tensor rank writes what all of them hold, so they read each other's files."""
    ranks = dist.get_process_group_ranks(mesh.world.group)
    own = {hosts[ranks.index(member)] for member in dist.get_process_group_ranks(mesh.tensor.group)}
    if max(everyone(len(own), mesh.control)) > 1:
        raise CheckpointError(
            f"checkpoint.local_every_steps needs tensor ranks on one host, but those of parallel.tensor "
            f"{mesh.tensor.size} are on several"
        )


def _say(line: str, mesh: Mesh) -> None:
    if mesh.world.rank == 0:
        print(line, file=sys.stderr, flush=True)
