"""The masked-feature loss against the authors' numbers, and its weights over unequal ranks."""

import pytest
import torch
import torch.distributed as dist

from engine.objectives.mim.loss import distillation_loss, global_masked_count
from engine.parallel.mesh import build_mesh
from tests.distributed import run_distributed, world
from tests.engine.test_waits import counted
from tests.golden import deviation, load_tensors

SHARES = ((0, 11), (11, 40))
"""Rows of the fixture on each of two ranks."""


def _fixture() -> tuple[torch.Tensor, torch.Tensor]:
    io = load_tensors("g8-mim/io")
    return io["loss_only.student"].clone().requires_grad_(), io["loss_only.teacher"]


def test_loss_and_gradient_of_the_authors_with_a_zero_vector() -> None:
    io = load_tensors("g8-mim/io")
    student, teacher = _fixture()
    loss = distillation_loss(student, teacher, torch.tensor(len(student)))
    loss.backward()
    torch.testing.assert_close(loss, io["loss_only.loss"], rtol=1e-6, atol=0)
    assert student.grad is not None
    # Apart, because the zero row's gradient is 1e8 times the others'.
    for rows in (slice(0, 1), slice(1, None)):
        assert deviation(student.grad[rows], io["loss_only.grad_student"][rows]) < 1e-5


@pytest.mark.parametrize("student", ["eva02B", "style18b", "style8b"])
def test_loss_of_the_students_predictions(student: str) -> None:
    io = load_tensors("g8-mim/io")
    loss = distillation_loss(io[f"{student}.pred"], io["targets"], torch.tensor(len(io["targets"])))
    torch.testing.assert_close(loss, io[f"{student}.loss"], rtol=1e-5, atol=0)


def test_bf16_predictions_are_compared_in_fp32() -> None:
    student, teacher = (t.detach().bfloat16() for t in _fixture())
    assert distillation_loss(student, teacher, torch.tensor(40)).dtype == torch.float32


def test_no_masked_patches_on_a_rank_add_nothing() -> None:
    assert float(distillation_loss(torch.empty(0, 4), torch.empty(0, 4), torch.tensor(7))) == 0


def test_a_batch_whose_masks_are_all_empty_has_no_loss() -> None:
    assert float(distillation_loss(torch.empty(0, 4), torch.empty(0, 4), torch.tensor(0))) == 0


def _share() -> dict:
    mesh = build_mesh(1, 1, world())
    rows = slice(*SHARES[mesh.data.rank])
    student, teacher = _fixture()
    with counted() as asked:
        count = global_masked_count(rows.stop - rows.start, mesh.data, torch.device("cpu"))
        loss = distillation_loss(student[rows], teacher[rows], count)
        loss.backward()
    dist.all_reduce(student.grad, group=mesh.data.group)
    return {"count": int(count), "loss": loss.detach(), "gradient": student.grad, "asked": dict(asked)}


@pytest.mark.dist
def test_unequal_ranks_add_up_to_the_global_mean() -> None:
    io = load_tensors("g8-mim/io")
    ranks = run_distributed(_share, 2)
    assert [rank["count"] for rank in ranks] == [40, 40]
    assert [rank["asked"] for rank in ranks] == [{}, {}], "the host waits for the device"
    torch.testing.assert_close(sum(rank["loss"] for rank in ranks), io["loss_only.loss"], rtol=1e-6, atol=0)
    assert deviation(ranks[0]["gradient"][1:], io["loss_only.grad_student"][1:]) < 1e-5
