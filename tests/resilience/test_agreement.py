"""Ranks that were started differently are named before any group exists; restarts meet in a store of their own."""

import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data.errors import DataError
from engine.checkpoint.continuity import accept_settings, changed_settings
from engine.checkpoint.format.errors import CheckpointError
from engine.config.read import to_dict
from engine.parallel import rendezvous
from engine.parallel.agree import PeerFailed, raise_together
from engine.parallel.mesh import Axis
from engine.parallel.rendezvous import NotEveryoneCame, _agree_on_name, own_store
from engine.resilience import agreement
from engine.resilience.agreement import RanksDiffer, agree, compare, content_of, facts_of
from tests.checkpoint.jobs import job_config
from tests.distributed import run_distributed, world

SOON = timedelta(seconds=300)


def on_ranks(size: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work(rank)` returns or raises, on threads that stand for ranks."""
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_every_start_gets_a_name_of_its_own_whatever_dead_ranks_have_left() -> None:
    store = dist.HashStore()
    store.set("asks/2", "a rank that was killed before it got an answer")
    names = [on_ranks(4, lambda rank: _agree_on_name(store, rank, 4, SOON)) for _ in range(3)]
    assert all(len(set(of_start)) == 1 for of_start in names)
    assert len({of_start[0] for of_start in names}) == 3


def test_ranks_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of the two is over once rank 1 has left its question, been answered and said that it came."""
    store = dist.HashStore()
    clock = SimpleNamespace(sleep=time.sleep, monotonic=lambda: 1e6 * (store.num_keys() >= 3))
    with monkeypatch.context() as patched:
        patched.setattr(rendezvous, "time", clock)
        first, second = on_ranks(2, lambda rank: _agree_on_name(store, rank, 4, SOON))
    assert isinstance(first, NotEveryoneCame) and "ranks 2, 3 of 4 did not come" in str(first)
    assert isinstance(second, str)
    lonely = on_ranks(1, lambda _: _agree_on_name(dist.HashStore(), 1, 2, timedelta(milliseconds=1)))[0]
    assert isinstance(lonely, NotEveryoneCame) and "rank 0 did not come" in str(lonely)


def test_half_an_environment_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(NotEveryoneCame, match=r"RANK is set, but not all of .*start with torchrun"):
        own_store(SOON)


def other(config: dict[str, Any], **changes: Any) -> dict[str, str]:
    facts = facts_of(config)
    return facts | {name.replace("__", "."): value for name, value in changes.items()}


def test_a_rank_that_differs_is_named_with_its_host_and_the_difference() -> None:
    config = to_dict(job_config("run"))
    facts = [{"host": f"node{rank}", **facts_of(config)} for rank in range(4)]
    assert compare(facts) == ""
    facts[2] |= {"config.optim.lr_vision": "0.005"}
    facts[3] |= {"code of engine/": "0123", "version of torch": "1.0", "config.data.cache_dir": "'/local'"}
    said = compare(facts)
    assert "rank 2 on node2 has optim.lr_vision 0.005, others 0.02" in said
    assert "rank 3 on node3 has code of engine/ 0123" in said and "version of torch 1.0" in said
    assert "cache_dir" not in said and "node0" not in said


def test_weights_that_two_hosts_have_under_one_name_are_compared(tmp_path: Path) -> None:
    """Each rank would load its part of another file, and nobody would ever know."""
    config, found = to_dict(job_config("run")), []
    for host in ("one", "other"):
        weights = tmp_path / "weights.safetensors"
        weights.write_bytes(bytes(3 << 20) + host.encode())
        os.utime(weights, (1, 1))
        facts = facts_of(config | {"init": {"vision": str(weights)}, "checkpoint": {"resume": f"{tmp_path}/gone"}})
        found.append({"host": host, **facts})
    assert "rank 1 on other has behind init.vision 3,145,733 bytes " in compare(found)
    assert "nothing that can be read" in found[0]["behind checkpoint.resume"]
    assert content_of(weights) == found[1]["behind init.vision"]


def test_switches_of_kernels_in_the_environment_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    config = to_dict(job_config("run"))
    facts = [{"host": "a", **facts_of(config)}]
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    monkeypatch.setenv("HOME", "/elsewhere")
    assert compare([*facts, {"host": "b", **facts_of(config)}]).startswith(
        "the ranks do not run the same job: rank 1 on b has NVTE_FLASH_ATTN 0, others not there."
    )


def test_cpus_that_multiply_bf16_in_different_ways_are_refused_where_it_matters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def facts(*overrides: str) -> list[dict[str, str]]:
        found = []
        for rank, multiplies in enumerate((True, True, False)):
            monkeypatch.setattr(agreement, "multiplies_bf16", lambda multiplies=multiplies: multiplies)
            found.append({"host": f"node{rank}", **facts_of(to_dict(job_config("run", *overrides)))})
        return found

    assert compare(facts("train.precision=bf16")) == (
        "the ranks do not run the same job: rank 2 on node2 has bf16 products of its CPU in fp32, others in bf16. "
        "Start every rank with one config and one installation, on CPUs of one kind or with train.precision=fp32"
    )
    assert compare(facts()) == "", "nothing is in bf16"
    in_a_phase = facts("phases=[{name: a, steps: 3}, {name: b, steps: 3, train: {precision: bf16}}]")
    assert "rank 2 on node2 has bf16 products" in compare(in_a_phase)
    said = compare([facts()[0], facts("train.precision=bf16")[2]])
    assert "train.precision 'bf16'" in said and "products" not in said and "CPUs" not in said, "it is not the CPU's"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert compare(facts("train.precision=bf16")) == "", "CPUs of GPU nodes may differ"


def test_all_ranks_hear_the_verdict() -> None:
    config = to_dict(job_config("run"))
    store = dist.HashStore()
    facts = [facts_of(config), facts_of(config | {"objective": "mim"})]
    results = on_ranks(2, lambda rank: agree(store, rank, 2, facts[rank], SOON))
    assert [type(result) for result in results] == [RanksDiffer, RanksDiffer]
    assert "rank 1 on" in str(results[0]) and str(results[0]) == str(results[1])


def fail_together() -> list[str]:
    """Kinds of errors that rank 1 meets, and what this rank raises."""
    axis = Axis(dist.get_world_size(), dist.get_rank(), world())
    found = []
    for error in (None, DataError("a bad shard"), CheckpointError("no room"), "in words", ZeroDivisionError("a bug")):
        try:
            raise_together(error if axis.rank == 1 else None, axis)
            found.append("")
        except Exception as raised:
            found.append(f"{type(raised).__name__}: {raised}")
    return found


@pytest.mark.dist
def test_what_one_rank_meets_all_raise() -> None:
    same = ["", "DataError: a bad shard", "CheckpointError: no room", "CheckpointError: in words"]
    assert run_distributed(fail_together, 3) == [
        [*same, f"{PeerFailed.__name__}: a bug"],
        [*same, "ZeroDivisionError: a bug"],
        [*same, f"{PeerFailed.__name__}: a bug"],
    ]


RESULT_CHANGES = {
    "optim.name=adamw": "optim.name lamb → adamw",
    "optim.lr_vision=1e-3": "optim.lr_vision 0.02 → 0.001",
    "train.global_batch_size=32": "train.global_batch_size 16 → 32",
    "train.precision=bf16": "train.precision fp32 → bf16",
    "train.loss=sigmoid": "train.loss softmax → sigmoid",
    "optim.betas=[0.9,0.99]": "optim.betas",
    "parallel.reduce_dtype=bf16": "parallel.reduce_dtype fp32 → bf16",
    "data.flip=true": "data.flip False → True",
}
NO_CHANGES = ("train.micro_batch_size=2", "parallel.tensor=2", "health.on_nonfinite=skip", "log.every_steps=1")


@pytest.mark.parametrize("override", RESULT_CHANGES)
def test_a_setting_that_changes_the_result_is_refused_or_accepted_by_name(override: str) -> None:
    changes = changed_settings(to_dict(job_config("run")), to_dict(job_config("elsewhere", override)))
    with pytest.raises(CheckpointError, match=r"written with other settings: .*checkpoint\.accept=") as refused:
        accept_settings(changes, ["data.crop*"], "step_00000002")
    name = override.partition("=")[0]
    assert RESULT_CHANGES[override] in str(refused.value) and f"checkpoint.accept=[{name}]" in str(refused.value)
    assert RESULT_CHANGES[override] in accept_settings(changes, [name.partition(".")[0] + ".*"], "step_00000002")


def test_kernels_may_differ_but_for_fp8_which_rounds_otherwise() -> None:
    stored = to_dict(job_config("run"))
    wanted = stored | {"model": stored["model"] | {"attention": "flash", "block_kernels": "fused", "fp8": "current"}}
    assert [str(change) for change in changed_settings(stored, wanted)] == ["model.fp8 none → current"]


def test_what_does_not_change_the_result_may_differ_and_a_longer_run_is_said() -> None:
    stored = to_dict(job_config("run"))
    assert not changed_settings(stored, to_dict(job_config("run", *NO_CHANGES)))
    longer = changed_settings(stored, to_dict(job_config("run", "train.steps=60")))
    assert accept_settings(longer, [], "x") == "goes on with other settings: train.steps 6 → 60"
    del stored["data"]["flip"]  # written before there was such a setting
    assert not changed_settings(stored, to_dict(job_config("run", "data.flip=true")))
