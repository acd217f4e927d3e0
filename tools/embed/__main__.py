"""Image and text embeddings of a checkpoint, at any layout.

`torchrun --nproc-per-node N -m tools.embed --checkpoint DIR (--npz IN.npz | --shards TAR…) --out OUT.npz|OUT.parquet
[parallel.tensor=2 parallel.pipeline=2 …]` (one rank needs no torchrun)

DIR is a checkpoint of any layout, converted or trained, or a run folder. IN.npz holds `images` (float32 [N, 3, h, w],
already normalised) and/or `tokens` (int64 [N, context]). OUT holds `image_embeddings` and/or `text_embeddings`, fp32
[N, D] of length 1, in input order, and for shards `keys` and bool `image_valid`, `text_valid`. A row of a shard is a
sample that has a picture, a caption or both; the side that it lacks is NaN and marked. Samples of which something is
there but unreadable are left out, counted and listed with their reasons in OUT.left_out.jsonl; --unreadable nan keep
them, marked: then OUT.npz has a row of every sample, and a job with a locked image tower reads it in place of pixels
(data.features). Blocks are read, embedded and written one after another; the finished file is read back.
"""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from data.pixels.features import FeatureOrigin
from engine.config.read import Config
from engine.evaluation.embedder import Embedder
from engine.evaluation.inputs import Block, ShardInput
from engine.evaluation.progress import Progress
from engine.evaluation.session import Session, block_size, load, open_session, shard_input, split_overrides
from engine.objectives.features import tower_digest
from engine.parallel.mesh import LayoutError
from engine.resilience.exit import leave
from tools.cli import answer, check_file, command_parser, positive
from tools.embed.inputs import Input, NpzInput
from tools.embed.outputs import check_ending, open_table
from tools.embed.rows import ShardRows


def main(argv: list[str]) -> int:
    """Run the command on this rank; the exit status."""
    rest, overrides = split_overrides(argv)
    arguments = _arguments(rest)
    return answer(lambda: _run(arguments, overrides), LayoutError)


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    check_ending(arguments.out)
    check_file(arguments.out)
    with open_session(arguments.checkpoint, overrides, arguments.micro_batch) as session:
        _embed(arguments, session)
    return 0


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = command_parser(
        "embed",
        __doc__,
        [
            "python -m tools.embed --checkpoint runs/quickstart --shards runs/quickstart/shards/heldout --out held.npz",
            "torchrun --nproc-per-node 4 -m tools.embed --checkpoint runs/b16 --npz in.npz --out out.parquet "
            "parallel.tensor=2 parallel.pipeline=2",
        ],
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint or run folder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--npz", type=Path, help="arrays `images` and/or `tokens`")
    source.add_argument("--shards", nargs="+", help="entries of data.shards")
    parser.add_argument("--out", type=Path, required=True, help="OUT.npz or OUT.parquet")
    parser.add_argument(
        "--unreadable",
        choices=("leave-out", "nan"),
        default="leave-out",
        help="what becomes of such samples of shards",
    )
    parser.add_argument("--micro-batch", type=positive, default=64, help="images of one pass through a stage")
    parser.add_argument("--ema", action="store_true", help="the averaged weights (optim.ema_decay)")
    parser.add_argument("--skip-hashes", action="store_true", help="check the sizes of the files only")
    return parser.parse_args(argv)


def _embed(arguments: argparse.Namespace, session: Session) -> None:
    source = NpzInput(arguments.npz, session.config) if arguments.npz else shard_input(arguments.shards, session)
    if arguments.out.suffix == ".parquet" and isinstance(source, NpzInput):
        source.check_rows()
    embedder = load(
        session,
        images=source.has_images,
        texts=source.has_tokens,
        verify_hashes=not arguments.skip_hashes,
        ema=arguments.ema,
        encodes=isinstance(source, ShardInput),
    )
    rows = (
        ShardRows(source, embedder, session.config, keep=arguments.unreadable == "nan")
        if isinstance(source, ShardInput)
        else None
    )
    tower = tower_digest(embedder.encoders.vision, session.mesh) if source.has_images else 0
    progress = Progress("embed", len(source), shown=session.is_first)
    with open_table(arguments.out) if session.is_first else nullcontext() as table:
        for block in source.blocks(block_size(session)):
            columns, valid = rows.columns(block) if rows is not None else (_npz_columns(embedder, source, block), None)
            if table is not None:
                table.write(columns, valid)
            progress.advance(block.stop)
        written = table.rows if table is not None else 0
    if rows is not None and session.is_first:
        rows.left_out.write(Path(f"{arguments.out}.left_out.jsonl"), rows.samples)
        if rows.keeps_all and source.has_images and arguments.out.suffix == ".npz":
            _origin(source, session.config, tower).write(arguments.out)
    progress.finish(f"{arguments.out}: {written:,} rows at {session.mesh.layout} in {progress.seconds:.1f} s")


def _origin(source: Input, config: Config, tower: int) -> FeatureOrigin:
    """What a job has to know to read the rows in the place of pixels (data.features)."""
    assert isinstance(source, ShardInput)
    shards, tallies = source.reader.sources.shards, source.reader.sources.tallies
    return FeatureOrigin(
        shards=shards,
        samples=[tally.samples for tally in tallies],
        digests=[tally.digest for tally in tallies],
        tower=tower,
        embed_dim=config.model.embed_dim,
        image_size=config.model.vision.image_size,
    )


def _npz_columns(embedder: Embedder, source: Input, block: Block) -> dict[str, np.ndarray]:
    columns = {}
    if block.pixels is not None:
        columns["image_embeddings"] = embedder.images(block.pixels, _count(source, block)).cpu().numpy()
    if block.tokens is not None:
        columns["text_embeddings"] = embedder.texts(block.tokens).cpu().numpy()
    return columns


def _count(source: Input, block: Block) -> int:
    """Images of the block: an .npz may hold fewer images than captions."""
    images = source.images if isinstance(source, NpzInput) else None
    return min(block.stop, len(images)) - block.start if images is not None else block.stop - block.start


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
