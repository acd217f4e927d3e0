"""Which kernels the blocks of both towers run on: chosen by the config, once, and the same on every rank.

The choice: model.backend names whose linears they are, model.attention and model.norm_kernel replace one kernel each,
and model.block_kernels=fused all that stands between products (models/blocks/fused; `auto` on a CUDA device with the
local backend). `auto` of attention and norm_kernel is what belongs to the backend; only model.backend=auto looks at the
machine, and the local backend's attention, which is faster as plain matrix products on a CPU that multiplies bf16. The
blocks of the caption tower (2 % of the FLOPs) are fused where the image tower's are, and have our linears and torch's
kernels otherwise, as the patch embedding, the head and the norm in front of it always do.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from models.blocks.attention import FlashAttention, Kernel, MatmulAttention, SdpaAttention
from models.blocks.norms import NORMS, ApexRMSNorm, CompiledRMSNorm
from models.blocks.outputs import ColumnLinear, RowLinear
from models.blocks.packages import (
    APEX,
    FLASH_2,
    FLASH_3,
    FLASH_4,
    TRANSFORMER_ENGINE,
    flash_2_serves_te,
    load,
    require_compiler,
)
from models.config import ModelConfig, ModelConfigError
from models.tensors.products import multiplies_bf16


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """What the blocks of a tower are built from; constructors under megatron-core's signatures."""

    column: Kernel
    """Linear whose output features the tensor axis splits."""
    row: Kernel
    """Linear whose input features it splits."""
    norm: Callable[..., nn.Module]
    attention: Kernel
    fused: bool = False
    """Whether the operators between products are fused (models/blocks/fused)."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What the kernels need of megatron-core's TransformerConfig."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The kernels by name, nothing left open."""

    backend: str
    attention: str
    norm_kernel: str
    block_kernels: str
    why: str
    """How `auto` came to the backend; empty where the config names it."""

    def __str__(self) -> str:
        """For the log: kernels of the image tower: local linears, sdpa attention, torch norms."""
        rest = "fused blocks" if self.block_kernels == "fused" else f"{self.norm_kernel} norms"
        kernels = f"{self.backend} linears, {self.attention} attention, {rest}"
        return f"kernels of the image tower: {kernels}" + (f" (model.backend=auto: {self.why})" if self.why else "")


def choose(model: ModelConfig, dtype: torch.dtype) -> Choice:
    """Settle every `auto`. Imports nothing."""
    backend, why = model.backend, ""
    if backend == "auto":
        backend, why = _by_machine(dtype)
    multiplies = dtype == torch.bfloat16 and not torch.cuda.is_available() and multiplies_bf16()
    local = "matmul" if multiplies else "sdpa"
    own = {"local": (local, "torch"), "transformer_engine": ("te", "te")}[backend]
    attention, norm_kernel = (
        default if asked == "auto" else asked
        for asked, default in zip((model.attention, model.norm_kernel), own, strict=True)
    )
    blocks = model.block_kernels
    if blocks == "auto":
        can = torch.cuda.is_available() and backend == "local" and model.norm_kernel == "auto"
        blocks = "fused" if can and find_spec("triton") is not None else "torch"
    return Choice(backend=backend, attention=attention, norm_kernel=norm_kernel, block_kernels=blocks, why=why)


def _by_machine(dtype: torch.dtype) -> tuple[str, str]:
    if not torch.cuda.is_available():
        return "local", "there is no CUDA device"
    if not TRANSFORMER_ENGINE.is_installed:
        return "local", f"{TRANSFORMER_ENGINE.name} is not installed"
    if dtype != torch.bfloat16:
        return "local", "the precision is not bf16"
    if not _te_has_packed_attention():
        return "local", f"{_no_flash_2()}, and {_BEFORE_HOPPER}"
    return "transformer_engine", f"{TRANSFORMER_ENGINE.name} is installed"


HOPPER = (9, 0)
"""Compute capability."""
_BEFORE_HOPPER = "before Hopper Transformer Engine attends to packed tokens through it (cuDNN's kernels want 9.0)"


def _te_has_packed_attention() -> bool:
    return flash_2_serves_te() or not torch.cuda.is_available() or torch.cuda.get_device_capability() >= HOPPER


def _no_flash_2() -> str:
    if not FLASH_2.is_installed:
        return f"{FLASH_2.name} is not installed"
    return f"{FLASH_2.name} {FLASH_2.version} counts as not installed for Transformer Engine before 2.19"


def require_kernels(model: ModelConfig, dtype: torch.dtype) -> Choice:
    """Import what the model asks for, before anything is built; ModelConfigError names the package that is missing."""
    choice = choose(model, dtype)
    asked = {
        TRANSFORMER_ENGINE: choice.backend == "transformer_engine",
        FLASH_2: choice.attention == "flash",
        FLASH_3: choice.attention == "flash3",
        FLASH_4: choice.attention == "flash4",
        APEX: choice.norm_kernel == "apex",
    }
    for package in (package for package, is_asked in asked.items() if is_asked):
        load(package)
    if choice.block_kernels == "fused":
        require_compiler("model.block_kernels=fused")
    elif choice.norm_kernel == "compiled":
        require_compiler("model.norm_kernel=compiled")
    if choice.attention == "te" and not _te_has_packed_attention():
        raise ModelConfigError(
            f"model.attention=te needs {FLASH_2.name} on this GPU: {_no_flash_2()}, and {_BEFORE_HOPPER}; pip install "
            "--no-build-isolation flash-attn==2.8.3, or set model.attention=sdpa"
        )
    if choice.attention == "flash4" and torch.cuda.is_available() and torch.cuda.get_device_capability() < HOPPER:
        raise ModelConfigError("model.attention=flash4 has gradients from Hopper on only: set model.attention=flash")
    return choice


def captions_are_fused(model: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether the caption tower's blocks are; ModelConfigError if there is no compiler for them."""
    fused = choose(model, dtype).block_kernels == "fused"
    if fused:
        require_compiler("model.block_kernels=fused")
    return fused


def vision_kernels(model: ModelConfig, layers: range, dtype: torch.dtype) -> Kernels:
    """Kernels for blocks `layers` of the image tower; ModelConfigError if a package that they need is missing."""
    choice = require_kernels(model, dtype)
    attention: dict[str, Kernel] = {
        "sdpa": SdpaAttention,
        "matmul": MatmulAttention,
        "flash": partial(FlashAttention, version=2),
        "flash3": partial(FlashAttention, version=3),
        "flash4": partial(FlashAttention, version=4),
    }
    norms: dict[str, Callable[..., nn.Module]] = {
        "torch": NORMS[model.vision.norm],
        "apex": ApexRMSNorm,
        "compiled": CompiledRMSNorm,
    }
    column: Kernel = ColumnLinear
    row: Kernel = RowLinear
    settings: dict[str, Any] = {}
    if choice.backend == "transformer_engine":
        from models.blocks import te  # megatron-core's wrappers are empty shells where Transformer Engine is missing

        column, row, settings = te.TEColumnParallelLinear, te.TERowParallelLinear, te.settings(model, layers)
        attention["te"], norms["te"] = te.TeAttention, te.TeNorm
    return Kernels(
        column=column,
        row=row,
        norm=norms[choice.norm_kernel],
        attention=attention[choice.attention],
        fused=choice.block_kernels == "fused",
        settings=settings,
    )
