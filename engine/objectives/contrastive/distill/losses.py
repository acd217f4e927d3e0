"""What frozen teachers add to the contrastive loss: feature, interactive and relational losses, each with its weight.

Source: CLIP-KD (Yang et al. 2024, arXiv 2307.12732, section 3), over the global batch of B pairs with the student's
embeddings I, T and the teacher's I', T':
    feature      1/(2B) Σ_i (|I_i − I'_i|² + |T_i − T'_i|²), which for unit vectors is 1/B Σ_i (1 − cos) of both towers
    interactive  ½ [loss(I, T') + loss(I', T)] with the job's own loss, scale and bias (CLIP-KD: images and captions of
                 the student as anchors alone; here rows and columns, as in the loss itself)
    relational   relational.py
Teachers get no gradient, and each loss is a sum over rows or over tiles of the whole matrix: no layout changes it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from engine.config.read import TeacherConfig
from engine.objectives.contrastive.distill.relational import Term, relational_loss
from engine.objectives.contrastive.exchange import RowExchange
from engine.objectives.contrastive.sigmoid import SigmoidLoss
from engine.objectives.contrastive.softmax import ContrastiveLoss
from engine.objectives.contrastive.tiles import inner

R = TypeVar("R", ContrastiveLoss, SigmoidLoss)
_SCALARS = ("loss", "grad_logit_scale", "grad_bias")


@dataclass(frozen=True, kw_only=True)
class Taught:
    """A teacher's embeddings of this rank's pairs."""

    teacher: TeacherConfig
    image: Tensor
    """[rows, E] fp32, L2-normalised."""
    text: Tensor
    """[rows, E] fp32, L2-normalised."""


@torch.no_grad()
def distilled(
    own: R,
    image: Tensor,
    text: Tensor,
    taught: Sequence[Taught],
    *,
    loss: Callable[[Tensor, Tensor], R],
    logit_scale: Tensor,
    **where: Any,
) -> R:
    """`own`, the loss without teachers, plus what they add; its `terms` are the weighted parts of the sum.

    image, text: the student's embeddings [rows, D] of this rank. loss: the job's, of the whole width. logit_scale: σ.
    where: group, tile, variant, row_counts and copies of the losses. Collective as they are.
    """
    result = replace(own, terms={"contrastive_loss": own.loss})
    for one in taught:
        teacher = one.teacher
        if teacher.feature > 0:
            exchange = RowExchange.create(image, where["group"], where["row_counts"])
            result = _plus(result, "distill_feature", teacher.feature, feature_loss(image, text, one, exchange))
        if teacher.interactive > 0:
            result = _plus(result, "distill_interactive", teacher.interactive, interactive_loss(image, text, one, loss))
        if teacher.relational > 0:
            pairs = one.image, one.text
            found = relational_loss(image, text, pairs, logit_scale, teacher.logit_scale, **where)
            result = _plus(result, "distill_relational", teacher.relational, found)
    return result


def feature_loss(image: Tensor, text: Tensor, taught: Taught, exchange: RowExchange) -> Term:
    """The feature loss of this rank's rows among all. Collective."""
    gaps = image - taught.image, text - taught.text
    squares = torch.stack([inner(gap, gap, max(1, len(gap))) for gap in gaps]).sum()
    return Term(
        loss=exchange.sum_(squares) / (2 * exchange.total),
        grad_image=gaps[0] / exchange.total,
        grad_text=gaps[1] / exchange.total,
        grad_logit_scale=squares.new_zeros(()),
    )


def interactive_loss(image: Tensor, text: Tensor, taught: Taught, loss: Callable[[Tensor, Tensor], R]) -> R:
    """The interactive loss, with the gradients of the student's rows. Collective as `loss` is."""
    of_images, of_texts = loss(image, taught.text), loss(taught.image, text)
    names = [name for name in _SCALARS if hasattr(of_images, name)]
    means = {name: (getattr(of_images, name) + getattr(of_texts, name)) / 2 for name in names}
    return replace(of_images, grad_image=of_images.grad_image / 2, grad_text=of_texts.grad_text / 2, **means)


def _plus(result: R, name: str, weight: float, term: Term | R) -> R:
    fields = [field for field in (*_SCALARS, "grad_image", "grad_text") if hasattr(term, field)]
    sums = {field: getattr(result, field) + weight * getattr(term, field) for field in fields}
    before = result.terms.get(name, torch.zeros_like(term.loss))
    return replace(result, terms={**result.terms, name: before + weight * term.loss}, **sums)
