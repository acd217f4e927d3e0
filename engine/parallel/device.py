"""The only file that tells CUDA from CPU: device, backend, stand-in for megatron-core, memory and time.

megatron-core takes torch.cuda.current_device() and torch.cuda.synchronize() as given, keeps a generator per device and
one all-gather buffer. `prepare()` provides them where there is no GPU, so that its tensor-parallel layers and gradient
buffers run on gloo. A test asserts that each replaced name still exists (tests/engine/test_device.py).
"""

import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import layers, mappings
from megatron.core.tensor_parallel import random as megatron_random
from torch import Tensor

from engine.config.sections.parallel import LINK_BLOCKS

CPU = torch.device("cpu")
PEAK_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": {"bf16": 312.0, "fp32": 19.5},
    "NVIDIA A100-SXM4-80GB": {"bf16": 312.0, "fp32": 19.5},
    "NVIDIA H100 80GB HBM3": {"bf16": 989.4, "fp32": 67.0},
    "NVIDIA H200": {"bf16": 989.4, "fp32": 67.0},
    "NVIDIA B200": {"bf16": 2250.0, "fp32": 75.0},
}
"""Device name as the driver gives it -> peak of dense matrix products by precision, from the vendors' data sheets
(tools/cost/hardware cites them). Other forms of a GPU (PCIe, NVL) have other clocks: they are not listed.
"""


@dataclass(frozen=True)
class Device:
    """Where this rank computes."""

    torch_device: torch.device
    backend: str
    """Process group backend: nccl or gloo."""

    @property
    def is_cuda(self) -> bool:
        """Whether this rank owns a GPU."""
        return self.torch_device.type == "cuda"

    def clock_s(self) -> float:
        """Seconds on a clock that waits for the device: for phase times at log steps, not for the hot path."""
        if self.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak_tflops(self, precision: str) -> float | None:
        """Peak of dense matrix products in fp32 or bf16; None for a device that the table does not know."""
        if not self.is_cuda:
            return None
        return PEAK_TFLOPS.get(torch.cuda.get_device_name(self.torch_device), {}).get(precision)

    def peak_memory_gb(self) -> float:
        """Peak memory of this rank in GB: allocated on a GPU, resident on the CPU."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated() / 1e9
        with open("/proc/self/status") as status:
            peak_kb = next(line for line in status if line.startswith("VmHWM")).split()[1]
        return int(peak_kb) * 1024 / 1e9


def order_kernels_by_launch() -> None:
    """Ask for one hardware queue before CUDA starts, unless the environment says otherwise.

    megatron-core launches a tensor-parallel collective before the GEMM that hides it; with several queues the GEMM may
    take every SM first. Its linears warn without this setting.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def priority_options(backend: str) -> Any:
    """pg_options for groups whose messages must not queue behind computing: the GPU's high-priority streams on NCCL.

    A receive that is posted ahead holds its thread blocks, an SM each, until the message comes, so they are few.
    """
    if backend != "nccl":
        return None
    options = dist.ProcessGroupNCCL.Options()
    options.is_high_priority_stream = True
    options.config.max_ctas = LINK_BLOCKS
    return options


class SideStream:
    """Copies between device and host beside the computing: on a CUDA stream of their own, on the CPU at once."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def host_buffer(self, like: Tensor) -> Tensor:
        """Host memory for a copy of `like`; pinned where a GPU can then copy without waiting."""
        return torch.empty(like.shape, dtype=like.dtype, device=CPU, pin_memory=self._stream is not None)

    def copy_out(self, source: Tensor, buffer: Tensor) -> None:
        """Start copying what the computing stream has written to `source` into host memory."""
        if self._stream is None:
            buffer.copy_(source)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            buffer.copy_(source, non_blocking=True)
        source.record_stream(self._stream)  # the allocator must not hand its memory out before the copy has been made

    def copy_in(self, buffer: Tensor) -> Tensor:
        """Start copying host memory to the device; not to be touched before `join`."""
        if self._stream is None:
            return buffer.clone()
        with torch.cuda.stream(self._stream):
            return buffer.to(self._device, non_blocking=True)

    def join(self, tensor: Tensor) -> None:
        """The computing stream waits for the copies started so far and may use `tensor` from here on."""
        if self._stream is not None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_stream(self._stream)
            tensor.record_stream(computing)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, from memory that a GPU reads by itself: the copy is queued, the host waits for none."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def prepare() -> Device:
    """Choose the device of this rank and make megatron-core ready for it. Idempotent; needs no process group."""
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local_rank)
        device = Device(torch.device("cuda", local_rank), "nccl")
    else:
        _stand_in_for_cuda()
        device = Device(CPU, "gloo")
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        # The groups are ours (mesh.py), so megatron-core's initialize_model_parallel, which would make it, never runs.
        parallel_state._set_global_memory_buffer()
    # Nothing draws from it (no dropout inside the layers), but the sequence-parallel block forks it in every pass: four
    # copies of a generator's state and a comparison on the host, for nothing.
    megatron_random.model_parallel_cuda_manual_seed(0, tp_rank=0, ep_rank=0, etp_rank=0)
    megatron_random.get_cuda_rng_tracker().fork = nullcontext
    return device


def gathered_tokens() -> list[torch.Tensor]:
    """megatron-core's buffers of gathered tokens, which stay between steps."""
    return list(parallel_state.get_global_memory_buffer().buffer.values())


def forget_gathered_tokens() -> None:
    """Drop these buffers; the next `prepare` makes room for new ones."""
    parallel_state.destroy_global_memory_buffer()


_FORGETFUL = "get_tensor_model_parallel_group_if_none"
"""megatron-core's function that answers None for every group where torch.distributed is not initialised."""


def keep_given_groups() -> None:
    """Let megatron-core's layers answer with the group that they are given; nothing else about them changes."""
    for module in (layers, mappings):
        _keep_given_groups(module)


def _keep_given_groups(module: Any) -> None:
    original = getattr(module, _FORGETFUL)
    if getattr(original, "keeps", False):
        return

    def group_or_default(tp_group: Any, *more: Any, **named: Any) -> Any:
        return original(tp_group, *more, **named) if tp_group is None else tp_group

    group_or_default.keeps = True  # type: ignore[attr-defined]
    setattr(module, _FORGETFUL, group_or_default)


_STAND_INS: dict[str, Any] = {
    "current_device": lambda: CPU,
    "current_stream": lambda device=None: torch.cpu.current_stream(),
    "synchronize": lambda device=None: None,
    "manual_seed": lambda seed: torch.manual_seed(seed) and None,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
}


def _stand_in_for_cuda() -> None:
    if torch.cuda.current_device is _STAND_INS["current_device"]:
        return
    for name, stand_in in _STAND_INS.items():
        setattr(torch.cuda, name, stand_in)
    megatron_random._get_cuda_rng_state = lambda *a, **k: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
