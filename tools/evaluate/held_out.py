"""Zero-shot and retrieval on held-out shards."""

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
from engine.evaluation.session import Session, block_size, load, shard_input
from engine.evaluation.text_files import write_whole
from engine.evaluation.vocabulary import tokenizer_of


def score_shards(arguments: argparse.Namespace, session: Session) -> None:
    """Score, print and write. Collective over the mesh."""
    started = time.perf_counter()
    source = shard_input(arguments.shards, session, arguments.readers)
    if not source.has_images or not source.has_tokens:
        missing = "caption" if source.has_images else "picture"
        raise DataError(f"{', '.join(arguments.shards)}: no sample has a {missing}, so there is nothing to compare")
    verify = not arguments.skip_hashes
    embedder = load(session, images=True, texts=True, verify_hashes=verify, ema=arguments.ema)
    collected = CaptionScores(embedder, tokenizer_of(session.config.model.text, session.config.data))
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
