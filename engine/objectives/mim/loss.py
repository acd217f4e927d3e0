"""The masked-feature loss of the MIM stage: minus the mean cosine between student and teacher over masked patches.

Mean over the masked patches of the *global* batch: images have different numbers of them, so the mean of the ranks'
means would weight patches by where they happen to lie (the authors' engine_for_pretraining.py does that).
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from engine.parallel.mesh import Axis

_NORM_FLOOR = 1e-8


def global_masked_count(own: int, data: Axis, device: torch.device) -> Tensor:
    """Masked patches of the global batch, 0-d int64 on the device, from those of this replica's: no host waits for it.
    Collective over the data axis.
    """
    count = torch.full((), own, dtype=torch.int64, device=device)
    dist.all_reduce(count, group=data.group)
    return count


def distillation_loss(predictions: Tensor, targets: Tensor, masked_count: Tensor) -> Tensor:
    """Predictions and teacher features [N, D] of N masked patches -> their share of the global loss, 0-d fp32.

    masked_count: of the global batch, 0-d; the shares of all micro-batches and replicas add up to the loss, and their
    gradients to its gradient. Each norm is floored at 1e-8, so a zero vector has a finite gradient; a batch whose masks
    all ended empty has the loss 0.
    """
    cosine = F.cosine_similarity(predictions.float(), targets.float(), dim=-1, eps=_NORM_FLOOR)
    return -cosine.sum() / masked_count.clamp(min=1)
