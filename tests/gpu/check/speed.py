"""One block and one stage of the 18B: milliseconds, FLOP/s against the measured peak, memory against the planner's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.config.read import preset_model
from engine.pipeline.memory import saved_bytes
from models.blocks.packages import APEX, FLASH_2, FLASH_3, FLASH_4, TRANSFORMER_ENGINE
from models.config import FP8_MULTIPLES, ModelConfig
from models.tensors.flops import block_flops
from models.towers.vision import VisionTower
from tests.gpu.check.parts import Part
from tools.cost.activations import block_saved_bytes

_TE = {"backend": "transformer_engine"}
_FP8_CAPABILITY = {"current": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
_SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def gemm(part: Part) -> None:
    """bf16 products of every size that the two saturation constants are fitted to; the largest is the peak."""
    rows, widths = ((64, 256), (64, 128)) if part.toy else ((512, 2048, 16384), (640, 2560, 5120))
    rates = []
    for count in rows:
        for width in widths:
            deep = 512 if part.toy else 25600
            left = part.empty(count, deep, dtype=torch.bfloat16)
            right = part.empty(deep, width, dtype=torch.bfloat16)
            seconds = part.seconds(partial(torch.matmul, left, right))
            rates.append({"rows": count, "width": width, "flops_per_s": 2 * count * width * deep / seconds})
    part.note("products", rates)
    part.note("peak_flops_per_s", max(rate["flops_per_s"] for rate in rates))
    side = 256 if part.toy else 8192
    square = part.empty(side, side)
    part.note("fp32_flops_per_s", 2 * side**3 / part.seconds(lambda: square @ square))
    big = part.empty((1 if part.toy else 1024) * 2**18)
    other = torch.empty_like(big)
    part.note("memory_bytes_per_s", 2 * 4 * big.numel() / part.seconds(lambda: other.copy_(big)))
    if part.device.is_cuda:
        part.note("memory_bytes", torch.cuda.get_device_properties(part.device.torch_device).total_memory)


def _model(toy: bool, **choice: Any) -> ModelConfig:
    model = preset_model("tiny-18b" if toy else "18b")
    model = replace(model, **choice)
    model.check()
    return model


def _choices(part: Part) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """(name, the model's choice, SDPA's backend or None) of what is installed here."""
    yield "eager", {"attention": "sdpa", "norm_kernel": "torch"}, None
    if part.device.is_cuda:
        yield "fused blocks", {"attention": "sdpa", "block_kernels": "fused"}, None
        yield "compiled norm", {"attention": "sdpa", "norm_kernel": "compiled"}, None
        for name, backend in _SDPA.items():
            yield f"sdpa {name}", {"attention": "sdpa", "norm_kernel": "torch"}, backend
    for name, package, choice in (
        ("flash-attn 2", FLASH_2, {"attention": "flash"}),
        ("flash-attn 3", FLASH_3, {"attention": "flash3"}),
        ("flash-attn 4", FLASH_4, {"attention": "flash4"}),
        ("apex norm", APEX, {"attention": "sdpa", "norm_kernel": "apex"}),
        ("Transformer Engine", TRANSFORMER_ENGINE, dict(_TE)),
    ):
        if package.is_installed and part.device.is_cuda:
            yield name, choice, None


@contextmanager
def _attending(backend: Any) -> Iterator[None]:
    with nullcontext() if backend is None else sdpa_kernel(backend):
        yield


def blocks(part: Part) -> None:
    """One inner block, and a stage of six: forward, replay (forward under grad), backward."""
    samples = 4 if part.toy else 124
    for layers in (1, 2 if part.toy else 6):
        for name, choice, backend in _choices(part):
            part.attempt(f"{layers} × {name}", partial(_stage, part, layers, samples, choice, backend))


def fp8(part: Part) -> None:
    """The stage of six in every recipe that the GPU has, where Transformer Engine is installed."""
    if not (TRANSFORMER_ENGINE.is_installed and part.device.is_cuda):
        part.note("skipped", "Transformer Engine is not installed, or there is no GPU")
        return
    for recipe in FP8_MULTIPLES:
        if torch.cuda.get_device_capability() < _FP8_CAPABILITY[recipe]:
            part.note(recipe, {"skipped": f"needs capability {_FP8_CAPABILITY[recipe]}"})
            continue
        # 128 samples of 129 tokens: multiples of 128 in every product.
        part.attempt(recipe, partial(_stage, part, 6, 128, {**_TE, "fp8": recipe}, None))


def _stage(part: Part, layers: int, samples: int, choice: dict[str, Any], backend: Any) -> dict[str, float]:
    model = _model(part.toy, **choice)
    vision, start = model.vision, 1  # inner blocks: no embedding, no head
    with torch.device(part.device.torch_device):
        tower = VisionTower(
            model, groups=part.mesh.vision_groups(), layers=range(start, start + layers), dtype=torch.bfloat16
        )
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    patches = vision.patches // 2  # half of them dropped, as the 18B trains
    kept = torch.arange(patches, device=part.device.torch_device).expand(samples, patches)
    tokens = samples * (vision.prefix_tokens + patches)
    inputs = part.empty(tokens, 1, vision.width, dtype=torch.bfloat16).requires_grad_()
    gradient = torch.ones_like(inputs)
    flops = samples * layers * block_flops(vision, vision.prefix_tokens + patches)
    peak = part.earlier("gemm")["peak_flops_per_s"]
    with _attending(backend):
        found = _measure(part, tower, lambda: tower(inputs, kept, samples=samples), inputs, gradient)
    for name, times in (("forward", 1), ("backward", 2)):
        rate = times * flops / found[f"{name}_ms"] * 1e3
        found |= {f"{name}_tflops": rate / 1e12, f"{name}_share_of_gemm_peak": rate / peak}
    return found | {"tokens": tokens, "planned_saved_bytes": layers * block_saved_bytes(vision, tokens, element=2)}


def _measure(
    part: Part, tower: VisionTower, forward: Callable[[], Tensor], inputs: Tensor, gradient: Tensor
) -> dict[str, float]:
    def encode() -> None:
        with torch.no_grad():
            forward()

    def both() -> None:
        tower.zero_grad()
        inputs.grad = None
        forward().backward(gradient)

    forward_s, replay_s, both_s = part.seconds(encode), part.seconds(forward), part.seconds(both)
    found = {"forward_ms": forward_s * 1e3, "replay_ms": replay_s * 1e3, "backward_ms": (both_s - replay_s) * 1e3}
    found["saved_bytes"] = saved_bytes(forward, [*tower.parameters()])
    if part.device.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return found
