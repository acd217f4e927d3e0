"""The three students of fixture g8-mim as towers: models, weights, gradients, batch."""

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from data.pixels.transforms import normalise
from engine.parallel.mesh import Mesh
from models.config import ModelConfig, VisionConfig
from models.formats.eva_names import to_logical
from models.tensors.naming import LogicalTensor, logical_tensors
from models.towers.mim import StudentTower
from tests.golden import load_json, load_tensors

_BLOCK = re.compile(r"blocks\.(\d+)\.")
STUDENTS = ("eva02B", "style18b", "style8b")
DEPTH = 2
"""Blocks of the fixture's students."""
TARGET_DIM = 32
"""D of the fixture's teacher."""


def _settings(student: str) -> dict:
    return load_json("g8-mim/meta.json")["students"][student]


def student_model(student: str, depth: int = DEPTH) -> ModelConfig:
    """The student's trunk, of another depth if asked for; the text tower is nobody's."""
    s = _settings(student)
    vision = VisionConfig(
        image_size=56,
        depth=depth,
        width=s["width"],
        head_width=s["width"] // s["heads"],
        mlp_hidden=s["mlp_hidden"],
        norm="layer" if s["norm"].startswith("LayerNorm") else "rms",
        post_norm=s["postnorm"],
        qkv_bias=s["qkv_bias"],
        separate_qkv=s["subln"],
        mlp="swiglu" if s["swiglu"] else "gelu",
        mlp_norm=s["subln"],
        rope=s["rope"],
        rope_grid=4,  # the MIM class does not stretch positions
    )
    return ModelConfig(embed_dim=TARGET_DIM, vision=vision)


def student_tensors(student: str, file: str) -> dict[str, Tensor]:
    """A file of the fixture (weights, grads) as logical tensors."""
    prefix = f"{student}."
    found = load_tensors(f"g8-mim/{file}")
    theirs = {f"visual.{name.removeprefix(prefix)}": value for name, value in found.items() if name.startswith(prefix)}
    return to_logical(theirs, student_model(student))


def build_student(
    student: str, mesh: Mesh, layers: range | None = None, *, sequence_parallel: bool = False, depth: int = DEPTH
) -> StudentTower:
    """This rank's stage with the fixture's weights; a deeper student has its blocks again from the first one on."""
    tower = StudentTower(
        student_model(student, depth),
        target_dim=TARGET_DIM,
        patch_gradient_scale=0.1 if _settings(student)["stop_grad_conv1"] else 1.0,
        groups=mesh.vision_groups(),
        layers=layers,
        sequence_parallel=sequence_parallel,
    )
    weights = student_tensors(student, "weights")
    with torch.no_grad():
        for tensor, parameter in logical_parameters(tower, mesh):
            whole = weights[_BLOCK.sub(lambda block: f"blocks.{int(block[1]) % DEPTH}.", tensor.name)]
            parameter.copy_(whole[tensor.slice_of(mesh.tensor.rank, mesh.tensor.size)])
    return tower


def logical_parameters(tower: StudentTower, mesh: Mesh) -> Iterator[tuple[LogicalTensor, torch.nn.Parameter]]:
    """(logical tensor, local slice) of a stage."""
    table = logical_tensors(tower, "vision", tower.layers.start, mesh.tensor.size)
    return ((table[local], parameter) for local, parameter in tower.named_parameters())


def pictures() -> Tensor:
    """[8, 3, 56, 56] as the towers see them."""
    return normalise(load_tensors("g8-mim/io")["images_u8"], torch.float32)


def masks() -> Tensor:
    """bool [8, 16], six masked patches in each row."""
    return load_tensors("g8-mim/io")["mask"].bool()


def unequal_masks() -> Tensor:
    """The same with one masked patch in the first picture and all in the sixth."""
    masked = masks()
    masked[0], masked[5] = False, True
    masked[0, 3] = True
    return masked
