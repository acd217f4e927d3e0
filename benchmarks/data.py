"""Images per CPU-second of the data room, against webdataset + Pillow + torchvision-style transforms.

500 x 375 JPEGs of about 110 kB (gradients with noise) in tar shards, to 224 x 224, training transform of the paper,
page cache warm. Every path runs in this process on one thread unless its name says otherwise; paths alternate within a
round, in another order in each, since a path pays for the caches and the heap that the one before it left; the table
holds medians over the rounds of CPU milliseconds an image (CPU time is what a loaded machine does not distort much;
wall time it does).

* webdataset: the pipeline of open_clip and of the authors' code: shards -> tar_to_samples -> shuffle -> decode pilrgb
  -> rename, transform, tokenise -> tuple -> batch. The transform is torchvision's in plain Pillow and torch: crop,
  bicubic resize, to float tensor, normalise. The tokenizer is ours in both: it is not what is compared.
* random / sequential: SampleReader with data.shuffle on and off: uint8 out; the device normalises.
* random, Pillow: the same with data.decoder=pillow in place of simplejpeg; Pillow resize: with Pillow's resize in place
  of torch's uint8 kernel as well, to show what that is worth.
* random + normalise: with the normalisation done here, on one core, as if the device did not.
* DALI, 1 and 2 threads: SampleReader with data.decoder=dali on the CPU.
* remote, whole shards / ranges: from an HTTP server on loopback (a process of its own, not counted), every pass with an
  empty cache; the reader fetches shards whole, the other row asks for each member by its range.
* video: 8 of 32 frames of MPEG-4 clips of 320 x 240, CPU ms a frame that is given (31 are decoded for 8).
* large: pictures of 1024 x 768 of the same kind (438 kB), by webdataset, in full, and with data.scaled_decode at 1.5
  and 1, a quarter as many a round.
* readers 1, 2: PrefetchLoader with so many processes (CPU time of parent and children); webdataset, reader 1: its
  pipeline in one worker of a torch DataLoader.
"""

import importlib.util
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image

from benchmarks.common import RESULTS, Spread, machine, save_chart, write_json
from benchmarks.data_further import (
    CLIPS,
    FRAMES_SEEN,
    ranged_path,
    served,
    video_path,
    whole_path,
    write_clips,
)
from data.config import DataConfig
from data.loader import PrefetchLoader
from data.pixels.decode import pillow, resize
from data.pixels.transforms import CLIP_MEAN, CLIP_STD, RandomResizedCrop, normalise
from data.reader import SampleBatch, SampleReader
from data.shards.index_store import load_index
from data.shards.storage import Storage
from data.shards.write import write_shard
from data.tokenizer import Tokenizer
from tools.cli import command_parser

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_EXAMPLES = (
    "python -m benchmarks.data                   # the peer: pip install --no-deps webdataset braceexpand",
    "python -m benchmarks.data --images 96 --rounds 2 --out results",
    "python -m benchmarks.data --only webdataset random sequential --rounds 12 --name data_again --out results",
)
WIDTH, HEIGHT, SIDE, CONTEXT, BATCH, SHARDS = 500, 375, 224, 77, 64, 6
SCALE = (0.9, 1.0)
VIDEO, LARGE = "video, a frame", "large"
LARGE_SIZE, LARGE_SHARE = (1024, 768), 4
Path_ = Callable[[int], int]

# Model TFLOP of one pair in training: 3 x forward of both towers, half of the patches (whole images for B/16).
TRAIN_TFLOP = {"18B, 50 % patches": 13.98, "8B, 50 % patches": 6.14, "B/16, all patches": 0.123}
PEAK_TFLOPS = {"A100": 312, "H100": 989}
MFU = 0.5


def make_shards(folder: Path, images: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> list[str]:
    """`images` JPEGs in SHARDS tars, indexed beside each shard, as tools.index_shards leaves them."""
    folder.mkdir(exist_ok=True)
    shards = []
    for shard in range(SHARDS):
        numbers = range(shard, images, SHARDS)
        shards.append(str(folder / f"{shard:05d}.tar"))
        samples = (
            (f"{n:06d}", {"jpg": _jpeg(n, *size), "txt": f"a photo of thing number {n}".encode()}) for n in numbers
        )
        write_shard(shards[-1], samples)
        load_index(shards[-1], Storage())
    return shards


def _jpeg(number: int, width: int = WIDTH, height: int = HEIGHT) -> bytes:
    rng = np.random.default_rng(number)
    smooth = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    pixels = np.asarray(smooth.resize((width, height), Image.Resampling.BICUBIC)) + rng.normal(
        0, 22, (height, width, 3)
    )
    stream = BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


# --- the paths: each reads every image once and returns how many -----------------------------------------------------


class Torchvision:
    """RandomResizedCrop, ToTensor, Normalize as torchvision runs them on a Pillow image."""

    def __init__(self) -> None:
        self._crop = RandomResizedCrop(seed=0, size=SIDE, scale=SCALE, flip=False)
        self._mean = torch.tensor(CLIP_MEAN).view(3, 1, 1)
        self._std = torch.tensor(CLIP_STD).view(3, 1, 1)
        self._calls = 0

    def __call__(self, image: Image.Image) -> torch.Tensor:
        self._calls += 1
        left, top, right, bottom = map(int, self._crop.window(self._calls, *image.size).box)
        resized = image.crop((left, top, right, bottom)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()
        return pixels.to(torch.float32).div(255).sub_(self._mean).div_(self._std)


def webdataset_path(shards: list[str], workers: int = 0) -> Path_:
    """open_clip's pipeline; made anew for every pass, as for every epoch."""
    import webdataset

    tokenizer, transform = Tokenizer(CONTEXT), Torchvision()

    def read(images: int) -> int:
        pipeline = webdataset.DataPipeline(
            webdataset.SimpleShardList(shards),
            webdataset.tarfile_to_samples(),
            webdataset.shuffle(5000, initial=1000),
            webdataset.select(lambda sample: "txt" in sample and "jpg" in sample),
            webdataset.decode("pilrgb"),
            webdataset.rename(image="jpg;png;jpeg;webp", text="txt"),
            webdataset.map_dict(image=transform, text=lambda text: torch.from_numpy(tokenizer.encode([text])[0])),
            webdataset.to_tuple("image", "text"),
            webdataset.batched(BATCH, partial=True, collation_fn=torch.utils.data.default_collate),
        )
        loader = torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=workers) if workers else pipeline
        return sum(len(image) for image, _ in loader)

    return read


def _reader(shards: list[str], **settings: Any) -> SampleReader:
    config = DataConfig(shards=shards, crop_scale=list(SCALE), **settings)
    return SampleReader(config, image_size=SIDE, context_length=CONTEXT, seed=0, train=True)


def _batches(images: int) -> Iterator[np.ndarray]:
    return (np.arange(first, min(first + BATCH, images)) for first in range(0, images, BATCH))


def reader_path(shards: list[str], *, finish: Callable[[torch.Tensor], Any] | None = None, **settings: Any) -> Path_:
    """SampleReader in this process; `finish` is applied to the pixels of each batch."""
    reader = _reader(shards, **settings)
    return lambda images: read_all(reader, images, finish)


def read_all(reader: SampleReader, images: int, finish: Callable[[torch.Tensor], Any] | None = None) -> int:
    """Batches of `reader` until `images` are read."""
    count = 0
    for positions in _batches(images):
        batch = reader.read(positions)
        if finish is not None:
            finish(batch.images)
        count += len(batch.images)
    return count


def dali_path(shards: list[str], threads: int) -> Path_:
    """SampleReader with DALI on so many threads."""
    reader = _reader(shards, decoder="dali")
    reader._decoder._threads = threads  # type: ignore[attr-defined]  # the readers use one each: they are processes
    return lambda images: sum(len(reader.read(positions).images) for positions in _batches(images))


def loader_path(shards: list[str], workers: int) -> Path_:
    """PrefetchLoader with so many reader processes, from their start to their end."""
    reader = _reader(shards)

    def read(images: int) -> int:
        loader: PrefetchLoader[SampleBatch] = PrefetchLoader(reader.read, _batches(images), workers=workers)
        with loader:
            return sum(len(batch.images) for batch in loader)

    return read


@contextmanager
def _pillow_resize() -> Iterator[None]:
    """The decoder without torch's resize kernel."""
    before = pillow.cut
    pillow.cut = lambda pixels, window: resize._resize_box(pixels, window)
    try:
        yield
    finally:
        pillow.cut = before


def pillow_resize_path(shards: list[str]) -> Path_:
    """Decoded and resized by Pillow."""
    read = reader_path(shards, decoder="pillow")

    def slowly(images: int) -> int:
        with _pillow_resize():
            return read(images)

    return slowly


def large_paths(folder: Path, images: int) -> dict[str, Path_]:
    """Pictures that a window of 224 allows to decode at half their size."""
    shards = make_shards(folder / "large", images // LARGE_SHARE, LARGE_SIZE)
    sides = {
        "webdataset": webdataset_path(shards),
        "random": reader_path(shards),
        "scaled 1.5": reader_path(shards, scaled_decode=1.5),
        "scaled 1": reader_path(shards, scaled_decode=1.0),
    }
    return {f"{LARGE}, {name}": _of_fewer(read) for name, read in sides.items()}


def _of_fewer(read: Path_) -> Path_:
    return lambda images: read(images // LARGE_SHARE)


def paths(shards: list[str], url: str, folder: Path) -> dict[str, Path_]:
    """What is compared, by name. url: where the shards are served; folder: for clips and caches."""
    urls = [f"{url}/{Path(shard).name}" for shard in shards]
    further = {
        "remote, whole shards": whole_path(urls, folder / "whole", _reader, read_all),
        "remote, ranges": ranged_path(urls, folder / "ranges", _reader, read_all),
        VIDEO: video_path(write_clips(folder), _reader),
    }
    dali = {}
    if importlib.util.find_spec("nvidia") is not None:
        dali = {"DALI, 1 thread": dali_path(shards, 1), "DALI, 2 threads": dali_path(shards, 2)}
    return {
        "webdataset": webdataset_path(shards),
        "webdataset, reader 1": webdataset_path(shards, workers=1),
        "random": reader_path(shards),
        "sequential": reader_path(shards, shuffle=False),
        "random, Pillow": reader_path(shards, decoder="pillow"),
        "random, Pillow resize": pillow_resize_path(shards),
        "random + normalise": reader_path(shards, finish=lambda images: normalise(images, torch.float32)),
        **dali,
        "readers 1": loader_path(shards, 1),
        "readers 2": loader_path(shards, 2),
        **further,
    }


# --- measuring -------------------------------------------------------------------------------------------------------


def _cpu_s() -> float:
    uses = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)


def measure(readers: dict[str, Path_], images: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Alternating rounds of all paths, after one that warms up."""
    cpu_ms: dict[str, list[float]] = {name: [] for name in readers}
    wall_ms: dict[str, list[float]] = {name: [] for name in readers}
    for turn in range(rounds + 1):
        for name, read in random.Random(turn).sample(list(readers.items()), len(readers)):
            cpu, wall = _cpu_s(), time.perf_counter()
            count = read(images)
            wanted = CLIPS * FRAMES_SEEN if name == VIDEO else images // (LARGE_SHARE if LARGE in name else 1)
            assert count == wanted, f"{name} read {count} of {wanted}"
            if turn:
                cpu_ms[name].append((_cpu_s() - cpu) / count * 1e3)
                wall_ms[name].append((time.perf_counter() - wall) / count * 1e3)
    return {
        name: {
            "cpu_ms_per_image": asdict(Spread.of(cpu_ms[name])),
            "wall_ms_per_image": asdict(Spread.of(wall_ms[name])),
        }
        for name in readers
    }


def decision_rule(cpu_ms: float) -> list[dict[str, Any]]:
    """Images/s that a GPU trains at MFU, and the cores that decode them."""
    rows = []
    for model, tflop in TRAIN_TFLOP.items():
        for gpu, peak in PEAK_TFLOPS.items():
            wanted = MFU * peak / tflop
            cores = wanted * cpu_ms / 1e3
            rows.append(
                {"model": model, "gpu": gpu, "images_per_s": round(wanted, 1), "cores_per_gpu": round(cores, 3)}
            )
    return rows


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Images per CPU-second, one bar a path."""
    names = list(results)[::-1]
    rates = [1e3 / results[name]["cpu_ms_per_image"]["median"] for name in names]
    colours = [
        "tab:grey" if name.startswith("webdataset") else "tab:orange" if "DALI" in name else "tab:blue"
        for name in names
    ]
    figure, axes = plt.subplots(figsize=(7, 3.6))
    bars = axes.barh(names, rates, color=colours)
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set_xlabel(f"images per CPU-second ({WIDTH} x {HEIGHT} JPEG to {SIDE} x {SIDE})")
    axes.margins(x=0.12)
    save_chart(figure, path)


def main() -> None:
    """Measure, print, write NAME.json and NAME.png."""
    parser = command_parser("data", __doc__, _EXAMPLES, room="benchmarks")
    parser.add_argument("--images", type=int, default=384, help="pictures of a round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of every path")
    parser.add_argument("--only", nargs="+", metavar="PATH", help="these paths; webdataset and random among them")
    parser.add_argument("--name", default="data", help="of the result")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of NAME.json and NAME.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        before = machine()
        shards = make_shards(Path(folder), options.images)
        kilobytes = sum(map(os.path.getsize, shards)) / options.images / 1e3
        with served(Path(folder)) as url:
            sides = paths(shards, url, Path(folder)) | large_paths(Path(folder), options.images)
            wanted = options.only or list(sides)
            if unknown := sorted({*wanted} - {*sides}) or sorted({"webdataset", "random"} - {*wanted}):
                parser.error(f"--only {' '.join(wanted)}: {unknown[0]!r} is unknown or missing: {'; '.join(sides)}")
            results = measure({name: sides[name] for name in wanted}, options.images, options.rounds)
    ours = results["random"]["cpu_ms_per_image"]["median"]
    ratio = results["webdataset"]["cpu_ms_per_image"]["median"] / ours
    report = {
        "machine": before | {"load_1min_after": round(os.getloadavg()[0], 1)},
        "images": options.images,
        "rounds": options.rounds,
        "kilobytes_per_sample": round(kilobytes, 1),
        "paths": results,
        "images_per_cpu_second_over_webdataset": round(ratio, 2),
        "decision_rule": {"mfu": MFU, "rows": decision_rule(ours)},
    }
    write_json(report, options.out / f"{options.name}.json")
    draw(results, options.out / f"{options.name}.png")
    for name, values in results.items():
        cpu, wall = values["cpu_ms_per_image"], values["wall_ms_per_image"]
        print(
            f"{name:24} {cpu['median']:6.2f} CPU ms ({cpu['low']:.2f} to {cpu['high']:.2f})  {wall['median']:6.2f} wall"
        )
    print(f"{ratio:.2f} times the images per CPU-second of webdataset")


if __name__ == "__main__":
    main()
