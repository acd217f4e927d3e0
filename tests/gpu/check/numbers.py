"""Right before fast: features and gradients of every architecture, and the curve of a few steps."""

import torch
from torch import Tensor

from tests.engine import test_step_options as step_options
from tests.golden import ARCHITECTURES, TOLERANCE, deviation, load_io, pixels
from tests.gpu.check.parts import Part
from tests.models import backend_cases as cases

BF16_TOLERANCE = 6e-2
"""As in tests/models/test_backends.py."""
GRADIENT_BF16_TOLERANCE = 0.5
"""Of all gradients of a tower together, which bf16 rounds far more than the features: 0.29 on a CPU."""
CURVE_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}


def golden(part: Part) -> None:
    """The authors' features in fp32; gradients and bf16 against this machine's CPU in fp32, which the tests compare."""
    for fixture in ARCHITECTURES:
        features, gradients = _passes(part, fixture, torch.float32, "cpu")
        for name, dtype, limits in (
            ("fp32", torch.float32, (TOLERANCE, TOLERANCE)),
            ("bf16", torch.bfloat16, (BF16_TOLERANCE, GRADIENT_BF16_TOLERANCE)),
        ):
            own, own_gradients = _passes(part, fixture, dtype, part.device.torch_device.type)
            if dtype == torch.float32:
                authors = load_io(fixture)["image_features"]
                part.require(f"{fixture} features, fp32, authors", deviation(own, authors), TOLERANCE)
            part.require(f"{fixture} features, {name}", deviation(own, features), limits[0])
            part.require(f"{fixture} gradients, {name}", deviation(own_gradients, gradients), limits[1])


def _passes(part: Part, fixture: str, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Features [8, D] and all gradients of a fixed function of them in one row, on the CPU."""
    with torch.device(device):
        tower = cases.build(fixture, {"attention": "sdpa"}, part.mesh, dtype=dtype)
    features = tower(pixels(fixture).to(device), None, samples=8)
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(0)).to(features)
    (features * weights).sum().backward()
    gradients = [p.grad.flatten().float().cpu() for p in tower.parameters() if p.grad is not None]
    return features.detach().float().cpu(), torch.cat(gradients)


def curve(part: Part) -> None:
    """Losses of a few LAMB steps with the 18B's switches, against the curve of a process that sees no GPU."""
    reference = part.earlier("curve-cpu")["cpu"]
    for precision, limit in CURVE_TOLERANCE.items():
        losses = _losses(part, f"train.precision={precision}")
        part.note(precision, losses)
        worst = max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))
        part.require(f"{precision} against the CPU", worst, limit)


def curve_cpu(part: Part) -> None:
    """The reference of `curve`."""
    part.note("cpu", _losses(part, "train.precision=fp32"))


def _losses(part: Part, *options: str) -> list[float]:
    config = step_options._config("18b", "train.micro_batch_size=4", *options)
    return step_options._curve(config, part.mesh, part.device)["losses"]
