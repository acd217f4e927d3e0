"""Canary: what engine/device.py replaces where there is no GPU still exists under these names."""

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as megatron_random

from engine import device


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and NCCL")
def test_prepare_leaves_cuda_alone() -> None:
    assert device.prepare().is_cuda
    assert isinstance(torch.cuda.current_device(), int)
