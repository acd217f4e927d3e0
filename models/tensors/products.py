"""bf16 models on a CPU that cannot multiply bf16: the products in fp32, everything else as it is.

Without avx512_bf16, amx_bf16 or their like, torch's bf16 products take six times as long as fp32 ones or longer (1 to
9 against 58 GFLOP/s on one core with AVX2). A product of numbers that bf16 holds, summed in fp32 and rounded once, is
what a kernel for bf16 computes as well, so only the order of a sum differs; attention keeps its weights in fp32 until
then. Weights, activations and gradients stay in bf16: memory grows by one product's operands.

Works below autograd: a pass, its replay and its backward have the same products, whoever asks for them (linears, kept
outputs, checkpoints, compiled code).
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

_MULTIPLIES = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""Names under which torch.cpu tells that a CPU multiplies bf16."""
_aten = torch.ops.aten
_WRITING = {
    _aten.addmm_.default: _aten.addmm.default,
    _aten.baddbmm_.default: _aten.baddbmm.default,
    _aten.mm.out: _aten.mm.default,
    _aten.bmm.out: _aten.bmm.default,
    _aten.addmm.out: _aten.addmm.default,
    _aten.baddbmm.out: _aten.baddbmm.default,
}
"""Operator that writes its result into a tensor -> the one that returns it; compiled code calls those with `out`."""


class Fp32Products(TorchDispatchMode):
    """Inside the block, products of bf16 tensors on the CPU are computed in fp32 and rounded to bf16."""

    rounded: ClassVar[dict[Any, int]] = {
        _aten.mm.default: 1,
        _aten.bmm.default: 1,
        _aten.addmm.default: 1,
        _aten.baddbmm.default: 1,
        _aten._scaled_dot_product_flash_attention_for_cpu.default: 1,  # and logarithms of sums, which stay in fp32
        _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: 3,
    }
    """Operator -> how many of its results are rounded to bf16, the first ones."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether torch wraps the method below to keep its compiler out: that takes longer than the method."""
        return False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Whether torch.compile may compile inside the block: its code calls these operators for products, too."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """An operator, with its operands as they are or in fp32."""
        if func in self.rounded and _is_slow(args[0]):
            return self._round(func, args, kwargs or {})
        if func in _WRITING and _is_slow(args[0]):
            rest = dict(kwargs or {})
            return rest.pop("out", args[0]).copy_(self._multiply(_WRITING[func], args, rest))  # which rounds
        return func(*args, **kwargs) if kwargs else func(*args)

    def _multiply(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # The mask of attention is bf16, too.
        return func(*map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()})

    def _round(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        answer = self._multiply(func, args, kwargs)
        if isinstance(answer, Tensor):
            return answer.bfloat16()
        count = self.rounded[func]
        return (*(None if part is None else part.bfloat16() for part in answer[:count]), *answer[count:])


def _is_slow(operand: Tensor) -> bool:
    return operand.dtype == torch.bfloat16 and operand.device.type == "cpu"


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


def fast_products(device: torch.device, *dtypes: torch.dtype) -> AbstractContextManager[object]:
    """What passes of towers run in, by device and weights: `Fp32Products` where bf16 ones would crawl."""
    slow = device.type == "cpu" and torch.bfloat16 in dtypes and not multiplies_bf16()
    return Fp32Products() if slow else nullcontext()


def shared(operand: Tensor) -> Tensor:
    """A factor of several products in the dtype that these are computed in: cast once, where each would cast it.

    For `product`, `product_onto` and `add_product`, which take it with factors in the model's dtype.
    """
    return operand.float() if _is_slow(operand) and _products_are_wide() else operand


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] b [k, n] in the dtype of `b`; `a` may be `shared`."""
    return a @ b if a.dtype == b.dtype else (a @ b.to(a.dtype)).to(b.dtype)


def product_onto(around: Tensor, a: Tensor, b: Tensor, *, may_write: bool) -> Tensor:
    """around [m, n] + a [m, k] b [k, n], the sum rounded once to the dtype of `b`; `a` may be `shared`.

    may_write: whether `around` may hold the answer.
    """
    may_write = may_write and around.is_contiguous() and around.dtype == b.dtype
    if a.dtype != b.dtype:
        wide = around.to(a.dtype).addmm_(a, b.to(a.dtype))
        return around.copy_(wide) if may_write else wide.to(b.dtype)
    return around.addmm_(a, b) if may_write else torch.addmm(around, a, b)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [m, n] += a [m, k] b [k, n], the sum in fp32; `a` may be `shared`.

    Inside the product in fp32, on CUDA and where products are computed in fp32; a bf16 product of a CPU has no fp32
    output, and is written and added.
    """
    if a.dtype == total.dtype or (not total.is_cuda and _products_are_wide()):
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(a @ b)


def _products_are_wide() -> bool:
    return any(isinstance(mode, Fp32Products) for mode in _get_current_dispatch_mode_stack())


@cache
def multiplies_bf16() -> bool:
    """Whether the CPU has instructions that multiply bf16."""
    if not hasattr(torch.cpu, "get_capabilities"):  # torch before 2.12
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    told = torch.cpu.get_capabilities()
    return any(told.get(name, False) for name in _MULTIPLIES)
