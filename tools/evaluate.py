"""Zero-shot and retrieval on held-out shards.

`torchrun --nproc-per-node N -m tools.evaluate CHECKPOINT SHARDS… [--out FILE.json] [--predictions FILE.json]`

CHECKPOINT is a run folder (its newest checkpoint) or one checkpoint folder; the layout is the checkpoint's own. Every
caption of the shards is a candidate for every image: top-1 chance is 1 / number of captions. Images are resized to the
model's square ("squash", as the paper evaluates retrieval).
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

from data.config import DataConfig
from data.errors import DataError
from data.reader import SampleBatch, SampleReader
from data.transforms import normalise
from engine.build import DTYPES, Towers, build_towers
from engine.callbacks.metrics import read_metrics
from engine.checkpoint.simple import CheckpointError, latest_checkpoint, load_checkpoint, read_meta
from engine.config import Config, ConfigError, check_layout, resolve
from engine.evaluation.retrieval import predictions, recall
from engine.evaluation.zero_shot import top_k_accuracy
from engine.inference import Embedder
from engine.launch import job
from engine.mesh import Mesh

_READ_BLOCK = 256


def main(argv: list[str]) -> int:
    """Run the command on this rank; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("shards", nargs="+")
    parser.add_argument("--out", type=Path, help="scores as JSON")
    parser.add_argument("--predictions", type=Path, help="pictures with their three best captions as JSON")
    parser.add_argument("--pictures", type=int, default=24, help="how many pictures go into --predictions")
    parser.add_argument("--micro-batch", type=int, default=64)
    arguments = parser.parse_args(argv)
    try:
        folder = _checkpoint_folder(arguments.checkpoint)
        config = _config_of(folder)
        with job(config.parallel) as (mesh, device):
            check_layout(config, mesh.world.size)
            towers = build_towers(config, mesh, device.torch_device)
            load_checkpoint(folder, towers, None, config, mesh)
            _evaluate(arguments, config, towers, mesh, device.torch_device)
    except (CheckpointError, ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _checkpoint_folder(path: Path) -> Path:
    if (path / "meta.json").is_file():
        return path
    found = latest_checkpoint(path, "auto")
    if found is None:
        raise CheckpointError(f"{path} is neither a checkpoint nor a run folder with one (checkpoint.every_steps > 0?)")
    return found


def _config_of(folder: Path) -> Config:
    return resolve(read_meta(folder)["config"], [], source=str(folder))


def _evaluate(arguments: argparse.Namespace, config: Config, towers: Towers, mesh: Mesh, device: torch.device) -> None:
    started = time.perf_counter()
    samples = _read_all(arguments.shards, config)
    dtype = DTYPES[config.train.precision]
    embedder = Embedder(towers, mesh, device, arguments.micro_batch)
    image = embedder.images(lambda rows: normalise(samples.images[rows], dtype), len(samples.keys)).cpu()
    text = embedder.texts(samples.tokens).cpu()
    if mesh.world.rank == 0:
        times = {
            "seconds": _training_seconds(Path(config.run_dir)),
            "evaluation_seconds": round(time.perf_counter() - started, 2),
        }
        scores = _scores(image, text) | {"layout": mesh.layout} | times
        print(json.dumps(scores, indent=1))
        if arguments.out:
            arguments.out.write_text(json.dumps(scores, indent=1))
        if arguments.predictions:
            arguments.predictions.write_text(json.dumps(_pictures(arguments, samples, image, text)))


def _training_seconds(run_dir: Path) -> float | None:
    """Wall time of the run's steps; None where its metrics are not at hand."""
    metrics = run_dir / "metrics.jsonl"
    return round(sum(r["step_time_s"] for r in read_metrics(metrics)), 1) if metrics.is_file() else None


def _read_all(shards: list[str], config: Config) -> SampleBatch:
    """Every sample of the shards, in order, on every rank."""
    reader = SampleReader(
        DataConfig(shards=shards, shuffle=False),
        image_size=config.model.vision.image_size,
        context_length=config.model.text.context_length,
        seed=0,
        train=False,
    )
    positions = np.arange(reader.total_samples)
    blocks = [reader.read(positions[i : i + _READ_BLOCK]) for i in range(0, len(positions), _READ_BLOCK)]
    return SampleBatch(
        images=torch.cat([block.images for block in blocks]),
        tokens=torch.cat([block.tokens for block in blocks]),
        captions=[caption for block in blocks for caption in block.captions],
        keys=[key for block in blocks for key in block.keys],
        bad=[bad for block in blocks for bad in block.bad],
    )


def _scores(image: torch.Tensor, text: torch.Tensor) -> dict[str, float]:
    own = torch.arange(len(image))
    top = top_k_accuracy(image, text, own, ks=(1, 5))
    both = recall(image, text, own, ks=(1, 5))
    return {
        "zero_shot_top1": top["top1"],
        "zero_shot_top5": top["top5"],
        "chance": 1 / len(text),
        "recall_at_1": (both["image_to_text_recall_at_1"] + both["text_to_image_recall_at_1"]) / 2,
        "recall_at_5": (both["image_to_text_recall_at_5"] + both["text_to_image_recall_at_5"]) / 2,
        **both,
    }


def _pictures(arguments, samples: SampleBatch, image: torch.Tensor, text: torch.Tensor) -> dict[str, Any]:
    """Evenly spaced samples with their three best captions, as tools/report.py shows them."""
    chosen = np.linspace(0, len(samples.keys) - 1, min(arguments.pictures, len(samples.keys))).astype(int).tolist()
    best = predictions(image[chosen], text, samples.captions, k=3)
    return {
        "shards": arguments.shards,
        "samples": [
            {
                "shard": arguments.shards[0],
                "key": samples.keys[i],
                "caption": samples.captions[i],
                "image_png_base64": _png_base64(samples.images[i]),
                "top": top,
            }
            for i, top in zip(chosen, best, strict=True)
        ],
    }


def _png_base64(pixels: torch.Tensor) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
