"""The MIM student cut by tensor and pipeline parallelism gives the authors' predictions, loss and gradients.

One launch a number of ranks runs all its cases. Stages pass activations by plain send and receive, one micro-batch
after the other: the schedule is not what is tested here.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engine.config.read import ParallelConfig
from engine.config.stages import stage_layers
from engine.objectives.mim.loss import distillation_loss
from engine.parallel.device import prepare
from engine.parallel.launch import job
from engine.parallel.mesh import Mesh, build_mesh
from models.tensors.naming import split_dim
from models.towers.mim import StudentTower
from tests.distributed import run_distributed, world
from tests.golden import TOLERANCE, deviation, deviations, load_tensors
from tests.models.students import (
    DEPTH,
    STUDENTS,
    build_student,
    logical_parameters,
    masks,
    pictures,
    student_model,
    student_tensors,
    unequal_masks,
)

pytestmark = pytest.mark.dist

MICRO_BATCH = 4


@dataclass(frozen=True)
class Case:
    """A student at a layout."""

    student: str
    tensor: int = 1
    layers: tuple[int, ...] = (2,)
    """Blocks of each pipeline stage."""
    sequence: bool = True
    unequal: bool = False
    """Other numbers of masked patches than the fixture has."""

    @property
    def depth(self) -> int:
        """Blocks of the student; the fixture's have two."""
        return sum(self.layers)

    @property
    def has_fixture(self) -> bool:
        """Whether the authors' numbers are for this case."""
        return self.depth == DEPTH and not self.unequal

    def __str__(self) -> str:
        stages = "+".join(map(str, self.layers))
        parts = [self.student, f"tp{self.tensor}", f"layers{stages}", "sp" if self.sequence else "nosp"]
        return "-".join(parts) + ("-unequal" if self.unequal else "")


# 85 hidden channels of eva02B do not divide by 2: it is cut into stages only.
EVEN = ("style18b", "style8b")
CASES = {
    2: [
        *(Case(s, tensor=2, sequence=sequence) for s in EVEN for sequence in (True, False)),
        *(Case(s, layers=(1, 1)) for s in STUDENTS),
        *(Case("style18b", tensor=2, sequence=sequence, unequal=True) for sequence in (True, False)),
    ],
    4: [
        *(Case(s, tensor=2, layers=(1, 1), sequence=sequence) for s in EVEN for sequence in (True, False)),
        Case("style18b", tensor=4),
        Case("style18b", tensor=2, layers=(2, 1), unequal=True),
        Case("style8b", tensor=2, layers=(1, 3), sequence=False),
        Case("eva02B", layers=(1, 2, 1, 1), unequal=True),
    ],
}


class _Neighbours:
    """Activations from the previous stage and gradients from the next one."""

    def __init__(self, mesh: Mesh, tokens: tuple[int, ...]):
        self.group, self.stage, self.tokens = mesh.pipeline.group, mesh.pipeline.rank, tokens

    def send(self, message: Tensor, step: int) -> None:
        dist.send(message.detach().contiguous(), group=self.group, group_dst=self.stage + step)

    def receive(self, step: int) -> Tensor:
        message = torch.empty(self.tokens)
        dist.recv(message, group=self.group, group_src=self.stage + step)
        return message


def one_pass(case: Case, mesh: Mesh) -> dict[str, Any]:
    """Forward and backward on the fixture's batch: this rank's share of the loss, its predictions and gradients."""
    vision = student_model(case.student, case.depth).vision
    layers = stage_layers(vision.depth, len(case.layers), list(case.layers))[mesh.pipeline.rank]
    tower = build_student(case.student, mesh, layers, sequence_parallel=case.sequence, depth=case.depth)
    masked = unequal_masks() if case.unequal else masks()
    rows = MICRO_BATCH * (1 + vision.patches) // (mesh.tensor.size if case.sequence else 1)
    neighbours = _Neighbours(mesh, (rows, 1, vision.width))
    loss, predictions = torch.zeros(()), []
    for start in range(0, len(masked), MICRO_BATCH):
        at = slice(start, start + MICRO_BATCH)
        inputs = pictures()[at] if tower.is_first else neighbours.receive(-1).requires_grad_()
        output = tower(inputs, masked[at], samples=MICRO_BATCH)
        if tower.is_last:
            targets = load_tensors("g8-mim/io")["teacher_patch_features"][at][masked[at]]
            share = distillation_loss(output, targets, masked.sum())
            share.backward()
            loss += share.detach()
            predictions.append(output.detach())
        else:
            neighbours.send(output, 1)
            output.backward(neighbours.receive(1))
        if not tower.is_first:
            assert inputs.grad is not None
            neighbours.send(inputs.grad, -1)
    return {
        "loss": loss if tower.is_last else None,
        "predictions": torch.cat(predictions) if tower.is_last else None,
        "tensor_rank": mesh.tensor.rank,
        "gradients": _gradients(tower, mesh),
    }


def _gradients(tower: StudentTower, mesh: Mesh) -> dict[str, Tensor | None]:
    """Logical name -> gradient of this rank's slice, partial sums added up as engine/objectives/update.py adds them."""
    for parameter in tower.parameters():
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(parameter.grad, group=mesh.tensor.group)
    return {tensor.name: parameter.grad for tensor, parameter in logical_parameters(tower, mesh)}


def run_cases(cases: list[Case]) -> list[dict[str, Any]]:
    """All cases on the ranks of this launch."""
    prepare()
    mesh = cache(lambda tensor, pipeline: build_mesh(tensor, pipeline, world()))
    return [one_pass(case, mesh(case.tensor, len(case.layers))) for case in cases]


@pytest.fixture(scope="module")
def outcomes() -> dict[int, list[list[dict[str, Any]]]]:
    """Ranks -> per rank the outcome of each case; filled by the first test of each number of ranks."""
    return {}


def _of_case(ranks: int, case: Case, outcomes: dict) -> list[dict[str, Any]]:
    """The outcome on every rank."""
    if ranks not in outcomes:
        outcomes[ranks] = run_distributed(run_cases, ranks, cases=CASES[ranks])
    return [rank[CASES[ranks].index(case)] for rank in outcomes[ranks]]


def _whole_gradients(ranks: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Slices of the tensor ranks put together; what is not cut must be the same on all of them."""
    whole: dict[str, Tensor] = {}
    for name in {name for rank in ranks for name in rank["gradients"]}:
        holders = sorted((r for r in ranks if name in r["gradients"]), key=lambda r: r["tensor_rank"])
        slices, dim = [r["gradients"][name] for r in holders], split_dim(name)
        if dim is None:
            assert all(deviation(copy, slices[0]) < 1e-5 for copy in slices), f"copies of {name} differ"
        whole[name] = slices[0] if dim is None else torch.cat(slices, dim)
    return whole


def _cases(*, with_fixture: bool) -> list:
    pairs = [(n, case) for n, cases in CASES.items() for case in cases if case.has_fixture == with_fixture]
    return [pytest.param(n, case, id=f"{n}ranks-{case}") for n, case in pairs]


def _check(found: list[dict[str, Any]], predictions: Tensor, loss: Tensor, gradients: dict[str, Tensor]) -> None:
    last = [rank for rank in found if rank["loss"] is not None]
    for rank in last:
        torch.testing.assert_close(rank["loss"], loss, rtol=1e-5, atol=0)
        assert deviation(rank["predictions"], predictions) < TOLERANCE
        assert rank["predictions"].equal(last[0]["predictions"])
    assert not deviations(_whole_gradients(found), gradients)


@pytest.mark.parametrize(("ranks", "case"), _cases(with_fixture=True))
def test_predictions_loss_and_every_gradient(ranks: int, case: Case, outcomes: dict) -> None:
    io = load_tensors("g8-mim/io")
    gradients = student_tensors(case.student, "grads")
    _check(_of_case(ranks, case, outcomes), io[f"{case.student}.pred"], io[f"{case.student}.loss"], gradients)


@pytest.mark.parametrize(("ranks", "case"), _cases(with_fixture=False))
def test_unequal_masks_and_uneven_stages_equal_one_process(ranks: int, case: Case, outcomes: dict) -> None:
    with job(ParallelConfig()) as (mesh, _):
        alone = one_pass(replace(case, tensor=1, layers=(case.depth,)), mesh)
    _check(_of_case(ranks, case, outcomes), alone["predictions"], alone["loss"], alone["gradients"])
