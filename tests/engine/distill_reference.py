"""What the tests of distillation compare with: the full matrices of student and teachers in float64 under autograd."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config.read import TeacherConfig
from engine.objectives.contrastive.distill.losses import Taught, distilled
from engine.objectives.contrastive.sigmoid import sigmoid_loss
from engine.objectives.contrastive.softmax import contrastive_loss
from tests.engine.loss_reference import Reference, equal_in_some_column, pairs

SCALE, BIAS = 12.0, -5.0
TEACHERS = {
    "feature": [TeacherConfig(path="a", feature=0.7, interactive=0)],
    "interactive": [TeacherConfig(path="a", feature=0, interactive=1.3)],
    "relational": [TeacherConfig(path="a", feature=0, interactive=0, relational=2.0, logit_scale=9.0)],
    "all of two": [
        TeacherConfig(path="a", relational=0.5, logit_scale=20.0),
        TeacherConfig(path="b", feature=0, interactive=0.4, relational=1.5, logit_scale=5.0),
    ],
}
"""What teaches, by name of the case."""


def taught_by(teachers: Sequence[TeacherConfig], rows: int, width: int, own: slice = slice(None)) -> list[Taught]:
    """Made-up embeddings of the teachers, float64; where embeddings are not compared, of another width."""
    found = []
    for number, teacher in enumerate(teachers):
        image, text = pairs(rows, width if teacher.needs_width else width - 7, noise=0.8, seed=5 + number)
        found.append(Taught(teacher=teacher, image=image[own], text=text[own]))
    return found


def result_of(kind: str, image: Tensor, text: Tensor, taught: Sequence[Taught], where: dict[str, Any]) -> Any:
    """What the engine makes of this rank's rows with the loss `kind`."""
    scale = torch.tensor(SCALE, dtype=torch.float64)
    loss: Any = partial(contrastive_loss, logit_scale=scale, **where)
    if kind == "sigmoid":
        loss = partial(sigmoid_loss, logit_scale=scale, logit_bias=BIAS, **where)
    return distilled(loss(image, text), image, text, taught, loss=loss, logit_scale=scale, **where)


def distilled_reference(
    kind: str, image: Tensor, text: Tensor, taught: Sequence[Taught], copies: Tensor | None = None
) -> Reference:
    """The loss `kind` of the whole batch plus what the teachers add; accuracies are not given."""
    scale, bias = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (SCALE, BIAS))
    image, text = (rows.detach().double().requires_grad_() for rows in (image, text))
    own = _softmax if kind == "softmax" else partial(_sigmoid, bias=bias)
    leave_out = partial(_leave_out, copies=copies)
    total = own(leave_out(scale * image @ text.t()))
    for one in taught:
        teacher = one.teacher
        gaps = sum((a - b).pow(2).sum(1).mean() for a, b in ((image, one.image), (text, one.text)) if teacher.feature)
        total = total + teacher.feature * gaps / 2
        if teacher.interactive:
            crossed = (scale * image @ one.text.t(), scale * one.image @ text.t())
            total = total + teacher.interactive * sum(own(leave_out(logits)) for logits in crossed) / 2
        wanted = teacher.logit_scale * one.image @ one.text.t()
        total = total + teacher.relational * _divergence(leave_out(scale * image @ text.t()), leave_out(wanted))
    leaves = [image, text, scale, *([bias] if kind == "sigmoid" else [])]
    gradients = torch.autograd.grad(total, leaves)
    return Reference(
        loss=total.detach(),
        grad_image=gradients[0],
        grad_text=gradients[1],
        grad_logit_scale=gradients[2],
        i2t_top1=None,
        t2i_top1=None,
        grad_bias=gradients[3] if kind == "sigmoid" else None,
    )


def _leave_out(logits: Tensor, copies: Tensor | None) -> Tensor:
    """A finite number that no exponential sees: 0 times minus infinity has no value."""
    return logits if copies is None else logits.masked_fill(equal_in_some_column(copies), -1e4)


def _softmax(logits: Tensor) -> Tensor:
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


def _sigmoid(logits: Tensor, bias: Tensor) -> Tensor:
    signs = 2 * torch.eye(len(logits), dtype=torch.float64) - 1
    return -F.logsigmoid(signs * (logits + bias)).sum() / len(logits)


def _divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean over pairs of torch's KL divergences of rows and of columns."""
    divergence: Callable[..., Tensor] = partial(F.kl_div, reduction="batchmean", log_target=True)
    both = ((logits, wanted), (logits.t(), wanted.t()))
    rows, columns = (divergence(F.log_softmax(s, dim=1), F.log_softmax(t, dim=1)) for s, t in both)
    return (rows + columns) / 2
