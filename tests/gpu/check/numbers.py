"""Right before fast: features and gradients of every architecture, the curves of a few steps and of the quickstart."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engine.config.phases import first_phase
from engine.config.read import read_job
from engine.trainer import Trainer
from tests.engine import test_step_options as step_options
from tests.engine.test_layouts import random_pairs
from tests.golden import ARCHITECTURES, TOLERANCE, deviation, load_io, local_batch, pixels
from tests.gpu.check.parts import Part
from tests.models import backend_cases as cases

BF16_TOLERANCE = 6e-2
"""As in tests/models/test_backends.py."""
GRADIENT_BF16_TOLERANCE = 0.5
"""Of all gradients of a tower together, which bf16 rounds far more than the features: 0.29 on a CPU."""
CURVE_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
QUICKSTART = Path(__file__).resolve().parents[3] / "examples" / "quickstart" / "train.yaml"
QUICKSTART_TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}
"""More than of a few steps: the loss of two batches that are learnt by heart falls fast, and a step early is a lot."""


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
    _compare(part, _losses, "curve-cpu", CURVE_TOLERANCE)


def curve_cpu(part: Part) -> None:
    """The reference of `curve`."""
    part.note("cpu", _losses(part, "fp32"))


def quickstart(part: Part) -> None:
    """Losses of the quickstart's model and recipe, against those of a process that sees no GPU."""
    _compare(part, _quickstart_losses, "quickstart-cpu", QUICKSTART_TOLERANCE)


def quickstart_cpu(part: Part) -> None:
    """The reference of `quickstart`."""
    part.note("cpu", _quickstart_losses(part, "fp32"))


def _compare(part: Part, losses_of: Callable[[Part, str], list[float]], earlier: str, limits: dict[str, float]) -> None:
    reference = part.earlier(earlier)["cpu"]
    if not reference[-1] < reference[0] - 0.01:
        part.wrong.append(f"the reference learns nothing: {reference}")
    for precision, limit in limits.items():
        losses = losses_of(part, precision)
        part.note(precision, losses)
        worst = max(abs(a - b) for a, b in zip(losses, reference, strict=True)) / reference[0]
        part.require(f"{precision} against the CPU", worst, limit)


def _losses(part: Part, precision: str) -> list[float]:
    config = step_options._config("18b", "train.micro_batch_size=4", f"train.precision={precision}")
    return step_options._curve(config, part.mesh, part.device)["losses"]


def _quickstart_losses(part: Part, precision: str) -> list[float]:
    """On two batches of noise in turn: the quickstart's pictures are in a package that a GPU's image lacks."""
    steps, batch = (8, 16) if part.toy else (20, 64)
    options = [f"train.steps={steps}", f"train.global_batch_size={batch}", f"train.micro_batch_size={batch // 2}"]
    layout = ["parallel.tensor=1", "parallel.pipeline=1", f"train.precision={precision}"]
    trainer = Trainer(first_phase(read_job(QUICKSTART, [*options, *layout]).config), part.mesh, part.device)
    batches = [local_batch(*random_pairs(trainer.config, turn), part.mesh) for turn in range(2)]
    return [float(trainer.step(batches[step % 2]).loss) for step in range(steps)]
