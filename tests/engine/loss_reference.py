"""What the tests of the losses compare with: the full B × B matrix in float64 under autograd, and input."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
    i2t_top1: Tensor | None
    t2i_top1: Tensor | None
    grad_bias: Tensor | None = None


def pairs(rows: int, width: int = 24, *, noise: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """L2-normalised images and texts [rows, width], float64; the texts are noisy copies of the images."""
    generator = torch.Generator().manual_seed(seed)
    image, other = (torch.randn(rows, width, dtype=torch.float64, generator=generator) for _ in range(2))
    return F.normalize(image, dim=1), F.normalize(F.normalize(image, dim=1) + noise * other, dim=1)


def equal_in_some_column(ids: Tensor) -> Tensor:
    """bool [B, B]: which two other rows of ids [B, k] share an entry."""
    equal = (ids[:, None] == ids[None]).any(2)
    return equal & ~torch.eye(len(ids), dtype=torch.bool)


def contrastive_reference(image: Tensor, text: Tensor, scale: float, copies: Tensor | None = None) -> Reference:
    """Mean of the cross-entropies of rows and columns; pairs with equal `copies` are no negatives of each other."""
    image, text, sigma = _leaves(image, text, scale)
    logits = sigma * image @ text.t()
    if copies is not None:
        logits = logits.masked_fill(equal_in_some_column(copies), float("-inf"))
    labels = torch.arange(len(logits))
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2
    return _reference(loss, logits, image, text, sigma)


def nested_reference(
    reference: Callable[..., Reference], image: Tensor, text: Tensor, *arguments: float, widths: Sequence[int]
) -> Reference:
    """The mean over the widths, by the chain rule through the normalisation, under autograd."""
    image, text = (rows.detach().double().requires_grad_() for rows in (image, text))
    parts = []
    for width in widths:
        units = [F.normalize(rows[:, :width], dim=1) for rows in (image, text)]
        part = reference(*units, *arguments)
        pulled = torch.autograd.grad(units, [image, text], [part.grad_image, part.grad_text])
        parts.append(replace(part, grad_image=pulled[0], grad_text=pulled[1]))
    names = [name for name, value in vars(parts[0]).items() if value is not None and not name.endswith("top1")]
    return replace(parts[-1], **{name: torch.stack([getattr(part, name) for part in parts]).mean(0) for name in names})


def sigmoid_reference(
    image: Tensor, text: Tensor, scale: float, bias: float, copies: Tensor | None = None
) -> Reference:
    """Sum of -log sigmoid(z · logit) over all pairs, over the number of rows; without those of equal `copies`."""
    image, text, sigma = _leaves(image, text, scale)
    beta = torch.tensor(bias, dtype=torch.float64, requires_grad=True)
    logits = sigma * image @ text.t() + beta
    if copies is not None:
        logits = logits.masked_fill(equal_in_some_column(copies), float("-inf"))
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
