"""Canary: what engine/parallel/device.py replaces where there is no GPU still exists under these names."""

import os
from datetime import timedelta

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as megatron_random

from engine.config.read import ParallelConfig
from engine.parallel import device
from engine.parallel.launch import job


def test_replaced_names_exist() -> None:
    for name in device._STAND_INS:
        assert hasattr(torch.cuda, name), f"torch.cuda.{name}"
    for name in ("_get_cuda_rng_state", "_set_cuda_rng_state", "model_parallel_cuda_manual_seed"):
        assert hasattr(megatron_random, name), f"tensor_parallel.random.{name}"
    assert hasattr(parallel_state, "_GLOBAL_MEMORY_BUFFER")
    assert hasattr(parallel_state, "_set_global_memory_buffer")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: nothing is replaced")
def test_prepare_stands_in_for_cuda_and_may_be_called_twice() -> None:
    first, second = device.prepare(), device.prepare()
    assert first == second == device.Device(torch.device("cpu"), "gloo")
    assert torch.cuda.current_device() == torch.device("cpu")
    assert first.peak_memory_gb() > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="NCCL's groups keep their timeout elsewhere")
def test_every_group_has_the_timeout_of_the_config() -> None:
    with job(ParallelConfig(timeout_minutes=7)) as (mesh, _):
        for axis in (mesh.world, mesh.tensor, mesh.pipeline, mesh.data):
            options = axis.group._get_backend(torch.device("cpu")).options
            assert options._timeout == timedelta(minutes=7)


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("8", "8")])
def test_kernels_are_ordered_unless_the_environment_says_otherwise(
    given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.setenv(name, given or "")
    if given is None:
        monkeypatch.delenv(name)
    device.order_kernels_by_launch()
    assert os.environ[name] == expected


def test_only_nccl_has_streams_to_prefer() -> None:
    assert device.priority_options("gloo") is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and NCCL")
def test_prepare_leaves_cuda_alone() -> None:
    assert device.prepare().is_cuda
    assert isinstance(torch.cuda.current_device(), int)
