"""The helper that starts ranks: results, failures and hangs are reported."""

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankFailure, run_distributed

pytestmark = pytest.mark.dist


def _sum_of_ranks(offset: int) -> tuple[int, torch.Tensor]:
    total = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(total, group=dist.group.WORLD)
    return dist.get_rank(), total


def _one_rank_raises() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the reason of rank one")
    dist.barrier(group=dist.group.WORLD)


def _one_rank_never_comes() -> None:
    if dist.get_rank() == 0:
        dist.recv(torch.zeros(1), src=1, group=dist.group.WORLD)
    dist.recv(torch.zeros(1), src=0, group=dist.group.WORLD)


def test_results_come_back_in_rank_order() -> None:
    results = run_distributed(_sum_of_ranks, 3, offset=10)
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert all(total.item() == 33 for _, total in results)


def test_a_failing_rank_is_named_with_its_reason() -> None:
    with pytest.raises(RankFailure, match="the reason of rank one"):
        run_distributed(_one_rank_raises, 2)


def test_a_hang_ends_and_shows_where_it_hung() -> None:
    with pytest.raises(RankFailure, match="in _one_rank_never_comes"):
        run_distributed(_one_rank_never_comes, 2, timeout_s=3)
