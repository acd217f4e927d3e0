"""One loss for several widths of the embedding: its first 256 numbers are an embedding, too, and so on.

Source: Kusupati et al. 2022, "Matryoshka Representation Learning", equation 1 with equal weights: the mean over the
widths d of the loss of the first d numbers, L2-normalised anew. Each is the whole loss over the global batch, so the
sum is as exact as one.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from engine.objectives.contrastive.sigmoid import SigmoidLoss
from engine.objectives.contrastive.softmax import ContrastiveLoss

R = TypeVar("R", ContrastiveLoss, SigmoidLoss)


@torch.no_grad()
def nested_loss(loss: Callable[[Tensor, Tensor], R], image: Tensor, text: Tensor, widths: Sequence[int]) -> R:
    """The mean of `loss` over the widths, and its gradients.

    image, text: L2-normalised embeddings [rows, D]. widths: rising, the last D; empty is the loss itself. The
    accuracies are those of the last width. Collective as the loss is.
    """
    if not widths:
        return loss(image, text)
    grads = [rows.new_zeros(rows.shape) for rows in (image, text)]
    results: list[R] = [_add_width(loss, (image, text), width, grads, len(widths)) for width in widths]
    scalars = ["loss", "grad_logit_scale", *(["grad_bias"] if isinstance(results[-1], SigmoidLoss) else [])]
    means: dict[str, Any] = {
        name: torch.stack([getattr(result, name) for result in results]).mean() for name in scalars
    }
    return replace(results[-1], **means)


def _add_width(
    loss: Callable[[Tensor, Tensor], R], rows: Sequence[Tensor], width: int, grads: Sequence[Tensor], widths: int
) -> R:
    """The loss of the first `width` numbers; it holds `grads`, to which its share of `widths` is added."""
    parts = [whole[:, :width] for whole in rows]
    norms = [part.norm(dim=1, keepdim=True).clamp_min(1e-12) for part in parts]
    units = [part / norm for part, norm in zip(parts, norms, strict=True)]
    result = loss(*units)
    of_units = (result.grad_image, result.grad_text)
    for grad, unit, norm, of_unit in zip(grads, units, norms, of_units, strict=True):
        radial = (of_unit * unit).sum(1, keepdim=True)  # the norm does not matter, so nothing pulls along it
        grad[:, :width] += (of_unit - radial * unit) / (norm * widths)
    return replace(result, grad_image=grads[0], grad_text=grads[1])
