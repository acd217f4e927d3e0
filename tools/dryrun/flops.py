"""FLOPs of one operator, by the convention of tools/cost/counts.py.

2 per multiply-add of matrix products and attention scores; the causal half is not deducted, what an attention kernel
computes again in its backward is not counted, and norms, activations and softmax are left out.
"""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor

Formula = Callable[[tuple[Any, ...]], int]


def _product(a: Tensor, b: Tensor) -> int:
    """[..., m, k] x [..., k, n]."""
    return 2 * a.numel() * b.shape[-1]


def _attention(products: int) -> Callable[[Tensor, Tensor], int]:
    """`products` of scores and weighted sums over q [M, heads, S, d] and k [M, heads, S', d]."""
    return lambda q, k: products * 2 * q.numel() * k.shape[-2]


_FORWARD, _BACKWARD = _attention(2), _attention(4)
_FORMULAS: dict[str, Formula] = {
    "mm": lambda args: _product(args[0], args[1]),
    "bmm": lambda args: _product(args[0], args[1]),
    "addmm": lambda args: _product(args[1], args[2]),
    "addmm_": lambda args: _product(args[1], args[2]),
    "baddbmm": lambda args: _product(args[1], args[2]),
    "_scaled_dot_product_flash_attention_for_cpu": lambda args: _FORWARD(args[0], args[1]),
    "_scaled_dot_product_flash_attention_for_cpu_backward": lambda args: _BACKWARD(args[1], args[2]),
    "_scaled_dot_product_flash_attention": lambda args: _FORWARD(args[0], args[1]),
    "_scaled_dot_product_flash_attention_backward": lambda args: _BACKWARD(args[1], args[2]),
}
_COUNTS = re.compile(r"mm(_|$)|mv(_|$)|^dot|conv|attention|matmul|linear|einsum")


def flops(operator: Any, args: tuple[Any, ...]) -> int:
    """FLOPs of an operator of namespace aten. Raises NotImplementedError for a product without a formula."""
    formula = _formula(operator.overloadpacket.__name__)
    return formula(args) if formula is not None else 0


@cache
def _formula(name: str) -> Formula | None:
    if name not in _FORMULAS and _COUNTS.search(name):
        raise NotImplementedError(f"the FLOPs of aten.{name} are not counted yet: add it to tools/dryrun/flops.py")
    return _FORMULAS.get(name)
