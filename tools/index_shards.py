"""Build the indices of tar shards ahead of a run.

SHARDS are entries of data.shards: files, folders, globs, brace patterns, URLs. Writes SHARD.index.npz beside each
shard (in DIR where that folder cannot be written, and for URLs) and one shards.counts.npz a folder, from which a run
over 200,000 shards starts without opening the indices. Where the shards are local before they are uploaded, upload
both kinds of files with them: readers of the URLs take them from there instead of reading each tar first.

With --subset it also finds what each shard has of a data.subset, which reads the metadata of all samples.

What is up to date is left alone. Prints one JSON object: shards that are no tars, hold no sample or are truncated are
listed, and what the tars hold beside samples is counted. The exit status is 1 if a shard cannot be used at all, or if
an index could not be written.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np

from data.config import DataConfig
from data.errors import DataError
from data.shards.index_store import COUNTS_FILE, Tally, is_stored, load_index, unwritable_folders, write_counts
from data.shards.listing import expand_shards
from data.shards.storage import Storage
from data.shards.subset import KeptTally
from data.shards.subset_table import check_subset
from data.sources import Listing, tally_kept
from tools.cli import CommandError, amount, answer, command_parser, progress, whole

_EXAMPLES = (
    "python -m tools.index_shards /data/shards",
    "python -m tools.index_shards 's3://bucket/laion/{00000..00999}.tar' --cache-dir /scratch/cache --workers 16",
)
_CURE = "make the shards' folder writable, free some space there, or give --cache-dir"


def index_shards(
    entries: Sequence[str], storage: Storage, *, workers: int, subset: DataConfig | None = None
) -> dict[str, Any]:
    """Index all shards of the entries with `workers` processes; the summary that is printed.

    subset: a config with a data.subset, of which is found what the shards have. Raises DataError for an entry that
    matches nothing, or if a folder takes no index.
    """
    if subset is not None:
        check_subset(subset.subset, subset.subset_weights)
    shards = expand_shards(entries, storage)
    if full := unwritable_folders(shards, storage):
        raise DataError(f"no index can be written in {full[0]} ({len(full)} such folders): {_CURE}")
    with ProcessPoolExecutor(max(1, workers), mp_context=get_context("spawn")) as pool:
        results = []
        with progress("indexing", len(shards), "shards") as done:
            for result in pool.map(partial(_index_one, storage), shards, chunksize=16):
                results.append(result)
                done(1)
        usable = [(shard, result) for shard, result in zip(shards, results, strict=True) if result.problem is None]
        kept = _look_through(pool, subset, usable) if subset is not None else None
    counts = np.array([result.tally.samples for _, result in usable], dtype=np.int64)
    written = write_counts([shard for shard, _ in usable], [result.tally for _, result in usable], storage)
    odd = sum((Counter(result.odd) for _, result in usable), Counter())
    return {
        "shards": len(shards),
        "samples": int(counts.sum()),
        "fewest": int(counts.min()) if len(counts) else 0,
        "most": int(counts.max()) if len(counts) else 0,
        "odd": dict(odd.most_common()),
        "without_samples": [shard for shard, result in usable if not result.tally.samples],
        "truncated": [shard for shard, result in usable if result.truncated],
        "unusable": [result.problem for result in results if result.problem is not None],
        "not_written": [shard for shard, result in usable if not result.stored],
        "counts_written": written,
        **({} if kept is None else {"subset": kept}),
    }


def _look_through(
    pool: ProcessPoolExecutor, config: DataConfig, usable: Sequence[tuple[str, "_Result"]]
) -> dict[str, Any]:
    """What the shards have of the subset, in numbers. The first shard goes ahead: it sorts the table if need be."""
    listings = [Listing(lists=[[shard]], tallies=[result.tally]) for shard, result in usable]
    kept: list[KeptTally] = []
    with progress("looking for the subset", len(listings), "shards") as done:
        for ahead in (listings[:1], listings[1:]):
            for tallies in pool.map(partial(_kept, config), ahead, chunksize=16):
                kept += tallies
                done(1)
    return {
        "file": config.subset,
        "samples": sum(tally.samples for tally in kept),
        "weight": sum(tally.weight for tally in kept),
        "without_uid": sum(tally.nameless for tally in kept),
    }


def _kept(config: DataConfig, listing: Listing) -> list[KeptTally]:
    return tally_kept(config, listing, [0])


@dataclass(frozen=True, kw_only=True)
class _Result:
    """What is known of one shard."""

    tally: Tally
    truncated: bool = False
    odd: Mapping[str, int] = field(default_factory=dict)
    stored: bool = False
    problem: str | None = None


def _index_one(storage: Storage, shard: str) -> _Result:
    try:
        index = load_index(shard, storage)
    except DataError as error:
        return _Result(tally=Tally(0, 0), problem=str(error))
    return _Result(
        tally=Tally(len(index), index.digest),
        truncated=index.truncated,
        odd=index.odd,
        stored=is_stored(shard, storage),
    )


def add_shard_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that name shards and how to reach them."""
    parser.add_argument("shards", nargs="+", help="entries of data.shards")
    parser.add_argument("--cache-dir", default="", help="folder for copies of remote shards and for indices")
    parser.add_argument("--cache-gb", type=amount, default=DataConfig.cache_gb, help="bound of the copies")
    parser.add_argument("--workers", type=whole, default=4, help="processes (0: one)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m tools.index_shards`; the exit status."""
    parser = command_parser("index_shards", __doc__, _EXAMPLES)
    add_shard_arguments(parser)
    parser.add_argument("--subset", default="", help="as data.subset: find what the shards have of it")
    parser.add_argument("--subset-weights", default="", help="as data.subset_weights")
    options = parser.parse_args(arguments)
    return answer(lambda: _index(options))


def _index(options: argparse.Namespace) -> int:
    storage = Storage(cache_dir=options.cache_dir, cache_gb=options.cache_gb)
    subset = DataConfig(
        shards=options.shards,
        subset=options.subset,
        subset_weights=options.subset_weights,
        cache_dir=options.cache_dir,
        cache_gb=options.cache_gb,
    )
    subset.check()
    summary = index_shards(options.shards, storage, workers=options.workers, subset=subset if options.subset else None)
    print(json.dumps(summary, indent=1))
    unwritten = summary["not_written"]
    if unwritten or not summary["counts_written"]:
        what = f"{len(unwritten)} of {summary['shards']} indices" if unwritten else COUNTS_FILE
        raise CommandError(f"{what} could not be written: {_CURE}")
    return 1 if summary["unusable"] else 0


if __name__ == "__main__":
    sys.exit(main())
