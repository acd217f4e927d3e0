"""Linear probes: L-BFGS swept over regularisation with a held-out part, and SGD as EVA's references train it."""

import numpy as np
import torch
from torch import nn

from data.errors import DataError

_STRENGTHS = np.logspace(-6, 1, 8)
"""Inverse regularisation C of scikit-learn, which sums the loss over samples; of features of variance 1."""
_HELD_OUT = 0.2
_SEED = 0
_MAX_ITERATIONS = 1000
_EPS = 1e-6


def lbfgs(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, float]:
    """(predicted labels of `test`, chosen C): the C that is best on a fifth of `train`, fitted again on all of it.

    Every feature is shifted and scaled to mean 0 and variance 1 over `train`, as `sgd`'s batch norm does.
    Raises DataError without scikit-learn.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise DataError(f"--probe needs scikit-learn ({error}): pip install 'eva-megatron[eval]'") from None
    mean, deviation = train.mean(axis=0), np.sqrt(train.var(axis=0) + _EPS)
    train, test = (train - mean) / deviation, (test - mean) / deviation
    order = np.random.default_rng(_SEED).permutation(len(train))
    held = order[: max(1, int(len(train) * _HELD_OUT))]
    rest = np.setdiff1d(order, held)
    shares = {}
    for strength in _STRENGTHS:
        fitted = LogisticRegression(C=strength, max_iter=_MAX_ITERATIONS).fit(train[rest], labels[rest])
        shares[float(strength)] = float((fitted.predict(train[held]) == labels[held]).mean())
    best = max(shares, key=lambda strength: (shares[strength], -strength))
    return LogisticRegression(C=best, max_iter=_MAX_ITERATIONS).fit(train, labels).predict(test), best


def sgd(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: int, *, epochs: int = 90, batch: int = 1024
) -> np.ndarray:
    """Predicted labels of `test`: batch norm without affine and a linear layer, SGD with momentum 0.9, no weight decay,
    warm-up and a cosine to 0 (EVA's linear probe, without LARS, which its batch of 16,000 wants).
    """
    draw = torch.Generator().manual_seed(_SEED)
    features, targets = torch.from_numpy(train), torch.from_numpy(labels)
    norm = nn.BatchNorm1d(features.shape[1], affine=False, eps=_EPS)
    layer = nn.Linear(features.shape[1], classes)
    nn.init.normal_(layer.weight, std=0.01, generator=draw)
    nn.init.zeros_(layer.bias)
    steps = epochs * max(1, len(features) // batch)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, momentum=0.9)
    warm = max(1, steps // 9)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 * (1 + np.cos(np.pi * step / steps)))
    )
    done = 0
    while done < steps:
        order = torch.randperm(len(features), generator=draw)
        for start in range(0, max(1, len(features) - batch + 1), batch):
            rows = order[start : start + batch]
            loss = nn.functional.cross_entropy(layer(norm(features[rows])), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            if done == steps:
                break
    norm.eval()
    with torch.no_grad():
        return layer(norm(torch.from_numpy(test))).argmax(dim=1).numpy()
