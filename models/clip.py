"""What joins the two towers: unit-length embeddings and the logit scale."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEARNED_SCALE_INIT = math.log(1 / 0.07)  # CLIP (arXiv 2103.00020, section 2.5)
LEARNED_SCALE_MAX = math.log(100)
LOGIT_BIAS_INIT = -10.0


def embedding(features: Tensor, frames: int = 1) -> Tensor:
    """Features [M, D] in any dtype -> embeddings fp32 [M / frames, D] of length 1 (x / max(|x|, 1e-12)).

    A clip stands for the mean of its frames' features, which lie together ("the mean of all [CLS] embeddings", paper,
    section 4). The paper leaves open whether frames are normalised before; here they are not: with or without the
    projection the mean is the same then, and one direction is normalised once, as for images.
    """
    features = features.float()
    if frames > 1:
        features = features.unflatten(0, (-1, frames)).mean(dim=1)
    return F.normalize(features, dim=-1)


class LogitScale(nn.Module):
    """The logarithm of the logit scale as a parameter (fp32 under every precision: bf16 cannot hold ln 100)."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.empty(1, dtype=torch.float32))

    def forward(self) -> Tensor:
        """The factor on the cosine similarities, 0-d."""
        return self.log_scale.exp().squeeze(0)


class LogitBias(nn.Module):
    """The bias on the logits of the sigmoid loss (SigLIP, arXiv 2303.15343, section 3.2), fp32, starting at -10."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(1, dtype=torch.float32))

    def forward(self) -> Tensor:
        """The bias, 0-d."""
        return self.bias.squeeze(0)
