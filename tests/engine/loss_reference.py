"""What the tests of the losses compare with: the full B × B matrix in float64 under autograd, and input."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Loss, gradients and accuracies of the whole batch, float64."""

    loss: Tensor
    grad_image: Tensor
    grad_text: Tensor
    grad_logit_scale: Tensor
    i2t_top1: Tensor
    t2i_top1: Tensor
    grad_bias: Tensor | None = None


def pairs(rows: int, width: int = 24, *, noise: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """L2-normalised images and texts [rows, width], float64; the texts are noisy copies of the images."""
    generator = torch.Generator().manual_seed(seed)
    image, other = (torch.randn(rows, width, dtype=torch.float64, generator=generator) for _ in range(2))
    return F.normalize(image, dim=1), F.normalize(F.normalize(image, dim=1) + noise * other, dim=1)


def contrastive_reference(image: Tensor, text: Tensor, scale: float) -> Reference:
    """Mean of the cross-entropies of rows and columns."""
    image, text, sigma = _leaves(image, text, scale)
    logits = sigma * image @ text.t()
    labels = torch.arange(len(logits))
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2
    return _reference(loss, logits, image, text, sigma)


def sigmoid_reference(image: Tensor, text: Tensor, scale: float, bias: float) -> Reference:
    """Sum of -log sigmoid(z · logit) over all pairs, over the number of rows."""
    image, text, sigma = _leaves(image, text, scale)
    beta = torch.tensor(bias, dtype=torch.float64, requires_grad=True)
    logits = sigma * image @ text.t() + beta
    signs = 2 * torch.eye(len(logits), dtype=torch.float64) - 1
    loss = -F.logsigmoid(signs * logits).sum() / len(logits)
    return _reference(loss, logits, image, text, sigma, beta)


def worst_error(result: Any, reference: Reference, own: slice = slice(None)) -> float:
    """Largest norm-wise relative error of any field of a result; own: the rows of the rank that gave it."""
    errors = []
    for name, expected in vars(reference).items():
        if expected is None:
            continue
        got = getattr(result, name).double()
        expected = expected[own] if expected.ndim else expected
        assert got.shape == expected.shape, f"{name}: {tuple(got.shape)} instead of {tuple(expected.shape)}"
        if expected.numel():
            errors.append(((got - expected).norm() / expected.norm().clamp_min(1e-12)).item())
    assert all(error == error for error in errors), f"NaN among the errors {errors}"
    return max(errors)


def _leaves(image: Tensor, text: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    sigma = torch.tensor(scale, dtype=torch.float64)
    image, text, sigma = (value.detach().double().requires_grad_() for value in (image, text, sigma))
    return image, text, sigma


def _reference(
    loss: Tensor, logits: Tensor, image: Tensor, text: Tensor, sigma: Tensor, beta: Tensor | None = None
) -> Reference:
    leaves = [image, text, sigma] if beta is None else [image, text, sigma, beta]
    grads = torch.autograd.grad(loss, leaves)
    labels = torch.arange(len(logits))
    return Reference(
        loss=loss.detach(),
        grad_image=grads[0],
        grad_text=grads[1],
        grad_logit_scale=grads[2],
        grad_bias=grads[3] if beta is not None else None,
        i2t_top1=(logits.argmax(1) == labels).double().mean(),
        t2i_top1=(logits.argmax(0) == labels).double().mean(),
    )
