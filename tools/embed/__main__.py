"""Image and text embeddings of a checkpoint, at any layout.

`torchrun --nproc-per-node N -m tools.embed --checkpoint DIR (--npz IN.npz | --shards TAR…) --out OUT.npz|OUT.parquet
[parallel.tensor=2 parallel.pipeline=2 …]` (one rank needs no torchrun)

DIR is a checkpoint of any layout, converted or trained, or a run folder. IN.npz holds `images` (float32 [N, 3, h, w],
already normalised) and/or `tokens` (int64 [N, context]). OUT holds `image_embeddings` and/or `text_embeddings`, fp32
[N, D] of length 1, in input order, and `keys` for shards. Blocks are read, embedded and written one after another.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from data.errors import DataError
from engine.checkpoint.format.errors import CheckpointError
from engine.config.read import ConfigError
from engine.evaluation.inputs import Block
from engine.evaluation.session import Session, block_size, fail, load, open_session, shard_input, split_overrides
from engine.parallel.mesh import LayoutError
from engine.resilience.exit import leave
from tools.embed.inputs import Input, NpzInput
from tools.embed.outputs import Sink, open_sink

_PROGRESS_EVERY_S = 2.0


def main(argv: list[str]) -> int:
    """Run the command on this rank; the exit status."""
    rest, overrides = split_overrides(argv)
    arguments = _arguments(rest)
    try:
        with open_session(arguments.checkpoint, overrides, arguments.micro_batch) as session:
            _embed(arguments, session)
    except (CheckpointError, ConfigError, DataError, LayoutError) as error:
        return fail(error)
    return 0


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools.embed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--npz", type=Path)
    source.add_argument("--shards", nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="OUT.npz or OUT.parquet")
    parser.add_argument("--micro-batch", type=int, default=64, help="images of one pass through a stage")
    parser.add_argument("--ema", action="store_true", help="the averaged weights (optim.ema_decay)")
    parser.add_argument("--skip-hashes", action="store_true", help="check the sizes of the files only")
    return parser.parse_args(argv)


def _embed(arguments: argparse.Namespace, session: Session) -> None:
    source: Input = NpzInput(arguments.npz, session.config) if arguments.npz else shard_input(arguments.shards, session)
    sink = open_sink(arguments.out) if session.is_first else None
    embedder = load(
        session,
        images=source.has_images,
        texts=source.has_tokens,
        verify_hashes=not arguments.skip_hashes,
        ema=arguments.ema,
    )
    progress = _Progress(len(source), session.is_first)
    for block in source.blocks(block_size(session)):
        columns = {}
        if block.pixels is not None:
            count = _count(source, block)
            columns["image_embeddings"] = embedder.images(block.pixels, count).cpu().numpy()
        if block.tokens is not None:
            columns["text_embeddings"] = embedder.texts(block.tokens).cpu().numpy()
        _write(sink, columns, block)
        progress.advance(block.stop)
    if sink is not None:
        sink.close()
    progress.finish(arguments.out, session.mesh.layout)


def _count(source: Input, block: Block) -> int:
    """Images of the block: an .npz may hold fewer images than captions."""
    images = source.images if isinstance(source, NpzInput) else None
    return min(block.stop, len(images)) - block.start if images is not None else block.stop - block.start


def _write(sink: Sink | None, columns: dict[str, np.ndarray], block: Block) -> None:
    if sink is not None:
        sink.write(columns | ({"keys": np.array(block.keys)} if block.keys else {}))


class _Progress:
    """A line every few seconds on standard error of rank 0."""

    def __init__(self, total: int, shown: bool):
        self._total, self._shown = total, shown
        self._began = self._last = time.perf_counter()

    def advance(self, done: int) -> None:
        now = time.perf_counter()
        if self._shown and now - self._last >= _PROGRESS_EVERY_S and done < self._total:
            self._last = now
            rate = done / (now - self._began)
            left_s = (self._total - done) / rate
            print(f"{done:,} of {self._total:,}  {rate:,.1f} samples/s  {left_s:,.0f} s left", file=sys.stderr)

    def finish(self, out: Path, layout: str) -> None:
        if self._shown:
            seconds = time.perf_counter() - self._began
            print(f"{out}: {self._total:,} samples at {layout} in {seconds:.1f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
