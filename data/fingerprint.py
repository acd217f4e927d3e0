"""What the order of samples depends on, small enough for a checkpoint, and what changed of it.

A run that is resumed on other data must not go on as if nothing had happened: samples would repeat and others never be
seen. `fingerprint` writes down, from the config and the indices' tallies alone (no shard is read), the seed, shuffle,
group size, mixture and, for each source, how many shards and samples it has, the shards' names in their order, their
sample counts and the digests of their members. `differences` says in words what two of them do not share.

What it sees: a shard added, removed, renamed, swapped or moved within the list; samples added, removed or reordered; a
key, a caption, metadata or the size of a picture that changed in place; every setting of the order, whether JPEGs are
decoded at a smaller size, and other rows of data.features (by the archive's own checksums). What it does not see: the
pixels of a picture that is replaced by another of the same number of bytes; text beyond the first 64 KiB of a member;
where the shards lie (the folder may move, and a shard may be packed again); and, for a remote shard, any change under
the same name, because remote shards are taken as immutable and their index is not built again.
"""

from collections.abc import Sequence
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataConfig
from data.pixels.features import rows_digest
from data.sources import Sources, called, weight_switches

VERSION = 1
_RANGES = 64
_SETTINGS = {
    "seed": "train.seed",
    "shuffle": "data.shuffle",
    "shuffle_group_shards": "data.shuffle_group_shards",
    "mix": "data.mix",
    "turn_samples": "train.global_batch_size (with data.mix=one_per_batch)",
    "first_position": "the position at which this phase begins",
    "captions": "data.captions",
    "sentences": "data.sentences",
    "tokenizer": "content of data.tokenizer",
    "cleaning": "data.cleaning",
    "scaled_decode": "data.scaled_decode",
}
_BEFORE = {"scaled_decode": 0.0}
"""What held before the fingerprint knew of it."""


def fingerprint(
    config: DataConfig, sources: Sources, *, seed: int, global_batch_size: int, first_position: int = 0
) -> dict[str, Any]:
    """What the order of samples depends on, as plain JSON values of a few kilobytes whatever the number of shards.

    seed, global_batch_size, first_position: as given to the `SampleReader` whose `sources` these are.
    """
    one_per_batch = bool(config.sources) and config.mix == "one_per_batch"
    return {
        "version": VERSION,
        "seed": seed,
        "shuffle": config.shuffle,
        "shuffle_group_shards": config.shuffle_group_shards if config.shuffle else 0,
        "mix": config.mix,
        "turn_samples": global_batch_size if one_per_batch else 1,
        "first_position": first_position,
        "captions": [list(pair) for pair in config.captions.items()],
        "sentences": config.sentences,
        "tokenizer": "clip" if config.tokenizer == "clip" else _hash(Path(config.tokenizer).read_bytes()),
        "cleaning": config.cleaning,
        "scaled_decode": config.scaled_decode,
        "features": rows_digest(Path(config.features)) if config.features else "",
        "weights": [[start, [list(pair) for pair in weights.items()]] for start, weights in weight_switches(config)],
        "sources": {
            name: _source(sources.shards[part], sources.counts_of_shards[part], sources.digests_of_shards[part])
            for name, part in sources.parts().items()
        },
    }


def _source(shards: Sequence[str], counts: np.ndarray, digests: np.ndarray) -> dict[str, Any]:
    """Digests of one source, of at most 64 ranges of its shards, so that a change can be placed."""
    borders = np.linspace(0, len(shards), min(len(shards), _RANGES) + 1).astype(int).tolist()
    ranges = [slice(first, last) for first, last in pairwise(borders)]
    names = [shard.rpartition("/")[2] for shard in shards]
    return {
        "shards": len(shards),
        "samples": int(counts.sum()),
        "names": [_hash("\n".join(names[part]).encode(errors="surrogateescape")) for part in ranges],
        "counts": [_hash(counts[part].astype("<i8").tobytes()) for part in ranges],
        "members": [_hash(digests[part].astype("<u8").tobytes()) for part in ranges],
    }


def _hash(content: bytes) -> str:
    return blake2b(content, digest_size=6).hexdigest()


def differences(was: dict[str, Any], now: dict[str, Any], *, position: int) -> list[str]:
    """What changed, a line each, that matters to a run resumed at `position` (samples seen); empty if nothing did.

    Weights that change at or after the position, and sources that had no weight before it, are no difference: a source
    may be added to a running job. What is compared of two versions of this file is nothing but the version.
    """
    if was.get("version") != now["version"]:
        return [f"fingerprint of the data: version {was.get('version')} was, {now['version']} is: they do not compare"]
    lines = [
        f"{name}: {was.get(key, _BEFORE.get(key))!r} was, {now[key]!r} is"
        for key, name in _SETTINGS.items()
        if was.get(key, _BEFORE.get(key, now[key])) != now[key]
    ]
    if "" not in (rows := {print_.get("features", "") for print_ in (was, now)}) and len(rows) > 1:
        lines.append("data.features: its rows are not those that were")
    seen = position - was["first_position"]
    before, after = (_weights_before(print_["weights"], seen) for print_ in (was, now))
    if before != after:
        lines.append(f"weights of the sources up to position {position}: {before} was, {after} is")
    used = sorted({name for _, weights in before for name, _ in weights})
    for name in used:
        if name not in now["sources"]:
            lines.append(f"{called(name)} is gone")
        else:
            lines += [
                f"{called(name)}: {line}" for line in _source_differences(was["sources"][name], now["sources"][name])
            ]
    return lines


def _weights_before(switches: list, position: int) -> list:
    """The stretches of positive weights that hold somewhere below the position (the first one always does)."""
    return [[start, weights] for start, weights in switches if start == 0 or start < position]


def _source_differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    if was["shards"] != now["shards"]:
        return [
            f"{was['shards']:,} shards with {was['samples']:,} samples were, "
            f"{now['shards']:,} with {now['samples']:,} are"
        ]
    lines = []
    if moved := _ranges_that_differ(was, now, "names"):
        lines.append(f"other names or another order of {moved}")
    if counts := _ranges_that_differ(was, now, "counts"):
        lines.append(f"other sample counts in {counts} ({was['samples']:,} samples were, {now['samples']:,} are)")
    elif members := _ranges_that_differ(was, now, "members"):
        lines.append(f"other keys, captions or picture sizes in {members} (or another choice of data.subset)")
    return lines


def _ranges_that_differ(was: dict[str, Any], now: dict[str, Any], field: str) -> str:
    """Which shards, in words; empty if none."""
    borders = np.linspace(0, was["shards"], len(was[field]) + 1).astype(int).tolist()
    found = [number for number, (a, b) in enumerate(zip(was[field], now[field], strict=True)) if a != b]
    if not found:
        return ""
    first, last = borders[found[0]], borders[found[-1] + 1] - 1
    return f"shard {first} of the list" if first == last else f"shards {first} to {last} of the list"
