"""Fused blocks against float64, and what they leave of launches and bytes; their functions run as they are written.

tests/models/test_golden.py compares whole towers of them with the authors' numbers, tests/engine/test_step_options.py
whole steps on several ranks, tests/models/test_fused_compiled.py what the compiler makes of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.operators import count_block, count_caption_block
from engine.config.read import ConfigError, preset_model, resolve
from engine.parallel.mesh import Mesh
from models.blocks.fused.mlp import activated, gated
from models.blocks.fused.norms import added, norm_of_residual, norm_of_stream, residual_of_norm
from models.blocks.fused.turning import turned
from models.blocks.norms import RMSNorm
from models.blocks.outputs import ColumnLinear, RowLinear
from models.blocks.rope import rope_tables, rotate_both
from models.blocks.transformer_config import vision_transformer_config
from models.config import VisionConfig
from models.towers.vision import VisionTower

T, C = 30, 48
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Norm-wise; of an operator that rounds once to bf16 it is 2e-3, of sums of such numbers more."""


GRID = VisionConfig(image_size=42, patch_size=14, head_width=8, rope=True)
"""3 x 3 patches."""


@pytest.fixture(autouse=True)
def _as_written() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def _norm(kind: str, dtype: torch.dtype) -> nn.Module:
    config = vision_transformer_config(
        preset_model("tiny-18b").vision, tensor_size=1, sequence_parallel=False, dtype=dtype, settings={}
    )
    norm = RMSNorm(config, C) if kind == "rms" else nn.LayerNorm(C, eps=1e-6, dtype=dtype)
    with torch.no_grad():
        for i, parameter in enumerate(norm.parameters()):
            parameter.copy_(torch.linspace(0.5, 2, C) - i)
    return norm


def _normed(norm: Any, x: Tensor) -> Tensor:
    """In float64."""
    weight, beta = norm.weight.double(), getattr(norm, "bias", None)
    if beta is not None:
        return F.layer_norm(x, (C,), weight, beta.double(), norm.eps)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * weight


def _gelu(kind: str, x: Tensor) -> Tensor:
    if kind == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def _turned(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    tables = [table[None, :, None] for table in rope_tables(GRID, torch.device("cpu"))]
    wide = [t.double() for t in tables] if q.dtype == torch.float64 else tables
    if q.dtype == torch.float64:
        cos, sin = wide
        return tuple(x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin for x in (q, k))  # type: ignore[return-value]
    return turned(q, k, *tables)


Function = Callable[..., Any]
CASES: dict[str, tuple[Function, Function, list[tuple[int, ...]]]] = {
    **{
        f"residual of a norm, {kind}": (
            lambda norm, r, b, bias: residual_of_norm(norm, r, b, bias),
            lambda norm, r, b, bias: r + _normed(norm, b + bias),
            [(T, 1, C), (T, 1, C), (C,)],
        )
        for kind in ("rms", "layer")
    },
    **{
        f"norm of a residual, {kind}": (
            lambda norm, r, b, bias: norm_of_residual(norm, r, b, bias),
            lambda norm, r, b, bias: (r + b + bias, _normed(norm, r + b + bias)),
            [(T, 1, C), (T, 1, C), (C,)],
        )
        for kind in ("rms", "layer")
    },
    **{
        f"norm of a stream, {kind}": (
            lambda norm, x: norm_of_stream(norm, x),
            lambda norm, x: (x, _normed(norm, x)),
            [(T, 1, C)],
        )
        for kind in ("rms", "layer")
    },
    "norm without a bias, rms": (
        lambda norm, r, b: residual_of_norm(norm, r, b, None),
        lambda norm, r, b: r + _normed(norm, b),
        [(T, 1, C), (T, 1, C)],
    ),
    "sum, rms": (
        lambda _, r, b, bias: added(r, b, bias),
        lambda _, r, b, bias: r + b + bias,
        [(T, 1, C), (T, 1, C), (C,)],
    ),
    **{
        f"{kind}, rms": (
            lambda _, x, bias, kind=kind: activated(x, bias, kind),
            lambda _, x, bias, kind=kind: _gelu(kind, x + bias),
            [(T, 1, C), (C,)],
        )
        for kind in ("gelu", "quick_gelu", "gelu_tanh")
    },
    "swiglu and norm, layer": (
        lambda norm, g, u: gated(g, u, norm),
        lambda norm, g, u: _normed(norm, F.silu(g) * u),
        [(T, 1, C), (T, 1, C)],
    ),
    "swiglu, rms": (lambda _, g, u: gated(g, u, None), lambda _, g, u: F.silu(g) * u, [(T, 1, C), (T, 1, C)]),
    "rope, rms": (lambda _, q, k: _turned(q, k), lambda _, q, k: _turned(q, k), [(3, 10, 4, 8), (3, 10, 4, 8)]),
}


def passes(function: Function, norm: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients of inputs and of the norm's parameters, for a fixed function of the outputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    answer = function(norm, *inputs)
    outputs = list(answer) if isinstance(answer, tuple) else [answer]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outputs]
    wanted = [*inputs, *norm.parameters()]
    found = torch.autograd.grad(outputs, wanted, weights, allow_unused=True)
    return [*(out.detach() for out in outputs), *(g for g in found if g is not None)]


def inputs_of(case: str, dtype: torch.dtype) -> tuple[nn.Module, list[Tensor]]:
    """The norm and the inputs of a case."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator).to(dtype) for shape in CASES[case][2]]
    return _norm(case.rsplit(" ", 1)[1], dtype), drawn


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_float64(case: str, dtype: torch.dtype) -> None:
    norm, inputs = inputs_of(case, dtype)
    ours, exact, _ = CASES[case]
    found, wanted = passes(ours, norm, inputs), passes(exact, norm, [x.double() for x in inputs])
    assert len(found) == len(wanted) >= 2
    for mine, reference in zip(found, wanted, strict=True):
        assert mine.dtype == dtype
        assert float((mine.double() - reference).norm() / reference.norm()) < ROUNDING[dtype], case


def test_rope_is_the_eager_one() -> None:
    q, k = torch.randn(2, 3, 10, 4, 8)
    tables = [table[None, :, None] for table in rope_tables(GRID, torch.device("cpu"))]
    for mine, eager in zip(turned(q, k, *tables), rotate_both(q, k, *tables), strict=True):
        torch.testing.assert_close(mine, eager)


# --- products ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def linear(mesh: Mesh) -> ColumnLinear:
    """C -> 2 C with a bias."""
    return _build(ColumnLinear, mesh, C, 2 * C, gather_output=False)


def _build(kind: Any, mesh: Mesh, inputs: int, outputs: int, **more: Any) -> Any:
    config = vision_transformer_config(
        preset_model("tiny-18b").vision, tensor_size=1, sequence_parallel=False, dtype=torch.float32, settings={}
    )
    built = kind(
        inputs, outputs, config=config, init_method=nn.init.ones_, bias=True, skip_bias_add=True,
        is_expert=False, tp_group=mesh.tensor.group, **more,
    )  # fmt: skip
    with torch.no_grad():
        built.weight.copy_(torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(2)))
    return built


def test_the_gradient_of_a_weight_goes_into_its_sum(linear: ColumnLinear) -> None:
    x = torch.randn(T, 1, C, requires_grad=True)
    linear.weight.main_grad = torch.ones(2 * C, C)
    out, passed = linear.product(x, linear.bias)
    gradient, around = torch.randn(T, 1, 2 * C), torch.randn(T, 1, C)
    expected = around.flatten(0, 1) + gradient.flatten(0, 1) @ linear.weight.detach()
    torch.autograd.backward([out, passed], [gradient, around])
    sums = 1 + gradient.flatten(0, 1).t() @ x.detach().flatten(0, 1)
    torch.testing.assert_close(linear.weight.main_grad, sums)
    assert linear.weight.grad_added_to_main_grad
    assert x.grad is not None and linear.bias.grad is not None
    torch.testing.assert_close(x.grad.flatten(0, 1), expected)
    torch.testing.assert_close(linear.bias.grad, gradient.sum((0, 1)))


def test_a_gradient_that_others_may_read_is_left_as_it_is(linear: ColumnLinear) -> None:
    x = torch.randn(T, 1, C, requires_grad=True)
    around = torch.randn(T, 1, C)
    for own in (False, True):
        given = around.clone()
        torch.autograd.backward([*linear.product(x, own=own)], [torch.ones(T, 1, 2 * C), given])
        assert torch.equal(given, around) != own


def test_a_tower_leaves_the_gradient_that_it_is_given(mesh: Mesh) -> None:
    from tests.models.backend_cases import build

    for fixture in ("tiny-18b", "tiny-8b", "tiny-eva02-B"):
        tower = build(fixture, {"block_kernels": "fused"}, mesh, layers=range(1, 3))
        x = torch.randn(34, 1, tower.vision.width, requires_grad=True)
        out = tower(x, None, samples=2)
        gradient = torch.randn_like(out)
        before = gradient.clone()
        out.backward(gradient)
        assert torch.equal(gradient, before), fixture


def test_a_product_without_a_sum_has_a_gradient(mesh: Mesh) -> None:
    last = _build(RowLinear, mesh, C, C, input_is_parallel=True)
    out, bias = last.product(torch.ones(T, 1, C))
    out.sum().backward()
    assert bias is last.bias
    torch.testing.assert_close(last.weight.grad, torch.full((C, C), float(T)))


# --- counted ----------------------------------------------------------------------------------------------------------

LIMITS = {"18b": (9, 16, 44, 80), "8b": (9, 16, 44, 80), "b16": (9, 24, 100, 130), "l14": (9, 24, 100, 130)}
"""Preset -> launches forward and backward, bytes a token and channel forward and backward."""


@pytest.mark.parametrize("preset", LIMITS)
def test_launches_and_bytes_between_products(preset: str, mesh: Mesh) -> None:
    found = count_block(replace(preset_model(preset), block_kernels="fused"), mesh)
    launches = tuple(counts.launches["other"] for counts in (found.forward, found.backward))
    counted = (*launches, *found.per_channel())
    assert all(number <= limit for number, limit in zip(counted, LIMITS[preset], strict=True)), counted
    assert min(counted) > 1


def test_gradients_of_fused_blocks_in_bf16_are_nearer_to_fp32_than_those_of_separate_operators(mesh: Mesh) -> None:
    """Their curves part after a few steps at a high rate: it is the separate operators that round more often."""
    found: dict[tuple[str, torch.dtype], Tensor] = {}
    for kernels, dtype in (("torch", torch.float32), ("torch", torch.bfloat16), ("fused", torch.bfloat16)):
        model = replace(preset_model("tiny-18b"), block_kernels=kernels)
        tower = VisionTower(model, groups=mesh.vision_groups(), layers=range(4), dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape, own=generator: torch.randn(*shape, generator=own).bfloat16()  # noqa: E731
        with torch.no_grad():
            for parameter in tower.parameters():
                parameter.copy_(draw(*parameter.shape) / (10 if parameter.dim() > 1 else 1))
        x = draw(4 * model.vision.tokens, 1, model.vision.width).to(dtype).requires_grad_()
        out = tower.run_blocks(x, tower._tokens(4, None, torch.device("cpu")))
        out.backward(draw(*out.shape).to(dtype))
        gradients = [x.grad, *(parameter.grad for parameter in tower.parameters())]
        found[kernels, dtype] = torch.cat(
            [g.double().flatten() / g.double().norm() for g in gradients if g is not None]
        )
    exact = found["torch", torch.float32]
    separate, fused = ((found[kernels, torch.bfloat16] - exact).norm() for kernels in ("torch", "fused"))
    assert fused < 0.85 * separate, (fused, separate)


def test_launches_and_bytes_of_a_captions_block(mesh: Mesh) -> None:
    """The counter's 60 and 79 bytes of separate operators, with torch's LayerNorm in one, are 34 and 69."""
    found = {}
    for kernels in ("torch", "fused"):
        counts = count_caption_block(replace(preset_model("18b"), block_kernels=kernels), mesh)
        launches = [one.launches["other"] for one in (counts.forward, counts.backward)]
        found[kernels] = *launches, *(round(size) for size in counts.per_channel())
    assert found == {"torch": (8, 18, 60, 79), "fused": (4, 15, 34, 69)}


def test_the_count_of_separate_operators_is_known(mesh: Mesh) -> None:
    """The counter sees what speed was planned with: 128 and 212 bytes."""
    found = count_block(replace(preset_model("18b"), block_kernels="torch"), mesh)
    assert [round(value) for value in found.per_channel()] == [128, 212]


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("model.backend=transformer_engine", r"block_kernels=fused works on the linears of model\.backend=local, not"),
        ("model.norm_kernel=compiled", r"has norms of its own, not those of model\.norm_kernel=compiled: set"),
        ("model.block_kernels=some", r"block_kernels is 'some': choose one of auto, torch, fused"),
    ],
)
def test_other_kernels_beside_it_are_refused(option: str, message: str) -> None:
    base = ["model.preset=tiny-18b", "model.block_kernels=fused", "train.precision=bf16"]
    with pytest.raises(ConfigError, match=message):
        resolve({"data": {"shards": ["-"]}}, [o for o in base if o.split("=")[0] != option.split("=")[0]] + [option])
