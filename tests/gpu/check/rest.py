"""The loss at B = 32,768, LAMB over a billion elements, copies to and from pinned memory, captions a second."""

import time

import torch
import torch.nn.functional as F

from data.tokenizer import Tokenizer
from engine.build import build_optimizer, build_towers
from engine.config.read import resolve
from engine.objectives.contrastive.softmax import contrastive_loss
from engine.parallel.device import SideStream
from tests.engine.loss_reference import contrastive_reference
from tests.gpu.check.parts import Part

SCALE = 100.0
LOSS_TOLERANCE = 1e-4


def loss(part: Part) -> None:
    """Value and gradients against float64 at a small size, then milliseconds at the paper's width."""
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(512, 64, dtype=torch.float64, generator=generator), dim=1) for _ in "ab")
    device = part.device.torch_device
    got = contrastive_loss(image.float().to(device), text.float().to(device), SCALE)
    wanted = contrastive_reference(image, text, SCALE)
    part.require("loss", abs(float(got.loss) - float(wanted.loss)) / float(wanted.loss), LOSS_TOLERANCE)
    for name in ("grad_image", "grad_text"):
        difference = (getattr(got, name).double().cpu() - getattr(wanted, name)).norm()
        part.require(name, float(difference / getattr(wanted, name).norm()), LOSS_TOLERANCE)
    rows, width = (1024, 64) if part.toy else (32768, 1536)
    image, text = (F.normalize(part.empty(rows, width), dim=1) for _ in "ab")
    part.note("rows", rows)
    part.note("ms", part.seconds(lambda: contrastive_loss(image, text, SCALE)) * 1e3)


def lamb(part: Part) -> None:
    """One LAMB step over what a rank owns: three blocks of the 18B, 1.2 B elements in bf16 with fp32 masters."""
    preset, depth = ("tiny-18b", 4) if part.toy else ("18b", 3)
    model = {"preset": preset, "vision": {"depth": depth}, "text": {"depth": 1}}
    config = resolve({"model": model, "data": {"shards": ["-"]}}, ["train.precision=bf16", "optim.name=lamb"])
    towers = build_towers(config, part.mesh, part.device.torch_device)
    optimizer = build_optimizer(config, towers)
    shards = [shard for tower in optimizer.towers for shard in tower.shards.shards]
    for shard in shards:
        shard.gradient.normal_(std=1e-3)
    elements = sum(shard.weight.numel() for shard in shards)
    seconds = part.seconds(optimizer.step)
    part.note("elements", elements)
    part.note("ms", seconds * 1e3)
    part.note("ns_per_element", seconds / elements * 1e9)


def copies(part: Part) -> None:
    """Device to pinned host memory and back on the side stream, as the offloaded stash does it."""
    device = part.device.torch_device
    side = SideStream(device)
    source = part.empty((1 if part.toy else 256) * 2**18)
    buffer = side.host_buffer(source)
    kept: list[torch.Tensor] = []

    def back() -> None:
        kept[:] = [side.copy_in(buffer)]
        side.join(kept[0])

    size = source.numel() * source.element_size()
    part.note("pinned", buffer.is_pinned())
    part.note("out_gb_per_s", size / part.seconds(lambda: side.copy_out(source, buffer)) / 1e9)
    part.note("in_gb_per_s", size / part.seconds(back) / 1e9)
    if not torch.equal(kept[0], source):
        part.wrong.append("what came back from the host is not what went out")


def tokenizer(part: Part) -> None:
    """Captions a second of one reader, on one core of this machine: what a node's cores have to keep up with."""
    tokenizer = Tokenizer(77)
    captions = [f"a photograph of {number} grey seals on a sandbank, seen from the ferry" for number in range(4096)]
    tokenizer.encode(captions[:8])
    start = time.perf_counter()
    tokenizer.encode(captions[: 512 if part.toy else None])
    part.note("captions_per_s", (512 if part.toy else len(captions)) / (time.perf_counter() - start))
