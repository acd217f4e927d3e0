"""The contrastive and the sigmoid loss in one process, against the full matrix in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.objectives.contrastive.sigmoid import sigmoid_loss
from engine.objectives.contrastive.softmax import contrastive_loss
from engine.objectives.contrastive.tiles import bfloat16_factors
from tests.engine.loss_reference import contrastive_reference, pairs, sigmoid_reference, worst_error

ROWS = 19
TILES = [1, 2, 10, 18, 19, 32]


@pytest.mark.parametrize("keep_bytes", [0, 2**20])
@pytest.mark.parametrize("tile", TILES)
def test_float64_equals_the_full_matrix(tile: int, keep_bytes: int) -> None:
    image, text = pairs(ROWS)
    result = contrastive_loss(image, text, 14.2857, tile=tile, keep_bytes=keep_bytes)
    assert result.loss.dtype == torch.float64
    assert worst_error(result, contrastive_reference(image, text, 14.2857)) < 1e-12


@pytest.mark.parametrize("scale", [1.0, 100.0, 1000.0])
@pytest.mark.parametrize("tile", [1, 10, None])
def test_large_logits_neither_overflow_nor_lose_digits(scale: float, tile: int | None) -> None:
    image, text = pairs(ROWS)
    result = contrastive_loss(image.float(), text.float(), torch.tensor(scale), tile=tile)
    expected = contrastive_reference(image.float(), text.float(), scale)
    assert worst_error(result, expected) < 1e-6 * max(scale, 10.0)


def test_wrong_pairs_at_a_large_scale_stay_finite() -> None:
    image, _ = pairs(ROWS)
    result = contrastive_loss(image.float(), -image.float(), 1000.0, tile=7)
    assert worst_error(result, contrastive_reference(image.float(), -image.float(), 1000.0)) < 1e-4


def test_well_matched_pairs_keep_the_digits_of_a_tiny_loss() -> None:
    image, text = pairs(ROWS, 64, noise=0.02)
    result = contrastive_loss(image.float(), text.float(), 100.0, tile=8)
    expected = contrastive_reference(image.float(), text.float(), 100.0)
    assert expected.loss < 1e-10  # a difference of two fp32 numbers near 100 could not show it
    assert worst_error(result, expected) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_embeddings_have_float32_logits(dtype: torch.dtype) -> None:
    image, text = (rows.to(dtype) for rows in pairs(ROWS))
    result = contrastive_loss(image, text, 100.0, tile=10)
    assert result.grad_image.dtype == torch.float32
    assert worst_error(result, contrastive_reference(image, text, 100.0)) < 2e-5


def test_one_pair_has_no_loss() -> None:
    image, text = pairs(1)
    result = contrastive_loss(image, text, 100.0)
    assert result.loss == 0 and result.i2t_top1 == 1 and result.grad_logit_scale == 0
    assert not result.grad_image.any() and not result.grad_text.any()


def test_a_tie_counts_as_correct_and_a_better_stranger_does_not() -> None:
    axes = torch.eye(4)
    image = axes[[0, 0, 1, 2]]
    text = axes[[0, 0, 1, 3]]
    text[3] = axes[1]
    result = contrastive_loss(image, text, 10.0, tile=2)
    # Images 0 and 1 tie between texts 0 and 1; image 3 is orthogonal to all texts: again a tie.
    assert result.i2t_top1 == 1.0
    # Text 3 is image 2's direction, so image 2 beats its own image.
    assert result.t2i_top1 == 0.75


def test_the_scale_may_be_a_learned_parameter_and_the_inputs_may_need_gradients() -> None:
    image, text = pairs(ROWS)
    scale = torch.nn.Parameter(torch.tensor(20.0, dtype=torch.float64))
    result = contrastive_loss(image.requires_grad_(), text.requires_grad_(), scale)
    assert not result.loss.requires_grad and not result.grad_image.requires_grad
    assert worst_error(result, contrastive_reference(image, text, 20.0)) < 1e-12


class _LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return out


@pytest.mark.parametrize("loss", ["contrastive", "sigmoid"])
def test_no_tensor_grows_with_the_square_of_the_batch(loss: str) -> None:
    rows, width, tile = 128, 8, 16
    image, text = pairs(rows, width)
    with _LargestTensor() as largest:
        if loss == "contrastive":
            contrastive_loss(image, text, 100.0, tile=tile, keep_bytes=0)
        else:
            sigmoid_loss(image, text, 10.0, -10.0, tile=tile)
    assert 0 < largest.elements <= max(rows * width, 2 * tile * tile)


@pytest.mark.parametrize("tile", TILES)
def test_sigmoid_float64_equals_the_full_matrix(tile: int) -> None:
    image, text = pairs(ROWS)
    result = sigmoid_loss(image, text, 10.0, -10.0, tile=tile)
    assert worst_error(result, sigmoid_reference(image, text, 10.0, -10.0)) < 1e-12


@pytest.mark.parametrize(("scale", "bias"), [(100.0, -50.0), (1000.0, 0.0)])
def test_sigmoid_at_large_logits(scale: float, bias: float) -> None:
    image, text = (rows.to(torch.bfloat16) for rows in pairs(ROWS))
    result = sigmoid_loss(image, text, scale, torch.tensor(bias), tile=8)
    assert worst_error(result, sigmoid_reference(image, text, scale, bias)) < 2e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": torch.zeros(3, 4)}, r"image \(2, 4\) and text \(3, 4\)"),
        ({"text": torch.zeros(2, 4, dtype=torch.float64)}, "make them equal"),
        ({"tile": 0}, "tile is 0"),
        ({"variant": "rings"}, "variant is 'rings'"),
        ({"row_counts": [2, 2]}, r"row_counts \[2, 2\] do not fit"),
        ({"image": torch.zeros(0, 4), "text": torch.zeros(0, 4)}, "no rows"),
        ({"image": torch.zeros(2, 4).long(), "text": torch.zeros(2, 4).long()}, "floating point"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    arguments: dict[str, Any] = {"image": torch.zeros(2, 4), "text": torch.zeros(2, 4), "logit_scale": 1.0} | change
    with pytest.raises(ValueError, match=message):
        contrastive_loss(**arguments)


def test_three_bfloat16_products_are_a_float32_one() -> None:
    """As a GPU multiplies embeddings (tensor cores add exact products of bfloat16 in float32)."""
    generator = torch.Generator().manual_seed(0)
    image = torch.nn.functional.normalize(torch.randn(64, 1536, generator=generator), dim=-1)
    text = torch.nn.functional.normalize(image + 0.5 * torch.randn(64, 1536, generator=generator) / 39, dim=-1)
    exact = 100 * image.double() @ text.double().t()
    factors = bfloat16_factors(image, text.t())
    assert len(factors) == 3
    assert all(part.dtype == torch.bfloat16 for pair in factors for part in pair)
    error = (100 * sum(a.float() @ b.float() for a, b in factors) - exact).abs().max()
    assert error < 1e-4
    assert (100 * (image.bfloat16().float() @ text.bfloat16().float().t()) - exact).abs().max() > 1e-2
    assert bfloat16_factors(image.bfloat16(), text.bfloat16().t())[0][0].dtype == torch.bfloat16
