"""bf16 products on a CPU that cannot multiply bf16: fp32 inside, bf16 outside, and none of a tower's is missed."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.parallel.mesh import Mesh
from models.config import ModelConfig, TextConfig, VisionConfig
from models.tensors.init import initialise
from models.tensors.naming import logical_tensors
from models.tensors.products import Fp32Products, add_product, fast_products, multiplies_bf16
from models.towers.text import TextTower
from models.towers.vision import VisionTower

BF16_STEP = 2.0**-8
MODEL = ModelConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=28, patch_size=14, width=32, depth=2, head_width=16, mlp_hidden=64, post_norm=True),
    text=TextConfig(context_length=12, vocab_size=50, width=32, depth=2, heads=2),
)
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "attention", "convolution", "einsum")


class Operators(TorchDispatchMode):
    """Names of the operators with a bf16 operand."""

    def __init__(self) -> None:
        super().__init__()
        self.of_bf16: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(a, Tensor) and a.dtype == torch.bfloat16 for a in args):
            self.of_bf16.add(str(func))
        return func(*args, **(kwargs or {}))

    @property
    def products(self) -> set[str]:
        return {name for name in self.of_bf16 if any(product in name for product in PRODUCTS)}


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def towers(mesh: Mesh) -> list[tuple[Any, Tensor, dict[str, Any]]]:
    """Both towers in bf16 with what they see."""
    vision = VisionTower(MODEL, groups=mesh.vision_groups(), dtype=torch.bfloat16)
    text = TextTower(MODEL, groups=mesh.text_groups(), dtype=torch.bfloat16)
    with torch.no_grad():
        for name, tower in (("vision", vision), ("text", text)):
            initialise(tower, logical_tensors(tower, name, 0, 1), MODEL, 0, 0, 1)
            tower.eval()
    ids = torch.tensor([[7, 3, 49, 0, 0, 0], [5, 5, 2, 8, 6, 49]])
    return [(vision, draw(3, 3, 28, 28).bfloat16(), {"samples": 3}), (text, ids, {})]


@torch.no_grad()
def test_values_are_the_products_rounded_once() -> None:
    a, w, bias, q, c = (draw(*shape).bfloat16() for shape in ((60, 300), (20, 300), (20,), (2, 3, 17, 16), (60, 20)))
    stack = a.view(3, 20, 300)
    cases = {
        "linear": lambda x: F.linear(x(a), x(w), x(bias)),
        "matmul": lambda x: x(a) @ x(w).T,
        "batched": lambda x: x(q) @ x(q).transpose(-1, -2),
        "added": lambda x: x(c).clone().addmm_(x(a), x(w).T),
        "scaled": lambda x: torch.addmm(x(c), x(a), x(w).T, beta=0.5, alpha=2),
        "written": lambda x: torch.addmm(x(bias), x(a), x(w).T, out=torch.empty_like(x(c))),
        "many": lambda x: torch.bmm(x(stack), x(stack).mT, out=x(stack).new_empty(3, 20, 20)),
        "many, added": lambda x: (x(stack) @ x(stack).mT).baddbmm_(x(stack), x(stack).mT, beta=0),
        "attention": lambda x: F.scaled_dot_product_attention(x(q), x(q), x(q)),
        "masked": lambda x: F.scaled_dot_product_attention(x(q), x(q), x(q), attn_mask=q[0, 0, :, :1].T > -1),
        "causal": lambda x: F.scaled_dot_product_attention(x(q), x(q), x(q), is_causal=True),
    }
    for name, product in cases.items():
        with Operators() as seen, Fp32Products():
            found = product(lambda t: t)
        assert found.dtype == torch.bfloat16 and not seen.products, (name, seen.products)
        exact = product(lambda t: t.double())
        assert (found.double() - exact).abs().max() <= BF16_STEP * exact.abs().max(), name
    with Fp32Products():
        untouched = draw(4, 4).half() @ draw(4, 4).half(), a.double() @ w.double().T
    assert torch.equal(untouched[0], draw(4, 4).half() @ draw(4, 4).half())
    assert torch.equal(untouched[1], a.double() @ w.double().T)


def test_attention_is_that_of_fp32_backward_too() -> None:
    gradients = {}
    for dtype in (torch.float64, torch.bfloat16):
        q, k, v = (draw(2, 3, 17, 16 + i)[..., :16].bfloat16().to(dtype).requires_grad_() for i in range(3))
        with Operators() as seen, Fp32Products():
            F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
        assert not seen.products, seen.products
        gradients[dtype] = [q.grad, k.grad, v.grad]
    for found, exact in zip(gradients[torch.bfloat16], gradients[torch.float64], strict=True):
        assert found is not None and exact is not None and found.dtype == torch.bfloat16
        assert (found.double() - exact).abs().max() <= 2 * BF16_STEP * exact.abs().max()


def test_a_sum_in_fp32_takes_a_product_without_rounding() -> None:
    a, b = draw(20, 300).bfloat16(), draw(300, 30).bfloat16()
    total, exact = torch.ones(20, 30), 1 + a.double() @ b.double()
    with Operators() as seen, Fp32Products():
        add_product(total, a, b)
    assert not seen.products and (total - exact).abs().max() < 1e-5 * exact.abs().max()
    rounded = torch.ones(20, 30)
    add_product(rounded, a, b)
    assert torch.equal(rounded, 1 + (a @ b).float())


@torch.no_grad()
def test_no_product_of_a_tower_is_left_in_bf16(mesh: Mesh) -> None:
    for tower, inputs, how in towers(mesh):
        with Operators() as plain:
            expected = tower(inputs, **how)
        with Operators() as seen, Fp32Products():
            found = tower(inputs, **how)
        assert plain.products and not seen.products, seen.products
        assert found.dtype == torch.bfloat16
        cosines = F.cosine_similarity(found.double(), expected.double())
        assert cosines.min() > 1 - 1e-3


def test_only_bf16_on_a_cpu_without_it_is_changed() -> None:
    changed = isinstance(fast_products(torch.device("cpu"), torch.bfloat16), Fp32Products)
    assert changed is not multiplies_bf16()
    with_teacher = fast_products(torch.device("cpu"), torch.float32, torch.bfloat16)
    assert isinstance(with_teacher, Fp32Products) is changed
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        assert not isinstance(fast_products(torch.device(device), dtype), Fp32Products)
