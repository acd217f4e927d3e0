"""The helper that starts ranks: results, failures and hangs are reported."""

import sys
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from engine import compiled_when_called
from tests.distributed import RankFailure, run_distributed

pytestmark = pytest.mark.dist

HERE_AT_THE_START = ("megatron.core", "torch._dynamo", "tests.preload")
NOT_NEEDED = ("sklearn",)
"""What the server has imported, and what no start should wait for."""


def _sum_of_ranks(offset: int) -> tuple[int, torch.Tensor, list[str]]:
    total = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(total, group=dist.group.WORLD)
    return dist.get_rank(), total, [name for name in (*HERE_AT_THE_START, *NOT_NEEDED) if name in sys.modules]


def _one_rank_raises() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the reason of rank one")
    dist.barrier(group=dist.group.WORLD)


def _one_rank_never_comes() -> None:
    if dist.get_rank() == 0:
        dist.recv(torch.zeros(1), src=1, group=dist.group.WORLD)
    dist.recv(torch.zeros(1), src=0, group=dist.group.WORLD)


def _coalesced() -> None:
    dist.group.WORLD.allreduce_coalesced([torch.zeros(1)])  # type: ignore[union-attr]


def test_results_come_back_in_rank_order() -> None:
    results = run_distributed(_sum_of_ranks, 3, offset=10)
    assert [rank for rank, *_ in results] == [0, 1, 2]
    assert all(total.item() == 33 for _, total, _ in results)
    # A failed import of the server's would only make every launch slow.
    assert all(modules == list(HERE_AT_THE_START) for *_, modules in results)


def test_a_function_that_megatron_wants_compiled_is_compiled_when_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Callable[..., int]] = []

    def compile_(function: Callable[..., int]) -> Callable[..., int]:
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    add = compiled_when_called(lambda a, *, b: a + b)
    assert not compiled
    assert [add(1, b=2), add(3, b=4)] == [3, 7]
    assert len(compiled) == 1


def test_a_failing_rank_is_named_with_its_reason() -> None:
    with pytest.raises(RankFailure, match="the reason of rank one"):
        run_distributed(_one_rank_raises, 2)


def test_a_collective_that_corrupts_memory_on_gloo_is_refused() -> None:
    with pytest.raises(RankFailure, match="a coalesced collective on gloo corrupts memory"):
        run_distributed(_coalesced, 1)


def test_a_hang_ends_and_shows_where_it_hung() -> None:
    with pytest.raises(RankFailure, match="in _one_rank_never_comes"):
        run_distributed(_one_rank_never_comes, 2, timeout_s=1)
