"""One side of the step benchmark in a process of its own; benchmarks/step.py starts them and takes turns.

    python -m benchmarks.step_sides SIDE PRECISION [--quick] [--batch N] [--profile]

Reads one JSON request a line ({"captions": "full" | "short"}), runs one training step and answers with its loss, wall
and CPU seconds and the process's peak memory above what its imports took. --profile prints where a step's time goes.
"""

import argparse
import dataclasses
import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TextIO

import torch
from torch import Tensor

from benchmarks.common import reset_peak, resident_bytes
from data.order.stateless import kept_patches
from models.config import ModelConfig, TextConfig, VisionConfig
from models.tensors.products import Fp32Products, fast_products

SEED, SCALE, RATE, CLIP_NORM = 0, 100.0, 1e-3, 5.0
DROPOUT = 0.5
GEMM_SIDE, GEMM_REPEATS = 2048, 3


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The model and batch that every side trains."""

    model: ModelConfig
    batch: int
    """Pairs of one step."""
    micro_batch: int
    """Images of one pass where activations are not kept."""

    def flops(self) -> float:
        """Useful operations of one step: three forwards' worth of matrix products, whatever is replayed."""
        vision, text = self.model.vision, self.model.text
        tokens, length = vision.kept_tokens(DROPOUT), text.context_length
        block = vision.width * (4 * vision.width + 2 * vision.mlp_hidden) + 2 * tokens * vision.width
        image = tokens * (vision.depth * block + 3 * vision.patch_size**2 * vision.width)
        caption = length * text.depth * (12 * text.width**2 + length * text.width)
        return 3 * 2 * self.batch * (image + caption)


FULL = Workload(
    model=ModelConfig(
        embed_dim=256,
        vision=VisionConfig(patch_size=16, depth=8, width=512, head_width=64, mlp_hidden=2560, post_norm=True),
        text=TextConfig(context_length=32, width=256, depth=4, heads=4),
    ),
    batch=16,
    micro_batch=4,
)
QUICK = Workload(
    model=ModelConfig(
        embed_dim=32,
        vision=VisionConfig(
            image_size=64, patch_size=16, depth=4, width=64, head_width=16, mlp_hidden=320, post_norm=True
        ),
        text=TextConfig(context_length=16, vocab_size=512, width=32, depth=2, heads=4),
    ),
    batch=4,
    micro_batch=2,
)


def workload_of(quick: bool, batch: int | None) -> Workload:
    """The model at its usual size or as a toy, with its usual batch or another."""
    workload = QUICK if quick else FULL
    return workload if batch is None else dataclasses.replace(workload, batch=batch)


@dataclass(frozen=True)
class Batch:
    """One step's input, the same for every side."""

    first_position: int
    images: Tensor
    """uint8 [B, 3, h, w]."""
    ids: Tensor
    """int64 [B, context]."""

    @classmethod
    def make(cls, workload: Workload, step: int, captions: str) -> "Batch":
        """full: the end of text stands last; short: captions of 6 to 20 tokens, as web captions have."""
        generator = torch.Generator().manual_seed(step)
        model, size = workload.model, workload.batch
        side, length, end = model.vision.image_size, model.text.context_length, model.text.vocab_size - 1
        images = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator)
        ids = torch.randint(1, end, (size, length), generator=generator)
        ends = torch.full((size, 1), length - 1)
        if captions == "short":
            ends = torch.randint(5, min(20, length), (size, 1), generator=generator)
        place = torch.arange(length)
        return cls(step * size, images, ids.masked_fill(place == ends, end).masked_fill(place > ends, 0))

    def kept(self, model: ModelConfig) -> Tensor:
        """int64 [B, k]: the patches that the engine keeps of these samples."""
        count = model.vision.kept_tokens(DROPOUT) - 1
        positions = torch.arange(self.first_position, self.first_position + len(self.images)).numpy()
        return torch.from_numpy(kept_patches(SEED, positions, model.vision.patches, count))


class Side(Protocol):
    """A way to train the workload."""

    def step(self, batch: Batch) -> float:
        """One optimizer step; the loss."""


class Ours:
    """The engine on one rank."""

    def __init__(
        self,
        workload: Workload,
        precision: str,
        *,
        keep_all: bool,
        optimizer: str = "adamw",
        kernels: dict[str, str] | None = None,
        outputs: str = "none",
        watched: bool = True,
    ):
        """watched: bits of the state at rest are summed before and behind every update, as is usual."""
        from engine.config.phases import first_phase
        from engine.config.read import ParallelConfig, resolve
        from engine.parallel.launch import job
        from engine.trainer import Trainer

        self.workload = workload
        train = {
            "global_batch_size": workload.batch,
            # Two micro-batches to replay: about the peak memory of the side that checkpoints every block.
            "micro_batch_size": workload.batch if keep_all else workload.batch // 2,
            "keep_activations": -1 if keep_all else 0,
            "keep_outputs": outputs,
            "precision": precision,
            "patch_dropout": DROPOUT,
            "logit_scale": SCALE,
            "seed": SEED,
            "steps": 10**6,
        }
        rates = {"lr_vision": RATE, "lr_text": RATE, "layer_decay_vision": 1.0, "layer_decay_text": 1.0}
        optim = rates | {"name": optimizer, "warmup_steps": 0, "clip_grad_norm": CLIP_NORM}
        model = dataclasses.asdict(workload.model) | {"block_kernels": "torch"} | (kernels or {})
        settings = {"model": model, "data": {"shards": ["-"]}, "train": train, "optim": optim}
        if not watched:
            settings["health"] = {"audit_every_steps": 0}
        config = resolve(settings, [])
        self.job = job(ParallelConfig())
        mesh, device = self.job.__enter__()
        self.trainer = Trainer(first_phase(config), mesh, device)

    def step(self, batch: Batch) -> float:
        """Through Trainer.step."""
        import numpy as np

        from engine.feed import LocalBatch

        positions = np.arange(batch.first_position, batch.first_position + len(batch.images))
        local = LocalBatch(positions=positions, images=batch.images, tokens=batch.ids)
        return float(self.trainer.step(local).loss)


class Plain:
    """Plain PyTorch, eager or through torch.compile: autograd over the whole batch, clipping, fused AdamW."""

    def __init__(
        self,
        workload: Workload,
        precision: str,
        *,
        checkpointing: bool = False,
        compiled: bool = False,
        wide: bool = False,
    ):
        """wide: bf16 products are computed in fp32, as the engine does on a CPU that cannot multiply bf16."""
        from benchmarks.plain_clip import PlainClip, initialise

        self.model, self.products = workload.model, _WideProducts if wide else nullcontext
        self.clip = PlainClip(workload.model, SCALE, checkpointing)
        initialise(self.clip, workload.model, SEED)
        if compiled:
            self.clip.compile(fullgraph=True)
        self.train = _AutogradStep(self.clip, precision)

    def step(self, batch: Batch) -> float:
        """One forward and backward of everything."""
        with self.products():
            return self.train(lambda: self.clip(batch.images, batch.kept(self.model), batch.ids))


class _WideProducts(Fp32Products):
    """The engine's products, and those of convolutions, of which it has none."""

    rounded: ClassVar = Fp32Products.rounded | {
        torch.ops.aten.convolution.default: 1,
        torch.ops.aten.convolution_backward.default: 3,
    }


class OpenClip:
    """open_clip's nearest model: pre-norm LayerNorm towers of the same sizes, its own loss."""

    def __init__(self, workload: Workload, precision: str):
        stand_in_for_torchvision_operators()
        from open_clip.loss import ClipLoss
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

        vision, text = workload.model.vision, workload.model.text
        self.clip = CLIP(
            workload.model.embed_dim,
            vision_cfg=CLIPVisionCfg(
                layers=vision.depth,
                width=vision.width,
                head_width=vision.head_width,
                mlp_ratio=vision.mlp_hidden / vision.width,
                patch_size=vision.patch_size,
                image_size=vision.image_size,
                patch_dropout=DROPOUT,
            ),
            text_cfg=CLIPTextCfg(
                context_length=text.context_length,
                vocab_size=text.vocab_size,
                width=text.width,
                heads=text.heads,
                layers=text.depth,
            ),
        )
        self.loss = ClipLoss()
        self.train = _AutogradStep(self.clip, precision)

    def step(self, batch: Batch) -> float:
        """Its forward, its loss."""
        from data.pixels.transforms import normalise

        images = normalise(batch.images, torch.float32)
        return self.train(lambda: self.loss(*self.clip(images, batch.ids)))


class _AutogradStep:
    """What the peers share: autocast, backward, clipping, fused AdamW."""

    def __init__(self, module: torch.nn.Module, precision: str):
        self.module, self.bf16 = module.train(), precision == "bf16"
        self.optimizer = torch.optim.AdamW(
            module.parameters(), lr=RATE, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0, fused=True
        )

    def __call__(self, loss_of: Callable[[], Tensor]) -> float:
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if self.bf16 else nullcontext():
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), CLIP_NORM)
        self.optimizer.step()
        return loss.item()


class Gemm:
    """A large square matrix product: the machine's peak, in the same minutes; of bf16 as the engine computes it."""

    def __init__(self, precision: str):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.a, self.b = (torch.randn(GEMM_SIDE, GEMM_SIDE).to(dtype) for _ in range(2))

    def step(self, batch: Batch) -> float:
        """GEMM_REPEATS products."""
        with fast_products(self.a.device, self.a.dtype):
            for _ in range(GEMM_REPEATS):
                torch.mm(self.a, self.b)
        return 0.0


_COMPILED_NORMS = {"norm_kernel": "compiled"}
SIDES: dict[str, Callable[[Workload, str], Side]] = {
    "ours": lambda w, p: Ours(w, p, keep_all=True),
    "ours_fused": lambda w, p: Ours(w, p, keep_all=True, kernels={"block_kernels": "fused"}),
    "plain": Plain,
    "plain_compiled": lambda w, p: Plain(w, p, compiled=True),
    "ours_stash": lambda w, p: Ours(w, p, keep_all=False),
    "ours_stash_fc2": lambda w, p: Ours(w, p, keep_all=False, outputs="fc2"),
    "ours_stash_all": lambda w, p: Ours(w, p, keep_all=False, outputs="all"),
    "ours_stash_fc2_compiled": lambda w, p: Ours(w, p, keep_all=False, outputs="fc2", kernels=_COMPILED_NORMS),
    "ours_stash_all_compiled": lambda w, p: Ours(w, p, keep_all=False, outputs="all", kernels=_COMPILED_NORMS),
    "ours_unwatched": lambda w, p: Ours(w, p, keep_all=True, watched=False),
    "ours_stash_unwatched": lambda w, p: Ours(w, p, keep_all=False, watched=False),
    "plain_checkpoint": lambda w, p: Plain(w, p, checkpointing=True),
    "plain_wide": lambda w, p: Plain(w, p, wide=True),
    "plain_compiled_wide": lambda w, p: Plain(w, p, compiled=True, wide=True),
    "plain_checkpoint_wide": lambda w, p: Plain(w, p, checkpointing=True, wide=True),
    "ours_lamb": lambda w, p: Ours(w, p, keep_all=True, optimizer="lamb"),
    "ours_compiled": lambda w, p: Ours(w, p, keep_all=True, kernels=_COMPILED_NORMS),
    "open_clip": OpenClip,
    "gemm": lambda w, p: Gemm(p),
}


def stand_in_for_torchvision_operators() -> None:
    """torchvision's operators are built for another build of torch; open_clip imports it but runs none of them here."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    source = (Path(spec.origin).parent / "_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in set(re.findall(r'register_(?:meta|fake)\("(?:torchvision::)?(\w+)"', source)):
        library.define(f"{name}() -> ()")
    _LIBRARIES.append(library)


_LIBRARIES: list[torch.library.Library] = []  # definitions last as long as their library


def _profile(side: Side, workload: Workload, answers: TextIO) -> None:
    """Print the operators of one step by their own CPU time."""
    from torch.profiler import ProfilerActivity, profile

    side.step(Batch.make(workload, 0, "full"))
    with profile(activities=[ProfilerActivity.CPU]) as recorder:
        side.step(Batch.make(workload, 1, "full"))
    table = recorder.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60)
    print(table, file=answers)


def serve(side: Side, workload: Workload, before_bytes: int, answers: TextIO) -> None:
    """Answer requests until standard input ends."""
    for step, line in enumerate(sys.stdin):
        batch = Batch.make(workload, step, json.loads(line)["captions"])
        wall, cpu = time.perf_counter(), time.process_time()
        loss = side.step(batch)
        answer: dict[str, Any] = {
            "loss": loss,
            "wall_s": time.perf_counter() - wall,
            "cpu_s": time.process_time() - cpu,
            "peak_gb": (resident_bytes("VmHWM") - before_bytes) / 1e9,
        }
        print(json.dumps(answer), file=answers, flush=True)


def _import_all(side: str) -> None:
    """Imports are not the step's memory; torch.optim would load the compiler at its first use."""
    import torch._dynamo  # noqa: F401

    if side.startswith("ours"):
        import engine.trainer  # noqa: F401


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("precision", choices=("fp32", "bf16"))
    parser.add_argument("--quick", action="store_true", help="a toy model")
    parser.add_argument("--batch", type=int, help="pairs of a step")
    parser.add_argument("--profile", action="store_true", help="print where one step's time goes, and end")
    options = parser.parse_args()
    workload = workload_of(options.quick, options.batch)
    answers, sys.stdout = sys.stdout, sys.stderr  # what packages print is no answer
    _import_all(options.side)
    before = reset_peak()
    side = SIDES[options.side](workload, options.precision)
    if options.profile:
        _profile(side, workload, answers)
    else:
        serve(side, workload, before, answers)


if __name__ == "__main__":
    main()
