"""Zero-shot and retrieval on held-out shards.

`torchrun --nproc-per-node N -m tools.evaluate CHECKPOINT SHARDS… [--out FILE.json] [--predictions FILE.json]
[parallel.tensor=2 …]`

CHECKPOINT is a run folder (its newest checkpoint) or a checkpoint folder, trained or converted; the layout is the one
it was written at unless overrides say otherwise. Every different caption of the shards (one a line of a sample's
.txt) is a candidate for every different picture, and right for all pictures that have it; top-1 chance is 1 / number
of different captions where a picture has one. Samples without a readable picture and caption are left out and counted.
Images are resized to the model's square ("squash", as the paper evaluates retrieval).
With data.frames=8 clips are embedded as in training, by 8 frames each; without it, by their middle frame.
"""

import argparse
import base64
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from data.errors import DataError
from engine.callbacks.metrics import read_metrics
from engine.evaluation.inputs import ShardInput, picture_identity
from engine.evaluation.progress import Progress
from engine.evaluation.retrieval import predictions
from engine.evaluation.scores import CaptionScores
from engine.evaluation.session import Session, block_size, load, open_session, shard_input, split_overrides
from engine.evaluation.text_files import write_whole
from engine.parallel.mesh import LayoutError
from engine.resilience.exit import leave
from tools.cli import answer, check_file, command_parser


def main(argv: list[str]) -> int:
    """Run the command on this rank; the exit status."""
    rest, overrides = split_overrides(argv)
    parser = command_parser(
        "evaluate",
        __doc__,
        ["python -m tools.evaluate runs/quickstart runs/quickstart/shards/heldout --out runs/quickstart/result.json"],
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("shards", nargs="+")
    parser.add_argument("--out", type=Path, help="scores as JSON")
    parser.add_argument("--predictions", type=Path, help="pictures with their three best captions as JSON")
    parser.add_argument("--pictures", type=int, default=24, help="how many pictures go into --predictions")
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--ema", action="store_true", help="the averaged weights (optim.ema_decay)")
    parser.add_argument("--skip-hashes", action="store_true", help="check the sizes of the checkpoint's files only")
    arguments = parser.parse_args(rest)
    return answer(lambda: _run(arguments, overrides), LayoutError)


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    for path in (arguments.out, arguments.predictions):
        if path is not None:
            check_file(path)
    with open_session(arguments.checkpoint, overrides, arguments.micro_batch) as session:
        _evaluate(arguments, session)
    return 0


def _evaluate(arguments: argparse.Namespace, session: Session) -> None:
    started = time.perf_counter()
    source = shard_input(arguments.shards, session)
    if not source.has_images or not source.has_tokens:
        missing = "caption" if source.has_images else "picture"
        raise DataError(f"{', '.join(arguments.shards)}: no sample has a {missing}, so there is nothing to compare")
    verify = not arguments.skip_hashes
    embedder = load(session, images=True, texts=True, verify_hashes=verify, ema=arguments.ema)
    collected = CaptionScores(embedder, session.config.model.text.context_length)
    progress = Progress("evaluate", len(source), shown=session.is_first)
    for block in source.blocks(block_size(session)):
        collected.add(block)
        progress.advance(block.stop)
    if not session.is_first:
        collected.scores()  # an error is every rank's
        return
    times = {
        "seconds": _training_seconds(Path(session.checkpoint.manifest.config["run_dir"])),
        "evaluation_seconds": round(time.perf_counter() - started, 2),
    }
    scores = collected.scores() | {"layout": session.mesh.layout} | times
    if collected.left_out.count:
        print(f"WARNING: {collected.left_out.describe(collected.samples)}", file=sys.stderr, flush=True)
    print(json.dumps(scores, indent=1))
    if arguments.out:
        write_whole(arguments.out, json.dumps(scores, indent=1))
    if arguments.predictions:
        shown = _pictures(arguments, source, collected)
        write_whole(arguments.predictions, json.dumps(shown))


def _training_seconds(run_dir: Path) -> float | None:
    """Wall time of the run's steps; None where its metrics are not at hand."""
    metrics = run_dir / "metrics.jsonl"
    return round(sum(r["step_time_s"] for r in read_metrics(metrics)), 1) if metrics.is_file() else None


def _pictures(arguments: argparse.Namespace, source: ShardInput, collected: CaptionScores) -> dict[str, Any]:
    """Evenly spaced samples with their three best captions, as tools/report/__main__.py shows them."""
    wanted = np.linspace(0, len(source) - 1, min(arguments.pictures, len(source))).astype(np.int64)
    seen = source.reader.read_each(wanted)
    identities = [picture_identity(image) for image in seen.images]
    rows = [row for row, identity in enumerate(identities) if collected.images.knows(identity)]
    image = collected.images.embeddings[[collected.images.number(identities[row]) for row in rows]]
    count = min(3, len(collected.captions))
    best = predictions(image, collected.texts.embeddings, collected.captions, k=count)
    return {
        "shards": arguments.shards,
        "samples": [
            {
                "shard": source.reader.shard_of(int(wanted[row])),
                "key": seen.keys[row],
                "caption": seen.captions[row],
                "image_png_base64": _png_base64(_still(seen.images[row])),
                "top": top,
            }
            for row, top in zip(rows, best, strict=True)
        ],
    }


def _still(pixels: Tensor) -> Tensor:
    """The picture, or the middle frame of a clip [frames, 3, h, w], on the CPU."""
    return (pixels if pixels.dim() == 3 else pixels[len(pixels) // 2]).cpu()


def _png_base64(pixels: Tensor) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
