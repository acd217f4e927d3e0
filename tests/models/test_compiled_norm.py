"""The norm that torch.compile writes against the eager one: values, gradients, what it keeps, where it is refused."""

from functools import partial

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from engine.pipeline.memory import saved_bytes
from models.blocks.norms import CompiledRMSNorm, PostNormResidual, RMSNorm
from models.blocks.packages import require_compiler
from models.config import ModelConfigError

WIDTH = 64


def _compiler_is_here() -> bool:
    try:
        require_compiler("model.norm_kernel=compiled")
    except ModelConfigError:
        return False
    return True


def _residual(norm: type[RMSNorm]) -> PostNormResidual:
    config = TransformerConfig(num_layers=1, hidden_size=WIDTH, num_attention_heads=1, layernorm_epsilon=1e-6)
    residual = PostNormResidual(config, norm)
    with torch.no_grad():
        residual.get_parameter("norm.weight").copy_(torch.linspace(0.5, 2, WIDTH))
    return residual


def _values(module: PostNormResidual, rows: int, bias: Tensor | None) -> list[Tensor]:
    """Output and gradients of stream, branch, gain and bias."""
    generator = torch.Generator().manual_seed(rows)
    stream, branch, weights = (torch.randn(rows, 1, WIDTH, generator=generator) for _ in range(3))
    gain = module.get_parameter("norm.weight")
    inputs = [stream.requires_grad_(), branch.requires_grad_(), gain, *([] if bias is None else [bias])]
    out = module(True, False)((branch, bias), stream, 0.0)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


@pytest.mark.slow
@pytest.mark.skipif(not _compiler_is_here(), reason="needs what torch.compile writes kernels with")
def test_the_compiled_norm_is_the_norm() -> None:
    eager, compiled = _residual(RMSNorm), _residual(CompiledRMSNorm)
    bias = torch.linspace(-1, 1, WIDTH, requires_grad=True)
    for rows in (48, 20):
        for value, reference in zip(_values(compiled, rows, bias), _values(eager, rows, bias), strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)
    stream, branch = torch.randn(2, 48, 1, WIDTH, requires_grad=True)
    kept = [
        saved_bytes(partial(module(True, False), (branch, bias), stream, 0.0), [bias, *module.parameters()])
        for module in (compiled, eager)
    ]
    assert kept[0] <= kept[1], "the memory that the planner counts"


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ModelConfigError, match=r"needs a C\+\+ compiler \(no-such-compiler\).*norm_kernel=torch"):
        require_compiler("model.norm_kernel=compiled")
