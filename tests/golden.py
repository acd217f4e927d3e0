"""The reference fixtures (tests/golden) as the engine's own objects: models, logical tensors, batches.

Numbers that the authors' public code gives for small random models in fp32; tests/golden/README.md says how each file
is laid out. `deviation` is the one measure by which tests compare with them.
"""

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from data.pixels.transforms import normalise
from engine.build import Towers
from engine.config.read import Config, preset_model, resolve
from engine.feed import LocalBatch
from engine.parallel.mesh import Mesh
from engine.parallel.rows import own_rows
from models.config import ModelConfig
from models.formats.eva_names import to_logical

FOLDER = Path(__file__).parent / "golden"
PRESET_OF = {"tiny-18b": "tiny-18b", "tiny-8b": "tiny-8b", "tiny-bigE": "tiny-e14", "tiny-eva02-B": "tiny-b16"}
"""Fixture -> preset of the same architecture."""
ARCHITECTURES = tuple(PRESET_OF)
PATCH_DROPOUT_GRADIENTS = ("tiny-18b", "tiny-eva02-B")
"""Fixtures with whole gradients under patch dropout; the others have their norms."""
TOLERANCE = 1e-4
"""Norm-wise relative deviation that every block output, feature, logit and gradient must keep."""


def load_json(path: str) -> Any:
    """A JSON file of tests/golden."""
    return json.loads((FOLDER / path).read_text())


@cache
def load_tensors(path: str) -> dict[str, Tensor]:
    """A safetensors file of tests/golden."""
    return load_file(FOLDER / f"{path}.safetensors")


def load_io(fixture: str) -> dict[str, Tensor]:
    """Inputs and outputs of an architecture's fixture."""
    return load_tensors(f"{fixture}/io")


def model_of(fixture: str) -> ModelConfig:
    """The architecture as this project's preset."""
    return preset_model(PRESET_OF[fixture])


def logical(fixture: str, file: str) -> dict[str, Tensor]:
    """A file under the authors' names (weights, grads, …) as logical tensors."""
    return to_logical(load_tensors(f"{fixture}/{file}"), model_of(fixture))


def config_of(fixture: str, *overrides: str) -> Config:
    """A job that trains the architecture on batches of 8 in fp32, without patch dropout, with a learned scale."""
    train = {"global_batch_size": 8, "micro_batch_size": 8, "patch_dropout": 0.0, "logit_scale": None}
    return resolve({"model": PRESET_OF[fixture], "data": {"shards": ["-"]}, "train": train}, list(overrides))


def pixels(fixture: str) -> Tensor:
    """The fixture's pictures as the tower sees them, [8, 3, h, w]."""
    return normalise(load_io(fixture)["images_u8"], torch.float32)


def local_batch(images: Tensor, text: Tensor, mesh: Mesh, start_position: int = 0) -> LocalBatch:
    """This rank's part of a global batch: uint8 [B, 3, h, w] and ids [B, L]; its first sample's place in the run."""
    rows = len(images) // mesh.data.size
    first = mesh.data.rank * rows
    return LocalBatch(
        positions=start_position + np.arange(first, first + rows),
        images=images[first : first + rows] if mesh.is_first_stage else None,
        tokens=text[first : first + rows][own_rows(rows, mesh)],
    )


@torch.no_grad()
def load_weights(towers: Towers, whole: dict[str, Tensor]) -> None:
    """Put this rank's slices of whole logical tensors into its towers."""
    mesh = towers.mesh
    for tensor, parameter in towers.logical_parameters():
        parameter.copy_(whole[tensor.name][tensor.slice_of(mesh.tensor.rank, mesh.tensor.size)])


def noise(towers: Towers) -> dict[str, Tensor]:
    """Seeded weights for a model without a fixture: nothing is 0 or 1, so that every switch shows."""
    whole = {}
    for tensor, _ in towers.logical_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(tensor.name.encode()))
        values = torch.randn(tensor.shape, generator=generator)
        whole[tensor.name] = 1 + 0.2 * values if "norm" in tensor.name else 0.15 * values
    return whole


def deviation(value: Tensor, reference: Tensor, floor: float = 0.0) -> float:
    """|value - reference| / max(|reference|, floor), 2-norms."""
    assert value.shape == reference.shape, f"shape {tuple(value.shape)} instead of {tuple(reference.shape)}"
    difference = (value.detach().double() - reference.double()).norm()
    return float(difference / max(float(reference.double().norm()), floor, 1e-300))


def deviations(
    values: dict[str, Tensor], reference: dict[str, Tensor], limit: float = TOLERANCE, floor: float = 0.0
) -> dict[str, float]:
    """Tensors that deviate by more than `limit`, worst first; both must have the same names."""
    assert values.keys() == reference.keys(), f"names differ: {sorted(values.keys() ^ reference.keys())[:5]}"
    found = {name: deviation(values[name], reference[name], floor) for name in reference}
    return dict(sorted(((n, d) for n, d in found.items() if not d <= limit), key=lambda item: -item[1]))
