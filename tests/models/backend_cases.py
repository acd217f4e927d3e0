"""What test_backends.py asks of the towers, in a process of its own that finds the packages of tests/fakes.

    python -m tests.models.backend_cases RESULT.pt          all but the curves of SLOW_CURVES
    python -m tests.models.backend_cases RESULT.pt slow     those

Transformer Engine changes what megatron-core is at its import, so this is never done inside the test process.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.config.read import ParallelConfig, preset_model
from engine.parallel.device import prepare
from engine.parallel.launch import job
from engine.parallel.mesh import Mesh, build_mesh
from models.config import ModelConfig
from models.tensors.naming import logical_tensors
from models.towers.vision import VisionTower
from tests.distributed import run_distributed, world
from tests.engine import test_step_options as step_options
from tests.golden import ARCHITECTURES, logical, model_of, pixels

FAKES = Path(__file__).resolve().parent.parent / "fakes"
TE = {"backend": "transformer_engine"}
EXACT: dict[str, dict[str, Any]] = {
    "local": {},
    "te": TE | {"attention": "sdpa"},
    "te-torch-norms": TE | {"attention": "sdpa", "norm_kernel": "torch"},
    "apex": {"norm_kernel": "apex"},
}
"""Kernels that compute in fp32, for every architecture of the fixtures that they fit."""
ATTENTIONS: dict[str, dict[str, Any]] = {
    "sdpa": {"attention": "sdpa"},
    "matmul": {"attention": "matmul"},
    "flash": {"attention": "flash"},
    "flash3": {"attention": "flash3"},
    "flash4": {"attention": "flash4"},
    "te": TE | {"attention": "te", "norm_kernel": "torch"},
    "te-all": TE,
}
"""Kernels of bf16."""
SHIPPED = ("18b", "8b", "e14-plus", "l14", "b16")
_TE = "model.backend=transformer_engine"
_TE_EXACT = (_TE, "model.attention=sdpa")
CURVES: dict[str, tuple[tuple[int, int], tuple[str, ...]]] = {
    "te-tp2": ((2, 1), _TE_EXACT),
    "te-tp2-no-sequence": ((2, 1), (*_TE_EXACT, "parallel.sequence=false")),
    "te-pp2-full-offload": ((1, 2), (*_TE_EXACT, "train.recompute=full", "train.offload_stash=true")),
    "te-pp2-selective-keep-1": ((1, 2), (*_TE_EXACT, "train.recompute=selective", "train.keep_activations=1")),
}
"""(TP, PP) and options of curves in fp32 on two ranks."""
SLOW_CURVES = ("te-tp2-no-sequence", "te-pp2-selective-keep-1")
_FP8 = (_TE, "model.fp8=current", "model.fp8_bf16_blocks=1")
BF16 = ("train.precision=bf16",)
BF16_CURVES: dict[str, tuple[str, ...]] = {
    "bf16": (),
    "te-bf16": (_TE,),
    "fp8": _FP8,
    "fp8-full": (*_FP8, "train.recompute=full"),
    "fp8-keep-all": (*_FP8, "train.keep_activations=-1"),
}
"""The same in bf16 at TP 1 x PP 2, in whole batches: 16 x 9 tokens suit fp8."""


def kernels(model: ModelConfig, choice: dict[str, Any]) -> ModelConfig:
    """The model on other kernels."""
    chosen = replace(model, **choice)
    chosen.check()
    return chosen


def build(fixture: str, choice: dict[str, Any], mesh: Mesh, **tower: Any) -> VisionTower:
    """The fixture's image tower, or a stage of it, with the fixture's weights."""
    built = VisionTower(kernels(model_of(fixture), choice), groups=mesh.vision_groups(), **tower)
    weights = logical(fixture, "weights")
    table = logical_tensors(built, "vision", built.layers.start, 1)
    with torch.no_grad():
        for local, parameter in built.named_parameters():
            parameter.copy_(weights[table[local].name])
    return built


def passes(tower: VisionTower, fixture: str) -> dict[str, Tensor]:
    """Features of the fixture's pictures, and gradients by logical name of a fixed function of them."""
    features = tower(pixels(fixture), None, samples=8)
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(0)).to(features)
    tower.zero_grad()
    (features * weights).sum().backward()
    table = logical_tensors(tower, "vision", 0, 1)
    gradients = {table[local].name: p.grad for local, p in tower.named_parameters() if p.grad is not None}
    return {"features": features.detach()} | gradients


def exact(mesh: Mesh) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Case -> fixture -> features and gradients in fp32."""
    return {
        case: {
            fixture: passes(build(fixture, choice, mesh), fixture)
            for fixture in ARCHITECTURES
            if choice.get("norm_kernel") != "apex" or model_of(fixture).vision.norm == "rms"
        }
        for case, choice in EXACT.items()
    }


def attentions(mesh: Mesh) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Kernel -> fixture (one has rope and a sub-LN) -> what `attention_alone` gives, and the tower's features."""
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for case, choice in ATTENTIONS.items():
        found[case] = {}
        for fixture in ("tiny-18b", "tiny-eva02-B"):
            tower = build(fixture, choice, mesh, dtype=torch.bfloat16)
            features = tower(pixels(fixture), None, samples=8).detach()
            found[case][fixture] = attention_alone(tower) | {"features": features}
    return found


def attention_alone(tower: VisionTower, device: str = "cpu") -> dict[str, Tensor]:
    """Output and gradients of a block's core attention, bf16; a whole tower's gradients drown in bf16's rounding."""
    tokens = tower._tokens(8, None, torch.device(device))
    generator = torch.Generator().manual_seed(0)
    shape = (8 * tokens.tokens_per_sample, tower.vision.heads, tower.vision.head_width)
    inputs = [torch.randn(shape, generator=generator).to(device, torch.bfloat16).requires_grad_() for _ in "qkv"]
    attention: Any = tower.block.layers[0]
    out = attention.self_attention.core_attention(*inputs, packed_seq_params=tokens)
    out.backward(torch.randn(out.shape, generator=generator).to(out))
    return {"out": out.detach()} | {name: t.grad for name, t in zip("qkv", inputs, strict=True) if t.grad is not None}


def shipped_names(mesh: Mesh, choice: dict[str, Any]) -> dict[str, dict[str, list[int]]]:
    """Preset -> logical name -> shape of a tower at full width, two blocks of it, on the meta device."""
    table = {}
    for preset in SHIPPED:
        model = preset_model(preset)
        model = replace(model, vision=replace(model.vision, depth=2))
        with torch.device("meta"):
            tower = VisionTower(kernels(model, choice), groups=mesh.vision_groups())
        tensors = logical_tensors(tower, "vision", 0, 1).values()
        table[preset] = {tensor.name: list(tensor.shape) for tensor in tensors}
    return table


def _in_fp8(tower: nn.Module) -> list[str]:
    return [name for name, module in tower.named_modules() if getattr(module, "ran_in_fp8", False)]


def fp8(mesh: Mesh) -> dict[str, Any]:
    """What ran in fp8: by the edge blocks of a whole tower and of a stage, and whether a replay repeats a pass."""
    choice = TE | {"fp8": "current"}
    bf16 = {"dtype": torch.bfloat16}
    found: dict[str, Any] = {}
    for edge in (0, 1):
        tower = build("tiny-18b", choice | {"fp8_bf16_blocks": edge}, mesh, **bf16)
        first, replay = (passes(tower, "tiny-18b") for _ in range(2))
        found[f"modules-{edge}"] = _in_fp8(tower)
        found[f"features-{edge}"] = first["features"]
        found[f"repeats-{edge}"] = all(torch.equal(first[name], replay[name]) for name in first)
        found[f"extra-{edge}"] = sorted({name.rsplit(".", 1)[-1] for name in tower.state_dict()})
    for start, stop in ((0, 2), (2, 3), (3, 4)):
        stage = build("tiny-18b", choice | {"fp8_bf16_blocks": 1}, mesh, layers=range(start, stop), **bf16)
        given = pixels("tiny-18b") if start == 0 else torch.randn(8 * 17, 1, 64, dtype=torch.bfloat16)
        stage(given, None, samples=8)
        found[f"stage-{start}-{stop}"] = sorted({int(name.split(".")[2]) + start for name in _in_fp8(stage)})
    return found


def curves(slow: bool) -> dict[str, list[float]]:
    """Losses of a few steps on two ranks, case by case."""
    device = prepare()
    out = {}
    for name, ((tensor, pipeline), options) in CURVES.items():
        if (name in SLOW_CURVES) != slow:
            continue
        mesh = build_mesh(tensor, pipeline, world())
        layout = (f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", "train.micro_batch_size=8")
        config = step_options._config("18b", *layout, *options)
        out[name] = step_options._curve(config, mesh, device)["losses"]
    mesh = build_mesh(1, 2, world())
    for name, options in BF16_CURVES.items() if not slow else ():
        config = step_options._config("18b", "parallel.pipeline=2", "train.micro_batch_size=16", *BF16, *options)
        out[name] = step_options._curve(config, mesh, device)["losses"]
    return out


def main(result: str, *part: str) -> None:
    """Run everything of a part and keep it."""
    slow = part == ("slow",)
    found: dict[str, Any] = {"curves": run_distributed(curves, 2, forked=True, slow=slow)[0]}
    if not slow:
        with job(ParallelConfig()) as (mesh, _device):
            found |= {
                "exact": exact(mesh),
                "attentions": attentions(mesh),
                "names": shipped_names(mesh, TE | {"attention": "sdpa"}),
                "fp8": fp8(mesh),
            }
    torch.save(found, result)


if __name__ == "__main__":
    assert str(FAKES) in os.environ.get("PYTHONPATH", "").split(os.pathsep), "started without the fakes"
    main(*sys.argv[1:])
