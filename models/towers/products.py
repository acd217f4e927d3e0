"""bf16 towers on a CPU that cannot multiply bf16: the products in fp32, everything else as it is.

Without avx512_bf16, amx_bf16 or their like, torch's bf16 products take six times as long as fp32 ones (8 against 50
GFLOP/s on one core with AVX2). A product of numbers that bf16 holds, summed in fp32 and rounded once, is what a kernel
for bf16 computes as well, so only the order of a sum differs; attention keeps its weights in fp32 until then. Weights
and activations stay in bf16: memory grows by one product's operands.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_MULTIPLIES = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""Names under which torch.cpu tells that a CPU multiplies bf16."""
_aten = torch.ops.aten
_PRODUCTS = frozenset(
    {
        _aten.mm.default,
        _aten.bmm.default,
        _aten.addmm.default,
        _aten.baddbmm.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)


class Fp32Products(TorchDispatchMode):
    """Inside the block, products of bf16 tensors on the CPU are computed in fp32 and rounded to bf16."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """An operator, with its operands as they are or in fp32."""
        kwargs = kwargs or {}
        if func not in _PRODUCTS or args[0].dtype != torch.bfloat16 or args[0].device.type != "cpu":
            return func(*args, **kwargs)
        answer = func(*tree_map(_widened, args), **tree_map(_widened, kwargs))  # the mask of attention is bf16, too
        if isinstance(answer, tuple):  # of attention: the output, and sums that stay in fp32
            return (answer[0].bfloat16(), *answer[1:])
        return answer.bfloat16()


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value


def fast_products(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """What a forward pass without graph runs in, by device and weights: `Fp32Products` where bf16 would crawl."""
    slow = device.type == "cpu" and dtype == torch.bfloat16 and not multiplies_bf16()
    return Fp32Products() if slow else nullcontext()


def multiplies_bf16() -> bool:
    """Whether the CPU has instructions that multiply bf16."""
    if not hasattr(torch.cpu, "get_capabilities"):  # torch before 2.12
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    told = torch.cpu.get_capabilities()
    return any(told.get(name, False) for name in _MULTIPLIES)
