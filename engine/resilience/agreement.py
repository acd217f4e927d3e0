"""Whether all ranks run the same job with the same code, before any group exists. One that differs is named.

Each rank leaves its facts (config, digest of our source files, versions, switches of kernels in the environment, how
its CPU multiplies bf16, what the files hold that every host reads for itself) in the store of this start, rank 0
compares them and leaves the verdict. A rank with other settings would train on in silence, or end all of them in a
collective that never fits.
"""

import hashlib
import json
import os
import socket
import sys
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.errors import DataError
from data.fingerprint import differences
from engine.checkpoint.format.disk import MANIFEST
from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.folders import resolve_checkpoint, step_folders
from engine.checkpoint.format.manifest import library_versions
from engine.parallel.agree import everyone
from engine.parallel.mesh import Mesh
from models.tensors.products import multiplies_bf16

_ROOMS = ("engine", "models", "data")
_OF_ONE_HOST = ("config.data.cache_dir",)
_FILES = ("init.vision", "init.text", "init.logit_scale", "mim.teacher", "checkpoint.resume")
"""Settings that name weights. Each rank reads the part that it owns: of two files half a model each."""
_SWITCHES = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG")
_SWITCHES_OF = "NVTE_"
"""Variables that choose kernels, and so the last digits; all of Transformer Engine's begin so."""
_PRODUCTS = "bf16 products of its CPU"
_LOOKED_AT = 1 << 20
_SHOWN = 6


class RanksDiffer(Exception):
    """Ranks were started with another config, code or library; the message names rank, host and difference."""


def facts_of(config: Mapping[str, Any]) -> dict[str, str]:
    """What has to be the same on every rank, flat, as text. config: the resolved job."""
    settings = _flat(config, "config.")
    return {
        **settings,
        **_products(settings),
        **{f"version of {name}": version for name, version in library_versions().items()},
        **{f"code of {room}/": _code(room) for room in _ROOMS},
        **{name: value for name, value in os.environ.items() if name in _SWITCHES or name.startswith(_SWITCHES_OF)},
        **_contents(config),
    }


def agree(store: dist.Store, rank: int, size: int, facts: Mapping[str, str], timeout: timedelta) -> None:
    """Raise RanksDiffer on every rank unless all have the same facts. Collective over all ranks of the start."""
    store.set(f"facts/{rank}", json.dumps({"host": socket.gethostname(), **facts}))
    if rank == 0:
        keys = [f"facts/{other}" for other in range(size)]
        store.wait(keys, timeout)
        store.set("facts/verdict", compare([json.loads(store.get(key)) for key in keys]))
    store.wait(["facts/verdict"], timeout)
    verdict = store.get("facts/verdict").decode()
    if verdict:
        raise RanksDiffer(verdict)


def compare(ranks: list[dict[str, str]]) -> str:
    """Say in words what differs from what most ranks have (of two, from what rank 0 has); empty if nothing does."""
    not_asked = {"host", *_OF_ONE_HOST, *([_PRODUCTS] if any(_PRODUCTS not in facts for facts in ranks) else [])}
    names = sorted({name for facts in ranks for name in facts} - not_asked)
    lines = []
    for name in names:
        values = [facts.get(name, "not there") for facts in ranks]
        usual, _ = Counter(values).most_common(1)[0]
        lines += [
            f"rank {rank} on {facts['host']} has {name.removeprefix('config.')} {value}, others {usual}"
            for rank, (facts, value) in enumerate(zip(ranks, values, strict=True))
            if value != usual
        ]
    more = f"; and {len(lines) - _SHOWN} differences more" if len(lines) > _SHOWN else ""
    by_cpu = _PRODUCTS in names and len({facts[_PRODUCTS] for facts in ranks}) > 1
    return "" if not lines else (
        f"the ranks do not run the same job: {'; '.join(lines[:_SHOWN])}{more}. Start every rank with one config and "
        f"one installation{', on CPUs of one kind or with train.precision=fp32' if by_cpu else ''}"
    )  # fmt: skip


def one_data(own: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """The fingerprint of the data, the same for all ranks that read. own: empty on ranks that read nothing.

    Collective over the mesh; raises DataError on every rank.
    """
    of_ranks = everyone((socket.gethostname(), own), mesh.control)
    readers = [(rank, host, found) for rank, (host, found) in enumerate(of_ranks) if found]
    for rank, host, found in readers[1:]:
        lines = differences(readers[0][2], found, position=sys.maxsize)
        if lines:
            raise DataError(
                f"rank {rank} on {host} reads other data than rank {readers[0][0]} on {readers[0][1]}: "
                f"{'; '.join(lines)}. Give every host the same shards"
            )
    return readers[0][2]


def _products(settings: Mapping[str, str]) -> dict[str, str]:
    """How a job that computes in bf16 on CPUs multiplies: copies of weights on two kinds of CPU would drift apart."""
    if torch.cuda.is_available() or not any(repr("bf16") in value for value in settings.values()):
        return {}
    return {_PRODUCTS: "in bf16" if multiplies_bf16() else "in fp32"}


def _code(room: str) -> str:
    """Digest of the source files of a package, as this process would import them."""
    root = Path(__file__).parents[2] / room
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(os.fsencode(path.relative_to(root)) + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _contents(config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    goes_on = config["checkpoint"]["resume"] == "auto" and step_folders(Path(config["run_dir"]))
    for setting in _FILES:
        section, name = setting.split(".")
        if section == "init" and goes_on:
            continue  # a run that goes on does not ask for it, and it may be gone on some hosts
        path = config.get(section, {}).get(name)
        if path and path not in ("auto", "none"):
            found[f"behind {setting}"] = content_of(Path(path))
    return found


def content_of(path: Path) -> str:
    """A checkpoint by its manifest, which has the hash of every file; another file by its size and both its ends."""
    digest = hashlib.sha256()
    try:
        if path.is_dir():
            folder = resolve_checkpoint(path)
            return f"{folder.name} {hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()[:12]}"
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            for place in (0, max(0, size - _LOOKED_AT)):
                file.seek(place)
                digest.update(file.read(_LOOKED_AT))
    except (OSError, CheckpointError) as error:
        return f"nothing that can be read ({error})"
    return f"{size:,} bytes {digest.hexdigest()[:12]}"


def _flat(tree: Mapping[str, Any], prefix: str) -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": repr(value)}
    return flat
