"""Gradients that go into their fp32 sums where they are computed: the same numbers, no pass over a weight or table."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.config.read import preset_model
from engine.parallel.mesh import Mesh
from models.blocks.outputs import ColumnLinear
from models.tensors.products import Fp32Products
from models.tensors.sums import SummedLinear, looked_up, multiplied_apart
from models.towers.vision import VisionTower
from tests.models.test_fused import C, T, _build

ROWS, WIDTH = 40, 8
IDS = torch.tensor([[3, 0, 0, 39], [3, 3, 0, 7]])


class Passes(TorchDispatchMode):
    """Operators that write a tensor of these shapes, views and new memory apart; and casts, by their shape."""

    def __init__(self, shapes: set[tuple[int, ...]]):
        super().__init__()
        self.shapes, self.writes, self.casts = shapes, Counter[str](), Counter[tuple[int, ...]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if name == "_to_copy":
            self.casts.update(tuple(t.shape) for t in made)
        if not func.is_view and not name.startswith("empty") and any(tuple(t.shape) in self.shapes for t in made):
            self.writes[name] += 1
        return out


def _table(dtype: torch.dtype) -> Any:  # DistributedDataParallel gives a parameter its sum
    return nn.Parameter(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tables_gradients_are_added_to_its_sum_row_by_row(dtype: torch.dtype) -> None:
    table, gradient = _table(dtype), torch.randn(2, 4, WIDTH).to(dtype)
    before = torch.randn(ROWS, WIDTH)
    table.main_grad = before.clone()
    with Passes({(ROWS, WIDTH)}) as seen:
        rows = looked_up(table, IDS)
        rows.backward(gradient)
    assert torch.equal(rows, table.detach()[IDS])
    exact = before.double()
    for token, of_token in zip(IDS.flatten().tolist(), gradient.flatten(0, 1).double(), strict=True):
        exact[token] += of_token
    assert (table.main_grad - exact).abs().max() < 1e-6
    assert table.grad_added_to_main_grad
    assert seen.writes == {"index_add_": 1}, seen.writes


def test_a_row_with_many_gradients_is_not_rounded_in_between() -> None:
    table, count = _table(torch.bfloat16), 2000
    table.main_grad = torch.zeros(ROWS, WIDTH)
    looked_up(table, torch.zeros(count, dtype=torch.int64)).backward(torch.ones(count, WIDTH, dtype=torch.bfloat16))
    assert torch.equal(table.main_grad[0], torch.full((WIDTH,), float(count)))


def test_without_a_sum_the_gradient_is_the_tables_own() -> None:
    table = _table(torch.float32)
    looked_up(table, IDS).sum().backward()
    assert table.grad is not None
    assert table.grad[:, 0].tolist() == torch.bincount(IDS.flatten(), minlength=ROWS).tolist()
    assert looked_up(table.detach(), IDS).shape == (2, 4, WIDTH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_linear_adds_its_gradients_to_the_sum_of_its_weight(dtype: torch.dtype) -> None:
    """Also of two inputs that have rows of the weight each, as a probe's query and the tokens' keys have."""
    torch.manual_seed(0)
    plain, own = nn.Linear(5, 9, dtype=dtype), SummedLinear(5, 9, dtype=dtype)
    own.load_state_dict(plain.state_dict())
    weight: Any = own.weight
    probe, tokens = torch.randn(5).to(dtype), torch.randn(2, 7, 5).to(dtype)
    gradients = [torch.randn(*shape).to(dtype) for shape in ((3,), (2, 7, 6), (2, 7, 9))]
    found = []
    for linear in (plain, own):
        xs = [x.clone().requires_grad_() for x in (probe, tokens)]
        if linear is own:
            weight.main_grad = torch.ones(9, 5)
        parts = multiplied_apart(linear.weight, linear.bias, (xs[0], slice(0, 3)), (xs[1], slice(3, None)))
        whole = linear(xs[1])
        with Passes({(9, 5)}) as seen:
            torch.autograd.backward([*parts, whole], gradients)
        assert linear.bias.grad is not None
        found.append(([*parts, whole], [x.grad for x in xs], linear.bias.grad))
    (outputs, of_xs, of_bias), (own_outputs, own_of_xs, own_of_bias) = found
    assert all(map(torch.equal, outputs, own_outputs)) and torch.equal(of_bias, own_of_bias)
    assert all(
        one is not None and other is not None and one.equal(other) for one, other in zip(of_xs, own_of_xs, strict=True)
    )
    rows, of_rows = tokens.double().flatten(0, 1), [g.double().reshape(-1, g.shape[-1]) for g in gradients]
    exact = 1 + torch.cat([of_rows[0].t() @ probe.double()[None], of_rows[1].t() @ rows]) + of_rows[2].t() @ rows
    assert (weight.main_grad - exact).abs().max() <= (1e-5 if dtype == torch.float32 else 2**-8) * exact.abs().max()
    assert weight.grad_added_to_main_grad and ("mm" not in seen.writes) == (dtype == torch.float32)


def test_a_linear_that_has_no_sum_or_is_not_trained_is_torchs() -> None:
    linear = SummedLinear(4, 3)
    linear(torch.randn(2, 4)).sum().backward()
    assert linear.weight.grad is not None and linear.weight.grad.any()
    weight: Any = linear.requires_grad_(False).weight
    weight.main_grad = torch.zeros(3, 4)
    assert not linear(torch.randn(2, 4)).requires_grad


def test_the_gradient_of_an_output_is_cast_once(mesh: Mesh) -> None:
    linear: ColumnLinear = _build(ColumnLinear, mesh, C, 2 * C, gather_output=False).bfloat16()
    linear.weight.main_grad = torch.zeros(2 * C, C)
    x, gradient = (torch.randn(T, 1, n).bfloat16() for n in (C, 2 * C))
    x.requires_grad_()
    with Fp32Products():
        out, passed = linear.product(x)
        with Passes(set()) as seen:
            torch.autograd.backward([out, passed], [gradient, torch.ones_like(passed)])
    assert seen.casts[T, 2 * C] == 1 and seen.casts[2 * C, T] == 0, seen.casts
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    of_x = 1 + gradient.double().squeeze(1) @ linear.weight.detach().double()
    assert (x.grad.squeeze(1).double() - of_x).abs().max() <= 2**-8 * of_x.abs().max()
    of_weight = gradient.double().squeeze(1).t() @ x.detach().double().squeeze(1)
    assert (linear.weight.main_grad - of_weight).abs().max() < 1e-4


@pytest.mark.parametrize("kernels", ["torch", "fused"])
@pytest.mark.parametrize("preset", ["tiny-18b", "tiny-8b"])
def test_the_lowest_trained_block_has_no_gradient_for_what_is_frozen(preset: str, kernels: str, mesh: Mesh) -> None:
    """Post-norm blocks multiply their input as it is; in pre-norm ones a norm that is trained stands before it."""
    model = replace(preset_model(preset), block_kernels=kernels)
    tower = VisionTower(model, groups=mesh.vision_groups(), layers=range(1, 2))
    for parameter in tower.parameters():
        nn.init.normal_(parameter, std=0.1)
    tokens, found = tower._tokens(2, None, torch.device("cpu")), []
    for wants_gradient in (True, False):
        shape = (2 * model.vision.tokens, 1, model.vision.width)
        x = torch.linspace(-1, 1, math.prod(shape)).view(shape).requires_grad_(wants_gradient)
        with torch.compiler.set_stance("force_eager"):
            tower.zero_grad()
            with _Products() as seen:
                tower.run_blocks(x, tokens).square().sum().backward()
        found.append((seen.rows, {name: p.grad for name, p in tower.named_parameters()}))
    (whole, gradients), (less, same) = found
    one = [(2 * model.vision.tokens, 3 * model.vision.width, model.vision.width)]
    assert whole - less == Counter(one if model.vision.post_norm else []) and not less - whole
    assert all(g is not None and torch.equal(g, same[name]) for name, g in gradients.items())  # type: ignore[arg-type]


class _Products(TorchDispatchMode):
    """Matrix products, by their three sides (rows, summed over, columns)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.rows[a.shape[0], a.shape[1], b.shape[1]] += 1
        return func(*args, **(kwargs or {}))
