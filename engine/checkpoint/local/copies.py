"""Files between hosts: who keeps a copy of whose, and how they travel."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.checkpoint.format.manifest import MANIFEST
from engine.parallel.mesh import Axis, Mesh, own_axis

HEAD = "head"
"""Folder of a set that holds the manifest without tensors, and its name among the files of a host."""


def partner_of(rank: int, hosts: Sequence[str]) -> int | None:
    """The rank of the next host that keeps a copy of this one's file; None where there is one host only."""
    members: dict[str, list[int]] = {}
    for member, host in enumerate(hosts):
        members.setdefault(host, []).append(member)
    order = list(members)
    if len(order) == 1:
        return None
    following = members[order[(order.index(hosts[rank]) + 1) % len(order)]]
    return following[members[hosts[rank]].index(rank) % len(following)]


def copies_axis(mesh: Mesh) -> Axis:
    """A group of its own: copies travel while training uses the others."""
    return own_axis("copies", dist.get_process_group_ranks(mesh.world.group), mesh.timeout, backend="gloo")


def send(folder: Path, files: Sequence[str], to: int, axis: Axis) -> Iterator[tuple[Any, Tensor]]:
    """Works to wait for, with the memory that must live as long."""
    sizes = {name: (folder / name).stat().st_size for name in files}
    header = torch.frombuffer(bytearray(json.dumps(sizes).encode()), dtype=torch.uint8)
    target = dist.get_global_rank(axis.group, to)
    for tensor in (torch.tensor([header.numel()]), header, *(_mapped(folder / name, sizes[name]) for name in files)):
        yield dist.isend(tensor, dst=target, group=axis.group), tensor


def receive(folder: Path, source: int, axis: Axis) -> int:
    """Write what a rank sends; the number of files."""
    origin, length = dist.get_global_rank(axis.group, source), torch.zeros(1, dtype=torch.int64)
    dist.recv(length, src=origin, group=axis.group)
    header = torch.empty(int(length), dtype=torch.uint8)
    dist.recv(header, src=origin, group=axis.group)
    sizes: dict[str, int] = json.loads(bytes(header.tolist()))
    for name, size in sizes.items():
        final = folder / name
        final.parent.mkdir(parents=True, exist_ok=True)
        hidden = final.with_name(f".{final.name}")
        with hidden.open("wb") as file:
            file.truncate(size)
        dist.recv(_mapped(hidden, size), src=origin, group=axis.group)
        hidden.rename(final)  # the report comes last: with it the file counts
    return len(sizes)


def _mapped(path: Path, size: int) -> Tensor:
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)


def bring(place: Path, holders: dict[int, set[str]], leads: list[int], mesh: Mesh) -> int:
    """Every host gets the files of its own ranks, and the head; how many had to come from another. Collective."""
    brought = 0
    for rank in range(len(leads)):
        for name in (f"rank_{rank:05d}", *([HEAD] if rank == leads[rank] else [])):
            if name in holders.get(leads[rank], ()):
                continue
            source = next(lead for lead, names in holders.items() if name in names)
            files = [f"{HEAD}/{MANIFEST}"] if name == HEAD else [f"{name}.safetensors", f"{name}.json"]
            if mesh.world.rank == source:
                for work, _ in list(send(place, files, leads[rank], mesh.control)):
                    work.wait()
            elif mesh.world.rank == leads[rank]:
                receive(place, source, mesh.control)
            brought += len(files)
    return brought
