"""One side of the evaluation benchmark in processes of its own; benchmarks/evaluation_speed.py starts them.

    python -m benchmarks.evaluation_sides pictures|prompts ours|open_clip SET PRECISION --images N … (or under torchrun)

Prints one JSON line: wall and CPU seconds of every round, CPU seconds of all ranks together.
"""

import argparse
import dataclasses
import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def ours(what: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rounds of ours: on one process, or on the ranks of torchrun."""
    config = _config(arguments)
    with job(config.parallel) as (mesh, device):
        embedder = Embedder(_encoders(config, mesh), mesh, device.torch_device, arguments.micro_batch)
        if what == "prompts":
            names, prompts = _prompts(arguments)
            classes = DistinctClasses(names, prompts, Tokenizer(config.model.text.context_length))
            return [_timed(mesh, classes=lambda: embed_classes(embedder, classes)) for _ in range(arguments.rounds)]
        return _pictures(arguments, config, mesh, embedder)


def _pictures(arguments: argparse.Namespace, config: Config, mesh: Mesh, embedder: Embedder) -> list[dict[str, Any]]:
    """The set from its tar to features on disk, and the same pictures in memory through the tower alone, by turns."""
    listing = list_set(arguments.data, SPEC, train=False, any_size=True)
    assert listing is not None
    dtype, device = DTYPES[arguments.precision], torch.device("cpu")
    factory = sample_factory(listing.test, config, transform="squash", frames=1)
    size = arguments.micro_batch * 4 * mesh.data.size
    whole = SampleInput(factory, mesh, dtype, device, readers=1)
    block = next(iter(whole.blocks(len(whole))))
    assert block.pixels is not None
    own = block.pixels(slice(*_own_rows(len(whole), mesh)))
    first = _own_rows(len(whole), mesh)[0]

    def evaluate() -> None:
        with _folder() as folder:
            source = SampleInput(factory, mesh, dtype, device, readers=arguments.readers)
            embed_part(embedder, source, size, Features(folder=folder, fingerprint=""), "", "features")

    def forward() -> None:
        embedder.images(lambda rows: own[rows.start - first : rows.stop - first], len(whole))

    forward()
    return [_timed(mesh, evaluated=evaluate, bare=forward) for _ in range(arguments.rounds)]


def _own_rows(count: int, mesh: Mesh) -> tuple[int, int]:
    per_rank = -(-count // mesh.data.size)
    assert count % mesh.data.size == 0, "a whole number of pictures a rank"
    return per_rank * mesh.data.rank, per_rank * (mesh.data.rank + 1)


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _timed(mesh: Mesh | None, **tasks: Callable[[], object]) -> dict[str, Any]:
    result = {}
    for name, task in tasks.items():
        if mesh is not None:
            everyone(None, mesh.world)
        began, cpu = time.perf_counter(), _cpu_s()
        task()
        own = (time.perf_counter() - began, _cpu_s() - cpu)
        ranks = everyone(own, mesh.world) if mesh is not None else [own]
        result[name] = {"wall_s": max(wall for wall, _ in ranks), "cpu_s": sum(used for _, used in ranks)}
    return result


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _config(arguments: argparse.Namespace) -> Config:
    tree = {
        "model": dataclasses.asdict(QUICK if arguments.quick else B16),
        "data": {"shards": ["-"]},
        "train": {"precision": arguments.precision, "micro_batch_size": 1, "global_batch_size": arguments.ranks},
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


def peer(what: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rounds of open_clip's model with clip_benchmark's own functions; it averages in bf16 by autocast, its default."""
    stand_in_for_torchvision_operators()
    import open_clip
    from clip_benchmark.metrics import zeroshot_classification as theirs

    model, _, transform = open_clip.create_model_and_transforms("ViT-B-16", pretrained=None)
    model.eval()
    amp = arguments.precision == "bf16"
    if what == "prompts":
        names, prompts = _prompts(arguments)
        tokenizer = open_clip.get_tokenizer("ViT-B-16")
        task = lambda: theirs.zero_shot_classifier(model, tokenizer, names, prompts, "cpu", amp=amp)  # noqa: E731
        return [_timed(None, classes=task) for _ in range(arguments.rounds)]
    weights = torch.randn(512, 1000)
    decoded = _TarPictures(arguments.data, transform)

    def evaluate() -> None:
        loader = torch.utils.data.DataLoader(decoded, batch_size=arguments.micro_batch)
        theirs.run_classification(model, weights, loader, "cpu", amp=amp)

    return [_timed(None, evaluated=evaluate) for _ in range(arguments.rounds)]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pictures", "prompts"))
    parser.add_argument("side", choices=("ours", "open_clip"))
    parser.add_argument("data", type=Path)
    parser.add_argument("precision", choices=("fp32", "bf16"))
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--readers", type=int, default=1)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rounds = (ours if arguments.side == "ours" else peer)(arguments.what, arguments)
    if arguments.side != "ours" or int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(rounds), flush=True)


if __name__ == "__main__":
    main()
