"""What torch.compile makes of the fused functions: the same values, for every number of rows."""

import pytest
import torch

from models.blocks.packages import require_compiler
from models.config import ModelConfigError
from tests.models.test_fused import CASES, inputs_of, passes


def _compiler_is_here() -> bool:
    try:
        require_compiler("model.block_kernels=fused")
    except ModelConfigError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not _compiler_is_here(), reason="needs what torch.compile writes kernels with")
@pytest.mark.parametrize("case", CASES)
def test_a_compiled_function_is_the_function(case: str) -> None:
    norm, inputs = inputs_of(case, torch.bfloat16)
    for part in (slice(None), slice(0, 2)):
        given = [x[part] if x.dim() > 1 else x for x in inputs]
        compiled = passes(CASES[case][0], norm, given)
        with torch.compiler.set_stance("force_eager"):
            written = passes(CASES[case][0], norm, given)
        for mine, reference in zip(compiled, written, strict=True):
            torch.testing.assert_close(mine, reference, rtol=0.02, atol=0.02)
