"""Embeddings of images and captions at any layout, without gradients: evaluation and feature extraction.

Images (or clips) are dealt over the data axis and run through the stages in micro-batches, as a program of the pipeline
(engine/pipeline/forward.py); captions are dealt over all ranks. Every rank gets all embeddings, in input order.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.build import DTYPES, build_vision
from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.manifest import WEIGHT, Manifest
from engine.checkpoint.format.matching import Exceptions, match
from engine.checkpoint.initial import Resized
from engine.checkpoint.load import load_weights
from engine.checkpoint.reader import Checkpoint
from engine.config.read import Config, ConfigError, check_layout, refuse_repeats, resolve
from engine.config.typed import typed
from engine.evaluation.progress import Progress
from engine.parallel.agree import everyone
from engine.parallel.mesh import Mesh
from engine.parallel.rows import gather_rows, split_rows
from engine.pipeline.clock import Phases
from engine.pipeline.executor import Executor, Work
from engine.pipeline.forward import ForwardProgram
from engine.pipeline.program import Alone, Unit
from models.clip import embedding
from models.config import LOCAL_KERNELS
from models.tensors.naming import LogicalTensor, logical_tensors
from models.tensors.products import fast_products
from models.towers.heads import Read
from models.towers.text import TextTower
from models.towers.vision import VisionTower

Pixels = Callable[[slice], Tensor]
"""rows of the input -> normalised images [rows, 3, h, w] or clips [rows, frames, 3, h, w]; asked for on the first stage
only."""

_OVERRIDABLE = (
    "parallel.",
    "data.frames=",
    "model.vision.image_size=",
    "model.backend=",
    "model.attention=",
    "model.norm_kernel=",
    "model.block_kernels=",
    "train.precision=",
)


@dataclass
class Encoders:
    """This rank's parts of the towers, for forward passes only: no gradient buffers, no optimizer."""

    vision: list[VisionTower]
    """Chunks in tower order; empty if images are not asked for."""
    text: TextTower | None
    embed_dim: int


def inference_config(manifest: Manifest, overrides: list[str], world_size: int, micro_batch: int) -> Config:
    """The model of a checkpoint at the layout of `overrides`, by default the one it was written at, or what of it the
    ranks admit (`fitting_layout`).

    Raises ConfigError for a layout that model or ranks do not admit and for overrides that mean nothing here.
    """
    idle = [override for override in overrides if not override.startswith(_OVERRIDABLE)]
    if idle:
        raise ConfigError(f"{idle[0]} has no effect here; what can be set: {', '.join(_OVERRIDABLE)}")
    refuse_repeats(overrides)
    stored = manifest.config
    given = {name: _count_of(f"parallel.{name}", overrides) for name in ("tensor", "pipeline")}
    parallel = {"sequence": stored["parallel"]["sequence"]} | fitting_layout(stored["parallel"], given, world_size)
    tree = {
        "model": {**stored["model"], **LOCAL_KERNELS},
        "parallel": parallel,
        "data": {"shards": ["-"]},
        "train": {"precision": stored["train"]["precision"], "patch_dropout": 0.0, "micro_batch_size": 1},
    }
    # Sequence parallelism cuts micro-batch x tokens, so a multiple of the tensor axis always fits; clips stay whole.
    unit = math.lcm(parallel["tensor"], max(1, _count_of("data.frames", overrides)))
    micro_batch += -micro_batch % unit
    batch = [f"train.micro_batch_size={micro_batch}", f"train.global_batch_size={micro_batch * world_size}"]
    config = resolve(tree, [*overrides, *batch], source="checkpoint")
    if config.parallel.shard != "optimizer":
        raise ConfigError("parallel.shard is for training: nothing else keeps gradients or optimizer states")
    if config.parallel.virtual > 1:
        raise ConfigError("parallel.virtual is for training: without a backward there is no bubble worth it")
    check_layout(config, world_size)
    return config


def fitting_layout(stored: Mapping[str, int], given: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Tensor and pipeline axes for `ranks`: as given (0: not), else the stored ones where the ranks are a multiple of
    them, else the largest parts of the stored ones that divide the ranks.
    """
    tensor = given["tensor"] or math.gcd(stored["tensor"], ranks // max(1, given["pipeline"]))
    return {"tensor": tensor, "pipeline": given["pipeline"] or math.gcd(stored["pipeline"], ranks // tensor)}


def _count_of(key: str, overrides: list[str]) -> int:
    """The count that an override gives; 0 where none does, or one that is refused later."""
    given = [override.partition("=")[2] for override in overrides if override.startswith(f"{key}=")]
    return max(0, typed(given[-1], int, key)) if given else 0


def build_encoders(
    config: Config, mesh: Mesh, device: torch.device, *, images: bool = True, texts: bool = True
) -> Encoders:
    """This rank's parts of the towers that are asked for, not initialised."""
    vision = build_vision(config, mesh, device) if images else []
    text = None
    if texts:
        with torch.device(device):
            text = TextTower(config.model, groups=mesh.text_groups(), dtype=DTYPES[config.train.precision])
    return Encoders(vision, text, config.model.embed_dim)


def load_encoders(
    checkpoint: Checkpoint,
    config: Config,
    mesh: Mesh,
    device: torch.device,
    *,
    images: bool = True,
    texts: bool = True,
    kind: str = WEIGHT,
) -> tuple[Encoders, list[str]]:
    """Build the towers that are asked for and fill them; returns them and remarks for people. Collective over the mesh.

    kind: WEIGHT or AVERAGE (engine/checkpoint/format/manifest.py).

    Raises CheckpointError if a tensor of theirs is missing or of another shape; other tensors of the checkpoint (the
    logit scale, the other tower, the optimizer's) are not looked at.
    """
    encoders = build_encoders(config, mesh, device, images=images, texts=texts)
    tables: list[tuple[nn.Module, dict[str, LogicalTensor]]] = []
    for chunk in encoders.vision:
        tables.append((chunk, logical_tensors(chunk, "vision", chunk.layers.start, mesh.tensor.size)))
    if encoders.text is not None:
        tables.append((encoders.text, logical_tensors(encoders.text, "text", 0, 1)))
    own = {t.name: t.shape for _, table in tables for t in table.values()}
    wanted = {name: tuple(shape) for stage in everyone(own, mesh.pipeline) for name, shape in stage.items()}
    source = Resized(checkpoint.kind(kind), config.model, None, resize_patch=False)
    towers = {name.split(".", 1)[0] for name in wanted}
    stored = {name: shape for name, shape in source.shapes().items() if name.split(".", 1)[0] in towers}
    match(stored, wanted, Exceptions(), str(checkpoint.folder))
    for module, table in tables:
        load_weights(source, set(wanted), [(table[n], p) for n, p in module.named_parameters()], mesh)
        module.eval()
    return encoders, source.remarks


def verify_together(checkpoint: Checkpoint, mesh: Mesh, hashes: bool) -> None:
    """Check every file, each on one rank; raise CheckpointError on all. Collective over the mesh."""
    total_mb = checkpoint.manifest.size_bytes() // mesh.world.size // 1_000_000
    progress, read_bytes = Progress("checking hashes", total_mb, shown=mesh.world.rank == 0, unit="MB"), 0

    def hashed(more_bytes: int) -> None:
        nonlocal read_bytes
        read_bytes += more_bytes
        progress.advance(min(read_bytes // 1_000_000, total_mb))

    own = checkpoint.problems(mesh.world.rank, mesh.world.size, hashes, hashed)
    progress.clear()
    problems = [problem for part in everyone(own, mesh.world) for problem in part]
    if problems:
        raise CheckpointError(f"{checkpoint.folder} is damaged: {'; '.join(problems)}")


class Embedder:
    """Runs the towers forward. Collective over the mesh."""

    def __init__(self, encoders: Encoders, mesh: Mesh, device: torch.device, micro_batch: int, frames: int = 1):
        """micro_batch: images of one pass; a multiple of the tensor axis under sequence parallelism, and of frames."""
        self.encoders, self.mesh, self.device, self.micro_batch = encoders, mesh, device, micro_batch
        self.frames = frames
        if encoders.vision:
            tower = encoders.vision[0]
            tokens = micro_batch * tower.vision.tokens
            rows = tokens // (mesh.tensor.size if tower.config.sequence_parallel else 1)
            self.message = (rows, 1, tower.vision.width)

    def images(self, pixels: Pixels, count: int) -> Tensor:
        """Embeddings fp32 [count, D] of `count` images, or clips of `frames` images."""
        return self.encode(pixels, count, "features")["images"]

    def widths(self, read: Read) -> dict[str, tuple[int, ...]]:
        """What `encode` gives for `read`, and the shape of a row of each."""
        vision = self.encoders.vision[0].vision
        if read == "tokens":
            return {"tokens": (self.frames * vision.patches, vision.width)}
        widths: dict[str, tuple[int, ...]] = {"images": (self.encoders.embed_dim,)}
        return widths | ({"pooled": (vision.width,)} if read == "pooled" else {})

    @torch.no_grad()
    def encode(self, pixels: Pixels, count: int, read: Read) -> dict[str, Tensor]:
        """fp32 rows of `count` images, or clips of `frames` images, every rank all of them.

        `images`: embeddings [count, D]; with read `pooled` also `pooled`: the features before the projection
        [count, H], the mean of a clip's frames; with `tokens` instead `tokens`: the normed patch tokens
        [count, frames x patches, H].
        """
        passes = _EmbeddingPasses(self, pixels, count, read)
        chunks = self.encoders.vision
        program = ForwardProgram(
            stages=self.mesh.pipeline.size,
            micro_batches=len(passes.blocks),
            chunks=len(chunks),
            round_size=self.mesh.pipeline.size,
        )
        executor = Executor(
            self.mesh, program, hidden=self.message, dtype=chunks[0].config.params_dtype, device=self.device
        )
        executor.run(Work(chunks=[partial(passes.chunk, chunk) for chunk in chunks]), passes, Phases())
        return passes.found

    @torch.no_grad()
    def texts(self, tokens: Tensor) -> Tensor:
        """Embeddings fp32 [N, D] of token ids int64 [N, context]; every rank passes all of them."""
        assert self.encoders.text is not None, "the text tower was not loaded"
        mine = split_rows(len(tokens), self.mesh.world.size)[self.mesh.world.rank]
        # Captions of like length run together, since the padding beyond the longest of a micro-batch is cut off.
        order = mine.start + tokens[mine].argmax(dim=-1).argsort(stable=True)
        own = torch.empty(len(order), self.encoders.embed_dim, device=self.device)
        for rows in _blocks(slice(0, len(order)), self.micro_batch):
            chosen = order[rows]
            with fast_products(self.device, self.encoders.text.config.params_dtype):
                features = self.encoders.text(self.encoders.text.trimmed(tokens[chosen]).to(self.device))
            own[chosen - mine.start] = embedding(features)
        return gather_rows(own, len(tokens), self.mesh.world)


class _EmbeddingPasses:
    """One call of `Embedder.encode`: this replica's rows in micro-batches, and what the tower's end says of them."""

    def __init__(self, embedder: Embedder, pixels: Pixels, count: int, read: Read):
        self.embedder, self.pixels, self.count, self.read = embedder, pixels, count, read
        self.mesh, self.frames = embedder.mesh, embedder.frames
        rows = split_rows(count, self.mesh.data.size)[self.mesh.data.rank]
        self.first = rows.start
        self.blocks = _blocks(rows, embedder.micro_batch // embedder.frames)
        self.found = {
            name: torch.empty(rows.stop - rows.start, *shape, device=embedder.device)
            for name, shape in embedder.widths(read).items()
        }
        """This replica's rows, and of all replicas after the exchange."""

    def chunk(self, tower: VisionTower, hidden: Tensor | None, micro_batch: int) -> Tensor:
        """A chunk of the tower on a message, or on images where it begins."""
        inputs = self._images(micro_batch) if hidden is None else hidden
        return tower(inputs, samples=self.embedder.micro_batch, read=self.read)

    def _images(self, micro_batch: int) -> Tensor:
        """The last micro-batch is filled up, so that every message has the same shape."""
        images = self.pixels(self.blocks[micro_batch]).to(self.embedder.device).flatten(0, -4)
        full = images.new_zeros(self.embedder.micro_batch, *images.shape[1:])
        full[: len(images)] = images
        return full

    def take(self, unit: Unit, output: Tensor) -> None:
        """Rows of a micro-batch; what it was filled up with is left out."""
        rows = self.blocks[unit.micro_batch]
        for name, found in self._answers(output, (rows.stop - rows.start) * self.frames).items():
            self.found[name][rows.start - self.first : rows.stop - self.first] = found

    def _answers(self, output: Tensor, images: int) -> dict[str, Tensor]:
        """output: of the last chunk for a micro-batch, of which the first `images` are some."""
        if self.read == "features":
            return {"images": embedding(output[:images], self.frames)}
        tower = self.embedder.encoders.vision[-1]
        if self.read == "tokens":
            patches = output[:images, tower.vision.prefix_tokens :]
            return {"tokens": patches.unflatten(0, (-1, self.frames)).flatten(1, 2)}
        projected = tower.head.projected(output)  # type: ignore[operator]  # the padding, too: bits as features
        return {
            "images": embedding(projected[:images], self.frames),
            "pooled": output[:images].float().unflatten(0, (-1, self.frames)).mean(dim=1),
        }

    def gradient(self, unit: Unit) -> None:
        """Nothing runs backward."""

    def alone(self, action: Alone) -> None:
        """Nothing runs beside the units."""

    def together(self, span: str, number: int) -> None:
        """Rows travel from the last stage to the others, then from every replica to all."""
        if self.mesh.pipeline.size > 1:
            last = dist.get_global_rank(self.mesh.pipeline.group, self.mesh.pipeline.size - 1)
            for part in self.found.values():
                dist.broadcast(part, src=last, group=self.mesh.pipeline.group)
        self.found = {name: gather_rows(part, self.count, self.mesh.data) for name, part in self.found.items()}


def _blocks(rows: slice, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]
