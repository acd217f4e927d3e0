"""Build the indices of tar shards ahead of a run.

    python -m tools.index_shards SHARDS… [--cache-dir DIR] [--cache-gb GB] [--workers N]

SHARDS are entries of data.shards: files, folders, globs, brace patterns, URLs. Writes SHARD.index.npz beside each
shard (in DIR where that folder cannot be written, and for URLs) and one shards.counts.npz a folder, from which a run
over 200,000 shards starts without opening the indices. Where the shards are local before they are uploaded, upload
both kinds of files with them: readers of the URLs take them from there instead of reading each tar first.

What is up to date is left alone. Prints one JSON object; shards that are no tars, empty or truncated are listed, and
the exit status is 1 if a shard cannot be used at all.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np

from data.config import DataConfig
from data.errors import DataError
from data.shards.index_store import Tally, load_index, write_counts
from data.shards.listing import expand_shards
from data.shards.storage import Storage


def index_shards(entries: Sequence[str], storage: Storage, *, workers: int) -> dict[str, Any]:
    """Index all shards of the entries with `workers` processes; the summary that is printed.

    Raises DataError for an entry that matches nothing.
    """
    shards = expand_shards(entries, storage)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(partial(_index_one, storage), shards, chunksize=16))
    usable = [number for number, (_, _, problem) in enumerate(results) if problem is None]
    tallies = [results[number][0] for number in usable]
    counts = np.array([tally.samples for tally in tallies], dtype=np.int64)
    write_counts([shards[number] for number in usable], tallies, storage)
    return {
        "shards": len(shards),
        "samples": int(counts.sum()),
        "fewest": int(counts.min()) if len(counts) else 0,
        "most": int(counts.max()) if len(counts) else 0,
        "truncated": [shards[number] for number in usable if results[number][1]],
        "unusable": [problem for _, _, problem in results if problem is not None],
    }


def _index_one(storage: Storage, shard: str) -> tuple[Tally, bool, str | None]:
    """(count and digest, truncated, why it cannot be used)."""
    try:
        index = load_index(shard, storage)
    except DataError as error:
        return Tally(0, 0), False, str(error)
    return Tally(len(index), index.digest), index.truncated, None


def add_shard_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that name shards and how to reach them."""
    parser.add_argument("shards", nargs="+", help="entries of data.shards")
    parser.add_argument("--cache-dir", default="", help="folder for copies of remote shards and for indices")
    parser.add_argument("--cache-gb", type=float, default=DataConfig.cache_gb, help="bound of the copies")
    parser.add_argument("--workers", type=int, default=4, help="processes")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m tools.index_shards`; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.index_shards", description="Index tar shards ahead of a run")
    add_shard_arguments(parser)
    options = parser.parse_args(arguments)
    storage = Storage(cache_dir=options.cache_dir, cache_gb=options.cache_gb)
    try:
        summary = index_shards(options.shards, storage, workers=options.workers)
    except DataError as error:
        print(f"tools.index_shards: {error}", file=sys.stderr)
        return 1
    print(json.dumps(summary, indent=1))
    return 1 if summary["unusable"] else 0


if __name__ == "__main__":
    sys.exit(main())
