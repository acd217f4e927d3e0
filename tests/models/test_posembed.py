"""Position tables and patch kernels between resolutions against the authors' resize."""

import pytest
import torch

from models.towers.posembed import resize_patch_kernel, resize_pos_embed
from tests.golden import load_json, load_tensors

CASES = {case["key"]: case for case in load_json("g6-posembed/meta.json")}


@pytest.mark.parametrize("key", CASES)
def test_position_table(key: str) -> None:
    tensors = load_tensors("g6-posembed/posembed")
    resized = resize_pos_embed(tensors[f"{key}.pos_in"][0], CASES[key]["dst_grid"])
    torch.testing.assert_close(resized, tensors[f"{key}.pos_out"][0], rtol=1e-5, atol=1e-5)
    assert torch.equal(resized[0], tensors[f"{key}.pos_in"][0, 0])


@pytest.mark.parametrize("key", CASES)
def test_patch_kernel(key: str) -> None:
    tensors = load_tensors("g6-posembed/posembed")
    resized = resize_patch_kernel(tensors[f"{key}.kernel_in"], CASES[key]["dst_patch"])
    torch.testing.assert_close(resized, tensors[f"{key}.kernel_out"], rtol=1e-5, atol=1e-5)


def test_an_equal_grid_is_left_alone() -> None:
    table = torch.randn(17, 8)
    assert resize_pos_embed(table, 4) is table


def test_bf16_tables_are_resized_in_fp32() -> None:
    table = torch.randn(17, 8)
    resized = resize_pos_embed(table.bfloat16(), 6)
    assert resized.dtype == torch.bfloat16
    assert torch.equal(resized, resize_pos_embed(table.bfloat16().float(), 6).bfloat16())


def test_a_table_that_is_no_square_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="19 rows"):
        resize_pos_embed(torch.zeros(19, 8), 6)
