"""Zero-shot and retrieval on held-out shards.

`torchrun --nproc-per-node N -m tools.evaluate CHECKPOINT SHARDS… [--out FILE.json] [--predictions FILE.json]
[parallel.tensor=2 …]`

CHECKPOINT is a run folder (its newest checkpoint) or a checkpoint folder, trained or converted; the layout is the one
it was written at unless overrides say otherwise. Every caption of the shards is a candidate for every image: top-1
chance is 1 / number of captions. Images are resized to the model's square ("squash", as the paper evaluates retrieval).
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
import torch
from PIL import Image
from torch import Tensor

from data.errors import DataError
from engine.callbacks.metrics import read_metrics
from engine.checkpoint.format.errors import CheckpointError
from engine.config.read import ConfigError
from engine.evaluation.retrieval import predictions
from engine.evaluation.scores import caption_scores, embedded_blocks
from engine.evaluation.session import Session, block_size, fail, load, open_session, shard_input, split_overrides
from engine.parallel.mesh import LayoutError
from engine.resilience.exit import leave


def main(argv: list[str]) -> int:
    """Run the command on this rank; the exit status."""
    rest, overrides = split_overrides(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("shards", nargs="+")
    parser.add_argument("--out", type=Path, help="scores as JSON")
    parser.add_argument("--predictions", type=Path, help="pictures with their three best captions as JSON")
    parser.add_argument("--pictures", type=int, default=24, help="how many pictures go into --predictions")
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--ema", action="store_true", help="the averaged weights (optim.ema_decay)")
    parser.add_argument("--skip-hashes", action="store_true", help="check the sizes of the checkpoint's files only")
    arguments = parser.parse_args(rest)
    try:
        with open_session(arguments.checkpoint, overrides, arguments.micro_batch) as session:
            _evaluate(arguments, session)
    except (CheckpointError, ConfigError, DataError, LayoutError) as error:
        return fail(error)
    return 0


def _evaluate(arguments: argparse.Namespace, session: Session) -> None:
    started = time.perf_counter()
    source = shard_input(arguments.shards, session)
    verify = not arguments.skip_hashes
    embedder = load(session, images=True, texts=True, verify_hashes=verify, ema=arguments.ema)
    chosen = np.linspace(0, len(source) - 1, min(arguments.pictures, len(source))).astype(int).tolist()
    images, texts, captions, pictures = [], [], [], []
    for block, image, text in embedded_blocks(embedder, source, block_size(session)):
        assert text is not None and block.images_u8 is not None
        images.append(image)
        texts.append(text)
        captions += block.captions
        rows = [i - block.start for i in chosen if block.start <= i < block.stop]
        pictures += [(block.start + row, block.keys[row], _still(block.images_u8[row])) for row in rows]
    if not session.is_first:
        return
    image, text = torch.cat(images), torch.cat(texts)
    times = {
        "seconds": _training_seconds(Path(session.checkpoint.manifest.config["run_dir"])),
        "evaluation_seconds": round(time.perf_counter() - started, 2),
    }
    scores = caption_scores(image, text) | {"layout": session.mesh.layout} | times
    print(json.dumps(scores, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(scores, indent=1))
    if arguments.predictions:
        shown = _pictures(arguments.shards, pictures, image, text, captions)
        arguments.predictions.write_text(json.dumps(shown))


def _training_seconds(run_dir: Path) -> float | None:
    """Wall time of the run's steps; None where its metrics are not at hand."""
    metrics = run_dir / "metrics.jsonl"
    return round(sum(r["step_time_s"] for r in read_metrics(metrics)), 1) if metrics.is_file() else None


def _pictures(
    shards: list[str], chosen: list[tuple[int, str, Tensor]], image: Tensor, text: Tensor, captions: list[str]
) -> dict[str, Any]:
    """Evenly spaced samples (row, key, pixels) with their three best captions, as tools/report shows them."""
    best = predictions(image[[row for row, _, _ in chosen]], text, captions, k=3)
    return {
        "shards": shards,
        "samples": [
            {
                "shard": shards[0],
                "key": key,
                "caption": captions[row],
                "image_png_base64": _png_base64(pixels),
                "top": top,
            }
            for (row, key, pixels), top in zip(chosen, best, strict=True)
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
