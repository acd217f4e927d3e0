"""The attentive probe: one learned query attends to the patch tokens of a frozen tower, then a linear layer.

One cross-attention as in the probes of CAE (arXiv 2202.03026) and AIM (arXiv 2401.08541): tokens through batch norm
without affine, keys and values of them, no projection behind the attention. AdamW, warm-up and a cosine to 0.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.evaluation.ranking import tiles
from engine.evaluation.suite.features import FileRows

_HEAD_WIDTH = 64
_BATCH = 128
_EPOCHS = 50
_RATE = 1e-3
_WEIGHT_DECAY = 0.01
_SEED = 0


class AttentiveProbe(nn.Module):
    """Tokens [M, S, H] -> logits [M, classes]."""

    def __init__(self, width: int, classes: int, draw: torch.Generator):
        super().__init__()
        self.heads = next(heads for heads in range(max(1, width // _HEAD_WIDTH), 0, -1) if width % heads == 0)
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.query = nn.Parameter(torch.empty(width))
        self.keys_values = nn.Linear(width, 2 * width)
        self.classify = nn.Linear(width, classes)
        for weight in (self.query, self.keys_values.weight, self.classify.weight):
            nn.init.normal_(weight, std=0.02, generator=draw)
        nn.init.zeros_(self.keys_values.bias)
        nn.init.zeros_(self.classify.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [M, S, H] -> [M, classes]."""
        normed = self.norm(tokens.flatten(0, 1)).view_as(tokens)
        keys, values = self.keys_values(normed).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query = self.query.view(1, self.heads, 1, -1).expand(len(tokens), -1, -1, -1)
        return self.classify(F.scaled_dot_product_attention(query, keys, values).flatten(1))


def attentive(
    train: FileRows, rows: np.ndarray, labels: np.ndarray, test: FileRows, scored: np.ndarray, classes: int
) -> np.ndarray:
    """Predicted labels of the rows `scored` of `test`, fitted on the rows `rows` of `train`, int64 each."""
    draw = torch.Generator().manual_seed(_SEED)
    batch = min(_BATCH, max(2, len(rows) // 8))
    probe = AttentiveProbe(train[slice(0, 1)].shape[-1], classes, draw)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=_RATE, weight_decay=_WEIGHT_DECAY)
    of_epoch = max(1, len(rows) // batch)
    steps, warm = _EPOCHS * of_epoch, max(1, _EPOCHS * of_epoch // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 * (1 + np.cos(np.pi * step / steps)))
    )
    for _ in range(_EPOCHS):
        order = torch.randperm(len(rows), generator=draw).numpy()
        for at in range(of_epoch):
            chosen = np.sort(order[at * batch : (at + 1) * batch])  # the order within a batch is nothing; on disk it is
            loss = F.cross_entropy(probe(train.pick(rows[chosen]).float()), torch.from_numpy(labels[chosen]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    probe.eval()
    with torch.no_grad():
        found = [probe(test.pick(scored[part]).float()).argmax(dim=1) for part in tiles(len(scored), _BATCH)]
    return torch.cat(found).numpy()
