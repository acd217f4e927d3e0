"""One side of the evaluation benchmark in a process of its own; benchmarks/evaluation_speed.py starts them.

    python -m benchmarks.evaluation_sides ours|open_clip SET PRECISION
    torchrun --nproc-per-node 2 … -m benchmarks.evaluation_sides ours SET PRECISION --rounds 3

Reads one task a line and answers with its wall and CPU seconds as JSON: `evaluated` (pictures from the tar to features,
or under clip_benchmark's loop), `bare` (the tower alone on the same pictures in memory), `read` (decoding alone),
`classes` (class embeddings), `gemm` (matrix products of a block). With --rounds no line is read: every rank runs
`evaluated`, `bare` and `read` by turns, and the first one answers for all, CPU seconds added up.
"""

import argparse
import dataclasses
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.step_sides import stand_in_for_torchvision_operators
from data.tokenizer import Tokenizer
from engine.build import DTYPES, build_vision
from engine.config.read import Config, resolve
from engine.evaluation.embedder import Embedder, Encoders
from engine.evaluation.inputs import SampleInput
from engine.evaluation.sets.listing import list_set
from engine.evaluation.sets.pictures import sample_factory
from engine.evaluation.sets.spec import SetSpec
from engine.evaluation.suite.features import Features, embed_part
from engine.evaluation.suite.texts import DistinctClasses, embed_classes
from engine.parallel.agree import everyone
from engine.parallel.launch import job
from engine.parallel.mesh import Mesh
from models.config import ModelConfig, TextConfig, VisionConfig
from models.tensors.init import initialise
from models.tensors.naming import logical_tensors
from models.towers.text import TextTower

B16 = ModelConfig(
    embed_dim=512,
    vision=VisionConfig(
        patch_size=16, norm="layer", norm_eps=1e-5, embed_norm=True, qkv_bias=True, key_bias=True, patch_bias=False
    ),
    text=TextConfig(width=512, depth=12, heads=8),
)
"""open_clip's ViT-B-16."""
QUICK = dataclasses.replace(
    B16,
    vision=dataclasses.replace(B16.vision, depth=2, width=128, mlp_hidden=512, image_size=64),
    text=dataclasses.replace(B16.text, width=128, depth=2, heads=2),
)
SPEC = SetSpec(name="pictures")
GEMM = (1576, 768, 3072)
"""Rows, inputs and outputs of the first product of an MLP, for eight pictures."""
Tasks = dict[str, Callable[[], object]]


def ours(arguments: argparse.Namespace, mesh: Mesh, device: torch.device, config: Config) -> Tasks:
    """The set from its tar to features on disk, the same pictures in memory through the tower, prompts."""
    embedder = Embedder(_encoders(config, mesh), mesh, device, arguments.micro_batch)
    listing = list_set(arguments.data, SPEC, train=False, any_size=True)
    assert listing is not None
    factory = sample_factory(listing.test, config, transform="squash", frames=1)
    norm, dtype = config.model.vision.pixel_norm, DTYPES[arguments.precision]
    source = lambda: SampleInput(factory, mesh, dtype, device, pixel_norm=norm, readers=arguments.readers)  # noqa: E731
    count, size = len(source()), arguments.micro_batch * 4 * mesh.data.size
    assert count % size == 0, "whole blocks, so that a rank embeds the rows that it has read"
    own = [block.pixels(_own_rows(size, mesh)) for block in source().blocks(size) if block.pixels is not None]

    def evaluated() -> None:
        with _folder() as folder:
            embed_part(embedder, source(), size, Features(folder=folder, fingerprint=""), "", "features")

    def bare() -> None:
        for ready in own:
            embedder.images(partial(_part_of, ready, _own_rows(size, mesh)), size)

    def read() -> None:
        for block in source().blocks(size):
            assert block.pixels is not None
            block.pixels(_own_rows(size, mesh))

    def classes() -> None:
        tokenizer = Tokenizer(config.model.text.context_length)  # its files are read once, as open_clip's are
        embed_classes(embedder, DistinctClasses(*_prompts(arguments), tokenizer))

    return {"evaluated": evaluated, "bare": bare, "read": read, "classes": classes}


def _own_rows(count: int, mesh: Mesh) -> slice:
    per_rank = count // mesh.data.size
    return slice(per_rank * mesh.data.rank, per_rank * (mesh.data.rank + 1))


def _part_of(pixels: torch.Tensor, of: slice, rows: slice) -> torch.Tensor:
    """Some rows of those that lie in `pixels`."""
    return pixels[rows.start - of.start : rows.stop - of.start]


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def timed(task: Callable[[], object], mesh: Mesh | None = None) -> dict[str, float]:
    """Wall and CPU seconds of a task; over the ranks of a mesh the longest and the sum."""
    if mesh is not None:
        everyone(None, mesh.world)
    began, cpu = time.perf_counter(), _cpu_s()
    task()
    own = (time.perf_counter() - began, _cpu_s() - cpu)
    ranks = everyone(own, mesh.world) if mesh is not None else [own]
    return {"wall_s": max(wall for wall, _ in ranks), "cpu_s": sum(used for _, used in ranks)}


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def config_of(arguments: argparse.Namespace) -> Config:
    """open_clip's ViT-B-16, or a toy, on so many ranks."""
    tree = {
        "model": dataclasses.asdict(QUICK if arguments.quick else B16),
        "data": {"shards": ["-"]},
        "train": {
            "precision": arguments.precision,
            "micro_batch_size": 1,
            "global_batch_size": int(os.environ.get("WORLD_SIZE", "1")),
        },
    }
    return resolve(tree, [])


def _encoders(config: Config, mesh: Mesh) -> Encoders:
    vision = build_vision(config, mesh, torch.device("cpu"))
    text = TextTower(config.model, groups=mesh.text_groups(), dtype=DTYPES[config.train.precision])
    with torch.no_grad():
        for name, module in (("vision", vision[0]), ("text", text)):
            initialise(module, logical_tensors(module, name, 0, 1), config.model, 0, 0, 1)
            module.eval()
    return Encoders(vision, text, config.model.embed_dim)


def _prompts(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Made-up names, and templates of the lengths that CLIP's have."""
    kinds = ["good", "blurry", "bright", "small", "large", "black and white", "cropped", "dark"]
    media = ["photo", "drawing", "painting", "sculpture", "rendition", "toy", "video", "close-up", "sketch", "print"]
    templates = [f"a {kind} {medium} of a {{c}}." for kind in kinds for medium in media]
    return [f"thing number {number}" for number in range(arguments.classes)], templates


# --- open_clip and clip_benchmark ------------------------------------------------------------------------------------


def peer(arguments: argparse.Namespace) -> Tasks:
    """open_clip's model with clip_benchmark's own functions; in bf16 by autocast, clip_benchmark's default."""
    stand_in_for_torchvision_operators()
    import open_clip
    from clip_benchmark.metrics import zeroshot_classification as theirs

    model, _, transform = open_clip.create_model_and_transforms("ViT-B-16", pretrained=None)
    model.eval()
    amp = arguments.precision == "bf16"
    names, prompts = _prompts(arguments)
    tokenizer = open_clip.get_tokenizer("ViT-B-16")
    weights = torch.randn(512, 1000)
    pictures = _TarPictures(arguments.data, transform)
    loader = lambda: torch.utils.data.DataLoader(pictures, batch_size=arguments.micro_batch)  # noqa: E731
    ready = [images for images, _ in loader()]

    def bare() -> None:
        with torch.no_grad(), torch.autocast("cpu") if amp else nullcontext():
            for images in ready:
                model.encode_image(images)

    return {
        "evaluated": lambda: theirs.run_classification(model, weights, loader(), "cpu", amp=amp),
        "bare": bare,
        "read": lambda: list(loader()),
        "classes": lambda: theirs.zero_shot_classifier(model, tokenizer, names, prompts, "cpu", amp=amp),
    }


class _TarPictures(torch.utils.data.Dataset):
    """The pictures of the set as clip_benchmark reads them: PIL, then open_clip's transform; in its order."""

    def __init__(self, data: Path, transform: Callable[[Any], torch.Tensor]):
        import tarfile

        self.transform = transform
        with tarfile.open(data / "pictures" / "test" / "0.tar") as tar:
            self.encoded = [tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")]  # type: ignore[union-attr]

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        import io

        from PIL import Image

        return self.transform(Image.open(io.BytesIO(self.encoded[number])).convert("RGB")), 0


def _products(dtype: torch.dtype) -> Callable[[], object]:
    rows, inputs, outputs = GEMM
    a, b = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    return partial(torch.nn.functional.linear, a, b)


def serve(tasks: Tasks, answers: Any) -> None:
    """Answer tasks until standard input ends; the first answer says that everything is loaded."""
    print(json.dumps({}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(timed(tasks[line.strip()])), file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=("ours", "open_clip"))
    parser.add_argument("data", type=Path)
    parser.add_argument("precision", choices=tuple(DTYPES))
    parser.add_argument("--readers", type=int, default=1)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr  # what packages print is no answer
    gemm: Tasks = {"gemm": _products(DTYPES[arguments.precision])}
    if arguments.side == "open_clip":
        serve(peer(arguments) | gemm, answers)
        return
    config = config_of(arguments)
    with job(config.parallel) as (mesh, device):
        tasks = ours(arguments, mesh, device.torch_device, config)
        if not arguments.rounds:
            serve(tasks | gemm, answers)
            return
        names = ("evaluated", "bare", "read")
        tasks["bare"]()
        rounds = [{name: timed(tasks[name], mesh) for name in names} for _ in range(arguments.rounds)]
        if mesh.world.rank == 0:
            print(json.dumps(rounds), file=answers, flush=True)


if __name__ == "__main__":
    main()
